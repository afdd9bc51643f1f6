"""What `config.dataset` says: classes, source of the files, lists of ids.

Shared by the trainer and the commands that only look at data: no JAX here.
"""

import dataclasses
from collections.abc import Sequence

import ml_collections

from input_pipeline import datasets, errors, shards, sources, splits, storage

SOURCES = ("files", "tfds")
_LISTED = ("labelled", "validation")


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise errors.ConfigError(message)


def _choice(key: str, value: str, choices) -> None:
  _require(
    value in choices,
    f"config.{key}={value!r}: choose one of {', '.join(choices)}",
  )


def check_dataset(dataset: ml_collections.ConfigDict) -> None:
  """Checks what can be said of config.dataset before any file is read.

  Raises:
    ConfigError: the first thing that is wrong.
  """
  _choice("dataset.mask_format", dataset.mask_format, datasets.MASK_FORMATS)
  _choice("dataset.source", dataset.source, SOURCES)
  _require(
    bool(dataset.classes_file) == (dataset.name == datasets.FOLDER),
    f"config.dataset.classes_file={dataset.classes_file!r}: names the class"
    f" table of dataset.name='{datasets.FOLDER}' and is '' for every other data"
    f" set (dataset.name={dataset.name!r})",
  )
  for part in ("labelled", "validation"):
    _require(
      bool(dataset[f"{part}_list"]),
      f"config.dataset.{part}_list='': must name a text file with one image id"
      " a line",
    )
  _require(
    bool(dataset.unlabelled_list) != bool(dataset.unlabelled_dir),
    f"config.dataset.unlabelled_list={dataset.unlabelled_list!r} and"
    f" unlabelled_dir={dataset.unlabelled_dir!r}: set one of them, a text file"
    " with one image id a line or a folder of images",
  )
  for key in ("mean", "std"):
    values = tuple(dataset[key])
    _require(
      len(values) in (0, 3) and all(0 <= v <= 255 for v in values),
      f"config.dataset.{key}={values}: needs red, green and blue from 0 to 255,"
      " or () for those of the data set",
    )
  _require(
    all(value > 0 for value in dataset.std),
    f"config.dataset.std={tuple(dataset.std)}: must be positive",
  )


def check_labels(
  dataset: ml_collections.ConfigDict, *, num_classes: int
) -> None:
  """Checks what config.dataset says of masks against the number of classes.

  Raises:
    ConfigError: the first thing that is wrong.
  """
  _require(
    num_classes <= dataset.ignore_label <= 255,
    f"config.dataset.ignore_label={dataset.ignore_label}: must be none of the"
    f" class ids 0 to {num_classes - 1}, and at most 255",
  )
  _require(
    dataset.mask_format != "cityscapes_label_ids" or num_classes == 19,
    "config.dataset.mask_format='cityscapes_label_ids' makes the 19 classes of"
    f" Cityscapes, but dataset.name={dataset.name!r} has {num_classes}: choose"
    " 'index' or 'colours'",
  )


def load_info(dataset: ml_collections.ConfigDict) -> datasets.DatasetInfo:
  """Names, palette and pixel statistics of the data set.

  Raises:
    ConfigError: config.dataset cannot work.
    DataError: an unknown data set, or a bad class table.
  """
  check_dataset(dataset)
  if dataset.name == datasets.FOLDER:
    info = datasets.read_class_table(
      storage.join(dataset.root, dataset.classes_file),
      need_colours=dataset.mask_format == "colours",
    )
  else:
    info = datasets.dataset_info(dataset.name)
  own = {
    key: tuple(float(value) for value in dataset[key])
    for key in ("mean", "std")
    if dataset[key]
  }
  return dataclasses.replace(info, **own)


def prepare_dataset(dataset: ml_collections.ConfigDict) -> None:
  """Sees to it that the folders of the data set are there.

  The synthetic 'shapes' is drawn on first use.

  Raises:
    DataError: a folder is missing; says what belongs there and where to get it.
  """
  if dataset.name == "shapes":
    _ensure_shapes(dataset)
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
  wanted = [f"the list {dataset[f'{part}_list']}" for part in _LISTED]
  if dataset.unlabelled_dir:
    wanted.append(f"the images in {dataset.unlabelled_dir}/")
  else:
    wanted.append(f"the list {dataset.unlabelled_list}")
  source = ""
  if dataset.name != datasets.FOLDER:
    source = datasets.dataset_info(dataset.name).source
  raise errors.DataError(
    f"{missing}: the folder does not exist. The data set {dataset.name!r} needs"
    f" {root} with {dataset.image_dir}/<id>{dataset.image_suffix or '.*'},"
    f" {dataset.mask_dir}/<id>{dataset.mask_suffix or '.*'},"
    f" {', '.join(wanted)}"
    " (another place: --config.dataset.root=...)"
    + (f". Where to get it: {source}" if source else "")
  )


def _ensure_shapes(dataset: ml_collections.ConfigDict) -> None:
  # Here, because its drawing code is of no use to other data sets.
  from input_pipeline import shapes

  wanted = dataset.shapes
  shapes.ensure_dataset(
    dataset.root,
    shapes.World(seed=wanted.seed),
    num_labelled=wanted.num_labelled,
    num_unlabelled=wanted.num_unlabelled,
    num_val=wanted.num_val,
    num_test=wanted.num_test,
  )


def open_source(dataset: ml_collections.ConfigDict) -> sources.Source:
  """Where images and masks are read; looks for no file of them.

  Raises:
    DataError: of dataset.source='tfds', the shards are missing or unfit.
  """
  if dataset.source == "tfds":
    folder = storage.join(dataset.root, dataset.tfds_dir)
    return shards.Shards(
      shards.shards_folder(folder, dataset.name),
      mask_format=dataset.mask_format,
    )
  return sources.Layout(
    root=dataset.root,
    image_dir=dataset.image_dir,
    mask_dir=dataset.mask_dir,
    image_suffix=dataset.image_suffix,
    mask_suffix=dataset.mask_suffix,
  )


def unlabelled_in_folder(
  dataset: ml_collections.ConfigDict,
  source: sources.Source,
  listed: Sequence[str],
) -> tuple[sources.Source, tuple[str, ...]]:
  """The images of dataset.unlabelled_dir that no list names.

  Args:
    dataset: with an unlabelled_dir.
    source: as `open_source` made it.
    listed: ids of the labelled and validation images.

  Returns:
    The source that finds these images too, and their ids, sorted.

  Raises:
    DataError: the folder is missing, or none of its images is unlabelled.
  """
  if isinstance(source, shards.Shards):
    return source, source.unlabelled_in(dataset.unlabelled_dir, listed)
  return sources.find_unlabelled(source, dataset.unlabelled_dir, listed)


def list_path(dataset: ml_collections.ConfigDict, part: str) -> str:
  """Path of the list of 'labelled', 'unlabelled' or 'validation' images.

  Of unlabelled ones it may be a folder of images.
  """
  if part == "unlabelled" and dataset.unlabelled_dir:
    return storage.join(dataset.root, dataset.unlabelled_dir)
  return storage.join(dataset.root, dataset[f"{part}_list"])


def read_lists(
  dataset: ml_collections.ConfigDict,
) -> tuple[sources.Source, dict[str, tuple[str, ...]]]:
  """Opens the source and reads the lists; looks for no file of them.

  Returns:
    Where images and masks are read, and the ids of 'labelled', 'validation' and
    'unlabelled'.

  Raises:
    DataError: a list, the folder of unlabelled images, or a shard is missing or
      unfit.
  """
  ids = {part: splits.read_split(list_path(dataset, part)) for part in _LISTED}
  source = open_source(dataset)
  if dataset.unlabelled_dir:
    source, ids["unlabelled"] = unlabelled_in_folder(
      dataset, source, ids["labelled"] + ids["validation"]
    )
  else:
    ids["unlabelled"] = splits.read_split(list_path(dataset, "unlabelled"))
  return source, ids
