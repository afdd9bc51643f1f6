"""PASCAL VOC 2012 with SBD: 10 582 training and 1 449 validation images.

  python -m u2pl_jax.main --config=configs/voc.py:split=732
  python -m u2pl_jax.main --config=configs/voc.py:split=732,method=supervised
  python -m u2pl_jax.main --config=configs/voc.py:split=732,released
  python -m u2pl_jax.main --config=configs/voc.py:split=732,photometric
  python -m u2pl_jax.main --config=configs/voc.py:split=cps_1_16

with --config.model.pretrained=resnet101.npz: ImageNet weights, docs/weights.md.
80 epochs, one of them warm-up, batches of 16 + 16, crops of 513, cross-entropy,
learning rate 0.001 and ten times that outside the encoder. Meant for 4 GPUs of
32 GB, as published, or one of 80 GB; not run with this code yet.

  split     labelled  fine  steps an epoch  updates  labels alone   U2PL
  92              92  100%             655   52 400         45.77  67.98
  183            183  100%             650   52 000         54.92  69.15
  366            366  100%             638   51 040         65.88  73.66
  732            732  100%             615   49 200         71.69  76.16
  1464         1 464  100%             570   45 600         72.50  79.49

  662            662  100%             620   49 600         67.87  77.21
  1323         1 323  100%             578   46 240         71.55  79.01
  2646         2 646   55%             496   39 680         75.80  79.30
  5291         5 291   28%             330   26 400         77.13  80.50

  cps_1_16       662   14%             620   49 600             -      -
  cps_1_8      1 323   15%             578   46 240             -      -
  cps_1_4      2 646   15%             496   39 680             -      -

The last two columns are the authors': mIoU in percent, ResNet-101, the teacher
at its best epoch, centre crops of 513 whose padding counts as background (what
:released computes; without it, whole images and no padding). Their labels alone
saw 80 epochs of the labelled images; method=supervised takes as many updates as
U2PL.

`fine` is the share of labelled images among the 1 464 that VOC itself
annotated; the others have SBD's coarser masks. The first group draws from the
1 464 only. The second and the third share sizes and the name "blender", but
U2PL's takes the fine ones first and CPS's is random: two benchmarks, whose
numbers must not be compared. The log says which one a run is.

:photometric shows the student other colours than the teacher (jitter, grey,
blur), as FixMatch and UniMatch do and the paper does not.

The data and the lists: scripts/prepare_data.py voc, docs/datasets.md.
"""

from configs import common

_U2PL = ("92", "183", "366", "732", "1464", "662", "1323", "2646", "5291")
_CPS = ("1_16", "1_8", "1_4")
SPLITS = {name: f"u2pl/{name}" for name in _U2PL} | {
  f"cps_{name}": f"unimatch/{name}" for name in _CPS
}


def row(split, options):
  """The config of one split.

  Args:
    split: see `common.apply_split`.
    options: the values of `common.PAPER_OPTIONS`.
  """
  config = common.get_base_config()
  config.name = "voc"
  common.apply_split(config, split, SPLITS)
  config.dataset.validation_list = "splits/u2pl/val.txt"
  common.apply_paper_options(config, options, num_gpus=4)
  return config


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(arg, split="1464", **common.PAPER_OPTIONS)
  return row(options.split, options)
