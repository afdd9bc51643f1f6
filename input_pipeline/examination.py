"""Reads all files of a run and collects what is wrong with them.

Of the config it checks what the data decide: ranks, batches, crop, sizes.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence

import ml_collections
import numpy as np

from input_pipeline import (
  costs,
  dataset_config,
  datasets,
  errors,
  inspection,
  parallel,
  sources,
  splits,
  storage,
)
from input_pipeline.inspection import KINDS, Problem

LABELLED, UNLABELLED, VALIDATION = "labelled", "unlabelled", "validation"
PARTS = (LABELLED, UNLABELLED, VALIDATION)


@dataclasses.dataclass(frozen=True)
class Labels:
  """What the masks of a part hold.

  Attributes:
    pixels: int64 [k], of each class.
    images: int64 [k], masks in which each class occurs.
    ignored: pixels that belong to no class.
  """

  pixels: np.ndarray
  images: np.ndarray
  ignored: int


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """All that a look at a data set finds.

  Attributes:
    info: of the data set.
    problems: errors first, then by kind and path.
    counts: ids in the list of each part.
    files: images and masks that were read.
    sizes: of each part, number of images by (height, width).
    labels: of the labelled and the validation masks.
    mask_storage: number of masks by how their pixels are stored.
    mean, std: per channel, RGB, on the 0..255 scale, of the images read; None
      without any.
    estimate: of memory and time.
  """

  info: datasets.DatasetInfo
  problems: tuple[Problem, ...]
  counts: Mapping[str, int]
  files: int
  sizes: Mapping[str, Mapping[tuple[int, int], int]]
  labels: Mapping[str, Labels]
  mask_storage: Mapping[str, int]
  mean: tuple[float, ...] | None
  std: tuple[float, ...] | None
  estimate: costs.Estimate


@dataclasses.dataclass(frozen=True)
class _Look:
  """One image of a part, and its mask if the part has masks."""

  part: str
  image: inspection.ImageLook
  mask: inspection.MaskLook | None


def examine(config: ml_collections.ConfigDict) -> Diagnosis:
  """Reads all files of the run of a config, in threads.

  Shows a progress bar on stderr.

  Args:
    config: complete, see `configs/common.py`.

  Raises:
    ConfigError: a key that leaves nothing to look at.
    DataError: a folder, the class table or the shards are missing or unfit.
  """
  dataset = config.dataset
  info = dataset_config.load_info(dataset)
  dataset_config.check_labels(dataset, num_classes=info.num_classes)
  if config.method not in ("u2pl", "supervised"):
    raise errors.ConfigError(
      f"config.method={config.method!r}: choose one of u2pl, supervised"
    )
  dataset_config.prepare_dataset(dataset)
  source, ids, problems = _read_lists(dataset)
  estimate = costs.estimate(
    config,
    num_classes=info.num_classes,
    num_unlabelled=len(ids[UNLABELLED]),
  )
  problems += _overlaps(source, ids)
  problems += _check_ranks(config, info.num_classes)
  problems += _check_batches(config, ids)

  # The supervised method counts the unlabelled images but reads none.
  read_parts = [
    part
    for part in PARTS
    if part != UNLABELLED or config.method != "supervised"
  ]
  looks = _look_at_all(config, info, source, {p: ids[p] for p in read_parts})
  for look in looks:
    problems += look.image.problems
    if look.mask is not None:
      problems += look.mask.problems
      problems += inspection.look_at_pair(look.image, look.mask)
  problems += _duplicates(looks)
  sizes = {
    part: collections.Counter(
      look.image.size for look in looks if look.part == part and look.image.size
    )
    for part in read_parts
  }
  labels = {
    part: _labels_of(looks, part, info.num_classes, dataset.ignore_label)
    for part in (LABELLED, VALIDATION)
  }
  problems += _absent_classes(dataset, info, looks, labels)
  problems += _check_crop(config, sizes[LABELLED])
  problems += _check_eval_size(config, looks)
  sums = [look.image.sums for look in looks if look.image.sums is not None]
  mean, std = inspection.mean_and_std(sums) if sums else (None, None)
  return Diagnosis(
    info=info,
    problems=_in_order(problems),
    counts={part: len(ids[part]) for part in PARTS},
    files=sum(1 if look.mask is None else 2 for look in looks),
    sizes=sizes,
    labels=labels,
    mask_storage=collections.Counter(
      look.mask.storage for look in looks if look.mask and look.mask.storage
    ),
    mean=mean,
    std=std,
    estimate=estimate,
  )


def _in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
  kinds = list(KINDS)
  return tuple(
    sorted(set(problems), key=lambda p: (kinds.index(p.kind), p.path, p.detail))
  )


# -- Lists ---------------------------------------------------------------------


def _read_lists(
  dataset: ml_collections.ConfigDict,
) -> tuple[sources.Source, dict[str, tuple[str, ...]], list[Problem]]:
  """What `dataset_config.read_lists` reads, past what is wrong with it."""
  problems = []
  ids = {}
  for part in PARTS:
    if part == UNLABELLED and dataset.unlabelled_dir:
      continue
    path = dataset_config.list_path(dataset, part)
    ids[part] = _read_list(path, problems)
  source = dataset_config.open_source(dataset)
  if dataset.unlabelled_dir:
    try:
      source, ids[UNLABELLED] = dataset_config.unlabelled_in_folder(
        dataset, source, ids[LABELLED] + ids[VALIDATION]
      )
    except errors.DataError as error:
      ids[UNLABELLED] = ()
      path = storage.join(dataset.root, dataset.unlabelled_dir)
      detail = str(error).removeprefix(f"{path}: ")
      problems.append(Problem("unusable_list", path, detail))
  return source, ids, problems


def _read_list(path: str, problems: list[Problem]) -> tuple[str, ...]:
  try:
    lines = splits.read_lines(path)
  except errors.DataError as error:
    detail = str(error).removeprefix(f"{path}: ")
    problems.append(Problem("unusable_list", path, detail))
    return ()
  lines_of_id = {}
  for number, id in lines:
    if splits.leads_outside(id):
      problems.append(
        Problem(
          "unusable_list",
          path,
          f"line {number}: {id!r} does not lie inside the data folder; write"
          " the image id, or its path relative to the data folder",
        )
      )
    else:
      lines_of_id.setdefault(id, []).append(number)
  for id, numbers in lines_of_id.items():
    if len(numbers) > 1:
      shown = ", ".join(map(str, numbers))
      problems.append(
        Problem(
          "repeated_id",
          path,
          f"id {id!r} is in lines {shown}; remove all but one",
        )
      )
  if not lines:
    problems.append(
      Problem(
        "unusable_list",
        path,
        "the list is empty; it should hold one image id per line",
      )
    )
  return tuple(lines_of_id)


def _overlaps(
  source: sources.Source, ids: Mapping[str, Sequence[str]]
) -> list[Problem]:
  problems = []
  for part_a, part_b in itertools.combinations(PARTS, 2):
    for id in sorted(set(ids[part_a]) & set(ids[part_b])):
      try:
        path = source.image_path(id)
      except errors.AmbiguousIdError as error:
        path = error.path
      problems.append(
        Problem(
          "overlapping_lists",
          path,
          f"id {id!r} is {part_a} and {part_b} at once; remove it from one of"
          " the lists",
        )
      )
  return problems


# -- Files ---------------------------------------------------------------------


def _look_at_all(
  config: ml_collections.ConfigDict,
  info: datasets.DatasetInfo,
  source: sources.Source,
  ids: Mapping[str, Sequence[str]],
) -> list[_Look]:
  look_at_mask = functools.partial(
    inspection.look_at_mask,
    source,
    num_classes=info.num_classes,
    ignore_label=config.dataset.ignore_label,
    mask_format=info.mask_format(config.dataset.mask_format),
  )

  def look(item: tuple[str, str]) -> _Look:
    part, id = item
    has_mask = part != UNLABELLED
    image = inspection.look_at_image(source, id, has_mask=has_mask)
    return _Look(part, image, look_at_mask(id) if has_mask else None)

  items = [(part, id) for part in ids for id in ids[part]]
  return parallel.map_in_threads(look, items, "reading", "image")


def _duplicates(looks: Sequence[_Look]) -> list[Problem]:
  groups = collections.defaultdict(dict)
  for look in looks:
    # Of a file in two lists `_overlaps` speaks; damaged files count by bytes.
    digest = look.image.pixel_digest or look.image.file_digest
    if digest:
      groups[digest].setdefault(look.image.path, look)
  problems = []
  for group in groups.values():
    # Training images come first in `looks`, so that the later one is named.
    first, *others = group.values()
    for other in others:
      same = (
        "the same bytes as"
        if other.image.file_digest == first.image.file_digest
        else "the same pixels, stored in other bytes, as"
      )
      detail = f"this {other.part} image has {same} {first.image.path}"
      detail += f" ({first.part})"
      both_read = first.mask is not None and other.mask is not None
      if both_read and first.mask.digest != other.mask.digest:
        detail += ", but another mask"
      leaks = other.part == VALIDATION != first.part
      problems.append(
        Problem(
          "leaked_image" if leaks else "duplicate_image",
          other.image.path,
          detail + "; take one of them off its list",
        )
      )
  return problems


def _labels_of(
  looks: Sequence[_Look], part: str, num_classes: int, ignore_label: int
) -> Labels:
  histograms = [
    look.mask.histogram
    for look in looks
    if look.part == part and look.mask and look.mask.histogram is not None
  ]
  table = np.zeros((0, 256), np.int64)
  if histograms:
    table = np.stack(histograms)
  return Labels(
    pixels=table[:, :num_classes].sum(0),
    images=(table[:, :num_classes] > 0).sum(0),
    ignored=int(table[:, ignore_label].sum()),
  )


def _absent_classes(
  dataset: ml_collections.ConfigDict,
  info: datasets.DatasetInfo,
  looks: Sequence[_Look],
  labels: Mapping[str, Labels],
) -> list[Problem]:
  problems = []
  for part, kind, effect in (
    (LABELLED, "class_without_labels", "the network cannot learn it"),
    (VALIDATION, "class_without_validation", "its IoU counts as 0"),
  ):
    masks = [look.mask for look in looks if look.part == part and look.mask]
    unread = sum(mask.histogram is None for mask in masks)
    if len(masks) == unread:
      continue  # Those problems are told already.
    note = f"; {unread} of {len(masks)} masks could not be read" * bool(unread)
    pixels = labels[part].pixels
    if not pixels[1:].any() and labels[part].ignored:
      note += (
        f"; every other pixel is {dataset.ignore_label}, which is ignored: if"
        " that value means a class, the masks need dataset.mask_format="
        "'colours'"
      )
    for class_id in np.flatnonzero(pixels == 0):
      problems.append(
        Problem(
          kind,
          dataset_config.list_path(dataset, part),
          f"class {class_id} ({info.class_names[class_id]}) has no {part}"
          f" pixel: {effect}{note}",
        )
      )
  return problems


# -- Config --------------------------------------------------------------------


def _check_ranks(
  config: ml_collections.ConfigDict, num_classes: int
) -> list[Problem]:
  low, high = config.contrastive.low_rank, config.contrastive.high_rank
  # Both 0: chosen by the number of classes.
  if config.method != "u2pl" or low == high == 0:
    return []
  if 0 < low < high <= num_classes:
    return []
  return [
    Problem(
      "rank_window",
      "config.contrastive.low_rank",
      f"low_rank={low} and high_rank={high} with {num_classes} classes: needs"
      f" 0 < low_rank < high_rank <= {num_classes}, or no class is a negative",
    )
  ]


def _check_batches(
  config: ml_collections.ConfigDict, ids: Mapping[str, Sequence[str]]
) -> list[Problem]:
  problems = []
  for part in (LABELLED, UNLABELLED):
    batch, images = config.batch[part], len(ids[part])
    if 0 < images < batch:
      problems.append(
        Problem(
          "batch_size",
          f"config.batch.{part}",
          f"batches of {batch} from {images} {part} images: every batch has"
          f" some of them twice; choose {images} or less",
        )
      )
  return problems


def _check_crop(
  config: ml_collections.ConfigDict, sizes: Mapping[tuple[int, int], int]
) -> list[Problem]:
  if not sizes:
    return []
  crop = tuple(config.input.crop_size)
  share = crop_cover(sizes, crop, tuple(config.input.scale_range))
  if share >= 0.5:
    return []
  height, width = median_size(sizes)
  return [
    Problem(
      "crop_size",
      "config.input.crop_size",
      f"crops of {crop[0]}x{crop[1]} from images of typically"
      f" {height}x{width} (height x width) show {share:.0%} image and"
      f" {1 - share:.0%} padding: choose a smaller crop",
    )
  ]


def crop_cover(
  sizes: Mapping[tuple[int, int], int],
  crop_size: tuple[int, int],
  scale_range: tuple[float, float],
) -> float:
  """Expected share of a training crop that is image rather than padding.

  Args:
    sizes: number of images by (height, width).
    crop_size: (height, width).
    scale_range: lowest and highest factor; half of the draws lie below 1.
  """
  steps = (np.arange(64) + 0.5) / 64
  lowest, highest = scale_range
  scales = np.concatenate(
    [lowest + (1 - lowest) * steps, 1 + (highest - 1) * steps]
  )
  total = 0.0
  for size, count in sizes.items():
    shown = [
      np.minimum(length * scales, crop) / crop
      for length, crop in zip(size, crop_size, strict=True)
    ]
    total += count * float((shown[0] * shown[1]).mean())
  return total / sum(sizes.values())


def _check_eval_size(
  config: ml_collections.ConfigDict, looks: Sequence[_Look]
) -> list[Problem]:
  if config.eval.protocol != "padded":
    return []
  height, width = config.eval.pad_to
  return [
    Problem(
      "eval_size",
      look.image.path,
      f"the image is {inspection.size_text(look.image.size)}, larger than"
      f" config.eval.pad_to=({height}, {width}) (height, width): raise that",
    )
    for look in looks
    if look.part == VALIDATION
    and look.image.size
    and (look.image.size[0] > height or look.image.size[1] > width)
  ]


def median_size(sizes: Mapping[tuple[int, int], int]) -> tuple[int, int]:
  """Median height and width of images, `sizes` as for `crop_cover`."""
  heights, widths = zip(*collections.Counter(sizes).elements(), strict=True)
  return int(np.median(heights)), int(np.median(widths))
