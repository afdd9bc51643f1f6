"""Step time on many devices, from counts alone: a prediction (docs/scaling.md).

A step takes its floor (`roofline`) divided by the share of it that a program
reaches, plus every exchange of the compiled step, one after another.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import ml_collections
from matplotlib import rc_context
from matplotlib.figure import Figure

from u2pl_jax import build as build_lib
from u2pl_jax import roofline
from u2pl_jax.config_checks import ConfigError, check_config, splits_bank

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GRADIENTS = "gradients"
NORMS_FORWARD, NORMS_BACKWARD = "norms, forward", "norms, backward"
OTHER = "all else"
# Bytes below which a gradient is that of a norm, which the rest of the backward
# pass waits for.
_LARGE = 2**18


@dataclasses.dataclass(frozen=True)
class Gpus:
  """Nodes of GPUs; rates are reachable, of one GPU and one direction.

  A reduction goes through the node, then between nodes, then back; a small one
  along a tree. Latencies are those with which NCCL 2.19 itself predicts its
  times (src/graph/tuning.cc, protocol LL).

  Attributes:
    inside, between: bytes a second within a node and between nodes.
    hop_between: seconds from node to node.
    source: of the rates.
    node: GPUs of a node.
    start, hop_inside: seconds of any operation, and from GPU to GPU.
  """

  inside: float
  between: float
  hop_between: float
  source: str
  node: int = 8
  start: float = 6.8e-6
  hop_inside: float = 0.6e-6

  def _shape(self, devices: int) -> tuple[int, int]:
    return min(devices, self.node), max(1, devices // self.node)

  def latency(self, devices: int) -> float:
    """Of a reduction without bytes."""
    within, nodes = self._shape(devices)
    # On several nodes NCCL takes 1.8 times as long within each.
    hop = self.hop_inside * (1.8 if nodes > 1 else 1.0)
    tree = (within - 1) * hop + math.log2(nodes) * self.hop_between
    return self.start + 2 * tree

  def seconds_per_byte(self, devices: int) -> float:
    """Of an all-reduce beyond its latency."""
    within, nodes = self._shape(devices)
    share = 2 * (nodes - 1) / nodes / within
    return 2 * (within - 1) / within / self.inside + share / self.between

  def neighbour_seconds(self, devices: int, num_bytes: float) -> float:
    """From every device to the next one."""
    if devices > self.node:
      return self.start + self.hop_between + num_bytes / self.between
    return self.start + self.hop_inside + num_bytes / self.inside


@dataclasses.dataclass(frozen=True)
class Torus:
  """TPU chips in a square (or 2:1) grid, a ring along each side.

  Only sides of 16 close to a ring (TPU v5e and v6e); the others are lines: half
  the rate, twice the way.

  Attributes:
    out: reachable bytes a second out of a chip, all its links together.
    source: of that.
    start, hop: seconds; assumed.
  """

  out: float
  source: str
  start: float = 2e-6
  hop: float = 1e-6

  def _sides(self, devices: int) -> tuple[int, int]:
    long = 2 ** math.ceil(math.log2(devices) / 2)
    return long, devices // long

  def latency(self, devices: int) -> float:
    """Of a reduction without bytes."""
    way = sum(n // 2 if n >= 16 else n - 1 for n in self._sides(devices))
    return self.start + 2 * way * self.hop

  def seconds_per_byte(self, devices: int) -> float:
    """Of an all-reduce beyond its latency."""
    sides = self._sides(devices)
    # Links of a side of one chip are not used.
    used = sum((0.5 if n >= 16 else 0.25) for n in sides if n > 1)
    return 2 * (devices - 1) / devices / (self.out * used)

  def neighbour_seconds(self, devices: int, num_bytes: float) -> float:
    """From every device to the next one."""
    return self.start + self.hop + num_bytes / (self.out / 4)


# Of the links 0.8 within a node (NCCL on an H100 reaches 360 of 450 GB/s) and
# 0.9 between nodes; of TPUs 0.9.
_GIGA = 1e9
_NVLINK = {"v100": 150, "a100": 300, "h100": 450, "h200": 450}
# Of a GPU, in Gbit/s: one port for two, then one for each.
_INFINIBAND = {"v100": 50, "a100": 200, "h100": 400, "h200": 400}
_ETHERNET = 100 / 8  # One port of 100 Gbit/s for the eight GPUs of a node.
_ICI = {"tpu-v5e": 200, "tpu-v5p": 600, "tpu-v6e": 400}


def make_network(device: str, network: str) -> Gpus | Torus:
  """The network of a device of `roofline.DEVICES`."""
  if device in _ICI:
    return Torus(
      0.9 * _ICI[device] * _GIGA,
      f"Google Cloud documentation: {2 * _ICI[device]} GB/s a chip, both ways",
    )
  link, gbit, hop = _NVLINK[device], _INFINIBAND[device], 5e-6
  if network == "ethernet":
    gbit, hop = _ETHERNET, 25e-6
  return Gpus(
    0.8 * link * _GIGA,
    0.9 * gbit / 8 * _GIGA,
    hop,
    f"NVLink {link} GB/s, {network} {gbit:g} Gbit/s a GPU, each way",
  )


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One kind of message of a step.

  Attributes:
    kind: 'all-reduce', ...
    purpose: GRADIENTS, NORMS_FORWARD, NORMS_BACKWARD or OTHER.
    times: a step.
    num_bytes: each.
  """

  kind: str
  purpose: str
  times: float
  num_bytes: float


def read_exchanges(step: dict[str, Any]) -> list[Exchange]:
  """What a compiled step exchanges, an entry an instruction."""
  instructions = collections.defaultdict(list)
  for entry in step["collectives"]:
    instructions[entry["instruction"]].append(entry)
  found = []
  for entries in instructions.values():
    times = entries[0]["count"]
    num_bytes = sum(e["num_bytes"] for e in entries) / times
    largest = max(entries, key=lambda e: e["num_bytes"])["purpose"]
    purpose = OTHER
    if largest == "gradients":
      purpose = GRADIENTS if num_bytes >= _LARGE else NORMS_BACKWARD
    elif largest == "batch statistics":
      purpose = NORMS_FORWARD
    found.append(Exchange(entries[0]["kind"], purpose, times, num_bytes))
  return found


# What could be changed, one after the other: the exchanges of norms that would
# be left, forward and backward, and whether the gradients travel meanwhile.
CHANGES = (
  ("as compiled", 1, 1, False),
  ("gradients sent during the backward pass", 1, 1, True),
  ("+ one exchange a norm and pass, not two", 1 / 2, 1 / 2, True),
  ("+ both networks' norms forward in one", 1 / 4, 1 / 2, True),
  ("+ none (running statistics)", 0, 0, True),
)


def with_norms(
  exchanges: Sequence[Exchange], forward: float, backward: float
) -> list[Exchange]:
  """The same with other shares of the norms' exchanges."""
  shares = {NORMS_FORWARD: forward, NORMS_BACKWARD: backward}
  return [
    dataclasses.replace(e, times=e.times * shares.get(e.purpose, 1))
    for e in exchanges
  ]


@dataclasses.dataclass(frozen=True)
class Exchanged:
  """Seconds of a step's exchanges.

  Attributes:
    waiting: latencies of all but the gradients.
    moving: their bytes.
    gradients: all of theirs.
  """

  waiting: float
  moving: float
  gradients: float

  @property
  def seconds(self) -> float:
    return self.waiting + self.moving + self.gradients


def exchange(
  exchanges: Sequence[Exchange],
  network: Gpus | Torus,
  devices: int,
  *,
  images: float = 1.0,
) -> Exchanged:
  """All exchanges of a step, one after another.

  Args:
    exchanges: of the step.
    network: between the devices.
    devices: 1 or more; of one nothing travels.
    images: of a device, relative to the compiled step: what goes from a device
      to its neighbour grows with them, reductions do not.
  """
  if devices == 1:
    return Exchanged(0.0, 0.0, 0.0)
  latency, per_byte = (
    network.latency(devices),
    network.seconds_per_byte(devices),
  )
  waiting = moving = gradients = 0.0
  for item in exchanges:
    if item.kind == "collective-permute":
      waiting += item.times * network.neighbour_seconds(devices, 0)
      moving += item.times * (
        network.neighbour_seconds(devices, item.num_bytes * images)
        - network.neighbour_seconds(devices, 0)
      )
      continue
    # Half of an all-reduce, which is a reduce-scatter and an all-gather.
    way = 1.0 if item.kind == "all-reduce" else 0.5
    bytes_s = item.times * way * item.num_bytes * per_byte
    if item.purpose == GRADIENTS:
      gradients += item.times * way * latency + bytes_s
    else:
      waiting += item.times * way * latency
      moving += bytes_s
  return Exchanged(waiting, moving, gradients)


def predict(
  config: ml_collections.ConfigDict,
  step: dict[str, Any],
  *,
  num_classes: int,
  device: roofline.Device,
  network: Gpus | Torus,
  share: float,
  images: Sequence[int],
) -> dict[str, Any]:
  """The tables.

  Args:
    config: complete.
    step: of inspect_step.py, on several devices.
    num_classes: k.
    device: one of the devices.
    network: of `make_network`.
    share: of the floor's rate that computing reaches.
    images: labelled ones of a device, for weak scaling.

  Returns:
    JSON-ready: 'strong', rows of the config's batch on more and more devices,
    and 'weak', such rows by images of a device; 'exchanges' of a step by
    purpose; 'changes', rows of the most devices after each of CHANGES.

  Raises:
    ConfigError: the config cannot work, or is not that of the step.
  """
  for key, value in (
    ("config", config.name),
    ("crop_size", list(config.input.crop_size)),
    ("memory_bank", config.sharding.memory_bank),
  ):
    if step.get(key) != value:
      raise ConfigError(
        f"--step: made for {key} {step.get(key)}, not {value}: make it again"
        " with inspect_step.py and this config"
      )
  if not step["collectives"]:
    raise ConfigError("--step: made for one device: make it with --devices=8")
  check_config(config, num_classes=num_classes, num_devices=1)
  exchanges = read_exchanges(step)
  network_of_config = roofline.describe(
    build_lib.make_model(config, num_classes), tuple(config.input.crop_size)
  )
  labelled, unlabelled = config.batch.labelled, config.batch.unlabelled
  compiled_images = step["labelled"] / step["devices"]

  rates = device, config.model.dtype

  def row(devices: int, num_l: int, change=CHANGES[0]) -> dict:
    _, forward, backward, is_hidden = change
    phases = roofline.step_phases(
      config,
      network_of_config,
      num_classes=num_classes,
      num_l=num_l,
      num_u=num_l * unlabelled // labelled,
      bank_share=1 / devices if splits_bank(config) else 1.0,
    )
    compute = roofline.cost(phases, *rates).seconds / share
    sent = exchange(
      with_norms(exchanges, forward, backward),
      network,
      devices,
      images=num_l / compiled_images,
    )
    gradients = sent.gradients
    if is_hidden:
      (behind,) = [p for p in phases if p.name == "student, backward"]
      behind_s = roofline.cost([behind], *rates).seconds / share
      gradients = max(0.0, gradients - behind_s)
    seconds = compute + sent.waiting + sent.moving + gradients
    images = num_l * (labelled + unlabelled) / labelled
    return {
      "devices": devices,
      "compute_ms": 1e3 * compute,
      "waiting_ms": 1e3 * sent.waiting,
      "moving_ms": 1e3 * sent.moving,
      "gradients_ms": 1e3 * gradients,
      "step_ms": 1e3 * seconds,
      "images_per_second": devices * images / seconds,
    }

  def rows(found: list[dict]) -> list[dict]:
    for one in found:
      one["efficiency"] = one["images_per_second"] / (
        one["devices"] * found[0]["images_per_second"]
      )
    return found

  def changes(num_l: int, devices: int) -> dict[str, dict]:
    one = row(1, num_l)["images_per_second"]
    found = {change[0]: row(devices, num_l, change) for change in CHANGES}
    for after in found.values():
      after["efficiency"] = after["images_per_second"] / (devices * one)
    return found

  limit = math.gcd(labelled, unlabelled)
  times = collections.Counter()
  for item in exchanges:
    times[item.purpose] += item.times
  strong = rows([row(n, labelled // n) for n in DEVICES if limit % n == 0])
  most = strong[-1]["devices"]
  return {
    "config": config.name,
    "dtype": config.model.dtype,
    "device": device.name,
    "network": dataclasses.asdict(network),
    "share": share,
    "exchanges": dict(times.most_common()),
    "gradient_bytes": sum(
      e.times * e.num_bytes for e in exchanges if e.purpose == GRADIENTS
    ),
    "batch": [labelled, unlabelled],
    "strong": strong,
    "weak": {
      str(num_l): rows([row(n, num_l) for n in DEVICES]) for num_l in images
    },
    "changes": {
      f"{labelled // most} labelled images on each of {most} devices": changes(
        labelled // most, most
      )
    }
    | {
      f"{num_l} labelled images on each of {DEVICES[-1]} devices": changes(
        num_l, DEVICES[-1]
      )
      for num_l in images
    },
  }


_HEADER = (
  f"{'devices':>7}{'compute':>10}{'waiting':>9}{'moving':>8}{'gradients':>11}"
  f"{'step ms':>10}{'images/s':>10}{'efficiency':>12}"
)


def table(result: dict[str, Any]) -> str:
  """The prediction as text, 80 columns wide."""
  lines = [
    f"{result['config']}, {result['dtype']}, on {result['device']} at"
    f" {result['share']:.0%} of the floor's rate; a PREDICTION",
    result["network"]["source"],
    f"{sum(result['exchanges'].values())} exchanges a step:",
  ]
  lines += [f"{n:>7} {name}" for name, n in result["exchanges"].items()]
  lines.append(f"{result['gradient_bytes'] / 1e6:.0f} MB of gradients")
  batch = "+".join(map(str, result["batch"]))
  titles = [(f"{batch} images on all devices", result["strong"])]
  titles += [
    (f"{images} labelled images on each device", rows)
    for images, rows in result["weak"].items()
  ]
  for title, rows in titles:
    lines += ["", title, _HEADER]
    for row in rows:
      lines.append(
        f"{row['devices']:>7}{row['compute_ms']:>10.1f}"
        f"{row['waiting_ms']:>9.1f}{row['moving_ms']:>8.1f}"
        f"{row['gradients_ms']:>11.1f}{row['step_ms']:>10.1f}"
        f"{row['images_per_second']:>10.0f}{row['efficiency']:>12.0%}"
      )
  for title, found in result["changes"].items():
    lines += ["", f"{title}, changed:"]
    lines.append(f"{'':<43}{'waiting':>9}{'step ms':>10}{'efficiency':>12}")
    for name, row in found.items():
      lines.append(
        f"{name:<43}{row['waiting_ms']:>9.1f}{row['step_ms']:>10.1f}"
        f"{row['efficiency']:>12.0%}"
      )
  return "\n".join(lines)


def plot(result: dict[str, Any], path: str) -> None:
  """Draws efficiency by devices.

  Raises:
    OSError, ValueError: the file cannot be written, or is of no known type.
  """
  # The same numbers make the same file.
  with rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none"}):
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    curves = {f"{'+'.join(map(str, result['batch']))} in all": result["strong"]}
    curves |= {
      f"{images} labelled a device": rows
      for images, rows in result["weak"].items()
    }
    for (label, rows), style in zip(
      curves.items(), ("k--", *["-"] * len(curves)), strict=False
    ):
      axes.plot(
        [row["devices"] for row in rows],
        [100 * row["efficiency"] for row in rows],
        style,
        marker="o",
        markersize=3,
        label=label,
      )
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEVICES, [str(n) for n in DEVICES])
    axes.set_ylim(0, 105)
    axes.set_xlabel("devices")
    axes.set_ylabel("efficiency in percent (prediction)")
    axes.set_title(f"{result['config']}, {result['device']}, {result['dtype']}")
    axes.grid(alpha=0.3)
    axes.legend()
    is_svg = path.endswith(".svg")
    figure.savefig(path, metadata={"Date": None} if is_svg else None)
