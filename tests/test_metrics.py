import numpy as np
import pytest

from u2pl_jax import metrics


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
  assert metrics.mean_accuracy(confusion) == pytest.approx((3 / 4 + 4 / 6) / 2)
  assert metrics.frequency_weighted_iou(confusion) == pytest.approx(
    0.4 * 3 / 5 + 0.6 * 4 / 7
  )


def test_calibration_error_by_hand():
  # 4 pixels of mean confidence 0.6, 3 right; 1 pixel of 0.9, wrong.
  calibration = np.asarray([[4, 2.4, 3], [1, 0.9, 0], [0, 0, 0]])
  expected = 4 / 5 * abs(0.6 - 0.75) + 1 / 5 * abs(0.9 - 0)
  error = metrics.expected_calibration_error(calibration)
  assert error == pytest.approx(expected)


def test_nothing_counted():
  confusion = np.zeros((3, 3), int)
  assert metrics.mean_iou(confusion) == 0
  assert np.isnan(metrics.mean_iou_present(confusion))
  assert np.isnan(metrics.pixel_accuracy(confusion))
  assert np.isnan(metrics.mean_accuracy(confusion))
  assert np.isnan(metrics.frequency_weighted_iou(confusion))
  assert np.isnan(metrics.expected_calibration_error(np.zeros((15, 3))))
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
