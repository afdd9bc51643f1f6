import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2pl_jax import contrastive, memory_bank


def test_class_ranks_break_ties_by_class_id():
  ranks = contrastive.class_ranks(jnp.asarray([[0.2, 0.5, 0.2, 0.1]]))
  assert ranks.tolist() == [[1, 0, 2, 3]]


def test_membership():
  labels = jnp.asarray([[[0, 2, 255]]])
  result = contrastive.class_membership(labels, num_classes=3, ignore_label=255)
  assert result[0, 0].tolist() == [
    [True, False, False],
    [False, False, True],
    [False, False, False],
  ]


def test_membership_with_the_published_scatter():
  labels = jnp.asarray([[[0, 2, 255]], [[1, 255, 1]]])
  result = contrastive.class_membership(
    labels, num_classes=3, ignore_label=255, batch_onehot=True
  )
  # Position 0: classes 0 and 1; position 1: 2, and the other image's ignored
  # pixel as 0; position 2: ignored by image 0, hence nothing.
  assert result[0, 0].tolist() == [
    [True, True, False],
    [True, False, True],
    [False, False, False],
  ]
  assert not result[1].any()


# Two images of 1x3 pixels, labelled first; three classes. Rank of a class is
# its position by probability.
PROBS = jnp.asarray(
  [
    [[[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.6, 0.3, 0.1]]],
    [[[0.5, 0.4, 0.1], [0.1, 0.5, 0.4], [0.4, 0.1, 0.5]]],
  ]
)
LABELS = jnp.asarray([[[0, 0, 255]], [[0, 1, 2]]])


def masks(**kwargs):
  options = dict(low_rank=1, high_rank=2, max_probability=1.0) | kwargs
  return contrastive.negative_mask(
    contrastive.class_membership(LABELS, num_classes=3, ignore_label=255),
    LABELS != 255,
    jnp.asarray([[[True, True, False]], [[True, False, True]]]),
    PROBS,
    is_labelled=np.asarray([True, False]),
    **options,
  )


def test_negatives_by_hand():
  result = masks()
  # Labelled, class ranked first although the label is another: only pixel 1
  # (label 0, but class 1 on top). Pixel 2 has no label.
  assert result[0, 0].tolist() == [
    [False, False, False],
    [False, True, False],
    [False, False, False],
  ]
  # Unlabelled and unreliable (pixels 0 and 2): the class of rank 1.
  assert result[1, 0].tolist() == [
    [False, True, False],
    [False, False, False],
    [True, False, False],
  ]


def test_negatives_of_the_published_rule():
  result = masks(own_label_negatives=True)
  assert not result.any()
  assert not masks(max_probability=0.05).any()


def test_prototype_of_an_absent_class_is_zero():
  reps = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]])
  member = jnp.asarray([[True, False], [True, False], [False, False]])
  assert contrastive.prototypes(reps, member).tolist() == [[2, 3], [0, 0]]


def test_info_nce_floor_and_chance():
  """49 opposite negatives reach the floor; equal similarities give chance."""
  opposite = jnp.full((1, 1, 50), -1.0)
  floor, chance = contrastive.floor_and_chance(50, 0.5)
  loss = contrastive.info_nce(jnp.ones((1, 1)), opposite, 0.5)
  np.testing.assert_allclose(loss, floor, rtol=1e-5)
  np.testing.assert_allclose(floor, 0.650, atol=5e-4)
  same = contrastive.info_nce(jnp.zeros((1, 1)), opposite, 1e9)
  np.testing.assert_allclose(same, chance, rtol=1e-5)
  np.testing.assert_allclose(chance, np.log(51), rtol=1e-6)


def test_info_nce_by_hand():
  positive = jnp.asarray([[1.0, 0.0]])
  loss = contrastive.info_nce(positive, jnp.asarray([[[0.0], [1.0]]]), 0.5)
  expected = (np.log(1 + np.exp(-2)) + np.log(1 + np.exp(2))) / 2
  np.testing.assert_allclose(loss, [expected], rtol=1e-6)


@pytest.mark.parametrize("form", ["_PRODUCTS", "_SUMS"])
@pytest.mark.parametrize("key_dtype", [jnp.float32, jnp.bfloat16])
def test_sampled_info_nce_is_the_plain_formula(monkeypatch, key_dtype, form):
  """Loss and gradient, with an anchor count that no block divides."""
  # Of the two forms a CPU runs the first.
  monkeypatch.setattr(contrastive, "_PRODUCTS", getattr(contrastive, form))
  k, a, m, d = 3, 11, 7, 16
  capacities = [30, 20, 20]
  rng = np.random.default_rng(0)
  bank = memory_bank.create(capacities, d, key_dtype)
  keys = rng.standard_normal((70, d), np.float32)
  keys[5] = 0
  bank = bank.replace(
    keys=jnp.asarray(keys, key_dtype), count=jnp.asarray(capacities)
  )
  slots = memory_bank.sample_slots(
    bank, jnp.asarray(rng.integers(0, 2**32, (k, a, m)), jnp.uint32)
  )
  assert (slots == 5).any()
  anchors = jnp.asarray(rng.standard_normal((k, a, d), np.float32))
  positives = memory_bank.unit(
    jnp.asarray(rng.standard_normal((k, d), np.float32))
  )
  weights = jnp.asarray([1.0, -2.0, 0.5])

  def plain(anchors):
    anchors = memory_bank.unit(anchors)
    cosines = memory_bank.negative_cosines(bank, slots, anchors)
    positive = jnp.einsum("kad,kd->ka", anchors, positives)
    losses = contrastive.info_nce(positive, cosines, 0.5)
    return (weights * losses).sum(), losses

  def sampled(anchors):
    losses = contrastive.sampled_info_nce(
      bank.keys, slots, memory_bank.unit(anchors), positives, 0.5
    )
    return (weights * losses).sum(), losses

  expected, expected_losses = jax.grad(plain, has_aux=True)(anchors)
  result, losses = jax.grad(sampled, has_aux=True)(anchors)
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-7)


class TestSelectKeys:
  def select(self, mask, max_keys, num_labelled=6, capacities=(4, 4)):
    bits = None
    if max_keys is not None:
      bits = jax.random.bits(
        jax.random.key(0), (len(capacities), max_keys + 2), jnp.uint32
      )
    ranks, count = contrastive.select_keys(
      jnp.asarray(mask[:num_labelled].sum(0), jnp.int32),
      jnp.asarray(mask[num_labelled:].sum(0), jnp.int32),
      num_pixels=len(mask),
      capacities=capacities,
      max_keys=max_keys,
      bits=bits,
    )
    return [
      np.flatnonzero(members)[np.asarray(rank[:n])].tolist()
      for members, rank, n in zip(mask.T, ranks, count, strict=True)
    ]

  def test_no_cap_keeps_the_last_in_raster_order(self):
    mask = np.zeros((12, 2), bool)
    mask[[1, 3, 5, 7, 9, 11], 0] = True
    mask[[0], 1] = True
    assert self.select(mask, None) == [[5, 7, 9, 11], [0]]

  def test_cap_takes_half_from_each_side(self):
    mask = np.ones((12, 2), bool)
    for chosen in self.select(mask, 4):
      assert len(set(chosen)) == 4
      assert sum(p < 6 for p in chosen) == 2

  def test_cap_fills_up_from_the_side_that_has_more(self):
    mask = np.ones((12, 2), bool)
    mask[1:6, 0] = False
    mask[6:, 1] = False
    first, second = self.select(mask, 4)
    assert first[0] == 0 and len(set(first)) == 4
    assert all(p >= 6 for p in first[1:])
    assert len(set(second)) == 4 and all(p < 6 for p in second)

  def test_cap_never_exceeds_the_queue(self):
    mask = np.ones((12, 2), bool)
    assert [len(c) for c in self.select(mask, 8, capacities=(3, 8))] == [3, 8]


def run(labels, *, reps=None, reliable=None, teacher_reps=None, **kwargs):
  """A call with 2 labelled and 2 unlabelled images of 3x3 and 3 classes."""
  key = jax.random.key(1)
  shape = (4, 3, 3)
  reps = jax.random.normal(key, (*shape, 5)) if reps is None else reps
  teacher_reps = reps * 0.5 + 0.1 if teacher_reps is None else teacher_reps
  probs = jax.nn.softmax(jax.random.normal(jax.random.key(2), (*shape, 3)))
  valid = labels != 255
  reliable = valid if reliable is None else reliable & valid
  options = dict(
    membership=contrastive.class_membership(
      labels, num_classes=3, ignore_label=255
    ),
    valid_mask=valid,
    reliable_mask=reliable,
    unreliable_mask=valid,
    teacher_probs=probs,
    num_labelled=2,
    memory_bank=memory_bank.create((6, 6, 6), 5),
    anchor_bits=jax.random.bits(key, (3, 4), jnp.uint32),
    negative_bits=jax.random.bits(key, (3, 4, 7), jnp.uint32),
    key_bits=None,
    max_keys=None,
    low_rank=1,
    high_rank=3,
    anchor_min_probability=0.0,
    negative_max_probability=1.0,
    temperature=0.5,
  )
  return contrastive.contrastive_loss(reps, teacher_reps, **options | kwargs)


RANDOM_LABELS = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 3, 3)))


def test_gradient_reaches_the_student_only():
  reps = jax.random.normal(jax.random.key(5), (4, 3, 3, 5))

  def loss(reps, teacher_reps, probs, keys):
    bank = memory_bank.create((6, 6, 6), 5).replace(
      keys=keys, count=jnp.full(3, 6, jnp.int32)
    )
    return run(
      RANDOM_LABELS,
      reps=reps,
      teacher_reps=teacher_reps,
      teacher_probs=probs,
      memory_bank=bank,
    ).loss

  probs = jax.nn.softmax(reps[..., :3])
  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(
    reps, reps + 1, probs, jax.random.normal(jax.random.key(0), (18, 5))
  )
  assert jnp.abs(grads[0]).max() > 1e-3
  for grad in grads[1:]:
    assert (grad == 0).all()


def test_absent_class_counts_neither_way():
  """Upstream issue 111: with class 0 absent the others must still train."""
  labels = jnp.where(RANDOM_LABELS == 0, 1, RANDOM_LABELS)
  result = run(labels)
  assert result.present.tolist() == [False, True, True]
  assert result.active.tolist() == [False, True, True]
  assert result.source.tolist() == [0, 1, 2]
  mixed_up = run(labels, class_index_mixup=True)
  # Class 1, first of the present, is paired with class 0, which has no anchor.
  assert mixed_up.source.tolist() == [0, 0, 1]
  assert mixed_up.active.tolist() == [False, False, True]


def test_one_class_alone_gives_zero_but_feeds_the_queues():
  result = run(jnp.ones((4, 3, 3), jnp.int32))
  assert result.loss == 0
  assert result.memory_bank.count.sum() > 0


def test_everything_ignored():
  reps = jax.random.normal(jax.random.key(5), (4, 3, 3, 5))
  labels = jnp.full((4, 3, 3), 255)
  value, grad = jax.value_and_grad(lambda r: run(labels, reps=r).loss)(reps)
  assert value == 0
  assert (grad == 0).all()
  assert run(labels).memory_bank.count.tolist() == [0, 0, 0]


def test_no_anchor_above_the_probability():
  result = run(RANDOM_LABELS, anchor_min_probability=1.0)
  assert result.loss == 0
  assert result.present.all() and not result.active.any()


def test_empty_queues_give_zero():
  result = run(RANDOM_LABELS, negative_max_probability=0.0)
  assert result.loss == 0
  assert result.num_keys.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_zero_representations_do_not_give_nan(scale):
  reps = scale * jax.random.normal(jax.random.key(5), (4, 3, 3, 5))
  value, grad = jax.value_and_grad(
    lambda r: run(RANDOM_LABELS, reps=r, teacher_reps=reps).loss
  )(reps)
  assert jnp.isfinite(value)
  assert jnp.isfinite(grad).all()
