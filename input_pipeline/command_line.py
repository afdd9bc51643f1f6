"""The --config flag, and errors of the command line as one line."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from input_pipeline import storage

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment file, with its arguments after a colon."
)


def fail(message: str, code: int = 1) -> NoReturn:
  """Ends the program with one line on stderr."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)


def write_json(path: str, content: Any, code: int = 1) -> None:
  """Writes what a command found, for --json; makes the folder at need.

  A file that cannot be written ends the program with one line and status
  `code`.
  """
  text = json.dumps(content, indent=2) + "\n"
  try:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    storage.write_whole(path, text.encode())
  except OSError as error:
    fail(
      f"--json={path}: cannot be written ({error.strerror}): choose another"
      " file",
      code,
    )


def parse_flags(
  argv: list[str],
  *,
  code: int = 1,
  needs_config: bool = True,
  max_arguments: int = 0,
) -> list[str]:
  """Parses the flags, for app.run; what the user got wrong becomes one line.

  Args:
    argv: name of the program and its arguments.
    code: status to exit with if they are wrong.
    needs_config: whether --config must be given.
    max_arguments: how many arguments that are no flags may be given.

  Returns:
    The name of the program and the arguments that are no flags.
  """
  arguments, has_config = _parse(flags.FLAGS, CONFIG, argv, code)
  if len(arguments) > 1 + max_arguments:
    unexpected = arguments[1 + max_arguments]
    fail(f"unexpected argument {unexpected!r}: flags begin with --", code)
  if needs_config and not has_config:
    fail("--config is missing: for example --config=configs/voc_1464.py", code)
  return arguments


def define_processes() -> Callable[[], dict[str, str | int | None]]:
  """Defines the flags of a command that several processes may run together.

  Returns:
    Called after parsing: what they say, as `u2pl_jax.distributed.initialize`
    takes it.
  """
  holders = {
    "coordinator": flags.DEFINE_string(
      "coordinator", None, "host:port of process 0, where all processes meet."
    ),
    "num_processes": flags.DEFINE_integer(
      "num_processes",
      None,
      "How many there are; 1 alone: this one, whatever SLURM says.",
    ),
    "process_id": flags.DEFINE_integer(
      "process_id", None, "Which one this is, from 0."
    ),
  }
  return lambda: {name: holder.value for name, holder in holders.items()}


def load_config(arguments: Sequence[str]) -> ml_collections.ConfigDict:
  """The config of a command that another process will run.

  Args:
    arguments: '--config=file.py:argument' and then '--config.key=value' ...

  Returns:
    The resolved config. What is wrong ends the program with one line.
  """
  argv = ["command", *arguments]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=argv
  )
  _parse(values, config, argv, 1)
  return config.value


def _parse(
  values: flags.FlagValues, config: flags.FlagHolder, argv: list[str], code: int
) -> tuple[list[str], bool]:
  """(arguments that are no flags, whether there is a config)."""
  try:
    arguments = values(argv)
    # A file that is missing shows at the first look into the config.
    return arguments, config.value is not None and "name" in config.value
  except flags.Error as error:
    # An error in get_config arrives as text that ends with its own line.
    fail(str(error).strip().splitlines()[-1], code)
  except (AttributeError, KeyError, OSError) as error:
    frames = traceback.extract_tb(error.__traceback__)
    if "ml_collections" not in frames[-1].filename:
      raise  # An error in the experiment file itself.
    text = str(error).replace("\\n", " ").replace("\\", "").replace("'", "")
    text = " ".join(text.split()).split("Attempted ")[-1]
    fail(f"--config: no such key or file: {text}", code)
