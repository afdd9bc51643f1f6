"""Which training images a run could not read: counted, named once, bounded."""

import logging
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from input_pipeline import DataError
from u2pl_jax import distributed

logger = logging.getLogger(__name__)

# Of a list in the message that ends a run.
_NAMES_SHOWN = 20


class BadRecords:
  """The images that a run has skipped, each counted once."""

  def __init__(
    self, ids: Sequence[str], *, limit: int, known: Iterable[str] = ()
  ):
    """Takes what was known at the checkpoint that the run goes on from.

    Args:
      ids: all images that the run trains on, the same on every process.
      limit: how many different ones may be bad.
      known: those that were found before; they are not named again.

    Raises:
      DataError: those are more than `limit` already.
    """
    self._ids = tuple(ids)
    self._limit = limit
    self._reasons = dict.fromkeys(known, "skipped before")
    self._check_limit()

  @property
  def ids(self) -> tuple[str, ...]:
    """The images, sorted."""
    return tuple(sorted(self._reasons))

  def add(self, id: str, reason: str) -> None:
    """Counts an image; names it if it is a new one.

    Args:
      id: of the image.
      reason: one line with the file and what is wrong with it.

    Raises:
      DataError: there are more than `limit` now.
    """
    if id in self._reasons:
      return
    self._reasons[id] = reason
    logger.warning(
      "image %r is skipped, number %d of at most %d: %s",
      id,
      len(self._reasons),
      self._limit,
      reason,
    )
    self._check_limit()

  def gather(self) -> None:
    """Adds what the other processes have found; all must call it.

    Raises:
      DataError: there are more than `limit` now, on all processes.
    """
    if jax.process_count() == 1:
      return
    # One more than `limit` at most: then `add` has raised.
    places = np.full(self._limit + 1, -1, np.int32)
    found = [place for place, id in enumerate(self._ids) if id in self._reasons]
    places[: len(found)] = found
    for place in np.unique(distributed.gather(places)):
      if place >= 0:
        self._reasons.setdefault(self._ids[place], "skipped by another process")
    self._check_limit()

  def _check_limit(self) -> None:
    if len(self._reasons) <= self._limit:
      return
    shown = list(self._reasons.items())[-_NAMES_SHOWN:]
    more = len(self._reasons) - len(shown)
    raise DataError(
      f"{len(self._reasons)} training images cannot be used, more than"
      f" config.input.max_bad_records={self._limit}, which is the key to raise"
      " if so many may be left out: "
      + "; ".join(f"{id!r} ({reason})" for id, reason in shown)
      + (f"; and {more} more" if more else "")
    )
