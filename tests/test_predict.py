"""The predict command, from its flags to the files it leaves."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from input_pipeline import DataError, storage
from tests import pretended
from u2pl_jax import predict
from u2pl_jax.evaluation import make_predict_step
from u2pl_jax.models import torch_weights
from u2pl_jax.prediction_log import LOG_FILE, PredictionLog
from u2pl_jax.trained import load_trained

REPOSITORY = pathlib.Path(__file__).parent.parent
KINDS = ("masks", "overlays", "entropy", "confidence")


def save_noise(path, height, width, seed=0):
  """Patches of colours, so that there is more than one class."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3))
  image = np.kron(small, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)
  return image


@pytest.fixture
def photos(tmp_path):
  """Five images, two that cannot be read, and a file that is none."""
  folder = tmp_path / "photos"
  images = {
    name: save_noise(folder / name, height, width, seed)
    for seed, (name, height, width) in enumerate(
      (
        ("a.png", 64, 64),
        ("b.bmp", 20, 64),
        ("sub/a.png", 5, 3),
        ("sub/deep/large.png", 90, 130),
        ("one.png", 1, 1),
      )
    )
  }
  (folder / "notes.txt").write_text("no image")
  (folder / "zero.jpg").write_bytes(b"")
  data = io.BytesIO()
  Image.effect_noise((60, 60), 90).save(data, "JPEG")
  (folder / "cut.jpg").write_bytes(data.getvalue()[:-100])
  return folder, images


def run(*arguments):
  return predict.main([str(argument) for argument in arguments])


def assert_fails(capsys, arguments, *parts, code=1):
  with pytest.raises(SystemExit) as exit:
    run(*arguments)
  assert exit.value.code == code
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith("error: ")
  assert sum(line.startswith("error: ") for line in lines) == 1
  for part in parts:
    assert str(part) in lines[-1]


def read_log(output):
  lines = (output / LOG_FILE).read_text().splitlines()
  return [json.loads(line) for line in lines]


def read_mask(path):
  picture = Image.open(path)
  assert picture.mode == "P"
  return np.asarray(picture)


def stamp(folder):
  """Every file with its content and the time of its writing."""
  return {
    str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_a_folder(trained_run, photos, tmp_path, capsys):
  folder, images = photos
  output = tmp_path / "out"
  arguments = (
    f"--checkpoint={trained_run.workdir}",
    f"--images={folder}",
    f"--output={output}",
    "--entropy",
    "--confidence",
  )
  assert run(*arguments) == 0
  told = capsys.readouterr()
  # Of the run's evaluation: all padded to 64 x 64, the large one in tiles.
  assert (
    "6 images: 5 as one of 64x64, 1 in tiles of 64x64 (height x width);"
    " 2 shapes to compile, of 2 that can occur" in told.out
  )
  assert "predicted 5 images, 3 files left out" in told.out
  assert "2 images cannot be read:" in told.err
  assert f"{folder}/zero.jpg: the file is empty" in told.err
  assert f"{folder}/cut.jpg: the JPEG file is truncated" in told.err
  assert "not images, left out: notes.txt" in told.err

  trained = load_trained(trained_run.workdir)
  lines = read_log(output)
  assert [line["input"] for line in lines] == sorted(images)
  for line in lines:
    image = images[line["input"]]
    stem = line["input"].rsplit(".", 1)[0]
    assert line["outputs"] == {
      kind: f"{kind}/{stem}.{'jpg' if kind == 'overlays' else 'png'}"
      for kind in KINDS
    }
    assert (line["height"], line["width"]) == image.shape[:2]
    assert line["root"] == os.path.realpath(folder)
    assert line["weights"] == trained.weights
    assert line["step"] == trained.step
    assert line["checkpoint"] == str(trained_run.workdir)
    assert line["inputs"] == (6 if image.shape[1] == 130 else 1)
    mask = read_mask(output / line["outputs"]["masks"])
    assert mask.shape == image.shape[:2]
    for class_id, name in enumerate(trained.info.class_names):
      share = (mask == class_id).mean()
      assert line["class_share"][name] == pytest.approx(share, abs=1e-6)
    for kind, key, scale in (
      ("confidence", "mean_confidence", 255),
      ("entropy", "mean_entropy", 255 / np.log(trained.info.num_classes)),
    ):
      pixels = Image.open(output / line["outputs"][kind])
      assert pixels.mode == "L"
      mean = np.asarray(pixels).mean()
      assert line[key] * scale == pytest.approx(mean, abs=0.5)
    overlay = Image.open(output / line["outputs"]["overlays"])
    assert overlay.size == (image.shape[1], image.shape[0])
  palette = Image.open(output / "masks" / "a.png").getpalette()
  assert tuple(palette[:3]) == tuple(trained.info.palette[0])
  assert len({*read_mask(output / "masks" / "a.png").ravel()}) > 1

  # Nothing is done twice.
  before = stamp(output)
  assert run(*arguments) == 0
  assert stamp(output) == before | {LOG_FILE: stamp(output)[LOG_FILE]}
  assert read_log(output) == lines
  assert "predicted 0 images, 5 predicted already" in capsys.readouterr().out


def test_masks_are_those_that_training_evaluated(trained_run, tmp_path):
  image = save_noise(tmp_path / "photos" / "a.png", 40, 57)
  run(
    f"--checkpoint={trained_run.workdir}",
    f"--images={tmp_path}/photos/a.png",
    f"--output={tmp_path}/out",
  )
  trained = load_trained(trained_run.workdir)
  padded = np.zeros((1, 64, 64, 3), np.uint8)
  padded[0, :40, :57] = image
  step = make_predict_step(
    trained.model, mean=trained.info.mean, std=trained.info.std
  )
  batch = {"image": padded, "valid_box": np.array([[0, 0, 40, 57]])}
  classes, _ = jax.jit(step)(trained.variables, batch)
  np.testing.assert_array_equal(
    read_mask(tmp_path / "out" / "masks" / "a.png"),
    np.asarray(classes)[0, :40, :57],
  )


def test_new_images_names_and_overwrite(trained_run, tmp_path, capsys):
  folder, output = tmp_path / "photos", tmp_path / "out"
  command = (
    f"--checkpoint={trained_run.workdir}",
    f"--images={folder}",
    f"--output={output}",
  )
  save_noise(folder / "a.png", 30, 30, 1)
  run(*command)
  old = stamp(output)
  # A neighbour of the same name does not take the place of the first.
  save_noise(folder / "a.bmp", 30, 31, 2)
  save_noise(folder / "b.png", 30, 32, 3)
  save_noise(folder / "b.bmp", 30, 33, 4)
  run(*command)
  new = stamp(output)
  assert {k: v for k, v in new.items() if k in old and k != LOG_FILE} == {
    k: v for k, v in old.items() if k != LOG_FILE
  }
  masks = {line["input"]: line["outputs"]["masks"] for line in read_log(output)}
  assert masks == {
    "a.bmp": "masks/a.bmp.png",
    "a.png": "masks/a.png",
    "b.bmp": "masks/b.bmp.png",
    "b.png": "masks/b.png.png",
  }
  widths = {"a.bmp": 31, "a.png": 30, "b.bmp": 33, "b.png": 32}
  for name, mask in masks.items():
    assert read_mask(output / mask).shape == (30, widths[name])

  # An output that is gone or asked for now is made, the others are kept.
  (output / masks["b.png"]).unlink()
  (output / masks["a.bmp"]).write_bytes(b"kept")
  capsys.readouterr()
  run(*command)
  assert "predicted 1 image, 3 predicted already" in capsys.readouterr().out
  assert (output / masks["b.png"]).is_file()
  assert (output / masks["a.bmp"]).read_bytes() == b"kept"
  run(*command, "--entropy")
  assert (output / "entropy" / "a.bmp.png").is_file()
  assert read_mask(output / masks["a.bmp"]).shape == (30, 31)
  lines = read_log(output)
  assert len(lines) == 4
  assert all("entropy" in line["outputs"] for line in lines)

  # Another network or grid is refused, or does all again.
  other = (*command, "--weights=student")
  log = (output / LOG_FILE).read_bytes()
  assert_fails(capsys, other, "a.bmp was predicted by another network")
  assert_fails(capsys, (*command, "--tile=49"), "up to 49x49", "--overwrite")
  assert (output / LOG_FILE).read_bytes() == log
  run(*other, "--overwrite")
  assert [line["weights"] for line in read_log(output)] == ["student"] * 4


def test_a_killed_run_goes_on(trained_run, tmp_path):
  folder, output = tmp_path / "photos", tmp_path / "out"
  for number in range(60):
    save_noise(folder / f"{number:02}.png", 60, 60, number)
  arguments = (
    f"--checkpoint={trained_run.workdir}",
    f"--images={folder}",
    f"--output={output}",
  )
  process = subprocess.Popen(
    [sys.executable, "-m", "u2pl_jax.predict", *arguments],
    cwd=REPOSITORY,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  log = output / LOG_FILE
  deadline = time.monotonic() + 100
  while not (log.exists() and log.read_bytes().count(b"\n") > 2):
    assert process.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.wait()
  done = log.read_bytes().count(b"\n")
  assert 2 < done < 60
  # As if the kill had come in the middle of a line, and of a picture.
  with log.open("ab") as file:
    file.write(b'{"input": "59.png", "outp')
  kept = stamp(output / "masks")
  (output / "masks" / "59.png").write_bytes(b"half")
  assert run(*arguments) == 0
  lines = read_log(output)
  assert [line["input"] for line in lines] == [f"{i:02}.png" for i in range(60)]
  for line in lines:
    assert read_mask(output / line["outputs"]["masks"]).shape == (60, 60)
  # What had its line is as it was.
  now = stamp(output / "masks")
  assert sum(now.get(name) == value for name, value in kept.items()) >= done


def test_devices_share_the_work(trained_run, tmp_path):
  # Seven images and tiles on three devices: batches that are not full.
  folder = tmp_path / "photos"
  for number in range(7):
    save_noise(folder / f"{number}.png", 50, 60 + 20 * (number == 3), number)
  arguments = (
    f"--checkpoint={trained_run.workdir}",
    f"--images={folder}",
  )
  result = subprocess.run(
    [
      *(sys.executable, "-m", "u2pl_jax.predict", *arguments),
      *(f"--output={tmp_path}/three", "--batch=4"),
    ],
    cwd=REPOSITORY,
    env=pretended.environment(3),
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert result.returncode == 0, result.stderr
  run(*arguments, f"--output={tmp_path}/one")
  for number in range(7):
    name = f"masks/{number}.png"
    one, three = (read_mask(tmp_path / x / name) for x in ("one", "three"))
    assert (one != three).mean() < 0.001


def test_a_file_of_weights_needs_a_config(trained_run, tmp_path, capsys):
  trained = load_trained(trained_run.workdir)
  tensors = torch_weights.to_state_dict(trained.variables.for_apply())
  weights = tmp_path / "weights.pth"
  torch.save(
    {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}, weights
  )
  save_noise(tmp_path / "a.png", 30, 30)
  command = (
    f"--checkpoint={weights}",
    f"--images={tmp_path}/a.png",
    f"--output={tmp_path}/out",
  )
  assert_fails(capsys, command, weights, "--config=configs/")
  config = f"--config={REPOSITORY}/configs/testing.py"
  assert_fails(
    capsys, (*command, config, "--config.model.hed=x"), '"head" instead'
  )
  assert_fails(capsys, (*command, "--config=no.py"), "no.py")
  assert_fails(capsys, (*command, "--config.seed=1"), "needs --config")
  run(*command, config, "--config.eval.pad_to=(64,64)")
  run(
    f"--checkpoint={trained_run.workdir}",
    *command[1:2],
    f"--output={tmp_path}/same",
  )
  same, out = (tmp_path / x / "masks" / "a.png" for x in ("same", "out"))
  assert same.read_bytes() == out.read_bytes()


def test_bad_input_is_one_line(trained_run, photos, tmp_path, capsys):
  folder, _ = photos
  checkpoint = f"--checkpoint={trained_run.workdir}"
  images, output = f"--images={folder}", f"--output={tmp_path}/out"
  (tmp_path / "empty").mkdir()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine.txt").write_text("mine")
  (tmp_path / "file").write_text("")
  for arguments, parts in (
    ((checkpoint, output), ("--images is missing",)),
    ((images, output), ("--checkpoint",)),
    ((checkpoint, images), ("--output",)),
    ((checkpoint, images, output, "--tiles=3"), ("--tiles=3",)),
    ((checkpoint, images, output, "--tile=8"), ("33 to 4096", "8")),
    ((checkpoint, images, output, "--tile=axb"), ("HEIGHTxWIDTH",)),
    ((checkpoint, images, output, "--batch=0"), ("--batch", "'0'")),
    ((checkpoint, images, output, "--step=5"), ("no checkpoint of step 5",)),
    ((checkpoint, f"--images={tmp_path}/empty", output), ("is empty",)),
    ((checkpoint, f"--images={folder}/*.gif", output), ("no file matches",)),
    ((checkpoint, f"--images={tmp_path}/none", output), ("no such file",)),
    (
      (checkpoint, images, f"--output={folder}/out"),
      ("in the folder of the images",),
    ),
    ((checkpoint, images, f"--output={folder}"), ("in the folder of",)),
    (
      (checkpoint, f"--images={folder}/**/*.png", f"--output={folder}/out"),
      ("in the folder of the images",),
    ),
    (
      (checkpoint, f"--images={folder}/sub/*.png", f"--output={folder}"),
      ("sub/a.png", "without images"),
    ),
    (
      (checkpoint, images, f"--output={tmp_path}/full"),
      ("not empty", LOG_FILE),
    ),
    ((checkpoint, images, f"--output={tmp_path}/file"), ("cannot write",)),
    ((checkpoint, images, "--output=gs://bucket/x"), ("local folder",)),
    (
      (f"--checkpoint={tmp_path}/none", images, output),
      ("no such workdir or file",),
    ),
    ((f"--checkpoint={folder}", images, output), ("no run here",)),
    ((f"--checkpoint={folder}/notes.txt", images, output), ("config",)),
  ):
    assert_fails(capsys, arguments, *parts)
  assert not (tmp_path / "out").exists()
  assert not (folder / "out").exists()


def test_damaged_weights_are_one_line(trained_run, photos, tmp_path, capsys):
  folder, _ = photos
  workdir = shutil.copytree(trained_run.workdir, tmp_path / "run")
  command = (
    f"--checkpoint={workdir}",
    f"--images={folder}",
    f"--output={tmp_path}/out",
  )
  for path in (workdir / "checkpoints").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:50])
  assert_fails(capsys, command, workdir)
  shutil.rmtree(workdir / "checkpoints")
  assert_fails(capsys, command, workdir)


def test_nothing_readable_is_an_error(trained_run, tmp_path, capsys):
  folder = tmp_path / "photos"
  folder.mkdir()
  (folder / "a.jpg").write_bytes(b"")
  (folder / "b.csv").write_text("1,2")
  command = (
    f"--checkpoint={trained_run.workdir}",
    f"--images={folder}",
    f"--output={tmp_path}/out",
  )
  assert_fails(capsys, command, "none of the 2 files", folder)


def test_a_full_disk_keeps_what_is_done(
  trained_run, tmp_path, capsys, monkeypatch
):
  folder, output = tmp_path / "photos", tmp_path / "out"
  for number in range(8):
    save_noise(folder / f"{number}.png", 20, 20, number)
  command = (
    f"--checkpoint={trained_run.workdir}",
    f"--images={folder}",
    f"--output={output}",
  )
  write_whole = storage.write_whole

  def write_or_fail(path, data):
    if str(path).endswith("overlays/3.jpg"):
      raise OSError(28, "No space left on device")
    write_whole(path, data)

  with monkeypatch.context() as patch:
    patch.setattr(storage, "write_whole", write_or_fail)
    assert_fails(capsys, command, "overlays/3.jpg", "No space left on device")
  done = [line["input"] for line in read_log(output)]
  assert {"0.png", "1.png", "2.png"} <= set(done)
  assert "3.png" not in done
  kept = (output / "masks" / "0.png").stat().st_mtime_ns
  run(*command)
  assert [line["input"] for line in read_log(output)] == [
    f"{i}.png" for i in range(8)
  ]
  assert (output / "masks" / "0.png").stat().st_mtime_ns == kept


def test_too_little_memory_is_one_line(
  trained_run, photos, tmp_path, capsys, monkeypatch
):
  def fail(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(predict, "Predictor", fail)
  folder, _ = photos
  command = (
    f"--checkpoint={trained_run.workdir}",
    f"--images={folder}",
    f"--output={tmp_path}/out",
  )
  assert_fails(capsys, command, "memory", "--batch", "--tile")


def test_interruption_is_one_line(
  trained_run, photos, tmp_path, capsys, monkeypatch
):
  def interrupt(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(predict, "Predictor", interrupt)
  folder, _ = photos
  command = (
    f"--checkpoint={trained_run.workdir}",
    f"--images={folder}",
    f"--output={tmp_path}/out",
  )
  assert_fails(capsys, command, "the same command goes on", code=130)


# -- predictions.jsonl ---------------------------------------------------------


def make_line(name, mask, **more):
  line = {"input": name, "root": "/r", "network": "n", "grid": "g"}
  return line | {"outputs": {"masks": mask}} | more


def test_names_are_never_shared(tmp_path):
  log = PredictionLog(tmp_path / "out")
  names = ["a.jpg", "a.png", "b.jpg", "x/a.jpg", "c"]
  assert log.stems(names) == {
    "a.jpg": "a.jpg",
    "a.png": "a.png",
    "b.jpg": "b",
    "x/a.jpg": "x/a",
    "c": "c",
  }
  log.append(make_line("a.jpg", "masks/a.png"))
  assert log.stems(names[:2]) == {"a.jpg": "a", "a.png": "a.png"}
  log.append(make_line("d.png", "masks/e.jpg.png"))
  log.append(make_line("f.png", "masks/e.png"))
  with pytest.raises(DataError, match="e.jpg: the outputs would have"):
    log.stems(["e.jpg"])
  log.close()


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, "No space left on device")

  log = PredictionLog(tmp_path / "out")
  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(DataError, match="predictions.jsonl: cannot be written"):
    log.append(make_line("a.jpg", "masks/a.png"))
  with pytest.raises(DataError, match="No space left on device"):
    log.rewrite()
  log.close()


def test_what_a_kill_leaves_before_the_first_line_is_no_obstacle(tmp_path):
  output = tmp_path / "out"
  output.mkdir()
  (output / f".{LOG_FILE}.x1.part").write_bytes(b"")
  PredictionLog(output).close()
  assert (output / LOG_FILE).read_bytes() == b""


def test_lines_that_are_none(tmp_path):
  output = tmp_path / "out"
  log = PredictionLog(output)
  log.append(make_line("a.jpg", "masks/a.png"))
  log.close()
  text = (output / LOG_FILE).read_text()
  (output / LOG_FILE).write_text(text + "[]\n")
  with pytest.raises(DataError, match="line 2 is no line of this program"):
    PredictionLog(output)
  (output / LOG_FILE).write_text(text + text[:20])
  log = PredictionLog(output)
  log.check(["a.jpg", "b.jpg"], network="n")
  with pytest.raises(DataError, match="a.jpg was predicted by another network"):
    log.check(["b.jpg", "a.jpg"], network="m")
  log.drop([])
  log.close()
  assert (output / LOG_FILE).read_text() == text
