"""From a config to batches, on small trees in the form of real data sets."""

import itertools
import shutil

import numpy as np
import pytest

from input_pipeline import DataError, dataset_config, dataset_info, storage
from tests import data_trees
from u2pl_jax import data as data_lib
from u2pl_jax.build import DataSpec, make_recipe
from u2pl_jax.config_checks import ConfigError, check_config

TREES = {
  "voc": data_trees.write_voc,
  "cityscapes": data_trees.write_cityscapes,
  "folder": data_trees.write_own,
}


def load(config):
  info = dataset_config.load_info(config.dataset)
  dataset_config.prepare_dataset(config.dataset)
  return data_lib.load_data(config, info)


def refused(config, error=DataError):
  with pytest.raises(error) as caught:
    load(config)
  message = str(caught.value)
  assert "\n" not in message
  return message


def train_batches(config, data, num_batches, *, labelled):
  spec = DataSpec(data.info.num_classes, data.info.mean, data.info.std, 9)
  recipe = make_recipe(config, spec)
  with data_lib.open_train_stream(
    config, data, recipe, labelled=labelled, step=0
  ) as stream:
    return list(itertools.islice(stream, num_batches))


def validation_batches(config, data):
  with data_lib.open_eval_stream(config, data, data.validation) as stream:
    return list(stream)


@pytest.mark.parametrize("name", TREES)
def test_validation_shows_the_drawn_labels(tmp_path, name):
  config = TREES[name](tmp_path)
  data = load(config)
  assert data.info.name == name
  h, w = data_trees.SIZE
  seen = []
  for batch in validation_batches(config, data):
    for row, index in enumerate(batch["index"]):
      if not batch["is_real"][row]:
        continue
      id = data.validation[index]
      seen.append(id)
      drawn = data_trees.labels(id, data.info.num_classes)
      np.testing.assert_array_equal(batch["label"][row, :h, :w], drawn)
      assert (batch["label"][row, h:] == 255).all()
      image = batch["image"][row, :h, :w].astype(int)
      assert np.abs(image - data_trees.photo(id)).mean() < 8
  assert seen == list(data.validation)


def test_cityscapes_label_ids_give_the_same_batches(tmp_path):
  config = data_trees.write_cityscapes(tmp_path)
  data = load(config)
  assert data.labelled == (
    "train/ulm/ulm_000000_000019",
    "train/ulm/ulm_000001_000019",
  )
  other = config.copy_and_resolve_references()
  other.dataset.mask_format = "cityscapes_label_ids"
  other.dataset.mask_suffix = "_gtFine_labelIds.png"
  for a, b in [
    (validation_batches(config, data), validation_batches(other, load(other))),
    (
      train_batches(config, data, 4, labelled=True),
      train_batches(other, load(other), 4, labelled=True),
    ),
  ]:
    for batch_a, batch_b in zip(a, b, strict=True):
      for key in batch_a:
        np.testing.assert_array_equal(batch_a[key], batch_b[key])
  other.dataset.mask_format = "index"
  with pytest.raises(DataError, match="dataset.mask_format"):
    validation_batches(other, load(other))


def test_own_folder_is_read_from_its_config_alone(tmp_path):
  config = data_trees.write_own(tmp_path)
  data = load(config)
  assert data.labelled == ("IMG 1", "IMG 2", "sub/c")
  assert data.unlabelled == ("day 2/u3", "u1", "u2")
  assert data.info.class_names == ("ground", "red coin", "sky")
  assert data.info.palette == tuple(data_trees.OWN_COLOURS.values())
  assert data.info.mean == dataset_info("voc").mean
  config.dataset.mean = (1, 2.5, 3)
  config.dataset.std = (4, 5, 6)
  info = dataset_config.load_info(config.dataset)
  assert (info.mean, info.std) == ((1.0, 2.5, 3.0), (4.0, 5.0, 6.0))


@pytest.mark.parametrize("name", TREES)
def test_no_mask_of_an_unlabelled_image_is_opened(tmp_path, name, monkeypatch):
  config = TREES[name](tmp_path)
  opened = []
  open_file = storage.open_file

  def record(path):
    opened.append(str(path))
    return open_file(path)

  monkeypatch.setattr(storage, "open_file", record)
  data = load(config)
  batches = train_batches(config, data, 6, labelled=False)
  assert "label" not in batches[0]
  masks = f"{tmp_path}/{config.dataset.mask_dir}/"
  assert len([path for path in opened if path.startswith(masks)]) == 0
  assert {data.source.image_path(id) for id in data.unlabelled} < set(opened)
  train_batches(config, data, 1, labelled=True)
  assert len([path for path in opened if path.startswith(masks)]) >= 2
  shutil.rmtree(masks)
  again = train_batches(config, data, 6, labelled=False)
  for a, b in zip(batches, again, strict=True):
    np.testing.assert_array_equal(a["image"], b["image"])


def test_oracle_finds_the_hidden_masks_of_voc(tmp_path):
  config = data_trees.write_voc(tmp_path)
  config.eval.oracle_images = 1
  assert load(config).oracle == ("2008_000008",)


def test_oracle_finds_nothing_in_an_own_folder(tmp_path):
  config = data_trees.write_own(tmp_path)
  config.eval.oracle_images = 5
  assert load(config).oracle == ()


# -- Bad input -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("key", "value", "parts"),
  [
    ("mask_format", "color", ("mask_format='color'", "index, city")),
    ("source", "s3", ("source='s3'", "files, tfds")),
    ("labelled_list", "", ("labelled_list=''",)),
    ("validation_list", "", ("validation_list=''",)),
    ("unlabelled_list", "u.txt", ("'u.txt'", "unlabelled_dir='more'")),
    ("unlabelled_dir", "", ("unlabelled_list=''", "unlabelled_dir=''")),
    ("classes_file", "", ("classes_file=''", "'folder'")),
    ("name", "voc", ("classes_file='classes.txt'", "name='voc'")),
    ("mean", (1, 2), ("mean=(1, 2)", "red, green and blue")),
    ("std", (1, 2, 300), ("std=(1, 2, 300)", "0 to 255")),
    ("std", (1, 0, 3), ("std=(1, 0, 3)", "positive")),
  ],
)
def test_keys_that_cannot_work(tmp_path, key, value, parts):
  config = data_trees.write_own(tmp_path)
  config.dataset[key] = value
  message = refused(config, ConfigError)
  assert message.startswith("config.dataset.")
  for part in parts:
    assert part in message


@pytest.mark.parametrize(
  ("key", "value", "part"),
  [
    ("ignore_label", 2, "ignore_label=2: must be none of the class ids 0 to 2"),
    ("ignore_label", 256, "ignore_label=256"),
    ("mask_format", "cityscapes_label_ids", "has 3: choose"),
  ],
)
def test_labels_that_do_not_fit_the_classes(tmp_path, key, value, part):
  config = data_trees.write_own(tmp_path)
  config.dataset[key] = value
  with pytest.raises(ConfigError) as error:
    check_config(config, num_classes=3, num_devices=1)
  assert part in str(error.value) and "\n" not in str(error.value)


def test_own_folder_without_its_parts(tmp_path):
  config = data_trees.write_own(tmp_path)
  for name, part in [
    ("more", "more: the folder of the unlabelled images does not exist"),
    ("val.txt", "val.txt: the split file does not exist"),
    ("masks", "masks: the folder does not exist"),
    ("classes.txt", "classes.txt: the class table does not exist"),
  ]:
    (tmp_path / name).rename(tmp_path / "away")
    assert refused(config).startswith(f"{tmp_path}/{part}")
    (tmp_path / "away").rename(tmp_path / name)
  load(config)


def test_missing_own_folder_says_what_belongs_there(tmp_path):
  config = data_trees.write_own(tmp_path)
  shutil.rmtree(tmp_path / "masks")
  message = refused(config)
  for part in (
    "'folder' needs",
    "images/<id>.*, masks/<id>.png,",
    "the images in more/",
  ):
    assert part in message


def test_colour_masks_need_the_colours_of_the_classes(tmp_path):
  config = data_trees.write_own(tmp_path)
  (tmp_path / "classes.txt").write_text("ground\nred coin\nsky")
  assert "classes.txt, line 1: the class has no colour" in refused(config)


def test_colour_of_no_class_stops_the_stream(tmp_path):
  config = data_trees.write_own(tmp_path)
  pixels = np.full((*data_trees.SIZE, 3), 10, np.uint8)
  data_trees.save(tmp_path / "masks/v2.png", pixels)
  data = load(config)
  with pytest.raises(DataError, match="masks/v2.png: colour .10, 10, 10. in"):
    validation_batches(config, data)


def test_unknown_data_set(tmp_path):
  config = data_trees.write_voc(tmp_path)
  config.dataset.name = "vok"
  assert "cityscapes, shapes, voc, and 'folder' for your own" in refused(config)


def test_list_of_paths_in_another_folder(tmp_path):
  """An absolute list, as for lists that are kept apart from the images."""
  config = data_trees.write_voc(tmp_path / "data")
  (tmp_path / "data/splits").rename(tmp_path / "splits")
  for part in ("labelled", "unlabelled", "validation"):
    key = f"{part}_list"
    config.dataset[key] = str(tmp_path / config.dataset[key])
  assert load(config).labelled == ("2007_000032", "2007_000039")
