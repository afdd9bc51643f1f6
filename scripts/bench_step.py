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
where bytes take longer. For a recipe the hours follow that its whole schedule
takes at these times.
"""

import bench_workload as workload  # isort: skip

import copy
import dataclasses
import functools

import jax

from input_pipeline.command_line import write_json
from u2pl_jax import roofline
from u2pl_jax.xla_flags import set_xla_flags


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the table.

  Attributes:
    timing: what was measured.
    flops: of its operations, by roofline.py.
    floor_ms: at the measured rates.
  """

  timing: workload.Timing
  flops: float
  floor_ms: float


def measure(case, device, repeats, *, phases=True):
  """{name: Row} of `workload.timings`."""
  config = case.config
  count = functools.partial(
    roofline.count, num_classes=case.num_classes, num_devices=1
  )
  counted = {phase.name: [phase] for phase in count(config)}
  counted["semi-supervised step"] = [p for (p,) in counted.values()]
  counted["student, both ways"] = [
    *counted.pop("student, forward"),
    *counted.pop("student, backward"),
  ]
  alone = copy.deepcopy(config)
  alone.method = "supervised"
  counted["supervised step"] = count(alone)

  rows = {}
  for name, timing in workload.timings(case, repeats, phases=phases).items():
    total = roofline.cost(counted[name], device, config.model.dtype)
    rows[name] = Row(timing, total.flops, 1e3 * total.seconds)
  return rows


def projected_hours(steps, rows):
  """Of a schedule, (supervised, semi-supervised) steps, at the times of rows.

  Input that keeps up costs nothing; evaluations are left out.
  """
  names = ("supervised step", "semi-supervised step")
  return (
    sum(n * rows[name].timing.ms for n, name in zip(steps, names, strict=True))
    / 3.6e6
  )


def table(case, device, repeats, rows):
  """The rows as text, 80 columns wide."""
  dtype = case.config.model.dtype
  step = rows["semi-supervised step"].timing
  lines = [
    case.name,
    workload.device_line(device, dtype),
    f"median of {repeats}",
    f"{'':<23}{'ms':>9}{'share':>7}{'TFLOP/s':>9}{'of rate':>8}"
    f"{'floor ms':>9}{'x':>6}{'compile':>9}",
  ]
  for name, row in rows.items():
    ms, rate = row.timing.ms, row.flops / (1e-3 * row.timing.ms)
    lines.append(
      f"{name:<23}{ms:>9.1f}{ms / step.ms:>7.1%}"
      f"{rate / 1e12:>9.3g}{rate / device.rate(dtype):>8.1%}"
      f"{row.floor_ms:>9.1f}{ms / row.floor_ms:>6.1f}"
      f"{row.timing.compile_s:>7.1f} s"
    )
  batch = case.config.batch
  images = batch.labelled + batch.unlabelled
  lines.append(
    f"{images * 1e3 / step.ms:.2f} images/s, peak memory by the compiler"
    f" {step.peak_bytes / 1e9:.2f} GB"
  )
  if case.steps is not None:
    supervised, semi = case.steps
    hours = projected_hours(case.steps, rows)
    lines.append(
      f"the schedule of {supervised} supervised and {semi} other steps:"
      f" {hours:.1f} h without evaluations"
    )
  stats = jax.devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    lines.append(
      f"peak memory in use {stats['peak_bytes_in_use'] / 1e9:.2f} GB"
      " (all of the above in one process)"
    )
  return "\n".join(lines)


def main():
  parser = workload.parser(__doc__)
  parser.add_argument(
    "--microbatches",
    type=workload.positive,
    help="config.batch.microbatches, if not the preset's",
  )
  parser.add_argument("--remat", action="store_true", help="config.model.remat")
  parser.add_argument(
    "--no-phases",
    dest="phases",
    action="store_false",
    help="time the two steps only",
  )
  options = parser.parse_args()
  set_xla_flags()
  # What is asked is how long it takes to compile.
  jax.config.update("jax_enable_compilation_cache", False)
  result = []
  for case in workload.cases(
    options.preset,
    sizes=options.size,
    batch=options.batch,
    microbatches=options.microbatches,
    remat=options.remat,
  ):
    device = workload.measured_device(case.config.model.dtype)
    rows = measure(case, device, options.repeats, phases=options.phases)
    print(table(case, device, options.repeats, rows), end="\n\n", flush=True)
    result.append(
      {
        "case": case.name,
        "device": dataclasses.asdict(device),
        "schedule": case.steps
        and {
          "supervised_steps": case.steps[0],
          "semi_supervised_steps": case.steps[1],
          "hours": projected_hours(case.steps, rows),
        },
        "rows": {
          name: row.timing._asdict()
          | {"flops": row.flops, "floor_ms": row.floor_ms}
          for name, row in rows.items()
        },
      }
    )
  if options.json:
    write_json(options.json, result)


if __name__ == "__main__":
  main()
