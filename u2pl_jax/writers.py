"""What a run writes into its workdir besides checkpoints and report.

  config.json     the resolved config, which a later run must have too
  dataset.json    classes, colours and pixel statistics: with config.json and a
                  checkpoint all that is needed to use the network
  metrics.jsonl   one JSON object a written step
  events...       the same for TensorBoard, with pictures, if tensorflow is
                  installed
  wandb_run.txt   id of the run in Weights & Biases, if the config names a
                  project there; wandb/ holds what its package keeps

A run that was killed and goes on from step s drops the lines after s, so that
the file ends up the one of an uninterrupted run, except for what depends on the
clock; such metrics are named `time/...`. TensorBoard keeps both files and shows
the later one; Weights & Biases keeps the lines it already has, which are equal.
"""

import contextlib
import errno
import json
import logging
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from input_pipeline import DatasetInfo, storage
from u2pl_jax.config_checks import ConfigError
from u2pl_jax.evaluation_record import digest

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
DATASET_FILE = "dataset.json"
METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb_run.txt"

# Keys that another run in the same workdir may change: none of them changes a
# parameter, and log.every_steps only changes which steps are written. (A run
# that failed at its first bad record has used none, so that to go on with
# 'skip' is to have had it from the start.)
MAY_CHANGE = (
  "checkpoint.keep",
  "input.max_bad_records",
  "input.num_threads",
  "input.num_workers",
  "input.on_bad_record",
  "input.prefetch",
  "log.every_steps",
  "log.images_every_epochs",
  "log.report_images",
  "log.wandb_project",
)


def config_digest(config: ml_collections.ConfigDict) -> str:
  """Digest of everything that another run in the workdir must not change."""
  values = _flat(config)
  for key in MAY_CHANGE:
    values.pop(key, None)
  return digest(values)


def check_sinks(config: ml_collections.ConfigDict) -> None:
  """Checks that what the config wants to write to is installed.

  Raises:
    ConfigError: a Weights & Biases project without its package.
  """
  project = config.log.wandb_project
  if not project:
    return
  try:
    import wandb

    # A folder wandb/, as its package leaves one behind, imports as empty.
    _ = wandb.init
  except (ImportError, AttributeError) as error:
    reason = "the package wandb is not installed"
    if isinstance(error, ImportError) and error.name != "wandb":
      reason = f"the package wandb cannot be imported ({error})"
    raise _wandb_error(project, reason, "pip install wandb") from None


def check_workdir(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
  """Creates the folder, and checks that this config may run in it.

  Args:
    workdir: may exist.
    config: complete.

  Raises:
    ConfigError: the folder cannot be written, or holds a run of another config;
      names the first key that differs.
  """
  probe = workdir / f".writable.{os.getpid()}"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise ConfigError(
      f"--workdir={workdir}: cannot write there ({error.strerror}): choose a"
      " folder that you may write"
    ) from None

  path = workdir / CONFIG_FILE
  try:
    stored = json.loads(path.read_text())
  except FileNotFoundError:
    return
  except (OSError, ValueError) as error:
    raise ConfigError(
      f"{path}: cannot be read ({error}): repair it, or choose another"
      " --workdir"
    ) from None
  old, new = _flat(stored), _flat(config)
  for key in sorted((old.keys() | new.keys()) - set(MAY_CHANGE)):
    if key not in old or key not in new or old[key] != new[key]:
      raise ConfigError(
        f"{workdir} holds a run of another config: config.{key} is"
        f" {_show(old, key)} there and {_show(new, key)} here: set it back, or"
        " choose another --workdir"
      )


def write_config(
  workdir: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
  """Writes config.json, whole or not at all."""
  text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
  storage.write_whole(workdir / CONFIG_FILE, text.encode())


def write_dataset(
  workdir: pathlib.Path, info: DatasetInfo, ignore_label: int
) -> None:
  """Writes dataset.json, whole or not at all."""
  content = {
    "name": info.name,
    "class_names": info.class_names,
    "palette": info.palette,
    "mean": info.mean,
    "std": info.std,
    "ignore_label": ignore_label,
  }
  text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
  storage.write_whole(workdir / DATASET_FILE, text.encode())


class Sink:
  """One place that metrics go to; one without pictures ignores them."""

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    """Writes the numbers of a step, of which some may not be finite."""
    raise NotImplementedError

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes [h, w, 3] uint8 pictures by name."""

  def sync(self) -> None:
    """Returns when all that was written is as safe as the place can be."""

  def close(self) -> None:
    """Ends it."""


class JsonLines(Sink):
  """metrics.jsonl: one object a line."""

  def __init__(self, workdir: pathlib.Path, *, last_step: int):
    """Opens the file; drops what is after `last_step`, or cut off by a kill."""
    path = workdir / METRICS_FILE
    _drop_lines_after(path, last_step)
    self._file = path.open("a", encoding="utf-8")

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    line = {"step": step} | {
      name: value if math.isfinite(value) else None
      for name, value in scalars.items()
    }
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()

  def sync(self) -> None:
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class TensorBoard(Sink):
  """Event files."""

  def __init__(self, workdir: pathlib.Path):
    """Needs tensorflow: ModuleNotFoundError without."""
    # It computes nothing here: its notes on how it would are noise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    # The accelerator's memory is for JAX.
    tf.config.set_visible_devices([], "GPU")
    from clu import metric_writers

    self._full_disk_error = tf.errors.ResourceExhaustedError
    self._writer = metric_writers.SummaryWriter(str(workdir))

  @contextlib.contextmanager
  def _os_errors(self) -> Iterator[None]:
    """A full disk as the system reports it."""
    try:
      yield
    except self._full_disk_error as error:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    with self._os_errors():
      self._writer.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    with self._os_errors():
      self._writer.write_images(step, images)

  def sync(self) -> None:
    with self._os_errors():
      self._writer.flush()

  def close(self) -> None:
    with self._os_errors():
      self._writer.close()


class WeightsAndBiases(Sink):
  """A run of a project there; WANDB_MODE=offline keeps it on this machine."""

  def __init__(self, workdir: pathlib.Path, config: ml_collections.ConfigDict):
    """Starts the run, or goes on with the one whose id is in the workdir.

    Raises:
      ConfigError: it cannot be started.
    """
    import wandb

    path = workdir / WANDB_FILE
    if not path.exists():
      storage.write_whole(path, f"{secrets.token_hex(4)}\n".encode())
    self._make_image = wandb.Image
    project = config.log.wandb_project
    try:
      self._run = wandb.init(
        project=project,
        id=path.read_text().strip(),
        resume="allow",
        name=config.name,
        dir=str(workdir),
        config=config.to_dict(),
        # A run that goes on may have other values of MAY_CHANGE.
        allow_val_change=True,
      )
    except wandb.Error as error:
      reason = " ".join(str(error).split()) or type(error).__name__
      raise _wandb_error(
        project, reason, "run `wandb login`, or set WANDB_MODE=offline"
      ) from None

  def write(self, step: int, scalars: Mapping[str, int | float]) -> None:
    self._run.log(dict(scalars), step=step)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    self._run.log(
      {name: self._make_image(image) for name, image in images.items()},
      step=step,
    )

  def close(self) -> None:
    self._run.finish()


class MetricsWriter:
  """Writes the same to several sinks."""

  def __init__(self, sinks: Sequence[Sink], *, class_names: Sequence[str]):
    """Takes the sinks, and the names of the entries of a vector."""
    self._sinks = tuple(sinks)
    self._class_names = tuple(class_names)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes one line.

    Args:
      step: updates done; must grow from call to call.
      metrics: numbers, or vectors with one entry a class, which are written as
        `<name>/<class>`. What is not finite is null in metrics.jsonl.

    Raises:
      ValueError: a vector of another length.
    """
    scalars = expand(metrics, self._class_names)
    for sink in self._sinks:
      sink.write(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes [h, w, 3] uint8 pictures to the sinks that take them.

    Args:
      step: of the last `write`, or a later one.
      images: by name.
    """
    for sink in self._sinks:
      sink.write_images(step, images)

  def sync(self) -> None:
    """Returns when all lines are on disk; call it before a checkpoint.

    A checkpoint of step s then never exists without the lines up to s.
    """
    for sink in self._sinks:
      sink.sync()

  def close(self) -> None:
    """Closes all sinks."""
    for sink in self._sinks:
      sink.close()


def open_writer(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  *,
  class_names: Sequence[str],
  last_step: int,
) -> MetricsWriter:
  """A writer to all that is installed and wanted.

  Args:
    workdir: of the run.
    config: complete, passed by `check_sinks`.
    class_names: names of the entries of a vector.
    last_step: lines after this step are dropped, and so is a line that a kill
      has cut off.

  Returns:
    `MetricsWriter`.

  Raises:
    ConfigError: Weights & Biases refuses.
  """
  others: list[Sink] = []
  try:
    others.append(TensorBoard(workdir))
  except ModuleNotFoundError as error:
    if error.name != "tensorflow":
      raise
    logger.info("TensorBoard files are off (tensorflow is not installed)")
  if config.log.wandb_project:
    others.append(WeightsAndBiases(workdir, config))
  return MetricsWriter(
    [JsonLines(workdir, last_step=last_step), *others],
    class_names=class_names,
  )


def expand(
  metrics: Mapping[str, Any], class_names: Sequence[str]
) -> dict[str, int | float]:
  """Metrics as Python numbers, vectors spread over the classes.

  Args:
    metrics: scalars and [k] vectors.
    class_names: k names.

  Returns:
    One number a name.

  Raises:
    ValueError: something that is neither.
  """
  scalars = {}
  for name, value in metrics.items():
    value = np.asarray(value)
    if value.ndim == 0:
      scalars[name] = value.item()
    elif value.shape == (len(class_names),):
      for class_name, entry in zip(class_names, value.tolist(), strict=True):
        scalars[f"{name}/{class_name}"] = entry
    else:
      raise ValueError(
        f"metric {name} has shape {value.shape}: needs a scalar or one entry"
        f" for each of the {len(class_names)} classes"
      )
  return scalars


def _drop_lines_after(path: pathlib.Path, last_step: int) -> None:
  try:
    text = path.read_text(encoding="utf-8", errors="replace")
  except FileNotFoundError:
    return
  kept = []
  lines = text.splitlines(keepends=True)
  for number, line in enumerate(lines, start=1):
    try:
      step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
      step = None
    if step is None and number < len(lines):
      # The last one is the trace of a kill and will be written again.
      logger.warning("%s: dropped line %d, which is damaged", path, number)
    if step is not None and step <= last_step:
      kept.append(line)
  if len(kept) < len(lines):
    storage.write_whole(path, "".join(kept).encode())


def _wandb_error(project: str, reason: str, fix: str) -> ConfigError:
  return ConfigError(
    f"config.log.wandb_project={project!r}: {reason}: {fix}, or set"
    " config.log.wandb_project to ''"
  )


def _flat(config: Any) -> dict[str, Any]:
  """Nested config -> 'a.b.c' keys, values as JSON gives them back."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  config = json.loads(json.dumps(config))

  flat = {}

  def visit(prefix: str, node: Any) -> None:
    if isinstance(node, dict):
      for key, value in node.items():
        visit(f"{prefix}.{key}" if prefix else key, value)
    else:
      flat[prefix] = node

  visit("", config)
  return flat


def _show(values: Mapping[str, Any], key: str) -> str:
  return repr(values[key]) if key in values else "absent"
