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


def mix_mask(
  draw: MixDraw, mix: str, pseudo_labels: Array, *, ignore_label: int
) -> Array:
  """Where each image keeps its own pixels.

  Args:
    draw: from `draw_mix` with the same `mix`.
    mix: one of `MIXES`.
    pseudo_labels: [b, h, w] int, before mixing.
    ignore_label: of the pixels that have none.

  Returns:
    [b, h, w] bool.

  Raises:
    ValueError: unknown mix.
  """
  if mix not in MIXES:
    raise ValueError(f"strong.mix={mix!r}: choose one of {list(MIXES)}")
  if mix == "none":
    return jnp.ones(pseudo_labels.shape, bool)
  if mix == "classmix":
    keep_mask = classmix_mask(pseudo_labels, draw.class_scores, ignore_label)
  else:
    keep_mask = draw.keep_mask
  return keep_mask | ~draw.apply


@jax.named_scope("mixing")
def partners(x: Array) -> Array:
  """Rows of the images that those of a batch are mixed with.

  The partner of image i is image i + 1 of the global batch, so one image of
  each device's share comes from another device. What can travel as uint8 (an
  image before normalisation) or as four numbers (a box) should.
  """
  return jnp.roll(x, -1, axis=0)


def fill(
  own: Array, partner: Array, keep_mask: Array, mix: str, blank: float
) -> Array:
  """Fills what an image does not keep, from its partner or with a constant.

  Args:
    own: [b, h, w, ...], images, pseudo labels or whatever lies on the pixels.
    partner: the same of the unmixed partners, see `partners`.
    keep_mask: [b, h, w] bool, from `mix_mask`.
    mix: one of `MIXES`.
    blank: the constant of cutout.

  Returns:
    Of the shape and type of `own`.
  """
  other = jnp.asarray(blank, own.dtype) if mix == "cutout" else partner
  mask = keep_mask.reshape(keep_mask.shape + (1,) * (own.ndim - 3))
  return jnp.where(mask, own, other)
