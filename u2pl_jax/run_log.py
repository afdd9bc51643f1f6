"""What a run left behind: its metrics, config and best evaluation, read back.

Standard library and numpy only: anything may ask how a run went.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from u2pl_jax import plateau


class RunError(ValueError):
  """One line that says which file is at fault."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir says about its run.

  Attributes:
    workdir: the folder.
    config: the resolved config, empty if the file is missing.
    rows: of metrics.jsonl, one a step, ascending.
    skipped_lines: lines that are no metrics, such as a half-written last one.
    extra: what an earlier report knew and the workdir does not tell: pictures,
      command, devices, versions.
    dataset: class names and colours, empty if the file is missing.
    evaluation: summary of the best evaluation, empty if the file is missing.
  """

  workdir: pathlib.Path
  config: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  skipped_lines: int = 0
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  dataset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    return str(self.setting("name") or self.workdir.resolve().name)

  @property
  def class_names(self) -> list[str]:
    """Those of the data set, else in the order of the metrics."""
    prefix = "eval/iou/"
    found = {
      key.removeprefix(prefix): None
      for row in self.rows
      for key in row
      if key.startswith(prefix)
    }
    known = self.dataset.get("class_names") or self.extra.get("class_names")
    return list(known or found)

  @property
  def palette(self) -> list[list[int]]:
    """Colours of the classes; empty if nothing says them."""
    return list(self.dataset.get("palette") or self.extra.get("palette") or [])

  @property
  def report_page(self) -> pathlib.Path:
    return self.workdir / "report" / "index.html"

  @property
  def steps_per_epoch(self) -> float | None:
    """From the last line with `train/epoch`; None if there is none."""
    steps, epochs = self.series("train/epoch")
    known = np.flatnonzero(epochs > 0)
    if not known.size:
      return None
    return float(steps[known[-1]] / epochs[known[-1]])

  def setting(self, path: str) -> Any:
    """The config's value at 'a.b.c'; None if there is none."""
    value: Any = self.config
    for key in path.split("."):
      if not isinstance(value, Mapping) or key not in value:
        return None
      value = value[key]
    return value

  def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [n] int64, values [n] float64) of the finite values of a metric.

    The IoU of a class that an evaluation never met is NaN: no point then.
    """
    points = [
      (row["step"], float(row[key]))
      for row in self.rows
      if _is_finite(row, key)
    ]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)

  def last(self, key: str) -> float | None:
    """The last finite value of a metric."""
    values = self.series(key)[1]
    return float(values[-1]) if values.size else None

  def best(self, key: str) -> tuple[int, float] | None:
    """(step, value) of the highest value, the first of equals."""
    steps, values = self.series(key)
    if not values.size:
      return None
    index = int(values.argmax())
    return int(steps[index]), float(values[index])

  @property
  def best_evaluation(self) -> tuple[int, float] | None:
    """(step, mIoU) of the evaluation whose checkpoint is kept as the best.

    The first of the highest; with the schedule 'plateau' the first that is
    within its threshold of the highest.
    """
    steps, values = self.series("eval/miou")
    threshold = self.setting("optimizer.plateau.threshold")
    if self.setting("optimizer.schedule") != "plateau" or threshold is None:
      threshold = 0.0
    found = plateau.contenders(
      list(zip(steps.tolist(), values.tolist(), strict=True)), threshold
    )
    return found[0] if found else None

  def value_at(self, key: str, step: int) -> float | None:
    """The value of a metric at a step, if it is there and finite."""
    for row in self.rows:
      if row["step"] == step and _is_finite(row, key):
        return float(row[key])
    return None


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(row: Mapping[str, Any], key: str) -> bool:
  value = row.get(key)
  return _is_number(value) and math.isfinite(value)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; empty if there is no such file."""
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise RunError(f"{path}: not JSON ({error})") from None
  if not isinstance(value, dict):
    raise RunError(f"{path}: holds no JSON object")
  return value


def _read_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """(rows by step, number of lines that are no metrics).

  A run that was killed may have written a step twice, or a line by half: the
  later value of a step stands, and a broken line is counted, not fatal.
  """
  rows: dict[int, dict[str, Any]] = {}
  skipped = 0
  if path.is_file():
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError:
        row = None
      if not isinstance(row, dict) or not _is_finite(row, "step"):
        skipped += 1
        continue
      rows.setdefault(int(row["step"]), {}).update(row)
  return [rows[step] for step in sorted(rows)], skipped


def read_run(workdir: str | os.PathLike) -> Run:
  """Reads what a run left behind.

  Args:
    workdir: of the run; metrics.jsonl and config.json may be missing, not both.

  Returns:
    `Run`.

  Raises:
    RunError: the folder is no workdir, or a file in it is broken.
  """
  workdir = pathlib.Path(workdir)
  config, metrics = workdir / "config.json", workdir / "metrics.jsonl"
  if not config.is_file() and not metrics.is_file():
    raise RunError(
      f"{workdir}: no run here (neither config.json nor metrics.jsonl)"
    )
  rows, skipped = _read_rows(metrics)
  return Run(
    workdir=workdir,
    config=_read_json(config),
    rows=rows,
    skipped_lines=skipped,
    extra=_read_json(workdir / "report" / "report.json"),
    dataset=_read_json(workdir / "dataset.json"),
    evaluation=_read_json(workdir / "evaluation" / "metrics.json"),
  )
