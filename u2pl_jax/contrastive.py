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

from typing import NamedTuple

import jax
import jax.numpy as jnp

from u2pl_jax import memory_bank as memory_bank_lib
from u2pl_jax.memory_bank import MemoryBank
from u2pl_jax.selection import nth_members, subset_ranks, uniform_ranks

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
  num_labelled: int,
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
    num_labelled: the first images of the batch are labelled.
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
  labelled = (
    ~membership[:num_labelled]
    & valid_mask[:num_labelled, ..., None]
    & (ranks[:num_labelled] < low_rank)
  )
  middle = (ranks >= low_rank) & (ranks < high_rank)
  unlabelled = middle[num_labelled:] & unreliable_mask[num_labelled:, ..., None]
  mask = jnp.concatenate([labelled, unlabelled]) & (probs < max_probability)
  return mask & membership if own_label_negatives else mask


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


def _unit(x: Array) -> Array:
  """Rows to length 1; a zero row stays zero, with zero gradient."""
  square = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))


def info_nce(
  anchors: Array, positives: Array, negatives: Array, temperature: float
) -> Array:
  """InfoNCE with cosine similarities (equation 10), mean over the anchors.

  Args:
    anchors: [k, a, d].
    positives: [k, d], one for all anchors of a class.
    negatives: [k, a, m, d].
    temperature: divides the cosines.

  Returns:
    [k].
  """
  anchors, positives, negatives = map(_unit, (anchors, positives, negatives))
  positive = jnp.einsum("kad,kd->ka", anchors, positives, precision=_HIGHEST)
  negative = jnp.einsum("kad,kamd->kam", anchors, negatives, precision=_HIGHEST)
  logits = jnp.concatenate([positive[..., None], negative], -1) / temperature
  return (jax.nn.logsumexp(logits, -1) - logits[..., 0]).mean(-1)


def floor_and_chance(num_negatives: int, temperature: float) -> Array:
  """[2]: the smallest possible InfoNCE, and its value for equal similarities.

  The floor has cosine 1 to the positive and -1 to every negative.
  """
  floor = jnp.log1p(num_negatives * jnp.exp(-2 / temperature))
  return jnp.stack([floor, jnp.log1p(float(num_negatives))])


def select_keys(
  mask: Array,
  *,
  num_labelled_pixels: int,
  capacities: tuple[int, ...],
  max_keys: int | None,
  bits: Array | None,
) -> tuple[Array, Array]:
  """Pixels that enter each queue in this step.

  The paper's rule yields more keys in a step than a queue holds, so at most
  `max_keys` of them enter, a random subset, half from labelled and half from
  unlabelled pixels (what one side lacks the other fills).

  Args:
    mask: [p, k] bool, from `negative_mask`.
    num_labelled_pixels: the first pixels belong to labelled images.
    capacities: of the queues.
    max_keys: per class and step; None takes all, of which the last `capacity`
      enter in raster order: exactly what an unbounded FIFO would hold.
    bits: [k, max_keys + 2] uint32; None with max_keys None.

  Returns:
    (pixels [k, m] int32 in the order of entry, count [k] int32).
  """
  num_pixels = mask.shape[0]
  count = mask.sum(0, dtype=jnp.int32)
  capacity = jnp.asarray(capacities, jnp.int32)
  if max_keys is None:
    size = jnp.minimum(count, capacity)
    row = jnp.arange(min(num_pixels, max(capacities)), dtype=jnp.int32)
    return nth_members(mask.T, (count - size)[:, None] + row), size

  limit = jnp.minimum(max_keys, capacity)
  count_l = mask[:num_labelled_pixels].sum(0, dtype=jnp.int32)
  count_u = count - count_l
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
  return nth_members(mask.T, rank), size_l + size_u


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
    anchor_pixels: [k, a] int32, the anchors drawn, meaningless where none.
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
) -> Contrast:
  """Feeds the memory bank and computes the contrastive loss.

  In the published order: the keys of this step enter first, so they can be
  drawn as negatives. The gradient reaches `reps` only.

  Args:
    reps: [b, hf, wf, d], the student's.
    teacher_reps: [b, hf, wf, d].
    membership: [b, hf, wf, k] bool, see `class_membership`.
    valid_mask, reliable_mask, unreliable_mask: [b, hf, wf] bool. Labelled
      pixels are reliable wherever they are valid.
    teacher_probs: [b, hf, wf, k].
    num_labelled: images at the front of the batch that are labelled.
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

  Returns:
    `Contrast`. The loss is the sum over active classes divided by the number
    of present ones, and 0 with fewer than two present.
  """
  num_classes, width = membership.shape[-1], reps.shape[-1]
  teacher_reps = jax.lax.stop_gradient(teacher_reps).reshape(-1, width)
  teacher_probs = jax.lax.stop_gradient(teacher_probs)
  pixels_per_image = membership.shape[1] * membership.shape[2]

  members = membership & reliable_mask[..., None]
  members = members.reshape(-1, num_classes)
  confident = teacher_probs > anchor_min_probability
  anchor_mask = members & confident.reshape(-1, num_classes)
  key_mask = negative_mask(
    membership,
    valid_mask,
    unreliable_mask,
    teacher_probs,
    num_labelled=num_labelled,
    low_rank=low_rank,
    high_rank=high_rank,
    max_probability=negative_max_probability,
    own_label_negatives=own_label_negatives,
  ).reshape(-1, num_classes)

  # Feed the queues.
  num_labelled_pixels = num_labelled * pixels_per_image
  key_pixels, num_keys = select_keys(
    key_mask,
    num_labelled_pixels=num_labelled_pixels,
    capacities=memory_bank.capacities,
    max_keys=max_keys,
    bits=key_bits,
  )
  memory_bank = memory_bank_lib.enqueue(
    memory_bank, teacher_reps[key_pixels], num_keys
  )

  # Pair the queue of each class with anchors and a prototype.
  num_reliable = members.sum(0, dtype=jnp.int32)
  num_anchors = anchor_mask.sum(0, dtype=jnp.int32)
  present = num_reliable > 0
  source = jnp.arange(num_classes, dtype=jnp.int32)
  if class_index_mixup:
    source = jnp.maximum(jnp.cumsum(present, dtype=jnp.int32) - 1, 0)
  ranks = uniform_ranks(anchor_bits, num_anchors[source][:, None])
  anchor_pixels = nth_members(anchor_mask.T[source], ranks)
  anchors = reps.reshape(-1, width)[anchor_pixels]
  positives = prototypes(teacher_reps, members)[source]
  negatives = memory_bank_lib.sample(memory_bank, negative_bits)
  negatives = jax.lax.stop_gradient(negatives).astype(anchors.dtype)

  losses = info_nce(anchors, positives, negatives, temperature)
  active = present & (num_anchors[source] > 0) & (memory_bank.count > 0)
  num_present = present.sum(dtype=jnp.int32)
  active = active & (num_present > 1)
  loss = jnp.where(active, losses, 0).sum() / jnp.maximum(num_present, 1)
  by_half = jnp.stack(
    [
      key_mask[:num_labelled_pixels].sum(0, dtype=jnp.int32),
      key_mask[num_labelled_pixels:].sum(0, dtype=jnp.int32),
    ]
  )
  return Contrast(
    loss=loss,
    memory_bank=memory_bank,
    present=present,
    active=active,
    num_reliable=num_reliable,
    num_anchors=num_anchors,
    num_candidates=by_half,
    num_keys=num_keys,
    source=source,
    anchor_pixels=anchor_pixels,
  )
