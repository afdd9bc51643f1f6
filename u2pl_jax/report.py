"""The page of a run: curves, class table and overlays, from its workdir.

  python -m u2pl_jax.report WORKDIR
  python -m u2pl_jax.report WORKDIR WORKDIR ... --output FOLDER
  python -m u2pl_jax.report --advice WORKDIR [WORKDIR ...]

The first command draws a run's page again from metrics.jsonl and config.json,
the second also compares runs on one page, the third draws nothing: it prints
what stands out in the metrics and what to change, compared with the first
supervised run among the workdirs. Nothing here needs jax or a network,
and the pages are plain HTML and PNG without script: they open from a file.
"""

import argparse
import dataclasses
import html
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from u2pl_jax.advice import advice_text
from u2pl_jax.report_plots import (
  PLOT_DPI,
  PLOT_WIDTH,
  Plot,
  comparison_plot,
  run_plots,
  save_overlay,
  warmup_end,
)
from u2pl_jax.run_log import Run, RunError, read_run
from u2pl_jax.run_stats import write_stats


@dataclasses.dataclass(frozen=True)
class Sample:
  """One validation image and what the network made of it.

  Attributes:
    id: of the image; also names its picture.
    image: [h, w, 3] uint8 RGB.
    truth: [h, w] uint8, the ignore label where there is none.
    prediction: [h, w] int class ids.
    entropy: [h, w] float, of the prediction, in nats.
  """

  id: str
  image: np.ndarray
  truth: np.ndarray
  prediction: np.ndarray
  entropy: np.ndarray


def _check_sample(sample: Sample) -> None:
  size = np.shape(sample.image)[:2]
  for name in ("truth", "prediction", "entropy"):
    shape = np.shape(getattr(sample, name))
    if shape != size:
      raise RunError(
        f"sample {sample.id!r}: image of size {size} but {name} of {shape}"
      )


def _file_stem(sample_id: str, taken: set[str]) -> str:
  """A file name for an id that may hold slashes; different for every id."""
  stem = base = re.sub(r"[^\w.-]+", "_", sample_id).strip(".") or "image"
  number = 1
  while stem.lower() in taken:
    number += 1
    stem = f"{base}-{number}"
  taken.add(stem.lower())
  return stem


def _draw_samples(
  folder: pathlib.Path,
  samples: Sequence[Sample],
  palette: np.ndarray,
  ignore_label: int,
) -> list[dict[str, Any]]:
  """Writes overlays/*.png; returns what the page says of each."""
  overlays = folder / "overlays"
  overlays.mkdir(parents=True, exist_ok=True)
  for old in overlays.glob("*.png"):
    old.unlink()
  taken: set[str] = set()
  entries = []
  for sample in samples:
    _check_sample(sample)
    file = f"overlays/{_file_stem(sample.id, taken)}.png"
    save_overlay(
      folder / file,
      image=sample.image,
      truth=sample.truth,
      prediction=sample.prediction,
      entropy=sample.entropy,
      palette=palette,
    )
    valid = sample.truth != ignore_label
    right = (sample.prediction == sample.truth)[valid]
    entries.append(
      {
        "id": sample.id,
        "file": file,
        "accuracy": float(right.mean()) if right.size else None,
        "mean_entropy": float(np.mean(sample.entropy)),
      }
    )
  return entries


# -- The page ------------------------------------------------------------------

_CSS = """
:root {
  color-scheme: light dark;
  --page: #f3f4f6; --card: #ffffff; --ink: #1f2328; --muted: #5c6570;
  --line: #dfe3e8; --accent: #1667c7; --warn: #fff4d6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1b1f24; --ink: #e4e7eb; --muted: #98a2ae;
    --line: #343a42; --accent: #6fb1ff; --warn: #3a3118;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 76rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0 0 .5rem; font-size: 1rem; }
p { margin: .25rem 0; }
h2 + p { margin: -.25rem 0 .75rem; }
a { color: var(--accent); }
.muted, figcaption, dt { color: var(--muted); }
figcaption, .small { font-size: .875rem; }
.card {
  background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .875rem 1rem; margin: 0; min-width: 0;
}
.notice { background: var(--warn); margin: 1rem 0; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tiles .card { flex: 1 1 9rem; }
.tiles strong { display: block; font-size: 1.75rem; line-height: 1.2; }
.grid {
  display: grid; gap: .75rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr));
}
.grid img, .wide img { display: block; width: 100%; height: auto; }
.wide { max-width: 34rem; margin-top: 1.25rem; }
dl {
  display: grid; grid-template-columns: max-content 1fr;
  gap: .25rem 1rem;
}
dl.card { margin-top: 1.25rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre, .scroll { overflow-x: auto; }
pre {
  margin: .5rem 0; padding: .625rem .75rem; font-size: .875rem;
  background: var(--page); border-radius: .375rem;
}
.overlay { margin-bottom: .75rem; }
.overlay img { display: block; min-width: 34rem; max-width: 100%; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; color: var(--muted); font-size: .875rem; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; }
th:first-child { text-align: left; }
tbody tr, tfoot tr { border-top: 1px solid var(--line); }
tbody th { font-weight: 400; }
td { font-variant-numeric: tabular-nums; }
td.bar { width: 50%; min-width: 6rem; }
td.bar span {
  display: block; height: .75rem; border-radius: 0 .2rem .2rem 0;
  background: var(--accent); min-width: 1px;
}
.swatch {
  display: inline-block; width: .875rem; height: .875rem; margin-right: .5rem;
  border: 1px solid var(--muted); border-radius: .2rem;
  vertical-align: -.1rem; forced-color-adjust: none;
}
.ignored {
  background: repeating-linear-gradient(-45deg, #000 0 2px, #fff 2px 4px);
}
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .5rem 0; }
summary { cursor: pointer; }
@media (max-width: 30rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  table { font-size: .875rem; }
  td.bar { width: auto; min-width: 3rem; }
}
"""

_METHODS = {
  "u2pl": "U2PL, semi-supervised",
  "supervised": "supervised, from labels alone",
}
_PROTOCOLS = {
  "padded": "whole images in one padded shape, padding not counted",
  "whole": "whole images at their own size",
  "center_crop": "centre crops, padding counted as class 0 (published code)",
}


def _escape(value: Any) -> str:
  return html.escape(str(value), quote=True)


def _percent(value: float | None) -> str:
  return "–" if value is None else f"{100 * value:.2f}"


def _write_text(path: pathlib.Path, text: str) -> None:
  """Replaces the file at once: a reader never meets half a page."""
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)


def _page(title: str, body: Sequence[str]) -> str:
  return "\n".join(
    [
      "<!doctype html>",
      '<html lang="en">',
      "<head>",
      '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      '<link rel="icon" href="data:,">',
      f"<title>{_escape(title)}</title>",
      f"<style>{_CSS}</style>",
      "</head>",
      "<body>",
      *body,
      "</body>",
      "</html>",
      "",
    ]
  )


def _figure_html(plot: Plot) -> str:
  caption = f"<figcaption>{_escape(plot.caption)}</figcaption>"
  return (
    f'<figure class="card"><h3>{_escape(plot.title)}</h3><picture>'
    f'<source srcset="{plot.stem}-dark.png"'
    ' media="(prefers-color-scheme: dark)">'
    f'<img src="{plot.stem}.png" alt="{_escape(plot.alt)}"'
    f' width="{round(PLOT_DPI * PLOT_WIDTH)}"'
    f' height="{round(PLOT_DPI * plot.height)}"></picture>'
    f"{caption if plot.caption else ''}</figure>"
  )


def _facts_html(facts: Sequence[tuple[str, Any]]) -> str:
  rows = "".join(
    f"<dt>{_escape(name)}</dt><dd>{_escape(value)}</dd>"
    for name, value in facts
    if value not in (None, "")
  )
  return f'<dl class="card">{rows}</dl>' if rows else ""


def _tile_html(label: str, value: str, note: str = "") -> str:
  return (
    f'<div class="card"><span class="muted">{_escape(label)}</span>'
    f"<strong>{_escape(value)}</strong>"
    f'<span class="small">{_escape(note)}</span></div>'
  )


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
  size = run.setting("eval.pad_to")
  if name != "whole" and isinstance(size, list | tuple):
    text += f", {' x '.join(map(str, size))}"
  images = run.setting("dataset.validation_list")
  return f"{text}; images of {images}" if images else text


def _last_step(run: Run) -> int | None:
  return int(run.rows[-1]["step"]) if run.rows else None


def _swatch(palette: Sequence[Sequence[int]], index: int) -> str:
  if index >= len(palette):
    return ""
  red, green, blue = palette[index]
  return (
    '<span class="swatch" style="background:'
    f'rgb({int(red)},{int(green)},{int(blue)})"></span>'
  )


def _iou_table(run: Run, palette: Sequence[Sequence[int]]) -> str:
  """Classes with their colours and, once evaluated, their IoU as bars."""
  names = run.class_names
  steps = run.series("eval/miou")[0]
  if not names:
    return ""
  if not steps.size:
    items = "".join(
      f"<span>{_swatch(palette, i)}{_escape(name)}</span>"
      for i, name in enumerate(names)
    )
    return f'<div class="card legend">{items}</div>'
  final, best = int(steps[-1]), run.best("eval/miou")[0]
  rows = []
  for i, name in enumerate(names):
    key = f"eval/iou/{name}"
    at_end, at_best = run.value_at(key, final), run.value_at(key, best)
    width = 0 if at_end is None else 100 * min(1.0, max(0.0, at_end))
    bar = f'<span style="width:{width:.1f}%"></span>'
    rows.append(
      f'<tr><th scope="row">{_swatch(palette, i)}{_escape(name)}</th>'
      f'<td class="bar" aria-hidden="true">{bar}</td>'
      f"<td>{_percent(at_end)}</td><td>{_percent(at_best)}</td></tr>"
    )
  return (
    '<div class="card scroll" tabindex="0" role="region"'
    ' aria-label="IoU of each class"><table>'
    f"<caption>IoU in percent. Bars: last evaluation.</caption>"
    '<thead><tr><th scope="col">class</th><td></td>'
    f'<th scope="col">last<br>step {final:,}</th>'
    f'<th scope="col">best<br>step {best:,}</th></tr></thead>'
    f"<tbody>{''.join(rows)}</tbody>"
    '<tfoot><tr><th scope="row">mIoU</th><td></td>'
    f"<td>{_percent(run.value_at('eval/miou', final))}</td>"
    f"<td>{_percent(run.value_at('eval/miou', best))}</td></tr></tfoot>"
    "</table></div>"
  )


def _samples_html(
  entries: Sequence[Mapping[str, Any]],
  names: Sequence[str],
  palette: Sequence[Sequence[int]],
) -> list[str]:
  if not entries:
    return []
  legend = "".join(
    f"<span>{_swatch(palette, i)}{_escape(name)}</span>"
    for i, name in enumerate(names)
  )
  legend += '<span><span class="swatch ignored"></span>ignored</span>'
  parts = ["<h2>Images</h2>", f'<div class="legend">{legend}</div>']
  for entry in entries:
    accuracy = entry.get("accuracy")
    said = (
      "no labelled pixel"
      if accuracy is None
      else f"{100 * accuracy:.1f} % of the labelled pixels right"
    )
    said += f", mean entropy {entry['mean_entropy']:.2f} nats"
    alt = (
      f"{entry['id']}: image, truth, prediction and entropy side by side;"
      f" {said}"
    )
    parts.append(
      f'<figure class="card overlay"><div class="scroll" tabindex="0"'
      f' role="region" aria-label="{_escape(entry["id"])}">'
      f'<img src="{_escape(urllib.parse.quote(entry["file"]))}"'
      f' alt="{_escape(alt)}" loading="lazy"></div>'
      f"<figcaption>{_escape(entry['id'])}: {_escape(said)}</figcaption>"
      "</figure>"
    )
  return parts


def _report_html(
  run: Run, plots: Sequence[Plot], extra: Mapping[str, Any]
) -> str:
  names, palette = run.class_names, extra.get("palette") or []
  best, final = run.best("eval/miou"), run.last("eval/miou")
  body = ["<header>", f"<h1>{_escape(run.name)}</h1>"]
  body.append(f'<p class="muted">{_escape(_method_text(run))}</p></header>')
  body.append("<main>")
  if not run.rows:
    body.append(
      '<p class="card notice">metrics.jsonl holds no step yet: the run has'
      " logged nothing so far.</p>"
    )
  if run.skipped_lines:
    body.append(
      f'<p class="card notice">{run.skipped_lines} line(s) of metrics.jsonl'
      " could not be read and are left out.</p>"
    )
  tiles = []
  if best is not None:
    last_step = int(run.series("eval/miou")[0][-1])
    tiles += [
      _tile_html("mIoU, last", f"{_percent(final)} %", f"step {last_step:,}"),
      _tile_html("mIoU, best", f"{_percent(best[1])} %", f"step {best[0]:,}"),
    ]
  accuracy = run.last("eval/pixel_accuracy")
  if accuracy is not None:
    tiles.append(
      _tile_html("pixel accuracy", f"{_percent(accuracy)} %", "last evaluation")
    )
  if _last_step(run) is not None:
    tiles.append(_tile_html("steps", f"{_last_step(run):,}", "last logged"))
  if tiles:
    body.append(f'<div class="tiles">{"".join(tiles)}</div>')
  versions = extra.get("versions") or {}
  body.append(
    _facts_html(
      [
        ("protocol", _protocol_text(run)),
        ("data set", extra.get("dataset") or run.setting("dataset.name")),
        ("labelled images", run.setting("dataset.labelled_list")),
        ("backbone", run.setting("model.backbone")),
        ("epochs", run.setting("schedule.epochs")),
        ("seed", run.setting("seed")),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
      ]
    )
  )
  if extra.get("command"):
    body.append("<h2>To reproduce</h2>")
    body.append(f'<pre tabindex="0">{_escape(extra["command"])}</pre>')
  if plots:
    body.append("<h2>Curves</h2>")
    if warmup_end(run) is not None:
      body.append('<p class="muted">Shaded: warm-up, from labels alone.</p>')
    body.append(f'<div class="grid">{"".join(map(_figure_html, plots))}</div>')
  if names:
    body.append("<h2>Classes</h2>")
    body.append(_iou_table(run, palette))
  body += _samples_html(extra.get("samples") or [], names, palette)
  if run.config:
    text = json.dumps(run.config, indent=2, ensure_ascii=False)
    body.append("<h2>Config</h2>")
    body.append(
      '<details class="card"><summary>All keys</summary>'
      f'<pre tabindex="0">{_escape(text)}</pre></details>'
    )
  body.append("</main>")
  return _page(run.name, body)


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


def _render(run: Run, extra: Mapping[str, Any]) -> pathlib.Path:
  """Draws plots and page and remembers `extra` beside them.

  The tables and pictures of `run_stats` are made new with them.
  """
  run = dataclasses.replace(run, extra=extra)
  folder = run.report_page.parent
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob("*.png"):
    old.unlink()
  plots = run_plots(run)
  for plot in plots:
    plot.save(folder)
  text = json.dumps(extra, indent=2, ensure_ascii=False)
  _write_text(folder / "report.json", text + "\n")
  _write_text(run.report_page, _report_html(run, plots, extra))
  write_stats(run)
  return run.report_page


def write_report(
  workdir: str | os.PathLike,
  samples: Sequence[Sample],
  info: Any,
  ignore_label: int,
) -> pathlib.Path:
  """Writes workdir/report/: index.html, plots and overlays.

  To be called by the process that trained, whose command line and package
  versions the page shows; `refresh_report` is for later.

  Args:
    workdir: with metrics.jsonl and config.json.
    samples: the images to show.
    info: `name`, `class_names` and `palette` of the data set, such as
      `input_pipeline.DatasetInfo`.
    ignore_label: value of `Sample.truth` where there is no label.

  Returns:
    Path of the page.

  Raises:
    RunError: the folder is no workdir, or a sample's arrays differ in size.
  """
  run = read_run(workdir)
  palette = np.asarray(info.palette, np.int64).reshape(-1, 3)
  folder = run.report_page.parent
  extra = {
    "dataset": info.name,
    "class_names": list(info.class_names),
    "palette": palette.tolist(),
    "command": _running_command() or run.extra.get("command"),
    "versions": _versions(),
    "samples": _draw_samples(folder, samples, palette, ignore_label),
  }
  return _render(run, extra)


def refresh_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Draws a run's page again, with the pictures that it already has.

  Args:
    workdir: as of `write_report`.

  Returns:
    Path of the page.

  Raises:
    RunError: the folder is no workdir, or a file in it is broken.
  """
  run = read_run(workdir)
  extra = dict(run.extra)
  folder = run.report_page.parent
  extra["samples"] = [
    entry
    for entry in extra.get("samples", [])
    if (folder / entry["file"]).is_file()
  ]
  extra["class_names"] = run.class_names
  return _render(run, extra)


# -- Several runs --------------------------------------------------------------


def run_labels(runs: Sequence[Run]) -> list[str]:
  """One name a run; with the folder where two runs have the same name."""
  names = [run.name for run in runs]
  return [
    f"{run.name} ({run.workdir})" if names.count(run.name) > 1 else run.name
    for run in runs
  ]


def _comparison_tables(
  runs: Sequence[Run], labels: Sequence[str], links: Sequence[str]
) -> list[str]:
  rows = []
  for run, label, link in zip(runs, labels, links, strict=True):
    best = run.best("eval/miou")
    text = f'<a href="{_escape(link)}">{_escape(label)}</a>'
    best_text = "–" if best is None else f"{_percent(best[1])} ({best[0]:,})"
    last_step = _last_step(run)
    rows.append(
      f'<tr><th scope="row">{text}</th>'
      f"<td>{_escape(run.setting('method') or '–')}</td>"
      f"<td>{_escape(_or_dash(run.setting('seed')))}</td>"
      f"<td>{'–' if last_step is None else f'{last_step:,}'}</td>"
      f"<td>{_percent(run.last('eval/miou'))}</td><td>{best_text}</td>"
      f"<td>{_percent(run.last('eval/pixel_accuracy'))}</td></tr>"
    )
  columns = ("run", "method", "seed", "steps", "mIoU, last", "best (step)")
  head = "".join(
    f'<th scope="col">{name}</th>' for name in (*columns, "pixel accuracy")
  )
  parts = [
    "<h2>Runs</h2>",
    '<div class="card scroll" tabindex="0" role="region" aria-label="Runs">'
    f"<table><caption>In percent.</caption><thead><tr>{head}</tr></thead>"
    f"<tbody>{''.join(rows)}</tbody></table></div>",
  ]
  names = list(dict.fromkeys(name for run in runs for name in run.class_names))
  if not names:
    return parts

  def cells(key: str) -> str:
    values = [run.last(key) for run in runs]
    known = [value for value in values if value is not None]
    texts = [
      f"<b>{_percent(value)}</b>"
      if len(known) > 1 and value == max(known)
      else _percent(value)
      for value in values
    ]
    if len(values) == 2:
      difference = None if len(known) < 2 else 100 * (values[1] - values[0])
      texts.append("–" if difference is None else f"{difference:+.2f}")
    return "".join(f"<td>{text}</td>" for text in texts)

  head = "".join(f'<th scope="col">{_escape(label)}</th>' for label in labels)
  if len(runs) == 2:
    head += '<th scope="col">difference</th>'
  body = "".join(
    f'<tr><th scope="row">{_escape(name)}</th>{cells(f"eval/iou/{name}")}</tr>'
    for name in names
  )
  parts += [
    "<h2>Classes</h2>",
    '<div class="card scroll" tabindex="0" role="region"'
    ' aria-label="IoU of each class and run"><table>'
    "<caption>IoU in percent at the last evaluation; bold: highest.</caption>"
    f'<thead><tr><th scope="col">class</th>{head}</tr></thead>'
    f"<tbody>{body}</tbody><tfoot>"
    f'<tr><th scope="row">mIoU</th>{cells("eval/miou")}</tr></tfoot>'
    "</table></div>",
  ]
  return parts


def _or_dash(value: Any) -> Any:
  return "–" if value is None else value


def _comparison_warnings(runs: Sequence[Run]) -> list[str]:
  """What makes the numbers of these runs not comparable."""
  warnings = []
  for text, values in (
    ("evaluation protocols", [_protocol_text(run) for run in runs]),
    ("classes", [tuple(run.class_names) for run in runs if run.rows]),
    ("last steps", [_last_step(run) for run in runs]),
  ):
    if len(set(values)) > 1:
      warnings.append(
        f'<p class="card notice">The runs differ in their {text}: compare with'
        " care.</p>"
      )
  return warnings


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
  """
  runs = [read_run(workdir) for workdir in workdirs]
  for run in runs:
    if not run.report_page.is_file():
      refresh_report(run.workdir)
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  labels = run_labels(runs)
  links = [
    urllib.parse.quote(
      pathlib.Path(
        os.path.relpath(run.report_page.resolve(), output.resolve())
      ).as_posix()
    )
    for run in runs
  ]
  body = ["<header><h1>Comparison of runs</h1></header>", "<main>"]
  body += _comparison_warnings(runs)
  plot = comparison_plot(runs, labels)
  if plot is None:
    body.append('<p class="card notice">No run has been evaluated yet.</p>')
  if plot is not None:
    plot.save(output)
    body.append(f'<div class="wide">{_figure_html(plot)}</div>')
  body += _comparison_tables(runs, labels, links)
  protocols = list(dict.fromkeys(map(_protocol_text, runs)))
  body.append(_facts_html([("protocol", text) for text in protocols]))
  body.append("</main>")
  page = output / "index.html"
  _write_text(page, _page("Comparison of runs", body))
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
