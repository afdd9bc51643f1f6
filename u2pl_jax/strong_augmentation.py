"""Strong augmentation of the unlabelled batch, on the device.

CutOut (DeVries and Taylor 2017), CutMix (French et al. 2020) and ClassMix
(Olsson et al. 2021) with the published box law. Drawing is separate from
applying, so that a draw is data: it can be recorded and replayed.
"""

import flax
import jax
import jax.numpy as jnp

Array = jax.Array

MIXES = ("cutmix", "cutout", "classmix", "none")


@flax.struct.dataclass
class MixDraw:
  """The random part of one mix.

  Attributes:
    apply: bool scalar, whether this step mixes at all (one coin a step).
    keep_mask: [b, h, w] bool, True where an image keeps its own pixel
      (cutmix, cutout), else None.
    class_scores: [b, k + 1] float, the classes with the higher scores are kept
      (classmix; the ignore label is the last class), else None.
  """

  apply: Array
  keep_mask: Array | None
  class_scores: Array | None


def draw_boxes(key: Array, batch: int, height: int, width: int) -> Array:
  """Boxes of half the image's area.

  Width uniform on the integers above half of the image's, height so that the
  area is one half (rounded), position uniform on what fits.

  Args:
    key: random key.
    batch, height, width: of the images; width at least 3.

  Returns:
    [batch, 4] int32: top, left, height, width.
  """
  key_width, key_top, key_left = jax.random.split(key, 3)
  box_width = jax.random.randint(key_width, (batch,), width // 2 + 1, width)
  box_height = jnp.round(height * width / 2 / box_width).astype(jnp.int32)
  top = jax.random.randint(key_top, (batch,), 0, height - box_height + 1)
  left = jax.random.randint(key_left, (batch,), 0, width - box_width + 1)
  return jnp.stack([top, left, box_height, box_width], -1)


def outside_boxes(boxes: Array, height: int, width: int) -> Array:
  """[b, 4] boxes -> [b, height, width] bool, False inside the box."""
  top, left, box_height, box_width = (boxes[:, i, None, None] for i in range(4))
  y = jnp.arange(height)[None, :, None]
  x = jnp.arange(width)[None, None, :]
  inside = (y >= top) & (y < top + box_height)
  return ~(inside & (x >= left) & (x < left + box_width))


def draw_mix(
  key: Array,
  mix: str,
  *,
  probability: float,
  batch: int,
  height: int,
  width: int,
  num_classes: int,
) -> MixDraw:
  """Draws the coin and the mask or scores of one step."""
  key_coin, key_mask = jax.random.split(key)
  apply = jax.random.uniform(key_coin) < probability
  if mix == "classmix":
    scores = jax.random.uniform(key_mask, (batch, num_classes + 1))
    return MixDraw(apply, None, scores)
  boxes = draw_boxes(key_mask, batch, height, width)
  return MixDraw(apply, outside_boxes(boxes, height, width), None)


def classmix_mask(labels: Array, scores: Array, ignore_label: int) -> Array:
  """Keeps the pixels of half (rounded down) of the classes of each image.

  Args:
    labels: [b, h, w] int; the ignore label counts as a class.
    scores: [b, k + 1] float; the present classes with the highest are kept.
    ignore_label: taken as class k.

  Returns:
    [b, h, w] bool, True where the image keeps its own pixel.
  """
  batch, num_slots = scores.shape
  labels = jnp.where(labels == ignore_label, num_slots - 1, labels)
  one_hot = labels.reshape(batch, -1, 1) == jnp.arange(num_slots)
  present = one_hot.any(1)
  scores = jnp.where(present, scores, -1)
  higher = (scores[:, None, :] > scores[:, :, None]).sum(-1)
  kept = present & (higher < present.sum(-1, keepdims=True) // 2)
  return jnp.take_along_axis(kept, labels.reshape(batch, -1), 1).reshape(
    labels.shape
  )


def apply_mix(
  draw: MixDraw,
  mix: str,
  images: Array,
  pseudo_labels: Array,
  confidence: Array,
  *,
  ignore_label: int,
) -> tuple[Array, Array, Array, Array]:
  """Mixes images, pseudo labels and confidences alike.

  The partner of image i is the unmixed image i + 1 of the global batch.

  Args:
    draw: from `draw_mix` with the same `mix`.
    mix: one of `MIXES`.
    images: [b, h, w, 3] normalised, so that CutOut's 0 is the mean colour.
    pseudo_labels: [b, h, w] int.
    confidence: [b, h, w] float.
    ignore_label: what CutOut writes into the labels.

  Returns:
    (images, pseudo_labels, confidence, keep_mask [b, h, w] bool).

  Raises:
    ValueError: unknown mix.
  """
  if mix not in MIXES:
    raise ValueError(f"strong.mix={mix!r}: choose one of {list(MIXES)}")
  if mix == "none":
    keep_mask = jnp.ones(pseudo_labels.shape, bool)
  elif mix == "classmix":
    keep_mask = classmix_mask(pseudo_labels, draw.class_scores, ignore_label)
  else:
    keep_mask = draw.keep_mask
  keep_mask = keep_mask | ~draw.apply

  def fill(x, blank):
    other = blank if mix == "cutout" else jnp.roll(x, -1, axis=0)
    mask = keep_mask.reshape(keep_mask.shape + (1,) * (x.ndim - 3))
    return jnp.where(mask, x, jnp.asarray(other, x.dtype))

  return (
    fill(images, 0),
    fill(pseudo_labels, ignore_label),
    fill(confidence, 0),
    keep_mask,
  )
