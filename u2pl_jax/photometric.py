"""Photometric strong augmentation of images, on the device.

Colour jitter, grey and Gaussian blur with the laws of FixMatch's and UniMatch's
recipes; no pixel moves. Drawing is separate from applying, so that a draw is
data: it can be recorded and replayed.
"""

import dataclasses
import math

import flax
import jax
import jax.numpy as jnp

from u2pl_jax.images import inside_box

Array = jax.Array

# Luma of Rec. 601, what 'grey' means in PIL and torchvision too.
_LUMA = (0.299, 0.587, 0.114)
_NUM_JITTERS = 4


@dataclasses.dataclass(frozen=True)
class PhotometricSettings:
  """The law of the draws, static.

  Attributes:
    probability: that an image is augmented at all.
    jitter: brightness, contrast, saturation as the largest change of a factor
      around 1 (which is never negative), and hue as the largest turn, in turns
      (at most 0.5).
    jitter_probability: of an augmented image.
    grey_probability: likewise.
    blur_probability: likewise.
    blur_sigma: (lowest, highest) standard deviation in pixels.
  """

  probability: float
  jitter: tuple[float, float, float, float]
  jitter_probability: float
  grey_probability: float
  blur_probability: float
  blur_sigma: tuple[float, float]


@flax.struct.dataclass
class PhotometricDraw:
  """The random part, for each image; neutral where an operation is left out.

  Attributes:
    brightness, contrast, saturation: [b] float factors, neutral 1.
    hue: [b] float turns, neutral 0.
    order: [b, 4] int32, which of the four above, numbered so, comes when.
    grey: [b] bool.
    sigma: [b] float pixels, 0 for no blur.
  """

  brightness: Array
  contrast: Array
  saturation: Array
  hue: Array
  order: Array
  grey: Array
  sigma: Array


@jax.named_scope("photometric")
def draw_photometric(
  key: Array, settings: PhotometricSettings, batch: int
) -> PhotometricDraw:
  """Draws for `batch` images; an image's draw depends on its position alone."""

  def draw_one(key):
    keys = jax.random.split(key, 6)
    augmented, jittered, grey, blurred = jax.random.uniform(keys[0], (4,)) < (
      jnp.asarray(
        (
          settings.probability,
          settings.jitter_probability,
          settings.grey_probability,
          settings.blur_probability,
        )
      )
    )
    jittered &= augmented
    reach = jnp.asarray(settings.jitter)
    center = jnp.asarray((1.0, 1.0, 1.0, 0.0))
    lowest = (center - reach).at[:3].max(0)
    values = jax.random.uniform(
      keys[1], (_NUM_JITTERS,), minval=lowest, maxval=center + reach
    )
    values = jnp.where(jittered, values, center)
    low, high = settings.blur_sigma
    sigma = jax.random.uniform(keys[2], minval=low, maxval=high)
    return PhotometricDraw(
      brightness=values[0],
      contrast=values[1],
      saturation=values[2],
      hue=values[3],
      order=jax.random.permutation(keys[3], _NUM_JITTERS).astype(jnp.int32),
      grey=grey & augmented,
      sigma=jnp.where(blurred & augmented, sigma, 0),
    )

  positions = jnp.arange(batch)
  return jax.vmap(lambda i: draw_one(jax.random.fold_in(key, i)))(positions)


@jax.named_scope("photometric")
def apply_photometric(
  draw: PhotometricDraw,
  images: Array,
  valid_box: Array,
  *,
  max_sigma: float,
) -> Array:
  """Jitter, then grey, then blur, each image by its own draw.

  The padding takes no part: the mean of the contrast is that of the image, and
  the blur at a border weighs the neighbours that there are. Values are cut off
  at black and white after each operation, as 8-bit images do.

  Args:
    draw: for these images.
    images: [b, h, w, 3] uint8 RGB, or float in [0, 255].
    valid_box: [b, 4] top, left, bottom, right of the image in the crop.
    max_sigma: no `draw.sigma` is larger.

  Returns:
    [b, h, w, 3] in [0, 255], float32 (float64 of float64 images). What lies
    outside valid_box is unspecified.
  """
  images = images.astype(jnp.promote_types(images.dtype, jnp.float32)) / 255
  inside = inside_box(valid_box, *images.shape[1:3])
  for position in range(_NUM_JITTERS):
    images = _jitter(images, inside, draw, draw.order[:, position])
  grey = jnp.broadcast_to(_luma(images), images.shape)
  images = jnp.where(_each(draw.grey), grey, images)
  images = _blur(images, valid_box, draw.sigma, max_sigma)
  return images * 255


def _each(values: Array) -> Array:
  """[b] -> [b, 1, 1, 1]."""
  return values[:, None, None, None]


def _luma(images: Array) -> Array:
  """[b, h, w, 3] -> [b, h, w, 1]."""
  weights = jnp.asarray(_LUMA, images.dtype)
  return (images * weights).sum(-1, keepdims=True)


def _jitter(
  images: Array, inside: Array, draw: PhotometricDraw, which: Array
) -> Array:
  """One of the four operations, `which` [b] says which one for each image."""
  luma = _luma(images)
  weight = inside[..., None].astype(images.dtype)
  mean = (luma * weight).sum((1, 2, 3), keepdims=True) / jnp.maximum(
    weight.sum((1, 2, 3), keepdims=True), 1
  )

  def blend(factor, other):
    factor = _each(factor).astype(images.dtype)
    return jnp.clip(factor * images + (1 - factor) * other, 0, 1)

  return jnp.select(
    [_each(which == i) for i in range(_NUM_JITTERS)],
    [
      blend(draw.brightness, 0),
      blend(draw.contrast, mean),
      blend(draw.saturation, luma),
      _turn_hue(images, draw.hue),
    ],
  )


def _turn_hue(images: Array, turns: Array) -> Array:
  """Adds to the hue of HSV, [b] in turns; saturation and value stay.

  A channel of a colour of HSV is value - value * saturation * w(hue), where w
  is a trapezoid that is shifted by a third of a turn from channel to channel.
  """
  highest = images.max(-1, keepdims=True)
  spread = highest - images.min(-1, keepdims=True)
  red, green, blue = (images[..., i : i + 1] for i in range(3))
  divisor = jnp.where(spread > 0, spread, 1)
  sixths = jnp.select(
    [highest == red, highest == green],
    [(green - blue) / divisor, 2 + (blue - red) / divisor],
    4 + (red - green) / divisor,
  )
  sixths = sixths + 6 * _each(turns).astype(images.dtype)
  place = (sixths + jnp.asarray((5, 3, 1), images.dtype)) % 6
  turned = highest - spread * jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
  # Exactly the same pixels where nothing turns.
  return jnp.where(_each(turns) == 0, images, turned)


def _blur(
  images: Array, valid_box: Array, sigma: Array, max_sigma: float
) -> Array:
  """Gaussian of [b] standard deviations, cut off at 4 of the largest."""
  height, width = images.shape[1:3]
  radius = math.ceil(4 * max_sigma)
  offsets = jnp.arange(-radius, radius + 1)
  sigma = sigma[:, None].astype(images.dtype)
  weights = jnp.exp(
    -0.5 * (offsets / jnp.where(sigma > 0, sigma, 1)).astype(images.dtype) ** 2
  )
  weights = jnp.where(sigma > 0, weights, offsets == 0)
  # A rectangle: the weights of what is there factor into the two axes.
  for axis, size in ((1, height), (2, width)):
    index = jnp.arange(size)
    first, last = valid_box[:, axis - 1, None], valid_box[:, axis + 1, None]
    there = ((index >= first) & (index < last)).astype(images.dtype)
    shape = (-1, size, 1, 1) if axis == 1 else (-1, 1, size, 1)
    there = there.reshape(shape)
    images = _weighted_sum(images * there, weights, axis, radius)
    present = _weighted_sum(there, weights, axis, radius)
    images /= jnp.where(present > 0, present, 1)
  return images


def _weighted_sum(x: Array, weights: Array, axis: int, radius: int) -> Array:
  """Sum over the neighbours along an axis; `weights` is [b, 2 * radius + 1]."""
  size = x.shape[axis]
  padding = [(0, 0)] * x.ndim
  padding[axis] = (radius, radius)
  x = jnp.pad(x, padding)
  return sum(
    jax.lax.slice_in_dim(x, k, k + size, axis=axis) * _each(weights[:, k])
    for k in range(2 * radius + 1)
  )
