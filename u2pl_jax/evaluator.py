"""Runs a protocol over a stream of images: in training and by the command."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from input_pipeline.boundary import boundary_counts
from u2pl_jax import distributed, sharding
from u2pl_jax.data import Data, open_eval_stream
from u2pl_jax.evaluation import (
  NUM_BINS,
  EvalSettings,
  Protocol,
  make_count_step,
  make_eval_step,
  make_pass_step,
  scaled_boxes,
)
from u2pl_jax.evaluation_record import EvaluationRecord, digest
from u2pl_jax.train_state import Variables

logger = logging.getLogger(__name__)

# Of 'whole': a compilation may take a minute for a large network.
_MANY_SHAPES = 8

# Batches whose counts may be waiting: the device works while the host reads.
_MAX_IN_FLIGHT = 2

_BATCH_KEYS = ("image", "label", "valid_box", "is_real", "index")

Boundary = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Counts:
  """What was counted; as in `evaluation_record.EvaluationRecord`.

  Attributes:
    confusions: [n, k, k] int64.
    boundary: [n, k, 2] int64, or None.
    calibration: [bins, 3] float64.
  """

  confusions: np.ndarray
  boundary: np.ndarray | None
  calibration: np.ndarray


class Evaluator:
  """Counts pixels under one protocol; compiles a program for each shape.

  Attributes:
    protocol: of the evaluation.
    shapes: (rows of this process, height, width) of the batches so far.
    num_compilations: of the programs that contain the network.
  """

  def __init__(
    self,
    model: nn.Module,
    mesh: Mesh,
    protocol: Protocol,
    settings: EvalSettings,
  ):
    self.protocol = protocol
    self.shapes: set[tuple[int, int, int]] = set()
    self.num_compilations = 0
    # Whether the batch is the first one of its shape.
    self._is_new = True
    self._mesh = mesh
    self._num_classes = settings.num_classes
    replicated = sharding.replicated(mesh)
    split = sharding.batch_sharded(mesh)
    # All processes have all counts, but each the classes of its rows alone.
    results = (replicated, split)
    if protocol.num_passes == 1:
      self._eval_step = jax.jit(
        self._counting(
          _with_index(make_eval_step(model, protocol, settings), batch_at=1)
        ),
        in_shardings=(replicated, split),
        out_shardings=results,
      )
      return
    self._pass_steps = {
      scale: jax.jit(
        self._counting(make_pass_step(model, protocol, settings, scale)),
        in_shardings=(replicated, split, split, replicated),
        out_shardings=split,
        donate_argnums=2,
      )
      for scale in protocol.scales
    }
    self._count_step = jax.jit(
      _with_index(make_count_step(protocol, settings), batch_at=0),
      in_shardings=(split, split),
      out_shardings=results,
    )
    self._zeros = jax.jit(
      functools.partial(jnp.zeros, dtype=jnp.float32),
      static_argnums=0,
      out_shardings=split,
    )

  def _counting(self, step: Callable) -> Callable:
    """Tracing, which is once a compilation, runs this wrapper."""

    @functools.wraps(step)
    def traced(*args):
      self.num_compilations += 1
      return step(*args)

    return traced

  def count(
    self,
    variables: Variables,
    stream: Iterable[Mapping[str, np.ndarray]],
    num_images: int,
    *,
    boundary: Boundary | None = None,
    update: Callable[[int], object] | None = None,
  ) -> Counts:
    """Counts the pixels of all images of a stream, over all processes.

    Args:
      variables: of the network, on the host or the devices.
      stream: of `data.open_eval_stream` for the same protocol: the rows of
        this process.
      num_images: n, how many images the stream has.
      boundary: (truth, prediction), both uint8 [h, w] -> [k, 2], called for
        every image of these rows in threads; None counts no boundaries.
      update: called with the number of images that are done.

    Returns:
      `Counts` in the order of the stream's list of ids, the same on every
      process.
    """
    k = self._num_classes
    confusions = np.zeros((num_images, k, k), np.int64)
    calibration = np.zeros((NUM_BINS, 3))
    boundaries = None
    if boundary is not None:
      boundaries = np.zeros((num_images, k, 2), np.int64)
    variables = sharding.put(variables, sharding.replicated(self._mesh))

    with contextlib.ExitStack() as stack:
      executor = stack.enter_context(
        concurrent.futures.ThreadPoolExecutor(os.cpu_count())
      )

      def collect(batch: Mapping[str, np.ndarray], results: tuple) -> None:
        counts, classes = results
        counts = jax.device_get(counts)
        is_real = counts["is_real"]
        confusions[counts["index"][is_real]] = counts["confusions"][is_real]
        calibration[:, (0, 2)] += counts["calibration"].sum(0, dtype=np.int64)
        calibration[:, 1] += counts["confidence"].sum(0, dtype=np.float64)
        if boundary is not None:
          rows = np.flatnonzero(batch["is_real"])
          pairs = _contents(batch, sharding.local_rows(classes), rows)
          found = executor.map(lambda pair: boundary(*pair), pairs)
          for row, value in zip(rows, found, strict=True):
            boundaries[batch["index"][row]] = value
        if update is not None:
          update(int(is_real.sum()))

      in_flight = collections.deque()
      for batch in stream:
        in_flight.append((batch, self._run(variables, batch)))
        if len(in_flight) >= _MAX_IN_FLIGHT:
          collect(*in_flight.popleft())
      while in_flight:
        collect(*in_flight.popleft())
    if boundary is not None:
      boundaries = distributed.gather(boundaries).sum(0)
    return Counts(confusions, boundaries, calibration)

  def record(
    self,
    counts: Counts,
    *,
    checkpoint: str,
    step: int | None,
    weights: str,
    config_hash: str,
    class_names: tuple[str, ...],
    image_ids: tuple[str, ...],
  ) -> EvaluationRecord:
    """The counts with what they are of; arguments as in the record."""
    settings = self.protocol.settings()
    return EvaluationRecord(
      protocol=settings,
      protocol_hash=digest(settings),
      checkpoint=checkpoint,
      step=step,
      weights=weights,
      config_hash=config_hash,
      class_names=tuple(class_names),
      image_ids=tuple(image_ids),
      confusions=counts.confusions,
      boundary=counts.boundary,
      calibration=counts.calibration,
    )

  def _run(
    self, variables: Variables, batch: Mapping[str, np.ndarray]
  ) -> tuple[dict[str, jax.Array], jax.Array]:
    """(counts, classes) of a batch, on the devices."""
    shape = batch["image"].shape[:3]
    self._is_new = shape not in self.shapes
    if self._is_new:
      self.shapes.add(shape)
      if self.protocol.name == "whole" and len(self.shapes) == _MANY_SHAPES:
        logger.warning(
          "protocol 'whole' compiles the network for every size of image, %d"
          " so far; 'padded' and 'sliding_window' need one or a few",
          _MANY_SHAPES,
        )
    put = functools.partial(sharding.put_batch, self._mesh)
    on_device = put({name: batch[name] for name in _BATCH_KEYS})

    def at_scale(scale: float) -> dict[str, jax.Array]:
      boxes = scaled_boxes(batch["valid_box"], self.protocol, scale)
      return on_device | put({"scaled_box": boxes})

    if self.protocol.num_passes == 1:
      return self._call(
        self._eval_step, variables, at_scale(self.protocol.scales[0])
      )
    num_rows = on_device["image"].shape[0]
    total = self._zeros((num_rows, *shape[1:], self._num_classes))
    for scale in self.protocol.scales:
      scaled = at_scale(scale)
      for flip in (False, True) if self.protocol.flip else (False,):
        total = self._call(
          self._pass_steps[scale], variables, scaled, total, flip
        )
    return self._call(self._count_step, on_device, total)

  def _call(self, step: Callable, *args) -> Any:
    """Compiles a new shape on all processes before any of them runs it."""
    if self._is_new:
      distributed.compile_together(step, *args)
    return step(*args)


def _with_index(step: Callable, *, batch_at: int) -> Callable:
  """The counts also say which image each row is: on every process."""

  @functools.wraps(step)
  def counted(*args):
    counts, classes = step(*args)
    batch = args[batch_at]
    return counts | {
      name: batch[name] for name in ("index", "is_real")
    }, classes

  return counted


def _contents(
  batch: Mapping[str, np.ndarray], classes: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(truth, prediction) of the photographs, without padding."""
  for row in rows:
    top, left, bottom, right = batch["valid_box"][row]
    inside = np.s_[row, top:bottom, left:right]
    yield batch["label"][inside], classes[inside]


def evaluate_images(
  config: ml_collections.ConfigDict,
  evaluator: Evaluator,
  data: Data,
  variables: Variables,
  *,
  batch_size: int,
  update: Callable[[int], object],
) -> Counts:
  """Counts the pixels of the validation images, boundaries too.

  Args:
    config: says how the files are read.
    evaluator: of the protocol.
    data: see `load_eval_data`.
    variables: of the network.
    batch_size: images at once, a multiple of the number of devices.
    update: called with the number of images that are done.

  Raises:
    DataError: of an image or a mask.
  """
  ids = data.validation
  stream = open_eval_stream(
    config, data, ids, protocol=evaluator.protocol, batch_size=batch_size
  )
  boundary = functools.partial(
    boundary_counts,
    num_classes=data.info.num_classes,
    ignore_label=config.dataset.ignore_label,
  )
  with contextlib.closing(stream):
    return evaluator.count(
      variables, stream, len(ids), boundary=boundary, update=update
    )
