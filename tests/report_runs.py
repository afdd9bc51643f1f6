"""Made-up runs and pictures for the tests of the report."""

import json
import math
import pathlib
import types

import numpy as np

from u2pl_jax.report_images import MethodSample, Pictures, Sample

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
# Rows are truth: 90 of ground right, 10 taken for leaves, and so on.
CONFUSION = [[90, 10, 0], [30, 60, 10], [0, 0, 0]]
# For tests that are not about figures.
FEW_ROWS = ({"step": 1, "eval/miou": 0.5, "eval/iou/coin": 0.5},)


def metric_rows(semi: bool = True, gain: float = 0.0) -> list[dict]:
  """A warm-up of 40 steps and 80 more, an evaluation every 40."""
  rows = []
  for step in range(10, 121, 10):
    row = {
      "step": step,
      "train/sup_loss": math.exp(-step / 50),
      "train/learning_rate": 0.01 * (1 - step / 120),
      "time/images_per_second": 50.0,
      "time/data_wait_share": 0.02,
      "time/seconds": 36.0 * step,
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


def write_run(workdir: pathlib.Path, rows=None, **config) -> pathlib.Path:
  """A workdir with metrics and a config, `CONFIG` but for what is given."""
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(CONFIG | config))
  rows = metric_rows() if rows is None else rows
  lines = [json.dumps(row) + "\n" for row in rows]
  (workdir / "metrics.jsonl").write_text("".join(lines))
  return workdir


def write_evaluation(workdir: pathlib.Path, step: int = 80) -> None:
  """The summary of the best evaluation, in the keys that the report reads."""
  folder = workdir / "evaluation"
  folder.mkdir()
  summary = {
    "miou": 0.6,
    "interval": {"low": 0.581, "high": 0.624, "level": 0.95},
    "ece": 0.0375,
    "reliability": [
      {"pixels": 0, "confidence": None, "accuracy": None},
      {"pixels": 50, "confidence": 0.6, "accuracy": 0.5},
      {"pixels": 150, "confidence": 0.9, "accuracy": 0.8},
    ],
    "step": step,
    "protocol_hash": "0123456789abcdef",
    "class_names": list(INFO.class_names),
    "confusion": CONFUSION,
  }
  (folder / "metrics.json").write_text(json.dumps(summary))


def sample(
  name: str, height: int = 32, width: int = 48, *, group: str = "best"
) -> Sample:
  """Noise for a truth; the upper half is taken for class 0."""
  rng = np.random.default_rng(0)
  truth = rng.integers(0, 3, (height, width)).astype(np.uint8)
  prediction = truth.astype(np.int32)
  prediction[: height // 2] = 0
  truth[0] = IGNORE
  return Sample(
    id=name,
    image=rng.integers(0, 256, (height, width, 3)).astype(np.uint8),
    truth=truth,
    prediction=prediction,
    entropy=rng.random((height, width)).astype(np.float32),
    group=group,
  )


def flat_sample(name: str, label: int, **changes) -> Sample:
  """A black image of one class, all of it right."""
  labels = np.full((32, 48), label, np.uint8)
  values = {
    "image": np.zeros((32, 48, 3), np.uint8),
    "truth": labels,
    "prediction": labels.astype(np.int32),
    "entropy": np.full((32, 48), 0.1 * (label + 1)),
  }
  return Sample(id=name, **(values | changes))


def method_sample(name: str) -> MethodSample:
  """Left quarter reliable, right quarter unreliable, half of it negatives."""
  height, width = 32, 48
  column = np.arange(width)[None].repeat(height, 0)
  unreliable = column >= 36
  negative = np.zeros((height, width, 3), bool)
  negative[:16, 36:, 1] = True
  negative[:, 36:, 2] = True
  return MethodSample(
    id=name,
    image=np.full((height, width, 3), 90, np.uint8),
    pseudo_labels=(column >= 24).astype(np.int32),
    entropy=column / width,
    keep_mask=~unreliable,
    reliable_mask=column < 12,
    unreliable_mask=unreliable,
    negative_mask=negative,
  )


def pictures(samples=(), method=(), step: int = 80) -> Pictures:
  """`Pictures` of the teacher, with ranks and alpha if it teaches."""
  semi = {"alpha": 25.0, "low_rank": 1, "high_rank": 3} if method else {}
  return Pictures(
    step=step,
    network="teacher",
    samples=tuple(samples),
    method=tuple(method),
    **semi,
  )
