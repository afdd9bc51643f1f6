"""Which ids belong to which split: lists in text files."""

import itertools
import os
from collections.abc import Mapping, Sequence

from input_pipeline import errors, storage

_IMAGE_SUFFIXES = frozenset(
  (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
)
# Cityscapes names image and mask differently behind a common stem:
# x_leftImg8bit.png and x_gtFine_labelTrainIds.png. The id is the stem, and
# Layout(image_suffix="_leftImg8bit.png", ...) leads back to both files.
_CITYSCAPES_ENDING = "_leftImg8bit"


def read_split(path: str | os.PathLike) -> tuple[str, ...]:
  """Reads a list of ids, one a line; see `read_lines` for what lines may hold.

  Raises:
    DataError: the file is missing or is not text, holds no id, holds an id
      twice, or holds a path that leads outside the data folder.
  """
  line_of_id = {}
  for number, id in read_lines(path):
    if leads_outside(id):
      raise errors.DataError(
        f"{path}, line {number}: {id!r} does not lie inside the data folder;"
        " write the image id, or its path relative to the data folder"
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


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
  """Reads the lines of a list: (line number from 1, id), blank lines left out.

  A line is a bare id (`2007_000032`, `train/ulm/0001`), or the path of an image
  (`leftImg8bit/train/ulm/x_leftImg8bit.png`), or the paths of an image and its
  mask (`JPEGImages/x.jpg SegmentationClassAug/x.png`), as published lists have
  it. Of a path, the first folder is taken for the image folder and dropped with
  the suffix: which folders and suffixes to read is the Layout's to say. CRLF, a
  byte order mark and a missing final newline are accepted.

  Raises:
    DataError: the file is missing or is not text.
  """
  try:
    text = storage.read_bytes(path).decode("utf-8-sig")
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
  lines = enumerate(text.splitlines(), start=1)
  return [(n, id_of_line(line.strip())) for n, line in lines if line.strip()]


def leads_outside(id: str) -> bool:
  """Whether an id leads out of the folder that it is relative to."""
  return not id or id.startswith("/") or ".." in id.split("/")


def id_of_line(line: str) -> str:
  """The id that a line of a list, without blanks around it, stands for."""
  fields = line.split()
  # A name may contain spaces, so that two words are two paths only if both end
  # like an image.
  if len(fields) == 2 and all(has_image_suffix(field) for field in fields):
    line = fields[0]
  if not has_image_suffix(line):
    return line
  if not line.startswith("/"):
    line = line.split("/", maxsplit=1)[-1]
  stem = os.path.splitext(line)[0]
  return stem.removesuffix(_CITYSCAPES_ENDING)


def has_image_suffix(name: str) -> bool:
  """Whether a file name ends like an image; upper case counts."""
  return os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES


def check_splits(lists: Mapping[str, Sequence[str]]) -> None:
  """Checks that no image is in two lists.

  Args:
    lists: ids by what messages call their list, such as its path.

  Raises:
    DataError: two of them share an id.
  """
  for (name_a, ids_a), (name_b, ids_b) in itertools.combinations(
    lists.items(), 2
  ):
    in_b = set(ids_b)
    shared = [id for id in ids_a if id in in_b]
    if shared:
      examples = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
      raise errors.DataError(
        f"{name_a} and {name_b} share {len(shared)}"
        f" {'id' if len(shared) == 1 else 'ids'} ({examples}); an image may be"
        " labelled, unlabelled or for validation: remove it from one list"
      )
