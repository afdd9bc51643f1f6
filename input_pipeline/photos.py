"""Photographs that nobody prepared, and the pictures made of them.

Finds files by folder, pattern or name, reads them as training does, and encodes
masks, maps and overlays.
"""

import dataclasses
import glob
import io
import os
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from input_pipeline import decode, errors, sources, storage

# Share of the class's colour in an overlay; the rest is the photograph.
_TINT = 0.5
# An outline is one pixel wide for each so many pixels of the shorter side.
_OUTLINE = 500
_JPEG_QUALITY = 92

# What a file whose name ends otherwise is, if it cannot be read: no image.
_SUFFIXES = frozenset(
  (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".tif"),
    *(".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pnm", ".jp2", ".avif"),
    *(".heic", ".heif"),
  )
)


@dataclasses.dataclass(frozen=True)
class Photos:
  """Files to look at.

  Attributes:
    root: the folder that their names are relative to.
    names: sorted, with '/' between folders.
    is_recursive: whether files of any folder below `root` would be among them.
  """

  root: str
  names: tuple[str, ...]
  is_recursive: bool

  def path(self, name: str) -> str:
    """The file of a name."""
    return storage.join(self.root, name)


def find_photos(what: str) -> Photos:
  """Finds the files of a folder (and those below), of a pattern, or one file.

  Whether they are images shows when they are read. Names that begin with a dot
  are left out, except a file that is named itself.

  Args:
    what: local, or a folder or file in object storage. A pattern has *, ?, [ ]
      and ** for any folders.

  Raises:
    DataError: there is nothing of that kind.
  """
  flag = f"--images={what}"
  if storage.is_folder(what):
    try:
      names = tuple(storage.files_below(what))
    except OSError as error:
      raise errors.DataError(
        f"{flag}: cannot list the folder: {error.strerror}"
      ) from None
    if not names:
      raise errors.DataError(f"{flag}: the folder is empty: there is no image")
    return Photos(what, names, is_recursive=True)
  if storage.is_file(what):
    root, name = os.path.split(what)
    return Photos(root or ".", (name,), is_recursive=False)
  if not glob.has_magic(what):
    raise errors.MissingFileError(
      f"{flag}: there is no such file or folder: correct the path"
    )
  fixed: list[str] = []
  for part in what.split("/")[:-1]:
    if glob.has_magic(part):
      break
    fixed.append(part)
  root = "/".join(fixed) or ("/" if what.startswith("/") else ".")
  paths = [p for p in glob.iglob(what, recursive=True) if os.path.isfile(p)]
  if not paths:
    raise errors.DataError(
      f"{flag}: no file matches the pattern; quote it, so that the shell does"
      " not read it, and correct it"
    )
  names = sorted({os.path.relpath(p, root).replace(os.sep, "/") for p in paths})
  return Photos(root, tuple(names), is_recursive="**" in what)


def has_image_suffix(name: str) -> bool:
  """Whether a name ends like that of an image."""
  return os.path.splitext(name)[1].lower() in _SUFFIXES


def photo_size(path: str) -> tuple[int, int]:
  """(height, width) as `read_photo` returns it, from the header alone.

  Raises:
    DataError: the file is missing, empty, or has no readable header.
  """
  try:
    with storage.open_file(path) as file:
      if not file.read(1):
        raise errors.EmptyFileError(
          f"{path}: the file is empty (0 bytes); copy or download it again"
        )
      file.seek(0)
      height, width, orientation = decode.read_header(file, path)
  except OSError as error:
    raise errors.UnreadableFileError(
      f"{path}: cannot be read: {error.strerror or error}"
    ) from None
  if orientation in decode.SWAPPING_ORIENTATIONS:
    return width, height
  return height, width


def read_photo(path: str) -> np.ndarray:
  """Reads a photograph as the network saw them in training.

  Greyscale, CMYK and palette images become RGB, 16 bits keep their upper 8, an
  alpha channel is dropped, and a rotation noted in EXIF is applied: the result
  is what a viewer shows. Of an animation the first picture is taken.

  Args:
    path: of an image file.

  Returns:
    uint8 [h, w, 3].

  Raises:
    DataError: the file is missing, empty, truncated, or not an image.
  """
  return decode.image_from_bytes(sources.read_file(path, "image"), path)


def encode_classes(
  classes: np.ndarray, palette: Sequence[Sequence[int]]
) -> bytes:
  """An index PNG: the pixels are class ids, the palette says their colours.

  Args:
    classes: uint8 [h, w].
    palette: (red, green, blue) in 0..255 of each class.
  """
  picture = Image.fromarray(classes, "P")
  # A short palette would be stored with fewer bits a pixel, which not every
  # reader takes.
  colours = [*palette, *[(0, 0, 0)] * (256 - len(palette))]
  picture.putpalette([value for colour in colours for value in colour])
  data = io.BytesIO()
  picture.save(data, format="PNG")
  return data.getvalue()


def encode_map(values: np.ndarray) -> bytes:
  """A grey PNG of uint8 [h, w]."""
  return _encode(".png", values, [])


def encode_overlay(
  image: np.ndarray, classes: np.ndarray, palette: Sequence[Sequence[int]]
) -> bytes:
  """A JPEG of `draw_overlay`: for looking, at a tenth of a PNG's size."""
  overlay = draw_overlay(image, classes, palette)
  return _encode(
    ".jpg",
    cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR),
    [
      *(cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY),
      # Colours at full resolution: outlines are thin.
      *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111),
    ],
  )


def draw_overlay(
  image: np.ndarray, classes: np.ndarray, palette: Sequence[Sequence[int]]
) -> np.ndarray:
  """The photograph in the colours of the classes, with white outlines.

  Args:
    image: uint8 [h, w, 3].
    classes: uint8 [h, w].
    palette: (red, green, blue) in 0..255 of each class.

  Returns:
    uint8 [h, w, 3].
  """
  table = np.zeros((256, 3), np.uint8)
  table[: len(palette)] = palette
  overlay = cv2.addWeighted(image, 1 - _TINT, table[classes], _TINT, 0)
  # The upper or left one of two neighbours that differ.
  outline = np.zeros(classes.shape, np.uint8)
  outline[:-1] |= classes[:-1] != classes[1:]
  outline[:, :-1] |= classes[:, :-1] != classes[:, 1:]
  width = max(1, round(min(classes.shape) / _OUTLINE))
  if width > 1:
    outline = cv2.dilate(outline, np.ones((width, width), np.uint8))
  overlay[outline.astype(bool)] = 255
  return overlay


def _encode(suffix: str, pixels: np.ndarray, parameters: list[int]) -> bytes:
  done, data = cv2.imencode(suffix, pixels, parameters)
  if not done:
    raise RuntimeError(f"cannot encode {pixels.shape} as {suffix}")
  return data.tobytes()
