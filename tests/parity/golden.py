"""Reads the recorded numbers and compares ours with them.

Everything is derived from the files: other files of the same format (other
seeds, sizes, class counts, cases) are tested by setting U2PL_GOLDEN_DIR.

With JAX_ENABLE_X64=1 the same tests run in float64: against float64 numbers
where they are recorded, else against the float32 ones within their recorded
distance from float64.
"""

import json
import os
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

X64 = jax.config.jax_enable_x64
DTYPE = jnp.float64 if X64 else jnp.float32
IGNORE = 255

_ROOT = pathlib.Path(__file__).parents[2]
_OWN = _ROOT / "tests" / "golden"
_BESIDE = _ROOT.parent / "shared" / "golden"


def fixtures(pattern: str) -> list[pathlib.Path]:
  """The recorded files of that name: of one directory if it is set, else ours.

  Those that are too large for the repository are used where they lie beside it.
  """
  named = os.environ.get("U2PL_GOLDEN_DIR")
  if named:
    if not any(pathlib.Path(named).glob("*.npz")):
      # Or every test would pass by having nothing to do.
      raise FileNotFoundError(f"U2PL_GOLDEN_DIR={named}: no .npz file there")
    return sorted(pathlib.Path(named).glob(pattern))
  found = {path.name: path for path in _OWN.glob(pattern)}
  if _BESIDE.is_dir():
    found = {path.name: path for path in _BESIDE.glob(pattern)} | found
  return [found[name] for name in sorted(found)]


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of a file."""
  with np.load(path, allow_pickle=False) as archive:
    return {name: archive[name] for name in archive.files}


def cases(arrays: dict, key: str) -> list[str]:
  """Prefixes 'a', 'b', ... of which the file has '<prefix>_<key>'."""
  found = (re.fullmatch(rf"([a-z]+)_{key}", name) for name in arrays)
  return sorted(match[1] for match in found if match)


def real(array: np.ndarray) -> jax.Array:
  """A floating-point input in the type under test."""
  return jnp.asarray(array, DTYPE)


def weights(
  names: np.ndarray, shapes: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
  """The state dict that was used, drawn from the names of its entries."""
  state = {}
  for name, shape in zip(names.tolist(), shapes.tolist(), strict=True):
    shape = tuple(int(n) for n in shape.split(",") if n)
    if name.endswith("num_batches_tracked"):
      continue
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    if name.endswith("running_mean"):
      value = 0.1 * rng.randn(*shape)
    elif name.endswith("running_var"):
      value = 1 + 0.2 * rng.rand(*shape)
    elif name.endswith("bias"):
      value = 0.1 * rng.randn(*shape)
    elif len(shape) == 4:
      value = rng.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
    else:
      value = 1 + 0.1 * rng.randn(*shape)
      if name.endswith("bn3.weight"):
        value = 0.2 * value
    state[name] = value.astype(np.float32)
  return state


def close(
  group: str,
  name: str,
  ours,
  recorded,
  *,
  atol: float = 0.0,
  rtol: float = 0.0,
) -> None:
  """Asserts |ours - recorded| <= atol + rtol * max |recorded|.

  Args:
    group: names the row of the table in docs/parity.md.
    name: of the array, for the message.
    ours, recorded: numbers of equal shape; NaN nowhere.
    atol, rtol: the second relative to the largest recorded number.
  """
  ours = np.asarray(ours, np.float64)
  recorded = np.asarray(recorded, np.float64)
  assert ours.shape == recorded.shape, (name, ours.shape, recorded.shape)
  if not recorded.size:
    return
  error = np.abs(ours - recorded).max()
  bound = atol + rtol * np.abs(recorded).max()
  _record(group, error, bound)
  assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"


def same(group: str, name: str, ours, recorded) -> None:
  """Asserts that two arrays of integers or masks are equal."""
  ours, recorded = np.asarray(ours), np.asarray(recorded)
  assert ours.shape == recorded.shape, (name, ours.shape, recorded.shape)
  different = int((ours != recorded).sum())
  _record(f"{group}: decisions", different, 0)
  assert not different, f"{name}: {different} of {ours.size} differ"


def _record(group: str, error: float, bound: float) -> None:
  """Appends to the file that scripts/parity_table.py reads, if it asked."""
  path = os.environ.get("U2PL_PARITY_LOG")
  if path:
    line = {
      "group": group,
      "type": "float64" if X64 else "float32",
      "error": float(error),
      "bound": float(bound),
    }
    with open(path, "a") as file:
      file.write(json.dumps(line) + "\n")
