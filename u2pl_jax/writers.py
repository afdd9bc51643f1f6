"""What a run writes into its workdir besides checkpoints and report.

  config.json     the resolved config, which a later run must have too
  dataset.json    classes, colours and pixel statistics: with config.json and a
                  checkpoint all that is needed to use the network
  metrics.jsonl   one JSON object a written step
  events...       the same for TensorBoard, if tensorflow is installed

A run that was killed and goes on from step s drops the lines after s, so that
the file ends up the one of an uninterrupted run, except for what depends on the
clock; such metrics are named `time/...`.
"""

import hashlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from input_pipeline import DatasetInfo, storage
from u2pl_jax.config_checks import ConfigError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
DATASET_FILE = "dataset.json"
METRICS_FILE = "metrics.jsonl"

# Keys that another run in the same workdir may change: none of them changes a
# parameter, and log.every_steps only changes which steps are written.
MAY_CHANGE = (
  "checkpoint.keep",
  "input.num_threads",
  "input.num_workers",
  "input.prefetch",
  "log.every_steps",
  "log.report_images",
)


def config_digest(config: ml_collections.ConfigDict) -> str:
  """Digest of everything that another run in the workdir must not change."""
  values = _flat(config)
  for key in MAY_CHANGE:
    values.pop(key, None)
  return digest(values)


def digest(value: Any) -> str:
  """Short digest of a JSON value."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


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


class MetricsWriter:
  """Writes metrics.jsonl and TensorBoard files."""

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    class_names: Sequence[str],
    last_step: int,
  ):
    """Opens metrics.jsonl for the steps after `last_step`.

    Args:
      workdir: of the run.
      class_names: names of the entries of a vector.
      last_step: lines after this step are dropped, and so is a line that a
        kill has cut off.
    """
    self._class_names = tuple(class_names)
    path = workdir / METRICS_FILE
    _drop_lines_after(path, last_step)
    self._tensorboard = _tensorboard_writer(workdir)
    self._file = path.open("a", encoding="utf-8")

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Writes one line.

    Args:
      step: updates done; must grow from call to call.
      metrics: numbers, or vectors with one entry a class, which are written as
        `<name>/<class>`. What is not finite is written as null.

    Raises:
      ValueError: a vector of another length.
    """
    scalars = expand(metrics, self._class_names)
    line = {"step": step} | {
      name: value if math.isfinite(value) else None
      for name, value in scalars.items()
    }
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    if self._tensorboard is not None:
      self._tensorboard.write_scalars(step, scalars)

  def sync(self) -> None:
    """Returns when all lines are on disk; call it before a checkpoint.

    A checkpoint of step s then never exists without the lines up to s.
    """
    self._file.flush()
    os.fsync(self._file.fileno())
    if self._tensorboard is not None:
      self._tensorboard.flush()

  def close(self) -> None:
    """Closes the files."""
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()


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


def _tensorboard_writer(workdir: pathlib.Path):
  """clu's writer of TensorBoard files, or None without tensorflow."""
  try:
    # It computes nothing here: its notes on how it would are noise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf
  except ModuleNotFoundError as error:
    if error.name != "tensorflow":
      raise
    logger.info("TensorBoard files are off (tensorflow is not installed)")
    return None
  # The accelerator's memory is for JAX.
  tf.config.set_visible_devices([], "GPU")
  from clu import metric_writers

  return metric_writers.SummaryWriter(str(workdir))


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
