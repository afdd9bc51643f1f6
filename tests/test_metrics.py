import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from u2pl_jax import metrics


@settings(deadline=None, max_examples=30)
@given(
  labels=hnp.arrays(
    np.int32, (3, 5), elements=st.sampled_from([0, 1, 2, 3, 255])
  ),
  predictions=hnp.arrays(np.int32, (3, 5), elements=st.integers(0, 3)),
)
def test_confusion_matrix_is_numpys(labels, predictions):
  expected = np.zeros((4, 4), int)
  for truth, prediction in zip(
    labels.ravel(), predictions.ravel(), strict=True
  ):
    if truth != 255:
      expected[truth, prediction] += 1
  result = metrics.confusion_matrix(
    jnp.asarray(labels),
    jnp.asarray(predictions),
    num_classes=4,
    ignore_label=255,
  )
  assert result.dtype == jnp.int32
  np.testing.assert_array_equal(result, expected)


def test_iou_by_hand():
  # Class 2 never occurs, class 3 is only predicted.
  confusion = np.asarray(
    [[3, 1, 0, 0], [1, 4, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
  )
  np.testing.assert_allclose(
    metrics.iou(confusion), [3 / 5, 4 / 7, np.nan, 0], rtol=1e-12
  )
  assert metrics.mean_iou(confusion) == pytest.approx((3 / 5 + 4 / 7) / 4)
  assert metrics.mean_iou_present(confusion) == pytest.approx(
    (3 / 5 + 4 / 7) / 2
  )
  assert metrics.pixel_accuracy(confusion) == pytest.approx(7 / 10)


def test_nothing_counted():
  confusion = np.zeros((3, 3), int)
  assert metrics.mean_iou(confusion) == 0
  assert np.isnan(metrics.mean_iou_present(confusion))
  assert np.isnan(metrics.pixel_accuracy(confusion))
  assert np.isnan(metrics.adjusted_rand_index(confusion))


def test_adjusted_rand_index_by_hand():
  # Pairs together: C(4,2) + C(1,2) + C(1,2) + C(4,2) = 12; rows and columns
  # C(5,2) * 2 = 20; all pairs 45, expected 400/45.
  confusion = np.asarray([[4, 1], [1, 4]])
  expected = (12 - 400 / 45) / (20 - 400 / 45)
  assert metrics.adjusted_rand_index(confusion) == pytest.approx(expected)


def test_adjusted_rand_index_ignores_names_and_is_0_by_chance():
  swapped = np.asarray([[0, 50], [50, 0]])
  assert metrics.adjusted_rand_index(swapped) == 1
  independent = np.asarray([[250_000, 250_000], [250_000, 250_000]])
  assert metrics.adjusted_rand_index(independent) == pytest.approx(0, abs=1e-5)
  assert metrics.adjusted_rand_index(np.asarray([[7]])) == 1
