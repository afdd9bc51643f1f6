"""Reads everything a run would read and says what is wrong with it.

  python -m input_pipeline.doctor --config=configs/voc_1464.py
  python -m input_pipeline.doctor --config=configs/voc_1464.py \
    --allow=greyscale_image,batch_size --json=doctor.json

All labelled and validation images with their masks, and the unlabelled images
without; every problem is collected. Ends with 0 if there is none, with 1 if
there are some that --allow does not name, and with 2 and one line if it could
not run. docs/own_data.md has the table of the kinds of problems.
"""

import collections
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence

from absl import app, flags
from absl import logging as absl_logging

from input_pipeline import command_line, costs, errors
from input_pipeline.examination import (
  LABELLED,
  PARTS,
  VALIDATION,
  Diagnosis,
  Labels,
  examine,
  median_size,
)
from input_pipeline.inspection import ERROR, KINDS, Problem

_JSON = flags.DEFINE_string("json", None, "Also write everything to this file.")
_ALLOW = flags.DEFINE_list(
  "allow",
  [],
  "Kinds of problems that are all right, comma-separated. All kinds: "
  + ", ".join(KINDS),
)

COULD_NOT_RUN = 2
# Examples of a kind of problem on the terminal; the JSON file has all.
_EXAMPLES = 5


def _ranges(
  sizes: Mapping[tuple[int, int], int],
) -> dict[str, tuple[int, int] | int]:
  heights, widths = zip(*sizes, strict=True)
  return {
    "smallest": (min(heights), min(widths)),
    "median": median_size(sizes),
    "largest": (max(heights), max(widths)),
    "distinct": len(sizes),
  }


def to_text(diagnosis: Diagnosis, allowed: Sequence[str]) -> str:
  """The report for a terminal, without the last line.

  Args:
    diagnosis: of a data set.
    allowed: kinds of problems that do not count.
  """
  info = diagnosis.info
  lines = [f"{info.name}: {info.num_classes} classes"]
  for part in PARTS:
    line = f"  {part:<11}{diagnosis.counts[part]:>7} images"
    if sizes := diagnosis.sizes.get(part):
      (h0, w0), (h1, w1) = (
        _ranges(sizes)[key] for key in ("smallest", "largest")
      )
      line += f", {h0}x{w0}"
      if len(sizes) > 1:
        line += f" to {h1}x{w1} in {len(sizes)} sizes"
      line += " (height x width)"
    elif part not in diagnosis.sizes:
      line += ", not read by this method"
    lines.append(line)
  if diagnosis.mask_storage:
    stored = sorted(diagnosis.mask_storage.items())
    lines.append("  masks: " + ", ".join(f"{n} {name}" for name, n in stored))
  if diagnosis.mean is not None:
    measured = ("mean", diagnosis.mean), ("std", diagnosis.std)
    lines.append(
      "  pixels: "
      + ", ".join(
        f"{name} ({', '.join(f'{x:.1f}' for x in values)})"
        for name, values in measured
      )
      + "; the config subtracts "
      + f"({', '.join(f'{x:.1f}' for x in info.mean)}) and divides by "
      + f"({', '.join(f'{x:.1f}' for x in info.std)})"
    )
  lines += ["", *_label_table(diagnosis), "", *_estimate_lines(diagnosis)]
  groups = itertools.groupby(diagnosis.problems, key=lambda p: p.kind)
  for kind, group in groups:
    problems = list(group)
    severity, meaning = KINDS[kind]
    severity = "allowed" if kind in allowed else severity
    lines += ["", f"{severity}: {kind}, {len(problems)} times: {meaning}"]
    lines += [f"  {p.path}: {p.detail}" for p in problems[:_EXAMPLES]]
    if len(problems) > _EXAMPLES:
      lines.append(f"  ... and {len(problems) - _EXAMPLES} more (--json=FILE)")
  return "\n".join(lines)


def _label_table(diagnosis: Diagnosis) -> list[str]:
  names = diagnosis.info.class_names
  width = max(map(len, (*names, "ignored")))
  lines = [
    f"{'class':<{width + 4}}" + f"{'labelled':>10}{'images':>8}"
    f"{'validation':>14}{'images':>8}"
  ]
  labels = [diagnosis.labels[part] for part in (LABELLED, VALIDATION)]

  def share(part: Labels, pixels: int) -> str:
    total = int(part.pixels.sum()) + part.ignored
    return f"{pixels / total:.2%}" if total else "-"

  for class_id, name in enumerate(names):
    cells = [
      (share(part, part.pixels[class_id]), part.images[class_id])
      for part in labels
    ]
    lines.append(
      f"{class_id:>3} {name:<{width}}{cells[0][0]:>10}{cells[0][1]:>8}"
      f"{cells[1][0]:>14}{cells[1][1]:>8}"
    )
  ignored = [share(part, part.ignored) for part in labels]
  lines.append(f"    {'ignored':<{width}}{ignored[0]:>10}{ignored[1]:>22}")
  return lines


def _estimate_lines(diagnosis: Diagnosis) -> list[str]:
  estimate = diagnosis.estimate
  gb = {
    name: getattr(estimate, f"{name}_bytes") / 1e9
    for name in ("memory", "parameter", "bank", "activation")
  }
  gpu_rate = f"{estimate.gpu_rate / 1e12:.0f} TFLOP/s"
  return [
    f"rough memory on one device: {gb['memory']:.1f} GB, of which"
    f" {gb['parameter']:.1f} parameters and optimiser, {gb['bank']:.1f} memory"
    f" bank, {gb['activation']:.1f} activations (which devices share);"
    " python -m u2pl_jax.plan predicts it better, and what lessens it",
    f"rough time for {estimate.steps} steps, without evaluations:"
    f" {_time_text(estimate.gpu_hours)} at {gpu_rate}"
    f" (an A100-class GPU), {_time_text(estimate.cpu_hours)} at"
    f" {costs.CPU_RATE / 1e12:g} TFLOP/s (two CPU cores)",
  ]


def _time_text(hours: float) -> str:
  if hours < 1:
    return f"{60 * hours:.1f} minutes"
  return f"{hours:.1f} hours" if hours < 10 else f"{hours:.0f} hours"


def to_json(
  diagnosis: Diagnosis, allowed: Sequence[str], config_name: str
) -> dict:
  """The report as what JSON can hold.

  Args:
    diagnosis: of a data set.
    allowed: kinds of problems that do not count.
    config_name: of the run.
  """
  info, estimate = diagnosis.info, diagnosis.estimate
  return {
    "config": config_name,
    "clean": not _counting(diagnosis, allowed),
    "problems": [
      {
        "kind": p.kind,
        "severity": p.severity,
        "path": p.path,
        "detail": p.detail,
        "allowed": p.kind in allowed,
      }
      for p in diagnosis.problems
    ],
    "kinds": dict(collections.Counter(p.kind for p in diagnosis.problems)),
    "files": diagnosis.files,
    "images": dict(diagnosis.counts),
    "sizes": {
      part: _ranges(sizes) for part, sizes in diagnosis.sizes.items() if sizes
    },
    "masks": dict(diagnosis.mask_storage),
    "classes": list(info.class_names),
    "labels": {
      part: {
        "pixels": labels.pixels.tolist(),
        "images": labels.images.tolist(),
        "ignored": labels.ignored,
      }
      for part, labels in diagnosis.labels.items()
    },
    "mean": diagnosis.mean,
    "std": diagnosis.std,
    "estimate": {
      "memory_gb": estimate.memory_bytes / 1e9,
      "parameter_gb": estimate.parameter_bytes / 1e9,
      "bank_gb": estimate.bank_bytes / 1e9,
      "activation_gb": estimate.activation_bytes / 1e9,
      "steps": estimate.steps,
      "warmup_steps": estimate.warmup_steps,
      "tflop": estimate.operations / 1e12,
      "gpu_tflop_per_second": estimate.gpu_rate / 1e12,
      "gpu_hours": estimate.gpu_hours,
      "cpu_tflop_per_second": costs.CPU_RATE / 1e12,
      "cpu_hours": estimate.cpu_hours,
    },
  }


def _counting(
  diagnosis: Diagnosis, allowed: Sequence[str]
) -> tuple[Problem, ...]:
  return tuple(p for p in diagnosis.problems if p.kind not in allowed)


def main(_: list[str]) -> None:
  absl_logging.set_verbosity(absl_logging.WARNING)
  config, allowed = command_line.CONFIG.value, _ALLOW.value
  unknown = sorted(set(allowed) - set(KINDS))
  if unknown:
    command_line.fail(
      f"--allow={unknown[0]}: no such kind: choose from {', '.join(KINDS)}",
      COULD_NOT_RUN,
    )
  try:
    diagnosis = examine(config)
    if _JSON.value:
      command_line.write_json(
        _JSON.value,
        to_json(diagnosis, allowed, config.name),
        COULD_NOT_RUN,
      )
  except (errors.DataError, errors.ConfigError) as error:
    command_line.fail(str(error), COULD_NOT_RUN)
  except KeyboardInterrupt:
    command_line.fail("interrupted; nothing was changed, start again", 130)
  print(to_text(diagnosis, allowed))
  counting = _counting(diagnosis, allowed)
  print()
  if counting:
    num_errors = sum(p.severity == ERROR for p in counting)
    print(
      f"{len(counting)} problems in {diagnosis.files} files: {num_errors}"
      f" errors, {len(counting) - num_errors} warnings"
    )
    sys.exit(1)
  note = f", {len(diagnosis.problems)} allowed problems" * bool(
    diagnosis.problems
  )
  print(f"clean: {diagnosis.files} files read{note}")


if __name__ == "__main__":
  app.run(
    main,
    flags_parser=functools.partial(
      command_line.parse_flags, code=COULD_NOT_RUN
    ),
  )
