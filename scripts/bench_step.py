"""Times a training step and its phases on whatever device is there.

  python scripts/bench_step.py --preset=cpu-mid
  python scripts/bench_step.py --preset=voc --json=step.json
  python scripts/bench_step.py --preset=voc --batch=16 --microbatches=8 --remat

Presets: voc and cityscapes are the published recipes (ResNet-101, 16+16 images
of 513 or 769, bfloat16), cpu-mid is ResNet-50 with 2+2 of 129 and of 257 in
float32. Random images and labels, full queues, a network at its initial
weights. Both step functions are compiled and timed as the trainer runs them;
the phases each on their own, so they need not add up to the whole. Beside each
stands its floor at the rates of large products and copies, measured first
(scripts/roofline.py); a share of the product rate of 100 % is out of reach
where bytes take longer.
"""

import bench_workload as workload  # isort: skip

import copy
import dataclasses
import sys
import time

import jax
import numpy as np
from absl import app, flags

from input_pipeline.command_line import write_json
from u2pl_jax import roofline, step_shapes

_MICROBATCHES = flags.DEFINE_integer(
  "microbatches", 0, "config.batch.microbatches; 0 for the preset's."
)
_REMAT = flags.DEFINE_bool("remat", False, "config.model.remat.")
_PHASES = flags.DEFINE_bool("phases", True, "Time the phases too.")


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    ms: median.
    flops: of the phase's operations, by roofline.py.
    floor_ms: at the measured rates.
    compile_s: 0 if it was not compiled alone.
    peak_bytes: of the compiled program; None where it says little.
  """

  ms: float
  flops: float
  floor_ms: float
  compile_s: float
  peak_bytes: int | None = None


def compiled(function, *args):
  """(program, seconds to compile)."""
  begin = time.perf_counter()
  lowered = function.lower(*args)
  return lowered.compile(), time.perf_counter() - begin


def measure(case, device):
  """{row: Row} of a case, the two steps last."""
  config = case.config
  rng = np.random.default_rng(0)
  program = workload.build(case)
  batches = workload.random_batches(case, rng)
  batches = jax.device_put(batches)
  counted = {
    phase.name: [phase]
    for phase in roofline.count(
      config, num_classes=case.num_classes, num_devices=1
    )
  }
  counted["semi-supervised step"] = [p for (p,) in counted.values()]
  counted["student, both ways"] = [
    *counted.pop("student, forward"),
    *counted.pop("student, backward"),
  ]
  alone = copy.deepcopy(config)
  alone.method = "supervised"
  counted["supervised step"] = roofline.count(
    alone, num_classes=case.num_classes, num_devices=1
  )

  rows = {}

  def add(name, ms, compile_s, peak_bytes=None):
    total = roofline.cost(counted[name], device, config.model.dtype)
    rows[name] = Row(
      ms, total.flops, 1e3 * total.seconds, compile_s, peak_bytes
    )

  state = program.create_state()
  state = state.replace(memory_bank=workload.full(state.memory_bank))
  if _PHASES.value:
    for name, (function, args) in workload.phases(case, program, state).items():
      run, compile_s = compiled(jax.jit(function), *args)
      add(
        name, workload.median_ms(run, workload.REPEATS.value, *args), compile_s
      )
    step, tables = workload.outside_network(
      case, program, *(workload.random_outputs(case, rng) for _ in range(2))
    )
    run, compile_s = compiled(step, tables, *batches)
    ms, _ = workload.step_ms(run, tables, batches, workload.REPEATS.value)
    add("outside the network", ms, compile_s)
    del tables
  for name, step, of in (
    ("supervised step", program.supervised_step, batches[:1]),
    ("semi-supervised step", program.semi_supervised_step, batches),
  ):
    run, compile_s = compiled(step, state, *of)
    ms, state = workload.step_ms(run, state, of, workload.REPEATS.value)
    add(name, ms, compile_s, step_shapes.peak_bytes(run))
  return rows


def table(case, device, rows):
  """The rows as text, 80 columns wide."""
  dtype = case.config.model.dtype
  step = rows["semi-supervised step"]
  lines = [
    case.name,
    workload.device_line(device, dtype),
    f"median of {workload.REPEATS.value}",
    f"{'':<23}{'ms':>9}{'share':>7}{'TFLOP/s':>9}{'of rate':>8}"
    f"{'floor ms':>9}{'x':>6}{'compile':>9}",
  ]
  for name, row in rows.items():
    rate = row.flops / (1e-3 * row.ms)
    lines.append(
      f"{name:<23}{row.ms:>9.1f}{row.ms / step.ms:>7.1%}"
      f"{rate / 1e12:>9.3g}{rate / device.rate(dtype):>8.1%}"
      f"{row.floor_ms:>9.1f}{row.ms / row.floor_ms:>6.1f}"
      f"{row.compile_s:>7.1f} s"
    )
  batch = case.config.batch
  images = batch.labelled + batch.unlabelled
  lines.append(
    f"{images * 1e3 / step.ms:.2f} images/s, peak memory by the compiler"
    f" {step.peak_bytes / 1e9:.2f} GB"
  )
  stats = jax.devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    lines.append(
      f"peak memory in use {stats['peak_bytes_in_use'] / 1e9:.2f} GB"
      " (all of the above in one process)"
    )
  return "\n".join(lines)


def main(_):
  # What is asked is how long it takes to compile.
  jax.config.update("jax_enable_compilation_cache", False)
  result = []
  for case in workload.chosen_cases(
    microbatches=_MICROBATCHES.value, remat=_REMAT.value
  ):
    device = workload.measured_device(case.config.model.dtype)
    rows = measure(case, device)
    print(table(case, device, rows), end="\n\n", flush=True)
    result.append(
      {
        "case": case.name,
        "device": dataclasses.asdict(device),
        "rows": {name: dataclasses.asdict(row) for name, row in rows.items()},
      }
    )
  if workload.JSON.value:
    write_json(workload.JSON.value, result)


if __name__ == "__main__":
  sys.exit(app.run(main))
