"""Which pixels are reliable: entropies, thresholds, masks and their schedule.

U2PL section 3.2: the alpha_t percent of pixels with the highest entropy are
unreliable; alpha_t falls linearly from alpha_0 to 0 over training.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from u2pl_jax.selection import masked_percentiles

Array = jax.Array


def entropy(logits: Array) -> Array:
  """Entropy of the softmax, with the published 1e-10 inside the logarithm.

  Args:
    logits: [..., k] float.

  Returns:
    [...] in nats, at least float32.
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  probs = jax.nn.softmax(logits)
  return -(probs * jnp.log(probs + 1e-10)).sum(-1)


def unreliable_percent(alpha0: float, progress: Array) -> Array:
  """alpha_t of equation 7: alpha0 (percent) at progress 0, 0 at progress 1."""
  return alpha0 * (1 - progress)


class Reliability(NamedTuple):
  """Masks at the resolution of the entropies, and what cut them.

  Attributes:
    keep_mask: bool, pseudo labels that enter the unsupervised loss (entropy
      strictly below the keep threshold).
    reliable_mask: bool, the alpha_t percent of lowest entropy: anchors.
    unreliable_mask: bool, the alpha_t percent of highest entropy: negatives.
    keep_threshold, low_threshold, high_threshold: scalars in nats.
  """

  keep_mask: Array
  reliable_mask: Array
  unreliable_mask: Array
  keep_threshold: Array
  low_threshold: Array
  high_threshold: Array


def assess(entropies: Array, valid_mask: Array, alpha: Array) -> Reliability:
  """Splits pixels by entropy.

  The published comparisons: keep is `<` the (100 - alpha) percentile, so that
  even at alpha 0 the most uncertain pixel is dropped; the other two include
  their threshold.

  Args:
    entropies: [b, h, w] float.
    valid_mask: bool, same shape: pixels that have a pseudo label.
    alpha: scalar, alpha_t in percent.

  Returns:
    The masks, all False outside `valid_mask`.
  """
  percents = jnp.stack([100 - alpha, alpha])
  high, low = masked_percentiles(entropies, valid_mask, percents)
  return Reliability(
    keep_mask=(entropies < high) & valid_mask,
    reliable_mask=(entropies <= low) & valid_mask,
    unreliable_mask=(entropies >= high) & valid_mask,
    keep_threshold=high,
    low_threshold=low,
    high_threshold=high,
  )
