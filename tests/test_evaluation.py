import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from u2pl_jax import evaluation
from u2pl_jax.models.deeplab import Outputs
from u2pl_jax.train_state import Variables


class RedMeansOne(nn.Module):
  """Two classes at full resolution: class 1 where red is above the mean."""

  @nn.compact
  def __call__(self, images, *, train):
    red = images[..., :1]
    return Outputs(jnp.concatenate([-red, red], -1), images, None)


def batch():
  image = np.zeros((2, 2, 3, 3), np.uint8)
  image[0, 0, :2] = 255
  return {
    "image": image,
    "label": np.asarray([[[1, 0, 1], [0, 255, 0]]] * 2, np.uint8),
    # The last column of both images is padding.
    "valid_box": np.asarray([[0, 0, 2, 2]] * 2, np.int32),
    "is_real": np.asarray([True, False]),
  }


def confusion(**kwargs):
  step = evaluation.make_eval_step(
    RedMeansOne(),
    num_classes=2,
    ignore_label=255,
    mean=(100.0,) * 3,
    std=(50.0,) * 3,
    **kwargs,
  )
  return jax.jit(step)(Variables({}, {}), batch()).tolist()


def test_padding_void_and_fillers_do_not_count():
  # Image 0: (1, predicted 1), (0, predicted 1), (0, predicted 0).
  assert confusion() == [[1, 1], [0, 1]]


def test_published_protocol_counts_padding_as_class_0():
  # Padding is the mean colour, a tie, which is class 0: two more right pixels.
  assert confusion(padding_label=0) == [[3, 1], [0, 1]]


def test_predict_step_gives_classes_and_entropy():
  step = evaluation.make_predict_step(
    RedMeansOne(), mean=(100.0,) * 3, std=(50.0,) * 3
  )
  classes, entropies = step(Variables({}, {}), batch())
  assert classes[0].tolist() == [[1, 1, 0], [0, 0, 0]]
  # Logits -3.1 and 3.1; a tie has ln 2.
  p = 1 / (1 + np.exp(-6.2))
  expected = -p * np.log(p) - (1 - p) * np.log(1 - p)
  np.testing.assert_allclose(entropies[0, 0, 0], expected, rtol=1e-4)
  np.testing.assert_allclose(entropies[0, 0, 2], np.log(2), rtol=1e-5)
