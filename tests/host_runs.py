"""The trainer for tests/test_hosts.py: without TensorBoard, and no report.

python -m tests.host_runs [flags of u2pl_jax.main]
"""

import sys

from absl import app

from u2pl_jax import main, report


def run(arguments):
  sys.modules["tensorflow"] = None  # As if it were not installed.
  report.write_report = report.refresh_report = lambda *_, **__: None
  main.main(arguments)


if __name__ == "__main__":
  app.run(run, flags_parser=main.parse_flags)
