"""Runs for tests/test_devices.py, in a process with 8 pretended CPU devices.

  python -m tests.device_runs FOLDER NAME...

Trains the same ten semi-supervised steps as each of RUNS says, and writes what
was decided: FOLDER/<name>.npz. Two supervised steps follow on 1 and on 4
devices.

One device trains on its own; each step on several begins with the state that
one device had there. Of a million rectified numbers in a step some lie within
rounding of 0, and a gradient that one of them passes on one side only differs
by 1e-4. In which step that happens depends on the machine; two runs that go
their own ways part there, whatever the number of devices.

With JAX_ENABLE_X64=1 the network computes in float64, where nothing lies as
close as that, and each run goes its own way for all ten steps.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs import testing
from u2pl_jax import build as build_lib
from u2pl_jax import rngs, sharding, train_step

X64 = jax.config.jax_enable_x64
DATA = build_lib.DataSpec(6, (120.0,) * 3, (60.0,) * 3, num_unlabelled=80)
NUM_STEPS, BATCH, SIZE = 10, 8, 33
# Devices, where the bank lies, micro-batches.
RUNS = {
  "1": (1, "replicated", 1),
  "2": (2, "replicated", 1),
  "4": (4, "replicated", 1),
  "8": (8, "replicated", 1),
  "8_split": (8, "classes", 1),
  "1_micro": (1, "replicated", 2),
  "4_micro": (4, "replicated", 2),
}
# From here on some devices have little or nothing to contribute; in the last
# step there are images without a pixel: not before, since a constant image lies
# on the kinks of the network as a whole, and rounding would show from then on.
POOR_FROM = 5


def get_config(memory_bank, microbatches):
  config = testing.get_config()
  config.batch.labelled = config.batch.unlabelled = BATCH
  config.batch.microbatches = microbatches
  config.eval.batch = BATCH
  config.schedule.epochs = 1
  config.schedule.warmup_epochs = 0
  config.strong.mix_probability = 1.0
  # Rounding must not be amplified from step to step.
  config.optimizer.learning_rate = 0.001
  config.contrastive.anchor_min_probability = 0.1
  # The 6 queues are 272 slots, of which each of 8 devices can have 34: it takes
  # parts of up to two queues. 8 keys of a class enter in a step, so they wrap.
  config.memory_bank.capacity = 40
  config.memory_bank.capacity_class0 = 72
  config.memory_bank.max_keys_per_step = 8
  config.sharding.memory_bank = memory_bank
  return config


def make_batches(step):
  """Blocks of one class, noise with a colour of the class; poor ones later."""
  rng = np.random.default_rng(step)
  blocks = rng.integers(0, 6, (2 * BATCH, 3, 3))
  if step >= POOR_FROM:
    # Images 2 and 3, all that a device of 4 has, show one class alone.
    blocks[2:4] = blocks[BATCH + 2 : BATCH + 4] = 1
  labels = blocks.repeat(11, 1).repeat(11, 2).astype(np.uint8)
  images = labels[..., None] * 30 + rng.integers(
    0, 90, (2 * BATCH, SIZE, SIZE, 3)
  )
  batch = {
    "image": images.astype(np.float64 if X64 else np.uint8),
    "valid_box": np.tile(
      np.asarray([[0, 0, SIZE, SIZE]], np.int32), (2 * BATCH, 1)
    ),
    "label": labels,
  }
  if step >= POOR_FROM:
    # Nothing to learn from on the devices of these images, with 8 or with 4.
    batch["label"][:2] = 255
  if step == NUM_STEPS - 1:
    batch["valid_box"][[0, 1, BATCH, BATCH + 1]] = 0
  half_l = {name: value[:BATCH] for name, value in batch.items()}
  half_u = {name: value[BATCH:] for name, value in batch.items()}
  del half_u["label"]
  return half_l, half_u


def state_shardings(config, program):
  return sharding.state_shardings(
    program.mesh,
    build_lib.abstract_state(config, program),
    split_bank=config.sharding.memory_bank == "classes",
  )


def traced_step(config, program):
  """The product's semi-supervised step on its devices, with its decisions."""
  recipe = program.recipe
  root_key = jax.random.key(config.seed)
  layout = build_lib.make_layout(config, program.mesh.devices.size)
  where = state_shardings(config, program)
  split = sharding.batch_sharded(program.mesh)

  @functools.partial(
    jax.jit,
    in_shardings=(where, split, split),
    out_shardings=(where, sharding.replicated(program.mesh)),
    donate_argnums=0,
  )
  def step(state, batch_l, batch_u):
    draws = rngs.draw_semi_supervised(
      root_key,
      state.step,
      mix=recipe.mix,
      mix_probability=recipe.mix_probability,
      unlabelled_shape=batch_u["image"].shape[:3],
      num_classes=recipe.num_classes,
      num_anchors=recipe.num_anchors,
      num_negatives=recipe.num_negatives,
      max_keys=recipe.max_keys_per_step,
    )
    state, metrics = train_step.semi_supervised_step(
      state,
      train_step.LabelledBatch(**batch_l),
      train_step.UnlabelledBatch(**batch_u),
      draws,
      model=program.model.clone(dtype=jnp.float64) if X64 else program.model,
      tx=program.tx,
      recipe=recipe,
      layout=layout,
      trace=True,
    )
    trace = metrics.pop("trace")
    metrics |= {
      name: trace[name]
      for name in ("pseudo_labels", "mixed_pseudo_labels", "kept_labels")
    }
    metrics |= {
      "present": trace["contrast"].present,
      "active": trace["contrast"].active,
      "num_anchors": trace["contrast"].num_anchors,
      "anchor_pixels": trace["contrast"].anchor_pixels,
      "bank_keys": state.memory_bank.keys,
      "bank_count": state.memory_bank.count,
      "bank_cursor": state.memory_bank.cursor,
    }
    return state, metrics

  return step


def first_state(program):
  """On the host, in the type of the runs."""
  state = jax.device_get(program.create_state())
  if not X64:
    return state
  return jax.tree.map(
    lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state
  )


def main(folder, *names):
  for name in names:
    num_devices, memory_bank, microbatches = RUNS[name]
    config = get_config(memory_bank, microbatches)
    program = build_lib.build(config, DATA, devices=jax.devices()[:num_devices])
    where = state_shardings(config, program)
    if num_devices == 1 or X64:
      # Before each step; those of one device for the float32 runs that follow.
      states = [first_state(program)]
    step = traced_step(config, program)

    def halves(i, mesh=program.mesh):
      return [sharding.put_batch(mesh, half) for half in make_batches(i)]

    rows = []
    for i in range(NUM_STEPS):
      state = jax.device_put(states[i], where)
      state, metrics = step(state, *halves(i))
      if num_devices == 1 or X64:
        states.append(jax.device_get(state))
      params = {
        who: np.concatenate(
          [np.ravel(x) for x in jax.tree.leaves(jax.device_get(variables))]
        )
        for who, variables in (
          ("student", state.student),
          ("teacher", state.teacher),
        )
      }
      rows.append(jax.device_get(metrics) | params)
    record = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    shards = state.memory_bank.keys.addressable_shards
    record["rows_of_a_device"] = shards[0].data.shape[0]
    if num_devices in (1, 4) and not X64:
      rows = []
      for i in range(2):
        state, metrics = program.supervised_step(state, halves(i)[0])
        rows.append(metrics["sup_loss"])
      record["supervised"] = np.stack(jax.device_get(rows))
    np.savez(pathlib.Path(folder) / f"{name}.npz", **record)
    print(name, flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
