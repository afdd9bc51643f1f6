"""Your own images and masks.

  python -m u2pl_jax.main --config=configs/folder.py:cpu
  python -m u2pl_jax.main --config=configs/folder.py --config.dataset.root=...
  python -m u2pl_jax.main --config=configs/folder.py:method=supervised

Needs data/own, or another folder named by --config.dataset.root, with

  images/          photographs: .jpg, .png, ... also mixed
  masks/           <id>.png, a class number in every pixel, 255 for none
  classes.txt      one class a line, in the order of the numbers
  labelled.txt     ids of the images that have masks, one a line
  unlabelled.txt   ids of the images that have none
  validation.txt   ids of the images, with masks, that judge the network

docs/datasets.md has what else is possible: colour masks, "all other images are
unlabelled" in place of a list. scripts/prepare_data.py folder draws a list.

The recipe is the paper's for PASCAL VOC with a longer warm-up and crops of 321:
80 epochs of (unlabelled images // 8) updates of 8 + 8 images, ResNet-50. It
is meant for one GPU and ImageNet weights
(--config.model.pretrained=resnet50.npz). `cpu` trains the tiny backbone from
scratch on crops of 129x129, 40 epochs, 20 of them warm-up, on two CPU cores:
enough to see the whole way, not a good network. There is no number to expect:
compare with method=supervised, which takes as many updates.
"""

from configs import common


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(
    arg, method="u2pl", cpu=False, backbone="resnet50", seed=2
  )
  config = common.get_base_config()
  config.name = "folder"
  config.seed = options.seed
  config.method = options.method
  config.model.backbone = options.backbone
  config.dataset.name = "folder"
  config.dataset.root = "data/own"
  config.dataset.image_dir = "images"
  config.dataset.mask_dir = "masks"
  config.dataset.image_suffix = ""
  config.dataset.classes_file = "classes.txt"
  config.dataset.labelled_list = "labelled.txt"
  config.dataset.unlabelled_list = "unlabelled.txt"
  config.dataset.validation_list = "validation.txt"
  config.batch.labelled = 8
  config.batch.unlabelled = 8
  config.input.crop_size = (321, 321)
  # With few images an epoch is short, and one is no start for a teacher.
  config.schedule.warmup_epochs = 20
  # How many classes there are is only known with the data.
  config.contrastive.low_rank = 0
  config.contrastive.high_rank = 0
  # Images may have any sizes.
  config.eval.protocol = "whole"
  config.eval.batch = 8
  config.eval.every_epochs = 5
  config.checkpoint.every_epochs = 5
  if options.cpu:
    common.apply_cpu(config)
  if options.method != "u2pl":
    config.name += f"_{options.method}"
  if options.backbone != "resnet50":
    config.name += f"_{options.backbone}"
  return config
