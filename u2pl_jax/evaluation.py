"""Evaluation on whole images: confusion matrices on the device.

One jitted step per protocol and shape. Every image counts once: the fillers of
the last batch carry nothing but the ignore label.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from u2pl_jax.images import inside_box, normalise
from u2pl_jax.metrics import confusion_matrix
from u2pl_jax.models.layers import resize_bilinear
from u2pl_jax.reliability import entropy
from u2pl_jax.train_state import Variables

Array = jax.Array

PROTOCOLS = ("padded", "whole", "center_crop")


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
  outputs = model.apply(variables.for_apply(), images, train=False)
  return resize_bilinear(outputs.logits, images.shape[1:3])


def make_eval_step(
  model: nn.Module,
  *,
  num_classes: int,
  ignore_label: int,
  mean: tuple[float, float, float],
  std: tuple[float, float, float],
  padding_label: int | None = None,
) -> Callable[[Variables, dict], Array]:
  """Builds `(variables, batch) -> confusion [k, k] int32`.

  Args:
    model, mean, std: see `predict_logits`.
    num_classes, ignore_label: of the labels.
    padding_label: label of the padding, which `center_crop` of the published
      code counts as class 0; None ignores the padding.

  Returns:
    A function of `Variables` and a batch of the evaluation stream.
  """

  def eval_step(variables: Variables, batch: dict) -> Array:
    logits = predict_logits(
      model, variables, batch["image"], batch["valid_box"], mean=mean, std=std
    )
    labels = batch["label"].astype(jnp.int32)
    inside = inside_box(batch["valid_box"], *labels.shape[1:3])
    outside_label = ignore_label if padding_label is None else padding_label
    labels = jnp.where(inside, labels, outside_label)
    labels = jnp.where(batch["is_real"][:, None, None], labels, ignore_label)
    return confusion_matrix(
      labels,
      logits.argmax(-1).astype(jnp.int32),
      num_classes=num_classes,
      ignore_label=ignore_label,
    )

  return eval_step


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
