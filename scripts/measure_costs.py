"""Measures the constants of input_pipeline/costs.py with the compiler.

  python scripts/measure_costs.py

Compiles the semi-supervised step for 2 + 2 images of two crop sizes and counts
the operations of a third one, runs nothing, and prints for every network how
many bytes of temporaries and how many operations a pixel of the step's images
costs. A CPU needs one to three minutes for each network. Its compiler undoes
model.remat, whose effect on memory cannot be seen here.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from configs import common
from u2pl_jax import build as build_lib
from u2pl_jax import step_shapes

_CROPS = (129, 193)
# Dilated filters that reach over the border count for less in small crops.
_COUNTED_CROP = 513
_IMAGES = 2
_NETWORKS = [
  # backbone, output stride, model.remat
  ("tiny", 8, False),
  ("tiny", 16, False),
  ("resnet18", 8, False),
  ("resnet18", 16, False),
  ("resnet34", 8, False),
  ("resnet34", 16, False),
  ("resnet50", 8, False),
  ("resnet50", 8, True),
  ("resnet50", 16, False),
  ("resnet101", 8, False),
  ("resnet101", 8, True),
  ("resnet101", 16, False),
  ("resnet152", 8, False),
  ("resnet152", 16, False),
]


def lower(backbone: str, stride: int, remat: bool, crop: int):
  """(lowered step, parameters) for crops of one size."""
  config = common.get_base_config()
  config.model.backbone = backbone
  config.model.output_stride = stride
  config.model.remat = remat
  config.batch.labelled = config.batch.unlabelled = _IMAGES
  config.input.crop_size = (crop, crop)
  # Small, so that its temporaries do not hide those of the pixels.
  config.memory_bank.capacity = config.memory_bank.capacity_class0 = 512
  program = build_lib.build(
    config, build_lib.DataSpec(21, (0.0,) * 3, (1.0,) * 3, 1000)
  )
  state = build_lib.abstract_state(config, program)
  halves = step_shapes.training_batches(config, program.mesh)
  lowered = program.semi_supervised_step.lower(state, *halves)
  parameters = sum(x.size for x in jax.tree.leaves(state.student.params))
  return lowered, parameters


def main() -> None:
  small, large = _CROPS
  print("network             parameters   bytes/pixel   MFLOP/pixel")
  for network in _NETWORKS:
    temporaries = [
      lower(*network, crop)[0].compile().memory_analysis().temp_size_in_bytes
      for crop in _CROPS
    ]
    pixel_bytes = (temporaries[1] - temporaries[0]) / (
      2 * _IMAGES * (large**2 - small**2)
    )
    lowered, parameters = lower(*network, _COUNTED_CROP)
    flops = lowered.cost_analysis()["flops"]
    flops /= 2 * _IMAGES * _COUNTED_CROP**2
    backbone, stride, remat = network
    name = f"{backbone} OS {stride}{' remat' * remat}"
    print(
      f"{name:<20}{parameters:>10}{pixel_bytes:>14.0f}{flops / 1e6:>14.3f}",
      flush=True,
    )


if __name__ == "__main__":
  main()
