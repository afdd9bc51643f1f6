"""Trains a network: flags only, the work is in train.py.

python -m u2pl_jax.main --config=configs/voc_1464.py
python -m u2pl_jax.main --config=configs/voc_1464.py:seed=3 --workdir=runs/3
"""

import logging
import os
import sys
import traceback

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment file, with its arguments after a colon."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run. Default: runs/<config.name>."
)


def _fail(message: str, code: int = 1) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; what the user got wrong becomes one line."""
  try:
    arguments = flags.FLAGS(argv)
    # A file that is missing shows at the first look into the config.
    has_config = _CONFIG.value is not None and "name" in _CONFIG.value
  except flags.Error as error:
    # An error in get_config arrives as text that ends with its own line.
    _fail(str(error).strip().splitlines()[-1])
  except (AttributeError, KeyError, OSError) as error:
    frames = traceback.extract_tb(error.__traceback__)
    if "ml_collections" not in frames[-1].filename:
      raise  # An error in the experiment file itself.
    text = str(error).replace("\\n", " ").replace("\\", "").replace("'", "")
    text = " ".join(text.split()).split("Attempted ")[-1]
    _fail(f"--config: no such key or file: {text}")
  if len(arguments) > 1:
    _fail(f"unexpected argument {arguments[1]!r}: flags begin with --")
  if not has_config:
    _fail("--config is missing: for example --config=configs/voc_1464.py")
  return arguments


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

  workdir = _WORKDIR.value or os.path.join("runs", _CONFIG.value.name)
  diverged = train.TrainingDivergedError
  try:
    train.train_and_evaluate(_CONFIG.value, workdir)
  except (DataError, ConfigError, CheckpointError, diverged) as error:
    _fail(str(error))
  except KeyboardInterrupt as interrupt:
    _fail(str(interrupt) or "interrupted", code=130)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
