"""What the devices of a step send each other, and how much memory one needs.

  python scripts/inspect_step.py --config=configs/voc_1464.py --devices=8
  python scripts/inspect_step.py --config=configs/shapes.py --devices=4 \
    --json=step.json

Compiles the semi-supervised step, runs nothing and reads no image. Without an
accelerator (or with JAX_PLATFORMS=cpu) the devices are CPU devices that XLA
pretends to have, which partitions the step like any others.

`arrays` travel in `runs`: times that the devices wait for each other, counted
for the purpose of the largest array where one run carries several. What the
bytes count: u2pl_jax/collectives.py; what they cost: scripts/scaling_model.py.
"""

import collections
import dataclasses
import os
import pathlib
import sys

from absl import app, flags
from absl import logging as absl_logging

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from input_pipeline.command_line import CONFIG, fail, parse_flags, write_json
from input_pipeline.parallel import elapsed

_DEVICES = flags.DEFINE_integer("devices", 8, "Devices that share the batch.")
_JSON = flags.DEFINE_string("json", None, "Also write the numbers here.")


def inspect(config, num_devices: int) -> dict:
  """Compiles the semi-supervised step and reads off what it does.

  Args:
    config: complete.
    num_devices: of those that there are.

  Returns:
    JSON-ready: 'collectives', 'purposes' (bytes by purpose), 'operations' (how
    often the devices wait for each other), 'total_bytes', 'least_bytes',
    'budget_bytes', 'peak_bytes' of one device and more.

  Raises:
    ConfigError, DataError: the config cannot work.
    ValueError: what the step sends cannot be counted.
  """
  import jax
  import jax.numpy as jnp

  from u2pl_jax import collectives, step_shapes

  with elapsed("tracing"):
    lowered, program, state = step_shapes.lower_semi_supervised(
      config, jax.devices()[:num_devices]
    )
  # The compiler of CPU code takes minutes to optimise what never runs.
  on_cpu = jax.default_backend() == "cpu"
  with elapsed("compiling, about a minute for ResNet-101"):
    compiled = lowered.compile(
      {"xla_backend_optimization_level": "0"} if on_cpu else None
    )
  found = collectives.read(compiled.as_text())
  purposes = collections.Counter()
  for entry in found:
    purposes[entry.purpose] += entry.num_bytes
  height, width = config.input.crop_size
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
  return {
    "config": config.name,
    "devices": num_devices,
    "device_kind": jax.devices()[0].device_kind,
    "crop_size": [height, width],
    "labelled": config.batch.labelled,
    "unlabelled": config.batch.unlabelled,
    "memory_bank": config.sharding.memory_bank,
    "purposes": dict(purposes.most_common()),
    "operations": collectives.operations(found),
    "total_bytes": sum(purposes.values()),
    "least_bytes": least,
    "budget_bytes": int(collectives.BUDGET_FACTOR * sum(least.values())),
    "peak_bytes": step_shapes.peak_bytes(compiled),
    "state_bytes": compiled.memory_analysis().argument_size_in_bytes,
    "collectives": [dataclasses.asdict(entry) for entry in found],
  }


def table(result: dict, *, largest: int = 12) -> str:
  """The result as text: by purpose, then the largest single arrays."""
  found = result["collectives"]
  lines = [
    f"{result['config']}: {result['devices']} x {result['device_kind']}",
    f"{'purpose':<49}{'arrays':>7}{'runs':>7}{'bytes':>15}",
  ]
  for purpose, num_bytes in result["purposes"].items():
    arrays = sum(e["purpose"] == purpose for e in found)
    runs = result["operations"].get(purpose, 0)
    lines.append(f"{purpose:<49}{arrays:>7}{runs:>7}{num_bytes:>15,}")
  runs, total = sum(result["operations"].values()), result["total_bytes"]
  least = result["least_bytes"]
  lines += [
    f"{'total':<49}{len(found):>7}{runs:>7}{total:>15,}",
    f"{'budget':<63}{result['budget_bytes']:>15,}",
  ]
  lines += [f"{'  at least: ' + k:<63}{v:>15,}" for k, v in least.items()]
  if found:
    share = total / sum(least.values())
    lines.append(f"the total is {share:.3f} x what is at least needed")
  lines.append(
    "peak memory of a device"
    f" {result['peak_bytes'] / 2**30:.2f} GiB, of which state and batch"
    f" {result['state_bytes'] / 2**30:.2f} GiB"
  )
  if found:
    lines.append("largest arrays:")
  for entry in sorted(found, key=lambda e: -e["num_bytes"])[:largest]:
    line = f"{entry['num_bytes']:>13,}  {entry['kind']} {entry['shape']}  "
    source = entry["source"]
    # The end of a long name says more than its beginning.
    while len(line + source) > 80 and "/" in source:
      source = source.split("/", 1)[1]
    lines.append(line + source)
  return "\n".join(lines)


def main(_: list[str]) -> None:
  num_devices = _DEVICES.value
  if num_devices < 1:
    fail(f"--devices={num_devices}: must be at least 1")
  # Before jax is imported. XLA reports a compilation of minutes as an error.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
  try:
    result = inspect(CONFIG.value, num_devices)
  except (ConfigError, DataError, ValueError) as error:
    fail(str(error))
  except KeyboardInterrupt:
    fail("interrupted; nothing was written", 130)
  print(table(result))
  if _JSON.value:
    write_json(_JSON.value, result)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
