"""The floor of a training step: what a device must compute and move at least.

The convolutions and batch norms are those of the network as it is built; a
layer takes as long as the larger of its arithmetic and its bytes, each array
read or written once. What counts:

- a convolution once forward and twice backward (gradients of input and kernel;
  of the images none), in multiplications and additions, padding included;
- train-mode batch norm with its ReLU as three passes over its input forward
  (statistics; read and write) and five backward; of running statistics as none,
  since they fold into the convolution before;
- the teacher's pass over clean images without the branches that nobody reads,
  as the compiler leaves them out;
- with `config.model.remat` the encoder's blocks forward once more;
- of everything outside the network what cannot be held in registers: see
  `_outside_network`;
- 7 passes over the parameters for momentum, update and average.

Additions, pooling, resizing, dropout and concatenation count as fused into
their neighbours: 0. So nothing that runs can be faster, and nothing says that
it can be reached.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from u2pl_jax import build as build_lib
from u2pl_jax.config_checks import (
  ConfigError,
  bank_capacities,
  check_config,
  splits_bank,
)
from u2pl_jax.models import layers, resnet

_FLOAT = 4  # Bytes of the type of parameters, losses and representations.
_NORM_FORWARD, _NORM_BACKWARD, _UPDATE = 3, 5, 7
# Only the logits of the clean images are used.
_UNREAD_OF_CLEAN = ("decoder/representation_", "auxor/")


@dataclasses.dataclass(frozen=True)
class Device:
  """Rates of one device, from public data sheets.

  Attributes:
    name: for --device.
    tflops: peak of dense matrix products by config.model.dtype, in 1e12 a
      second; a type that is missing is not supported.
    terabytes: of memory a second, peak.
    source: of both.
    reach: share of the peak arithmetic that large matrix products reach.
    reach_bytes: likewise of the bytes, large copies.
  """

  name: str
  tflops: dict[str, float]
  terabytes: float
  source: str
  # Measured on an H200: 790 of 989 TFLOP/s, 4.3 of 4.8 TB/s. Assumed of all.
  reach: float = 0.8
  reach_bytes: float = 0.9

  def rate(self, dtype: str) -> float:
    """Reachable operations a second.

    Raises:
      ConfigError: the device does not compute in this type.
    """
    if dtype not in self.tflops:
      raise ConfigError(
        f"--device={self.name} does not compute in {dtype}: set"
        f" --config.model.dtype={next(iter(self.tflops))}"
      )
    return self.tflops[dtype] * 1e12 * self.reach

  @property
  def byte_rate(self) -> float:
    """Reachable bytes a second."""
    return self.terabytes * 1e12 * self.reach_bytes


# float32 is what JAX makes of it by default: TF32 on NVIDIA from Ampere on, one
# pass of bfloat16 on TPUs.
DEVICES = {
  device.name: device
  for device in (
    Device("v100", {"float32": 15.7}, 0.9, "NVIDIA V100 data sheet, SXM2"),
    Device(
      "a100",
      {"bfloat16": 312, "float32": 156},
      2.039,
      "NVIDIA A100 data sheet, SXM4 80 GB",
    ),
    Device(
      "h100",
      {"bfloat16": 989, "float32": 494},
      3.35,
      "NVIDIA H100 data sheet, SXM5, without sparsity",
    ),
    Device(
      "h200",
      {"bfloat16": 989, "float32": 494},
      4.8,
      "NVIDIA H200 data sheet, SXM, without sparsity",
    ),
    Device(
      "tpu-v5e",
      {"bfloat16": 197, "float32": 197},
      0.819,
      "Google Cloud documentation, TPU v5e",
    ),
    Device(
      "tpu-v5p",
      {"bfloat16": 459, "float32": 459},
      2.765,
      "Google Cloud documentation, TPU v5p",
    ),
    Device(
      "tpu-v6e",
      {"bfloat16": 918, "float32": 918},
      1.638,
      "Google Cloud documentation, TPU v6e",
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Operation:
  """What is bound by one thing: its arithmetic or its bytes.

  Attributes:
    name: for people.
    flops: multiplications and additions.
    inside: of them those not with padding.
    num_bytes: read and written.
  """

  name: str
  flops: float
  inside: float
  num_bytes: float


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of the step, of one device."""

  name: str
  operations: tuple[Operation, ...]


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a phase on a device.

  Attributes:
    flops, inside, num_bytes: sums over the operations.
    arithmetic_s: of the operations whose arithmetic takes longer.
    memory_s: of those whose bytes do.
  """

  flops: float
  inside: float
  num_bytes: float
  arithmetic_s: float
  memory_s: float

  @property
  def seconds(self) -> float:
    return self.arithmetic_s + self.memory_s


def cost(phases: Sequence[Phase], device: Device, dtype: str) -> Cost:
  """Of phases one after another; raises ConfigError as `Device.rate`."""
  rate, byte_rate = device.rate(dtype), device.byte_rate
  operations = [o for phase in phases for o in phase.operations]
  arithmetic_s = memory_s = 0.0
  for operation in operations:
    arithmetic = operation.flops / rate
    memory = operation.num_bytes / byte_rate
    if arithmetic > memory:
      arithmetic_s += arithmetic
    else:
      memory_s += memory
  return Cost(
    sum(o.flops for o in operations),
    sum(o.inside for o in operations),
    sum(o.num_bytes for o in operations),
    arithmetic_s,
    memory_s,
  )


@dataclasses.dataclass(frozen=True)
class Layer:
  """A convolution or a batch norm, for one image.

  Attributes:
    name: of the module.
    in_size, out_size: values.
    flops, inside: as in `Operation`, 0 of a norm.
    parameters: of the kernel, 0 of a norm.
    of_images: whether its input needs no gradient.
    in_block: whether it belongs to a residual block.
  """

  name: str
  in_size: int
  out_size: int
  flops: int = 0
  inside: int = 0
  parameters: int = 0
  of_images: bool = False
  in_block: bool = False

  @property
  def is_norm(self) -> bool:
    return self.flops == 0


def _taps_inside(size: int, out: int, layer: layers.Conv) -> int:
  """Pairs of output and kernel element along an axis that see no padding."""
  padding = layer.dilation * (layer.kernel_size - 1) // 2
  position = (
    np.arange(out)[:, None] * layer.stride
    + np.arange(layer.kernel_size) * layer.dilation
    - padding
  )
  return int(((position >= 0) & (position < size)).sum())


@dataclasses.dataclass(frozen=True)
class Network:
  """What a network consists of.

  Attributes:
    layers: convolutions and norms, in order.
    outputs: shapes and types for one image.
    num_parameters: of all modules.
  """

  layers: tuple[Layer, ...]
  outputs: Any
  num_parameters: int


def describe(model: nn.Module, size: tuple[int, int]) -> Network:
  """Traces a network; computes nothing.

  Args:
    model: a module of [b, h, w, 3] images with a keyword `train`.
    size: height and width of the images.
  """
  found, blocks = [], []

  def record(call, args, kwargs, context):
    module = context.module
    is_block = isinstance(module, resnet.Block)
    blocks.extend([module] * is_block)
    y = call(*args, **kwargs)
    if is_block:
      blocks.pop()
    if context.method_name != "__call__":
      return y
    name = "/".join(module.path)
    if isinstance(module, layers.BatchNorm):
      found.append(Layer(name, y.size, y.size, in_block=bool(blocks)))
    elif isinstance(module, layers.Conv):
      x = args[0]
      per_tap = 2 * x.shape[3] * y.shape[3]
      taps = math.prod(
        _taps_inside(x.shape[axis], y.shape[axis], module) for axis in (1, 2)
      )
      found.append(
        Layer(
          name,
          x.size,
          y.size,
          flops=per_tap * y.shape[1] * y.shape[2] * module.kernel_size**2,
          inside=per_tap * taps,
          parameters=x.shape[3] * y.shape[3] * module.kernel_size**2,
          of_images=x.shape[1:] == (*size, 3),
          in_block=bool(blocks),
        )
      )
    return y

  with nn.intercept_methods(record):
    # Initialising is the one forward pass that takes a single image.
    outputs, variables = jax.eval_shape(
      lambda images: model.init_with_output(
        jax.random.key(0), images, train=False
      ),
      jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),
    )
  parameters = jax.tree.leaves(variables["params"])
  return Network(tuple(found), outputs, sum(x.size for x in parameters))


def forward(
  found: Sequence[Layer], images: int, itemsize: int, *, train: bool
) -> tuple[Operation, ...]:
  """One pass of the network over some images; see the module's docstring."""
  operations = []
  for layer in found:
    if not layer.is_norm:
      moved = images * (layer.in_size + layer.out_size) * itemsize
      operations.append(
        Operation(
          layer.name,
          images * layer.flops,
          images * layer.inside,
          moved + layer.parameters * _FLOAT,
        )
      )
    elif train:
      moved = _NORM_FORWARD * images * layer.out_size * itemsize
      operations.append(Operation(layer.name, 0, 0, moved))
  return tuple(operations)


def backward(
  found: Sequence[Layer], images: int, itemsize: int
) -> tuple[Operation, ...]:
  """The gradients of a train-mode pass with respect to all parameters."""
  operations = []
  for layer in found:
    if layer.is_norm:
      moved = _NORM_BACKWARD * images * layer.out_size * itemsize
      operations.append(Operation(layer.name, 0, 0, moved))
      continue
    # Input and kernel: each reads the gradient of the output, and the other.
    moved = images * (layer.in_size + layer.out_size) * itemsize
    for what in ("kernel",) if layer.of_images else ("input", "kernel"):
      operations.append(
        Operation(
          f"{layer.name}: gradient of the {what}",
          images * layer.flops,
          images * layer.inside,
          moved + layer.parameters * _FLOAT,
        )
      )
  return tuple(operations)


def _outside_network(
  config: ml_collections.ConfigDict,
  *,
  num_classes: int,
  num_l: int,
  num_u: int,
  grid: tuple[int, int],
  aux_size: int,
  itemsize: int,
  bank_share: float,
) -> tuple[Operation, ...]:
  """All but the network and the optimiser, for a device's images.

  Full-resolution logits are never written: they are made again from those of
  the grid wherever they are needed. Labels and masks are bytes.
  """
  crop = math.prod(config.input.crop_size)
  cells = math.prod(grid)
  scores = cells * num_classes * _FLOAT
  width = config.model.rep_features
  operations = []

  def add(name: str, num_bytes: float, flops: float = 0) -> None:
    operations.append(Operation(name, flops, flops, num_bytes))

  # Its logits read and the gradient written, on the grid, beside the labels.
  add("supervised loss", num_l * (2 * scores + crop))
  if aux_size:
    add("auxiliary loss", num_l * (2 * aux_size * _FLOAT + crop))
  if config.method == "supervised":
    add("images", 3 * crop * num_l * (1 + itemsize))
    return tuple(operations)

  # Clean and mixed; the mix reads a partner too.
  add(
    "images and mixing",
    3 * crop * (num_l * (1 + itemsize) + num_u * (3 + 2 * itemsize)),
  )
  if config.strong.photometric > 0:
    add("photometric", 3 * crop * num_u * (2 + itemsize))
  add("pseudo labels and their mix", num_u * (scores + crop * (1 + 3)))
  # Written, read for the thresholds, read for the masks.
  add("entropies and thresholds", num_u * (scores + crop * (3 * _FLOAT + 4)))
  add("unsupervised loss", num_u * (2 * scores + crop))

  # The bank: a device that has a share of it compares its own anchors alone.
  images = num_l + num_u
  contrastive, bank = config.contrastive, config.memory_bank
  capacities = bank_capacities(config, num_classes)
  key_bytes = width * jnp.dtype(bank.dtype).itemsize
  keys = bank.max_keys_per_step or min(images * cells, max(capacities))
  anchors = num_classes * contrastive.num_anchors
  negatives = anchors * contrastive.num_negatives * bank_share
  reps = images * cells * width * _FLOAT
  masks = 2 * images * cells * num_classes
  add("ranks and masks of the grid", images * scores + 2 * masks)
  add("prototypes", reps, 2 * images * cells * num_classes * width)
  add("keys that enter", 2 * num_classes * keys * key_bytes * bank_share)
  add("anchors and the gradient of the representations", reps)
  add("negatives, forward", negatives * key_bytes, 2 * negatives * width)
  add("negatives, backward", negatives * key_bytes, 2 * negatives * width)
  return tuple(operations)


def step_phases(
  config: ml_collections.ConfigDict,
  network: Network,
  *,
  num_classes: int,
  num_l: int,
  num_u: int,
  bank_share: float = 1.0,
) -> list[Phase]:
  """The phases of a training step, in order, of one device.

  Args:
    config: complete; for method 'u2pl' the semi-supervised step.
    network: of the config.
    num_classes: k.
    num_l, num_u: labelled and unlabelled images of the device; num_u 0 for
      method 'supervised'.
    bank_share: of the memory bank that the device has.
  """
  found, aux = network.layers, network.outputs.aux_logits
  itemsize = jnp.dtype(config.model.dtype).itemsize
  images = num_l + num_u
  phases = {}
  if config.method == "u2pl":
    read = [x for x in found if not x.name.startswith(_UNREAD_OF_CLEAN)]
    phases["teacher, clean images"] = forward(
      read, num_u, itemsize, train=False
    )
    phases["teacher, strong view"] = forward(
      found, images, itemsize, train=True
    )
  # What the backward pass computes a second time: the blocks, and of several
  # micro-batches everything.
  again = [x for x in found if x.in_block and config.model.remat]
  if config.batch.microbatches > 1:
    again += found
  phases |= {
    "student, forward": forward(found, images, itemsize, train=True),
    "student, backward": backward(found, images, itemsize)
    + forward(again, images, itemsize, train=True),
    "outside the network": _outside_network(
      config,
      num_classes=num_classes,
      num_l=num_l,
      num_u=num_u,
      grid=network.outputs.logits.shape[1:3],
      aux_size=0 if aux is None else aux.size,
      itemsize=itemsize,
      bank_share=bank_share,
    ),
    # Reads gradient, parameter, momentum and teacher; writes the last three.
    "optimiser and average": (
      Operation("update", 0, 0, _UPDATE * network.num_parameters * _FLOAT),
    ),
  }
  return [Phase(name, operations) for name, operations in phases.items()]


def count(
  config: ml_collections.ConfigDict, *, num_classes: int, num_devices: int
) -> list[Phase]:
  """`step_phases` of one of the devices that share the config's batch.

  Raises:
    ConfigError: the config cannot work.
  """
  check_config(config, num_classes=num_classes, num_devices=num_devices)
  is_semi = config.method == "u2pl"
  return step_phases(
    config,
    describe(
      build_lib.make_model(config, num_classes), tuple(config.input.crop_size)
    ),
    num_classes=num_classes,
    num_l=config.batch.labelled // num_devices,
    num_u=config.batch.unlabelled // num_devices if is_semi else 0,
    bank_share=1 / num_devices if splits_bank(config) else 1.0,
  )


def find_device(name: str) -> Device:
  """By its name; raises ConfigError, which lists all."""
  if name not in DEVICES:
    raise ConfigError(
      f"--device={name} is unknown: choose one of {', '.join(DEVICES)}"
    )
  return DEVICES[name]


def floor(
  config: ml_collections.ConfigDict,
  *,
  num_classes: int,
  device: Device,
  num_devices: int,
) -> dict[str, Any]:
  """The floor of a config's step on one of the devices that share its batch.

  Returns:
    JSON-ready: 'phases' and their sum 'step', each with tflop, tflop_inside,
    gigabytes, ms, arithmetic_ms and memory_ms, and what they are of.

  Raises:
    ConfigError: the config cannot work, or not on this device.
  """
  phases = count(config, num_classes=num_classes, num_devices=num_devices)

  def row(parts: Sequence[Phase]) -> dict[str, float]:
    total = cost(parts, device, config.model.dtype)
    return {
      "tflop": total.flops / 1e12,
      "tflop_inside": total.inside / 1e12,
      "gigabytes": total.num_bytes / 1e9,
      "ms": 1e3 * total.seconds,
      "arithmetic_ms": 1e3 * total.arithmetic_s,
      "memory_ms": 1e3 * total.memory_s,
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


def table(result: dict[str, Any]) -> str:
  """`floor` as text, 80 columns wide."""
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
