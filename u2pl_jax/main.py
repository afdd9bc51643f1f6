"""Trains a network: flags only, the work is in train.py.

python -m u2pl_jax.main --config=configs/voc_1464.py
python -m u2pl_jax.main --config=configs/voc_1464.py:seed=3 --workdir=runs/3
"""

import logging
import os

from absl import app, flags
from absl import logging as absl_logging

from input_pipeline.command_line import CONFIG, fail, parse_flags

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run. Default: runs/<config.name>."
)


def main(_: list[str]) -> None:
  # The program's own lines, and of the libraries it uses only warnings.
  absl_logging.set_verbosity(absl_logging.WARNING)
  logger, handler = logging.getLogger("u2pl_jax"), logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  logger.propagate = False

  from input_pipeline import DataError
  from u2pl_jax import train
  from u2pl_jax.checkpoint import CheckpointError
  from u2pl_jax.config_checks import ConfigError
  from u2pl_jax.rehearsal import OutOfMemoryError
  from u2pl_jax.run_log import RunError

  workdir = _WORKDIR.value or os.path.join("runs", CONFIG.value.name)
  diverged = train.TrainingDivergedError
  try:
    train.train_and_evaluate(CONFIG.value, workdir)
  except (
    DataError,
    ConfigError,
    CheckpointError,
    RunError,
    OutOfMemoryError,
    diverged,
  ) as error:
    fail(str(error))
  except KeyboardInterrupt as interrupt:
    fail(str(interrupt) or "interrupted", code=130)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
