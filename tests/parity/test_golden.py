"""The parity tests can fail: on a changed number, and on no numbers at all."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(directory):
  """Runs the optimiser's tests, the smallest file, on another directory."""
  # What is compared here is not to be recorded.
  env = {k: v for k, v in os.environ.items() if k != "U2PL_PARITY_LOG"}
  return subprocess.run(
    [sys.executable, "-m", "pytest", "tests/parity/test_optimizer.py"],
    cwd=ROOT,
    env=env | {"U2PL_GOLDEN_DIR": str(directory)},
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope="module")
def arrays():
  with np.load(ROOT / "tests/golden/optimizer.npz") as archive:
    return dict(archive)


def changed(arrays, name):
  """One number of one array, by a tenth of the largest."""
  array = arrays[name].copy()
  array.reshape(-1)[array.size // 2] += 0.1 * np.abs(array).max()
  return {**arrays, name: array}


def test_other_directory(tmp_path, arrays):
  np.savez(tmp_path / "optimizer.npz", **arrays)
  result = run(tmp_path)
  assert result.returncode == 0, result.stdout[-2000:]
  assert " passed" in result.stdout and "failed" not in result.stdout


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_changed_number_fails(tmp_path, arrays, part):
  names = sorted(n for n, a in arrays.items() if a.dtype.kind == "f" and a.size)
  name = names[int(part * len(names))]
  np.savez(tmp_path / "optimizer.npz", **changed(arrays, name))
  result = run(tmp_path)
  assert result.returncode == 1, name
  assert "off by" in result.stdout or "AssertionError" in result.stdout


def test_empty_directory_is_an_error(tmp_path):
  result = run(tmp_path)
  assert result.returncode not in (0, 5)
  assert f"U2PL_GOLDEN_DIR={tmp_path}: no .npz file there" in result.stdout
