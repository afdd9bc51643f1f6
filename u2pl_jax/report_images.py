"""The pictures of a report: photographs, and what is laid over them.

A picture is written in layers, a photograph and masks over it, which the page
stacks: the reader sets how much of the photograph shines through.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from u2pl_jax.run_log import RunError

# Pixels of the longer side; the page shows no picture larger.
_MAX_SIDE = 800
# A photograph below it is kept without loss: blocks of JPEG would show.
_LOSSLESS_PIXELS = 200 * 200
# Over a photograph, with opacity: wrong pixels; the three kinds of pixels of
# the method; negatives of a class. The page's legend has the same colours.
WRONG = (230, 30, 60, 255)
KINDS = {
  "reliable": (30, 120, 220, 255),
  "kept": (120, 190, 240, 255),
  "unreliable": (245, 140, 20, 255),
}
_NEGATIVE = (245, 140, 20, 255)
_CLEAR = (0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Sample:
  """One validation image and what the network made of it.

  Attributes:
    id: of the image; also names its pictures.
    image: [h, w, 3] uint8 RGB.
    truth: [h, w] uint8, the ignore label where there is none.
    prediction: [h, w] int class ids.
    entropy: [h, w] float, of the prediction, in nats.
    group: why it is shown: 'best', 'median', 'worst' or 'first'.
  """

  id: str
  image: np.ndarray
  truth: np.ndarray
  prediction: np.ndarray
  entropy: np.ndarray
  group: str = "first"


@dataclasses.dataclass(frozen=True)
class MethodSample:
  """One unlabelled image and what the teacher makes of it.

  Attributes:
    id: of the image; also names its pictures.
    image: [h, w, 3] uint8 RGB.
    pseudo_labels: [h, w] int class ids.
    entropy: [h, w] float, in nats.
    keep_mask: [h, w] bool, pseudo labels that are taught.
    reliable_mask: [h, w] bool, pixels that may be anchors.
    unreliable_mask: [h, w] bool, pixels that may be negatives.
    negative_mask: [h, w, k] bool, which classes a pixel is a negative of.
  """

  id: str
  image: np.ndarray
  pseudo_labels: np.ndarray
  entropy: np.ndarray
  keep_mask: np.ndarray
  reliable_mask: np.ndarray
  unreliable_mask: np.ndarray
  negative_mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pictures:
  """What a report shows beside numbers, of one network.

  Attributes:
    step: updates the network has had.
    network: 'teacher' or 'student'.
    samples: validation images.
    method: unlabelled images; none before the teacher teaches.
    alpha: percent of pixels that are unreliable at this step; None without
      `method`, like the ranks.
    low_rank, high_rank: ranks of the classes that an unreliable pixel is a
      negative of, from low_rank on and below high_rank.
  """

  step: int
  network: str
  samples: Sequence[Sample] = ()
  method: Sequence[MethodSample] = ()
  alpha: float | None = None
  low_rank: int | None = None
  high_rank: int | None = None


def draw_pictures(
  folder: pathlib.Path,
  pictures: Pictures,
  palette: np.ndarray,
  ignore_label: int,
) -> dict[str, Any]:
  """Writes overlays/ anew.

  Args:
    folder: of the report.
    pictures: what to draw.
    palette: [k, 3] uint8 colours of the classes.
    ignore_label: value of `Sample.truth` where there is no label.

  Returns:
    What the page says of them: a JSON value.

  Raises:
    RunError: the arrays of an image differ in size.
  """
  for sample in (*pictures.samples, *pictures.method):
    _check_sizes(sample)
  overlays = folder / "overlays"
  overlays.mkdir(parents=True, exist_ok=True)
  for old in overlays.iterdir():
    old.unlink()
  taken: set[str] = set()
  return {
    "step": pictures.step,
    "network": pictures.network,
    "alpha": pictures.alpha,
    "low_rank": pictures.low_rank,
    "high_rank": pictures.high_rank,
    "samples": [
      _draw_sample(overlays, sample, taken, palette, ignore_label)
      for sample in pictures.samples
    ],
    "method": [
      _draw_method(overlays, sample, taken, palette)
      for sample in pictures.method
    ],
  }


def image_miou(
  truth: np.ndarray, prediction: np.ndarray, num_classes: int, ignore_label: int
) -> float | None:
  """Mean IoU of one image over the classes in its truth or prediction.

  Args:
    truth: [h, w] uint8.
    prediction: [h, w] int.
    num_classes: k.
    ignore_label: pixels that do not count.

  Returns:
    The mean; None without labelled pixels.
  """
  valid = truth != ignore_label
  if not valid.any():
    return None
  cells = truth[valid].astype(np.int64) * num_classes + prediction[valid]
  counts = np.bincount(cells, minlength=num_classes**2)
  confusion = counts.reshape(num_classes, num_classes)
  both = np.diag(confusion)
  union = confusion.sum(0) + confusion.sum(1) - both
  return float((both[union > 0] / union[union > 0]).mean())


def _check_sizes(sample: Sample | MethodSample) -> None:
  size = np.shape(sample.image)[:2]
  for field in dataclasses.fields(sample):
    if field.name not in ("id", "group", "image"):
      shape = np.shape(getattr(sample, field.name))
      if shape[:2] != size:
        raise RunError(
          f"sample {sample.id!r}: image of size {size} but {field.name} of"
          f" {shape}"
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


def _draw_sample(
  folder: pathlib.Path,
  sample: Sample,
  taken: set[str],
  palette: np.ndarray,
  ignore_label: int,
) -> dict[str, Any]:
  stem = _file_stem(sample.id, taken)
  truth, prediction = sample.truth, sample.prediction
  valid = truth != ignore_label
  wrong = valid & (prediction != truth)
  colors = np.array([_CLEAR, WRONG], np.uint8)
  files = {
    "image": _save_photo(folder, stem, sample.image),
    "truth": _save_mask(folder, f"{stem}-truth", colored(truth, palette)),
    "prediction": _save_mask(
      folder, f"{stem}-prediction", colored(prediction, palette)
    ),
    "error": _save_mask(folder, f"{stem}-error", colors[wrong.astype(int)]),
    "entropy": _save_entropy(folder, stem, sample.entropy, len(palette)),
  }
  num_classes = len(palette)
  return {
    "id": sample.id,
    "group": sample.group,
    "size": list(truth.shape),
    "files": files,
    "miou": image_miou(truth, prediction, num_classes, ignore_label),
    "accuracy": float(1 - wrong.sum() / valid.sum()) if valid.any() else None,
    "mean_entropy": float(np.mean(sample.entropy)),
    "truth_shares": _shares(truth, valid, num_classes),
    "prediction_shares": _shares(prediction, np.ones_like(valid), num_classes),
  }


def _draw_method(
  folder: pathlib.Path,
  sample: MethodSample,
  taken: set[str],
  palette: np.ndarray,
) -> dict[str, Any]:
  stem = _file_stem(sample.id, taken)
  num_classes = len(palette)
  kinds = np.zeros(sample.keep_mask.shape, np.int64)
  kinds[sample.keep_mask] = 2
  kinds[sample.reliable_mask] = 1
  kinds[sample.unreliable_mask] = 3
  colors = np.array([_CLEAR, *KINDS.values()], np.uint8)
  negatives = sample.negative_mask
  # One tile a class, one below the other; the page shows one of them.
  layers = [
    _reduced(negatives[..., i], _MAX_SIDE // 2) for i in range(num_classes)
  ]
  tiles = np.concatenate(layers).astype(int)
  counts = negatives.sum(-1) / max(1, int(negatives.sum(-1).max()))
  count_colors = matplotlib.colormaps["viridis"](counts, bytes=True)
  count_colors[~negatives.any(-1)] = _CLEAR
  files = {
    "image": _save_photo(folder, stem, sample.image),
    "pseudo_labels": _save_mask(
      folder, f"{stem}-pseudo", colored(sample.pseudo_labels, palette)
    ),
    "entropy": _save_entropy(folder, stem, sample.entropy, num_classes),
    "kinds": _save_mask(folder, f"{stem}-kinds", colors[kinds]),
    "negative_counts": _save_mask(folder, f"{stem}-counts", count_colors),
    "negatives": _save_png(
      folder,
      f"{stem}-negatives",
      np.array([_CLEAR, _NEGATIVE], np.uint8)[tiles],
    ),
  }
  unreliable = max(1, int(sample.unreliable_mask.sum()))
  return {
    "id": sample.id,
    "size": list(kinds.shape),
    "files": files,
    "mean_entropy": float(np.mean(sample.entropy)),
    "shares": {
      name: float((kinds == i).mean()) for i, name in enumerate(KINDS, 1)
    },
    "pseudo_shares": _shares(
      sample.pseudo_labels, np.ones(kinds.shape, bool), num_classes
    ),
    "max_negatives": int(negatives.sum(-1).max()),
    "negative_shares": [
      float((negatives[..., i] & sample.unreliable_mask).sum() / unreliable)
      for i in range(num_classes)
    ],
  }


def _shares(
  labels: np.ndarray, mask: np.ndarray, num_classes: int
) -> list[float]:
  counts = np.bincount(labels[mask].astype(np.int64), minlength=num_classes)[
    :num_classes
  ]
  return (counts / max(1, int(mask.sum()))).round(6).tolist()


def colored(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """Labels in the colours of their classes; what is no class is striped.

  Stripes, since any plain colour may be the colour of a class.

  Args:
    labels: [h, w] int.
    palette: [k, 3] uint8.

  Returns:
    [h, w, 4] uint8, opaque.
  """
  has_class = (labels >= 0) & (labels < len(palette))
  color = np.asarray(palette, np.uint8)[np.where(has_class, labels, 0)]
  y, x = np.indices(labels.shape)
  stripe = (x + y) // max(2, labels.shape[1] // 64) % 2
  striped = (255 * stripe[..., None]).astype(np.uint8)
  color = np.where(has_class[..., None], color, striped)
  opaque = np.full((*labels.shape, 1), 255, np.uint8)
  return np.concatenate([color, opaque], -1)


def _reduced(mask: np.ndarray, max_side: int = _MAX_SIDE) -> np.ndarray:
  """Every n-th row and column: labels do not mix."""
  step = math.ceil(max(mask.shape[:2]) / max_side)
  return mask[step // 2 :: step, step // 2 :: step]


def _save_photo(folder: pathlib.Path, stem: str, image: np.ndarray) -> str:
  photo = Image.fromarray(np.asarray(image, np.uint8))
  photo.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
  if photo.width * photo.height < _LOSSLESS_PIXELS:
    path = folder / f"{stem}.png"
    photo.save(path)
  else:
    path = folder / f"{stem}.jpg"
    photo.save(path, quality=88)
  return f"{folder.name}/{path.name}"


def _save_mask(folder: pathlib.Path, stem: str, colors: np.ndarray) -> str:
  return _save_png(folder, stem, _reduced(colors))


def _save_png(folder: pathlib.Path, stem: str, colors: np.ndarray) -> str:
  Image.fromarray(colors).save(folder / f"{stem}.png", compress_level=4)
  return f"{folder.name}/{stem}.png"


def _save_entropy(
  folder: pathlib.Path, stem: str, entropy: np.ndarray, num_classes: int
) -> str:
  """From 0 to the maximum log k, so that images compare."""
  scaled = _reduced(np.asarray(entropy)) / math.log(max(2, num_classes))
  colors = matplotlib.colormaps["magma"](scaled, bytes=True)
  return _save_png(folder, f"{stem}-entropy", colors[..., :3].copy())
