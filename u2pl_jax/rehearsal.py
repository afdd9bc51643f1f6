"""The largest step once on empty data, so that memory errors come at once.

A run begins with the warm-up, whose steps need a third of the memory of those
that follow: without a rehearsal it would fail after hours. And the one line
that any memory error of a run becomes.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from u2pl_jax import distributed, sharding
from u2pl_jax.build import Program
from u2pl_jax.config_checks import legal_microbatches
from u2pl_jax.train_state import TrainState

logger = logging.getLogger(__name__)


class OutOfMemoryError(RuntimeError):
  """One line: what did not fit into what, and how to make it fit."""


def rehearse(
  config: ml_collections.ConfigDict, program: Program, abstract: TrainState
) -> str:
  """Compiles and runs the step that needs most memory; its result is dropped.

  To be called before there is a state: the one of zeros that the step is given
  (and donated) would be a second one. The step stays compiled for the run.

  Args:
    config: of the run.
    program: whose semi-supervised step is the largest, or for the supervised
      method its only one.
    abstract: shapes and shardings of the state.

  Returns:
    Name of the step, an attribute of `program`.
  """
  is_semi = program.semi_supervised_step is not None
  name = "semi_supervised_step" if is_semi else "supervised_step"
  start = time.perf_counter()
  logger.info("compiling %s, the largest step ...", name)
  batches = [_empty(config, program, "labelled")]
  if is_semi:
    batches.append(_empty(config, program, "unlabelled"))
  state = jax.jit(
    lambda: jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract
    ),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
  )()
  step = getattr(program, name)
  distributed.compile_together(step, state, *batches)
  jax.block_until_ready(step(state, *batches))
  logger.info(
    "compiled and tried on empty images in %.1f s%s",
    time.perf_counter() - start,
    _peak(program.mesh.local_devices[0]),
  )
  return name


def _empty(
  config: ml_collections.ConfigDict, program: Program, half: str
) -> dict[str, jax.Array]:
  """A half of the batch as the input gives it, black and of class 0."""
  rows = config.batch[half] // jax.process_count()
  size = tuple(config.input.crop_size)
  batch = {
    "image": np.zeros((rows, *size, 3), np.uint8),
    "valid_box": np.tile(np.asarray([[0, 0, *size]], np.int32), (rows, 1)),
  }
  if half == "labelled":
    batch["label"] = np.zeros((rows, *size), np.uint8)
  return sharding.put_batch(program.mesh, batch)


def _peak(device: jax.Device) -> str:
  """What the device says of its memory; CPUs say nothing."""
  stats = device.memory_stats() or {}
  if not {"peak_bytes_in_use", "bytes_limit"} <= stats.keys():
    return ""
  return (
    f", peak memory {stats['peak_bytes_in_use'] / 2**30:.1f} of"
    f" {stats['bytes_limit'] / 2**30:.1f} GiB"
  )


@contextlib.contextmanager
def memory_errors_in_one_line(
  config: ml_collections.ConfigDict, num_devices: int
) -> Iterator[None]:
  """Turns a memory error of the devices into `OutOfMemoryError`.

  Args:
    config: of the run.
    num_devices: over which the batch is split.

  Raises:
    OutOfMemoryError: from the error of the runtime.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise OutOfMemoryError(_advice(config, num_devices)) from error


def _advice(config: ml_collections.ConfigDict, num_devices: int) -> str:
  device = jax.local_devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  memory = "the device memory"
  size = "<size>"
  if limit:
    size = f"{limit / 2**30:.1f}GiB"
    memory = f"{size} of a {device.device_kind}"
  batch, crop = config.batch, tuple(config.input.crop_size)
  larger = [
    number
    for number in legal_microbatches(config, num_devices)
    if number > batch.microbatches
  ]
  # The order of what costs least.
  if config.model.dtype == "float32" and device.platform != "cpu":
    fix = "--config.model.dtype=bfloat16"
  elif larger:
    fix = f"--config.batch.microbatches={larger[0]}"
  elif not config.model.remat:
    fix = "--config.model.remat"
  else:
    fix = "a smaller config.input.crop_size, or more devices"
  return (
    f"out of memory: {memory} cannot hold a step of {batch.labelled} +"
    f" {batch.unlabelled} images of {crop[0]}x{crop[1]} over {num_devices}"
    f" device(s) in {batch.microbatches} micro-batch(es): try {fix};"
    " python -m u2pl_jax.plan with the same --config arguments and"
    f" --device-memory={size} lists what fits (docs/memory.md)"
  )
