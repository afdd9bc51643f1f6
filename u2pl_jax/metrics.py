"""Confusion matrices and what is read off them."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def confusion_matrix(
  labels: Array, predictions: Array, *, num_classes: int, ignore_label: int
) -> Array:
  """Counts pixels by (true class, predicted class), on the device.

  Args:
    labels: int, any shape.
    predictions: int in [0, num_classes), same shape.
    num_classes: k.
    ignore_label: pixels that do not count.

  Returns:
    [k, k] int32: rows are truth. One batch stays below 2**31 pixels; sums over
    batches belong in int64 on the host.
  """
  valid = labels != ignore_label
  cell = jnp.where(valid, labels * num_classes + predictions, num_classes**2)
  counts = jnp.bincount(cell.ravel(), length=num_classes**2 + 1)
  return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


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
