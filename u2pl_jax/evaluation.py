"""Evaluation on the device: what a protocol makes of a batch of images.

A protocol says in what form the network sees an image, and which pixels count.
Every image counts once: the fillers of the last batch carry nothing but the
ignore label. Everything is counted image by image.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from u2pl_jax.images import inside_box, normalise
from u2pl_jax.models.layers import resize_bilinear
from u2pl_jax.pixel_counts import calibration_counts, confusion_matrices
from u2pl_jax.reliability import entropy
from u2pl_jax.train_state import Variables

Array = jax.Array

PROTOCOLS = ("padded", "whole", "center_crop", "sliding_window")

# Of the reliability curve.
NUM_BINS = 15


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How an image is judged.

  Attributes:
    name: one of PROTOCOLS. 'whole': native size. 'padded': in one static shape,
      padding ignored. 'center_crop': its middle, padding counted as class 0.
      'sliding_window': windows, logits averaged where they overlap.
    size: (h, w) of the static shape, the crop or the windows; None for 'whole'.
    stride: (h, w) between windows; None for the others.
    scales: factors of the size in which the network sees the image.
    flip: each scale mirrored too. Probabilities are averaged over both.
  """

  name: str
  size: tuple[int, int] | None = None
  stride: tuple[int, int] | None = None
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False

  @property
  def num_passes(self) -> int:
    return len(self.scales) * (2 if self.flip else 1)

  def settings(self) -> dict[str, Any]:
    """All that changes a number, as JSON values."""
    return {
      "name": self.name,
      "size": None if self.size is None else list(self.size),
      "stride": None if self.stride is None else list(self.stride),
      "scales": list(self.scales),
      "flip": self.flip,
    }


def scaled_length(length: int, scale: float) -> int:
  """Pixels of a side at a scale, as the published code rounds."""
  return max(1, round(length * scale))


def window_grid(
  lengths: np.ndarray | Array, window: int, stride: int
) -> np.ndarray | Array:
  """How many windows cover lengths that are no shorter than the window."""
  return -(-(lengths - window) // stride) + 1


def scaled_canvas(
  size: tuple[int, int], protocol: Protocol, scale: float
) -> tuple[int, int]:
  """(h, w) that holds every image of a canvas of `size`, at a scale."""
  scaled = tuple(scaled_length(length, scale) for length in size)
  if protocol.name != "sliding_window":
    return scaled
  return tuple(
    wide + (int(window_grid(max(length, wide), wide, step)) - 1) * step
    for length, wide, step in zip(
      scaled, protocol.size, protocol.stride, strict=True
    )
  )


def scaled_boxes(
  valid_box: np.ndarray, protocol: Protocol, scale: float
) -> np.ndarray:
  """Where images of [b, 4] boxes lie in the canvas of a scale: [b, 4] int32."""
  boxes = np.zeros_like(valid_box)
  for axis in (0, 1):
    lengths = valid_box[:, axis + 2] - valid_box[:, axis]
    lengths = np.asarray([scaled_length(int(n), scale) for n in lengths])
    if protocol.name == "sliding_window":
      # In the middle of a window that is larger, as at scale 1.
      boxes[:, axis] = np.maximum(protocol.size[axis] - lengths, 0) // 2
    boxes[:, axis + 2] = boxes[:, axis] + lengths
  return boxes


def resize_boxes(
  x: Array, box: Array, new_box: Array, size: tuple[int, int]
) -> Array:
  """Resizes the content of each image's box to another box.

  Bilinear with align_corners=True, as every resize here. Sizes may differ from
  image to image and need no compilation of their own.

  Args:
    x: [b, h, w, c] float.
    box: [b, 4] int32, (top, left, bottom, right).
    new_box: [b, 4] int32.
    size: height and width of the result.

  Returns:
    [b, *size, c], 0 outside the new boxes.
  """
  rows, columns = (
    _interpolation_weights(
      x.shape[axis + 1], size[axis], box[:, axis::2], new_box[:, axis::2]
    )
    for axis in (0, 1)
  )
  precision = jax.lax.Precision.HIGHEST
  x = jnp.einsum("bHh,bhwc->bHwc", rows, x, precision=precision)
  return jnp.einsum("bWw,bhwc->bhWc", columns, x, precision=precision)


def _interpolation_weights(
  size_in: int, size_out: int, span: Array, new_span: Array
) -> Array:
  """[b, 2] spans -> [b, size_out, size_in] weights."""
  begin, end = (span[:, i, None, None] for i in (0, 1))
  new_begin, new_end = (new_span[:, i, None, None] for i in (0, 1))
  out = jnp.arange(size_out)[:, None]
  scale = (end - begin - 1) / jnp.maximum(new_end - new_begin - 1, 1)
  position = (out - new_begin).astype(jnp.float32) * scale.astype(jnp.float32)
  distance = jnp.abs(position - (jnp.arange(size_in) - begin))
  weights = jnp.maximum(0, 1 - distance)
  # The last position may come out a rounding beyond the last pixel.
  is_inside = (out >= new_begin) & (out < new_end)
  source = jnp.arange(size_in)
  is_content = (source >= begin) & (source < end)
  weights = jnp.where(is_inside & is_content, weights, 0)
  total = weights.sum(-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)


def predict_logits(
  model: nn.Module,
  variables: Variables,
  image: Array,
  valid_box: Array,
  *,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
) -> Array:
  """Logits at the size of the images, running statistics.

  Args:
    model: the network.
    variables: student's or teacher's.
    image: [b, h, w, 3] uint8.
    valid_box: [b, 4] int32, the rest is padding.
    mean, std: of the channels.

  Returns:
    [b, h, w, k] float32.
  """
  images = normalise(image, valid_box, mean, std)
  return _logits(model, variables, images)


def _logits(model: nn.Module, variables: Variables, images: Array) -> Array:
  outputs = model.apply(variables.for_apply(), images, train=False)
  return resize_bilinear(outputs.logits, images.shape[1:3])


def window_logits(
  network: Callable[[Array], Array],
  images: Array,
  box: Array,
  *,
  window: tuple[int, int],
  stride: tuple[int, int],
) -> Array:
  """Logits by sliding windows, averaged where windows overlap.

  As published: windows begin at multiples of the stride, and the last one is
  moved back to end with the image. An image smaller than the window is padded
  to it, half on either side.

  Args:
    network: [b, *window, 3] -> [b, *window, k].
    images: [b, h, w, 3] normalised, 0 outside the boxes.
    box: [b, 4] int32, where the images lie: at the top (left), but for one
      smaller than the window, which is in the middle of it.
    window, stride: in pixels; h and w are covered by whole steps.

  Returns:
    [b, h, w, k], 0 where no window of an image lies.
  """
  # With its padding, if any, an image begins at 0 and is as long as this.
  lengths = [
    jnp.maximum(box[:, axis + 2] - box[:, axis], window[axis])
    for axis in (0, 1)
  ]
  counts = [window_grid(lengths[i], window[i], stride[i]) for i in (0, 1)]
  grid = [
    window_grid(images.shape[i + 1], window[i], stride[i]) for i in (0, 1)
  ]

  def add_window(carry: tuple[Array, Array], index: Array):
    total, weight = carry
    cell = (index // grid[1], index % grid[1])
    starts = [
      jnp.clip(cell[i] * stride[i], 0, lengths[i] - window[i]) for i in (0, 1)
    ]
    # Other images of the batch may have more windows than this one.
    is_used = (cell[0] < counts[0]) & (cell[1] < counts[1])
    logits = network(_cut(images, starts, window))
    logits = jnp.where(is_used[:, None, None, None], logits, 0)
    ones = jnp.broadcast_to(is_used[:, None, None, None], logits[..., :1].shape)
    return (
      _add(total, logits, starts),
      _add(weight, ones.astype(weight.dtype), starts),
    ), None

  shape = jax.eval_shape(network, images[:, : window[0], : window[1]])
  zeros = jnp.zeros((*images.shape[:3], shape.shape[-1]), shape.dtype)
  (total, weight), _ = jax.lax.scan(
    add_window, (zeros, zeros[..., :1]), jnp.arange(grid[0] * grid[1])
  )
  return total / jnp.maximum(weight, 1)


def _cut(images: Array, starts: list[Array], window: tuple[int, int]) -> Array:
  def one(image: Array, top: Array, left: Array) -> Array:
    return jax.lax.dynamic_slice(
      image, (top, left, 0), (*window, image.shape[-1])
    )

  return jax.vmap(one)(images, *starts)


def _add(total: Array, part: Array, starts: list[Array]) -> Array:
  def one(total: Array, part: Array, top: Array, left: Array) -> Array:
    old = jax.lax.dynamic_slice(total, (top, left, 0), part.shape)
    return jax.lax.dynamic_update_slice(total, old + part, (top, left, 0))

  return jax.vmap(one)(total, part, *starts)


# -- Steps ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """What the steps must know besides network and protocol.

  Attributes:
    num_classes, ignore_label: of the labels.
    mean, std: of the channels in [0, 255].
  """

  num_classes: int
  ignore_label: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


def pass_logits(
  model: nn.Module,
  protocol: Protocol,
  settings: EvalSettings,
  variables: Variables,
  batch: dict[str, Array],
  *,
  scale: float,
  flip: Array | None = None,
) -> Array:
  """Logits of one pass of the network over the images.

  Args:
    model, protocol, settings: of the evaluation.
    variables: student's or teacher's.
    batch: image [b, h, w, 3] uint8 and valid_box [b, 4], in the form of the
      protocol, and scaled_box [b, 4] of `scaled_boxes`.
    scale: factor of the images' sizes.
    flip: bool scalar, whether the network sees mirrored images; None: no.

  Returns:
    [b, h, w, k] float32.
  """

  def network(images: Array) -> Array:
    if flip is None:
      return _logits(model, variables, images)
    images = jnp.where(flip, images[:, :, ::-1], images)
    logits = _logits(model, variables, images)
    return jnp.where(flip, logits[:, :, ::-1], logits)

  if protocol.name == "sliding_window":
    network = functools.partial(
      window_logits, network, window=protocol.size, stride=protocol.stride
    )
  else:
    of_images = network

    def network(images: Array, box: Array) -> Array:
      del box
      return of_images(images)

  size, box = batch["image"].shape[1:3], batch["valid_box"]
  images = normalise(batch["image"], box, settings.mean, settings.std)
  if scale == 1:
    return network(images, box)
  canvas = scaled_canvas(size, protocol, scale)
  if protocol.name in ("whole", "center_crop"):
    # The canvas is the image: of a crop, with its padding, which counts.
    logits = network(resize_bilinear(images, canvas), box)
    return resize_bilinear(logits, size)
  scaled_box = batch["scaled_box"]
  logits = network(resize_boxes(images, box, scaled_box, canvas), scaled_box)
  return resize_boxes(logits, scaled_box, box, size)


def count_pixels(
  protocol: Protocol,
  settings: EvalSettings,
  batch: dict[str, Array],
  classes: Array,
  confidence: Array,
) -> dict[str, Array]:
  """Everything that is counted, from predictions.

  Args:
    protocol, settings: of the evaluation.
    batch: of the evaluation stream.
    classes: [b, h, w] int32.
    confidence: [b, h, w] float32, the probability of the class.

  Returns:
    For each image, so that no sum depends on how images lie on devices:
    confusions [b, k, k] int32, calibration [b, bins, 2] int32 (pixels, right)
    and confidence [b, bins] float32 (sums), see `pixel_counts`.
  """
  labels = batch["label"].astype(jnp.int32)
  inside = inside_box(batch["valid_box"], *labels.shape[1:3])
  outside = 0 if protocol.name == "center_crop" else settings.ignore_label
  labels = jnp.where(inside, labels, outside)
  is_real = batch["is_real"][:, None, None]
  labels = jnp.where(is_real, labels, settings.ignore_label)
  calibration, confidence = jax.vmap(
    functools.partial(calibration_counts, num_bins=NUM_BINS)
  )(confidence, classes == labels, labels != settings.ignore_label)
  return {
    "confusions": confusion_matrices(
      labels,
      classes,
      num_classes=settings.num_classes,
      ignore_label=settings.ignore_label,
    ),
    "calibration": calibration,
    "confidence": confidence,
  }


def make_eval_step(
  model: nn.Module, protocol: Protocol, settings: EvalSettings
) -> Callable[[Variables, dict], tuple[dict[str, Array], Array]]:
  """Builds `(variables, batch) -> (counts, classes)` of a single pass.

  For a protocol of one scale without flip; counts as in `count_pixels`, classes
  [b, h, w] uint8.
  """
  (scale,) = protocol.scales

  def eval_step(variables: Variables, batch: dict):
    logits = pass_logits(
      model, protocol, settings, variables, batch, scale=scale
    )
    classes = logits.argmax(-1).astype(jnp.int32)
    confidence = 1 / jnp.exp(logits - logits.max(-1, keepdims=True)).sum(-1)
    counts = count_pixels(protocol, settings, batch, classes, confidence)
    return counts, classes.astype(jnp.uint8)

  return eval_step


def make_pass_step(
  model: nn.Module, protocol: Protocol, settings: EvalSettings, scale: float
) -> Callable[[Variables, dict, Array, Array], Array]:
  """Builds `(variables, batch, total, flip) -> total` with probabilities added.

  `total` is [b, h, w, k] float32, `flip` a bool scalar.
  """

  def pass_step(variables: Variables, batch: dict, total: Array, flip: Array):
    logits = pass_logits(
      model,
      protocol,
      settings,
      variables,
      batch,
      scale=scale,
      flip=flip if protocol.flip else None,
    )
    return total + jax.nn.softmax(logits, -1)

  return pass_step


def make_count_step(
  protocol: Protocol, settings: EvalSettings
) -> Callable[[dict, Array], tuple[dict[str, Array], Array]]:
  """Builds `(batch, total) -> (counts, classes)` after all passes."""

  def count_step(batch: dict, total: Array):
    classes = total.argmax(-1).astype(jnp.int32)
    confidence = total.max(-1) / protocol.num_passes
    counts = count_pixels(protocol, settings, batch, classes, confidence)
    return counts, classes.astype(jnp.uint8)

  return count_step


def make_predict_step(
  model: nn.Module,
  *,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
) -> Callable[[Variables, dict], tuple[Array, Array]]:
  """Builds `(variables, batch) -> (classes, entropy)`.

  Both are [b, h, w]: int32 and float32 in nats.
  """

  def predict_step(variables: Variables, batch: dict) -> tuple[Array, Array]:
    logits = predict_logits(
      model, variables, batch["image"], batch["valid_box"], mean=mean, std=std
    )
    return logits.argmax(-1).astype(jnp.int32), entropy(logits)

  return predict_step
