"""The figures of a report, as data for plotly: JSON, drawn by the browser.

A colour is the name of a CSS variable of the page ('--line-1'), which the page
replaces when it draws, and again when the reader changes to dark.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from u2pl_jax.run_log import Run

LINES = tuple(f"--line-{i}" for i in range(1, 9))
_MUTED = "--muted"
_SMOOTH_ABOVE = 60  # Points of a curve that gets a running mean.
_MAX_POINTS = 2000  # Of a curve: no screen has more columns.
_MAX_COLUMNS = 400  # Of a heat map over time.
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclasses.dataclass(frozen=True)
class Figure:
  """One figure.

  Attributes:
    stem: names its element on the page.
    title, caption: of the page's text around it.
    alt: what it shows, with numbers.
    data, layout: plotly's.
    height: CSS pixels.
    wide: whether it takes the width of the page.
  """

  stem: str
  title: str
  caption: str
  alt: str
  data: Sequence[Mapping[str, Any]]
  layout: Mapping[str, Any]
  height: int = 340
  wide: bool = False

  def to_json(self) -> str:
    """Fit for a script element."""
    text = json.dumps(
      {"data": list(self.data), "layout": dict(self.layout)},
      separators=(",", ":"),
      allow_nan=False,
    )
    return text.replace("<", "\\u003c")


@dataclasses.dataclass(frozen=True)
class Curve:
  """A metric as a line, a reference level if it is dashed."""

  key: str
  label: str
  dash: str = "solid"
  smooth: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
  """Curves on common axes.

  Attributes:
    label: of the vertical axis.
    curves: those without data are left out.
    percent: whether the values are shares.
    from_zero: whether the axis starts at 0.
  """

  label: str
  curves: Sequence[Curve]
  percent: bool = False
  from_zero: bool = False


def warmup_end(run: Run) -> int | None:
  """Last written step of the supervised phase; None if not followed by more."""
  teaching, _ = run.series("train/unsup_loss")
  if not teaching.size:
    return None
  steps, _ = run.series("train/sup_loss")
  before = steps[steps < teaching[0]]
  return int(before[-1]) if before.size else None


# -- Pieces --------------------------------------------------------------------


def _numbers(values: np.ndarray) -> list[float]:
  """Six digits: what a screen can show, in a third of the bytes."""
  return [float(f"{value:.6g}") for value in values]


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
  """Centred running mean, over fewer values at both ends."""
  kernel = np.ones(width)
  counts = np.convolve(np.ones(values.size), kernel, "same")
  return np.convolve(values, kernel, "same") / counts


def _thinned(*arrays: np.ndarray) -> list[np.ndarray]:
  size = arrays[0].size
  if size <= _MAX_POINTS:
    return list(arrays)
  keep = np.linspace(0, size - 1, _MAX_POINTS).round().astype(int)
  return [array[keep] for array in arrays]


def _axis(**changes: Any) -> dict[str, Any]:
  return {
    "automargin": True,
    "gridcolor": "--line",
    "linecolor": "--line",
    "zeroline": False,
    "tickfont": {"color": _MUTED, "size": 12},
    "title": {"font": {"color": "--ink", "size": 13}, "standoff": 8},
    **changes,
  }


def _titled(text: str, **changes: Any) -> dict[str, Any]:
  axis = _axis(**changes)
  axis["title"] = axis["title"] | {"text": text}
  return axis


def _layout(**changes: Any) -> dict[str, Any]:
  return {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "--ink"},
    "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
    "hoverlabel": {
      "bgcolor": "--card",
      "bordercolor": "--line",
      "font": {"color": "--ink", "size": 13},
      "align": "left",
      "namelength": -1,
    },
    "legend": {
      "orientation": "h",
      "x": 0,
      "y": 1.02,
      "xanchor": "left",
      "yanchor": "bottom",
      "font": {"size": 12},
    },
    "showlegend": False,
    **changes,
  }


def _step_axis(last: float, **changes: Any) -> dict[str, Any]:
  """From 0 to the last step, so that figures above each other are aligned."""
  return _titled(
    "step",
    range=[0, 1.02 * max(1, last)],
    tickformat=",d",
    hoverformat=",d",
    unifiedhovertitle={"text": "step %{x:,d}"},
    nticks=6,
    **changes,
  )


def _last_step(runs: Sequence[Run]) -> int:
  return max((int(run.rows[-1]["step"]) for run in runs if run.rows), default=1)


def _vertical_line(x: float) -> dict[str, Any]:
  return {
    "type": "line",
    "x0": x,
    "x1": x,
    "y0": 0,
    "y1": 1,
    "yref": "paper",
    "line": {"color": _MUTED, "width": 1, "dash": "dot"},
    "layer": "below",
  }


def _shaded_until(x: float) -> dict[str, Any]:
  return {
    "type": "rect",
    "x0": 0,
    "x1": x,
    "y0": 0,
    "y1": 1,
    "yref": "paper",
    "fillcolor": "--shade",
    "line": {"width": 0},
    "layer": "below",
  }


def _value_axis(panel: Panel, domain: tuple[float, float]) -> dict[str, Any]:
  return _titled(
    panel.label,
    domain=list(domain),
    nticks=5,
    rangemode="tozero" if panel.from_zero else "normal",
    **({"tickformat": "~%"} if panel.percent else {}),
  )


def _traces(
  steps: np.ndarray,
  values: np.ndarray,
  *,
  name: str,
  color: str,
  dash: str,
  axis: str,
  percent: bool,
  smooth: bool,
  **extra: Any,
) -> list[dict[str, Any]]:
  """A line; a noisy one thin, with its running mean over it."""
  steps, values = _thinned(steps, values)
  number = "%{y:.2%}" if percent else "%{y:.4~g}"
  trace = {
    "type": "scatter",
    "mode": "lines",
    "name": name,
    "x": steps.tolist(),
    "y": _numbers(values),
    "yaxis": axis,
    "line": {"color": color, "dash": dash, "width": 2},
    "hovertemplate": number,
    **extra,
  }
  if steps.size <= _SMOOTH_ABOVE and dash == "solid":
    trace |= {"mode": "lines+markers", "marker": {"size": 5, "color": color}}
  if not smooth or steps.size <= _SMOOTH_ABOVE:
    return [trace]
  thin = trace | {
    "line": {"color": color, "width": 1},
    "opacity": 0.35,
    "hoverinfo": "skip",
    "showlegend": False,
  }
  del thin["hovertemplate"]
  logged = number.replace("y", "customdata")
  return [
    thin,
    trace
    | {
      "y": _numbers(_running_mean(values, steps.size // 30)),
      "customdata": _numbers(values),
      "hovertemplate": f"{number} (logged {logged})",
    },
  ]


def _curve_figure(
  run: Run, stem: str, title: str, caption: str, panels: Sequence[Panel]
) -> Figure | None:
  """Panels of curves over a common axis of steps; None without any data."""

  def known(panel: Panel) -> list[Curve]:
    return [c for c in panel.curves if run.series(c.key)[0].size]

  panels = [panel for panel in panels if known(panel)]
  if not panels:
    return None
  data, said = [], []
  gap = 0.1
  part = (1 - gap * (len(panels) - 1)) / len(panels)
  layout = _layout(hovermode="x unified", hoversubplots="axis")
  color = 0
  for number, panel in enumerate(panels):
    axis = f"y{number + 1}" if number else "y"
    top = 1 - number * (part + gap)
    layout[axis.replace("y", "yaxis")] = _value_axis(
      panel, (max(0.0, top - part), top)
    )
    for curve in known(panel):
      steps, values = run.series(curve.key)
      muted = curve.dash != "solid"
      data += _traces(
        steps,
        values,
        name=curve.label,
        color=_MUTED if muted else LINES[color % len(LINES)],
        dash=curve.dash,
        axis=axis,
        percent=panel.percent,
        smooth=curve.smooth,
      )
      color += not muted
      said.append(
        f"{curve.label} from {_said(values[0], panel)} at step {steps[0]:,} to"
        f" {_said(values[-1], panel)} at step {steps[-1]:,}"
      )
  layout["showlegend"] = len(said) > 1
  layout["xaxis"] = _step_axis(
    _last_step([run]), anchor=f"y{len(panels)}".removesuffix("1")
  )
  layout["shapes"] = []
  if (warmup := warmup_end(run)) is not None:
    layout["shapes"].append(_shaded_until(warmup))
  if (best := run.best_evaluation) is not None:
    layout["shapes"].append(_vertical_line(best[0]))
  return Figure(
    stem=stem,
    title=title,
    caption=caption,
    alt=f"{title} over training steps: {'; '.join(said)}.",
    data=data,
    layout=layout,
    height=320 if len(panels) == 1 else 420,
  )


def _said(value: float, panel: Panel) -> str:
  return f"{100 * value:.1f} %" if panel.percent else f"{value:.3g}"


def _classes_of(run: Run, prefix: str) -> list[str]:
  """Classes that a metric has values for, in the order of the class ids."""
  found = {
    key.removeprefix(prefix): None
    for row in run.rows
    for key in row
    if key.startswith(prefix)
  }
  names = [name for name in run.class_names if name in found]
  # Names that only these metrics know, e.g. before the first evaluation.
  names += [name for name in found if name not in names]
  return [name for name in names if run.series(prefix + name)[0].size]


def _class_map(
  run: Run, stem: str, title: str, caption: str, prefix: str
) -> Figure | None:
  """A heat map of one metric a class: rows are classes, columns steps."""
  classes = _classes_of(run, prefix)
  if not classes:
    return None
  steps = np.unique(
    np.concatenate([run.series(prefix + name)[0] for name in classes])
  )
  if steps.size > _MAX_COLUMNS:
    keep = np.linspace(0, steps.size - 1, _MAX_COLUMNS).round().astype(int)
    steps = steps[keep]
  table = np.full((len(classes), steps.size), np.nan)
  for row, name in enumerate(classes):
    at, values = run.series(prefix + name)
    _, column, index = np.intersect1d(steps, at, return_indices=True)
    table[row, column] = values[index]
  latest = [run.series(prefix + name)[1][-1] for name in classes]

  def cells(values: np.ndarray) -> list[list[float | None]]:
    return [
      [None if np.isnan(v) else float(f"{v:.4g}") for v in row]
      for row in values
    ]

  said = ", ".join(
    f"{name} {100 * value:.1f} %"
    for name, value in zip(classes, latest, strict=True)
  )
  return Figure(
    stem=stem,
    title=title,
    caption=caption,
    alt=f"{title} over training steps; at the end: {said}.",
    data=[
      {
        "type": "heatmap",
        "x": steps.tolist(),
        "y": classes,
        # The square root sets a rare class apart from an absent one.
        "z": cells(np.sqrt(table)),
        "customdata": cells(table),
        "zmin": 0,
        "zmax": float(max(1e-3, np.sqrt(np.nanmax(table)))),
        "colorscale": [[0, "--heat-0"], [1, "--heat-1"]],
        "showscale": False,
        "ygap": 1,
        "hovertemplate": "<b>%{y}</b><br>step %{x:,d}"
        "<br>%{customdata:.2%}<extra></extra>",
      }
    ],
    layout=_layout(
      xaxis=_step_axis(_last_step([run]), showgrid=False),
      yaxis=_axis(autorange="reversed", showgrid=False, dtick=1),
    ),
    height=max(260, 90 + 22 * len(classes)),
  )


# -- The figures of a run ------------------------------------------------------


def curve_figures(run: Run) -> list[Figure]:
  """Curves over steps that this run has data for."""
  miou = [Curve("eval/miou", "mIoU")]
  # The same curve where every class is present.
  if not np.array_equal(
    run.series("eval/miou")[1], run.series("eval/miou_present")[1]
  ):
    miou.append(Curve("eval/miou_present", "present classes", "dash"))
  is_semi = bool(run.series("train/unsup_loss")[0].size)
  figures = [
    _curve_figure(
      run,
      "miou",
      "Evaluation",
      "",
      [
        Panel(
          "",
          [*miou, Curve("eval/pixel_accuracy", "pixel accuracy")],
          percent=True,
        )
      ],
    ),
    _curve_figure(
      run,
      "losses",
      "Losses",
      "Before weighting. Chance: the contrastive loss if all similarities were"
      " equal; floor: the smallest possible one."
      if is_semi
      else "",
      [
        Panel(
          "cross-entropy",
          [
            Curve("train/sup_loss", "supervised", smooth=True),
            Curve("train/unsup_loss", "unsupervised", smooth=True),
          ],
        ),
        Panel(
          "contrastive",
          [
            Curve("train/contra_loss", "contrastive", smooth=True),
            Curve("train/contra_chance", "chance", "dash"),
            Curve("train/contra_floor", "floor", "dot"),
          ],
        ),
      ],
    ),
    _curve_figure(
      run,
      "reliability",
      "Reliability of the pseudo labels",
      "Kept: share of the pixels that enter the unsupervised loss, those with"
      " an entropy below its threshold. Agreement: of teacher and student.",
      [
        Panel(
          "",
          [
            Curve("train/kept_share", "kept", smooth=True),
            Curve("train/confidence", "confidence", smooth=True),
            Curve("train/agreement", "agreement", smooth=True),
          ],
          percent=True,
        ),
        Panel(
          "entropy (nats)",
          [
            Curve("train/keep_threshold", "keep below", smooth=True),
            Curve("train/low_threshold", "anchors below", smooth=True),
          ],
        ),
      ],
    ),
    _curve_figure(
      run,
      "schedules",
      "Schedules",
      "",
      [
        Panel("learning rate", [Curve("train/learning_rate", "learning rate")]),
        Panel("EMA decay", [Curve("train/ema_decay", "EMA decay")]),
      ],
    ),
    _curve_figure(
      run,
      "speed",
      "Speed",
      ("Both halves of the batch counted. " if is_semi else "")
      + "Data wait: share of the time in which the devices had to wait for"
      " images.",
      [
        Panel(
          "images / s",
          [Curve("time/images_per_second", "images per second")],
          from_zero=True,
        ),
        Panel(
          "data wait",
          [Curve("time/data_wait_share", "data wait")],
          percent=True,
          from_zero=True,
        ),
      ],
    ),
  ]
  return _with_star([figure for figure in figures if figure is not None], run)


def _with_star(figures: list[Figure], run: Run) -> list[Figure]:
  """Marks the best evaluation on the curve of the mIoU."""
  best = run.best_evaluation
  return [
    dataclasses.replace(
      figure,
      wide=True,
      caption=f"Star: highest mIoU, {100 * best[1]:.2f} % at step {best[0]:,}.",
      data=[
        *figure.data,
        {
          "type": "scatter",
          "mode": "markers",
          "x": [best[0]],
          "y": [float(f"{best[1]:.6g}")],
          "marker": {"symbol": "star", "size": 13, "color": "--ink"},
          "hoverinfo": "skip",
          "showlegend": False,
          "cliponaxis": False,
        },
      ],
    )
    if figure.stem == "miou" and best is not None
    else figure
    for figure in figures
  ]


def method_figures(run: Run, labelled_pixels: Sequence[int]) -> list[Figure]:
  """How the pseudo labels and the bank do; none of a supervised run.

  Args:
    run: the metrics.
    labelled_pixels: of each class in the labelled masks; empty if not known.
  """
  figures = [
    _curve_figure(
      run,
      "oracle",
      "Pseudo labels against hidden masks",
      "Measured only; nothing learns from these masks.",
      [
        Panel(
          "",
          [
            Curve("oracle/pixel_accuracy", "pixel accuracy"),
            Curve("oracle/ari", "adjusted Rand index"),
            Curve("oracle/miou", "mIoU"),
          ],
          percent=True,
        )
      ],
    ),
    _histogram(run, labelled_pixels),
    _class_map(
      run,
      "pseudo_labels",
      "Classes of the pseudo labels",
      "Share of the pixels of a batch, on a square-root scale.",
      "train/pseudo_label_share/",
    ),
    _class_map(
      run,
      "bank_fill",
      "Fill of the memory bank",
      "Share of each class's queue that holds keys.",
      "train/bank_fill/",
    ),
  ]
  return [figure for figure in figures if figure is not None]


def _histogram(run: Run, labelled_pixels: Sequence[int]) -> Figure | None:
  """Class shares of the pseudo labels beside those of the labelled masks."""
  prefix = "train/pseudo_label_share/"
  classes = _classes_of(run, prefix)
  if not classes:
    return None
  # One batch holds few images: the mean of the last lines is steadier.
  count = min(10, run.series(prefix + classes[0])[0].size)
  pseudo = np.array(
    [run.series(prefix + c)[1][-count:].mean() for c in classes]
  )
  bars = [("pseudo labels", pseudo, LINES[0])]
  said = [f"{c} {100 * v:.1f} %" for c, v in zip(classes, pseudo, strict=True)]
  caption = f"Mean of the last {count} logged batches."
  if len(labelled_pixels) == len(classes) and sum(labelled_pixels):
    prior = np.array(labelled_pixels) / sum(labelled_pixels)
    bars.append(("labelled masks", prior, LINES[1]))
    said = [
      f"{text} (labelled {100 * v:.1f} %)"
      for text, v in zip(said, prior, strict=True)
    ]
  else:
    caption += (
      " The shares of the labelled masks are counted when training draws the"
      " page."
    )
  return Figure(
    stem="histogram",
    title="Pseudo labels against the labelled classes",
    caption=caption,
    alt=f"Share of the pixels of each class: {', '.join(said)}.",
    data=[
      {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": classes,
        "x": _numbers(values),
        "marker": {"color": color},
        "hovertemplate": "%{x:.2%}",
      }
      for name, values, color in bars
    ],
    layout=_layout(
      barmode="group",
      bargap=0.25,
      hovermode="y unified",
      showlegend=len(bars) > 1,
      xaxis=_titled("share of the pixels", tickformat="~%", nticks=6),
      yaxis=_axis(autorange="reversed", showgrid=False, dtick=1),
    ),
    height=max(260, 110 + 26 * len(classes)),
  )


# -- The figures of an evaluation ----------------------------------------------


def confusion_figure(summary: Mapping[str, Any]) -> Figure:
  """The confusion matrix, each row in shares of its true pixels.

  Args:
    summary: of an evaluation, with `confusion`, whose rows are truth, and
      `class_names`.
  """
  counts = np.asarray(summary["confusion"], np.int64)
  names = list(summary["class_names"])
  totals = counts.sum(1, keepdims=True)
  shares = counts / np.maximum(totals, 1)
  mistakes = shares - np.diag(np.diag(shares))
  worst = np.argsort(-mistakes, axis=None)[:3]
  said = [
    f"{100 * mistakes.flat[i]:.0f} % of {names[i // len(names)]} are taken for"
    f" {names[i % len(names)]}"
    for i in worst
    if mistakes.flat[i] > 0
  ]
  right = ", ".join(
    f"{name} {100 * shares[i, i]:.0f} %"
    for i, name in enumerate(names)
    if totals[i, 0]
  )
  return Figure(
    stem="confusion",
    title="Confusion matrix",
    caption="Rows: truth, columns: prediction, in shares of the row.",
    alt=f"Confusion matrix. Right: {right}. Largest mistakes:"
    f" {'; '.join(said) or 'none'}.",
    data=[
      {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": [_numbers(row) for row in shares],
        "customdata": counts.tolist(),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "--heat-0"], [1, "--heat-1"]],
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "truth <b>%{y}</b><br>predicted <b>%{x}</b>"
        "<br>%{z:.1%}: %{customdata:,} pixels<extra></extra>",
      }
    ],
    layout=_layout(
      xaxis=_titled("prediction", tickangle=-90, showgrid=False, dtick=1),
      yaxis=_titled("truth", autorange="reversed", showgrid=False, dtick=1),
    ),
    height=max(380, 150 + 24 * len(names)),
    wide=True,
  )


def calibration_figure(summary: Mapping[str, Any]) -> Figure | None:
  """The reliability diagram.

  Args:
    summary: of an evaluation, with `ece` and `reliability`: pixels, confidence
      and accuracy of each bin of confidence.

  Returns:
    None without any pixel.
  """
  filled = [
    (entry["pixels"], entry["confidence"], entry["accuracy"])
    for entry in summary["reliability"]
    if entry["pixels"]
  ]
  if not filled:
    return None
  ece = summary["ece"]
  pixels, confidence, accuracy = np.array(filled, np.float64).T
  share = pixels / pixels.sum()
  said = ", ".join(
    f"{100 * a:.0f} % right at confidence {c:.2f}"
    for c, a in zip(confidence, accuracy, strict=True)
  )
  return Figure(
    stem="calibration",
    title="Reliability diagram",
    caption=f"Expected calibration error {100 * ece:.2f} %. Above the diagonal"
    " the network is right more often than it is sure.",
    alt=f"Accuracy by confidence: {said}; expected calibration error"
    f" {100 * ece:.2f} %.",
    data=[
      {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": _MUTED, "dash": "dash", "width": 1},
        "hoverinfo": "skip",
        "name": "calibrated",
      },
      {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "accuracy",
        "x": _numbers(confidence),
        "y": _numbers(accuracy),
        "customdata": pixels.astype(np.int64).tolist(),
        "line": {"color": LINES[0], "width": 2},
        "marker": {"size": 7, "color": LINES[0]},
        "hovertemplate": "%{y:.1%} of %{customdata:,} pixels right",
      },
      {
        "type": "bar",
        "name": "share of the pixels",
        "x": _numbers(confidence),
        "y": _numbers(share),
        "yaxis": "y2",
        "marker": {"color": LINES[1]},
        "hovertemplate": "%{y:.1%}",
      },
    ],
    layout=_layout(
      hovermode="x unified",
      hoversubplots="axis",
      bargap=0.1,
      xaxis=_titled(
        "confidence",
        anchor="y2",
        range=[0, 1],
        tickformat=".1f",
        hoverformat=".3f",
        unifiedhovertitle={"text": "confidence %{x:.3f}"},
      ),
      yaxis=_titled(
        "accuracy", domain=[0.36, 1], range=[0, 1.02], tickformat="~%"
      ),
      yaxis2=_titled("pixels", domain=[0, 0.26], tickformat="~%", nticks=3),
    ),
    height=420,
  )


# -- Several runs --------------------------------------------------------------

_COMPARED = (
  ("miou", "mIoU", "eval/miou", True),
  ("sup_loss", "Supervised loss", "train/sup_loss", False),
  ("unsup_loss", "Unsupervised loss", "train/unsup_loss", False),
  ("contra_loss", "Contrastive loss", "train/contra_loss", False),
  ("oracle", "Pseudo labels: accuracy", "oracle/pixel_accuracy", True),
)


def comparison_figures(
  runs: Sequence[Run], labels: Sequence[str], groups: Sequence[int]
) -> list[Figure]:
  """One figure a metric, one line a run.

  Args:
    runs: the metrics.
    labels: one a run.
    groups: number of each run's group, which gives the colour; runs of a group
      are told apart by their dash.

  Returns:
    The figures that at least one run has data for.
  """
  figures = []
  for stem, title, key, percent in _COMPARED:
    data, said, seen = [], [], {}
    for run, label, group in zip(runs, labels, groups, strict=True):
      number = seen.get(group, 0)
      seen[group] = number + 1
      steps, values = run.series(key)
      if not steps.size:
        continue
      data += _traces(
        steps,
        values,
        name=label,
        color=LINES[group % len(LINES)],
        dash=_DASHES[(group // len(LINES) + number) % len(_DASHES)],
        axis="y",
        percent=percent,
        smooth=key.startswith("train/"),
        legendgroup=label,
      )
      ends = f"{100 * values[-1]:.2f} %" if percent else f"{values[-1]:.3g}"
      said.append(f"{label} ends at {ends}")
    if not data:
      continue
    figures.append(
      Figure(
        stem=stem,
        title=title,
        caption="",
        alt=f"{title} over training steps: {'; '.join(said)}.",
        data=data,
        layout=_layout(
          hovermode="x unified",
          showlegend=True,
          xaxis=_step_axis(_last_step(runs)),
          yaxis=_titled(
            "", nticks=6, **({"tickformat": "~%"} if percent else {})
          ),
        ),
        height=420 if stem == "miou" else 340,
        wide=stem == "miou",
      )
    )
  return figures
