"""The method, top to bottom: one supervised and one semi-supervised step.

Both are pure functions `(state, batch, draws) -> (state, metrics)` of the whole
global batch; `build.py` binds the statics, draws the randomness and compiles.
Another method is another function beside these, with the same leaves.
"""

import dataclasses
import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from u2pl_jax import ema, halves, losses, reliability, strong_augmentation
from u2pl_jax.contrastive import (
  class_membership,
  contrastive_loss,
  floor_and_chance,
)
from u2pl_jax.images import inside_box, normalise, normalise_inside
from u2pl_jax.models.layers import resize_bilinear, resize_nearest
from u2pl_jax.photometric import PhotometricSettings, apply_photometric
from u2pl_jax.rngs import SemiSupervisedDraws, SupervisedDraws
from u2pl_jax.train_state import TrainState, Variables

Array = jax.Array
Metrics = dict[str, Array]

# Named departures of the published code (docs/quirks.md); none is the paper.
QUIRKS = {
  "batch_onehot": "one-hot labels scattered over the wrong axis",
  "class_index_mixup": "queues paired with anchors by position among the "
  "present classes",
  "own_label_negatives": "negatives only where the pixel carries the class "
  "itself",
  "teacher_alias": "teacher equal to the student through the whole first "
  "semi-supervised epoch",
  "teacher_cold_start": "teacher starts from its own random heads and is "
  "handed the student's parameters, not its batch statistics",
  "zero_padding_label": "crop padding is labelled 0 and trained on",
  "padded_center_crop": "evaluation on centre crops whose padding counts as "
  "class 0",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Hyper-parameters of the steps, all static.

  The names and units are those of `configs/common.py`, where each is described;
  counts of steps are derived from epochs by `build.py`.
  """

  num_classes: int
  ignore_label: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  steps_per_epoch: int
  warmup_steps: int
  total_steps: int
  sup_loss: str
  ohem_threshold: float
  ohem_min_kept: int
  aux_weight: float
  mix: str
  mix_probability: float
  alpha0: float
  alpha_decay: str
  unsup_weight: float
  contra_weight: float
  num_anchors: int
  num_negatives: int
  temperature: float
  low_rank: int
  high_rank: int
  anchor_min_probability: float
  negative_max_probability: float
  max_keys_per_step: int | None
  ema_max_decay: float
  quirks: frozenset[str] = frozenset()
  photometric: PhotometricSettings | None = None
  microbatches: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
  """Over how many devices a step's arrays are split, static.

  No result depends on it: it says what must be found without leaving a device.

  Attributes:
    pixel_parts: equal parts of the batch.
    bank_parts: equal parts of the memory bank's slots, 1 where every device
      has them all.
  """

  pixel_parts: int = 1
  bank_parts: int = 1


ONE_DEVICE = Layout()


@flax.struct.dataclass
class LabelledBatch:
  """What the supervised step reads.

  Attributes:
    image: [b, h, w, 3] uint8 RGB.
    label: [b, h, w] integer.
    valid_box: [b, 4] int32 top, left, bottom, right of the part of the crop
      that is image; the rest is padding.
  """

  image: Array
  label: Array
  valid_box: Array


@flax.struct.dataclass
class UnlabelledBatch:
  """Images alone; see `LabelledBatch`."""

  image: Array
  valid_box: Array


def forward_eval(
  model: nn.Module, network: Variables, images: Array, microbatches: int
):
  """Forward pass with running statistics, by micro-batches."""

  def forward(images):
    return model.apply(network.for_apply(), images, train=False)

  if microbatches == 1:
    return forward(images)
  groups = len(images)
  outputs = jax.lax.map(
    forward, halves.micro_batches(images, groups, microbatches)
  )
  return jax.tree.map(lambda x: halves.whole_batch(x, groups), outputs)


def forward_train(
  model: nn.Module,
  params: Any,
  batch_stats: Any,
  images: Array,
  dropout_key: Array,
  *,
  groups: int,
  microbatches: int,
):
  """Forward pass with batch statistics, by micro-batches.

  Only the network runs by micro-batches: the outputs are those of the whole
  batch, and so is what a loss makes of them. Of several micro-batches no
  activation is kept for the gradient: the backward pass runs each a second
  time, with the same dropout, and adds up what they contribute.

  Args:
    model: a `DeepLab`.
    params, batch_stats: of the network.
    images: [b, h, w, 3].
    dropout_key: of the pass.
    groups: see `halves.micro_batches`.
    microbatches: each normalises with its own statistics; they enter the
      running ones one micro-batch after the other.

  Returns:
    (outputs, new running statistics).
  """

  def forward(batch_stats, inputs):
    images, key = inputs
    outputs, mutated = model.apply(
      {"params": params, "batch_stats": batch_stats},
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    return jax.lax.stop_gradient(mutated["batch_stats"]), outputs

  if microbatches == 1:
    batch_stats, outputs = forward(batch_stats, (images, dropout_key))
    return outputs, batch_stats
  keys = jax.vmap(jax.random.fold_in, (None, 0))(
    dropout_key, jnp.arange(microbatches)
  )
  batch_stats, outputs = jax.lax.scan(
    # In a scan nothing can undo the recomputation: no barriers needed.
    jax.checkpoint(forward, prevent_cse=False),
    batch_stats,
    (halves.micro_batches(images, groups, microbatches), keys),
  )
  outputs = jax.tree.map(lambda x: halves.whole_batch(x, groups), outputs)
  return outputs, batch_stats


def _supervised_loss(
  logits: Array, aux_logits: Array | None, labels: Array, recipe: Recipe
) -> Array:
  """Cross-entropy or OHEM at full resolution, plus the auxiliary head's."""

  def loss(logits):
    logits = resize_bilinear(logits, labels.shape[1:3])
    if recipe.sup_loss == "ohem":
      return losses.ohem_cross_entropy(
        logits,
        labels,
        ignore_label=recipe.ignore_label,
        threshold=recipe.ohem_threshold,
        min_kept=recipe.ohem_min_kept,
      )
    return losses.cross_entropy(
      logits, labels, ignore_label=recipe.ignore_label
    )

  total = loss(logits)
  if aux_logits is not None:
    total += recipe.aux_weight * loss(aux_logits)
  return total


def apply_gradients(
  state: TrainState,
  grads: Any,
  batch_stats: Any,
  tx: optax.GradientTransformation,
) -> tuple[Variables, optax.OptState]:
  """The student after an update, with these running statistics."""
  updates, opt_state = tx.update(grads, state.opt_state, state.student.params)
  params = optax.apply_updates(state.student.params, updates)
  return Variables(params, batch_stats), opt_state


def supervised_step(
  state: TrainState,
  batch: LabelledBatch,
  draws: SupervisedDraws,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  recipe: Recipe,
  trace: bool = False,
) -> tuple[TrainState, Metrics]:
  """One update from labelled images alone: the warm-up, and the baseline.

  Args:
    state: donated by the caller.
    batch: global batch.
    draws: from `rngs.draw_supervised`.
    model, tx, recipe: static.
    trace: see `semi_supervised_step`.

  Returns:
    (next state, metrics).
  """
  images = normalise(batch.image, batch.valid_box, recipe.mean, recipe.std)
  labels = batch.label.astype(jnp.int32)
  run_train = functools.partial(
    forward_train,
    model,
    groups=len(images),
    microbatches=recipe.microbatches,
  )

  def loss_fn(params):
    outputs, batch_stats = run_train(
      params, state.student.batch_stats, images, draws.student_dropout
    )
    loss = _supervised_loss(outputs.logits, outputs.aux_logits, labels, recipe)
    return loss, (batch_stats, outputs)

  (sup_loss, (batch_stats, outputs)), grads = jax.value_and_grad(
    loss_fn, has_aux=True
  )(state.student.params)
  student, opt_state = apply_gradients(state, grads, batch_stats, tx)

  teacher, t_out = state.teacher, None
  if "teacher_cold_start" in recipe.quirks:
    # Only its batch statistics move, by a forward pass of its own weights.
    t_out, teacher_stats = run_train(
      teacher.params, teacher.batch_stats, images, draws.teacher_dropout
    )
    teacher = teacher.replace(batch_stats=teacher_stats)

  metrics = {
    "sup_loss": sup_loss,
    "total_loss": sup_loss,
    "grad_norm": optax.tree.norm(grads),
    "pixel_accuracy_l": _accuracy(outputs.logits, labels, recipe),
  }
  if trace:
    metrics["trace"] = {"student": outputs, "teacher": t_out, "grads": grads}
  state = state.replace(
    step=state.step + 1, student=student, teacher=teacher, opt_state=opt_state
  )
  return state, metrics


def semi_supervised_step(
  state: TrainState,
  batch_l: LabelledBatch,
  batch_u: UnlabelledBatch,
  draws: SemiSupervisedDraws,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  recipe: Recipe,
  layout: Layout = ONE_DEVICE,
  trace: bool = False,
) -> tuple[TrainState, Metrics]:
  """One update of U2PL (algorithm 1 of the paper).

  Args:
    state: donated by the caller.
    batch_l, batch_u: global batches of equal crop size.
    draws: from `rngs.draw_semi_supervised`.
    model, tx, recipe, layout: static.
    trace: put the step's decisions (masks, pseudo labels, outputs) into
      metrics['trace'], labelled images first; compiled away otherwise.

  Returns:
    (next state, metrics). Vectors in the metrics have one entry a class.
  """
  quirks, ignore = recipe.quirks, recipe.ignore_label
  num_l, num_classes = batch_l.image.shape[0], recipe.num_classes
  height, width = batch_u.image.shape[1:3]
  images_l = normalise(
    batch_l.image, batch_l.valid_box, recipe.mean, recipe.std
  )
  inside_u = inside_box(batch_u.valid_box, height, width)
  images_u = normalise_inside(batch_u.image, inside_u, recipe.mean, recipe.std)
  labels_l = batch_l.label.astype(jnp.int32)
  progress = training_progress(state.step, recipe)
  teacher = _hand_over(state, recipe)
  run_train = functools.partial(
    forward_train,
    model,
    groups=halves.num_groups(num_l, len(batch_u.image)),
    microbatches=recipe.microbatches,
  )

  # Pseudo labels: the teacher on clean images, running statistics.
  clean = forward_eval(model, teacher, images_u, recipe.microbatches)
  probs = jax.nn.softmax(resize_bilinear(clean.logits, (height, width)))
  pseudo_labels = probs.argmax(-1).astype(jnp.int32)
  confidence = probs.max(-1)
  if "zero_padding_label" not in quirks:
    # Padding is no image: it gets no pseudo label.
    pseudo_labels = jnp.where(inside_u, pseudo_labels, ignore)
  unmixed = {"pseudo_labels": pseudo_labels, "confidence": confidence}
  confidence = losses.masked_mean(confidence, pseudo_labels != ignore)

  # Strong view. Photometric changes are for the student alone: the teacher
  # judges the same mixed pixels in their own colours.
  keep_mask = strong_augmentation.mix_mask(
    draws.mix, recipe.mix, pseudo_labels, ignore_label=ignore
  )
  fill = functools.partial(
    strong_augmentation.fill, keep_mask=keep_mask, mix=recipe.mix
  )
  partners = strong_augmentation.partners
  inside_u = fill(
    inside_u,
    inside_box(partners(batch_u.valid_box), height, width),
    blank=False,
  )

  def mixed(images):
    images = fill(images, partners(images), blank=0)
    return normalise_inside(images, inside_u, recipe.mean, recipe.std)

  # A partner comes from another device, so it comes as bytes.
  small_labels = pseudo_labels.astype(jnp.uint8)
  pseudo_labels = fill(
    small_labels, partners(small_labels), blank=ignore
  ).astype(jnp.int32)
  images = halves.interleave(images_l, mixed(batch_u.image))
  student_images = images
  if recipe.photometric is not None:
    strong_u = apply_photometric(
      draws.photometric,
      batch_u.image,
      batch_u.valid_box,
      max_sigma=recipe.photometric.blur_sigma[1],
    )
    student_images = halves.interleave(images_l, mixed(strong_u))

  # The teacher's second pass: strong view, batch statistics. It judges
  # reliability, and gives prototypes and negatives.
  t_out, teacher_stats = run_train(
    teacher.params, teacher.batch_stats, images, draws.teacher_dropout
  )
  _, t_logits_u = halves.separate(t_out.logits, num_l)
  entropies = reliability.entropy(resize_bilinear(t_logits_u, (height, width)))
  alpha = reliability.unreliable_percent(recipe.alpha0, progress)
  reliable = reliability.assess(entropies, pseudo_labels != ignore, alpha)
  kept_labels = jnp.where(reliable.keep_mask, pseudo_labels, ignore)

  # Masks on the feature grid, in the order of the network's batch.
  grid = t_out.logits.shape[1:3]
  grid_labels_l = resize_nearest(labels_l, grid)
  grid_labels_u = resize_nearest(pseudo_labels, grid)
  valid_l = grid_labels_l != ignore
  on_grid = {
    "membership": halves.interleave(
      *(
        class_membership(
          labels,
          num_classes=num_classes,
          ignore_label=ignore,
          batch_onehot="batch_onehot" in quirks,
        )
        for labels in (grid_labels_l, grid_labels_u)
      )
    ),
    "valid_mask": halves.interleave(valid_l, grid_labels_u != ignore),
    "reliable_mask": halves.interleave(
      valid_l, resize_nearest(reliable.reliable_mask, grid)
    ),
    "unreliable_mask": halves.interleave(
      valid_l, resize_nearest(reliable.unreliable_mask, grid)
    ),
    "teacher_probs": jax.nn.softmax(t_out.logits),
  }

  def loss_fn(params):
    outputs, batch_stats = run_train(
      params, state.student.batch_stats, student_images, draws.student_dropout
    )
    logits_l, logits_u = halves.separate(outputs.logits, num_l)
    aux_l = None
    if outputs.aux_logits is not None:
      aux_l, _ = halves.separate(outputs.aux_logits, num_l)
    sup_loss = _supervised_loss(logits_l, aux_l, labels_l, recipe)
    unsup_loss = losses.unsupervised_loss(
      resize_bilinear(logits_u, (height, width)),
      kept_labels,
      ignore_label=ignore,
    )
    contrast = contrastive_loss(
      outputs.reps,
      t_out.reps,
      **on_grid,
      num_labelled=num_l,
      places=halves.places(num_l, len(batch_u.image)),
      pixel_parts=layout.pixel_parts,
      bank_parts=layout.bank_parts,
      memory_bank=state.memory_bank,
      anchor_bits=draws.anchor_bits,
      negative_bits=draws.negative_bits,
      key_bits=draws.key_bits,
      max_keys=recipe.max_keys_per_step,
      low_rank=recipe.low_rank,
      high_rank=recipe.high_rank,
      anchor_min_probability=recipe.anchor_min_probability,
      negative_max_probability=recipe.negative_max_probability,
      temperature=recipe.temperature,
      class_index_mixup="class_index_mixup" in quirks,
      own_label_negatives="own_label_negatives" in quirks,
    )
    total = (
      sup_loss
      + recipe.unsup_weight * unsup_loss
      + recipe.contra_weight * contrast.loss
    )
    return total, (sup_loss, unsup_loss, contrast, batch_stats, outputs)

  (
    (total_loss, (sup_loss, unsup_loss, contrast, batch_stats, outputs)),
    grads,
  ) = jax.value_and_grad(loss_fn, has_aux=True)(state.student.params)
  student, opt_state = apply_gradients(state, grads, batch_stats, tx)

  # The teacher follows.
  decay = ema.ema_decay(state.step - recipe.warmup_steps, recipe.ema_max_decay)
  teacher_params = ema.ema_update(teacher.params, student.params, decay)
  if "teacher_alias" in quirks:
    aliased = state.step < recipe.warmup_steps + recipe.steps_per_epoch
    teacher_params = _select(aliased, student.params, teacher_params)
  new_state = state.replace(
    step=state.step + 1,
    student=student,
    teacher=Variables(teacher_params, teacher_stats),
    opt_state=opt_state,
    memory_bank=contrast.memory_bank,
  )

  valid_u = pseudo_labels != ignore
  floor, chance = floor_and_chance(recipe.num_negatives, recipe.temperature)
  logits_l, logits_u = halves.separate(outputs.logits, num_l)
  agree = logits_u.argmax(-1) == t_logits_u.argmax(-1)
  metrics = {
    "sup_loss": sup_loss,
    "unsup_loss": unsup_loss,
    "contra_loss": contrast.loss,
    "total_loss": total_loss,
    "grad_norm": optax.tree.norm(grads),
    "pixel_accuracy_l": _accuracy(logits_l, labels_l, recipe),
    "alpha": alpha,
    "ema_decay": decay,
    # Before mixing, so that no confidences have to be mixed.
    "confidence": confidence,
    "mixed": draws.mix.apply.astype(jnp.float32),
    "kept_share": _ratio(reliable.keep_mask.sum(), valid_u.sum()),
    "keep_threshold": reliable.keep_threshold,
    "low_threshold": reliable.low_threshold,
    "high_threshold": reliable.high_threshold,
    "agreement": agree.mean(dtype=jnp.float32),
    # The loss is a mean over the present classes; its floor and chance level
    # are reached only if all of these are active.
    "contra_floor": floor,
    "contra_chance": chance,
    "contra_active_classes": contrast.active.sum(dtype=jnp.int32),
    "contra_present_classes": contrast.present.sum(dtype=jnp.int32),
    "pseudo_label_share": _class_shares(pseudo_labels, valid_u, num_classes),
    "keys_enqueued": contrast.num_keys,
    "key_candidates_l": contrast.num_candidates[0],
    "key_candidates_u": contrast.num_candidates[1],
    "bank_fill": contrast.memory_bank.count
    / jnp.asarray(contrast.memory_bank.capacities, jnp.float32),
  }
  if trace:
    in_batch = {
      "images": images,
      "student_images": student_images,
      "student": outputs,
      "teacher": t_out,
      **on_grid,
    }
    metrics["trace"] = {
      **unmixed,
      "mixed_pseudo_labels": pseudo_labels,
      "kept_labels": kept_labels,
      "mix_mask": keep_mask,
      "entropies": entropies,
      "teacher_used": teacher,
      "contrast": contrast._replace(memory_bank=None),
      "grads": grads,
      **jax.tree.map(lambda x: halves.labelled_first(x, num_l), in_batch),
    }
  return new_state, metrics


def training_progress(step: Array, recipe: Recipe) -> Array:
  """Share of the training that is over, by whole epochs or by steps."""
  dtype = jnp.result_type(float)
  if recipe.alpha_decay == "epoch":
    epochs = recipe.total_steps // recipe.steps_per_epoch
    return (step // recipe.steps_per_epoch).astype(dtype) / epochs
  return step.astype(dtype) / recipe.total_steps


def _hand_over(state: TrainState, recipe: Recipe) -> Variables:
  """The teacher of this step.

  At the first semi-supervised step it becomes a copy of the student; before
  that it has had no part. (Done inside the step, so that the phase switch needs
  no third function and a resumed run no memory of it.)
  """
  first = state.step == recipe.warmup_steps
  params_from_student = first
  if "teacher_alias" in recipe.quirks:
    params_from_student = (
      state.step < recipe.warmup_steps + recipe.steps_per_epoch
    )
  params = _select(
    params_from_student, state.student.params, state.teacher.params
  )
  batch_stats = state.teacher.batch_stats
  if "teacher_cold_start" not in recipe.quirks:
    batch_stats = _select(first, state.student.batch_stats, batch_stats)
  return Variables(params, batch_stats)


def _select(condition: Array, if_true: Any, if_false: Any) -> Any:
  return jax.tree.map(
    lambda a, b: jnp.where(condition, a, b), if_true, if_false
  )


def _ratio(part: Array, whole: Array) -> Array:
  return part.astype(jnp.float32) / jnp.maximum(whole, 1)


def _class_shares(labels: Array, mask: Array, num_classes: int) -> Array:
  one_hot = (labels[..., None] == jnp.arange(num_classes)) & mask[..., None]
  counts = one_hot.sum(range(labels.ndim), dtype=jnp.int32)
  return _ratio(counts, mask.sum(dtype=jnp.int32))


def _accuracy(logits: Array, labels: Array, recipe: Recipe) -> Array:
  """Pixel accuracy on the feature grid."""
  labels = resize_nearest(labels, logits.shape[1:3])
  return losses.masked_mean(
    (logits.argmax(-1) == labels).astype(jnp.float32),
    labels != recipe.ignore_label,
  )
