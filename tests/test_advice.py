"""Every finding on made-up metrics, where it holds and where it just does not.

The healthy run below has none; each case changes what its condition reads.
"""

import copy
import gzip
import json
import math
import pathlib

import pytest

from u2pl_jax import advice, report
from u2pl_jax.run_log import Run

CLASSES = ("ground", "leaf", "pebble", "wheel", "coin", "sky")
# 10 steps an epoch, 40 epochs, 10 of them warm-up.
LOG_STEPS = range(10, 401, 10)
WARMUP = 100
CONFIG = {
  "name": "trial",
  "method": "u2pl",
  "batch": {"labelled": 8, "unlabelled": 8},
  "model": {"pretrained": "encoder.npz"},
  "schedule": {"epochs": 40, "warmup_epochs": 10},
  "strong": {"mix": "cutmix", "mix_probability": 0.5},
  "reliability": {"alpha0": 20.0},
  "contrastive": {"low_rank": 2, "high_rank": 6},
  "dataset": {"validation_list": "val.txt"},
  "eval": {"protocol": "padded", "pad_to": [32, 48]},
}
# mIoU by step: no gain of a point in the last quarter, the best at the end.
MIOU = {50: 0.3, 100: 0.4, 150: 0.45, 200: 0.5, 250: 0.55, 300: 0.6}
MIOU |= {350: 0.604, 400: 0.608}


def _healthy() -> dict[int, dict]:
  """step -> metrics of a semi-supervised run with nothing to say about."""
  rows = {}
  for step in LOG_STEPS:
    row = {
      "step": step,
      "train/sup_loss": math.exp(-step / 300),
      "train/total_loss": 1.0,
      "train/learning_rate": 0.005 * (1 - step / 400),
      "train/pixel_accuracy_l": 0.8,
      "train/epoch": step / 10,
      "time/data_wait_share": 0.1,
    }
    if step > WARMUP:
      row |= {
        "train/unsup_loss": 0.4,
        "train/contra_loss": 2.0,
        "train/contra_floor": 0.65,
        "train/contra_chance": 3.93,
        "train/contra_active_classes": 5,
        "train/contra_present_classes": 6,
        "train/kept_share": 0.8 + 0.2 * step / 400,
        "train/agreement": 0.9,
      }
      for name in CLASSES:
        row[f"train/pseudo_label_share/{name}"] = 1 / 6
        row[f"train/bank_fill/{name}"] = 1.0
        row[f"train/key_candidates_l/{name}"] = 100
        row[f"train/key_candidates_u/{name}"] = 100
    if step in MIOU:
      row |= {"eval/miou": MIOU[step], "eval/pixel_accuracy": 0.75}
      row |= {f"eval/iou/{name}": MIOU[step] for name in CLASSES}
      if step > WARMUP:
        row |= {"oracle/pixel_accuracy": 0.85, "oracle/miou": MIOU[step]}
    rows[step] = row
  return rows


def _run(rows: dict[int, dict], workdir="runs/trial", **settings) -> Run:
  config = copy.deepcopy(CONFIG)
  for path, value in settings.items():
    *parents, key = path.split("__")
    node = config
    for parent in parents:
      node = node[parent]
    node[key] = value
  rows = [rows[step] for step in sorted(rows)]
  return Run(pathlib.Path(workdir), config, rows)


def _supervised() -> dict[int, dict]:
  """As the healthy run, from labels alone."""
  rows = _healthy()
  semi_only = set(rows[110]) - set(rows[10])
  return {
    step: {
      k: v
      for k, v in row.items()
      if k not in semi_only and not k.startswith("oracle/")
    }
    for step, row in rows.items()
  }


def _set(key: str, value, steps=LOG_STEPS, settings=None):
  """A change of the healthy run: the metric at the steps where it is written.

  `value` may be a function of the step.
  """

  def change():
    rows = _healthy()
    for step in steps:
      if key in rows[step]:
        rows[step][key] = value(step) if callable(value) else value
    return _run(rows, **(settings or {}))

  return change


def _both(*changes):
  """Several metrics at once: (key, value) each."""

  def change():
    rows = _healthy()
    for key, value in changes:
      for step, row in rows.items():
        if key in row:
          row[key] = value(step) if callable(value) else value
    return _run(rows)

  return change


def _settings(**settings):
  return lambda: _run(_healthy(), **settings)


def _twelve_classes(**settings):
  def change():
    rows = _healthy()
    for step in MIOU:
      rows[step] |= {f"eval/iou/more {i}": MIOU[step] for i in range(6)}
    return _run(rows, **settings)

  return change


def _miou(values: dict[int, float]):
  """Other evaluations of the mean alone."""
  return _set("eval/miou", lambda step: (MIOU | values)[step])


def _shares(missing: int, share: float = 0.0):
  """The last classes get no pseudo label, or this share of all."""
  names = CLASSES[len(CLASSES) - missing :]
  return _both(*((f"train/pseudo_label_share/{name}", share) for name in names))


def _coin_from(iou: float):
  """A class that had this IoU at the end of the warm-up and lost most of it."""
  return _set("eval/iou/coin", lambda step: iou if step <= WARMUP else 0.02)


TAIL = range(330, 401, 10)  # The last quarter of 30 semi-supervised lines.

# title's beginning: (severity, change that makes it hold, what the evidence
# must say, change that just does not).
CASES = {
  "A loss is not finite": (
    "problem",
    _set("train/sup_loss", None, [240]),
    ["train/sup_loss", "step 240", "0.4646 at step 230"],
    _set("train/kept_share", None, [240]),
  ),
  "The loss of the labelled images rises": (
    "problem",
    # The lowest quarter before the last: mean of exp(-s / 300), s 210 to 300.
    _set("train/sup_loss", 0.66, range(310, 401, 10)),
    ["0.66", "steps 310 to 400", "0.429 over steps 210 to 300"],
    _set("train/sup_loss", 0.64, range(310, 401, 10)),
  ),
  "The learning rate is unusually high": (
    "warning",
    # 8 images and pretrained weights: at most 8 * 2.5e-3.
    _set("train/learning_rate", 0.021),
    ["0.021", "8 labelled images", "0.00012 to 0.02"],
    _set("train/learning_rate", 0.0199),
  ),
  "The learning rate is unusually low": (
    "warning",
    _set("train/learning_rate", 1.1e-3, settings={"model__pretrained": ""}),
    ["0.0011", "random weights"],
    _set("train/learning_rate", 1.3e-3, settings={"model__pretrained": ""}),
  ),
  "Almost no pseudo label is kept": (
    "problem",
    _set("train/kept_share", 0.04, range(110, 261, 10)),
    ["below 5.0 % in 16 of 30"],
    _set("train/kept_share", 0.04, range(110, 241, 10)),
  ),
  "Every pseudo label is kept": (
    "warning",
    # The last line of the healthy run, at step 400, has 1 as well.
    _set("train/kept_share", 1.0, range(110, 241, 10)),
    ["above 99.9 % in 15 of 30"],
    _set("train/kept_share", 1.0, range(110, 231, 10)),
  ),
  "The teacher gives 4 of 6 classes": (
    "warning",
    _shares(missing=2),
    ["coin, sky", "steps 340 to 400", "16.7 % for ground", "0 of the 2"],
    _shares(missing=1),
  ),
  "The teacher gives 3 of 6 classes": (
    "problem",
    _shares(missing=3),
    ["wheel, coin, sky"],
    _shares(missing=1),
  ),
  "Classes got lost after the warm-up": (
    "warning",
    # 40 % at the end of the warm-up.
    _set("eval/iou/coin", 0.19, [400]),
    ["step 100 to step 400", "coin 40.0 % to 19.0 %"],
    _set("eval/iou/coin", 0.21, [400]),
  ),
  "The pseudo labels get worse": (
    "warning",
    _set("oracle/pixel_accuracy", 0.829, [400]),
    ["85.0 % at step 150", "82.9 % at step 400", "agree on 90.0 %"],
    _set("oracle/pixel_accuracy", 0.831, [400]),
  ),
  "Wrong pseudo labels are kept": (
    "warning",
    _set("oracle/pixel_accuracy", 0.79),
    # Mean of 0.8 + s / 2000 over steps 340 to 400.
    ["79.0 % at step 400", "98.5 % over steps 340 to 400"],
    _set("oracle/pixel_accuracy", 0.81),
  ),
  "The first teacher is worse": (
    "hint",
    _miou({150: 0.389}),
    ["40.0 % at step 100", "38.9 % at step 150"],
    _miou({150: 0.391}),
  ),
  "The memory bank is empty for 1 of 6": (
    "warning",
    _both(
      ("train/bank_fill/coin", 0.009),
      ("train/key_candidates_l/coin", 0),
      ("train/key_candidates_u/coin", 1.5),
    ),
    ["step 400", "coin", "1.5 candidate keys"],
    _set("train/bank_fill/coin", 0.011),
  ),
  "The contrastive ranks leave only far-fetched": (
    "warning",
    _settings(contrastive__low_rank=4),
    ["low_rank 4", "6 classes", "negative of 2"],
    _settings(contrastive__low_rank=3),
  ),
  "The contrastive ranks exclude next to nothing": (
    "hint",
    _twelve_classes(contrastive__low_rank=1, contrastive__high_rank=12),
    ["low_rank 1 and high_rank 12 with 12 classes", "negative of 11 classes"],
    _twelve_classes(contrastive__low_rank=2, contrastive__high_rank=12),
  ),
  "Unlabelled pixels give no negatives": (
    "warning",
    _both(*((f"train/key_candidates_u/{name}", 0) for name in CLASSES)),
    ["0 in all 30 written lines", "alpha0=20"],
    _both(*((f"train/key_candidates_u/{name}", 0) for name in CLASSES[1:])),
  ),
  "The contrastive loss is at chance": (
    "warning",
    # Chance for 5 of 6 classes: 3.93 - 5 % of 3.28, times 5 / 6, is 3.138.
    _set("train/contra_loss", 3.15),
    ["3.78", "chance is 3.93", "floor 0.65"],
    _set("train/contra_loss", 3.12),
  ),
  "The contrastive loss is off": (
    "warning",
    _set("train/contra_active_classes", 0, TAIL),
    ["0 over steps 340 to 400", "6.0 present"],
    _set("train/contra_active_classes", 5, TAIL),
  ),
  "Most classes have no part": (
    "hint",
    _both(
      ("train/contra_active_classes", 2.9), ("train/contra_loss", 2.0 * 2.9 / 5)
    ),
    ["2.9 of 6.0"],
    _both(
      ("train/contra_active_classes", 3.1), ("train/contra_loss", 2.0 * 3.1 / 5)
    ),
  ),
  "1 of 6 classes are not recognised": (
    "warning",
    _set("eval/iou/coin", 0.009),
    ["step 400", "coin"],
    _set("eval/iou/coin", 0.011),
  ),
  "Unlabelled images did harm: no gain since the warm-up": (
    "problem",
    _miou({step: 0.394 for step in MIOU if step > WARMUP}),
    ["39.4 % at step 400", "40.0 % at step 100"],
    _miou({step: 0.406 for step in MIOU if step > WARMUP}),
  ),
  "Unlabelled images did not help: no gain since": (
    "warning",
    _miou({step: 0.404 for step in MIOU if step > WARMUP}),
    ["40.4 % at step 400"],
    _miou({step: 0.406 for step in MIOU if step > WARMUP}),
  ),
  "The run was still improving": (
    "hint",
    _miou({400: 0.611}),
    ["60.0 % at step 300", "61.1 % at step 400"],
    _miou({400: 0.609}),
  ),
  "The best evaluation was long ago": (
    "warning",
    _miou({250: 0.619}),
    ["61.9 % at step 250", "60.8 % at step 400"],
    _miou({300: 0.619}),
  ),
  "The labelled images are learned by heart": (
    "hint",
    _set("train/pixel_accuracy_l", 0.91),
    ["91.0 %", "steps 310 to 400", "75.0 % at step 400"],
    _set("train/pixel_accuracy_l", 0.89),
  ),
  "The device waits for images": (
    "hint",
    _set("time/data_wait_share", 0.21, range(20, 401, 10)),
    ["21.0 %", "steps 20 to 400"],
    # The first line does not count.
    _set("time/data_wait_share", lambda step: 1.0 if step == 10 else 0.19),
  ),
}


def _titles(run: Run) -> list[str]:
  return [finding.title for finding in advice.findings(run)]


def test_a_healthy_run_has_no_findings():
  assert advice.findings(_run(_healthy())) == []
  supervised = _run(_supervised(), method="supervised")
  assert advice.findings(supervised) == []
  assert advice.findings(_run(_healthy()), baseline=supervised) != []


@pytest.mark.parametrize("title", CASES)
def test_condition(title):
  severity, holds, evidence, quiet = CASES[title]
  found = advice.findings(holds())
  assert len([f for f in found if f.title.startswith(title)]) == 1, found
  finding = next(f for f in found if f.title.startswith(title))
  assert finding.severity == severity
  for part in evidence:
    assert part in finding.evidence
  assert finding.advice.endswith(".") and finding.evidence.endswith(".")
  assert not [t for t in _titles(quiet()) if t.startswith(title)]


@pytest.mark.parametrize(
  ("change", "title"),
  [
    (_shares(2, 9e-5), "The teacher gives 4 of 6 classes"),
    (_shares(2, 1.1e-4), None),
    (_set("time/data_wait_share", 0.51), "The device waits for images"),
    (_set("oracle/miou", 0.5, [400]), "The pseudo labels get worse"),
    # What the labels had not taught cannot get lost.
    (_coin_from(0.051), "Classes got lost after the warm-up"),
    (_coin_from(0.049), None),
    # Many wrong labels are harmless where few are kept.
    (_both(("oracle/pixel_accuracy", 0.5), ("train/kept_share", 0.94)), None),
    (
      _both(("oracle/pixel_accuracy", 0.5), ("train/kept_share", 0.96)),
      "Wrong pseudo labels are kept",
    ),
  ],
)
def test_limit(change, title):
  titles = _titles(change())
  assert len(titles) == (title is not None)
  assert all(found.startswith(title) for found in titles)


def test_a_long_wait_is_more_than_a_hint():
  for share, severity in ((0.51, "warning"), (0.49, "hint")):
    run = _set("time/data_wait_share", share)()
    assert [f.severity for f in advice.findings(run)] == [severity]


def test_every_condition_has_a_case():
  for condition in (*advice.CONDITIONS, advice._not_above_warmup):
    assert any(condition(holds()) for _, holds, _, _ in CASES.values()), (
      condition.__name__
    )


def test_compared_with_a_supervised_run():
  rows = _supervised()
  for step in MIOU:
    rows[step]["eval/miou"] += 0.02
  rows[400]["eval/iou/wheel"] = 0.9
  baseline = _run(rows, "runs/labels", method="supervised")
  run = _run(_healthy())
  (finding,) = advice.findings(run, baseline)
  assert finding.title == "Unlabelled images did harm: not above labels alone"
  assert finding.severity == "problem"
  for part in ("60.8 % at step 400", "62.8 % at step 400", "runs/labels"):
    assert part in finding.evidence
  assert "wheel -29.2 (90.0 to 60.8)" in finding.evidence
  # What the run has not tried yet.
  assert "strong.mix_probability=1" in finding.advice
  tried = _run(_healthy(), strong__mix_probability=1.0)
  (finding,) = advice.findings(tried, baseline)
  assert "mix_probability" not in finding.advice
  # Better by more than seeds differ: nothing to say.
  for step in MIOU:
    rows[step]["eval/miou"] -= 0.026
  assert advice.findings(run, _run(rows, method="supervised")) == []


def test_a_baseline_judged_in_another_way_is_not_compared():
  baseline = _run(_supervised(), method="supervised", eval__protocol="whole")
  (finding,) = advice.findings(_run(_healthy()), baseline)
  assert finding.title == "The two runs cannot be compared"
  assert "config.eval.protocol is padded here and whole" in finding.evidence


def test_the_worst_come_first():
  rows = _healthy()
  for row in rows.values():
    row["time/data_wait_share"] = 0.3
    row["train/learning_rate"] = 1.0
  rows[400]["train/sup_loss"] = None
  severities = [f.severity for f in advice.findings(_run(rows))]
  assert severities == ["problem", "warning", "hint"]


def test_an_unfinished_run_is_not_judged_by_its_end():
  rows = {k: v for k, v in _healthy().items() if k <= 200}
  for step in (150, 200):
    rows[step]["eval/miou"] = 0.4
  run = _run(rows)
  assert _titles(run) == []
  # The same is the end if the run was meant to be that long.
  assert len(_titles(_run(rows, schedule__epochs=20))) == 1
  # And the schedule 'plateau' may end it there.
  rows[200]["eval/plateau_stop"] = 1
  assert len(_titles(_run(rows))) == 1
  rows[200]["eval/plateau_stop"] = 0
  text = advice.advice_text([run])
  assert "50.0 % of its epochs" in text and "Nothing stands out" in text


def test_few_lines_say_nothing():
  rows = {k: v for k, v in _healthy().items() if k <= 70}
  for row in rows.values():
    row["time/data_wait_share"] = 0.9
  text = advice.advice_text([_run(rows)])
  assert "7 training lines" in text
  assert "Nothing stands out: none of 21 conditions holds." in text
  text = advice.advice_text([_run({})])
  assert "0 training lines" in text


def test_few_semi_supervised_lines_are_told():
  rows = {k: v for k, v in _healthy().items() if k <= 170}
  for step in range(110, 171, 10):
    rows[step]["train/kept_share"] = 0.0
  text = advice.advice_text([_run(rows)])
  assert "semi-supervised steps: they have 7 lines" in text
  assert "Nothing stands out" in text


def test_few_evaluations_say_nothing_of_a_trend():
  rows = _healthy()
  for step in (50, 150, 200, 250, 300):
    rows[step] = {k: v for k, v in rows[step].items() if k[:5] != "eval/"}
  # 40 % at step 100, and 19 % at the third and last evaluation.
  rows[400] |= {"eval/iou/coin": 0.19, "eval/miou": 0.7}
  assert advice.findings(_run(rows)) == []


@pytest.mark.parametrize("removed", ["train/", "eval/", "time/", "oracle/"])
@pytest.mark.parametrize("title", CASES)
def test_missing_metrics_are_no_error(removed, title):
  run = CASES[title][1]()
  rows = {
    row["step"]: {k: v for k, v in row.items() if not k.startswith(removed)}
    for row in run.rows
  }
  advice.findings(_run(rows))
  advice.findings(Run(pathlib.Path("."), {}, list(rows.values())))


def test_text_is_for_a_terminal():
  run = CASES["The teacher gives 3 of 6 classes"][1]()
  text = advice.advice_text([run])
  assert max(map(len, text.splitlines())) <= 80
  assert "\n1. problem: The teacher gives 3 of 6 classes\n" in text
  assert "What to change:" in text and "16.7 %" in text
  assert "\N{NO-BREAK SPACE}" not in text


# -- Real runs -----------------------------------------------------------------

# Every second line of two runs on CamVid, config beside the metrics; what they
# ended with is in docs/camvid.md.
REAL_RUNS = pathlib.Path(__file__).parent / "runs"


def _real_run(name: str, folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir()
  with gzip.open(REAL_RUNS / f"{name}.json.gz", "rt") as file:
    content = json.load(file)
  (folder / "config.json").write_text(json.dumps(content["config"]))
  lines = [json.dumps(row) + "\n" for row in content["rows"]]
  (folder / "metrics.jsonl").write_text("".join(lines))
  return folder


def test_real_runs_with_the_command_line(tmp_path, capsys):
  supervised = _real_run("camvid_supervised", tmp_path / "supervised")
  u2pl = _real_run("camvid_u2pl", tmp_path / "u2pl")
  assert report.main(["--advice", str(supervised), str(u2pl)]) == 0
  output = capsys.readouterr()
  assert output.err == ""
  first, second = output.out.split("camvid_46_cpu (")
  assert [line for line in first.splitlines() if line[:1].isdigit()] == [
    "1. warning: 5 of 11 classes are not recognised",
    "2. hint: The run was still improving at its end",
  ]
  assert [line for line in second.splitlines() if line[:1].isdigit()] == [
    "1. problem: Unlabelled images did harm: not above labels alone",
    "2. warning: The teacher gives 7 of 11 classes",
    "3. warning: Classes got lost after the warm-up",
    "4. warning: Wrong pseudo labels are kept",
    "5. warning: 5 of 11 classes are not recognised",
    "6. hint: The first teacher is worse than the student before it",
  ]
  words = " ".join(second.split())
  for part in (
    "eval/miou is 27.9 % at step 1,600, and 31.3 % at step 1,600",
    "pavement -31.3 (34.0 to 2.7), road -11.4 (82.3 to 70.9)",
    "pole, fence, pedestrian, bicyclist",
    "pavement 22.0 % to 2.7 %",
    "oracle/pixel_accuracy is 74.6 % at step 1,600",
  ):
    assert part in words
  # Nothing is drawn.
  assert not (u2pl / "report").exists()


def test_command_line_refuses(tmp_path, capsys):
  assert report.main(["--advice", str(tmp_path)]) == 1
  assert str(tmp_path) in capsys.readouterr().err
  with pytest.raises(SystemExit):
    report.main(["--advice", str(tmp_path), "--output", "page"])
  assert "--advice writes no page" in capsys.readouterr().err
