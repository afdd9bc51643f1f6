"""Images and masks from shards that tensorflow-datasets wrote.

The records hold the bytes of the files as they were, so that a stream over
shards is the stream over the files, bit for bit. Images and masks lie in shards
of their own: who reads no masks opens none.
"""

import io
import threading
from collections.abc import Sequence
from typing import BinaryIO

from input_pipeline import errors, storage

# Splits of the data set, in the sense of tensorflow-datasets.
IMAGES = "images"
MASKS = "masks"
VERSION = "1.0.0"


def builder_name(dataset_name: str) -> str:
  """Name of the builder whose shards hold a data set."""
  names = {"voc": "voc_aug", "cityscapes": "cityscapes_trainids"}
  return names.get(dataset_name, "folder")


def shards_folder(tfds_dir: str, dataset_name: str) -> str:
  """Where, in a folder of data sets, the shards of one lie."""
  return storage.join(tfds_dir, builder_name(dataset_name), VERSION)


class Shards:
  """A Source of the records of one data set in shards; random access.

  Opened anew in every process that it is sent to.

  Args:
    folder: of the shards, `<tfds_dir>/<builder>/<version>`, local or remote.
    mask_format: kind that masks are going to be decoded as.

  Raises:
    DataError: the shards are missing, incomplete, or of another mask format.
  """

  def __init__(self, folder: str, *, mask_format: str):
    self._folder = folder.rstrip("/")
    self._builder = _open_builder(self._folder)
    index = self._builder.info.metadata
    if not index or index.get("made_by") != "u2pl_jax":
      raise errors.DataError(
        f"{self._folder}: these shards have no index of ids; write them with"
        " scripts/write_tfds.py"
      )
    if index["mask_format"] != mask_format:
      raise errors.DataError(
        f"{self._folder}: the masks in the shards are of format"
        f" {index['mask_format']!r}, not dataset.mask_format={mask_format!r}:"
        " set that key, or write the shards again"
      )
    self._unlabelled_dir = index["unlabelled_dir"]
    self._unlabelled = index["unlabelled"]
    self._position = {
      split: {id: i for i, id in enumerate(index[split])}
      for split in (IMAGES, MASKS)
    }
    self._sizes = index["sizes"]
    self._check_shard_files()
    self._records = {}
    self._lock = threading.Lock()

  def __reduce__(self):
    return _reopen, (self._folder, self._builder.info.metadata["mask_format"])

  def image_path(self, id: str) -> str:
    return f"{self._folder}, image {id}"

  def mask_path(self, id: str) -> str:
    return f"{self._folder}, mask {id}"

  def read_image(self, id: str) -> bytes:
    return self._read(IMAGES, id, self.image_path(id))

  def read_mask(self, id: str) -> bytes:
    return self._read(MASKS, id, self.mask_path(id))

  def open_image(self, id: str) -> BinaryIO:
    return io.BytesIO(self.read_image(id))

  def stored_size(self, id: str) -> tuple[int, int]:
    if id not in self._position[IMAGES]:
      raise self._missing(self.image_path(id))
    height, width = self._sizes[self._position[IMAGES][id]]
    return height, width

  def has_mask(self, id: str) -> bool:
    return id in self._position[MASKS]

  def check(
    self, ids: Sequence[str], *, masks: bool, max_missing: int = 0
  ) -> None:
    for split in (IMAGES, MASKS) if masks else (IMAGES,):
      missing = [id for id in ids if id not in self._position[split]]
      if len(missing) > max_missing:
        raise errors.DataError(
          f"{self._folder}: {len(missing)} of {len(ids)} {split} of the lists"
          f" are not in the shards, the first is {missing[0]!r}: write the"
          " shards again with these lists (scripts/write_tfds.py)"
        )

  def unlabelled_in(
    self, folder: str, listed: Sequence[str]
  ) -> tuple[str, ...]:
    """`find_unlabelled` as it was when the shards were written.

    Args:
      folder: the unlabelled_dir of then.
      listed: ids of the labelled and validation images.

    Raises:
      DataError: it was another folder, or no id is left.
    """
    if folder != self._unlabelled_dir:
      raise errors.DataError(
        f"{self._folder}: the shards were written with dataset.unlabelled_dir="
        f"{self._unlabelled_dir!r}, not {folder!r}: write them again, or set"
        " that key"
      )
    listed = set(listed)
    ids = tuple(id for id in self._unlabelled if id not in listed)
    if not ids:
      raise errors.DataError(
        f"{self._folder}: every image of {folder!r} is in a list, so that none"
        " is unlabelled"
      )
    return ids

  def _check_shard_files(self) -> None:
    try:
      present = storage.names_in(self._folder)
    except OSError as error:
      raise errors.DataError(
        f"{self._folder}: cannot list the folder: {error.strerror}"
      ) from None
    for split in self._builder.info.splits.values():
      missing = sorted(set(split.filenames) - present)
      if missing:
        raise errors.DataError(
          f"{self._folder}: {len(missing)} of {len(split.filenames)} shards of"
          f" the {split.name} are missing, the first is {missing[0]}: copy the"
          " folder again"
        )

  def _missing(self, path: str) -> errors.DataError:
    return errors.MissingFileError(
      f"{path}: not in the shards; write them again with lists that hold it"
      " (scripts/write_tfds.py)"
    )

  def _read(self, split: str, id: str, path: str) -> bytes:
    position = self._position[split].get(id)
    if position is None:
      raise self._missing(path)
    with self._lock:
      if split not in self._records:
        self._records[split] = self._builder.as_data_source(split)
      records = self._records[split]
    try:
      record = records[position]
    except Exception as error:  # The readers have errors of many kinds.
      text = " ".join(str(error).split())
      raise errors.DataError(
        f"{path}: cannot read the shard ({text}); copy the folder again"
      ) from None
    found, data = record["id"], record["data"]
    # A shard that was cut off gives records without values.
    if found is None or not data:
      raise errors.DataError(
        f"{path}: the shard is damaged or truncated; copy the folder again"
      )
    if found.decode() != id:
      raise errors.DataError(
        f"{path}: the shard holds {found.decode()!r} there; shards and"
        " metadata.json belong to different data sets: copy the folder again"
      )
    return data


def _reopen(folder: str, mask_format: str) -> Shards:
  return Shards(folder, mask_format=mask_format)


def _open_builder(folder: str):
  import tensorflow_datasets as tfds

  if not storage.is_file(f"{folder}/dataset_info.json"):
    raise errors.DataError(
      f"{folder}: there are no shards of tensorflow-datasets; write them with"
      " scripts/write_tfds.py, or set dataset.source='files'"
    )
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # Of its protos, JSON, storage.
    text = " ".join(str(error).split())
    raise errors.DataError(
      f"{folder}: cannot open the shards ({text}); copy the folder again"
    ) from None
