"""Convolutions of the network: XLA's own, or by matrix products for a CPU."""

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
  if _AS_PRODUCTS.get():
    pixels = x.shape[0] * -(-x.shape[1] // stride) * -(-x.shape[2] // stride)
    if pixels * kernel.shape[2] * kernel.shape[3] >= _WORTH_PRODUCTS:
      return convolve_by_products(x, kernel, stride, dilation)
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
  # The compiler transposes the first factor, slowly: that should be the one
  # with fewer channels.
  if x.shape[-1] > grad.shape[-1]:
    swapped = _sums_of_outer_products(grad, x, size, stride, dilation, -1)
    return swapped.swapaxes(2, 3)
  return _sums_of_outer_products(x, grad, size, stride, dilation, 1)


def _sums_of_outer_products(
  first: Array,
  second: Array,
  size: int,
  stride: int,
  dilation: int,
  direction: int,
) -> Array:
  """Of an input and an output (direction 1) or an output and an input (-1)."""
  x, y = (first, second) if direction == 1 else (second, first)
  batch, height, width, _ = x.shape
  reach = dilation * (size // 2)
  pixels = (height + reach) * (width + reach)
  elements = range(size)
  if size > 1 and stride == 1 and pixels <= 1.2 * height * width:
    # All images as one row of pixels, with as many zeros behind each line and
    # image as the kernel reaches: then an element is a shift of the whole, and
    # the first factor is transposed once for all of them.
    padding = ((0, 0), (0, reach), (0, reach), (0, 0))
    flat_first, flat_second = (
      jnp.pad(array, padding).reshape(batch * pixels, -1)
      for array in (first, second)
    )
    largest = reach * (width + reach + 1)
    flat_second = jnp.pad(flat_second, ((largest, largest), (0, 0)))
    sums = []
    for row in elements:
      for col in elements:
        shift = (row - size // 2) * (width + reach) + (col - size // 2)
        begin = largest - direction * dilation * shift
        part = flat_second[begin : begin + batch * pixels]
        sums.append(jnp.einsum("pc,pf->cf", flat_first, part))
    return jnp.stack(sums).reshape(size, size, *sums[0].shape)

  result = jnp.zeros((size, size, first.shape[-1], second.shape[-1]), x.dtype)
  for rows in _taps(height, size, stride, dilation):
    for cols in _taps(width, size, stride, dilation):
      seen = x[:, rows.source, cols.source]
      seeing = y[:, rows.target, cols.target]
      pair = (seen, seeing) if direction == 1 else (seeing, seen)
      result = result.at[rows.element, cols.element].set(
        jnp.einsum("bhwc,bhwf->cf", *pair)
      )
  return result


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
