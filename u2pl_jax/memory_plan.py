"""How much memory a step will need, and which settings make it fit.

What the backward pass keeps is read off the traced network; the rest is
arithmetic on shapes. How far that is from what a compiler reports:
docs/memory.md. The command is plan.py.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
from jax.extend.core import Var

from u2pl_jax import build as build_lib
from u2pl_jax.config_checks import (
  ConfigError,
  check_config,
  legal_microbatches,
  splits_bank,
)
from u2pl_jax.models.deeplab import Outputs

_UNITS = {"": 1, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
_FLOAT = 4

# How often the largest array of a kind exists at once; from the compiler's
# reports of docs/memory.md.
_FULL_RESOLUTION_COPIES = 5
_BACKWARD_COPIES = 4
# What JAX takes of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_USABLE = 0.75


@dataclasses.dataclass(frozen=True)
class Network:
  """What a forward and backward pass of a network leaves in memory.

  Attributes:
    parameters, batch_stats: bytes of the variables.
    kept: bytes for the backward pass, of one image.
    largest: bytes of the largest single array of these.
    outputs: shapes for one image.
  """

  parameters: int
  batch_stats: int
  kept: int
  largest: int
  outputs: Outputs


def trace_network(
  config: ml_collections.ConfigDict, num_classes: int
) -> Network:
  """Traces a training pass of two images; computes nothing."""
  model = build_lib.make_model(config, num_classes)
  images = jax.ShapeDtypeStruct((2, *config.input.crop_size, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(
    functools.partial(model.init, train=False), key, images
  )

  def run(variables, images, key):
    def forward(params):
      outputs, _ = model.apply(
        {**variables, "params": params},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
      )
      return outputs

    outputs, backward = jax.vjp(forward, variables["params"])
    return backward, outputs

  closed, (_, outputs) = jax.make_jaxpr(run, return_shape=True)(
    variables, images, key
  )
  jaxpr = closed.jaxpr
  # A value that several gradients need is kept once, a constant not at all.
  num_kept = len(jaxpr.outvars) - len(jax.tree.leaves(outputs))
  kept = {v for v in jaxpr.outvars[:num_kept] if isinstance(v, Var)}
  for equation in jaxpr.eqns:
    if equation.primitive.name == "broadcast_in_dim":
      kept -= set(equation.outvars)
  sizes = [
    math.prod(v.aval.shape) * v.aval.dtype.itemsize
    for v in kept - set(jaxpr.invars)
    # Weights in another type and statistics do not grow with the batch.
    if len(v.aval.shape) == 4 and v.aval.shape[0] == 2
  ]
  return Network(
    parameters=_num_bytes(variables["params"]),
    batch_stats=_num_bytes(variables["batch_stats"]),
    kept=sum(sizes) // 2,
    largest=max(sizes) // 2,
    outputs=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), outputs
    ),
  )


def _num_bytes(tree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Bytes on one device at the moment of a step that needs most.

  Attributes:
    parts: by what takes them, largest first.
    moment: which moment that is.
  """

  parts: dict[str, int]
  moment: str

  @property
  def peak(self) -> int:
    return sum(self.parts.values())


def predict(
  config: ml_collections.ConfigDict,
  *,
  num_classes: int,
  num_devices: int,
  network: Network,
) -> Prediction:
  """Predicts the memory of the largest step of a config.

  Args:
    config: complete and legal.
    num_classes: k.
    num_devices: over which the batch is split.
    network: of a config with the same network and crop size.
  """
  is_semi = config.method == "u2pl"
  num_l = config.batch.labelled // num_devices
  num_u = config.batch.unlabelled // num_devices if is_semi else 0
  number, micro = num_l + num_u, config.batch.microbatches
  height, width = config.input.crop_size
  pixels = height * width
  logits, reps, aux = network.outputs
  cells = logits.shape[1] * logits.shape[2]

  def of_one(*arrays) -> int:
    return sum(math.prod(a.shape) * _FLOAT for a in arrays if a is not None)

  bank = _num_bytes(
    jax.eval_shape(lambda: build_lib.make_memory_bank(config, num_classes))
  )
  if splits_bank(config):
    bank //= num_devices
  always = {
    # Of the optimiser a momentum for every parameter.
    "student, teacher, optimiser": 3 * network.parameters
    + 2 * network.batch_stats,
    "memory bank": bank,
    "images as bytes and as numbers": (number + num_u) * pixels * 3 * _FLOAT
    + number * pixels * 4,
    "outputs of the networks": number
    * (of_one(logits, reps, aux) + is_semi * of_one(logits, reps)),
  }
  # Of the half that is larger, and of the auxiliary head.
  full = max(num_l, num_u) * pixels * num_classes * _FLOAT
  losses = {
    "logits and entropies at full resolution": _FULL_RESOLUTION_COPIES * full
  }
  if is_semi:
    contrastive = config.contrastive
    negatives = (
      num_classes * contrastive.num_anchors * contrastive.num_negatives
    )
    losses["contrastive loss"] = (
      # Masks, their running counts, and the gradient that the anchors leave.
      number * cells * num_classes * 2 * _FLOAT
      + number * of_one(reps)
      # Keys as they lie in the bank and as numbers.
      + 2 * negatives * reps.shape[3] * _FLOAT
    )
  kept = {"kept for the backward pass": number // micro * network.kept}
  backward = {
    "gradients of the parameters": network.parameters,
    "gradients of the outputs": number * of_one(logits, reps, aux),
    "working space of the backward pass": number
    // micro
    * network.largest
    * _BACKWARD_COPIES,
  }
  moments = {
    "losses": losses if micro > 1 else kept | losses,
    "backward pass": kept | backward,
  }
  moment = max(moments, key=lambda name: sum(moments[name].values()))
  parts = always | moments[moment]
  return Prediction(
    dict(sorted(parts.items(), key=lambda item: -item[1])), moment
  )


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way to run a config, with the same global batch.

  Attributes:
    overrides: of the config, by flattened key.
    num_devices: over which the batch is split.
    prediction: for one of them.
    work: passes of the network, relative to the config as it is.
  """

  overrides: dict[str, object]
  num_devices: int
  prediction: Prediction
  work: float


def settings(
  config: ml_collections.ConfigDict, *, num_classes: int, num_devices: int
) -> Iterator[Setting]:
  """Yields the config as it is, then what saves memory, cheapest first.

  Args:
    config: complete and legal.
    num_classes: k.
    num_devices: that there are; the last settings have more.
  """

  @functools.cache
  def network_of(dtype: str, remat: bool) -> Network:
    return trace_network(
      _changed(config, {"model.dtype": dtype, "model.remat": remat}),
      num_classes,
    )

  def setting(overrides: dict[str, object], devices: int) -> Setting:
    changed = _changed(config, overrides)
    prediction = predict(
      changed,
      num_classes=num_classes,
      num_devices=devices,
      network=network_of(changed.model.dtype, changed.model.remat),
    )
    return Setting(
      overrides, devices, prediction, _passes(changed) / _passes(config)
    )

  yield setting({}, num_devices)
  saved = {}
  for key, value in (("model.dtype", "bfloat16"), ("model.remat", True)):
    before = dict(saved)
    if config[key.split(".")[0]][key.split(".")[1]] != value:
      saved[key] = value
      yield setting(dict(saved), num_devices)

  def micro(devices: int) -> list[int]:
    return [
      number
      for number in legal_microbatches(config, devices)
      if number > config.batch.microbatches
    ]

  # Instead of remat, which with them costs a second recomputation.
  for number in micro(num_devices):
    yield setting(before | {"batch.microbatches": number}, num_devices)
  if micro(num_devices):
    saved["batch.microbatches"] = micro(num_devices)[-1]
    if "model.remat" in saved:
      yield setting(dict(saved), num_devices)
  if config.method == "u2pl" and config.memory_bank.dtype == "float32":
    saved["memory_bank.dtype"] = "bfloat16"
    yield setting(dict(saved), num_devices)
  for factor in (2, 4, 8):
    devices = factor * num_devices
    saved.pop("batch.microbatches", None)
    if micro(devices):
      saved["batch.microbatches"] = micro(devices)[-1]
    try:
      check_config(
        _changed(config, saved), num_classes=num_classes, num_devices=devices
      )
    except ConfigError:
      return  # The batch does not divide over so many.
    yield setting(dict(saved), devices)


def _changed(
  config: ml_collections.ConfigDict, overrides: dict[str, object]
) -> ml_collections.ConfigDict:
  changed = config.copy_and_resolve_references()
  changed.update_from_flattened_dict(overrides)
  return changed


def _passes(config: ml_collections.ConfigDict) -> float:
  """Forward passes over the batch; a backward pass counts as two."""
  # A clean pass of one half and a second one of the teacher.
  teacher = 1.5 if config.method == "u2pl" else 0.0
  recomputed = float(config.batch.microbatches > 1)
  # Of the encoder alone: what scripts/measure_costs.py counts.
  recomputed += 0.54 * config.model.remat
  return teacher + 3 + recomputed


def parse_memory(text: str) -> int:
  """'24GiB' or '11GB' -> bytes.

  Raises:
    ConfigError: neither a number nor such a unit.
  """
  match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
  if not match or match[2] not in _UNITS or float(match[1]) == 0:
    raise ConfigError(
      f"--device-memory={text}: needs a number and one of"
      f" {', '.join(filter(None, _UNITS))}, such as 24GiB"
    )
  return int(float(match[1]) * _UNITS[match[2]])


def _flags_of(setting: Setting) -> str:
  texts = [
    f"--config.{key}={value}" for key, value in setting.overrides.items()
  ]
  return " ".join(texts) or "(as it is)"


def report(
  config: ml_collections.ConfigDict, found: list[Setting], memory: int
) -> str:
  """The plan as text."""
  batch, crop = config.batch, tuple(config.input.crop_size)
  first = found[0]
  limit = _USABLE * memory
  lines = [
    f"{config.name}: {batch.labelled} + {batch.unlabelled} images of"
    f" {crop[0]}x{crop[1]} on {first.num_devices} device(s) of"
    f" {_gib(memory)}, of which {_gib(limit)} count as usable",
    f"at its peak ({first.prediction.moment}) a step needs on each device:",
  ]
  lines += [
    f"  {name:<46}{_gib(size):>12}"
    for name, size in first.prediction.parts.items()
  ]
  lines += [
    f"  {'in all':<46}{_gib(first.prediction.peak):>12}",
    "settings with the same global batch, cheapest first:",
    f"  {'peak':>10}  {'fits':<5}{'devices':>7}{'work':>7}  settings",
  ]
  for setting in found:
    fits = setting.prediction.peak <= limit
    lines.append(
      f"  {_gib(setting.prediction.peak):>10}  {'yes' if fits else 'no':<5}"
      f"{setting.num_devices:>7}{setting.work:>7.2f}  {_flags_of(setting)}"
    )
  best = first_that_fits(found, memory)
  if best is None:
    smallest = min(found, key=lambda s: s.prediction.peak)
    lines.append(
      f"nothing fits: the least is {_gib(smallest.prediction.peak)}; choose a"
      " smaller config.input.crop_size, batch, config.model.backbone or"
      " memory bank, or a larger device"
    )
  elif best is first:
    lines.append("the config fits as it is")
  else:
    more = ""
    if best.num_devices != first.num_devices:
      more = f" on {best.num_devices} devices"
    lines.append(f"the first that fits{more}: {_flags_of(best)}")
  return "\n".join(lines)


def first_that_fits(found: list[Setting], memory: int) -> Setting | None:
  """The cheapest setting within the usable part of `memory` bytes."""
  return next((s for s in found if s.prediction.peak <= _USABLE * memory), None)


def _gib(num_bytes: float) -> str:
  return f"{num_bytes / 2**30:.2f} GiB"


def as_json(
  config: ml_collections.ConfigDict, found: list[Setting], memory: int
) -> dict:
  """The plan as data: all sizes in bytes."""
  best = first_that_fits(found, memory)
  return {
    "config": config.name,
    "device_memory": memory,
    "usable_memory": int(_USABLE * memory),
    "settings": [
      {
        "overrides": setting.overrides,
        "devices": setting.num_devices,
        "work": setting.work,
        "peak_bytes": setting.prediction.peak,
        "moment": setting.prediction.moment,
        "parts": setting.prediction.parts,
        "fits": setting.prediction.peak <= _USABLE * memory,
      }
      for setting in found
    ],
    "proposal": None if best is None else found.index(best),
  }
