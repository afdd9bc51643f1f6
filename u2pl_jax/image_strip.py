"""Small pictures of what the network makes of an image, as plain arrays."""

import math

import matplotlib
import numpy as np
from PIL import Image

from u2pl_jax.report_images import colored

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
    _overlay(image, truth, palette),
    _overlay(image, prediction, palette),
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


def _overlay(
  image: np.ndarray, labels: np.ndarray, palette: np.ndarray
) -> np.ndarray:
  """[h, w, 3] uint8: the colours of the classes over the image."""
  color = colored(labels, palette)[..., :3]
  return (0.4 * image + 0.6 * color).round().astype(np.uint8)
