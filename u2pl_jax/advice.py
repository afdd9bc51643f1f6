"""What the metrics of a run say in plain words, and what to change.

Each condition is a function from a run to a `Finding` or None, and its limits
are the constants below with the reason for each. A condition that lacks the
metrics it needs, or has too few of them, says nothing.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence

import numpy as np

from u2pl_jax.clock import DATA_WAIT_ADVICE, DATA_WAIT_LIMIT
from u2pl_jax.run_log import Run

# From the worst to the mildest: the run is lost or harmful; it falls short of
# what it could be; a thing to know.
PROBLEM, WARNING, HINT = SEVERITIES = ("problem", "warning", "hint")

# A line is one batch. A quarter of eight is two: fewer say nothing of a trend.
_MIN_LINES = 8
# A curve falls or rises over evaluations only if there are some.
_MIN_EVALUATIONS = 4
# "At the end" is the last quarter: long enough for a mean over batches, short
# enough to be after the first changes of the semi-supervised phase.
_TAIL = 0.25
# Labelled pixels are learned again and again: their loss does not rise by half
# unless something breaks. Over a quarter of a run its noise averages out.
_RISE_OF_LOSS = 1.5
# A class with less than a ten-thousandth of the pseudo labels has a few pixels
# of a crop: not an object, and no lesson.
_NO_SHARE = 1e-4
# One absent class is a rare one; a third of all is no longer the data's fault.
_MISSING_CLASSES = 1 / 3
_MOST_CLASSES = 1 / 2
# A class below 1 % of IoU is not recognised.
_NO_IOU = 0.01
# A class that the labels taught (5 % is more than chance hits), and of which
# less than half is left.
_TAUGHT_IOU, _LEFT_OF_IOU = 0.05, 0.5
# The percentile keeps 100 - alpha percent; it keeps nothing only where all
# entropies are equal, or where alpha0 asks for it.
_KEPT_NOTHING, _KEPT_EVERYTHING = 0.05, 0.999
# A queue filled to less than a hundredth gives the same few negatives again
# and again.
_EMPTY_QUEUE = 0.01
# A window with nine tenths of the ranks excludes next to nothing; one that
# begins in the lower half leaves classes that nobody would confuse.
_WIDE_WINDOW, _LATE_WINDOW = 0.9, 0.5
# Rank windows of so few classes are all narrow or wide.
_FEW_CLASSES = 4
# Within a twentieth of the way from chance to the floor the representations
# tell no class from another.
_AT_CHANCE = 0.05
# The loss is divided by the present classes: with less than half of them
# active it is mostly zeros.
_IDLE_CLASSES = 0.5
# The standard deviation over seeds is 0.1 to 0.3 points of mIoU in our own
# runs; a difference of half a point is more than that.
_MARGIN = 0.005
# A point of mIoU: above the noise of an evaluation, and worth some hours.
_POINT = 0.01
# The last quarter of a falling learning rate; the best should lie in it.
_LATE = 0.7
# Learning rate of the encoder for one labelled image. The published recipes
# have 0.001 and 0.01 for 16 images, from ImageNet; our rows from random weights
# 0.005 to 0.1 for 8. Four times beyond either end is outside all of them.
_USUAL_RATES = {True: (1.5e-5, 2.5e-3), False: (1.5e-4, 5e-2)}
# At a half the input decides how long the run takes.
_LONG_WAIT = 0.5
# Whole images are harder than crops by some points, not by fifteen.
_OVERFIT_GAP = 0.15
# Two points of pixel accuracy or mIoU: more than a few hundred images vary.
_ORACLE_DROP = 0.02
# alpha0 = 20 % takes the teacher to be wrong in about a fifth of the pixels.
# With more wrong than that, keeping nearly all teaches the mistakes.
_WRONG_SHARE, _KEPT_NEARLY_ALL = 0.2, 0.95
_NAMES_SHOWN = 8
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that the metrics say.

  Attributes:
    title: the finding in a few words.
    evidence: numbers and the steps they are from.
    advice: what to change, with the config's keys.
    severity: 'problem', 'warning' or 'hint'.
  """

  title: str
  evidence: str
  advice: str
  severity: str


Condition = Callable[[Run], Finding | None]


# -- Reading a run -------------------------------------------------------------


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"


def _names(names: Sequence[str]) -> str:
  if len(names) <= _NAMES_SHOWN:
    return ", ".join(names)
  rest = len(names) - _NAMES_SHOWN
  return f"{', '.join(names[:_NAMES_SHOWN])} and {rest} more"


def _tail(values: np.ndarray) -> np.ndarray:
  """The last quarter, at least one."""
  return values[-max(1, math.floor(values.size * _TAIL)) :]


def _tail_mean(run: Run, key: str) -> float | None:
  """Mean over the last quarter of the lines; None with too few lines."""
  values = run.series(key)[1]
  return float(_tail(values).mean()) if values.size >= _MIN_LINES else None


def _tail_steps(run: Run, key: str) -> str:
  steps = _tail(run.series(key)[0])
  return f"steps {steps[0]:,} to {steps[-1]:,}"


def _classes(run: Run, metric: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """class -> (steps, values) of a metric with one value a class."""
  prefix = metric + "/"
  keys = {key: None for row in run.rows for key in row}
  return {
    key.removeprefix(prefix): run.series(key)
    for key in keys
    if key.startswith(prefix)
  }


def _num_lines(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> int:
  """Most values that a class of `_classes` has."""
  return max((values.size for _, values in found.values()), default=0)


def _number_of_classes(run: Run) -> int:
  return max(len(run.class_names), len(_classes(run, "train/bank_fill")))


def _progress(run: Run) -> float | None:
  """Share of the run that is over; None if the workdir does not tell."""
  if run.last("eval/plateau_stop"):
    return 1.0  # Meant to end before the last epoch.
  epoch, epochs = run.last("train/epoch"), run.setting("schedule.epochs")
  return epoch / epochs if epoch is not None and epochs else None


def _is_over(run: Run) -> bool:
  """False for a run that is still going on or was interrupted."""
  progress = _progress(run)
  return progress is None or progress >= 1


def _last_labels_step(run: Run) -> int | None:
  """Last step from labels alone, of a run that went on to teach itself."""
  teaching, _ = run.series("train/unsup_loss")
  if not teaching.size:
    return None
  warmup, per_epoch = run.setting("schedule.warmup_epochs"), run.steps_per_epoch
  if warmup is None or per_epoch is None:
    return int(teaching[0]) - 1
  return round(warmup * per_epoch)


def _end_of_warmup(run: Run) -> tuple[int, float] | None:
  """(step, mIoU) of the last evaluation before the teacher had a part."""
  last = _last_labels_step(run)
  steps, values = run.series("eval/miou")
  before = np.flatnonzero(steps <= last) if last is not None else ()
  if not len(before):
    return None
  return int(steps[before[-1]]), float(values[before[-1]])


def _last_evaluation(run: Run) -> tuple[int, float] | None:
  steps, values = run.series("eval/miou")
  return (int(steps[-1]), float(values[-1])) if steps.size else None


# -- Losses and learning rate --------------------------------------------------


def _not_finite(run: Run) -> Finding | None:
  """A loss or the gradient is NaN or infinite."""
  for name in ("sup_loss", "unsup_loss", "contra_loss", "total_loss"):
    key = f"train/{name}"
    finite = set(run.series(key)[0].tolist())
    bad = [r["step"] for r in run.rows if key in r and r["step"] not in finite]
    if not bad:
      continue
    before = [step for step in finite if step < bad[0]]
    good = (
      f"; its last finite value is {run.value_at(key, max(before)):.4g} at step"
      f" {max(before):,}"
      if before
      else ""
    )
    return Finding(
      "A loss is not finite",
      f"{key} is no number at step {bad[0]:,}{good}.",
      "Lower config.optimizer.learning_rate to a third and go on from the last"
      " checkpoint. If it happens at the same step again, look at the images"
      " and masks of that step with python -m input_pipeline.doctor. With"
      " config.model.dtype='bfloat16' try 'float32' once.",
      PROBLEM,
    )
  return None


def _diverging(run: Run) -> Finding | None:
  """The loss of the labelled images rises."""
  steps, values = run.series("train/sup_loss")
  if values.size < _MIN_LINES:
    return None
  quarters = np.array_split(np.arange(values.size), 4)
  means = [values[quarter].mean() for quarter in quarters]
  lowest = int(np.argmin(means))
  if means[-1] <= _RISE_OF_LOSS * means[lowest]:
    return None
  low, end = steps[quarters[lowest]], steps[quarters[-1]]
  return Finding(
    "The loss of the labelled images rises",
    f"train/sup_loss is {means[-1]:.3g} on average over steps {end[0]:,} to"
    f" {end[-1]:,}, and was {means[lowest]:.3g} over steps {low[0]:,} to"
    f" {low[-1]:,}.",
    "Lower config.optimizer.learning_rate. If the rise begins with the pseudo"
    " labels, lower config.unsupervised.weight or lengthen"
    " config.schedule.warmup_epochs.",
    PROBLEM,
  )


def _unusual_learning_rate(run: Run) -> Finding | None:
  """The rate, for one labelled image, is outside all recipes known to work."""
  rates = run.series("train/learning_rate")[1]
  batch = run.setting("batch.labelled")
  pretrained = run.setting("model.pretrained")
  if not rates.size or not batch or pretrained is None:
    return None
  low, high = _USUAL_RATES[bool(pretrained)]
  rate = float(rates.max())
  if low <= rate / batch <= high:
    return None
  start = "pretrained" if pretrained else "random"
  word = "high" if rate / batch > high else "low"
  return Finding(
    f"The learning rate is unusually {word} for the batch",
    f"train/learning_rate is at most {rate:.3g} with {batch} labelled images a"
    f" step and {start} weights; usual are {low * batch:.2g} to"
    f" {high * batch:.2g} for this batch.",
    "config.optimizer.learning_rate belongs to config.optimizer.reference_batch"
    " and is scaled to config.batch.labelled: set the two as the recipe that"
    " you follow has them.",
    WARNING,
  )


# -- Pseudo labels -------------------------------------------------------------


def _collapsed_teacher(run: Run) -> Finding | None:
  """The teacher gives pseudo labels of few classes only."""
  metric = "train/pseudo_label_share"
  shares = {
    name: (steps, values)
    for name, (steps, values) in _classes(run, metric).items()
    # A class that no evaluation met is perhaps in no image at all.
    if run.last("eval/miou") is None or run.last(f"eval/iou/{name}") is not None
  }
  lines = _num_lines(shares)
  if lines < _MIN_LINES:
    return None
  means = {name: _tail(values).mean() for name, (_, values) in shares.items()}
  missing = [name for name, mean in means.items() if mean < _NO_SHARE]
  if len(missing) < _MISSING_CLASSES * len(means):
    return None
  most = max(means, key=means.get)
  start = _end_of_warmup(run)
  never = [
    name
    for name in missing
    if start and (run.value_at(f"eval/iou/{name}", start[0]) or 0) < _NO_IOU
  ]
  before = (
    f" After the warm-up (step {start[0]:,}) {len(never)} of the"
    f" {len(missing)} had an IoU below {_percent(_NO_IOU)} already."
    if start
    else ""
  )
  return Finding(
    f"The teacher gives {len(means) - len(missing)} of {len(means)} classes",
    f"{metric} over {_tail_steps(run, f'{metric}/{most}')}: below"
    f" {100 * _NO_SHARE:g} % for {_names(missing)};"
    f" {_percent(means[most])} for {most}.{before}",
    "What the teacher never says the student never learns from unlabelled"
    " images. Let the labels teach these classes first: a longer"
    " config.schedule.warmup_epochs, a labelled list that holds them,"
    " pretrained weights (config.model.pretrained). config.strong.mix="
    "'classmix' pastes whole objects of rare classes.",
    PROBLEM if len(missing) >= _MOST_CLASSES * len(means) else WARNING,
  )


def _lost_classes(run: Run) -> Finding | None:
  """Classes that the labels taught and the pseudo labels undid."""
  start, end = _end_of_warmup(run), _last_evaluation(run)
  if start is None or end[0] == start[0]:
    return None
  if run.series("eval/miou")[0].size < _MIN_EVALUATIONS:
    return None
  lost = []
  for name in _classes(run, "eval/iou"):
    before = run.value_at(f"eval/iou/{name}", start[0])
    after = run.value_at(f"eval/iou/{name}", end[0])
    if before is None or after is None or before < _TAUGHT_IOU:
      continue
    if after < _LEFT_OF_IOU * before:
      lost.append(f"{name} {_percent(before)} to {_percent(after)}")
  if not lost:
    return None
  return Finding(
    "Classes got lost after the warm-up",
    f"IoU from step {start[0]:,} to step {end[0]:,}: {_names(lost)}.",
    "Their pixels are pseudo-labelled as another class, and that repeats"
    " itself. Keep fewer pseudo labels (a higher config.reliability.alpha0),"
    " give them less weight (config.unsupervised.weight), make the teacher"
    " slower (config.teacher.ema_decay) or begin with a better one"
    " (config.schedule.warmup_epochs, config.model.pretrained).",
    WARNING,
  )


def _nothing_kept(run: Run) -> Finding | None:
  """Most steps learn from no pseudo label."""
  steps, kept = run.series("train/kept_share")
  few = kept < _KEPT_NOTHING
  if kept.size < _MIN_LINES or few.mean() < 0.5:
    return None
  return Finding(
    "Almost no pseudo label is kept",
    f"train/kept_share is below {_percent(_KEPT_NOTHING)} in {few.sum()} of"
    f" {few.size} written lines from step {steps[0]:,} to {steps[-1]:,}.",
    "Kept is what lies strictly below the (100 - alpha) percentile of the"
    " entropy. Lower config.reliability.alpha0 (published: 20). With alpha as"
    " published all entropies are equal: the teacher has collapsed, see"
    " train/pseudo_label_share.",
    PROBLEM,
  )


def _everything_kept(run: Run) -> Finding | None:
  """No pixel counts as unreliable."""
  steps, kept = run.series("train/kept_share")
  full = kept > _KEPT_EVERYTHING
  if kept.size < _MIN_LINES or full.mean() < 0.5:
    return None
  return Finding(
    "Every pseudo label is kept",
    f"train/kept_share is above {_percent(_KEPT_EVERYTHING)} in {full.sum()} of"
    f" {full.size} written lines from step {steps[0]:,} to {steps[-1]:,}.",
    "Then no pixel is unreliable, wrong labels are taught with the right ones"
    " and unlabelled images give no negatives. Raise config.reliability.alpha0"
    " (published: 20).",
    WARNING,
  )


def _wrong_labels_kept(run: Run) -> Finding | None:
  """More pseudo labels are kept than are right."""
  accuracy = run.last("oracle/pixel_accuracy")
  kept = _tail_mean(run, "train/kept_share")
  if accuracy is None or kept is None:
    return None
  if 1 - accuracy <= _WRONG_SHARE or kept <= _KEPT_NEARLY_ALL:
    return None
  step = int(run.series("oracle/pixel_accuracy")[0][-1])
  return Finding(
    "Wrong pseudo labels are kept",
    f"oracle/pixel_accuracy is {_percent(accuracy)} at step {step:,}, while"
    f" train/kept_share is {_percent(kept)} over"
    f" {_tail_steps(run, 'train/kept_share')}.",
    "alpha falls to 0, so that nearly all labels are kept at the end, which is"
    " meant for a teacher that is right by then. Raise"
    " config.reliability.alpha0, lower config.unsupervised.weight, or begin"
    " with a better teacher (config.schedule.warmup_epochs,"
    " config.model.pretrained).",
    WARNING,
  )


def _confirmation_bias(run: Run) -> Finding | None:
  """The pseudo labels get worse while the networks agree."""
  for key, name in (
    ("oracle/pixel_accuracy", "pixel accuracy"),
    ("oracle/miou", "mIoU"),
  ):
    steps, values = run.series(key)
    best = run.best(key)
    if values.size < _MIN_EVALUATIONS or best[1] - values[-1] < _ORACLE_DROP:
      continue
    agreement = _tail_mean(run, "train/agreement")
    agree = (
      f" Teacher and student agree on {_percent(agreement)} of the pixels."
      if agreement is not None
      else ""
    )
    return Finding(
      "The pseudo labels get worse (confirmation bias)",
      f"{key}, the {name} against hidden masks, falls from"
      f" {_percent(best[1])} at step {best[0]:,} to {_percent(values[-1])} at"
      f" step {steps[-1]:,}.{agree}",
      "The networks confirm each other's mistakes. Stop earlier or use the"
      " best checkpoint; raise config.reliability.alpha0, lower"
      " config.unsupervised.weight, mix in every step"
      " (config.strong.mix_probability=1) or change the student's colours"
      " (config.strong.photometric=1).",
      WARNING,
    )
  return None


# -- Contrastive learning ------------------------------------------------------


def _empty_queues(run: Run) -> Finding | None:
  """Classes without negatives."""
  fills = _classes(run, "train/bank_fill")
  lines = _num_lines(fills)
  if lines < _MIN_LINES:
    return None
  empty = [n for n, (_, v) in fills.items() if v.size and v[-1] < _EMPTY_QUEUE]
  if not empty:
    return None
  found = [
    _tail_mean(run, f"train/key_candidates_{half}/{name}") or 0.0
    for name in empty
    for half in "lu"
  ]
  step = int(next(iter(fills.values()))[0][-1])
  return Finding(
    f"The memory bank is empty for {len(empty)} of {len(fills)} classes",
    f"train/bank_fill is below {_percent(_EMPTY_QUEUE)} at step {step:,} for"
    f" {_names(empty)}; over the last quarter a step finds"
    f" {sum(found) / len(empty):.1f} candidate keys for such a class.",
    "A class without negatives has no contrastive loss. Keys are pixels of"
    " other classes that the teacher ranks it high: widen the window"
    " (config.contrastive.low_rank, high_rank), set"
    " config.contrastive.negative_max_probability=1, and use neither of the"
    " quirks own_label_negatives and batch_onehot.",
    WARNING,
  )


def _rank_window(run: Run) -> Finding | None:
  """The contrastive ranks select next to nothing, or next to all."""
  low = run.setting("contrastive.low_rank")
  high = run.setting("contrastive.high_rank")
  count = _number_of_classes(run)
  if run.setting("method") != "u2pl" or not high or count < _FEW_CLASSES:
    return None
  advice = (
    "Set config.contrastive.low_rank=0 and high_rank=0: then the number of"
    " classes decides, and the log says what it chose."
  )
  evidence = f"low_rank {low} and high_rank {high} with {count} classes"
  window = min(high, count) - low
  if window > _WIDE_WINDOW * count:
    return Finding(
      "The contrastive ranks exclude next to nothing",
      f"{evidence}: an unlabelled unreliable pixel is a negative of"
      f" {window} classes.",
      advice,
      HINT,
    )
  if low > _LATE_WINDOW * count:
    return Finding(
      "The contrastive ranks leave only far-fetched negatives",
      f"{evidence}: an unlabelled unreliable pixel is a negative of {window}"
      " classes, all in the lower half of the teacher's order.",
      advice,
      WARNING,
    )
  return None


def _no_unlabelled_keys(run: Run) -> Finding | None:
  """Unlabelled pixels give no negatives: the idea of the method is off."""
  found = _classes(run, "train/key_candidates_u")
  lines = _num_lines(found)
  if lines < _MIN_LINES:
    return None
  total = sum(values.sum() for _, values in found.values())
  if total >= lines:
    return None
  alpha = run.setting("reliability.alpha0")
  return Finding(
    "Unlabelled pixels give no negatives",
    f"train/key_candidates_u: {total:.0f} in all {lines} written lines and"
    f" {len(found)} classes"
    f"{'' if alpha is None else f' (config.reliability.alpha0={alpha:g})'}.",
    "Negatives from unreliable pixels are what the method adds. Raise"
    " config.reliability.alpha0, widen [low_rank, high_rank) in"
    " config.contrastive, set negative_max_probability=1 there, and do without"
    " the quirk own_label_negatives.",
    WARNING,
  )


def _contrast_at_chance(run: Run) -> Finding | None:
  """The contrastive loss tells no class from another."""
  key = "train/contra_loss"
  levels = [
    _tail_mean(run, f"train/{name}")
    for name in (
      "contra_loss",
      "contra_chance",
      "contra_floor",
      "contra_active_classes",
      "contra_present_classes",
    )
  ]
  if None in levels:
    return None
  loss, chance, floor, active, present = levels
  if not active:
    return Finding(
      "The contrastive loss is off",
      f"train/contra_active_classes is 0 over {_tail_steps(run, key)}, of"
      f" {present:.1f} present classes.",
      "A class takes part with reliable pixels that the teacher gives more than"
      " config.contrastive.anchor_min_probability and with keys in its queue:"
      " lower the first, or see train/bank_fill.",
      WARNING,
    )
  # It is a sum over the active classes, divided by the present ones.
  loss *= present / active
  if loss < chance - _AT_CHANCE * (chance - floor):
    return None
  return Finding(
    "The contrastive loss is at chance level",
    f"{key} is {loss:.2f} an active class over {_tail_steps(run, key)}; chance"
    f" is {chance:.2f}, the floor {floor:.2f}.",
    "The representations tell no class from another. It need not fall far, but"
    " it should fall: check that config.contrastive.weight is not 0, lower"
    " config.contrastive.temperature, raise anchor_min_probability so that"
    " anchors are surely of their class.",
    WARNING,
  )


def _idle_classes(run: Run) -> Finding | None:
  """Most present classes have no part in the contrastive loss."""
  active = _tail_mean(run, "train/contra_active_classes")
  present = _tail_mean(run, "train/contra_present_classes")
  if not active or not present or active >= _IDLE_CLASSES * present:
    return None
  return Finding(
    "Most classes have no part in the contrastive loss",
    f"Over {_tail_steps(run, 'train/contra_active_classes')} {active:.1f} of"
    f" {present:.1f} present classes are active.",
    "The others have no pixel that the teacher gives more than"
    " config.contrastive.anchor_min_probability, or an empty queue"
    " (train/bank_fill): lower the first.",
    HINT,
  )


# -- mIoU ----------------------------------------------------------------------


def _unlearned_classes(run: Run) -> Finding | None:
  """Classes that are not recognised in the end."""
  end, progress = _last_evaluation(run), _progress(run)
  if end is None or (progress is not None and progress < 0.5):
    return None
  if run.series("train/sup_loss")[0].size < _MIN_LINES:
    return None
  ious = {
    name: run.value_at(f"eval/iou/{name}", end[0])
    for name in _classes(run, "eval/iou")
  }
  known = {name: iou for name, iou in ious.items() if iou is not None}
  unlearned = [name for name, iou in known.items() if iou < _NO_IOU]
  if not unlearned:
    return None
  return Finding(
    f"{len(unlearned)} of {len(known)} classes are not recognised",
    f"IoU below {_percent(_NO_IOU)} at step {end[0]:,}: {_names(unlearned)}.",
    "Count their pixels in the labelled images: python -m input_pipeline.doctor"
    " prints the share of every class. Label images that hold them, use larger"
    " crops (config.input.crop_size) for small objects,"
    " config.supervised.loss='ohem', or pretrained weights.",
    WARNING,
  )


def _worst_classes(run: Run, step: int, other: Run, other_step: int) -> str:
  """'; most in road -11.4 (from 82.3 to 70.9), ...', or nothing."""
  changes = []
  for name in _classes(run, "eval/iou"):
    after = run.value_at(f"eval/iou/{name}", step)
    before = other.value_at(f"eval/iou/{name}", other_step)
    if before is not None and after is not None and after - before < -_POINT:
      changes.append((after - before, name, before, after))
  text = ", ".join(
    f"{name} {100 * change:+.1f} ({100 * before:.1f} to {100 * after:.1f})"
    for change, name, before, after in sorted(changes)[:3]
  )
  return f"; most in {text}" if text else ""


def _teaching_advice(run: Run) -> str:
  """What helps where pseudo labels do not, of what the run has not tried."""
  mixing = run.setting("strong.mix_probability")
  mix = (
    " mixing in every step (config.strong.mix_probability=1),"
    if mixing is not None and mixing < 1
    else ""
  )
  start = (
    ""
    if run.setting("model.pretrained")
    else " This run began with random weights; the method is meant for a"
    " pretrained encoder (config.model.pretrained)."
  )
  return (
    f"Look at the other findings first. Then:{mix} more warm-up"
    " (config.schedule.warmup_epochs), fewer pseudo labels (a higher"
    " config.reliability.alpha0), less weight (config.unsupervised.weight)."
    f"{start}"
  )


def _gain_finding(
  gain: float, what: str, evidence: str, advice: str
) -> Finding | None:
  if gain >= _MARGIN:
    return None
  below = gain < -_MARGIN
  title = f"Unlabelled images {'did harm' if below else 'did not help'}: {what}"
  return Finding(title, evidence, advice, PROBLEM if below else WARNING)


def _not_above_warmup(run: Run) -> Finding | None:
  """No gain over the run's own warm-up."""
  start, end = _end_of_warmup(run), _last_evaluation(run)
  if start is None or end[0] == start[0] or not _is_over(run):
    return None
  return _gain_finding(
    end[1] - start[1],
    "no gain since the warm-up",
    f"eval/miou is {_percent(end[1])} at step {end[0]:,} and was"
    f" {_percent(start[1])} at step {start[0]:,}, the end of the warm-up"
    f"{_worst_classes(run, end[0], run, start[0])}.",
    "More steps from labels alone may well have done better: run"
    " method=supervised for the same number of updates to know."
    f" {_teaching_advice(run)}",
  )


def _not_above_baseline(run: Run, baseline: Run) -> Finding | None:
  """No gain over labels alone, where both were judged in the same way."""
  end, other = _last_evaluation(run), _last_evaluation(baseline)
  if _last_labels_step(run) is None or not _is_over(run):
    return None
  if end is None or other is None:
    return None
  for key in ("eval.protocol", "eval.pad_to", "dataset.validation_list"):
    if run.setting(key) != baseline.setting(key):
      return Finding(
        "The two runs cannot be compared",
        f"config.{key} is {run.setting(key)} here and"
        f" {baseline.setting(key)} in {baseline.workdir}.",
        "Run method=supervised with the config of this run.",
        HINT,
      )
  unfair = (
    f" The runs end at different steps ({end[0]:,} and {other[0]:,})."
    if end[0] != other[0]
    else ""
  )
  return _gain_finding(
    end[1] - other[1],
    "not above labels alone",
    f"eval/miou is {_percent(end[1])} at step {end[0]:,}, and"
    f" {_percent(other[1])} at step {other[0]:,} of {baseline.workdir}, from"
    " labels alone"
    f"{_worst_classes(run, end[0], baseline, other[0])}.{unfair}",
    _teaching_advice(run),
  )


def _drop_at_hand_over(run: Run) -> Finding | None:
  """The first evaluation of the teacher is below the last of the student."""
  start = _end_of_warmup(run)
  if start is None:
    return None
  steps, values = run.series("eval/miou")
  after = np.flatnonzero(steps > start[0])
  if not after.size or start[1] - values[after[0]] < _POINT:
    return None
  return Finding(
    "The first teacher is worse than the student before it",
    f"eval/miou falls from {_percent(start[1])} at step {start[0]:,} (student,"
    f" labels alone) to {_percent(values[after[0]])} at step"
    f" {steps[after[0]]:,} (teacher).",
    "It begins with labels that are worse than what the labels had taught."
    " Lengthen config.schedule.warmup_epochs, raise config.teacher.ema_decay"
    " (0.99 averages about 100 steps), lower config.unsupervised.weight.",
    HINT,
  )


def _still_improving(run: Run) -> Finding | None:
  """The best evaluation is the last one, by far."""
  steps, values = run.series("eval/miou")
  if values.size < _MIN_EVALUATIONS or not _is_over(run):
    return None
  before = int(np.searchsorted(steps, (1 - _TAIL) * steps[-1], "right")) - 1
  if before < 0 or values[-1] < values.max():
    return None
  if values[-1] - values[before] < _POINT:
    return None
  return Finding(
    "The run was still improving at its end",
    f"eval/miou rose from {_percent(values[before])} at step"
    f" {steps[before]:,} to {_percent(values[-1])} at step {steps[-1]:,}, its"
    " best.",
    "Part of this is the falling learning rate, part may be had by training"
    " longer: a higher config.schedule.epochs, in a new workdir. Compare with"
    " runs of the same number of updates only.",
    HINT,
  )


def _best_long_ago(run: Run) -> Finding | None:
  """The best evaluation lies well before the last."""
  steps, values = run.series("eval/miou")
  if values.size < _MIN_EVALUATIONS:
    return None
  step, best = run.best("eval/miou")
  if step > _LATE * steps[-1] or best - values[-1] < _POINT:
    return None
  return Finding(
    "The best evaluation was long ago",
    f"eval/miou was {_percent(best)} at step {step:,} and is"
    f" {_percent(values[-1])} at step {steps[-1]:,}.",
    "The best checkpoint is kept. Fewer config.schedule.epochs, a lower"
    " config.optimizer.learning_rate or a higher weight_decay may make the end"
    " the best; judge on images that chose neither.",
    WARNING,
  )


def _overfitting(run: Run) -> Finding | None:
  """Labelled crops are known by heart."""
  train = _tail_mean(run, "train/pixel_accuracy_l")
  steps, accuracy = run.series("eval/pixel_accuracy")
  if train is None or not accuracy.size:
    return None
  if train - accuracy[-1] <= _OVERFIT_GAP:
    return None
  return Finding(
    "The labelled images are learned by heart",
    f"train/pixel_accuracy_l is {_percent(train)} over"
    f" {_tail_steps(run, 'train/pixel_accuracy_l')}, eval/pixel_accuracy"
    f" {_percent(accuracy[-1])} at step {steps[-1]:,}.",
    "More labelled images help most. Else more variation (a wider"
    " config.input.scale_range), a higher config.optimizer.weight_decay or"
    " config.model.dropout, a smaller backbone, fewer epochs. Check also that"
    " validation images look like the labelled ones.",
    HINT,
  )


def _data_wait(run: Run) -> Finding | None:
  """The device waits for images."""
  steps, shares = run.series("time/data_wait_share")
  # The first line holds the start of the readers.
  if shares.size < _MIN_LINES or shares[1:].mean() <= DATA_WAIT_LIMIT:
    return None
  mean = shares[1:].mean()
  return Finding(
    "The device waits for images",
    f"time/data_wait_share is {_percent(mean)} on average over steps"
    f" {steps[1]:,} to {steps[-1]:,}.",
    DATA_WAIT_ADVICE,
    WARNING if mean >= _LONG_WAIT else HINT,
  )


CONDITIONS: tuple[Condition, ...] = (
  _not_finite,
  _diverging,
  _unusual_learning_rate,
  _nothing_kept,
  _everything_kept,
  _collapsed_teacher,
  _lost_classes,
  _confirmation_bias,
  _wrong_labels_kept,
  _drop_at_hand_over,
  _empty_queues,
  _rank_window,
  _no_unlabelled_keys,
  _contrast_at_chance,
  _idle_classes,
  _unlearned_classes,
  _still_improving,
  _best_long_ago,
  _overfitting,
  _data_wait,
)


def findings(run: Run, baseline: Run | None = None) -> list[Finding]:
  """What stands out in a run, the worst first.

  Args:
    run: finished or not.
    baseline: a supervised run of the same data. Without it the run is compared
      with its own end of warm-up.

  Returns:
    The findings; empty if no condition holds.
  """
  if baseline is None:
    gain = _not_above_warmup(run)
  else:
    gain = _not_above_baseline(run, baseline)
  found = [gain, *(condition(run) for condition in CONDITIONS)]
  found = [finding for finding in found if finding is not None]
  # Stable: of equal severity the order above stands.
  return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


# -- Text ----------------------------------------------------------------------


def _limits(run: Run) -> list[str]:
  """What could not be judged, and why."""
  notes = []
  lines = run.series("train/sup_loss")[0].size
  semi = run.series("train/unsup_loss")[0].size
  if lines < _MIN_LINES:
    notes.append(
      f"Too early for most conditions: {lines} training lines in"
      f" metrics.jsonl, {_MIN_LINES} are needed."
    )
  elif run.setting("method") == "u2pl" and semi < _MIN_LINES:
    notes.append(
      "Too early for the conditions of semi-supervised steps: they have"
      f" {semi} lines in metrics.jsonl, {_MIN_LINES} are needed."
    )
  progress = _progress(run)
  if progress is not None and progress < 1:
    notes.append(f"The run is at {_percent(progress)} of its epochs.")
  return notes


def _wrapped(label: str, text: str) -> str:
  # A number and its unit stay on one line.
  filled = textwrap.fill(
    f"{label}: {text}".replace(" %", "\N{NO-BREAK SPACE}%"),
    _WIDTH,
    initial_indent="   ",
    subsequent_indent="   ",
    break_long_words=False,
    break_on_hyphens=False,
  )
  return filled.replace("\N{NO-BREAK SPACE}", " ")


def advice_text(runs: Sequence[Run]) -> str:
  """The findings of runs as text for a terminal.

  Args:
    runs: one or more. The first supervised one among them is what the
      semi-supervised ones are compared with.

  Returns:
    Lines of at most 80 columns where words allow it.
  """
  baselines = [run for run in runs if run.setting("method") == "supervised"]
  parts = []
  for run in runs:
    is_baseline = run.setting("method") == "supervised"
    baseline = baselines[0] if baselines and not is_baseline else None
    found = findings(run, baseline)
    lines = [f"{run.name} ({run.workdir})"]
    lines += [textwrap.fill(note, _WIDTH) for note in _limits(run)]
    if not found:
      lines.append(
        f"Nothing stands out: none of {len(CONDITIONS) + 1} conditions holds."
      )
    for number, finding in enumerate(found, start=1):
      lines += [
        "",
        f"{number}. {finding.severity}: {finding.title}",
        _wrapped("Evidence", finding.evidence),
        _wrapped("What to change", finding.advice),
      ]
    parts.append("\n".join(lines))
  return "\n\n".join(parts)
