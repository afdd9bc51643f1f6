"""CamVid, 46 of 367 training photographs labelled, 11 classes.

  python -m u2pl_jax.main --config=configs/camvid_46.py
  python -m u2pl_jax.main --config=configs/camvid_46.py:cpu
  python -m u2pl_jax.main --config=configs/camvid_46.py:cpu,method=supervised

`:cpu` trains the tiny backbone from scratch on crops of 129x129 at a fraction
of the updates, which two CPU cores do in well under an hour; docs/camvid.md has
its numbers. The full recipe (ResNet-101, crops of 321x321) wants a GPU and
pretrained weights and has not been run yet.

Needs data/camvid in VOC layout: 480x360 photographs, index masks and the lists
splits/46/{labeled,unlabeled}.txt; override with --config.dataset.root=...
"""

from configs import common


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(arg, method="u2pl", cpu=False, seed=2)
  config = common.get_base_config()
  config.name = "camvid_46"
  config.seed = options.seed
  config.method = options.method
  config.dataset.name = "camvid"
  config.dataset.root = "data/camvid"
  config.dataset.mask_dir = "SegmentationClass"
  config.dataset.labelled_list = "splits/46/labeled.txt"
  config.dataset.unlabelled_list = "splits/46/unlabeled.txt"
  config.dataset.validation_list = "ImageSets/Segmentation/val.txt"
  config.batch.labelled = 8
  config.batch.unlabelled = 8
  config.input.crop_size = (321, 321)
  config.schedule.epochs = 200
  config.schedule.warmup_epochs = 20
  config.optimizer.learning_rate = 0.005
  # 11 classes: the published window [3, 20) ends at the last class.
  config.contrastive.high_rank = 11
  # All photographs have this size.
  config.eval.pad_to = (360, 480)
  config.eval.batch = 8
  config.eval.every_epochs = 5
  config.checkpoint.every_epochs = 5
  config.eval.oracle_images = 64
  if options.cpu:
    config.name += "_cpu"
    config.model.backbone = "tiny"
    config.model.rep_features = 64
    config.input.crop_size = (129, 129)
    config.input.num_threads = 2
    config.schedule.epochs = 40
    config.schedule.warmup_epochs = 20
    # The feature map of a crop is 17x17.
    config.model.aspp_rates = (2, 4, 6)
    # As in configs/shapes.py, and for the same reason.
    config.strong.mix_probability = 1.0
    config.optimizer.learning_rate = 0.02
    config.optimizer.head_multiplier = 1.0
    config.contrastive.num_anchors = 64
    config.memory_bank.capacity = 2000
    config.memory_bank.capacity_class0 = 2000
    config.memory_bank.max_keys_per_step = 64
    config.log.every_steps = 10
  if options.method != "u2pl":
    config.name += f"_{options.method}"
  return config
