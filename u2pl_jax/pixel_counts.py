"""Pixels counted on the device, image by image: what every score is made of."""

import jax
import jax.numpy as jnp

Array = jax.Array


def confusion_matrices(
  labels: Array, predictions: Array, *, num_classes: int, ignore_label: int
) -> Array:
  """Counts the pixels of each image by (true class, predicted class).

  Args:
    labels: [b, ...] int.
    predictions: [b, ...] int in [0, num_classes).
    num_classes: k.
    ignore_label: pixels that do not count.

  Returns:
    [b, k, k] int32: rows are truth. An image stays below 2**31 pixels; sums
    over images belong in int64 on the host.
  """
  valid = labels != ignore_label
  cell = jnp.where(valid, labels * num_classes + predictions, num_classes**2)

  def count(cell: Array) -> Array:
    return jnp.bincount(cell.ravel(), length=num_classes**2 + 1)[:-1]

  counts = jax.vmap(count)(cell)
  return counts.reshape(-1, num_classes, num_classes).astype(jnp.int32)


def calibration_counts(
  confidence: Array, is_right: Array, is_valid: Array, *, num_bins: int
) -> tuple[Array, Array]:
  """Sorts pixels by the probability of their predicted class.

  Bin i holds the pixels with confidence in (i / num_bins, (i + 1) / num_bins],
  as Guo et al. 2017 have it.

  Args:
    confidence: float32, any shape, the largest probability of each pixel.
    is_right: bool, same shape, whether the prediction is the truth.
    is_valid: bool, same shape, the pixels that count.
    num_bins: of equal width.

  Returns:
    counts [num_bins, 2] int32, pixels and right pixels of each bin, and
    confidence [num_bins] float32, summed.
  """
  bins = jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1
  bins = jnp.where(is_valid, jnp.clip(bins, 0, num_bins - 1), num_bins)

  # Reductions, not scattered additions: those lose the last digits of a sum of
  # millions in float32.
  def one(index: Array) -> tuple[Array, Array]:
    inside = bins == index
    counts = jnp.stack(
      [inside.sum(dtype=jnp.int32), (inside & is_right).sum(dtype=jnp.int32)]
    )
    return counts, jnp.where(inside, confidence, 0).sum()

  return jax.vmap(one)(jnp.arange(num_bins))
