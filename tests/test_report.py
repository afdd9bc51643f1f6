"""The pages of runs, on made-up metrics and pictures."""

import html.parser
import json
import math
import pathlib
import subprocess
import sys
import types
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from scripts import demo_table
from u2pl_jax import report
from u2pl_jax.run_log import RunError, read_run

IGNORE = 255
INFO = types.SimpleNamespace(
  name="made-up",
  class_names=("ground", "leaf & <twig>", "coin"),
  palette=((0, 0, 0), (60, 160, 60), (240, 220, 60)),
)
CONFIG = {
  "name": "trial",
  "method": "u2pl",
  "seed": 7,
  "quirks": "",
  "dataset": {"name": "made-up", "validation_list": "val.txt"},
  "eval": {"protocol": "padded", "pad_to": [32, 48]},
}
SUPERVISED_PLOTS = {"images_per_second", "learning_rate", "losses", "miou"}
U2PL_PLOTS = SUPERVISED_PLOTS | {
  "bank_fill",
  "oracle",
  "pseudo_labels",
  "reliability",
}


def _metric_rows(semi: bool = True, gain: float = 0.0) -> list[dict]:
  """A warm-up of 40 steps and 80 more, an evaluation every 40."""
  rows = []
  for step in range(10, 121, 10):
    row = {
      "step": step,
      "train/sup_loss": math.exp(-step / 50),
      "train/learning_rate": 0.01 * (1 - step / 120),
      "time/images_per_second": 50.0,
    }
    if semi and step > 40:
      row |= {
        "train/unsup_loss": 0.5,
        "train/contra_loss": 3.0,
        "train/contra_floor": 0.7,
        "train/contra_chance": 3.9,
        "train/kept_share": 0.8,
        "train/keep_threshold": 0.6,
        "train/low_threshold": 0.2,
        "train/high_threshold": 0.5,
        "train/agreement": 0.9,
        "train/confidence": 0.7,
        "train/ema_decay": 0.99,
      }
      for i, name in enumerate(INFO.class_names):
        row[f"train/pseudo_label_share/{name}"] = (0.6, 0.39, 0.01)[i]
        row[f"train/bank_fill/{name}"] = step / 120
    if step % 40 == 0:
      # The best evaluation is not the last one.
      miou = {40: 0.4, 80: 0.6, 120: 0.55}[step] + gain
      row |= {"eval/miou": miou, "eval/pixel_accuracy": miou + 0.2}
      row |= {f"eval/iou/{name}": miou for name in INFO.class_names}
      row["eval/iou/coin"] = None if step == 40 else miou
      if semi:
        row |= {"oracle/pixel_accuracy": 0.8, "oracle/ari": 0.6}
    rows.append(row)
  return rows


# For tests that are not about plots, which take their time.
_FEW_ROWS = ({"step": 1, "eval/miou": 0.5, "eval/iou/coin": 0.5},)


def _write_run(workdir: pathlib.Path, rows=None, **config) -> pathlib.Path:
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(CONFIG | config))
  rows = _metric_rows() if rows is None else rows
  lines = [json.dumps(row) + "\n" for row in rows]
  (workdir / "metrics.jsonl").write_text("".join(lines))
  return workdir


def _sample(name: str, height: int = 32, width: int = 48) -> report.Sample:
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 3, (height, width)).astype(np.uint8)
  prediction = truth.astype(np.int32)
  prediction[: height // 2] = 0
  truth[0] = IGNORE
  return report.Sample(
    id=name,
    image=rng.integers(0, 256, (height, width, 3)).astype(np.uint8),
    truth=truth,
    prediction=prediction,
    entropy=rng.random((height, width)).astype(np.float32),
  )


class _PageParser(html.parser.HTMLParser):
  """Collects text, references and images; checks that tags are balanced."""

  def __init__(self, text: str):
    super().__init__()
    self.references, self.images, self._open = [], [], []
    self.words = ""
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    for name in ("src", "srcset", "href"):
      if name in attrs:
        self.references.append(attrs[name])
    if tag == "img":
      self.images.append(attrs)
    if tag not in ("img", "meta", "link", "source", "br"):
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.words += data


def _check_page(page: pathlib.Path) -> _PageParser:
  """What holds for every page: complete, offline, described."""
  text = page.read_text(encoding="utf-8")
  assert "http:" not in text and "https:" not in text and "<script" not in text
  assert "prefers-color-scheme: dark" in text and "viewport" in text
  parsed = _PageParser(text)
  for reference in parsed.references:
    if not reference.startswith("data:"):
      path = page.parent / urllib.parse.unquote(reference)
      assert path.is_file(), reference
      if path.suffix == ".png":
        with Image.open(path) as image:
          image.load()
  for image in parsed.images:
    assert len(image["alt"]) > 20
    if "width" in image:
      size = (int(image["width"]), int(image["height"]))
      with Image.open(page.parent / image["src"]) as picture:
        assert picture.size == size
  return parsed


def _plots(folder: pathlib.Path) -> set[str]:
  stems = {path.stem for path in folder.glob("*.png")}
  light = {stem for stem in stems if not stem.endswith("-dark")}
  assert stems == light | {f"{stem}-dark" for stem in light}
  return light


def test_page_of_a_semi_supervised_run(tmp_path):
  workdir = _write_run(tmp_path / "run")
  samples = [_sample("a/b c?.x"), _sample("a/b-c?.x"), _sample("a b", 33, 300)]
  page = report.write_report(workdir, samples, INFO, IGNORE)
  assert page == workdir / "report" / "index.html"
  parsed = _check_page(page)
  assert _plots(page.parent) == U2PL_PLOTS
  for name in INFO.class_names:
    assert parsed.words.count(name) >= 2  # Table and legend.
  for text in ("trial", "U2PL", "60.00", "55.00", "padded", "32 x 48", "flax"):
    assert text in parsed.words
  for sample in samples:
    assert sample.id in parsed.words


def test_best_and_last_and_absent_classes(tmp_path):
  run = read_run(_write_run(tmp_path))
  assert run.best("eval/miou") == (80, 0.6)
  assert run.last("eval/miou") == 0.55
  # null where the class was absent
  assert run.series("eval/iou/coin")[0].tolist() == [80, 120]
  assert run.value_at("eval/iou/coin", 40) is None
  assert run.class_names == list(INFO.class_names)


def test_first_of_equally_good_evaluations_is_the_best(tmp_path):
  rows = [{"step": step, "eval/miou": 0.5} for step in (1, 2, 3)]
  assert read_run(_write_run(tmp_path, rows)).best("eval/miou") == (1, 0.5)


def test_overlays_have_four_panels_and_distinct_names(tmp_path):
  workdir = _write_run(tmp_path, _FEW_ROWS)
  samples = [_sample("a/1"), _sample("a?1"), _sample("A_1"), _sample("..")]
  report.write_report(workdir, samples, INFO, IGNORE)
  files = sorted((workdir / "report" / "overlays").iterdir())
  assert len(files) == len(samples)
  for file in files:
    with Image.open(file) as image:
      width, height = image.size
      # Four panels of 48 x 32, enlarged to a width that shows pixels.
      assert width > 4 * 240
      assert height == pytest.approx(width / 4 * 32 / 48, rel=0.25)


def test_overlay_colours(tmp_path):
  """Black image: classes in their colour at 60 %, ignored pixels striped."""
  labels = np.full((32, 32), 2, np.uint8)
  labels[:16] = IGNORE
  sample = report.Sample(
    id="flat",
    image=np.zeros((32, 32, 3), np.uint8),
    truth=labels,
    prediction=np.ones((32, 32), np.int64),
    entropy=np.zeros((32, 32)),
  )
  workdir = _write_run(tmp_path, _FEW_ROWS)
  report.write_report(workdir, [sample], INFO, IGNORE)
  with Image.open(workdir / "report" / "overlays" / "flat.png") as image:
    pixels = np.asarray(image.convert("RGB")).astype(int)
  height, width, _ = pixels.shape
  in_panel = [round(width * (2 * i + 1) / 8) for i in range(4)]
  upper, lower = height * 4 // 10, height * 8 // 10

  def at(y, x):
    return pixels[y, x].tolist()

  assert at(lower, in_panel[0]) == [0, 0, 0]
  ignored = pixels[upper, in_panel[1] - 50 : in_panel[1] + 50]
  assert (ignored == ignored[:, :1]).all()
  assert set(np.unique(ignored)) == {0, 153}
  assert at(lower, in_panel[1]) == [144, 132, 36]
  assert at(lower, in_panel[2]) == [36, 96, 36]
  assert max(at(lower, in_panel[3])) < 10


def test_accuracy_of_a_sample_counts_labelled_pixels_only(tmp_path):
  sample = _sample("one")
  unlabelled = _sample("none")
  unlabelled.truth[:] = IGNORE
  workdir = _write_run(tmp_path, _FEW_ROWS)
  page = report.write_report(workdir, [sample, unlabelled], INFO, IGNORE)
  right = (sample.truth == sample.prediction)[1:].mean()
  text = page.read_text()
  assert f"{100 * right:.1f} % of the labelled pixels right" in text
  assert "no labelled pixel" in text


def test_supervised_run_has_no_empty_plots(tmp_path):
  rows = _metric_rows(semi=False)
  workdir = _write_run(tmp_path, rows, method="supervised")
  page = report.write_report(workdir, [_sample("a")], INFO, IGNORE)
  parsed = _check_page(page)
  assert _plots(page.parent) == SUPERVISED_PLOTS
  assert "from labels alone" in parsed.words
  for text in ("unsupervised", "contrastive", "warm-up", "Memory", "bank"):
    assert text not in parsed.words


def test_a_plot_without_data_any_more_is_removed(tmp_path):
  workdir = _write_run(tmp_path, _metric_rows(semi=False))
  report.write_report(workdir, [_sample("a"), _sample("b")], INFO, IGNORE)
  assert len(_plots(workdir / "report")) == len(SUPERVISED_PLOTS)
  _write_run(tmp_path, _FEW_ROWS)
  page = report.write_report(workdir, [_sample("b")], INFO, IGNORE)
  _check_page(page)
  assert _plots(page.parent) == {"miou"}
  assert [p.name for p in (page.parent / "overlays").iterdir()] == ["b.png"]


def test_empty_metrics(tmp_path):
  workdir = _write_run(tmp_path, [])
  page = report.write_report(workdir, [], INFO, IGNORE)
  parsed = _check_page(page)
  assert _plots(page.parent) == set()
  assert "no step yet" in parsed.words
  for name in INFO.class_names:
    assert name in parsed.words


@pytest.mark.parametrize("removed", ["train/", "eval/", "time/", "oracle/"])
def test_missing_metrics(tmp_path, removed):
  rows = [
    {k: v for k, v in row.items() if not k.startswith(removed)}
    for row in _metric_rows()
  ]
  page = report.write_report(_write_run(tmp_path, rows), [], INFO, IGNORE)
  _check_page(page)
  assert _plots(page.parent)


def test_missing_config_and_one_step(tmp_path):
  workdir = _write_run(tmp_path, [_metric_rows()[-1]])
  (workdir / "config.json").unlink()
  page = report.write_report(workdir, [], INFO, IGNORE)
  parsed = _check_page(page)
  assert tmp_path.name in parsed.words
  assert _plots(page.parent) == U2PL_PLOTS


def test_killed_run_with_half_a_line_and_repeated_steps(tmp_path):
  rows = [{k: row[k] for k in row if "bank" not in k} for row in _metric_rows()]
  workdir = _write_run(tmp_path, rows)
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
  run = read_run(_write_run(tmp_path, rows))
  assert run.series("eval/miou")[0].tolist() == [2]
  assert run.series("train/sup_loss")[0].size == 0


def test_long_runs_are_drawn_too(tmp_path):
  rows = [
    {"step": step}
    | {f"train/bank_fill/{name}": 0.5 for name in INFO.class_names}
    | {"train/sup_loss": 1.0, "train/unsup_loss": 1.0}
    for step in range(1, 3001)
  ]
  page = report.write_report(_write_run(tmp_path, rows), [], INFO, IGNORE)
  _check_page(page)
  assert _plots(page.parent) == {"bank_fill", "losses"}


def test_refresh_keeps_what_only_the_training_knew(tmp_path):
  workdir = _write_run(tmp_path, _FEW_ROWS)
  report.write_report(workdir, [_sample("a"), _sample("b")], INFO, IGNORE)
  extra_file = workdir / "report" / "report.json"
  extra = json.loads(extra_file.read_text())
  extra["command"] = "python -m u2pl_jax.main --config=configs/trial.py"
  extra["versions"] = {"jax": "0.0.1"}
  extra_file.write_text(json.dumps(extra))
  (workdir / "report" / "overlays" / "a.png").unlink()
  (workdir / "report" / "index.html").unlink()
  parsed = _check_page(report.refresh_report(workdir))
  assert extra["command"] in parsed.words
  assert "jax 0.0.1" in parsed.words
  assert [
    image["src"] for image in parsed.images if "overlays" in image["src"]
  ] == ["overlays/b.png"]


def test_page_shows_the_command_of_the_training_process(tmp_path, monkeypatch):
  monkeypatch.setattr(
    sys.modules["__main__"],
    "__spec__",
    types.SimpleNamespace(name="u2pl_jax.main"),
  )
  arguments = ["--config=configs/a.py:released", "--config.name=two words"]
  monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
  page = report.write_report(_write_run(tmp_path, _FEW_ROWS), [], INFO, IGNORE)
  expected = (
    "python -m u2pl_jax.main --config=configs/a.py:released"
    " '--config.name=two words'"
  )
  assert expected in _check_page(page).words


def test_sample_of_other_size_is_refused(tmp_path):
  sample = _sample("odd")
  sample = report.Sample(
    sample.id, sample.image, sample.truth[1:], sample.prediction, sample.entropy
  )
  with pytest.raises(RunError, match="'odd'.*truth"):
    report.write_report(_write_run(tmp_path), [sample], INFO, IGNORE)


def test_comparison(tmp_path):
  supervised = _write_run(
    tmp_path / "runs" / "base line",
    _metric_rows(semi=False),
    name="base line",
    method="supervised",
  )
  u2pl = _write_run(tmp_path / "runs" / "u2pl", _metric_rows(gain=0.1))
  report.write_report(supervised, [], INFO, IGNORE)
  # The other report is missing: it is drawn as well.
  page = report.write_comparison([supervised, u2pl], tmp_path / "out" / "page")
  parsed = _check_page(page)  # Both reports are linked, and so exist.
  assert sum("report/index.html" in link for link in parsed.references) == 2
  assert _plots(page.parent) == {"miou"}
  for name in INFO.class_names:
    assert name in parsed.words
  for text in ("base line", "trial", "55.00", "65.00", "+10.00", "supervised"):
    assert text in parsed.words
  assert "compare with care" not in parsed.words


def test_comparison_of_unlike_runs_warns(tmp_path):
  a = _write_run(tmp_path / "a", _metric_rows(semi=False))
  b = _write_run(tmp_path / "b", [], eval={"protocol": "whole"})
  c = _write_run(tmp_path / "c", _FEW_ROWS)
  parsed = _check_page(report.write_comparison([a, b, c], tmp_path / "out"))
  for text in ("evaluation protocols", "last steps"):
    assert f"differ in their {text}" in parsed.words
  # Equal names are told apart by their folders.
  for workdir in (a, b, c):
    assert str(workdir) in parsed.words


def test_demo_table(tmp_path):
  base = _write_run(tmp_path / "base", name="base")
  trial = _write_run(tmp_path / "trial", _metric_rows(gain=-0.2))
  table = demo_table.format_table([read_run(base), read_run(trial)])
  assert [line.split() for line in table.splitlines()] == [
    ["run", "steps", "mIoU", "best", "at", "step"],
    ["base", "120", "55.00", "60.00", "80"],
    ["trial", "120", "35.00", "40.00", "80"],
    ["trial", "-", "base", "-20.00"],
  ]
  with pytest.raises(RunError, match="no eval/miou"):
    demo_table.format_table([read_run(_write_run(tmp_path / "new", []))])


def test_command_line(tmp_path):
  a = _write_run(tmp_path / "a", _FEW_ROWS, name="a")
  b = _write_run(tmp_path / "b", _FEW_ROWS, name="b")
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


@pytest.mark.parametrize("broken", ["missing", "config", "earlier report"])
def test_command_line_refuses_in_one_line(tmp_path, capsys, broken):
  if broken != "missing":
    _write_run(tmp_path)
    (tmp_path / "report").mkdir()
    name = "config.json" if broken == "config" else "report/report.json"
    (tmp_path / name).write_text("{")
  assert report.main([str(tmp_path)]) == 1
  output = capsys.readouterr()
  assert output.out == ""
  assert output.err.startswith("error: ") and output.err.count("\n") == 1
  assert str(tmp_path) in output.err
