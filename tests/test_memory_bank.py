import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from u2pl_jax import memory_bank


@settings(deadline=None, max_examples=30)
@given(
  st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    min_size=1,
    max_size=8,
  )
)
def test_queues_are_deques(counts_per_step):
  """Wrap-around, more keys than capacity, empty classes, own capacities."""
  capacities = (5, 3, 7)
  bank = memory_bank.create(capacities, 2)
  reference = [collections.deque(maxlen=c) for c in capacities]
  number = 0
  for counts in counts_per_step:
    new = np.full((3, 9, 2), -1.0, np.float32)
    for c, count in enumerate(counts):
      for j in range(count):
        number += 1
        new[c, j] = number, -number
        reference[c].append((number, -number))
    bank = memory_bank.enqueue(
      bank, jnp.asarray(new), jnp.asarray(counts, jnp.int32)
    )
    for c, queue in enumerate(reference):
      expected = np.asarray(queue, np.float32).reshape(-1, 2)
      np.testing.assert_array_equal(memory_bank.queue(bank, c), expected)


def test_sample_takes_from_the_oldest():
  bank = memory_bank.create((3, 2), 1)
  new = jnp.asarray([[[1.0], [2], [3], [4]], [[9], [0], [0], [0]]])
  bank = memory_bank.enqueue(bank, new, jnp.asarray([4, 1], jnp.int32))
  slots = memory_bank.sample_slots(
    bank, jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 3]], jnp.uint32)
  )
  keys = bank.keys[slots]
  # Class 0 holds 2, 3, 4 (1 was pushed out); class 1 holds 9 alone.
  assert keys[..., 0].tolist() == [[2, 3, 4, 2], [9, 9, 9, 9]]


def test_sampling_is_uniform():
  bank = memory_bank.create((8,), 1)
  bank = memory_bank.enqueue(
    bank, jnp.arange(5.0).reshape(1, 5, 1), jnp.asarray([5], jnp.int32)
  )
  bits = jax.random.bits(jax.random.key(0), (1, 50_000), jnp.uint32)
  keys = np.asarray(bank.keys[memory_bank.sample_slots(bank, bits)])
  values = keys.astype(int).ravel()
  # Standard deviation of a share: sqrt(.2 * .8 / 50000) = 0.0018.
  np.testing.assert_allclose(np.bincount(values) / 50_000, 0.2, atol=0.008)


def test_published_bank_size():
  bank = jax.eval_shape(
    lambda: memory_bank.create((50_000,) + (30_000,) * 20, 256)
  )
  assert bank.keys.shape == (650_000, 256)
  assert bank.keys.size * 4 == 665_600_000
  assert bank.offsets[:3].tolist() == [0, 50_000, 80_000]


def test_enqueue_keeps_the_dtype_of_the_bank():
  bank = memory_bank.create((4,), 2, jnp.bfloat16)
  bank = memory_bank.enqueue(
    bank, jnp.full((1, 1, 2), 1.5), jnp.asarray([1], jnp.int32)
  )
  assert bank.keys.dtype == jnp.bfloat16
  assert memory_bank.queue(bank, 0).tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("num_parts", [1, 2, 4, 8, 16])
def test_parts_change_nothing(num_parts):
  """Queues of 5, 3, 1 and 7 slots, wherever the parts are cut."""
  capacities = (5, 3, 1, 7)
  rng = np.random.default_rng(0)
  bank = whole = memory_bank.create(capacities, 3)
  for counts in ([3, 0, 1, 9], [4, 2, 0, 0], [9, 9, 9, 1]):
    new = jnp.asarray(rng.standard_normal((4, 9, 3)), jnp.float32)
    counts = jnp.asarray(counts, jnp.int32)
    bank = memory_bank.enqueue(bank, new, counts, num_parts=num_parts)
    whole = memory_bank.enqueue(whole, new, counts)
  np.testing.assert_array_equal(bank.keys, whole.keys)
  bits = jnp.asarray(rng.integers(0, 2**32, (4, 6, 20)), jnp.uint32)
  slots = memory_bank.sample_slots(bank, bits)
  # All slots are drawn, those of the first and the last row too.
  assert set(np.ravel(slots)) == set(range(16))
  anchors = rng.standard_normal((4, 6, 3)).astype(np.float32)
  anchors /= np.linalg.norm(anchors, axis=-1, keepdims=True)
  keys = np.asarray(bank.keys)
  keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)

  def cosines(anchors):
    return memory_bank.negative_cosines(
      bank, slots, anchors, num_parts=num_parts
    )

  np.testing.assert_allclose(
    cosines(anchors),
    np.einsum("kad,kamd->kam", anchors, keys[np.asarray(slots)]),
    atol=1e-6,
  )
  # The gradient of a sum of cosines is the sum of the keys.
  np.testing.assert_allclose(
    jax.grad(lambda a: cosines(a).sum())(jnp.asarray(anchors)),
    keys[np.asarray(slots)].sum(2),
    atol=1e-5,
  )
