"""PASCAL VOC 2012, 1 464 labelled images of the fine set, 9 118 unlabelled.

  python -m u2pl_jax.main --config=configs/voc_1464.py
  python -m u2pl_jax.main --config=configs/voc_1464.py:method=supervised
  python -m u2pl_jax.main --config=configs/voc_1464.py:released
  python -m u2pl_jax.main --config=configs/voc_1464.py:backbone=resnet50

with --config.model.pretrained=resnet101.npz: ImageNet weights, docs/weights.md.

The row of configs/voc.py that the published code ships; the others are there.
The authors report 79.49 mIoU for U2PL and 72.50 for labels alone (ResNet-101,
centre crops of 513 whose padding counts as background, 4 GPUs of 32 GB); it has
not been run with this code yet. 80 epochs of 570 steps, 45 600 updates of
16 + 16 images.

Needs data/VOC2012 with JPEGImages and SegmentationClassAug, and the published
lists in data/VOC2012/splits/u2pl (scripts/prepare_data.py voc); override with
--config.dataset.root=...
"""

from configs import common, voc


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  return voc.row("1464", common.parse_arg(arg, **common.PAPER_OPTIONS))
