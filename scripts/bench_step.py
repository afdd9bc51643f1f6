"""Times the phases of a semi-supervised step on whatever device is there.

  python scripts/bench_step.py --preset=cpu-mid
  python scripts/bench_step.py --preset=voc --json=step.json

Random images and labels, full queues, a network at its initial weights. Each
phase is compiled on its own and timed alone, so the phases need not add up to
the whole step, which is compiled and timed as the trainer runs it.
"""

import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from configs import common
from u2pl_jax import (
  build as build_lib,
)
from u2pl_jax import (
  contrastive,
  ema,
  losses,
  reliability,
  rngs,
  step_shapes,
  strong_augmentation,
)
from u2pl_jax.images import normalise
from u2pl_jax.models.layers import resize_bilinear, resize_nearest

_PRESET = flags.DEFINE_enum(
  "preset", "cpu-mid", ["cpu-mid", "voc"], "What is timed."
)
_SIZE = flags.DEFINE_integer("size", 0, "Crop size, if not the preset's.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed runs of each phase.")
_JSON = flags.DEFINE_string("json", "", "Also write the numbers here.")

NUM_CLASSES = 21


def get_config():
  """The VOC recipe, reduced for cpu-mid to ResNet-50 and 2 + 2 of 129x129."""
  config = common.get_base_config()
  config.schedule.warmup_epochs = 0
  if _PRESET.value == "cpu-mid":
    config.model.backbone = "resnet50"
    config.batch.labelled = config.batch.unlabelled = 2
    config.input.crop_size = (129, 129)
  else:
    config.model.dtype = "bfloat16"
  if _SIZE.value:
    config.input.crop_size = (_SIZE.value, _SIZE.value)
  return config


def random_batch(config, rng, *, labelled):
  """One half of a batch in the form of the input pipeline."""
  size = config.batch.labelled if labelled else config.batch.unlabelled
  height, width = config.input.crop_size
  batch = {
    "image": rng.integers(0, 256, (size, height, width, 3), dtype=np.uint8),
    "valid_box": np.tile(
      np.asarray([[0, 0, height, width]], np.int32), (size, 1)
    ),
  }
  if labelled:
    # Blocks of one class, so that nearest down-sampling keeps some of each.
    coarse = rng.integers(0, NUM_CLASSES, (size, 16, 16), dtype=np.uint8)
    batch["label"] = np.array(
      resize_nearest(jnp.asarray(coarse), (height, width))
    )
  return batch


def full_bank(bank, rng):
  """The same bank with every queue full of random keys."""
  keys = rng.standard_normal(bank.keys.shape, dtype=np.float32)
  return bank.replace(
    keys=jnp.asarray(keys, bank.keys.dtype),
    count=jnp.asarray(bank.capacities, jnp.int32),
  )


def timed(function, *args):
  """(median milliseconds, compile seconds) of a jitted function."""
  begin = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  compile_s = time.perf_counter() - begin
  jax.block_until_ready(compiled(*args))
  samples = []
  for _ in range(_REPEATS.value):
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    samples.append(time.perf_counter() - begin)
  return 1e3 * statistics.median(samples), compile_s


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  config = get_config()
  rng = np.random.default_rng(0)
  program = build_lib.build(
    config,
    build_lib.DataSpec(NUM_CLASSES, (124, 116, 104), (58, 57, 57), 1000),
  )
  recipe, model = program.recipe, program.model
  state = program.create_state()
  state = state.replace(memory_bank=full_bank(state.memory_bank, rng))
  batch_l = random_batch(config, rng, labelled=True)
  batch_u = random_batch(config, rng, labelled=False)
  num_l, crop = config.batch.labelled, tuple(config.input.crop_size)

  images_u = normalise(
    jnp.asarray(batch_u["image"]), batch_u["valid_box"], recipe.mean, recipe.std
  )
  images_l = normalise(
    jnp.asarray(batch_l["image"]), batch_l["valid_box"], recipe.mean, recipe.std
  )
  labels_l = jnp.asarray(batch_l["label"], jnp.int32)
  images = jnp.concatenate([images_l, images_u])
  draws = rngs.draw_semi_supervised(
    jax.random.key(0),
    state.step,
    mix="cutmix",
    mix_probability=1.0,
    unlabelled_shape=images_u.shape[:3],
    num_classes=NUM_CLASSES,
    num_anchors=recipe.num_anchors,
    num_negatives=recipe.num_negatives,
    max_keys=recipe.max_keys_per_step,
  )

  def pseudo_labelling(teacher, images_u):
    logits = model.apply(teacher.for_apply(), images_u, train=False).logits
    probs = jax.nn.softmax(resize_bilinear(logits, crop))
    return probs.argmax(-1).astype(jnp.int32), probs.max(-1)

  def forward_train(params, batch_stats, images):
    return model.apply(
      {"params": params, "batch_stats": batch_stats},
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": draws.student_dropout},
    )

  pseudo_labels, _ = jax.jit(pseudo_labelling)(state.teacher, images_u)
  outputs, _ = jax.jit(forward_train)(
    state.student.params, state.student.batch_stats, images
  )

  def mixing(images_u, pseudo_labels):
    keep_mask = strong_augmentation.mix_mask(
      draws.mix, "cutmix", pseudo_labels, ignore_label=255
    )
    return [
      strong_augmentation.fill(
        x, strong_augmentation.partners(x), keep_mask, "cutmix", 0
      )
      for x in (images_u, pseudo_labels)
    ]

  def student_backward(params, batch_stats, images):
    def scalar(params):
      out, _ = forward_train(params, batch_stats, images)
      return out.logits.sum() + out.reps.sum()

    return jax.grad(scalar)(params)

  def thresholds(logits):
    entropies = reliability.entropy(resize_bilinear(logits[num_l:], crop))
    valid = jnp.ones(entropies.shape, bool)
    return reliability.assess(entropies, valid, jnp.asarray(20.0))

  def pixel_losses(logits):
    def scalar(logits):
      logits = resize_bilinear(logits, crop)
      return losses.cross_entropy(
        logits[:num_l], labels_l, ignore_label=255
      ) + losses.unsupervised_loss(
        logits[num_l:], pseudo_labels, ignore_label=255
      )

    return jax.value_and_grad(scalar)(logits)

  grid = outputs.logits.shape[1:3]
  labels = resize_nearest(jnp.concatenate([labels_l, pseudo_labels]), grid)

  def bank_and_contrastive(bank, reps, teacher_reps, logits):
    def scalar(reps):
      everything = jnp.ones(labels.shape, bool)
      result = contrastive.contrastive_loss(
        reps,
        teacher_reps,
        membership=contrastive.class_membership(
          labels, num_classes=NUM_CLASSES, ignore_label=255
        ),
        valid_mask=everything,
        reliable_mask=everything,
        unreliable_mask=everything,
        teacher_probs=jax.nn.softmax(logits),
        num_labelled=num_l,
        memory_bank=bank,
        anchor_bits=draws.anchor_bits,
        negative_bits=draws.negative_bits,
        key_bits=draws.key_bits,
        max_keys=recipe.max_keys_per_step,
        low_rank=recipe.low_rank,
        high_rank=recipe.high_rank,
        # Untrained probabilities are about 1/21: without this no anchors.
        anchor_min_probability=0.0,
        negative_max_probability=1.0,
        temperature=recipe.temperature,
      )
      return result.loss, result.memory_bank

    return jax.value_and_grad(scalar, has_aux=True)(reps)

  def optimiser(params, opt_state, teacher_params):
    updates, opt_state = program.tx.update(params, opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
    return params, opt_state, ema.ema_update(teacher_params, params, 0.99)

  teacher, student = state.teacher, state.student
  rows = {
    "teacher forward (eval)": timed(pseudo_labelling, teacher, images_u),
    "mixing": timed(mixing, batch_u["image"], pseudo_labels),
    "teacher forward (train)": timed(
      forward_train, teacher.params, teacher.batch_stats, images
    ),
    "student forward + backward": timed(
      student_backward, student.params, student.batch_stats, images
    ),
    "entropies + thresholds": timed(thresholds, outputs.logits),
    "pixel losses + gradient": timed(pixel_losses, outputs.logits),
    # Alone it cannot donate the bank, so this includes one copy of it.
    "bank + contrastive (+ copy)": timed(
      bank_and_contrastive,
      state.memory_bank,
      outputs.reps,
      outputs.reps + 0.1,
      outputs.logits,
    ),
    "optimiser + EMA": timed(
      optimiser, student.params, state.opt_state, teacher.params
    ),
  }

  begin = time.perf_counter()
  lowered = program.semi_supervised_step.lower(state, batch_l, batch_u)
  compiled = lowered.compile()
  compile_s = time.perf_counter() - begin
  samples = []
  for _ in range(2 + _REPEATS.value):
    begin = time.perf_counter()
    state, metrics = compiled(state, batch_l, batch_u)
    jax.block_until_ready((state, metrics))
    samples.append(time.perf_counter() - begin)
  whole_ms = 1e3 * statistics.median(samples[2:])
  peak = step_shapes.peak_bytes(compiled)
  batch = config.batch.labelled + config.batch.unlabelled

  device = jax.devices()[0]
  print(
    f"{device.device_kind} x {jax.device_count()}, jax {jax.__version__},"
    f" preset {_PRESET.value}: {config.model.backbone},"
    f" {config.model.dtype}, {num_l}+{batch - num_l} images of"
    f" {crop[0]}x{crop[1]}, {NUM_CLASSES} classes, bank of"
    f" {state.memory_bank.keys.nbytes / 1e6:.0f} MB, median of"
    f" {_REPEATS.value}"
  )
  print(f"{'phase':<30}{'ms':>10}{'share':>8}{'compile s':>11}")
  for name, (ms, seconds) in rows.items():
    print(f"{name:<30}{ms:>10.1f}{ms / whole_ms:>8.1%}{seconds:>11.1f}")
  print(f"{'whole step':<30}{whole_ms:>10.1f}{'':>8}{compile_s:>11.1f}")
  print(
    f"{batch * 1e3 / whole_ms:.2f} images/s, peak memory"
    f" {peak / 1e9:.2f} GB (compiler's estimate)"
  )
  if _JSON.value:
    record = {
      "device": device.device_kind,
      "preset": _PRESET.value,
      "crop_size": crop,
      "phases_ms": {name: ms for name, (ms, _) in rows.items()},
      "step_ms": whole_ms,
      "images_per_second": batch * 1e3 / whole_ms,
      "compile_s": compile_s,
      "peak_bytes": peak,
    }
    pathlib.Path(_JSON.value).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
