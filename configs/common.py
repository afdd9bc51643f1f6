"""Every key of every config, and what experiment files share.

The values here are the paper's PASCAL VOC recipe; an experiment file changes
what differs. Quantities with "batch" are global: they do not depend on the
number of devices.
"""

from collections.abc import Mapping

import ml_collections

RELEASED_QUIRKS = (
  "batch_onehot",
  "class_index_mixup",
  "own_label_negatives",
  "teacher_alias",
  "teacher_cold_start",
  "zero_padding_label",
  "padded_center_crop",
)


def get_base_config() -> ml_collections.ConfigDict:
  """The complete config with the defaults of the VOC recipe."""
  config = ml_collections.ConfigDict()
  # Names the run: the default workdir is runs/<name>.
  config.name = "base"
  # Root of all randomness: initialisation, input order, augmentation, draws.
  config.seed = 2
  # 'u2pl', or 'supervised': the same number of updates from labels alone.
  config.method = "u2pl"
  # Departures of the published code to reproduce; see docs/quirks.md. Empty is
  # the paper. A comma-separated string, so that the command line can set it.
  config.quirks = ""

  # -- Data ------------------------------------------------------------------
  config.dataset = dataset = ml_collections.ConfigDict()
  # Class names, palette and pixel statistics: 'voc', 'cityscapes', 'camvid',
  # 'shapes', or 'folder' for your own data with the classes of classes_file.
  dataset.name = "voc"
  # Folder, local or gs://. All paths below are relative to it unless absolute.
  dataset.root = "data/VOC2012"
  # Image <image_dir>/<id><image_suffix> and mask <mask_dir>/<id><mask_suffix>;
  # the suffix '' takes whatever image file has that name (.jpg, .JPG, .png).
  dataset.image_dir = "JPEGImages"
  dataset.mask_dir = "SegmentationClassAug"
  dataset.image_suffix = ".jpg"
  dataset.mask_suffix = ".png"
  # What pixels of masks mean: 'index', class ids; 'cityscapes_label_ids', the
  # ids in *_gtFine_labelIds.png; 'colours', the colours of the classes.
  dataset.mask_format = "index"
  # For 'folder' alone: text file with one class a line, 'name' or 'name R G B',
  # and perhaps 'ignore R G B', a colour that belongs to no class.
  dataset.classes_file = ""
  # Text files with one image id (or "image mask") a line.
  dataset.labelled_list = ""
  dataset.unlabelled_list = ""
  dataset.validation_list = ""
  # In place of unlabelled_list: a folder, all of whose images that are in
  # neither of the other lists are the unlabelled ones.
  dataset.unlabelled_dir = ""
  # Value in the masks that belongs to no class.
  dataset.ignore_label = 255
  # Pixel statistics per channel, RGB on the 0..255 scale; (): the data set's.
  dataset.mean = ()
  dataset.std = ()
  # Where images and masks are read: 'files', or 'tfds', the shards that
  # scripts/write_tfds.py made of them in tfds_dir.
  dataset.source = "files"
  dataset.tfds_dir = "tfds"
  # For dataset.name='shapes' alone: how many images of each kind are drawn into
  # dataset.root on first use, and the seed of the world.
  dataset.shapes = shapes = ml_collections.ConfigDict()
  shapes.seed = 0
  shapes.num_labelled = 24
  shapes.num_unlabelled = 500
  shapes.num_val = 100
  shapes.num_test = 200

  # -- Global batch and input --------------------------------------------------
  config.batch = batch = ml_collections.ConfigDict()
  # Labelled and unlabelled images of one update, over all devices.
  batch.labelled = 16
  batch.unlabelled = 16
  # Parts of that batch that go through the network one after another, to save
  # memory. Only batch normalisation sees them: docs/memory.md.
  batch.microbatches = 1

  config.input = inputs = ml_collections.ConfigDict()
  # Height and width of the random crop; any size from 33 up, odd ones fit best.
  inputs.crop_size = (513, 513)
  # Factors of the random resize: half of the draws below 1, half above.
  inputs.scale_range = (0.5, 2.0)
  # Probability of a horizontal flip.
  inputs.flip_probability = 0.5
  # Worker processes that decode and augment; 0 uses threads of this process.
  # For JPEG threads do; PNG photographs decode three times as fast in workers.
  inputs.num_workers = 0
  # Threads (per process) and batches held ready.
  inputs.num_threads = 8
  inputs.prefetch = 4
  # When a training image or its mask turns out to be missing or unreadable:
  # 'fail', the run ends and says which; 'skip', the next image of the list
  # takes its place. Evaluations always fail. See docs/own_data.md.
  inputs.on_bad_record = "fail"
  # With 'skip': more different ones than this end the run all the same.
  inputs.max_bad_records = 10

  # -- Network -----------------------------------------------------------------
  config.model = model = ml_collections.ConfigDict()
  # resnet18, resnet34, resnet50, resnet101, resnet152, tiny.
  model.backbone = "resnet101"
  # 'deep' (three 3x3 convolutions, the published network) or 'conv7'.
  model.stem = "deep"
  # 'deeplabv3plus' or 'deeplabv3'.
  model.head = "deeplabv3plus"
  # 8 or 16: how far the encoder reduces the resolution.
  model.output_stride = 8
  # Dilations of the last stage times 2, 2, 4.
  model.multi_grid = True
  # Dilations of the three 3x3 branches of ASPP.
  model.aspp_rates = (12, 24, 36)
  # Width of the representations that are contrasted.
  model.rep_features = 256
  # Probability of dropping a channel in the heads.
  model.dropout = 0.1
  # 'float32' or 'bfloat16': type of the convolutions. All else is float32.
  model.dtype = "float32"
  # Recompute the encoder's blocks in the backward pass: less memory, more time.
  model.remat = False
  # Weights to start from, '' for none: a .pth, or a .npz made from one by
  # scripts/convert_weights.py, of an encoder or of a whole network.
  model.pretrained = ""

  # -- Schedule and optimiser --------------------------------------------------
  config.schedule = schedule = ml_collections.ConfigDict()
  # An epoch is one pass over the *unlabelled* images, whatever the method.
  schedule.epochs = 80
  # Epochs from labels alone before the teacher teaches.
  schedule.warmup_epochs = 1
  # An epoch has (unlabelled images + reference_devices - 1) // batch updates:
  # the published sampler fills its list up to a multiple of its GPUs, and then
  # drops the last partial batch. 4 or 8 gives the published number of updates;
  # it says nothing about the devices of this run.
  schedule.reference_devices = 1

  config.optimizer = optimizer = ml_collections.ConfigDict()
  # Of the encoder at step 0.
  optimizer.learning_rate = 0.001
  # The batch.labelled that learning_rate is meant for. Another one scales it in
  # proportion, as the published code asks for; the log has the result.
  optimizer.reference_batch = 16
  # How the rate falls: 'poly', with (1 - step / steps) ** poly_power; 'cosine',
  # half a wave to 0; 'multistep', times decay_factor at every milestone;
  # 'plateau', times decay_factor where eval/miou no longer rises.
  optimizer.schedule = "poly"
  optimizer.poly_power = 0.9
  optimizer.decay_factor = 0.1
  # Of 'multistep': shares of the updates.
  optimizer.milestones = (0.6, 0.8)
  # 'plateau' reduces the rate after this many evaluations in a row of which
  # none beat the last better one by more than `threshold` (absolute, mIoU from
  # 0 to 1). After `reductions` of them it stops the run instead. Evaluations
  # within the warm-up do not count. The best step is then the first one within
  # `threshold` of the highest mIoU.
  optimizer.plateau = plateau = ml_collections.ConfigDict()
  plateau.patience = 10
  plateau.threshold = 0.001
  plateau.reductions = 2
  # Learning rate of everything outside the encoder, relative to it.
  optimizer.head_multiplier = 10.0
  optimizer.momentum = 0.9
  # On all parameters, norms and biases included, as published.
  optimizer.weight_decay = 1e-4

  # -- The method --------------------------------------------------------------
  config.supervised = supervised = ml_collections.ConfigDict()
  # 'ce' or 'ohem'.
  supervised.loss = "ce"
  # OHEM keeps pixels whose true class is below this probability ...
  supervised.ohem_threshold = 0.7
  # ... and at least this many of the global batch; 0 turns mining off.
  supervised.ohem_min_kept = 100_000
  # Weight of the auxiliary head's loss; 0 builds no auxiliary head.
  supervised.aux_weight = 0.0

  config.strong = strong = ml_collections.ConfigDict()
  # 'cutmix', 'cutout', 'classmix' or 'none'.
  strong.mix = "cutmix"
  # One coin a step decides for the whole batch.
  strong.mix_probability = 0.5
  # Probability that the student sees an unlabelled image in other colours than
  # the teacher (jitter, grey, blur, as below). 0, as published: never, and the
  # step does not contain it; 1 is the habit of FixMatch, UniMatch and others.
  strong.photometric = 0.0
  # Largest change of brightness, contrast and saturation (as factors 1 +- x)
  # and of hue (in turns), and the probability that there is any.
  strong.jitter = (0.5, 0.5, 0.5, 0.25)
  strong.jitter_probability = 0.8
  strong.grey_probability = 0.2
  # Gaussian blur with a standard deviation in pixels between these two.
  strong.blur_probability = 0.5
  strong.blur_sigma = (0.1, 2.0)

  config.reliability = reliability = ml_collections.ConfigDict()
  # Percent of the pixels that are unreliable at the start (alpha_0) ...
  reliability.alpha0 = 20.0
  # ... falling linearly to 0, once per 'epoch' (published) or 'step'.
  reliability.decay = "epoch"

  config.unsupervised = unsupervised = ml_collections.ConfigDict()
  # Of the cross-entropy with the pseudo labels that were kept.
  unsupervised.weight = 1.0

  config.contrastive = contrastive = ml_collections.ConfigDict()
  # The paper's value (issue 22 upstream). The published code says 1, of which
  # its gradients see 1 / (number of GPUs): see docs/quirks.md.
  contrastive.weight = 0.1
  # Anchors per class and negatives per anchor. (The paper's text has them the
  # other way round; the published code and its author say 256 and 50.)
  contrastive.num_anchors = 256
  contrastive.num_negatives = 50
  contrastive.temperature = 0.5
  # A labelled pixel of another class is a negative if the class ranks below
  # low_rank in the teacher's order; an unlabelled unreliable one if it ranks in
  # [low_rank, high_rank). At most the number of classes. Both 0: chosen by the
  # number of classes, and the log says what.
  contrastive.low_rank = 3
  contrastive.high_rank = 20
  # The teacher's probability of its class must be above this for an anchor ...
  contrastive.anchor_min_probability = 0.3
  # ... and below this for a negative (1: no condition, as published).
  contrastive.negative_max_probability = 1.0

  config.memory_bank = bank = ml_collections.ConfigDict()
  # Keys that each queue holds; class 0 has its own size.
  bank.capacity = 30_000
  bank.capacity_class0 = 50_000
  # Keys of one class that enter in one step, a random subset. The paper's rule
  # finds about 43 000 a step at this recipe, more than a queue holds, so that
  # without the cap the bank would have no memory. 0: no cap, exact FIFO.
  bank.max_keys_per_step = 512
  # 'float32', or 'bfloat16': half the memory and half of what travels between
  # devices when keys enter. All maths with them is float32.
  bank.dtype = "float32"

  config.sharding = sharding = ml_collections.ConfigDict()
  # Where the keys lie: 'replicated', all of them on every device, or 'classes',
  # each device its share of the queues, which lie one after another. The same
  # numbers either way; 'classes' saves memory and moves more between devices.
  sharding.memory_bank = "replicated"

  config.teacher = teacher = ml_collections.ConfigDict()
  # Weight of the old average: min(1 - 1 / (updates + 1), ema_decay).
  teacher.ema_decay = 0.99

  # -- Evaluation, checkpoints, output -----------------------------------------
  config.eval = evaluation = ml_collections.ConfigDict()
  # 'padded': whole images in one static shape, padding ignored; 'whole': whole
  # images, one compilation per size; 'center_crop': published protocol of VOC,
  # needs the quirk padded_center_crop; 'sliding_window': published protocol of
  # Cityscapes. See docs/evaluation.md.
  evaluation.protocol = "padded"
  # Shape of 'padded' and 'center_crop'.
  evaluation.pad_to = (513, 513)
  # Of 'sliding_window': height and width, and the step from one window to the
  # next as a share of them.
  evaluation.window = (769, 769)
  evaluation.stride = 2 / 3
  # Images at once, over all devices.
  evaluation.batch = 16
  evaluation.every_epochs = 1
  # Unlabelled images whose hidden masks measure the pseudo labels (metrics
  # named oracle/); read by nothing else. 0 never opens such a mask.
  evaluation.oracle_images = 0

  config.checkpoint = checkpoint = ml_collections.ConfigDict()
  # Also saved at the end and on a new best mIoU.
  checkpoint.every_epochs = 1
  # Latest ones to keep, beside the best.
  checkpoint.keep = 2

  config.log = log = ml_collections.ConfigDict()
  # Steps between lines of metrics.jsonl and of the log.
  log.every_steps = 50
  # Images drawn in the report.
  log.report_images = 8
  # Epochs between pictures of a few validation images (image | truth |
  # prediction | entropy) in TensorBoard and Weights & Biases; 0 for none.
  log.images_every_epochs = 10
  # Weights & Biases project that gets the metrics too, '' for none. Needs the
  # package wandb; its WANDB_* environment variables apply.
  log.wandb_project = ""
  return config


# Arguments of the published rows, with their defaults.
PAPER_OPTIONS = {
  "method": "u2pl",
  "paper": False,
  "released": False,
  "photometric": False,
  "backbone": "resnet101",
  "seed": 2,
}


def apply_paper_options(
  config: ml_collections.ConfigDict,
  options: ml_collections.ConfigDict,
  *,
  num_gpus: int,
) -> None:
  """Turns the recipe of the paper into the row that was asked for.

  Args:
    config: the recipe, its crop size set; changed in place, its name too.
    options: the values of PAPER_OPTIONS.
    num_gpus: that the published run had.

  Raises:
    ValueError: both `paper` and `released`.
  """
  if options.paper and options.released:
    raise ValueError("config arguments paper and released: choose one")
  config.seed = options.seed
  config.method = options.method
  config.model.backbone = options.backbone
  config.schedule.reference_devices = num_gpus
  if options.released:
    config.name += "_released"
    config.quirks = ",".join(RELEASED_QUIRKS)
    config.eval.protocol = "center_crop"
    config.eval.pad_to = config.input.crop_size
    # The code says 1, of which DDP leaves one share in the gradient.
    config.contrastive.weight = 1 / num_gpus
    # Its keys are few (about 2 000 a step over all classes): a cap never bites.
    config.memory_bank.max_keys_per_step = 8192
  if options.photometric:
    config.name += "_photometric"
    config.strong.photometric = 1.0
  if options.method != "u2pl":
    config.name += f"_{options.method}"
  if options.backbone != "resnet101":
    config.name += f"_{options.backbone}"


def apply_cpu(config: ml_collections.ConfigDict) -> None:
  """Shrinks a recipe to what two CPU cores train in well under an hour.

  Args:
    config: changed in place; its name too. Its batches stay; 8 fit.
  """
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
  config.optimizer.reference_batch = 8
  config.optimizer.head_multiplier = 1.0
  config.contrastive.num_anchors = 64
  config.memory_bank.capacity = 2000
  config.memory_bank.capacity_class0 = 2000
  config.memory_bank.max_keys_per_step = 64
  config.log.every_steps = 10


def apply_split(
  config: ml_collections.ConfigDict, split: str, rows: Mapping[str, str]
) -> None:
  """Sets the lists that an argument `split=` means, and the name after it.

  Args:
    config: changed in place; its name too.
    split: a key of `rows`, or a folder below splits/ with a slash in it, such
      as 'own/100_seed0', which scripts/prepare_data.py makes.
    rows: folders below splits/ of the published rows.

  Raises:
    ValueError: neither; lists the rows.
  """
  if split not in rows and "/" not in split:
    raise ValueError(
      f"config argument split={split!r} is unknown: choose from {list(rows)},"
      " or a folder below splits/ such as own/100_seed0"
    )
  folder = rows.get(split, split)
  config.name += "_" + split.replace("/", "_")
  config.dataset.labelled_list = f"splits/{folder}/labeled.txt"
  config.dataset.unlabelled_list = f"splits/{folder}/unlabeled.txt"


def parse_arg(arg: str | None, **defaults) -> ml_collections.ConfigDict:
  """Parses the part of `--config=file.py:arg` after the colon.

  Args:
    arg: comma-separated `key=value` or bare `flag`, e.g.
      'method=supervised,released,seed=3'.
    **defaults: the legal keys with their defaults; a bool is a flag, and the
      type of the default is the type of the value.

  Returns:
    ConfigDict with all keys of `defaults`.

  Raises:
    ValueError: unknown key or a value of the wrong type; lists the legal keys.
  """
  values = dict(defaults)
  for item in filter(None, (arg or "").split(",")):
    key, has_value, text = item.partition("=")
    if key not in defaults:
      raise ValueError(
        f"config argument {key!r} is unknown: choose from {sorted(defaults)}"
      )
    default = defaults[key]
    if isinstance(default, bool) and not has_value:
      values[key] = True
    elif not has_value:
      raise ValueError(f"config argument {key!r} needs a value: {key}=...")
    else:
      try:
        values[key] = type(default)(text)
      except ValueError:
        raise ValueError(
          f"config argument {key}={text!r} is not of type"
          f" {type(default).__name__}"
        ) from None
  return ml_collections.ConfigDict(values)
