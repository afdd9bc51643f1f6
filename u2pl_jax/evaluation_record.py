"""An evaluation on disk: what was counted, and every score read off it.

  metrics.json   the summary, for people and other programs
  images.npz     the counts of every image

NumPy and JSON alone: anything may read it, and two evaluations are compared
without a network.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from input_pipeline import storage
from u2pl_jax import metrics

METRICS_FILE = "metrics.json"
IMAGES_FILE = "images.npz"

_LEVEL = 0.95
_RESAMPLES = 1000
_SEED = 0


class RecordError(ValueError):
  """One line that names the file or the setting."""


@dataclasses.dataclass(frozen=True)
class EvaluationRecord:
  """What one network does on a list of images under one protocol.

  Attributes:
    protocol: its name and all settings that change a number; JSON values.
    protocol_hash: of `protocol`, see `digest`.
    checkpoint: where the weights come from.
    step: updates done; None of a file of weights.
    weights: 'teacher' or 'student'; '' of a file that holds one network.
    config_hash: digest of the config.
    class_names: k names.
    image_ids: n ids.
    confusions: [n, k, k] int64, rows are truth.
    boundary: [n, k, 2] int64, pixels in the intersection and in the union of
      the boundaries; None if they were not counted.
    calibration: [bins, 3] float64: pixels, sum of their confidence, and pixels
      right, by confidence in bins of equal width.
  """

  protocol: Mapping[str, Any]
  protocol_hash: str
  checkpoint: str
  step: int | None
  weights: str
  config_hash: str
  class_names: tuple[str, ...]
  image_ids: tuple[str, ...]
  confusions: np.ndarray
  boundary: np.ndarray | None
  calibration: np.ndarray


# What stands in metrics.json as it stands in the record.
_PLAIN = (
  "protocol",
  "protocol_hash",
  "checkpoint",
  "step",
  "weights",
  "config_hash",
)


def digest(value: Any) -> str:
  """Short digest of a JSON value."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- Scores --------------------------------------------------------------------


def image_miou(record: EvaluationRecord) -> np.ndarray:
  """[n] mean IoU of each image, over the classes in its truth or prediction.

  NaN for an image all of whose pixels are ignored.
  """
  areas = _areas(record.confusions)
  union = areas[:, 1] + areas[:, 2] - areas[:, 0]
  found = union > 0
  iou = np.where(found, areas[:, 0] / np.maximum(union, 1), 0)
  count = found.sum(1)
  return np.where(count > 0, iou.sum(1) / np.maximum(count, 1), np.nan)


def summarise(record: EvaluationRecord) -> dict[str, Any]:
  """All scores, as JSON values; what does not exist is None.

  Returns:
    miou, which is miou_all_classes: the mean of `iou` where an absent class
    counts 0, as published; miou_present_classes: over the classes of the truth;
    iou: of each class; pixel_accuracy, mean_accuracy, frequency_weighted_iou;
    boundary_iou, by the rule of miou, and boundary_iou_per_class, both None if
    boundaries were not counted; confusion [k][k], rows are truth; num_images;
    interval of miou: low, high, level, resamples, seed; ece; reliability: low,
    high, pixels, confidence and accuracy of each bin; and what the record says
    of itself.
  """
  confusion = record.confusions.sum(0)
  boundary = boundary_per_class = None
  if record.boundary is not None:
    intersection, union = record.boundary.sum(0).T.astype(np.float64)
    with np.errstate(invalid="ignore"):
      per_class = intersection / union
    boundary = float(np.nan_to_num(per_class).mean())
    boundary_per_class = _by_class(record.class_names, per_class)
  miou = metrics.mean_iou(confusion)
  return {
    "miou": miou,
    "interval": miou_interval(record.confusions),
    "miou_all_classes": miou,
    "miou_present_classes": _finite(metrics.mean_iou_present(confusion)),
    "iou": _by_class(record.class_names, metrics.iou(confusion)),
    "pixel_accuracy": _finite(metrics.pixel_accuracy(confusion)),
    "mean_accuracy": _finite(metrics.mean_accuracy(confusion)),
    "frequency_weighted_iou": _finite(
      metrics.frequency_weighted_iou(confusion)
    ),
    "boundary_iou": boundary,
    "boundary_iou_per_class": boundary_per_class,
    "ece": _finite(metrics.expected_calibration_error(record.calibration)),
    "reliability": _reliability(record.calibration),
    "num_images": len(record.image_ids),
    **{name: _plain(getattr(record, name)) for name in _PLAIN},
    "class_names": list(record.class_names),
    "confusion": confusion.tolist(),
  }


def miou_interval(
  confusions: np.ndarray, *, resamples: int = _RESAMPLES, seed: int = _SEED
) -> dict[str, Any]:
  """Bootstrap interval of the mIoU over images (percentiles).

  A class that no image has counts 0, as in the mIoU; one that only a resample
  lacks is left out of the mean of that resample.

  Args:
    confusions: [n, k, k] counts.
    resamples: lists of n images drawn with replacement.
    seed: of the draws.

  Returns:
    low, high, level, resamples, seed.
  """
  draws = _draws(len(confusions), resamples, seed)
  values = _resampled_iou(draws, _areas(confusions))
  low, high = _percentiles(_mean_over_classes(values))
  return {
    "low": low,
    "high": high,
    "level": _LEVEL,
    "resamples": resamples,
    "seed": seed,
  }


def compare(a: EvaluationRecord, b: EvaluationRecord) -> dict[str, Any]:
  """b - a: of the mIoU, and of the IoU of every class.

  Intervals are of a paired bootstrap: each resample is the same images of both,
  so that what makes an image hard for both does not widen them.

  Args:
    a, b: of the same classes, images and protocol.

  Returns:
    miou: {a, b, difference, low, high}; iou: the same of each class, None where
    a class does not occur; level, resamples, seed, num_images, protocol.

  Raises:
    RecordError: they cannot be compared; names the setting.
  """
  _check_comparable(a, b)
  position = {image_id: i for i, image_id in enumerate(b.image_ids)}
  order = [position[image_id] for image_id in a.image_ids]
  draws = _draws(len(order), _RESAMPLES, _SEED)
  confusions = (a.confusions, b.confusions[order])
  iou_a, iou_b = (_resampled_iou(draws, _areas(x)) for x in confusions)
  total_a, total_b = (x.sum(0) for x in confusions)

  def entry(value_a: float, value_b: float, differences: np.ndarray) -> dict:
    low, high = _percentiles(differences)
    return {
      "a": _finite(value_a),
      "b": _finite(value_b),
      "difference": _finite(value_b - value_a),
      "low": low,
      "high": high,
    }

  return {
    "miou": entry(
      metrics.mean_iou(total_a),
      metrics.mean_iou(total_b),
      _mean_over_classes(iou_b) - _mean_over_classes(iou_a),
    ),
    "iou": {
      name: entry(*values)
      for name, *values in zip(
        a.class_names,
        metrics.iou(total_a),
        metrics.iou(total_b),
        (iou_b - iou_a).T,
        strict=True,
      )
    },
    "level": _LEVEL,
    "resamples": _RESAMPLES,
    "seed": _SEED,
    "num_images": len(order),
    "protocol": _plain(a.protocol),
  }


def _check_comparable(a: EvaluationRecord, b: EvaluationRecord) -> None:
  differing = [
    f"{key} is {a.protocol.get(key)!r} in A and {b.protocol.get(key)!r} in B"
    # The name first: the others follow from it.
    for key in sorted(
      a.protocol.keys() | b.protocol.keys(),
      key=lambda key: (key != "name", key),
    )
    if a.protocol.get(key) != b.protocol.get(key)
  ]
  if differing:
    raise RecordError(
      f"the protocols differ: {'; '.join(differing)} (A is {a.checkpoint}, B is"
      f" {b.checkpoint}): evaluate both with the same settings"
    )
  if a.class_names != b.class_names:
    named = next(
      (
        f"class {i} is {x!r} in A and {y!r} in B"
        for i, (x, y) in enumerate(
          zip(a.class_names, b.class_names, strict=False)
        )
        if x != y
      ),
      f"A has {len(a.class_names)} and B {len(b.class_names)}",
    )
    raise RecordError(f"the classes differ: {named}")
  for name, here, there in (("A", a, b), ("B", b, a)):
    known = set(there.image_ids)
    alone = [image_id for image_id in here.image_ids if image_id not in known]
    if alone:
      raise RecordError(
        f"the images differ: {len(alone)} are in {name} alone, the first is"
        f" {alone[0]!r}: evaluate both on the same list"
      )


def _areas(confusions: np.ndarray) -> np.ndarray:
  """[n, k, k] -> [n, 3, k] float64: right, in the truth, predicted."""
  right = np.diagonal(confusions, axis1=1, axis2=2)
  areas = [right, confusions.sum(2), confusions.sum(1)]
  return np.stack(areas, 1).astype(np.float64)


def _draws(num_images: int, resamples: int, seed: int) -> np.ndarray:
  """[resamples, n] float64: how often each image is in each resample."""
  rng = np.random.default_rng(seed)
  even = np.full(num_images, 1 / num_images)
  return rng.multinomial(num_images, even, size=resamples).astype(np.float64)


def _resampled_iou(draws: np.ndarray, areas: np.ndarray) -> np.ndarray:
  """[resamples, k] IoU; NaN where a resample lacks a class that others have."""
  num_images, _, num_classes = areas.shape
  sums = draws @ areas.reshape(num_images, -1)
  right, truth, predicted = np.moveaxis(sums.reshape(-1, 3, num_classes), 1, 0)
  with np.errstate(invalid="ignore"):
    return right / (truth + predicted - right)


def _mean_over_classes(values: np.ndarray) -> np.ndarray:
  """[resamples, k] -> [resamples]; a class that is NaN throughout counts 0."""
  values = np.where(np.isnan(values).all(0), 0, values)
  found = ~np.isnan(values)
  total = np.where(found, values, 0).sum(1)
  return total / np.maximum(found.sum(1), 1)


def _percentiles(values: np.ndarray) -> tuple[float | None, float | None]:
  values = values[np.isfinite(values)]
  if not values.size:
    return None, None
  tail = 50 * (1 - _LEVEL)
  low, high = np.percentile(values, [tail, 100 - tail])
  return float(low), float(high)


def _reliability(calibration: np.ndarray) -> list[dict[str, Any]]:
  bins = len(calibration)
  curve = []
  for index, (pixels, confidence, right) in enumerate(calibration.tolist()):
    curve.append(
      {
        "low": index / bins,
        "high": (index + 1) / bins,
        "pixels": int(pixels),
        "confidence": confidence / pixels if pixels else None,
        "accuracy": right / pixels if pixels else None,
      }
    )
  return curve


def _by_class(names: Sequence[str], values: np.ndarray) -> dict[str, Any]:
  return {
    name: _finite(float(value))
    for name, value in zip(names, values, strict=True)
  }


def _finite(value: float) -> float | None:
  return float(value) if np.isfinite(value) else None


def _plain(value: Any) -> Any:
  """As JSON gives it back: tuples are lists."""
  return json.loads(json.dumps(value))


# -- Files ---------------------------------------------------------------------


def check_output(folder: str | os.PathLike, *, overwrite: bool) -> None:
  """Checks, before hours are spent, that an evaluation can be written.

  Args:
    folder: created at need.
    overwrite: whether an evaluation in it may be replaced.

  Raises:
    RecordError: the folder cannot be written, or holds an evaluation.
  """
  folder = pathlib.Path(folder)
  probe = folder / f".writable.{os.getpid()}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise RecordError(
      f"--output={folder}: cannot write there ({error.strerror}): choose a"
      " folder that you may write"
    ) from None
  if (folder / METRICS_FILE).exists() and not overwrite:
    raise RecordError(
      f"--output={folder}: holds a finished evaluation: choose another folder,"
      " or add --overwrite"
    )


def write_record(
  folder: str | os.PathLike, record: EvaluationRecord
) -> dict[str, Any]:
  """Writes metrics.json and images.npz, each whole or not at all.

  Args:
    folder: created at need; files of an earlier evaluation are replaced.
    record: to write.

  Returns:
    The summary that stands in metrics.json.

  Raises:
    OSError: the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {
    "image_ids": np.array(record.image_ids),
    "confusions": record.confusions,
    "calibration": record.calibration,
    "image_miou": image_miou(record),
  }
  if record.boundary is not None:
    arrays["boundary"] = record.boundary
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  images = buffer.getvalue()
  summary = summarise(record)
  # Two files are not replaced at once: the digest tells whether they belong
  # together.
  summary["images_sha256"] = hashlib.sha256(images).hexdigest()
  text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
  storage.write_whole(folder / IMAGES_FILE, images)
  storage.write_whole(folder / METRICS_FILE, (text + "\n").encode())
  return summary


def read_record(folder: str | os.PathLike) -> EvaluationRecord:
  """Reads what `write_record` wrote.

  Args:
    folder: or the metrics.json in it.

  Raises:
    RecordError: a file is missing or damaged, or they do not belong together.
  """
  folder = pathlib.Path(folder)
  if folder.name == METRICS_FILE:
    folder = folder.parent
  path = folder / METRICS_FILE
  again = "evaluate again"
  try:
    summary = json.loads(path.read_text(encoding="utf-8"))
    names = {name: summary[name] for name in _PLAIN}
    class_names = tuple(summary["class_names"])
    sha256 = summary["images_sha256"]
  except (FileNotFoundError, NotADirectoryError):
    raise RecordError(
      f"{path}: there is no such file: give a folder that"
      " python -m u2pl_jax.evaluate --output=... wrote"
    ) from None
  except OSError as error:
    raise RecordError(f"{path}: cannot be read: {error.strerror}") from None
  except (ValueError, KeyError, TypeError) as error:
    raise RecordError(
      f"{path}: not the summary of an evaluation"
      f" ({type(error).__name__}: {error}): {again}"
    ) from None
  path = folder / IMAGES_FILE
  try:
    data = path.read_bytes()
  except OSError as error:
    raise RecordError(
      f"{path}: cannot be read ({error.strerror}): {again}"
    ) from None
  if hashlib.sha256(data).hexdigest() != sha256:
    raise RecordError(
      f"{path}: damaged, or of another evaluation than {METRICS_FILE} beside"
      f" it: {again}"
    )
  try:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
      return EvaluationRecord(
        **names,
        class_names=class_names,
        image_ids=tuple(arrays["image_ids"].tolist()),
        confusions=arrays["confusions"],
        boundary=arrays["boundary"] if "boundary" in arrays else None,
        calibration=arrays["calibration"],
      )
  except (KeyError, ValueError, zipfile.BadZipFile) as error:
    raise RecordError(
      f"{path}: not the counts of an evaluation ({error}): {again}"
    ) from None
