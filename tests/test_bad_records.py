"""Bad records: what takes their place, who hears of it, and where it ends."""

import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import input_pipeline as ip
from configs import testing
from input_pipeline import DataError, dataset_info
from tests import data_trees
from u2pl_jax import bad_records, judging, train, writers
from u2pl_jax import data as data_lib
from u2pl_jax.bad_records import BadRecords
from u2pl_jax.build import DataSpec, abstract_state, build
from u2pl_jax.checkpoint import FOLDER, read_checkpoint
from u2pl_jax.clock import StallWarning
from u2pl_jax.report_data import Reporter

NUM_IMAGES, NUM_CLASSES = 7, 5
IDS = [f"photo{i}" for i in range(NUM_IMAGES)]


# -- Streams -------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path):
  """Image i is 20 i all over, its mask class i % 5; all have one size."""
  layout = ip.Layout(tmp_path, image_suffix=".png")
  for i, id in enumerate(IDS):
    image = np.full((24, 32, 3), 20 * i, np.uint8)
    data_trees.save(layout.image_path(id), image)
    mask = np.full((24, 32), i % NUM_CLASSES, np.uint8)
    data_trees.save(layout.mask_path(id), mask)
  return layout


def truncate(path):
  path = pathlib.Path(path)
  path.write_bytes(path.read_bytes()[:-30])


def remove(path):
  pathlib.Path(path).unlink()


def empty(path):
  pathlib.Path(path).write_bytes(b"")


def shrink(path):
  data_trees.save(path, np.zeros((24, 31), np.uint8))


def relabel(path):
  data_trees.save(path, np.full((24, 32), NUM_CLASSES, np.uint8))


def colour(path):
  data_trees.save(path, np.zeros((24, 32, 3), np.uint8))


def batches(source, num_batches, *, ids=IDS, **options):
  arguments = {
    "batch_size": 4,
    "seed": 1,
    "with_labels": True,
    "num_classes": NUM_CLASSES,
    "num_threads": 0,
    **options,
  }
  transform = ip.TrainTransform((16, 20))
  with ip.make_train_stream(source, ids, transform, **arguments) as stream:
    return list(itertools.islice(stream, num_batches))


def skipping(source, num_batches, *, max_bad_records=3, **options):
  """The batches, and what the stream said while it made them."""
  said = []
  found = batches(
    source,
    num_batches,
    on_bad_record=lambda id, reason: said.append((id, reason)),
    max_bad_records=max_bad_records,
    **options,
  )
  return found, said


def assert_equal(batches_a, batches_b):
  for a, b in zip(batches_a, batches_b, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_the_next_image_that_is_good_takes_the_place(layout):
  """2 and 3 are bad, so 4 stands in for both; 6 is bad, and 0 follows it."""
  clean = batches(layout, 20)
  truncate(layout.image_path(IDS[2]))
  remove(layout.mask_path(IDS[3]))
  relabel(layout.mask_path(IDS[6]))
  found, said = skipping(layout, 20)
  instead = np.array([0, 1, 4, 4, 4, 5, 0])
  expected_ids = []
  for before, after in zip(clean, found, strict=True):
    assert before.keys() == after.keys()
    np.testing.assert_array_equal(after["index"], instead[before["index"]])
    # The draws are those of the row: same crop, same flip, same scale.
    np.testing.assert_array_equal(after["valid_box"], before["valid_box"])
    for row, index in enumerate(after["index"]):
      top, left, bottom, right = after["valid_box"][row]
      image = after["image"][row, top:bottom, left:right]
      np.testing.assert_array_equal(image, 20 * index)
      label = after["label"][row, top:bottom, left:right]
      np.testing.assert_array_equal(label, index % NUM_CLASSES)
    for index in before["index"]:
      expected_ids += {2: [2, 3], 3: [3], 6: [6]}.get(int(index), [])
  assert [id for id, _ in said] == [IDS[i] for i in expected_ids]
  reasons = dict(said)
  for i, path in (
    (2, layout.image_path(IDS[2])),
    (3, layout.mask_path(IDS[3])),
    (6, layout.mask_path(IDS[6])),
  ):
    assert reasons[IDS[i]].startswith(f"{path}: ")
    assert "\n" not in reasons[IDS[i]]


@pytest.mark.parametrize(
  ("damage", "part", "word"),
  [
    (truncate, "image", "decoded"),
    (remove, "image", "not found"),
    (empty, "image", "empty"),
    (truncate, "mask", "damaged or truncated"),
    (remove, "mask", "not found"),
    (shrink, "mask", "31x24"),
    (relabel, "mask", "label value 5"),
    (colour, "mask", "colours"),
  ],
)
def test_what_counts_as_bad(layout, damage, part, word):
  path = getattr(layout, f"{part}_path")(IDS[1])
  damage(path)
  found, said = skipping(layout, 2)
  assert {id for id, _ in said} == {IDS[1]}
  assert all(path in reason and word in reason for _, reason in said)
  assert 1 not in np.concatenate([batch["index"] for batch in found])
  with pytest.raises(ip.RecordError) as error:
    batches(layout, 2)
  assert (error.value.id, str(error.value)) == said[0]


def test_the_decoder_says_nothing_of_its_own(layout):
  """It would at every attempt to read the file."""
  path = layout.image_path(IDS[1])
  truncate(path)
  code = f"""if True:
    import input_pipeline as ip
    try:
      ip.decode_image({path!r})
    except ip.DataError as error:
      print("refused")
  """
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=data_trees.REPOSITORY,
    capture_output=True,
    text=True,
  )
  assert (result.stdout, result.stderr) == ("refused\n", "")


def test_who_shares_the_work_changes_nothing(layout):
  """Threads, two processes, a start in the middle, two hosts."""
  truncate(layout.image_path(IDS[2]))
  remove(layout.mask_path(IDS[3]))
  empty(layout.image_path(IDS[6]))
  expected, said = skipping(layout, 9)
  _, said_late = skipping(layout, 6, start_batch=3)
  assert said[-len(said_late) :] == said_late and len(said_late) < len(said)
  for options in (
    {"num_threads": 4},
    {"num_threads": 2, "start_batch": 3},
    {"num_threads": 2, "num_workers": 2, "start_batch": 3},
  ):
    start = options.get("start_batch", 0)
    found, said_now = skipping(layout, 9 - start, **options)
    assert_equal(expected[start:], found)
    assert said_now == (said_late if start else said)
  hosts = [
    skipping(layout, 9, shard_index=i, shard_count=2, num_threads=i)
    for i in range(2)
  ]
  together = [
    {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for parts in zip(*(found for found, _ in hosts), strict=True)
  ]
  assert_equal(expected, together)
  assert sorted(hosts[0][1] + hosts[1][1]) == sorted(said)


def test_unlabelled_images_need_no_mask(layout):
  clean = batches(layout, 4, with_labels=False)
  remove(layout.mask_path(IDS[1]))
  found, said = skipping(layout, 4, with_labels=False)
  assert_equal(clean, found)
  assert said == []
  empty(layout.image_path(IDS[1]))
  found, said = skipping(layout, 4, with_labels=False)
  assert {id for id, _ in said} == {IDS[1]}
  for before, after in zip(clean, found, strict=True):
    expected = np.where(before["index"] == 1, 2, before["index"])
    np.testing.assert_array_equal(after["index"], expected)


def test_a_mended_file_is_used_again(layout):
  clean = batches(layout, 12)
  path = pathlib.Path(layout.image_path(IDS[2]))
  kept = path.read_bytes()
  path.unlink()
  found = []
  stream = ip.make_train_stream(
    layout,
    IDS,
    ip.TrainTransform((16, 20)),
    batch_size=4,
    seed=1,
    with_labels=True,
    num_classes=NUM_CLASSES,
    num_threads=0,
    on_bad_record=lambda id, reason: None,
    max_bad_records=1,
  )
  with stream:
    found += itertools.islice(stream, 6)
    path.write_bytes(kept)
    found += itertools.islice(stream, 6)
  assert_equal(clean[6:], found[6:])
  assert all((batch["index"] != 2).all() for batch in found[:6])
  assert any((batch["index"] == 2).any() for batch in clean[:6])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_row_does_not_try_for_ever(layout, num_workers):
  """Three in a row are bad, two may be: the third ends it, and all are told."""
  for i in (0, 1, 2):
    empty(layout.image_path(IDS[i]))
  said = []
  options = {"batch_size": 1, "num_workers": num_workers, "num_threads": 1}
  with pytest.raises(ip.RecordError, match="nor can the 2 images") as error:
    batches(
      layout,
      NUM_IMAGES,
      on_bad_record=lambda id, _: said.append(id),
      max_bad_records=2,
      **options,
    )
  assert said[-3:] == [IDS[0], IDS[1], IDS[2]]
  assert error.value.id == IDS[2]
  if not num_workers:  # Three may be bad.
    skipping(layout, NUM_IMAGES, max_bad_records=3, **options)


def test_no_image_is_left(layout):
  for id in IDS[:2]:
    empty(layout.image_path(id))
  with pytest.raises(ip.RecordError, match="nor can the 1 images"):
    skipping(layout, 1, ids=IDS[:2])


def test_what_is_raised_on_hearing_of_it_ends_the_stream(layout):
  empty(layout.image_path(IDS[1]))

  def refuse(id, reason):
    raise DataError(f"enough: {id}")

  stream = ip.make_train_stream(
    layout,
    IDS,
    ip.TrainTransform((16, 20)),
    batch_size=NUM_IMAGES,
    seed=1,
    with_labels=True,
    num_classes=NUM_CLASSES,
    num_threads=2,
    on_bad_record=refuse,
    max_bad_records=1,
  )
  with pytest.raises(DataError, match="enough: photo1"):
    next(stream)
  with pytest.raises(ValueError, match="closed"):
    next(stream)


# -- The count -----------------------------------------------------------------


def test_each_image_is_counted_and_named_once(caplog):
  records = BadRecords(IDS, limit=3, known=["photo5"])
  with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
    for id in ("photo3", "photo1", "photo3", "photo5", "photo1"):
      records.add(id, f"{id}.png: torn")
  assert records.ids == ("photo1", "photo3", "photo5")
  named = [record.getMessage() for record in caplog.records]
  assert named == [
    "image 'photo3' is skipped, number 2 of at most 3: photo3.png: torn",
    "image 'photo1' is skipped, number 3 of at most 3: photo1.png: torn",
  ]
  with pytest.raises(DataError) as error:
    records.add("photo0", "photo0.png: torn")
  message = str(error.value)
  assert message.startswith("4 training images cannot be used, more than")
  assert "config.input.max_bad_records=3" in message
  assert "'photo0' (photo0.png: torn)" in message
  assert "'photo5' (skipped before)" in message and "\n" not in message
  with pytest.raises(DataError, match="max_bad_records=1"):
    BadRecords(IDS, limit=1, known=["photo5", "photo3"])


def test_the_count_is_that_of_all_processes(monkeypatch):
  """Two processes in turn, in place of what travels between them."""
  records = [BadRecords(IDS, limit=3) for _ in range(2)]
  records[0].add("photo6", "torn")
  records[0].add("photo0", "torn")
  records[1].add("photo0", "torn")
  records[0].gather()  # One process: nothing to ask.
  sent = []
  monkeypatch.setattr(bad_records.jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    bad_records.distributed,
    "gather",
    lambda places: sent.append(places.copy()) or np.stack([places] * 2),
  )
  for one in records:
    one.gather()
  assert [one.tolist() for one in sent] == [[0, 6, -1, -1], [0, -1, -1, -1]]
  received = np.stack(sent)
  monkeypatch.setattr(bad_records.distributed, "gather", lambda _: received)
  for one in records:
    one.gather()
    assert one.ids == ("photo0", "photo6")
  received = np.array([[0, 6, 1, -1], [2, -1, -1, -1]])
  with pytest.raises(DataError, match="4 training images"):
    records[1].gather()


# -- A run ---------------------------------------------------------------------

# One epoch of warm-up; a checkpoint an epoch. The labelled batch holds all four
# images, the unlabelled one four of sixteen.
STEPS_PER_EPOCH, TOTAL_STEPS = 4, 12
LABELLED = [f"l{i}" for i in range(4)]
UNLABELLED = [f"u{i:02}" for i in range(16)]
VALIDATION = [f"v{i}" for i in range(4)]


@pytest.fixture
def root(tmp_path):
  """Images of 11 classes, those of 'camvid'; unlabelled ones without masks."""
  root = tmp_path / "data"
  for path, ids in (
    ("splits/4/labeled.txt", LABELLED),
    ("splits/4/unlabeled.txt", UNLABELLED),
    ("ImageSets/Segmentation/val.txt", VALIDATION),
  ):
    data_trees.write_list(root / path, ids)
    for id in ids:
      photo = data_trees.photo(id, (40, 48))
      data_trees.save(root / f"JPEGImages/{id}.png", photo)
      if ids is not UNLABELLED:
        mask = data_trees.labels(id, 11, (40, 48))
        data_trees.save(root / f"SegmentationClass/{id}.png", mask)
  return root


def make_config(root, **changes):
  config = testing.get_config()
  config.dataset.name = "camvid"
  config.dataset.root = str(root)
  config.eval.oracle_images = 0
  config.log.every_steps = 1
  config.log.images_every_epochs = 0
  config.update_from_flattened_dict(changes)
  return config


SKIP = {"input.on_bad_record": "skip"}


class NoReporter:
  """In place of the one whose programs take half a minute to compile."""

  def __init__(self, config, program, data, workdir, *, devices):
    self.page = workdir / "page"

  def draw(self, variables, **of_network):
    pass

  def draw_missing(self, variables, **of_network):
    pass

  def is_complete(self, last_step):
    return True

  def finish(self, variables, **of_network):
    pass


@functools.cache
def real_program(method):
  """Built once: the tests change no key that it depends on, and no array."""
  info = dataset_info("camvid")
  config = make_config("", method=method)
  program = build(config, DataSpec(11, info.mean, info.std, len(UNLABELLED)))
  return (
    dataclasses.replace(
      program, create_state=functools.cache(program.create_state)
    ),
    abstract_state(config, program),
  )


@pytest.fixture
def loop(monkeypatch):
  """Steps whose loss is what they saw, and evaluations that cost nothing.

  Returns a set: of steps at which Ctrl-C is pressed.
  """
  stop_at = set()

  def step(state, *batches):
    done = int(state.step) + 1
    if done in stop_at:
      raise KeyboardInterrupt
    seen = sum(np.asarray(batch["image"]).mean() for batch in batches)
    names = ("sup_loss", "total_loss", "grad_norm")
    return (
      state.replace(step=state.step + 1),
      {name: jax.numpy.float32(seen) for name in names},
    )

  def fake_build(config, _, **_kwargs):
    program, _ = real_program(config.method)
    return dataclasses.replace(
      program, supervised_step=step, semi_supervised_step=step
    )

  metrics = {"eval/miou": 0.5, "eval/pixel_accuracy": 0.5}
  monkeypatch.setattr(train, "build", fake_build)
  monkeypatch.setattr(
    train, "abstract_state", lambda config, _: real_program(config.method)[1]
  )
  monkeypatch.setattr(train, "counts_of", lambda *_: None)
  monkeypatch.setattr(train, "evaluate", lambda *_: dict(metrics))
  monkeypatch.setattr(train, "scores_of", lambda _: {})
  monkeypatch.setattr(train._Run, "_record", lambda *_: None)
  monkeypatch.setattr(train, "Reporter", NoReporter)
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  return stop_at


def lines_of(workdir):
  text = (workdir / writers.METRICS_FILE).read_text()
  return [
    {k: v for k, v in json.loads(line).items() if k[:5] != "time/"}
    for line in text.splitlines()
  ]


def bad_in_checkpoints(workdir):
  steps = [int(folder.name) for folder in (workdir / FOLDER).iterdir()]
  return {s: read_checkpoint(workdir, s).meta.bad_records for s in steps}


def unlabelled_batches(config):
  """Ids of the unlabelled batches of all semi-supervised steps."""
  info = dataset_info("camvid")
  data = data_lib.load_data(config, info)
  program, _ = real_program(config.method)
  stream = data_lib.open_train_stream(
    config, data, program.recipe, labelled=False, step=STEPS_PER_EPOCH
  )
  with stream:
    found = itertools.islice(stream, TOTAL_STEPS - STEPS_PER_EPOCH)
    return [[UNLABELLED[i] for i in batch["index"]] for batch in found]


@pytest.mark.slow
def test_a_run_that_skips_ends_the_same_however_it_got_there(
  root, tmp_path, loop, caplog
):
  """Uninterrupted; and stopped twice, at first with worker processes."""
  truncate(root / "JPEGImages/l1.png")
  remove(root / "JPEGImages/u03.png")
  config = make_config(root, **SKIP)
  with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
    train.train_and_evaluate(config, tmp_path / "a")
  named = [x.getMessage() for x in caplog.records if "skipped" in x.msg]
  assert len(named) == 2
  assert "'l1' is skipped, number 1 of at most 10" in named[0]
  assert f"{root}/JPEGImages/u03.png: image not found" in named[1]

  lines = lines_of(tmp_path / "a")
  assert [line["step"] for line in lines] == list(range(1, TOTAL_STEPS + 1))
  counts = [line["train/bad_records"] for line in lines]
  # The list of 16 is gone through by step 8, and 3 stands in it.
  assert counts[0] == 1 and counts[7:] == [2] * 5
  assert counts == sorted(counts)
  assert bad_in_checkpoints(tmp_path / "a")[12] == ("l1", "u03")

  for step, workers in ((6, 1), (9, 0)):
    loop.add(step)
    config.input.num_workers = workers
    with pytest.raises(KeyboardInterrupt):
      train.train_and_evaluate(config, tmp_path / "b")
    loop.clear()
  caplog.clear()
  with caplog.at_level(logging.WARNING, logger="u2pl_jax"):
    train.train_and_evaluate(config, tmp_path / "b")
  assert "is skipped" not in caplog.text  # Both were named before step 8.
  assert lines_of(tmp_path / "b") == lines
  assert bad_in_checkpoints(tmp_path / "b")[12] == ("l1", "u03")


def test_a_run_that_fails_says_what_and_goes_on_when_mended(
  root, tmp_path, loop
):
  config = make_config(root)
  train.train_and_evaluate(config, tmp_path / "clean")
  expected = lines_of(tmp_path / "clean")
  assert not any("train/bad_records" in line for line in expected)
  # Not in the first unlabelled batch, so that there is a checkpoint.
  ids = unlabelled_batches(config)
  bad = next(id for id in ids[2] if id not in ids[0] + ids[1])
  path = root / f"JPEGImages/{bad}.png"
  kept = path.read_bytes()
  truncate(path)
  workdir = tmp_path / "run"
  with pytest.raises(DataError) as error:
    train.train_and_evaluate(config, workdir)
  message = str(error.value)
  assert "\n" not in message
  for part in (
    f"training image {bad!r}: {path}: cannot be decoded",
    "stopped at step 6; the last good checkpoint is of step 4 in",
    "config.input.on_bad_record='skip'",
    "run the same command again",
  ):
    assert part in message
  assert bad_in_checkpoints(workdir) == {4: ()}
  path.write_bytes(kept)
  train.train_and_evaluate(config, workdir)
  assert lines_of(workdir) == expected


def test_a_run_that_failed_may_go_on_and_skip(root, tmp_path, loop):
  """It ends as one that skips from the start."""
  empty(root / "JPEGImages/u03.png")
  with pytest.raises(DataError, match="training image 'u03'"):
    train.train_and_evaluate(make_config(root), tmp_path / "a")
  config = make_config(root, **SKIP)
  train.train_and_evaluate(config, tmp_path / "a")
  train.train_and_evaluate(config, tmp_path / "b")
  # What was written before it failed does not say how many there were: none.
  lines = [{"train/bad_records": 0} | line for line in lines_of(tmp_path / "a")]
  assert lines == lines_of(tmp_path / "b")


def test_too_many_end_a_run_that_skips(root, tmp_path, loop):
  for id in ("l0", "l2", "u05"):
    truncate(root / f"JPEGImages/{id}.png")
  config = make_config(root, **SKIP, **{"input.max_bad_records": 2})
  with pytest.raises(DataError) as error:
    train.train_and_evaluate(config, tmp_path / "run")
  message = str(error.value)
  assert message.startswith("3 training images cannot be used, more than")
  for id in ("l0", "l2", "u05"):
    assert f"{root}/JPEGImages/{id}.png: cannot be decoded" in message
  assert "the last good checkpoint is of step 4" in message
  config.input.max_bad_records = 3
  train.train_and_evaluate(config, tmp_path / "run")
  assert lines_of(tmp_path / "run")[-1]["train/bad_records"] == 3
  # Files that are missing when it starts count too.
  for id in ("u01", "u02", "u03", "u04"):
    remove(root / f"JPEGImages/{id}.png")
  with pytest.raises(DataError, match="4 of 16 images are missing"):
    train.train_and_evaluate(config, tmp_path / "other")


def test_an_evaluation_never_skips(root, tmp_path, loop, monkeypatch):
  monkeypatch.setattr(train, "counts_of", judging.counts_of)
  truncate(root / "SegmentationClass/v2.png")
  with pytest.raises(DataError) as error:
    train.train_and_evaluate(make_config(root, **SKIP), tmp_path / "run")
  message = str(error.value)
  assert message.startswith(f"{root}/SegmentationClass/v2.png: the mask")
  assert "stopped at step 4; there is no checkpoint yet" in message
  assert "on_bad_record" not in message
  remove(root / "SegmentationClass/v2.png")
  with pytest.raises(DataError, match="1 of 4 masks are missing"):
    train.train_and_evaluate(make_config(root, **SKIP), tmp_path / "run")


def test_the_report_does_without_what_the_run_skipped(root, tmp_path):
  config = make_config(root, **SKIP)
  info = dataset_info("camvid")
  data = data_lib.load_data(config, info)

  def labelled_pixels(config):
    program, _ = real_program(config.method)
    reporter = Reporter(config, program, data, tmp_path, devices="")
    return reporter, reporter._labelled_pixels()

  _, whole = labelled_pixels(config)
  mask = data_trees.labels("l1", 11, (40, 48))
  of_mask = np.bincount(mask.ravel(), minlength=256)[:11]
  truncate(root / "SegmentationClass/l1.png")
  reporter, rest = labelled_pixels(config)
  np.testing.assert_array_equal(rest, whole - of_mask)
  with pytest.raises(DataError, match="l1.png"):
    labelled_pixels(make_config(root))
  # Nor do its pictures of the method need an unlabelled image.
  for id in UNLABELLED:
    empty(root / f"JPEGImages/{id}.png")
  assert reporter._method(None, None) == ()


# -- Slow input ----------------------------------------------------------------


def test_which_lines_warn_of_slow_input():
  watch = StallWarning()
  watch.stream_opens()
  shares = [0.9, 0.19, 0.2, 0.21, *[0.9] * 20, 0.5, 0.9]
  warned = [watch.of_line(share) for share in shares]
  # Not the start, not up to a fifth, and then not the next twenty lines.
  assert [i for i, text in enumerate(warned) if text] == [3, 24]
  assert "21%" in warned[3] and "50%" in warned[24]
  for key in ("num_workers", "num_threads", "prefetch", "local disk"):
    assert key in warned[3]
  # The second stream opens.
  watch = StallWarning()
  watch.stream_opens()
  watch.of_line(0.0)
  watch.stream_opens()
  assert watch.of_line(0.9) is None and watch.of_line(0.9)


class SlowLayout(ip.Layout):
  def read_image(self, id):
    time.sleep(0.05)
    return super().read_image(id)


def test_a_run_with_a_slow_disk_says_so(
  root, tmp_path, loop, caplog, monkeypatch
):
  load_data = train.load_data

  def slow_data(*args):
    data = load_data(*args)
    source = SlowLayout(root, image_suffix=".png")
    return dataclasses.replace(data, source=source)

  monkeypatch.setattr(train, "load_data", slow_data)
  config = make_config(
    root,
    **{
      "method": "supervised",
      "input.num_threads": 1,
      "input.prefetch": 1,
    },
  )
  with caplog.at_level(logging.INFO, logger="u2pl_jax"):
    train.train_and_evaluate(config, tmp_path / "run")
  lines = [x.getMessage() for x in caplog.records]
  (warning,) = (line for line in lines if line.startswith("slow input: "))
  # Before the line of step 2: the first one holds the start of the readers.
  following = lines[lines.index(warning) + 1]
  assert "step 2/12" in following
  # 0.2 s a batch, and a step that does nothing.
  share = int(warning.split("slow input: ")[1].split("%")[0])
  assert share > 50 and f"data wait {share}%" in following
