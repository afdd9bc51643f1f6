"""Shapes of what the compiled steps take, and the memory that they need, for
tools that compile or lower them and run nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from u2pl_jax import sharding

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
