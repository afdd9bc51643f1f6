"""The same checks in float64, in a process of their own."""

import os
import subprocess
import sys

import pytest

from tests.parity.golden import X64


@pytest.mark.skipif(X64, reason="this is that process")
def test_everything_in_float64(request):
  # Whole networks take half of the time.
  arguments = ["-m", "not slow", "--ignore=tests/parity/test_model.py"]
  if request.config.getoption("-m") != "not slow":
    arguments = []
  result = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-x", "tests/parity", *arguments),
      # Which files are read, and that a wrong one fails, needs no second look.
      "--ignore=tests/parity/test_golden.py",
    ],
    cwd=request.config.rootpath,
    env=os.environ | {"JAX_ENABLE_X64": "1"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stdout[-6000:]
