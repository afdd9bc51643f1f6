"""SGD with momentum, poly schedule and a faster head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]


def poly_schedule(base: float, total_steps: int, power: float) -> Schedule:
  """base * (1 - step / total_steps) ** power: step 0 has the base rate."""

  def schedule(step: jax.Array) -> jax.Array:
    # optax's own divides the int32 step in float32, also under x64.
    step = jnp.minimum(step, total_steps).astype(jnp.result_type(float))
    return base * (1 - step / total_steps) ** power

  return schedule


def sgd(
  schedule: Schedule,
  *,
  momentum: float,
  weight_decay: float,
  head_multiplier: float,
) -> optax.GradientTransformation:
  """torch's SGD: decay into the gradient, no Nesterov, no dampening.

  Args:
    schedule: learning rate of the encoder by step.
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

  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.trace(momentum),
    optax.stateless(scale_heads),
    optax.scale_by_learning_rate(schedule),
  )
