"""The teacher's exponential moving average of the student's parameters."""

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def ema_decay(num_updates: Array, max_decay: float) -> Array:
  """Weight of the teacher's old value: min(1 - 1 / (n + 1), max_decay).

  Args:
    num_updates: int scalar n, updates since the end of the warm-up; 0 at the
      first, which therefore copies the student.
    max_decay: reached after 1 / (1 - max_decay) updates.

  Returns:
    Scalar.
  """
  dtype = jnp.result_type(float)
  return jnp.minimum(1 - 1 / (num_updates.astype(dtype) + 1), max_decay)


def ema_update(teacher, student, decay: Array):
  """decay * teacher + (1 - decay) * student, leaf by leaf."""
  return optax.incremental_update(student, teacher, 1 - decay)
