"""The weak augmentation against torch, and its law against derived numbers.

The law of the published pipeline for a crop of side C from an image of side H:
scale s is U(1/2, 1) or U(1, 2), each with probability 1/2; the image becomes
int(H s) pixels; a coin flips it; what is below C is padded, half above; the
crop lies uniformly on what is there.
"""

import functools

import numpy as np
import pytest
import torch
from torch.nn import functional

import input_pipeline as ip

NUM_DRAWS = 20_000


def published(image, mask, crop, scale, flip, offset):
  """The published order in torch: resize all, flip, pad, crop."""
  size = tuple(int(side * scale) for side in image.shape[:2])
  image = torch.from_numpy(image.transpose(2, 0, 1)[None].copy()).double()
  mask = torch.from_numpy(mask[None, None].copy()).double()
  image = functional.interpolate(
    image, size=size, mode="bilinear", align_corners=False
  )
  mask = functional.interpolate(mask, size=size, mode="nearest")
  if flip:
    image, mask = image.flip(3), mask.flip(3)
  border = []
  for side, wanted in zip(size[::-1], crop[::-1], strict=True):
    missing = max(wanted - side, 0)
    border += [missing // 2, missing - missing // 2]
  image = functional.pad(image, border, value=0.0)
  mask = functional.pad(mask, border, value=255.0)
  window = tuple(slice(o, o + c) for o, c in zip(offset, crop, strict=True))
  image = image[0][:, window[0], window[1]].permute(1, 2, 0)
  return image.numpy(), mask[0, 0][window].numpy()


class Recorded(np.random.Generator):
  """A generator that remembers what it gave."""

  def __init__(self, seed):
    super().__init__(np.random.PCG64(seed))
    self.randoms, self.offsets = [], []

  def random(self):
    self.randoms.append(super().random())
    return self.randoms[-1]

  def integers(self, low, high):
    self.offsets.append(int(super().integers(low, high)))
    return self.offsets[-1]


@pytest.mark.parametrize(
  ("size", "crop"),
  [((37, 50), (51, 51)), ((102, 204), (77, 77)), ((90, 61), (40, 33))],
)
def test_equals_the_published_order_in_torch(size, crop):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (*size, 3), np.uint8)
  mask = rng.integers(0, 256, size, np.uint8)
  transform = ip.TrainTransform(crop)
  flips = 0
  for seed in range(40):
    draws = Recorded(seed)
    out = transform(image, mask, draws)
    side, position, coin = draws.randoms
    scale = 0.5 + 0.5 * position if side < 0.5 else 1 + position
    flips += coin < 0.5
    expected, expected_mask = published(
      image, mask, crop, scale, coin < 0.5, draws.offsets
    )
    # Bytes cannot hold torch's fractions: half a level to round, half for the
    # fixed point of OpenCV.
    assert np.abs(out["image"] - expected).max() <= 1
    # OpenCV drops bits between its two passes: about a tenth of a level darker.
    assert abs((out["image"] - expected).mean()) < 0.2
    # Torch computes floor(i * in / out) in float32, which may fall just below
    # a whole number: there, and only there, it reads the pixel before.
    differ = out["label"] != expected_mask
    assert differ.mean() < 0.03
    assert out["label"].dtype == np.uint8
  assert 10 < flips < 30


@functools.cache
def boxes_of(side, crop):
  """valid_box of many crops of a black square."""
  rng = np.random.default_rng(1)
  transform = ip.TrainTransform((crop, crop))
  image = np.zeros((side, side, 3), np.uint8)
  return np.array(
    [transform(image, None, rng)["valid_box"] for _ in range(NUM_DRAWS)]
  )


def assert_mean(values, mean, deviation):
  """Mean of independent draws within 5 standard errors."""
  error = deviation / np.sqrt(len(values))
  assert abs(np.mean(values) - mean) < 5 * error


def test_share_of_padded_crops_and_their_size():
  # 40 s < 30 needs s < 3/4: half of the lower half of the draws, 1/4 of all.
  boxes = boxes_of(40, 30)
  height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  np.testing.assert_array_equal(height, width)
  padded = height < 30
  assert_mean(padded, 1 / 4, np.sqrt(3) / 4)
  # There 40 s is uniform on [20, 30), and int(40 s) is on 20 ... 29.
  counts = np.bincount(height[padded])[20:]
  share = padded.sum() / 10
  assert len(counts) == 10
  assert np.abs(counts - share).max() < 5 * np.sqrt(share)
  # Odd padding has its larger half below and on the right.
  np.testing.assert_array_equal(boxes[:, 0], (30 - height) // 2)
  np.testing.assert_array_equal(boxes[:, 1], (30 - width) // 2)


def test_mean_share_of_the_image_in_a_crop():
  # The side of the valid part is min(int(40 s), 30): E = P(s < 3/4) * mean of
  # 20 ... 29 + P(s >= 3/4) * 30 = 1/4 * 24.5 + 3/4 * 30 = 28.625, and
  # E[x ** 2] = 1/4 * 608.5 + 3/4 * 900 = 827.125.
  boxes = boxes_of(40, 30)
  side = boxes[:, 2] - boxes[:, 0]
  assert_mean(side, 28.625, np.sqrt(827.125 - 28.625**2))


def test_scale_moments_from_the_pixels_themselves():
  # A ramp over 64 columns: two neighbours in the crop differ by 4 / s, which
  # tells the scale of each draw without looking inside.
  ramp = np.repeat(np.arange(64, dtype=np.uint8)[None] * 4, 64, axis=0)
  image = np.dstack([ramp] * 3)
  transform = ip.TrainTransform((16, 16))
  rng = np.random.default_rng(2)
  scales = []
  for _ in range(4000):
    row = transform(image, None, rng)["image"][8, :, 0].astype(float)
    # Away from the border, where the last column is repeated.
    steps = np.abs(np.diff(row))
    scales.append(4 / np.median(np.convolve(steps, np.ones(8) / 8, "valid")))
  scales = np.array(scales)
  # E[s] = (3/4 + 3/2) / 2 = 9/8; E[s ** 2] = (7/12 + 7/3) / 2 = 35/24.
  deviation = np.sqrt(35 / 24 - (9 / 8) ** 2)
  # Bytes round the slope; 0.01 covers the bias of its reciprocal.
  assert abs(scales.mean() - 9 / 8) < 5 * deviation / np.sqrt(4000) + 0.01
  assert abs(scales.std() - deviation) < 0.02
  assert abs((scales < 1).mean() - 1 / 2) < 0.05


def test_flip_is_independent_of_scale_and_place():
  image = np.zeros((20, 20, 3), np.uint8)
  image[..., 0] = np.arange(20)
  transform = ip.TrainTransform((8, 8))
  rng = np.random.default_rng(3)
  flipped, boxes = [], []
  for _ in range(4000):
    draws = Recorded(int(rng.integers(2**32)))
    out = transform(image, None, draws)["image"][4, :, 0].astype(int)
    flipped.append(out[-1] < out[0])
    boxes.append((draws.randoms[0] < 0.5, draws.offsets[1]))
  flipped = np.array(flipped)
  shrunk = np.array([box[0] for box in boxes])
  assert_mean(flipped, 1 / 2, 1 / 2)
  for group in (shrunk, ~shrunk):
    assert_mean(flipped[group], 1 / 2, 1 / 2)


def test_every_source_pixel_is_seen_as_often_as_derived():
  # Side 4, crop 2, scale 1: offsets 0, 1, 2 with 1/3 each, so that a pixel of
  # the row is in the crop with probability 1/3, 2/3, 2/3, 1/3; flips mirror.
  image = np.zeros((4, 4, 3), np.uint8)
  image[..., 0] = np.arange(4)
  transform = ip.TrainTransform((2, 2), scale_range=(1, 1))
  rng = np.random.default_rng(4)
  seen = np.zeros(4)
  for _ in range(6000):
    seen += np.bincount(
      transform(image, None, rng)["image"][0, :, 0], minlength=4
    )
  share = seen / 6000
  assert (
    np.abs(share - [1 / 3, 2 / 3, 2 / 3, 1 / 3])
    < 5 * np.sqrt(2) / 3 / np.sqrt(6000)
  ).all()
