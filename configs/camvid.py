"""CamVid: 367 training and 101 validation photographs, 480x360, 11 classes.

  python -m u2pl_jax.main --config=configs/camvid.py:split=92
  python -m u2pl_jax.main --config=configs/camvid.py:split=92,method=supervised
  python -m u2pl_jax.main --config=configs/camvid.py:split=92,cpu

  split  labelled  unlabelled  steps an epoch  updates  with cpu
  23           23         344              43    8 600     1 720
  46           46         321              40    8 000     1 600
  92           92         275              34    6 800     1 360
  183         183         184              23    4 600       920

200 epochs, 20 of them warm-up, batches of 8 + 8. The full recipe (ResNet-101,
crops of 321x321) wants a GPU and ImageNet weights
(--config.model.pretrained=resnet101.npz) and has not been run yet; no paper has
these rows. `cpu` trains the tiny backbone from scratch on crops of 129x129, 40
epochs, 20 of them warm-up, which two CPU cores do in well under an hour;
docs/camvid.md has its numbers on 46 labelled photographs.

Needs data/camvid in VOC layout: photographs, index masks and the lists
splits/<split>/{labeled,unlabeled}.txt; override with --config.dataset.root=...
More splits: scripts/prepare_data.py camvid, docs/datasets.md.
"""

from configs import common

OPTIONS = {"method": "u2pl", "cpu": False, "seed": 2}
SPLITS = {name: name for name in ("23", "46", "92", "183")}


def row(split, options):
  """The config of one split.

  Args:
    split: see `common.apply_split`.
    options: the values of OPTIONS.
  """
  config = common.get_base_config()
  config.name = "camvid"
  common.apply_split(config, split, SPLITS)
  config.seed = options.seed
  config.method = options.method
  config.dataset.name = "camvid"
  config.dataset.root = "data/camvid"
  config.dataset.mask_dir = "SegmentationClass"
  config.dataset.validation_list = "ImageSets/Segmentation/val.txt"
  config.batch.labelled = 8
  config.batch.unlabelled = 8
  config.input.crop_size = (321, 321)
  config.schedule.epochs = 200
  config.schedule.warmup_epochs = 20
  config.optimizer.learning_rate = 0.005
  config.optimizer.reference_batch = 8
  # 11 classes: the published window [3, 20) ends at the last class.
  config.contrastive.high_rank = 11
  # All photographs have this size.
  config.eval.pad_to = (360, 480)
  config.eval.batch = 8
  config.eval.every_epochs = 5
  config.checkpoint.every_epochs = 5
  config.eval.oracle_images = 64
  if options.cpu:
    common.apply_cpu(config)
  if options.method != "u2pl":
    config.name += f"_{options.method}"
  return config


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(arg, split="46", **OPTIONS)
  return row(options.split, options)
