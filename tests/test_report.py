"""The pages of runs, on made-up metrics and pictures."""

import dataclasses
import html.parser
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
import types
import urllib.parse

import numpy as np
import plotly.graph_objects
import pytest
from PIL import Image

from scripts import demo_table
from tests.report_runs import (
  CONFUSION,
  FEW_ROWS,
  IGNORE,
  INFO,
  flat_sample,
  method_sample,
  metric_rows,
  pictures,
  sample,
  write_evaluation,
  write_run,
)
from u2pl_jax import report, report_figures, report_images, report_page
from u2pl_jax.run_log import RunError, read_run

SUPERVISED_FIGURES = {"miou", "losses", "schedules", "speed"}
U2PL_FIGURES = SUPERVISED_FIGURES | {
  "reliability",
  "oracle",
  "histogram",
  "pseudo_labels",
  "bank_fill",
}
EVALUATION_FIGURES = {"confusion", "calibration"}
_VOID = ("img", "meta", "link", "input", "br")
_CSS_NAME = re.compile(r"--[a-z0-9-]+")


class _PageParser(html.parser.HTMLParser):
  """Collects text, references, images, figures; checks that tags balance."""

  def __init__(self, text: str):
    super().__init__()
    self.references, self.images, self.labels, self._open = [], [], [], []
    self.figures, self.pictures, self.words, self._figure = {}, [], "", None
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    for name in ("src", "href"):
      if name in attrs:
        self.references.append(attrs[name])
    self.references += re.findall(r"url\('(.*?)'\)", attrs.get("style", ""))
    if tag == "img":
      self.images.append(attrs)
    if "aria-label" in attrs:
      self.labels.append(attrs["aria-label"])
    if "data-classes" in attrs:
      self.pictures.append(attrs)
    if attrs.get("type") == "application/json":
      name = attrs["id"].removeprefix("figure-").removesuffix("-data")
      self._figure = name
      self.figures[name] = ""
    if tag not in _VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag
    self._figure = None

  def handle_data(self, data):
    if self._figure is not None:
      self.figures[self._figure] += data
    elif self._open[-1:] != ["script"] and self._open[-1:] != ["style"]:
      self.words += data


def _check_page(page: pathlib.Path) -> _PageParser:
  """What holds for every page: complete, offline, described, valid figures."""
  text = page.read_text(encoding="utf-8")
  assert (
    "http:" not in text
    and "https:" not in text
    and "//" not in re.sub(r"^\s*//.*$", "", text, flags=re.M)
  )
  assert "prefers-color-scheme: dark" in text and "viewport" in text
  assert "<noscript>" in text
  parsed = _PageParser(text)
  known = set(_CSS_NAME.findall(text[: text.index("</style>")]))
  for reference in parsed.references:
    if reference.startswith("data:"):
      continue
    if reference.startswith("#"):
      assert f'id="{reference[1:]}"' in text
      continue
    path = page.parent / urllib.parse.unquote(reference)
    assert path.is_file(), reference
    if path.suffix in (".png", ".jpg"):
      with Image.open(path) as image:
        image.load()
  for name, source in parsed.figures.items():
    names = {match for match in re.findall(r'"(--[^"]+)"', source)}
    assert names <= known, name
    # plotly refuses keys that it does not know, and values of a wrong kind.
    figure = json.loads(_CSS_NAME.sub("#123456", source))
    plotly.graph_objects.Figure(figure)
    assert any(re.search(r"\d", x) for x in parsed.labels if len(x) > 20)
  assert (page.parent / "plotly.min.js").stat().st_size > 1_000_000
  return parsed


def _write(workdir, samples=(), method=(), **options):
  shown = pictures(samples, method)
  return report.write_report(workdir, shown, INFO, IGNORE, **options)


def _traces(parsed, name):
  return json.loads(parsed.figures[name])["data"]


def test_page_of_a_semi_supervised_run(tmp_path):
  workdir = write_run(tmp_path / "run")
  write_evaluation(workdir)
  samples = [sample("a/b c?.x"), sample("a/b-c?.x"), sample("a b", 33, 300)]
  page = _write(workdir, samples, [method_sample("u/1")], devices="2 x TPU v9")
  assert page == workdir / "report" / "index.html"
  parsed = _check_page(page)
  assert set(parsed.figures) == U2PL_FIGURES | EVALUATION_FIGURES
  for name in INFO.class_names:
    assert parsed.words.count(name) >= 2  # Table and legend.
  for text in ("trial", "U2PL", "60.00", "55.00", "padded", "32 x 48", "flax"):
    assert text in parsed.words
  # 36 s a step, 120 steps; the interval, the error of calibration, devices.
  for text in ("1.2 h", "95 %: 58.1 to 62.4", "3.75", "2 x TPU v9"):
    assert text in parsed.words
  for entry in samples:
    assert entry.id in parsed.words


def test_hours_of_a_run_that_went_on_twice(tmp_path):
  seconds = (100, 900, 50, 1850, 10)
  rows = [
    {"step": step, "time/seconds": value} for step, value in enumerate(seconds)
  ]
  parsed = _check_page(_write(write_run(tmp_path, rows)))
  # 900 + 1850 + 10 seconds are 46 minutes.
  assert "46.0 min" in parsed.words


def test_interval_of_another_step_is_not_shown(tmp_path):
  workdir = write_run(tmp_path)
  write_evaluation(workdir, step=40)
  assert "95 %" not in _check_page(_write(workdir)).words


def test_best_and_last_and_absent_classes(tmp_path):
  run = read_run(write_run(tmp_path))
  assert run.best("eval/miou") == (80, 0.6)
  assert run.last("eval/miou") == 0.55
  # null where the class was absent
  assert run.series("eval/iou/coin")[0].tolist() == [80, 120]
  assert run.value_at("eval/iou/coin", 40) is None


def test_classes_and_colours_are_those_of_the_data_set(tmp_path):
  workdir = write_run(tmp_path, FEW_ROWS)
  assert read_run(workdir).class_names == ["coin"]  # All that metrics say.
  content = {"name": "x", "class_names": ["p", "q"], "palette": [[1, 2, 3]]}
  (workdir / "dataset.json").write_text(json.dumps(content))
  run = read_run(workdir)
  assert (run.class_names, run.palette) == (["p", "q"], [[1, 2, 3]])


def test_first_of_equally_good_evaluations_is_the_best(tmp_path):
  rows = [{"step": step, "eval/miou": 0.5} for step in (1, 2, 3)]
  assert read_run(write_run(tmp_path, rows)).best("eval/miou") == (1, 0.5)


# -- Figures -------------------------------------------------------------------


def test_curves_have_the_logged_values_and_the_marks(tmp_path):
  run = read_run(write_run(tmp_path))
  figures = {f.stem: f for f in report_figures.curve_figures(run)}
  miou, accuracy, star = figures["miou"].data
  assert (miou["x"], miou["y"]) == ([40, 80, 120], [0.4, 0.6, 0.55])
  assert accuracy["y"] == [0.6, 0.8, 0.75]
  assert (star["x"], star["y"]) == ([80], [0.6])
  losses = figures["losses"]
  assert [trace["name"] for trace in losses.data] == [
    "supervised",
    "unsupervised",
    "contrastive",
    "chance",
    "floor",
  ]
  assert losses.data[0]["y"][0] == pytest.approx(math.exp(-0.2), rel=1e-5)
  assert [t["y"][0] for t in losses.data[2:]] == [3.0, 3.9, 0.7]
  for figure in figures.values():
    shade, best = figure.layout["shapes"]
    assert (shade["x0"], shade["x1"]) == (0, 40)
    assert best["x0"] == best["x1"] == 80
    assert figure.layout["hovermode"] == "x unified"
  assert "supervised from 0.819 at step 10" in losses.alt


def test_a_noisy_curve_keeps_its_values_beside_the_mean(tmp_path):
  rows = [
    {"step": step, "train/sup_loss": float(step % 2)} for step in range(90)
  ]
  run = read_run(write_run(tmp_path, rows))
  (figure,) = report_figures.curve_figures(run)
  thin, thick = figure.data
  assert thin["y"] == thick["customdata"] == [float(i % 2) for i in range(90)]
  # A mean over 3 values: (0 + 1 + 0) / 3 or (1 + 0 + 1) / 3.
  assert thick["y"][10] == pytest.approx(2 / 3, rel=1e-5)
  assert thick["y"][11] == pytest.approx(1 / 3, rel=1e-5)
  assert "hovertemplate" not in thin and thin["hoverinfo"] == "skip"


def test_long_runs_are_thinned(tmp_path):
  rows = [
    {"step": step}
    | {f"train/bank_fill/{name}": 0.5 for name in INFO.class_names}
    | {"train/sup_loss": 1.0, "train/unsup_loss": 1.0}
    for step in range(1, 3001)
  ]
  parsed = _check_page(_write(write_run(tmp_path, rows)))
  assert set(parsed.figures) == {"bank_fill", "losses"}
  steps = _traces(parsed, "losses")[0]["x"]
  assert (len(steps), steps[0], steps[-1]) == (2000, 1, 3000)
  assert len(_traces(parsed, "bank_fill")[0]["x"]) == 400


def test_class_map_of_the_bank(tmp_path):
  run = read_run(write_run(tmp_path))
  figures = report_figures.method_figures(run, [])
  (trace,) = next(f for f in figures if f.stem == "bank_fill").data
  assert trace["x"] == list(range(50, 121, 10))
  assert trace["customdata"][0][0] == pytest.approx(50 / 120, rel=1e-3)
  assert trace["z"][2][-1] == 1.0  # The square root of a full queue.


def test_histogram_against_the_labelled_masks(tmp_path):
  run = read_run(write_run(tmp_path))
  figures = report_figures.method_figures(run, [50, 30, 20])
  figure = next(f for f in figures if f.stem == "histogram")
  pseudo, labelled = figure.data
  assert pseudo["x"] == pytest.approx([0.6, 0.39, 0.01])
  assert labelled["x"] == pytest.approx([0.5, 0.3, 0.2])
  assert "coin 1.0 % (labelled 20.0 %)" in figure.alt
  figures = report_figures.method_figures(run, [])
  assert len(next(f for f in figures if f.stem == "histogram").data) == 1


def test_confusion_in_shares_of_the_rows(tmp_path):
  workdir = write_run(tmp_path)
  write_evaluation(workdir)
  figure = report_figures.confusion_figure(read_run(workdir).evaluation)
  (trace,) = figure.data
  assert trace["customdata"] == CONFUSION
  assert trace["z"] == [[0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.0, 0.0, 0.0]]
  assert "30 % of leaf & <twig> are taken for ground" in figure.alt
  assert "coin 0 %" not in figure.alt  # It does not occur.


def test_reliability_diagram_leaves_out_empty_bins(tmp_path):
  workdir = write_run(tmp_path)
  write_evaluation(workdir)
  summary = read_run(workdir).evaluation
  _, curve, shares = report_figures.calibration_figure(summary).data
  assert (curve["x"], curve["y"]) == ([0.6, 0.9], [0.5, 0.8])
  assert (curve["customdata"], shares["y"]) == ([50, 150], [0.25, 0.75])
  empty = summary | {"reliability": summary["reliability"][:1]}
  assert report_figures.calibration_figure(empty) is None


def test_supervised_run_has_no_sections_of_the_method(tmp_path):
  rows = metric_rows(semi=False)
  workdir = write_run(tmp_path, rows, method="supervised")
  parsed = _check_page(_write(workdir, [sample("a")]))
  assert set(parsed.figures) == SUPERVISED_FIGURES
  assert "from labels alone" in parsed.words
  for text in ("unsupervised", "contrastive", "warm-up", "bank", "pseudo"):
    assert text not in parsed.words + str(parsed.figures)


def test_empty_metrics(tmp_path):
  parsed = _check_page(_write(write_run(tmp_path, [])))
  assert parsed.figures == {}
  assert "no step yet" in parsed.words
  for name in INFO.class_names:
    assert name in parsed.words


@pytest.mark.parametrize("removed", ["train/", "eval/", "time/", "oracle/"])
def test_missing_metrics(tmp_path, removed):
  rows = [
    {k: v for k, v in row.items() if not k.startswith(removed)}
    for row in metric_rows()
  ]
  assert _check_page(_write(write_run(tmp_path, rows))).figures


def test_missing_config_and_one_step(tmp_path):
  workdir = write_run(tmp_path, [metric_rows()[-1]])
  (workdir / "config.json").unlink()
  parsed = _check_page(_write(workdir))
  assert tmp_path.name in parsed.words
  assert set(parsed.figures) == U2PL_FIGURES


def test_killed_run_with_half_a_line_and_repeated_steps(tmp_path):
  rows = [{k: row[k] for k in row if "bank" not in k} for row in metric_rows()]
  workdir = write_run(tmp_path, rows)
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 80, "eval/miou": 0.75}\n')  # Later value stands.
    file.write('[1]\n{"no step": 1}\n{"step": 120, "eval/mi')
  run = read_run(workdir)
  assert run.best("eval/miou") == (80, 0.75)
  assert run.value_at("train/sup_loss", 80) is not None
  assert run.skipped_lines == 3
  assert "3 line(s)" in _check_page(report.refresh_report(workdir)).words


def test_non_finite_and_non_numeric_values_are_no_points(tmp_path):
  rows = [
    {"step": 1, "eval/miou": float("nan"), "train/sup_loss": "high"},
    {"step": 2, "eval/miou": 0.5, "train/sup_loss": float("inf")},
    {"step": 3, "eval/miou": None, "train/sup_loss": True},
  ]
  run = read_run(write_run(tmp_path, rows))
  assert run.series("eval/miou")[0].tolist() == [2]
  assert run.series("train/sup_loss")[0].size == 0


# -- Pictures ------------------------------------------------------------------


def _pixels(path):
  with Image.open(path) as image:
    return np.asarray(image.convert("RGBA"))


def test_layers_of_a_sample(tmp_path):
  """Classes in their colours, the ignored upper half striped, errors red."""
  truth = np.full((32, 48), 2, np.uint8)
  truth[:16] = IGNORE
  prediction = np.ones((32, 48), np.int32)
  prediction[:, 24:] = 2
  entry = flat_sample("flat", 0, truth=truth, prediction=prediction)
  workdir = write_run(tmp_path, FEW_ROWS)
  _write(workdir, [entry])
  folder = workdir / "report" / "overlays"
  assert {path.name for path in folder.iterdir()} == {
    "flat.png",
    "flat-truth.png",
    "flat-prediction.png",
    "flat-error.png",
    "flat-entropy.png",
  }
  shown = _pixels(folder / "flat-truth.png")
  assert shown[31, 0].tolist() == [240, 220, 60, 255]
  assert set(np.unique(shown[:16, :, :3])) == {0, 255}
  shown = _pixels(folder / "flat-prediction.png")
  assert shown[0, 0].tolist() == [60, 160, 60, 255]
  shown = _pixels(folder / "flat-error.png")
  # Wrong are the labelled pixels at the left, nothing else.
  assert (shown[16:, :24] == report_images.WRONG).all()
  assert not shown[:16, :, 3].any() and not shown[:, 24:, 3].any()


def test_numbers_of_a_sample(tmp_path):
  truth = np.full((32, 48), 2, np.uint8)
  truth[:16] = IGNORE
  prediction = np.ones((32, 48), np.int32)
  prediction[:, 12:] = 2
  entry = flat_sample("half", 0, truth=truth, prediction=prediction)
  unlabelled = flat_sample("none", 0, truth=np.full((32, 48), IGNORE, np.uint8))
  parsed = _check_page(
    _write(write_run(tmp_path, FEW_ROWS), [entry, unlabelled])
  )
  # Class 2: 3/4 of its pixels found; class 1: predicted, but not there.
  assert "mIoU 37.50 %, 75.0 % of the labelled pixels right" in parsed.words
  assert "no labelled pixel" in parsed.words
  first, second = parsed.pictures
  assert first["data-miou"] == "0.375000" and second["data-miou"] == ""
  assert first["data-classes"] == "1 2" and second["data-classes"] == "0"
  alts = [image["alt"] for image in parsed.images]
  assert "truth: coin 100 %" in alts
  assert "prediction: coin 75 %, leaf & <twig> 25 %" in alts
  assert "error: 25.0 % of the labelled pixels wrong" in alts


def test_layers_of_the_method(tmp_path):
  workdir = write_run(tmp_path)
  parsed = _check_page(_write(workdir, [], [method_sample("u")]))
  folder = workdir / "report" / "overlays"
  kinds = _pixels(folder / "u-kinds.png")
  for column, name in ((0, "reliable"), (20, "kept"), (40, "unreliable")):
    assert kinds[5, column].tolist() == list(report_images.KINDS[name])
  # One tile a class, one below the other.
  tiles = _pixels(folder / "u-negatives.png")[..., 3] > 0
  assert tiles.shape == (3 * 32, 48)
  assert not tiles[:32].any()
  assert tiles[32:48, 36:].all() and not tiles[48:64].any()
  assert tiles[64:, 36:].all() and not tiles[:, :36].any()
  counts = _pixels(folder / "u-counts.png")
  assert (counts[0, 40] != counts[31, 40]).any() and counts[0, 0, 3] == 0
  words = " ".join(parsed.words.split())
  assert "reliable 25.0 %, kept 50.0 %, unreliable 25.0 %" in words
  assert "negative of up to 2 classes" in words
  assert "ranks 1 to 2, counted from 0" in words
  assert "running statistics" in words and "step 80" in words
  (entry,) = json.loads((workdir / "report" / "report.json").read_text())[
    "pictures"
  ]["method"]
  assert entry["negative_shares"] == [0.0, 0.5, 1.0]


def test_large_pictures_are_reduced_and_small_ones_stay_exact(tmp_path):
  workdir = write_run(tmp_path, FEW_ROWS)
  large, small = sample("large", 600, 1000), sample("small")
  _write(workdir, [large, small])
  folder = workdir / "report" / "overlays"
  with Image.open(folder / "large.jpg") as image:
    assert image.size == (800, 480)
  assert _pixels(folder / "large-truth.png").shape[:2] == (300, 500)
  assert (_pixels(folder / "small.png")[..., :3] == small.image).all()


def test_pictures_have_names_of_their_own(tmp_path):
  workdir = write_run(tmp_path, FEW_ROWS)
  names = ["a/1", "a?1", "A_1", "..", "a-truth"]
  parsed = _check_page(_write(workdir, [sample(name) for name in names]))
  files = {image["src"] for image in parsed.images}
  assert len(files) == 5 * len(names)


def test_old_pictures_go(tmp_path):
  workdir = write_run(tmp_path, FEW_ROWS)
  _write(workdir, [sample("a"), sample("b")])
  page = _write(workdir, [sample("b")])
  _check_page(page)
  assert len(list((page.parent / "overlays").iterdir())) == 5


def test_sample_of_other_size_is_refused_and_changes_nothing(tmp_path):
  workdir = write_run(tmp_path)
  _write(workdir, [sample("good")])
  before = sorted((workdir / "report" / "overlays").iterdir())
  entry = sample("odd")
  entry = dataclasses.replace(entry, truth=entry.truth[1:])
  with pytest.raises(RunError, match="'odd'.*truth"):
    _write(workdir, [sample("new"), entry])
  assert sorted((workdir / "report" / "overlays").iterdir()) == before


# -- Again, and the command ----------------------------------------------------


def test_refresh_keeps_what_only_the_training_knew(tmp_path):
  workdir = write_run(tmp_path, FEW_ROWS)
  _write(
    workdir,
    [sample("a"), sample("b")],
    [method_sample("u")],
    devices="3 x H100",
    labelled_pixels=[1, 2, 3],
  )
  extra_file = workdir / "report" / "report.json"
  extra = json.loads(extra_file.read_text())
  extra["command"] = "python -m u2pl_jax.main --config=configs/trial.py"
  extra["versions"] = {"jax": "0.0.1"}
  extra_file.write_text(json.dumps(extra))
  (workdir / "report" / "overlays" / "a-truth.png").unlink()
  (workdir / "report" / "index.html").unlink()
  parsed = _check_page(report.refresh_report(workdir))
  assert extra["command"] in parsed.words
  assert "jax 0.0.1" in parsed.words and "3 x H100" in parsed.words
  sources = {image["src"].split("-")[0] for image in parsed.images}
  assert sources == {"overlays/b.png", "overlays/b", "overlays/u.png"} | {
    "overlays/u"
  }
  assert report.labelled_pixels(workdir) == [1, 2, 3]
  assert report.pictured_step(workdir) == 80


def test_page_shows_the_command_of_the_training_process(tmp_path, monkeypatch):
  monkeypatch.setattr(
    sys.modules["__main__"],
    "__spec__",
    types.SimpleNamespace(name="u2pl_jax.main"),
  )
  arguments = ["--config=configs/a.py:released", "--config.name=two words"]
  monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
  expected = (
    "python -m u2pl_jax.main --config=configs/a.py:released"
    " '--config.name=two words'"
  )
  page = _write(write_run(tmp_path, FEW_ROWS))
  assert expected in _check_page(page).words


def test_advice_is_shown(tmp_path):
  findings = [
    types.SimpleNamespace(
      title="Few <classes>",
      evidence="2 of 3",
      advice="Lower it.",
      severity=severity,
    )
    for severity in ("problem", "warning", "hint")
  ]
  text = report_page.advice(findings)
  assert text.count("Few &lt;classes&gt;") == 3 and text.count(" bad") == 1
  assert "2 of 3" in text and "Lower it." in text


def test_command_line(tmp_path):
  a = write_run(tmp_path / "a", FEW_ROWS, name="a")
  b = write_run(tmp_path / "b", FEW_ROWS, name="b")
  root = pathlib.Path(__file__).resolve().parent.parent
  result = subprocess.run(
    [sys.executable, "-m", "u2pl_jax.report", str(a), str(b)],
    cwd=root,
    capture_output=True,
    text=True,
    check=True,
  )
  pages = [pathlib.Path(line) for line in result.stdout.splitlines()]
  comparison = tmp_path / "comparison" / "index.html"
  assert pages == [a / "report/index.html", b / "report/index.html", comparison]
  for page in pages:
    _check_page(page)


@pytest.mark.parametrize(
  "broken", ["missing", "config", "earlier report", "evaluation", "plotly"]
)
def test_command_line_refuses_in_one_line(
  tmp_path, capsys, monkeypatch, broken
):
  names = {
    "config": "config.json",
    "earlier report": "report/report.json",
    "evaluation": "evaluation/metrics.json",
  }
  if broken != "missing":
    write_run(tmp_path)
  if broken in names:
    path = tmp_path / names[broken]
    path.parent.mkdir(exist_ok=True)
    path.write_text("{")
  if broken == "plotly":
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
  assert report.main([str(tmp_path)]) == 1
  output = capsys.readouterr()
  assert output.out == ""
  assert output.err.startswith("error: ") and output.err.count("\n") == 1
  assert (str(tmp_path) if broken != "plotly" else "pip") in output.err


# -- Several runs --------------------------------------------------------------


def test_comparison(tmp_path):
  supervised = write_run(
    tmp_path / "runs" / "base line",
    metric_rows(semi=False),
    name="base line",
    method="supervised",
  )
  u2pl = write_run(tmp_path / "runs" / "u2pl", metric_rows(gain=0.1))
  _write(supervised)
  # The other report is missing: it is drawn as well.
  page = report.write_comparison([supervised, u2pl], tmp_path / "out" / "page")
  parsed = _check_page(page)  # Both reports are linked, and so exist.
  assert sum("report/index.html" in link for link in parsed.references) == 2
  assert set(parsed.figures) == {
    "miou",
    "sup_loss",
    "unsup_loss",
    "contra_loss",
    "oracle",
  }
  assert [t["name"] for t in _traces(parsed, "miou")] == ["base line", "trial"]
  ranges = {
    tuple(json.loads(source)["layout"]["xaxis"]["range"])
    for source in parsed.figures.values()
  }
  assert len(ranges) == 1  # Aligned.
  for name in INFO.class_names:
    assert name in parsed.words
  for text in ("base line", "trial", "55.00", "65.00", "+10.00", "supervised"):
    assert text in parsed.words
  assert "compare with care" not in parsed.words
  assert "over seeds" not in parsed.words


def test_seeds_are_grouped_with_mean_and_spread(tmp_path):
  gains = (0.0, 0.02, 0.07)
  runs = [
    write_run(tmp_path / str(seed), metric_rows(gain=gain), seed=seed)
    for seed, gain in enumerate(gains)
  ]
  other = write_run(
    tmp_path / "b", metric_rows(semi=False), name="base", method="supervised"
  )
  page = report.write_comparison([*runs, other], tmp_path / "out")
  parsed = _check_page(page)
  values = [100 * (0.55 + gain) for gain in gains]
  expected = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
  assert expected == "58.00 ± 3.61" and expected in parsed.words
  assert "0, 1, 2" in parsed.words
  traces = _traces(parsed, "miou")
  assert [t["name"] for t in traces[:2]] == ["trial, seed 0", "trial, seed 1"]
  colors = [t["line"]["color"] for t in traces]
  assert colors[0] == colors[1] == colors[2] != colors[3]
  assert len({t["line"]["dash"] for t in traces[:3]}) == 3


def test_what_is_not_a_seed_is_no_group(tmp_path):
  rows = FEW_ROWS
  runs = [
    read_run(write_run(tmp_path / "a", rows, seed=1)),
    read_run(write_run(tmp_path / "b", rows, seed=2, log={"every_steps": 9})),
    read_run(write_run(tmp_path / "c", rows, seed=3, method="supervised")),
    read_run(write_run(tmp_path / "d", rows, seed=1, quirks="x")),
  ]
  assert report.group_runs(runs) == [0, 0, 1, 2]


def test_comparison_of_unlike_runs_warns(tmp_path):
  a = write_run(tmp_path / "a", metric_rows(semi=False))
  b = write_run(tmp_path / "b", [], eval={"protocol": "whole"})
  c = write_run(tmp_path / "c", FEW_ROWS)
  parsed = _check_page(report.write_comparison([a, b, c], tmp_path / "out"))
  for text in ("evaluation protocols", "last steps"):
    assert f"differ in their {text}" in parsed.words
  # Equal names and seeds are told apart by their folders.
  for workdir in (a, b, c):
    assert str(workdir) in parsed.words


def test_demo_table(tmp_path):
  base = write_run(tmp_path / "base", name="base")
  trial = write_run(tmp_path / "trial", metric_rows(gain=-0.2))
  table = demo_table.format_table([read_run(base), read_run(trial)])
  assert [line.split() for line in table.splitlines()] == [
    ["run", "steps", "mIoU", "best", "at", "step"],
    ["base", "120", "55.00", "60.00", "80"],
    ["trial", "120", "35.00", "40.00", "80"],
    ["trial", "-", "base", "-20.00"],
  ]
  with pytest.raises(RunError, match="no eval/miou"):
    demo_table.format_table([read_run(write_run(tmp_path / "new", []))])
