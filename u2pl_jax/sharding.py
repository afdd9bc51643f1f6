"""Where arrays live: the only file that builds a Mesh or a NamedSharding.

One axis, 'data', over all devices. Batches are split along it, the state is
replicated (the memory bank only if it is told so); a step sees global arrays,
so its means and batch statistics are over the global batch whatever the number
of devices.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over `devices`, all devices by default, process by process.

  The rows of a batch that a process holds are then neighbours, and those of
  process 0 are the first: what its input stream reads.
  """
  devices = jax.devices() if devices is None else devices
  # Not jax.make_mesh, which may order the chips of a pod by their wires.
  devices = sorted(
    devices, key=lambda device: (device.process_index, device.id)
  )
  # Explicit axes, the default, reject gathers over sharded pixels.
  return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def local_mesh(mesh: Mesh) -> Mesh:
  """The part of a mesh whose devices are this process's."""
  return create_mesh(mesh.local_devices)


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


def put(tree: Any, shardings: Any) -> Any:
  """Arrays that every process has whole -> global arrays.

  Args:
    tree: arrays on the host or on devices; the same values in every process.
    shardings: of each, or one for all.

  Returns:
    The same structure; an array that lies right already is taken as it is.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  def put_one(value: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(value, jax.Array) and value.sharding == sharding:
      return value
    # jax.device_put would send everything round to compare it.
    value = np.asarray(value)
    return jax.make_array_from_callback(
      value.shape, sharding, lambda part: value[part]
    )

  return jax.tree.map(put_one, tree, shardings)


def put_locally(mesh: Mesh, tree: Any) -> Any:
  """Replicated arrays -> the same on the devices of `local_mesh(mesh)` alone.

  What is computed from them involves no other process.
  """
  sharding = replicated(local_mesh(mesh))

  def put_one(value: Any) -> jax.Array:
    if isinstance(value, jax.Array):
      value = value.addressable_data(0)
    return jax.device_put(value, sharding)

  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  return jax.tree.map(put_one, tree)


def local_rows(array: jax.Array) -> np.ndarray:
  """This process's rows of an array that is split along its first axis."""
  shards = {
    shard.index[0].start or 0: shard.data for shard in array.addressable_shards
  }
  return np.concatenate([np.asarray(shards[row]) for row in sorted(shards)])
