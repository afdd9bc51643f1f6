"""Which images a report shows, and what the network makes of them.

The side of the report that runs on the devices; the page itself is drawn from
arrays and files alone, see report.py.
"""

import contextlib
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from input_pipeline import DataError, decode, make_eval_stream, parallel
from u2pl_jax import report, sharding
from u2pl_jax.build import Program
from u2pl_jax.contrastive import class_membership, negative_mask
from u2pl_jax.data import Data, open_eval_stream
from u2pl_jax.evaluation_record import (
  EvaluationRecord,
  RecordError,
  image_miou,
  read_record,
)
from u2pl_jax.images import inside_box, normalise
from u2pl_jax.models.layers import resize_bilinear, resize_nearest
from u2pl_jax.reliability import assess, entropy, unreliable_percent
from u2pl_jax.report_images import MethodSample, Pictures, Sample
from u2pl_jax.run_log import RunError
from u2pl_jax.train_state import Variables
from u2pl_jax.train_step import Recipe, training_progress

logger = logging.getLogger(__name__)
Array = jax.Array

# Unlabelled images that show the method at work.
_METHOD_IMAGES = 4


def pick_images(
  ids: Sequence[str], scores: Mapping[str, float] | None, count: int
) -> list[tuple[str, str]]:
  """The best, median and worst images.

  Args:
    ids: of the validation images.
    scores: mean IoU of each; images whose score is NaN (no labelled pixel) are
      never picked. None, if no image was judged on its own: the first ones.
    count: how many to pick, a third of each kind.

  Returns:
    (id, group) with group 'best', 'median' or 'worst' (or 'first'), the best
    one first; fewer where there are fewer images.
  """
  if scores is None:
    return [(image_id, "first") for image_id in ids[:count]]
  judged = [i for i in ids if not np.isnan(scores[i])]
  judged.sort(key=lambda i: -scores[i])
  count = min(count, len(judged))
  ends = (count + 1) // 3
  middle = count - 2 * ends
  start = (len(judged) - middle) // 2
  groups = {
    "best": judged[:ends],
    "median": judged[start : start + middle],
    "worst": judged[len(judged) - ends :],
  }
  return [(i, group) for group, members in groups.items() for i in members]


def scores_of(record: EvaluationRecord) -> dict[str, float]:
  """Mean IoU of each image of an evaluation, for `pick_images`."""
  return dict(zip(record.image_ids, image_miou(record).tolist(), strict=True))


def make_method_step(
  model: nn.Module, recipe: Recipe
) -> Callable[[Variables, dict, Array], dict[str, Array]]:
  """Builds `(teacher, batch, alpha) -> decisions` on clean images.

  The rules of the training step, but for its input: running statistics and
  whole, unmixed images, and thresholds over the images of this batch alone.

  Args:
    model: the network.
    recipe: its ranks, thresholds and quirks.

  Returns:
    A function of variables, a batch with image [b, h, w, 3] uint8, valid_box
    [b, 4] and is_real [b], and alpha in percent. Its results are [b, h, w]:
    pseudo_labels int32, entropy float32, keep_mask, reliable_mask and
    unreliable_mask bool; and negative_mask [b, hf, wf, k] bool on the feature
    grid.
  """

  def method_step(variables: Variables, batch: dict, alpha: Array) -> dict:
    image, valid_box = batch["image"], batch["valid_box"]
    images = normalise(image, valid_box, recipe.mean, recipe.std)
    outputs = model.apply(variables.for_apply(), images, train=False)
    size = images.shape[1:3]
    logits = resize_bilinear(outputs.logits, size)
    inside = inside_box(valid_box, *size) & batch["is_real"][:, None, None]
    pseudo_labels = jnp.where(
      inside, logits.argmax(-1).astype(jnp.int32), recipe.ignore_label
    )
    entropies = entropy(logits)
    masks = assess(entropies, inside, alpha)
    grid = outputs.logits.shape[1:3]
    grid_labels = resize_nearest(pseudo_labels, grid)
    negatives = negative_mask(
      class_membership(
        grid_labels,
        num_classes=recipe.num_classes,
        ignore_label=recipe.ignore_label,
      ),
      grid_labels != recipe.ignore_label,
      resize_nearest(masks.unreliable_mask, grid),
      jax.nn.softmax(outputs.logits),
      is_labelled=np.zeros(len(image), bool),
      low_rank=recipe.low_rank,
      high_rank=recipe.high_rank,
      max_probability=recipe.negative_max_probability,
      own_label_negatives="own_label_negatives" in recipe.quirks,
    )
    return {
      "pseudo_labels": pseudo_labels,
      "entropy": entropies,
      "keep_mask": masks.keep_mask,
      "reliable_mask": masks.reliable_mask,
      "unreliable_mask": masks.unreliable_mask,
      "negative_mask": negatives,
    }

  return method_step


class Reporter:
  """Draws the page of a run as it goes on, with pictures of its best network.

  One object a run, since it keeps compiled programs. Of several processes one
  draws, with its own devices alone: if it cannot read a file, nobody is left
  waiting in the middle of the network.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    program: Program,
    data: Data,
    workdir: pathlib.Path,
    *,
    devices: str,
  ):
    """Reads and compiles nothing yet.

    Args:
      config, program, data, workdir: of the run.
      devices: what it runs on, in words.
    """
    self._config = config
    self._program = program
    self._data = data
    self._workdir = workdir
    self._devices = devices
    # Whether `draw` has pictures of the best network, and those not written.
    self._taken = False
    self._unwritten: Pictures | None = None
    self._mesh = sharding.local_mesh(program.mesh)
    # As many images on a device as in the evaluation.
    self._batch_size = config.eval.batch // jax.process_count()
    repl = sharding.replicated(self._mesh)
    split = sharding.batch_sharded(self._mesh)
    self._method_step = jax.jit(
      make_method_step(program.model, program.recipe),
      in_shardings=(repl, split, repl),
      out_shardings=repl,
    )

  @property
  def page(self) -> pathlib.Path:
    """Where the page is written."""
    return self._workdir / "report" / "index.html"

  def draw(
    self,
    variables: Variables,
    *,
    network: str,
    step: int,
    scores: Mapping[str, float] | None = None,
  ) -> None:
    """Draws the page of the best network so far.

    A page is no reason to end a training: what goes wrong is a warning here,
    and an error in `finish`, which tries again.

    Args:
      variables, network, step, scores: see `take`.
    """
    start = time.perf_counter()
    # Not those of an earlier network, should this fail.
    self._taken, self._unwritten = False, None
    try:
      self._unwritten = self.take(
        variables, network=network, step=step, scores=scores
      )
      self._taken = True
      self._write()
    except Exception as error:
      logger.warning(
        "the report of step %d could not be drawn (%s: %s)",
        step,
        type(error).__name__,
        error,
      )
      return
    logger.info(
      "report of step %d drawn in %.1f s", step, time.perf_counter() - start
    )

  def draw_missing(
    self, variables: Variables, *, network: str, step: int
  ) -> None:
    """As `draw`, unless an earlier process has done it.

    Args:
      variables, network, step: see `take`; of the best network, whose
        evaluation is in the workdir.
    """
    try:
      if report.pictured_step(self._workdir) == step:
        return
      scores = self._stored_scores()
    except RunError as error:
      logger.warning("the report of step %d is not drawn (%s)", step, error)
      return
    self.draw(variables, network=network, step=step, scores=scores)

  def is_complete(self, last_step: int) -> bool:
    """Whether `finish` is done with a run of so many steps.

    Raises:
      RunError: see `report.complete_step`.
    """
    return self.page.exists() and (
      report.complete_step(self._workdir) == last_step
    )

  def finish(
    self,
    variables: Variables,
    *,
    network: str,
    step: int,
    best_step: int | None,
  ) -> None:
    """Draws the page with the curves of the whole training.

    The pictures are of the best network if `draw` took them, in this process or
    in an earlier one; else of this one.

    Args:
      variables, network, step: see `take`.
      best_step: of the run.

    Raises:
      RunError: a file of the workdir is damaged or cannot be written.
      DataError: see `take`.
    """
    try:
      known = self._taken or report.pictured_step(self._workdir) == best_step
      if not known:
        self._unwritten = self.take(
          variables,
          network=network,
          step=step,
          scores=self._stored_scores(),
        )
      if self._unwritten is not None:
        self._write()
      # For the tables of the whole run, which `draw` does not write.
      report.refresh_report(self._workdir)
    except OSError as error:
      raise RunError(
        f"{error.filename or self.page}: the report cannot be written"
        f" ({error.strerror}): make room, or set the permissions right; then"
        f" python -m u2pl_jax.report {self._workdir} draws it"
      ) from error

  def take(
    self,
    variables: Variables,
    *,
    network: str,
    step: int,
    scores: Mapping[str, float] | None,
  ) -> Pictures:
    """Pictures of a network.

    Args:
      variables: of the network, replicated over the devices.
      network: 'teacher' or 'student'. The method is at work once the teacher is
        the one that is judged.
      step: updates it has had.
      scores: see `pick_images`.

    Returns:
      `Pictures`: config.log.report_images validation images, and at most
      four unlabelled ones.

    Raises:
      DataError: a file cannot be read any more. With
        config.input.on_bad_record='skip' unlabelled images that cannot are left
        out.
    """
    recipe, count = self._program.recipe, self._config.log.report_images
    samples = self.samples(
      variables, pick_images(self._data.validation, scores, count)
    )
    if network != "teacher":
      return Pictures(step=step, network=network, samples=samples)
    # The schedule's value at the last update.
    progress = training_progress(jnp.asarray(step - 1), recipe)
    alpha = unreliable_percent(recipe.alpha0, progress)
    return Pictures(
      step=step,
      network=network,
      samples=samples,
      method=self._method(variables, alpha),
      alpha=float(alpha),
      low_rank=recipe.low_rank,
      high_rank=recipe.high_rank,
    )

  def samples(
    self, variables: Variables, picked: Sequence[tuple[str, str]]
  ) -> tuple[Sample, ...]:
    """What a network makes of validation images; computed on this process.

    Args:
      variables: of the network, replicated over the devices.
      picked: (id, group) of each, see `pick_images`.

    Returns:
      One sample each, in the same order.
    """
    if not picked:
      return ()
    ids = tuple(image_id for image_id, _ in picked)
    found = {}
    variables = sharding.put_locally(self._program.mesh, variables)
    stream = open_eval_stream(
      self._config, self._data, ids, batch_size=self._batch_size, whole=True
    )
    with contextlib.closing(stream):
      for batch in stream:
        classes, entropies = jax.device_get(
          self._program.predict_step(
            variables, self._put(batch, "image", "valid_box")
          )
        )
        for row in np.flatnonzero(batch["is_real"]):
          inside = _inside(batch, row)
          index = int(batch["index"][row])
          found[index] = Sample(
            id=ids[index],
            image=batch["image"][inside],
            truth=batch["label"][inside],
            prediction=classes[inside],
            entropy=entropies[inside],
            group=picked[index][1],
          )
    return tuple(found[index] for index in sorted(found))

  def _method(
    self, variables: Variables, alpha: Array
  ) -> tuple[MethodSample, ...]:
    """Some unlabelled images; of one larger than eval.pad_to the middle."""
    config, data = self._config, self._data
    variables = sharding.put_locally(self._program.mesh, variables)
    count = min(_METHOD_IMAGES, self._batch_size, len(data.unlabelled))
    # From all over the list: neighbours may be frames of the same scene.
    places = np.linspace(0, len(data.unlabelled) - 1, count).round().astype(int)
    ids = tuple(data.unlabelled[place] for place in places)
    if config.input.on_bad_record == "skip":
      ids = tuple(filter(self._is_readable, ids))
      if not ids:
        return ()
    stream = make_eval_stream(
      data.source,
      ids,
      batch_size=self._batch_size,
      pad_to=tuple(config.eval.pad_to),
      center_crop=True,
      num_classes=data.info.num_classes,
      with_labels=False,
      num_threads=config.input.num_threads,
      prefetch=config.input.prefetch,
    )
    samples = []
    with contextlib.closing(stream):
      for batch in stream:
        result = jax.device_get(
          self._method_step(
            variables, self._put(batch, "image", "valid_box", "is_real"), alpha
          )
        )
        negatives = result.pop("negative_mask")
        size = batch["image"].shape[1:3]
        for row in np.flatnonzero(batch["is_real"]):
          inside = _inside(batch, row)
          samples.append(
            MethodSample(
              id=ids[int(batch["index"][row])],
              image=batch["image"][inside],
              negative_mask=_enlarged(negatives[row], size)[inside[1:]],
              **{name: value[inside] for name, value in result.items()},
            )
          )
    return tuple(samples)

  def _is_readable(self, image_id: str) -> bool:
    source = self._data.source
    try:
      decode.image_from_bytes(
        source.read_image(image_id), source.image_path(image_id)
      )
    except DataError:
      return False
    return True

  def _labelled_pixels(self) -> list[int]:
    """Pixels of each class in the labelled masks, of those that a run uses."""
    config, data = self._config, self._data
    num_classes = data.info.num_classes

    def count(image_id: str) -> np.ndarray:
      try:
        mask = decode.mask_from_bytes(
          data.source.read_mask(image_id),
          data.source.mask_path(image_id),
          num_classes=num_classes,
          ignore_label=config.dataset.ignore_label,
          mask_format=data.info.mask_format(config.dataset.mask_format),
        )
      except DataError:
        if config.input.on_bad_record != "skip":
          raise
        return np.zeros(num_classes, np.int64)
      return np.bincount(mask.ravel(), minlength=256)[:num_classes]

    counts = parallel.map_in_threads(
      count, data.labelled, "counting the labelled pixels", "mask"
    )
    return np.sum(counts, 0, dtype=np.int64).tolist()

  def _stored_scores(self) -> dict[str, float] | None:
    """Of the best evaluation of the run; None if its images were not counted.

    Runs of earlier versions have none.
    """
    folder = self._workdir / "evaluation"
    if not folder.is_dir():
      return None
    try:
      return scores_of(read_record(folder))
    except RecordError as error:
      raise RunError(str(error)) from error

  def _write(self) -> None:
    """Writes what was taken; it stays in memory if that fails."""
    pixels = report.labelled_pixels(self._workdir)
    report.write_report(
      self._workdir,
      self._unwritten,
      self._data.info,
      self._config.dataset.ignore_label,
      devices=self._devices,
      # All labelled masks are read, but once a workdir.
      labelled_pixels=pixels or self._labelled_pixels(),
    )
    self._unwritten = None

  def _put(self, batch: Mapping[str, np.ndarray], *names: str) -> dict:
    return sharding.put_batch(self._mesh, {name: batch[name] for name in names})


def _inside(batch: Mapping[str, np.ndarray], row: int) -> Any:
  """Index of the part of a row that is no padding."""
  top, left, bottom, right = batch["valid_box"][row]
  return np.s_[row, top:bottom, left:right]


def _enlarged(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[hf, wf, k] -> [h, w, k]: the cell of the grid that holds a pixel."""
  rows = np.arange(size[0]) * grid.shape[0] // size[0]
  cols = np.arange(size[1]) * grid.shape[1] // size[1]
  return grid[rows][:, cols]
