"""Tables and pictures of made-up metrics, against values worked out by hand."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline import storage
from u2pl_jax import report, run_stats
from u2pl_jax.run_log import read_run

# 10 steps an epoch, a line every 5 steps and an evaluation every 20; the run
# was killed at step 50, after its last evaluation.
SUP_LOSS = {5: 8.0, 10: 6.0, 15: 4.0, 20: 2.0, 25: 1.0, 30: 3.0, 35: 5.0}
SUP_LOSS |= {40: 7.0, 45: 100.0, 50: 100.0}
MIOU = {20: 0.6, 40: 0.4}


def _rows() -> list[dict]:
  rows = []
  for step, loss in SUP_LOSS.items():
    row = {
      "step": step,
      "train/sup_loss": loss,
      "train/epoch": step / 10,
      "time/seconds": 2.0 * step,
    }
    if step > 20:
      row |= {"train/bank_fill/road": step / 100, "train/bank_fill/a/b": 0.0}
    if step in MIOU:
      row |= {"eval/miou": MIOU[step], "eval/iou/road": MIOU[step]}
      row |= {"eval/iou/a/b": None, "data/labelled/own list": 4.0}
    rows.append(row)
  return rows


def _run(workdir, rows):
  lines = [json.dumps(row) + "\n" for row in rows]
  (workdir / "metrics.jsonl").write_text("".join(lines))
  return read_run(workdir)


def _read_csv(workdir) -> list[dict]:
  with open(workdir / "stats.csv", newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def test_a_row_an_evaluation_with_means_since_the_last(tmp_path):
  stats = run_stats.make_stats(_run(tmp_path, _rows()))
  columns = stats.columns
  assert columns["step"] == [20, 40]
  assert columns["epoch"] == [2.0, 4.0]
  assert columns["is_best"] == [1, 0]
  # (8 + 6 + 4 + 2) / 4 and (1 + 3 + 5 + 7) / 4.
  assert columns["train/sup_loss"] == [5.0, 4.0]
  assert columns["train/bank_fill/road"] == [None, pytest.approx(0.325)]
  # What is not train/ is the last value, not a mean.
  assert columns["time/seconds"] == [40.0, 80.0]
  assert columns["eval/miou"] == [0.6, 0.4]
  assert columns["eval/iou/a/b"] == [None, None]
  assert "train/epoch" not in columns
  assert (stats.best_epoch, stats.best_step, stats.best_miou) == (2.0, 20, 0.6)


def test_files_hold_the_same_table(tmp_path):
  run = _run(tmp_path, _rows())
  stats = run_stats.write_stats(run)
  rows = _read_csv(tmp_path)
  assert list(rows[0]) == list(stats.columns)
  assert [row["eval/miou"] for row in rows] == ["0.6", "0.4"]
  assert [row["is_best"] for row in rows] == ["1", "0"]
  assert [row["train/bank_fill/road"] for row in rows][0] == ""
  values = json.loads((tmp_path / "stats.json").read_text())
  assert values["columns"] == stats.columns
  assert values["best_epoch"] == 2.0
  assert values["best_step"] == 20
  assert values["best_miou"] == 0.6


def test_a_picture_a_metric_and_one_for_all_classes(tmp_path):
  run_stats.write_stats(_run(tmp_path, _rows()))
  assert {path.name for path in tmp_path.iterdir()} == {
    "metrics.jsonl",
    "stats.csv",
    "stats.json",
    "plots",
  }
  assert {path.name for path in (tmp_path / "plots").iterdir()} == {
    "train_sup_loss.png",
    "train_bank_fill.png",
    "time_seconds.png",
    "eval_miou.png",
    "eval_iou.png",
  }


def _dark_columns(path) -> np.ndarray:
  """x positions with a long vertical stretch of the grey of the mark."""
  with Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB")).astype(int)
  grey = (abs(pixels - 0.35 * 255) < 30).all(-1)
  # The mark is dashed from the bottom of the axes to their top.
  return np.flatnonzero(grey.sum(0) > 0.4 * pixels.shape[0])


def test_the_best_epoch_is_marked_where_it_is(tmp_path):
  run = _run(tmp_path, _rows())
  run_stats.write_stats(run)
  loss = tmp_path / "plots" / "train_sup_loss.png"
  at_2 = _dark_columns(loss)
  assert at_2.size and np.ptp(at_2) <= 2
  # The axis spans epochs 0.5 to 5 and 5 % more at either end.
  left = run_stats._LEFT * run_stats._DPI
  width = run_stats._WIDTH * run_stats._DPI
  expected = left + width * (2 - 0.5 + 0.05 * 4.5) / (1.1 * 4.5)
  assert at_2.mean() == pytest.approx(expected, abs=2)
  # Nothing is marked before the first evaluation.
  run_stats.write_stats(_run(tmp_path, _rows()[:3]))
  assert _dark_columns(loss).size == 0


def test_before_the_first_evaluation(tmp_path):
  stats = run_stats.write_stats(_run(tmp_path, _rows()[:3]))
  assert stats.best_step is None and stats.best_miou is None
  assert _read_csv(tmp_path) == []
  header = (tmp_path / "stats.csv").read_text()
  assert header.startswith("epoch,step,is_best,train/sup_loss")
  assert json.loads((tmp_path / "stats.json").read_text())["best_epoch"] is None


def test_no_line_at_all(tmp_path):
  run_stats.write_stats(_run(tmp_path, []))
  assert (tmp_path / "stats.csv").read_text() == "epoch,step,is_best\n"
  assert not (tmp_path / "plots").exists()


def test_without_epochs_the_axis_is_steps(tmp_path):
  rows = [
    {k: v for k, v in row.items() if k != "train/epoch"} for row in _rows()
  ]
  stats = run_stats.write_stats(_run(tmp_path, rows))
  assert stats.columns["epoch"] == [None, None]
  assert (stats.best_epoch, stats.best_step) == (None, 20)
  assert (tmp_path / "plots" / "train_sup_loss.png").is_file()


def test_what_is_not_finite_is_left_out(tmp_path):
  rows = [
    {"step": 1, "train/sup_loss": None, "train/grad_norm": 3.0},
    {"step": 2, "train/sup_loss": float("nan"), "train/grad_norm": None},
    {"step": 3, "train/sup_loss": 4.0, "eval/miou": 0.5},
  ]
  stats = run_stats.write_stats(_run(tmp_path, rows))
  assert stats.columns["train/sup_loss"] == [4.0]
  assert stats.columns["train/grad_norm"] == [3.0]


def test_long_curves_keep_their_ends():
  shown = run_stats._thin(100_000)
  assert shown.size <= 800 and shown[0] == 0 and shown[-1] == 99_999
  np.testing.assert_array_equal(run_stats._thin(7), np.arange(7))


def test_a_file_that_cannot_be_written_leaves_the_old_one(
  tmp_path, monkeypatch
):
  run = _run(tmp_path, _rows())
  run_stats.write_stats(run)
  before = (tmp_path / "stats.csv").read_bytes()

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(storage.os, "fsync", fail)
  with pytest.raises(OSError, match="No space"):
    run_stats.write_stats(_run(tmp_path, _rows()[:4]))
  assert (tmp_path / "stats.csv").read_bytes() == before
  assert not list(tmp_path.glob(".*"))


def test_the_report_writes_them_too(tmp_path):
  _run(tmp_path, _rows())
  report.refresh_report(tmp_path)
  assert len(_read_csv(tmp_path)) == 2
  assert (tmp_path / "plots" / "eval_miou.png").is_file()


def test_a_class_name_may_hold_a_slash(tmp_path):
  groups = run_stats._groups(_run(tmp_path, _rows()))
  assert groups["eval/iou"] == [
    ("road", "eval/iou/road"),
    ("a/b", "eval/iou/a/b"),
  ]
  assert groups["eval/miou"] == [("", "eval/miou")]


def test_a_plateau_schedule_has_its_own_best(tmp_path):
  """As the checkpoints: the first within the threshold of the highest."""
  rows = [
    {"step": step, "eval/miou": miou}
    for step, miou in ((10, 0.5), (20, 0.5995), (30, 0.6), (40, 0.55))
  ]
  plateau = {"schedule": "plateau", "plateau": {"threshold": 0.001}}
  for optimizer, best in ((plateau, 20), ({"schedule": "poly"}, 30)):
    config = json.dumps(
      {"optimizer": {"plateau": {"threshold": 1}} | optimizer}
    )
    (tmp_path / "config.json").write_text(config)
    run = _run(tmp_path, rows)
    assert run.best_evaluation[0] == best
    assert run_stats.make_stats(run).best_step == best
