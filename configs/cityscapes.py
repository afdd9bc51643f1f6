"""Cityscapes: 2 975 training images, 500 validation, 2048x1024, 19 classes.

  python -m u2pl_jax.main --config=configs/cityscapes.py:split=186
  python -m u2pl_jax.main --config=configs/cityscapes.py:split=186,released
  python -m u2pl_jax.main --config=configs/cityscapes.py:split=186,photometric
  python -m u2pl_jax.main --config=configs/cityscapes.py:method=supervised
  python -m u2pl_jax.main --config=configs/cityscapes.py:split=unimatch_1_16

with --config.model.pretrained=resnet101.npz: ImageNet weights, docs/weights.md.
200 epochs, 20 of them warm-up, batches of 16 + 16, crops of 769, OHEM and an
auxiliary head, learning rate 0.01 everywhere. Meant for 8 GPUs of 32 GB, as
published; not run with this code yet.

  split          labelled  steps an epoch  updates  labels alone   U2PL  + AEL
  186                 186             174   34 800         65.74  70.30  74.90
  372                 372             163   32 600         72.53  74.37  76.48
  744                 744             139   27 800         74.43  76.47  78.51
  1488              1 488              93   18 600         77.83  79.05  79.12

  unimatch_1_30       100             180   36 000             -      -      -
  unimatch_1_16       186             174   34 800             -      -      -
  unimatch_1_8        372             163   32 600             -      -      -
  unimatch_1_4        744             139   27 800             -      -      -
  unimatch_1_2      1 488              93   18 600             -      -      -

The last three columns are the authors': mIoU in percent, ResNet-101, sliding
windows of 769 with a stride of 2/3; "+ AEL" is another method, not here. The
paper evaluates whole images by those windows; here each is one input of
1024x2048, and with :released the centre crop that the published code looks at
while it trains. After the training, the number to compare with the table:

  python -m u2pl_jax.evaluate --checkpoint=runs/cityscapes_186
    --protocol=sliding_window --output=evaluations/cityscapes_186

Labels alone saw 200 epochs of the labelled images, on 4 GPUs;
method=supervised takes as many updates as U2PL. The second group has the same
sizes and other images.

Masks are read from ..._gtFine_labelIds.png, as Cityscapes ships them. For files
with train ids: --config.dataset.mask_suffix=_gtFine_labelTrainIds.png
--config.dataset.mask_format=index

:photometric shows the student other colours than the teacher (jitter, grey,
blur), as FixMatch and UniMatch do and the paper does not.

The data and the lists: scripts/prepare_data.py cityscapes, docs/datasets.md.
"""

from configs import common

SPLITS = {name: f"u2pl/{name}" for name in ("186", "372", "744", "1488")} | {
  f"unimatch_{name}": f"unimatch/{name}"
  for name in ("1_30", "1_16", "1_8", "1_4", "1_2")
}


def row(split, options):
  """The config of one split.

  Args:
    split: see `common.apply_split`.
    options: the values of `common.PAPER_OPTIONS`.
  """
  config = common.get_base_config()
  config.name = "cityscapes"
  common.apply_split(config, split, SPLITS)
  config.dataset.name = "cityscapes"
  config.dataset.root = "data/cityscapes"
  config.dataset.image_dir = "leftImg8bit"
  config.dataset.mask_dir = "gtFine"
  config.dataset.image_suffix = "_leftImg8bit.png"
  config.dataset.mask_suffix = "_gtFine_labelIds.png"
  config.dataset.mask_format = "cityscapes_label_ids"
  config.dataset.validation_list = "splits/u2pl/val.txt"
  config.input.crop_size = (769, 769)
  # PNG photographs decode three times as fast in processes of their own.
  config.input.num_workers = 4
  config.schedule.epochs = 200
  config.schedule.warmup_epochs = 20
  config.optimizer.learning_rate = 0.01
  config.optimizer.head_multiplier = 1.0
  config.optimizer.weight_decay = 5e-4
  config.supervised.loss = "ohem"
  # 100 000 of the two images of each of 8 GPUs.
  config.supervised.ohem_min_kept = 800_000
  config.supervised.aux_weight = 0.4
  # 19 classes: the published window [3, 20) ends at the last one.
  config.contrastive.high_rank = 19
  # All images have this size.
  config.eval.pad_to = (1024, 2048)
  config.eval.batch = 8
  common.apply_paper_options(config, options, num_gpus=8)
  if options.released:
    # The published config says 0; the paper and its author say 20.
    config.schedule.warmup_epochs = 0
  return config


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(arg, split="744", **common.PAPER_OPTIONS)
  return row(options.split, options)
