"""Contrastive learning with unreliable pixels (U2PL section 3.3).

Anchors are the student's representations of reliable pixels of a class, the
positive is the mean of the teacher's over the same pixels, the negatives come
from the class's queue, fed with pixels that are surely not of this class:
labelled pixels of another class that the teacher still ranks it high, and
unlabelled unreliable pixels that rank it in the middle.

Everything is indexed by class id and batched over the classes; `p` runs over
all pixels of the feature grid, labelled images first. The quirks of the
published code are keywords (docs/quirks.md).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from u2pl_jax import memory_bank as memory_bank_lib
from u2pl_jax.memory_bank import MemoryBank, inverse_length, unit
from u2pl_jax.selection import (
  member_positions,
  nth_members,
  subset_ranks,
  take_members,
  uniform_ranks,
)

Array = jax.Array
_HIGHEST = jax.lax.Precision.HIGHEST


def class_membership(
  labels: Array,
  *,
  num_classes: int,
  ignore_label: int,
  batch_onehot: bool = False,
) -> Array:
  """One-hot labels of one half of the batch (labelled or unlabelled).

  Args:
    labels: [b, h, w] int.
    num_classes: k.
    ignore_label: pixels without class.
    batch_onehot: quirk. The published scatter runs over the wrong axis: image
      0 belongs, at each position, to the classes of *all* images there (their
      ignored pixels count as class 0, positions it ignores itself as none) and
      the other images to no class.

  Returns:
    [b, h, w, k] bool.
  """
  valid = (labels != ignore_label)[..., None]
  classes = jnp.arange(num_classes, dtype=labels.dtype)
  membership = (labels[..., None] == classes) & valid
  if batch_onehot:
    ignored_as_0 = jnp.where(valid[..., 0], labels, 0)
    union = (ignored_as_0[..., None] == classes).any(0) & valid[0]
    membership = jnp.zeros_like(membership).at[0].set(union)
  return membership


def class_ranks(probs: Array) -> Array:
  """Position of each class in the descending order of probabilities.

  Counts the larger probabilities instead of sorting; of equal ones the lower
  class id comes first.

  Args:
    probs: [..., k].

  Returns:
    [..., k] int32, 0 for the most probable class.
  """
  k = probs.shape[-1]
  other, own = probs[..., None, :], probs[..., :, None]
  earlier = jnp.arange(k)[None, :] < jnp.arange(k)[:, None]
  ahead = (other > own) | ((other == own) & earlier)
  return ahead.sum(-1, dtype=jnp.int32)


def negative_mask(
  membership: Array,
  valid_mask: Array,
  unreliable_mask: Array,
  probs: Array,
  *,
  is_labelled: np.ndarray,
  low_rank: int,
  high_rank: int,
  max_probability: float,
  own_label_negatives: bool = False,
) -> Array:
  """Which pixel is a negative of which class (equations 12 to 16).

  Args:
    membership: [b, hf, wf, k] bool, classes of each pixel.
    valid_mask: [b, hf, wf] bool, pixels with a label or pseudo label.
    unreliable_mask: [b, hf, wf] bool, read for the unlabelled images.
    probs: [b, hf, wf, k], the teacher's.
    is_labelled: [b] bool, the images of the labelled half.
    low_rank: labelled pixels qualify below it, unlabelled from it on.
    high_rank: unlabelled pixels qualify below it.
    max_probability: the class's probability must be below it.
    own_label_negatives: quirk. The published mask also demands that the pixel
      carry the class itself: never true of labelled pixels, and of unlabelled
      ones only where the teacher's two passes disagree.

  Returns:
    [b, hf, wf, k] bool.
  """
  ranks = class_ranks(probs)
  labelled = ~membership & valid_mask[..., None] & (ranks < low_rank)
  middle = (ranks >= low_rank) & (ranks < high_rank)
  unlabelled = middle & unreliable_mask[..., None]
  by_image = jnp.asarray(is_labelled)[:, None, None, None]
  mask = jnp.where(by_image, labelled, unlabelled) & (probs < max_probability)
  return mask & membership if own_label_negatives else mask


@jax.named_scope("prototypes")
def prototypes(reps: Array, member_mask: Array) -> Array:
  """Mean representation of each class.

  Args:
    reps: [p, d].
    member_mask: [p, k] bool.

  Returns:
    [k, d]; zeros for a class without pixel.
  """
  weight = member_mask.astype(reps.dtype)
  total = jnp.einsum("pk,pd->kd", weight, reps, precision=_HIGHEST)
  count = member_mask.sum(0, dtype=jnp.int32)
  return total / jnp.maximum(count, 1)[:, None].astype(reps.dtype)


def info_nce(positive: Array, negative: Array, temperature: float) -> Array:
  """InfoNCE of cosine similarities (equation 10), mean over the anchors.

  Args:
    positive: [k, a], of each anchor with the prototype of its class.
    negative: [k, a, m].
    temperature: divides the cosines.

  Returns:
    [k].
  """
  logits = jnp.concatenate([positive[..., None], negative], -1) / temperature
  return (jax.nn.logsumexp(logits, -1) - logits[..., 0]).mean(-1)


class _Contractions(NamedTuple):
  """How the negatives of an anchor, [m, d], are multiplied and added up."""

  squares: Callable[[Array], Array]
  dots: Callable[[Array, Array], Array]
  weighted: Callable[[Array, Array], Array]


_PRODUCTS = _Contractions(
  squares=lambda rows: jnp.einsum("md,md->m", rows, rows, precision=_HIGHEST),
  dots=lambda rows, x: jnp.matmul(rows, x, precision=_HIGHEST),
  weighted=lambda weights, rows: jnp.matmul(weights, rows, precision=_HIGHEST),
)
_SUMS = _Contractions(
  squares=lambda rows: jnp.square(rows).sum(-1),
  dots=lambda rows, x: (rows * x).sum(-1),
  weighted=lambda weights, rows: (weights[:, None] * rows).sum(0),
)
# Anchors whose negatives a CPU holds in its caches: 32 x 50 keys of 256 floats
# are 1.6 MB.
_ANCHORS_AT_ONCE = 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sampled_info_nce(
  keys: Array,
  slots: Array,
  anchors: Array,
  positives: Array,
  temperature: float,
) -> Array:
  """`info_nce` of anchors with keys of the bank; the gradient reaches anchors.

  The negatives are by far the most that the losses read: 275 MB at the recipe
  of the paper. They are read once: the gradient is found beside the loss, while
  the negatives of an anchor are at hand, and they are never stored.

  Args:
    keys: [q, d] of the bank, in its type.
    slots: [k, a, m] int32, rows of `keys`, in bounds.
    anchors: [k, a, d], of length 1.
    positives: [k, d], of length 1.
    temperature: divides the cosines.

  Returns:
    [k].
  """
  return _losses_and_slopes(keys, slots, anchors, positives, temperature)[0]


def _losses_and_slopes(
  keys: Array,
  slots: Array,
  anchors: Array,
  positives: Array,
  temperature: float,
) -> tuple[Array, Array]:
  """([k] losses, [k, a, d] the gradient of each by its anchors)."""
  num_classes, num_anchors, width = anchors.shape

  def one(anchor, positive, rows, contract):
    negatives = keys.at[rows].get(mode="promise_in_bounds")
    negatives = negatives.astype(anchor.dtype)
    scale = inverse_length(contract.squares(negatives))
    negative = contract.dots(negatives, anchor) * scale
    logits = jnp.append(negative, (anchor * positive).sum()) / temperature
    total = jax.nn.logsumexp(logits)
    share = jnp.exp(logits - total) / temperature
    pull = (share[-1] - 1 / temperature) * positive
    push = contract.weighted(share[:-1] * scale, negatives)
    return total - logits[-1], pull + push

  def by_anchor(batch_size, contract):
    def run(slots, anchors, positives):
      return jax.lax.map(
        lambda x: one(*x, contract),
        (
          anchors.reshape(-1, width),
          jnp.repeat(positives, num_anchors, axis=0),
          slots.reshape(-1, slots.shape[-1]),
        ),
        batch_size=batch_size,
      )

    return run

  losses, slopes = jax.lax.platform_dependent(
    slots,
    anchors,
    positives,
    # A CPU multiplies what lies in its caches. Elsewhere matrix products would
    # need the negatives in memory, which are never stored so.
    cpu=by_anchor(_ANCHORS_AT_ONCE, _PRODUCTS),
    default=by_anchor(num_classes * num_anchors, _SUMS),
  )
  losses = losses.reshape(num_classes, num_anchors).mean(-1)
  return losses, slopes.reshape(anchors.shape) / num_anchors


def _sampled_info_nce_forward(keys, slots, anchors, positives, temperature):
  losses, slopes = _losses_and_slopes(
    keys, slots, anchors, positives, temperature
  )
  return losses, slopes


def _sampled_info_nce_backward(temperature, slopes, cotangent):
  del temperature
  return None, None, cotangent[:, None, None] * slopes, None


sampled_info_nce.defvjp(_sampled_info_nce_forward, _sampled_info_nce_backward)


def floor_and_chance(num_negatives: int, temperature: float) -> Array:
  """[2]: the smallest possible InfoNCE, and its value for equal similarities.

  The floor has cosine 1 to the positive and -1 to every negative.
  """
  floor = jnp.log1p(num_negatives * jnp.exp(-2 / temperature))
  return jnp.stack([floor, jnp.log1p(float(num_negatives))])


def select_keys(
  count_l: Array,
  count_u: Array,
  *,
  num_pixels: int,
  capacities: tuple[int, ...],
  max_keys: int | None,
  bits: Array | None,
) -> tuple[Array, Array]:
  """Which of the negatives of a step enter each queue.

  The paper's rule yields more keys in a step than a queue holds, so at most
  `max_keys` of them enter, a random subset, half from labelled and half from
  unlabelled pixels (what one side lacks the other fills).

  Args:
    count_l, count_u: [k] int32, negatives of each class among the labelled and
      the unlabelled pixels.
    num_pixels: of the feature grids, which no count exceeds.
    capacities: of the queues.
    max_keys: per class and step; None takes all, of which the last `capacity`
      enter in raster order: exactly what an unbounded FIFO would hold.
    bits: [k, max_keys + 2] uint32; None with max_keys None.

  Returns:
    (ranks [k, m] int32 among the negatives of the class, labelled images first,
    in the order of entry, count [k] int32 of those that are meant).
  """
  count = count_l + count_u
  capacity = jnp.asarray(capacities, jnp.int32)
  if max_keys is None:
    size = jnp.minimum(count, capacity)
    row = jnp.arange(min(num_pixels, max(capacities)), dtype=jnp.int32)
    return (count - size)[:, None] + row, size

  limit = jnp.minimum(max_keys, capacity)
  size_l = jnp.minimum(count_l, jnp.maximum(limit // 2, limit - count_u))
  size_u = jnp.minimum(count_u, limit - size_l)
  row = jnp.arange(max_keys, dtype=jnp.int32)
  rank_l = subset_ranks(count_l, size_l, bits[:, : max_keys + 1])
  # The unlabelled draw reuses the bits of its own rows, with its own rotation.
  bits_u = jnp.concatenate([bits[:, -1:], bits[:, 1 : max_keys + 1]], 1)
  rank_u = count_l[:, None] + subset_ranks(count_u, size_u, bits_u)
  after = row - size_l[:, None]
  rank = jnp.where(
    after < 0,
    rank_l,
    jnp.take_along_axis(rank_u, jnp.maximum(after, 0), 1),
  )
  return rank, size_l + size_u


class Contrast(NamedTuple):
  """Loss and what shows whether it is alive.

  Attributes:
    loss: scalar.
    memory_bank: with the new keys.
    present: [k] bool, classes with a reliable pixel.
    active: [k] bool, classes that contributed to the loss.
    num_reliable, num_anchors: [k] int32 pixels.
    num_candidates: [2, k] int32, labelled and unlabelled negatives found.
    num_keys: [k] int32, keys that entered the queue.
    source: [k] int32, the class whose anchors a queue was paired with.
    anchor_pixels: [k, a] int32, the anchors drawn in raster order over the
      batch, labelled images first; -1 where there is none.
  """

  loss: Array
  memory_bank: MemoryBank
  present: Array
  active: Array
  num_reliable: Array
  num_anchors: Array
  num_candidates: Array
  num_keys: Array
  source: Array
  anchor_pixels: Array


def contrastive_loss(
  reps: Array,
  teacher_reps: Array,
  *,
  membership: Array,
  valid_mask: Array,
  reliable_mask: Array,
  unreliable_mask: Array,
  teacher_probs: Array,
  num_labelled: int,
  memory_bank: MemoryBank,
  anchor_bits: Array,
  negative_bits: Array,
  key_bits: Array | None,
  max_keys: int | None,
  low_rank: int,
  high_rank: int,
  anchor_min_probability: float,
  negative_max_probability: float,
  temperature: float,
  class_index_mixup: bool = False,
  own_label_negatives: bool = False,
  places: np.ndarray | None = None,
  pixel_parts: int = 1,
  bank_parts: int = 1,
) -> Contrast:
  """Feeds the memory bank and computes the contrastive loss.

  In the published order: the keys of this step enter first, so they can be
  drawn as negatives. The gradient reaches `reps` only.

  Args:
    reps: [b, hf, wf, d], the student's; the order of the images is that of
      all other arrays too, see `places`.
    teacher_reps: [b, hf, wf, d].
    membership: [b, hf, wf, k] bool, see `class_membership`.
    valid_mask, reliable_mask, unreliable_mask: [b, hf, wf] bool. Labelled
      pixels are reliable wherever they are valid.
    teacher_probs: [b, hf, wf, k].
    num_labelled: images of the batch that are labelled, the first ones of
      `places`.
    memory_bank: k queues.
    anchor_bits: [k, a] uint32, draws of the anchors.
    negative_bits: [k, a, m] uint32, draws of each anchor's negatives.
    key_bits: [k, max_keys + 2] uint32, or None; see `select_keys`.
    max_keys: keys per class and step, or None for all.
    low_rank, high_rank: see `negative_mask`.
    anchor_min_probability: delta_p, the teacher's probability of an anchor's
      class must be above it.
    negative_max_probability: delta_n.
    temperature: tau.
    class_index_mixup: quirk. The i-th *present* class is paired with anchors
      and prototype of class i.
    own_label_negatives: quirk, see `negative_mask`.
    places: [b] int, where image i of the raster order lies in the batch,
      labelled images first; None where they lie so.
    pixel_parts: equal parts of the batch that lie on devices of their own.
    bank_parts: likewise of the bank, see `memory_bank.negative_cosines`. On
      neither depends a result, only what has to travel.

  Returns:
    `Contrast`. The loss is the sum over active classes divided by the number
    of present ones, and 0 with fewer than two present.
  """
  batch, _, _, num_classes = membership.shape
  width = reps.shape[-1]
  pixels_per_image = membership.shape[1] * membership.shape[2]
  if places is None:
    places = np.arange(batch, dtype=np.int32)
  is_labelled = np.zeros(batch, bool)
  is_labelled[places[:num_labelled]] = True
  by_pixel = (batch, pixels_per_image, -1)
  reps = reps.reshape(by_pixel)
  teacher_reps = jax.lax.stop_gradient(teacher_reps).reshape(by_pixel)
  teacher_probs = jax.lax.stop_gradient(teacher_probs)

  members = membership & reliable_mask[..., None]
  anchor_mask = members & (teacher_probs > anchor_min_probability)
  key_mask = negative_mask(
    membership,
    valid_mask,
    unreliable_mask,
    teacher_probs,
    is_labelled=is_labelled,
    low_rank=low_rank,
    high_rank=high_rank,
    max_probability=negative_max_probability,
    own_label_negatives=own_label_negatives,
  )
  members, anchor_mask, key_mask = (
    mask.reshape(by_pixel) for mask in (members, anchor_mask, key_mask)
  )
  find = functools.partial(nth_members, places=places, num_parts=pixel_parts)

  # Feed the queues.
  with jax.named_scope("keys"):
    keys_per_image = key_mask.sum(1, dtype=jnp.int32)
    num_candidates = jnp.stack(
      [keys_per_image[half].sum(0) for half in (is_labelled, ~is_labelled)]
    )
    ranks, num_keys = select_keys(
      *num_candidates,
      num_pixels=batch * pixels_per_image,
      capacities=memory_bank.capacities,
      max_keys=max_keys,
      bits=key_bits,
    )
    new_keys = take_members(
      # In the type of the bank before they travel.
      teacher_reps.astype(memory_bank.keys.dtype),
      find(key_mask, ranks),
    )
  memory_bank = memory_bank_lib.enqueue(
    memory_bank, new_keys, num_keys, num_parts=bank_parts
  )

  # Pair the queue of each class with anchors and a prototype.
  num_reliable = members.sum((0, 1), dtype=jnp.int32)
  num_anchors = anchor_mask.sum((0, 1), dtype=jnp.int32)
  present = num_reliable > 0
  source = jnp.arange(num_classes, dtype=jnp.int32)
  if class_index_mixup:
    source = jnp.maximum(jnp.cumsum(present, dtype=jnp.int32) - 1, 0)
    anchor_mask = anchor_mask[..., source]
  num_paired = num_anchors[source]
  with jax.named_scope("anchors"):
    drawn = find(anchor_mask, uniform_ranks(anchor_bits, num_paired[:, None]))
    anchors = unit(take_members(reps, drawn))
  positives = prototypes(
    teacher_reps.reshape(-1, width), members.reshape(-1, num_classes)
  )[source]
  slots = memory_bank_lib.sample_slots(memory_bank, negative_bits)

  positives = unit(positives)
  if bank_parts == 1:
    losses = sampled_info_nce(
      memory_bank.keys, slots, anchors, positives, temperature
    )
  else:
    losses = info_nce(
      jnp.einsum("kad,kd->ka", anchors, positives, precision=_HIGHEST),
      memory_bank_lib.negative_cosines(
        memory_bank, slots, anchors, num_parts=bank_parts
      ),
      temperature,
    )
  active = present & (num_paired > 0) & (memory_bank.count > 0)
  num_present = present.sum(dtype=jnp.int32)
  active = active & (num_present > 1)
  loss = jnp.where(active, losses, 0).sum() / jnp.maximum(num_present, 1)
  return Contrast(
    loss=loss,
    memory_bank=memory_bank,
    present=present,
    active=active,
    num_reliable=num_reliable,
    num_anchors=num_anchors,
    num_candidates=num_candidates,
    num_keys=num_keys,
    source=source,
    anchor_pixels=member_positions(drawn, pixels_per_image),
  )
