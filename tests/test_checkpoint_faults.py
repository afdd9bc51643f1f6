"""Checkpoints under damage to every file; a full disk; what SIGTERM saves."""

import contextlib
import errno
import logging
import os
import resource
import shutil

import jax
import numpy as np
import pytest

from tests.test_checkpoint import (
  abstract,
  make_meta,
  make_state,
  restore,
  save_steps,
  step_folder,
)
from u2pl_jax import checkpoint, writers
from u2pl_jax.checkpoint import CheckpointError, Checkpoints, Meta


def files_of(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def cut(path):
  os.truncate(path, path.stat().st_size // 2)


def flip_one_bit(path):
  data = bytearray(path.read_bytes())
  data[2 * len(data) // 3] ^= 4
  path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip_one_bit, os.remove])
def test_whatever_is_damaged(tmp_path, caplog, damage):
  """The newest one is whole after all, or the one before it is used."""
  save_steps(tmp_path / "run", (2, 4))
  noticed = set()
  for file in files_of(step_folder(tmp_path / "run", 4)):
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    name = file.relative_to(tmp_path / "run")
    damage(tmp_path / "copy" / name)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
      state, meta = restore(tmp_path / "copy")
    said = [r for r in caplog.records if r.name.startswith("u2pl_jax")]
    assert len(said) == (0 if meta.step == 4 else 1), name
    assert meta == make_meta(meta.step)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(meta.step))
    if meta.step == 2:
      noticed.add(file.name)
    shutil.rmtree(tmp_path / "copy")
  # Those that nothing can do without.
  assert {"metadata", "_METADATA", "manifest.ocdbt"} <= noticed


@pytest.mark.parametrize(
  "old, new",
  [
    # It would pass for a checkpoint of another run, which is an error.
    (b'"config": "config"', b'"config": "konfig"'),
    (b'"best_step": null', b'"best_step": 2   '),
  ],
)
def test_damage_that_still_reads_well(tmp_path, caplog, old, new):
  save_steps(tmp_path, (2, 4))
  path = step_folder(tmp_path, 4) / "meta" / "metadata"
  data = path.read_bytes()
  assert old in data
  path.write_bytes(data.replace(old, new))
  with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
    assert restore(tmp_path)[1].step == 2
  assert "its meta data are not those that were saved" in caplog.text


def test_without_the_newer_checksum(tmp_path):
  """As earlier versions have saved it."""
  save_steps(tmp_path, (2,))
  handler = checkpoint.ocp.JsonCheckpointHandler()
  stored = dict(handler.restore(step_folder(tmp_path, 2) / "meta"))
  for name in ("meta_checksum", "pending_line"):
    del stored[name]
  path = step_folder(tmp_path, 2) / "meta" / "metadata"
  path.write_text(checkpoint.json.dumps(stored))
  assert restore(tmp_path)[1] == make_meta(2)


# -- A full disk ---------------------------------------------------------------


@contextlib.contextmanager
def small_files(limit):
  """No file becomes larger than that: the system refuses to write."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_refused_by_the_system(tmp_path):
  save_steps(tmp_path, (2,))
  checkpoints = Checkpoints(tmp_path, keep=10)
  with small_files(2_000), pytest.raises(CheckpointError) as info:
    checkpoints.save(make_state(4), make_meta(4))
    checkpoints.wait()
  message = str(info.value)
  assert str(tmp_path / checkpoint.FOLDER) in message
  assert "cannot be written (File too large): make room" in message
  assert "\n" not in message
  # The process ends; the next one finds the good one, and saves again.
  with contextlib.suppress(CheckpointError):
    checkpoints.close()
  assert restore(tmp_path)[1].step == 2
  save_steps(tmp_path, (4,))
  assert restore(tmp_path)[1].step == 4


def test_no_room_is_known_before(tmp_path, monkeypatch):
  """300 x 5 and 8 numbers of 4 bytes, and one more: 6036 bytes."""
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    shutil, "disk_usage", lambda _: usage._replace(free=6_035)
  )
  checkpoints = Checkpoints(tmp_path, keep=10)
  with pytest.raises(CheckpointError, match="No space left on device: 0.0 MB"):
    checkpoints.save(make_state(4), make_meta(4))
  assert checkpoints.steps() == ()
  monkeypatch.setattr(
    shutil, "disk_usage", lambda _: usage._replace(free=6_036)
  )
  checkpoints.save(make_state(4), make_meta(4))
  checkpoints.close()
  assert restore(tmp_path)[1].step == 4


def test_full_disk_in_tensorboard(tmp_path):
  """Whose library has an error of its own for it."""
  tf = pytest.importorskip("tensorflow")
  sink = writers.TensorBoard(tmp_path)

  class Full:
    def flush(self, *_):
      raise tf.errors.ResourceExhaustedError(None, None, "events file")

    close = write_scalars = write_images = flush

  sink._writer = Full()
  for call in (sink.sync, sink.close):
    with pytest.raises(OSError) as info:
      call()
    assert info.value.errno == errno.ENOSPC
  for call in (sink.write, sink.write_images):
    with pytest.raises(OSError, match="No space left"):
      call(1, {})


# -- SIGTERM -------------------------------------------------------------------


def preempted(workdir):
  folder = workdir / checkpoint.PREEMPTED_FOLDER
  return sorted(path.name for path in folder.iterdir())


def restored_step(workdir):
  state, meta = restore(workdir)
  np.testing.assert_array_equal(state["step"], meta.step)
  return meta.step


def test_preempted_lies_apart_until_there_is_a_newer_one(tmp_path):
  save_steps(tmp_path, (2,))
  pending = make_meta(3)
  pending = Meta(**{**vars(pending), "pending_line": {"a": 0.1, "b": 3}})
  checkpoints = Checkpoints(tmp_path, keep=10)
  checkpoints.save_preempted(make_state(3), pending)
  assert checkpoints.steps() == (2, 3)
  checkpoints.close()
  assert not (tmp_path / checkpoint.FOLDER / "3").exists()
  _, meta = restore(tmp_path)
  assert meta == pending
  # Again, further on: only the newest is of use.
  checkpoints = Checkpoints(tmp_path, keep=10)
  checkpoints.save_preempted(make_state(5), make_meta(5))
  checkpoints.close()
  assert preempted(tmp_path) == ["5"]
  assert restored_step(tmp_path) == 5
  # A newer one is begun, and complete.
  checkpoints = Checkpoints(tmp_path, keep=10)
  checkpoints.save(make_state(6), make_meta(6))
  assert preempted(tmp_path) == ["5"]
  checkpoints.wait()
  assert preempted(tmp_path) == []
  checkpoints.close()
  assert restored_step(tmp_path) == 6


def test_the_complete_one_of_a_step_counts(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=10)
  pending = Meta(**{**vars(make_meta(4)), "pending_line": {}})
  checkpoints.save_preempted(make_state(4), pending)
  # As a process that was killed before it could remove the other.
  checkpoints.save(make_state(4), make_meta(4))
  checkpoints.close()
  assert preempted(tmp_path) == ["4"]
  checkpoints = Checkpoints(tmp_path, keep=10)
  like = abstract(make_state(0))
  _, meta = checkpoints.restore_latest(like, config="config", lists="lists")
  assert meta.pending_line is None
  checkpoints.wait()
  assert preempted(tmp_path) == []
  checkpoints.close()


def test_damaged_preempted_one(tmp_path, caplog):
  save_steps(tmp_path, (2,))
  checkpoints = Checkpoints(tmp_path, keep=10)
  checkpoints.save_preempted(make_state(3), make_meta(3))
  checkpoints.close()
  folder = tmp_path / checkpoint.PREEMPTED_FOLDER / "3"
  shutil.rmtree(folder / "state")
  with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
    assert restored_step(tmp_path) == 2
  assert f"step 3 in {folder.parent} cannot be read" in caplog.text
  assert (tmp_path / checkpoint.UNREADABLE_FOLDER / "3").is_dir()
  assert preempted(tmp_path) == []
