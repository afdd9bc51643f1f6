"""Refuses configs that cannot work, before anything is read or compiled."""

import itertools
import math

import ml_collections

from input_pipeline import ConfigError
from input_pipeline.dataset_config import check_labels
from u2pl_jax.evaluation import PROTOCOLS, Protocol
from u2pl_jax.models.deeplab import HEADS
from u2pl_jax.models.resnet import BACKBONES
from u2pl_jax.strong_augmentation import MIXES
from u2pl_jax.train_step import QUIRKS

METHODS = ("u2pl", "supervised")
BAD_RECORDS = ("fail", "skip")
SCHEDULES = ("poly", "cosine", "multistep", "plateau")


def parse_quirks(text: str) -> frozenset[str]:
  """'a,b' -> {'a', 'b'}.

  Raises:
    ConfigError: a name that is no quirk.
  """
  names = frozenset(filter(None, (name.strip() for name in text.split(","))))
  for name in sorted(names - set(QUIRKS)):
    raise ConfigError(
      f"config.quirks: {name!r} is unknown: choose from {', '.join(QUIRKS)}"
    )
  return names


def contrastive_ranks(
  config: ml_collections.ConfigDict, num_classes: int
) -> tuple[int, int]:
  """(low_rank, high_rank), chosen by the number of classes if both are 0.

  The published window [3, 20) fits 20 classes and more. With fewer it ends at
  the last class and begins after the first third: 1 for two classes, as its
  author advises.
  """
  low, high = config.contrastive.low_rank, config.contrastive.high_rank
  if low == high == 0:
    return max(1, min(3, num_classes // 3)), min(20, num_classes)
  return low, high


def bank_capacities(
  config: ml_collections.ConfigDict, num_classes: int
) -> list[int]:
  """Slots of each queue of the memory bank."""
  bank = config.memory_bank
  return [bank.capacity_class0] + [bank.capacity] * (num_classes - 1)


def splits_bank(config: ml_collections.ConfigDict) -> bool:
  """Whether each device holds a share of the memory bank, not all of it."""
  return config.method == "u2pl" and config.sharding.memory_bank == "classes"


def eval_protocol(
  config: ml_collections.ConfigDict,
  *,
  scales: tuple[float, ...] = (1.0,),
  flip: bool = False,
) -> Protocol:
  """The protocol that config.eval describes.

  Args:
    config: complete.
    scales, flip: see `Protocol`; training looks at native sizes alone.

  Raises:
    ConfigError: a value, or the combination with config.quirks, cannot work.
  """
  evaluation = config.eval
  name = evaluation.protocol
  _choice("eval.protocol", name, PROTOCOLS)
  _require(
    name != "center_crop"
    or "padded_center_crop" in parse_quirks(config.quirks),
    "config.eval.protocol='center_crop' counts padding as class 0: add"
    " padded_center_crop to config.quirks, or choose 'padded'",
  )
  size = stride = None
  if name in ("padded", "center_crop"):
    size = _positive_size("eval.pad_to", evaluation.pad_to)
  if name == "sliding_window":
    size = _positive_size("eval.window", evaluation.window)
    share = evaluation.stride
    _require(
      0 < share <= 1,
      f"config.eval.stride={share}: a share of the window, above 0 and at most"
      " 1",
    )
    # Rounded up, as published.
    stride = tuple(math.ceil(length * share) for length in size)
  return Protocol(name, size, stride, scales, flip)


def _positive_size(key: str, value) -> tuple[int, int]:
  size = tuple(value)
  _require(
    len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size),
    f"config.{key}={size}: needs height and width in pixels",
  )
  return size


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def _choice(key: str, value: str, choices) -> None:
  _require(
    value in choices,
    f"config.{key}={value!r}: choose one of {', '.join(choices)}",
  )


def _in_range(key: str, value: float, low: float, high: float) -> None:
  _require(
    low <= value <= high,
    f"config.{key}={value}: must be between {low} and {high}",
  )


def _check_schedule(optimizer: ml_collections.ConfigDict) -> None:
  _choice("optimizer.schedule", optimizer.schedule, SCHEDULES)
  _require(
    0 < optimizer.decay_factor < 1,
    f"config.optimizer.decay_factor={optimizer.decay_factor}: must lie between"
    " 0 and 1, both excluded",
  )
  # With 0 before and 1 behind, they must rise.
  milestones = tuple(optimizer.milestones)
  bounded = (0, *milestones, 1)
  _require(
    all(a < b for a, b in itertools.pairwise(bounded)),
    f"config.optimizer.milestones={milestones}: needs rising shares of the"
    " training between 0 and 1, both excluded",
  )
  plateau = optimizer.plateau
  _require(
    plateau.patience >= 1,
    f"config.optimizer.plateau.patience={plateau.patience}: must be at least 1",
  )
  _require(
    plateau.reductions >= 0,
    f"config.optimizer.plateau.reductions={plateau.reductions}: must not be"
    " negative",
  )
  # A threshold in percent would never see an improvement.
  _in_range("optimizer.plateau.threshold", plateau.threshold, 0, 0.5)


def legal_microbatches(
  config: ml_collections.ConfigDict, num_devices: int
) -> list[int]:
  """The numbers of micro-batches that the batch and the devices allow.

  Every device has its share of every micro-batch, which has at least the two
  labelled images that batch normalisation needs.
  """
  labelled, unlabelled = config.batch.labelled, config.batch.unlabelled
  groups = (
    labelled
    if config.method == "supervised"
    else math.gcd(labelled, unlabelled)
  )
  return [
    number
    for number in range(1, labelled // 2 + 1)
    if groups % (number * num_devices) == 0
  ]


def _check_microbatches(
  config: ml_collections.ConfigDict, num_devices: int
) -> None:
  number, legal = (
    config.batch.microbatches,
    legal_microbatches(config, num_devices),
  )
  _require(
    number in legal,
    f"config.batch.microbatches={number}: {config.batch.labelled} labelled and"
    f" {config.batch.unlabelled} unlabelled images on {num_devices} device(s)"
    f" allow {', '.join(map(str, legal))}: each device needs equal shares of"
    " both in each micro-batch, and batch normalisation two labelled images",
  )


def check_config(
  config: ml_collections.ConfigDict, *, num_classes: int, num_devices: int
) -> None:
  """Checks the values of a config and their combinations.

  Args:
    config: complete, see `configs/common.py`.
    num_classes: of the data set.
    num_devices: over which the batch is split.

  Raises:
    ConfigError: the first thing that is wrong.
  """
  check_labels(config.dataset, num_classes=num_classes)
  parse_quirks(config.quirks)
  _choice("method", config.method, METHODS)
  _choice("model.backbone", config.model.backbone, BACKBONES)
  _choice("model.head", config.model.head, HEADS)
  _choice("model.stem", config.model.stem, ("deep", "conv7"))
  _choice("model.dtype", config.model.dtype, ("float32", "bfloat16"))
  _choice("supervised.loss", config.supervised.loss, ("ce", "ohem"))
  _choice("strong.mix", config.strong.mix, MIXES)
  _choice(
    "memory_bank.dtype", config.memory_bank.dtype, ("float32", "bfloat16")
  )
  _choice(
    "sharding.memory_bank",
    config.sharding.memory_bank,
    ("replicated", "classes"),
  )
  _choice("reliability.decay", config.reliability.decay, ("epoch", "step"))
  _require(
    config.model.output_stride in (8, 16),
    f"config.model.output_stride={config.model.output_stride}: choose 8 or 16",
  )
  _require(
    len(config.model.aspp_rates) == 3,
    f"config.model.aspp_rates={tuple(config.model.aspp_rates)}: needs three",
  )
  eval_protocol(config)

  _require(config.seed >= 0, f"config.seed={config.seed}: must be 0 or more")
  for half in ("labelled", "unlabelled"):
    size = config.batch[half]
    _require(size >= 1, f"config.batch.{half}={size}: must be at least 1")
    _require(
      size % num_devices == 0,
      f"config.batch.{half}={size} does not divide over {num_devices} devices:"
      f" choose a multiple of {num_devices}",
    )
  _require(
    config.batch.labelled >= 2,
    f"config.batch.labelled={config.batch.labelled}: batch normalisation of"
    " the image-pooling branch needs at least 2",
  )
  _check_microbatches(config, num_devices)
  _require(
    config.eval.batch >= 1 and config.eval.batch % num_devices == 0,
    f"config.eval.batch={config.eval.batch} does not divide over"
    f" {num_devices} devices: choose a multiple of {num_devices}",
  )

  crop = tuple(config.input.crop_size)
  _require(
    len(crop) == 2 and min(crop) >= 33,
    f"config.input.crop_size={crop}: needs height and width of at least 33,"
    " so that the feature grid is larger than a pixel",
  )
  low, high = config.input.scale_range
  _require(
    0 < low <= 1 <= high,
    f"config.input.scale_range={(low, high)}: needs 0 < low <= 1 <= high",
  )
  _choice("input.on_bad_record", config.input.on_bad_record, BAD_RECORDS)
  _in_range("input.flip_probability", config.input.flip_probability, 0, 1)
  _in_range("strong.mix_probability", config.strong.mix_probability, 0, 1)
  for key in (
    "photometric",
    "jitter_probability",
    "grey_probability",
    "blur_probability",
  ):
    _in_range(f"strong.{key}", config.strong[key], 0, 1)
  jitter = tuple(config.strong.jitter)
  _require(
    len(jitter) == 4 and min(jitter) >= 0 and jitter[3] <= 0.5,
    f"config.strong.jitter={jitter}: needs brightness, contrast, saturation and"
    " hue, none negative, hue at most 0.5",
  )
  sigma = tuple(config.strong.blur_sigma)
  _require(
    len(sigma) == 2 and 0 < sigma[0] <= sigma[1] <= 16,
    f"config.strong.blur_sigma={sigma}: needs (lowest, highest) in pixels with"
    " 0 < lowest <= highest <= 16",
  )
  _in_range("model.dropout", config.model.dropout, 0, 0.99)
  _in_range("reliability.alpha0", config.reliability.alpha0, 0, 100)
  _in_range("teacher.ema_decay", config.teacher.ema_decay, 0, 1)
  _in_range("optimizer.momentum", config.optimizer.momentum, 0, 1)
  for key in ("learning_rate", "head_multiplier"):
    value = config.optimizer[key]
    _require(value > 0, f"config.optimizer.{key}={value}: must be positive")
  _check_schedule(config.optimizer)
  _require(
    config.optimizer.weight_decay >= 0,
    f"config.optimizer.weight_decay={config.optimizer.weight_decay}:"
    " must not be negative",
  )

  epochs, warmup = config.schedule.epochs, config.schedule.warmup_epochs
  _require(epochs >= 1, f"config.schedule.epochs={epochs}: at least 1")
  _require(
    0 <= warmup <= epochs,
    f"config.schedule.warmup_epochs={warmup}: must lie between 0 and"
    f" config.schedule.epochs={epochs}",
  )
  for key, value in (
    ("optimizer.reference_batch", config.optimizer.reference_batch),
    ("schedule.reference_devices", config.schedule.reference_devices),
    ("eval.every_epochs", config.eval.every_epochs),
    ("checkpoint.every_epochs", config.checkpoint.every_epochs),
    ("checkpoint.keep", config.checkpoint.keep),
    ("log.every_steps", config.log.every_steps),
    ("input.num_threads", config.input.num_threads),
    ("input.prefetch", config.input.prefetch),
    ("input.max_bad_records", config.input.max_bad_records),
    ("model.rep_features", config.model.rep_features),
  ):
    _require(value >= 1, f"config.{key}={value}: must be at least 1")
  for key, value in (
    ("eval.oracle_images", config.eval.oracle_images),
    ("input.num_workers", config.input.num_workers),
    ("log.report_images", config.log.report_images),
    ("log.images_every_epochs", config.log.images_every_epochs),
  ):
    _require(value >= 0, f"config.{key}={value}: must not be negative")

  if config.method != "u2pl":
    return
  contrastive, bank = config.contrastive, config.memory_bank
  low_rank, high_rank = contrastive_ranks(config, num_classes)
  _require(
    0 < low_rank < high_rank,
    f"config.contrastive.low_rank={low_rank}: must be at least 1 and below"
    f" high_rank={high_rank}, or both 0",
  )
  _require(
    low_rank < num_classes,
    f"config.contrastive.low_rank={low_rank}: must be below the {num_classes}"
    " classes, or no unlabelled pixel is ever a negative",
  )
  _require(
    high_rank <= num_classes,
    f"config.contrastive.high_rank={high_rank}: there are only {num_classes}"
    f" classes: set it to {num_classes} or less",
  )
  _require(
    contrastive.temperature > 0,
    f"config.contrastive.temperature={contrastive.temperature}: must be"
    " positive",
  )
  for key, value in (
    ("contrastive.num_anchors", contrastive.num_anchors),
    ("contrastive.num_negatives", contrastive.num_negatives),
    ("memory_bank.capacity", bank.capacity),
    ("memory_bank.capacity_class0", bank.capacity_class0),
  ):
    _require(value >= 1, f"config.{key}={value}: must be at least 1")
  _require(
    bank.max_keys_per_step >= 0,
    f"config.memory_bank.max_keys_per_step={bank.max_keys_per_step}: 0 (no cap)"
    " or a positive number",
  )
  slots = sum(bank_capacities(config, num_classes))
  _require(
    not splits_bank(config) or slots % num_devices == 0,
    f"config.sharding.memory_bank='classes': the {slots} slots of the"
    f" {num_classes} queues do not divide over {num_devices} devices: choose"
    " config.memory_bank.capacity and capacity_class0 so that they do, or"
    " 'replicated'",
  )
