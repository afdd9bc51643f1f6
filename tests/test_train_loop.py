"""The loop end to end on a tiny data set: what it leaves, and how it goes on.

Programs are compiled once for the module; the tests about the loop alone put a
step that only counts in place of the real ones.
"""

import dataclasses
import json
import logging
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from configs import testing
from input_pipeline import DataError, dataset_info
from u2pl_jax import advice, checkpoint, run_stats, train, writers
from u2pl_jax import data as data_lib
from u2pl_jax.build import DataSpec, build
from u2pl_jax.checkpoint import CheckpointError, Checkpoints
from u2pl_jax.config_checks import ConfigError
from u2pl_jax.evaluation_record import image_miou, read_record, summarise
from u2pl_jax.models import torch_weights
from u2pl_jax.run_log import read_run

REPOSITORY = pathlib.Path(__file__).parent.parent
NUM_CLASSES = 11  # Those of 'camvid', whose name stands in the config.
STEPS_PER_EPOCH, WARMUP_STEPS, TOTAL_STEPS = 4, 8, 20
LOG_EVERY = 3


def write_data(root):
  """4 labelled, 16 unlabelled and 4 validation images of 6 classes."""
  rng = np.random.default_rng(0)
  colours = rng.integers(0, 255, (6, 3))
  ids = {
    "splits/4/labeled.txt": [f"l{i}" for i in range(4)],
    "splits/4/unlabeled.txt": [f"u{i:02}" for i in range(16)],
    "ImageSets/Segmentation/val.txt": [f"v{i}" for i in range(4)],
  }
  for folder in ("JPEGImages", "SegmentationClass"):
    (root / folder).mkdir(parents=True)
  for path, names in ids.items():
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("\n".join(names))
    for number, name in enumerate(names):
      size = 48 if number % 2 else 64
      blocks = rng.integers(0, 6, (4, 4))
      mask = np.kron(blocks, np.ones((size // 4, size // 4))).astype(np.uint8)
      noise = rng.normal(0, 25, (size, size, 3))
      image = np.clip(colours[mask] + noise, 0, 255).astype(np.uint8)
      mask[:2] = 255
      Image.fromarray(image).save(root / "JPEGImages" / f"{name}.png")
      Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")


def make_config(root, **changes):
  config = testing.get_config()
  config.dataset.name = "camvid"
  config.dataset.root = str(root)
  config.schedule.epochs = TOTAL_STEPS // STEPS_PER_EPOCH
  config.schedule.warmup_epochs = WARMUP_STEPS // STEPS_PER_EPOCH
  config.log.every_steps = LOG_EVERY
  config.update_from_flattened_dict(changes)
  return config


COMMAND = (
  "--config=configs/testing.py",
  "--config.dataset.name=camvid",
  f"--config.schedule.epochs={TOTAL_STEPS // STEPS_PER_EPOCH}",
  f"--config.schedule.warmup_epochs={WARMUP_STEPS // STEPS_PER_EPOCH}",
  f"--config.log.every_steps={LOG_EVERY}",
)


def run_main(*arguments, code="from u2pl_jax import main"):
  """Runs the command in a process of its own."""
  code += "; from absl import app; app.run(main.main, "
  code += "flags_parser=main.parse_flags)"
  return subprocess.run(
    [sys.executable, "-c", code, *arguments],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=500,
  )


def assert_one_line(result, *parts):
  assert result.returncode not in (0, -signal.SIGKILL)
  assert "Traceback" not in result.stderr
  lines = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1, result.stderr
  assert result.stderr.splitlines()[-1] == lines[0]
  for part in parts:
    assert part in lines[0]


def read_metrics(workdir, *, with_time=False):
  text = (workdir / writers.METRICS_FILE).read_text()
  return [
    {k: v for k, v in json.loads(x).items() if with_time or k[:5] != "time/"}
    for x in text.splitlines()
  ]


def best_of(workdir):
  return max(x.get("eval/miou", -1) for x in read_metrics(workdir))


def read_state(config, workdir):
  """The state of the newest checkpoint, and its meta data."""
  info = dataset_info(config.dataset.name)
  program = build(config, DataSpec(NUM_CLASSES, info.mean, info.std, 16))
  data = data_lib.load_data(config, info)
  checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
  restored = checkpoints.restore_latest(
    train.abstract_state(config, program),
    config=writers.config_digest(config),
    lists=writers.digest([data.labelled, data.unlabelled, data.validation]),
  )
  checkpoints.close()
  return restored


def assert_same_run(config, workdir, expected):
  """Same bits in every array, same lines but for the clock."""
  state, meta = read_state(config, workdir)
  expected_state, expected_meta = read_state(config, expected)
  assert meta == expected_meta
  names, leaves, _ = checkpoint._flatten(state)
  _, expected_leaves, _ = checkpoint._flatten(expected_state)
  for name, a, b in zip(names, leaves, expected_leaves, strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
  assert read_metrics(workdir) == read_metrics(expected)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  write_data(root)
  return root


@pytest.fixture(scope="module")
def no_tensorflow():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "tensorflow", None)
    yield


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory, no_tensorflow):
  """Workdir of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("runs") / "finished"
  train.train_and_evaluate(make_config(root), workdir)
  return workdir


# -- A whole run ---------------------------------------------------------------


def test_what_a_run_leaves(root, finished):
  config = json.loads((finished / writers.CONFIG_FILE).read_text())
  assert config["dataset"]["root"] == str(root)
  assert (finished / "report" / "index.html").is_file()
  record = read_record(finished / train.EVALUATION_FOLDER)
  line = {x["step"]: x for x in read_metrics(finished)}[record.step]
  summary = summarise(record)
  assert summary["miou"] == line["eval/miou"] == best_of(finished)
  assert summary["mean_accuracy"] == line["eval/mean_accuracy"]
  assert summary["ece"] == line["eval/ece"]
  assert record.image_ids == ("v0", "v1", "v2", "v3")
  assert record.protocol["name"] == "padded"
  # Five evaluations.
  assert len((finished / "stats.csv").read_text().splitlines()) == 1 + 5
  assert (finished / "plots" / "train_bank_fill.png").is_file()
  steps = {int(p.name) for p in (finished / checkpoint.FOLDER).iterdir()}
  _, meta = read_state(make_config(root), finished)
  pictured = json.loads((finished / "report" / "report.json").read_text())
  assert pictured["pictures"]["step"] == meta.best_step
  samples = pictured["pictures"]["samples"]
  scores = dict(zip(record.image_ids, image_miou(record), strict=True))
  assert [sample["group"] for sample in samples] == ["best", "worst"]
  for sample, extreme in zip(samples, (max, min), strict=True):
    assert scores[sample["id"]] == extreme(scores.values())
    # The picture is of the network that was judged.
    assert sample["miou"] == pytest.approx(scores[sample["id"]], abs=1e-9)
  assert sum(pictured["labelled_pixels"]) > 0
  assert steps == {16, 20, meta.best_step}
  assert not list(finished.glob("*.tmp"))


def test_advice_on_a_tiny_run(finished):
  """Of 20 steps, which teach next to nothing, it says no more than is true."""
  titles = {finding.title for finding in advice.findings(read_run(finished))}
  assert titles <= {"The run was still improving at its end"}


def test_lines_of_a_run(finished):
  lines = {line["step"]: line for line in read_metrics(finished)}
  log_steps = {*range(LOG_EVERY, TOTAL_STEPS, LOG_EVERY), TOTAL_STEPS}
  eval_steps = set(range(STEPS_PER_EPOCH, TOTAL_STEPS + 1, STEPS_PER_EPOCH))
  assert list(lines) == sorted(log_steps | eval_steps)
  for step, line in lines.items():
    assert ("train/sup_loss" in line) == (step in log_steps)
    assert ("eval/miou" in line) == (step in eval_steps)
    assert ("eval/iou/pole" in line) == (step in eval_steps)
    assert ("data/labelled/own list" in line) == (step in eval_steps)
    semi = step > WARMUP_STEPS
    assert ("train/unsup_loss" in line) == (step in log_steps and semi)
    assert ("train/bank_fill/sky" in line) == (step in log_steps and semi)
    # The teacher's pseudo labels, so only once there is a teacher.
    assert ("oracle/ari" in line) == (step in eval_steps and semi)
  first = lines[LOG_EVERY]["train/learning_rate"]
  expected = 0.02 * (1 - (LOG_EVERY - 1) / TOTAL_STEPS) ** 0.9
  assert first == pytest.approx(expected, rel=1e-5)
  # 5 of the 11 classes are in neither truth nor prediction, or only predicted.
  line = lines[TOTAL_STEPS]
  ious = [v or 0 for k, v in line.items() if k.startswith("eval/iou/")]
  assert len(ious) == NUM_CLASSES
  assert line["eval/miou"] == pytest.approx(np.mean(ious))


def test_timing_has_names_of_its_own(finished):
  line = read_metrics(finished, with_time=True)[-1]
  names = {name for name in line if name.startswith("time/")}
  assert names == {
    "time/images_per_second",
    "time/seconds_per_step",
    "time/data_wait_share",
    "time/seconds",
    "time/eval_seconds",
  }
  assert all(line[name] > 0 for name in names)


def test_finished_run_is_left_alone(root, finished, tmp_path, caplog):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  before = (workdir / writers.METRICS_FILE).read_bytes()
  page = workdir / "report" / "index.html"
  page.unlink()
  # Keys that change no result may differ.
  config = make_config(root)
  config.log.every_steps = 1
  config.input.num_threads = 1
  with caplog.at_level(logging.INFO, logger="u2pl_jax"):
    train.train_and_evaluate(config, workdir)
  assert "the run is finished" in caplog.text
  assert "compiling supervised_step" not in caplog.text
  assert page.is_file()
  assert (workdir / writers.METRICS_FILE).read_bytes() == before
  stamp = page.stat().st_mtime_ns
  train.train_and_evaluate(config, workdir)
  assert page.stat().st_mtime_ns == stamp


# -- Going on ------------------------------------------------------------------


@pytest.mark.slow
def test_interrupted_twice_equals_uninterrupted(
  root, finished, tmp_path, monkeypatch
):
  """Ctrl-C within the warm-up and within the semi-supervised phase."""
  config = make_config(root)
  write = writers.MetricsWriter.write
  for stop, saved in ((6, 4), (15, 12)):

    def write_or_stop(self, step, metrics, stop=stop):
      if step == stop:
        raise KeyboardInterrupt
      write(self, step, metrics)

    monkeypatch.setattr(writers.MetricsWriter, "write", write_or_stop)
    with pytest.raises(KeyboardInterrupt) as info:
      train.train_and_evaluate(config, tmp_path)
    message = str(info.value)
    assert f"interrupted at step {stop};" in message
    assert f"checkpoint is of step {saved} in" in message
    assert "\n" not in message
  monkeypatch.setattr(writers.MetricsWriter, "write", write)
  train.train_and_evaluate(config, tmp_path)
  assert_same_run(config, tmp_path, finished)


KILL_AT_15 = """
import os, signal
from u2pl_jax import main, writers
write = writers.MetricsWriter.write
def write_and_die(self, step, metrics):
  write(self, step, metrics)
  if step == 15:
    file = self._sinks[0]._file
    file.write('{"step": 16, "train/su')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
writers.MetricsWriter.write = write_and_die
pass"""


@pytest.mark.slow
def test_killed_equals_uninterrupted(root, finished, tmp_path):
  workdir = tmp_path / "run"
  command = (
    *COMMAND,
    f"--config.dataset.root={root}",
    f"--workdir={workdir}",
  )
  result = run_main(*command, code=KILL_AT_15)
  assert result.returncode == -signal.SIGKILL, result.stderr
  assert (workdir / writers.METRICS_FILE).read_text()[-1] != "\n"
  result = run_main(*command)
  assert result.returncode == 0, result.stderr
  # Step 12 if its save had been complete by the time of the kill.
  assert re.search("going on from the checkpoint of step (8|12)", result.stderr)
  assert_same_run(make_config(root), workdir, finished)


def test_damaged_checkpoint_equals_uninterrupted(
  root, finished, tmp_path, caplog
):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / checkpoint.FOLDER / "20" / "state")
  with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
    train.train_and_evaluate(make_config(root), workdir)
  assert "step 20" in caplog.text and "from step 16" in caplog.text
  assert_same_run(make_config(root), workdir, finished)


def test_no_readable_checkpoint_is_no_fresh_start(root, finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  for folder in (workdir / checkpoint.FOLDER).iterdir():
    shutil.rmtree(folder / "state")
  before = (workdir / writers.METRICS_FILE).read_bytes()
  with pytest.raises(CheckpointError, match="none of the"):
    train.train_and_evaluate(make_config(root), workdir)
  assert (workdir / writers.METRICS_FILE).read_bytes() == before


def test_another_config_is_refused(root, finished):
  before = (finished / writers.CONFIG_FILE).read_bytes()
  config = make_config(root, **{"teacher.ema_decay": 0.5})
  with pytest.raises(ConfigError, match="ema_decay is 0.99 there and 0.5 here"):
    train.train_and_evaluate(config, finished)
  assert (finished / writers.CONFIG_FILE).read_bytes() == before


def test_another_config_without_config_file(root, finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  (workdir / writers.CONFIG_FILE).unlink()
  config = make_config(root, **{"teacher.ema_decay": 0.5})
  with pytest.raises(CheckpointError, match="made with another config"):
    train.train_and_evaluate(config, workdir)
  assert not (workdir / writers.CONFIG_FILE).exists()


# -- The loop alone ------------------------------------------------------------


@pytest.fixture
def fake_steps(monkeypatch, no_tensorflow):
  """Steps that count; returns a dict that makes a loss NaN: {step: name}."""
  broken = {}
  real_build = train.build

  def step_function(names):
    def step(state, *batches):
      done = int(state.step) + 1
      metrics = {name: jnp.float32(1 / done) for name in names}
      if done in broken:
        metrics[broken[done]] = jnp.float32(jnp.nan)
      return state.replace(step=state.step + 1), metrics

    return step

  def fake_build(*args, **kwargs):
    warmup = ("sup_loss", "total_loss", "grad_norm")
    return dataclasses.replace(
      real_build(*args, **kwargs),
      supervised_step=step_function(warmup),
      semi_supervised_step=step_function(
        (*warmup, "unsup_loss", "contra_loss")
      ),
    )

  monkeypatch.setattr(train, "build", fake_build)
  # Made-up curves need no pictures, which take seconds a run.
  monkeypatch.setattr(run_stats, "_write_plots", lambda *_: None)
  return broken


@pytest.fixture
def streams(monkeypatch):
  """Records (labelled, first step) of the train streams and their closing."""
  opened, closed = [], []
  open_stream = train.open_train_stream

  class Recorder:
    def __init__(self, stream, name):
      self._stream, self._name = stream, name

    def __next__(self):
      return next(self._stream)

    def close(self):
      closed.append(self._name)
      self._stream.close()

  def record(*args, labelled, step):
    opened.append((labelled, step))
    stream = open_stream(*args, labelled=labelled, step=step)
    return Recorder(stream, (labelled, step))

  monkeypatch.setattr(train, "open_train_stream", record)
  return opened, closed


def test_warmup_opens_no_unlabelled_stream(
  root, tmp_path, fake_steps, streams, monkeypatch
):
  opened, closed = streams
  train.train_and_evaluate(make_config(root), tmp_path / "a")
  assert opened == [(True, 0), (False, WARMUP_STEPS)]
  assert sorted(closed) == sorted(opened)
  opened.clear()
  # All of it is warm-up.
  config = make_config(root, **{"method": "supervised"})
  train.train_and_evaluate(config, tmp_path / "b")
  assert opened == [(True, 0)]
  lines = read_metrics(tmp_path / "b")
  assert not any("train/unsup_loss" in line for line in lines)


@pytest.mark.parametrize(
  "step, name, window, saved",
  [
    (2, "sup_loss", "at step 3: sup_loss=nan (all was well at step 0)", None),
    (12, "grad_norm", "at step 12: grad_norm=nan (all was well at step 9)", 8),
    (18, "contra_loss", "at step 18: contra_loss=nan", 16),
  ],
)
def test_not_finite_stops(
  root, tmp_path, fake_steps, streams, step, name, window, saved
):
  # A lost network stays lost: every loss from then on.
  fake_steps.update(dict.fromkeys(range(step, TOTAL_STEPS + 1), name))
  with pytest.raises(train.TrainingDivergedError) as info:
    train.train_and_evaluate(make_config(root), tmp_path)
  message = str(info.value)
  assert window in message and "\n" not in message
  expected = (
    "there is no checkpoint yet"
    if saved is None
    else f"the last good checkpoint is of step {saved} in"
  )
  assert expected in message
  last = read_metrics(tmp_path)[-1]
  assert last["step"] == -(-step // LOG_EVERY) * LOG_EVERY
  assert last[f"train/{name}"] is None
  opened, closed = streams
  assert sorted(closed) == sorted(opened)


def made_up(miou):
  """What `train.evaluate` returns."""
  return {"eval/miou": miou, "eval/pixel_accuracy": miou}


def fake_evaluation(miou):
  return {"eval/miou": miou, "eval/pixel_accuracy": 0.5}


@pytest.mark.parametrize(
  "every, expected", [(2, [8, 16, 20]), (1, [4, 8, 12, 16, 20])]
)
@pytest.mark.slow
def test_intervals_in_epochs(
  root, tmp_path, fake_steps, monkeypatch, every, expected
):
  saved = []
  save = Checkpoints.save

  def record(self, state, meta):
    saved.append((meta.step, meta.best_step))
    save(self, state, meta)

  monkeypatch.setattr(Checkpoints, "save", record)
  config = make_config(
    root, **{"eval.every_epochs": every, "checkpoint.every_epochs": 4}
  )
  miou = iter([0.3, 0.5, 0.4, 0.5, 0.6])
  monkeypatch.setattr(train, "evaluate", lambda *_: made_up(next(miou)))
  train.train_and_evaluate(config, tmp_path)
  lines = read_metrics(tmp_path)
  assert [x["step"] for x in lines if "eval/miou" in x] == expected
  # New bests, every fourth epoch, and the end.
  if every == 2:
    assert saved == [(8, 8), (16, 16), (20, 16)]
  else:
    assert saved == [(4, 4), (8, 8), (16, 8), (20, 20)]


def test_best_and_latest_are_kept(root, tmp_path, fake_steps, monkeypatch):
  miou = iter([0.3, 0.6, 0.4, 0.5, 0.6])
  monkeypatch.setattr(train, "evaluate", lambda *_: made_up(next(miou)))
  config = make_config(root)
  train.train_and_evaluate(config, tmp_path)
  folders = (tmp_path / checkpoint.FOLDER).iterdir()
  assert {int(folder.name) for folder in folders} == {8, 16, 20}
  _, meta = read_state(config, tmp_path)
  assert (meta.best_step, meta.best_miou) == (8, 0.6)


def test_evaluated_network():
  recipe = type("Recipe", (), {"warmup_steps": 8})
  state = type("State", (), {"student": "s", "teacher": "t"})
  assert train.evaluated_network(state, 8, recipe) == ("student", "s")
  assert train.evaluated_network(state, 9, recipe) == ("teacher", "t")


def test_last_eval_batch_counts_once(root):
  """3 images in batches of 2, against whole images one by one."""
  config = make_config(root, **{"eval.batch": 2})
  info = dataset_info("camvid")
  data = data_lib.load_data(config, info)
  ids = data.validation[:3]
  program = build(config, DataSpec(NUM_CLASSES, info.mean, info.std, 16))
  network = program.create_state().student
  counts = train.counts_of(config, program, data, network, ids)
  assert counts.confusions.dtype == np.int64
  for name, confusion in zip(ids, counts.confusions, strict=True):
    mask = Image.open(root / "SegmentationClass" / f"{name}.png")
    pixels = np.asarray(mask)
    expected = np.bincount(pixels[pixels != 255], minlength=NUM_CLASSES)
    np.testing.assert_array_equal(confusion.sum(1), expected)


# -- Bad input, before anything compiles ---------------------------------------


@pytest.fixture
def no_build(monkeypatch):
  def build(*_, **__):
    raise AssertionError("must not get this far")

  monkeypatch.setattr(train, "build", build)


def test_one_cpu_trains_with_what_is_fastest_there(root, tmp_path, monkeypatch):
  class Seen(Exception):
    pass

  def build(*_, for_one_cpu):
    raise Seen(for_one_cpu)

  monkeypatch.setattr(train, "build", build)
  with pytest.raises(Seen) as info:
    train.train_and_evaluate(make_config(root), tmp_path / "run")
  assert info.value.args == (True,)


@pytest.fixture
def own_root(root, tmp_path):
  shutil.copytree(root, tmp_path / "own")
  return tmp_path / "own"


def refused(config, workdir, error):
  with pytest.raises(error) as info:
    train.train_and_evaluate(config, workdir)
  assert "\n" not in str(info.value)
  assert not workdir.exists()
  return str(info.value)


def test_missing_root(tmp_path, no_build):
  config = make_config(tmp_path / "nowhere")
  message = refused(config, tmp_path / "run", DataError)
  assert message.startswith(f"{tmp_path / 'nowhere'}: the folder")
  for part in ("JPEGImages/<id>.png", "splits/4/labeled.txt", "SegNet"):
    assert part in message


def test_missing_mask_folder(own_root, tmp_path, no_build):
  shutil.rmtree(own_root / "SegmentationClass")
  message = refused(make_config(own_root), tmp_path / "run", DataError)
  assert message.startswith(f"{own_root / 'SegmentationClass'}: the folder")


@pytest.mark.parametrize("name", ["l1", "v2", "u07"])
def test_missing_image(own_root, tmp_path, no_build, name):
  (own_root / "JPEGImages" / f"{name}.png").unlink()
  message = refused(make_config(own_root), tmp_path / "run", DataError)
  assert f"JPEGImages/{name}.png" in message


def test_supervised_needs_no_unlabelled_image(own_root):
  (own_root / "JPEGImages" / "u07.png").unlink()
  config = make_config(own_root, **{"method": "supervised"})
  data = data_lib.load_data(config, dataset_info("camvid"))
  assert len(data.unlabelled) == 16 and data.oracle == ()


def test_training_on_validation_images(own_root, tmp_path, no_build):
  path = own_root / "splits/4/unlabeled.txt"
  path.write_text(path.read_text() + "\nv1")
  message = refused(make_config(own_root), tmp_path / "run", DataError)
  assert "v1" in message and "validation" in message


def test_list_not_set(root, tmp_path, no_build):
  config = make_config(root, **{"dataset.unlabelled_list": ""})
  message = refused(config, tmp_path / "run", ConfigError)
  assert "config.dataset.unlabelled_list=''" in message


def test_image_larger_than_pad_to(root, tmp_path, no_build):
  config = make_config(root, **{"eval.pad_to": (64, 50)})
  message = refused(config, tmp_path / "run", DataError)
  assert "pad_to" in message


def test_combination_that_cannot_work(root, tmp_path, no_build):
  config = make_config(root, **{"contrastive.low_rank": 9})
  assert "low_rank=9" in refused(config, tmp_path / "run", ConfigError)


def test_changed_lists_are_refused(own_root, tmp_path, fake_steps):
  workdir = tmp_path / "run"
  config = make_config(own_root)
  train.train_and_evaluate(config, workdir)
  path = own_root / "splits/4/unlabeled.txt"
  path.write_text(path.read_text().replace("u07\n", ""))
  with pytest.raises(CheckpointError, match="lists of images have changed"):
    train.train_and_evaluate(config, workdir)


def test_missing_pretrained_weights(root, tmp_path):
  config = make_config(root, **{"model.pretrained": "weights.npz"})
  with pytest.raises(
    ConfigError, match="config.model.pretrained=weights.npz: there"
  ):
    train.train_and_evaluate(config, tmp_path)


def test_starts_from_published_weights(root, tmp_path, caplog):
  """Student and teacher of step 0 have the encoder of a .pth; the log says."""
  spec = DataSpec(NUM_CLASSES, (120.0,) * 3, (60.0,) * 3, num_unlabelled=8)
  state = build(make_config(root, seed=1), spec).create_state()
  weights = torch_weights.to_state_dict(
    jax.device_get(state.student.for_apply())
  )
  path = tmp_path / "resnet.pth"
  torch.save(
    {
      name.removeprefix("encoder."): torch.from_numpy(np.array(value))
      for name, value in weights.items()
      if name.startswith("encoder.")
    },
    path,
  )
  config = make_config(root, **{"model.pretrained": str(path)})
  with caplog.at_level(logging.INFO, logger="u2pl_jax"):
    loaded = build(config, spec).create_state()
  assert f"from {path}" in caplog.text
  assert caplog.text.count("encoder.* loaded") == 1
  for network in (loaded.student, loaded.teacher):
    ours = torch_weights.to_state_dict(jax.device_get(network.for_apply()))
    for name, value in weights.items():
      if name.startswith("encoder."):
        np.testing.assert_array_equal(ours[name], value)
  name = "decoder.classifier.0.weight"
  assert (ours[name] != weights[name]).any()


@pytest.mark.parametrize("name", ["weights.npz", "weights.pth"])
def test_unfit_pretrained_weights(root, tmp_path, name):
  (tmp_path / name).write_bytes(b"no weights")
  config = make_config(root, **{"model.pretrained": str(tmp_path / name)})
  with pytest.raises(ConfigError, match="config.model.pretrained=") as info:
    train.train_and_evaluate(config, tmp_path / "run")
  assert name in str(info.value)
  # So that the next attempt, with other weights, is not refused.
  assert not (tmp_path / "run" / writers.CONFIG_FILE).exists()


def test_oracle_takes_only_images_with_masks(own_root, caplog):
  for name in ("u00", "u02"):
    (own_root / "SegmentationClass" / f"{name}.png").unlink()
  config, info = make_config(own_root), dataset_info("camvid")
  assert data_lib.load_data(config, info).oracle == ("u01", "u03", "u04", "u05")
  for path in (own_root / "SegmentationClass").glob("u*"):
    path.unlink()
  with caplog.at_level(logging.INFO, logger="u2pl_jax"):
    assert data_lib.load_data(config, info).oracle == ()
  assert caplog.text.count("no oracle/ metrics") == 1


def test_compilation_cache_beside_the_runs(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  try:
    train._enable_compilation_cache(tmp_path / "runs" / "a")
    assert jax.config.jax_compilation_cache_dir == before
    jax.config.update("jax_compilation_cache_dir", None)
    train._enable_compilation_cache(tmp_path / "runs" / "a")
    path = str(tmp_path / "runs" / ".jax_cache")
    assert jax.config.jax_compilation_cache_dir == path
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


# -- The command ---------------------------------------------------------------


@pytest.mark.parametrize(
  "arguments, parts",
  [
    (
      ["--config=configs/voc_1464.py"],
      ["data/VOC2012", "SegmentationClassAug/", "host.robots.ox.ac.uk"],
    ),
    (["--config=configs/testing.py", "--config.batch.labeled=3"], ["labelled"]),
    (["--config=configs/testing.py", "--config.batch.labelled=x"], ["'x'"]),
    (["--config=configs/testing.py:seeds=3"], ["'seeds' is unknown"]),
    (["--config=configs/nowhere.py"], ["configs/nowhere.py"]),
    ([], ["--config is missing"]),
    (
      ["--config=configs/voc_1464.py", "--config.eval.batch=0"],
      ["config.eval.batch=0"],
    ),
  ],
)
def test_command_refuses_in_one_line(arguments, parts):
  code = (
    "import sys; sys.modules['tensorflow'] = None; from u2pl_jax import main"
  )
  assert_one_line(run_main(*arguments, code=code), *parts)


def test_command_refuses_workdir(root, tmp_path):
  (tmp_path / "file").write_text("")
  result = run_main(
    *COMMAND, f"--config.dataset.root={root}", f"--workdir={tmp_path}/file"
  )
  assert_one_line(result, f"--workdir={tmp_path}/file", "cannot write there")


def test_unexpected_error_keeps_its_traceback(root):
  code = "from u2pl_jax import main, train; train.load_data = lambda *_: 1 / 0"
  result = run_main(*COMMAND, f"--config.dataset.root={root}", code=code)
  assert result.returncode == 1
  assert "ZeroDivisionError" in result.stderr
  assert "Traceback" in result.stderr
