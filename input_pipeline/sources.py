"""Where encoded images and masks come from, by id.

A source hands out bytes; `decode` makes arrays of them. Whoever asks does not
know whether they lie in a folder, in object storage or in shards.
"""

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Protocol

from input_pipeline import errors, splits, storage


class Source(Protocol):
  """Encoded images and masks by id.

  The paths name a file in messages. Only `read_mask` and `has_mask` touch
  masks.
  """

  def image_path(self, id: str) -> str:
    """What messages call the image."""

  def mask_path(self, id: str) -> str:
    """What messages call the mask."""

  def read_image(self, id: str) -> bytes:
    """The encoded image; DataError if there is none."""

  def read_mask(self, id: str) -> bytes:
    """The encoded mask; DataError if there is none."""

  def open_image(self, id: str) -> BinaryIO:
    """The encoded image, for a look at its header; DataError as above."""

  def stored_size(self, id: str) -> tuple[int, int] | None:
    """(height, width) of the decoded image; None: its header must be read."""

  def has_mask(self, id: str) -> bool:
    """Whether there is a mask."""

  def check(
    self, ids: Sequence[str], *, masks: bool, max_missing: int = 0
  ) -> None:
    """Raises a DataError if more images, or also masks, are missing."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """The folders of a data set in VOC form; a Source of the files in them.

  An id may contain subfolders: image `id` is `root/image_dir/id + image_suffix`
  and its mask `root/mask_dir/id + mask_suffix`. The suffixes may be longer than
  a file extension. Cityscapes, for example, is image_dir="leftImg8bit",
  mask_dir="gtFine", image_suffix="_leftImg8bit.png",
  mask_suffix="_gtFine_labelTrainIds.png". The suffix '' takes whatever image
  file has that name, .jpg, .JPG or .png; folders are then listed once.

  Attributes:
    root: a local folder, or one in object storage.
    image_dir, mask_dir: relative to root unless absolute.
    image_suffix, mask_suffix: what follows the id.
    images_elsewhere: path, relative to root, of the image of those ids that do
      not lie in image_dir.
  """

  root: str | os.PathLike
  image_dir: str = "JPEGImages"
  mask_dir: str = "SegmentationClass"
  image_suffix: str = ".jpg"
  mask_suffix: str = ".png"
  images_elsewhere: Mapping[str, str] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )
  # Listings of folders, for the suffix ''.
  _names: dict[str, dict[str, list[str]]] = dataclasses.field(
    default_factory=dict, init=False, repr=False, compare=False
  )

  def image_path(self, id: str) -> str:
    """Path of the image; for the suffix '' that of the file there is.

    Raises:
      DataError: the suffix is '' and two files have the id, or the folder
        cannot be listed.
    """
    if id in self.images_elsewhere:
      return storage.join(self.root, self.images_elsewhere[id])
    return self._path(self.image_dir, id, self.image_suffix)

  def mask_path(self, id: str) -> str:
    """Path of the mask; raises as image_path does."""
    return self._path(self.mask_dir, id, self.mask_suffix)

  def read_image(self, id: str) -> bytes:
    return read_file(self.image_path(id), "image")

  def read_mask(self, id: str) -> bytes:
    return read_file(self.mask_path(id), "mask")

  def open_image(self, id: str) -> BinaryIO:
    path = self.image_path(id)
    try:
      return storage.open_file(path)
    except OSError as error:
      raise _unreadable(path, "image", error) from None

  def stored_size(self, id: str) -> None:
    return None

  def has_mask(self, id: str) -> bool:
    return storage.is_file(self.mask_path(id))

  def check(
    self, ids: Sequence[str], *, masks: bool, max_missing: int = 0
  ) -> None:
    check_files(self, ids, masks=masks, max_missing=max_missing)

  def _path(self, folder: str, id: str, suffix: str) -> str:
    stem = storage.join(self.root, folder, id)
    if suffix:
      return stem + suffix
    parent, name = os.path.split(stem)
    if parent not in self._names:
      self._names[parent] = _names_by_stem(parent)
    found = self._names[parent].get(name, [])
    if len(found) > 1:
      raise errors.AmbiguousIdError(
        f"{os.path.join(parent, found[0])} and"
        f" {os.path.join(parent, found[1])} have the same id {id!r}: remove or"
        " rename one, or set dataset.image_suffix (dataset.mask_suffix) to that"
        " of the right one",
        os.path.join(parent, found[0]),
      )
    return os.path.join(parent, found[0]) if found else stem


def _names_by_stem(folder: str) -> dict[str, list[str]]:
  try:
    names = storage.names_in(folder)
  except (FileNotFoundError, NotADirectoryError):
    names = set()
  except OSError as error:
    raise errors.DataError(
      f"{folder}: cannot list the folder: {error.strerror}"
    ) from None
  found = collections.defaultdict(list)
  for name in sorted(names):
    if splits.has_image_suffix(name) and name[0] != ".":
      found[os.path.splitext(name)[0]].append(name)
  return dict(found)


def read_file(path: str | os.PathLike, kind: str) -> bytes:
  """The bytes of a file; `kind` is 'image' or 'mask'.

  Raises:
    DataError: it is missing, empty or cannot be read.
  """
  try:
    data = storage.read_bytes(path)
  except OSError as error:
    raise _unreadable(path, kind, error) from None
  if not data:
    raise errors.EmptyFileError(
      f"{path}: the {kind} file is empty; copy or download it again"
    )
  return data


def _unreadable(
  path: str | os.PathLike, kind: str, error: OSError
) -> errors.DataError:
  if isinstance(error, FileNotFoundError):
    needed = "; every labelled image needs one" if kind == "mask" else ""
    return errors.MissingFileError(
      f"{path}: {kind} not found{needed}: add the file, or take its id off the"
      " list"
    )
  return errors.UnreadableFileError(
    f"{path}: cannot read the {kind}: {error.strerror}"
  )


def find_unlabelled(
  layout: Layout, folder: str, listed: Sequence[str]
) -> tuple[Layout, tuple[str, ...]]:
  """The images of a folder that no list names.

  Ids in image_dir are those that lists would use. Elsewhere an id is the path
  relative to the folder, without the suffix, and an image whose id a list names
  is left out too: it would be the same photograph in another place.

  Args:
    layout: of the labelled images; of its suffixes the image suffix holds here.
    folder: relative to the root unless absolute; its subfolders count.
    listed: ids of the labelled and validation images.

  Returns:
    The layout that finds these images too, and their ids, sorted.

  Raises:
    DataError: the folder is missing, holds no such image, two images with the
      same id, or the folder of the masks.
  """
  path = storage.join(layout.root, folder).rstrip("/")
  if not storage.is_folder(path):
    raise errors.DataError(
      f"{path}: the folder of the unlabelled images does not exist; it should"
      " contain the images of dataset.unlabelled_dir"
    )
  masks = storage.join(layout.root, layout.mask_dir)
  if masks.startswith(path + "/"):
    raise errors.DataError(
      f"{path}: the folder of the unlabelled images contains the folder of the"
      f" masks, {masks}: move the images into a folder of their own"
    )
  try:
    found = list(storage.files_below(path))
  except OSError as error:
    raise errors.DataError(
      f"{path}: cannot list the folder: {error.strerror}"
    ) from None
  home = storage.join(layout.root, layout.image_dir).rstrip("/") + "/"
  listed = set(listed)
  elsewhere, name_of_id = {}, {}
  for name in found:
    if layout.image_suffix:
      if not name.endswith(layout.image_suffix):
        continue
      id = name.removesuffix(layout.image_suffix)
    elif splits.has_image_suffix(name):
      id = os.path.splitext(name)[0]
    else:
      continue
    full = storage.join(path, name)
    is_home = full.startswith(home)
    if is_home:
      id = full.removeprefix(home)[: len(id) - len(name)]
    if id in listed:
      continue
    if id in name_of_id:
      raise errors.DataError(
        f"{storage.join(path, name_of_id[id])} and {full} have the same id"
        f" {id!r}: remove or rename one"
      )
    name_of_id[id] = name
    if not is_home:
      elsewhere[id] = os.path.join(folder, name)
  if not name_of_id:
    ending = layout.image_suffix or "an image suffix"
    raise errors.DataError(
      f"{path}: none of its {len(found)} files is an unlabelled image: it needs"
      f" files that end in {ending} and are in no list"
    )
  layout = dataclasses.replace(layout, images_elsewhere=elsewhere)
  return layout, tuple(sorted(name_of_id))


def check_files(
  layout: Layout, ids: Sequence[str], *, masks: bool, max_missing: int = 0
) -> None:
  """Checks that the files of all ids exist.

  Every folder is listed once instead of asking for each file, so that ten
  thousand ids on a network disk take one round trip per folder.

  Args:
    layout: where the files should be.
    ids: the ids to look for.
    masks: whether masks must exist too; False never looks at the mask folder.
    max_missing: images, and masks, that may be missing all the same.

  Raises:
    DataError: a folder is missing, or more files than that.
  """
  if not storage.is_folder(layout.root):
    wanted = layout.image_dir + "/" + (f" and {layout.mask_dir}/" * masks)
    raise errors.DataError(
      f"{layout.root}: the data folder does not exist; it should contain"
      f" {wanted}"
    )
  if any(id not in layout.images_elsewhere for id in ids):
    _check_folder(layout, layout.image_dir, "images", layout.image_suffix)
  _check_exist([layout.image_path(id) for id in ids], "image", max_missing)
  if masks:
    _check_folder(layout, layout.mask_dir, "masks", layout.mask_suffix)
    _check_exist([layout.mask_path(id) for id in ids], "mask", max_missing)


def _check_folder(layout: Layout, name: str, kind: str, suffix: str) -> None:
  folder = storage.join(layout.root, name)
  if not storage.is_folder(folder):
    raise errors.DataError(
      f"{folder}: the folder of the {kind} does not exist; it should contain"
      f" one file <id>{suffix or '.jpg or .png'} per id"
    )


def _check_exist(paths: Sequence[str], kind: str, max_missing: int) -> None:
  names_in_folder = collections.defaultdict(set)
  for path in paths:
    names_in_folder[os.path.dirname(path)].add(os.path.basename(path))
  missing = set()
  for folder, names in names_in_folder.items():
    try:
      present = storage.names_in(folder)
    except (FileNotFoundError, NotADirectoryError):
      present = set()
    except OSError as error:
      raise errors.DataError(
        f"{folder}: cannot list the folder: {error.strerror}"
      ) from None
    missing.update(os.path.join(folder, name) for name in names - present)
  if len(missing) > max_missing:
    first, *others = (path for path in paths if path in missing)
    also = f" (also {' and '.join(others[:2])})" if others else ""
    raise errors.DataError(
      f"{first}: {kind} not found; {len(missing)} of {len(paths)} {kind}s are"
      f" missing{also}: add the files, or take their ids off the list"
    )
