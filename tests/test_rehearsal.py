"""The largest step is tried first, and leaves no trace but a compilation."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import testing
from u2pl_jax import build as build_lib
from u2pl_jax import rehearsal, sharding, train
from u2pl_jax.rehearsal import OutOfMemoryError, memory_errors_in_one_line

DATA = build_lib.DataSpec(6, (120.0,) * 3, (60.0,) * 3, num_unlabelled=8)
FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore lines"


def make_batch(seed, *, labelled):
  rng = np.random.default_rng(seed)
  batch = {
    "image": rng.integers(0, 256, (4, 33, 33, 3), dtype=np.uint8),
    "valid_box": np.tile(np.asarray([[0, 0, 33, 33]], np.int32), (4, 1)),
  }
  if labelled:
    batch["label"] = rng.integers(0, 6, (4, 33, 33), dtype=np.uint8)
  return batch


def real_step(program):
  put = sharding.put_batch
  result = program.semi_supervised_step(
    program.create_state(),
    put(program.mesh, make_batch(0, labelled=True)),
    put(program.mesh, make_batch(1, labelled=False)),
  )
  return jax.device_get(result)


@pytest.mark.slow
def test_the_run_uses_the_compilation_and_gets_the_same_numbers():
  config = testing.get_config()
  program = build_lib.build(config, DATA)
  abstract = build_lib.abstract_state(config, program)
  assert rehearsal.rehearse(config, program, abstract) == "semi_supervised_step"
  step = program.semi_supervised_step
  assert step._cache_size() == 1
  tried = real_step(program)
  assert step._cache_size() == 1
  without = real_step(build_lib.build(config, DATA))
  for a, b in zip(
    jax.tree.leaves(tried), jax.tree.leaves(without), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_the_supervised_method_tries_its_only_step():
  config = testing.get_config("method=supervised")
  program = build_lib.build(config, DATA)
  called = []

  def step(state, batch):
    called.append((state, batch))
    return state, {}

  program = dataclasses.replace(program, supervised_step=step)
  abstract = build_lib.abstract_state(config, program)
  assert rehearsal.rehearse(config, program, abstract) == "supervised_step"
  ((state, batch),) = called
  # What the input gives, and a state like the real one, but for its values.
  real = make_batch(0, labelled=True)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in real.items()
  }
  created = program.create_state()
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(
      (a.shape, a.dtype, a.sharding, a.weak_type),
      (b.shape, b.dtype, b.sharding, b.weak_type),
    ),
    state,
    created,
  )


def test_a_memory_error_is_one_line_with_the_fix():
  config = testing.get_config()
  with pytest.raises(OutOfMemoryError) as caught:
    with memory_errors_in_one_line(config, 1):
      raise jax.errors.JaxRuntimeError(FULL)
  text = str(caught.value)
  assert "\n" not in text
  for part in (
    "4 + 4 images of 33x33 over 1 device(s)",
    "--config.batch.microbatches=2",
    "python -m u2pl_jax.plan",
    "--device-memory=",
  ):
    assert part in text
  config.batch.microbatches = 2
  with pytest.raises(OutOfMemoryError, match="--config.model.remat"):
    with memory_errors_in_one_line(config, 1):
      raise jax.errors.JaxRuntimeError(FULL)


def test_other_errors_stay_what_they_are():
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    with memory_errors_in_one_line(testing.get_config(), 1):
      raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_run_that_does_not_fit_ends_before_it_has_a_state(
  tmp_path, monkeypatch
):
  def full(config, program, abstract):
    raise jax.errors.JaxRuntimeError(FULL)

  def build(*args, **kwargs):
    program = build_lib.build(*args, **kwargs)
    return dataclasses.replace(program, create_state=None)

  monkeypatch.setattr(train, "rehearse", full)
  monkeypatch.setattr(train, "build", build)
  config = testing.get_config()
  config.dataset.root = str(tmp_path / "data")
  with pytest.raises(OutOfMemoryError):
    train.train_and_evaluate(config, tmp_path / "run")
