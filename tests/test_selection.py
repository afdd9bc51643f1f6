import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from u2pl_jax import selection

floats = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None, max_examples=60)
@given(
  values=hnp.arrays(np.float32, 60, elements=floats),
  mask=hnp.arrays(bool, 60),
  percent=st.floats(0, 100, width=32),
)
def test_percentile_is_numpys(values, mask, percent):
  result = selection.masked_percentiles(
    jnp.asarray(values), jnp.asarray(mask), jnp.asarray([percent], jnp.float32)
  )
  if not mask.any():
    assert result[0] == 0
    return
  expected = np.percentile(values[mask].astype(np.float64), percent)
  scale = np.abs(values[mask]).max() + 1e-30
  # The position is a float32; between neighbours that moves it by 1e-5 ranks.
  assert abs(float(result[0]) - expected) <= 2e-5 * scale


@settings(deadline=None, max_examples=40)
@given(
  values=hnp.arrays(
    np.float32, 40, elements=st.sampled_from([-2.0, -0.0, 0.0, 1.0, 3.5, 9e9])
  ),
  mask=hnp.arrays(bool, 40),
)
def test_order_statistics_are_exact_with_ties(values, mask):
  count = int(mask.sum())
  ranks = jnp.arange(40, dtype=jnp.int32)
  result = selection.order_statistics(
    jnp.asarray(values), jnp.asarray(mask), ranks
  )
  np.testing.assert_array_equal(result[:count], np.sort(values[mask]))


def test_percentiles_by_hand():
  values = jnp.asarray([[4.0, 1.0], [3.0, 100.0]])
  mask = jnp.asarray([[True, True], [True, False]])
  result = selection.masked_percentiles(
    values, mask, jnp.asarray([0.0, 25.0, 50.0, 80.0, 100.0])
  )
  # Of 1, 3, 4: position 0.25 * 2 = 0.5 lies half way from 1 to 3, and so on.
  np.testing.assert_allclose(result, [1, 2, 3, 3.6, 4], rtol=1e-6)


def test_nth_members():
  # One image of five pixels; the second set is empty, as is rank 3.
  mask = jnp.asarray([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], bool).T[None]
  ranks = jnp.asarray([[0, 1, 2, 3], [0, 1, 2, 3]], jnp.int32)
  members = selection.nth_members(mask, ranks)
  positions = selection.member_positions(members, 5)
  np.testing.assert_array_equal(positions, [[1, 3, 4, -1], [-1] * 4])
  values = jnp.arange(10.0, 15)[None, :, None]
  np.testing.assert_array_equal(
    selection.take_members(values, members)[..., 0],
    [[11, 13, 14, 0], [0] * 4],
  )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_members_do_not_depend_on_the_parts(seed, share):
  """Against flatnonzero, for images in any order and some without a member."""
  rng = np.random.default_rng(seed)
  mask = rng.random((8, 5, 3)) < share
  mask[rng.integers(8)] = False
  places = rng.permutation(8).astype(np.int32)
  ranks = rng.integers(-1, 42, (3, 20)).astype(np.int32)
  values = rng.standard_normal((8, 5, 2)).astype(np.float32)
  in_order = mask[places].reshape(40, 3)
  expected = np.full((3, 20), -1)
  for c in range(3):
    members = np.flatnonzero(in_order[:, c])
    for j, rank in enumerate(ranks[c]):
      if 0 <= rank < len(members):
        expected[c, j] = members[rank]
  rows = np.append(values[places].reshape(40, 2), [[0, 0]], 0)[expected]
  for num_parts in (1, 2, 4, 8):
    members = selection.nth_members(
      jnp.asarray(mask), jnp.asarray(ranks), places=places, num_parts=num_parts
    )
    np.testing.assert_array_equal(
      selection.member_positions(members, 5), expected
    )
    np.testing.assert_array_equal(
      selection.take_members(jnp.asarray(values), members), rows
    )


def test_uniform_ranks_replay_and_range():
  bits = jnp.asarray([[3, 7, 2**32 - 1]], jnp.uint32)
  assert selection.uniform_ranks(bits, jnp.asarray([[8]])).tolist() == [
    [3, 7, 7]
  ]
  assert selection.uniform_ranks(bits, jnp.asarray([[0]])).tolist() == [
    [0, 0, 0]
  ]


@settings(deadline=None, max_examples=40)
@given(
  count=st.integers(0, 200), size=st.integers(0, 32), seed=st.integers(0, 99)
)
def test_subset_ranks_are_distinct_members(count, size, seed):
  size = min(count, size)
  bits = jax.random.bits(jax.random.key(seed), (1, 33), jnp.uint32)
  ranks = selection.subset_ranks(
    jnp.asarray([count], jnp.int32), jnp.asarray([size], jnp.int32), bits
  )[0, :size]
  assert len(set(ranks.tolist())) == size
  assert all(0 <= r < count for r in ranks.tolist())
  if size == count:
    assert ranks.tolist() == list(range(count))


def test_subset_ranks_take_every_rank_equally_often():
  count, size, trials = 10, 4, 20_000
  bits = jax.random.bits(jax.random.key(0), (trials, size + 1), jnp.uint32)
  ranks = selection.subset_ranks(
    jnp.full(trials, count, jnp.int32), jnp.full(trials, size, jnp.int32), bits
  )
  share = np.bincount(np.asarray(ranks).ravel(), minlength=count) / trials
  # Standard deviation of a share is sqrt(.4 * .6 / 20000) = 0.0035.
  np.testing.assert_allclose(share, size / count, atol=0.015)


@pytest.mark.parametrize("size", [1, 31, 1000])
def test_percentile_of_constant(size):
  result = selection.masked_percentiles(
    jnp.full(size, 0.25), jnp.ones(size, bool), jnp.asarray([37.0])
  )
  assert result[0] == 0.25
