"""The one place where a step's randomness is drawn.

The root key of a run is constant and a step's key is `fold_in(root, step)`, so
a resumed run draws what the uninterrupted one would have drawn. What the method
does with randomness arrives in the step as data (`SemiSupervisedDraws`): a test
hands in recorded draws instead.
"""

import flax
import jax
import jax.numpy as jnp

from u2pl_jax.photometric import (
  PhotometricDraw,
  PhotometricSettings,
  draw_photometric,
)
from u2pl_jax.strong_augmentation import MixDraw, draw_mix

Array = jax.Array

# Order is part of the format: a new stream goes to the end, so that the draws
# of the others stay what they were.
_STREAMS = (
  "student_dropout",
  "teacher_dropout",
  "mix",
  "anchors",
  "negatives",
  "keys",
  "photometric",
)


def step_keys(root_key: Array, step: Array) -> dict[str, Array]:
  """One key for each named use of randomness in a step."""
  step_key = jax.random.fold_in(root_key, step)
  return {
    name: jax.random.fold_in(step_key, i) for i, name in enumerate(_STREAMS)
  }


@flax.struct.dataclass
class SupervisedDraws:
  """Randomness of `supervised_step`: dropout of both networks."""

  student_dropout: Array
  teacher_dropout: Array


@flax.struct.dataclass
class SemiSupervisedDraws:
  """Randomness of `semi_supervised_step`.

  Attributes:
    student_dropout, teacher_dropout: keys.
    mix: coin and masks of the strong augmentation.
    anchor_bits: [k, a] uint32; a value below the number of anchors of a class
      is the rank of the anchor itself.
    negative_bits: [k, a, m] uint32; likewise the age rank in the queue.
    key_bits: [k, max_keys + 2] uint32, or None if the keys are not capped.
    photometric: of the student's view of the unlabelled images, or None if it
      is the teacher's.
  """

  student_dropout: Array
  teacher_dropout: Array
  mix: MixDraw
  anchor_bits: Array
  negative_bits: Array
  key_bits: Array | None
  photometric: PhotometricDraw | None = None


def draw_supervised(root_key: Array, step: Array) -> SupervisedDraws:
  """Draws for one supervised step."""
  keys = step_keys(root_key, step)
  return SupervisedDraws(keys["student_dropout"], keys["teacher_dropout"])


def draw_semi_supervised(
  root_key: Array,
  step: Array,
  *,
  mix: str,
  mix_probability: float,
  unlabelled_shape: tuple[int, int, int],
  num_classes: int,
  num_anchors: int,
  num_negatives: int,
  max_keys: int | None,
  photometric: PhotometricSettings | None = None,
) -> SemiSupervisedDraws:
  """Draws for one semi-supervised step.

  Args:
    root_key: constant key of the run.
    step: int scalar.
    mix, mix_probability: see `strong_augmentation`.
    unlabelled_shape: batch, height, width of the unlabelled images.
    num_classes, num_anchors, num_negatives, max_keys: k, a, m and the cap.
    photometric: law of the photometric augmentation, None for none.

  Returns:
    The draws.
  """
  keys = step_keys(root_key, step)
  batch, height, width = unlabelled_shape

  def bits(name, *shape):
    return jax.random.bits(keys[name], shape, jnp.uint32)

  return SemiSupervisedDraws(
    student_dropout=keys["student_dropout"],
    teacher_dropout=keys["teacher_dropout"],
    mix=draw_mix(
      keys["mix"],
      mix,
      probability=mix_probability,
      batch=batch,
      height=height,
      width=width,
      num_classes=num_classes,
    ),
    anchor_bits=bits("anchors", num_classes, num_anchors),
    negative_bits=bits("negatives", num_classes, num_anchors, num_negatives),
    key_bits=(
      None if max_keys is None else bits("keys", num_classes, max_keys + 2)
    ),
    photometric=(
      None
      if photometric is None
      else draw_photometric(keys["photometric"], photometric, batch)
    ),
  )
