"""Schedules of the learning rate, and the plateau that ends a run early.

References are torch's schedulers and the definitions, spelled out.
"""

import logging
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from configs import testing
from input_pipeline import dataset_info
from tests import test_train_loop as loop
from u2pl_jax import build as build_lib
from u2pl_jax import checkpoint, optimizer, plateau, train, writers
from u2pl_jax.config_checks import ConfigError, check_config

SCHEDULERS = torch.optim.lr_scheduler


def torch_rates(make_scheduler, base, steps):
  """The rates of a torch scheduler at steps 0, 1, ..."""
  sgd = torch.optim.SGD([torch.zeros(1)], lr=base)
  scheduler = make_scheduler(sgd)
  rates = []
  for _ in range(steps):
    rates.append(sgd.param_groups[0]["lr"])
    sgd.step()
    scheduler.step()
  return rates


# -- By step -------------------------------------------------------------------


def test_cosine_is_torchs():
  schedule = optimizer.cosine_schedule(0.2, 40)
  expected = torch_rates(lambda o: SCHEDULERS.CosineAnnealingLR(o, 40), 0.2, 40)
  rates = [float(schedule(jnp.int32(step))) for step in range(40)]
  np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-7)
  assert rates[0] == pytest.approx(0.2)
  assert float(schedule(20)) == pytest.approx(0.1)
  assert float(schedule(40)) == 0


def test_multistep_is_torchs():
  schedule = optimizer.multistep_schedule(0.2, 40, (0.5, 0.75), 0.1)
  expected = torch_rates(
    lambda o: SCHEDULERS.MultiStepLR(o, [20, 30], gamma=0.1), 0.2, 40
  )
  rates = [float(schedule(jnp.int32(step))) for step in range(40)]
  np.testing.assert_allclose(rates, expected, rtol=1e-6)
  np.testing.assert_allclose(
    [rates[0], rates[19], rates[20], rates[29], rates[30], rates[39]],
    [0.2, 0.2, 0.02, 0.02, 0.002, 0.002],
    rtol=1e-6,
  )


def test_milestones_on_the_same_step_both_count():
  schedule = optimizer.multistep_schedule(1.0, 4, (0.5, 0.55), 0.1)
  rates = [float(schedule(step)) for step in range(4)]
  np.testing.assert_allclose(rates, [1, 1, 0.01, 0.01], rtol=1e-6)


@pytest.mark.parametrize("name", ["poly", "cosine", "multistep"])
def test_rate_is_float64_under_x64(name):
  config = testing.get_config()
  config.optimizer.schedule = name
  with jax.enable_x64(True):
    rate = build_lib.make_learning_rate(config, 30)(jnp.asarray(7, jnp.int32))
    assert rate.dtype == jnp.float64
  expected = {
    "poly": 0.02 * (1 - 7 / 30) ** 0.9,
    "cosine": 0.01 * (1 + math.cos(math.pi * 7 / 30)),
    "multistep": 0.02,
  }[name]
  assert float(rate) == pytest.approx(expected, rel=1e-14)


def test_milestones_of_the_config():
  config = testing.get_config()
  config.optimizer.schedule = "multistep"
  config.optimizer.milestones = (0.25, 0.5)
  config.optimizer.decay_factor = 0.5
  schedule = build_lib.make_learning_rate(config, 8)
  np.testing.assert_allclose(
    [float(schedule(step)) for step in range(8)],
    [0.02, 0.02, 0.01, 0.01, 0.005, 0.005, 0.005, 0.005],
    rtol=1e-6,
  )


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("schedule", "linear", "'linear': choose one of poly, cosine, multistep"),
    ("decay_factor", 1.0, "decay_factor=1.0: must lie between 0 and 1"),
    ("decay_factor", 0.0, "decay_factor=0.0: must lie between"),
    ("milestones", (0.8, 0.6), "milestones=\\(0.8, 0.6\\): needs rising"),
    ("milestones", (0.5, 1.0), "milestones=\\(0.5, 1.0\\): needs rising"),
    ("milestones", (30, 60), "milestones=\\(30, 60\\): needs rising shares"),
    ("plateau.patience", 0, "plateau.patience=0: must be at least 1"),
    ("plateau.reductions", -1, "plateau.reductions=-1: must not be negative"),
    ("plateau.threshold", 1.0, "plateau.threshold=1.0: must be between 0"),
  ],
)
def test_bad_settings(key, value, message):
  config = testing.get_config()
  with config.unlocked():
    config.update_from_flattened_dict({f"optimizer.{key}": value})
  with pytest.raises(ConfigError, match=message) as error:
    check_config(config, num_classes=6, num_devices=1)
  assert "\n" not in str(error.value)


# -- The rate in the state -----------------------------------------------------


def test_state_of_a_schedule_by_step_is_as_before():
  """Checkpoints of the other schedules keep their structure."""
  tx = optimizer.sgd(
    lambda step: 0.1, momentum=0.9, weight_decay=0.5, head_multiplier=10.0
  )
  state = tx.init({"encoder": jnp.ones(2), "decoder": jnp.ones(3)})
  names, _, _ = checkpoint._flatten(state)
  assert names == ["1/trace/decoder", "1/trace/encoder", "3/count"]


def test_sgd_with_a_rate_in_the_state_by_hand():
  """As `test_sgd_by_hand`: torch's rule, the rate reduced in between."""
  params = {"encoder": jnp.float32(1), "decoder": jnp.float32(1)}
  tx = optimizer.sgd(0.1, momentum=0.9, weight_decay=0.5, head_multiplier=10.0)
  update = jax.jit(tx.update)
  # As a run does: on devices that are named.
  params, state = jax.device_put((params, tx.init(params)), jax.devices()[0])
  expected = {"encoder": 1.0, "decoder": 1.0}
  velocity = {"encoder": 0.0, "decoder": 0.0}
  for rate in (0.1, 0.1, 0.025):
    if rate != 0.1:
      state = optimizer.set_learning_rate(state, rate)
    assert float(optimizer.get_learning_rate(state)) == np.float32(rate)
    grads = jax.tree.map(lambda p: 2 * jnp.ones_like(p), params)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for name, multiplier in (("encoder", 1), ("decoder", 10)):
      velocity[name] = 0.9 * velocity[name] + 2 + 0.5 * expected[name]
      expected[name] -= rate * multiplier * velocity[name]
      np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)
  assert update._cache_size() == 1


# -- The watch -----------------------------------------------------------------


def watch(mious, patience=3, threshold=0.001, reductions=2):
  return plateau.watch(
    mious, patience=patience, threshold=threshold, reductions=reductions
  )


def test_watch_by_hand():
  # 0.5005 is no better than 0.5 by more than 0.001; 0.502 is.
  mious = [0.5, 0.5005, 0.4, 0.502, 0.502, 0.502]
  assert watch(mious) == plateau.Progress(2, 0, stop=False)
  assert watch([*mious, 0.503]) == plateau.Progress(0, 1, stop=False)
  assert watch([*mious, 0.503] + 3 * [0.5]) == plateau.Progress(0, 2, False)
  assert watch([*mious, 0.503] + 5 * [0.5]) == plateau.Progress(2, 2, False)
  assert watch([*mious, 0.503] + 6 * [0.5]) == plateau.Progress(3, 2, True)
  # An improvement between two reductions begins the count anew.
  assert watch([*mious, 0.503, 0.5, 0.5, 0.6, 0.5]) == plateau.Progress(
    1, 1, stop=False
  )
  assert watch([]) == plateau.Progress(0, 0, stop=False)
  assert watch([0.5, 0.5], patience=1, reductions=0).stop


@pytest.mark.parametrize("seed", range(20))
def test_reductions_are_torchs(seed):
  """ReduceLROnPlateau, whose patience is one evaluation longer."""
  rng = np.random.default_rng(seed)
  rising = np.linspace(0.3, 0.3 + rng.choice([0, 0.02, 0.2]), 60)
  mious = (rising + rng.normal(0, 0.003, 60)).tolist()
  patience = int(rng.integers(1, 8))
  sgd = torch.optim.SGD([torch.zeros(1)], lr=1.0)
  scheduler = SCHEDULERS.ReduceLROnPlateau(
    sgd,
    mode="max",
    factor=0.1,
    patience=patience - 1,
    threshold=0.001,
    threshold_mode="abs",
    eps=0,
  )
  for i, miou in enumerate(mious, start=1):
    scheduler.step(miou)
    reductions = round(-math.log10(sgd.param_groups[0]["lr"]))
    ours = watch(mious[:i], patience=patience, reductions=10**6)
    assert ours.reductions == reductions
    assert ours.waited == scheduler.num_bad_epochs
    # Stopped at the first reduction that is one too many, and ever after.
    assert watch(mious[:i], patience=patience).stop == (reductions > 2)


def first_within(evaluations, threshold):
  highest = max(miou for _, miou in evaluations)
  return next(item for item in evaluations if item[1] >= highest - threshold)


def test_best_is_the_first_within_the_threshold():
  evaluations = [(4, 0.5), (8, 0.5008), (12, 0.5004), (16, 0.5016)]
  assert plateau.contenders(evaluations[:3], 0.001) == [(4, 0.5), (8, 0.5008)]
  assert plateau.contenders(evaluations, 0.001) == [(8, 0.5008), (16, 0.5016)]
  # The highest, the first of equals.
  assert plateau.contenders([*evaluations, (20, 0.5016)], 0.0) == [(16, 0.5016)]
  assert plateau.contenders([], 0.001) == []


@pytest.mark.parametrize("seed", range(20))
def test_what_may_become_the_best_is_a_contender(seed):
  rng = np.random.default_rng(seed)
  mious = np.cumsum(rng.normal(0.0003, 0.0006, 50)).tolist()
  evaluations = list(enumerate(mious))
  for i in range(1, 50):
    past = evaluations[:i]
    contenders = plateau.contenders(past, 0.001)
    assert contenders[0] == first_within(past, 0.001)
    later_best, _ = first_within(evaluations[: i + 1], 0.001)
    assert later_best == i or later_best in dict(contenders)


@pytest.mark.parametrize(
  ("warmup", "total", "waited"),
  # 8 evaluations: the first is better, and the rest is not.
  [(0, 40, 7), (8, 40, 5), (16, 40, 3), (32, 40, 0), (40, 40, 7)],
)
def test_warm_up_does_not_count(warmup, total, waited):
  config = testing.get_config()
  config.optimizer.schedule = "plateau"
  recipe = types.SimpleNamespace(warmup_steps=warmup, total_steps=total)
  # High in the warm-up: the teacher is not held to it.
  evaluations = [
    (step, 0.9 if step <= warmup < total else 0.5) for step in range(4, 36, 4)
  ]
  progress = train.plateau_progress(config, recipe, evaluations)
  assert progress == plateau.Progress(waited, 0, stop=False)


def test_other_schedules_have_no_watch_and_no_threshold():
  config = testing.get_config()
  evaluations = [(4, 0.5), (8, 0.5008)]
  assert train.plateau_progress(config, None, evaluations) is None
  assert train.contenders(config, evaluations) == [(8, 0.5008)]
  config.optimizer.schedule = "plateau"
  assert train.contenders(config, evaluations) == evaluations


# -- Whole runs ----------------------------------------------------------------

EPOCH = loop.STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  loop.write_data(root)
  return root


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
  monkeypatch.setitem(loop.sys.modules, "tensorflow", None)


fake_steps = loop.fake_steps


def plateau_config(root, **changes):
  """Patience 1 and one reduction: the second evaluation that is no better."""
  return loop.make_config(
    root,
    **{
      "optimizer.schedule": "plateau",
      "optimizer.plateau.patience": 1,
      "optimizer.plateau.reductions": 1,
      "eval.oracle_images": 0,
      **changes,
    },
  )


def judge(monkeypatch, mious):
  """Evaluations say what the epoch's place in `mious` says."""

  def evaluate(config, program, data, state, step, counts, update):
    miou = mious[step // EPOCH - 1]
    return {"eval/miou": miou, "eval/pixel_accuracy": miou}

  monkeypatch.setattr(train, "evaluate", evaluate)


def test_early_stop_and_what_it_leaves(
  root, tmp_path, monkeypatch, fake_steps, caplog
):
  # Epochs 1 and 2 are the warm-up; 4 is no better than 3, nor is 5 of 7.
  judge(monkeypatch, [0.9, 0.8, 0.5, 0.5005, 0.4, 0.9, 0.9])
  config = plateau_config(
    root, **{"schedule.epochs": 7, "checkpoint.every_epochs": 7}
  )
  with caplog.at_level(logging.INFO, logger="u2pl_jax"):
    train.train_and_evaluate(config, tmp_path)
  assert (
    "mIoU no better by 0.001 in 1 evaluations: learning rate 0.002 from now on,"
    " reduction 1 of 1"
  ) in caplog.messages
  assert (
    "the run stopped early, at step 20 of 28: mIoU no better by 0.001 in 1"
    " evaluations after 1 reductions of the learning rate"
  ) in caplog.messages
  lines = {line["step"]: line for line in loop.read_metrics(tmp_path)}
  assert max(lines) == 20
  keys = ("waited", "reductions", "stop")
  counts = {
    step: tuple(lines[step][f"eval/plateau_{key}"] for key in keys)
    for step in range(EPOCH, 24, EPOCH)
  }
  assert counts == {
    4: (0, 0, 0), 8: (0, 0, 0), 12: (0, 0, 0), 16: (0, 1, 0), 20: (1, 1, 1),
  }  # fmt: skip
  rates = {
    step: line["train/learning_rate"]
    for step, line in lines.items()
    if "train/learning_rate" in line
  }
  assert set(rates) == {3, 6, 9, 12, 15, 18}
  for step, rate in rates.items():
    assert rate == np.float32(0.02 if step <= 16 else 0.002)
  # The end is saved, and the best by the whole history; the report is there.
  folders = (tmp_path / checkpoint.FOLDER).iterdir()
  assert {int(folder.name) for folder in folders} == {4, 20}
  assert (tmp_path / "report" / "index.html").is_file()

  before = (tmp_path / writers.METRICS_FILE).read_bytes()
  caplog.clear()
  with caplog.at_level(logging.INFO, logger="u2pl_jax"):
    train.train_and_evaluate(config, tmp_path)
  assert "stopped early, at step 20 of 28" in caplog.text
  assert "compiling" not in caplog.text
  assert (tmp_path / writers.METRICS_FILE).read_bytes() == before


def test_contenders_keep_their_checkpoints(
  root, tmp_path, monkeypatch, fake_steps
):
  judge(monkeypatch, [0.5, 0.5008, 0.5004, 0.5016, 0.5])
  config = plateau_config(
    root,
    **{
      "method": "supervised",
      "checkpoint.keep": 1,
      "optimizer.plateau.patience": 5,
    },
  )
  train.train_and_evaluate(config, tmp_path)
  folders = (tmp_path / checkpoint.FOLDER).iterdir()
  assert {int(folder.name) for folder in folders} == {8, 16, 20}
  _, meta = loop.read_state(config, tmp_path)
  assert (meta.best_step, meta.best_miou) == (8, 0.5008)
  assert meta.contenders == (8, 16)
  assert meta.evaluations == (
    (4, 0.5), (8, 0.5008), (12, 0.5004), (16, 0.5016), (20, 0.5),
  )  # fmt: skip


@pytest.mark.slow
def test_interrupted_around_a_reduction_equals_uninterrupted(
  root, tmp_path, monkeypatch
):
  """Real steps: at the evaluation that reduces, and after it."""
  judge(monkeypatch, [0.5, 0.5, 0.6, 0.6, 0.9])
  config = plateau_config(root, method="supervised")
  # One program for all runs, and no report: seconds each.
  info = dataset_info("camvid")
  spec = build_lib.DataSpec(loop.NUM_CLASSES, info.mean, info.std, 16)
  program = build_lib.build(config, spec)
  monkeypatch.setattr(train, "build", lambda *_, **_kwargs: program)
  for name in ("draw", "draw_missing", "finish"):
    monkeypatch.setattr(train.Reporter, name, lambda *_, **__: None)
  expected = tmp_path / "uninterrupted"
  train.train_and_evaluate(config, expected)
  _, meta = loop.read_state(config, expected)
  assert (meta.step, meta.best_step) == (16, 12)

  write = writers.MetricsWriter.write
  workdir = tmp_path / "interrupted"
  for stop, saved in ((8, 4), (9, 8), (16, 12)):

    def write_or_stop(self, step, metrics, stop=stop):
      if step == stop:
        raise KeyboardInterrupt
      write(self, step, metrics)

    monkeypatch.setattr(writers.MetricsWriter, "write", write_or_stop)
    with pytest.raises(KeyboardInterrupt, match=f"of step {saved} in"):
      train.train_and_evaluate(config, workdir)
  monkeypatch.setattr(writers.MetricsWriter, "write", write)
  train.train_and_evaluate(config, workdir)
  loop.assert_same_run(config, workdir, expected)
  # Neither a reduction nor a restored state asked for another compilation.
  assert program.supervised_step._cache_size() == 1

  # And the reduced rate is the one that the updates used.
  state, _ = loop.read_state(config, workdir)
  rate = float(optimizer.get_learning_rate(state.opt_state))
  assert rate == np.float32(0.002)
