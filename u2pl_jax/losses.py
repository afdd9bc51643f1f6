"""Cross-entropies: with ignored pixels, hard-example mining, pseudo labels.

Every loss is at least float32, and 0 with zero gradient when no pixel counts
(the published code gives NaN there).
"""

import jax
import jax.numpy as jnp

from u2pl_jax.selection import order_statistics

Array = jax.Array


def pixel_cross_entropy(
  logits: Array, labels: Array, ignore_label: int
) -> tuple[Array, Array]:
  """Cross-entropy of each pixel.

  Args:
    logits: [..., k] float.
    labels: [...] int; `ignore_label` marks pixels without label.
    ignore_label: outside [0, k).

  Returns:
    (losses [...], 0 where ignored; valid_mask [...] bool).
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  valid_mask = labels != ignore_label
  # Below their maximum no exponential overflows; which maximum is no matter.
  logits -= jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  # The gradient of a gather by label would be a scatter.
  own = labels[..., None] == jnp.arange(logits.shape[-1])
  losses = jnp.log(jnp.exp(logits).sum(-1)) - jnp.where(own, logits, 0).sum(-1)
  return jnp.where(valid_mask, losses, 0), valid_mask


def masked_mean(values: Array, mask: Array) -> Array:
  """Mean of the values where `mask` is True; 0 if nowhere."""
  count = mask.sum(dtype=jnp.int32).astype(values.dtype)
  return jnp.where(mask, values, 0).sum() / jnp.maximum(count, 1)


def cross_entropy(logits: Array, labels: Array, *, ignore_label: int) -> Array:
  """Mean cross-entropy over the labelled pixels of the batch; scalar."""
  return masked_mean(*pixel_cross_entropy(logits, labels, ignore_label))


def ohem_mask(
  logits: Array,
  labels: Array,
  *,
  ignore_label: int,
  threshold: float,
  min_kept: int,
) -> Array:
  """Pixels that online hard example mining keeps (Shrivastava et al. 2016).

  Kept are pixels whose true class has probability <= the threshold, which is
  raised to the min_kept-th smallest such probability if that is larger. As
  published, everything valid is kept if min_kept is 0 or more than is valid.

  Args:
    logits: [..., k] float.
    labels: [...] int.
    ignore_label: marks pixels without label.
    threshold: probability.
    min_kept: pixels of the global batch.

  Returns:
    bool [...].
  """
  logits = jax.lax.stop_gradient(logits)
  losses, valid_mask = pixel_cross_entropy(logits, labels, ignore_label)
  num_valid = valid_mask.sum(dtype=jnp.int32)
  if min_kept == 0:
    return valid_mask
  true_class_probs = jnp.exp(-losses)
  (kth,) = order_statistics(
    true_class_probs, valid_mask, jnp.asarray([min_kept - 1], jnp.int32)
  )
  hard = valid_mask & (true_class_probs <= jnp.maximum(threshold, kth))
  return jnp.where(min_kept > num_valid, valid_mask, hard)


def ohem_cross_entropy(
  logits: Array,
  labels: Array,
  *,
  ignore_label: int,
  threshold: float,
  min_kept: int,
) -> Array:
  """Mean cross-entropy over the pixels of `ohem_mask`; scalar."""
  losses, _ = pixel_cross_entropy(logits, labels, ignore_label)
  mask = ohem_mask(
    logits,
    labels,
    ignore_label=ignore_label,
    threshold=threshold,
    min_kept=min_kept,
  )
  return masked_mean(losses, mask)


def unsupervised_loss(
  logits: Array, pseudo_labels: Array, *, ignore_label: int
) -> Array:
  """Cross-entropy with the pseudo labels that were kept (equation 5).

  The mean over the kept pixels times (all pixels / kept pixels), as published:
  the fewer are kept, the more each weighs (METHOD C.2, row 24).

  Args:
    logits: [b, h, w, k] float, the student's.
    pseudo_labels: [b, h, w] int, `ignore_label` where unreliable.
    ignore_label: marks pixels that do not count.

  Returns:
    Scalar.
  """
  losses, kept = pixel_cross_entropy(logits, pseudo_labels, ignore_label)
  share = kept.mean(dtype=losses.dtype)
  return masked_mean(losses, kept) / jnp.where(share > 0, share, 1)
