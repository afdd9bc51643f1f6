"""Says which kernels of the semi-supervised step take its time.

  python scripts/profile_step.py --preset=voc --json=profile.json

Traces the step as bench_step times it (same presets, random data, full queues,
one device) and prints the kernels that take most, with the place in the network
or the loss where each takes most of that. What one kernel does inside another,
as the body of a loop on a CPU, counts as its own only. A CPU's kernels are the
operations of the compiled program. Tracing itself takes time on a CPU: beside
the table stands the step without it.
"""

import bench_workload as workload  # isort: skip

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.profiler import ProfileData

from input_pipeline.command_line import write_json
from u2pl_jax.xla_flags import set_xla_flags

_NUM_SHOWN = 15
# The instruction of the compiled program that an event is about.
_INSTRUCTION = "hlo_op"
# An instruction as text: its name stands before what it is.
_TEXT = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = ")


@dataclasses.dataclass(frozen=True)
class Event:
  """A kernel at work: from `begin` to `end`, ns; `instruction` may be ''."""

  begin: float
  end: float
  kernel: str
  instruction: str


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What the calls of a kernel took in a step.

  Attributes:
    name: by which calls are one kernel.
    ms: of all calls in a step, on average.
    calls: in a step, on average.
    where: operation of the step that took most of it; '' if unknown.
  """

  name: str
  ms: float
  calls: float
  where: str


@dataclasses.dataclass(frozen=True)
class Profile:
  """What a trace says.

  Attributes:
    kernels: all, those that take longest first.
    busy: share of the time between the first and the last kernel in which one
      at least is at work.
  """

  kernels: list[Kernel]
  busy: float

  @property
  def ms(self) -> float:
    """Of all kernels in a step."""
    return sum(kernel.ms for kernel in self.kernels)


def device_events(data: ProfileData) -> list[list[Event]]:
  """Kernels by the queue or thread that ran them.

  Raises:
    ValueError: there are none in the trace.
  """
  rows = []
  for plane in data.planes:
    for line in plane.lines:
      if plane.name.startswith("/device:GPU"):
        is_kernels = line.name.startswith("Stream")
      elif plane.name.startswith("/device:TPU"):
        is_kernels = line.name == "XLA Ops"
      else:
        is_kernels = plane.name == "/host:CPU"
      if not is_kernels:
        continue
      row = []
      for event in line.events:
        kernel = event.name
        instruction = str(dict(event.stats).get(_INSTRUCTION, ""))
        # A TPU's kernels are instructions, named by their whole text.
        text = _TEXT.match(kernel)
        if text:
          kernel = instruction = text[1]
        # Threads of a CPU do other things too, also where kernels run on a GPU.
        if instruction or plane.name != "/host:CPU":
          begin, end = event.start_ns, event.start_ns + event.duration_ns
          row.append(Event(begin, end, kernel, instruction))
      if row:
        rows.append((plane.name == "/host:CPU", row))
  on_device = [row for is_host, row in rows if not is_host]
  found = on_device or [row for _, row in rows]
  if not found:
    names = [plane.name for plane in data.planes]
    raise ValueError(f"the trace has no kernels; its planes are {names}")
  return found


def own_times(row: Sequence[Event]) -> Iterator[tuple[Event, float]]:
  """(event, ns without the events inside it) of a queue or thread."""
  events = sorted(row, key=lambda event: (event.begin, -event.end))
  own = [event.end - event.begin for event in events]
  around: list[int] = []
  for i, event in enumerate(events):
    while around and events[around[-1]].end <= event.begin:
      around.pop()
    if around and event.end <= events[around[-1]].end:
      own[around[-1]] -= event.end - event.begin
    around.append(i)
  return zip(events, own, strict=True)


def busy_share(rows: Sequence[Sequence[Event]]) -> float:
  """Share of the time in which a kernel at least is at work."""
  events = sorted(
    (event for row in rows for event in row), key=lambda event: event.begin
  )
  busy, until = 0.0, events[0].begin
  for event in events:
    busy += max(0.0, event.end - max(until, event.begin))
    until = max(until, event.end)
  return busy / (until - events[0].begin)


def read_profile(
  data: ProfileData, places: Mapping[str, str], num_steps: int
) -> Profile:
  """Adds up a trace of `num_steps` steps.

  Args:
    data: the trace.
    places: instruction -> operation of the step that it comes from.
    num_steps: in the trace.
  """
  rows = device_events(data)
  ns = collections.defaultdict(collections.Counter)
  calls = collections.Counter()
  for row in rows:
    for event, own in own_times(row):
      ns[event.kernel][places.get(event.instruction, "")] += own
      calls[event.kernel] += 1
  kernels = [
    Kernel(
      name,
      by_place.total() / num_steps / 1e6,
      calls[name] / num_steps,
      by_place.most_common(1)[0][0],
    )
    for name, by_place in ns.items()
  ]
  kernels.sort(key=lambda kernel: -kernel.ms)
  return Profile(kernels, busy_share(rows))


def read_places(text: str) -> dict[str, str]:
  """Instruction -> where it comes from, of a compiled program's HLO text."""
  pattern = rf'^{_TEXT.pattern}.*\bop_name="([^"]*)"'
  return {
    name: re.sub(r"^jit\([^/]*\)/", "", place)
    for name, place in re.findall(pattern, text, re.MULTILINE)
  }


def table(profile: Profile, num_shown: int = _NUM_SHOWN) -> str:
  """The kernels that take most, as text."""
  lines = [
    f"{'ms':>9}{'share':>7}{'calls':>10}  kernel, and where most of it is"
  ]
  for kernel in profile.kernels[:num_shown]:
    lines.append(
      f"{kernel.ms:>9.2f}{kernel.ms / profile.ms:>7.1%}{kernel.calls:>10.1f}"
      f"  {kernel.name}"
    )
    if kernel.where:
      lines.append(f"{'':28}{kernel.where}")
  rest = profile.kernels[num_shown:]
  if rest:
    ms, calls = sum(k.ms for k in rest), sum(k.calls for k in rest)
    lines.append(
      f"{ms:>9.2f}{ms / profile.ms:>7.1%}{calls:>10.1f}  {len(rest)} others"
    )
  return "\n".join(lines)


def trace_step(case: workload.Case, repeats: int) -> tuple[Profile, float]:
  """The profile of a case's step, and its ms without tracing."""
  program = workload.build(case)
  batches = jax.device_put(
    workload.random_batches(case, np.random.default_rng(0))
  )
  state = program.create_state()
  state = state.replace(memory_bank=workload.full(state.memory_bank))
  name = "semi-supervised step"
  step = workload.compile_for(
    name, program.semi_supervised_step, state, *batches
  )
  ms, state = workload.step_ms(name, step, state, batches, repeats)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(repeats):
        state, metrics = step(state, *batches)
      jax.block_until_ready((state, metrics))
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    data = ProfileData.from_file(str(path))
    return read_profile(data, read_places(step.as_text()), repeats), ms


def main() -> None:
  """The command line."""
  options = workload.parser(__doc__).parse_args()
  set_xla_flags()
  result = []
  for case in workload.cases(
    options.preset, sizes=options.size, batch=options.batch
  ):
    profile, ms = trace_step(case, options.repeats)
    print(
      f"{case.name}\n{jax.devices()[0].device_kind}, jax {jax.__version__}:"
      f" {ms:.1f} ms a step without tracing,\nkernels of {profile.ms:.1f} ms a"
      f" step in a trace of {options.repeats}, one at work in"
      f" {profile.busy:.1%} of its time\n{table(profile)}\n",
      flush=True,
    )
    result.append(
      {"case": case.name, "step_ms": ms} | dataclasses.asdict(profile)
    )
  if options.json:
    write_json(options.json, result)


if __name__ == "__main__":
  main()
