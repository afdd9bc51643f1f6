"""The --config flag, and errors of the command line as one line."""

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import ml_collections
from absl import flags
from ml_collections import config_flags

from input_pipeline import errors

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment file, with its arguments after a colon."
)


def fail(message: str, code: int = 1) -> NoReturn:
  """Ends the program with one line on stderr."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(code)


def parse_flags(argv: list[str], *, code: int = 1) -> list[str]:
  """Parses the flags, for app.run; what the user got wrong becomes one line.

  Args:
    argv: name of the program and its arguments.
    code: status to exit with if they are wrong.
  """
  try:
    arguments = flags.FLAGS(argv)
    # A file that is missing shows at the first look into the config.
    has_config = CONFIG.value is not None and "name" in CONFIG.value
  except flags.Error as error:
    fail(_last_line(error), code)
  except (AttributeError, KeyError, OSError) as error:
    fail(_unknown_key(error), code)
  if len(arguments) > 1:
    fail(f"unexpected argument {arguments[1]!r}: flags begin with --", code)
  if not has_config:
    fail("--config is missing: for example --config=configs/voc_1464.py", code)
  return arguments


def read_config(
  file: str, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Reads an experiment file, for a command whose --config may be missing.

  Args:
    file: with its arguments after a colon, as --config takes it.
    overrides: flags such as '--config.model.head=deeplabv3'.

  Raises:
    ConfigError: there is no such file or key, or a value does not fit.
  """
  values = flags.FlagValues()
  argv = ["", f"--config={file}", *overrides]
  config = config_flags.DEFINE_config_file(
    "config", None, flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
    if config.value is not None and "name" in config.value:
      return config.value
  except flags.Error as error:
    raise errors.ConfigError(_last_line(error)) from None
  except (AttributeError, KeyError, OSError) as error:
    raise errors.ConfigError(_unknown_key(error)) from None
  raise errors.ConfigError(f"--config={file}: no experiment file")


def _last_line(error: flags.Error) -> str:
  # An error in get_config arrives as text that ends with its own line.
  return str(error).strip().splitlines()[-1]


def _unknown_key(error: Exception) -> str:
  """The line about a missing key or file; raises what is another error."""
  frames = traceback.extract_tb(error.__traceback__)
  if "ml_collections" not in frames[-1].filename:
    raise error  # An error in the experiment file itself.
  text = str(error).replace("\\n", " ").replace("\\", "").replace("'", "")
  text = " ".join(text.split()).split("Attempted ")[-1]
  return f"--config: no such key or file: {text}"
