import os
import resource
import stat

import pytest

from input_pipeline import storage


def test_write_whole_replaces(tmp_path):
  path = tmp_path / "list.txt"
  path.write_bytes(b"before, and longer")
  previous = os.umask(0o027)
  try:
    storage.write_whole(path, b"after")
  finally:
    os.umask(previous)
  assert path.read_bytes() == b"after"
  assert stat.S_IMODE(path.stat().st_mode) == 0o640
  assert os.listdir(tmp_path) == ["list.txt"]


def test_write_whole_that_fails_leaves_what_was_there(tmp_path):
  """A limit on the size of files stands for a full disk."""
  path = tmp_path / "list.txt"
  path.write_bytes(b"before")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(OSError, match="File too large"):
      storage.write_whole(path, bytes(2000))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert path.read_bytes() == b"before"
  assert os.listdir(tmp_path) == ["list.txt"]


def test_write_whole_into_no_folder(tmp_path):
  with pytest.raises(FileNotFoundError):
    storage.write_whole(tmp_path / "no" / "list.txt", b"")
