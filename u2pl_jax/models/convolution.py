"""Convolutions of the network: XLA's own, but where it runs them slowly."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


def convolve(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
  """Convolution with torch's symmetric padding for odd kernels.

  Args:
    x: [b, h, w, c].
    kernel: [size, size, c, f], of the type of `x`.
    stride, dilation: as in torch; the padding is `dilation * (size - 1) // 2`.

  Returns:
    [b, ceil(h / stride), ceil(w / stride), f].
  """
  # In a shorter type the parts would be rounded before they are added.
  if _AS_PRODUCTS.get() and x.dtype.itemsize >= 4:
    pixels = x.shape[0] * -(-x.shape[1] // stride) * -(-x.shape[2] // stride)
    if pixels * kernel.shape[2] * kernel.shape[3] >= _WORTH_PRODUCTS:
      return convolve_by_products(x, kernel, stride, dilation)
  if dilation > 1 and stride == 1 and kernel.shape[0] > 1:
    return _convolve_dilated(x, kernel, dilation)
  return _convolution(x, kernel, stride, dilation)


def _convolution(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
  padding = dilation * (kernel.shape[0] - 1) // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((padding, padding), (padding, padding)),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_dilated(x: Array, kernel: Array, dilation: int) -> Array:
  """`_convolution` of stride 1, with a kernel's gradient that GPUs know.

  To XLA that gradient is a convolution of the images with the gradient of the
  outputs as a kernel of 65x65, say, and with the dilation as stride. Without
  dilation it recognises what cuDNN has kernels for; with, it takes the
  convolution literally.
  """
  return _convolution(x, kernel, 1, dilation)


def _dilated_forward(x: Array, kernel: Array, dilation: int):
  return _convolution(x, kernel, 1, dilation), (x, kernel)


def _dilated_backward(
  dilation: int, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  input_gradient = jax.linear_transpose(
    lambda x: _convolution(x, kernel, 1, dilation), x
  )

  def directly(x: Array, grad: Array) -> Array:
    return jax.linear_transpose(
      lambda kernel: _convolution(x, kernel, 1, dilation), kernel
    )(grad)[0]

  def by_subimages(x: Array, grad: Array) -> Array:
    return kernel_gradient_by_subimages(x, grad, kernel, dilation)

  gradient = jax.lax.platform_dependent(
    x, grad, cuda=by_subimages, rocm=by_subimages, default=directly
  )
  return *input_gradient(grad), gradient


_convolve_dilated.defvjp(_dilated_forward, _dilated_backward)


def kernel_gradient_by_subimages(
  x: Array, grad: Array, kernel: Array, dilation: int
) -> Array:
  """Gradient of the kernel of a dilated convolution, by one without dilation.

  Pixels that lie a multiple of the dilation apart never meet others: they are
  an image of their own, of which there are dilation x dilation.

  Args:
    x: [b, h, w, c].
    grad: [b, h, w, f], of the outputs at stride 1.
    kernel: [size, size, c, f]; its shape and type.
    dilation: of the convolution.

  Returns:
    [size, size, c, f].
  """

  def subimages(x: Array) -> Array:
    batch, height, width, channels = x.shape
    # With zeros, which add nothing to any sum.
    padding = ((0, -height % dilation), (0, -width % dilation))
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    x = x.reshape(
      batch,
      x.shape[1] // dilation,
      dilation,
      x.shape[2] // dilation,
      dilation,
      channels,
    )
    x = x.transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(batch * dilation**2, *x.shape[3:])

  x, grad = subimages(x), subimages(grad)
  return jax.linear_transpose(
    lambda kernel: _convolution(x, kernel, 1, 1), kernel
  )(grad)[0]


# Whether large convolutions run as matrix products; see `products`.
_AS_PRODUCTS = contextvars.ContextVar("as_products", default=False)
# Multiplications of a kernel element below which a product saves less than the
# larger program costs.
_WORTH_PRODUCTS = 2**25


@contextlib.contextmanager
def products(enabled: bool) -> Iterator[None]:
  """Within it large convolutions are traced as `convolve_by_products`."""
  token = _AS_PRODUCTS.set(enabled)
  try:
    yield
  finally:
    _AS_PRODUCTS.reset(token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_by_products(
  x: Array, kernel: Array, stride: int, dilation: int
) -> Array:
  """`convolve` by matrix products, since XLA's own are slow on a CPU.

  A kernel element at a time, over those outputs only for which it sees image
  and not padding: with dilations as large as the feature map few are left.
  Without dilation, where that saves nothing, only the gradient of the kernel
  is found so. docs/performance.md has the times.
  """
  return _forward(x, kernel, stride, dilation)


def _forward(x: Array, kernel: Array, stride: int, dilation: int) -> Array:
  if dilation == 1 and kernel.shape[0] > 1:
    return _convolution(x, kernel, stride, dilation)
  total, size = None, kernel.shape[0]
  for rows in _taps(x.shape[1], size, stride, dilation):
    for cols in _taps(x.shape[2], size, stride, dilation):
      part = jnp.einsum(
        "bhwc,cf->bhwf",
        x[:, rows.source, cols.source],
        kernel[rows.element, cols.element],
      )
      part = jnp.pad(part, ((0, 0), rows.missing, cols.missing, (0, 0)))
      total = part if total is None else total + part
  return total


def _forward_and_saved(x: Array, kernel: Array, stride: int, dilation: int):
  return _forward(x, kernel, stride, dilation), (x, kernel)


def _backward(
  stride: int, dilation: int, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
  x, kernel = saved
  input_gradient = jax.linear_transpose(
    lambda x: _forward(x, kernel, stride, dilation), x
  )
  gradient = _kernel_gradient(x, grad, kernel.shape[0], stride, dilation)
  return *input_gradient(grad), gradient


def _kernel_gradient(
  x: Array, grad: Array, size: int, stride: int, dilation: int
) -> Array:
  """[size, size, c, f]: for each kernel element a sum of outer products."""
  _, height, width, channels = x.shape
  reach = dilation * (size // 2)
  padded = (height + reach) * (width + reach)
  if size > 1 and stride == 1 and padded <= _WORTH_PADDING * height * width:
    return _kernel_gradient_by_shifts(x, grad, size, dilation)
  result = jnp.zeros((size, size, channels, grad.shape[-1]), x.dtype)
  for rows in _taps(height, size, stride, dilation):
    for cols in _taps(width, size, stride, dilation):
      seen = x[:, rows.source, cols.source]
      by = grad[:, rows.target, cols.target]
      result = result.at[rows.element, cols.element].set(
        _sum_of_outer_products(
          seen.reshape(-1, channels), by.reshape(-1, by.shape[-1])
        )
      )
  return result


def _sum_of_outer_products(x: Array, y: Array) -> Array:
  """[p, c] and [p, f] -> [c, f]."""
  # The compiler transposes the first factor, slowly: that should be the one
  # with fewer channels.
  if x.shape[-1] <= y.shape[-1]:
    return jnp.einsum("pc,pf->cf", x, y)
  return jnp.einsum("pf,pc->fc", y, x).T


# How many times the pixels the padding may make of them below.
_WORTH_PADDING = 1.2


def _kernel_gradient_by_shifts(
  x: Array, grad: Array, size: int, dilation: int
) -> Array:
  """`_kernel_gradient` of stride 1, with one transposition for all elements.

  All images become one row of pixels, with as many zeros behind each line and
  each image as the kernel reaches: then what an element sees is the whole row,
  shifted, and the factor that is not shifted is the same for all.
  """
  reach = dilation * (size // 2)
  line = x.shape[2] + reach
  # More than any shift, so that every shifted row is a slice.
  margin = reach * (line + 1)

  def row_of_pixels(array: Array) -> Array:
    padding = ((0, 0), (0, reach), (0, reach), (0, 0))
    return jnp.pad(array, padding).reshape(-1, array.shape[-1])

  x, grad = row_of_pixels(x), row_of_pixels(grad)
  # The wider one is shifted; see `_sum_of_outer_products`.
  shift_input = x.shape[-1] > grad.shape[-1]
  fixed, shifted = (grad, x) if shift_input else (x, grad)
  shifted = jnp.pad(shifted, ((margin, margin), (0, 0)))
  sums = []
  for row in range(size):
    for col in range(size):
      shift = dilation * ((row - size // 2) * line + (col - size // 2))
      begin = margin + shift if shift_input else margin - shift
      part = shifted[begin : begin + len(fixed)]
      product = jnp.einsum("pc,pf->cf", fixed, part)
      sums.append(product.T if shift_input else product)
  return jnp.stack(sums).reshape(size, size, *sums[0].shape)


convolve_by_products.defvjp(_forward_and_saved, _backward)


class _Tap(NamedTuple):
  """One kernel element along one axis.

  Attributes:
    element: its index.
    source: the inputs that it sees.
    target: the outputs that see an input through it.
    missing: how many outputs before and after them see padding.
  """

  element: int
  source: slice
  target: slice
  missing: tuple[int, int]


def _taps(size: int, kernel: int, stride: int, dilation: int) -> list[_Tap]:
  """Those elements of a kernel that see an input at all."""
  result, num_out = [], -(-size // stride)
  for element in range(kernel):
    # Output o sees input o * stride + shift.
    shift = dilation * (element - kernel // 2)
    begin = max(0, -(shift // stride))
    end = min(num_out, (size - 1 - shift) // stride + 1)
    if begin < end:
      first, last = begin * stride + shift, (end - 1) * stride + shift
      result.append(
        _Tap(
          element,
          slice(first, last + 1, stride),
          slice(begin, end),
          (begin, num_out - end),
        )
      )
  return result
