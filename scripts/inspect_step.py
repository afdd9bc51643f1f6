"""What the devices of a step send each other, and how much memory one needs.

  python scripts/inspect_step.py --config=configs/voc_1464.py --devices=8
  python scripts/inspect_step.py --config=configs/shapes.py --devices=4 \
    --json=step.json

Compiles the semi-supervised step, runs nothing and reads no image. Without an
accelerator (or with JAX_PLATFORMS=cpu) the devices are CPU devices that XLA
pretends to have, which partitions the step like any others.

What the bytes count: u2pl_jax/collectives.py.
"""

import collections
import dataclasses
import json
import os
import pathlib
import sys
import time

from absl import app, flags
from absl import logging as absl_logging

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from input_pipeline.command_line import CONFIG, fail, parse_flags

_DEVICES = flags.DEFINE_integer("devices", 8, "Devices that share the batch.")
_JSON = flags.DEFINE_string("json", None, "Also write the numbers here.")


def inspect(config, num_devices: int) -> dict:
  """Compiles the semi-supervised step and reads off what it does.

  Args:
    config: complete.
    num_devices: of those that there are.

  Returns:
    JSON-ready: 'collectives', 'purposes' (bytes by purpose), 'total_bytes',
    'least_bytes', 'budget_bytes', 'peak_bytes' of one device and more.

  Raises:
    ConfigError, DataError: the config cannot work.
  """
  import jax
  import jax.numpy as jnp

  from input_pipeline.dataset_config import load_info
  from u2pl_jax import build as build_lib
  from u2pl_jax import collectives, sharding
  from u2pl_jax.config_checks import ConfigError

  if config.method != "u2pl":
    raise ConfigError(
      f"config.method={config.method!r} has no semi-supervised step: choose"
      " 'u2pl'"
    )
  info = load_info(config.dataset)
  program = build_lib.build(
    config,
    # The number of images only sets the schedule.
    build_lib.DataSpec(info.num_classes, info.mean, info.std, 1000),
    devices=jax.devices()[:num_devices],
  )
  state = build_lib.abstract_state(config, program)
  height, width = config.input.crop_size
  split = sharding.batch_sharded(program.mesh)

  def batch(size: int, *names: str) -> dict:
    shapes = {
      "image": ((size, height, width, 3), jnp.uint8),
      "label": ((size, height, width), jnp.uint8),
      "valid_box": ((size, 4), jnp.int32),
    }
    return {
      name: jax.ShapeDtypeStruct(*shapes[name], sharding=split)
      for name in names
    }

  lowered = program.semi_supervised_step.lower(
    state,
    batch(config.batch.labelled, "image", "label", "valid_box"),
    batch(config.batch.unlabelled, "image", "valid_box"),
  )
  # The compiler of CPU code takes minutes to optimise what never runs.
  on_cpu = jax.default_backend() == "cpu"
  compiled = lowered.compile(
    {"xla_backend_optimization_level": "0"} if on_cpu else None
  )
  found = collectives.read(compiled.as_text())
  purposes = collections.Counter()
  for entry in found:
    purposes[entry.purpose] += entry.num_bytes
  grid = jax.eval_shape(
    lambda variables, images: (
      program.model.apply(variables, images, train=False).logits
    ),
    state.student.for_apply(),
    jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32),
  ).shape
  num_images = config.batch.labelled + config.batch.unlabelled
  least = collectives.least_bytes(
    state, program.recipe.max_keys_per_step, num_images * grid[1] * grid[2]
  )
  memory = compiled.memory_analysis()
  return {
    "config": config.name,
    "devices": num_devices,
    "device_kind": jax.devices()[0].device_kind,
    "purposes": dict(purposes.most_common()),
    "total_bytes": sum(purposes.values()),
    "least_bytes": least,
    "budget_bytes": int(collectives.BUDGET_FACTOR * sum(least.values())),
    "peak_bytes": memory.temp_size_in_bytes
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    "state_bytes": memory.argument_size_in_bytes,
    "collectives": [dataclasses.asdict(entry) for entry in found],
  }


def table(result: dict, *, largest: int = 12) -> str:
  """The result as text: by purpose, then the largest single arrays."""
  found = result["collectives"]
  lines = [
    f"{result['config']}: {result['devices']} x {result['device_kind']}",
    f"{'purpose':<50}{'arrays':>8}{'runs':>8}{'bytes':>15}",
  ]
  for purpose, num_bytes in result["purposes"].items():
    entries = [e for e in found if e["purpose"] == purpose]
    runs = sum(e["count"] for e in entries)
    lines.append(f"{purpose:<50}{len(entries):>8}{runs:>8}{num_bytes:>15,}")
  least = sum(result["least_bytes"].values())
  parts = ", ".join(f"{k} {v:,}" for k, v in result["least_bytes"].items())
  share = result["total_bytes"] / least
  lines += [
    f"{'total':<66}{result['total_bytes']:>15,}",
    f"{'budget':<66}{result['budget_bytes']:>15,}",
    f"  of at least {least:,} ({parts}); the total is {share:.3f} x that",
    "peak memory of a device"
    f" {result['peak_bytes'] / 2**30:.2f} GiB, of which state and batch"
    f" {result['state_bytes'] / 2**30:.2f} GiB",
  ]
  if found:
    lines.append("largest arrays:")
  for entry in sorted(found, key=lambda e: -e["num_bytes"])[:largest]:
    lines.append(
      f"{entry['num_bytes']:>15,}  {entry['kind']} {entry['shape']}"
      f"  {entry['source'][-60:]}"
    )
  return "\n".join(lines)


def main(_: list[str]) -> None:
  num_devices = _DEVICES.value
  if num_devices < 1:
    fail(f"--devices={num_devices}: must be at least 1")
  # Before jax is imported.
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count={num_devices}"
  )
  absl_logging.set_verbosity(absl_logging.WARNING)
  import jax

  from input_pipeline import DataError
  from u2pl_jax.config_checks import ConfigError

  if jax.device_count() < num_devices:
    fail(
      f"--devices={num_devices}: there are {jax.device_count()}"
      f" {jax.default_backend()} devices: set JAX_PLATFORMS=cpu to pretend"
    )
  begin = time.monotonic()
  try:
    result = inspect(CONFIG.value, num_devices)
  except (ConfigError, DataError) as error:
    fail(str(error))
  print(table(result))
  print(f"compiled in {time.monotonic() - begin:.0f} s")
  if _JSON.value:
    path = pathlib.Path(_JSON.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
