"""Shapes of what the compiled steps take, and the memory that they need, for
tools that compile or lower them and run nothing."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from input_pipeline.dataset_config import load_info
from u2pl_jax import build as build_lib
from u2pl_jax import sharding
from u2pl_jax.config_checks import ConfigError
from u2pl_jax.train_state import TrainState

Batch = dict[str, jax.ShapeDtypeStruct]


def _batch(
  mesh: Mesh, size: int, shape: tuple[int, int], names: tuple[str, ...]
) -> Batch:
  shapes = {
    "image": ((size, *shape, 3), jnp.uint8),
    "label": ((size, *shape), jnp.uint8),
    "valid_box": ((size, 4), jnp.int32),
    "scaled_box": ((size, 4), jnp.int32),
    "is_real": ((size,), jnp.bool_),
    "index": ((size,), jnp.int32),
  }
  split = sharding.batch_sharded(mesh)
  return {
    name: jax.ShapeDtypeStruct(*shapes[name], sharding=split) for name in names
  }


def training_batches(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> tuple[Batch, Batch]:
  """The labelled and the unlabelled half, as `Program`'s steps take them."""
  crop = tuple(config.input.crop_size)
  return (
    _batch(mesh, config.batch.labelled, crop, ("image", "label", "valid_box")),
    _batch(mesh, config.batch.unlabelled, crop, ("image", "valid_box")),
  )


def eval_batch(
  config: ml_collections.ConfigDict, mesh: Mesh, shape: tuple[int, int]
) -> Batch:
  """A batch of the evaluation, of images in a static shape (h, w)."""
  names = ("image", "label", "valid_box", "scaled_box", "is_real", "index")
  return _batch(mesh, config.eval.batch, shape, names)


def lower_semi_supervised(
  config: ml_collections.ConfigDict, devices: Sequence[jax.Device]
) -> tuple[jax.stages.Lowered, build_lib.Program, TrainState]:
  """The semi-supervised step of a config, traced for some devices.

  Args:
    config: complete.
    devices: share the batch; those of a described topology will do.

  Returns:
    (lowered step, its program, the shapes of its state).

  Raises:
    ConfigError, DataError: the config cannot work.
  """
  if config.method != "u2pl":
    raise ConfigError(
      f"config.method={config.method!r} has no semi-supervised step: choose"
      " 'u2pl'"
    )
  info = load_info(config.dataset)
  program = build_lib.build(
    config,
    # The number of images only sets the schedule.
    build_lib.DataSpec(info.num_classes, info.mean, info.std, 1000),
    devices=devices,
  )
  state = build_lib.abstract_state(config, program)
  halves = training_batches(config, program.mesh)
  return program.semi_supervised_step.lower(state, *halves), program, state


def peak_bytes(compiled: Any) -> int:
  """What the compiler lays out for a step on one device, arguments included.

  Args:
    compiled: a step, from `.lower(...).compile()`.
  """
  memory = compiled.memory_analysis()
  return (
    memory.temp_size_in_bytes
    + memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
