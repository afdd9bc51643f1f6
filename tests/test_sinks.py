"""Pictures in TensorBoard; Weights & Biases, by a module of that name."""

import importlib
import io
import json
import logging
import math
import sys

import numpy as np
import pytest
from PIL import Image

from configs import testing
from tests import test_train_loop as loop
from u2pl_jax import train, writers
from u2pl_jax.config_checks import ConfigError, check_config
from u2pl_jax.image_strip import image_strip

NAMES = ("sky", "road")
PALETTE = np.array([[0, 0, 0], [200, 100, 50]])

# Writes what it is asked to a file, since the test may not be in its process.
FAKE_WANDB = """
import json, os, pathlib

class Error(Exception): pass

class Image:
  def __init__(self, array): self.shape = array.shape

def record(**call):
  with open(os.environ["FAKE_WANDB_LOG"], "a") as file:
    file.write(json.dumps(call, default=lambda image: image.shape) + "\\n")

class Run:
  def log(self, data, step): record(call="log", data=data, step=step)
  def finish(self): record(call="finish")

def init(**arguments):
  if os.environ.get("FAKE_WANDB_ERROR"):
    raise Error(os.environ["FAKE_WANDB_ERROR"])
  record(call="init", arguments=arguments)
  return Run()
"""


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
  """Its import takes seconds; the one test that wants it undoes this."""
  monkeypatch.setitem(sys.modules, "tensorflow", None)


@pytest.fixture
def wandb_calls(tmp_path, monkeypatch):
  """Installs the module; returns a function that reads its calls."""
  folder = tmp_path / "site"
  folder.mkdir()
  (folder / "wandb.py").write_text(FAKE_WANDB)
  log = tmp_path / "wandb_calls.jsonl"
  log.write_text("")
  monkeypatch.setenv("FAKE_WANDB_LOG", str(log))
  monkeypatch.syspath_prepend(str(folder))
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  yield lambda: [json.loads(line) for line in log.read_text().splitlines()]
  sys.modules.pop("wandb", None)


@pytest.fixture
def no_wandb(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)


def wandb_config(**changes):
  config = testing.get_config()
  config.log.wandb_project = "lanes"
  config.update_from_flattened_dict(changes)
  return config


def open_writer(workdir, config, last_step=0):
  return writers.open_writer(
    workdir, config, class_names=NAMES, last_step=last_step
  )


# -- The picture ---------------------------------------------------------------


def strip_of(size, palette=PALETTE):
  height, width = size
  truth = np.zeros(size, np.uint8)
  truth[:, width // 2 :] = 1
  return image_strip(
    image=np.full((*size, 3), 100, np.uint8),
    truth=truth,
    prediction=np.ones(size, np.int32),
    entropy=np.full(size, math.log(2)) * (truth == 1),
    palette=palette,
  )


def test_four_panels_by_hand():
  strip = strip_of((10, 20))
  assert strip.shape == (10, 4 * 20 + 3 * 4, 3) and strip.dtype == np.uint8
  # Class colours at 0.6 over the image; columns 10 and on are class 1.
  assert strip[0, 0].tolist() == [100, 100, 100]
  assert (strip[:, 20:24] == 0).all()
  assert strip[5, 24].tolist() == [40, 40, 40]
  assert strip[5, 24 + 10].tolist() == [160, 100, 70]
  assert strip[5, 48].tolist() == [160, 100, 70]
  # The colour map's two ends: no entropy, and as much as there can be.
  assert strip[5, 72].tolist() == [0, 0, 3]
  assert strip[5, 72 + 19].tolist() == [251, 252, 191]


@pytest.mark.parametrize(
  ("size", "panel"),
  [
    ((256, 256), (256, 256)),
    ((513, 300), (171, 100)),
    ((720, 960), (180, 240)),
  ],
)
def test_large_images_are_reduced(size, panel):
  assert strip_of(size).shape == (panel[0], 4 * panel[1] + 3 * 4, 3)


# -- TensorBoard ---------------------------------------------------------------


def test_pictures_in_tensorboard_files(tmp_path, monkeypatch):
  monkeypatch.undo()
  tf = pytest.importorskip("tensorflow")
  writer = open_writer(tmp_path, testing.get_config())
  strip = strip_of((10, 20))
  writer.write(3, {"eval/iou": np.array([0.25, 0.5])})
  writer.write_images(3, {"eval/image/a/b": strip})
  writer.sync()
  writer.close()
  (path,) = tmp_path.glob("events*")
  found = {
    (event.step, value.tag): tf.make_ndarray(value.tensor)
    for event in tf.compat.v1.train.summary_iterator(str(path))
    for value in event.summary.value
  }
  assert found.pop((3, "eval/iou/sky")) == 0.25
  assert found.pop((3, "eval/iou/road")) == 0.5
  ((key, (width, height, png)),) = found.items()
  assert key == (3, "eval/image/a/b")
  assert (int(width), int(height)) == (92, 10)
  np.testing.assert_array_equal(Image.open(io.BytesIO(png)), strip)


# -- Weights & Biases ----------------------------------------------------------


def test_off_by_default(tmp_path, wandb_calls):
  config = testing.get_config()
  writers.check_sinks(config)
  writer = open_writer(tmp_path, config)
  writer.write(1, {"a": 1.0})
  writer.close()
  assert "wandb" not in sys.modules and wandb_calls() == []
  assert not (tmp_path / writers.WANDB_FILE).exists()


def test_metrics_and_pictures_get_there(tmp_path, wandb_calls):
  config = wandb_config()
  writers.check_sinks(config)
  writer = open_writer(tmp_path, config)
  writer.write(2, {"eval/miou": np.float32(0.5), "eval/iou": np.ones(2)})
  writer.write_images(2, {"eval/image/a": strip_of((10, 20))})
  writer.sync()
  writer.close()
  init, line, images, finish = wandb_calls()
  run_id = (tmp_path / writers.WANDB_FILE).read_text().strip()
  assert len(run_id) == 8
  arguments = init["arguments"]
  assert arguments.pop("config")["optimizer"]["schedule"] == "poly"
  # No mode: WANDB_MODE decides.
  assert arguments == {
    "project": "lanes",
    "id": run_id,
    "resume": "allow",
    "name": "testing",
    "dir": str(tmp_path),
    "allow_val_change": True,
  }
  assert line["step"] == images["step"] == 2
  assert line["data"] == {
    "eval/miou": 0.5, "eval/iou/sky": 1.0, "eval/iou/road": 1.0,
  }  # fmt: skip
  assert images["data"] == {"eval/image/a": [10, 92, 3]}
  assert finish == {"call": "finish"}
  # The lines of metrics.jsonl are what they are without it.
  text = (tmp_path / writers.METRICS_FILE).read_text()
  assert json.loads(text) == {"step": 2, **line["data"]}


def test_goes_on_with_the_same_run(tmp_path, wandb_calls):
  for last_step in (0, 4):
    open_writer(tmp_path, wandb_config(), last_step).close()
  open_writer(tmp_path / "site", wandb_config()).close()
  ids = [x["arguments"]["id"] for x in wandb_calls() if x["call"] == "init"]
  assert ids[0] == ids[1] != ids[2]


def test_missing_package_is_one_line(no_wandb):
  with pytest.raises(ConfigError) as error:
    writers.check_sinks(wandb_config())
  assert str(error.value) == (
    "config.log.wandb_project='lanes': the package wandb is not installed: pip"
    " install wandb, or set config.log.wandb_project to ''"
  )


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
  (tmp_path / "wandb").mkdir()
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  # First on the path stands for the only one, where none is installed.
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  importlib.invalidate_caches()
  with pytest.raises(ConfigError, match="is not installed"):
    writers.check_sinks(wandb_config())
  sys.modules.pop("wandb", None)


def test_refusal_of_the_service_is_one_line(tmp_path, wandb_calls, monkeypatch):
  monkeypatch.setenv("FAKE_WANDB_ERROR", "No API key configured.\nUse login")
  with pytest.raises(ConfigError) as error:
    open_writer(tmp_path, wandb_config())
  message = str(error.value)
  assert message.startswith(
    "config.log.wandb_project='lanes': No API key configured. Use login:"
  )
  assert "WANDB_MODE=offline" in message and "\n" not in message


def test_a_package_that_is_broken_says_why(tmp_path, monkeypatch):
  (tmp_path / "wandb.py").write_text("import half_of_an_installation")
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
  importlib.invalidate_caches()
  with pytest.raises(
    ConfigError, match="cannot be imported .*half_of_an_installation"
  ):
    writers.check_sinks(wandb_config())


def test_refused_before_anything_is_read(tmp_path, monkeypatch, no_wandb):
  def build(*_, **__):
    raise AssertionError("must not get this far")

  monkeypatch.setattr(train, "build", build)
  config = wandb_config(**{"dataset.root": str(tmp_path / "data")})
  with pytest.raises(ConfigError, match="wandb is not installed"):
    train.train_and_evaluate(config, tmp_path / "run")
  assert list(tmp_path.iterdir()) == []


# -- A run ---------------------------------------------------------------------

fake_steps = loop.fake_steps


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  loop.write_data(root)
  return root


def made_up(*_):
  return {
    "eval/miou": 0.5,
    "eval/pixel_accuracy": 0.5,
    "eval/iou": np.linspace(0, 1, loop.NUM_CLASSES),
  }


def test_pictures_of_a_run(
  root, tmp_path, fake_steps, monkeypatch, wandb_calls, caplog
):
  """Every second epoch and at the end; a few of the report's, always these."""
  monkeypatch.setattr(train, "evaluate", made_up)
  config = loop.make_config(
    root,
    **{
      "log.images_every_epochs": 2,
      "log.report_images": 3,
      "log.wandb_project": "lanes",
      "eval.pad_to": (64, 66),
    },
  )
  workdir = tmp_path / "run"
  with caplog.at_level(logging.INFO, logger="u2pl_jax"):
    train.train_and_evaluate(config, workdir)
  logs = [call for call in wandb_calls() if call["call"] == "log"]
  pictures = {
    call["step"]: call["data"]
    for call in logs
    if any(name.startswith("eval/image/") for name in call["data"])
  }
  # Padding is cut off: images of 64 and 48 pixels.
  expected = {
    "eval/image/v0": [64, 4 * 64 + 12, 3],
    "eval/image/v1": [48, 4 * 48 + 12, 3],
    "eval/image/v2": [64, 4 * 64 + 12, 3],
  }
  assert pictures == {8: expected, 16: expected, 20: expected}
  # Everything else is what metrics.jsonl has, name for name.
  lines = [call for call in logs if call["data"] not in pictures.values()]
  assert [{"step": x["step"], **x["data"]} for x in lines] == loop.read_metrics(
    workdir, with_time=True
  )
  assert "eval/iou/pole" in lines[-1]["data"]


@pytest.mark.parametrize(("every", "most"), [(0, 3), (2, 0)])
def test_no_pictures(root, tmp_path, fake_steps, monkeypatch, every, most):
  monkeypatch.setattr(train, "evaluate", made_up)
  written = []
  monkeypatch.setattr(
    writers.MetricsWriter,
    "write_images",
    lambda self, step, images: written.extend(images),
  )
  config = loop.make_config(
    root, **{"log.images_every_epochs": every, "log.report_images": most}
  )
  train.train_and_evaluate(config, tmp_path)
  assert written == []


def test_more_images_in_the_report_than_are_logged(
  root, tmp_path, fake_steps, monkeypatch
):
  monkeypatch.setattr(train, "evaluate", made_up)
  monkeypatch.setattr(train, "_NUM_LOGGED_IMAGES", 2)
  written = []
  monkeypatch.setattr(
    writers.MetricsWriter,
    "write_images",
    lambda self, step, images: written.append(list(images)),
  )
  config = loop.make_config(
    root, **{"log.images_every_epochs": 5, "log.report_images": 3}
  )
  train.train_and_evaluate(config, tmp_path)
  assert written == [["eval/image/v0", "eval/image/v1"]]


def test_interval_must_not_be_negative():
  config = testing.get_config()
  config.log.images_every_epochs = -1
  with pytest.raises(ConfigError, match="images_every_epochs=-1: must not be"):
    check_config(config, num_classes=6, num_devices=1)
