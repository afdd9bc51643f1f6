"""The embedded default: synthetic images that need no download, on a CPU.

  python -m u2pl_jax.main --config=configs/shapes.py
  python -m u2pl_jax.main --config=configs/shapes.py:method=supervised

24 labelled and 500 unlabelled images of 64x64 with 7 classes, one of them rare,
are drawn into data/shapes on first use. The tiny network starts from random
weights. Both methods take the same number of updates. README.md has the results
of three seeds; they are those of the last step on the test images, and settings
were chosen on the validation images
(--config.dataset.validation_list=ImageSets/Segmentation/val.txt).
"""

from configs import common


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(arg, method="u2pl", seed=0)
  config = common.get_base_config()
  config.name = "shapes"
  config.seed = options.seed
  config.method = options.method
  config.dataset.name = "shapes"
  config.dataset.root = "data/shapes"
  config.dataset.mask_dir = "SegmentationClass"
  config.dataset.image_suffix = ".png"
  config.dataset.labelled_list = "splits/24/labeled.txt"
  config.dataset.unlabelled_list = "splits/24/unlabeled.txt"
  config.dataset.validation_list = "ImageSets/Segmentation/test.txt"
  config.batch.labelled = 8
  config.batch.unlabelled = 8
  config.input.crop_size = (65, 65)
  config.input.scale_range = (0.7, 1.4)
  config.input.num_threads = 2
  config.model.backbone = "tiny"
  config.model.rep_features = 32
  # The feature map of a crop is 9x9 at output stride 8.
  config.model.aspp_rates = (1, 2, 3)
  # 62 steps an epoch.
  config.schedule.epochs = 24
  config.schedule.warmup_epochs = 6
  # With the published coin (0.5) half of the steps teach the student what it
  # already says, and early mistakes of this small network stay: U2PL ended 8
  # points below the labels alone. Mixing every step turned that around.
  config.strong.mix_probability = 1.0
  config.optimizer.learning_rate = 0.1
  config.optimizer.reference_batch = 8
  config.optimizer.head_multiplier = 1.0
  config.optimizer.weight_decay = 5e-4
  config.contrastive.num_anchors = 64
  config.contrastive.low_rank = 2
  config.contrastive.high_rank = 7
  config.memory_bank.capacity = 2000
  config.memory_bank.capacity_class0 = 2000
  config.memory_bank.max_keys_per_step = 64
  config.eval.pad_to = (64, 64)
  config.eval.batch = 20
  config.eval.every_epochs = 4
  config.eval.oracle_images = 100
  config.checkpoint.every_epochs = 4
  config.log.every_steps = 31
  if options.method != "u2pl":
    config.name += f"_{options.method}"
  return config
