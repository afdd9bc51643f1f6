"""From a config to the images of a run: checked lists, streams."""

import dataclasses
import logging
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from input_pipeline import (
  DatasetInfo,
  Source,
  TrainTransform,
  check_splits,
  make_eval_stream,
  make_train_stream,
  read_split,
)
from input_pipeline.dataset_config import list_path, open_source, read_lists
from u2pl_jax.bad_records import BadRecords
from u2pl_jax.config_checks import eval_protocol
from u2pl_jax.evaluation import Protocol
from u2pl_jax.train_step import Recipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
  """The images of a run, checked.

  Attributes:
    info: names, palette and pixel statistics.
    source: where images and masks are read.
    labelled, unlabelled, validation: ids.
    oracle: the unlabelled ids whose hidden masks measure the pseudo labels.
  """

  info: DatasetInfo
  source: Source
  labelled: tuple[str, ...]
  unlabelled: tuple[str, ...]
  validation: tuple[str, ...]
  oracle: tuple[str, ...]


def load_data(config: ml_collections.ConfigDict, info: DatasetInfo) -> Data:
  """Reads the lists and checks that all files are there.

  Args:
    config: complete.
    info: of its data set.

  Returns:
    `Data`.

  Raises:
    DataError: a list or a file is missing or unfit.
  """
  source, ids = read_lists(config.dataset)
  check_splits({list_path(config.dataset, part): ids[part] for part in ids})
  # A run that skips goes on after a stop without the files it skipped.
  skips = config.input.on_bad_record == "skip"
  max_missing = config.input.max_bad_records if skips else 0
  source.check(ids["labelled"], masks=True, max_missing=max_missing)
  source.check(ids["validation"], masks=True)
  if config.method != "supervised":
    source.check(ids["unlabelled"], masks=False, max_missing=max_missing)
  data = Data(
    info=info,
    source=source,
    oracle=_oracle_ids(config, source, ids["unlabelled"]),
    **ids,
  )
  # Opening a stream reads the sizes of its images: one that does not fit into
  # eval.pad_to shows now instead of after the first epoch.
  for part in (data.validation, data.oracle):
    if part:
      open_eval_stream(config, data, part).close()
  return data


def load_eval_data(
  config: ml_collections.ConfigDict,
  info: DatasetInfo,
  *,
  split: str = "validation",
  list_file: str | None = None,
) -> Data:
  """The images of one list, as `validation`; reads no other list.

  Args:
    config: complete.
    info: of its data set.
    split: 'validation' or 'labelled'.
    list_file: path of a list in place of the split's.

  Returns:
    `Data` without images to train on.

  Raises:
    DataError: the list, an image or a mask is missing.
  """
  ids = read_split(list_file or list_path(config.dataset, split))
  source = open_source(config.dataset)
  source.check(ids, masks=True)
  return Data(
    info=info,
    source=source,
    labelled=(),
    unlabelled=(),
    validation=ids,
    oracle=(),
  )


def _oracle_ids(
  config: ml_collections.ConfigDict, source: Source, unlabelled: tuple[str, ...]
) -> tuple[str, ...]:
  """The first unlabelled images that have a mask after all."""
  wanted = config.eval.oracle_images
  if config.method != "u2pl" or not wanted:
    return ()
  found = []
  for image_id in unlabelled:
    if len(found) == wanted:
      break
    if source.has_mask(image_id):
      found.append(image_id)
  if not found:
    logger.info(
      "no oracle/ metrics: the unlabelled images have no masks such as %s",
      source.mask_path(unlabelled[0]),
    )
  return tuple(found)


def open_train_stream(
  config: ml_collections.ConfigDict,
  data: Data,
  recipe: Recipe,
  bad_records: BadRecords | None = None,
  *,
  labelled: bool,
  step: int,
) -> Iterator[dict[str, np.ndarray]]:
  """The stream whose next batch is the one of `step`.

  Args:
    config, data, recipe: of the run.
    bad_records: counts the images that cannot be read and are replaced; None:
      such an image ends the stream.
    labelled: which of the two streams.
    step: number of the update, from 0.
  """
  inputs = config.input
  ignore = config.dataset.ignore_label
  return make_train_stream(
    data.source,
    data.labelled if labelled else data.unlabelled,
    TrainTransform(
      crop_size=tuple(inputs.crop_size),
      scale_range=tuple(inputs.scale_range),
      flip_probability=inputs.flip_probability,
      pad_label=0 if "zero_padding_label" in recipe.quirks else ignore,
    ),
    batch_size=config.batch["labelled" if labelled else "unlabelled"],
    # Different for the two streams, also of runs with neighbouring seeds.
    seed=2 * config.seed + (0 if labelled else 1),
    start_batch=step,
    with_labels=labelled,
    num_classes=data.info.num_classes,
    ignore_label=ignore,
    mask_format=data.info.mask_format(config.dataset.mask_format),
    num_workers=inputs.num_workers,
    num_threads=inputs.num_threads,
    prefetch=inputs.prefetch,
    shard_index=jax.process_index(),
    shard_count=jax.process_count(),
    on_bad_record=None if bad_records is None else bad_records.add,
    max_bad_records=inputs.max_bad_records,
  )


def open_eval_stream(
  config: ml_collections.ConfigDict,
  data: Data,
  ids: tuple[str, ...],
  *,
  protocol: Protocol | None = None,
  batch_size: int | None = None,
  whole: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
  """Whole images with labels, in the form of a protocol.

  Args:
    config, data: of the run.
    ids: the images.
    protocol: None takes that of the config.
    batch_size: rows over all processes; None takes that of the config.
    whole: all rows of every batch, not only those of this process's devices.
  """
  protocol = eval_protocol(config) if protocol is None else protocol
  is_padded = protocol.name in ("padded", "center_crop")
  is_windows = protocol.name == "sliding_window"
  num_devices = jax.local_device_count() if whole else jax.device_count()
  return make_eval_stream(
    data.source,
    ids,
    batch_size=batch_size or config.eval.batch,
    pad_to=protocol.size if is_padded else None,
    center_crop=protocol.name == "center_crop",
    window=protocol.size if is_windows else None,
    stride=protocol.stride if is_windows else None,
    # The only one with many sizes: fillers would be most of the work.
    row_multiple=num_devices if protocol.name == "whole" else None,
    num_classes=data.info.num_classes,
    ignore_label=config.dataset.ignore_label,
    mask_format=data.info.mask_format(config.dataset.mask_format),
    with_labels=True,
    num_threads=config.input.num_threads,
    prefetch=config.input.prefetch,
    shard_index=0 if whole else jax.process_index(),
    shard_count=1 if whole else jax.process_count(),
  )
