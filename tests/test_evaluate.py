"""The command: what it writes, and what it refuses in one line."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from configs import testing
from input_pipeline import ConfigError
from tests.test_train_loop import REPOSITORY
from u2pl_jax import evaluate, train
from u2pl_jax import trained as trained_lib
from u2pl_jax.config_checks import eval_protocol
from u2pl_jax.evaluation_record import read_record, summarise


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the command here: (flags) -> (exit code, stdout, stderr)."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

  def run(*arguments, config=None, **values):
    monkeypatch.setattr(evaluate, "CONFIG", types.SimpleNamespace(value=config))
    code = 0
    with flagsaver.flagsaver(**values):
      try:
        evaluate.main(["evaluate", *map(str, arguments)])
      except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return run


@pytest.fixture(scope="module")
def evaluated(trained_run, tmp_path_factory):
  """What the command wrote of the best checkpoint, under the run's protocol."""
  output = tmp_path_factory.mktemp("evaluated") / "padded"
  result = subprocess.run(
    [
      sys.executable,
      "-m",
      "u2pl_jax.evaluate",
      f"--checkpoint={trained_run.workdir}",
      f"--output={output}",
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr
  return output, result


def refused(result, *parts):
  code, out, err = result
  assert code == 1 and "mIoU" not in out
  assert err.startswith("error: ") and err.count("\n") == 1, err
  for part in parts:
    assert part in err
  return err


# -- What it finds -------------------------------------------------------------


def test_equals_the_best_evaluation_of_training(trained_run, evaluated):
  output, result = evaluated
  record = read_record(output)
  best = read_record(trained_run.workdir / train.EVALUATION_FOLDER)
  np.testing.assert_array_equal(record.confusions, best.confusions)
  np.testing.assert_allclose(record.calibration, best.calibration, rtol=1e-6)
  for field in (
    "protocol",
    "protocol_hash",
    "checkpoint",
    "step",
    "weights",
    "config_hash",
    "class_names",
    "image_ids",
  ):
    assert getattr(record, field) == getattr(best, field), field
  assert best.boundary is None and record.boundary.shape == (4, 7, 2)
  summary = json.loads((output / "metrics.json").read_text())
  miou = summarise(best)["miou"]
  assert summary["miou"] == miou and f"mIoU {miou:.4f}" in result.stdout
  assert "1 shape, 1 compilation," in result.stdout
  assert result.stderr == ""


@pytest.mark.parametrize("name", ["whole", "padded", "sliding_window"])
def test_every_image_has_all_its_pixels(trained_run, command, tmp_path, name):
  """On another root, of images of several sizes, by a list of one's own."""
  root = tmp_path / "data"
  shutil.copytree(trained_run.data, root)
  (tmp_path / "list.txt").write_text("a\nb\nc\n")
  rng = np.random.default_rng(0)
  expected = []
  for id, size in (("a", (40, 64)), ("b", (35, 33)), ("c", (40, 64))):
    image = rng.integers(0, 255, (*size, 3), np.uint8)
    mask = rng.choice([0, 1, 6, 255], size).astype(np.uint8)
    Image.fromarray(image).save(root / f"JPEGImages/{id}.png")
    Image.fromarray(mask).save(root / f"SegmentationClass/{id}.png")
    expected.append(np.bincount(mask[mask != 255], minlength=7))
  code, out, err = command(
    checkpoint=str(trained_run.workdir),
    output=str(tmp_path / "out"),
    root=str(root),
    list=str(tmp_path / "list.txt"),
    protocol=name,
    window=["33", "33"],
    batch=2,
    weights="student",
    step=12,
  )
  assert code == 0, err
  record = read_record(tmp_path / "out")
  assert record.image_ids == ("a", "b", "c")
  assert (record.weights, record.step) == ("student", 12)
  np.testing.assert_array_equal(record.confusions.sum(2), expected)
  shapes = {"whole": 2, "padded": 1, "sliding_window": 2}[name]
  assert f"{shapes} shape" in out
  # The inner edges of the boundary are found by OpenCV on the photograph.
  assert (record.boundary[..., 0] <= record.boundary[..., 1]).all()


def test_published_protocol_of_cityscapes():
  config = testing.get_config()
  config.eval.protocol = "sliding_window"
  protocol = eval_protocol(config)
  # ceil(769 * 2 / 3), as the published evaluation computes it.
  assert (protocol.size, protocol.stride) == ((769, 769), (513, 513))
  assert protocol.settings() == {
    "name": "sliding_window",
    "size": [769, 769],
    "stride": [513, 513],
    "scales": [1.0],
    "flip": False,
  }


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("protocol", "sliding", "choose one of padded, whole, center_crop, slid"),
    ("stride", 0.0, "config.eval.stride=0.0"),
    ("stride", 1.5, "config.eval.stride=1.5"),
    ("window", (0, 3), "config.eval.window=(0, 3)"),
    ("window", (9,), "config.eval.window=(9,)"),
  ],
)
def test_protocol_that_cannot_work(key, value, message):
  config = testing.get_config()
  config.eval.protocol = "sliding_window"
  config.eval[key] = value
  with pytest.raises(ConfigError) as info:
    eval_protocol(config)
  assert message in str(info.value)


# -- Comparing -----------------------------------------------------------------


def test_compare(trained_run, evaluated, command, tmp_path):
  output, _ = evaluated
  best = trained_run.workdir / train.EVALUATION_FOLDER / "metrics.json"
  path = tmp_path / "difference.json"
  code, out, err = command(best, compare=str(output), output=str(path))
  assert code == 0, err
  lines = out.splitlines()
  row = next(line for line in lines if line.split()[0] == "mIoU")
  miou = f"{read_miou(output):.4f}"
  assert row.split() == ["mIoU", miou, miou, *["+0.0000"] * 2, "to", "+0.0000"]
  assert json.loads(path.read_text())["miou"]["difference"] == 0
  again = command(best, compare=str(output), output=str(path))
  refused(again, str(path), "--overwrite")
  refused(command(compare=str(output)), "--compare A B")
  nowhere = tmp_path / "nowhere"
  refused(command(nowhere, compare=str(output)), f"{nowhere}/metrics.json")


def read_miou(output):
  return json.loads((output / "metrics.json").read_text())["miou"]


# -- Bad input -----------------------------------------------------------------


def test_finished_output_is_kept(trained_run, evaluated, command, monkeypatch):
  output, _ = evaluated
  before = (output / "metrics.json").read_bytes()

  def never(*_, **__):
    raise AssertionError("the network must not be loaded")

  monkeypatch.setattr("u2pl_jax.trained.load_trained", never)
  same = {"checkpoint": str(trained_run.workdir), "output": str(output)}
  refused(command(**same), str(output), "--overwrite")
  assert (output / "metrics.json").read_bytes() == before
  unwritable = {**same, "output": str(output / "metrics.json")}
  refused(command(**unwritable), "cannot write there")


def test_flags_that_cannot_work(trained_run, command, tmp_path):
  usual = {
    "checkpoint": str(trained_run.workdir),
    "output": str(tmp_path / "out"),
  }
  for changes, parts in (
    ({"checkpoint": None}, ["--checkpoint is missing"]),
    ({"output": None}, ["--output is missing"]),
    ({"scales": ["0"]}, ["--scales=0:", "between 0.25 and 4"]),
    ({"scales": ["1", "5"]}, ["--scales=1,5:"]),
    ({"scales": ["1", "x"]}, ["--scales=1,x: needs numbers"]),
    ({"scales": ["nan"]}, ["--scales=nan"]),
    ({"scales": ["1", "1.0"]}, ["one is there twice"]),
    ({"scales": []}, ["--scales=:"]),
    ({"pad_to": ["64.5", "64"]}, ["--pad_to=64.5,64: needs whole numbers"]),
    ({"pad_to": ["64"]}, ["config.eval.pad_to=(64,)"]),
    ({"pad_to": ["32", "32"]}, ["the image is 64x64", "eval.pad_to 32x32"]),
    ({"protocol": "half"}, ["config.eval.protocol='half': choose one of"]),
    ({"protocol": "center_crop"}, ["padded_center_crop", "config.quirks"]),
    ({"batch": 0}, ["--batch=0: must be a positive multiple"]),
    ({"step": 5}, ["no checkpoint of step 5"]),
    ({"checkpoint": str(tmp_path / "no")}, ["no such workdir"]),
    ({"checkpoint": str(trained_run.data)}, ["no run here"]),
    ({"list": str(tmp_path / "no.txt")}, ["no.txt: the split file does not"]),
  ):
    refused(command(**usual | changes), *parts)
  refused(command("extra", **usual), "unexpected argument 'extra'")
  assert not list((tmp_path / "out").iterdir())


def test_config_of_another_network_or_data_set(trained_run, command, tmp_path):
  usual = {
    "checkpoint": str(trained_run.workdir),
    "output": str(tmp_path / "out"),
  }
  config = testing.get_config()
  config.dataset.root = str(trained_run.data)
  config.model.backbone = "resnet18"
  refused(command(config=config, **usual), "config.model.backbone='tiny'")
  config = testing.get_config()
  config.dataset.name = "camvid"
  config.dataset.root = str(trained_run.data)
  refused(
    command(config=config, **usual),
    "7 classes (ground,",
    "'camvid' has 11 classes (sky,",
  )


@pytest.fixture
def own_root(trained_run, tmp_path):
  shutil.copytree(trained_run.data, tmp_path / "data")
  return tmp_path / "data"


def test_data_that_cannot_be_judged(trained_run, command, own_root, tmp_path):
  usual = {
    "checkpoint": str(trained_run.workdir),
    "output": str(tmp_path / "out"),
    "root": str(own_root),
  }
  val = own_root / "ImageSets/Segmentation/val.txt"
  ids = val.read_text().split()
  # A file of no bytes, and an image cut short, whose header says all is well.
  image = own_root / f"JPEGImages/{ids[1]}.png"
  whole = image.read_bytes()
  for content in (b"", whole[: len(whole) // 2]):
    image.write_bytes(content)
    refused(command(**usual), f"{ids[1]}.png")
  image.write_bytes(whole)
  for id in ids[:-1]:
    (own_root / f"SegmentationClass/{id}.png").unlink()
  refused(command(**usual), "3 of 4 masks are missing", *ids[:3])
  val.write_text("\n")
  refused(command(**usual), "val.txt", "empty")
  assert not list((tmp_path / "out").iterdir())


def test_weights_that_are_not_finite(
  trained_run, command, monkeypatch, tmp_path
):
  trained = trained_lib.load_trained(trained_run.workdir)
  variables = jax.tree.map(np.copy, trained.variables)
  kernel = variables.params["encoder"]["layer1_0"]["conv1"]["kernel"]
  kernel[0, 0, 0, 0] = np.nan
  damaged = dataclasses.replace(trained, variables=variables)
  monkeypatch.setattr(trained_lib, "_from_workdir", lambda *_: damaged)
  result = command(
    checkpoint=str(trained_run.workdir), output=str(tmp_path / "out")
  )
  refused(result, "params/encoder/layer1_0/conv1/kernel", "not finite")
