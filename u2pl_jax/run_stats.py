"""The metrics of a run as tables and pictures for everybody's tools.

  stats.csv          a row an evaluation
  stats.json         the same as columns, and the best epoch
  plots/<name>.png   a picture a metric, '/' in its name written as '_'

All of them are made of metrics.jsonl again whenever the report is drawn, and
need neither jax nor a display.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from input_pipeline import storage
from u2pl_jax.run_log import Run

CSV_FILE, JSON_FILE, PLOTS_FOLDER = "stats.csv", "stats.json", "plots"

# The yardstick of all other metrics.
_EPOCH = "train/epoch"
# Facts of the data that do not change from line to line: not worth a picture.
_FACTS = "data/"
# Points of a curve: about the width of a picture in pixels.
_MAX_POINTS = 800
# In inches, and fixed: looking for the best layout takes longer than drawing.
_LEFT, _BOTTOM, _RIGHT, _TOP = 0.75, 0.5, 0.25, 0.4
_WIDTH, _HEIGHT, _LEGEND_WIDTH = 5.4, 2.7, 1.7
_DPI = 100
_LEGEND_ROWS, _LABEL_LETTERS = 18, 22
_LINE_STYLES = ("-", "--", ":")


@dataclasses.dataclass(frozen=True)
class Stats:
  """What the evaluations of a run say, one entry an evaluation.

  Attributes:
    columns: name -> values, all of the same length, None where unknown:
      `epoch`, `step`, `is_best`, then the metrics by name.
    best_epoch, best_step, best_miou: of `Run.best_evaluation`; None before the
      first evaluation, the epoch also if no line has `train/epoch`.
  """

  columns: Mapping[str, Sequence[Any]]
  best_epoch: float | None
  best_step: int | None
  best_miou: float | None


def make_stats(run: Run) -> Stats:
  """The table of a run: one row for every step that was evaluated.

  The metrics `train/...` of a row are means over the lines written since the
  row before it, this line included: one line is one step's batch, and noise.
  All others are the last value since then. A line after the last evaluation is
  in no row.

  Args:
    run: with any metrics.

  Returns:
    `Stats`; its columns are empty before the first evaluation.
  """
  names = _metric_names(run.rows)
  best = run.best_evaluation
  per_epoch = run.steps_per_epoch

  def epoch_of(step: int) -> float | None:
    return None if per_epoch is None else round(step / per_epoch, 6)

  columns: dict[str, list[Any]] = {"epoch": [], "step": [], "is_best": []}
  columns |= {name: [] for name in names}
  since: list[Mapping[str, Any]] = []
  for row in run.rows:
    since.append(row)
    if not any(name.startswith("eval/") for name in row):
      continue
    step = int(row["step"])
    columns["epoch"].append(epoch_of(step))
    columns["step"].append(step)
    columns["is_best"].append(int(best is not None and step == best[0]))
    for name in names:
      values = [line[name] for line in since if _is_number(line.get(name))]
      if not values:
        columns[name].append(None)
      elif name.startswith("train/"):
        columns[name].append(float(np.mean(values)))
      else:
        columns[name].append(values[-1])
    since = []
  return Stats(
    columns=columns,
    best_epoch=None if best is None else epoch_of(best[0]),
    best_step=None if best is None else best[0],
    best_miou=None if best is None else best[1],
  )


def write_stats(run: Run) -> Stats:
  """Writes stats.csv, stats.json and plots/ into the run's workdir.

  Every file is replaced whole, so that a reader never meets half of one.

  Args:
    run: with any metrics; without an evaluation the tables are empty.

  Returns:
    What the tables hold.

  Raises:
    OSError: a file cannot be written.
  """
  stats = make_stats(run)
  text = io.StringIO(newline="")
  table = csv.writer(text, lineterminator="\n")
  table.writerow(stats.columns)
  table.writerows(zip(*stats.columns.values(), strict=True))
  storage.write_whole(run.workdir / CSV_FILE, text.getvalue().encode())
  values = dataclasses.asdict(stats)
  values["columns"] = values.pop("columns")  # The short ones first.
  encoded = json.dumps(values, ensure_ascii=False, allow_nan=False)
  storage.write_whole(run.workdir / JSON_FILE, encoded.encode() + b"\n")
  _write_plots(run, stats)
  return stats


def _is_number(value: Any) -> bool:
  # bool is an int, and no metric.
  return type(value) in (int, float) and math.isfinite(value)


def _metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Of all lines, in the order of their first appearance."""
  names = {name: None for row in rows for name in row if "/" in name}
  names.pop(_EPOCH, None)
  return list(names)


# -- Pictures ------------------------------------------------------------------


def _groups(run: Run) -> dict[str, list[tuple[str, str]]]:
  """'train/bank_fill' -> (class, metric) of each of its curves.

  The first two parts of a name are the metric, and what follows is a class,
  whose name may hold a slash of its own. A number has one curve, without class.
  """
  groups: dict[str, list[tuple[str, str]]] = {}
  for name in _metric_names(run.rows):
    if name.startswith(_FACTS):
      continue
    parts = name.split("/", 2)
    label = parts[2] if len(parts) == 3 else ""
    groups.setdefault("/".join(parts[:2]), []).append((label, name))
  return groups


def _write_plots(run: Run, stats: Stats) -> None:
  folder = run.workdir / PLOTS_FOLDER
  per_epoch = run.steps_per_epoch or 1.0
  mark = None
  if stats.best_step is not None:
    unit = "step" if stats.best_epoch is None else "epoch"
    at = stats.best_step if stats.best_epoch is None else stats.best_epoch
    text = f"best: {unit} {at:g}, mIoU {100 * stats.best_miou:.2f} %"
    mark = (stats.best_step / per_epoch, text)
  axis = "step" if run.steps_per_epoch is None else "epoch"
  figure = Figure(dpi=_DPI)
  canvas = FigureCanvasAgg(figure)
  for group, members in _groups(run).items():
    curves = []
    for label, name in members:
      steps, values = run.series(name)
      if steps.size:
        curves.append((label, steps / per_epoch, values))
    if not curves:
      continue
    figure.clear()
    _draw(figure, group, curves, axis, mark)
    picture = io.BytesIO()
    canvas.print_png(picture, pil_kwargs={"compress_level": 1})
    folder.mkdir(exist_ok=True)
    path = folder / f"{_file_stem(group)}.png"
    storage.write_whole(path, picture.getvalue())


def _file_stem(group: str) -> str:
  return "".join(c if c.isalnum() or c in "-." else "_" for c in group)


def _draw(
  figure: Figure,
  title: str,
  curves: Sequence[tuple[str, np.ndarray, np.ndarray]],
  axis: str,
  mark: tuple[float, str] | None,
) -> None:
  """Curves (label, x, y) on one pair of axes, and the best epoch."""
  legend_columns = math.ceil(len(curves) / _LEGEND_ROWS)
  has_legend = len(curves) > 1
  right = _LEGEND_WIDTH * legend_columns if has_legend else _RIGHT
  width, height = _LEFT + _WIDTH + right, _BOTTOM + _HEIGHT + _TOP
  figure.set_size_inches(width, height)
  axes = figure.add_axes(
    (_LEFT / width, _BOTTOM / height, _WIDTH / width, _HEIGHT / height)
  )
  colors = matplotlib.colormaps["tab10"].colors
  for i, (label, x, y) in enumerate(curves):
    shown = _thin(y.size)
    axes.plot(
      x[shown],
      y[shown],
      color=colors[i % len(colors)],
      linestyle=_LINE_STYLES[i // len(colors) % len(_LINE_STYLES)],
      linewidth=1.2,
      marker="o" if y.size <= 60 else "",
      markersize=2.5,
      label=_shorten(label or title),
    )
  axes.set_title(title, loc="left", fontsize=11)
  axes.set_xlabel(axis)
  axes.grid(True, color="0.9", linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  if mark is not None:
    position, text = mark
    axes.axvline(position, color="0.35", linestyle="--", linewidth=0.9)
    figure.text(
      1 - _RIGHT / width,
      1 - 0.26 / height,
      text,
      ha="right",
      fontsize=9,
      color="0.35",
    )
  if has_legend:
    axes.legend(
      loc="upper left",
      bbox_to_anchor=(1.01, 1.02),
      ncols=legend_columns,
      fontsize=7.5,
      frameon=False,
      borderaxespad=0,
    )


def _shorten(label: str) -> str:
  if len(label) <= _LABEL_LETTERS:
    return label
  return label[: _LABEL_LETTERS - 1] + "…"


def _thin(count: int) -> np.ndarray:
  """Indices of the points to draw, first and last always among them."""
  if count <= _MAX_POINTS:
    return np.arange(count)
  return np.linspace(0, count - 1, _MAX_POINTS).round().astype(np.int64)
