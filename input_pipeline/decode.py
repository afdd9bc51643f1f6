"""Files to arrays: photographs to RGB, masks to class ids."""

import os
import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from input_pipeline import errors, png, splits

# EXIF: tag of the orientation, and its values that swap height and width.
_EXIF_ORIENTATION = 0x0112
_SWAPPING_ORIENTATIONS = frozenset((5, 6, 7, 8))


def decode_image(path: str | os.PathLike) -> np.ndarray:
  """Reads a photograph as 8-bit RGB.

  Greyscale, CMYK and palette images are converted, 16 bits keep their upper 8,
  an alpha channel is dropped, and a rotation noted in EXIF is applied. OpenCV
  does this outside the interpreter lock (PIL does not), so that threads scale.

  Args:
    path: an image file.

  Returns:
    uint8 [h, w, 3].

  Raises:
    DataError: the file is missing, truncated, or not an image.
  """
  data = _read_bytes(path, "image")
  if data.startswith(b"\xff\xd8") and _is_truncated_jpeg(data):
    # Some OpenCV versions fill the missing part with grey, silently.
    raise errors.DataError(
      f"{path}: the JPEG file is truncated; copy or download it again"
    )
  image = png.decode_rgb(data)
  if image is not None:
    return image
  try:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
  except cv2.error:
    image = None
  if image is None:
    raise errors.DataError(
      f"{path}: cannot be decoded as an image; it is damaged, truncated or of"
      " an unknown format: replace it, or save it as JPEG or PNG"
    )
  return image


def decode_mask(
  path: str | os.PathLike, *, num_classes: int, ignore_label: int
) -> np.ndarray:
  """Reads a mask as class ids.

  The ids are the pixel values of a greyscale image or the palette indices of a
  palette image; the colours of the palette do not matter.

  Args:
    path: an image file with one channel, usually PNG.
    num_classes: valid ids are 0 ... num_classes - 1.
    ignore_label: the one other value that may occur.

  Returns:
    uint8 [h, w].

  Raises:
    DataError: the file is missing, damaged, stored with losses or in colours,
      or holds another value.
  """
  mask = _read_indices(path)
  invalid = (mask >= num_classes) & (mask != ignore_label)
  if invalid.any():
    row, column = np.unravel_index(np.argmax(invalid), mask.shape)
    value = mask[row, column]
    count = int((mask == value).sum())
    others = [int(v) for v in np.unique(mask[invalid]) if v != value]
    also = ""
    if others:
      shown = ", ".join(map(str, others[:5]))
      also = f", and also {shown}{', ...' if len(others) > 5 else ''}"
    raise errors.DataError(
      f"{path}: label value {value} in {count} pixels{also}, first at row"
      f" {row}, column {column}; labels must be 0 to {num_classes - 1}, or"
      f" {ignore_label} for pixels to ignore: correct the mask or num_classes"
    )
  # Wider pixels were checked above to hold small values.
  return mask.astype(np.uint8, copy=False)


def decode_pair(
  layout: splits.Layout, id: str, *, num_classes: int, ignore_label: int
) -> tuple[np.ndarray, np.ndarray]:
  """Reads an image and its mask: uint8 [h, w, 3] and uint8 [h, w].

  Raises:
    DataError: as decode_image and decode_mask, or the sizes differ.
  """
  image_path, mask_path = layout.image_path(id), layout.mask_path(id)
  image = decode_image(image_path)
  mask = decode_mask(
    mask_path, num_classes=num_classes, ignore_label=ignore_label
  )
  if mask.shape != image.shape[:2]:
    fix = "make one mask pixel per image pixel"
    if mask.shape == _unrotated_size(image_path):
      fix = "the image is rotated by its EXIF tag: save it without the tag"
    raise errors.DataError(
      f"{image_path} is {_size_text(image.shape)} but its mask {mask_path} is"
      f" {_size_text(mask.shape)}; {fix}"
    )
  return image, mask


def image_sizes(
  layout: splits.Layout, ids: Sequence[str]
) -> list[tuple[int, int]]:
  """(height, width) of the images as decode_image returns them.

  Reads headers only.

  Raises:
    DataError: a file is missing or has no readable header.
  """
  sizes = []
  for id in ids:
    path = layout.image_path(id)
    height, width, orientation = _read_header(path)
    if orientation in _SWAPPING_ORIENTATIONS:
      height, width = width, height
    sizes.append((height, width))
  return sizes


def _read_bytes(path: str | os.PathLike, kind: str) -> bytes:
  try:
    with open(path, "rb") as file:
      data = file.read()
  except FileNotFoundError:
    raise errors.DataError(
      f"{path}: {kind} not found; add the file, or take its id off the list"
    ) from None
  except OSError as error:
    raise errors.DataError(
      f"{path}: cannot read the {kind}: {error.strerror}"
    ) from None
  if not data:
    raise errors.DataError(
      f"{path}: the {kind} file is empty; copy or download it again"
    )
  return data


def _is_truncated_jpeg(data: bytes) -> bool:
  # In the compressed pixels 0xff is always followed by 0x00 or a restart
  # marker, so that the end marker behind the last start of scan is the real
  # one, not the one of a thumbnail in the header. Bytes may follow it.
  start_of_scan = data.rfind(b"\xff\xda")
  return start_of_scan < 0 or data.rfind(b"\xff\xd9") < start_of_scan


def _read_indices(path: str | os.PathLike) -> np.ndarray:
  """Pixel values of a one-channel image as stored, an integer [h, w] array."""
  if not os.path.isfile(path):
    raise errors.DataError(
      f"{path}: mask not found; every labelled image needs one: add the file,"
      " or take its id off the list"
    )
  indices = png.decode_indices(_read_bytes(path, "mask"))
  if indices is not None:
    return indices
  try:
    with Image.open(path) as file:
      format, mode = file.format, file.mode
      if format == "JPEG":
        raise errors.DataError(
          f"{path}: the mask is a JPEG, whose compression changes labels; save"
          " it as an index (palette or 8-bit grey) PNG"
        )
      if mode not in ("P", "L", "1", "I", "I;16", "I;16B", "I;16L"):
        raise errors.DataError(
          f"{path}: the mask holds colours ({mode}), not class ids; it must be"
          " an index (palette or 8-bit grey) PNG, so replace each colour by the"
          " id of its class"
        )
      values = np.asarray(file)
  except errors.DataError:
    raise
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    # PIL reports damage inside a PNG as a SyntaxError.
    raise errors.DataError(
      f"{path}: the mask cannot be decoded; it is damaged or truncated: copy or"
      " export it again"
    ) from None
  if mode == "1":
    return values.astype(np.uint8)
  if mode == "L" and format == "PNG":
    # PIL stretches grey of 2 and 4 bits to 0 ... 255.
    with open(path, "rb") as file:
      bit_depth = file.read(25)[24]
    if bit_depth < 8:
      return values // (255 // (2**bit_depth - 1))
  return values


def _read_header(path: str | os.PathLike) -> tuple[int, int, int]:
  """(height, width, EXIF orientation), the size before the rotation."""
  try:
    with warnings.catch_warnings():
      # PIL warns from 90 megapixels on; the size is all that is read here.
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(path) as file:
        orientation = file.getexif().get(_EXIF_ORIENTATION, 1)
        return file.height, file.width, orientation
  except FileNotFoundError:
    raise errors.DataError(
      f"{path}: image not found; add the file, or take its id off the list"
    ) from None
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    raise errors.DataError(
      f"{path}: cannot be read as an image; it is damaged, truncated or of an"
      " unknown format: replace it, or save it as JPEG or PNG"
    ) from None


def _unrotated_size(path: str) -> tuple[int, int] | None:
  height, width, orientation = _read_header(path)
  return (height, width) if orientation in _SWAPPING_ORIENTATIONS else None


def _size_text(shape: tuple[int, ...]) -> str:
  return f"{shape[1]}x{shape[0]} (width x height)"
