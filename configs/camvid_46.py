"""CamVid, 46 of 367 training photographs labelled, 11 classes.

  python -m u2pl_jax.main --config=configs/camvid_46.py
  python -m u2pl_jax.main --config=configs/camvid_46.py:cpu
  python -m u2pl_jax.main --config=configs/camvid_46.py:cpu,method=supervised

A row of configs/camvid.py, which says what it needs and takes: 8 000 updates,
1 600 with `cpu`. With `cpu`, whole photographs, seed 2: 29.8 mIoU for U2PL and
32.4 for labels alone (docs/camvid.md).
"""

from configs import camvid, common


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  return camvid.row("46", common.parse_arg(arg, **camvid.OPTIONS))
