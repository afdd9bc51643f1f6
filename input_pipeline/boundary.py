"""Boundary IoU: how well the outlines of classes agree.

Cheng et al. 2021, for all classes at once: a pixel belongs to the boundary of
its class if something else lies within the distance, the outside of the image
included.
"""

import cv2
import numpy as np

DILATION_RATIO = 0.02


def boundary_counts(
  truth: np.ndarray,
  prediction: np.ndarray,
  *,
  num_classes: int,
  ignore_label: int,
) -> np.ndarray:
  """Pixels in the intersection and in the union of the two boundaries.

  Pixels that the truth ignores belong to no class on either side, so that the
  boundary of what lies next to them is the same for both.

  Args:
    truth: uint8 [h, w].
    prediction: uint8 [h, w], in [0, num_classes).
    num_classes: k.
    ignore_label: in the truth, none of the classes.

  Returns:
    [k, 2] int64.
  """
  prediction = np.where(
    truth == ignore_label, np.uint8(ignore_label), prediction
  )
  # As in the authors' code: 2 % of the diagonal, steps of a 3x3 erosion.
  distance = max(1, round(DILATION_RATIO * float(np.hypot(*truth.shape))))
  in_truth = _near_something_else(truth, distance)
  in_prediction = _near_something_else(prediction, distance)

  def count(labels: np.ndarray) -> np.ndarray:
    return np.bincount(labels, minlength=256)[:num_classes]

  both = in_truth & in_prediction & (truth == prediction)
  intersection = count(truth[both])
  union = count(truth[in_truth]) + count(prediction[in_prediction])
  return np.stack([intersection, union - intersection], 1).astype(np.int64)


def _near_something_else(labels: np.ndarray, distance: int) -> np.ndarray:
  """Whether another label, or the outside, is within the (square) distance."""
  kernel = np.ones((2 * distance + 1,) * 2, np.uint8)
  # OpenCV's default border changes neither minimum nor maximum.
  found = cv2.erode(labels, kernel) != cv2.dilate(labels, kernel)
  for edge in (np.s_[:distance], np.s_[-distance:]):
    found[edge] = True
    found[:, edge] = True
  return found
