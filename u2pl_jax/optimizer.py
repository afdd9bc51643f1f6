"""SGD with momentum, schedules of its learning rate and a faster head."""

import collections
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule = Callable[[jax.Array], jax.Array]


def poly_schedule(base: float, total_steps: int, power: float) -> Schedule:
  """base * (1 - step / total_steps) ** power: step 0 has the base rate."""

  def schedule(step: jax.Array) -> jax.Array:
    # optax's own divides the int32 step in float32, also under x64.
    step = jnp.minimum(step, total_steps).astype(jnp.result_type(float))
    return base * (1 - step / total_steps) ** power

  return schedule


def cosine_schedule(base: float, total_steps: int) -> Schedule:
  """base * (1 + cos(pi * step / total_steps)) / 2: from base to 0."""
  return _of_float(optax.cosine_decay_schedule(base, total_steps))


def multistep_schedule(
  base: float, total_steps: int, milestones: Sequence[float], factor: float
) -> Schedule:
  """base * factor ** (milestones behind).

  Args:
    base: rate of step 0.
    total_steps: of the training.
    milestones: shares of the training; the step nearest to one is the first
      with the lower rate.
    factor: what each multiplies the rate by.

  Returns:
    The rate by step.
  """
  # In a short training two may fall on one step.
  at = collections.Counter(round(share * total_steps) for share in milestones)
  scales = {step: factor**times for step, times in at.items()}
  return _of_float(optax.piecewise_constant_schedule(base, scales))


def _of_float(schedule: Schedule) -> Schedule:
  """With the step as a float, so that float64 stays float64 under x64."""

  def of_step(step: jax.Array) -> jax.Array:
    return schedule(jnp.asarray(step, jnp.result_type(float)))

  return of_step


def sgd(
  learning_rate: float | Schedule,
  *,
  momentum: float,
  weight_decay: float,
  head_multiplier: float,
) -> optax.GradientTransformation:
  """torch's SGD: decay into the gradient, no Nesterov, no dampening.

  Args:
    learning_rate: of the encoder: by step; or a number that lies in the
      optimiser's state, where `set_learning_rate` changes it.
    momentum: of the velocity, which starts at zero.
    weight_decay: on every parameter, norms and biases included, as published.
    head_multiplier: learning rate of everything outside params['encoder']
      divided by the encoder's.

  Returns:
    A gradient transformation for the parameters of `DeepLab`.
  """

  def scale_heads(updates, params=None):
    del params
    return {
      name: tree
      if name == "encoder"
      else jax.tree.map(lambda u: u * head_multiplier, tree)
      for name, tree in updates.items()
    }

  scale = optax.scale_by_learning_rate
  if not callable(learning_rate):
    scale = optax.inject_hyperparams(scale)
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.trace(momentum),
    optax.stateless(scale_heads),
    scale(learning_rate),
  )


def get_learning_rate(opt_state: optax.OptState) -> jax.Array:
  """The scalar rate that lies in the state of `sgd(number)`."""
  return optax.tree.get(opt_state, "learning_rate")


def set_learning_rate(
  opt_state: optax.OptState, learning_rate: float
) -> optax.OptState:
  """The state of `sgd(number)` with another rate.

  Its type and sharding stay, so that the next step needs no compilation.
  """
  old = get_learning_rate(opt_state)
  new = jax.device_put(np.asarray(learning_rate, old.dtype), old.sharding)
  return optax.tree.set(opt_state, learning_rate=new)
