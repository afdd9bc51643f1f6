"""Small pictures of what the network makes of an image, as plain arrays."""

import math

import matplotlib
import numpy as np
from PIL import Image

# Pixels: the longer side of each panel, and the gap between two.
_PANEL_SIZE, _GAP = 256, 4


def image_strip(
  *,
  image: np.ndarray,
  truth: np.ndarray,
  prediction: np.ndarray,
  entropy: np.ndarray,
  palette: np.ndarray,
) -> np.ndarray:
  """Image | truth | prediction | entropy, side by side.

  Args:
    image: [h, w, 3] uint8.
    truth, prediction: [h, w] int; striped where the value is no class.
    entropy: [h, w] in nats, drawn from 0 to its maximum log k.
    palette: [k, 3].

  Returns:
    [h', 4 w' + 3 gaps, 3] uint8, h' and w' at most 256 and in proportion; a
    smaller image keeps its size.
  """
  scale = entropy / math.log(max(2, len(palette)))
  heat = matplotlib.colormaps["magma"](np.clip(scale, 0, 1), bytes=True)
  panels = (
    image,
    overlay(image, truth, palette),
    overlay(image, prediction, palette),
    heat[..., :3],
  )
  factor = -(-max(truth.shape) // _PANEL_SIZE)
  strip = []
  for panel in panels:
    reduced = Image.fromarray(np.ascontiguousarray(panel)).reduce(factor)
    strip += [
      np.asarray(reduced),
      np.zeros((reduced.height, _GAP, 3), np.uint8),
    ]
  return np.concatenate(strip[:-1], axis=1)


def overlay(
  image: np.ndarray, labels: np.ndarray, palette: np.ndarray
) -> np.ndarray:
  """Class colours over the image; a label without class is striped.

  Stripes, since any plain colour may be the colour of a class.

  Args:
    image: [h, w, 3] uint8.
    labels: [h, w] int.
    palette: [k, 3].

  Returns:
    [h, w, 3] uint8.
  """
  num_classes = len(palette)
  has_class = (labels >= 0) & (labels < num_classes)
  color = palette[np.where(has_class, labels, 0)].astype(np.float32)
  y, x = np.indices(labels.shape)
  stripe = (x + y) // max(2, labels.shape[1] // 64) % 2
  color = np.where(has_class[..., None], color, 255 * stripe[..., None])
  return (0.4 * image + 0.6 * color).round().astype(np.uint8)
