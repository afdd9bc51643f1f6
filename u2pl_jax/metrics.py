"""What is read off counts of pixels: NumPy alone, no backend."""

import numpy as np


def iou(confusion: np.ndarray) -> np.ndarray:
  """[k, k] counts -> [k] IoU; NaN for a class found on neither side."""
  confusion = confusion.astype(np.float64)
  intersection = np.diag(confusion)
  union = confusion.sum(0) + confusion.sum(1) - intersection
  with np.errstate(invalid="ignore"):
    return intersection / union


def mean_iou(confusion: np.ndarray) -> float:
  """Mean IoU over all classes; an absent class counts 0, as published."""
  return float(np.nan_to_num(iou(confusion)).mean())


def mean_iou_present(confusion: np.ndarray) -> float:
  """Mean IoU over the classes that occur in the truth; NaN if none does."""
  present = confusion.sum(1) > 0
  return float(iou(confusion)[present].mean()) if present.any() else np.nan


def pixel_accuracy(confusion: np.ndarray) -> float:
  """Share of counted pixels that are right; NaN without any."""
  total = confusion.sum()
  return float(np.trace(confusion) / total) if total else float("nan")


def mean_accuracy(confusion: np.ndarray) -> float:
  """Mean over the classes of the truth of the share found; NaN if none."""
  truth = confusion.sum(1)
  present = truth > 0
  if not present.any():
    return float("nan")
  return float((np.diag(confusion)[present] / truth[present]).mean())


def frequency_weighted_iou(confusion: np.ndarray) -> float:
  """IoU of each class, weighted by its share of the truth; NaN if no pixel."""
  truth = confusion.sum(1)
  present = truth > 0
  if not present.any():
    return float("nan")
  return float((truth[present] * iou(confusion)[present]).sum() / truth.sum())


def expected_calibration_error(calibration: np.ndarray) -> float:
  """Mean distance of confidence and accuracy, weighted by pixels.

  Args:
    calibration: [bins, 3]: pixels, sum of their confidence, pixels right.

  Returns:
    In [0, 1]; NaN without any pixel.
  """
  pixels, confidence, right = np.asarray(calibration, np.float64).T
  if not pixels.sum():
    return float("nan")
  return float(np.abs(confidence - right).sum() / pixels.sum())


def adjusted_rand_index(confusion: np.ndarray) -> float:
  """Agreement of two partitions of pixels, 1 perfect, 0 by chance.

  Hubert and Arabie 1985, from the contingency table, which the confusion
  matrix is.

  Args:
    confusion: [k, k] counts.

  Returns:
    The index; 1 if both sides are a single class; NaN for no pixels.
  """
  counts = confusion.astype(np.float64)
  total = counts.sum()
  if total < 2:
    return float("nan")

  def pairs(n):
    return (n * (n - 1) / 2).sum()

  together = pairs(counts)
  rows, cols = pairs(counts.sum(1)), pairs(counts.sum(0))
  expected = rows * cols / (total * (total - 1) / 2)
  maximum = (rows + cols) / 2
  if maximum == expected:
    return 1.0
  return float((together - expected) / (maximum - expected))
