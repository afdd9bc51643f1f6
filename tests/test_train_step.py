"""Both steps as the trainer compiles them, on random data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import testing
from u2pl_jax import build as build_lib
from u2pl_jax import rngs, train_step
from u2pl_jax.images import normalise

DATA = build_lib.DataSpec(6, (120.0,) * 3, (60.0,) * 3, num_unlabelled=8)


def random_batch(seed, *, labelled=True, size=4):
  rng = np.random.default_rng(seed)
  batch = {
    "image": rng.integers(0, 256, (size, 33, 33, 3), dtype=np.uint8),
    "valid_box": np.tile(np.asarray([[0, 0, 33, 33]], np.int32), (size, 1)),
  }
  if labelled:
    batch["label"] = rng.integers(0, 6, (size, 33, 33), dtype=np.uint8)
    batch["label"][0, :4] = 255
  return batch


def run_steps(program, num_steps):
  """Through the phase switch -> (states as numpy, metrics)."""
  state = program.create_state()
  states, metrics = [jax.device_get(state)], []
  for i in range(num_steps):
    if i < program.recipe.warmup_steps:
      state, m = program.supervised_step(state, random_batch(i))
    else:
      state, m = program.semi_supervised_step(
        state, random_batch(i), random_batch(100 + i, labelled=False)
      )
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(m))
  return states, metrics


@pytest.fixture(scope="module")
def program():
  # 2 steps an epoch: 2 of warm-up, 4 semi-supervised.
  return build_lib.build(testing.get_config(), DATA)


@pytest.fixture(scope="module")
def history(program):
  return run_steps(program, 6)


def same(a, b):
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_one_compilation_per_step_function(program, history):
  assert program.supervised_step._cache_size() == 1
  assert program.semi_supervised_step._cache_size() == 1


def test_schedule(program):
  recipe = program.recipe
  assert (recipe.steps_per_epoch, recipe.warmup_steps) == (2, 2)
  assert recipe.total_steps == 6
  progress = [
    float(train_step.training_progress(jnp.asarray(s), recipe))
    for s in range(7)
  ]
  np.testing.assert_allclose(progress, [0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])


def test_teacher_waits_copies_and_follows(history):
  states, metrics = history
  # Warm-up: untouched.
  assert same(states[0].teacher, states[2].teacher)
  assert not same(states[0].student, states[2].student)
  # First semi-supervised step: decay 0, a copy of the student's parameters.
  assert metrics[2]["ema_decay"] == 0
  assert same(states[3].teacher.params, states[3].student.params)
  # Its batch statistics were the student's before its own forward pass moved
  # them; the two passes differ by dropout in the heads alone.
  assert same(
    states[3].teacher.batch_stats["encoder"],
    states[3].student.batch_stats["encoder"],
  )
  # Second: half way.
  expected = jax.tree.map(
    lambda t, s: (t + s) / 2,
    states[3].teacher.params,
    states[4].student.params,
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    states[4].teacher.params,
    expected,
  )


def test_bank_fills_and_step_counts(history):
  states, metrics = history
  assert [int(s.step) for s in states] == list(range(7))
  assert states[2].memory_bank.count.sum() == 0
  fed = sum(m["keys_enqueued"] for m in metrics[2:])
  capacities = states[0].memory_bank.capacities
  np.testing.assert_array_equal(
    states[6].memory_bank.count, np.minimum(fed, capacities)
  )
  np.testing.assert_allclose(
    metrics[5]["bank_fill"], states[6].memory_bank.count / capacities
  )


def test_metrics_are_consistent(history):
  _, metrics = history
  for m in metrics[2:]:
    np.testing.assert_allclose(
      m["total_loss"],
      m["sup_loss"] + m["unsup_loss"] + 0.1 * m["contra_loss"],
      rtol=1e-5,
    )
    np.testing.assert_allclose(m["pseudo_label_share"].sum(), 1, rtol=1e-5)
    assert 0.5 < m["kept_share"] < 1
    assert m["low_threshold"] <= m["keep_threshold"]
    assert (m["keys_enqueued"] <= 16).all()
    np.testing.assert_allclose(m["contra_chance"], np.log(5), rtol=1e-6)
  assert metrics[0]["total_loss"] == metrics[0]["sup_loss"]


def test_same_seed_same_numbers(program, history):
  states, _ = run_steps(program, 4)
  assert same(states[4], history[0][4])


def one_trace(config, batch_u=None):
  """Traces the first semi-supervised step of a fresh state."""
  config.schedule.warmup_epochs = 0
  recipe = build_lib.make_recipe(config, DATA)
  model = build_lib.make_model(config, 6)
  tx = build_lib.build(config, DATA).tx
  state = build_lib.build(config, DATA).create_state()
  batch_l = random_batch(0)
  batch_u = random_batch(1, labelled=False) if batch_u is None else batch_u
  draws = rngs.draw_semi_supervised(
    jax.random.key(0),
    state.step,
    mix=recipe.mix,
    mix_probability=1.0,
    unlabelled_shape=(4, 33, 33),
    num_classes=6,
    num_anchors=8,
    num_negatives=4,
    max_keys=recipe.max_keys_per_step,
  )

  @jax.jit
  def step(state, draws):
    return train_step.semi_supervised_step(
      state,
      train_step.LabelledBatch(**batch_l),
      train_step.UnlabelledBatch(**batch_u),
      draws,
      model=model,
      tx=tx,
      recipe=recipe,
      trace=True,
    )

  return state, *step(state, draws)


def test_padding_gets_no_pseudo_label_unless_published():
  batch_u = random_batch(1, labelled=False)
  batch_u["valid_box"][:] = [4, 0, 33, 30]
  _, _, metrics = one_trace(testing.get_config(), batch_u)
  pseudo_labels = metrics["trace"]["pseudo_labels"]
  assert (pseudo_labels[:, :4] == 255).all()
  assert (pseudo_labels[:, :, 30:] == 255).all()
  assert (pseudo_labels[:, 4:, :30] != 255).all()
  # Mean colour outside the box, before mixing brings in a partner's.
  images = normalise(
    batch_u["image"], batch_u["valid_box"], (120.0,) * 3, (60.0,) * 3
  )
  assert (images[:, :4] == 0).all()
  np.testing.assert_allclose(
    images[0, 5, 5], (batch_u["image"][0, 5, 5] - 120.0) / 60, rtol=1e-5
  )


@pytest.mark.slow
def test_every_quirk_at_once_runs_and_changes_the_step():
  config = testing.get_config()
  config.quirks = ",".join(train_step.QUIRKS)
  before, after, metrics = one_trace(config)
  trace = metrics["trace"]
  # The teacher started cold and was handed the student's parameters alone.
  assert not same(before.teacher.params, before.student.params)
  assert same(trace["teacher_used"].params, before.student.params)
  assert same(trace["teacher_used"].batch_stats, before.teacher.batch_stats)
  assert same(after.teacher.params, after.student.params)
  # Labelled pixels never enter a queue.
  assert metrics["key_candidates_l"].sum() == 0
  # Images after the first of each half have no class.
  membership = trace["membership"]
  assert not membership[1:4].any() and not membership[5:].any()
  assert membership[0].sum() > membership[0].any(-1).sum()
