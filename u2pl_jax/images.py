"""Images on the device: normalisation and padding."""

import jax
import jax.numpy as jnp

Array = jax.Array


def inside_box(valid_box: Array, height: int, width: int) -> Array:
  """[b, 4] boxes -> [b, height, width] bool, True inside."""
  top, left, bottom, right = (valid_box[:, i, None, None] for i in range(4))
  y = jnp.arange(height)[None, :, None]
  x = jnp.arange(width)[None, None, :]
  return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def normalise(
  image: Array,
  valid_box: Array,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
) -> Array:
  """uint8 RGB -> float, exactly 0 (the mean colour) in the padding.

  Args:
    image: [b, h, w, 3] uint8, or float already in [0, 255].
    valid_box: [b, 4].
    mean, std: of each channel, in [0, 255].

  Returns:
    [b, h, w, 3], float32 (float64 of float64 images).
  """
  inside = inside_box(valid_box, *image.shape[1:3])
  return normalise_inside(image, inside, mean, std)


def normalise_inside(
  image: Array,
  inside: Array,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
) -> Array:
  """`normalise` with a mask [b, h, w] of what is image, in place of a box."""
  dtype = jnp.promote_types(image.dtype, jnp.float32)
  image = (image.astype(dtype) - jnp.asarray(mean, dtype)) / jnp.asarray(
    std, dtype
  )
  return jnp.where(inside[..., None], image, 0)
