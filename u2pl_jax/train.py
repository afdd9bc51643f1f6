"""A run from its config to its report: check, build, resume, loop, write.

The order of the loop is a contract: update, evaluate, write the line, save.
A checkpoint of step s therefore comes after everything that belongs to s, and a
run that goes on from it begins with batch s, as if it had not been killed.
"""

import collections
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from input_pipeline.dataset_config import load_info, prepare_dataset
from input_pipeline.split_families import identify_split
from u2pl_jax import distributed, plateau, sharding, writers
from u2pl_jax import optimizer as optimizer_lib
from u2pl_jax.build import (
  DataSpec,
  Program,
  abstract_state,
  base_learning_rate,
  build,
)
from u2pl_jax.checkpoint import Checkpoints, Meta
from u2pl_jax.clock import Clock, duration
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
from u2pl_jax.report_data import Reporter, scores_of
from u2pl_jax.train_state import TrainState

logger = logging.getLogger(__name__)

# Updates that may be queued on the device. More would hide nothing more, and
# each holds a batch in its memory.
_MAX_IN_FLIGHT = 2

# In the workdir, the evaluation with the highest mIoU.
EVALUATION_FOLDER = "evaluation"

# Validation images in TensorBoard, of those in the report.
_NUM_LOGGED_IMAGES = 4

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
  config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> None:
  """Trains to the end, from wherever the workdir says the run is.

  The end is the last epoch, or earlier where the schedule 'plateau' says stop.

  Compiled programs are kept in `<workdir>/../.jax_cache`, shared by the runs
  beside each other, unless JAX_COMPILATION_CACHE_DIR names another folder.

  Args:
    config: complete, see `configs/common.py`.
    workdir: created at need. A finished run's is left as it is, but for a
      missing report.

  Raises:
    ConfigError: of the config or the workdir.
    DataError: of the data.
    CheckpointError: of the checkpoints.
    TrainingDivergedError: a loss is not finite.
    KeyboardInterrupt: with a line that says how to go on.
  """
  workdir = pathlib.Path(workdir)
  is_main = jax.process_index() == 0
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
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    stack.callback(checkpoints.close)

    # Where to begin:
    # 1. the newest checkpoint of the workdir that can be read;
    # 2. without any checkpoint, step 0: weights from config.model.pretrained
    #    if it is set, random ones otherwise.
    restored = checkpoints.restore_latest(
      abstract, config=config_digest, lists=lists
    )
    if restored is None:
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
          workdir, config, class_names=info.class_names, last_step=meta.step
        )
        stack.callback(writer.close)
      run = _Run(config, program, data, checkpoints, writer, reporter, workdir)
      state, meta = run.train(state, meta)
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
    if is_main and not (was_finished and page.exists()):
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
  ):
    """`writer` is None on all processes but the first."""
    self._config = config
    self._workdir = workdir
    self._program = program
    self._data = data
    self._checkpoints = checkpoints
    self._writer = writer
    self._reporter = reporter
    self._clock = Clock()
    self._compiled: set[str] = set()
    self._last_finite_step = 0

  def train(self, state: TrainState, meta: Meta) -> tuple[TrainState, Meta]:
    """Goes on from `meta.step` to the last step; `state` is donated."""
    step = self._last_finite_step = meta.step
    in_flight = collections.deque()
    try:
      with contextlib.ExitStack() as streams:
        for batches in self._batches(meta.step, streams):
          state, metrics = self._update(state, batches)
          in_flight.append(metrics["total_loss"])
          if len(in_flight) > _MAX_IN_FLIGHT:
            in_flight.popleft().block_until_ready()
          step += 1
          state, meta = self._after_update(step, state, metrics, meta)
          if is_finished(self._config, self._program.recipe, meta):
            break
    except KeyboardInterrupt:
      raise KeyboardInterrupt(
        f"interrupted at step {step}; {self._last_checkpoint()}; run the same"
        " command again to go on"
      ) from None
    self._checkpoints.wait()
    return state, meta

  def _batches(
    self, first: int, streams: contextlib.ExitStack
  ) -> Iterator[list[dict[str, jax.Array]]]:
    """Yields what each update from `first` on reads, on the devices."""
    config, program = self._config, self._program
    recipe = program.recipe

    def open_stream(labelled: bool, step: int):
      stream = open_train_stream(
        config, self._data, recipe, labelled=labelled, step=step
      )
      streams.callback(stream.close)
      return stream

    stream_l = open_stream(True, first)
    stream_u = None
    for step in range(first, recipe.total_steps):
      semi = step >= recipe.warmup_steps
      if semi and stream_u is None:
        # Only now: the warm-up reads no unlabelled image.
        stream_u = open_stream(False, step)
      with self._clock.waiting_for_data():
        batches = [_put(program, next(stream_l), "image", "label", "valid_box")]
        if semi:
          batches.append(_put(program, next(stream_u), "image", "valid_box"))
      yield batches

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
    if name in self._compiled:
      return function(*args)
    self._compiled.add(name)
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
    config, recipe = self._config, self._program.recipe

    def is_due(interval: int) -> bool:
      return step % interval == 0 or step == recipe.total_steps

    log_due = is_due(config.log.every_steps)
    eval_due = is_due(config.eval.every_epochs * recipe.steps_per_epoch)
    save_due = is_due(config.checkpoint.every_epochs * recipe.steps_per_epoch)
    image_epochs = config.log.images_every_epochs
    images_due = image_epochs > 0 and is_due(
      image_epochs * recipe.steps_per_epoch
    )
    network, _ = evaluated_network(state, step, recipe)
    meta = dataclasses.replace(meta, step=step, network=network)
    if not (log_due or eval_due or save_due or images_due):
      return state, meta

    # Also before a save, so that every checkpoint is a good one.
    train_metrics = jax.device_get(metrics)
    line = {}
    if log_due:
      line |= self._train_line(step, state, train_metrics)
      self._clock.restart()
    self._check_finite(step, train_metrics, line)
    with self._clock.paused():
      is_highest = False
      if eval_due:
        evaluation, counts = self._evaluate(step, state)
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
        )
        state = self._follow_plateau(state, evaluations, line)
        is_highest = rivals[-1][0] == step
        save_due |= is_highest or is_finished(config, recipe, meta)
        if is_highest:
          record = self._record(meta, counts)
      if line and self._writer is not None:
        self._writer.write(step, line)
      if images_due and self._writer is not None:
        self._write_images(step, state)
      if save_due:
        if self._writer is not None:
          self._writer.sync()
        # Not in the save: its timeouts are made for files.
        distributed.wait_for_all()
        self._checkpoints.save(state, meta)
      if is_highest and self._writer is not None:
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
    counts = counts_of(*of_run, variables, data.validation)
    line = evaluate(*of_run, state, step, counts)
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


def _enable_compilation_cache(workdir: pathlib.Path) -> None:
  if jax.config.jax_compilation_cache_dir is None:
    path = workdir.absolute().parent / ".jax_cache"
    jax.config.update("jax_compilation_cache_dir", str(path))
