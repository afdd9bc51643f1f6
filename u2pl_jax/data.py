"""From a config to the images of a run: checks, lists, streams."""

import dataclasses
import logging
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from input_pipeline import (
  FOLDER,
  DataError,
  DatasetInfo,
  Layout,
  Shards,
  Source,
  TrainTransform,
  check_splits,
  dataset_info,
  find_unlabelled,
  make_eval_stream,
  make_train_stream,
  read_class_table,
  read_split,
  shards_folder,
  storage,
)
from u2pl_jax.config_checks import check_dataset
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


def load_info(config: ml_collections.ConfigDict) -> DatasetInfo:
  """Names, palette and pixel statistics of the data set of a config.

  Raises:
    ConfigError: config.dataset cannot work.
    DataError: an unknown data set, or a bad class table.
  """
  dataset = config.dataset
  check_dataset(dataset)
  if dataset.name == FOLDER:
    info = read_class_table(
      storage.join(dataset.root, dataset.classes_file),
      need_colours=dataset.mask_format == "colours",
    )
  else:
    info = dataset_info(dataset.name)
  own = {
    key: tuple(float(value) for value in dataset[key])
    for key in ("mean", "std")
    if dataset[key]
  }
  return dataclasses.replace(info, **own)


def prepare_dataset(config: ml_collections.ConfigDict) -> None:
  """Sees to it that the folders of the data set are there.

  The synthetic 'shapes' is drawn on first use.

  Raises:
    DataError: a folder is missing; says what belongs there and where to get it.
  """
  dataset = config.dataset
  if dataset.name == "shapes":
    _ensure_shapes(config)
  if dataset.source == "tfds":
    return  # `Shards` says what is missing.
  root = str(dataset.root)
  folders = [
    root,
    storage.join(root, dataset.image_dir),
    storage.join(root, dataset.mask_dir),
  ]
  missing = next((x for x in folders if not storage.is_folder(x)), None)
  if missing is None:
    return
  wanted = [
    f"the list {dataset[f'{part}_list']}" for part in ("labelled", "validation")
  ]
  if dataset.unlabelled_dir:
    wanted.append(f"the images in {dataset.unlabelled_dir}/")
  else:
    wanted.append(f"the list {dataset.unlabelled_list}")
  source = "" if dataset.name == FOLDER else dataset_info(dataset.name).source
  raise DataError(
    f"{missing}: the folder does not exist. The data set {dataset.name!r} needs"
    f" {root} with {dataset.image_dir}/<id>{dataset.image_suffix or '.*'},"
    f" {dataset.mask_dir}/<id>{dataset.mask_suffix or '.*'},"
    f" {', '.join(wanted)}"
    " (another place: --config.dataset.root=...)"
    + (f". Where to get it: {source}" if source else "")
  )


def _ensure_shapes(config: ml_collections.ConfigDict) -> None:
  # Here, because its drawing code is of no use to other data sets.
  from input_pipeline import shapes

  wanted = config.dataset.shapes
  shapes.ensure_dataset(
    config.dataset.root,
    shapes.World(seed=wanted.seed),
    num_labelled=wanted.num_labelled,
    num_unlabelled=wanted.num_unlabelled,
    num_val=wanted.num_val,
    num_test=wanted.num_test,
  )


def read_lists(
  config: ml_collections.ConfigDict,
) -> tuple[Source, dict[str, tuple[str, ...]]]:
  """Opens the source and reads the lists; looks for no file of them.

  Returns:
    Where images and masks are read, and the ids of 'labelled', 'validation' and
    'unlabelled'.

  Raises:
    DataError: a list, the folder of unlabelled images, or a shard is missing or
      unfit.
  """
  dataset = config.dataset
  ids = {
    part: read_split(storage.join(dataset.root, dataset[f"{part}_list"]))
    for part in ("labelled", "validation")
  }
  listed = ids["labelled"] + ids["validation"]
  if dataset.source == "tfds":
    source = Shards(
      shards_folder(storage.join(dataset.root, dataset.tfds_dir), dataset.name),
      mask_format=dataset.mask_format,
    )
    if dataset.unlabelled_dir:
      ids["unlabelled"] = source.unlabelled_in(dataset.unlabelled_dir, listed)
  else:
    source = Layout(
      root=dataset.root,
      image_dir=dataset.image_dir,
      mask_dir=dataset.mask_dir,
      image_suffix=dataset.image_suffix,
      mask_suffix=dataset.mask_suffix,
    )
    if dataset.unlabelled_dir:
      source, ids["unlabelled"] = find_unlabelled(
        source, dataset.unlabelled_dir, listed
      )
  if not dataset.unlabelled_dir:
    ids["unlabelled"] = read_split(
      storage.join(dataset.root, dataset.unlabelled_list)
    )
  return source, ids


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
  source, ids = read_lists(config)
  check_splits(ids["labelled"], ids["unlabelled"], ids["validation"])
  source.check(ids["labelled"], masks=True)
  source.check(ids["validation"], masks=True)
  if config.method != "supervised":
    source.check(ids["unlabelled"], masks=False)
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
  *,
  labelled: bool,
  step: int,
) -> Iterator[dict[str, np.ndarray]]:
  """The stream whose next batch is the one of `step`."""
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
  )


def open_eval_stream(
  config: ml_collections.ConfigDict, data: Data, ids: tuple[str, ...]
) -> Iterator[dict[str, np.ndarray]]:
  """Whole images with labels, in the form of the config's protocol."""
  protocol = config.eval.protocol
  return make_eval_stream(
    data.source,
    ids,
    batch_size=config.eval.batch,
    pad_to=None if protocol == "whole" else tuple(config.eval.pad_to),
    center_crop=protocol == "center_crop",
    num_classes=data.info.num_classes,
    ignore_label=config.dataset.ignore_label,
    mask_format=data.info.mask_format(config.dataset.mask_format),
    with_labels=True,
    num_threads=config.input.num_threads,
    prefetch=config.input.prefetch,
  )
