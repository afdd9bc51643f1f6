"""The first lines of a run's log: what it is about to do, and on what."""

import logging
import math
import pathlib

import jax
import ml_collections

from input_pipeline.split_families import identify_split
from u2pl_jax.build import Program, base_learning_rate
from u2pl_jax.data import Data
from u2pl_jax.train_state import TrainState

logger = logging.getLogger(__name__)


def log_head(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  program: Program,
  data: Data,
  abstract: TrainState,
) -> None:
  """Logs config, devices, network, data and schedule.

  Args:
    config, workdir, program, data: of the run.
    abstract: shapes of its state.
  """
  recipe = program.recipe
  num_parameters = sum(
    math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.student.params)
  )
  logger.info("config:\n%s", str(config).rstrip())
  logger.info("%s, method %s, workdir %s", config.name, config.method, workdir)
  logger.info("jax %s on %s", jax.__version__, describe_devices(program))
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
    " %d + %d images a step, learning rate %g%s, %s",
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
    optimizer.schedule,
  )
  if config.method == "u2pl" and not config.contrastive.high_rank:
    logger.info(
      "contrastive ranks for %d classes: low_rank %d, high_rank %d",
      recipe.num_classes,
      recipe.low_rank,
      recipe.high_rank,
    )
  logger.info("quirks: %s", ", ".join(sorted(recipe.quirks)) or "none")


def describe_devices(program: Program) -> str:
  """How many of which kind, such as '8 x H100 (gpu), 1 process(es)'."""
  devices = program.mesh.devices.ravel()
  return (
    f"{devices.size} x {devices[0].device_kind} ({devices[0].platform}),"
    f" {jax.process_count()} process(es)"
  )
