"""Prediction of images of any size, with few compiled shapes and little memory.

An image that fits into a tile is one input of the network, padded to one of a
few shapes. A larger one is covered by overlapping tiles; at a pixel that
several of them see, their class probabilities are averaged with weights that
fall from the centre of a tile to its border. Of those averages only a band as
thick as a tile is kept at a time: the probabilities of a 20-megapixel image
would need gigabytes.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from u2pl_jax import sharding
from u2pl_jax.evaluation import predict_logits
from u2pl_jax.images import inside_box
from u2pl_jax.train_state import Variables

Array = jax.Array

# Neighbouring tiles share this part of their side, as the windows of the
# published evaluation of Cityscapes do.
_OVERLAP = 3
# From one padded side to the next longer one: at most a quarter is padding.
_LADDER_RATIO = 1.25
SMALLEST_SIDE = 33
# Pixels that are turned from probabilities into classes at a time.
_CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Grid:
  """Which inputs of the network an image becomes.

  Attributes:
    tile: height and width of the largest input.
    one_shape: pad every smaller image to `tile`, as the evaluation protocol
      'padded' does; otherwise to the next sides of a ladder.
  """

  tile: tuple[int, int]
  one_shape: bool

  def fits(self, height: int, width: int) -> bool:
    """Whether the image is a single input."""
    return height <= self.tile[0] and width <= self.tile[1]

  def input_shape(self, height: int, width: int) -> tuple[int, int]:
    """Height and width of the inputs that the image becomes."""
    if self.one_shape:
      return self.tile
    return (
      _padded_side(height, self.tile[0]),
      _padded_side(width, self.tile[1]),
    )

  def num_shapes(self) -> int:
    """How many shapes all images of the world can have, tiles included."""
    if self.one_shape:
      return 2
    tall, wide = (len(ladder(side)) for side in self.tile)
    # Of a tile at least one side is the longest.
    return tall * wide + tall + wide - 1

  def describe(self) -> str:
    """One line that differs between grids."""
    height, width = self.tile
    if self.one_shape:
      return f"all padded to {height}x{width}"
    return f"up to {height}x{width}"

  def corners(self, height: int, width: int) -> list[list[tuple[int, int]]]:
    """(top, left) of the tiles, in bands along the shorter side of the image.

    The tiles of a band share their top, or their left in an image that is wider
    than high.
    """
    shape = self.input_shape(height, width)
    tops = tile_positions(height, shape[0])
    lefts = tile_positions(width, shape[1])
    if width > height:
      return [[(top, left) for top in tops] for left in lefts]
    return [[(top, left) for left in lefts] for top in tops]


def ladder(longest: int) -> list[int]:
  """Sides that images are padded to, longest first.

  One more than a multiple of 8 below the longest, so that the stride of the
  network divides the distance of the outermost pixels.
  """
  sides = [longest]
  while (side := int(sides[-1] / _LADDER_RATIO) // 8 * 8 + 1) >= SMALLEST_SIDE:
    sides.append(side)
  return sides


def _padded_side(size: int, longest: int) -> int:
  return min(side for side in ladder(longest) if side >= min(size, longest))


def tile_positions(size: int, side: int) -> tuple[int, ...]:
  """Where tiles of `side` begin, evenly spaced, that cover `size` pixels.

  Neighbours share at least a third of their side. A tile that is longer than
  the image begins at 0.
  """
  if size <= side:
    return (0,)
  stride = side - side // _OVERLAP
  last = -(-(size - side) // stride)
  return tuple(i * (size - side) // last for i in range(last + 1))


def tent(side: int) -> np.ndarray:
  """float32 [side], falling evenly from 1 at the centre, nowhere 0."""
  distance = np.minimum(np.arange(side) + 1, side - np.arange(side))
  return (distance / distance.max()).astype(np.float32)


# -- On the device -------------------------------------------------------------


def make_maps(num_classes: int) -> Callable[[Array], dict[str, Array]]:
  """Builds `probs [..., k] -> maps`.

  The maps are uint8 [...]: `classes`; `confidence`, the highest probability,
  and `entropy` divided by log k, both 0 to 255 for 0 to 1; and float32 [...]:
  `exact_confidence`, and `exact_entropy` in nats.
  """
  most = math.log(max(2, num_classes))

  def to_byte(values: Array) -> Array:
    return jnp.round(255 * jnp.clip(values, 0, 1)).astype(jnp.uint8)

  def maps(probs: Array) -> dict[str, Array]:
    # As reliability.entropy, which begins with logits.
    entropy = -(probs * jnp.log(probs + 1e-10)).sum(-1)
    confidence = probs.max(-1)
    return {
      "classes": probs.argmax(-1).astype(jnp.uint8),
      "confidence": to_byte(confidence),
      "entropy": to_byte(entropy / most),
      "exact_confidence": confidence,
      "exact_entropy": entropy,
    }

  return maps


def _with_sums(maps: dict[str, Array], counts: Array, axes: Any) -> dict:
  """Replaces the exact maps by sums over the pixels where `counts`."""
  sums = [
    jnp.where(counts, maps.pop(f"exact_{name}"), 0).sum(axes)
    for name in ("confidence", "entropy")
  ]
  return maps | {"sums": jnp.stack(sums, -1)}


def make_whole_step(
  model: nn.Module,
  *,
  num_classes: int,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
) -> Callable[[Variables, dict], dict[str, Array]]:
  """Builds `(variables, batch) -> maps` for images that are one input.

  The batch has `image` [b, h, w, 3] uint8 and `valid_box` [b, 4]. The result
  has `classes`, `confidence` and `entropy`, uint8 [b, h, w] as in `make_maps`,
  and `sums` [b, 2] of the exact confidence and entropy inside the box.
  """
  to_maps = make_maps(num_classes)

  def step(variables: Variables, batch: dict) -> dict[str, Array]:
    image, box = batch["image"], batch["valid_box"]
    logits = predict_logits(model, variables, image, box, mean=mean, std=std)
    inside = inside_box(box, *image.shape[1:3])
    return _with_sums(to_maps(jax.nn.softmax(logits)), inside, (1, 2))

  return step


def make_tile_step(
  model: nn.Module,
  *,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
) -> Callable[[Variables, dict], Array]:
  """Builds `(variables, batch) -> weighted probabilities [b, h, w, k]`."""

  def step(variables: Variables, batch: dict) -> Array:
    image, box = batch["image"], batch["valid_box"]
    logits = predict_logits(model, variables, image, box, mean=mean, std=std)
    height, width = image.shape[1:3]
    weight = tent(height)[:, None] * tent(width)
    return jax.nn.softmax(logits) * weight[None, :, :, None]

  return step


def make_blended_maps(num_classes: int) -> Callable[[Array], dict[str, Array]]:
  """Builds `sums of weighted probabilities [p, k] -> maps [p], sums [2]`.

  The maps and sums are those of `make_whole_step`. Where all is 0 there is no
  pixel.
  """
  to_maps = make_maps(num_classes)

  def blended_maps(weighted: Array) -> dict[str, Array]:
    weight = weighted.sum(-1, keepdims=True)
    is_pixel = weight > 0
    probs = weighted / jnp.where(is_pixel, weight, 1)
    return _with_sums(to_maps(probs), is_pixel[:, 0], 0)

  return blended_maps


# -- On the host ---------------------------------------------------------------


@dataclasses.dataclass
class Prediction:
  """What the network makes of an image.

  Attributes:
    classes: uint8 [h, w].
    confidence: uint8 [h, w], 255 times the highest probability.
    entropy: uint8 [h, w], 255 times the entropy divided by log k.
    mean_confidence: of the image.
    mean_entropy: of the image, in nats.
    seconds: that the devices and the blending took; images of a batch share
      its time.
    num_inputs: of the network: 1, or the number of tiles.
  """

  classes: np.ndarray
  confidence: np.ndarray
  entropy: np.ndarray
  mean_confidence: float = 0.0
  mean_entropy: float = 0.0
  seconds: float = 0.0
  num_inputs: int = 1


_MAPS = ("classes", "confidence", "entropy")


class Blender:
  """Sums tiles and finishes the image band by band.

  Memory: float32 for a tile's side times the shorter side of the image times
  the classes, a third of that again while the band moves on, and a chunk.
  """

  def __init__(
    self,
    height: int,
    width: int,
    *,
    num_classes: int,
    bands: list[list[tuple[int, int]]],
    shape: tuple[int, int],
    to_maps: Callable[[np.ndarray], dict[str, Array]],
  ):
    """Makes room.

    Args:
      height, width: of the image.
      num_classes: k.
      bands, shape: corners and size of the tiles, see `Grid`.
      to_maps: of `make_blended_maps`, for `_CHUNK` pixels.
    """
    self._to_maps = to_maps
    # Bands follow each other along this axis of the image.
    self._axis = 1 if width > height else 0
    self._starts = [band[0][self._axis] for band in bands]
    size = (height, width)
    self._length = size[self._axis]
    room = list(size)
    room[self._axis] = min(shape[self._axis], self._length)
    self._sums = np.zeros((*room, num_classes), np.float32)
    # One room for all: the result is waited for before it is filled again.
    self._chunk = np.zeros((_CHUNK, num_classes), np.float32)
    self._band = 0
    self._totals = np.zeros(2)
    self._maps = {name: np.empty(size, np.uint8) for name in _MAPS}

  def add(
    self, band: int, corner: tuple[int, int], weighted: np.ndarray
  ) -> int:
    """Adds a tile; the bands must come in order.

    Args:
      band: index of its band.
      corner: its (top, left).
      weighted: [h, w, k] float32; what lies outside the image is not read.

    Returns:
      How many pixels were finished.
    """
    done = 0
    while self._band < band:
      done += self._finish_band()
    start = [*corner]
    start[self._axis] = 0
    room = self._sums[start[0] :, start[1] :]
    weighted = weighted[: room.shape[0], : room.shape[1]]
    room[: weighted.shape[0], : weighted.shape[1]] += weighted
    return done

  def finish(self) -> tuple[Prediction, int]:
    """The prediction, and how many pixels were finished last."""
    done = self._finish_band()
    pixels = self._maps["classes"].size
    confidence, entropy = self._totals / pixels
    prediction = Prediction(
      **self._maps,
      mean_confidence=float(confidence),
      mean_entropy=float(entropy),
    )
    return prediction, done

  def _finish_band(self) -> int:
    """Reads off the part that no further tile reaches, and moves on."""
    start = self._starts[self._band]
    self._band += 1
    is_last = self._band == len(self._starts)
    end = self._length if is_last else self._starts[self._band]
    sums = np.moveaxis(self._sums, self._axis, 0)
    done, across = end - start, sums.shape[1]
    targets = {
      name: np.moveaxis(pixels, self._axis, 0)[start:end]
      for name, pixels in self._maps.items()
    }
    lines = max(1, _CHUNK // across)
    for first in range(0, done, lines):
      last = min(first + lines, done)
      pixels = sums[first:last].reshape(-1, sums.shape[2])
      for name, values in self._chunks(pixels).items():
        targets[name][first:last] = values.reshape(last - first, across)
    if not is_last:
      kept = len(sums) - done
      sums[:kept] = sums[done:]
      sums[kept:] = 0
    return done * across

  def _chunks(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Maps of [n, k] in pieces of one size, for one compilation."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in _MAPS}
    for first in range(0, len(pixels), _CHUNK):
      piece = pixels[first : first + _CHUNK]
      self._chunk[: len(piece)] = piece
      self._chunk[len(piece) :] = 0
      maps = jax.device_get(self._to_maps(self._chunk))
      self._totals += maps["sums"]
      for name in _MAPS:
        found[name].append(maps[name][: len(piece)])
    return {name: np.concatenate(parts) for name, parts in found.items()}


class Predictor:
  """Predicts a stream of images on all devices.

  Batches have one size: the inputs of the last one of a shape are filled up.
  While the devices compute one batch, the next is prepared and the previous
  read back.
  """

  def __init__(
    self,
    model: nn.Module,
    variables: Variables,
    *,
    num_classes: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    grid: Grid,
    batch: int,
    on_pixels: Callable[[int], None] = lambda _: None,
  ):
    """Puts the weights on the devices.

    Args:
      model, variables, num_classes, mean, std: of the network.
      grid: the inputs.
      batch: inputs at a time, over all devices; rounded up to a multiple of
        their number.
      on_pixels: is told how many pixels were finished.
    """
    self.grid = grid
    self.mesh = sharding.create_mesh()
    devices = self.mesh.devices.size
    self.batch = -(-batch // devices) * devices
    self._num_classes = num_classes
    self._on_pixels = on_pixels
    repl, split = (
      sharding.replicated(self.mesh),
      sharding.batch_sharded(self.mesh),
    )
    self._variables = jax.device_put(variables, repl)
    pixels = {"mean": mean, "std": std}
    self.whole_step = jax.jit(
      make_whole_step(model, num_classes=num_classes, **pixels),
      in_shardings=(repl, split),
      out_shardings=split,
    )
    self.tile_step = jax.jit(
      make_tile_step(model, **pixels),
      in_shardings=(repl, split),
      out_shardings=split,
    )
    self._blended_maps = jax.jit(make_blended_maps(num_classes))

  def predict(
    self, images: Iterable[tuple[Hashable, np.ndarray]]
  ) -> Iterator[tuple[Any, np.ndarray, Prediction]]:
    """Predicts images; those of one input shape should follow each other.

    Args:
      images: (key, uint8 [h, w, 3]).

    Yields:
      (key, image, prediction), in order.
    """
    group: list[tuple[Any, np.ndarray]] = []
    group_shape = None
    running = None
    for key, image in images:
      size = image.shape[:2]
      shape = self.grid.input_shape(*size) if self.grid.fits(*size) else None
      if group and (shape != group_shape or len(group) == self.batch):
        started = self._start(group, group_shape)
        yield from self._results(running)
        running, group = started, []
      if shape is None:
        yield from self._results(running)
        running = None
        yield key, image, self._predict_tiles(image)
      else:
        group.append((key, image))
        group_shape = shape
    started = self._start(group, group_shape) if group else None
    yield from self._results(running)
    yield from self._results(started)

  def _start(self, group: list, shape: tuple[int, int]) -> tuple:
    begin = time.perf_counter()
    views = [image for _, image in group]
    return (
      begin,
      group,
      self.whole_step(self._variables, self._batch(views, shape)),
    )

  def _results(
    self, running: tuple | None
  ) -> Iterator[tuple[Any, np.ndarray, Prediction]]:
    if running is None:
      return
    begin, group, maps = running
    maps = jax.device_get(maps)
    seconds = (time.perf_counter() - begin) / len(group)
    for row, (key, image) in enumerate(group):
      height, width = image.shape[:2]
      confidence, entropy = maps["sums"][row] / (height * width)
      yield (
        key,
        image,
        Prediction(
          # Copies: a view would keep the whole batch.
          **{name: maps[name][row, :height, :width].copy() for name in _MAPS},
          mean_confidence=float(confidence),
          mean_entropy=float(entropy),
          seconds=seconds,
        ),
      )
      self._on_pixels(height * width)

  def _predict_tiles(self, image: np.ndarray) -> Prediction:
    begin = time.perf_counter()
    height, width = image.shape[:2]
    shape = self.grid.input_shape(height, width)
    bands = self.grid.corners(height, width)
    tiles = [(i, corner) for i, band in enumerate(bands) for corner in band]
    blender = Blender(
      height,
      width,
      num_classes=self._num_classes,
      bands=bands,
      shape=shape,
      to_maps=self._blended_maps,
    )

    def add(running: tuple | None) -> None:
      if running is not None:
        part, weighted = running
        for (band, corner), values in zip(
          part, jax.device_get(weighted), strict=False
        ):
          self._on_pixels(blender.add(band, corner, values))

    running = None
    for first in range(0, len(tiles), self.batch):
      part = tiles[first : first + self.batch]
      views = [
        image[top : top + shape[0], left : left + shape[1]]
        for _, (top, left) in part
      ]
      batch = self._batch(views, shape)
      started = part, self.tile_step(self._variables, batch)
      add(running)
      running = started
    add(running)
    prediction, done = blender.finish()
    self._on_pixels(done)
    prediction.seconds = time.perf_counter() - begin
    prediction.num_inputs = len(tiles)
    return prediction

  def _batch(self, views: list[np.ndarray], shape: tuple[int, int]) -> dict:
    images = np.zeros((self.batch, *shape, 3), np.uint8)
    boxes = np.zeros((self.batch, 4), np.int32)
    for row, view in enumerate(views):
      height, width = view.shape[:2]
      images[row, :height, :width] = view
      boxes[row, 2:] = height, width
    return sharding.put_batch(self.mesh, {"image": images, "valid_box": boxes})
