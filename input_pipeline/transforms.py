"""The weak augmentation: random scale, flip and crop of an image and its mask.

Pure functions of (image, mask, rng). Strong augmentation is not here: it needs
the teacher's output and runs on the device.
"""

import dataclasses

import cv2
import numpy as np

# Resizing the whole photograph costs less than sampling the crop alone up to
# about this many times the pixels (one core: 0.8 to 1.1 ns a pixel whole, 5 ns
# sampled). Beyond, a large photograph would cost time and memory for pixels
# that the crop drops.
_WHOLE_RESIZE_LIMIT = 4


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """Random scale, horizontal flip and crop, as the published code draws them.

  The scale is below 1 in half of all draws and above 1 in the other half, each
  half uniform. What is smaller than the crop is padded on both sides, then the
  crop lies anywhere with equal probability.

  Attributes:
    crop_size: (h, w) of the result.
    scale_range: (lowest, highest) scale, around 1.
    flip_probability: of a horizontal flip.
    pad_label: label of the padding.

  Raises:
    ValueError: an attribute is out of range.
  """

  crop_size: tuple[int, int]
  scale_range: tuple[float, float] = (0.5, 2.0)
  flip_probability: float = 0.5
  pad_label: int = 255

  def __post_init__(self):
    lowest, highest = self.scale_range
    if not 0 < lowest <= 1 <= highest:
      raise ValueError(
        f"scale_range {self.scale_range} must be (lowest, highest) with"
        " 0 < lowest <= 1 <= highest"
      )
    if len(self.crop_size) != 2 or min(self.crop_size) < 1:
      raise ValueError(f"crop_size {self.crop_size} must be (height, width)")
    if not 0 <= self.flip_probability <= 1:
      raise ValueError(
        f"flip_probability {self.flip_probability} must be in [0, 1]"
      )
    if not 0 <= self.pad_label <= 255:
      raise ValueError(f"pad_label {self.pad_label} must be in 0 ... 255")

  def __call__(
    self, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Draws one crop.

    The draws depend on the size of the image only, not on whether there is a
    mask: the same rng gives the same crop with and without.

    Args:
      image: uint8 [H, W, 3].
      mask: uint8 [H, W], or None.
      rng: the only source of randomness.

    Returns:
      image: uint8 [h, w, 3], 0 where padded.
      label: uint8 [h, w], pad_label where padded; only with a mask.
      valid_box: int32 [4], (top, left, bottom, right), half-open: the part of
        the crop that is image. The device writes the mean colour around it,
        which no byte value can stand for.

    Raises:
      ValueError: image and mask differ in size.
    """
    if mask is not None and mask.shape != image.shape[:2]:
      raise ValueError(f"image {image.shape} and mask {mask.shape} differ")
    crop_h, crop_w = self.crop_size
    scale = self._draw_scale(rng)
    height = max(1, int(image.shape[0] * scale))
    width = max(1, int(image.shape[1] * scale))
    flip = rng.random() < self.flip_probability
    rows, top = _draw_window(height, crop_h, rng)
    columns, left = _draw_window(width, crop_w, rng)
    if flip:
      columns = range(width - columns.stop, width - columns.start)

    bottom, right = top + len(rows), left + len(columns)
    crop = np.zeros((crop_h, crop_w, 3), np.uint8)
    resized = _resize_region(image, (height, width), rows, columns)
    if flip:
      # Into the crop at once; NumPy copies pixels of a reversed axis one by
      # one, which takes ten times as long.
      cv2.flip(resized, 1, dst=crop[top:bottom, left:right])
    else:
      crop[top:bottom, left:right] = resized
    example = {
      "image": crop,
      "valid_box": np.array([top, left, bottom, right], np.int32),
    }
    if mask is not None:
      label = np.full((crop_h, crop_w), self.pad_label, np.uint8)
      # Torch's nearest: output i reads input floor(i * in / out).
      mask_rows = np.asarray(rows) * mask.shape[0] // height
      mask_columns = np.asarray(columns) * mask.shape[1] // width
      if flip:
        mask_columns = mask_columns[::-1]
      label[top:bottom, left:right] = mask[mask_rows].take(mask_columns, axis=1)
      example["label"] = label
    return example

  def _draw_scale(self, rng: np.random.Generator) -> float:
    lowest, highest = self.scale_range
    shrink = rng.random() < 0.5
    position = rng.random()
    if shrink:
      return lowest + (1 - lowest) * position
    return 1 + (highest - 1) * position


def _draw_window(
  size: int, crop: int, rng: np.random.Generator
) -> tuple[range, int]:
  """Draws, along one axis, what the crop sees of the image.

  Returns:
    The part of the resized image that the crop shows, and where in the crop it
    begins.
  """
  canvas = max(size, crop)
  offset = int(rng.integers(0, canvas - crop + 1))
  if size < crop:
    return range(size), (crop - size) // 2
  return range(offset, offset + crop), 0


def _resize_region(
  image: np.ndarray, size: tuple[int, int], rows: range, columns: range
) -> np.ndarray:
  """The given rows and columns of the bilinearly resized image.

  Bilinear without antialiasing and with align_corners=False, as the published
  code has it. Both ways below agree to one grey level.

  Args:
    image: uint8 [H, W, 3].
    size: (height, width) of the whole resized image.
    rows: consecutive rows of the resized image.
    columns: consecutive columns of the resized image.

  Returns:
    uint8 [len(rows), len(columns), 3], perhaps a view.
  """
  height, width = size
  if image.shape[:2] == (height, width):
    resized = image
  elif height * width <= _WHOLE_RESIZE_LIMIT * len(rows) * len(columns):
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
  else:
    return _sample_region(image, size, rows, columns)
  return resized[rows.start : rows.stop, columns.start : columns.stop]


def _sample_region(
  image: np.ndarray, size: tuple[int, int], rows: range, columns: range
) -> np.ndarray:
  """_resize_region that touches only the pixels it needs."""
  step_y, first_y, source_rows = _source_window(image.shape[0], size[0], rows)
  step_x, first_x, source_columns = _source_window(
    image.shape[1], size[1], columns
  )
  return cv2.warpAffine(
    image[source_rows, source_columns],
    np.array([[step_x, 0, first_x], [0, step_y, first_y]]),
    (len(columns), len(rows)),
    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    # Only at the border of the photograph are neighbours missing; there
    # bilinear resizing repeats the last pixel too.
    borderMode=cv2.BORDER_REPLICATE,
  )


def _source_window(
  source_size: int, size: int, window: range
) -> tuple[float, float, slice]:
  """Where a window of the resized image lies in the source, along one axis.

  Returns:
    The distance of two samples, the position of the first one in the slice, and
    the slice of the source that holds all neighbours of the samples.
  """
  step = source_size / size
  first = (window.start + 0.5) * step - 0.5
  last = (window.stop - 0.5) * step - 0.5
  start = min(max(int(np.floor(first)), 0), source_size - 1)
  stop = min(int(np.floor(last)) + 2, source_size)
  return step, first - start, slice(start, stop)
