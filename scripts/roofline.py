"""The floor of a training step: how long a device needs at the very least.

  python scripts/roofline.py --config=configs/voc_1464.py --device=h200 \
    --config.model.dtype=bfloat16
  python scripts/roofline.py --config=configs/cityscapes_744.py --devices=8 \
    --device=a100 --json=floor.json

Counts the layers of the config's network and what the method adds; compiles and
runs nothing, and reads no image. What counts, and the rates of the devices:
u2pl_jax/roofline.py; what to make of it: docs/scaling.md.
"""

import dataclasses
import os
import pathlib
import sys

from absl import app, flags
from absl import logging as absl_logging

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from input_pipeline.command_line import CONFIG, fail, parse_flags, write_json

_DEVICE = flags.DEFINE_string("device", "h200", "Whose rates count; see above.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share the batch.")
_JSON = flags.DEFINE_string("json", None, "Also write the numbers here.")


def floor(config, device_name: str, num_devices: int) -> dict:
  """The floor of a config's step on one of the devices that share its batch.

  Args:
    config: complete.
    device_name: a key of `roofline.DEVICES`.
    num_devices: that share the batch.

  Returns:
    JSON-ready: 'phases' and their sum 'step', each with tflop, tflop_inside,
    gigabytes, ms, arithmetic_ms and memory_ms, and what they are of.

  Raises:
    ConfigError, DataError: the config cannot work, or not on this device.
  """
  from input_pipeline.dataset_config import load_info
  from u2pl_jax import roofline
  from u2pl_jax.config_checks import ConfigError

  if device_name not in roofline.DEVICES:
    raise ConfigError(
      f"--device={device_name} is unknown: choose one of"
      f" {', '.join(roofline.DEVICES)}"
    )
  device = roofline.DEVICES[device_name]
  phases = roofline.count(
    config,
    num_classes=load_info(config.dataset).num_classes,
    num_devices=num_devices,
  )

  def row(parts) -> dict:
    cost = roofline.cost(parts, device, config.model.dtype)
    return {
      "tflop": cost.flops / 1e12,
      "tflop_inside": cost.inside / 1e12,
      "gigabytes": cost.num_bytes / 1e9,
      "ms": 1e3 * cost.seconds,
      "arithmetic_ms": 1e3 * cost.arithmetic_s,
      "memory_ms": 1e3 * cost.memory_s,
    }

  return {
    "config": config.name,
    "crop_size": list(config.input.crop_size),
    "labelled": config.batch.labelled,
    "unlabelled": config.batch.unlabelled,
    "devices": num_devices,
    "dtype": config.model.dtype,
    "device": dataclasses.asdict(device),
    "tflops": device.rate(config.model.dtype) / 1e12,
    "terabytes": device.byte_rate / 1e12,
    "phases": {phase.name: row([phase]) for phase in phases},
    "step": row(phases),
  }


def table(result: dict) -> str:
  """The result as text, 80 columns wide."""
  height, width = result["crop_size"]
  device = result["device"]
  lines = [
    f"{result['config']}: {result['labelled']}+{result['unlabelled']} images of"
    f" {height}x{width}, {result['dtype']}, on"
    f" {result['devices']} x {device['name']}",
    f"each {result['tflops']:.0f} TFLOP/s and {result['terabytes']:.2f} TB/s:"
    f" {device['reach']:.0%} and {device['reach_bytes']:.0%} of the peak",
    f"({device['source']})",
    f"{'phase':<23}{'TFLOP':>9}{'GB':>9}{'ms':>9}{'share':>7}{'bound by':>12}",
  ]
  step = result["step"]
  for name, row in (*result["phases"].items(), ("step", step)):
    by = [row[key] / row["ms"] for key in ("arithmetic_ms", "memory_ms")]
    lines.append(
      f"{name:<23}{row['tflop']:>9.3f}{row['gigabytes']:>9.2f}{row['ms']:>9.2f}"
      f"{row['ms'] / step['ms']:>7.1%}    {by[0]:.0%} FLOP, {by[1]:.0%} bytes"
    )
  padding = 1 - step["tflop_inside"] / step["tflop"]
  lines.append(
    f"Of the arithmetic {padding:.1%} is with the padding of convolutions."
  )
  return "\n".join(lines)


def main(_: list[str]) -> None:
  num_devices = _DEVICES.value
  if num_devices < 1:
    fail(f"--devices={num_devices}: must be at least 1")
  # Before jax is imported: nothing runs, so no accelerator is looked for.
  os.environ["JAX_PLATFORMS"] = "cpu"
  absl_logging.set_verbosity(absl_logging.WARNING)
  from input_pipeline import DataError
  from u2pl_jax.config_checks import ConfigError

  try:
    result = floor(CONFIG.value, _DEVICE.value, num_devices)
  except (ConfigError, DataError) as error:
    fail(str(error))
  print(table(result))
  if _JSON.value:
    write_json(_JSON.value, result)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
