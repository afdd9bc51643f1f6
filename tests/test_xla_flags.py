import os
import subprocess
import sys

import pytest

from u2pl_jax.xla_flags import set_xla_flags

_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"


@pytest.mark.parametrize(
  "given, expected",
  [
    ("", f"{_SCHEDULER}=false"),
    ("--xla_other=1", f"--xla_other=1 {_SCHEDULER}=false"),
    (f"{_SCHEDULER}=true", f"{_SCHEDULER}=true"),
  ],
)
def test_what_the_user_set_stays(monkeypatch, given, expected):
  monkeypatch.setenv("XLA_FLAGS", given)
  set_xla_flags()
  assert os.environ["XLA_FLAGS"] == expected


def test_the_compiler_knows_them():
  """It refuses unknown ones when the first program is compiled."""
  code = (
    "from u2pl_jax.xla_flags import set_xla_flags; set_xla_flags();"
    "import jax; print(jax.jit(lambda x: x + 1)(1))"
  )
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
  )
  assert (result.returncode, result.stdout) == (0, "2\n"), result.stderr
