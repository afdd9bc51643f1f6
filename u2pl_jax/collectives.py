"""What the devices of a compiled step send each other, read from its HLO text.

The bytes of a collective are those of the array it is about (what an
all-reduce reduces, an all-gather returns, a permutation sends), once for each
time that it runs. A ring all-reduce sends close to twice that. Where code has
branches all of them count.
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
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
  "c128": 16,
}  # fmt: skip
_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_COLLECTIVE = re.compile(rf" ({'|'.join(_KINDS)})(-start)?\((.*)$")
# Attributes that name computations; the names of instructions look the same.
_CALLED = re.compile(
  r"\b(body|condition|calls|to_apply|branch_computations|true_computation"
  r"|false_computation|called_computations)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
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
    instruction: that moves it, perhaps together with other arrays.
    purpose: a name of `_PURPOSES`, or OTHER.
    shape: as the compiler writes it, such as 'f32[21,512,256]'.
    count: times that it runs in a step.
    num_bytes: of all of them together.
    source: the operation that made the array.
  """

  kind: str
  instruction: str
  purpose: str
  shape: str
  count: int
  num_bytes: int
  source: str


def _array_bytes(dtype: str, dims: str) -> int:
  if dtype not in _BYTES:
    raise ValueError(f"{dtype}[{dims}]: unknown type of an array that travels")
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


def _executions(
  computations: dict[str, list[str]],
) -> tuple[dict[str, int], set[str]]:
  """How often each computation runs.

  Returns:
    (times, from the trip counts of the loops; the computations that a loop of
    unknown length runs, counted as if it ran once).
  """
  calls = collections.defaultdict(list)
  called = set()
  for name, lines in computations.items():
    for line in lines:
      # The end of an asynchronous call names what its start has called.
      if re.search(r" async-(update|done)\(", line):
        continue
      known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
      trips = int(known[1]) if known else 1
      is_unknown = not known and re.search(r" while\(", line) is not None
      for _, several, one in _CALLED.findall(line):
        for target in re.findall(r"[\w.-]+", several or one):
          if target in computations:
            calls[name].append((target, trips, is_unknown))
            called.add(target)
  times = collections.Counter()
  uncertain = set()

  def visit(name: str, count: int, is_uncertain: bool) -> None:
    times[name] += count
    if is_uncertain:
      uncertain.add(name)
    for target, trips, is_unknown in calls[name]:
      visit(target, count * trips, is_uncertain or is_unknown)

  for name in computations.keys() - called:
    visit(name, 1, False)
  return times, uncertain


def _operand_names(text: str) -> list[str]:
  """The instructions between the parentheses that `text` begins within."""
  depth = 1
  for end, letter in enumerate(text):
    depth += {"(": 1, ")": -1}.get(letter, 0)
    if depth == 0:
      text = text[:end]
      break
  return re.findall(r"%([\w.-]+)", text)


def read(text: str) -> list[Collective]:
  """Everything that travels between devices in an optimised HLO module.

  Args:
    text: of `compiled.as_text()`.

  Returns:
    One entry for each array, as an instruction may combine several.

  Raises:
    ValueError: a loop whose length the compiler does not know sends something,
      so that there is no total; or an array of an unknown type.
  """
  computations = _split_computations(text)
  times, uncertain = _executions(computations)
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
      if name in uncertain:
        raise ValueError(
          f"{instruction[1]} ({match[1]}) is in a loop of unknown length:"
          " its bytes cannot be counted"
        )
      kind, start, operands = match[1], match[2], _operand_names(match[3])
      arrays = _ARRAY.findall((" " + instruction[2])[: match.start()])
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
            instruction=instruction[1],
            purpose=_purpose(made_by),
            shape=f"{dtype}[{dims}]",
            count=times[name],
            num_bytes=size * times[name],
            source=made_by,
          )
        )
  return found


def operations(found: list[Collective]) -> dict[str, int]:
  """Times a step that the devices exchange something, by purpose.

  Arrays that one instruction moves are one exchange, counted for the purpose of
  the largest of them.
  """
  largest: dict[str, Collective] = {}
  for entry in found:
    known = largest.get(entry.instruction)
    if known is None or entry.num_bytes > known.num_bytes:
      largest[entry.instruction] = entry
  times = collections.Counter()
  for entry in largest.values():
    times[entry.purpose] += entry.count
  return dict(times.most_common())


def _group_size(line: str) -> int:
  """Devices in each group of a collective."""
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  if listed:
    return len(listed[1].split(","))
  counted = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
  if counted:
    return int(counted[2])
  axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{'(\w+)'\}", line)
  if not axes:
    raise ValueError(f"replica groups of an unknown form: {line.strip()}")
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
