"""Colour jitter, grey, blur: against PIL, colorsys and scipy; statistics."""

import colorsys
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import ndimage

from u2pl_jax import photometric
from u2pl_jax.images import normalise

RGB = np.random.default_rng(0).integers(0, 256, (2, 24, 20, 3), np.uint8)
WHOLE = np.asarray([[0, 0, 24, 20]] * 2, np.int32)
USUAL = photometric.PhotometricSettings(
  probability=1.0,
  jitter=(0.5, 0.5, 0.5, 0.25),
  jitter_probability=0.8,
  grey_probability=0.2,
  blur_probability=0.5,
  blur_sigma=(0.1, 2.0),
)


def neutral(batch=2, **changes):
  """A draw that changes nothing but what is named."""
  fields = {
    "brightness": np.ones(batch),
    "contrast": np.ones(batch),
    "saturation": np.ones(batch),
    "hue": np.zeros(batch),
    "order": np.tile(np.arange(4, dtype=np.int32), (batch, 1)),
    "grey": np.zeros(batch, bool),
    "sigma": np.zeros(batch),
  }
  fields |= changes
  return photometric.PhotometricDraw(
    **{name: jnp.asarray(value) for name, value in fields.items()}
  )


# One shape and one compilation for all tests.
_apply = jax.jit(
  functools.partial(photometric.apply_photometric, max_sigma=2.0)
)


def augment(images=RGB, box=WHOLE, **changes):
  assert images.shape == RGB.shape
  return np.asarray(_apply(neutral(**changes), images, box))


def test_the_neutral_draw_changes_nothing():
  np.testing.assert_allclose(augment(), RGB, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "enhancer"),
  [
    ("brightness", ImageEnhance.Brightness),
    ("contrast", ImageEnhance.Contrast),
    ("saturation", ImageEnhance.Color),
  ],
)
@pytest.mark.parametrize("factors", [(0.5, 1.5), (0.0, 0.9)])
def test_jitter_equals_pil_to_a_grey_level(name, enhancer, factors):
  result = augment(**{name: np.asarray(factors)})
  for image, factor, ours in zip(RGB, factors, result, strict=True):
    expected = enhancer(Image.fromarray(image)).enhance(factor)
    # PIL rounds its grey value and cuts the result to whole levels: one each.
    assert np.abs(ours - np.asarray(expected)).max() < 1.6
    assert np.abs(ours - image).max() > 5


@pytest.mark.parametrize("turns", [-0.25, 0.1, 0.5])
def test_hue_equals_the_standard_library(turns):
  grey_too = RGB.copy()
  grey_too[0, 0] = grey_too[0, 0, :, :1]
  grey_too[0, 1, :3] = [[0, 0, 0], [255, 255, 255], [255, 255, 0]]
  result = augment(grey_too, hue=np.asarray([turns, 0.0]))
  for ours, pixel in zip(
    result[0].reshape(-1, 3), grey_too[0].reshape(-1, 3), strict=True
  ):
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel / 255)
    expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    np.testing.assert_allclose(ours / 255, expected, atol=2e-4)
  np.testing.assert_allclose(result[1], grey_too[1], atol=1e-4)


def test_grey_equals_pil_to_half_a_grey_level():
  result = augment(grey=np.asarray([True, False]))
  expected = np.asarray(Image.fromarray(RGB[0]).convert("L"))
  for channel in range(3):
    assert np.abs(result[0, ..., channel] - expected).max() < 0.6
  np.testing.assert_allclose(result[1], RGB[1], atol=1e-4)


def test_blur_equals_scipy_inside_and_keeps_constants():
  sigmas = np.asarray([2.0, 0.7])
  result = augment(sigma=sigmas)
  for image, sigma, ours in zip(RGB, sigmas, result, strict=True):
    expected = ndimage.gaussian_filter(
      image.astype(float), (sigma, sigma, 0), truncate=8 / sigma
    )
    inner = np.s_[8:-8, 8:-8]
    np.testing.assert_allclose(ours[inner], expected[inner], atol=0.01)
  flat = np.full(RGB.shape, 77, np.uint8)
  np.testing.assert_allclose(augment(flat, sigma=sigmas), flat, atol=1e-3)


def test_blur_of_a_point_by_hand():
  images = np.zeros_like(RGB)
  images[:, 12, 10] = 255
  result = augment(images, sigma=np.asarray([0.5, 2.0]))[0, ..., 0]
  # exp(-0.5 * (1 / 0.5) ** 2) = exp(-2), and so on, over their sum.
  weights = np.exp([-8, -2, 0, -2, -8])
  weights /= np.exp([-32, -18, -8, -2, 0, -2, -8, -18, -32]).sum()
  np.testing.assert_allclose(
    result[10:15, 8:13], 255 * np.outer(weights, weights), atol=1e-4
  )


def test_padding_takes_no_part_and_stays_the_mean_colour():
  box = np.asarray([[3, 2, 20, 15], [0, 0, 24, 20]], np.int32)
  changes = {
    "brightness": np.asarray([1.3, 0.8]),
    "contrast": np.asarray([0.6, 1.4]),
    "saturation": np.asarray([1.4, 0.7]),
    "hue": np.asarray([0.2, -0.1]),
    "sigma": np.asarray([1.5, 0.4]),
  }
  inner = RGB[0, 3:20, 2:15]
  # The same image where the crop begins, among other values.
  elsewhere = RGB.copy()
  elsewhere[0, :17, :13] = inner
  alone = augment(
    elsewhere, np.asarray([[0, 0, 17, 13], WHOLE[1]], np.int32), **changes
  )[0, :17, :13]
  for padding in (0, 255):
    images = RGB.copy()
    images[0] = padding
    images[0, 3:20, 2:15] = inner
    strong = augment(images, box, **changes)
    np.testing.assert_allclose(strong[0, 3:20, 2:15], alone, atol=1e-3)
    pixels = np.array(
      normalise(strong, box, (120.0,) * 3, (60.0,) * 3), copy=True
    )
    pixels[0, 3:20, 2:15] = 0
    assert (pixels[0] == 0).all()


def test_each_image_has_an_order_of_its_own():
  # Brightness clips, so that before and after another operation differ.
  changes = {
    "brightness": np.asarray([1.5, 1.5]),
    "contrast": np.asarray([0.5, 0.5]),
    "order": np.asarray([[0, 1, 2, 3], [1, 3, 2, 0]], np.int32),
  }
  images = np.stack([RGB[0], RGB[0]])
  first, second = augment(images, **changes) / 255
  x = RGB[0] / 255
  luma = (0.299, 0.587, 0.114)

  def contrast(x):
    return 0.5 * x + 0.5 * (x @ luma).mean()

  np.testing.assert_allclose(first, contrast(np.minimum(1.5 * x, 1)), atol=1e-5)
  np.testing.assert_allclose(
    second, np.minimum(1.5 * contrast(x), 1), atol=1e-5
  )
  assert np.abs(first - second).max() > 0.05


def drawn(settings=USUAL, batch=6000, seed=0):
  draw = _draw(jax.random.key(seed), settings, batch)
  return jax.tree.map(np.asarray, draw)


_draw = jax.jit(photometric.draw_photometric, static_argnums=(1, 2))


def assert_share(mask, probability):
  spread = np.sqrt(len(mask) * probability * (1 - probability))
  assert abs(mask.sum() - len(mask) * probability) < 5 * spread


def assert_uniform(values, low, high, bins=10):
  counts, _ = np.histogram(values, bins, (low, high))
  assert counts.sum() == len(values)
  share = len(values) / bins
  assert np.abs(counts - share).max() < 5 * np.sqrt(share * (1 - 1 / bins))


@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_laws_of_the_draws(probability):
  draw = drawn(
    photometric.PhotometricSettings(
      **{**vars(USUAL), "probability": probability}
    )
  )
  jittered = draw.hue != 0
  assert_share(jittered, 0.8 * probability)
  for name in ("brightness", "contrast", "saturation"):
    factor = getattr(draw, name)
    np.testing.assert_array_equal(factor != 1, jittered)
    assert_uniform(factor[jittered], 0.5, 1.5)
  assert_uniform(draw.hue[jittered], -0.25, 0.25)
  assert_share(draw.grey, 0.2 * probability)
  blurred = draw.sigma > 0
  assert_share(blurred, 0.5 * probability)
  assert_uniform(draw.sigma[blurred], 0.1, 2.0)
  # One coin decides for the three, which are independent behind it.
  joint = 0.8 * 0.2 * 0.5 * probability
  assert_share(jittered & draw.grey & blurred, joint)
  orders = (draw.order * [64, 16, 4, 1]).sum(-1)
  expected = [
    64 * a + 16 * b + 4 * c + d
    for a, b, c, d in itertools.permutations(range(4))
  ]
  np.testing.assert_array_equal(np.unique(orders), np.sort(expected))
  counts = np.unique(orders, return_counts=True)[1]
  assert np.abs(counts - 250).max() < 5 * np.sqrt(250)


def test_factors_never_turn_negative():
  settings = photometric.PhotometricSettings(
    **{**vars(USUAL), "jitter": (3.0, 3.0, 3.0, 0.5), "jitter_probability": 1.0}
  )
  assert_uniform(drawn(settings).brightness, 0, 4)


def test_a_draw_depends_on_the_position_alone():
  few, many = drawn(batch=3), drawn()
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:3]), few, many)
  other = drawn(seed=1)
  assert (many.order != other.order).any()
