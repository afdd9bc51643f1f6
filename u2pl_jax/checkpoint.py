"""Checkpoints in workdir/checkpoints: the only file that imports orbax.

One folder a step with two items: `state`, the whole `TrainState` under the
names of its fields, and `meta`, the few numbers the loop needs besides. The
input needs no item of its own, since batch k is a function of (seed, k).

A save is asynchronous and atomic: orbax writes into a folder with another name
and renames it. What a killed process leaves under such a name is removed by the
next one; what is damaged later is skipped here.

What SIGTERM has a run save lies apart, in PREEMPTED_FOLDER, since that step may
not be complete: its evaluation may be due. It goes as soon as there is a newer
checkpoint, so that in the end the folders are those of a run without SIGTERM.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from u2pl_jax import checksum as checksum_lib
from u2pl_jax import distributed

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
PREEMPTED_FOLDER = "preempted_checkpoint"
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
    pending_line: None if all that belongs to the step is done. Otherwise its
      evaluation is due, and this is the rest of its line of metrics.
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
  pending_line: dict[str, int | float] | None = None


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
    self._preempted_directory = (workdir / PREEMPTED_FOLDER).absolute()
    self._policy = _LatestAndBest(keep)
    self._manager = _open_manager(self.directory, self._policy)
    # The folder is made when it is needed.
    self._preempted = None
    # As process 0 sees it: another one may see a shared folder a while later.
    exists = self._preempted_directory.is_dir()
    if json.loads(distributed.share(json.dumps(exists))):
      self._preempted = _open_manager(self._preempted_directory)

  def steps(self) -> tuple[int, ...]:
    """The steps that have a checkpoint, readable or not, oldest first."""
    return tuple(dict.fromkeys(step for step, _ in self._stored()))

  def newest_meta(self) -> Meta | None:
    """Of the newest checkpoint; None if there is none or it cannot be read."""
    for step, folder in self._stored()[-1:]:
      # What cannot be read `restore_latest` deals with.
      with contextlib.suppress(Exception):
        return _read_meta(folder, step)[0]
    return None

  def save(self, state: Any, meta: Meta) -> None:
    """Begins to save; returns when the state may be donated.

    Waits for the previous save, whose error, if any, is raised here.

    Args:
      state: pytree of arrays.
      meta: of the same step; decides which old checkpoints are kept: those of
        the best step and the contenders.

    Raises:
      CheckpointError: this one or the previous one cannot be written.
    """
    self.wait()
    self._policy.kept = {meta.best_step, *meta.contenders}
    checksum = _checksum_of_all(state)
    with self._writing():
      _check_room(self.directory, state)
      _save(self._manager, state, meta, checksum)

  def save_preempted(self, state: Any, meta: Meta) -> None:
    """Saves a step that is not due, or not complete; returns when it is done.

    Args:
      state, meta: as of `save`.

    Raises:
      CheckpointError: it cannot be written.
    """
    self.wait()
    checksum = _checksum_of_all(state)
    if self._preempted is None:
      self._preempted = _open_manager(self._preempted_directory)
    with self._writing():
      _check_room(self.directory, state)
      _save(self._preempted, state, meta, checksum)
      self._preempted.wait_until_finished()
    self._drop_preempted(before=meta.step)

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
    unreadable: dict[pathlib.Path, str] = {}
    # One list for all processes, each of which may see another one for a while.
    stored = [(step, str(folder)) for step, folder in self._stored()]
    for step, folder in reversed(
      json.loads(distributed.share(json.dumps(stored)))
    ):
      folder, problem = pathlib.Path(folder), ""
      try:
        meta, checksum = _read_meta(folder, step)
        structure = _read_structure(folder)
      except Exception as error:  # Damage shows as a dozen types of errors.
        problem = _first_line(error)
      if problem := distributed.first_problem(problem):
        unreadable[folder] = problem
        continue
      _check_belongs(folder, meta, structure, like, config=config, lists=lists)
      try:
        state = _read_state(folder, like)
      except Exception as error:
        problem = _first_line(error)
      problem = distributed.first_problem(problem)
      # Only now: to compute it takes all processes.
      if not problem and _checksum(state) != checksum:
        problem = "the bytes are not those that were saved"
      if problem := distributed.first_problem(problem):
        unreadable[folder] = problem
        continue
      if unreadable:
        self._set_aside(unreadable, used=step)
      return state, meta
    if unreadable:
      newest, reason = next(iter(unreadable.items()))
      raise CheckpointError(
        f"{self.directory}: none of the {len(unreadable)} checkpoints can be"
        f" read (step {newest.name}: {reason}): repair the folder, or start"
        " anew with another --workdir"
      )
    return None

  def wait(self) -> None:
    """Returns when the last save is complete on disk.

    Raises:
      CheckpointError: it cannot be written.
    """
    with self._writing():
      self._manager.wait_until_finished()
    newest = max(self._manager.all_steps(), default=-1)
    self._drop_preempted(before=newest + 1)

  def close(self) -> None:
    """Waits for the last save and stops the threads.

    Raises:
      CheckpointError: it cannot be written.
    """
    with self._writing():
      self._manager.close()
      if self._preempted is not None:
        self._preempted.close()

  def _stored(self) -> list[tuple[int, pathlib.Path]]:
    """Step and folder, oldest first; of two of a step the complete one last."""
    found = [(step, False, self._preempted) for step in self._preempted_steps()]
    found += [(step, True, self._manager) for step in self._manager.all_steps()]
    return [
      (step, pathlib.Path(manager.directory) / str(step))
      for step, _, manager in sorted(found, key=lambda item: item[:2])
    ]

  def _preempted_steps(self) -> list[int]:
    return [] if self._preempted is None else self._preempted.all_steps()

  def _drop_preempted(self, *, before: int) -> None:
    for step in self._preempted_steps():
      if step < before:
        self._preempted.delete(step)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """What goes wrong while a save is under way, in one line."""
    try:
      yield
    except Exception as error:  # As of reading.
      raise CheckpointError(
        f"{self.directory}: a checkpoint cannot be written"
        f" ({_why_not_written(error)}): make room, or set the permissions"
        " right; the same command then goes on from the last one that is"
        " complete"
      ) from error

  def _set_aside(
    self, unreadable: dict[pathlib.Path, str], *, used: int
  ) -> None:
    folder = self._workdir / UNREADABLE_FOLDER
    newest, reason = next(iter(unreadable.items()))
    logger.warning(
      "checkpoint of step %s in %s cannot be read (%s): going on from step %d;"
      " moved to %s",
      ", ".join(path.name for path in unreadable),
      newest.parent,
      reason,
      used,
      folder,
    )
    if jax.process_index() == 0:
      folder.mkdir(exist_ok=True)
      for path in unreadable:
        target = folder / path.name
        number = 1
        while target.exists():
          number += 1
          target = folder / f"{path.name}_{number}"
        path.rename(target)
    distributed.wait_for_all()
    self._manager.reload()
    if self._preempted is not None:
      self._preempted.reload()


def _open_manager(
  directory: pathlib.Path, policy: _LatestAndBest | None = None
) -> ocp.CheckpointManager:
  """Without a policy all that is saved stays."""
  if jax.process_index() == 0:
    _remove_unfinished(directory)
  distributed.wait_for_all()
  return ocp.CheckpointManager(
    directory,
    item_handlers={
      "state": ocp.StandardCheckpointHandler(),
      "meta": ocp.JsonCheckpointHandler(),
    },
    options=ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      # Reads nothing of the existing steps, of which one may be damaged.
      lightweight_initialize=True,
    ),
  )


def _save(
  manager: ocp.CheckpointManager, state: Any, meta: Meta, checksum: int
) -> None:
  """Begins to save; returns when the state may be donated."""
  stored_meta = {**dataclasses.asdict(meta), "checksum": checksum}
  # Or a flipped byte would pass for another config, or another best step.
  stored_meta["meta_checksum"] = _checksum_of_values(stored_meta)
  manager.save(
    meta.step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(_to_tree(state)),
      meta=ocp.args.JsonSave(stored_meta),
    ),
    # Without it a step that is not the newest would be left out silently.
    force=True,
  )


def _check_room(directory: pathlib.Path, state: Any) -> None:
  """Orbax would say it too, in some hundred lines."""
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  free = shutil.disk_usage(directory).free
  if free < needed:
    raise OSError(
      errno.ENOSPC,
      f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:.1f} MB are needed,"
      f" {free / 1e6:.1f} MB are free",
    )


def _structure(names: list[str], leaves: list[Any]) -> dict[str, tuple]:
  """Shape and type of every array, by name."""
  return {
    name: (tuple(leaf.shape), str(leaf.dtype))
    for name, leaf in zip(names, leaves, strict=True)
  }


def _read_structure(folder: pathlib.Path) -> dict[str, tuple]:
  tree = ocp.StandardCheckpointHandler().metadata(folder / "state").tree
  leaves = traverse_util.flatten_dict(tree, sep="/")
  return _structure(list(leaves), list(leaves.values()))


def _read_state(folder: pathlib.Path, like: Any) -> Any:
  # Not by the manager: it would wait for a process that cannot read.
  tree = ocp.StandardCheckpointHandler().restore(
    folder / "state", args=ocp.args.StandardRestore(_to_tree(like))
  )
  arrays = traverse_util.flatten_dict(tree, sep="/")
  names, _, treedef = _flatten(like)
  return treedef.unflatten([arrays[name] for name in names])


def _check_belongs(
  folder: pathlib.Path,
  meta: Meta,
  stored: dict,
  like: Any,
  *,
  config: str,
  lists: str,
) -> None:
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
  wanted = _structure(names, leaves)
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise CheckpointError(
        f"{folder}: the checkpoint is of another network: {name} is"
        f" {_describe(stored.get(name))} there and"
        f" {_describe(wanted.get(name))} here: {fix}"
      )


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
  # Earlier versions have saved none.
  meta_checksum = stored.pop("meta_checksum", None)
  if meta_checksum not in (None, _checksum_of_values(stored)):
    raise ValueError("its meta data are not those that were saved")
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


def _checksum_of_all(state: Any) -> int:
  """The same, which must be so on all processes.

  Raises:
    ConfigError: on all processes, names one that differs.
  """
  checksum = _checksum(state)
  # Every process writes a share of what all have.
  distributed.check_equal(
    f"{checksum:08x}",
    "other parameters than process 0, though both did the same steps: the run"
    " cannot be saved; it can go on from its last checkpoint",
  )
  return checksum


def _checksum_of_values(values: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _describe(array: tuple | None) -> str:
  return "absent" if array is None else f"{array[1]}{list(array[0])}"


def _why_not_written(error: Exception) -> str:
  """The system's word, which stands at the end of a long line of others."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES):
    if os.strerror(number) in str(error):
      return os.strerror(number)
  return _first_line(error)


def _first_line(error: Exception) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:200] if text else ''}"
