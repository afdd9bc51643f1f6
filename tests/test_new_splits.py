"""Drawn lists show every class, follow the shares and do not change."""

import collections
import hashlib
import itertools
import random

import pytest

from input_pipeline import DataError
from input_pipeline.new_splits import draw_split


def random_classes(seed, num_images, shares):
  """{id: classes}, class c in an image with probability shares[c]."""
  rng = random.Random(seed)
  return {
    f"image{i:04d}": {c for c, p in enumerate(shares) if rng.random() < p}
    for i in range(num_images)
  }


def counts(classes, ids):
  return collections.Counter(c for id in ids for c in classes[id])


def test_rare_classes_are_there_and_common_ones_near_their_share():
  shares = [0.98, 0.4, 0.2, 0.1, 0.03, 0.004]
  classes = random_classes(0, 1000, shares)
  everything = counts(classes, classes)
  for seed in range(5):
    drawn = draw_split(classes, 50, seed=seed)
    assert len(set(drawn)) == 50 and list(drawn) == sorted(drawn)
    found = counts(classes, drawn)
    for c in range(6):
      share = 50 * everything[c] / 1000
      # An image is drawn for one class and brings others: none falls short by
      # two, and few overshoot.
      assert max(1, share - 1) <= found[c] <= share + 6


def test_the_draw_is_this_one():
  """By hand: a list must be the same on every machine, with every version."""
  classes = {f"{i}": {i % 3} for i in range(12)}
  order = sorted(
    classes, key=lambda id: hashlib.sha256(f"0:{id}".encode()).hexdigest()
  )
  assert order[:6] == ["7", "4", "9", "10", "3", "8"]
  # The first of class 0, 1 and 2, then all lag alike and class 0 is next.
  expected = ("3", "7", "8", "9")
  assert draw_split(classes, 4, seed=0) == expected
  backwards = dict(reversed(classes.items()))
  assert draw_split(backwards, 4, seed=0) == expected
  assert draw_split(classes, 4, seed=1) != expected


def test_few_images_show_all_classes_just_when_some_do():
  """Against trying all subsets."""
  rng = random.Random(1)
  outcomes = collections.Counter()
  for trial in range(60):
    num_classes = rng.randint(2, 6)
    classes = {
      f"{i}": set(rng.sample(range(num_classes), rng.randint(0, 2)))
      for i in range(9)
    }
    wanted = set().union(*classes.values())
    number = rng.randint(1, 4)
    possible = any(
      set().union(*(classes[id] for id in ids)) == wanted
      for ids in itertools.combinations(classes, number)
    )
    outcomes[possible] += 1
    if possible:
      drawn = draw_split(classes, number, seed=trial)
      assert set().union(*(classes[id] for id in drawn)) == wanted
    else:
      with pytest.raises(DataError, match=f"no {number} images show all"):
        draw_split(classes, number, seed=trial)
  assert min(outcomes[True], outcomes[False]) >= 10


@pytest.mark.parametrize("number", [0, 4])
def test_impossible_numbers(number):
  classes = {"a": {0}, "b": {0}, "c": {0}}
  with pytest.raises(DataError, match=f"cannot draw {number} of 3 images"):
    draw_split(classes, number, seed=0)


def test_all_images_can_be_drawn():
  classes = {"a": {0}, "b": set(), "c": {1}}
  assert draw_split(classes, 3, seed=0) == ("a", "b", "c")
