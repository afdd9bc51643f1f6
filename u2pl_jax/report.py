"""The page of a run: numbers, curves and pictures, from its workdir.

  python -m u2pl_jax.report WORKDIR
  python -m u2pl_jax.report WORKDIR WORKDIR ... --output FOLDER
  python -m u2pl_jax.report --advice WORKDIR [WORKDIR ...]

The first command draws a run's page again from what the run left behind, and
the tables and pictures of run_stats.py. The second also compares runs on one
page. The third draws nothing: it prints what stands out in the metrics and what
to change, compared with the first supervised run among the workdirs. Nothing
here needs jax or a network, and the pages open from a file: plotly lies beside
them.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from input_pipeline import storage
from u2pl_jax import report_figures, report_page
from u2pl_jax.advice import advice_text, findings
from u2pl_jax.report_images import Pictures, draw_pictures
from u2pl_jax.report_page import escape, percent
from u2pl_jax.run_log import Run, RunError, read_run
from u2pl_jax.run_stats import write_stats

_METHODS = {
  "u2pl": "U2PL, semi-supervised",
  "supervised": "supervised, from labels alone",
}
_PROTOCOLS = {
  "padded": "whole images in one padded shape, padding not counted",
  "whole": "whole images at their own size",
  "center_crop": "centre crops, padding counted as class 0 (published code)",
  "sliding_window": "overlapping windows, averaged (published code)",
}
# Keys of the config that make no other experiment of two runs.
_NOT_THE_EXPERIMENT = ("seed", "log", "checkpoint")


# -- Words ---------------------------------------------------------------------


def _method_text(run: Run) -> str:
  method = run.setting("method")
  text = _METHODS.get(str(method), str(method or ""))
  quirks = run.setting("quirks")
  return f"{text}; quirks: {quirks}" if quirks else text


def _protocol_text(run: Run) -> str:
  name = run.setting("eval.protocol")
  if not name:
    return ""
  text = f"{name}: {_PROTOCOLS.get(str(name), 'see configs/common.py')}"
  is_sliding = name == "sliding_window"
  size = run.setting("eval.window" if is_sliding else "eval.pad_to")
  if name != "whole" and isinstance(size, list | tuple):
    text += f", {' x '.join(map(str, size))}"
  images = run.setting("dataset.validation_list")
  return f"{text}; images of {images}" if images else text


def _last_step(run: Run) -> int | None:
  return int(run.rows[-1]["step"]) if run.rows else None


def _hours(run: Run) -> float | None:
  """Hours of training; the clock starts anew whenever a run goes on."""
  _, seconds = run.series("time/seconds")
  if not seconds.size:
    return None
  # A fall is a new start, which begins at 0.
  ends = np.append(seconds[:-1] > seconds[1:], True)
  return float(seconds[ends].sum() / 3600)


def _hours_text(hours: float) -> str:
  return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _interval(run: Run) -> tuple[float, float] | None:
  """Of the best mIoU, if its images were counted."""
  interval = run.evaluation.get("interval") or {}
  best = run.best_evaluation
  if best is None or run.evaluation.get("step") != best[0]:
    return None
  low, high = interval.get("low"), interval.get("high")
  return None if low is None or high is None else (low, high)


# -- The page of a run ---------------------------------------------------------


def _tiles(run: Run) -> list[tuple[str, str, str]]:
  found = []
  best = run.best_evaluation
  if best is not None:
    interval = _interval(run)
    note = f"step {best[0]:,}"
    if interval is not None:
      low, high = (100 * value for value in interval)
      note = f"95 %: {low:.1f} to {high:.1f}; {note}"
    found.append(("best mIoU", f"{percent(best[1])} %", note))
    steps, values = run.series("eval/miou")
    found.append(
      ("last mIoU", f"{percent(values[-1])} %", f"step {steps[-1]:,}")
    )
    accuracy = run.value_at("eval/pixel_accuracy", best[0])
    if accuracy is not None:
      found.append(("pixel accuracy", f"{percent(accuracy)} %", "at the best"))
  ece = run.evaluation.get("ece")
  if ece is not None:
    found.append(("calibration error", f"{percent(ece)} %", "at the best"))
  if (step := _last_step(run)) is not None:
    found.append(("steps", f"{step:,}", "last logged"))
  if (hours := _hours(run)) is not None:
    found.append(("time", _hours_text(hours), "evaluation included"))
  speeds = run.series("time/images_per_second")[1]
  if speeds.size:
    found.append(("images / s", f"{np.median(speeds):.4g}", "median"))
  return found


def _run_facts(run: Run) -> list[tuple[str, Any]]:
  extra = run.extra
  versions = extra.get("versions") or {}
  hashed = run.evaluation.get("protocol_hash")
  return [
    ("protocol", _protocol_text(run)),
    ("protocol hash", hashed),
    (
      "data set",
      run.dataset.get("name")
      or extra.get("dataset")
      or run.setting("dataset.name"),
    ),
    ("labelled images", run.setting("dataset.labelled_list")),
    ("backbone", run.setting("model.backbone")),
    ("epochs", run.setting("schedule.epochs")),
    ("seed", run.setting("seed")),
    ("devices", extra.get("devices")),
    ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
  ]


def _iou_table(run: Run) -> str:
  """Classes with their colours and, once evaluated, their IoU as bars."""
  names, palette = run.class_names, run.palette
  steps = run.series("eval/miou")[0]
  if not names:
    return ""
  if not steps.size:
    legend = report_page.class_legend(names, palette)
    return f'<div class="card">{legend}</div>'
  last, best = int(steps[-1]), run.best_evaluation[0]
  rows = []
  for i, name in enumerate(names):
    key = f"eval/iou/{name}"
    at_best, at_last = run.value_at(key, best), run.value_at(key, last)
    rows.append(
      (
        report_page.swatch(palette, i) + escape(name),
        report_page.bar_cell(at_best),
        percent(at_best),
        percent(at_last),
      )
    )
  return report_page.table(
    ("class", "", f"best<br>step {best:,}", f"last<br>step {last:,}"),
    rows,
    foot=[
      (
        "mIoU",
        "",
        percent(run.value_at("eval/miou", best)),
        percent(run.value_at("eval/miou", last)),
      )
    ],
    caption="IoU in percent. Bars: best evaluation.",
    label="IoU of each class",
  )


def _classes(run: Run) -> list[str]:
  figures = []
  if run.evaluation.get("confusion"):
    figures = [
      report_figures.calibration_figure(run.evaluation),
      report_figures.confusion_figure(run.evaluation),
    ]
  figures = [figure for figure in figures if figure is not None]
  return [
    f'<div class="grid">{_iou_table(run)}'
    f"{''.join(map(report_page.figure, figures))}</div>"
    if run.class_names
    else ""
  ]


def _method_note(run: Run, pictures: Mapping[str, Any]) -> str:
  if not pictures.get("method"):
    return ""
  return (
    f"Pictures: the {pictures['network']} after step {pictures['step']:,}, on"
    " clean images with running statistics, and thresholds over these images;"
    " in training it judges mixed crops with the statistics of the batch. An"
    " unreliable pixel is a negative of the classes that it ranks"
    f" {pictures['low_rank']} to {pictures['high_rank'] - 1}, counted from 0"
    " for the most probable one."
  )


def _images_note(pictures: Mapping[str, Any]) -> str:
  samples = pictures.get("samples")
  if not samples:
    return ""
  chosen = (
    "The first validation images"
    if samples[0]["group"] == "first"
    else "Best, median and worst validation images by the mIoU of the image"
  )
  return f"{chosen}; the {pictures['network']} after step {pictures['step']:,}."


def _run_page(run: Run) -> str:
  extra = run.extra
  pictures = extra.get("pictures") or {}
  names, palette = run.class_names, run.palette
  config = json.dumps(run.config, indent=2, ensure_ascii=False)
  sections = [
    ("advice", "Advice", [report_page.advice(findings(run))], ""),
    (
      "curves",
      "Curves",
      [report_page.figures(report_figures.curve_figures(run))],
      _curves_note(run),
    ),
    ("classes", "Classes", _classes(run), ""),
    (
      "method",
      "The method at work",
      [
        report_page.method_pictures(pictures, names, palette),
        report_page.figures(
          report_figures.method_figures(run, extra.get("labelled_pixels") or [])
        ),
      ],
      _method_note(run, pictures),
    ),
    (
      "images",
      "Images",
      [
        report_page.validation_pictures(
          pictures.get("samples") or [], names, palette
        )
      ],
      _images_note(pictures),
    ),
    (
      "config",
      "Config",
      [report_page.details("All keys", report_page.code(config))]
      if run.config
      else [],
      "",
    ),
  ]
  sections = [entry for entry in sections if any(entry[2])]
  body = [
    "<header>",
    f"<h1>{escape(run.name)}</h1>",
    f'<p class="muted">{escape(_method_text(run))}</p>',
    report_page.navigation([entry[:2] for entry in sections]),
    "</header>",
    "<main>",
    report_page.no_script_notice(),
  ]
  if not run.rows:
    body.append(
      report_page.notice(
        "metrics.jsonl holds no step yet: the run has logged nothing so far."
      )
    )
  if run.skipped_lines:
    body.append(
      report_page.notice(
        f"{run.skipped_lines} line(s) of metrics.jsonl could not be read and"
        " are left out."
      )
    )
  body.append(report_page.tiles(_tiles(run)))
  body.append(report_page.facts(_run_facts(run)))
  if extra.get("command"):
    body.append("<h2>To reproduce</h2>")
    body.append(report_page.code(extra["command"]))
  body += [
    report_page.section(name, title, parts, note)
    for name, title, parts, note in sections
  ]
  body.append("</main>")
  return report_page.page(run.name, body)


def _curves_note(run: Run) -> str:
  words = []
  if report_figures.warmup_end(run) is not None:
    words.append("Shaded: warm-up, from labels alone.")
  if run.best_evaluation is not None:
    words.append("Dotted: the best evaluation.")
  words.append(
    "Thin: as logged; thick: running mean. Drag to zoom, double click to see"
    " all; with the keyboard, arrow keys read the values."
  )
  return " ".join(words)


def _running_command() -> str | None:
  """The command line of this process, if it is a training run."""
  spec = getattr(sys.modules.get("__main__"), "__spec__", None)
  if spec is None or spec.name != "u2pl_jax.main":
    return None
  return shlex.join(["python", "-m", spec.name, *sys.argv[1:]])


def _versions() -> dict[str, str]:
  """Of Python and of the installed packages that numbers depend on."""
  found = {"Python": platform.python_version()}
  for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _write_plotly(folder: pathlib.Path) -> None:
  """plotly.min.js beside the page, from the package that is installed."""
  # Found, not imported: the package takes a second to load.
  spec = importlib.util.find_spec("plotly")
  if spec is None or spec.origin is None:
    raise RunError(
      "the figures need the package plotly, which is not installed: run"
      " pip install -r requirements.txt"
    )
  package = pathlib.Path(spec.origin).parent
  source = package / "package_data" / report_page.PLOTLY_FILE
  target = folder / report_page.PLOTLY_FILE
  if target.is_file() and target.stat().st_size == source.stat().st_size:
    return
  storage.write_whole(target, source.read_bytes())


def _render(run: Run, extra: Mapping[str, Any]) -> pathlib.Path:
  """Writes the page and remembers `extra` beside it."""
  run = dataclasses.replace(run, extra=extra)
  folder = run.report_page.parent
  folder.mkdir(parents=True, exist_ok=True)
  _write_plotly(folder)
  text = json.dumps(extra, indent=2, ensure_ascii=False) + "\n"
  storage.write_whole(run.report_page, _run_page(run).encode())
  # Last, since it says that the page is there.
  storage.write_whole(folder / "report.json", text.encode())
  return run.report_page


def write_report(
  workdir: str | os.PathLike,
  pictures: Pictures,
  info: Any,
  ignore_label: int,
  *,
  devices: str = "",
  labelled_pixels: Sequence[int] = (),
) -> pathlib.Path:
  """Writes workdir/report/: the page, its pictures and plotly.

  To be called by the process that trained, whose command line and package
  versions the page shows; `refresh_report` is for later.

  Args:
    workdir: with metrics.jsonl and config.json.
    pictures: the images to show.
    info: `name`, `class_names` and `palette` of the data set, such as
      `input_pipeline.DatasetInfo`.
    ignore_label: value of `Sample.truth` where there is no label.
    devices: what the run trains on, in words.
    labelled_pixels: of each class in the labelled masks; () if not known.

  Returns:
    Path of the page.

  Raises:
    RunError: the folder is no workdir, or a sample's arrays differ in size.
    OSError: a file cannot be written.
  """
  run = read_run(workdir)
  palette = np.asarray(info.palette, np.uint8).reshape(-1, 3)
  extra = {
    "dataset": info.name,
    "class_names": list(info.class_names),
    "palette": palette.tolist(),
    "command": _running_command() or run.extra.get("command"),
    "devices": devices or run.extra.get("devices"),
    "versions": _versions(),
    "labelled_pixels": list(labelled_pixels)
    or run.extra.get("labelled_pixels"),
    "pictures": draw_pictures(
      run.report_page.parent, pictures, palette, ignore_label
    ),
  }
  return _render(run, extra)


def pictured_step(workdir: str | os.PathLike) -> int | None:
  """Updates of the network that a report's pictures are of; None without any.

  Raises:
    RunError: the folder is no workdir, or a file in it is broken.
  """
  return (read_run(workdir).extra.get("pictures") or {}).get("step")


def complete_step(workdir: str | os.PathLike) -> int | None:
  """Last step that `refresh_report` has drawn; None if it has drawn nothing.

  Raises:
    RunError: the folder is no workdir, or a file in it is broken.
  """
  return read_run(workdir).extra.get("complete_step")


def labelled_pixels(workdir: str | os.PathLike) -> list[int]:
  """What an earlier `write_report` was told; [] if there was none.

  Raises:
    RunError: the folder is no workdir, or a file in it is broken.
  """
  return list(read_run(workdir).extra.get("labelled_pixels") or [])


def refresh_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Draws a run's page again, with the pictures that it already has.

  Writes the tables and pictures of `run_stats` too, which take some seconds.

  Args:
    workdir: as of `write_report`.

  Returns:
    Path of the page.

  Raises:
    RunError: the folder is no workdir, or a file in it is broken.
    OSError: a file cannot be written.
  """
  run = read_run(workdir)
  extra = dict(run.extra)
  folder = run.report_page.parent

  def is_whole(entry: Mapping[str, Any]) -> bool:
    return all((folder / file).is_file() for file in entry["files"].values())

  if pictures := dict(extra.get("pictures") or {}):
    for part in ("samples", "method"):
      pictures[part] = list(filter(is_whole, pictures[part]))
    extra["pictures"] = pictures
  write_stats(run)
  extra["complete_step"] = _last_step(run)
  return _render(run, extra)


# -- Several runs --------------------------------------------------------------


def run_labels(runs: Sequence[Run]) -> list[str]:
  """One name a run: with the seed, or the folder, where names are equal."""
  names = [run.name for run in runs]
  with_seed = [
    f"{run.name}, seed {run.setting('seed')}"
    if names.count(run.name) > 1
    else run.name
    for run in runs
  ]
  return [
    f"{run.name} ({run.workdir})" if with_seed.count(label) > 1 else label
    for run, label in zip(runs, with_seed, strict=True)
  ]


def group_runs(runs: Sequence[Run]) -> list[int]:
  """Number of the group of each run; runs of a group differ in seed only."""
  found: dict[str, int] = {}
  groups = []
  for run in runs:
    config = {
      key: value
      for key, value in run.config.items()
      if key not in _NOT_THE_EXPERIMENT
    }
    # A run without config is like no other.
    text = json.dumps(config, sort_keys=True) if config else str(run.workdir)
    groups.append(found.setdefault(text, len(found)))
  return groups


def _spread_text(values: Sequence[float | None]) -> str:
  """Mean and sample standard deviation, in percent."""
  known = [100 * value for value in values if value is not None]
  if not known:
    return "–"
  if len(known) == 1:
    return f"{known[0]:.2f}"
  return f"{statistics.mean(known):.2f} ± {statistics.stdev(known):.2f}"


def _best_value(run: Run) -> float | None:
  best = run.best_evaluation
  return None if best is None else best[1]


def _groups_table(
  runs: Sequence[Run], labels: Sequence[str], groups: Sequence[int]
) -> str:
  """One line a group, with means over its seeds; empty without any group."""
  if len(set(groups)) == len(runs):
    return ""
  rows = []
  for group in sorted(set(groups)):
    members = [r for r, g in zip(runs, groups, strict=True) if g == group]
    seeds = ", ".join(str(run.setting("seed")) for run in members)
    only = labels[groups.index(group)]
    rows.append(
      (
        escape(members[0].name if len(members) > 1 else only),
        escape(_or_dash(members[0].setting("method"))),
        escape(seeds),
        _spread_text([run.last("eval/miou") for run in members]),
        _spread_text([_best_value(run) for run in members]),
        _spread_text([run.last("eval/pixel_accuracy") for run in members]),
      )
    )
  return report_page.table(
    ("runs", "method", "seeds", "last mIoU", "best mIoU", "pixel accuracy"),
    rows,
    caption="In percent: mean ± standard deviation over seeds.",
    label="Means over seeds",
  )


def _runs_table(
  runs: Sequence[Run], labels: Sequence[str], links: Sequence[str]
) -> str:
  rows = []
  for run, label, link in zip(runs, labels, links, strict=True):
    best, interval = run.best_evaluation, _interval(run)
    best_text = "–" if best is None else percent(best[1])
    if interval is not None:
      low, high = (100 * value for value in interval)
      best_text += f" [{low:.1f}, {high:.1f}]"
    hours, last_step = _hours(run), _last_step(run)
    rows.append(
      (
        f'<a href="{escape(link)}">{escape(label)}</a>',
        escape(_or_dash(run.setting("method"))),
        escape(_or_dash(run.setting("seed"))),
        "–" if last_step is None else f"{last_step:,}",
        percent(run.last("eval/miou")),
        best_text,
        "–" if best is None else f"{best[0]:,}",
        percent(run.last("eval/pixel_accuracy")),
        "–" if hours is None else _hours_text(hours),
      )
    )
  has_interval = any(_interval(run) is not None for run in runs)
  return report_page.table(
    (
      "run",
      "method",
      "seed",
      "steps",
      "last mIoU",
      "best mIoU",
      "at step",
      "pixel accuracy",
      "time",
    ),
    rows,
    caption="In percent."
    + (" In brackets: 95 % interval over images." if has_interval else ""),
    label="Runs",
  )


def _class_table(runs: Sequence[Run], labels: Sequence[str]) -> str:
  names = list(dict.fromkeys(name for run in runs for name in run.class_names))
  if not names:
    return ""

  def cells(key: str) -> list[str]:
    values = [run.last(key) for run in runs]
    known = [value for value in values if value is not None]
    texts = [
      f"<b>{percent(value)}</b>"
      if len(set(known)) > 1 and value == max(known)
      else percent(value)
      for value in values
    ]
    if len(values) == 2:
      difference = None if len(known) < 2 else 100 * (values[1] - values[0])
      texts.append("–" if difference is None else f"{difference:+.2f}")
    return texts

  head = ["class", *map(escape, labels)]
  if len(runs) == 2:
    head.append("difference")
  return report_page.table(
    head,
    [(escape(name), *cells(f"eval/iou/{name}")) for name in names],
    foot=[("mIoU", *cells("eval/miou"))],
    caption="IoU in percent at the last evaluation; bold: highest.",
    label="IoU of each class and run",
  )


def _or_dash(value: Any) -> Any:
  return "–" if value is None else value


def _comparison_warnings(runs: Sequence[Run]) -> list[str]:
  """What makes the numbers of these runs not comparable."""
  return [
    report_page.notice(f"The runs differ in their {text}: compare with care.")
    for text, values in (
      ("evaluation protocols", [_protocol_text(run) for run in runs]),
      ("classes", [tuple(run.class_names) for run in runs if run.rows]),
      ("last steps", [_last_step(run) for run in runs]),
    )
    if len(set(values)) > 1
  ]


def write_comparison(
  workdirs: Sequence[str | os.PathLike], output: str | os.PathLike
) -> pathlib.Path:
  """Writes one page that compares runs and links to their reports.

  A report that is missing is drawn first.

  Args:
    workdirs: of the runs, in the order of the columns; of two runs the table
      also has the difference, second minus first.
    output: folder of the page, made if need be.

  Returns:
    Path of the page.

  Raises:
    RunError: a folder is no workdir, or a file in it is broken.
    OSError: a file cannot be written.
  """
  runs = [read_run(workdir) for workdir in workdirs]
  for run in runs:
    if not run.report_page.is_file():
      refresh_report(run.workdir)
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  labels, groups = run_labels(runs), group_runs(runs)
  links = [
    urllib.parse.quote(
      pathlib.Path(
        os.path.relpath(run.report_page.resolve(), output.resolve())
      ).as_posix()
    )
    for run in runs
  ]
  figures = report_figures.comparison_figures(runs, labels, groups)
  body = [
    "<header><h1>Comparison of runs</h1>",
    f'<p class="muted">{escape(", ".join(labels))}</p></header>',
    "<main>",
    report_page.no_script_notice(),
    *_comparison_warnings(runs),
  ]
  if not any(run.series("eval/miou")[0].size for run in runs):
    body.append(report_page.notice("No run has been evaluated yet."))
  tables = [
    _groups_table(runs, labels, groups),
    _runs_table(runs, labels, links),
  ]
  body += [
    report_page.section(
      "runs", "Runs", [f'<div class="pictures">{"".join(tables)}</div>']
    ),
    report_page.section("curves", "Curves", [report_page.figures(figures)]),
    report_page.section("classes", "Classes", [_class_table(runs, labels)]),
  ]
  protocols = list(dict.fromkeys(map(_protocol_text, runs)))
  body.append(report_page.facts([("protocol", text) for text in protocols]))
  body.append("</main>")
  _write_plotly(output)
  page = output / "index.html"
  text = report_page.page("Comparison of runs", body)
  storage.write_whole(page, text.encode())
  return page


def main(arguments: Sequence[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m u2pl_jax.report",
    description="Draw the page of a run again; compare several runs.",
  )
  parser.add_argument("workdirs", nargs="+", metavar="WORKDIR")
  parser.add_argument(
    "--output",
    help="folder of the comparison (default: 'comparison' beside the first"
    " run); of several runs only",
  )
  parser.add_argument(
    "--advice",
    action="store_true",
    help="print what stands out in the metrics and what to change; no page",
  )
  options = parser.parse_args(arguments)
  several = len(options.workdirs) > 1
  if options.advice and options.output:
    parser.error("--advice writes no page: leave --output out")
  if options.output and not several:
    parser.error("--output is for the comparison of several runs")
  try:
    if options.advice:
      print(advice_text([read_run(path) for path in options.workdirs]))
      return 0
    for workdir in options.workdirs:
      print(refresh_report(workdir))
    if several:
      first = pathlib.Path(options.workdirs[0]).resolve()
      output = options.output or first.parent / "comparison"
      print(write_comparison(options.workdirs, output))
  except (RunError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
