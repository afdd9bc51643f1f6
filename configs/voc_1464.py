"""PASCAL VOC 2012, 1 464 labelled images of the fine set, 9 118 unlabelled.

  python -m u2pl_jax.main --config=configs/voc_1464.py
  python -m u2pl_jax.main --config=configs/voc_1464.py:method=supervised
  python -m u2pl_jax.main --config=configs/voc_1464.py:released
  python -m u2pl_jax.main --config=configs/voc_1464.py:backbone=resnet50

The paper reports 79.49 mIoU for U2PL (ResNet-101, published code, centre crop
513, 4 GPUs); it has not been run with this code yet. 80 epochs of 569 steps,
45.5 k updates of 16 + 16 images.

Needs data/VOC2012 with JPEGImages and SegmentationClassAug, and the published
lists in data/VOC2012/splits/1464; override with --config.dataset.root=...
"""

from configs import common


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(
    arg, method="u2pl", released=False, backbone="resnet101", seed=2
  )
  config = common.get_base_config()
  config.name = "voc_1464"
  config.seed = options.seed
  config.method = options.method
  config.model.backbone = options.backbone
  config.dataset.labelled_list = "splits/1464/labeled.txt"
  config.dataset.unlabelled_list = "splits/1464/unlabeled.txt"
  config.dataset.validation_list = "splits/val.txt"
  if options.released:
    config.name += "_released"
    config.quirks = ",".join(common.RELEASED_QUIRKS)
    config.eval.protocol = "center_crop"
    # The code says 1, of which DDP on 4 GPUs leaves a quarter in the gradient.
    config.contrastive.weight = 0.25
    # Its keys are few (about 2 000 a step over all classes): a cap never bites.
    config.memory_bank.max_keys_per_step = 8192
  if options.method != "u2pl":
    config.name += f"_{options.method}"
  if options.backbone != "resnet101":
    config.name += f"_{options.backbone}"
  return config
