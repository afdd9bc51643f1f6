"""The doctor finds every planted fault, and none where there is none."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from input_pipeline import (
  ConfigError,
  DataError,
  costs,
  dataset_config,
  doctor,
  examination,
  inspection,
  sources,
  tfds_builders,
)
from tests import data_trees

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ("ground", "coin", "leaf")
LABELLED, VALIDATION = ("l1", "l2", "l3"), ("v1", "v2")
UNLABELLED = ("u1", "u2", "u3")
SIZE = (40, 48)


def labels(id):
  """Rows of class 0, 1, 2 and 255, in an order of their own for each id."""
  mask = np.repeat(np.array([0, 1, 2, 255], np.uint8), 10)[:, None]
  return np.roll(np.tile(mask, (1, SIZE[1])), sum(id.encode()), axis=0)


def write_pair(root, id, *, mask=True, suffix=".png"):
  path = root / f"images/{id}{suffix}"
  data_trees.save(path, data_trees.photo(id, SIZE))
  if mask:
    data_trees.save(root / f"masks/{id}.png", labels(id))
  return path


def write_clean(root):
  for id in LABELLED + VALIDATION:
    write_pair(root, id)
  for id in UNLABELLED:
    write_pair(root, id, mask=False, suffix=".jpg")
  data_trees.write_list(root / "classes.txt", NAMES)
  data_trees.write_list(root / "labelled.txt", LABELLED)
  data_trees.write_list(root / "unlabelled.txt", UNLABELLED)
  data_trees.write_list(root / "val.txt", VALIDATION)
  config = data_trees.small_config(
    root,
    name="folder",
    image_dir="images",
    mask_dir="masks",
    image_suffix="",
    classes_file="classes.txt",
    labelled_list="labelled.txt",
    unlabelled_list="unlabelled.txt",
    validation_list="val.txt",
  )
  config.contrastive.low_rank, config.contrastive.high_rank = 1, 3
  config.eval.pad_to = (50, 50)
  return config


def run(config, *arguments, cwd=None):
  """Runs the command with the keys of a config that differ from voc_1464's."""
  keys = {f"dataset.{key}": value for key, value in config.dataset.items()}
  del keys["dataset.shapes"], keys["dataset.mean"], keys["dataset.std"]
  keys |= {
    "batch.labelled": 2,
    "batch.unlabelled": 2,
    "input.crop_size": (33, 33),
    "eval.pad_to": (50, 50),
    "contrastive.low_rank": config.contrastive.low_rank,
    "contrastive.high_rank": config.contrastive.high_rank,
  }
  return subprocess.run(
    [
      *(sys.executable, "-m", "input_pipeline.doctor"),
      f"--config={ROOT}/configs/voc_1464.py",
      *(f"--config.{key}={value}" for key, value in keys.items()),
      *arguments,
    ],
    cwd=cwd or ROOT,
    capture_output=True,
    text=True,
  )


def found(config):
  return {(p.kind, p.path) for p in examination.examine(config).problems}


def detail_of(config, kind):
  problems = examination.examine(config).problems
  (detail,) = (p.detail for p in problems if p.kind == kind)
  assert "\n" not in detail
  return detail


def plant(root):
  """Plants a fault of every kind of file and list: {(kind, path)}."""
  images, masks = root / "images", root / "masks"
  planted = set()
  extra = {"labelled": [], "unlabelled": [], "val": []}

  def expect(kind, path):
    planted.add((kind, str(path)))

  def pair(id, part="labelled"):
    extra[part].append(id)
    return write_pair(root, id, mask=part != "unlabelled"), (
      masks / f"{id}.png"
    )

  image, _ = pair("no_image")
  image.unlink()
  expect("missing_image", image.with_suffix(""))
  _, mask = pair("no_mask")
  mask.unlink()
  expect("missing_mask", mask)
  image, _ = pair("zero", "unlabelled")
  image.write_bytes(b"")
  expect("empty_file", image)
  image, _ = pair("text", "unlabelled")
  image.write_text("<html>404</html>")
  expect("unreadable_image", image)
  extra["unlabelled"].append("cut")
  image = write_pair(root, "cut", mask=False, suffix=".jpg")
  image.write_bytes(image.read_bytes()[:-200])
  expect("unreadable_image", image)
  _, mask = pair("cut_mask", "val")
  mask.write_bytes(mask.read_bytes()[:-40])
  expect("unreadable_mask", mask)

  _, mask = pair("rgb_mask")
  data_trees.save(mask, data_trees.photo("x", SIZE))
  expect("mask_format", mask)
  _, mask = pair("jpeg_mask", "val")
  Image.fromarray(labels("a")).save(mask, format="JPEG")
  expect("mask_format", mask)
  _, mask = pair("seven")
  values = labels("seven")
  values[2, 5] = 7
  data_trees.save(mask, values)
  expect("illegal_label", mask)
  _, mask = pair("small_mask")
  data_trees.save(mask, labels("small_mask")[:, :-8])
  expect("size_mismatch", mask)
  _, mask = pair("void")
  data_trees.save(mask, np.full(SIZE, 255, np.uint8))
  expect("mask_without_labels", mask)

  image, _ = pair("leak", "val")
  image.write_bytes((images / "u1.jpg").read_bytes())
  expect("leaked_image", image)
  image, _ = pair("twin", "unlabelled")
  image.write_bytes((images / "l1.png").read_bytes())
  expect("duplicate_image", image)
  image, _ = pair("stored_again", "unlabelled")
  Image.open(images / "l2.png").save(image, compress_level=0)
  expect("duplicate_image", image)

  image, _ = pair("turned", "unlabelled")
  image.unlink()
  exif = Image.Exif()
  exif[0x0112] = 6
  photo = Image.fromarray(data_trees.photo("turned", SIZE))
  photo.save(image.with_suffix(".jpg"), exif=exif)
  expect("rotated_image", image.with_suffix(".jpg"))
  image, _ = pair("grey", "unlabelled")
  photo.convert("L").save(image)
  expect("greyscale_image", image)
  image, _ = pair("print", "unlabelled")
  image.unlink()
  Image.fromarray(255 - data_trees.photo("print", SIZE)).convert("CMYK").save(
    image.with_suffix(".jpg")
  )
  expect("cmyk_image", image.with_suffix(".jpg"))
  image, _ = pair("deep", "unlabelled")
  deep = data_trees.photo("deep", SIZE).astype(np.uint16) * 257
  cv2.imwrite(str(image), deep)
  expect("sixteen_bit_image", image)
  image, _ = pair("glass", "unlabelled")
  glass = Image.fromarray(data_trees.photo("glass", SIZE)).convert("RGBA")
  glass.putpixel((3, 4), (1, 2, 3, 0))
  glass.save(image)
  expect("alpha_image", image)

  extra["val"].append("large")
  data_trees.save(images / "large.png", data_trees.photo("large", (51, 30)))
  data_trees.save(masks / "large.png", np.zeros((51, 30), np.uint8))
  expect("eval_size", images / "large.png")
  image, _ = pair("double", "unlabelled")
  data_trees.save(image.with_suffix(".bmp"), data_trees.photo("double", SIZE))
  expect("ambiguous_id", image.with_suffix(".bmp"))
  extra["unlabelled"].append("v2")
  expect("overlapping_lists", images / "v2.png")
  extra["labelled"].append("l3")
  expect("repeated_id", root / "labelled.txt")
  extra["labelled"].append("../elsewhere/x")
  expect("unusable_list", root / "labelled.txt")
  for name, ids in (
    ("labelled", LABELLED),
    ("unlabelled", UNLABELLED),
    ("val", VALIDATION),
  ):
    data_trees.write_list(root / f"{name}.txt", (*ids, *extra[name]))
  # A fourth class, that no mask has.
  data_trees.write_list(root / "classes.txt", (*NAMES, "ghost"))
  expect("class_without_labels", root / "labelled.txt")
  expect("class_without_validation", root / "val.txt")
  return planted


def test_every_planted_fault_is_found_and_nothing_else(tmp_path):
  config = write_clean(tmp_path)
  planted = plant(tmp_path)
  of_the_config = {"rank_window", "batch_size", "crop_size"}
  assert {kind for kind, _ in planted} == set(inspection.KINDS) - of_the_config
  assert found(config) == planted


def test_command_on_planted_faults(tmp_path):
  config = write_clean(tmp_path)
  planted = plant(tmp_path)
  report = tmp_path / "report.json"
  result = run(config, f"--json={report}")
  assert result.returncode == 1
  content = json.loads(report.read_text())
  assert not content["clean"]
  problems = content["problems"]
  assert {(p["kind"], p["path"]) for p in problems} == planted
  assert all(p["severity"] in ("error", "warning") for p in problems)
  num_errors = sum(p["severity"] == "error" for p in problems)
  last = result.stdout.splitlines()[-1]
  assert last.startswith(
    f"{len(problems)} problems in {content['files']} files"
  )
  assert f"{num_errors} errors" in last
  for kind in {kind for kind, _ in planted}:
    assert f": {kind}, " in result.stdout
  # Allowing all of them makes it clean, allowing all but one does not.
  kinds = sorted(content["kinds"])
  assert sum(content["kinds"].values()) == len(problems)
  result = run(config, f"--allow={','.join(kinds)}", f"--json={report}")
  assert result.returncode == 0
  assert result.stdout.splitlines()[-1].startswith("clean: ")
  content = json.loads(report.read_text())
  assert content["clean"] and all(p["allowed"] for p in content["problems"])
  assert list(tmp_path.glob("*.tmp")) == []


def test_clean_tree(tmp_path):
  config = write_clean(tmp_path)
  report = tmp_path / "report.json"
  result = run(config, f"--json={report}")
  assert result.returncode == 0, result.stdout + result.stderr
  # 3 + 2 pairs and 3 images.
  assert result.stdout.splitlines()[-1] == "clean: 13 files read"
  assert result.stderr == ""  # Over at once: no bar.
  content = json.loads(report.read_text())
  assert content["problems"] == [] and content["clean"]
  assert content["images"] == {"labelled": 3, "unlabelled": 3, "validation": 2}
  # 10 of 40 rows of 48 pixels for each class and for 255.
  assert content["labels"]["labelled"] == {
    "pixels": [1440, 1440, 1440],
    "images": [3, 3, 3],
    "ignored": 1440,
  }
  assert content["labels"]["validation"]["pixels"] == [960, 960, 960]
  assert content["sizes"]["unlabelled"] == {
    "smallest": [40, 48],
    "median": [40, 48],
    "largest": [40, 48],
    "distinct": 1,
  }
  assert content["masks"] == {"grey": 5}
  # 80 epochs of (3 + 4 - 1) // 2, see schedule.reference_devices.
  assert content["estimate"]["steps"] == 240
  assert re.search(r"1 coin +25.00% +3 +25.00% +2\n", result.stdout)


def test_masks_of_unlabelled_images_are_never_touched(tmp_path, monkeypatch):
  config = write_clean(tmp_path)
  for id in UNLABELLED:
    (tmp_path / f"masks/{id}.png").write_bytes(b"hidden")
  read = []
  for name in ("mask_path", "read_mask", "has_mask"):
    original = getattr(sources.Layout, name)

    def spy(layout, id, original=original):
      read.append(id)
      return original(layout, id)

    monkeypatch.setattr(sources.Layout, name, spy)
  assert found(config) == set()
  assert set(read) == set(LABELLED + VALIDATION)


@pytest.mark.parametrize(
  "tree", [data_trees.write_voc, data_trees.write_cityscapes]
)
def test_other_forms_of_data_sets(tmp_path, tree):
  config = tree(tmp_path)
  # So few pixels miss some classes, and one image misses two in a batch.
  kinds = {kind for kind, _ in found(config)}
  assert kinds <= {
    "class_without_labels",
    "class_without_validation",
    "rank_window",
  }
  assert ("rank_window" in kinds) == (tree == data_trees.write_cityscapes)


def test_colour_masks_and_a_folder_of_unlabelled_images(tmp_path):
  config = data_trees.write_own(tmp_path)
  config.contrastive.low_rank, config.contrastive.high_rank = 1, 3
  diagnosis = examination.examine(config)
  assert diagnosis.problems == ()
  assert diagnosis.counts["unlabelled"] == 3
  h, w = data_trees.SIZE
  drawn = np.stack([data_trees.labels(id, 3) for id in ("v1", "v2")])
  expected = np.bincount(drawn.ravel(), minlength=256)
  validation = diagnosis.labels["validation"]
  assert validation.pixels.tolist() == expected[:3].tolist()
  assert validation.ignored == 2 * h
  # An index mask among them is told as such.
  mask = tmp_path / "masks/v1.png"
  data_trees.save(mask, data_trees.labels("v1", 3))
  assert found(config) == {("mask_format", str(mask))}
  detail = detail_of(config, "mask_format")
  assert "dataset.mask_format='index'" in detail
  # No image is left in the folder.
  config.dataset.unlabelled_dir = "masks"
  assert ("unusable_list", str(tmp_path / "masks")) in found(config)


def test_details_say_value_place_and_fix(tmp_path):
  config = write_clean(tmp_path)
  plant(tmp_path)
  problems = examination.examine(config).problems
  details = {p.kind: p.detail for p in problems}
  assert (
    "value 7 in 1 pixels, first at row 2, column 5"
    in (details["illegal_label"])
  )
  assert "40x40" in details["size_mismatch"]
  assert "48x40 (width x height)" in details["size_mismatch"]
  assert "u1.jpg (unlabelled)" in details["leaked_image"]
  assert "1 pixels are not opaque" in details["alpha_image"]
  assert "'l3' is in lines 3, " in details["repeated_id"]
  assert "class 3 (ghost)" in details["class_without_labels"]
  assert "orientation 6" in details["rotated_image"]
  duplicates = sorted(p.detail for p in problems if p.kind == "duplicate_image")
  assert "the same bytes as" in duplicates[0]
  assert "stored in other bytes" in duplicates[1]


def test_turned_image_with_an_unturned_mask(tmp_path):
  config = write_clean(tmp_path)
  (tmp_path / "images/l1.png").unlink()
  exif = Image.Exif()
  exif[0x0112] = 6
  photo = Image.fromarray(data_trees.photo("l1", SIZE))
  photo.save(tmp_path / "images/l1.jpg", exif=exif)
  assert {kind for kind, _ in found(config)} == {
    "rotated_image",
    "size_mismatch",
  }
  assert "EXIF tag has turned it" in detail_of(config, "size_mismatch")
  assert "its mask must be turned alike" in detail_of(config, "rotated_image")


def test_two_level_masks_whose_255_is_a_class(tmp_path):
  config = write_clean(tmp_path)
  for id in LABELLED + VALIDATION:
    mask = np.where(labels(id) == 1, 255, 0).astype(np.uint8)
    data_trees.save(tmp_path / f"masks/{id}.png", mask)
  diagnosis = examination.examine(config)
  details = [p.detail for p in diagnosis.problems]
  assert len(details) == 4  # Two classes, in two lists.
  assert all("mask_format='colours'" in detail for detail in details)


def test_missing_lists_do_not_stop_it(tmp_path):
  config = write_clean(tmp_path)
  (tmp_path / "unlabelled.txt").unlink()
  (tmp_path / "val.txt").write_text("\n")
  (tmp_path / "masks/l1.png").unlink()
  assert found(config) == {
    ("unusable_list", str(tmp_path / "unlabelled.txt")),
    ("unusable_list", str(tmp_path / "val.txt")),
    ("missing_mask", str(tmp_path / "masks/l1.png")),
  }


def test_ranks_batches_and_crop(tmp_path):
  config = write_clean(tmp_path)
  for low, high, is_wrong in (
    (1, 2, False),
    (2, 3, False),
    (0, 0, False),
    (0, 3, True),
    (2, 2, True),
    (1, 4, True),
  ):
    config.contrastive.low_rank, config.contrastive.high_rank = low, high
    kinds = {kind for kind, _ in found(config)}
    assert kinds == ({"rank_window"} if is_wrong else set()), (low, high)
  config.method = "supervised"  # It has no ranks, and reads no ...
  (tmp_path / "images/u1.jpg").unlink()  # ... unlabelled image.
  assert found(config) == set()
  config.batch.labelled = 4
  config.batch.unlabelled = 5
  config.input.crop_size = (129, 129)
  assert found(config) == {
    ("batch_size", "config.batch.labelled"),
    ("batch_size", "config.batch.unlabelled"),
    ("crop_size", "config.input.crop_size"),
  }


def test_crop_cover():
  # Without scaling: 40 of 80 rows and 30 of 60 columns.
  assert examination.crop_cover({(40, 30): 1}, (80, 60), (1, 1)) == 0.25
  # A quarter of the images covers a crop whole, the others a half.
  sizes = {(90, 90): 1, (40, 60): 3}
  assert examination.crop_cover(sizes, (80, 60), (1, 1)) == 0.25 + 0.75 * 0.5
  # Half of the draws in [0.5, 1], mean of (40 s)^2 is 1600 * 7 / 12; half in
  # [1, 2], where everything is covered.
  cover = examination.crop_cover({(40, 40): 1}, (40, 40), (0.5, 2))
  assert cover == pytest.approx(0.5 * 7 / 12 + 0.5, abs=1e-4)


def test_estimate_is_the_formula(tmp_path):
  config = write_clean(tmp_path)
  config.model.backbone = "resnet101"
  config.batch.labelled = config.batch.unlabelled = 16
  config.input.crop_size = (513, 513)
  estimate = costs.estimate(config, num_classes=21, num_unlabelled=9118)
  # 50 000 + 20 * 30 000 keys of 256 floats.
  assert estimate.bank_bytes == 650_000 * 256 * 4
  assert (estimate.steps, estimate.warmup_steps) == (80 * 569, 569)
  # Counted by hand for the step of the published recipe: 93.8 TFLOP.
  step = estimate.operations / (79 * 569 + 569 / 3)
  assert step == pytest.approx(93.8e12, rel=0.15)
  half = config.copy_and_resolve_references()
  half.batch.labelled = half.batch.unlabelled = 8
  other = costs.estimate(half, num_classes=21, num_unlabelled=9118)
  assert other.activation_bytes == estimate.activation_bytes / 2
  assert other.parameter_bytes == estimate.parameter_bytes
  half.method = "supervised"
  other = costs.estimate(half, num_classes=21, num_unlabelled=9118)
  assert other.bank_bytes == 0
  assert other.activation_bytes == estimate.activation_bytes / 4
  assert other.warmup_steps == other.steps
  config.model.backbone = "resnet7"
  with pytest.raises(ConfigError, match="resnet7"):
    costs.estimate(config, num_classes=21, num_unlabelled=9118)


def test_what_cannot_run_is_one_line_and_status_2(tmp_path):
  config = write_clean(tmp_path)
  for arguments, part in (
    (["--allow=nonsense"], "--allow=nonsense: no such kind"),
    ([f"--json={tmp_path}/classes.txt/x.json"], "cannot be written"),
    (["--config.dataset.root=/nowhere"], "does not exist"),
    (["--config.dataset.mask_format=x"], "config.dataset.mask_format='x'"),
    (["--config.nonsense=1"], "nonsense"),
  ):
    result = run(config, *arguments)
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and part in last
    assert "Traceback" not in result.stderr


def test_errors_that_leave_nothing_to_look_at(tmp_path):
  config = write_clean(tmp_path)
  config.method = "magic"
  with pytest.raises(ConfigError, match="config.method='magic'"):
    examination.examine(config)
  config.method = "u2pl"
  os.unlink(tmp_path / "classes.txt")
  with pytest.raises(DataError, match="class table does not exist"):
    examination.examine(config)


def test_many_problems_of_a_kind_are_shown_by_examples(tmp_path):
  config = write_clean(tmp_path)
  ids = [f"n{i}" for i in range(12)]
  data_trees.write_list(tmp_path / "unlabelled.txt", (*UNLABELLED, *ids))
  text = doctor.to_text(examination.examine(config), ())
  assert "missing_image, 12 times" in text
  assert text.count("image not found") == 5
  assert "and 7 more" in text


def test_docs_have_every_kind():
  text = (ROOT / "docs/own_data.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", text, re.MULTILINE)
  assert {kind: (severity, meaning) for kind, severity, meaning in rows} == (
    inspection.KINDS
  )


def test_statistics_of_pixels(tmp_path):
  config = write_clean(tmp_path)
  for id, value in zip(LABELLED + VALIDATION, range(5), strict=True):
    pixels = np.full((*SIZE, 3), (10 + 10 * value, 0, 7), np.uint8)
    pixels[0, 0] = 255 - value  # Different images, outside every fourth row ...
    data_trees.save(
      tmp_path / f"images/{id}.png", np.roll(pixels, (1, 1), (0, 1))
    )
  for id in UNLABELLED:
    buffer = io.BytesIO()
    pixels = np.full((*SIZE, 3), (30, 0, 7), np.uint8)
    pixels[1, 1] = sum(id.encode()) % 256
    Image.fromarray(pixels).save(buffer, format="PNG")
    (tmp_path / f"images/{id}.jpg").write_bytes(buffer.getvalue())
  diagnosis = examination.examine(config)
  assert diagnosis.problems == ()
  assert diagnosis.mean == (30.0, 0.0, 7.0)
  # Five reds 10 ... 50 and three of 30: variance 1000 / 8.
  assert diagnosis.std == pytest.approx((125**0.5, 0, 0), abs=1e-6)


def test_shards_are_read_like_files(tmp_path):
  config = data_trees.write_own(tmp_path)
  config.contrastive.low_rank, config.contrastive.high_rank = 1, 3
  from_files = examination.examine(config)
  source, ids = dataset_config.read_lists(config.dataset)
  tfds_builders.write_shards(
    source,
    sum(ids.values(), ()),
    str(tmp_path / "tfds"),
    dataset_name="folder",
    mask_format="colours",
    unlabelled_dir="more",
    unlabelled=ids["unlabelled"],
  )
  config.dataset.source = "tfds"
  from_shards = examination.examine(config)
  assert from_files.problems == from_shards.problems == ()
  assert from_shards.mean == from_files.mean
  assert from_shards.sizes == from_files.sizes
  data_trees.write_list(tmp_path / "val.txt", ["v1", "v2", "nobody"])
  assert {kind for kind, _ in found(config)} == {
    "missing_image",
    "missing_mask",
  }


@pytest.mark.parametrize(
  ("name", "unlabelled"), [("voc_1464", 9118), ("camvid_46", 321)]
)
@pytest.mark.parametrize("arg", ["", "method=supervised"])
def test_estimate_counts_the_steps_of_the_loop(name, unlabelled, arg):
  from u2pl_jax.build import DataSpec, make_recipe

  module = __import__(f"configs.{name}", fromlist=["get_config"])
  config = module.get_config(arg)
  recipe = make_recipe(config, DataSpec(21, (0,) * 3, (1,) * 3, unlabelled))
  estimate = costs.estimate(config, num_classes=21, num_unlabelled=unlabelled)
  assert estimate.steps == recipe.total_steps
  assert estimate.warmup_steps == recipe.warmup_steps
