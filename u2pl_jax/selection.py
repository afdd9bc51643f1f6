"""Selection from masked sets of static shape: order statistics and members.

The sets of this method are ragged (entropies of valid pixels, anchor pixels of
a class), so a set is a mask, and taking from it is arithmetic on counts. The
one leaf that other leaves import.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


@jax.named_scope("thresholds")
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


@jax.named_scope("thresholds")
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


class Members(NamedTuple):
  """Where chosen members of several sets lie, as each part of a batch sees it.

  Attributes:
    index: [s, k, m] int32, pixel within the part.
    here: [s, k, m] bool, whether the member lies in this part; it lies in one
      of the parts, or in none if there is no such member.
    image: [k, m] int32, the image in the order of the ranks.
  """

  index: Array
  here: Array
  image: Array


def nth_members(
  mask: Array,
  ranks: Array,
  *,
  places: np.ndarray | None = None,
  num_parts: int = 1,
) -> Members:
  """Finds members of several sets by rank, without gathering the sets.

  A part of the batch looks among its own pixels alone; all that the parts have
  to know of each other is how many members each image has. With the parts on
  devices of their own, k * b numbers travel.

  Args:
    mask: [b, p, k] bool, the pixels of each image that belong to each set.
    ranks: [k, m] int32, 0-based rank of the wanted member in its set, image
      after image and pixel after pixel.
    places: [b] int, where in the batch the image is that comes i-th in the
      order of the ranks; None where they are in this order already.
    num_parts: s, equal parts of the batch to be searched each on its own. No
      result depends on it.

  Returns:
    `Members`, for `take_members` and `member_positions`.
  """
  batch, _, num_sets = mask.shape
  if places is None:
    places = np.arange(batch, dtype=np.int32)
  counts = mask.sum(1, dtype=jnp.int32)
  in_order = counts[places]
  ends = jnp.cumsum(in_order, 0, dtype=jnp.int32)
  find = jax.vmap(functools.partial(jnp.searchsorted, side="right"))
  image = find(ends.T, ranks).astype(jnp.int32)
  exists = (ranks >= 0) & (image < batch)
  image = jnp.minimum(image, batch - 1)
  rank_in_image = ranks - jnp.take_along_axis((ends - in_order).T, image, 1)

  # The same member by its rank within its part.
  place = jnp.asarray(places)[image]
  by_part = counts.reshape(num_parts, -1, num_sets)
  starts = (jnp.cumsum(by_part, 1, dtype=jnp.int32) - by_part).reshape(
    batch, num_sets
  )
  rank_in_part = rank_in_image + jnp.take_along_axis(starts.T, place, 1)
  part = jnp.arange(num_parts, dtype=jnp.int32)[:, None, None]
  here = exists & (place // (batch // num_parts) == part)

  pixels = mask.reshape(num_parts, -1, num_sets).transpose(0, 2, 1)
  running = jnp.cumsum(pixels, axis=2, dtype=jnp.int32)
  index = jax.vmap(jax.vmap(jnp.searchsorted))(
    running, jnp.where(here, rank_in_part, 0) + 1
  )
  index = jnp.minimum(index, pixels.shape[2] - 1).astype(jnp.int32)
  return Members(index, here, image)


def take_members(values: Array, members: Members) -> Array:
  """Rows of the members.

  Args:
    values: [b, p, d], of all pixels, in the order of the mask.
    members: from `nth_members`.

  Returns:
    [k, m, d]; zeros where there is no such member. The sum over the parts, of
    which all but one are zero, is exact in any type.
  """
  num_parts = members.index.shape[0]
  parts = values.reshape(num_parts, -1, values.shape[-1])
  rows = jax.vmap(lambda part, index: part[index])(parts, members.index)
  return jnp.where(members.here[..., None], rows, 0).sum(0, dtype=values.dtype)


def member_positions(members: Members, pixels_per_image: int) -> Array:
  """[k, m] int32, image * p + pixel in the order of the ranks; -1 for none."""
  pixel = members.index % pixels_per_image
  position = members.image * pixels_per_image + pixel
  return jnp.where(members.here, position + 1, 0).sum(0) - 1


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
