"""scripts/chaos.py: a few faults for real, and that it sees what differs."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from scripts import chaos
from u2pl_jax import checkpoint, writers

REPOSITORY = pathlib.Path(__file__).parent.parent


def test_three_kills_and_one_of_everything_else(tmp_path):
  result = subprocess.run(
    [
      *(sys.executable, "scripts/chaos.py", "--kills=3", "--seed=1"),
      f"--json={tmp_path / 'chaos.json'}",
    ],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=1500,
  )
  assert result.returncode == 0, result.stderr
  found = json.loads((tmp_path / "chaos.json").read_text())
  assert found["bit_identical"] and found["survived"] == found["injected"]
  injected = {kind: n["injected"] for kind, n in found["kinds"].items()}
  assert sum(injected.pop(kind, 0) for kind in chaos.KILLS.values()) == 3
  assert injected == dict.fromkeys(
    (
      chaos.SIGTERM,
      chaos.DISK_FULL,
      chaos.DATA_GONE,
      chaos.CLOCK,
      chaos.FLIPPED,
      chaos.TRUNCATED,
      chaos.DELETED,
      chaos.ALL_DAMAGED,
    ),
    1,
  )
  assert found["slowest_sigterm_seconds"] < chaos.SIGTERM_SECONDS


# -- What it sees --------------------------------------------------------------


@pytest.fixture
def runs(trained_run, tmp_path):
  """(a run, its copy) to be made different."""
  shutil.copytree(trained_run.workdir, tmp_path / "run")
  return tmp_path / "run", trained_run.workdir


def edit_lines(workdir, edit):
  path = workdir / writers.METRICS_FILE
  lines = edit(path.read_text().splitlines())
  path.write_text("".join(f"{line}\n" for line in lines))


def test_equal_runs(runs):
  workdir, clean = runs
  assert chaos.differences(workdir, clean) == []


def other_time(line):
  row = json.loads(line)
  return json.dumps(row | {"time/seconds": 1e9})


@pytest.mark.parametrize(
  "edit, expected",
  [
    (lambda lines: [*map(other_time, lines)], None),
    (lambda lines: lines[:-1], "metrics.jsonl has the steps [2, 4, 6, 8, 10]"),
    (
      lambda lines: [*lines, lines[-1]],
      "metrics.jsonl has the steps [2, 4, 6, 8, 10, 12, 12]",
    ),
    (
      lambda lines: [lines[0].replace("sup_loss", "x", 1), *lines[1:]],
      "metrics of step 2: train/sup_loss, train/x",
    ),
  ],
)
def test_lines_of_metrics(runs, edit, expected):
  edit_lines(runs[0], edit)
  found = chaos.metrics_differences(*runs)
  assert found == ([] if expected is None else [expected])


def test_one_bit_of_each_part_of_the_state(runs, monkeypatch):
  workdir, _ = runs
  read = checkpoint.read_checkpoint
  parts = (
    "memory_bank",
    "opt_state",
    "student/batch_stats",
    "teacher/batch_stats",
    "teacher/params",
  )

  def with_bits_changed(path, step):
    stored = read(path, step)
    if path == workdir and step == 12:
      for part in parts:
        key = next(key for key in stored.arrays if key.startswith(part))
        array = np.array(stored.arrays[key])
        array.reshape(-1).view(np.uint8)[0] ^= 1
        stored.arrays[key] = array
    return stored

  monkeypatch.setattr(checkpoint, "read_checkpoint", with_bits_changed)
  assert chaos.differences(*runs) == [
    f"step 12: 1 arrays of {part}" for part in parts
  ]


def test_other_checkpoints_and_leftovers(runs):
  workdir, clean = runs
  (workdir / checkpoint.PREEMPTED_FOLDER / "4").mkdir(parents=True)
  picture = next((workdir / "report").rglob("*.png"))
  picture.write_bytes(b"another picture")
  assert chaos.differences(workdir, clean) == [
    "preempted_checkpoint is not empty",
    "the report's pictures",
  ]
  shutil.rmtree(workdir / checkpoint.FOLDER / "12")
  found = chaos.differences(workdir, clean)
  assert any(x.startswith("checkpoints of ['8'], not") for x in found), found


def test_an_end_with_one_clear_line():
  def life(code, log):
    return chaos.Life(code, log, True, 1.0, 1.0).error(naming="a.png")

  assert life(1, "words\nerror: a.png: there is no such file\n") == []
  assert life(0, "error: a.png\n") == ["exit status 0 instead of 1"]
  assert life(1, "Traceback\nOSError: a.png\n") == ["no clear error: []"]
  assert len(life(1, "error: b.png\n")) == 1
  assert len(life(1, "error: a.png\nerror: a.png\n")) == 1
