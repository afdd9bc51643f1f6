"""Class-wise first-in-first-out queues of negatives, as a pytree.

U2PL section 3.3. All queues lie one after another in a single array, because
their capacities differ (50 000 for class 0, 30 000 for the others) and padding
to the largest would cost 60 % more memory.
"""

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np

from u2pl_jax.selection import uniform_ranks

Array = jax.Array


@flax.struct.dataclass
class MemoryBank:
  """Ring buffers of representations.

  Attributes:
    keys: [sum of capacities, d]; the queue of class c is a contiguous part.
    count: [k] int32, filled slots of each queue.
    cursor: [k] int32, the slot that is written next.
    capacities: the static sizes of the queues.
  """

  keys: Array
  count: Array
  cursor: Array
  capacities: tuple[int, ...] = flax.struct.field(pytree_node=False)

  @property
  def offsets(self) -> np.ndarray:
    """[k] int32, where each queue begins in `keys`."""
    return np.cumsum([0, *self.capacities[:-1]]).astype(np.int32)


def create(
  capacities: Sequence[int], width: int, dtype: jnp.dtype = jnp.float32
) -> MemoryBank:
  """An empty bank for representations of `width` numbers."""
  num_classes = len(capacities)
  return MemoryBank(
    keys=jnp.zeros((sum(capacities), width), dtype),
    count=jnp.zeros(num_classes, jnp.int32),
    cursor=jnp.zeros(num_classes, jnp.int32),
    capacities=tuple(int(c) for c in capacities),
  )


def enqueue(bank: MemoryBank, new_keys: Array, num_new: Array) -> MemoryBank:
  """Appends keys to every queue, pushing out the oldest.

  Args:
    bank: the bank; its buffer is updated in place if it is donated.
    new_keys: [k, m, d], oldest first.
    num_new: [k] int32, how many of the m rows of each class are real. More
      than the capacity is fine: the last `capacity` of them stay.

  Returns:
    The new bank.
  """
  capacity = jnp.asarray(bank.capacities, jnp.int32)[:, None]
  row = jnp.arange(new_keys.shape[1], dtype=jnp.int32)
  num_new = num_new[:, None]
  written = (row < num_new) & (row >= num_new - capacity)
  slot = bank.offsets[:, None] + (bank.cursor[:, None] + row) % capacity
  # Rows that are not real go past the end, where the scatter drops them.
  slot = jnp.where(written, slot, bank.keys.shape[0])
  keys = bank.keys.at[slot.ravel()].set(
    new_keys.reshape(-1, new_keys.shape[-1]).astype(bank.keys.dtype),
    mode="drop",
  )
  return bank.replace(
    keys=keys,
    count=jnp.minimum(bank.count + num_new[:, 0], capacity[:, 0]),
    cursor=(bank.cursor + num_new[:, 0]) % capacity[:, 0],
  )


def sample(bank: MemoryBank, bits: Array) -> Array:
  """Draws keys uniformly with replacement from every queue.

  Args:
    bank: the bank.
    bits: [k, ...] uint32; `bits % count` is the age rank, 0 the oldest.

  Returns:
    [k, ..., d]; rows of an empty queue are meaningless.
  """
  shape = (-1,) + (1,) * (bits.ndim - 1)
  capacity = jnp.asarray(bank.capacities, jnp.int32).reshape(shape)
  count, cursor = bank.count.reshape(shape), bank.cursor.reshape(shape)
  age_rank = uniform_ranks(bits, count)
  slot = (cursor - count + age_rank) % capacity + bank.offsets.reshape(shape)
  return bank.keys[slot]


def queue(bank: MemoryBank, class_id: int) -> np.ndarray:
  """One queue on the host, oldest first: [count, d]. For tests and reports."""
  count, cursor = int(bank.count[class_id]), int(bank.cursor[class_id])
  capacity = bank.capacities[class_id]
  slots = (cursor - count + np.arange(count)) % capacity
  return np.asarray(bank.keys)[bank.offsets[class_id] + slots]
