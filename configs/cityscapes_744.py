"""Cityscapes, 744 labelled and 2 231 unlabelled images.

  python -m u2pl_jax.main --config=configs/cityscapes_744.py
  python -m u2pl_jax.main --config=configs/cityscapes_744.py:method=supervised
  python -m u2pl_jax.main --config=configs/cityscapes_744.py:released

with --config.model.pretrained=resnet101.npz: ImageNet weights, docs/weights.md.

The row of configs/cityscapes.py that the published code ships; the others are
there. The authors report 76.47 mIoU for U2PL and 74.43 for labels alone
(ResNet-101, sliding windows of 769, 8 GPUs of 32 GB); it has not been run with
this code yet. 200 epochs of 139 steps, 27 800 updates of 16 + 16 images.

Needs data/cityscapes with leftImg8bit and gtFine, and the published lists in
data/cityscapes/splits/u2pl (scripts/prepare_data.py cityscapes); override with
--config.dataset.root=...
"""

from configs import cityscapes, common


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  return cityscapes.row("744", common.parse_arg(arg, **common.PAPER_OPTIONS))
