"""Files by path, on this machine or in object storage (gs://, s3://).

A local path goes straight to the operating system. One with '://' goes through
etils, which is loaded for such a path alone.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

from input_pipeline import errors

Path = str | os.PathLike


def join(root: Path, *names: str) -> str:
  """Joins as os.path.join; an absolute or remote name stands for itself.

  The names, not the root, lose '.' and slashes that say nothing.
  """
  path = os.fspath(root)
  for name in names:
    if is_remote(name):
      path = name
    elif (name := os.path.normpath(name)) != ".":
      path = os.path.join(path, name)
  return path


def is_remote(path: Path) -> bool:
  """Whether the path is the address of an object store."""
  return "://" in os.fspath(path)


def read_bytes(path: Path) -> bytes:
  """The whole file.

  Raises:
    OSError: it cannot be read; FileNotFoundError if there is none.
  """
  with open_file(path) as file:
    with _os_errors():
      return file.read()


def open_file(path: Path) -> BinaryIO:
  """Opens a file to read; a header can be read without the rest.

  Raises:
    OSError: it cannot be opened; FileNotFoundError if there is none.
  """
  if not is_remote(path):
    return open(path, "rb")
  return _remote(path, lambda remote: remote.open("rb"))


def write_whole(path: Path, data: bytes) -> None:
  """Writes a local file, whole or not at all, also if the power goes.

  Raises:
    OSError: it cannot be written; what was there is untouched.
  """
  folder, name = os.path.split(os.path.abspath(path))
  handle, temporary = tempfile.mkstemp(
    prefix=f".{name}.", suffix=".part", dir=folder
  )
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    # mkstemp keeps the file to its owner.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def is_file(path: Path) -> bool:
  """Whether there is a file (remote: anything but a folder).

  Raises:
    DataError: the object store does not answer.
  """
  if not is_remote(path):
    return os.path.isfile(path)
  return _ask(path, lambda remote: remote.exists() and not remote.is_dir())


def is_folder(path: Path) -> bool:
  """Whether there is a folder.

  Raises:
    DataError: the object store does not answer.
  """
  if not is_remote(path):
    return os.path.isdir(path)
  return _ask(path, lambda remote: remote.is_dir())


def names_in(folder: Path) -> set[str]:
  """The names of what lies directly in a folder.

  Raises:
    OSError: it cannot be listed; FileNotFoundError if there is none.
  """
  if not is_remote(folder):
    with os.scandir(folder) as entries:
      return {entry.name for entry in entries}
  return _remote(
    folder, lambda remote: {entry.name for entry in remote.iterdir()}
  )


def files_below(folder: Path) -> Iterator[str]:
  """Paths relative to a folder of the files in and below it, sorted.

  Names that begin with a dot are left out, files and folders alike: editors and
  operating systems put them there.

  Raises:
    OSError: a folder cannot be listed.
  """
  if is_remote(folder):
    top = os.fspath(folder).rstrip("/")
    walk = _remote(folder, lambda remote: list(remote.walk()))
  else:
    top = os.fspath(folder)
    walk = os.walk(top, onerror=_raise, followlinks=True)
  found = []
  for parent, subfolders, names in walk:
    subfolders[:] = [name for name in subfolders if name[0] != "."]
    below = os.path.relpath(os.fspath(parent), top).replace(os.sep, "/")
    parts = [] if below == "." else below.split("/")
    if any(part.startswith(".") for part in parts):
      continue  # A remote walk is not steered by `subfolders`.
    found += ["/".join([*parts, name]) for name in names if name[0] != "."]
  return iter(sorted(found))


def _raise(error: OSError) -> None:
  raise error


def _ask(path: Path, question) -> bool:
  # Whoever asks expects an answer, not an error of the network.
  try:
    return _remote(path, question)
  except OSError as error:
    raise errors.DataError(f"{path}: cannot look: {error.strerror}") from None


def _remote(path: Path, do):
  """do(remote path), whose libraries have many errors, with OSError alone."""
  from etils import epath

  with _os_errors():
    return do(epath.Path(path))


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
  """Turns every error into an OSError with one line in strerror."""
  try:
    yield
  except Exception as error:
    if isinstance(error, FileNotFoundError) or getattr(error, "strerror", None):
      raise
    text = " ".join(str(error).split())
    raise OSError(0, f"{type(error).__name__}: {text}") from None
