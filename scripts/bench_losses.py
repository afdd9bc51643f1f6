"""Times everything of a semi-supervised step that is not the network.

  python scripts/bench_losses.py
  python scripts/bench_losses.py --preset=voc --json=losses.json

The step is the one that trains, forward and backward, with the outputs of the
networks given: upsampling, pseudo labels, mixing, percentiles, masks, ranks,
losses and their gradients, memory bank, sampling. Full queues, random images
and labels, outputs that tell the classes a little. The parts are compiled and
timed alone, so they need not add up to the whole. The floor counts what must be
read and written at the rates that are measured first (u2pl_jax/roofline.py).
"""

import bench_workload as workload  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.command_line import write_json
from u2pl_jax import (
  contrastive,
  halves,
  losses,
  reliability,
  rngs,
  roofline,
  strong_augmentation,
)
from u2pl_jax.models.layers import resize_bilinear, resize_nearest
from u2pl_jax.xla_flags import set_xla_flags


def parts(case, program, outputs, rng):
  """The parts of the whole: {name: (function, arguments)}, not compiled.

  The first argument of the last is the memory bank, given as None: it is
  donated, like that of the step.
  """
  recipe, config = program.recipe, case.config
  num_l, num_u = config.batch.labelled, config.batch.unlabelled
  num_classes, crop, ignore = case.num_classes, case.crop, recipe.ignore_label
  labels_l = jnp.asarray(workload.random_labels(rng, case, num_l), jnp.int32)
  labels_u = jnp.asarray(workload.random_labels(rng, case, num_u), jnp.int32)
  images = jnp.asarray(rng.integers(0, 256, (num_u, *crop, 3), dtype=np.uint8))
  draws = rngs.draw_semi_supervised(
    jax.random.key(0),
    jnp.asarray(1),
    mix=recipe.mix,
    mix_probability=1.0,
    unlabelled_shape=(num_u, *crop),
    num_classes=num_classes,
    num_anchors=recipe.num_anchors,
    num_negatives=recipe.num_negatives,
    max_keys=recipe.max_keys_per_step,
  )
  logits, reps = outputs["logits"], outputs["reps"]
  grid = logits.shape[1:3]

  def pseudo_labels(logits):
    probs = jax.nn.softmax(resize_bilinear(logits, crop))
    return probs.argmax(-1).astype(jnp.uint8), probs.max(-1)

  def mixing(images, labels):
    keep = strong_augmentation.mix_mask(
      draws.mix, recipe.mix, labels, ignore_label=ignore
    )
    return [
      strong_augmentation.fill(
        x, strong_augmentation.partners(x), keep, recipe.mix, 0
      )
      for x in (images, labels)
    ]

  def thresholds(logits):
    entropies = reliability.entropy(resize_bilinear(logits, crop))
    valid = jnp.ones(entropies.shape, bool)
    return reliability.assess(entropies, valid, jnp.asarray(20.0))

  def pixel_losses(logits):
    def scalar(logits):
      logits_l, logits_u = halves.separate(logits, num_l)
      if recipe.sup_loss == "ohem":
        supervised = losses.ohem_cross_entropy(
          resize_bilinear(logits_l, crop),
          labels_l,
          ignore_label=ignore,
          threshold=recipe.ohem_threshold,
          min_kept=recipe.ohem_min_kept,
        )
      else:
        supervised = losses.cross_entropy(
          resize_bilinear(logits_l, crop), labels_l, ignore_label=ignore
        )
      return supervised + losses.unsupervised_loss(
        resize_bilinear(logits_u, crop), labels_u, ignore_label=ignore
      )

    return jax.value_and_grad(scalar)(logits)

  grid_labels = [resize_nearest(x, grid) for x in (labels_l, labels_u)]
  membership = halves.interleave(
    *(
      contrastive.class_membership(
        x, num_classes=num_classes, ignore_label=ignore
      )
      for x in grid_labels
    )
  )
  everywhere = jnp.ones(membership.shape[:3], bool)

  def bank_and_contrastive(bank, reps, teacher_reps, logits):
    def scalar(reps):
      result = contrastive.contrastive_loss(
        reps,
        teacher_reps,
        membership=membership,
        valid_mask=everywhere,
        reliable_mask=everywhere,
        unreliable_mask=everywhere,
        teacher_probs=jax.nn.softmax(logits),
        num_labelled=num_l,
        places=halves.places(num_l, num_u),
        memory_bank=bank,
        anchor_bits=draws.anchor_bits,
        negative_bits=draws.negative_bits,
        key_bits=draws.key_bits,
        max_keys=recipe.max_keys_per_step,
        low_rank=recipe.low_rank,
        high_rank=recipe.high_rank,
        anchor_min_probability=recipe.anchor_min_probability,
        negative_max_probability=recipe.negative_max_probability,
        temperature=recipe.temperature,
      )
      return result.loss, result.memory_bank

    return jax.value_and_grad(scalar, has_aux=True)(reps)

  clean = outputs["clean_logits"]
  return {
    "upsampling and pseudo labels": (pseudo_labels, (clean,)),
    "mixing": (mixing, (images, labels_u)),
    "entropies and thresholds": (thresholds, (clean,)),
    "pixel losses and gradient": (pixel_losses, (logits,)),
    "bank, contrastive, gradient": (
      bank_and_contrastive,
      (None, reps, reps[::-1], logits),
    ),
  }


def time_part(name, function, args, bank, repeats):
  """Median ms of a part; with the first argument None it feeds the bank."""
  if args[0] is not None:
    run = workload.compile_for(name, jax.jit(function), *args)
    return workload.median_ms(name, run, repeats, *args)
  run = jax.jit(function, donate_argnums=0)
  run = workload.compile_for(name, run, bank, *args[1:])

  def feed():
    nonlocal bank
    (loss, bank), gradient = run(bank, *args[1:])
    return loss, gradient, bank

  return workload.median_ms(name, feed, repeats)


def main():
  options = workload.parser(__doc__).parse_args()
  set_xla_flags()
  repeats, result = options.repeats, []
  for case in workload.cases(
    options.preset, sizes=options.size, batch=options.batch
  ):
    rng = np.random.default_rng(0)
    device = workload.measured_device(case.config.model.dtype)
    program = workload.build(case)
    outputs = workload.random_outputs(case, rng)
    batches = workload.random_batches(case, rng)
    step, state = workload.outside_network(
      case, program, outputs, workload.random_outputs(case, rng)
    )
    whole = "everything, as in the step"
    compiled = workload.compile_for(whole, step, state, *batches)
    whole_ms, state = workload.step_ms(whole, compiled, state, batches, repeats)
    times = {
      name: time_part(name, function, args, state.memory_bank, repeats)
      for name, (function, args) in parts(case, program, outputs, rng).items()
    }
    floor = next(
      phase
      for phase in roofline.count(
        case.config, num_classes=case.num_classes, num_devices=1
      )
      if phase.name == "outside the network"
    )
    floor_ms = (
      1e3 * roofline.cost([floor], device, case.config.model.dtype).seconds
    )
    print(case.name)
    print(workload.device_line(device, case.config.model.dtype))
    print(f"median of {repeats}; floor of the whole {floor_ms:.2f} ms")
    for name, ms in (*times.items(), (whole, whole_ms)):
      print(f"{name:<32}{ms:>10.2f} ms")
    print(flush=True)
    result.append(
      {
        "case": case.name,
        "device": device.name,
        "parts_ms": times,
        "whole_ms": whole_ms,
        "floor_ms": floor_ms,
      }
    )
  if options.json:
    write_json(options.json, result)


if __name__ == "__main__":
  main()
