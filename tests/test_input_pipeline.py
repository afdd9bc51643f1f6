"""The streams: order, determinism, sharing of work, and errors that surface."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from PIL import Image

import input_pipeline as ip
from input_pipeline import decode

NUM_CLASSES = 5


def write_dataset(root, sizes):
  """Image i is noise of colour about 20 i, its mask holds class i % 5."""
  rng = np.random.default_rng(0)
  layout = ip.Layout(root, image_suffix=".png")
  for folder in (layout.image_dir, layout.mask_dir):
    (root / folder).mkdir()
  ids = [f"photo{i}" for i in range(len(sizes))]
  for i, (id, size) in enumerate(zip(ids, sizes, strict=True)):
    noise = rng.integers(0, 16, (*size, 3), np.uint8)
    Image.fromarray(noise + np.uint8(20 * i)).save(layout.image_path(id))
    mask = np.full(size, i % NUM_CLASSES, np.uint8)
    Image.fromarray(mask).save(layout.mask_path(id))
  return layout, ids


@pytest.fixture
def dataset(tmp_path):
  return write_dataset(tmp_path, [(24 + i, 32 - i) for i in range(7)])


def train_batches(dataset, num_batches, **options):
  layout, ids = dataset
  arguments = {
    "batch_size": 4,
    "seed": 1,
    "with_labels": True,
    "num_classes": NUM_CLASSES,
    "num_threads": 0,
    **options,
  }
  transform = ip.TrainTransform((16, 20))
  with ip.make_train_stream(layout, ids, transform, **arguments) as stream:
    return list(itertools.islice(stream, num_batches))


def assert_equal(batches_a, batches_b):
  for a, b in zip(batches_a, batches_b, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def indices(batches):
  return np.concatenate([batch["index"] for batch in batches])


def test_batch_has_the_promised_arrays(dataset):
  (batch,) = train_batches(dataset, 1)
  assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
    "image": ((4, 16, 20, 3), np.uint8),
    "label": ((4, 16, 20), np.uint8),
    "valid_box": ((4, 4), np.int32),
    "index": ((4,), np.int32),
  }


def test_rows_belong_to_their_index(dataset):
  for batch in train_batches(dataset, 20):
    for image, label, box, index in zip(
      batch["image"],
      batch["label"],
      batch["valid_box"],
      batch["index"],
      strict=True,
    ):
      top, left, bottom, right = box
      inside = np.zeros(label.shape, bool)
      inside[top:bottom, left:right] = True
      assert image[inside].min() >= 20 * index
      assert image[inside].max() < 20 * index + 16
      assert (image[~inside] == 0).all()
      np.testing.assert_array_equal(
        label, np.where(inside, index % NUM_CLASSES, 255)
      )


def test_every_pass_is_a_fresh_permutation_without_gaps(dataset):
  order = indices(train_batches(dataset, 7 * 20)).reshape(-1, 7)
  np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(7), (80, 1)))
  assert len({tuple(one_pass) for one_pass in order}) > 70


def test_another_pass_draws_other_crops(dataset):
  layout, _ = dataset
  batches = train_batches((layout, ["photo1"]), 8, batch_size=1)
  assert len({batch["image"].tobytes() for batch in batches}) == 8


@pytest.mark.parametrize("num_ids", [1, 3])
def test_fewer_ids_than_rows(dataset, num_ids):
  layout, ids = dataset
  batches = train_batches((layout, ids[:num_ids]), 3, batch_size=8)
  order = indices(batches)[: 24 // num_ids * num_ids].reshape(-1, num_ids)
  np.testing.assert_array_equal(
    np.sort(order), np.tile(np.arange(num_ids), (len(order), 1))
  )


def test_seed_decides_order_and_crops(dataset):
  a = train_batches(dataset, 6)
  assert_equal(a, train_batches(dataset, 6))
  b = train_batches(dataset, 6, seed=2)
  assert (indices(a) != indices(b)).any()
  layout, _ = dataset
  one = (layout, ["photo1"])
  (a,) = train_batches(one, 1, batch_size=1)
  (b,) = train_batches(one, 1, batch_size=1, seed=2)
  assert (a["image"] != b["image"]).any()


@pytest.mark.parametrize("start_batch", [1, 5, 9])
def test_starting_late_equals_iterating_there(dataset, start_batch):
  whole = train_batches(dataset, 12)
  late = train_batches(dataset, 12 - start_batch, start_batch=start_batch)
  assert_equal(whole[start_batch:], late)


@pytest.mark.parametrize(
  "options",
  [
    {"num_threads": 4, "prefetch": 1},
    {"num_threads": 1, "prefetch": 6},
    {"num_workers": 2, "num_threads": 2, "start_batch": 3},
  ],
)
def test_threads_and_processes_do_not_change_the_batches(dataset, options):
  start = options.get("start_batch", 0)
  assert_equal(
    train_batches(dataset, 9)[start:],
    train_batches(dataset, 9 - start, **options),
  )


def test_batches_of_processes_are_ordinary_arrays(dataset):
  (batch,) = train_batches(dataset, 1, num_workers=1)
  # Shared memory would end with the iterator, under a device that reads it.
  assert {type(value) for value in batch.values()} == {np.ndarray}
  assert all(value.base is None for value in batch.values())


@pytest.mark.parametrize("shard_count", [2, 4])
def test_shards_put_together_are_the_whole(dataset, shard_count):
  whole = train_batches(dataset, 5, start_batch=2)
  shards = [
    train_batches(
      dataset, 5, start_batch=2, shard_index=i, shard_count=shard_count
    )
    for i in range(shard_count)
  ]
  together = [
    {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for parts in zip(*shards, strict=True)
  ]
  assert_equal(whole, together)


def test_a_shard_decodes_its_own_rows_only(dataset, monkeypatch):
  decoded = []
  decode_pair = decode.decode_pair

  def counting(layout, id, **options):
    decoded.append(id)
    return decode_pair(layout, id, **options)

  monkeypatch.setattr(decode, "decode_pair", counting)
  batches = train_batches(dataset, 3, shard_index=1, shard_count=2)
  assert decoded == [f"photo{i}" for i in indices(batches)]
  assert len(decoded) == 6


def test_unlabelled_stream_never_needs_a_mask(dataset):
  layout, _ = dataset
  labelled = train_batches(dataset, 4)
  shutil.rmtree(layout.root / layout.mask_dir)
  unlabelled = train_batches(dataset, 4, with_labels=False)
  assert "label" not in unlabelled[0]
  for batch in labelled:
    del batch["label"]
  assert_equal(labelled, unlabelled)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_surface_in_order_as_one_line(dataset, num_workers):
  layout, ids = dataset
  order = indices(train_batches(dataset, 2))
  bad = order[4]  # first row of the second batch, if not in the first
  ids = [id for i, id in enumerate(ids) if i == bad or i in order[:4]]
  dataset = layout, ids
  batches = indices(train_batches(dataset, 3)).reshape(3, 4)
  bad = next(i for i in range(len(ids)) if i not in batches[0])
  path = layout.mask_path(ids[bad])
  Image.new("RGB", (8, 8)).save(path)
  stream = ip.make_train_stream(
    layout,
    ids,
    ip.TrainTransform((16, 20)),
    batch_size=4,
    seed=1,
    with_labels=True,
    num_classes=NUM_CLASSES,
    num_workers=num_workers,
    num_threads=2,
  )
  np.testing.assert_array_equal(next(stream)["index"], batches[0])
  with pytest.raises(ip.DataError) as error:
    for _ in range(2):
      next(stream)
  assert str(error.value).startswith(f"{path}: the mask holds colours (RGB)")
  assert "\n" not in str(error.value)
  assert error.value.__cause__ is None and error.value.__context__ is None
  with pytest.raises(ValueError, match="closed"):
    next(stream)


def grain_threads():
  return [t for t in threading.enumerate() if t.name.startswith("grain")]


def test_close_stops_the_threads(dataset):
  layout, ids = dataset
  stream = ip.make_eval_stream(
    layout, ids, batch_size=1, num_classes=NUM_CLASSES, num_threads=2
  )
  next(stream)
  assert grain_threads()
  stream.close()
  stream.close()
  deadline = time.monotonic() + 10
  while grain_threads() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not grain_threads()


SCRIPT = """
  import multiprocessing, os, sys
  import input_pipeline as ip

  class Transform(ip.TrainTransform):
    def __call__(self, image, mask, rng):
      bridge = sys.modules.get("jax._src.xla_bridge")
      if bridge is not None and bridge._backends:
        raise ip.DataError("a worker initialised a JAX backend")
      return super().__call__(image, mask, rng)

  if __name__ == "__main__":
    stream = ip.make_train_stream(
      ip.Layout(sys.argv[1], image_suffix=".png"),
      ["photo0", "photo1", "photo2"],
      Transform((16, 16)),
      batch_size=2,
      seed=0,
      with_labels=True,
      num_classes=5,
      num_workers=2,
      num_threads=1,
    )
    kept = [next(stream) for _ in range(5)]
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "kill":
      os.kill(os.getpid(), 9)
"""


SIGTERM_SCRIPT = """
  import itertools, os, pathlib, signal, sys, threading, time
  import input_pipeline as ip

  def terminate():
    # Before, while and after the workers start.
    while not stop.wait(0.01):
      os.killpg(0, signal.SIGTERM)

  if __name__ == "__main__":
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    stop = threading.Event()
    thread = threading.Thread(target=terminate)
    thread.start()
    stream = ip.make_train_stream(
      ip.Layout(sys.argv[1], image_suffix=".png"),
      ["photo0", "photo1", "photo2"],
      ip.TrainTransform((16, 16)),
      batch_size=2,
      seed=0,
      with_labels=True,
      num_classes=5,
      num_workers=2,
      num_threads=1,
    )
    with stream:
      kept = list(itertools.islice(stream, 50))
      stop.set()
      thread.join()
    before = len(heard)
    os.kill(os.getpid(), signal.SIGTERM)
    print(len(kept), before > 10, len(heard) - before)
"""


def test_sigterm_to_the_whole_group_ends_no_worker(dataset, tmp_path):
  script = tmp_path / "script.py"
  script.write_text(textwrap.dedent(SIGTERM_SCRIPT))
  result = subprocess.run(
    [sys.executable, str(script), str(dataset[0].root)],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)},
    start_new_session=True,
  )
  assert result.stderr == ""
  assert result.returncode == 0
  # All batches; the process itself heard it, and goes on hearing it.
  assert result.stdout.split() == ["50", "True", "1"]


@pytest.mark.parametrize("how", ["leave", "kill"])
def test_a_process_that_ends_takes_its_workers_with_it(dataset, tmp_path, how):
  script = tmp_path / "script.py"
  script.write_text(textwrap.dedent(SCRIPT))
  result = subprocess.run(
    [sys.executable, str(script), str(dataset[0].root), how],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)},
  )
  if how == "leave":
    # The stream was never closed; nothing may be said about that.
    assert result.stderr == ""
    assert result.returncode == 0
  else:
    assert result.returncode == -signal.SIGKILL
  pids = [int(pid) for pid in result.stdout.split()]
  assert len(pids) == 2
  deadline = time.monotonic() + 20
  while any(map(is_running, pids)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(is_running, pids))


def is_running(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  try:
    # Where nobody collects orphans, an ended one stays as a zombie.
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False


@pytest.mark.parametrize(
  ("options", "word"),
  [
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": 4, "shard_count": 3}, "multiple of shard_count"),
    ({"shard_index": 2, "shard_count": 2}, "shard_index"),
    ({"seed": -1}, "seed"),
    ({"start_batch": -1}, "start_batch"),
  ],
)
def test_bad_arguments_are_refused(dataset, options, word):
  with pytest.raises(ValueError, match=word):
    train_batches(dataset, 1, **options)


def test_no_ids(dataset):
  with pytest.raises(ip.DataError, match="empty"):
    train_batches((dataset[0], []), 1)
  with pytest.raises(ip.DataError, match="empty"):
    eval_batches((dataset[0], []))


def eval_batches(dataset, **options):
  layout, ids = dataset
  arguments = {"batch_size": 3, "num_classes": NUM_CLASSES, **options}
  with ip.make_eval_stream(layout, ids, **arguments) as stream:
    return list(stream)


def assert_rows_are_the_images(dataset, batches):
  """Every row shows its whole image, padding after it."""
  layout, ids = dataset
  for batch in batches:
    for row, index in enumerate(batch["index"]):
      photo = ip.decode_image(layout.image_path(ids[index]))
      h, w = photo.shape[:2]
      assert batch["valid_box"][row].tolist() == [0, 0, h, w]
      image = batch["image"][row]
      np.testing.assert_array_equal(image[:h, :w], photo)
      assert not image[h:].any() and not image[:, w:].any()
      expected = np.full(image.shape[:2], 255)
      if batch["is_real"][row]:
        expected[:h, :w] = index % NUM_CLASSES
      np.testing.assert_array_equal(batch["label"][row], expected)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_eval_pads_and_shows_each_image_once_in_order(dataset, num_threads):
  batches = eval_batches(dataset, pad_to=(31, 33), num_threads=num_threads)
  assert {k: (v.shape, v.dtype) for k, v in batches[0].items()} == {
    "image": ((3, 31, 33, 3), np.uint8),
    "label": ((3, 31, 33), np.uint8),
    "valid_box": ((3, 4), np.int32),
    "index": ((3,), np.int32),
    "is_real": ((3,), np.bool_),
  }
  # 7 images in batches of 3: the last image is repeated twice, not real.
  assert indices(batches).tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 6]
  is_real = np.concatenate([batch["is_real"] for batch in batches])
  assert is_real.tolist() == [True] * 7 + [False] * 2
  assert_rows_are_the_images(dataset, batches)


def test_eval_batches_equal_sizes_together(tmp_path):
  a, b, c = (20, 30), (30, 20), (8, 8)
  dataset = write_dataset(tmp_path, [a, b, a, a, b, c, a])
  batches = eval_batches(dataset)
  assert [batch["index"].tolist() for batch in batches] == [
    [0, 2, 3],
    [6, 6, 6],
    [1, 4, 4],
    [5, 5, 5],
  ]
  assert [batch["is_real"].tolist() for batch in batches] == [
    [True, True, True],
    [True, False, False],
    [True, True, False],
    [True, False, False],
  ]
  assert [batch["image"].shape[1:3] for batch in batches] == [a, a, b, c]
  assert_rows_are_the_images(dataset, batches)


def test_eval_without_labels_never_needs_a_mask(dataset):
  layout, _ = dataset
  shutil.rmtree(layout.root / layout.mask_dir)
  batches = eval_batches(dataset, with_labels=False, pad_to=(40, 40))
  assert "label" not in batches[0]
  assert indices(batches)[:7].tolist() == list(range(7))


def test_eval_image_larger_than_pad_to(dataset):
  layout, ids = dataset
  with pytest.raises(ip.DataError) as error:
    eval_batches(dataset, pad_to=(28, 40))
  message = str(error.value)
  assert message.startswith(layout.image_path(ids[5]))  # 29 x 27
  assert "29x27" in message and "eval.pad_to 28x40" in message


def test_eval_errors_surface(dataset):
  layout, ids = dataset
  path = layout.mask_path(ids[4])
  os.remove(path)
  with pytest.raises(ip.DataError, match="mask not found") as error:
    eval_batches(dataset, pad_to=(40, 40))
  assert str(error.value).startswith(path)


def test_eval_image_that_outgrew_its_header(dataset, monkeypatch):
  monkeypatch.setattr(
    decode, "image_sizes", lambda layout, ids: [(8, 8)] * len(ids)
  )
  with pytest.raises(ip.DataError, match="24x32 .*not what its header says"):
    eval_batches(dataset)


def test_center_crop_by_hand(tmp_path):
  """3x7 into 5x4: a row of padding above and below, columns 1 to 4 of 7."""
  layout = ip.Layout(tmp_path, image_suffix=".png")
  for folder in (layout.image_dir, layout.mask_dir):
    (tmp_path / folder).mkdir()
  mask = np.arange(21, dtype=np.uint8).reshape(3, 7)
  Image.fromarray(np.stack([mask] * 3, -1)).save(layout.image_path("a"))
  Image.fromarray(mask).save(layout.mask_path("a"))
  options = {"batch_size": 1, "num_classes": 21, "center_crop": True}
  with ip.make_eval_stream(layout, ["a"], pad_to=(5, 4), **options) as stream:
    (batch,) = stream
  assert batch["valid_box"].tolist() == [[1, 0, 4, 4]]
  np.testing.assert_array_equal(batch["label"][0, 1:4], mask[:, 1:5])
  np.testing.assert_array_equal(batch["image"][0, 1:4, :, 0], mask[:, 1:5])
  assert (batch["label"][0, [0, 4]] == 255).all()
  assert not batch["image"][0, [0, 4]].any()
  with pytest.raises(ValueError, match="center_crop"):
    ip.make_eval_stream(layout, ["a"], **options)


def test_windows_are_batched_by_how_many_cover_the_image(tmp_path):
  # Windows of 10x8 every 6 and 5 pixels: one window high up to 10 pixels, two
  # up to 16; one wide up to 8, two up to 13, three up to 18.
  sizes = [(10, 8), (11, 13), (16, 9), (4, 18), (7, 5)]
  layout, ids = write_dataset(tmp_path, sizes)
  options = {"batch_size": 2, "window": (10, 8), "stride": (6, 5)}
  batches = eval_batches((layout, ids), **options)
  assert [batch["label"].shape for batch in batches] == [
    (2, 10, 8),
    (2, 16, 13),
    (2, 10, 18),
  ]
  assert [batch["index"].tolist() for batch in batches] == [
    [0, 4],
    [1, 2],
    [3, 3],
  ]
  boxes = {
    index: box.tolist()
    for batch in batches
    for index, box in zip(batch["index"], batch["valid_box"], strict=True)
  }
  # In the middle of a window that is larger, rounded up and to the left.
  assert boxes == {
    0: [0, 0, 10, 8],
    1: [0, 0, 11, 13],
    2: [0, 0, 16, 9],
    3: [3, 0, 7, 18],
    4: [1, 1, 8, 6],
  }
  photo = ip.decode_image(layout.image_path(ids[4]))
  np.testing.assert_array_equal(batches[0]["image"][1, 1:8, 1:6], photo)
  for unfit in ({"pad_to": (20, 20)}, {"stride": None}):
    with pytest.raises(ValueError, match="window and stride"):
      eval_batches((layout, ids), **options | unfit)


def test_few_images_of_a_size_make_a_small_batch(tmp_path):
  a, b = (8, 9), (9, 8)
  dataset = write_dataset(tmp_path, [a, a, a, a, a, a, b])
  batches = eval_batches(dataset, batch_size=4, row_multiple=2)
  assert [batch["index"].tolist() for batch in batches] == [
    [0, 1, 2, 3],
    [4, 5, 5, 5],
    [6, 6],
  ]
  assert batches[2]["is_real"].tolist() == [True, False]
  assert_rows_are_the_images(dataset, batches)
