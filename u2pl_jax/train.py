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
from u2pl_jax import metrics as metrics_lib
from u2pl_jax import report, sharding, writers
from u2pl_jax.build import (
  DataSpec,
  Program,
  abstract_state,
  base_learning_rate,
  build,
)
from u2pl_jax.checkpoint import Checkpoints, Meta
from u2pl_jax.config_checks import ConfigError, check_config
from u2pl_jax.data import (
  Data,
  load_data,
  open_eval_stream,
  open_train_stream,
)
from u2pl_jax.models.weight_files import WeightsError
from u2pl_jax.train_state import TrainState, Variables
from u2pl_jax.train_step import Recipe

logger = logging.getLogger(__name__)

# Updates that may be queued on the device. More would hide nothing more, and
# each holds a batch in its memory.
_MAX_IN_FLIGHT = 2

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
  info = load_info(config.dataset)
  check_config(
    config, num_classes=info.num_classes, num_devices=jax.device_count()
  )
  prepare_dataset(config.dataset)
  data = load_data(config, info)
  writers.check_workdir(workdir, config)
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
  _log_head(config, workdir, program, data, abstract)
  config_digest = writers.config_digest(config)
  lists = writers.digest([data.labelled, data.unlabelled, data.validation])

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
    is_main = jax.process_index() == 0
    if is_main:
      writers.write_config(workdir, config)
      writers.write_dataset(workdir, info, config.dataset.ignore_label)
    total_steps = program.recipe.total_steps
    was_finished = meta.step == total_steps
    if was_finished:
      logger.info("the run is finished: all %d steps are done", total_steps)
    else:
      writer = None
      if is_main:
        writer = writers.MetricsWriter(
          workdir, class_names=info.class_names, last_step=meta.step
        )
        stack.callback(writer.close)
      run = _Run(config, program, data, checkpoints, writer)
      state, meta = run.train(state, meta)

    page = workdir / "report" / "index.html"
    if not (was_finished and page.exists()):
      _, variables = evaluated_network(state, meta.step, program.recipe)
      samples = report_samples(config, program, data, variables)
      if is_main:
        page = report.write_report(
          workdir, samples, info, config.dataset.ignore_label
        )
  logger.info(
    "best mIoU %.4f at step %d; report: %s",
    meta.best_miou,
    meta.best_step,
    page,
  )


# -- Evaluation ----------------------------------------------------------------


def _put(program: Program, batch: dict, *names: str) -> dict[str, jax.Array]:
  """The named entries of a batch, on the devices."""
  return sharding.put_batch(program.mesh, {name: batch[name] for name in names})


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


def confusion_of(
  config: ml_collections.ConfigDict,
  program: Program,
  data: Data,
  variables: Variables,
  ids: tuple[str, ...],
) -> np.ndarray:
  """[k, k] int64 confusion matrix over the images `ids`."""
  num_classes = data.info.num_classes
  total = np.zeros((num_classes, num_classes), np.int64)
  # The matrix of a batch is fetched when the next one is on its way.
  pending = None
  with contextlib.closing(open_eval_stream(config, data, ids)) as stream:
    for batch in stream:
      batch = _put(program, batch, "image", "label", "valid_box", "is_real")
      confusion = program.eval_step(variables, batch)
      if pending is not None:
        total += np.asarray(pending, np.int64)
      pending = confusion
  return total + np.asarray(pending, np.int64)


def evaluate(
  config: ml_collections.ConfigDict,
  program: Program,
  data: Data,
  state: TrainState,
  step: int,
) -> dict[str, Any]:
  """Metrics `eval/...` of the validation images, `oracle/...` of hidden masks.

  Args:
    config, program, data: of the run.
    state: after `step` updates.
    step: decides which network is judged.

  Returns:
    Numbers, and the vector `eval/iou` with NaN for a class that is absent.
  """
  name, variables = evaluated_network(state, step, program.recipe)
  confusion = confusion_of(config, program, data, variables, data.validation)
  metrics = {
    "eval/miou": metrics_lib.mean_iou(confusion),
    "eval/miou_present": metrics_lib.mean_iou_present(confusion),
    "eval/pixel_accuracy": metrics_lib.pixel_accuracy(confusion),
    "eval/iou": metrics_lib.iou(confusion),
  }
  if name == "teacher" and data.oracle:
    confusion = confusion_of(config, program, data, variables, data.oracle)
    metrics |= {
      "oracle/pixel_accuracy": metrics_lib.pixel_accuracy(confusion),
      "oracle/ari": metrics_lib.adjusted_rand_index(confusion),
      "oracle/miou": metrics_lib.mean_iou(confusion),
    }
  return metrics


def report_samples(
  config: ml_collections.ConfigDict,
  program: Program,
  data: Data,
  variables: Variables,
) -> list[report.Sample]:
  """The first validation images with what the network makes of them."""
  ids = data.validation[: config.log.report_images]
  if not ids:
    return []
  samples = {}
  with contextlib.closing(open_eval_stream(config, data, ids)) as stream:
    for batch in stream:
      classes, entropies = jax.device_get(
        program.predict_step(
          variables, _put(program, batch, "image", "valid_box")
        )
      )
      for row in np.flatnonzero(batch["is_real"]):
        top, left, bottom, right = batch["valid_box"][row]
        inside = np.s_[row, top:bottom, left:right]
        index = int(batch["index"][row])
        samples[index] = report.Sample(
          id=ids[index],
          image=batch["image"][inside],
          truth=batch["label"][inside],
          prediction=classes[inside],
          entropy=entropies[inside],
        )
  return [samples[index] for index in sorted(samples)]


# -- The loop ------------------------------------------------------------------


class _Clock:
  """Speed since the last written line, without compilation and evaluation."""

  def __init__(self):
    self._begin = time.perf_counter()
    self.restart()

  def restart(self) -> None:
    self._start = time.perf_counter()
    self._waited = 0.0
    self._steps = self._images = 0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self._start += time.perf_counter() - start

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  def count(self, num_images: int) -> None:
    self._steps += 1
    self._images += num_images

  def read(self) -> dict[str, float]:
    """All that depends on the clock: the metrics named time/."""
    elapsed = max(time.perf_counter() - self._start, 1e-9)
    return {
      "time/images_per_second": self._images / elapsed,
      "time/seconds_per_step": elapsed / max(self._steps, 1),
      "time/data_wait_share": self._waited / elapsed,
      "time/seconds": time.perf_counter() - self._begin,
    }


class _Run:
  """The loop and what it needs at every turn."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    program: Program,
    data: Data,
    checkpoints: Checkpoints,
    writer: writers.MetricsWriter | None,
  ):
    """`writer` is None on all processes but the first."""
    self._config = config
    self._program = program
    self._data = data
    self._checkpoints = checkpoints
    self._writer = writer
    self._clock = _Clock()
    self._compiled: set[str] = set()
    self._last_finite_step = 0

  def train(self, state: TrainState, meta: Meta) -> tuple[TrainState, Meta]:
    """Goes on from `meta.step` to the last step; `state` is donated."""
    step = self._last_finite_step = meta.step
    try:
      with contextlib.ExitStack() as streams:
        updates = self._updates(state, meta.step, streams)
        for step, state, metrics in updates:  # noqa: B020
          meta = self._after_update(step, state, metrics, meta)
    except KeyboardInterrupt:
      raise KeyboardInterrupt(
        f"interrupted at step {step}; {self._last_checkpoint()}; run the same"
        " command again to go on"
      ) from None
    self._checkpoints.wait()
    return state, meta

  def _updates(
    self, state: TrainState, first: int, streams: contextlib.ExitStack
  ) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Yields (updates done, state, metrics on the device) after every one."""
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
    in_flight = collections.deque()
    for step in range(first, recipe.total_steps):
      semi = step >= recipe.warmup_steps
      if semi and stream_u is None:
        # Only now: the warm-up reads no unlabelled image.
        stream_u = open_stream(False, step)
      with self._clock.waiting_for_data():
        batches = [_put(program, next(stream_l), "image", "label", "valid_box")]
        if semi:
          batches.append(_put(program, next(stream_u), "image", "valid_box"))
      if semi:
        state, metrics = self._call("semi_supervised_step", state, *batches)
      else:
        state, metrics = self._call("supervised_step", state, *batches)
      self._clock.count(sum(batch["image"].shape[0] for batch in batches))
      in_flight.append(metrics["total_loss"])
      if len(in_flight) > _MAX_IN_FLIGHT:
        in_flight.popleft().block_until_ready()
      yield step + 1, state, metrics

  def _call(self, name: str, *args: Any) -> Any:
    """Calls a step of the program; says so when that means compiling it."""
    function = getattr(self._program, name)
    if name in self._compiled:
      return function(*args)
    self._compiled.add(name)
    logger.info("compiling %s ...", name)
    start = time.perf_counter()
    with self._clock.paused():
      result = function(*args)
    logger.info("compiled in %.1f s", time.perf_counter() - start)
    return result

  def _after_update(
    self,
    step: int,
    state: TrainState,
    metrics: dict[str, jax.Array],
    meta: Meta,
  ) -> Meta:
    """Logs, evaluates, writes and saves what is due after `step` updates."""
    config, recipe = self._config, self._program.recipe

    def is_due(interval: int) -> bool:
      return step % interval == 0 or step == recipe.total_steps

    log_due = is_due(config.log.every_steps)
    eval_due = is_due(config.eval.every_epochs * recipe.steps_per_epoch)
    save_due = is_due(config.checkpoint.every_epochs * recipe.steps_per_epoch)
    network, _ = evaluated_network(state, step, recipe)
    meta = dataclasses.replace(meta, step=step, network=network)
    if not (log_due or eval_due or save_due):
      return meta

    # Also before a save, so that every checkpoint is a good one.
    train_metrics = jax.device_get(metrics)
    line = {}
    if log_due:
      line |= self._train_line(step, train_metrics)
      self._clock.restart()
    self._check_finite(step, train_metrics, line)
    with self._clock.paused():
      if eval_due:
        line |= self._evaluate(step, state)
        if meta.best_miou is None or line["eval/miou"] > meta.best_miou:
          meta = dataclasses.replace(
            meta, best_miou=line["eval/miou"], best_step=step
          )
          save_due = True
      if line and self._writer is not None:
        self._writer.write(step, line)
      if save_due:
        if self._writer is not None:
          self._writer.sync()
        self._checkpoints.save(state, meta)
    return meta

  def _train_line(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
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
      _duration(seconds),
    )
    line = {f"train/{name}": value for name, value in metrics.items()}
    # The rate of this update, which was number step - 1 counted from 0.
    line["train/learning_rate"] = float(self._program.learning_rate(step - 1))
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

  def _evaluate(self, step: int, state: TrainState) -> dict[str, Any]:
    start = time.perf_counter()
    recipe = self._program.recipe
    line = evaluate(self._config, self._program, self._data, state, step)
    data = self._data
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
    return line

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


def _log_head(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  program: Program,
  data: Data,
  abstract: TrainState,
) -> None:
  recipe, devices = program.recipe, program.mesh.devices.ravel()
  num_parameters = sum(
    math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.student.params)
  )
  logger.info("config:\n%s", str(config).rstrip())
  logger.info("%s, method %s, workdir %s", config.name, config.method, workdir)
  logger.info(
    "jax %s on %d x %s (%s), %d process(es)",
    jax.__version__,
    devices.size,
    devices[0].device_kind,
    devices[0].platform,
    jax.process_count(),
  )
  logger.info(
    "network: %s, %s, %s parameters, convolutions in %s",
    config.model.backbone,
    config.model.head,
    f"{num_parameters:,}",
    config.model.dtype,
  )
  logger.info(
    "data: %s, %d classes, %d labelled, %d unlabelled, %d validation images",
    data.info.name,
    data.info.num_classes,
    len(data.labelled),
    len(data.unlabelled),
    len(data.validation),
  )
  logger.info("split: %s", identify_split(data.info.name, data.labelled))
  rate = base_learning_rate(config)
  optimizer = config.optimizer
  logger.info(
    "schedule: %d epochs of %d steps, warm-up %d steps, total %d steps,"
    " %d + %d images a step, learning rate %g%s",
    config.schedule.epochs,
    recipe.steps_per_epoch,
    min(recipe.warmup_steps, recipe.total_steps),
    recipe.total_steps,
    config.batch.labelled,
    config.batch.unlabelled,
    rate,
    ""
    if rate == optimizer.learning_rate
    else f" ({optimizer.learning_rate:g} at {optimizer.reference_batch}"
    " labelled images a step)",
  )
  if config.method == "u2pl" and not config.contrastive.high_rank:
    logger.info(
      "contrastive ranks for %d classes: low_rank %d, high_rank %d",
      recipe.num_classes,
      recipe.low_rank,
      recipe.high_rank,
    )
  logger.info("quirks: %s", ", ".join(sorted(recipe.quirks)) or "none")


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"
