"""The config of the tests: seconds on one CPU core, every code path in use.

Not an experiment: 33x33 crops, the tiny network and a bank that wraps around
after a few steps. The data set is 'shapes', written small by the tests.
"""

from configs import common


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(arg, method="u2pl", seed=2)
  config = common.get_base_config()
  config.name = "testing"
  config.seed = options.seed
  config.method = options.method
  config.dataset.name = "shapes"
  config.dataset.root = "data/testing"
  config.dataset.mask_dir = "SegmentationClass"
  config.dataset.image_suffix = ".png"
  config.dataset.shapes.num_labelled = 4
  config.dataset.shapes.num_unlabelled = 16
  config.dataset.shapes.num_val = 4
  config.dataset.shapes.num_test = 0
  config.dataset.labelled_list = "splits/4/labeled.txt"
  config.dataset.unlabelled_list = "splits/4/unlabeled.txt"
  config.dataset.validation_list = "ImageSets/Segmentation/val.txt"
  config.batch.labelled = 4
  config.batch.unlabelled = 4
  config.input.crop_size = (33, 33)
  config.input.num_threads = 2
  config.model.backbone = "tiny"
  config.model.rep_features = 16
  config.schedule.epochs = 3
  config.optimizer.learning_rate = 0.02
  config.optimizer.reference_batch = 4
  config.optimizer.head_multiplier = 1.0
  config.contrastive.num_anchors = 8
  config.contrastive.num_negatives = 4
  config.contrastive.high_rank = 6
  config.contrastive.low_rank = 1
  config.memory_bank.capacity = 40
  config.memory_bank.capacity_class0 = 60
  config.memory_bank.max_keys_per_step = 16
  config.eval.pad_to = (64, 64)
  config.eval.batch = 4
  config.eval.oracle_images = 4
  config.log.every_steps = 2
  config.log.report_images = 2
  return config
