"""From a user's folders to a config, and the commands of docs/own_data.md."""

import json
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import init_dataset
import numpy as np
import pytest
from PIL import Image

from input_pipeline import DataError, dataset_config, examination, read_split
from tests import data_trees
from u2pl_jax.config_checks import check_config

ROOT = pathlib.Path(__file__).parent.parent


def write_images(folder, ids, suffix=".jpg"):
  for id in ids:
    data_trees.save(folder / f"{id}{suffix}", data_trees.photo(id, (40, 64)))


def blocks(id, values, size=(40, 64)):
  """A mask of vertical stripes, one for each value."""
  row = np.repeat(np.array(values), -(-size[1] // len(values)))[: size[1]]
  return np.tile(np.roll(row, len(id)), (size[0], 1)).astype(np.uint8)


def write_own(root, num_masks=6, values=(0, 1, 2, 255), num_images=10):
  ids = [f"IMG {i}" for i in range(num_images)]
  write_images(root / "images", ids)
  for id in ids[:num_masks]:
    data_trees.save(root / f"masks/{id}.png", blocks(id, values))
  return ids


def run(root, *arguments):
  """The script's main; the config that it wrote and its folder."""
  output = root / "out"
  init_dataset.main(
    [str(root / "images"), str(root / "masks"), f"--output={output}"]
    + list(arguments)
  )
  return load_config(output / "config.py"), output


def load_config(path, arg=None):
  # Leaves no bytecode beside the files that are compared.
  return runpy.run_path(str(path))["get_config"](arg)


def refused(capsys, root, *arguments):
  with pytest.raises(SystemExit) as stop:
    run(root, *arguments)
  assert stop.value.code == 1
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1].startswith("error: ")
  assert not (root / "out").exists()
  return lines[-1]


def test_lists_classes_statistics_and_config(tmp_path):
  ids = write_own(tmp_path)
  config, output = run(tmp_path, "--classes=ground, red  coin,leaf")
  labelled = read_split(output / "labelled.txt")
  validation = read_split(output / "validation.txt")
  # A fifth of 6 masks, rounded.
  assert len(validation) == 1 and len(labelled) == 5
  assert sorted(labelled + validation) == ids[:6]
  assert list(read_split(output / "unlabelled.txt")) == ids[6:]
  assert (output / "classes.txt").read_text() == (
    "ground 0 0 0\nred coin 128 0 0\nleaf 0 128 0\n"
  )
  statistics = json.loads((output / "statistics.json").read_text())
  assert statistics["images"] == {
    "labelled": 5,
    "unlabelled": 4,
    "validation": 1,
  }
  # Four stripes of 16 columns: 6 masks * 40 rows * 16.
  assert [row["pixels"] for row in statistics["classes"]] == [3840] * 3
  assert [row["share"] for row in statistics["classes"]] == [0.25] * 3
  assert statistics["ignored_share"] == 0.25
  assert statistics["sizes"]["largest"] == [40, 64]
  training = [
    data_trees.photo(id, (40, 64)) for id in labelled + tuple(ids[6:])
  ]
  mean = np.mean(training, (0, 1, 2))
  assert np.abs(np.array(statistics["mean"]) - mean).max() < 3

  assert config.dataset.mask_format == "index"
  assert config.input.crop_size == (33, 33)  # 32 * round(40 / 32) + 1.
  assert config.eval.pad_to == (40, 64)
  assert (config.batch.labelled, config.batch.unlabelled) == (5, 4)
  assert (config.contrastive.low_rank, config.contrastive.high_rank) == (1, 3)
  assert config.schedule.epochs == 10_000  # One step each.
  assert examination.examine(config).problems == ()
  for arg in (None, "cpu", "method=supervised", "backbone=resnet101"):
    config = load_config(output / "config.py", arg)
    info = dataset_config.load_info(config.dataset)
    check_config(config, num_classes=info.num_classes, num_devices=1)
  assert load_config(output / "config.py", "cpu").dataset.mean == tuple(
    round(value, 1) for value in statistics["mean"]
  )


def test_the_same_seed_makes_the_same_files(tmp_path):
  write_own(tmp_path, num_masks=9)
  _, output = run(tmp_path, "--seed=3")
  first = {path.name: path.read_text() for path in output.iterdir()}
  assert set(first) == {
    "classes.txt",
    "config.py",
    "labelled.txt",
    "statistics.json",
    "unlabelled.txt",
    "validation.txt",
  }
  # What is there already and is the same is no conflict.
  run(tmp_path, "--seed=3")
  assert {path.name: path.read_text() for path in output.iterdir()} == first
  with pytest.raises(SystemExit):
    run(tmp_path, "--seed=4", "--val-fraction=0.5")
  assert {path.name: path.read_text() for path in output.iterdir()} == first
  run(tmp_path, "--seed=4", "--val-fraction=0.5", "--force")
  assert (output / "validation.txt").read_text() != first["validation.txt"]


def test_nothing_is_written_when_a_file_would_be_replaced(tmp_path, capsys):
  write_own(tmp_path)
  output = tmp_path / "out"
  output.mkdir()
  (output / "config.py").write_text("mine")
  with pytest.raises(SystemExit):
    run(tmp_path)
  error = capsys.readouterr().err.splitlines()[-1]
  assert f"{output / 'config.py'}: the file exists" in error
  assert [path.name for path in output.iterdir()] == ["config.py"]
  assert (output / "config.py").read_text() == "mine"


def test_a_write_that_fails_leaves_no_half_file(tmp_path, monkeypatch, capsys):
  write_own(tmp_path)

  def full(*_):
    raise OSError(28, "No space left on device", "config.py")

  monkeypatch.setattr(init_dataset.os, "fsync", full)
  with pytest.raises(SystemExit):
    run(tmp_path)
  assert "No space left" in capsys.readouterr().err
  assert list((tmp_path / "out").iterdir()) == []


def test_folders_inside_the_output_are_named_relative_to_it(tmp_path):
  root = tmp_path / "coins"
  write_own(root)
  init_dataset.main(
    [str(root / "images"), str(root / "masks"), f"--output={root}"]
  )
  config = load_config(root / "config.py")
  assert config.name == "coins"
  assert config.dataset.image_dir == "images"
  assert config.dataset.mask_dir == "masks"
  config.dataset.root = str(root.rename(tmp_path / "moved"))
  assert examination.examine(config).problems == ()


def test_shared_ending_subfolders_and_names_like_paths(tmp_path):
  ids = ["day 1/a", "day 1/b", "day 2/a", "c.png", "d 2", "d 22", "e", "f"]
  write_images(tmp_path / "images", ids)
  for id in ids[:6]:
    mask = blocks(id, (0, 1, 2))
    data_trees.save(tmp_path / f"masks/{id}_mask.png", mask)
  data_trees.save(tmp_path / "masks/nobody_mask.png", blocks("x", (0, 1)))
  config, output = run(tmp_path)
  assert config.dataset.mask_suffix == "_mask.png"
  listed = read_split(output / "labelled.txt")
  listed += read_split(output / "validation.txt")
  assert sorted(listed) == sorted(ids[:6])
  assert examination.examine(config).problems == ()


def test_a_folder_of_unlabelled_images(tmp_path, capsys):
  ids = write_own(tmp_path, num_masks=10)
  write_images(tmp_path / "more", ["x", "deep/y", "z", ids[0]], suffix=".png")
  config, output = run(tmp_path, f"--unlabelled={tmp_path / 'more'}")
  assert not (output / "unlabelled.txt").exists()
  diagnosis = examination.examine(config)
  assert diagnosis.problems == ()
  assert diagnosis.counts["unlabelled"] == 3
  # Images without a mask in the first folder would be lost.
  (tmp_path / "masks" / f"{ids[3]}.png").unlink()
  with pytest.raises(SystemExit):
    run(tmp_path, f"--unlabelled={tmp_path / 'more'}", "--force")
  assert "1 images have no mask, such as IMG 3.jpg" in capsys.readouterr().err


COLOURS = {(0, 0, 0): 0, (200, 0, 0): 1, (0, 9, 0): 2}


def test_colour_masks(tmp_path):
  ids = write_own(tmp_path)
  table = np.array([(0, 0, 0), (200, 0, 0), (0, 9, 0), (224, 224, 192)])
  for id in ids[:6]:
    mask = table.astype(np.uint8)[blocks(id, (0, 1, 2, 3))]
    data_trees.save(tmp_path / f"masks/{id}.png", mask)
  config, output = run(tmp_path, "--classes=ground,leaf,coin")
  assert config.dataset.mask_format == "colours"
  # In the order of the colours; the void colour of VOC is no class.
  assert (output / "classes.txt").read_text() == (
    "ground 0 0 0\nleaf 0 9 0\ncoin 200 0 0\nignore 224 224 192\n"
  )
  diagnosis = examination.examine(config)
  assert diagnosis.problems == ()
  assert diagnosis.labels["validation"].pixels.tolist() == [640] * 3
  assert diagnosis.labels["validation"].ignored == 640


def test_black_and_white_masks(tmp_path, capsys):
  ids = write_own(tmp_path, values=(0, 255))
  config, output = run(tmp_path)
  assert config.dataset.mask_format == "colours"
  assert (output / "classes.txt").read_text() == (
    "class_0 0 0 0\nclass_1 255 255 255\n"
  )
  # The advice for two classes: r_l = 1.
  assert (config.contrastive.low_rank, config.contrastive.high_rank) == (1, 2)
  assert "grey levels 0, 255" in capsys.readouterr().out
  diagnosis = examination.examine(config)
  assert diagnosis.problems == ()
  assert diagnosis.labels["validation"].pixels.tolist() == [1280, 1280]
  assert len(ids) == 10


RawMask = init_dataset.RawMask


@pytest.mark.parametrize(
  ("values", "is_palette", "names", "expected"),
  [
    # (kind, names or their number, colour to ignore)
    ({0, 1, 2, 255}, False, "", ("index", 3, None)),
    ({0, 15, 255}, False, "", ("index", 16, None)),
    ({0, 1, 11}, False, "", ("index", 12, None)),
    ({0, 1}, False, "a,b,c", ("index", ("a", "b", "c"), None)),
    ({0, 128, 255}, True, "", ("index", 129, None)),
    ({0, 128, 255}, False, "", ("colours", 3, None)),
    ({0, 85, 170, 255}, False, "", ("colours", 4, None)),
    ({0, 85, 255}, False, "a,b", ("colours", ("a", "b"), (255,) * 3)),
    ({0, 7}, False, "a,b", ("colours", ("a", "b"), None)),
  ],
)
def test_what_values_mean(values, is_palette, names, expected):
  mask = RawMask(dict.fromkeys(values, 1), is_palette)
  classes = init_dataset.find_classes(
    [mask], tuple(filter(None, names.split(",")))
  )
  kind, wanted, ignore_colour = expected
  assert classes.mask_format == kind
  found = classes.names if isinstance(wanted, tuple) else len(classes.names)
  assert found == wanted
  assert classes.ignore_colour == ignore_colour


@pytest.mark.parametrize(
  ("values", "is_palette", "names", "part"),
  [
    ({0}, False, (), "one class only"),
    ({255}, False, (), "belongs to no class"),
    ({0, 300}, False, (), "the value 300"),
    ({0, 254}, True, (), "255 classes"),
    ({0, 3}, True, ("a", "b"), "the value 3"),
    ({0, 128, 255}, False, ("a",), "have 3 grey levels: 0, 128, 255"),
    ({(0, 0, 0), (1, 0, 0)}, False, ("a",), "have 2 colours"),
    ({(i, 0, j) for i in range(16) for j in range(16)}, False, (), "256"),
  ],
)
def test_values_that_cannot_be_classes(values, is_palette, names, part):
  mask = RawMask(dict.fromkeys(values, 1), is_palette)
  with pytest.raises(DataError, match=re.escape(part)):
    init_dataset.find_classes([mask], names)


def test_validation_is_stratified():
  # 40 images of class 0, of which 4 have class 1 and 2 have class 2; one image
  # alone has class 3.
  classes_of = {f"{i:02}": frozenset({0}) for i in range(40)}
  for i in range(4):
    classes_of[f"{i:02}"] |= {1}
  for i in (10, 11):
    classes_of[f"{i}"] |= {2}
  classes_of["20"] |= {3}
  draws = set()
  for seed in range(20):
    chosen = init_dataset.choose_validation(classes_of, 0.1, seed)
    draws.add(chosen)
    assert len(chosen) == 4
    seen = frozenset().union(*(classes_of[id] for id in chosen))
    left = frozenset().union(
      *(classes_of[id] for id in classes_of if id not in chosen)
    )
    assert seen == {0, 1, 2}
    assert left == {0, 1, 2, 3}
  assert len(draws) > 10
  # None can be spared.
  alone = {"a": frozenset({0}), "b": frozenset({1})}
  assert init_dataset.choose_validation(alone, 0.5, 0) == ()


def test_what_cannot_work_is_one_line(tmp_path, capsys):
  write_images(tmp_path / "images", ["a", "b", "c"])
  (tmp_path / "masks").mkdir()
  assert "no image files" in refused(capsys, tmp_path)
  data_trees.save(tmp_path / "masks/z.png", blocks("z", (0, 1)))
  assert "no mask has the name of an image" in refused(capsys, tmp_path)
  for id in "abc":
    data_trees.save(tmp_path / f"masks/{id}.png", blocks(id, (0, 1)))
  assert "every image has a mask" in refused(capsys, tmp_path)
  (tmp_path / "masks/c.png").unlink()
  for arguments, part in (
    (["--val-fraction=1"], "--val-fraction=1.0"),
    (["--seed=-1"], "--seed=-1"),
    (["--name=a b"], "--name=a b"),
    (["--classes=a,a"], "is there twice"),
    (["--classes=a,ignore"], "is no name"),
    (["--unlabelled=/nowhere"], "/images: 1 images have no mask"),
  ):
    assert part in refused(capsys, tmp_path, *arguments)
  Image.fromarray(blocks("a", (0, 1))).save(tmp_path / "masks/a.jpg")
  assert "have the same id 'a'" in refused(capsys, tmp_path)
  (tmp_path / "masks/a.png").unlink()
  (tmp_path / "masks/b.png").unlink()
  assert "the mask is a JPEG" in refused(capsys, tmp_path)


def first_part_of_the_docs():
  text = (ROOT / "docs/own_data.md").read_text()
  return text.split("## The first ten minutes")[1].split("\n## ")[0]


def commands_of(text):
  """Arguments of the commands in indented blocks."""
  joined = text.replace("\\\n", " ")
  return [
    shlex.split(line)
    for line in joined.splitlines()
    if line.startswith("    python ")
  ]


@pytest.mark.slow
def test_first_ten_minutes(tmp_path):
  text = first_part_of_the_docs()
  commands = commands_of(text)
  assert [command[1:3] for command in commands] == [
    ["scripts/init_dataset.py", "mushrooms/images"],
    ["-m", "input_pipeline.doctor"],
    ["-m", "u2pl_jax.main"],
  ]
  # The tree that the text speaks of; unlabelled images have no masks.
  ids = [f"IMG_{i:02}" for i in range(36)]
  write_images(tmp_path / "mushrooms/images", ids)
  for id in ids[:12]:
    mask = blocks(id, (0, 1, 2, 3))
    data_trees.save(tmp_path / f"mushrooms/masks/{id}.png", mask)
  for name in ("configs", "input_pipeline", "scripts", "u2pl_jax"):
    (tmp_path / name).symlink_to(ROOT / name)
  outputs = []
  for command in commands:
    assert command[0] == "python"
    result = subprocess.run(
      [sys.executable, *command[1:]],
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    outputs.append(result.stdout)
    log = result.stderr
  # What the text says is printed.
  expected = re.findall(r"^    (masks hold .*|\d+ labelled .*)$", text, re.M)
  assert len(expected) == 2
  assert set(expected) <= set(outputs[0].splitlines())
  (clean,) = re.findall(r"`(clean: [^`]*)`", text)
  assert outputs[1].splitlines()[-1] == clean
  # The command that comes next is the one of the text.
  printed = commands_of(outputs[0].replace("  python", "    python"))
  assert commands[1] == printed[0]
  assert commands[2][3] in printed[1]
  assert "step 3/3" in log and "semi " in log
  (page,) = re.findall(r"`(runs/.*?\.html)`", text)
  assert (tmp_path / page).is_file()
  workdir = (tmp_path / page).parent.parent
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines]
  assert max(steps) == 3
