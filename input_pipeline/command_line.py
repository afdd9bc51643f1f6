"""The --config flag, and errors of the command line as one line."""

import sys
import traceback
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment file, with its arguments after a colon."
)


def fail(message: str, code: int = 1) -> NoReturn:
  """Ends the program with one line on stderr."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)


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
  try:
    arguments = flags.FLAGS(argv)
    # A file that is missing shows at the first look into the config.
    has_config = CONFIG.value is not None and "name" in CONFIG.value
    has_config = has_config or not needs_config
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
  if len(arguments) > 1 + max_arguments:
    unexpected = arguments[1 + max_arguments]
    fail(f"unexpected argument {unexpected!r}: flags begin with --", code)
  if not has_config:
    fail("--config is missing: for example --config=configs/voc_1464.py", code)
  return arguments
