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


def labelled_first(whole: Array, num_labelled: int) -> Array:
  """The halves of `whole` laid end to end: for the eye, and for tests."""
  return jnp.concatenate(separate(whole, num_labelled))
