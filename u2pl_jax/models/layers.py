"""Layers whose numbers have to equal the published network's.

Everything is NHWC. Parameters and batch statistics are float32 (float64 under
x64); `dtype` is the type of the convolutions' inputs and outputs.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from u2pl_jax.models.convolution import convolve

Array = jax.Array
Dtype = jnp.dtype

# Initialisers of the two halves of the published network: the encoder draws
# He-normal over fan-out, the heads keep the default of torch's Conv2d, which is
# U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases alike.
encoder_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
head_kernel_init = nn.initializers.variance_scaling(
  1.0 / 3.0, "fan_in", "uniform"
)


def _head_bias_init(fan_in: int):
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Conv(nn.Module):
  """2-D convolution with torch's explicit symmetric padding.

  Attributes:
    features: output channels.
    kernel_size: side of the square kernel.
    stride, dilation: as in torch; the padding is `dilation * (size - 1) // 2`,
      which keeps the size of the input at stride 1.
    use_bias: whether a bias is added.
    head: initialise like the published heads instead of the encoder.
    dtype: compute type.
  """

  features: int
  kernel_size: int
  stride: int = 1
  dilation: int = 1
  use_bias: bool = False
  head: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    size, in_features = self.kernel_size, x.shape[-1]
    kernel = self.param(
      "kernel",
      head_kernel_init if self.head else encoder_kernel_init,
      (size, size, in_features, self.features),
      jnp.float32,
    )
    y = convolve(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      self.stride,
      self.dilation,
    )
    if self.use_bias:
      fan_in = in_features * size**2
      bias = self.param(
        "bias", _head_bias_init(fan_in), (self.features,), jnp.float32
      )
      y = y + bias.astype(self.dtype)
    return y


class BatchNorm(nn.Module):
  """Batch normalisation over the global batch, in torch's convention.

  Linen's own BatchNorm stores the *biased* batch variance in the running
  average; torch stores the unbiased one. In the image-pooling branch of ASPP
  n is the batch size, so the two differ by a factor of n / (n - 1).

  Attributes:
    momentum: weight of the old running value (torch's momentum is 1 - this).
    epsilon: added to the variance.
    scale_init: initialiser of the scale; zero for the last norm of a block.
    dtype: type of the output; statistics are at least float32.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """Normalises `x` [b, h, w, c] with batch (train) or running statistics.

    Raises:
      ValueError: in training with one value per channel (a batch of one image
        in the image-pooling branch), where the variance does not exist.
    """
    channels = x.shape[-1]
    running_mean = self.variable(
      "batch_stats", "mean", jnp.zeros, (channels,), jnp.float32
    )
    running_var = self.variable(
      "batch_stats", "var", jnp.ones, (channels,), jnp.float32
    )
    scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

    if train:
      count = x.size // channels
      if count < 2 and not self.is_initializing():
        raise ValueError(
          "batch normalisation of a single value per channel: the image-pooling"
          " branch needs at least two images in the global batch"
        )
      mean = _widened(x).mean((0, 1, 2))
      var = _variance(x, mean)
      if not self.is_initializing():
        unbiased = var * (count / (count - 1))
        keep = self.momentum
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * unbiased
    else:
      mean, var = running_mean.value, running_var.value
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    return _normalise(x, mean, factor, bias, self.dtype)


def _widened(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Of the norms' input the backward pass needs several functions, each as large
# and in float32: they are computed again, so that only the input itself is
# kept, in its own type. (The statistics are not computed again.)


@jax.checkpoint
def _variance(x: Array, mean: Array) -> Array:
  """[c]; two passes: E[x^2] - E[x]^2 cancels when the mean is large."""
  return jnp.square(_widened(x) - mean).mean((0, 1, 2))


@functools.partial(jax.checkpoint, static_argnums=4)
def _normalise(
  x: Array, mean: Array, factor: Array, bias: Array, dtype: Dtype
) -> Array:
  y = (_widened(x) - mean) * factor + bias
  return y.astype(dtype)


def max_pool_ceil(x: Array) -> Array:
  """3x3 max-pooling with stride 2, padding 1 and torch's `ceil_mode=True`.

  Args:
    x: [b, h, w, c].

  Returns:
    [b, ceil((h - 1) / 2) + 1, ..., c]; a last window that would begin outside
    the input and its left padding is dropped, as torch does.
  """

  def right_padding(size: int) -> int:
    out = -(-(size - 1) // 2) + 1
    if (out - 1) * 2 >= size + 1:
      out -= 1
    return (out - 1) * 2 + 3 - size - 1

  padding = [(1, right_padding(size)) for size in x.shape[1:3]]
  return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)


def _interpolation_matrix(
  size_in: int, size_out: int, dtype: np.dtype
) -> np.ndarray:
  """[size_out, size_in] weights of align_corners=True linear interpolation.

  Positions are rounded to `dtype` where torch rounds them: exact ones would
  differ from its results by up to 1e-5 in float32.
  """
  scale = dtype.type(size_in - 1) / dtype.type(max(size_out - 1, 1))
  position = np.arange(size_out, dtype=dtype) * scale
  low = np.minimum(position.astype(np.int64), size_in - 1)
  high = np.minimum(low + 1, size_in - 1)
  fraction = position - low.astype(dtype)
  matrix = np.zeros((size_out, size_in), dtype)
  np.add.at(matrix, (np.arange(size_out), low), 1 - fraction)
  np.add.at(matrix, (np.arange(size_out), high), fraction)
  return matrix


def _weighted_gathers(x: Array, matrix: np.ndarray, axis: int) -> Array:
  """`matrix` times `axis` of x, reading only where the matrix is not 0."""
  shape = [1] * x.ndim
  shape[axis] = len(matrix)
  # The nonzero entries of a row first, in their order.
  places = np.argsort(matrix == 0, axis=1, kind="stable")
  result = 0
  for tap in range((matrix != 0).sum(1).max()):
    place = places[:, tap]
    weights = matrix[np.arange(len(matrix)), place].reshape(shape)
    result += weights * jnp.take(x, place, axis, mode="clip")
  return result


def _product(x: Array, matrix: np.ndarray, axis: int) -> Array:
  """`matrix` times `axis` of x."""
  # TPU matmuls default to bfloat16 inputs, which would blur the logits.
  y = jnp.tensordot(matrix, x, (1, axis), precision=jax.lax.Precision.HIGHEST)
  return jnp.moveaxis(y, 0, axis)


def _apply(x: Array, matrix: np.ndarray, axis: int) -> Array:
  # A gather is slow on a TPU, a product that is mostly zeros on a CPU.
  return jax.lax.platform_dependent(
    x,
    cpu=lambda x: _weighted_gathers(x, matrix, axis),
    default=lambda x: _product(x, matrix, axis),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _interpolate(x: Array, size_in: int, size_out: int, axis: int) -> Array:
  """Linear interpolation along an axis, from `size_in` to `size_out` points."""
  matrix = _interpolation_matrix(size_in, size_out, np.dtype(x.dtype))
  return _apply(x, matrix, axis)


def _interpolate_forward(
  x: Array, size_in: int, size_out: int, axis: int
) -> tuple[Array, None]:
  return _interpolate(x, size_in, size_out, axis), None


def _interpolate_backward(
  size_in: int, size_out: int, axis: int, _: None, gradient: Array
) -> tuple[Array]:
  # Automatically it would be a scatter, which is slow everywhere.
  matrix = _interpolation_matrix(size_in, size_out, np.dtype(gradient.dtype))
  return (_apply(gradient, matrix.T, axis),)


_interpolate.defvjp(_interpolate_forward, _interpolate_backward)


def resize_bilinear(x: Array, size: Sequence[int]) -> Array:
  """Bilinear resize with align_corners=True, as every resize of the network.

  Args:
    x: [b, h, w, c] float.
    size: the two output sizes.

  Returns:
    [b, *size, c] of at least float32.
  """
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  for axis, size_out in zip((1, 2), size, strict=True):
    size_in = x.shape[axis]
    if size_in != size_out:
      x = _interpolate(x, size_in, int(size_out), axis)
  return x


def resize_nearest(x: Array, size: Sequence[int]) -> Array:
  """Nearest resize of [b, h, w, ...] by torch's floor rule.

  Source index of output i is floor(i * size_in / size_out), in integers, which
  is not the nearest point of the align_corners grid.
  """
  rows = np.arange(size[0]) * x.shape[1] // size[0]
  cols = np.arange(size[1]) * x.shape[2] // size[1]
  return x[:, rows][:, :, cols]
