"""The pictures of a report: curves and heat maps of metrics, overlays.

Every plot is drawn twice, for light and for dark pages, and the browser picks.
Figures are made without pyplot, which would keep state and look for a display.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from u2pl_jax.run_log import Run

# The pages' colours are in _CSS; these are the same surfaces and inks.
_THEMES = {
  "light": {
    "surface": "#ffffff",
    "ink": "#1f2328",
    "muted": "#6b7280",
    "grid": "#e3e6ea",
    "lines": ("#1667c7", "#c8500a", "#0d7d5a", "#8a3ab9", "#a3195b", "#7a6a00"),
  },
  "dark": {
    "surface": "#1b1f24",
    "ink": "#e4e7eb",
    "muted": "#98a2ae",
    "grid": "#343a42",
    "lines": ("#6fb1ff", "#ff9d5c", "#4fd1a1", "#cf9cf5", "#ff86b5", "#dcc94a"),
  },
}
# Inches and dots per inch of a plot.
PLOT_WIDTH, PLOT_DPI = 4.2, 200
_MUTED = "muted"  # Colour name of reference lines, replaced by the theme's.
_SMOOTH_ABOVE = 60  # Points of a curve that gets a running mean.
_MAX_COLUMNS = 400  # Of a heat map: about its width in pixels.


def _percent(value: float, position: int = 0) -> str:
  """A share as a tick label; the second argument is matplotlib's."""
  del position
  return f"{100 * value:g}%"


def _rc_params(theme: Mapping[str, Any]) -> dict[str, Any]:
  return {
    "figure.facecolor": theme["surface"],
    "savefig.facecolor": theme["surface"],
    "figure.dpi": PLOT_DPI,
    "axes.facecolor": theme["surface"],
    "axes.edgecolor": theme["grid"],
    "axes.labelcolor": theme["ink"],
    "axes.prop_cycle": matplotlib.cycler(color=theme["lines"]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": theme["grid"],
    "grid.linewidth": 0.6,
    "text.color": theme["ink"],
    "xtick.color": theme["muted"],
    "ytick.color": theme["muted"],
    "xtick.labelcolor": theme["ink"],
    "ytick.labelcolor": theme["ink"],
    "font.size": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
  }


@dataclasses.dataclass(frozen=True)
class Plot:
  """One picture: `draw(figure, theme)` fills it in the colours of a theme."""

  stem: str
  title: str
  caption: str
  alt: str
  height: float
  draw: Callable[[Figure, Mapping[str, Any]], None]

  def save(self, folder: pathlib.Path) -> None:
    """Writes <stem>.png and <stem>-dark.png."""
    for name, theme in _THEMES.items():
      suffix = "" if name == "light" else f"-{name}"
      with matplotlib.rc_context(_rc_params(theme)):
        figure = Figure(figsize=(PLOT_WIDTH, self.height), layout="constrained")
        self.draw(figure, theme)
        figure.savefig(folder / f"{self.stem}{suffix}.png")


@dataclasses.dataclass(frozen=True)
class _Curve:
  """A metric as a line; `color` 'muted' and a dash for reference levels."""

  key: str
  label: str
  color: str | None = None
  style: str = "-"
  marker: str = ""
  smooth: bool = False


@dataclasses.dataclass(frozen=True)
class _Panel:
  """Curves on common axes.

  Attributes:
    label: of the vertical axis.
    curves: those without data are left out.
    percent: whether the values are shares.
    from_zero: whether the axis starts at 0.
  """

  label: str
  curves: Sequence[_Curve]
  percent: bool = False
  from_zero: bool = False


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
  """Centred running mean, over fewer values at both ends."""
  kernel = np.ones(width)
  counts = np.convolve(np.ones(values.size), kernel, "same")
  return np.convolve(values, kernel, "same") / counts


def _draw_curves(
  axes: Axes, run: Run, curves: Sequence[_Curve], theme: Mapping[str, Any]
) -> None:
  """Curves with data, and a legend if there is more than one."""
  lines = 0
  for curve in curves:
    steps, values = run.series(curve.key)
    if not steps.size:
      continue
    color = theme["muted"] if curve.color == _MUTED else f"C{lines}"
    lines += curve.color != _MUTED
    marker = curve.marker or ("o" if steps.size == 1 else "")
    if curve.smooth and steps.size > _SMOOTH_ABOVE:
      axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.7)
      values = _running_mean(values, steps.size // 30)
    axes.plot(
      steps,
      values,
      color=color,
      linestyle=curve.style,
      marker=marker,
      markersize=3,
      label=curve.label,
    )
  if len(axes.get_legend_handles_labels()[0]) > 1:
    axes.legend(loc="best", ncols=2, columnspacing=1, handlelength=1.6)


def _style_steps(axes: Axes, label: bool = True) -> None:
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
  if label:
    axes.set_xlabel("step")


def warmup_end(run: Run) -> int | None:
  """Last written step of the supervised phase; None if not followed by more."""
  teaching, _ = run.series("train/unsup_loss")
  if not teaching.size:
    return None
  steps, _ = run.series("train/sup_loss")
  before = steps[steps < teaching[0]]
  return int(before[-1]) if before.size else None


def _curve_plot(
  run: Run,
  stem: str,
  title: str,
  caption: str,
  panels: Sequence[_Panel],
  decorate: Callable[[Axes, Mapping[str, Any]], None] | None = None,
) -> Plot | None:
  """Panels of curves, one above the other, with a common axis of steps.

  Args:
    run: the metrics.
    stem, title, caption: of the plot.
    panels: what to draw.
    decorate: draws more into the first panel.

  Returns:
    The plot of those panels that have data; None if none has.
  """

  def has_data(panel: _Panel) -> bool:
    return any(run.series(curve.key)[0].size for curve in panel.curves)

  panels = list(filter(has_data, panels))
  if not panels:
    return None
  warmup = warmup_end(run)

  def draw(figure: Figure, theme: Mapping[str, Any]) -> None:
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
      if warmup is not None:
        axes.axvspan(0, warmup, color=theme["muted"], alpha=0.12, linewidth=0)
      _draw_curves(axes, run, panel.curves, theme)
      axes.set_ylabel(panel.label)
      if panel.percent:
        axes.yaxis.set_major_formatter(_percent)
      if panel.from_zero:
        axes.set_ylim(bottom=0)
      _style_steps(axes, label=axes is all_axes[-1])
    if decorate:
      decorate(all_axes[0], theme)
    figure.align_ylabels()

  said = []
  for panel in panels:
    for curve in panel.curves:
      steps, values = run.series(curve.key)
      if steps.size:
        said.append(
          f"{curve.label} from {values[0]:.3g} at step {steps[0]} to"
          f" {values[-1]:.3g} at step {steps[-1]}"
        )
  return Plot(
    stem=stem,
    title=title,
    caption=caption,
    alt=f"{title} over training steps: {'; '.join(said)}.",
    height=2.5 if len(panels) == 1 else 1.2 + 1.5 * len(panels),
    draw=draw,
  )


def _class_plot(
  run: Run, stem: str, title: str, caption: str, prefix: str
) -> Plot | None:
  """A heat map of one metric a class: rows are classes, columns steps."""
  classes = [
    name for name in run.class_names if run.series(prefix + name)[0].size
  ]
  # Names that only these metrics know, e.g. before the first evaluation.
  for row in run.rows:
    for key in row:
      name = key.removeprefix(prefix)
      if key != name and name not in classes and run.series(key)[0].size:
        classes.append(name)
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
  # A column reaches from the middle between two steps to the next middle.
  half = np.diff(steps) / 2 if steps.size > 1 else np.array([0.5])
  edges = np.concatenate(
    [[steps[0] - half[0]], steps[:-1] + half[: steps.size - 1]]
    + [[steps[-1] + half[-1]]]
  )
  latest = [run.series(prefix + name)[1][-1] for name in classes]

  def draw(figure: Figure, theme: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    # The square root sets a rare class apart from an absent one.
    mesh = axes.pcolormesh(
      edges,
      np.arange(len(classes) + 1),
      table,
      cmap=colors.LinearSegmentedColormap.from_list(
        "share", (theme["grid"], theme["lines"][0])
      ),
      norm=colors.PowerNorm(0.5, 0, max(1e-6, float(np.nanmax(table)))),
      rasterized=True,
    )
    # Thin gaps keep the rows of two full classes apart.
    for row in range(1, len(classes)):
      axes.axhline(row, color=theme["surface"], linewidth=1.5)
    axes.set_yticks(np.arange(len(classes)) + 0.5, classes)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    for row, value in enumerate(latest):
      axes.annotate(
        f"{100 * value:.1f}%",
        (1.01, row + 0.5),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=8.5,
      )
    _style_steps(axes)
    bar = figure.colorbar(mesh, ax=axes, pad=0.13, fraction=0.06)
    bar.ax.yaxis.set_major_formatter(_percent)
    bar.ax.yaxis.set_major_locator(ticker.MaxNLocator(4))
    bar.outline.set_visible(False)

  said = ", ".join(
    f"{name} {100 * value:.1f} %"
    for name, value in zip(classes, latest, strict=True)
  )
  return Plot(
    stem=stem,
    title=title,
    caption=caption,
    alt=f"{title} over training steps; at the end: {said}.",
    height=max(2.6, 0.9 + 0.24 * len(classes)),
    draw=draw,
  )


def run_plots(run: Run) -> list[Plot]:
  """The plots that this run has data for."""
  best = run.best("eval/miou")

  def mark_best(axes: Axes, theme: Mapping[str, Any]) -> None:
    if best is not None:
      axes.plot(*best, marker="*", markersize=9, color=theme["ink"])

  miou = [_Curve("eval/miou", "mIoU", marker="o")]
  # The same curve where every class is present.
  if not np.array_equal(
    run.series("eval/miou")[1], run.series("eval/miou_present")[1]
  ):
    miou.append(_Curve("eval/miou_present", "present classes", _MUTED, "--"))

  many = run.series("train/sup_loss")[0].size > _SMOOTH_ABOVE
  # By height, so that the page's rows of three come out even.
  plots = [
    _curve_plot(
      run,
      "miou",
      "Evaluation",
      "Star: highest mIoU." if best else "",
      [
        _Panel(
          "",
          [
            *miou,
            _Curve("eval/pixel_accuracy", "pixel accuracy"),
          ],
          percent=True,
        )
      ],
      mark_best,
    ),
    _curve_plot(
      run,
      "oracle",
      "Pseudo labels against hidden labels",
      "Measured only; nothing learns from these labels.",
      [
        _Panel(
          "",
          [
            _Curve("oracle/pixel_accuracy", "pixel accuracy", marker="o"),
            _Curve("oracle/ari", "Rand index (adj.)", marker="o"),
            _Curve("oracle/miou", "mIoU", marker="o"),
          ],
        )
      ],
    ),
    _curve_plot(
      run,
      "images_per_second",
      "Speed",
      "Images through training, both halves of the batch counted.",
      [
        _Panel(
          "images / s",
          [_Curve("time/images_per_second", "images per second")],
          from_zero=True,
        )
      ],
    ),
    _curve_plot(
      run,
      "losses",
      "Losses",
      "Before weighting."
      + (" Thin: as logged; thick: running mean." if many else ""),
      [
        _Panel(
          "cross-entropy",
          [
            _Curve("train/sup_loss", "supervised", smooth=True),
            _Curve("train/unsup_loss", "unsupervised", smooth=True),
          ],
        ),
        _Panel(
          "contrastive",
          [
            _Curve("train/contra_loss", "loss", smooth=True),
            _Curve("train/contra_chance", "chance", _MUTED, "--"),
            _Curve("train/contra_floor", "floor", _MUTED, ":"),
          ],
        ),
      ],
    ),
    _curve_plot(
      run,
      "reliability",
      "Reliability of the pseudo labels",
      "Kept: share of the pixels that enter the unsupervised loss, those with"
      " an entropy below its threshold. Agreement: of teacher and student.",
      [
        _Panel(
          "",
          [
            _Curve("train/kept_share", "kept", smooth=True),
            _Curve("train/confidence", "confidence", smooth=True),
            _Curve("train/agreement", "agreement", smooth=True),
          ],
          percent=True,
        ),
        _Panel(
          "entropy (nats)",
          [
            _Curve("train/keep_threshold", "keep below", smooth=True),
            _Curve("train/low_threshold", "anchors below", smooth=True),
            _Curve("train/high_threshold", "negatives above", smooth=True),
          ],
        ),
      ],
    ),
    _curve_plot(
      run,
      "learning_rate",
      "Schedules",
      "",
      [
        _Panel(
          "learning rate", [_Curve("train/learning_rate", "learning rate")]
        ),
        _Panel("EMA decay", [_Curve("train/ema_decay", "EMA decay")]),
      ],
    ),
    _class_plot(
      run,
      "pseudo_labels",
      "Classes of the pseudo labels",
      "Share of the pixels; at right the last value.",
      "train/pseudo_label_share/",
    ),
    _class_plot(
      run,
      "bank_fill",
      "Fill of the memory bank",
      "Share of each class's queue that holds keys; at right the last value.",
      "train/bank_fill/",
    ),
  ]
  return [plot for plot in plots if plot is not None]


def overlay(
  image: np.ndarray, labels: np.ndarray, palette: np.ndarray
) -> np.ndarray:
  """Class colours over the image; a label without class is striped.

  Stripes, since any plain colour may be the colour of a class.

  Args:
    image: [h, w, 3] uint8.
    labels: [h, w] int.
    palette: [k, 3].

  Returns:
    [h, w, 3] uint8.
  """
  num_classes = len(palette)
  has_class = (labels >= 0) & (labels < num_classes)
  color = palette[np.where(has_class, labels, 0)].astype(np.float32)
  y, x = np.indices(labels.shape)
  stripe = (x + y) // max(2, labels.shape[1] // 64) % 2
  color = np.where(has_class[..., None], color, 255 * stripe[..., None])
  return (0.4 * image + 0.6 * color).round().astype(np.uint8)


def save_overlay(
  path: pathlib.Path,
  *,
  image: np.ndarray,
  truth: np.ndarray,
  prediction: np.ndarray,
  entropy: np.ndarray,
  palette: np.ndarray,
) -> None:
  """Image | truth | prediction | entropy, on a dark mat in both themes.

  Args:
    path: of the PNG.
    image: [h, w, 3] uint8.
    truth, prediction: [h, w] int; striped where the value is no class.
    entropy: [h, w], drawn from 0 to its maximum log k, so that images compare.
    palette: [k, 3].
  """
  height, width = truth.shape
  max_entropy = math.log(max(2, len(palette)))
  theme, dpi = _THEMES["dark"], 100
  # Small images are enlarged, large ones reduced: the page is for looking.
  panel = float(np.clip(width, 260, 480)) / dpi
  panels = (
    ("image", image),
    ("truth", overlay(image, truth, palette)),
    ("prediction", overlay(image, prediction, palette)),
    (f"entropy, 0 to {max_entropy:.2f} nats", entropy),
  )
  # In proportion, since the page shows all pictures equally wide.
  gap, title = 0.02 * panel, 0.1 * panel
  figure_width = len(panels) * (panel + gap) + gap
  panel_height = panel * height / width
  figure_height = panel_height + title + gap
  figure = Figure((figure_width, figure_height), dpi=dpi)
  figure.set_facecolor(theme["surface"])
  for i, (text, pixels) in enumerate(panels):
    axes = figure.add_axes(
      (
        (gap + i * (panel + gap)) / figure_width,
        gap / figure_height,
        panel / figure_width,
        panel_height / figure_height,
      )
    )
    axes.imshow(
      pixels,
      cmap="magma",
      vmin=0,
      vmax=max_entropy,
      interpolation="nearest" if width < 260 else "antialiased",
      aspect="auto",
    )
    axes.set_axis_off()
    axes.set_title(
      text, color=theme["ink"], fontsize=3.8 * panel, pad=1.5 * panel
    )
  figure.savefig(path)


def comparison_plot(runs: Sequence[Run], labels: Sequence[str]) -> Plot | None:
  """The validation curves of several runs; None if none was evaluated."""
  if not any(run.series("eval/miou")[0].size for run in runs):
    return None

  def draw(figure: Figure, theme: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    markers = "os^Dvp"
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
      steps, values = run.series("eval/miou")
      if steps.size:
        axes.plot(
          steps,
          values,
          color=f"C{i}",
          # Beyond the colours, lines are told apart by their dash.
          linestyle=("-", "--", ":")[i // len(theme["lines"]) % 3],
          marker=markers[i % len(markers)],
          markersize=3.5,
          label=label,
        )
    axes.set_ylabel("mIoU")
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(loc="lower right")
    _style_steps(axes)

  said = "; ".join(
    f"{label} ends at {100 * final:.2f} %"
    for run, label in zip(runs, labels, strict=True)
    if (final := run.last("eval/miou")) is not None
  )
  return Plot(
    stem="miou",
    title="mIoU",
    caption="",
    alt=f"mIoU over training steps of each run: {said}.",
    height=3.0,
    draw=draw,
  )
