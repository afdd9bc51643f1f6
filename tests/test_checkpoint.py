"""Checkpoints: round trip, what is kept, and every kind of damage."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2pl_jax import checkpoint
from u2pl_jax.checkpoint import CheckpointError, Checkpoints, Meta


def make_state(value: int, width: int = 300):
  # Random bits do not compress, so that their bytes lie in the file as such.
  kernel = np.random.default_rng(value).standard_normal((width, 5))
  return {
    "step": jnp.int32(value),
    "student": {"kernel": jnp.asarray(kernel, jnp.float32)},
    "opt_state": ({"trace": jnp.arange(8, dtype=jnp.float32) * value}, ()),
  }


def abstract(state):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state
  )


def make_meta(step, *, best_step=None, config="config", lists="lists"):
  best = None if best_step is None else 0.5
  return Meta(step, best, best_step, "teacher", config=config, lists=lists)


def save_steps(workdir, steps, *, keep=10, best_step=None):
  checkpoints = Checkpoints(workdir, keep=keep)
  for step in steps:
    checkpoints.save(make_state(step), make_meta(step, best_step=best_step))
  checkpoints.close()


def restore(workdir, *, state=None, config="config", lists="lists"):
  checkpoints = Checkpoints(workdir, keep=10)
  try:
    return checkpoints.restore_latest(
      abstract(make_state(0) if state is None else state),
      config=config,
      lists=lists,
    )
  finally:
    checkpoints.close()


def step_folder(workdir, step):
  return workdir / checkpoint.FOLDER / str(step)


def cut_short(folder):
  """What is left of a file that was being written."""
  for path in (folder / "state").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:10])


def flip_bits(folder):
  largest = max(
    (folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size
  )
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 0xFF
  largest.write_bytes(bytes(data))


def remove_state(folder):
  shutil.rmtree(folder / "state")


def remove_all(folder):
  shutil.rmtree(folder)
  folder.mkdir()


def break_meta(folder):
  (folder / "meta" / "metadata").write_text('{"step": ')


DAMAGES = (cut_short, flip_bits, remove_state, remove_all, break_meta)


def test_round_trip(tmp_path):
  state = make_state(3)
  checkpoints = Checkpoints(tmp_path, keep=1)
  meta = Meta(3, 0.25, 2, "teacher", config="c", lists="l")
  checkpoints.save(state, meta)
  checkpoints.close()
  restored, restored_meta = restore(tmp_path, config="c", lists="l")
  assert restored_meta == meta
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_empty_folder_is_a_fresh_start(tmp_path):
  assert restore(tmp_path) is None


def test_donated_after_save(tmp_path):
  """The step overwrites the state's buffers while the save is under way."""
  add_one = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  state = add_one(make_state(1, width=100_000))
  expected = jax.tree.map(np.array, state)
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(state, make_meta(7))
  for _ in range(5):
    state = add_one(state)
  jax.block_until_ready(state)
  checkpoints.close()
  restored, _ = restore(tmp_path, state=expected)
  jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.mark.parametrize(
  "best_step, expected", [(None, (6, 8)), (2, (2, 6, 8)), (8, (6, 8))]
)
def test_keeps_the_newest_and_the_best(tmp_path, best_step, expected):
  save_steps(tmp_path, (2, 4, 6, 8), keep=2, best_step=best_step)
  assert Checkpoints(tmp_path, keep=2).steps() == expected


def test_best_survives_another_process(tmp_path):
  save_steps(tmp_path, (2, 4), keep=1, best_step=2)
  save_steps(tmp_path, (6, 8), keep=1, best_step=2)
  assert Checkpoints(tmp_path, keep=1).steps() == (2, 8)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_one_is_skipped_with_one_warning(tmp_path, caplog, damage):
  save_steps(tmp_path, (2, 4))
  damage(step_folder(tmp_path, 4))
  with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
    state, meta = restore(tmp_path)
  assert meta.step == 2
  np.testing.assert_array_equal(state["step"], 2)
  warnings = [r for r in caplog.records if r.name.startswith("u2pl_jax")]
  assert len(warnings) == 1
  message = warnings[0].getMessage()
  assert "step 4" in message and "from step 2" in message
  # Out of the way: the step can be saved again, and a second look is quiet.
  assert (tmp_path / checkpoint.UNREADABLE_FOLDER / "4").is_dir()
  save_steps(tmp_path, (4,))
  caplog.clear()
  assert restore(tmp_path)[1].step == 4
  assert not [r for r in caplog.records if r.name.startswith("u2pl_jax")]


def test_flipped_bits_show_in_the_checksum(tmp_path, caplog):
  """Orbax itself reads them without a word."""
  save_steps(tmp_path, (2, 4))
  flip_bits(step_folder(tmp_path, 4))
  with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
    restore(tmp_path)
  assert "the bytes are not those that were saved" in caplog.text


def test_same_step_damaged_twice(tmp_path):
  save_steps(tmp_path, (2, 4))
  remove_state(step_folder(tmp_path, 4))
  restore(tmp_path)
  save_steps(tmp_path, (4,))
  remove_state(step_folder(tmp_path, 4))
  assert restore(tmp_path)[1].step == 2
  folder = tmp_path / checkpoint.UNREADABLE_FOLDER
  assert sorted(path.name for path in folder.iterdir()) == ["4", "4_2"]


def test_none_readable_is_an_error(tmp_path):
  save_steps(tmp_path, (2, 4))
  for step in (2, 4):
    remove_state(step_folder(tmp_path, step))
  with pytest.raises(
    CheckpointError, match="none of the 2 checkpoints"
  ) as info:
    restore(tmp_path)
  assert "\n" not in str(info.value)
  # Nothing was damaged further.
  assert step_folder(tmp_path, 2).exists() and step_folder(tmp_path, 4).exists()


def test_unfinished_save_of_a_killed_process(tmp_path):
  save_steps(tmp_path, (2,))
  unfinished = step_folder(tmp_path, "4.orbax-checkpoint-tmp")
  shutil.copytree(step_folder(tmp_path, 2), unfinished)
  shutil.rmtree(unfinished / "meta")
  assert restore(tmp_path)[1].step == 2
  save_steps(tmp_path, (4,))
  assert restore(tmp_path)[1].step == 4
  assert not unfinished.exists()


def test_another_config(tmp_path):
  save_steps(tmp_path, (2,))
  with pytest.raises(CheckpointError, match="another config") as info:
    restore(tmp_path, config="other")
  assert str(step_folder(tmp_path, 2)) in str(info.value)


def test_other_lists(tmp_path):
  save_steps(tmp_path, (2,))
  with pytest.raises(CheckpointError, match="lists of images have changed"):
    restore(tmp_path, lists="other")


def test_another_network(tmp_path):
  save_steps(tmp_path, (2,))
  with pytest.raises(CheckpointError, match="another network") as info:
    restore(tmp_path, state=make_state(0, width=65))
  message = str(info.value)
  assert "student/kernel" in message
  assert "float32[300, 5]" in message and "float32[65, 5]" in message
  state = {**make_state(0), "teacher": jnp.zeros(3)}
  with pytest.raises(CheckpointError, match="teacher is absent there"):
    restore(tmp_path, state=state)


def test_existing_step_is_not_overwritten(tmp_path):
  save_steps(tmp_path, (2,))
  with pytest.raises(Exception, match="already exists"):
    save_steps(tmp_path, (2,))
