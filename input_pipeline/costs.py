"""Rough memory and time of a run, from its config alone.

  memory = 16 bytes x parameters         student, teacher, momentum, gradients
         +  4 bytes x keys x rep_features                    of the memory bank
         + images of a step x pixels of a crop x constant          activations

  time   = steps x images of a step x pixels of a crop x constant / rate

The constants are those of the semi-supervised step with 21 classes, from
scripts/measure_costs.py: what one more pixel adds to the compiler's temporaries
between crops of 129 and 193, and its count of operations by pixels for a crop
of 513, with 2 + 2 images in float32 on a CPU (jax 0.10.2, 2026-11-30).
Accelerators fuse and schedule differently and need workspace for convolutions,
so that a third more or less is no surprise.
"""

import dataclasses

import ml_collections

from input_pipeline import errors

# (backbone, output stride) -> parameters, bytes and operations per pixel.
_NETWORKS = {
  ("tiny", 8): (739_301, 1_076, 0.344e6),
  ("tiny", 16): (739_301, 1_001, 0.292e6),
  ("resnet18", 8): (21_708_629, 3_191, 4.640e6),
  ("resnet18", 16): (21_708_629, 2_699, 3.051e6),
  ("resnet34", 8): (31_816_789, 3_730, 5.898e6),
  ("resnet34", 16): (31_816_789, 2_985, 3.469e6),
  ("resnet50", 8): (45_467_861, 6_246, 7.386e6),
  ("resnet50", 16): (45_467_861, 4_171, 3.795e6),
  ("resnet101", 8): (64_459_989, 9_657, 10.079e6),
  ("resnet101", 16): (64_459_989, 5_139, 4.490e6),
  ("resnet152", 8): (80_103_637, 12_626, 12.300e6),
  ("resnet152", 16): (80_103_637, 6_150, 5.182e6),
}
# Temporaries in bfloat16, relative to float32: assumed, because a CPU computes
# in float32 all the same (0.93). Those of convolutions halve, of losses stay.
_BFLOAT16 = 0.6
# Operations with model.remat, relative to those without. What it saves of the
# memory is not in the estimate, because the compiler of the CPU undoes it.
_REMAT = 1.12
# Operations of a supervised step, relative to the whole one (ResNet-50). By the
# number of forward passes of a half it would be 3 of 9.
_SUPERVISED_SHARE = 0.30

# Operations a second that are assumed. Two CPU cores reach this on the tiny
# network (docs/camvid.md) and on ResNet-101 alike.
GPU_RATE = {"bfloat16": 100e12, "float32": 50e12}
CPU_RATE = 0.05e12


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Rough needs of a run, evaluations left out.

  Attributes:
    parameter_bytes: of both networks, the optimiser and the gradients.
    bank_bytes: of the memory bank.
    activation_bytes: shared by the devices of a run.
    steps: updates in all.
    warmup_steps: of them from labels alone.
    operations: of all steps, multiplications and additions apart.
    gpu_rate: operations a second assumed of an A100-class GPU.
  """

  parameter_bytes: float
  bank_bytes: float
  activation_bytes: float
  steps: int
  warmup_steps: int
  operations: float
  gpu_rate: float

  @property
  def memory_bytes(self) -> float:
    """On one device."""
    return self.parameter_bytes + self.bank_bytes + self.activation_bytes

  @property
  def gpu_hours(self) -> float:
    return self.operations / self.gpu_rate / 3600

  @property
  def cpu_hours(self) -> float:
    """On two cores."""
    return self.operations / CPU_RATE / 3600


def estimate(
  config: ml_collections.ConfigDict, *, num_classes: int, num_unlabelled: int
) -> Estimate:
  """The rough needs of the run of a config.

  Args:
    config: complete, see `configs/common.py`.
    num_classes: of the data set.
    num_unlabelled: images, which give the length of an epoch.

  Raises:
    ConfigError: a network, stride or type that there is not.
  """
  model, batch, schedule = config.model, config.batch, config.schedule
  network = (model.backbone, model.output_stride)
  if network not in _NETWORKS:
    known = ", ".join(f"{name} with {stride}" for name, stride in _NETWORKS)
    raise errors.ConfigError(
      f"config.model.backbone={model.backbone!r} with"
      f" output_stride={model.output_stride}: choose one of {known}"
    )
  if model.dtype not in GPU_RATE:
    raise errors.ConfigError(
      f"config.model.dtype={model.dtype!r}: choose one of {', '.join(GPU_RATE)}"
    )
  parameters, pixel_bytes, pixel_operations = _NETWORKS[network]
  if model.remat:
    pixel_operations *= _REMAT
  if model.dtype == "bfloat16":
    pixel_bytes *= _BFLOAT16
  is_supervised = config.method == "supervised"
  crop_pixels = config.input.crop_size[0] * config.input.crop_size[1]
  step_pixels = (batch.labelled + batch.unlabelled) * crop_pixels
  peak_pixels = batch.labelled * crop_pixels if is_supervised else step_pixels

  # As the training loop counts: configs/common.py, reference_devices.
  padded = num_unlabelled + schedule.reference_devices - 1
  epoch_steps = max(1, padded // batch.unlabelled)
  steps = schedule.epochs * epoch_steps
  warmup_steps = (
    steps if is_supervised else min(steps, schedule.warmup_epochs * epoch_steps)
  )
  semi_steps = steps - warmup_steps
  bank = config.memory_bank
  keys = bank.capacity_class0 + (num_classes - 1) * bank.capacity
  return Estimate(
    parameter_bytes=16.0 * parameters,
    bank_bytes=0.0 if is_supervised else 4.0 * keys * model.rep_features,
    activation_bytes=peak_pixels * pixel_bytes,
    steps=steps,
    warmup_steps=warmup_steps,
    operations=step_pixels
    * pixel_operations
    * (semi_steps + _SUPERVISED_SHARE * warmup_steps),
    gpu_rate=GPU_RATE[model.dtype],
  )
