"""A run from its config to its report: check, build, resume, loop, write.

The order of the loop is a contract: update, evaluate, write the line, save.
A checkpoint of step s therefore comes after everything that belongs to s, and a
run that goes on from it begins with batch s, as if it had not been killed. Only
SIGTERM breaks an evaluation off: what it has saved says so, and the run that
goes on begins with that evaluation.
"""

import collections
import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np

from input_pipeline import DataError, RecordError
from input_pipeline.dataset_config import load_info, prepare_dataset
from input_pipeline.split_families import identify_split
from u2pl_jax import distributed, plateau, sharding, writers
from u2pl_jax import optimizer as optimizer_lib
from u2pl_jax.bad_records import BadRecords
from u2pl_jax.build import (
  DataSpec,
  Program,
  abstract_state,
  base_learning_rate,
  build,
  runs_on_one_cpu,
)
from u2pl_jax.checkpoint import Checkpoints, Meta
from u2pl_jax.clock import Clock, StallWarning, duration
from u2pl_jax.config_checks import ConfigError, check_config
from u2pl_jax.data import (
  Data,
  load_data,
  open_train_stream,
)
from u2pl_jax.evaluation_record import EvaluationRecord, write_record
from u2pl_jax.evaluator import Counts
from u2pl_jax.image_strip import image_strip
from u2pl_jax.judging import (
  contenders,
  counts_of,
  evaluate,
  evaluated_network,
  is_finished,
  no_better,
  plateau_progress,
)
from u2pl_jax.log_head import describe_devices, log_head
from u2pl_jax.models.weight_files import WeightsError
from u2pl_jax.preemption import Preempted, Preemption
from u2pl_jax.rehearsal import memory_errors_in_one_line, rehearse
from u2pl_jax.report_data import Reporter, scores_of
from u2pl_jax.run_log import RunError
from u2pl_jax.train_state import TrainState

logger = logging.getLogger(__name__)

# Updates that may be queued on the device. More would hide nothing more, and
# each holds a batch in its memory.
_MAX_IN_FLIGHT = 2

# In the workdir, the evaluation with the highest mIoU.
EVALUATION_FOLDER = "evaluation"

# Validation images in TensorBoard, of those in the report.
_NUM_LOGGED_IMAGES = 4

# What the system says where there is no room: a device, a quota, a limit.
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A non-finite one of these means that the parameters are lost.
_VITAL_METRICS = (
  "sup_loss",
  "unsup_loss",
  "contra_loss",
  "total_loss",
  "grad_norm",
)


class TrainingDivergedError(RuntimeError):
  """One line: the steps in question and the last good checkpoint."""


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  preemption: Preemption | None = None,
) -> None:
  """Trains to the end, from wherever the workdir says the run is.

  The end is the last epoch, or earlier where the schedule 'plateau' says stop.

  Compiled programs are kept in `<workdir>/../.jax_cache`, shared by the runs
  beside each other, unless JAX_COMPILATION_CACHE_DIR names another folder.

  Args:
    config: complete, see `configs/common.py`.
    workdir: created at need. A finished run's is left as it is, but for a
      report that is missing or not complete.
    preemption: says when to stop; None goes on to the end.

  Raises:
    ConfigError: of the config or the workdir.
    DataError: of the data.
    CheckpointError: of the checkpoints.
    RunError: the disk is full, or the report cannot be written.
    TrainingDivergedError: a loss is not finite.
    Preempted: asked to stop; all that was done is saved.
    OutOfMemoryError: a step does not fit on the devices.
    KeyboardInterrupt: with a line that says how to go on.
  """
  workdir = pathlib.Path(workdir)
  is_main = jax.process_index() == 0
  preemption = preemption or Preemption()
  info = load_info(config.dataset)
  check_config(
    config, num_classes=info.num_classes, num_devices=jax.device_count()
  )
  writers.check_sinks(config)
  with distributed.in_turn():
    # The first one may draw what all read.
    prepare_dataset(config.dataset)
  data = load_data(config, info)
  if is_main:
    writers.check_workdir(workdir, config)
  distributed.wait_for_all()
  _enable_compilation_cache(workdir)

  program = build(
    config,
    DataSpec(
      num_classes=info.num_classes,
      mean=info.mean,
      std=info.std,
      num_unlabelled=len(data.unlabelled),
    ),
    for_one_cpu=runs_on_one_cpu(),
  )
  abstract = abstract_state(config, program)
  log_head(config, workdir, program, data, abstract)
  config_digest = writers.config_digest(config)
  lists = writers.digest([data.labelled, data.unlabelled, data.validation])
  distributed.check_equal(
    config_digest, "another config than process 0: start all with the same"
  )
  distributed.check_equal(
    lists, "other lists of images than process 0: give all the same data set"
  )

  with contextlib.ExitStack() as stack:
    stack.enter_context(_full_disk_in_one_line(workdir))
    stack.enter_context(
      memory_errors_in_one_line(config, program.mesh.devices.size)
    )
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    stack.callback(checkpoints.close)

    compiled = set()
    newest = checkpoints.newest_meta()
    ended = newest is not None and is_finished(config, program.recipe, newest)
    # As process 0 sees it, since it takes all of them.
    if not json.loads(distributed.share(json.dumps(ended))):
      compiled.add(rehearse(config, program, abstract))

    # Where to begin:
    # 1. the newest checkpoint of the workdir that can be read;
    # 2. without any checkpoint, step 0: weights from config.model.pretrained
    #    if it is set, random ones otherwise.
    restored = checkpoints.restore_latest(
      abstract, config=config_digest, lists=lists
    )
    if restored is None:
      if (workdir / writers.METRICS_FILE).exists():
        logger.warning(
          "%s has no checkpoint yet: starting from step 0 again", workdir
        )
      state = _create_state(config, program)
      meta = Meta(0, None, None, "student", config=config_digest, lists=lists)
    else:
      state, meta = restored
      logger.info("going on from the checkpoint of step %d", meta.step)
    del restored  # Or it would hold the donated state.

    # Not earlier: a config that does not fit the checkpoints must not stay.
    if is_main:
      writers.write_config(workdir, config)
      writers.write_dataset(workdir, info, config.dataset.ignore_label)
    recipe = program.recipe
    was_finished = is_finished(config, recipe, meta)
    reporter = Reporter(
      config, program, data, workdir, devices=describe_devices(program)
    )
    if not was_finished:
      writer = None
      if is_main:
        writer = writers.open_writer(
          workdir,
          config,
          class_names=info.class_names,
          # Without the line that is still to be completed.
          last_step=meta.step - (meta.pending_line is not None),
        )
        stack.callback(writer.close)
      run = _Run(
        config,
        program,
        data,
        checkpoints,
        writer,
        reporter,
        workdir,
        preemption,
      )
      run.compiled |= compiled
      state, meta = run.train(state, meta)
      if preemption.reached():
        raise Preempted(
          f"SIGTERM: stopped after step {meta.step}, the last one, before its"
          " report was drawn; run the same command again to draw it"
        )
    progress = plateau_progress(config, recipe, meta.evaluations)
    if meta.step < recipe.total_steps:
      logger.info(
        "the run stopped early, at step %d of %d: %s after %d reductions of the"
        " learning rate",
        meta.step,
        recipe.total_steps,
        no_better(config, progress.waited),
        progress.reductions,
      )
    elif was_finished:
      logger.info("the run is finished: all %d steps are done", meta.step)

    page = reporter.page
    if is_main and not (was_finished and reporter.is_complete(meta.step)):
      network, variables = evaluated_network(state, meta.step, recipe)
      reporter.finish(
        variables,
        network=network,
        step=meta.step,
        best_step=meta.contenders[-1] if meta.contenders else None,
      )
    distributed.wait_for_all()
  logger.info(
    "best mIoU %.4f at step %d; report: %s",
    meta.best_miou,
    meta.best_step,
    page,
  )


def _put(program: Program, batch: dict, *names: str) -> dict[str, jax.Array]:
  """The named entries of a batch, on the devices."""
  return sharding.put_batch(program.mesh, {name: batch[name] for name in names})


# -- The loop ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Due:
  """What is to be done after a step."""

  log: bool
  evaluation: bool
  save: bool
  images: bool


class _Run:
  """The loop and what it needs at every turn."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    program: Program,
    data: Data,
    checkpoints: Checkpoints,
    writer: writers.MetricsWriter | None,
    reporter: Reporter,
    workdir: pathlib.Path,
    preemption: Preemption,
  ):
    """`writer` is None on all processes but the first."""
    self._config = config
    self._workdir = workdir
    self._program = program
    self._data = data
    self._checkpoints = checkpoints
    self._writer = writer
    self._reporter = reporter
    self._preemption = preemption
    self._clock = Clock()
    self._stall_warning = StallWarning()
    self._bad_records: BadRecords | None = None
    self.compiled: set[str] = set()
    self._last_finite_step = 0

  def train(self, state: TrainState, meta: Meta) -> tuple[TrainState, Meta]:
    """Goes on from `meta.step` to the last step; `state` is donated."""
    step = self._last_finite_step = meta.step
    # (step, whether it is complete) of the newest checkpoint.
    self._saved = (step, meta.pending_line is None)
    in_flight = collections.deque()
    if self._config.input.on_bad_record == "skip":
      self._bad_records = BadRecords(
        (*self._data.labelled, *self._data.unlabelled),
        limit=self._config.input.max_bad_records,
        known=meta.bad_records,
      )
    try:
      if meta.pending_line is not None:
        state, meta = self._complete(state, meta, {**meta.pending_line})
      elif meta.contenders and meta.contenders[-1] == step:
        if self._writer is not None:
          network, variables = evaluated_network(
            state, step, self._program.recipe
          )
          self._reporter.draw_missing(variables, network=network, step=step)
        distributed.wait_for_all()
      with contextlib.ExitStack() as streams:
        batches = self._batches(step, streams)
        finished = self._is_finished(meta)
        while not finished:
          state, metrics = self._update(state, next(batches))
          self._preemption.hold()
          in_flight.append(metrics["total_loss"])
          if len(in_flight) > _MAX_IN_FLIGHT:
            in_flight.popleft().block_until_ready()
          step += 1
          state, meta = self._after_update(step, state, metrics, meta)
          finished = self._is_finished(meta)
          if not finished and self._preemption.reached():
            self._check_finite(step, jax.device_get(metrics), {})
            self._stop(state, meta)
    except KeyboardInterrupt:
      raise KeyboardInterrupt(
        f"interrupted at step {step}; {self._last_checkpoint()}; run the same"
        " command again to go on"
      ) from None
    except DataError as error:
      raise DataError(
        f"{error}; stopped at step {step}; {self._last_checkpoint()}; run the"
        " same command again to go on once the data are mended"
      ) from None
    self._checkpoints.wait()
    self._preemption.release("while the report was being drawn")
    return state, meta

  def _stop(self, state: TrainState, meta: Meta) -> NoReturn:
    """Saves what is not saved yet and leaves, as SIGTERM asks for."""
    is_complete = meta.pending_line is None
    with self._preemption.saving():
      if self._saved != (meta.step, is_complete):
        if self._writer is not None:
          self._writer.sync()
        self._checkpoints.save_preempted(state, meta)
      self._checkpoints.wait()
    raise Preempted(
      f"SIGTERM: stopped after step {meta.step} of"
      f" {self._program.recipe.total_steps}"
      + ("" if is_complete else ", before its evaluation was done")
      + "; all is saved; run the same command again to go on"
    )

  def _batches(
    self, first: int, streams: contextlib.ExitStack
  ) -> Iterator[list[dict[str, jax.Array]]]:
    """Yields what each update from `first` on reads, on the devices."""
    config, program = self._config, self._program
    recipe = program.recipe

    def open_stream(labelled: bool, step: int):
      stream = open_train_stream(
        config,
        self._data,
        recipe,
        self._bad_records,
        labelled=labelled,
        step=step,
      )
      streams.callback(stream.close)
      self._stall_warning.stream_opens()
      return stream

    stream_l = open_stream(True, first)
    stream_u = None
    for step in range(first, recipe.total_steps):
      semi = step >= recipe.warmup_steps
      if semi and stream_u is None:
        # Only now: the warm-up reads no unlabelled image.
        stream_u = open_stream(False, step)
      with self._clock.waiting_for_data():
        batch = self._next_batch(stream_l)
        batches = [_put(program, batch, "image", "label", "valid_box")]
        if semi:
          batch = self._next_batch(stream_u)
          batches.append(_put(program, batch, "image", "valid_box"))
      yield batches

  def _next_batch(
    self, stream: Iterator[dict[str, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    try:
      return next(stream)
    except RecordError as error:
      hint = ""
      if self._bad_records is None:
        hint = ", or set config.input.on_bad_record='skip' to do without it"
      raise DataError(f"training image {error.id!r}: {error}{hint}") from None

  def _update(
    self, state: TrainState, batches: list[dict[str, jax.Array]]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step; the metrics are still on the devices."""
    name = "semi_supervised_step" if len(batches) == 2 else "supervised_step"
    result = self._call(name, state, *batches)
    self._clock.count(sum(batch["image"].shape[0] for batch in batches))
    return result

  def _call(self, name: str, *args: Any) -> Any:
    """Calls a step of the program; says so when that means compiling it."""
    function = getattr(self._program, name)
    if name in self.compiled:
      return function(*args)
    self.compiled.add(name)
    logger.info("compiling %s ...", name)
    start = time.perf_counter()
    with self._clock.paused():
      distributed.compile_together(function, *args)
      result = function(*args)
    logger.info("compiled in %.1f s", time.perf_counter() - start)
    return result

  def _after_update(
    self,
    step: int,
    state: TrainState,
    metrics: dict[str, jax.Array],
    meta: Meta,
  ) -> tuple[TrainState, Meta]:
    """Logs, evaluates, writes and saves what is due after `step` updates."""
    network, _ = evaluated_network(state, step, self._program.recipe)
    meta = dataclasses.replace(meta, step=step, network=network)
    due = self._due(step)
    anything_due = any(dataclasses.astuple(due))
    if self._bad_records is not None:
      if anything_due:
        self._bad_records.gather()
      meta = dataclasses.replace(meta, bad_records=self._bad_records.ids)
    if not anything_due:
      return state, meta

    # Also before a save, so that every checkpoint is a good one.
    train_metrics = jax.device_get(metrics)
    line = {}
    if due.log:
      line |= self._train_line(step, state, train_metrics)
      self._clock.restart()
    self._check_finite(step, train_metrics, line)
    with self._clock.paused():
      return self._complete(state, meta, line)

  def _is_finished(self, meta: Meta) -> bool:
    return is_finished(self._config, self._program.recipe, meta)

  def _due(self, step: int) -> _Due:
    config, recipe = self._config, self._program.recipe

    def is_due(interval: int) -> bool:
      return step % interval == 0 or step == recipe.total_steps

    image_epochs = config.log.images_every_epochs
    return _Due(
      log=is_due(config.log.every_steps),
      evaluation=is_due(config.eval.every_epochs * recipe.steps_per_epoch),
      save=is_due(config.checkpoint.every_epochs * recipe.steps_per_epoch),
      images=image_epochs > 0 and is_due(image_epochs * recipe.steps_per_epoch),
    )

  def _complete(
    self, state: TrainState, meta: Meta, line: dict[str, Any]
  ) -> tuple[TrainState, Meta]:
    """All that is due after the update of `meta.step` has been logged.

    Args:
      state: after that update.
      meta: without its evaluation.
      line: metrics of the update.

    Returns:
      State, perhaps with another learning rate, and meta data of the step.
    """
    config, recipe = self._config, self._program.recipe
    step, due = meta.step, self._due(meta.step)
    save_due, is_highest = due.save, False
    if due.evaluation:
      try:
        evaluation, counts = self._evaluate(step, state)
      except Preempted:
        names = self._data.info.class_names
        self._stop(
          state,
          dataclasses.replace(meta, pending_line=writers.expand(line, names)),
        )
      line |= evaluation
      evaluations = (*meta.evaluations, (step, line["eval/miou"]))
      rivals = contenders(config, evaluations)
      best_step, best_miou = rivals[0]
      meta = dataclasses.replace(
        meta,
        best_miou=best_miou,
        best_step=best_step,
        evaluations=evaluations,
        contenders=tuple(step for step, _ in rivals),
        pending_line=None,
      )
      state = self._follow_plateau(state, evaluations, line)
      is_highest = rivals[-1][0] == step
      save_due |= is_highest or self._is_finished(meta)
      if is_highest:
        record = self._record(meta, counts)
    if line and self._writer is not None:
      self._writer.write(step, line)
    if due.images and self._writer is not None:
      self._write_images(step, state)
    if save_due:
      if self._writer is not None:
        self._writer.sync()
      # Not in the save: its timeouts are made for files.
      distributed.wait_for_all()
      self._checkpoints.save(state, meta)
      self._saved = (step, True)
    # After SIGTERM the run that goes on draws it. All processes ask.
    if (
      is_highest and not self._preemption.reached() and self._writer is not None
    ):
      network, variables = evaluated_network(state, step, recipe)
      self._reporter.draw(
        variables, network=network, step=step, scores=scores_of(record)
      )
    # For the first process, which may have drawn for longer than another one
    # would wait in the next step.
    distributed.wait_for_all()
    return state, meta

  def _follow_plateau(
    self,
    state: TrainState,
    evaluations: plateau.Evaluations,
    line: dict[str, Any],
  ) -> TrainState:
    """Reduces the learning rate where the last evaluation asks for it.

    Args:
      state: after the update that was evaluated.
      evaluations: with the last one.
      line: gets the metrics of the watch, if the schedule is 'plateau'.

    Returns:
      The state, perhaps with another rate.
    """
    config, recipe = self._config, self._program.recipe
    progress = plateau_progress(config, recipe, evaluations)
    if progress is None:
      return state
    line |= {
      "eval/plateau_waited": progress.waited,
      "eval/plateau_reductions": progress.reductions,
      "eval/plateau_stop": int(progress.stop),
    }
    before = plateau_progress(config, recipe, evaluations[:-1])
    if progress.reductions == before.reductions:
      return state
    optimizer = config.optimizer
    rate = base_learning_rate(config)
    rate *= optimizer.decay_factor**progress.reductions
    logger.info(
      "%s: learning rate %g from now on, reduction %d of %d",
      no_better(config, optimizer.plateau.patience),
      rate,
      progress.reductions,
      optimizer.plateau.reductions,
    )
    return state.replace(
      opt_state=optimizer_lib.set_learning_rate(state.opt_state, rate)
    )

  def _write_images(self, step: int, state: TrainState) -> None:
    """Pictures of the same few validation images every time."""
    _, variables = evaluated_network(state, step, self._program.recipe)
    ids = self._data.validation[: self._config.log.report_images]
    samples = self._reporter.samples(
      variables, [(image_id, "first") for image_id in ids[:_NUM_LOGGED_IMAGES]]
    )
    palette = np.asarray(self._data.info.palette)
    self._writer.write_images(
      step,
      {
        f"eval/image/{sample.id}": image_strip(
          image=sample.image,
          truth=sample.truth,
          prediction=sample.prediction,
          entropy=sample.entropy,
          palette=palette,
        )
        for sample in samples
      },
    )

  def _train_line(
    self, step: int, state: TrainState, metrics: dict[str, Any]
  ) -> dict[str, Any]:
    """Logs the progress line; returns the metrics to write."""
    recipe = self._program.recipe
    semi = step > recipe.warmup_steps
    speed = self._clock.read()
    if semi:
      phase, end = "semi", recipe.total_steps
    elif recipe.warmup_steps < recipe.total_steps:
      # Semi-supervised steps take longer by a factor that is not known yet.
      phase, end = "warm-up", recipe.warmup_steps
    else:
      phase, end = "supervised", recipe.total_steps
    losses = " ".join(
      f"{name.removesuffix('_loss')} {float(metrics[name]):.4f}"
      for name in ("sup_loss", "unsup_loss", "contra_loss")
      if name in metrics
    )
    if slow_input := self._stall_warning.of_line(speed["time/data_wait_share"]):
      logger.warning(slow_input)
    seconds = speed["time/seconds_per_step"] * (end - step)
    logger.info(
      "%s  epoch %d/%d  step %d/%d  %s  %.1f images/s  data wait %.0f%%  %s %s",
      phase,
      math.ceil(step / recipe.steps_per_epoch),
      recipe.total_steps // recipe.steps_per_epoch,
      step,
      recipe.total_steps,
      losses,
      speed["time/images_per_second"],
      100 * speed["time/data_wait_share"],
      "warm-up ends in" if phase == "warm-up" else "ETA",
      duration(seconds),
    )
    line = {f"train/{name}": value for name, value in metrics.items()}
    rate = self._program.learning_rate
    # The rate of this update, which was number step - 1 counted from 0.
    line["train/learning_rate"] = float(
      rate(step - 1)
      if callable(rate)
      else optimizer_lib.get_learning_rate(state.opt_state)
    )
    line["train/epoch"] = step / recipe.steps_per_epoch
    if self._bad_records is not None:
      line["train/bad_records"] = len(self._bad_records.ids)
    return line | speed

  def _check_finite(
    self, step: int, metrics: dict[str, Any], line: dict[str, Any]
  ) -> None:
    bad = [
      f"{name}={float(metrics[name])}"
      for name in _VITAL_METRICS
      if name in metrics and not np.isfinite(metrics[name])
    ]
    if not bad:
      self._last_finite_step = step
      return
    if line and self._writer is not None:
      self._writer.write(step, line)
    raise TrainingDivergedError(
      f"not finite at step {step}: {', '.join(bad)} (all was well at step"
      f" {self._last_finite_step}); {self._last_checkpoint()}; lower"
      " config.optimizer.learning_rate or look at the images of these steps"
    )

  def _record(self, meta: Meta, counts: Counts) -> EvaluationRecord:
    """The evaluation with the highest mIoU so far; also writes it."""
    record = self._program.evaluator.record(
      counts,
      checkpoint=str(self._workdir),
      step=meta.step,
      weights=meta.network,
      config_hash=meta.config,
      class_names=self._data.info.class_names,
      image_ids=self._data.validation,
    )
    if self._writer is not None:
      write_record(self._workdir / EVALUATION_FOLDER, record)
    return record

  def _evaluate(
    self, step: int, state: TrainState
  ) -> tuple[dict[str, Any], Counts]:
    """Metrics of the network to judge, and its counts."""
    start = time.perf_counter()
    recipe, data = self._program.recipe, self._data
    _, variables = evaluated_network(state, step, recipe)
    of_run = (self._config, self._program, data)
    check = self._preemption.check
    counts = counts_of(*of_run, variables, data.validation, check)
    line = evaluate(*of_run, state, step, counts, check)
    line |= identify_split(data.info.name, data.labelled).metrics()
    line["time/eval_seconds"] = time.perf_counter() - start
    oracle = ""
    if "oracle/miou" in line:
      oracle = (
        f"; hidden labels of {len(self._data.oracle)} unlabelled images: mIoU"
        f" {line['oracle/miou']:.4f}, ARI {line['oracle/ari']:.4f}"
      )
    logger.info(
      "evaluation of the %s  step %d/%d  mIoU %.4f  pixel accuracy %.4f"
      "  %.1f s%s",
      evaluated_network(state, step, recipe)[0],
      step,
      recipe.total_steps,
      line["eval/miou"],
      line["eval/pixel_accuracy"],
      line["time/eval_seconds"],
      oracle,
    )
    return line, counts

  def _last_checkpoint(self) -> str:
    self._checkpoints.wait()
    steps = self._checkpoints.steps()
    if not steps:
      return "there is no checkpoint yet"
    return (
      f"the last good checkpoint is of step {steps[-1]} in"
      f" {self._checkpoints.directory}"
    )


# -- Setting up ----------------------------------------------------------------


def _create_state(
  config: ml_collections.ConfigDict, program: Program
) -> TrainState:
  """The state of step 0; ConfigError if the pretrained weights are unfit."""
  try:
    return program.create_state()
  except WeightsError as error:
    raise ConfigError(
      f"config.model.pretrained={error}; set it to the weights of the encoder,"
      " or to '' to start from random ones"
    ) from error


@contextlib.contextmanager
def _full_disk_in_one_line(workdir: pathlib.Path) -> Iterator[None]:
  """RunError for the one error of files that is no fault of the program."""
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL_DISK:
      raise
    raise RunError(
      f"{error.filename or workdir}: cannot be written ({error.strerror}): make"
      " room, then run the same command again; it goes on from the last"
      " checkpoint that is complete"
    ) from error


def _enable_compilation_cache(workdir: pathlib.Path) -> None:
  if jax.config.jax_compilation_cache_dir is None:
    path = workdir.absolute().parent / ".jax_cache"
    jax.config.update("jax_compilation_cache_dir", str(path))
