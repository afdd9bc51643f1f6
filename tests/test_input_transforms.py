"""Random scale, flip and crop: exact cases, a reference, and distributions."""

import cv2
import numpy as np
import pytest

import input_pipeline as ip
from input_pipeline import transforms


class Scripted:
  """An rng that gives the numbers it is told to."""

  def __init__(self, randoms, integers):
    self._randoms = list(randoms)
    self._integers = list(integers)

  def random(self):
    return self._randoms.pop(0)

  def integers(self, low, high):
    value = self._integers.pop(0)
    assert low <= value < high
    return value


NO_SHRINK, NO_FLIP, FLIP = 0.9, 0.9, 0.1


def test_upscaling_by_two_by_hand():
  image = np.array([[0, 80], [160, 240]], np.uint8)
  mask = np.array([[1, 2], [3, 4]], np.uint8)
  transform = ip.TrainTransform((4, 4), scale_range=(0.5, 2.0))
  # Position 1 of [1, 2] is scale 2; no such draw exists, but it is the limit.
  rng = Scripted([NO_SHRINK, 1.0, NO_FLIP], [0, 0])
  out = transform(np.dstack([image] * 3), mask, rng)
  # Samples lie at -0.25, 0.25, 0.75, 1.25 of the source, the ends clamped.
  rows = np.array([0, 40, 120, 160])
  columns = np.array([0, 20, 60, 80])
  expected = rows[:, None] + columns[None, :]
  np.testing.assert_array_equal(out["image"], np.dstack([expected] * 3))
  np.testing.assert_array_equal(
    out["label"], [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
  )
  assert out["valid_box"].tolist() == [0, 0, 4, 4]


def test_nearest_follows_the_floor_rule():
  # Scale 0.6: 5 become 3; output i reads floor(i * 5 / 3) = 0, 1, 3.
  mask = np.arange(25, dtype=np.uint8).reshape(5, 5)
  image = np.zeros((5, 5, 3), np.uint8)
  transform = ip.TrainTransform((3, 3), scale_range=(0.5, 2.0))
  rng = Scripted([0.0, 0.2, NO_FLIP], [0, 0])
  label = transform(image, mask, rng)["label"]
  np.testing.assert_array_equal(label, mask[np.ix_([0, 1, 3], [0, 1, 3])])
  rng = Scripted([0.0, 0.2, FLIP], [0, 0])
  label = transform(image, mask, rng)["label"]
  np.testing.assert_array_equal(label, mask[np.ix_([0, 1, 3], [3, 1, 0])])


def test_padding_is_centred_and_marked():
  image = np.full((3, 4, 3), 200, np.uint8)
  mask = np.ones((3, 4), np.uint8)
  transform = ip.TrainTransform((6, 9), scale_range=(1, 1), pad_label=77)
  out = transform(image, mask, np.random.default_rng(0))
  # 3 missing rows: 1 above, 2 below; 5 missing columns: 2 left, 3 right.
  assert out["valid_box"].tolist() == [1, 2, 4, 6]
  inside = np.zeros((6, 9), bool)
  inside[1:4, 2:6] = True
  np.testing.assert_array_equal(out["label"], np.where(inside, 1, 77))
  np.testing.assert_array_equal(
    out["image"], np.dstack([np.where(inside, 200, 0)] * 3)
  )


def test_one_axis_padded_the_other_cropped():
  image = np.zeros((3, 8, 3), np.uint8)
  image[..., 0] = np.arange(8)
  transform = ip.TrainTransform((5, 4), scale_range=(1, 1))
  out = transform(image, None, Scripted([0.9, 0.9, FLIP], [0, 1]))
  assert out["valid_box"].tolist() == [1, 0, 4, 4]
  # Flipped columns are 7 ... 0; the crop begins at 1.
  assert out["image"][2, :, 0].tolist() == [6, 5, 4, 3]
  assert "label" not in out


def test_types_and_layout():
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (50, 70, 3), np.uint8)
  out = ip.TrainTransform((33, 45))(image, image[..., 0], rng)
  assert out["image"].shape == (33, 45, 3) and out["image"].dtype == np.uint8
  assert out["label"].shape == (33, 45) and out["label"].dtype == np.uint8
  assert out["valid_box"].shape == (4,) and out["valid_box"].dtype == np.int32
  assert out["image"].flags.c_contiguous and out["label"].flags.c_contiguous


def reference(transform, image, mask, rng):
  """The same, the plain way: everything whole, one step after the other."""
  lowest, highest = transform.scale_range
  shrink, position = rng.random() < 0.5, rng.random()
  if shrink:
    scale = lowest + (1 - lowest) * position
  else:
    scale = 1 + (highest - 1) * position
  h, w = int(image.shape[0] * scale), int(image.shape[1] * scale)
  image = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
  rows = np.floor(np.arange(h) * mask.shape[0] / h).astype(int)
  columns = np.floor(np.arange(w) * mask.shape[1] / w).astype(int)
  mask = mask[np.ix_(rows, columns)]
  if rng.random() < transform.flip_probability:
    image, mask = image[:, ::-1], mask[:, ::-1]
  crop_h, crop_w = transform.crop_size
  more_h, more_w = max(crop_h - h, 0), max(crop_w - w, 0)
  padding = (
    (more_h // 2, more_h - more_h // 2),
    (more_w // 2, more_w - more_w // 2),
  )
  valid = np.pad(np.ones((h, w), bool), padding)
  image = np.pad(image, (*padding, (0, 0)))
  mask = np.pad(mask, padding, constant_values=transform.pad_label)
  top = rng.integers(0, image.shape[0] - crop_h + 1)
  left = rng.integers(0, image.shape[1] - crop_w + 1)
  window = slice(top, top + crop_h), slice(left, left + crop_w)
  return image[window], mask[window], valid[window]


@pytest.mark.parametrize("limit", [0, transforms._WHOLE_RESIZE_LIMIT, 1e9])
def test_equals_the_plain_reference(monkeypatch, limit):
  # Limit 0 samples every region, 1e9 resizes every image whole.
  monkeypatch.setattr(transforms, "_WHOLE_RESIZE_LIMIT", limit)
  sizes = np.random.default_rng(1)
  boxes = set()
  for seed in range(300):
    h, w = sizes.integers(2, 150, 2)
    # Noise is the hardest case for the image: neighbours differ by up to 255.
    image = sizes.integers(0, 256, (h, w, 3), np.uint8)
    mask = sizes.integers(0, 21, (h, w), np.uint8)
    transform = ip.TrainTransform(tuple(sizes.integers(1, 100, 2).tolist()))
    out = transform(image, mask, np.random.default_rng(seed))
    expected_image, expected_mask, valid = reference(
      transform, image, mask, np.random.default_rng(seed)
    )
    difference = np.abs(out["image"].astype(int) - expected_image)
    assert difference.max() <= 1
    np.testing.assert_array_equal(out["label"], expected_mask)
    top, left, bottom, right = out["valid_box"]
    inside = np.zeros_like(valid)
    inside[top:bottom, left:right] = True
    np.testing.assert_array_equal(inside, valid)
    boxes.add((top > 0, left > 0))
  assert len(boxes) == 4  # padded, cropped, and both mixtures occurred


def test_a_large_photo_is_sampled_not_resized(monkeypatch):
  image = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
  transform = ip.TrainTransform((64, 64))
  expected, _, _ = reference(
    transform, image, image[..., 0], np.random.default_rng(3)
  )
  monkeypatch.setattr(cv2, "resize", None)
  out = transform(image, None, np.random.default_rng(3))
  assert np.abs(out["image"].astype(int) - expected).max() <= 1


def test_the_mask_does_not_change_the_draws():
  image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  transform = ip.TrainTransform((33, 33))
  for seed in range(20):
    rng_a, rng_b = np.random.default_rng(seed), np.random.default_rng(seed)
    a = transform(image, image[..., 0], rng_a)
    b = transform(image, None, rng_b)
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["valid_box"], b["valid_box"])
    assert rng_a.random() == rng_b.random()


def assert_uniform(values, num_bins):
  """Each of num_bins equally likely values within 5 standard deviations."""
  counts = np.bincount(values, minlength=num_bins)
  assert len(counts) == num_bins
  p = 1 / num_bins
  spread = np.sqrt(len(values) * p * (1 - p))
  assert np.abs(counts - len(values) * p).max() < 5 * spread


def test_scale_is_half_below_and_half_above_one():
  rng = np.random.default_rng(0)
  image = np.zeros((1000, 4, 3), np.uint8)
  # The crop shows the whole image, so that valid_box tells its height.
  transform = ip.TrainTransform((2000, 8), scale_range=(0.5, 2.0))
  boxes = [transform(image, None, rng)["valid_box"] for _ in range(4000)]
  height = np.array([bottom - top for top, _, bottom, _ in boxes])
  shrunk = height[height < 1000]
  enlarged = height[height >= 1000]
  assert abs(len(shrunk) - 2000) < 5 * np.sqrt(4000 / 4)
  # Heights 500 ... 999 and 1000 ... 1999, each in 10 bins of equal width.
  assert_uniform((shrunk - 500) // 50, 10)
  assert_uniform((enlarged - 1000) // 100, 10)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_flip_probability(probability):
  rng = np.random.default_rng(0)
  image = np.zeros((4, 4, 3), np.uint8)
  image[:, :2] = 255
  transform = ip.TrainTransform(
    (4, 4), scale_range=(1, 1), flip_probability=probability
  )
  flipped = sum(
    int(transform(image, None, rng)["image"][0, 0, 0] == 0) for _ in range(4000)
  )
  spread = np.sqrt(4000 * probability * (1 - probability))
  assert abs(flipped - 4000 * probability) <= 5 * spread


@pytest.mark.parametrize("flip_probability", [0.0, 1.0])
def test_offsets_are_uniform(flip_probability):
  rng = np.random.default_rng(0)
  image = np.zeros((12, 20, 3), np.uint8)
  image[..., 0] = np.arange(12)[:, None]
  image[..., 1] = np.arange(20)
  transform = ip.TrainTransform(
    (5, 10), scale_range=(1, 1), flip_probability=flip_probability
  )
  corners = np.array(
    [transform(image, None, rng)["image"][0, 0] for _ in range(8000)]
  )
  assert_uniform(corners[:, 0], 8)  # 12 - 5 + 1 rows
  columns = 19 - corners[:, 1] if flip_probability else corners[:, 1]
  assert_uniform(columns, 11)  # 20 - 10 + 1 columns
  pairs = corners[:, 0].astype(int) * 11 + columns
  assert_uniform(pairs, 88)  # rows and columns are independent


def test_tiny_images_keep_a_pixel():
  transform = ip.TrainTransform((3, 3), scale_range=(0.1, 1.0))
  out = transform(
    np.full((1, 1, 3), 9, np.uint8), None, Scripted([0.0, 0.0, 0.9], [0, 0])
  )
  assert out["valid_box"].tolist() == [1, 1, 2, 2]
  assert out["image"][1, 1].tolist() == [9, 9, 9]


@pytest.mark.parametrize(
  "arguments",
  [
    {"crop_size": (0, 5)},
    {"crop_size": (5,)},
    {"scale_range": (1.2, 2.0)},
    {"scale_range": (0.5, 0.9)},
    {"scale_range": (0.0, 2.0)},
    {"flip_probability": 1.5},
    {"pad_label": 256},
  ],
)
def test_bad_settings_are_refused(arguments):
  (name,) = arguments
  with pytest.raises(ValueError, match=name):
    ip.TrainTransform(**{"crop_size": (5, 5), **arguments})


def test_image_and_mask_must_match():
  with pytest.raises(ValueError, match="differ"):
    ip.TrainTransform((2, 2))(
      np.zeros((4, 4, 3), np.uint8),
      np.zeros((4, 5), np.uint8),
      np.random.default_rng(0),
    )
