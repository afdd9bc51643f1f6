import re

import jax
import numpy as np
import pytest

from tests.parity.golden import X64, close, fixtures, load, real, same
from u2pl_jax.models.layers import resize_bilinear, resize_nearest

FILES = [(path, load(path)) for path in fixtures("upsample*.npz")]
CASES = [
  pytest.param(arrays, name.removesuffix(":in"), id=name)
  for _, arrays in FILES
  for name in arrays
  if name.endswith(":in")
]


@pytest.mark.parametrize("arrays,case", CASES)
def test_resize(arrays, case):
  kind, size = re.fullmatch(r"(\w+?)_\d+x\d+_to_(\d+x\d+)", case).groups()
  size = tuple(int(n) for n in size.split("x"))
  x = arrays[f"{case}:in"]
  if kind == "nearest":
    same("nearest", case, resize_nearest(x, size), arrays[f"{case}:out"])
    # The source indices themselves, read off images of row and column numbers.
    rows = np.broadcast_to(np.arange(x.shape[1])[None, :, None], x.shape)
    cols = np.broadcast_to(np.arange(x.shape[2])[None, None], x.shape)
    same(
      "nearest", case, resize_nearest(rows, size)[0, :, 0],
      arrays[f"{case}:rows"],
    )  # fmt: skip
    same(
      "nearest", case, resize_nearest(cols, size)[0, 0], arrays[f"{case}:cols"]
    )
    return
  weight = arrays[f"{case}:w"]
  out, pullback = jax.vjp(lambda x: resize_bilinear(x, size), real(x))
  (grad,) = pullback(real(weight))
  if X64:
    # The recorded numbers are float32, and up to 1.5e-5 from the exact ones.
    rows, cols = (
      exact_weights(*n) for n in zip(x.shape[1:3], size, strict=True)
    )
    exact = np.einsum("Hh,Ww,bhwc->bHWc", rows, cols, x.astype(float))
    close("upsample", case, out, exact, atol=1e-10)
    exact = np.einsum("Hh,Ww,bHWc->bhwc", rows, cols, weight.astype(float))
    close("upsample gradient", case, grad, exact, atol=1e-10)
    return
  close("upsample", case, out, arrays[f"{case}:out"], atol=1e-5)
  close("upsample gradient", case, grad, arrays[f"{case}:grad"], atol=1e-5)


def exact_weights(size_in, size_out):
  """[size_out, size_in] in float64: hat functions around the source points."""
  position = np.linspace(0, size_in - 1, size_out)
  return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size_in)))
