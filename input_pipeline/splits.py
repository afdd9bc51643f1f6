"""Where the files lie, which ids belong to which split, and are they all there.

Everything here looks at names only; no image is opened.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from input_pipeline import errors

_IMAGE_SUFFIXES = frozenset(
  (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
)
# Cityscapes names image and mask differently behind a common stem:
# x_leftImg8bit.png and x_gtFine_labelTrainIds.png. The id is the stem, and
# Layout(image_suffix="_leftImg8bit.png", ...) leads back to both files.
_CITYSCAPES_ENDING = "_leftImg8bit"


@dataclasses.dataclass(frozen=True)
class Layout:
  """The folders of a data set in VOC form.

  An id may contain subfolders: image `id` is `root/image_dir/id + image_suffix`
  and its mask `root/mask_dir/id + mask_suffix`. The suffixes may be longer than
  a file extension. Cityscapes, for example, is image_dir="leftImg8bit",
  mask_dir="gtFine", image_suffix="_leftImg8bit.png",
  mask_suffix="_gtFine_labelTrainIds.png".
  """

  root: str | os.PathLike
  image_dir: str = "JPEGImages"
  mask_dir: str = "SegmentationClass"
  image_suffix: str = ".jpg"
  mask_suffix: str = ".png"

  def image_path(self, id: str) -> str:
    return os.path.join(self.root, self.image_dir, id + self.image_suffix)

  def mask_path(self, id: str) -> str:
    return os.path.join(self.root, self.mask_dir, id + self.mask_suffix)


def read_split(path: str | os.PathLike) -> tuple[str, ...]:
  """Reads a list of ids, one a line.

  A line is a bare id (`2007_000032`, `train/ulm/0001`), or the path of an image
  (`leftImg8bit/train/ulm/x_leftImg8bit.png`), or the paths of an image and its
  mask (`JPEGImages/x.jpg SegmentationClassAug/x.png`), as published lists have
  it. Of a path, the first folder is taken for the image folder and dropped with
  the suffix: which folders and suffixes to read is the Layout's to say. Blank
  lines, CRLF, a byte order mark and a missing final newline are accepted.

  Raises:
    DataError: the file is missing or is not text, holds no id, holds an id
      twice, or holds a path that leads outside the data folder.
  """
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8-sig")
  except FileNotFoundError:
    raise errors.DataError(
      f"{path}: the split file does not exist; it should be a text file with"
      " one image id per line, for example 2007_000032"
    ) from None
  except UnicodeDecodeError:
    raise errors.DataError(
      f"{path}: the split file is not UTF-8 text; it should hold one image id"
      " per line"
    ) from None
  except OSError as error:
    raise errors.DataError(
      f"{path}: cannot read the split file: {error.strerror}"
    ) from None

  line_of_id = {}
  for number, line in enumerate(text.splitlines(), start=1):
    if not line.strip():
      continue
    id = _id_of_line(line.strip())
    if id.startswith("/") or ".." in id.split("/") or not id:
      raise errors.DataError(
        f"{path}, line {number}: {line.strip()!r} does not lie inside the data"
        " folder; write the image id, or its path relative to the data folder"
      )
    if id in line_of_id:
      raise errors.DataError(
        f"{path}: id {id!r} is listed twice, in lines {line_of_id[id]} and"
        f" {number}; remove one of them"
      )
    line_of_id[id] = number
  if not line_of_id:
    raise errors.DataError(
      f"{path}: the split file is empty; it should hold one image id per line"
    )
  return tuple(line_of_id)


def _id_of_line(line: str) -> str:
  fields = line.split()
  # A name may contain spaces, so that two words are two paths only if both end
  # like an image.
  if len(fields) == 2 and all(_has_image_suffix(field) for field in fields):
    line = fields[0]
  if not _has_image_suffix(line):
    return line
  if not line.startswith("/"):
    line = line.split("/", maxsplit=1)[-1]
  stem = os.path.splitext(line)[0]
  return stem.removesuffix(_CITYSCAPES_ENDING)


def _has_image_suffix(name: str) -> bool:
  return os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES


def check_splits(
  labelled: Sequence[str], unlabelled: Sequence[str], validation: Sequence[str]
) -> None:
  """Checks that no image plays two roles.

  Raises:
    DataError: two of the three lists share an id.
  """
  _check_disjoint("labelled", labelled, "unlabelled", unlabelled)
  _check_disjoint("labelled", labelled, "validation", validation)
  _check_disjoint("unlabelled", unlabelled, "validation", validation)


def _check_disjoint(
  name_a: str, ids_a: Sequence[str], name_b: str, ids_b: Sequence[str]
) -> None:
  in_b = set(ids_b)
  shared = [id for id in ids_a if id in in_b]
  if shared:
    examples = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
    raise errors.DataError(
      f"the {name_a} and the {name_b} split share {len(shared)}"
      f" {'id' if len(shared) == 1 else 'ids'} ({examples}); an image may be in"
      " only one of the two: remove it from one list"
    )


def check_files(layout: Layout, ids: Sequence[str], *, masks: bool) -> None:
  """Checks that the files of all ids exist.

  Every folder is listed once instead of asking for each file, so that ten
  thousand ids on a network disk take one round trip per folder.

  Args:
    layout: where the files should be.
    ids: the ids to look for.
    masks: whether masks must exist too; False never looks at the mask folder.

  Raises:
    DataError: a folder or a file is missing.
  """
  if not os.path.isdir(layout.root):
    wanted = layout.image_dir + "/" + (f" and {layout.mask_dir}/" * masks)
    raise errors.DataError(
      f"{layout.root}: the data folder does not exist; it should contain"
      f" {wanted}"
    )
  _check_folder(layout, layout.image_dir, "images", layout.image_suffix)
  _check_exist([layout.image_path(id) for id in ids], "image")
  if masks:
    _check_folder(layout, layout.mask_dir, "masks", layout.mask_suffix)
    _check_exist([layout.mask_path(id) for id in ids], "mask")


def _check_folder(layout: Layout, name: str, kind: str, suffix: str) -> None:
  folder = os.path.join(layout.root, name)
  if not os.path.isdir(folder):
    raise errors.DataError(
      f"{folder}: the folder of the {kind} does not exist; it should contain"
      f" one file <id>{suffix} per id"
    )


def _check_exist(paths: Sequence[str], kind: str) -> None:
  names_in_folder = collections.defaultdict(set)
  for path in paths:
    names_in_folder[os.path.dirname(path)].add(os.path.basename(path))
  missing = set()
  for folder, names in names_in_folder.items():
    try:
      with os.scandir(folder) as entries:
        present = {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
      present = set()
    except OSError as error:
      raise errors.DataError(
        f"{folder}: cannot list the folder: {error.strerror}"
      ) from None
    missing.update(os.path.join(folder, name) for name in names - present)
  if missing:
    first = next(path for path in paths if path in missing)
    raise errors.DataError(
      f"{first}: {kind} not found; {len(missing)} of {len(paths)} {kind}s are"
      f" missing: add the files, or take their ids off the list"
    )
