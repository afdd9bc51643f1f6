"""Flags of the compiler that help, for commands to set before they use jax."""

import os

# On a CPU the default runs operations side by side that could each use all
# cores: a tenth slower, and with twice the memory (docs/performance.md). It is
# no option of a single program.
_FLAGS = {"xla_cpu_enable_concurrency_optimized_scheduler": "false"}


def set_xla_flags() -> None:
  """Adds the flags to XLA_FLAGS; what the user has set there stays."""
  given = os.environ.get("XLA_FLAGS", "")
  added = [
    f"--{name}={value}" for name, value in _FLAGS.items() if name not in given
  ]
  os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
