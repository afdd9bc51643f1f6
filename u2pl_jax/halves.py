"""The labelled and the unlabelled images as one batch.

The networks see both halves at once. Laid end to end, a device's share of the
whole would not be its shares of the halves, and images, outputs and gradients
would have to travel between devices. So the halves are interleaved: as many
groups as their sizes allow (the greatest common divisor), each of labelled and
then unlabelled images. A number of devices that divides both halves divides
the groups too, so each device holds whole groups; and since the order depends
on the batch alone, so does what is drawn by position (dropout).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def interleave(labelled: Array, unlabelled: Array) -> Array:
  """[bl, ...] and [bu, ...] -> [bl + bu, ...], no image leaves its device."""
  groups = math.gcd(len(labelled), len(unlabelled))
  whole = jnp.concatenate(
    [x.reshape(groups, -1, *x.shape[1:]) for x in (labelled, unlabelled)], 1
  )
  return whole.reshape(-1, *whole.shape[2:])


def separate(whole: Array, num_labelled: int) -> tuple[Array, Array]:
  """The inverse of `interleave`.

  Args:
    whole: [b, ...].
    num_labelled: bl, of the b images.

  Returns:
    ([bl, ...], [b - bl, ...]).
  """
  groups = math.gcd(num_labelled, len(whole) - num_labelled)
  grouped = whole.reshape(groups, -1, *whole.shape[1:])
  cut = num_labelled // groups
  return tuple(
    half.reshape(-1, *whole.shape[1:])
    for half in (grouped[:, :cut], grouped[:, cut:])
  )


def places(num_labelled: int, num_unlabelled: int) -> np.ndarray:
  """[b] int32: where image i lies in the whole, labelled images first."""
  groups = math.gcd(num_labelled, num_unlabelled)
  whole = np.arange(num_labelled + num_unlabelled, dtype=np.int32)
  whole = whole.reshape(groups, -1)
  cut = num_labelled // groups
  return np.concatenate([whole[:, :cut].ravel(), whole[:, cut:].ravel()])


def num_groups(num_labelled: int, num_unlabelled: int) -> int:
  """Groups of the whole that `interleave` makes of halves of these sizes."""
  return math.gcd(num_labelled, num_unlabelled)


def micro_batches(whole: Array, groups: int, number: int) -> Array:
  """Cuts a batch into equal micro-batches; no image leaves its device.

  Micro-batch i has the groups g with g % number == i, so that each device has
  its share of each of them, and what is in one does not depend on the devices.

  Args:
    whole: [b, ...].
    groups: into which the batch is divided, see `num_groups`; of images of one
      kind each is a group.
    number: of micro-batches; with the number of devices it divides the groups.

  Returns:
    [number, b // number, ...], each in the order of the batch.
  """
  grouped = whole.reshape(
    groups // number, number, len(whole) // groups, *whole.shape[1:]
  )
  return jnp.moveaxis(grouped, 1, 0).reshape(number, -1, *whole.shape[1:])


def whole_batch(parts: Array, groups: int) -> Array:
  """The inverse of `micro_batches`: [number, b // number, ...] -> [b, ...]."""
  number, size, *rest = parts.shape
  grouped = parts.reshape(
    number, groups // number, number * size // groups, *rest
  )
  return jnp.moveaxis(grouped, 0, 1).reshape(-1, *rest)


def labelled_first(whole: Array, num_labelled: int) -> Array:
  """The halves of `whole` laid end to end: for the eye, and for tests."""
  return jnp.concatenate(separate(whole, num_labelled))
