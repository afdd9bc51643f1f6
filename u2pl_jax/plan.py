"""Predicts whether a config fits on a device: flags only, see memory_plan.py.

python -m u2pl_jax.plan --config=configs/voc_1464.py --device-memory=24GiB
python -m u2pl_jax.plan --config=configs/voc_1464.py --device-memory=16GiB \
  --devices=4 --json=plan.json

Takes seconds: nothing is compiled, no image is read, no accelerator is used.
"""

from absl import app, flags
from absl import logging as absl_logging

from input_pipeline.command_line import CONFIG, fail, parse_flags, write_json

_MEMORY = flags.DEFINE_string(
  "device-memory", None, "Memory of one device, such as 24GiB or 11GB."
)
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share the batch.")
_JSON = flags.DEFINE_string("json", None, "Also write the numbers here.")


def main(_: list[str]) -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)
  import jax

  # Nothing is computed, and the accelerator may be in use.
  jax.config.update("jax_platforms", "cpu")

  from input_pipeline import DataError
  from input_pipeline.dataset_config import load_info
  from u2pl_jax import memory_plan
  from u2pl_jax.config_checks import ConfigError, check_config

  config, num_devices = CONFIG.value, _DEVICES.value
  if _MEMORY.value is None:
    fail("--device-memory is missing: that of one device, such as 24GiB")
  if num_devices < 1:
    fail(f"--devices={num_devices}: must be at least 1")
  try:
    memory = memory_plan.parse_memory(_MEMORY.value)
    num_classes = load_info(config.dataset).num_classes
    check_config(config, num_classes=num_classes, num_devices=num_devices)
    found = list(
      memory_plan.settings(
        config, num_classes=num_classes, num_devices=num_devices
      )
    )
    print(memory_plan.report(config, found, memory))
    if _JSON.value:
      write_json(_JSON.value, memory_plan.as_json(config, found, memory))
  except (ConfigError, DataError) as error:
    fail(str(error))


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
