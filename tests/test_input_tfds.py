"""Shards: what they hold is the files, and streams cannot tell them apart."""

import itertools
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorflow_datasets.core import shuffle

import input_pipeline as ip
from input_pipeline import dataset_config, tfds_builders
from tests import data_trees
from u2pl_jax import data as data_lib
from u2pl_jax.build import DataSpec, make_recipe

TREES = {
  "voc_aug": data_trees.write_voc,
  "cityscapes_trainids": data_trees.write_cityscapes,
  "folder": data_trees.write_own,
}


def write_tfds(config, *arguments):
  """Runs the command with the dataset section of a config."""
  keys = {
    key: value
    for key, value in config.dataset.items()
    if key not in ("shapes", "mean", "std")
  }
  return subprocess.run(
    [
      sys.executable,
      "scripts/write_tfds.py",
      "--config=configs/testing.py",
      *(f"--config.dataset.{key}={value}" for key, value in keys.items()),
      *arguments,
    ],
    cwd=data_trees.REPOSITORY,
    capture_output=True,
    text=True,
    timeout=100,
  )


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
  """Name of the builder -> config; files and shards, written once each."""
  configs = {}
  for name, write in TREES.items():
    root = tmp_path_factory.mktemp(name)
    configs[name] = write(root)
    result = write_tfds(configs[name])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{root}/tfds/{name}/1.0.0"]
    assert result.stderr == ""  # Over at once: no bar.
  return configs


@pytest.fixture
def own_trees(trees, tmp_path):
  """Copies that a test may break."""
  configs = {}
  for name, config in trees.items():
    shutil.copytree(config.dataset.root, tmp_path / name)
    configs[name] = config.copy_and_resolve_references()
    configs[name].dataset.root = str(tmp_path / name)
  return configs


def with_source(config, source, **keys):
  config = config.copy_and_resolve_references()
  config.dataset.source = source
  for key, value in keys.items():
    config.dataset[key] = value
  return config


def load(config):
  info = dataset_config.load_info(config.dataset)
  dataset_config.prepare_dataset(config.dataset)
  return data_lib.load_data(config, info)


def train_batches(config, data, num_batches, *, labelled):
  spec = DataSpec(data.info.num_classes, data.info.mean, data.info.std, 9)
  with data_lib.open_train_stream(
    config, data, make_recipe(config, spec), labelled=labelled, step=3
  ) as stream:
    return list(itertools.islice(stream, num_batches))


def eval_batches(config, data, ids):
  with data_lib.open_eval_stream(config, data, ids) as stream:
    return list(stream)


def assert_equal(batches_a, batches_b):
  for a, b in zip(batches_a, batches_b, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("name", TREES)
def test_batches_equal_those_of_the_files(trees, name):
  files, shards = (
    with_source(trees[name], source) for source in ("files", "tfds")
  )
  for config in (files, shards):
    config.eval.oracle_images = 2
    config.seed = 5
  data_f, data_s = load(files), load(shards)
  for part in ("labelled", "unlabelled", "validation", "oracle"):
    assert getattr(data_f, part) == getattr(data_s, part)
  assert len(data_f.oracle) == (2 if name == "voc_aug" else 0)
  for labelled in (True, False):
    assert_equal(
      train_batches(files, data_f, 5, labelled=labelled),
      train_batches(shards, data_s, 5, labelled=labelled),
    )
  for ids in (data_f.validation, data_f.oracle):
    for protocol in ("padded", "whole"):
      for config in (files, shards):
        config.eval.protocol = protocol
      if ids:
        a = eval_batches(files, data_f, ids)
        assert len(a) == -(-len(ids) // 2) and "label" in a[0]
        assert_equal(a, eval_batches(shards, data_s, ids))


def test_processes_read_shards_and_files_of_any_suffix(trees):
  batches = {}
  for source, num_workers in (("files", 2), ("tfds", 2), ("files", 0)):
    config = with_source(trees["folder"], source)
    config.input.num_workers = num_workers
    batches[source, num_workers] = train_batches(
      config, load(config), 5, labelled=False
    )
  first, *others = batches.values()
  for other in others:
    assert_equal(first, other)


def test_shards_hold_the_bytes_of_the_files(trees):
  for config in trees.values():
    files = load(config)
    shards = load(with_source(config, "tfds")).source
    for id in files.labelled + files.unlabelled + files.validation:
      assert shards.read_image(id) == files.source.read_image(id)
      assert shards.has_mask(id) == files.source.has_mask(id)
      if shards.has_mask(id):
        assert shards.read_mask(id) == files.source.read_mask(id)


def test_the_unlabelled_stream_needs_no_shard_of_masks(own_trees):
  for name, config in own_trees.items():
    config = with_source(config, "tfds")
    data = load(config)
    expected = train_batches(config, data, 4, labelled=False)
    data = load(config)
    folder = ip.shards_folder(f"{config.dataset.root}/tfds", data.info.name)
    (masks,) = pathlib.Path(folder).glob(f"{name}-masks.*")
    masks.unlink()
    assert_equal(expected, train_batches(config, data, 4, labelled=False))
    with pytest.raises(ip.DataError, match="mask .*cannot read the shard"):
      train_batches(config, data, 1, labelled=True)


def test_reading_loads_no_tensorflow(trees):
  config = trees["voc_aug"]
  code = f"""if True:
    import sys, input_pipeline as ip
    shards = ip.Shards(
      "{config.dataset.root}/tfds/voc_aug/1.0.0", mask_format="index"
    )
    ids = ["2007_000032", "2007_000039"]
    with ip.make_train_stream(
      shards, ids, ip.TrainTransform((9, 9)), batch_size=2, seed=0,
      with_labels=True, num_classes=21,
    ) as stream:
      print(next(stream)["label"].shape, "tensorflow" in sys.modules)
  """
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=data_trees.REPOSITORY,
    capture_output=True,
    text=True,
  )
  assert result.stdout.strip() == "(2, 9, 9) False", result.stderr


def test_another_split_of_the_same_images(own_trees):
  """Shards serve lists they were not written with, hidden masks included."""
  config = with_source(own_trees["voc_aug"], "tfds")
  root = pathlib.Path(config.dataset.root)
  data_trees.write_list(root / "l.txt", ["2008_000008"])
  data_trees.write_list(root / "u.txt", ["2007_000032"])
  config.dataset.labelled_list = "l.txt"
  config.dataset.unlabelled_list = "u.txt"
  for folder in ("JPEGImages", "SegmentationClassAug"):
    shutil.rmtree(root / folder)
  data = load(config)
  (batch,) = train_batches(config, data, 1, labelled=True)
  assert (batch["label"] < 21).any()


def test_an_id_taken_off_a_list_becomes_unlabelled(own_trees):
  config = own_trees["folder"]
  config.dataset.unlabelled_dir = "images"
  config.dataset.tfds_dir = "tfds2"
  root = pathlib.Path(config.dataset.root)
  data_trees.write_list(root / "labelled.txt", ["IMG 1", "IMG 2"])
  result = write_tfds(config)
  assert result.returncode == 0, result.stderr
  data_trees.write_list(root / "labelled.txt", ["IMG 1"])
  expected = load(config).unlabelled
  assert expected == ("IMG 2", "sub/c")
  assert load(with_source(config, "tfds")).unlabelled == expected


def test_order_survives_the_sorting_on_disk(tmp_path, monkeypatch):
  """Data sets above a gigabyte take another way through the writer."""
  monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
  buckets = []
  get_bucket_number = shuffle.get_bucket_number

  def record(**arguments):
    buckets.append(get_bucket_number(**arguments))
    return buckets[-1]

  monkeypatch.setattr(shuffle, "get_bucket_number", record)
  config = data_trees.write_voc(tmp_path)
  source, ids = dataset_config.read_lists(config.dataset)
  ids = sum(ids.values(), ())
  folder = tfds_builders.write_shards(
    source, ids, str(tmp_path / "out"), dataset_name="voc"
  )
  # A seventh of the range apart: no bucket is all of the data in memory.
  assert buckets == [0, 142, 285, 428, 571, 714, 857] * 2
  shards = ip.Shards(folder, mask_format="index")
  for id in ids:
    assert shards.read_image(id) == source.read_image(id)
    assert shards.read_mask(id) == source.read_mask(id)
  assert ip.image_sizes(shards, ids) == ip.image_sizes(source, ids)


def test_sizes_are_those_of_rotated_images(tmp_path):
  layout = ip.Layout(tmp_path)
  exif = Image.Exif()
  exif[0x0112] = 6
  data_trees.save(layout.mask_path("a"), np.zeros((8, 4), np.uint8))
  (tmp_path / layout.image_dir).mkdir()
  Image.new("RGB", (8, 4)).save(layout.image_path("a"), exif=exif)
  folder = tfds_builders.write_shards(
    layout, ["a"], str(tmp_path / "out"), dataset_name="camvid"
  )
  assert folder == f"{tmp_path}/out/folder/1.0.0"
  shards = ip.Shards(folder, mask_format="index")
  assert ip.image_sizes(shards, ["a"]) == [(8, 4)]
  copy = pickle.loads(pickle.dumps(shards))
  assert copy.read_image("a") == layout.read_image("a")
  assert copy.open_image("a").read(2) == b"\xff\xd8"


def test_skipping_a_bad_record_is_skipping_a_bad_file(tmp_path):
  layout, ids = ip.Layout(tmp_path), ["a", "b", "c"]
  for id in ids:
    data_trees.save(layout.image_path(id), data_trees.photo(id))
    data_trees.save(layout.mask_path(id), data_trees.labels(id, 21))
  path = pathlib.Path(layout.image_path("b"))
  path.write_bytes(path.read_bytes()[:-20])
  folder = tfds_builders.write_shards(
    layout, ids, str(tmp_path / "out"), dataset_name="voc"
  )
  batches, reasons = [], []
  for source in (layout, ip.Shards(folder, mask_format="index")):
    with ip.make_train_stream(
      source,
      ids,
      ip.TrainTransform((9, 9)),
      batch_size=3,
      seed=0,
      with_labels=True,
      num_classes=21,
      on_bad_record=lambda id, reason: reasons.append((id, reason)),
      max_bad_records=1,
    ) as stream:
      batches.append(list(itertools.islice(stream, 3)))
  assert_equal(*batches)
  assert [id for id, _ in reasons] == ["b"] * 6
  assert reasons[0][1].startswith(f"{path}: the JPEG file is truncated")
  assert reasons[3][1].startswith(f"{folder}, image b: the JPEG file is trunc")


# -- Bad input -----------------------------------------------------------------


def refused(config):
  with pytest.raises(ip.DataError) as error:
    load(config)
  message = str(error.value)
  assert "\n" not in message
  return message


def test_shards_that_are_not_there(own_trees):
  config = with_source(own_trees["voc_aug"], "tfds", tfds_dir="nowhere")
  message = refused(config)
  folder = f"{config.dataset.root}/nowhere/voc_aug/1.0.0"
  assert message.startswith(f"{folder}: there are no shards")
  assert "scripts/write_tfds.py" in message
  config = with_source(own_trees["voc_aug"], "tfds")
  folder = pathlib.Path(config.dataset.root) / "tfds/voc_aug/1.0.0"
  shard = next(folder.glob("*images*"))
  shard.rename(folder / "away")
  assert (
    f"1 of 1 shards of the images are missing, the first is {shard.name}"
    in (refused(config))
  )
  (folder / "away").rename(shard)
  (folder / "dataset_info.json").write_text("{")
  assert "cannot open the shards" in refused(config)


def test_shards_of_something_else(own_trees):
  config = with_source(own_trees["cityscapes_trainids"], "tfds")
  config.dataset.mask_format = "cityscapes_label_ids"
  message = refused(config)
  assert "'index', not dataset.mask_format='cityscapes_label_ids'" in message
  config = with_source(own_trees["folder"], "tfds", unlabelled_dir="images")
  assert "unlabelled_dir='more', not 'images'" in refused(config)
  config = with_source(own_trees["voc_aug"], "tfds")
  root = pathlib.Path(config.dataset.root)
  data_trees.write_list(root / "splits/2/unlabeled.txt", ["2008_000008", "x"])
  assert (
    "1 of 2 images of the lists are not in the shards, the first is 'x'"
    in (refused(config))
  )
  # To a run that skips bad records it is one of them.
  config.input.on_bad_record = "skip"
  assert load(config).unlabelled == ("2008_000008", "x")
  (root / "tfds/voc_aug/1.0.0/metadata.json").write_text("{}")
  assert "have no index of ids" in refused(config)


def test_shards_and_index_that_disagree(own_trees):
  config = with_source(own_trees["voc_aug"], "tfds")
  path = pathlib.Path(config.dataset.root)
  path = path / "tfds/voc_aug/1.0.0/metadata.json"
  path.write_text(path.read_text().replace("2007_000032", "2007_000031"))
  shards = ip.Shards(str(path.parent), mask_format="index")
  with pytest.raises(ip.DataError, match="holds '2007_000032' there"):
    shards.read_image("2007_000031")
  for function in (shards.read_image, shards.stored_size):
    with pytest.raises(ip.DataError, match="image 2007_000032: not in the sh"):
      function("2007_000032")


def test_a_damaged_shard(own_trees):
  config = with_source(own_trees["voc_aug"], "tfds")
  path = pathlib.Path(config.dataset.root)
  (path,) = (path / "tfds/voc_aug/1.0.0").glob("*images*")
  data = load(config)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ip.DataError, match="damaged or truncated") as error:
    train_batches(config, data, 2, labelled=False)
  assert "\n" not in str(error.value)


def test_a_failed_write_leaves_nothing(tmp_path):
  config = data_trees.write_voc(tmp_path)
  (tmp_path / "SegmentationClassAug/2011_003271.png").write_bytes(b"")
  result = write_tfds(config, f"--output={tmp_path}/out")
  assert result.returncode == 1
  assert result.stdout == ""
  last = result.stderr.splitlines()[-1]
  assert last.startswith(f"error: {tmp_path}/SegmentationClassAug/2011_003271")
  assert "the mask file is empty" in last
  assert "Traceback" not in result.stderr
  assert not list((tmp_path / "out").rglob("*.*"))


def test_an_output_that_cannot_be_written(trees, tmp_path):
  (tmp_path / "out").write_text("a file")
  result = write_tfds(trees["voc_aug"], f"--output={tmp_path}/out")
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1] == (
    f"error: {tmp_path}/out/voc_aug/1.0.0: cannot write the shards: Not a"
    " directory"
  )
  assert "Traceback" not in result.stderr


def test_writing_twice_is_refused(trees):
  result = write_tfds(trees["voc_aug"])
  assert result.returncode == 1
  assert result.stderr.startswith("error: ")
  assert "tfds/voc_aug/1.0.0: exists already" in result.stderr
  assert len(result.stderr.splitlines()) == 1


def test_nothing_but_images_to_write(tmp_path):
  layout = ip.Layout(tmp_path, image_suffix=".png")
  data_trees.save(layout.image_path("a"), np.zeros((8, 4, 3), np.uint8))
  with pytest.raises(ip.DataError, match="not one mask"):
    tfds_builders.write_shards(
      layout, ["a"], str(tmp_path / "out"), dataset_name="voc"
    )
