"""Selection from masked sets of static shape: order statistics and members.

The sets of this method are ragged (entropies of valid pixels, anchor pixels of
a class), so a set is a mask, and taking from it is arithmetic on counts. The
one leaf that other leaves import.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def _ordered_bits(values: Array) -> Array:
  """Floats -> unsigned integers of the same order (and back by the inverse)."""
  unsigned = {4: jnp.uint32, 8: jnp.uint64}[values.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(values, unsigned)
  sign = jnp.asarray(1, unsigned) << (bits.dtype.itemsize * 8 - 1)
  # Negative floats order backwards, and below the positive ones.
  return jnp.where(bits & sign, ~bits, bits | sign)


def _float_from_ordered_bits(bits: Array, dtype: jnp.dtype) -> Array:
  sign = jnp.asarray(1, bits.dtype) << (bits.dtype.itemsize * 8 - 1)
  return jax.lax.bitcast_convert_type(
    jnp.where(bits & sign, bits ^ sign, ~bits), dtype
  )


def order_statistics(values: Array, mask: Array, ranks: Array) -> Array:
  """Exact order statistics of the values where `mask` is True.

  Bisection on the bits of the floats: as many counting passes as a float has
  bits, no sort and, on several devices, no gather of the values (a count is a
  sum). Ties need no care, since a count sees values, not positions.

  Args:
    values: any shape, float32 or float64, no NaN under the mask.
    mask: bool, same shape.
    ranks: [m] int32, 0-based ascending ranks, below the number of True.

  Returns:
    [m], the values at these ranks; meaningless where a rank does not exist.
  """
  bits = _ordered_bits(values.ravel())
  mask = mask.ravel()
  num_bits = bits.dtype.itemsize * 8
  one = jnp.asarray(1, bits.dtype)

  def fix_one_bit(i, found):
    bit = one << (num_bits - 1 - i).astype(bits.dtype)
    # The largest number whose leading bits are `found` followed by a 0.
    ceiling = found + (bit - one)
    below = (bits <= ceiling[:, None]) & mask
    enough = below.sum(-1, dtype=jnp.int32) > ranks
    return jnp.where(enough, found, found + bit)

  found = jax.lax.fori_loop(
    0, num_bits, fix_one_bit, jnp.zeros(ranks.shape, bits.dtype)
  )
  return _float_from_ordered_bits(found, values.dtype)


def masked_percentiles(values: Array, mask: Array, percents: Array) -> Array:
  """numpy.percentile (method 'linear') of the values where `mask` is True.

  The two neighbouring order statistics are exact. The position between them is
  percent / 100 * (n - 1) in the type of `values`, so with float32 and millions
  of values it is off by up to n * 6e-8 ranks, as any float32 percent is.

  Args:
    values: any shape, float32 or float64.
    mask: bool, same shape.
    percents: [m] in [0, 100].

  Returns:
    [m]; zeros if the mask has no True.
  """
  count = mask.sum(dtype=jnp.int32)
  last = jnp.maximum(count - 1, 0)
  position = percents.astype(values.dtype) / 100 * last.astype(values.dtype)
  low = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, last)
  fraction = position - low.astype(values.dtype)
  below = order_statistics(values, mask, low)

  # The next one up: equal if `below` repeats, else the smallest above it.
  flat, flat_mask = values.ravel(), mask.ravel()
  not_above = ((flat <= below[:, None]) & flat_mask).sum(-1, dtype=jnp.int32)
  higher = jnp.where((flat > below[:, None]) & flat_mask, flat, jnp.inf).min(-1)
  above = jnp.where((not_above > low + 1) | (low >= last), below, higher)
  # numpy interpolates from the nearer end.
  step = above - below
  result = jnp.where(
    fraction < 0.5, below + step * fraction, above - step * (1 - fraction)
  )
  return jnp.where(count > 0, result, 0)


def nth_members(mask: Array, ranks: Array) -> Array:
  """Positions of chosen members of several sets.

  Args:
    mask: [k, p] bool, one set a row.
    ranks: [k, m] int32, 0-based rank of the member in its row's order.

  Returns:
    [k, m] int32 positions in [0, p); p - 1 where the rank does not exist.
  """
  running = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
  find = jax.vmap(lambda row, rank: jnp.searchsorted(row, rank + 1))
  return jnp.minimum(find(running, ranks), mask.shape[1] - 1)


def uniform_ranks(bits: Array, counts: Array) -> Array:
  """Draws with replacement: ranks uniform below `counts`, from random bits.

  The remainder of 32 random bits, whose bias is below counts / 2**32. A rank
  given instead of bits comes back as it is, which is how a recorded draw is
  replayed.

  Args:
    bits: uint32, any shape.
    counts: int32, broadcastable to it.

  Returns:
    int32 ranks; 0 where the count is 0.
  """
  counts = jnp.maximum(counts, 1).astype(jnp.uint32)
  return (bits % counts).astype(jnp.int32)


def subset_ranks(counts: Array, sizes: Array, bits: Array) -> Array:
  """Random subsets without replacement, in O(size) instead of O(count).

  The count ranks, rotated by a random offset, are cut into `size` strata of
  (almost) equal length and one rank is drawn in each. Ranks are distinct and,
  by the rotation, each is taken with probability size / count exactly;
  neighbours are taken together less often than in an unrestricted subset.

  Args:
    counts: [k] int32, members of each set.
    sizes: [k] int32 <= counts, members to take.
    bits: [k, m + 1] uint32 with m >= max(sizes).

  Returns:
    [k, m] int32; entry j is a rank for j < size. If everything is taken
    (size == count), rank j is j: the order of the set is kept.
  """
  offset = uniform_ranks(bits[:, :1], counts[:, None])
  j = jnp.arange(bits.shape[1] - 1, dtype=jnp.int32)
  sizes_safe = jnp.maximum(sizes, 1)[:, None]
  length, longer = counts[:, None] // sizes_safe, counts[:, None] % sizes_safe
  # The first `longer` strata have one more rank; no product that overflows.
  begin = j * length + jnp.minimum(j, longer)
  width = length + (j < longer)
  rank = begin + uniform_ranks(bits[:, 1:], width)
  rotated = (rank + offset) % jnp.maximum(counts, 1)[:, None]
  return jnp.where((sizes == counts)[:, None], j, rotated)
