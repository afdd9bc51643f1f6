"""What a history of evaluations says: the best step, and when to slow down.

Everything is a function of all mIoUs so far, which a checkpoint holds, and of
nothing else: a run that goes on decides as if it had not been killed. optax has
`contrib.reduce_on_plateau`, but it counts updates of the parameters, and here
evaluations count, which happen outside the compiled step.
"""

import dataclasses
import math
from collections.abc import Sequence

# (step, mIoU) of every evaluation, oldest first.
Evaluations = Sequence[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Progress:
  """Where the watch for a plateau is.

  Attributes:
    waited: evaluations in a row, up to the last one, that were no better.
    reductions: of the learning rate so far.
    stop: patience has run out once more, and no reduction is left.
  """

  waited: int
  reductions: int
  stop: bool


def contenders(
  evaluations: Evaluations, threshold: float
) -> list[tuple[int, float]]:
  """The best evaluation, and those that may become it later.

  The best is the first one whose mIoU is within `threshold` of the highest. A
  later evaluation can raise the highest, and then the first one within reach of
  it is again one that was the highest in its time.

  Args:
    evaluations: all so far.
    threshold: absolute, mIoU between 0 and 1; 0 makes the highest the best.

  Returns:
    (step, mIoU), in ascending order of both: the best first, the highest last.
  """
  risen = []
  for step, miou in evaluations:
    if not risen or miou > risen[-1][1]:
      risen.append((step, miou))
  return [
    (step, miou) for step, miou in risen if miou >= risen[-1][1] - threshold
  ]


def watch(
  mious: Sequence[float], *, patience: int, threshold: float, reductions: int
) -> Progress:
  """Counts the evaluations that were no better, as a plateau schedule does.

  An evaluation is better if it beats the last better one by more than
  `threshold`. After `patience` that are not, in a row, the rate is reduced and
  the count begins anew; after `reductions` of them the run stops instead.

  Args:
    mious: of the evaluations that count, oldest first.
    patience: at least 1.
    threshold: absolute.
    reductions: how many there may be.

  Returns:
    `Progress` after the last one, or after the one that said stop.
  """
  reference, waited, reduced = -math.inf, 0, 0
  for miou in mious:
    if miou > reference + threshold:
      reference, waited = miou, 0
      continue
    waited += 1
    if waited < patience:
      continue
    if reduced == reductions:
      return Progress(waited, reduced, stop=True)
    waited, reduced = 0, reduced + 1
  return Progress(waited, reduced, stop=False)
