import jax.numpy as jnp
import numpy as np

from u2pl_jax import reliability


def test_entropy_by_hand():
  logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30]]))
  expected = 0.5 * np.log(2) + 0.5 * np.log(4)
  np.testing.assert_allclose(
    reliability.entropy(logits), [expected, 0], atol=1e-6
  )


def test_entropy_of_uniform_is_log_k():
  np.testing.assert_allclose(
    reliability.entropy(jnp.zeros((2, 7))), np.log(7), rtol=1e-6
  )


def test_schedule_ends():
  assert reliability.unreliable_percent(20.0, jnp.asarray(0.0)) == 20
  np.testing.assert_allclose(
    reliability.unreliable_percent(20.0, jnp.asarray(0.75)), 5
  )
  assert reliability.unreliable_percent(20.0, jnp.asarray(1.0)) == 0


def test_masks_of_ten_pixels():
  # 0..9 and an ignored 10th pixel that would shift every percentile.
  entropies = jnp.arange(11.0).at[10].set(1000.0)
  valid = jnp.arange(11) < 10
  result = reliability.assess(entropies, valid, jnp.asarray(20.0))
  # Position 0.8 * 9 = 7.2 and 0.2 * 9 = 1.8.
  np.testing.assert_allclose(result.keep_threshold, 7.2, rtol=1e-6)
  np.testing.assert_allclose(result.low_threshold, 1.8, rtol=1e-6)
  assert result.keep_mask.tolist() == [True] * 8 + [False] * 3
  assert result.reliable_mask.tolist() == [True] * 2 + [False] * 9
  assert result.unreliable_mask.tolist() == [False] * 8 + [True] * 2 + [False]


def test_alpha_zero_still_drops_the_most_uncertain_pixel():
  result = reliability.assess(
    jnp.asarray([0.1, 0.9, 0.4]), jnp.ones(3, bool), jnp.asarray(0.0)
  )
  assert result.keep_mask.tolist() == [True, False, True]
  assert result.reliable_mask.tolist() == [True, False, False]
  assert result.unreliable_mask.tolist() == [False, True, False]


def test_nothing_valid():
  result = reliability.assess(
    jnp.ones((2, 3)), jnp.zeros((2, 3), bool), jnp.asarray(20.0)
  )
  for mask in result[:3]:
    assert not mask.any()
  assert result.keep_threshold == 0
