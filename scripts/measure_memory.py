"""Compares the plan of the memory with what the compiler reports.

  python scripts/measure_memory.py
  python scripts/measure_memory.py --only=resnet50

The table of docs/memory.md. Compiles the semi-supervised step of three configs
for the CPU, as a whole and by micro-batches, and runs nothing; two minutes for
the largest.
"""

import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags

from configs import common, testing, voc_1464
from u2pl_jax import build as build_lib
from u2pl_jax import memory_plan, step_shapes

_ONLY = flags.DEFINE_enum(
  "only", None, ["testing", "resnet50", "voc_1464"], "One of the configs alone."
)


def resnet50():
  """ResNet-50, 8 + 8 images of 257x257, the full bank."""
  config = common.get_base_config()
  config.name = "resnet50"
  config.model.backbone = "resnet50"
  config.input.crop_size = (257, 257)
  config.batch.labelled = config.batch.unlabelled = 8
  return config


# Config, classes, micro-batches.
_CASES = (
  (testing.get_config, 6, 1),
  (testing.get_config, 6, 2),
  (resnet50, 21, 1),
  (resnet50, 21, 4),
  (voc_1464.get_config, 21, 1),
  (voc_1464.get_config, 21, 8),
)


def compiled_peak(config, num_classes: int) -> int:
  """`step_shapes.peak_bytes` of the semi-supervised step."""
  program = build_lib.build(
    config,
    build_lib.DataSpec(num_classes, (0.0,) * 3, (1.0,) * 3, 1000),
    devices=jax.devices()[:1],
  )

  lowered = program.semi_supervised_step.lower(
    build_lib.abstract_state(config, program),
    *step_shapes.training_batches(config, program.mesh),
  )
  return step_shapes.peak_bytes(lowered.compile())


def main(_: list[str]) -> None:
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, MiB")
  print("config       micro-batches  predicted  compiler  ratio  compiled in")
  for get_config, num_classes, microbatches in _CASES:
    config = get_config()
    if _ONLY.value not in (None, config.name):
      continue
    config.batch.microbatches = microbatches
    predicted = memory_plan.predict(
      config,
      num_classes=num_classes,
      num_devices=1,
      network=memory_plan.trace_network(config, num_classes),
    ).peak
    begin = time.monotonic()
    measured = compiled_peak(config, num_classes)
    print(
      f"{config.name:<12}{microbatches:>14}{predicted / 2**20:>11.1f}"
      f"{measured / 2**20:>10.1f}{predicted / measured:>7.2f}"
      f"{time.monotonic() - begin:>11.0f} s",
      flush=True,
    )


if __name__ == "__main__":
  app.run(main)
