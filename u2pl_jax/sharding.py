"""Where arrays live: the only file that builds a Mesh or a NamedSharding.

One axis, 'data', over all devices. Batches are split along it, the state is
replicated (the memory bank only if it is told so); a step sees global arrays,
so its means and batch statistics are over the global batch whatever the number
of devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def create_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh over `devices`, all devices by default."""
  devices = jax.devices() if devices is None else devices
  # Explicit axes, the default, reject gathers over sharded pixels.
  return jax.make_mesh(
    (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds everything."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
  """The first axis is split over the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def state_shardings(mesh: Mesh, state: Any, *, split_bank: bool) -> Any:
  """A sharding for each leaf of a `TrainState`, arrays or shapes.

  Args:
    mesh: from `create_mesh`.
    state: everything in it is replicated, except
    split_bank: the slots of `state.memory_bank.keys`, if this is True.

  Returns:
    The same structure.
  """
  shardings = jax.tree.map(lambda _: replicated(mesh), state)
  if not split_bank:
    return shardings
  # The queues lie one after another along the first axis.
  bank = shardings.memory_bank.replace(keys=batch_sharded(mesh))
  return shardings.replace(memory_bank=bank)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict:
  """This process's rows of a global batch -> global arrays on the devices."""
  sharding = batch_sharded(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, value)
    for name, value in batch.items()
  }


def put_whole_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict:
  """A global batch that every process has whole -> arrays on the devices."""
  sharding = batch_sharded(mesh)
  return {
    name: jax.make_array_from_callback(
      value.shape, sharding, lambda part, value=value: value[part]
    )
    for name, value in batch.items()
  }
