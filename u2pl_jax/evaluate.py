"""Judges a trained network under a named protocol, or compares two judgements.

python -m u2pl_jax.evaluate --checkpoint=runs/voc_1464 --protocol=whole
  --output=evaluations/voc_1464_whole
python -m u2pl_jax.evaluate --checkpoint=u2pl.pth --config=configs/voc_1464.py
  --output=evaluations/published
python -m u2pl_jax.evaluate --compare evaluations/a evaluations/b

docs/evaluation.md says what the protocols and the numbers mean. Several
processes share the images out as in training, see docs/many_hosts.md.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import ml_collections
from absl import app, flags
from absl import logging as absl_logging

from input_pipeline import ConfigError, DataError, parallel, storage
from input_pipeline.command_line import (
  CONFIG,
  define_processes,
  fail,
  parse_flags,
)
from u2pl_jax import evaluation_record
from u2pl_jax.evaluation_record import EvaluationRecord, RecordError

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Workdir of a run, or a .pth or .npz (with --config)."
)
_WEIGHTS = flags.DEFINE_enum(
  "weights",
  None,
  ("teacher", "student"),
  "Which network. Default: the teacher once it has had an update.",
)
_STEP = flags.DEFINE_integer(
  "step", None, "Checkpoint of a workdir. Default: the best by mIoU."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "Folder for metrics.json and images.npz."
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace an evaluation in --output."
)
_ROOT = flags.DEFINE_string(
  "root", None, "Folder of the data set. Default: config.dataset.root."
)
_SPLIT = flags.DEFINE_enum(
  "split",
  "validation",
  ("validation", "labelled"),
  "Which list of the config.",
)
_LIST = flags.DEFINE_string(
  "list", None, "Text file of image ids, in place of --split."
)
_PROTOCOL = flags.DEFINE_string(
  "protocol",
  None,
  "padded, whole, center_crop or sliding_window. Default: config.eval's, as for"
  " the next three.",
)
_PAD_TO = flags.DEFINE_list(
  "pad_to", None, "Height,width of padded and center_crop."
)
_WINDOW = flags.DEFINE_list(
  "window", None, "Height,width of the windows of sliding_window."
)
_STRIDE = flags.DEFINE_float(
  "stride", None, "Step between windows, as a share of the window."
)
_SCALES = flags.DEFINE_list(
  "scales", ["1.0"], "Factors of the images' sizes, such as 0.5,1.0,1.5."
)
_FLIP = flags.DEFINE_bool("flip", False, "Mirror each scale too.")
_BATCH = flags.DEFINE_integer(
  "batch", None, "Images at once, over all devices. Default: config.eval.batch."
)
_COMPARE = flags.DEFINE_string(
  "compare", None, "Folders A B of two evaluations: prints B - A."
)
_PROCESSES = define_processes()


def _evaluate() -> None:
  if _CHECKPOINT.value is None or _OUTPUT.value is None:
    missing = "checkpoint" if _CHECKPOINT.value is None else "output"
    raise ConfigError(
      f"--{missing} is missing: for example --checkpoint=runs/voc_1464"
      " --output=evaluations/voc_1464, or --compare A B"
    )
  evaluation_record.check_output(_OUTPUT.value, overwrite=_OVERWRITE.value)
  scales = _scales()

  # Not at the top: comparing, and refusing, need no backend.
  import jax

  from input_pipeline.dataset_config import (
    check_labels,
    load_info,
    prepare_dataset,
  )
  from u2pl_jax import distributed, sharding, writers
  from u2pl_jax.config_checks import eval_protocol
  from u2pl_jax.data import load_eval_data
  from u2pl_jax.evaluation import EvalSettings
  from u2pl_jax.evaluator import Evaluator, evaluate_images
  from u2pl_jax.trained import load_trained

  trained = load_trained(
    _CHECKPOINT.value,
    weights=_WEIGHTS.value,
    step=_STEP.value,
    config=CONFIG.value,
  )
  config = _config(CONFIG.value or trained.config)
  protocol = eval_protocol(config, scales=scales, flip=_FLIP.value)
  batch_size = _batch_size(config, jax.device_count())
  info = load_info(config.dataset)
  if info.class_names != trained.info.class_names:
    raise ConfigError(
      f"{trained.path}: the network knows"
      f" {_classes(trained.info.class_names)}, but the data set {info.name!r}"
      f" has {_classes(info.class_names)}: choose the config of its data set"
    )
  check_labels(config.dataset, num_classes=info.num_classes)
  with distributed.in_turn():
    prepare_dataset(config.dataset)
  data = load_eval_data(config, info, split=_SPLIT.value, list_file=_LIST.value)

  evaluator = Evaluator(
    trained.model,
    sharding.create_mesh(),
    protocol,
    EvalSettings(
      info.num_classes,
      config.dataset.ignore_label,
      # They belong to the weights.
      mean=trained.info.mean,
      std=trained.info.std,
    ),
  )
  is_main = jax.process_index() == 0
  if is_main:
    print(_network(trained.path, trained.step, trained.weights))
    print(_describe(protocol.settings()), flush=True)
  start = time.perf_counter()
  with parallel.progress(len(data.validation), "evaluating", "image") as bar:
    counts = evaluate_images(
      config,
      evaluator,
      data,
      trained.variables,
      batch_size=batch_size,
      update=bar.update,
    )
  seconds = time.perf_counter() - start
  if not is_main:
    distributed.wait_for_all()
    return
  record = evaluator.record(
    counts,
    checkpoint=trained.path,
    step=trained.step,
    weights=trained.weights,
    config_hash=writers.config_digest(trained.config),
    class_names=info.class_names,
    image_ids=data.validation,
  )
  summary = evaluation_record.write_record(_OUTPUT.value, record)
  _print_summary(record, summary)
  print(
    f"{_count(len(evaluator.shapes), 'shape')},"
    f" {_count(evaluator.num_compilations, 'compilation')}, {seconds:.1f} s;"
    f" written to {_OUTPUT.value}"
  )
  distributed.wait_for_all()


def _scales() -> tuple[float, ...]:
  scales = tuple(_numbers("scales", _SCALES.value, float))
  if not scales or any(not 0.25 <= scale <= 4 for scale in scales):
    raise ConfigError(
      f"--scales={','.join(_SCALES.value)}: each must be between 0.25 and 4"
    )
  if len(set(scales)) < len(scales):
    raise ConfigError(f"--scales={','.join(_SCALES.value)}: one is there twice")
  return scales


def _numbers(name: str, texts: list[str], kind: type) -> list:
  try:
    return [kind(text) for text in texts]
  except ValueError:
    raise ConfigError(
      f"--{name}={','.join(texts)}: needs"
      f" {'whole numbers' if kind is int else 'numbers'} with commas"
    ) from None


def _config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config with what the flags change."""
  from configs import common

  config = ml_collections.ConfigDict(config.to_dict())
  for key, default in common.get_base_config().eval.items():
    if key not in config.eval:
      # The run is older than the key.
      config.eval[key] = default
  if _ROOT.value is not None:
    config.dataset.root = _ROOT.value
  if _PROTOCOL.value is not None:
    config.eval.protocol = _PROTOCOL.value
  if _STRIDE.value is not None:
    config.eval.stride = _STRIDE.value
  for flag in (_PAD_TO, _WINDOW):
    if flag.value is not None:
      size = _numbers(flag.name, flag.value, int)
      config.eval[flag.name] = tuple(size)
  return config


def _batch_size(config: ml_collections.ConfigDict, num_devices: int) -> int:
  if _BATCH.value is None:
    # Meant for the devices of the training run.
    return -(-config.eval.batch // num_devices) * num_devices
  if _BATCH.value < 1 or _BATCH.value % num_devices:
    raise ConfigError(
      f"--batch={_BATCH.value}: must be a positive multiple of the number of"
      f" devices, {num_devices}"
    )
  return _BATCH.value


def _classes(names: tuple[str, ...]) -> str:
  shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
  return f"{len(names)} classes ({shown})"


# -- What is printed -----------------------------------------------------------


def _number(value: float | None, form: str = "7.4f") -> str:
  width = int(form.split(".")[0].lstrip("+"))
  return "-".rjust(width) if value is None else format(value, form)


def _count(number: int, unit: str) -> str:
  return f"{number} {unit}" + ("" if number == 1 else "s")


def _network(path: str, step: int | None, weights: str) -> str:
  of_step = "" if step is None else f" of step {step}"
  return f"{weights or 'network'}{of_step} of {path}"


def _describe(protocol: Mapping[str, Any]) -> str:
  settings = ", ".join(
    f"{key} {value}"
    for key, value in protocol.items()
    if key != "name" and value is not None
  )
  return f"protocol {protocol['name']} ({settings})"


def _print_summary(
  record: EvaluationRecord, summary: Mapping[str, Any]
) -> None:
  width = max(map(len, record.class_names))
  print(f"  {'class':{width}}      IoU  boundary IoU")
  for name in record.class_names:
    print(
      f"  {name:{width}}  {_number(summary['iou'][name])}"
      f"       {_number(summary['boundary_iou_per_class'][name])}"
    )
  interval = summary["interval"]
  print(
    f"mIoU {summary['miou']:.4f}  (95 % interval over images"
    f" {_number(interval['low'], '6.4f')} to"
    f" {_number(interval['high'], '6.4f')};"
    " of the classes present"
    f" {_number(summary['miou_present_classes'], '6.4f')})"
  )
  for key, name in (
    ("boundary_iou", "boundary IoU"),
    ("frequency_weighted_iou", "frequency-weighted IoU"),
    ("pixel_accuracy", "pixel accuracy"),
    ("mean_accuracy", "mean accuracy"),
    ("ece", "calibration error (ECE)"),
  ):
    print(f"{name} {_number(summary[key], '6.4f')}")
  print(_count(summary["num_images"], "image"))


def _compare(path_a: str, path_b: str) -> None:
  a, b = map(evaluation_record.read_record, (path_a, path_b))
  comparison = evaluation_record.compare(a, b)
  if _OUTPUT.value is not None:
    _write_comparison(_OUTPUT.value, comparison)
  for name, path, record in (("A", path_a, a), ("B", path_b, b)):
    network = _network(record.checkpoint, record.step, record.weights)
    print(f"{name} {path}: {network}")
  print(_describe(a.protocol))
  width = max(map(len, (*a.class_names, "class")))
  print(f"  {'class':{width}}        A        B    B - A  95 % interval")
  rows = [*comparison["iou"].items(), ("mIoU", comparison["miou"])]
  for name, row in rows:
    print(
      f"  {name:{width}}  {_number(row['a'])}  {_number(row['b'])}"
      f"  {_number(row['difference'], '+7.4f')}"
      f"  {_number(row['low'], '+7.4f')} to {_number(row['high'], '+7.4f')}"
    )
  images = _count(comparison["num_images"], "image")
  print(f"{images}, paired bootstrap over them")


def _write_comparison(path: str, comparison: Mapping[str, Any]) -> None:
  if os.path.exists(path) and not _OVERWRITE.value:
    raise RecordError(
      f"--output={path}: exists: choose another file, or add --overwrite"
    )
  text = json.dumps(comparison, indent=2, ensure_ascii=False) + "\n"
  try:
    storage.write_whole(path, text.encode())
  except OSError as error:
    raise RecordError(
      f"--output={path}: cannot be written ({error.strerror}): name a file in a"
      " folder that is there"
    ) from None


def main(arguments: list[str]) -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)
  errors = [ConfigError, DataError, RecordError]
  prefix = ""
  with contextlib.ExitStack() as stack:
    try:
      if _COMPARE.value is not None:
        if len(arguments) != 2:
          raise ConfigError("--compare needs two folders: --compare A B")
        _compare(_COMPARE.value, arguments[1])
        return
      if len(arguments) > 1:
        raise ConfigError(
          f"unexpected argument {arguments[1]!r}: flags begin with --"
        )
      from u2pl_jax import distributed
      from u2pl_jax.checkpoint import CheckpointError
      from u2pl_jax.models.weight_files import WeightsError
      from u2pl_jax.trained import TrainedError

      errors += [CheckpointError, TrainedError, WeightsError]
      distributed.initialize(**_PROCESSES())
      prefix = distributed.error_prefix()
      stack.enter_context(distributed.end_together())
      _evaluate()
    except tuple(errors) as error:
      fail(prefix + str(error))
    except KeyboardInterrupt:
      fail(f"{prefix}interrupted: nothing was written", code=130)


if __name__ == "__main__":
  app.run(
    main,
    flags_parser=functools.partial(
      parse_flags, needs_config=False, max_arguments=1
    ),
  )
