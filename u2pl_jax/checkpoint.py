"""Checkpoints in workdir/checkpoints: the only file that imports orbax.

One folder a step with two items: `state`, the whole `TrainState` under the
names of its fields, and `meta`, the few numbers the loop needs besides. The
input needs no item of its own, since batch k is a function of (seed, k).

A save is asynchronous and atomic: orbax writes into a folder with another name
and renames it. What a killed process leaves under such a name is removed by the
next one; what is damaged later is skipped here.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from u2pl_jax import checksum as checksum_lib
from u2pl_jax import distributed

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
# Damaged checkpoints are moved here, out of the way of the step that will be
# saved under the same number.
UNREADABLE_FOLDER = "unreadable_checkpoints"


class CheckpointError(ValueError):
  """One line that names the checkpoint and the fix."""


@dataclasses.dataclass(frozen=True)
class Meta:
  """What the loop must know besides the state.

  Attributes:
    step: updates done.
    best_miou: of the best evaluation up to this step, if any: the highest mIoU,
      or for the schedule 'plateau' the first within its threshold of that.
    best_step: the step that had it.
    network: 'teacher' or 'student': which one is judged at this step.
    config: digest of the config without the keys that may change.
    lists: digest of the lists of images.
    evaluations: (step, mIoU) of all so far, oldest first.
    contenders: steps that may be the best one after further evaluations.
    bad_records: ids of the training images that were skipped so far, sorted.
  """

  step: int
  best_miou: float | None
  best_step: int | None
  network: str
  config: str
  lists: str
  evaluations: tuple[tuple[int, float], ...] = ()
  contenders: tuple[int, ...] = ()
  bad_records: tuple[str, ...] = ()


class _LatestAndBest:
  """Orbax's `PreservationPolicy`: the newest `keep`, and what may be best."""

  def __init__(self, keep: int):
    self.keep = keep
    self.kept: set[int | None] = set()

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    newest = sorted(steps)[-self.keep :]
    return [step in newest or step in self.kept for step in steps]


class Checkpoints:
  """Saves and restores the states of one run.

  Every process must call its methods: each writes and reads its share, the
  first one alone removes and renames.
  """

  def __init__(self, workdir: pathlib.Path, *, keep: int):
    """Opens the folder, which is created at need.

    Args:
      workdir: of the run.
      keep: how many of the newest checkpoints stay, beside the best.
    """
    self._workdir = workdir
    self.directory = (workdir / FOLDER).absolute()
    self._policy = _LatestAndBest(keep)
    if jax.process_index() == 0:
      _remove_unfinished(self.directory)
    distributed.wait_for_all()
    self._manager = ocp.CheckpointManager(
      self.directory,
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        # Reads nothing of the existing steps, of which one may be damaged.
        lightweight_initialize=True,
      ),
    )

  def steps(self) -> tuple[int, ...]:
    """The steps that have a checkpoint, readable or not, oldest first."""
    return tuple(sorted(self._manager.all_steps()))

  def save(self, state: Any, meta: Meta) -> None:
    """Begins to save; returns when the state may be donated.

    Waits for the previous save, whose error, if any, is raised here.

    Args:
      state: pytree of arrays.
      meta: of the same step; decides which old checkpoints are kept: those of
        the best step and the contenders.
    """
    self._policy.kept = {meta.best_step, *meta.contenders}
    checksum = _checksum(state)
    # Every process writes a share of what all have.
    distributed.check_equal(
      f"{checksum:08x}",
      "other parameters than process 0, though both did the same steps: the run"
      " cannot be saved; it can go on from its last checkpoint",
    )
    stored_meta = {**dataclasses.asdict(meta), "checksum": checksum}
    self._manager.save(
      meta.step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(_to_tree(state)),
        meta=ocp.args.JsonSave(stored_meta),
      ),
      # Without it a step that is not the newest would be left out silently.
      force=True,
    )

  def restore_latest(
    self, like: Any, *, config: str, lists: str
  ) -> tuple[Any, Meta] | None:
    """Restores the newest checkpoint that can be read.

    Newer ones that cannot be read are moved to UNREADABLE_FOLDER.

    Args:
      like: `jax.ShapeDtypeStruct`s with shardings, in the structure of the
        state.
      config, lists: digests that the checkpoint must have, see `Meta`.

    Returns:
      (state, meta), or None if there is no checkpoint at all.

    Raises:
      CheckpointError: there are checkpoints but none is readable; or one is of
        another config, other lists or another network.
    """
    unreadable: dict[int, str] = {}
    # One list for all processes, each of which may see another one for a while.
    steps = json.loads(distributed.share(json.dumps(self.steps())))
    for step in reversed(steps):
      problem = ""
      try:
        meta, checksum = _read_meta(self.directory / str(step), step)
        stored = self._read_structure(step)
      except Exception as error:  # Damage shows as a dozen types of errors.
        problem = _first_line(error)
      if problem := distributed.first_problem(problem):
        unreadable[step] = problem
        continue
      self._check_belongs(meta, stored, like, config=config, lists=lists)
      try:
        state = self._read_state(step, like)
      except Exception as error:
        problem = _first_line(error)
      problem = distributed.first_problem(problem)
      # Only now: to compute it takes all processes.
      if not problem and _checksum(state) != checksum:
        problem = "the bytes are not those that were saved"
      if problem := distributed.first_problem(problem):
        unreadable[step] = problem
        continue
      if unreadable:
        self._set_aside(unreadable, used=step)
      return state, meta
    if unreadable:
      newest, reason = next(iter(unreadable.items()))
      raise CheckpointError(
        f"{self.directory}: none of the {len(unreadable)} checkpoints can be"
        f" read (step {newest}: {reason}): repair the folder, or start anew"
        " with another --workdir"
      )
    return None

  def wait(self) -> None:
    """Returns when the last save is complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and stops the threads."""
    self._manager.close()

  def _read_structure(self, step: int) -> dict[str, tuple]:
    """Shape and type of every array, by name."""
    folder = self.directory / str(step) / "state"
    tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    leaves = traverse_util.flatten_dict(tree, sep="/")
    return {k: (tuple(v.shape), str(v.dtype)) for k, v in leaves.items()}

  def _read_state(self, step: int, like: Any) -> Any:
    # Not by the manager: it would wait for a process that cannot read.
    tree = ocp.StandardCheckpointHandler().restore(
      self.directory / str(step) / "state",
      args=ocp.args.StandardRestore(_to_tree(like)),
    )
    arrays = traverse_util.flatten_dict(tree, sep="/")
    names, _, treedef = _flatten(like)
    return treedef.unflatten([arrays[name] for name in names])

  def _check_belongs(
    self, meta: Meta, stored: dict, like: Any, *, config: str, lists: str
  ) -> None:
    folder = self.directory / str(meta.step)
    fix = "choose another --workdir, or remove the folder to start anew"
    if meta.config != config:
      raise CheckpointError(
        f"{folder}: the checkpoint was made with another config: {fix}"
      )
    if meta.lists != lists:
      raise CheckpointError(
        f"{folder}: the lists of images have changed since this checkpoint:"
        f" restore them, {fix}"
      )
    names, leaves, _ = _flatten(like)
    wanted = {
      name: (tuple(leaf.shape), str(leaf.dtype))
      for name, leaf in zip(names, leaves, strict=True)
    }
    for name in sorted(stored.keys() | wanted.keys()):
      if stored.get(name) != wanted.get(name):
        raise CheckpointError(
          f"{folder}: the checkpoint is of another network: {name} is"
          f" {_describe(stored.get(name))} there and"
          f" {_describe(wanted.get(name))} here: {fix}"
        )

  def _set_aside(self, unreadable: dict[int, str], *, used: int) -> None:
    folder = self._workdir / UNREADABLE_FOLDER
    newest, reason = next(iter(unreadable.items()))
    logger.warning(
      "checkpoint of step %s in %s cannot be read (%s): going on from step %d;"
      " moved to %s",
      ", ".join(map(str, unreadable)),
      self.directory,
      reason,
      used,
      folder,
    )
    if jax.process_index() == 0:
      folder.mkdir(exist_ok=True)
      for step in unreadable:
        target = folder / str(step)
        number = 1
        while target.exists():
          number += 1
          target = folder / f"{step}_{number}"
        (self.directory / str(step)).rename(target)
    distributed.wait_for_all()
    self._manager.reload()


@dataclasses.dataclass(frozen=True)
class Stored:
  """A checkpoint as it lies on disk.

  Attributes:
    meta: of its step.
    arrays: host arrays by name, such as 'student/params/encoder/...'.
  """

  meta: Meta
  arrays: dict[str, np.ndarray]


def read_checkpoint(workdir: pathlib.Path, step: int | None = None) -> Stored:
  """Reads one checkpoint of a run to the host, changing nothing.

  The run may be going on meanwhile. Needs neither its config nor its devices.

  Args:
    workdir: of the run.
    step: which one; None for the best by mIoU, or the newest one if the run has
      not been evaluated yet.

  Returns:
    `Stored`, its checksum verified.

  Raises:
    CheckpointError: there is no such checkpoint, or it cannot be read.
  """
  directory = (pathlib.Path(workdir) / FOLDER).absolute()
  steps = []
  if directory.is_dir():
    # What a save has not finished yet has a longer name.
    names = (path.name for path in directory.iterdir() if path.is_dir())
    steps = sorted(int(name) for name in names if name.isdecimal())
  if not steps:
    raise CheckpointError(
      f"{directory}: there is no checkpoint yet: the run saves the first one"
      " after config.checkpoint.every_epochs epochs"
    )
  if step is None:
    step = _best_step(directory, steps)
  if step not in steps:
    raise CheckpointError(
      f"{directory}: there is no checkpoint of step {step}, only of"
      f" {', '.join(map(str, steps))}"
    )
  folder = directory / str(step)
  handler = ocp.StandardCheckpointHandler()
  try:
    meta, checksum = _read_meta(folder, step)
    # As numpy arrays: nothing of it has to fit on a device.
    like = jax.tree.map(
      lambda leaf: np.empty(leaf.shape, leaf.dtype),
      handler.metadata(folder / "state").tree,
    )
    tree = handler.restore(
      folder / "state", args=ocp.args.StandardRestore(like)
    )
    if _checksum(tree) != checksum:
      raise ValueError("the bytes are not those that were saved")
  except Exception as error:  # Damage shows as a dozen types of errors.
    others = [str(other) for other in steps if other != step]
    raise CheckpointError(
      f"{folder}: the checkpoint cannot be read ({_first_line(error)}): "
      + (
        f"choose another step: {', '.join(others)}"
        if others
        else "there is no other one"
      )
    ) from error
  return Stored(meta, traverse_util.flatten_dict(tree, sep="/"))


def _remove_unfinished(directory: pathlib.Path) -> None:
  """Removes what killed saves have left behind.

  Orbax's manager would do it in a thread that outlives one which saves nothing,
  and meets that of the next.
  """
  for unfinished in ocp.utils.tmp_checkpoints(directory):
    shutil.rmtree(unfinished.get())


def _best_step(directory: pathlib.Path, steps: list[int]) -> int:
  """Of the newest checkpoint that says which was the best; else the newest."""
  for step in reversed(steps):
    try:
      meta, _ = _read_meta(directory / str(step), step)
    except Exception as error:  # As in `read_checkpoint`.
      logger.warning(
        "%s: cannot be read (%s)", directory / str(step), _first_line(error)
      )
      continue
    return step if meta.best_step is None else meta.best_step
  return steps[-1]


def _read_meta(folder: pathlib.Path, step: int) -> tuple[Meta, int]:
  """Meta data of a step and the checksum of its state."""
  handler = ocp.JsonCheckpointHandler()
  stored = dict(handler.restore(folder / "meta"))
  checksum = stored.pop("checksum")
  meta = Meta(**stored)
  # JSON knows no tuples.
  meta = dataclasses.replace(
    meta,
    evaluations=tuple(map(tuple, meta.evaluations)),
    contenders=tuple(meta.contenders),
    bad_records=tuple(meta.bad_records),
  )
  if meta.step != step:
    raise ValueError(f"its meta data are of step {meta.step}")
  return meta, checksum


def _flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
  """Names like 'student/params/encoder/...', leaves and structure."""
  paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
  names = [
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths
  ]
  return names, [leaf for _, leaf in paths], treedef


def _to_tree(state: Any) -> dict:
  """Plain nested dicts: readable without the classes of this program."""
  names, leaves, _ = _flatten(state)
  return traverse_util.unflatten_dict(
    dict(zip(names, leaves, strict=True)), sep="/"
  )


def _checksum(state: Any) -> int:
  """Of all names and bytes.

  Orbax notices what is missing or cut short, but not a flipped bit or a block
  that a power cut left full of zeros.
  """
  names, leaves, _ = _flatten(state)
  return checksum_lib.checksum(names, leaves)


def _describe(array: tuple | None) -> str:
  return "absent" if array is None else f"{array[1]}{list(array[0])}"


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:200] if text else ''}"
