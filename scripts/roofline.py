"""The floor of a training step: how long a device needs at the very least.

  python scripts/roofline.py --config=configs/voc_1464.py --device=h200 \
    --config.model.dtype=bfloat16
  python scripts/roofline.py --config=configs/cityscapes_744.py --devices=8 \
    --device=a100 --json=floor.json

Counts the layers of the config's network and what the method adds; compiles and
runs nothing, and reads no image. What counts, and the rates of the devices:
u2pl_jax/roofline.py; what to make of it: docs/scaling.md.
"""

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


def main(_: list[str]) -> None:
  num_devices = _DEVICES.value
  if num_devices < 1:
    fail(f"--devices={num_devices}: must be at least 1")
  # Before jax is imported: nothing runs, so no accelerator is looked for.
  os.environ["JAX_PLATFORMS"] = "cpu"
  absl_logging.set_verbosity(absl_logging.WARNING)
  from input_pipeline import DataError
  from input_pipeline.dataset_config import load_info
  from u2pl_jax import roofline
  from u2pl_jax.config_checks import ConfigError

  config = CONFIG.value
  try:
    result = roofline.floor(
      config,
      num_classes=load_info(config.dataset).num_classes,
      device=roofline.find_device(_DEVICE.value),
      num_devices=num_devices,
    )
  except (ConfigError, DataError) as error:
    fail(str(error))
  print(roofline.table(result))
  if _JSON.value:
    write_json(_JSON.value, result)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
