import jax
import jax.numpy as jnp
import numpy as np
import optax

from u2pl_jax import ema, optimizer


def test_decay_at_0_1_10_and_saturation():
  decay = [
    float(ema.ema_decay(jnp.asarray(n), 0.99)) for n in (0, 1, 10, 99, 5000)
  ]
  np.testing.assert_allclose(decay, [0, 1 / 2, 10 / 11, 0.99, 0.99], rtol=1e-6)


def test_decay_multiplies_the_teacher():
  teacher, student = {"w": jnp.asarray([10.0])}, {"w": jnp.asarray([0.0])}
  result = ema.ema_update(teacher, student, jnp.asarray(0.75))
  np.testing.assert_allclose(result["w"], [7.5])


def test_poly_schedule_ends():
  schedule = optimizer.poly_schedule(0.1, 40, 0.9)
  np.testing.assert_allclose(schedule(0), 0.1)
  np.testing.assert_allclose(schedule(10), 0.1 * 0.75**0.9, rtol=1e-6)
  np.testing.assert_allclose(schedule(39), 0.1 * (1 / 40) ** 0.9, rtol=1e-5)
  assert schedule(40) == 0


def test_sgd_by_hand():
  """Two steps of torch's rule on an encoder and a head parameter."""
  params = {"encoder": jnp.asarray(1.0), "decoder": jnp.asarray(1.0)}
  tx = optimizer.sgd(
    lambda step: jnp.asarray([0.1, 0.05])[step],
    momentum=0.9,
    weight_decay=0.5,
    head_multiplier=10.0,
  )
  state = tx.init(params)
  expected = {"encoder": 1.0, "decoder": 1.0}
  velocity = {"encoder": 0.0, "decoder": 0.0}
  for rate in (0.1, 0.05):
    grads = jax.tree.map(lambda p: 2 * jnp.ones_like(p), params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for name, multiplier in (("encoder", 1), ("decoder", 10)):
      velocity[name] = 0.9 * velocity[name] + 2 + 0.5 * expected[name]
      expected[name] -= rate * multiplier * velocity[name]
      np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)
