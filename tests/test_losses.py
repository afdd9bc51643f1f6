import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2pl_jax import losses


def logits_for(true_class_probs):
  """Two-class logits that give class 0 these probabilities."""
  p = np.asarray(true_class_probs)
  return jnp.asarray(np.stack([np.log(p), np.log(1 - p)], -1), jnp.float32)


def test_cross_entropy_is_the_mean_over_labelled_pixels():
  logits = logits_for([0.5, 0.25, 0.9])
  labels = jnp.asarray([0, 1, 255])
  loss = losses.cross_entropy(logits, labels, ignore_label=255)
  np.testing.assert_allclose(loss, -(np.log(0.5) + np.log(0.75)) / 2, 1e-6)


def test_ignored_pixels_have_zero_gradient():
  labels = jnp.asarray([0, 255])
  grad = jax.grad(lambda x: losses.cross_entropy(x, labels, ignore_label=255))(
    logits_for([0.5, 0.25])
  )
  np.testing.assert_allclose(grad, [[-0.5, 0.5], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("min_kept", [0, 2])
def test_everything_ignored_is_zero_not_nan(min_kept):
  labels = jnp.full((2, 3), 255)

  def loss(x):
    return losses.cross_entropy(
      x, labels, ignore_label=255
    ) + losses.ohem_cross_entropy(
      x, labels, ignore_label=255, threshold=0.7, min_kept=min_kept
    )

  value, grad = jax.value_and_grad(loss)(jnp.ones((2, 3, 4)))
  assert value == 0
  assert (grad == 0).all()


@pytest.mark.parametrize(
  ("min_kept", "kept"),
  [
    (0, [1, 1, 1, 1, 0]),  # mining off
    (1, [1, 1, 0, 0, 0]),  # threshold 0.7
    (3, [1, 1, 1, 0, 0]),  # third smallest is 0.8 > 0.7, and itself kept
    (4, [1, 1, 1, 1, 0]),
    (5, [1, 1, 1, 1, 0]),  # more than valid: all
  ],
)
def test_ohem_by_hand(min_kept, kept):
  logits = logits_for([0.2, 0.6, 0.8, 0.95, 0.01])
  labels = jnp.asarray([0, 0, 0, 0, 255])
  mask = losses.ohem_mask(
    logits, labels, ignore_label=255, threshold=0.7, min_kept=min_kept
  )
  assert mask.tolist() == [bool(k) for k in kept]
  loss = losses.ohem_cross_entropy(
    logits, labels, ignore_label=255, threshold=0.7, min_kept=min_kept
  )
  probs = np.asarray([0.2, 0.6, 0.8, 0.95, 0.01])[np.asarray(mask)]
  np.testing.assert_allclose(loss, -np.log(probs).mean(), rtol=1e-5)


def test_unsupervised_loss_weighs_by_the_inverse_of_the_kept_share():
  logits = logits_for([[[0.5, 0.25], [0.9, 0.9]]])
  labels = jnp.asarray([[[0, 0], [255, 255]]])
  loss = losses.unsupervised_loss(logits, labels, ignore_label=255)
  # Mean over the two kept ones, times 4 pixels / 2 kept.
  np.testing.assert_allclose(loss, -(np.log(0.5) + np.log(0.25)), rtol=1e-6)


def test_unsupervised_loss_of_nothing():
  value, grad = jax.value_and_grad(
    lambda x: losses.unsupervised_loss(
      x, jnp.full((1, 2, 2), 255), ignore_label=255
    )
  )(jnp.ones((1, 2, 2, 3)))
  assert value == 0
  assert (grad == 0).all()


def test_bfloat16_logits_give_a_float32_loss():
  loss = losses.cross_entropy(
    jnp.ones((4, 3), jnp.bfloat16), jnp.zeros(4, jnp.int32), ignore_label=255
  )
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


def test_the_gradient_of_a_pixel_is_softmax_minus_one_hot():
  logits = jnp.asarray([[1e4, 1e4, -1e4], [0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
  labels = jnp.asarray([1, 2, 255])

  def total(logits):
    pixels, valid = losses.pixel_cross_entropy(logits, labels, 255)
    return pixels.sum(), (pixels, valid)

  grads, (pixels, valid) = jax.grad(total, has_aux=True)(logits)
  assert valid.tolist() == [True, True, False]
  shares = np.exp([0.0, 1.0, 3.0]) / np.exp([0.0, 1.0, 3.0]).sum()
  np.testing.assert_allclose(
    pixels, [np.log(2), -np.log(shares[2]), 0], rtol=1e-6
  )
  np.testing.assert_allclose(
    grads,
    [[0.5, -0.5, 0], shares - np.asarray([0, 0, 1]), [0, 0, 0]],
    rtol=1e-5,
    atol=1e-7,
  )
  # A scatter would be slow everywhere.
  assert "scatter" not in str(
    jax.make_jaxpr(jax.grad(total, has_aux=True))(logits)
  )
