"""What is written of an evaluation, read back, and compared."""

import dataclasses
import json

import numpy as np
import pytest

from u2pl_jax import evaluation_record
from u2pl_jax.evaluation_record import (
  EvaluationRecord,
  RecordError,
  check_output,
  compare,
  digest,
  image_miou,
  miou_interval,
  read_record,
  summarise,
  write_record,
)

PROTOCOL = {"name": "padded", "size": [4, 4], "scales": [1.0], "flip": False}
NAMES = ("sky", "road", "pole", "ghost")

# Image 0 knows classes 0 and 1; image 1 class 2 alone, half of it predicted 3;
# image 2 is all ignored. 'ghost' is never in the truth.
CONFUSIONS = np.zeros((3, 4, 4), np.int64)
CONFUSIONS[0, :2, :2] = [[3, 1], [2, 4]]
CONFUSIONS[1, 2, 2:] = 5, 5


def record(**changes):
  calibration = np.zeros((15, 3))
  calibration[14] = 20, 19.0, 12
  values = {
    "protocol": PROTOCOL,
    "protocol_hash": digest(PROTOCOL),
    "checkpoint": "runs/a",
    "step": 40,
    "weights": "teacher",
    "config_hash": "c0ffee",
    "class_names": NAMES,
    "image_ids": ("a", "b/ö", "c"),
    "confusions": CONFUSIONS,
    "boundary": np.full((3, 4, 2), (1, 2)),
    "calibration": calibration,
  }
  return EvaluationRecord(**values | changes)


def test_summary_by_hand():
  summary = summarise(record())
  iou = {"sky": 3 / 6, "road": 4 / 7, "pole": 5 / 10, "ghost": 0.0}
  assert summary["iou"] == pytest.approx(iou)
  assert summary["miou"] == pytest.approx(sum(iou.values()) / 4)
  assert summary["miou_all_classes"] == summary["miou"]
  assert summary["miou_present_classes"] == pytest.approx(sum(iou.values()) / 3)
  assert summary["pixel_accuracy"] == pytest.approx(12 / 20)
  assert summary["mean_accuracy"] == pytest.approx((3 / 4 + 4 / 6 + 1 / 2) / 3)
  assert summary["frequency_weighted_iou"] == pytest.approx(
    (4 * 3 / 6 + 6 * 4 / 7 + 10 * 5 / 10) / 20
  )
  assert summary["boundary_iou"] == 0.5
  assert summary["boundary_iou_per_class"]["pole"] == 0.5
  assert summary["ece"] == pytest.approx((19 - 12) / 20)
  assert summary["confusion"] == CONFUSIONS.sum(0).tolist()
  assert summary["num_images"] == 3
  assert summary["reliability"][14] == {
    "low": 14 / 15,
    "high": 1,
    "pixels": 20,
    "confidence": pytest.approx(0.95),
    "accuracy": pytest.approx(0.6),
  }
  assert summary["reliability"][0]["accuracy"] is None
  for name in ("protocol_hash", "checkpoint", "step", "weights", "config_hash"):
    assert summary[name] == getattr(record(), name)


def test_absent_class_is_none_and_counts_0():
  summary = summarise(record(confusions=CONFUSIONS[:1], image_ids=("a",)))
  assert summary["iou"]["pole"] is None and summary["iou"]["ghost"] is None
  assert summary["miou_all_classes"] == pytest.approx((3 / 6 + 4 / 7) / 4)
  assert summary["miou_present_classes"] == pytest.approx((3 / 6 + 4 / 7) / 2)
  # One image: every resample is that image.
  interval = summary["interval"]
  assert interval["low"] == interval["high"] == pytest.approx(summary["miou"])


def test_nothing_counted_is_none():
  nothing = record(
    confusions=np.zeros((2, 4, 4), np.int64),
    image_ids=("a", "b"),
    boundary=None,
    calibration=np.zeros((15, 3)),
  )
  summary = summarise(nothing)
  assert summary["miou"] == 0
  for name in (
    "miou_present_classes",
    "pixel_accuracy",
    "mean_accuracy",
    "frequency_weighted_iou",
    "boundary_iou",
    "ece",
  ):
    assert summary[name] is None
  assert json.dumps(summary, allow_nan=False)


def test_miou_of_each_image():
  np.testing.assert_allclose(
    image_miou(record()), [(3 / 6 + 4 / 7) / 2, (5 / 10 + 0) / 2, np.nan]
  )


def test_interval_is_of_all_resamples():
  """Two images: their four resamples, of equal probability, by hand."""
  confusions = np.zeros((2, 2, 2), np.int64)
  confusions[0] = [[8, 2], [0, 10]]
  confusions[1] = [[1, 9], [0, 10]]
  interval = miou_interval(confusions, resamples=4000)
  # Twice the better image, and twice the worse one, each one time in four.
  assert interval["high"] == pytest.approx((8 / 10 + 10 / 12) / 2)
  assert interval["low"] == pytest.approx((1 / 10 + 10 / 19) / 2)
  assert (interval["level"], interval["resamples"]) == (0.95, 4000)
  assert interval == miou_interval(confusions, resamples=4000)


def test_interval_covers_the_truth_95_times_in_100():
  """Accuracy of class 0 alone: resamples of 50 images of 100 draws."""
  rng = np.random.default_rng(1)
  covered = 0
  for _ in range(300):
    right = rng.binomial(100, rng.beta(7, 3, size=50))
    confusions = np.zeros((50, 2, 2), np.int64)
    confusions[:, 0, 0], confusions[:, 0, 1] = right, 100 - right
    interval = miou_interval(confusions, resamples=200)
    # IoU of class 0 is its accuracy, 0.7; class 1 is only predicted: 0.
    covered += interval["low"] <= 0.35 <= interval["high"]
  # Binomial(300, 0.95) is at least 268 but once in ten thousand; percentile
  # intervals of 50 images are a little short.
  assert 268 <= covered <= 300


def test_class_that_a_resample_lacks_is_left_out_of_it():
  """Both images are perfect, so every resample is: no class drops to 0."""
  confusions = np.zeros((2, 2, 2), np.int64)
  confusions[0, 0, 0] = confusions[1, 1, 1] = 10
  interval = miou_interval(confusions)
  assert interval["low"] == interval["high"] == 1


# -- Files ---------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [record().boundary, None])
def test_round_trip(tmp_path, boundary):
  written = record(boundary=boundary)
  summary = write_record(tmp_path / "new" / "folder", written)
  folder = tmp_path / "new" / "folder"
  assert json.loads((folder / "metrics.json").read_text()) == summary
  assert {p.name for p in folder.iterdir()} == {"metrics.json", "images.npz"}
  for path in (folder, folder / "metrics.json", str(folder)):
    back = read_record(path)
    for field in dataclasses.fields(EvaluationRecord):
      a, b = getattr(written, field.name), getattr(back, field.name)
      if isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
      else:
        assert a == b
  first = (folder / "images.npz").read_bytes()
  write_record(folder, written)
  assert (folder / "images.npz").read_bytes() == first


def test_files_that_do_not_belong_together(tmp_path):
  write_record(tmp_path / "a", record())
  write_record(tmp_path / "b", record(confusions=2 * CONFUSIONS))
  (tmp_path / "b/images.npz").replace(tmp_path / "a/images.npz")
  with pytest.raises(RecordError, match="images.npz: damaged, or of another"):
    read_record(tmp_path / "a")
  with pytest.raises(RecordError, match=r"b/images.npz: cannot be read \(No"):
    read_record(tmp_path / "b")
  with pytest.raises(RecordError, match="c/metrics.json: there is no such"):
    read_record(tmp_path / "c")
  (tmp_path / "a/metrics.json").write_text('{"protocol": {}}')
  with pytest.raises(RecordError, match="not the summary of an evaluation"):
    read_record(tmp_path / "a")


def test_finished_output_is_kept(tmp_path):
  check_output(tmp_path, overwrite=False)
  write_record(tmp_path, record())
  with pytest.raises(RecordError, match="holds a finished evaluation: choose"):
    check_output(tmp_path, overwrite=False)
  check_output(tmp_path, overwrite=True)
  assert read_record(tmp_path).step == 40
  (tmp_path / "file").write_text("")
  with pytest.raises(RecordError, match="file: cannot write there"):
    check_output(tmp_path / "file", overwrite=True)
  with pytest.raises(RecordError, match="file/x: cannot write there"):
    check_output(tmp_path / "file" / "x", overwrite=True)


# -- Comparing -----------------------------------------------------------------


def test_comparison_by_hand():
  better = CONFUSIONS.copy()
  better[0, :2, :2] = [[4, 0], [2, 4]]
  # The same images in another order.
  b = record(confusions=better[::-1], image_ids=("c", "b/ö", "a"))
  found = compare(record(), b)
  assert found["iou"]["sky"]["a"] == pytest.approx(3 / 6)
  assert found["iou"]["sky"]["b"] == pytest.approx(4 / 6)
  assert found["iou"]["sky"]["difference"] == pytest.approx(1 / 6)
  # In every resample with image 0 the difference is that.
  assert found["iou"]["sky"]["low"] == pytest.approx(1 / 6)
  assert found["iou"]["sky"]["high"] == pytest.approx(1 / 6)
  assert found["iou"]["pole"]["difference"] == 0
  assert found["miou"]["difference"] == pytest.approx(
    (4 / 6 - 3 / 6 + 4 / 6 - 4 / 7) / 4
  )
  assert found["miou"]["low"] <= found["miou"]["difference"]
  assert found["miou"]["difference"] <= found["miou"]["high"]
  assert found["num_images"] == 3
  assert json.dumps(found, allow_nan=False)


def test_pairing_removes_what_is_common():
  """Images differ much, the networks by exactly one pixel on each."""
  rng = np.random.default_rng(0)
  right = rng.integers(5, 95, 40)
  confusions = np.zeros((40, 2, 2), np.int64)
  confusions[:, 0, 0], confusions[:, 0, 1] = right, 100 - right
  ids = tuple(map(str, range(40)))
  names = {"class_names": NAMES[:2], "boundary": None}
  a = record(confusions=confusions, image_ids=ids, **names)
  shifted = confusions + np.asarray([[1, -1], [0, 0]])
  # In another order, which must not matter.
  b = record(confusions=shifted[::-1], image_ids=ids[::-1], **names)
  sky = compare(a, b)["iou"]["sky"]
  assert sky["low"] == pytest.approx(0.01) == sky["high"]
  own = miou_interval(confusions)
  assert own["high"] - own["low"] > 0.05


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"protocol": PROTOCOL | {"flip": True, "name": "whole"}},
      "name is .* in B; flip is False in A and True in B ",
    ),
    ({"protocol": PROTOCOL | {"stride": [2]}}, "stride is None in A .*runs/a"),
    ({"class_names": ("sky", "street", "pole", "ghost")}, "'road' in A and"),
    ({"class_names": (*NAMES, "car")}, "A has 4 and B 5"),
    ({"image_ids": ("a", "b/ö", "d")}, "1 are in A alone, the first is 'c'"),
    ({"image_ids": ("a", "b/ö", "c", "d")}, "1 are in B alone.* 'd'"),
  ],
)
def test_what_cannot_be_compared_is_refused(changes, message):
  with pytest.raises(RecordError, match=message) as info:
    compare(record(), record(**changes))
  assert "\n" not in str(info.value)


def test_digest_does_not_depend_on_order():
  reordered = dict(reversed(PROTOCOL.items()))
  assert digest(reordered) == digest(PROTOCOL)
  assert digest(PROTOCOL | {"flip": True}) != digest(PROTOCOL)
  assert evaluation_record.digest(PROTOCOL) == record().protocol_hash
