"""The evaluations of a run: which network, its metrics, what they decide."""

import contextlib
from collections.abc import Callable
from typing import Any

import ml_collections

from u2pl_jax import metrics as metrics_lib
from u2pl_jax import plateau
from u2pl_jax.build import Program
from u2pl_jax.checkpoint import Meta
from u2pl_jax.data import Data, open_eval_stream
from u2pl_jax.evaluator import Counts
from u2pl_jax.train_state import TrainState, Variables
from u2pl_jax.train_step import Recipe


def evaluated_network(
  state: TrainState, step: int, recipe: Recipe
) -> tuple[str, Variables]:
  """The network to judge after `step` updates: (name, variables).

  The teacher as soon as it has had an update; before, it is no more than the
  initial weights.
  """
  if step > recipe.warmup_steps:
    return "teacher", state.teacher
  return "student", state.student


def counts_of(
  config: ml_collections.ConfigDict,
  program: Program,
  data: Data,
  variables: Variables,
  ids: tuple[str, ...],
  update: Callable[[int], object] | None = None,
) -> Counts:
  """What the network makes of each of the images `ids`.

  Args:
    config, program, data: of the run.
    variables: of the network.
    ids: of the images.
    update: called after every batch, see `Evaluator.count`; what it raises ends
      the evaluation.
  """
  with contextlib.closing(open_eval_stream(config, data, ids)) as stream:
    return program.evaluator.count(variables, stream, len(ids), update=update)


def evaluate(
  config: ml_collections.ConfigDict,
  program: Program,
  data: Data,
  state: TrainState,
  step: int,
  counts: Counts,
  update: Callable[[int], object] | None = None,
) -> dict[str, Any]:
  """Metrics `eval/...` of the validation images, `oracle/...` of hidden masks.

  Args:
    config, program, data: of the run.
    state: after `step` updates.
    step: decides which network is judged.
    counts: of that network on the validation images.
    update: see `counts_of`.

  Returns:
    Numbers, and the vector `eval/iou` with NaN for a class that is absent.
  """
  name, variables = evaluated_network(state, step, program.recipe)
  confusion = counts.confusions.sum(0)
  metrics = {
    "eval/miou": metrics_lib.mean_iou(confusion),
    "eval/miou_present": metrics_lib.mean_iou_present(confusion),
    "eval/pixel_accuracy": metrics_lib.pixel_accuracy(confusion),
    "eval/mean_accuracy": metrics_lib.mean_accuracy(confusion),
    "eval/ece": metrics_lib.expected_calibration_error(counts.calibration),
    "eval/iou": metrics_lib.iou(confusion),
  }
  if name == "teacher" and data.oracle:
    counts_u = counts_of(config, program, data, variables, data.oracle, update)
    confusion = counts_u.confusions.sum(0)
    metrics |= {
      "oracle/pixel_accuracy": metrics_lib.pixel_accuracy(confusion),
      "oracle/ari": metrics_lib.adjusted_rand_index(confusion),
      "oracle/miou": metrics_lib.mean_iou(confusion),
    }
  return metrics


# -- What the evaluations decide -----------------------------------------------


def plateau_progress(
  config: ml_collections.ConfigDict,
  recipe: Recipe,
  evaluations: plateau.Evaluations,
) -> plateau.Progress | None:
  """Where the watch for a plateau is; None for the other schedules.

  An evaluation of the warm-up counts neither as better nor as no better: it
  judges the student, and says nothing about how long the teacher may take.
  Where all of the training is warm-up, as in the supervised method, all count.
  """
  optimizer = config.optimizer
  if optimizer.schedule != "plateau":
    return None
  first = recipe.warmup_steps
  if first == recipe.total_steps:
    first = 0
  return plateau.watch(
    [miou for step, miou in evaluations if step > first],
    patience=optimizer.plateau.patience,
    threshold=optimizer.plateau.threshold,
    reductions=optimizer.plateau.reductions,
  )


def contenders(
  config: ml_collections.ConfigDict, evaluations: plateau.Evaluations
) -> list[tuple[int, float]]:
  """(step, mIoU) of the best evaluation and of those that may become it.

  Without the schedule 'plateau' there is no threshold: the highest alone.
  """
  optimizer = config.optimizer
  is_plateau = optimizer.schedule == "plateau"
  threshold = optimizer.plateau.threshold if is_plateau else 0.0
  return plateau.contenders(evaluations, threshold)


def is_finished(
  config: ml_collections.ConfigDict, recipe: Recipe, meta: Meta
) -> bool:
  """Whether nothing is left to train or to evaluate."""
  if meta.pending_line is not None:
    return False
  progress = plateau_progress(config, recipe, meta.evaluations)
  stopped = progress is not None and progress.stop
  return stopped or meta.step == recipe.total_steps


def no_better(config: ml_collections.ConfigDict, waited: int) -> str:
  """What the log says of that many evaluations in a row."""
  threshold = config.optimizer.plateau.threshold
  return f"mIoU no better by {threshold:g} in {waited} evaluations"
