"""Boundary IoU, against masks eroded pixel by pixel."""

import itertools

import numpy as np
import pytest

from input_pipeline.boundary import boundary_counts


def boundary_by_steps(mask, distance):
  """As the authors define it: the mask less its erosion by 3x3, repeated."""
  eroded = np.pad(mask, 1)
  for _ in range(distance):
    shifts = itertools.product((-1, 0, 1), repeat=2)
    shifted = [np.roll(eroded, shift, (0, 1)) for shift in shifts]
    eroded = np.logical_and.reduce(shifted)
    eroded[[0, -1]] = eroded[:, [0, -1]] = False
  return mask & ~eroded[1:-1, 1:-1]


@pytest.mark.parametrize(
  # Diagonals of 33 and 156 pixels, 2 % of which are 0.7 and 3.1.
  ("size", "distance"),
  [((17, 29), 1), ((110, 111), 3)],
)
def test_equals_masks_eroded_step_by_step(size, distance):
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, 4, (9, 9))
  blocks[blocks == 3] = 255
  cells = [np.arange(n) * 9 // n for n in size]
  truth = blocks[np.ix_(*cells)].astype(np.uint8)
  prediction = np.roll(truth, (2, 1), (0, 1))
  prediction[prediction == 255] = 0
  counts = boundary_counts(truth, prediction, num_classes=4, ignore_label=255)
  assert counts.shape == (4, 2) and counts.dtype == np.int64
  valid = truth != 255
  for class_id in range(4):
    a = boundary_by_steps((truth == class_id) & valid, distance)
    b = boundary_by_steps((prediction == class_id) & valid, distance)
    assert counts[class_id].tolist() == [(a & b).sum(), (a | b).sum()]
  assert counts[:3, 0].min() > 0 and counts[3].sum() == 0


def test_by_hand():
  truth = np.zeros((5, 5), np.uint8)
  truth[1:4, 1:4] = 1
  prediction = truth.copy()
  prediction[1, 1] = 0
  counts = boundary_counts(truth, prediction, num_classes=3, ignore_label=255)
  # Class 1 is a ring of 8 around its middle; the prediction lacks a corner of
  # it, which makes the middle boundary too. Of class 0 all is boundary.
  assert counts.tolist() == [[16, 17], [7, 9], [0, 0]]


def test_same_outline_beside_ignored_pixels():
  truth = np.zeros((40, 40), np.uint8)
  truth[:, 20:] = 255
  prediction = np.zeros((40, 40), np.uint8)
  prediction[:, 20:] = 1
  counts = boundary_counts(truth, prediction, num_classes=2, ignore_label=255)
  # The rim of 40 x 20 pixels, one pixel wide.
  assert counts.tolist() == [[116, 116], [0, 0]]
