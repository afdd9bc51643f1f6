"""Draws which images to label, so that every class is among them."""

import collections
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from input_pipeline import errors


def draw_split(
  classes: Mapping[str, Collection[int]], num_labelled: int, *, seed: int
) -> tuple[str, ...]:
  """Draws images such that every class appears, each near its share.

  First every class gets an image, the rarest first; then, until there are
  enough, the class that lags most behind its share of the images gets one.
  Ids are tried in the order of a hash of seed and id: the result is the same on
  every machine and whatever the order of `classes`.

  Args:
    classes: class ids in the mask of each image.
    num_labelled: images to draw.
    seed: another one gives another draw.

  Returns:
    [num_labelled] ids, sorted.

  Raises:
    DataError: there are too few images, or so few are asked for that they
      cannot show every class.
  """
  if not 1 <= num_labelled <= len(classes):
    raise errors.DataError(
      f"cannot draw {num_labelled} of {len(classes)} images: choose a number"
      f" between 1 and {len(classes)}"
    )
  order = sorted(
    classes, key=lambda id: hashlib.sha256(f"{seed}:{id}".encode()).digest()
  )
  counts = collections.Counter(c for id in order for c in set(classes[id]))
  chosen = _cover(order, classes, counts)
  if len(chosen) > num_labelled:
    chosen = _cover_within(num_labelled, order, classes, counts)

  shares = {c: num_labelled * n / len(order) for c, n in counts.items()}
  have = collections.Counter(c for id in chosen for c in set(classes[id]))
  taken = set(chosen)
  left: dict[int | None, Iterable[str]] = {
    c: iter([id for id in order if c in classes[id]]) for c in counts
  }
  left[None] = iter(order)
  while len(taken) < num_labelled:
    lagging = max(
      counts, key=lambda c: (1 - have[c] / shares[c], -c), default=None
    )
    if lagging is not None and have[lagging] >= shares[lagging]:
      lagging = None
    id = next(id for id in left[lagging] if id not in taken)
    taken.add(id)
    have.update(set(classes[id]))
  return tuple(sorted(taken))


def _cover(
  order: Sequence[str],
  classes: Mapping[str, Collection[int]],
  counts: Mapping[int, int],
) -> list[str]:
  """The first image of every class, but for those already shown."""
  chosen: list[str] = []
  shown: set[int] = set()
  for wanted in sorted(counts, key=lambda c: (counts[c], c)):
    if wanted not in shown:
      chosen.append(next(id for id in order if wanted in classes[id]))
      shown |= set(classes[chosen[-1]])
  return chosen


def _cover_within(
  limit: int,
  order: Sequence[str],
  classes: Mapping[str, Collection[int]],
  counts: Mapping[int, int],
) -> list[str]:
  """At most `limit` images that show every class; exact, by depth-first search.

  Raises:
    DataError: there are none.
  """
  # Images with the same classes are one choice.
  image_of = {}
  for id in order:
    image_of.setdefault(frozenset(classes[id]), id)
  choices = [c for c in image_of if not any(c < other for other in image_of)]
  largest = max(map(len, choices))
  failed: dict[frozenset[int], int] = {}

  def search(missing: frozenset[int], budget: int) -> list[str] | None:
    if not missing:
      return []
    if len(missing) > budget * largest or failed.get(missing, -1) >= budget:
      return None
    wanted = min(missing, key=lambda c: (counts[c], c))
    found = [c for c in choices if wanted in c]
    for choice in sorted(found, key=lambda c: -len(c & missing)):
      rest = search(missing - choice, budget - 1)
      if rest is not None:
        return [image_of[choice], *rest]
    failed[missing] = budget
    return None

  cover = search(frozenset(counts), limit)
  if cover is None:
    raise errors.DataError(
      f"no {limit} images show all {len(counts)} classes: ask for more"
    )
  return cover
