"""Makes a data set and a config of a folder of images and a folder of masks.

  python scripts/init_dataset.py my/images my/masks
  python scripts/init_dataset.py my/images my/masks --unlabelled=my/more \
    --classes=background,coin,leaf --name=coins

An image and its mask have the same name but for the suffix, and perhaps an
ending that all masks share (IMG_1.jpg, IMG_1_mask.png). Images without a mask
are the unlabelled ones. Masks hold class numbers, 255 where no class is meant,
or the colour of the class; which of the two is found out and printed.

Nothing in the two folders is changed. data/<name>, or --output, gets

  config.py          for --config=
  classes.txt        one class a line, with its colour: names can be edited
  labelled.txt       ids of the images to learn from
  validation.txt     ids of the images, with masks, that judge the network
  unlabelled.txt     ids of the others; not with --unlabelled
  statistics.json    sizes, pixel statistics, frequencies of the classes
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from input_pipeline import (
  DataError,
  decode,
  errors,
  find_unlabelled,
  inspection,
  parallel,
  read_class_table,
  sources,
  splits,
  storage,
  voc_palette,
)

IGNORE = 255
# Colour of pixels to ignore in the colour masks of PASCAL VOC.
VOC_VOID = voc_palette(256)[IGNORE]
MAX_CLASSES = 254
# Images whose pixels are read for mean and standard deviation.
_SAMPLE = 500
# Updates of a run, with a GPU and on two CPU cores.
_STEPS, _STEPS_CPU = 10_000, 1_600


@dataclasses.dataclass(frozen=True)
class Files:
  """What lies in the user's folders.

  Attributes:
    images: file name, relative to the image folder, by id.
    masked: ids with a mask, sorted.
    mask_suffix: what follows the id of all masks, '' for any image suffix.
    orphans: masks without an image.
  """

  images: Mapping[str, str]
  masked: tuple[str, ...]
  mask_suffix: str
  orphans: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RawMask:
  """Values of one mask, before it is clear what they mean.

  Attributes:
    values: number of pixels by value, or by (red, green, blue).
    is_palette: whether the values index a palette.
    problem: why it could not be read; '' if it could.
  """

  values: Mapping[int | tuple[int, int, int], int]
  is_palette: bool = False
  problem: str = ""

  @property
  def has_colours(self) -> bool:
    return any(isinstance(value, tuple) for value in self.values)


@dataclasses.dataclass(frozen=True)
class Classes:
  """What the values of masks mean.

  Attributes:
    mask_format: 'index' or 'colours'.
    names: one per class.
    colours: one per class.
    ignore_colour: of 'colours', the colour to ignore, or None.
    how: a line for the user.
  """

  mask_format: str
  names: tuple[str, ...]
  colours: tuple[tuple[int, int, int], ...]
  ignore_colour: tuple[int, int, int] | None
  how: str

  def class_of(self, value: int | tuple[int, int, int]) -> int | None:
    """Class id of a value of a mask; None for one to ignore."""
    if self.mask_format == "index":
      return None if value == IGNORE else value
    colour = value if isinstance(value, tuple) else (value,) * 3
    return None if colour == self.ignore_colour else self.colours.index(colour)

  @property
  def table(self) -> str:
    """Text of the class table."""
    lines = [
      f"{name} {r} {g} {b}"
      for name, (r, g, b) in zip(self.names, self.colours, strict=True)
    ]
    if self.ignore_colour is not None:
      lines.append("ignore {} {} {}".format(*self.ignore_colour))
    return "\n".join(lines) + "\n"


# -- Folders -------------------------------------------------------------------


def find_files(images: str, masks: str) -> Files:
  """Pairs images with masks by name.

  Raises:
    DataError: a folder is missing or empty, two files have one id, or no mask
      has the name of an image.
  """
  for folder, what in ((images, "images"), (masks, "masks")):
    if not storage.is_folder(folder):
      raise DataError(f"{folder}: the folder of the {what} does not exist")
  if images == masks:
    raise DataError(
      f"{images}: images and masks lie in one folder; move the masks into a"
      " folder of their own"
    )
  image_of = _by_stem(images, outside=masks)
  mask_of = _by_stem(masks, outside=images)
  tails = {stem: _tail(stem, image_of) for stem in mask_of}
  counts = collections.Counter(t for t in tails.values() if t is not None)
  if not counts:
    raise DataError(
      f"{masks}: no mask has the name of an image, as IMG_1.png or"
      f" IMG_1_mask.png has that of IMG_1.jpg; there are, for example,"
      f" {next(iter(image_of))!r} and {next(iter(mask_of))!r}"
    )
  # The most common one; the empty one if there are as many of it.
  tail = max(counts, key=lambda t: (counts[t], t == ""))
  used = {stem: name for stem, name in mask_of.items() if tails[stem] == tail}
  suffixes = {os.path.splitext(name)[1] for name in used.values()}
  if tail and len(suffixes) > 1:
    raise DataError(
      f"{masks}: masks end in {' and '.join(sorted(suffixes))} behind {tail!r};"
      " save them all in one format"
    )
  return Files(
    images=image_of,
    masked=tuple(sorted(stem.removesuffix(tail) for stem in used)),
    mask_suffix=tail + suffixes.pop() if len(suffixes) == 1 else "",
    orphans=tuple(sorted(set(mask_of.values()) - set(used.values()))),
  )


def _by_stem(folder: str, *, outside: str) -> dict[str, str]:
  found = {}
  for name in storage.files_below(folder):
    if not splits.has_image_suffix(name):
      continue
    if storage.join(folder, name).startswith(outside.rstrip("/") + "/"):
      continue
    stem = os.path.splitext(name)[0]
    if stem in found:
      raise DataError(
        f"{storage.join(folder, found[stem])} and"
        f" {storage.join(folder, name)} have the same id {stem!r}: remove or"
        " rename one"
      )
    found[stem] = name
  if not found:
    raise DataError(f"{folder}: the folder has no image files")
  return found


def _tail(stem: str, ids: Mapping[str, str]) -> str | None:
  """What a mask's name has behind the longest id that it begins with."""
  for end in range(len(stem), 0, -1):
    if stem[:end] in ids:
      return stem[end:]
  return None


# -- Masks ---------------------------------------------------------------------


def read_raw(source: sources.Source, id: str) -> RawMask:
  """The values of a mask as they are stored."""
  try:
    path = source.mask_path(id)
    data = source.read_mask(id)
    try:
      indices = decode.read_indices(data, path)
    except errors.MaskFormatError:
      rgb = decode.read_colours(data, path).reshape(-1, 3).astype(np.int32)
      codes = rgb[:, 0] << 16 | rgb[:, 1] << 8 | rgb[:, 2]
      values, counts = np.unique(codes, return_counts=True)
      colours = [(v >> 16, v >> 8 & 255, v & 255) for v in values.tolist()]
      return RawMask(dict(zip(colours, counts.tolist(), strict=True)))
  except DataError as error:
    return RawMask({}, problem=str(error))
  values, counts = np.unique(indices, return_counts=True)
  return RawMask(
    dict(zip(values.tolist(), counts.tolist(), strict=True)),
    is_palette=inspection.storage_of(data) == "palette",
  )


def find_classes(masks: Sequence[RawMask], names: Sequence[str]) -> Classes:
  """Finds out what the values of masks mean.

  Args:
    masks: those that could be read.
    names: of the classes as the user has them, or () for class_0, class_1, ...

  Raises:
    DataError: there is one class only or there are too many, or the names do
      not fit.
  """
  coloured = [mask.has_colours for mask in masks]
  if any(coloured):
    if not all(coloured):
      raise DataError(
        f"{sum(coloured)} of {len(masks)} masks have colours and the others"
        " grey values or a palette: save them all in one way"
      )
    colours = set().union(*(mask.values for mask in masks))
    ignore = VOC_VOID if VOC_VOID in colours else None
    return _colour_classes(colours - {ignore}, ignore, names, "colours")
  values = set().union(*(mask.values for mask in masks))
  levels = sorted(values - {IGNORE})
  if levels and levels[-1] > IGNORE:
    raise DataError(
      f"there are masks with the value {levels[-1]}: class numbers are 0 to"
      f" {MAX_CLASSES - 1}, and {IGNORE} for no class"
    )
  is_grey = not any(mask.is_palette for mask in masks)
  # Grey masks for the eye rather than for numbers: black and white, or levels
  # far apart.
  if names:
    is_for_the_eye = bool(levels) and levels[-1] >= len(names)
  else:
    is_for_the_eye = bool(levels) and levels[-1] >= max(64, 4 * len(values))
  if is_grey and (values == {0, IGNORE} or is_for_the_eye):
    # White is a class, unless the names leave it over.
    ignored = IGNORE in values and len(names) == len(levels)
    return _colour_classes(
      {(value,) * 3 for value in (levels if ignored else values)},
      (IGNORE,) * 3 if ignored else None,
      names,
      "grey levels",
    )
  if not levels:
    raise DataError(
      f"all pixels of the masks are {IGNORE}, which belongs to no class"
    )
  num_classes = len(names) or levels[-1] + 1
  if levels[-1] >= num_classes:
    raise DataError(
      f"--classes has {num_classes} names, but there are masks with the value"
      f" {levels[-1]}: name the classes 0 to {levels[-1]}"
    )
  how = f"masks hold class numbers {_listed(levels)}"
  if IGNORE in values:
    how += f", and {IGNORE} for no class"
  return Classes(
    "index", _names(names, num_classes), voc_palette(num_classes), None, how
  )


def _colour_classes(
  colours: set[tuple[int, int, int]],
  ignore: tuple[int, int, int] | None,
  names: Sequence[str],
  what: str,
) -> Classes:
  if len(colours) > MAX_CLASSES:
    raise DataError(
      f"the masks have {len(colours)} {what}: one each for at most"
      f" {MAX_CLASSES} classes; were they saved with losses, scaled, or drawn"
      " with smooth edges?"
    )
  ordered = sorted(colours)
  shown = [c[0] for c in ordered] if what == "grey levels" else ordered
  if names and len(names) != len(ordered):
    raise DataError(
      f"--classes has {len(names)} names, but the masks have {len(ordered)}"
      f" {what}: {_listed(shown)}; name them in this order"
    )
  how = f"masks hold the {what} {_listed(shown)}"
  if ignore is not None:
    how += f", and {ignore} for no class"
  return Classes(
    "colours", _names(names, len(ordered)), tuple(ordered), ignore, how
  )


def _names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
  if num_classes > MAX_CLASSES:
    raise DataError(
      f"the masks have {num_classes} classes: at most {MAX_CLASSES} can be"
    )
  if num_classes < 2:
    raise DataError("the masks have one class only: nothing can be told apart")
  return tuple(names) or tuple(f"class_{i}" for i in range(num_classes))


def _listed(values: Sequence) -> str:
  shown = ", ".join(map(str, values[:12]))
  return f"{shown}, ... ({len(values)})" if len(values) > 12 else shown


# -- Lists ---------------------------------------------------------------------


def choose_validation(
  classes_of: Mapping[str, frozenset[int]], fraction: float, seed: int
) -> tuple[str, ...]:
  """Draws the images that judge the network.

  Every class stays among the others, and is drawn at least once if it occurs
  twice and the number suffices; the rarest class is served first.

  Args:
    classes_of: classes in the mask of each id.
    fraction: of the images to draw; at least one is drawn.
    seed: of the draw.

  Returns:
    Ids, sorted; fewer than the fraction if a class would be lost.
  """
  ids = sorted(classes_of)
  wanted = max(1, round(fraction * len(ids)))
  order = [ids[i] for i in np.random.default_rng(seed).permutation(len(ids))]
  left = collections.Counter(c for id in ids for c in classes_of[id])
  chosen = set()

  def take_first(candidates: Sequence[str]) -> None:
    for id in candidates:
      is_free = id not in chosen and len(chosen) < min(wanted, len(ids) - 1)
      if is_free and all(left[c] > 1 for c in classes_of[id]):
        chosen.add(id)
        left.subtract(classes_of[id])
        return

  for class_id in sorted(left, key=lambda c: (left[c], c)):
    if not any(class_id in classes_of[id] for id in chosen):
      take_first([id for id in order if class_id in classes_of[id]])
  for id in order:
    take_first([id])
  return tuple(sorted(chosen))


def list_text(ids: Sequence[str], image_of: Mapping[str, str]) -> str:
  """Text of a list that reads back as `ids`.

  Raises:
    DataError: a name that no list can hold.
  """
  lines = []
  for id in ids:
    line = id
    if splits.id_of_line(line.strip()) != id:
      # The name looks like a path: write all of it, below a first folder.
      line = f"images/{image_of[id]}"
    is_one_line = len(line.splitlines()) == 1
    if not is_one_line or splits.id_of_line(line.strip()) != id:
      raise DataError(
        f"{image_of[id]!r}: a list cannot hold this name; rename the image and"
        " its mask"
      )
    lines.append(line)
  return "".join(f"{line}\n" for line in lines)


# -- Config --------------------------------------------------------------------

_CONFIG = '''"""Own data {name!r}: {counts}.

  python -m input_pipeline.doctor --config={path}
  python -m u2pl_jax.main --config={path}:cpu
  python -m u2pl_jax.main --config={path}
  python -m u2pl_jax.main --config={path}:method=supervised

Made by scripts/init_dataset.py; edit what you like. `cpu` trains the tiny
backbone from random weights, enough to see the whole way on two cores. The full
recipe wants a GPU and ImageNet weights (--config.model.pretrained=, see
docs/weights.md). Compare with method=supervised, which takes as many updates.
"""

from configs import common


def get_config(arg=None):
  """See `common.get_base_config` for the keys."""
  options = common.parse_arg(
    arg, method="u2pl", cpu=False, backbone="resnet50", seed=2
  )
  config = common.get_base_config()
  config.name = {name_text}
  config.seed = options.seed
  config.method = options.method
  config.model.backbone = options.backbone
  config.dataset.name = "folder"
  # Where this file lies; paths are relative to it unless absolute.
  config.dataset.root = {root_text}
  config.dataset.image_dir = {image_dir_text}
  config.dataset.mask_dir = {mask_dir_text}
  config.dataset.image_suffix = ""
  config.dataset.mask_suffix = {mask_suffix_text}
  config.dataset.mask_format = {mask_format_text}
  config.dataset.classes_file = "classes.txt"
  config.dataset.labelled_list = "labelled.txt"
  config.dataset.validation_list = "validation.txt"
  config.dataset.{unlabelled_key} = {unlabelled_text}
  config.batch.labelled = {batch_labelled}
  config.batch.unlabelled = {batch_unlabelled}
  # Half of the images are {median} (height x width) or smaller.
  config.input.crop_size = ({crop}, {crop})
  config.model.aspp_rates = {aspp_rates}
  # About {steps} updates, {epoch_steps} an epoch; a quarter from labels alone.
  config.schedule.epochs = {epochs}
  config.schedule.warmup_epochs = {warmup}
  # For {num_classes} classes.
  config.contrastive.low_rank = {low_rank}
  config.contrastive.high_rank = {high_rank}
  # The largest image with a mask.
  config.eval.pad_to = {pad_to}
  config.eval.batch = {eval_batch}
  config.eval.every_epochs = {every}
  config.checkpoint.every_epochs = {every}
  if options.cpu:
    common.apply_cpu(config)
    config.input.crop_size = ({crop_cpu}, {crop_cpu})
    config.model.aspp_rates = {aspp_rates_cpu}
    # Of these images: ImageNet's statistics belong to ImageNet's weights.
    config.dataset.mean = {mean}
    config.dataset.std = {std}
    config.schedule.epochs = {epochs_cpu}
    config.schedule.warmup_epochs = {warmup_cpu}
    config.eval.every_epochs = {every_cpu}
    config.checkpoint.every_epochs = {every_cpu}
  if options.method != "u2pl":
    config.name += f"_{{options.method}}"
  return config
'''


def config_text(
  *,
  name: str,
  path: str,
  paths: Mapping[str, str],
  mask_format: str,
  num_classes: int,
  counts: Mapping[str, int],
  sizes: Sequence[tuple[int, int]],
  masked_sizes: Sequence[tuple[int, int]],
  mean: Sequence[float],
  std: Sequence[float],
) -> str:
  """Text of the experiment file.

  Args:
    name: of the data set.
    path: of the file, for its docstring.
    paths: root, image_dir, mask_dir, mask_suffix, unlabelled_key, unlabelled.
    mask_format: of the masks.
    num_classes: k.
    counts: images by part: labelled, unlabelled, validation.
    sizes: (height, width) of all images that could be read.
    masked_sizes: of those with masks.
    mean, std: per channel, RGB, on the 0..255 scale.
  """
  batch = {part: min(8, counts[part]) for part in ("labelled", "unlabelled")}
  epoch_steps = counts["unlabelled"] // batch["unlabelled"]
  short = int(np.median([min(size) for size in sizes]))
  crop = min(513, max(33, 32 * round(short / 32) + 1))
  pad_to = tuple(map(max, zip(*masked_sizes, strict=True)))
  epochs = math.ceil(_STEPS / epoch_steps)
  epochs_cpu = math.ceil(_STEPS_CPU / epoch_steps)
  median = [int(np.median(lengths)) for lengths in zip(*sizes, strict=True)]
  texts = {"name": name, "mask_format": mask_format, **paths}
  return _CONFIG.format(
    name=name,
    path=path,
    unlabelled_key=paths["unlabelled_key"],
    # As the formatter of this repository writes strings.
    **{
      f"{key}_text": json.dumps(text, ensure_ascii=False)
      for key, text in texts.items()
    },
    counts=", ".join(f"{n} {part}" for part, n in counts.items()) + " images",
    num_classes=num_classes,
    # Batch normalisation of the image-pooling branch needs two.
    batch_labelled=max(2, batch["labelled"]),
    batch_unlabelled=batch["unlabelled"],
    median=f"{median[0]}x{median[1]}",
    crop=crop,
    aspp_rates=_aspp_rates(crop),
    crop_cpu=min(129, crop),
    aspp_rates_cpu=_aspp_rates(min(129, crop)),
    steps=_STEPS,
    epoch_steps=epoch_steps,
    epochs=epochs,
    warmup=epochs // 4,
    every=max(1, epochs // 40),
    epochs_cpu=epochs_cpu,
    warmup_cpu=epochs_cpu // 2,
    every_cpu=max(1, epochs_cpu // 8),
    # The published window [3, 20), as far as there are classes for it; two
    # classes want 1.
    low_rank=max(1, min(3, num_classes // 3)),
    high_rank=min(20, num_classes),
    pad_to=pad_to,
    eval_batch=min(8, max(1, 8 * 513**2 // math.prod(pad_to))),
    mean=tuple(round(value, 1) for value in mean),
    std=tuple(max(1.0, round(value, 1)) for value in std),
  )


def _aspp_rates(crop: int) -> tuple[int, int, int]:
  """The published dilations, or smaller ones for a small feature map."""
  rate = 12 if crop >= 257 else max(1, crop // 8 // 8)
  return (rate, 2 * rate, 3 * rate)


# -- Everything ----------------------------------------------------------------


def init(arguments: argparse.Namespace) -> None:
  """Looks, decides, writes, prints.

  Raises:
    DataError: the folders or the arguments do not fit, or the output exists.
  """
  images, masks = _absolute(arguments.images), _absolute(arguments.masks)
  name = arguments.name or os.path.basename(os.path.dirname(images))
  if not re.fullmatch(r"[\w.-]+", name):
    raise DataError(
      f"--name={name}: needs letters, digits, '_', '-' and '.' alone"
    )
  if not 0 < arguments.val_fraction < 1:
    raise DataError(
      f"--val-fraction={arguments.val_fraction}: must lie between 0 and 1"
    )
  if arguments.seed < 0:
    raise DataError(f"--seed={arguments.seed}: must be 0 or more")
  output = pathlib.Path(arguments.output or os.path.join("data", name))
  names = _class_names(arguments.classes)
  files = find_files(images, masks)
  source = sources.Layout(
    root=str(output),
    image_dir=images,
    mask_dir=masks,
    image_suffix="",
    mask_suffix=files.mask_suffix,
  )
  notes = []
  if files.orphans:
    notes.append(
      f"{len(files.orphans)} masks belong to no image and are not used, such as"
      f" {files.orphans[0]}"
    )
  unlabelled = tuple(sorted(set(files.images) - set(files.masked)))
  folder = None
  if arguments.unlabelled:
    folder = _absolute(arguments.unlabelled)
    if unlabelled and not f"{images}/".startswith(f"{folder}/"):
      raise DataError(
        f"{images}: {len(unlabelled)} images have no mask, such as"
        f" {files.images[unlabelled[0]]}, and --unlabelled names a further"
        " folder; a run takes its unlabelled images from one folder: move them"
        " there"
      )
    source, unlabelled = find_unlabelled(source, folder, files.masked)
  if not unlabelled:
    raise DataError(
      f"{images}: every image has a mask, so that there is nothing unlabelled"
      " to learn from: add more images, or name a folder of them with"
      " --unlabelled"
    )

  raw = dict(
    zip(
      files.masked,
      parallel.map_in_threads(
        lambda id: read_raw(source, id), files.masked, "masks", "mask"
      ),
      strict=True,
    )
  )
  broken = [mask.problem for mask in raw.values() if mask.problem]
  readable = {id: mask for id, mask in raw.items() if not mask.problem}
  if not readable:
    raise DataError(broken[0])
  if broken:
    notes.append(
      f"{len(broken)} masks cannot be read, the doctor lists them; the first:"
      f" {broken[0]}"
    )
  classes = find_classes(list(readable.values()), names)
  classes_of = {
    id: frozenset(map(classes.class_of, mask.values)) - {None}
    for id, mask in readable.items()
  }
  validation = choose_validation(
    classes_of, arguments.val_fraction, arguments.seed
  )
  if not validation:
    raise DataError(
      f"{masks}: no mask can be spared to judge the network, or a class would"
      " have no labelled image: label more images"
    )
  labelled = tuple(id for id in files.masked if id not in set(validation))
  wanted = round(arguments.val_fraction * len(readable))
  if len(validation) < wanted:
    notes.append(
      f"{len(validation)} instead of {wanted} validation images, or a class"
      " would have no labelled image"
    )

  looks = _look_at_images(source, labelled, unlabelled, validation)
  sizes = {id: look for id, look in looks.sizes.items() if look}
  masked_sizes = [sizes[id] for id in files.masked if id in sizes]
  if not masked_sizes:
    raise DataError(f"{images}: none of the images with masks can be read")
  if len(sizes) < len(looks.sizes):
    notes.append(
      f"{len(looks.sizes) - len(sizes)} images cannot be read, the doctor lists"
      " them"
    )
  counts = {
    "labelled": len(labelled),
    "unlabelled": len(unlabelled),
    "validation": len(validation),
  }
  config_path = output / "config.py"
  config = config_text(
    name=name,
    path=str(config_path),
    paths={
      "root": os.path.abspath(output),
      "image_dir": _inside(images, output),
      "mask_dir": _inside(masks, output),
      "mask_suffix": files.mask_suffix,
      "unlabelled_key": "unlabelled_dir" if folder else "unlabelled_list",
      "unlabelled": _inside(folder, output) if folder else "unlabelled.txt",
    },
    mask_format=classes.mask_format,
    num_classes=len(classes.names),
    counts=counts,
    sizes=list(sizes.values()),
    masked_sizes=masked_sizes,
    mean=looks.mean,
    std=looks.std,
  )
  table = _frequencies(classes, readable, classes_of, validation)
  contents = {
    "classes.txt": classes.table,
    "labelled.txt": list_text(labelled, files.images),
    "validation.txt": list_text(validation, files.images),
    "statistics.json": _statistics(
      table, counts, list(sizes.values()), looks, arguments
    ),
    # Last: where it is, everything is.
    "config.py": config,
  }
  if not folder:
    text = list_text(unlabelled, files.images)
    contents = {"unlabelled.txt": text, **contents}
  _write(output, contents, force=arguments.force)
  # As a run will read it.
  read_class_table(output / "classes.txt")

  print(f"{classes.how}; mask_format={classes.mask_format!r}")
  print(f"{'class':<24}{'colour':<18}{'pixels':>8}{'labelled':>10}{'val':>6}")
  for row in table:
    colour = " ".join(map(str, row["colour"]))
    print(
      f"{row['id']:>3} {row['name']:<20}{colour:<18}{row['share']:>8.2%}"
      f"{row['labelled_images']:>10}{row['validation_images']:>6}"
    )
    if not row["labelled_images"]:
      notes.append(
        f"class {row['id']} ({row['name']}) is in no mask; a number that is not"
        " used is a class too"
      )
  print(", ".join(f"{n} {part} images" for part, n in counts.items()))
  for note in notes:
    print(f"note: {note}")
  print(f"wrote {', '.join(str(output / file) for file in contents)}")
  print("next:")
  print(f"  python -m input_pipeline.doctor --config={config_path}")
  print(f"  python -m u2pl_jax.main --config={config_path}:cpu")
  print(f"  python -m u2pl_jax.main --config={config_path}")


def _absolute(path: str) -> str:
  return path.rstrip("/") if storage.is_remote(path) else os.path.abspath(path)


def _inside(path: str, output: pathlib.Path) -> str:
  """The path relative to the output if it lies in there."""
  root = os.path.abspath(output) + "/"
  return path.removeprefix(root)


def _class_names(text: str) -> tuple[str, ...]:
  if not text:
    return ()
  names = tuple(" ".join(name.split()) for name in text.split(","))
  for name in names:
    if not name or name == "ignore" or names.count(name) > 1:
      raise DataError(
        f"--classes={text}: {name!r} is no name for a class, or is there twice"
      )
  return names


@dataclasses.dataclass(frozen=True)
class _Looks:
  """Sizes by id, None where unreadable, and pixel statistics of a sample."""

  sizes: Mapping[str, tuple[int, int] | None]
  mean: tuple[float, ...]
  std: tuple[float, ...]


def _look_at_images(
  source: sources.Source,
  labelled: Sequence[str],
  unlabelled: Sequence[str],
  validation: Sequence[str],
) -> _Looks:
  def size_of(id: str) -> tuple[int, int] | None:
    try:
      return decode.image_sizes(source, [id])[0]
    except DataError:
      return None  # Counted by the caller; the doctor says why.

  ids = [*labelled, *unlabelled, *validation]
  sizes = parallel.map_in_threads(size_of, ids, "sizes", "image")
  training = ids[: len(labelled) + len(unlabelled)]
  sample = training[:: math.ceil(len(training) / _SAMPLE)]
  sums = [
    look.sums
    for look in parallel.map_in_threads(
      lambda id: inspection.look_at_image(source, id, has_mask=False),
      sample,
      "pixels",
      "image",
    )
    if look.sums is not None
  ]
  if not sums:
    raise DataError(f"{source.image_path(sample[0])}: no image can be read")
  mean, std = inspection.mean_and_std(sums)
  return _Looks(dict(zip(ids, sizes, strict=True)), mean, std)


def _frequencies(
  classes: Classes,
  masks: Mapping[str, RawMask],
  classes_of: Mapping[str, frozenset[int]],
  validation: Sequence[str],
) -> list[dict]:
  pixels = collections.Counter()
  for mask in masks.values():
    for value, count in mask.values.items():
      pixels[classes.class_of(value)] += count
  return [
    {
      "id": class_id,
      "name": name,
      "colour": colour,
      "pixels": pixels[class_id],
      "share": pixels[class_id] / pixels.total(),
      "labelled_images": sum(
        class_id in found and id not in validation
        for id, found in classes_of.items()
      ),
      "validation_images": sum(class_id in classes_of[id] for id in validation),
    }
    for class_id, (name, colour) in enumerate(
      zip(classes.names, classes.colours, strict=True)
    )
  ]


def _statistics(
  table: Sequence[dict],
  counts: Mapping[str, int],
  sizes: Sequence[tuple[int, int]],
  looks: _Looks,
  arguments: argparse.Namespace,
) -> str:
  heights, widths = zip(*sizes, strict=True)
  content = {
    "images": counts,
    "sizes": {
      "smallest": (min(heights), min(widths)),
      "median": (int(np.median(heights)), int(np.median(widths))),
      "largest": (max(heights), max(widths)),
      "distinct": len(set(sizes)),
    },
    "mean": [round(value, 2) for value in looks.mean],
    "std": [round(value, 2) for value in looks.std],
    "classes": table,
    "ignored_share": 1 - sum(row["share"] for row in table),
    "seed": arguments.seed,
    "val_fraction": arguments.val_fraction,
  }
  return json.dumps(content, indent=2) + "\n"


def _write(
  output: pathlib.Path, contents: Mapping[str, str], *, force: bool
) -> None:
  """Writes files whole or not at all; what is the same already may stay.

  Raises:
    DataError: a file with other content is there, or writing fails.
  """
  try:
    for name, text in contents.items():
      path = output / name
      if not force and path.exists() and path.read_text("utf-8") != text:
        raise DataError(
          f"{path}: the file exists and is different; choose another --output,"
          " or replace it with --force"
        )
    output.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
      storage.write_whole(output / name, text.encode())
  except OSError as error:
    raise DataError(
      f"{error.filename}: cannot be written: {error.strerror}"
    ) from None
  except UnicodeDecodeError:
    raise DataError(
      f"{path}: the file exists and is no text; choose another --output, or"
      " replace it with --force"
    ) from None


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("images", help="folder of the images")
  parser.add_argument("masks", help="folder of the masks")
  parser.add_argument(
    "--unlabelled", help="a folder of further images, all without masks"
  )
  parser.add_argument(
    "--name", help="of the data set; default: the folder above the images"
  )
  parser.add_argument(
    "--classes",
    default="",
    help="names of the classes, comma-separated, in the order of their numbers"
    " or of the colours that are printed; default: class_0,class_1,...",
  )
  parser.add_argument(
    "--val-fraction",
    type=float,
    default=0.2,
    help="of the images with masks, that judge the network; default 0.2",
  )
  parser.add_argument("--seed", type=int, default=0, help="of their draw")
  parser.add_argument("--output", help="folder to write; default: data/<name>")
  parser.add_argument(
    "--force", action="store_true", help="replace files of the output"
  )
  try:
    init(parser.parse_args(argv))
  except DataError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print("error: interrupted; start again", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
  main()
