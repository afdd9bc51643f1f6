"""What the devices of a compiled step send each other, read from its HLO text.

The bytes of a collective are those of the array it is about (what an
all-reduce reduces, an all-gather returns, a permutation sends), once for each
time that it runs. A ring all-reduce sends close to twice that.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax

# What the total may be, relative to what no data-parallel step can do without.
BUDGET_FACTOR = 1.15

_BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_COLLECTIVE = re.compile(rf" ({'|'.join(_KINDS)})(-start)?\(([^)]*)\)")
# First match wins; the names are scopes of train_step.py and of the leaves.
_PURPOSES = (
  ("mixing: the partner's image, box, pseudo labels", r"\bmixing\b"),
  ("thresholds (counts)", r"\bthresholds\b"),
  ("keys that enter the bank", r"\bkeys\b"),
  ("anchors", r"\banchors\b"),
  ("prototypes", r"\bprototypes\b"),
  ("cosines with a split bank", r"\bcosines\b"),
  # By micro-batches the network lies in a loop of the backward pass.
  ("gradients", r"transpose\(jvp\((DeepLab|checkpoint|rematted|\)\)/while/)"),
  ("batch statistics", r"\bDeepLab\b"),
)
OTHER = "losses and metrics (numbers)"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One array that travels.

  Attributes:
    kind: 'all-reduce', ...
    purpose: a name of `_PURPOSES`, or OTHER.
    shape: as the compiler writes it, such as 'f32[21,512,256]'.
    count: times that it runs in a step.
    num_bytes: of all of them together.
    source: the operation that made the array.
  """

  kind: str
  purpose: str
  shape: str
  count: int
  num_bytes: int
  source: str


def _array_bytes(dtype: str, dims: str) -> int:
  return _BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)


def _purpose(source: str) -> str:
  for purpose, pattern in _PURPOSES:
    if re.search(pattern, source):
      return purpose
  return OTHER


def _split_computations(text: str) -> dict[str, list[str]]:
  """Name of each computation -> its lines."""
  computations, current = {}, None
  for line in text.splitlines():
    header = re.match(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
    if header:
      current = computations.setdefault(header[1], [])
    elif line.startswith("}"):
      current = None
    elif current is not None:
      current.append(line)
  return computations


def _executions(computations: dict[str, list[str]]) -> dict[str, int]:
  """Times that each computation runs, from the trip counts of the loops."""
  calls = collections.defaultdict(list)
  called = set()
  for name, lines in computations.items():
    for line in lines:
      trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
      for target in re.findall(
        r"(?:body|condition|calls|to_apply|branch_computations=\{|"
        r"true_computation|false_computation)=?%?([\w.-]+)",
        line,
      ):
        if target in computations:
          calls[name].append((target, int(trips[1]) if trips else 1))
          called.add(target)
  times = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for target, trips in calls[name]:
      visit(target, count * trips)

  for name in computations.keys() - called:
    visit(name, 1)
  return times


def read(text: str) -> list[Collective]:
  """Everything that travels between devices in an optimised HLO module.

  Args:
    text: of `compiled.as_text()`.

  Returns:
    One entry for each array, as an instruction may combine several.
  """
  computations = _split_computations(text)
  times = _executions(computations)
  found = []
  for name, lines in computations.items():
    sources = {}
    for line in lines:
      instruction = _INSTRUCTION.match(line)
      if not instruction:
        continue
      source = re.search(r'op_name="([^"]*)"', line)
      source = source[1] if source else ""
      sources[instruction[1]] = source
      match = _COLLECTIVE.search(" " + instruction[2])
      if not match:
        continue
      kind, start, operands = match[1], match[2], match[3]
      arrays = _ARRAY.findall((" " + instruction[2])[: match.start()])
      operands = re.findall(
        r"%?([\w.-]+)(?:,|$)", re.sub(r"/\*.*?\*/", "", operands)
      )
      if start and len(arrays) > len(operands):
        # A start returns (operands, results[, contexts]).
        arrays = arrays[len(operands) : 2 * len(operands)]
      for (dtype, dims), operand in zip(arrays, operands, strict=True):
        size = _array_bytes(dtype, dims)
        if kind == "reduce-scatter":
          size *= _group_size(line)
        made_by = sources.get(operand, "") or source
        # A combined instruction names all its sources; one names its own.
        if len(operands) == 1:
          made_by = source or made_by
        found.append(
          Collective(
            kind=kind,
            purpose=_purpose(made_by),
            shape=f"{dtype}[{dims}]",
            count=times[name],
            num_bytes=size * times[name],
            source=made_by,
          )
        )
  return found


def _group_size(line: str) -> int:
  """Devices in each group of a collective."""
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  if listed:
    return len(listed[1].split(","))
  counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
  if counted:
    return int(counted[2])
  axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{'(\w+)'\}", line)
  return int(re.search(rf"'{axes[2]}'=(\d+)", axes[1])[1])


def least_bytes(
  state: Any, max_keys: int | None, pixels: int
) -> dict[str, int]:
  """What a data-parallel step of this method cannot do without.

  Args:
    state: a `TrainState`, abstract or not.
    max_keys: per class and step that enter the bank, None for all.
    pixels: of the feature grids of the whole batch.

  Returns:
    Bytes by name: gradients, batch statistics (mean and variance of student and
    teacher, and the backward pass of the student's), entering keys.
  """

  def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  bank = state.memory_bank
  entering = max_keys or min(pixels, max(bank.capacities))
  row = bank.keys.shape[1] * bank.keys.dtype.itemsize
  return {
    "gradients": size(state.student.params),
    "batch statistics": 3 * size(state.student.batch_stats),
    "entering keys": len(bank.capacities) * entering * row,
  }
