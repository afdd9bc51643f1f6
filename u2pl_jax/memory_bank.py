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
_HIGHEST = jax.lax.Precision.HIGHEST


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


def enqueue(
  bank: MemoryBank, new_keys: Array, num_new: Array, *, num_parts: int = 1
) -> MemoryBank:
  """Appends keys to every queue, pushing out the oldest.

  Args:
    bank: the bank; its buffer is updated in place if it is donated.
    new_keys: [k, m, d], oldest first.
    num_new: [k] integers, how many of the m rows of each class are real. More
      than the capacity is fine: the last `capacity` of them stay.
    num_parts: equal parts of the slots that each take their own keys, see
      `negative_cosines`.

  Returns:
    The new bank.
  """
  capacity = jnp.asarray(bank.capacities, jnp.int32)[:, None]
  row = jnp.arange(new_keys.shape[1], dtype=jnp.int32)
  # Under x64 counts are int64, and the state would change its type.
  num_new = num_new.astype(jnp.int32)[:, None]
  written = (row < num_new) & (row >= num_new - capacity)
  slot = bank.offsets[:, None] + (bank.cursor[:, None] + row) % capacity
  num_slots, width = bank.keys.shape
  size = num_slots // num_parts
  new_keys = new_keys.reshape(-1, width).astype(bank.keys.dtype)

  def write(part: Array, first: Array) -> Array:
    # Rows that are not real or belong to another part go past the end, where
    # the scatter drops them.
    mine = written & (slot >= first) & (slot < first + size)
    local = jnp.where(mine, slot - first, size)
    return part.at[local.ravel()].set(new_keys, mode="drop")

  keys = jax.vmap(write)(
    bank.keys.reshape(num_parts, size, width),
    jnp.arange(num_parts, dtype=jnp.int32) * size,
  )
  return bank.replace(
    keys=keys.reshape(num_slots, width),
    count=jnp.minimum(bank.count + num_new[:, 0], capacity[:, 0]),
    cursor=(bank.cursor + num_new[:, 0]) % capacity[:, 0],
  )


def sample_slots(bank: MemoryBank, bits: Array) -> Array:
  """Draws keys uniformly with replacement from every queue.

  Args:
    bank: the bank.
    bits: [k, ...] uint32; `bits % count` is the age rank, 0 the oldest.

  Returns:
    Of the shape of `bits`, int32: rows of `bank.keys`; meaningless where the
    queue is empty.
  """
  shape = (-1,) + (1,) * (bits.ndim - 1)
  capacity = jnp.asarray(bank.capacities, jnp.int32).reshape(shape)
  count, cursor = bank.count.reshape(shape), bank.cursor.reshape(shape)
  age_rank = uniform_ranks(bits, count)
  return (cursor - count + age_rank) % capacity + bank.offsets.reshape(shape)


@jax.named_scope("cosines")
def negative_cosines(
  bank: MemoryBank, slots: Array, anchors: Array, *, num_parts: int = 1
) -> Array:
  """Cosines of each anchor with its negatives; the gradient reaches anchors.

  With several parts each compares the anchors of its own classes with its own
  slots, so that of a bank that lies on several devices not a key travels: only
  the cosines do.

  Args:
    bank: the bank.
    slots: [k, a, m] int32, from `sample_slots`.
    anchors: [k, a, d], of length 1.
    num_parts: equal parts that `bank.keys` consists of; divides the number of
      slots. No result depends on it.

  Returns:
    [k, a, m].
  """
  num_slots, width = bank.keys.shape
  size = num_slots // num_parts
  classes, holds = _classes_of_parts(bank.capacities, num_parts)
  first = jnp.arange(num_parts, dtype=jnp.int32)[:, None, None, None] * size
  local = slots[classes] - first
  mine = (local >= 0) & (local < size)
  negatives = jax.vmap(lambda part, index: part[index])(
    bank.keys.reshape(num_parts, size, width), jnp.clip(local, 0, size - 1)
  )
  negatives = jax.lax.stop_gradient(negatives).astype(anchors.dtype)
  cosines = jnp.einsum(
    "skad,skamd->skam", anchors[classes], unit(negatives), precision=_HIGHEST
  )
  cosines = jnp.where(mine, cosines, 0)
  # Back from the classes of each part to all classes, by a static table.
  index = np.maximum(holds, 0)
  by_class = jax.vmap(lambda part, row: part[row])(cosines, jnp.asarray(index))
  here = (holds >= 0)[:, :, None, None]
  return jnp.where(here, by_class, 0).sum(0)


def _classes_of_parts(
  capacities: tuple[int, ...], num_parts: int
) -> tuple[np.ndarray, np.ndarray]:
  """Which queues reach into which part of the slots.

  Returns:
    (classes [s, c] int32, the classes of each part, of which there are as many
    in every part, some perhaps without a slot in it; holds [s, k] int32, the
    index of a class in that row, -1 if it is not there).
  """
  ends = np.cumsum(capacities)
  size = int(ends[-1]) // num_parts
  begin = np.arange(num_parts) * size
  first = np.searchsorted(ends, begin, side="right")
  last = np.searchsorted(ends, begin + size - 1, side="right")
  most = int((last - first).max()) + 1
  first = np.minimum(first, len(capacities) - most)
  classes = (first[:, None] + np.arange(most)).astype(np.int32)
  holds = np.arange(len(capacities)) - first[:, None]
  return classes, np.where((holds >= 0) & (holds < most), holds, -1).astype(
    np.int32
  )


def unit(x: Array) -> Array:
  """Rows to length 1; a zero row stays zero, with zero gradient."""
  return x * inverse_length(jnp.square(x).sum(-1))[..., None]


def inverse_length(square: Array) -> Array:
  """1 / length of rows of these squared lengths, finite for zero."""
  return jax.lax.rsqrt(jnp.maximum(square, 1e-16))


def queue(bank: MemoryBank, class_id: int) -> np.ndarray:
  """One queue on the host, oldest first: [count, d]. For tests and reports."""
  count, cursor = int(bank.count[class_id]), int(bank.cursor[class_id])
  capacity = bank.capacities[class_id]
  slots = (cursor - count + np.arange(count)) % capacity
  return np.asarray(bank.keys)[bank.offsets[class_id] + slots]
