"""Encoded bytes to arrays: photographs to RGB, masks to class ids."""

import functools
import io
import os
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from input_pipeline import errors, png, sources
from input_pipeline.datasets import INDEX_MASKS, MaskFormat

# EXIF: tag of the orientation, and its values that swap height and width.
_EXIF_ORIENTATION = 0x0112
SWAPPING_ORIENTATIONS = frozenset((5, 6, 7, 8))

# PIL reports damage inside a PNG as a SyntaxError.
PIL_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# Train id of the label ids 0 ... 33 of Cityscapes, -1 for those to ignore.
_TRAIN_IDS = (
  *(-1, -1, -1, -1, -1, -1, -1, 0, 1, -1, -1, 2, 3, 4, -1, -1, -1),
  *(5, -1, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -1, -1, 16, 17, 18),
)


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
  return image_from_bytes(sources.read_file(path, "image"), path)


def image_from_bytes(data: bytes, path: str | os.PathLike) -> np.ndarray:
  """decode_image of bytes that were read already; `path` is for messages."""
  if data.startswith(b"\xff\xd8") and _is_truncated_jpeg(data):
    # Some OpenCV versions fill the missing part with grey, silently.
    raise errors.UnreadableFileError(
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
    raise errors.UnreadableFileError(
      f"{path}: cannot be decoded as an image; it is damaged, truncated or of"
      " an unknown format: replace it, or save it as JPEG or PNG"
    )
  return image


def decode_mask(
  path: str | os.PathLike,
  *,
  num_classes: int,
  ignore_label: int,
  mask_format: MaskFormat = INDEX_MASKS,
) -> np.ndarray:
  """Reads a mask as class ids.

  Without another format the ids are the pixel values of a greyscale image or
  the palette indices of a palette image; the colours of the palette do not
  matter.

  Args:
    path: an image file stored without losses, usually PNG.
    num_classes: valid ids are 0 ... num_classes - 1.
    ignore_label: the one other value that may occur.
    mask_format: what the pixels mean.

  Returns:
    uint8 [h, w].

  Raises:
    DataError: the file is missing, damaged, stored with losses, not of this
      format, or holds another value or colour.
  """
  return mask_from_bytes(
    sources.read_file(path, "mask"),
    path,
    num_classes=num_classes,
    ignore_label=ignore_label,
    mask_format=mask_format,
  )


def mask_from_bytes(
  data: bytes,
  path: str | os.PathLike,
  *,
  num_classes: int,
  ignore_label: int,
  mask_format: MaskFormat = INDEX_MASKS,
) -> np.ndarray:
  """decode_mask of bytes that were read already; `path` is for messages."""
  if mask_format.kind == "colours":
    return _ids_of_colours(data, path, mask_format, ignore_label)
  mask = read_indices(data, path)
  if mask_format.kind == "cityscapes_label_ids":
    return _train_ids(mask, path, ignore_label)
  invalid = (mask >= num_classes) & (mask != ignore_label)
  if invalid.any():
    _refuse_values(
      mask,
      invalid,
      path,
      f"labels must be 0 to {num_classes - 1}, or {ignore_label} for pixels to"
      " ignore: correct the mask, the class table or dataset.mask_format",
    )
  # Wider pixels were checked above to hold small values.
  return mask.astype(np.uint8, copy=False)


def _train_ids(
  mask: np.ndarray, path: str | os.PathLike, ignore_label: int
) -> np.ndarray:
  invalid = (mask >= len(_TRAIN_IDS)) | (mask < 0)
  if invalid.any():
    _refuse_values(
      mask,
      invalid,
      path,
      f"label ids of Cityscapes are 0 to {len(_TRAIN_IDS) - 1}: for masks of"
      " train ids set dataset.mask_format='index'",
    )
  train_ids = np.array(_TRAIN_IDS)
  table = np.where(train_ids < 0, ignore_label, train_ids).astype(np.uint8)
  return table[mask]


def _refuse_values(
  mask: np.ndarray, invalid: np.ndarray, path: str | os.PathLike, rule: str
):
  """Raises the DataError that says which values are invalid, and where."""
  row, column = np.unravel_index(np.argmax(invalid), mask.shape)
  value = mask[row, column]
  count = int((mask == value).sum())
  others = [int(v) for v in np.unique(mask[invalid]) if v != value]
  also = ""
  if others:
    shown = ", ".join(map(str, others[:5]))
    also = f", and also {shown}{', ...' if len(others) > 5 else ''}"
  raise errors.LabelError(
    f"{path}: label value {value} in {count} pixels{also}, first at row {row},"
    f" column {column}; {rule}"
  )


def _ids_of_colours(
  data: bytes,
  path: str | os.PathLike,
  mask_format: MaskFormat,
  ignore_label: int,
) -> np.ndarray:
  rgb = read_colours(data, path)
  table = _colour_table(mask_format, ignore_label)
  codes = rgb[..., 0].astype(np.int32) << 16
  codes |= rgb[..., 1].astype(np.int32) << 8
  codes |= rgb[..., 2]
  ids = table[codes]
  invalid = ids == _no_class(ignore_label)
  if invalid.any():
    row, column = np.unravel_index(np.argmax(invalid), ids.shape)
    count = int((codes == codes[row, column]).sum())
    others = len(np.unique(codes[invalid])) - 1
    also = f", and {others} other such colours" if others else ""
    colour = tuple(int(value) for value in rgb[row, column])
    raise errors.LabelError(
      f"{path}: colour {colour} in {count} pixels{also}, first at row {row},"
      f" column {column}, is that of no class: correct the mask, or add the"
      " colour to the class table (as 'ignore R G B' for pixels to ignore)"
    )
  return ids


def _no_class(ignore_label: int) -> int:
  # There are at most 254 classes, so that one of these ids is free.
  return 254 if ignore_label != 254 else 255


@functools.lru_cache(maxsize=4)
def _colour_table(mask_format: MaskFormat, ignore_label: int) -> np.ndarray:
  """Class id of every 24-bit colour, uint8 [2 ** 24]: one gather per mask."""
  table = np.full(1 << 24, _no_class(ignore_label), np.uint8)
  for class_id, (red, green, blue) in enumerate(mask_format.palette):
    table[red << 16 | green << 8 | blue] = class_id
  if mask_format.ignore_colour is not None:
    red, green, blue = mask_format.ignore_colour
    table[red << 16 | green << 8 | blue] = ignore_label
  return table


def decode_pair(
  source: sources.Source,
  id: str,
  *,
  num_classes: int,
  ignore_label: int,
  mask_format: MaskFormat = INDEX_MASKS,
) -> tuple[np.ndarray, np.ndarray]:
  """Reads an image and its mask: uint8 [h, w, 3] and uint8 [h, w].

  Raises:
    DataError: as decode_image and decode_mask, or the sizes differ.
  """
  image_path, mask_path = source.image_path(id), source.mask_path(id)
  data = source.read_image(id)
  image = image_from_bytes(data, image_path)
  mask = mask_from_bytes(
    source.read_mask(id),
    mask_path,
    num_classes=num_classes,
    ignore_label=ignore_label,
    mask_format=mask_format,
  )
  if mask.shape != image.shape[:2]:
    fix = "make one mask pixel per image pixel"
    height, width, orientation = read_header(io.BytesIO(data), image_path)
    if orientation in SWAPPING_ORIENTATIONS and mask.shape == (height, width):
      fix = "the image is rotated by its EXIF tag: save it without the tag"
    raise errors.DataError(
      f"{image_path} is {_size_text(image.shape)} but its mask {mask_path} is"
      f" {_size_text(mask.shape)}; {fix}"
    )
  return image, mask


def image_sizes(
  source: sources.Source, ids: Sequence[str]
) -> list[tuple[int, int]]:
  """(height, width) of the images as decode_image returns them.

  Reads headers only, if those.

  Raises:
    DataError: a file is missing or has no readable header.
  """
  sizes = []
  for id in ids:
    if (size := source.stored_size(id)) is not None:
      sizes.append(size)
      continue
    with source.open_image(id) as file:
      height, width, orientation = read_header(file, source.image_path(id))
    if orientation in SWAPPING_ORIENTATIONS:
      height, width = width, height
    sizes.append((height, width))
  return sizes


def _is_truncated_jpeg(data: bytes) -> bool:
  # In the compressed pixels 0xff is always followed by 0x00 or a restart
  # marker, so that the end marker behind the last start of scan is the real
  # one, not the one of a thumbnail in the header. Bytes may follow it.
  start_of_scan = data.rfind(b"\xff\xda")
  return start_of_scan < 0 or data.rfind(b"\xff\xd9") < start_of_scan


def read_indices(data: bytes, path: str | os.PathLike) -> np.ndarray:
  """Pixel values of a one-channel image as stored, an integer [h, w] array.

  Raises:
    DataError: the image has colours, is damaged or a JPEG; `path` is for the
      message.
  """
  indices = png.decode_indices(data)
  if indices is not None:
    return indices
  with _open_mask(data, path) as file:
    format, mode = file.format, file.mode
    if mode not in ("P", "L", "1", "I", "I;16", "I;16B", "I;16L"):
      raise errors.MaskFormatError(
        f"{path}: the mask holds colours ({mode}), not class ids; it must be an"
        " index (palette or 8-bit grey) PNG, or set"
        " dataset.mask_format='colours' if they are those of the classes"
      )
    values = _pixels(file, path)
  if mode == "1":
    return values.astype(np.uint8)
  if mode == "L" and format == "PNG":
    # PIL stretches grey of 2 and 4 bits to 0 ... 255.
    bit_depth = data[24]
    if bit_depth < 8:
      return values // (255 // (2**bit_depth - 1))
  return values


def read_colours(data: bytes, path: str | os.PathLike) -> np.ndarray:
  """Colours of an 8-bit image, grey and palette ones too: uint8 [h, w, 3].

  Raises:
    DataError: the image has 16 bits a channel, is damaged or a JPEG; `path` is
      for the message.
  """
  with _open_mask(data, path) as file:
    if file.mode not in ("RGB", "RGBA", "P", "L", "LA", "1"):
      raise errors.MaskFormatError(
        f"{path}: the mask is of mode {file.mode}, not of 8-bit colours; save"
        " it as an RGB PNG"
      )
    return _pixels(file, path, convert="RGB")


def _open_mask(data: bytes, path: str | os.PathLike) -> Image.Image:
  try:
    file = Image.open(io.BytesIO(data))
  except PIL_ERRORS:
    raise _damaged_mask(path) from None
  if file.format == "JPEG":
    file.close()
    raise errors.MaskFormatError(
      f"{path}: the mask is a JPEG, whose compression changes labels; save it"
      " as PNG"
    )
  return file


def _pixels(
  file: Image.Image, path: str | os.PathLike, *, convert: str | None = None
) -> np.ndarray:
  try:
    return np.asarray(file if convert is None else file.convert(convert))
  except PIL_ERRORS:
    raise _damaged_mask(path) from None


def _damaged_mask(path: str | os.PathLike) -> errors.DataError:
  return errors.UnreadableFileError(
    f"{path}: the mask cannot be decoded; it is damaged or truncated: copy or"
    " export it again"
  )


def read_header(
  file: BinaryIO, path: str | os.PathLike
) -> tuple[int, int, int]:
  """(height, width, EXIF orientation) of an image, before it is turned.

  Raises:
    DataError: the header cannot be read; `path` is for the message.
  """
  try:
    with warnings.catch_warnings():
      # PIL warns from 90 megapixels on; the size is all that is read here.
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(file) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        height, width = image.height, image.width
        if image.format == "TIFF" and orientation in SWAPPING_ORIENTATIONS:
          height, width = width, height  # PIL tells the size of the turned one.
        return height, width, orientation
  except Image.DecompressionBombError as error:
    text = str(error).split(",")[0]
    raise errors.UnreadableFileError(
      f"{path}: too large ({text}): reduce it, or cut it into pieces"
    ) from None
  except PIL_ERRORS:
    raise errors.UnreadableFileError(
      f"{path}: cannot be read as an image; it is damaged, truncated or of an"
      " unknown format: replace it, or save it as JPEG or PNG"
    ) from None


def _size_text(shape: tuple[int, ...]) -> str:
  return f"{shape[1]}x{shape[0]} (width x height)"
