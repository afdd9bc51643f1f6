"""A procedural segmentation world in VOC layout: data without a download.

An image shows dull, cloudy ground and a few textured objects that overlap, are
lit from one side and photographed through coloured light, haze and noise. A
class is a cluster of appearances that is wide but apart from the others: its
texture is its own; its hue roams over its own sixth of the colour circle; its
shape is usual, not certain; pitch, direction, contrast and light vary freely.
A few labelled images cover such clusters with gaps. The gaps are what
unlabelled images can fill: neighbouring appearances, and halves of objects that
CutMix hides, connect what the labels left apart. No class is decided by chance:
with enough labels a small network learns them all.

`render` is a pure function of the world and the number of the image. It draws
only by `Generator.random`, whose stream NumPy keeps, and computes in float64,
so that the last-bit differences between processors do not survive the rounding
to 8 bits.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable

import numpy as np
from PIL import Image

from input_pipeline import datasets, errors

_INFO = datasets.dataset_info("shapes")
CLASS_NAMES, PALETTE = _INFO.class_names, _INFO.palette

IMAGE_SUFFIX = ".png"

_FORMAT = 1  # Raise when `render` or the layout changes: old folders refuse.
_STYLES = ("target", "pretrain")
_TAU = 2.0 * math.pi
# First image number of each role. The ranges never meet, so that validation and
# test images stay the same whatever the size of the training set.
_FIRST = {"train": 0, "val": 1_000_000, "test": 2_000_000}
_MAX_SEARCH = 20_000


@dataclasses.dataclass(frozen=True)
class World:
  """What the images look like. Equal worlds have equal images.

  Attributes:
    image_size: height and width in pixels; objects grow with it.
    num_classes: with the ground, 3 to 7. The last class is the rare one.
    variety: how wide the classes are, in hue, texture, shape and light; 1 is
      the default world, 0 leaves position, size and contrast.
    rare_probability: share of images into which the rare class is put. Of
      these, some hide it behind the border.
    noise: scale of the camera noise; 0 is none.
    style: "target", or "pretrain" for a world with other textures, other hues
      and mostly other shapes, on which to pretrain a backbone.
    seed: another seed is another set of images of the same kind.
  """

  image_size: int = 64
  num_classes: int = 7
  variety: float = 1.0
  rare_probability: float = 0.15
  noise: float = 1.0
  style: str = "target"
  seed: int = 0

  def __post_init__(self):
    if self.image_size < 8:
      raise ValueError(f"image_size is {self.image_size}, must be at least 8")
    if not 3 <= self.num_classes <= len(CLASS_NAMES):
      raise ValueError(
        f"num_classes is {self.num_classes}, must be 3 to {len(CLASS_NAMES)}"
      )
    if not 0.0 <= self.variety <= 2.0:
      raise ValueError(f"variety is {self.variety}, must be 0 to 2")
    if not 0.0 <= self.rare_probability <= 1.0:
      raise ValueError(
        f"rare_probability is {self.rare_probability}, must be 0 to 1"
      )
    if self.noise < 0.0:
      raise ValueError(f"noise is {self.noise}, must not be negative")
    if self.style not in _STYLES:
      raise ValueError(f"style is {self.style!r}, must be one of {_STYLES}")
    if self.seed < 0:
      raise ValueError(f"seed is {self.seed}, must not be negative")


# Textures: object coordinates (x, y) and radius r in units that make a period
# 2 pi, and the angle a, to values in [-1, 1].


def _wave(x):
  """A sine pushed towards a square wave: crisp, with little aliasing."""
  return np.clip(1.7 * np.sin(x), -1.0, 1.0)


def _stripes(x, y, r, a):
  return _wave(x)


def _checks(x, y, r, a):
  return np.clip(2.2 * np.sin(x) * np.sin(y), -1.0, 1.0)


def _chevrons(x, y, r, a):
  return _wave(x + 0.9 * np.abs(y))


def _dots(x, y, r, a):
  return np.clip(1.6 * (np.cos(x) + np.cos(y)) - 0.9, -1.0, 1.0)


def _spokes(x, y, r, a):
  return _wave(8.0 * a)


def _rings(x, y, r, a):
  return _wave(r)


def _ripples(x, y, r, a):
  return _wave(x + 1.3 * np.sin(0.7 * y))


def _grid(x, y, r, a):
  return np.clip(2.5 * np.maximum(np.cos(x), np.cos(y)) - 1.7, -1.0, 1.0)


def _bricks(x, y, r, a):
  # Every second row is shifted by half a brick.
  joints = np.cos(0.5 * x + np.pi * np.floor(y / _TAU))
  return np.clip(2.5 * np.maximum(np.cos(y), joints) - 1.7, -1.0, 1.0)


def _hexes(x, y, r, a):
  waves = np.cos(x) + 2.0 * np.cos(0.5 * x) * np.cos(0.866 * y)
  return np.clip(waves - 0.5, -1.0, 1.0)


def _plaid(x, y, r, a):
  return 0.5 * (_wave(x) + _wave(0.5 * y))


def _spiral(x, y, r, a):
  return _wave(r + 2.0 * a)


# Shapes: object coordinates (x, y, r, a) of an object of radius about 1 and two
# numbers p in [0, 1) to a distance to the outline, negative inside.


def _bar(x, y, r, a, p):
  length = 1.35 + 0.5 * p[0]
  return np.maximum(np.abs(x) - length, np.abs(y) - 1.0 / length)


def _square(x, y, r, a, p):
  length = 0.85 + 0.2 * p[0]
  return np.maximum(np.abs(x) - length, np.abs(y) - 1.0 / length)


def _lens(x, y, r, a, p):
  offset = 0.9 + 0.7 * p[0]
  radius = math.sqrt(2.25 + offset * offset)
  return np.sqrt(x * x + (np.abs(y) + offset) ** 2) - radius


def _blob(x, y, r, a, p):
  outline = 1.05 + 0.16 * np.cos(2 * a + _TAU * p[0])
  return r - (outline + 0.12 * np.cos(3 * a + _TAU * p[1]))


def _ring(x, y, r, a, p):
  return np.abs(r - 0.95) - (0.36 + 0.10 * p[0])


def _disc(x, y, r, a, p):
  return r - 1.05


def _ellipse(x, y, r, a, p):
  stretch = 1.1 + 0.35 * p[0]
  return (np.sqrt((x / stretch) ** 2 + (y * stretch) ** 2) - 1.0) * 0.8


def _star(x, y, r, a, p):
  points = 3.0 + math.floor(3.0 * p[0])
  return (r - (1.0 + 0.3 * np.cos(points * a))) * 0.8


def _cross(x, y, r, a, p):
  width = 0.38 + 0.1 * p[0]
  ax, ay = np.abs(x), np.abs(y)
  return np.minimum(
    np.maximum(ax - 1.3, ay - width), np.maximum(ay - 1.3, ax - width)
  )


@dataclasses.dataclass(frozen=True)
class _Kind:
  texture: Callable[..., np.ndarray]
  shape: Callable[..., np.ndarray]
  hue: float


# By class id, from class 1 on.
_KINDS = {
  "target": (
    _Kind(_stripes, _bar, 0.06),
    _Kind(_checks, _square, 0.22),
    _Kind(_chevrons, _lens, 0.38),
    _Kind(_dots, _blob, 0.55),
    _Kind(_spokes, _ring, 0.72),
    _Kind(_rings, _disc, 0.89),
  ),
  "pretrain": (
    _Kind(_ripples, _ellipse, 0.14),
    _Kind(_grid, _star, 0.30),
    _Kind(_bricks, _cross, 0.46),
    _Kind(_hexes, _bar, 0.64),
    _Kind(_plaid, _blob, 0.80),
    _Kind(_spiral, _ellipse, 0.97),
  ),
}


def render(world: World, index: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws one image and its mask.

  Args:
    world: what images look like.
    index: the number of the image, >= 0.

  Returns:
    image uint8 [size, size, 3] RGB and mask uint8 [size, size] of class ids.
    Every pixel has a class; on an outline it is that of the pixel's centre.
  """
  seeds = [world.seed, _STYLES.index(world.style), index]
  rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds)))
  image = _ground(world, rng)
  mask = np.zeros(image.shape[:2], np.uint8)

  rare = world.num_classes - 1
  u = rng.random(4)
  class_ids = [1 + int(v * (rare - 1)) for v in rng.random(2 + int(u[0] * 3))]
  if u[1] < world.rare_probability:
    class_ids.append(rare)  # Last is nearest: small objects stay visible.
  for class_id in class_ids:
    colour, distance = _object(world, class_id, rng)
    # One pixel of soft outline in the image, a hard one in the mask.
    image += (colour - image) * np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    mask[distance < 0.0] = class_id

  image = _photograph(world, image, rng)
  return (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8), mask


def _ground(world, rng):
  """Two dull colours mixed by clouds, float64 [size, size, 3]."""
  u = rng.random(8)
  value = _between(u[2], 0.25, 0.75)
  value2 = min(max(value + _between(u[5], -0.25, 0.25), 0.15), 0.9)
  first = _hsv(u[0], 0.3 * u[1], value)
  second = _hsv(u[3], 0.3 * u[4], value2)
  clouds = _clouds(rng, world.image_size, 3 + int(u[6] * 4))
  mix = np.clip(0.5 + 0.8 * clouds, 0.0, 1.0)
  image = first + (second - first) * mix[..., None]
  return image + (0.1 * u[7]) * _clouds(rng, world.image_size, 20)[..., None]


def _object(world, class_id, rng):
  """Colours [size, size, 3] and distance in pixels [size, size]."""
  kind = _KINDS[world.style][class_id - 1]
  variety = world.variety
  is_rare = class_id == world.num_classes - 1
  u = rng.random(20)

  # The rare class is small, but vivid and less varied. The few labels that show
  # it would not suffice otherwise: its pseudo labels would fade to nothing and
  # hide what the unlabelled images do for the others.
  radius = _between(u[0], *((6.5, 9.0) if is_rare else (10.0, 16.0)))
  vivid = 0.7 if is_rare else 0.45
  hue_width = variety * (0.032 if is_rare else 0.08)

  yy, xx = _coordinates(world.image_size)
  dy, dx = yy - _between(u[1], 4.0, 60.0), xx - _between(u[2], 4.0, 60.0)
  cos, sin = math.cos(_TAU * u[3]), math.sin(_TAU * u[3])
  x, y = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius
  r, a = np.sqrt(x * x + y * y), np.arctan2(y, x)
  shape = _blob if u[4] < 0.15 * variety else kind.shape
  distance = shape(x, y, r, a, u[5:7]) * (radius * world.image_size / 64.0)

  hue = kind.hue + _between(u[7], -hue_width, hue_width)
  if u[8] < 0.03 * variety:
    hue = u[7]  # Any hue: texture and shape must decide.
  hue2 = hue + variety * _between(u[11], -0.03, 0.03)
  saturation = _between(u[9], vivid, 0.95)
  value = _between(u[10], vivid, 0.95)
  light = _hsv(hue, saturation, value)
  dark = _hsv(
    hue2,
    saturation * _between(u[13], 0.4, 1.0),
    value * (1.0 - _between(u[12], 0.3, 0.65)),
  )
  if u[14] < 0.5:
    dark, light = light, dark

  tilt = _TAU * (u[16] - 0.5) * 0.5 * variety
  cos, sin = math.cos(tilt), math.sin(tilt)
  pitch = _TAU * radius / (4.2 + 2.0 * variety * u[15])
  shift = _TAU * u[17]
  pattern = kind.texture(
    pitch * (cos * x + sin * y) + shift,
    pitch * (cos * y - sin * x) + _TAU * u[18],
    pitch * r + shift,
    a,
  )
  colour = dark + (light - dark) * (0.5 + 0.5 * pattern)[..., None]
  shade = 1.0 + 0.35 * u[19] * np.clip(y, -1.0, 1.0)
  return colour * shade[..., None], distance


def _photograph(world, image, rng):
  """Light from one side, coloured light, haze and noise."""
  variety = world.variety
  u = rng.random(8)
  yy, xx = _coordinates(world.image_size)
  cos, sin = math.cos(_TAU * u[0]), math.sin(_TAU * u[0])
  ramp = ((xx - 32.0) * cos + (yy - 32.0) * sin) / 45.0
  gain = _between(u[1], 0.75, 1.2) * (1.0 + variety * 0.3 * u[2] * ramp)
  cast = 1.0 + variety * 0.1 * (2.0 * u[3:6] - 1.0)
  image = image * gain[..., None] * cast
  image += (0.7 - image) * (0.2 * variety * u[6] * u[6])
  # The sum of three uniforms is bell-shaped and needs no log or exp.
  bell = rng.random((3, *image.shape)).sum(0) - 1.5
  return image + (2.0 * world.noise * _between(u[7], 0.004, 0.02)) * bell


def _between(u, low, high):
  return low + (high - low) * u


def _hsv(hue, saturation, value):
  """RGB of one colour, all in [0, 1]; the hue wraps around."""
  k = (np.array([5.0, 3.0, 1.0]) + 6.0 * hue) % 6.0
  return value * (1 - saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0))


@functools.lru_cache(maxsize=8)
def _coordinates(size):
  """Pixel centres (y, x) on a 64x64 canvas, read only."""
  centres = (np.arange(size) + 0.5) * (64.0 / size)
  grids = np.meshgrid(centres, centres, indexing="ij")
  for grid in grids:
    grid.setflags(write=False)
  return tuple(grids)


@functools.lru_cache(maxsize=32)
def _interpolation(size, cells):
  """Weights [size, cells + 1] from the nodes of a grid to pixels, read only."""
  t = (np.arange(size) + 0.5) / size * cells
  node = np.minimum(t.astype(np.int64), cells - 1)
  fraction = t - node
  fraction = fraction * fraction * (3.0 - 2.0 * fraction)
  weights = np.zeros((size, cells + 1))
  weights[np.arange(size), node] = 1.0 - fraction
  weights[np.arange(size), node + 1] = fraction
  weights.setflags(write=False)
  return weights


def _clouds(rng, size, cells):
  """Value noise in [-1, 1], `cells` lumps across."""
  weights = _interpolation(size, cells)
  nodes = 2.0 * rng.random((cells + 1, cells + 1)) - 1.0
  return weights @ nodes @ weights.T


def ensure_dataset(
  root: str | os.PathLike,
  world: World,
  *,
  num_labelled: int,
  num_unlabelled: int,
  num_val: int,
  num_test: int = 0,
) -> None:
  """Writes the data set unless it is there; see `write_dataset`.

  Raises:
    DataError: the folder holds something else, or another data set of this
      kind, or cannot be written.
  """
  wanted = _description(world, num_labelled, num_unlabelled, num_val, num_test)
  found = _read_description(root)
  if found is None:
    write_dataset(
      root,
      world,
      num_labelled=num_labelled,
      num_unlabelled=num_unlabelled,
      num_val=num_val,
      num_test=num_test,
    )
  elif found.get("sha256") != _digest(wanted):
    raise errors.DataError(
      f"{root}: the folder holds a shapes data set made with"
      f" {_first_difference(found, wanted)}; delete the folder to have it"
      " written again, or choose another one in dataset.root"
    )


def write_dataset(
  root: str | os.PathLike,
  world: World,
  *,
  num_labelled: int,
  num_unlabelled: int,
  num_val: int,
  num_test: int = 0,
) -> None:
  """Writes a data set in VOC layout.

      JPEGImages/ID.png           lossless, whatever the folder's name says
      SegmentationClass/ID.png    class ids with a palette; of unlabelled images
                                  too, to measure pseudo labels by
      ImageSets/Segmentation/     train.txt, val.txt, test.txt (num_test > 0)
      splits/<num_labelled>/      labeled.txt, unlabeled.txt
      world.json                  what was asked for, and its hash

  Choose models and settings on val; test is for the numbers that are reported.
  Both stay the same whatever the numbers of training images.

  The labelled images are the first ones of the training range, less those that
  would leave too few places for every class to be in two labelled images (in
  one, if there are fewer labelled images than classes); the unlabelled images
  are the first of the rest.

  The files are written to a folder beside `root` that takes its name at the
  end: an interrupted call leaves no data set, only that folder.

  Raises:
    DataError: the folder is not empty or cannot be written, or there are too
      few labelled images to show every class.
  """
  description = _description(
    world, num_labelled, num_unlabelled, num_val, num_test
  )
  root = pathlib.Path(os.path.realpath(root))
  _check_free(root)
  temporary = root.with_name(f".{root.name}.{uuid.uuid4().hex[:12]}.partial")
  try:
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
      (temporary / folder).mkdir(parents=True)
    labelled, unlabelled = _choose(world, num_labelled, num_unlabelled)
    lists = {
      f"splits/{num_labelled}/labeled.txt": _ids("train", labelled),
      f"splits/{num_labelled}/unlabeled.txt": _ids("train", unlabelled),
      "ImageSets/Segmentation/train.txt": _ids(
        "train", sorted(labelled + unlabelled)
      ),
      "ImageSets/Segmentation/val.txt": _ids("val", range(num_val)),
    }
    if num_test:
      lists["ImageSets/Segmentation/test.txt"] = _ids("test", range(num_test))
    for name, ids in lists.items():
      (temporary / name).parent.mkdir(parents=True, exist_ok=True)
      (temporary / name).write_text("".join(f"{id}\n" for id in ids))
      if name.startswith("ImageSets"):
        for id in ids:
          _write_pair(temporary, world, id)
    (temporary / "world.json").write_text(
      json.dumps({**description, "sha256": _digest(description)}, indent=2)
      + "\n"
    )
    _put_in_place(temporary, root, description)
  except OSError as error:
    raise errors.DataError(
      f"{root}: cannot write the shapes data set: {error.strerror}; choose a"
      " writable folder in dataset.root"
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _ids(role, numbers):
  return [f"{role}_{number:06d}" for number in numbers]


def _write_pair(folder, world, id):
  role, number = id.split("_")
  image, mask = render(world, _FIRST[role] + int(number))
  Image.fromarray(image).save(folder / "JPEGImages" / f"{id}{IMAGE_SUFFIX}")
  indexed = Image.fromarray(mask).convert("P")
  indexed.putpalette([value for colour in PALETTE for value in colour])
  indexed.save(folder / "SegmentationClass" / f"{id}.png")


def _choose(world, num_labelled, num_unlabelled):
  """Numbers of the labelled and of the unlabelled training images."""
  needed = dict.fromkeys(range(1, world.num_classes), 2)
  if world.rare_probability == 0.0:
    del needed[world.num_classes - 1]
  if num_labelled < len(needed):
    needed = dict.fromkeys(needed, 1)
  # Images that show three missing classes at once are too rare to wait for.
  if 2 * num_labelled < len(needed):
    raise errors.DataError(
      f"{num_labelled} labelled images cannot be relied on to show all"
      f" {world.num_classes} classes; ask for at least"
      f" {math.ceil(len(needed) / 2)}"
    )
  labelled, numbers = [], iter(range(_MAX_SEARCH))
  while len(labelled) < num_labelled:
    number = next(numbers, None)
    if number is None:
      raise errors.DataError(
        f"no {num_labelled} of the first {_MAX_SEARCH} images show every class;"
        " raise rare_probability or the number of labelled images"
      )
    places, missing = num_labelled - len(labelled), sum(needed.values())
    found = set(np.unique(render(world, number)[1]).tolist())
    found = {class_id for class_id in found if needed.get(class_id)}
    if missing < places or len(found) >= math.ceil(missing / places):
      labelled.append(number)
      for class_id in found:
        needed[class_id] -= 1
  taken = set(labelled)
  rest = (n for n in range(num_labelled + num_unlabelled) if n not in taken)
  # A labelled image beyond that range leaves one more here than is asked for.
  return labelled, list(itertools.islice(rest, num_unlabelled))


def _description(world, num_labelled, num_unlabelled, num_val, num_test):
  counts = {
    "num_labelled": num_labelled,
    "num_unlabelled": num_unlabelled,
    "num_val": num_val,
    "num_test": num_test,
  }
  for name, count in counts.items():
    if count < 0:
      raise ValueError(f"{name} is {count}, must not be negative")
  return {"format": _FORMAT, **dataclasses.asdict(world), **counts}


def _digest(description):
  text = json.dumps(description, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _read_description(root):
  """The content of world.json, None if there is no such file."""
  path = pathlib.Path(root) / "world.json"
  try:
    found = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError):
    found = None
  if not isinstance(found, dict):
    raise errors.DataError(
      f"{path}: cannot be read; delete {root} to have it written again"
    )
  return found


def _first_difference(found, wanted):
  for name, value in wanted.items():
    if found.get(name) != value:
      return f"{name}={found.get(name)!r}, asked for {value!r}"
  return "another version"


def _check_free(root):
  try:
    free = not root.exists() or (root.is_dir() and not any(root.iterdir()))
  except OSError as error:
    raise errors.DataError(
      f"{root}: cannot look into the folder: {error.strerror}"
    ) from error
  if not free:
    raise errors.DataError(
      f"{root}: is not an empty folder, and nothing in it is overwritten;"
      " delete it, or choose another folder in dataset.root"
    )


def _put_in_place(temporary, root, description):
  try:
    os.replace(temporary, root)
  except OSError:
    # Two runs that start together both write; the later one finds the other's.
    found = _read_description(root)
    if found is None or found.get("sha256") != _digest(description):
      raise
