"""Step time on 1 to 256 devices, from counts alone: a prediction.

  python scripts/inspect_step.py --config=configs/voc_1464.py --devices=8 \
    --json=step.json
  python scripts/scaling_model.py --config=configs/voc_1464.py \
    --config.model.dtype=bfloat16 --device=h200 --step=step.json

The time of a step is its floor (scripts/roofline.py) divided by --share, the
share of it that a program is taken to reach, plus that of every exchange in the
compiled step, one after another, as they wait for each other. No cluster has
confirmed it. Formulas, rates and what follows: docs/scaling.md.
"""

import json
import os
import pathlib
import sys

from absl import app, flags
from absl import logging as absl_logging

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from input_pipeline.command_line import CONFIG, fail, parse_flags, write_json

_STEP = flags.DEFINE_string(
  "step", None, "JSON of inspect_step.py for this config on several devices."
)
_DEVICE = flags.DEFINE_string("device", "h200", "As in roofline.py.")
_NETWORK = flags.DEFINE_enum(
  "network",
  "infiniband",
  ["infiniband", "ethernet"],
  "Between nodes of 8 GPUs; TPUs have their own.",
)
_SHARE = flags.DEFINE_float(
  "share", 0.55, "Of the floor's rate that computing reaches, above 0, up to 1."
)
_IMAGES = flags.DEFINE_list(
  "images",
  ["1", "4", "16"],
  "Labelled images of a device for weak scaling; unlabelled in proportion.",
)
_JSON = flags.DEFINE_string("json", None, "Also write the numbers here.")
_PLOT = flags.DEFINE_string(
  "plot", None, "Draw the efficiencies, .svg or .png."
)


def _read_step(path: str | None) -> dict:
  if not path:
    fail("--step is missing: make it with scripts/inspect_step.py --json=...")
  try:
    step = json.loads(pathlib.Path(path).read_text())
  except OSError as error:
    fail(f"--step={path}: cannot be read ({error.strerror})")
  except ValueError:
    step = None
  if not isinstance(step, dict) or "operations" not in step:
    fail(f"--step={path}: no JSON of scripts/inspect_step.py")
  return step


def main(_: list[str]) -> None:
  if not 0 < _SHARE.value <= 1:
    fail(f"--share={_SHARE.value}: must be above 0 and at most 1")
  images = [int(text) for text in _IMAGES.value if text.isdecimal()]
  if len(images) < len(_IMAGES.value) or 0 in images:
    fail(f"--images={','.join(_IMAGES.value)}: numbers from 1 up")
  step = _read_step(_STEP.value)
  # Before jax is imported: nothing runs, so no accelerator is looked for.
  os.environ["JAX_PLATFORMS"] = "cpu"
  absl_logging.set_verbosity(absl_logging.WARNING)
  from input_pipeline import DataError
  from input_pipeline.dataset_config import load_info
  from u2pl_jax import roofline, scaling
  from u2pl_jax.config_checks import ConfigError

  config, device = CONFIG.value, _DEVICE.value
  try:
    result = scaling.predict(
      config,
      step,
      num_classes=load_info(config.dataset).num_classes,
      device=roofline.find_device(device),
      network=scaling.make_network(device, _NETWORK.value),
      share=_SHARE.value,
      images=images,
    )
  except (ConfigError, DataError) as error:
    fail(str(error))
  print(scaling.table(result))
  if _JSON.value:
    write_json(_JSON.value, result)
  if _PLOT.value:
    try:
      scaling.plot(result, _PLOT.value)
    except (OSError, ValueError) as error:
      fail(f"--plot={_PLOT.value}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
