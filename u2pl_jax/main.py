"""Trains a network: flags only, the work is in train.py.

python -m u2pl_jax.main --config=configs/voc_1464.py
python -m u2pl_jax.main --config=configs/voc_1464.py:seed=3 --workdir=runs/3

Several processes: srun, a TPU pod, or the flags --coordinator, --num_processes
and --process_id; docs/many_hosts.md.

Exit status: 0 trained to the end, 75 stopped by SIGTERM and 130 by an interrupt
(the same command goes on), 1 an error, which the last line names.
"""

import logging
import os

from absl import app, flags
from absl import logging as absl_logging

from input_pipeline.command_line import (
  CONFIG,
  define_processes,
  fail,
  parse_flags,
)
from u2pl_jax import preemption as preemption_lib
from u2pl_jax.xla_flags import set_xla_flags

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run. Default: runs/<config.name>."
)
_PROCESSES = define_processes()


def main(_: list[str]) -> None:
  preemption = preemption_lib.Preemption()
  preemption.install()
  set_xla_flags()
  # The program's own lines, and of the libraries it uses only warnings.
  absl_logging.set_verbosity(absl_logging.WARNING)
  logger, handler = logging.getLogger("u2pl_jax"), logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  logger.propagate = False

  from input_pipeline import DataError
  from u2pl_jax import distributed
  from u2pl_jax.checkpoint import CheckpointError
  from u2pl_jax.config_checks import ConfigError
  from u2pl_jax.rehearsal import OutOfMemoryError
  from u2pl_jax.run_log import RunError

  # Before any other use of jax.
  try:
    distributed.initialize(**_PROCESSES())
  except ConfigError as error:
    fail(str(error))
  prefix = distributed.error_prefix()
  if prefix:
    logger.setLevel(logging.WARNING)
    form = f"%(asctime)s {prefix}%(message)s"
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))

  from u2pl_jax import train

  workdir = _WORKDIR.value or os.path.join("runs", CONFIG.value.name)
  diverged = train.TrainingDivergedError
  with distributed.end_together():
    try:
      train.train_and_evaluate(CONFIG.value, workdir, preemption)
    except (
      DataError,
      ConfigError,
      CheckpointError,
      RunError,
      OutOfMemoryError,
      diverged,
    ) as error:
      fail(prefix + str(error))
    except preemption_lib.Preempted as stop:
      fail(prefix + str(stop), code=preemption_lib.EXIT_CODE)
    except KeyboardInterrupt as interrupt:
      fail(prefix + (str(interrupt) or "interrupted"), code=130)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
