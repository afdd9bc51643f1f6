"""CRC-32 of a state, whatever devices and processes hold its parts."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from u2pl_jax import distributed


def checksum(names: Sequence[str], leaves: Sequence[Any]) -> int:
  """CRC-32 over all names and bytes, in the order of the names.

  About a second a gigabyte. Every process must call it, with its arrays.

  Args:
    names: of the leaves.
    leaves: arrays; one that no process has whole is split along its first axis.

  Returns:
    The same number on every process, and for any number of them.
  """
  crc = 0
  # Sorted: whoever reads the files alone knows the names but not their order.
  for name, leaf in sorted(zip(names, leaves, strict=True), key=_first):
    crc = zlib.crc32(name.encode(), crc)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      if not leaf.is_fully_replicated:
        crc = _of_split(leaf, crc)
        continue
    crc = _of_array(leaf, crc)
  return crc


def _of_array(array: Any, crc: int) -> int:
  array = np.ascontiguousarray(np.asarray(array))
  return zlib.crc32(array.reshape(-1).view(np.uint8), crc)


def _of_split(array: jax.Array, crc: int) -> int:
  """Each process reads its own rows; their checksums are put together."""
  own = np.asarray(
    [
      (shard.index[0].start or 0, shard.data.nbytes, _of_array(shard.data, 0))
      for shard in array.addressable_shards
    ],
    np.int64,
  )
  parts = distributed.gather(own).reshape(-1, 3)
  for _, num_bytes, part in np.unique(parts, axis=0).tolist():
    crc = combine(crc, part, num_bytes)
  return crc


def combine(first: int, second: int, num_bytes: int) -> int:
  """CRC-32 of two texts one behind the other, as zlib's crc32_combine.

  Args:
    first: CRC-32 of the first text.
    second: of the second one.
    num_bytes: length of the second one.

  Returns:
    What `zlib.crc32(a + b)` is.
  """
  # Appending a zero bit is a linear map of the 32 bits; so is any number of
  # them, which squaring reaches in a few steps.
  operator = [0xEDB88320, *(1 << bit for bit in range(31))]
  exponent = 8 * num_bytes
  while exponent:
    if exponent & 1:
      first = _apply(operator, first)
    operator = [_apply(operator, column) for column in operator]
    exponent >>= 1
  return first ^ second


def _apply(operator: Sequence[int], vector: int) -> int:
  """The product of a matrix of bits, by columns, and a vector of bits."""
  result = 0
  for bit, column in enumerate(operator):
    if vector >> bit & 1:
      result ^= column
  return result


def _first(pair: tuple) -> Any:
  return pair[0]
