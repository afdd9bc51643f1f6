"""The procedural world: deterministic images, and a data set written whole."""

import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from input_pipeline import dataset_info, decode, errors, shapes, sources, splits

WORLD = shapes.World()
COUNTS = {
  "num_labelled": 12,
  "num_unlabelled": 20,
  "num_val": 5,
  "num_test": 4,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "deep" / "shapes"
  shapes.write_dataset(path, WORLD, **COUNTS)
  return path


@pytest.fixture(scope="module")
def masks():
  return np.stack([shapes.render(WORLD, i)[1] for i in range(500)])


def read(root, name):
  return splits.read_split(root / name)


def test_render_is_pinned():
  image, mask = shapes.render(WORLD, 12)
  assert image.shape == (64, 64, 3) and image.dtype == np.uint8
  assert mask.shape == (64, 64) and mask.dtype == np.uint8
  digest = hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()
  # The numbers in the README belong to these pixels. Whoever changes them on
  # purpose raises shapes._FORMAT and measures again.
  assert digest[:16] == "440274f6645b1c0a"


def test_render_depends_on_world_and_index_only():
  first = shapes.render(WORLD, 3)
  shapes.render(shapes.World(image_size=32, style="pretrain"), 4)
  for a, b in zip(first, shapes.render(shapes.World(), 3), strict=True):
    np.testing.assert_array_equal(a, b)
  for world, index in (
    (WORLD, 4),
    (shapes.World(seed=1), 3),
    (shapes.World(style="pretrain"), 3),
  ):
    assert (shapes.render(world, index)[0] != first[0]).mean() > 0.5


@pytest.mark.parametrize("size", [8, 33, 128])
@pytest.mark.parametrize("style", ["target", "pretrain"])
def test_render_at_other_sizes(size, style):
  world = shapes.World(image_size=size, style=style, num_classes=6)
  masks = [shapes.render(world, i)[1] for i in range(10)]
  assert masks[0].shape == (size, size)
  assert max(mask.max() for mask in masks) <= 5


def test_image_grows_with_its_size():
  small, large = (
    shapes.render(shapes.World(image_size=size), 5)[1] for size in (64, 128)
  )
  assert (small == large[::2, ::2]).mean() > 0.95


def test_class_frequencies(masks):
  in_image = [(masks == k).any((1, 2)).mean() for k in range(7)]
  assert in_image[0] == 1.0
  assert all(0.4 < share < 0.6 for share in in_image[1:6])
  assert 0.10 < in_image[6] < 0.20
  pixels = np.bincount(masks.ravel(), minlength=7) / masks.size
  assert 0.5 < pixels[0] < 0.75
  assert pixels[1:6].min() > 0.04
  assert pixels[6] < 0.015


def test_rare_class_can_be_left_out():
  world = shapes.World(rare_probability=0.0, num_classes=4)
  masks = [shapes.render(world, i)[1] for i in range(40)]
  assert set(np.unique(masks)) == {0, 1, 2}


def test_pixel_statistics():
  pixels = np.stack([shapes.render(WORLD, i)[0] for i in range(300)])
  np.testing.assert_allclose(
    pixels.mean((0, 1, 2)), dataset_info("shapes").mean, atol=4
  )
  np.testing.assert_allclose(
    pixels.std((0, 1, 2)), dataset_info("shapes").std, atol=3
  )
  assert len(shapes.PALETTE) == len(shapes.CLASS_NAMES) == WORLD.num_classes
  assert len(set(shapes.PALETTE)) == WORLD.num_classes


@pytest.mark.parametrize(
  "change",
  [
    {"image_size": 4},
    {"num_classes": 2},
    {"num_classes": 8},
    {"variety": -0.1},
    {"rare_probability": 1.5},
    {"noise": -1.0},
    {"style": "voc"},
    {"seed": -1},
  ],
)
def test_impossible_worlds(change):
  (name,) = change
  with pytest.raises(ValueError, match=name):
    shapes.World(**change)


def test_lists(root):
  labelled = read(root, "splits/12/labeled.txt")
  unlabelled = read(root, "splits/12/unlabeled.txt")
  train = read(root, "ImageSets/Segmentation/train.txt")
  val = read(root, "ImageSets/Segmentation/val.txt")
  test = read(root, "ImageSets/Segmentation/test.txt")
  assert [len(x) for x in (labelled, unlabelled, val, test)] == [12, 20, 5, 4]
  assert sorted(labelled + unlabelled) == list(train)
  assert len({*train, *val, *test}) == 12 + 20 + 5 + 4
  splits.check_splits({"l": labelled, "u": unlabelled, "v": val})
  layout = sources.Layout(root, image_suffix=shapes.IMAGE_SUFFIX)
  sources.check_files(layout, (*train, *val, *test), masks=True)


def test_files_hold_what_render_draws(root):
  layout = sources.Layout(root, image_suffix=shapes.IMAGE_SUFFIX)
  for id, index in (("train_000003", 3), ("val_000001", 1_000_001)):
    image, mask = shapes.render(WORLD, index)
    np.testing.assert_array_equal(
      decode.decode_image(layout.image_path(id)), image
    )
    np.testing.assert_array_equal(
      decode.decode_mask(layout.mask_path(id), num_classes=7, ignore_label=255),
      mask,
    )
    with Image.open(layout.mask_path(id)) as file:
      assert file.mode == "P"
      palette = np.reshape(file.getpalette()[:21], (7, 3))
    np.testing.assert_array_equal(palette, shapes.PALETTE)


@pytest.mark.parametrize("num_labelled", [3, 4, 12, 24])
def test_every_class_is_labelled(num_labelled):
  labelled, unlabelled = shapes._choose(WORLD, num_labelled, 50)
  assert len(set(labelled)) == num_labelled
  assert len(unlabelled) == 50 and not set(labelled) & set(unlabelled)
  masks = [shapes.render(WORLD, i)[1] for i in labelled]
  counts = [sum(k in mask for mask in masks) for k in range(7)]
  assert min(counts) >= (2 if num_labelled >= 6 else 1)


def test_too_few_labelled_images(tmp_path):
  with pytest.raises(errors.DataError, match="ask for at least 3"):
    shapes.write_dataset(
      tmp_path / "x", WORLD, num_labelled=2, num_unlabelled=1, num_val=1
    )
  assert not os.listdir(tmp_path)


def test_validation_images_do_not_depend_on_the_training_set(root, tmp_path):
  shapes.write_dataset(
    tmp_path / "x", WORLD, num_labelled=3, num_unlabelled=2, num_val=2
  )
  name = "JPEGImages/val_000001.png"
  assert (tmp_path / "x" / name).read_bytes() == (root / name).read_bytes()
  assert not (tmp_path / "x/ImageSets/Segmentation/test.txt").exists()


def test_ensure_returns_at_once_when_complete(root, monkeypatch):
  monkeypatch.setattr(shapes, "render", None)
  before = (root / "world.json").stat().st_mtime_ns
  shapes.ensure_dataset(root, shapes.World(), **COUNTS)
  assert (root / "world.json").stat().st_mtime_ns == before
  assert json.loads((root / "world.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_val": 6}, "num_val=5, asked for 6.*delete the folder"),
    ({"world": shapes.World(seed=3)}, "seed=0, asked for 3.*dataset.root"),
  ],
)
def test_ensure_refuses_another_data_set(root, change, message):
  arguments = {"world": WORLD, **COUNTS, **change}
  with pytest.raises(errors.DataError, match=message):
    shapes.ensure_dataset(root, **arguments)


def test_nothing_is_overwritten(tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(errors.DataError, match="not an empty folder"):
    shapes.ensure_dataset(tmp_path, WORLD, **COUNTS)
  file = tmp_path / "thesis.tex"
  with pytest.raises(errors.DataError, match="not an empty folder"):
    shapes.ensure_dataset(file, WORLD, **COUNTS)
  assert file.read_text() == "years of work"
  assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_empty_folder_is_used(tmp_path):
  counts = {"num_labelled": 3, "num_unlabelled": 1, "num_val": 1}
  shapes.ensure_dataset(tmp_path, WORLD, **counts)
  shapes.ensure_dataset(tmp_path, WORLD, **counts)
  assert (tmp_path / "world.json").exists()


def test_an_interrupted_write_leaves_no_data_set(tmp_path, monkeypatch):
  write_pair, written = shapes._write_pair, []

  def interrupted(folder, world, id):
    if len(written) == 7:
      raise KeyboardInterrupt
    written.append(id)
    write_pair(folder, world, id)

  monkeypatch.setattr(shapes, "_write_pair", interrupted)
  with pytest.raises(KeyboardInterrupt):
    shapes.write_dataset(tmp_path / "x", WORLD, **COUNTS)
  assert len(written) == 7 and not os.listdir(tmp_path)
  monkeypatch.setattr(shapes, "_write_pair", write_pair)
  shapes.ensure_dataset(tmp_path / "x", WORLD, **COUNTS)


def test_two_writers_at_once(root, tmp_path, monkeypatch):
  counts = {"num_labelled": 3, "num_unlabelled": 1, "num_val": 1}
  put_in_place = shapes._put_in_place

  def overtaken(temporary, root, description):
    monkeypatch.setattr(shapes, "_put_in_place", put_in_place)
    shapes.write_dataset(tmp_path / "x", WORLD, **counts)
    put_in_place(temporary, root, description)

  monkeypatch.setattr(shapes, "_put_in_place", overtaken)
  shapes.write_dataset(tmp_path / "x", WORLD, **counts)
  assert os.listdir(tmp_path) == ["x"]


def test_damaged_description(tmp_path):
  (tmp_path / "world.json").write_text("{")
  with pytest.raises(errors.DataError, match="world.json: cannot be read"):
    shapes.ensure_dataset(tmp_path, WORLD, **COUNTS)


def test_unwritable_folder():
  # /proc is read only for everybody, root included.
  path = pathlib.Path("/proc/shapes")
  if not path.parent.is_dir():
    pytest.skip("no /proc here")
  with pytest.raises(errors.DataError, match="dataset.root"):
    shapes.ensure_dataset(path, WORLD, **COUNTS)
