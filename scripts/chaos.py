"""Trains under faults, and compares with a run without: no bit may differ.

  python scripts/chaos.py --kills 30 --seed 0 --json chaos.json

Starts `python -m u2pl_jax.main` with the tiny config again and again, as a
cluster would, and ends it by a fault: SIGKILL at a random time or in the middle
of a save, an evaluation or a report, SIGTERM, a full disk, a data file that is
gone. Between two starts it damages checkpoints. The wall clock of some runs
jumps. When a run has come to its end it is compared with the clean one, and the
next begins, until every fault has had its turn.

Equal must be: every line of metrics.jsonl but for the metrics `time/...`, which
read a clock; the losses of every step, therefore the order of the input;
parameters, batch statistics, optimiser, memory bank, best so far and which
checkpoints are kept; the record of the best evaluation and the report's
pictures.

Needs Linux. The exit status is 1 if a fault was not survived; then the folder
with all logs stays.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from input_pipeline import storage
from u2pl_jax import preemption, writers
from u2pl_jax.clock import duration

# Lines of metrics that a clock decides begin with it.
CLOCK_METRICS = "time/"
SIGTERM_SECONDS = 30.0
# A run that takes so long hangs.
_MAX_SECONDS = 600.0
_POLL_SECONDS = 0.003
# Two checkpoints of 8 MB, as many set aside or half written, and a report.
_DISK_BYTES = 160 << 20
# Set for the process that has a file system of its own.
_DISK_VARIABLE = "CHAOS_OWN_MOUNTS"

KILLS = {
  "time": "SIGKILL at a random time",
  "saving": "SIGKILL while saving",
  "evaluating": "SIGKILL while evaluating",
  "report": "SIGKILL while drawing the report",
}
SIGTERM, DISK_FULL = "SIGTERM", "disk full"
DATA_GONE, CLOCK = "data file gone", "clock jumps"
FLIPPED, TRUNCATED = "checkpoint bytes flipped", "last checkpoint truncated"
DELETED, ALL_DAMAGED = "last checkpoint deleted", "all checkpoints damaged"

# Imported by every Python that has its folder in PYTHONPATH.
_SITECUSTOMIZE = """
import os, random, sys, time
# Nothing of it is tested here, and its import takes seconds.
sys.modules["tensorflow"] = None
if "CHAOS_CLOCK" in os.environ:
  rng, real, state = random.Random(os.environ["CHAOS_CLOCK"]), time.time, [0, 0]
  def jumping():
    now = time.monotonic()
    if now >= state[1]:
      state[:] = rng.uniform(-1e8, 1e8), now + rng.uniform(0.2, 2)
      with open(os.environ["CHAOS_CLOCK_LOG"], "a") as log:
        log.write(f"{state[0]}\\n")
    return real() + state[0]
  time.time = jumping
  time.time_ns = lambda: int(jumping() * 1e9)
"""


class ChaosError(RuntimeError):
  """One line: why the faults cannot be tried at all."""


@dataclasses.dataclass
class Fault:
  """One fault that was injected.

  Attributes:
    kind: row of the table.
    problems: why it was not survived; empty if it was.
  """

  kind: str
  problems: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Life:
  """One start of the trainer.

  Attributes:
    code: exit status, negative after a signal.
    log: what it printed.
    injected: whether the fault came before its end.
    seconds: from the start, and from the fault, to the end.
  """

  code: int
  log: str
  injected: bool
  seconds: float
  seconds_after: float

  def error(self, *, naming: str = "") -> list[str]:
    """Problems, unless it ended with one clear line, which names `naming`."""
    errors = [x for x in self.log.splitlines() if x.startswith("error: ")]
    found = []
    if self.code != 1:
      found.append(f"exit status {self.code} instead of 1")
    if len(errors) != 1 or naming not in errors[0]:
      found.append(f"no clear error: {errors}")
    return found


# -- What must be equal --------------------------------------------------------


def differences(workdir: pathlib.Path, clean: pathlib.Path) -> list[str]:
  """What a finished run has that is not as in the clean one, one line each."""
  from u2pl_jax import checkpoint

  found = metrics_differences(workdir, clean)

  def steps(path: pathlib.Path) -> list[str]:
    return sorted(step.name for step in (path / checkpoint.FOLDER).iterdir())

  if steps(workdir) != steps(clean):
    return [*found, f"checkpoints of {steps(workdir)}, not {steps(clean)}"]
  for step in map(int, steps(clean)):
    stored = checkpoint.read_checkpoint(workdir, step)
    wanted = checkpoint.read_checkpoint(clean, step)
    if stored.meta != wanted.meta:
      found.append(f"step {step}: {stored.meta}, not {wanted.meta}")
    groups = collections.Counter(
      _group(name)
      for name in stored.arrays.keys() | wanted.arrays.keys()
      if not _same_bits(stored.arrays.get(name), wanted.arrays.get(name))
    )
    found += [
      f"step {step}: {number} arrays of {group}"
      for group, number in sorted(groups.items())
    ]
  pending = workdir / checkpoint.PREEMPTED_FOLDER
  if pending.is_dir() and any(pending.iterdir()):
    found.append(f"{pending.name} is not empty")
  return found + _output_differences(workdir, clean)


def metrics_differences(
  workdir: pathlib.Path, clean: pathlib.Path
) -> list[str]:
  """Of the lines of metrics alone."""
  rows, wanted = (
    [
      json.loads(line)
      for line in (path / writers.METRICS_FILE).read_text().splitlines()
    ]
    for path in (workdir, clean)
  )
  steps = [row["step"] for row in rows]
  if steps != [row["step"] for row in wanted]:
    return [f"metrics.jsonl has the steps {steps}"]
  found = []
  for row, other in zip(rows, wanted, strict=True):
    names = [
      name
      for name in sorted(row.keys() | other.keys())
      if not name.startswith(CLOCK_METRICS)
      and row.get(name, "absent") != other.get(name, "absent")
    ]
    if names:
      found.append(f"metrics of step {row['step']}: {', '.join(names)}")
  return found


def _group(name: str) -> str:
  """'student/params/encoder/...' -> 'student/params'."""
  parts = name.split("/")
  return "/".join(parts[: 2 if parts[0] in ("student", "teacher") else 1])


def _same_bits(a: np.ndarray | None, b: np.ndarray | None) -> bool:
  if a is None or b is None:
    return False
  same_form = a.shape == b.shape and a.dtype == b.dtype
  return same_form and a.tobytes() == b.tobytes()


def _output_differences(
  workdir: pathlib.Path, clean: pathlib.Path
) -> list[str]:
  """Of the best evaluation and the report."""

  def outputs(path: pathlib.Path) -> dict[str, Any]:
    summary = json.loads((path / "evaluation" / "metrics.json").read_text())
    summary.pop("checkpoint")  # Its path.
    report = json.loads((path / "report" / "report.json").read_text())
    files = {
      file.name: file.read_bytes()
      for file in sorted((path / "report").rglob("*.png"))
    }
    with np.load(path / "evaluation" / "images.npz") as images:
      counts = {name: images[name].tolist() for name in images.files}
    counts.pop("checkpoint", None)
    return {
      "the best evaluation": summary,
      "its counts": counts,
      "the report's pictures": (report["pictures"], files),
      "the report's last step": report["complete_step"],
    }

  found, wanted = outputs(workdir), outputs(clean)
  return [name for name in wanted if found[name] != wanted[name]]


# -- One start -----------------------------------------------------------------

# Looks at a run that goes on: whether the moment of the fault has come.
Moment = Callable[[], bool]


class Trainer:
  """Starts the trainer in one folder, and does something to it.

  Attributes:
    workdir: of the run.
  """

  def __init__(self, work: pathlib.Path, workdir: pathlib.Path, logs: Iterator):
    self.workdir = workdir
    self._work = work
    self._logs = logs

  def live(
    self,
    moment: Moment | None = None,
    act: Callable[[subprocess.Popen], None] = lambda _: None,
    *,
    clock: int | None = None,
    max_file_bytes: int | None = None,
  ) -> Life:
    """Starts the trainer and waits for its end.

    Args:
      moment: when to act; asked some hundred times a second. None: never.
      act: what to do then.
      clock: seed of a wall clock that jumps.
      max_file_bytes: no file may become larger.

    Raises:
      ChaosError: it hangs.
    """
    log_path = self._work / "logs" / f"{next(self._logs):03}.txt"
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "PYTHONPATH": os.pathsep.join((str(self._work / "hook"), str(ROOT))),
      "PYTHONUNBUFFERED": "1",
    }
    environment.setdefault(
      "JAX_COMPILATION_CACHE_DIR", str(self._work / "cache")
    )
    if clock is not None:
      environment["CHAOS_CLOCK"] = str(clock)
      environment["CHAOS_CLOCK_LOG"] = str(self._work / "clock.txt")

    def limit() -> None:
      # Python ignores the signal that would come with it.
      resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes,) * 2)

    # What the process before was killed in; this one removes it.
    self._stale = self._unfinished()
    start = time.monotonic()
    with log_path.open("wb") as log:
      process = subprocess.Popen(
        [
          *(sys.executable, "-m", "u2pl_jax.main"),
          "--config=configs/testing.py",
          "--config.log.every_steps=1",
          f"--config.dataset.root={self._work / 'data'}",
          f"--workdir={self.workdir}",
        ],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=None if max_file_bytes is None else limit,
      )
    self.pid, self.log_path = process.pid, log_path
    acted = None
    try:
      while process.poll() is None:
        now = time.monotonic()
        if acted is None and moment is not None and moment():
          act(process)
          acted = time.monotonic()
        if now - start > _MAX_SECONDS:
          raise ChaosError(
            f"{log_path}: the run has not ended after {_MAX_SECONDS:g} s"
          )
        time.sleep(_POLL_SECONDS)
    finally:
      if process.poll() is None:
        process.kill()
        process.wait()
    end = time.monotonic()
    return Life(
      code=process.returncode,
      log=log_path.read_text(errors="replace"),
      injected=acted is not None or max_file_bytes is not None,
      seconds=end - start,
      seconds_after=end - (acted or end),
    )

  # -- Moments -----------------------------------------------------------------

  def after(self, seconds: float, begin: Moment = lambda: True) -> Moment:
    """So many seconds after `begin`."""
    began = []

    def moment() -> bool:
      if not began and begin():
        began.append(time.monotonic())
      return bool(began) and time.monotonic() - began[0] >= seconds

    return moment

  def heeds_sigterm(self) -> bool:
    """Whether the process has set a handler: not in its first half second."""
    try:
      status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
    except OSError:
      return False
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)

  def is_compiling(self, _: int = 0) -> bool:
    """Whether the first step is being compiled; no image is needed before."""
    return "compiling" in self._last_line()

  def is_saving(self, first: int) -> bool:
    """Whether a save is under way, of step `first` or a later one."""
    unfinished = self._unfinished()
    self._stale &= unfinished
    return any(int(x.split(".")[0]) >= first for x in unfinished - self._stale)

  def _unfinished(self) -> set[str]:
    try:
      names = os.listdir(self.workdir / "checkpoints")
    except FileNotFoundError:
      return set()
    return {name for name in names if "tmp" in name}

  def is_evaluating(self, first: int) -> bool:
    """Whether the last line is of a step that is evaluated: 4, 8 or 12."""
    step = re.search(r"  step (\d+)/\d+  sup", self._last_line())
    return step is not None and int(step[1]) >= first and int(step[1]) % 4 == 0

  def is_drawing(self, first: int) -> bool:
    """Whether an evaluation is done, and the report after it is not."""
    step = re.search(r"evaluation of the .*step (\d+)/", self._last_line())
    return step is not None and int(step[1]) >= first

  def _last_line(self) -> str:
    text = self.log_path.read_text(errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return lines[-1] if lines else ""

  def checkpoints(self) -> list[pathlib.Path]:
    """Those that are complete, oldest first."""
    folder = self.workdir / "checkpoints"
    if not folder.is_dir():
      return []
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
    return [folder / str(step) for step in steps]


# -- The faults ----------------------------------------------------------------


class Chaos:
  """Injects faults until all have had their turn.

  Attributes:
    faults: those injected so far.
    sigterm_seconds: what each SIGTERM took.
  """

  def __init__(
    self,
    work: pathlib.Path,
    *,
    kills: int,
    seed: int,
    own_disk: bool,
  ):
    """Plans the faults.

    Args:
      work: folder with runs, logs and hook.
      kills, seed: see the command line.
      own_disk: whether `runs` is a small file system.
    """
    self._work = work
    self._rng = random.Random(seed)
    self._own_disk = own_disk
    self.faults: list[Fault] = []
    self.sigterm_seconds: list[float] = []
    self.rounds = 0
    self._logs = iter(range(1_000_000))
    self._begin = time.monotonic()
    few, some = max(1, kills // 10), max(1, kills // 5)
    phases = list(KILLS)
    turns = [KILLS[phases[i % len(phases)]] for i in range(kills)]
    turns += some * [SIGTERM] + few * [DISK_FULL] + few * [DATA_GONE]
    self._rng.shuffle(turns)
    self._turns = collections.deque(turns)
    # Done to a run that does not go on: needs no start of its own.
    damages = few * [FLIPPED, TRUNCATED, DELETED, ALL_DAMAGED]
    self._rng.shuffle(damages)
    self._damages = collections.deque(damages)
    # By how many are left.
    self._clock_turns = set(
      self._rng.sample(range(len(turns) // 2, len(turns) + 1), few)
    )
    # Seconds of a start: of the latest ones, all programs compiled.
    self._seconds = [12.0]

  def run(self) -> pathlib.Path:
    """Trains the clean run and all others; returns the former's folder."""
    clean = self._work / "clean"
    life = Trainer(self._work, clean, self._logs).live()
    if life.code:
      raise ChaosError(f"the clean run failed: {life.log.splitlines()[-1:]}")
    self._say(f"clean run, {life.seconds:.0f} s")
    while self._turns or self._damages:
      self._round(clean)
    return clean

  def _round(self, clean: pathlib.Path) -> None:
    """One run from its start to its end, and its comparison."""
    first = len(self.faults)
    workdir = self._work / "runs" / str(self.rounds)
    self.rounds += 1
    trainer = Trainer(self._work, workdir, self._logs)
    problems = None
    while problems is None:
      if self._turns:
        life, fault = self._turn(trainer)
        what = fault.kind if life.injected else "no fault in time"
      else:
        life, fault = trainer.live(), None
        what = "no fault"
      self._seconds = [*self._seconds[-4:], life.seconds]
      was_injected = fault is not None and life.injected
      if was_injected:
        self.faults.append(fault)
        self._turns.popleft()
      if (life.code and not was_injected) or (fault and fault.problems):
        problems = [f"exit status {life.code}: {life.log.splitlines()[-1:]}"]
      elif not life.code and (found := differences(workdir, clean)):
        problems = found
      elif self._may_damage(trainer) and self._damages:
        # A finished run too: it has to do the last steps again.
        what += f", then {self._damages[0]}"
        self._damage(trainer)
      elif not life.code:
        problems = []
      left = len(self._turns) + 1
      eta = left * sum(self._seconds) / len(self._seconds)
      self._say(f"{what}: exit status {life.code}, ETA {duration(eta)}")
      for problem in fault.problems if fault else ():
        self._say(f"  NOT SURVIVED: {problem} ({trainer.log_path})")
    for fault in self.faults[first:]:
      fault.problems += problems
    for problem in problems:
      self._say(f"  NOT EQUAL: {problem}")
    if not any(fault.problems for fault in self.faults[first:]):
      shutil.rmtree(workdir)
    self._say(f"run {self.rounds}: {'DIFFERENT' if problems else 'identical'}")

  def _say(self, text: str) -> None:
    total = len(self.faults) + len(self._turns) + len(self._damages)
    seconds = duration(time.monotonic() - self._begin)
    print(
      f"[{len(self.faults)}/{total} {seconds}] {text}",
      file=sys.stderr,
      flush=True,
    )

  def _turn(self, trainer: Trainer) -> tuple[Life, Fault]:
    """One start with the next fault."""
    fault = Fault(self._turns[0])
    clock = None
    if len(self._turns) in self._clock_turns:
      clock = self._rng.randrange(1 << 30)
      (self._work / "clock.txt").unlink(missing_ok=True)
    if fault.kind in KILLS.values():
      life = self._kill(trainer, fault, clock)
    elif fault.kind == SIGTERM:
      life = self._terminate(trainer, fault, clock)
    elif fault.kind == DISK_FULL:
      life = self._fill_disk(trainer, fault, clock)
    else:
      life = self._take_data_away(trainer, fault, clock)
    if clock is not None and life.injected:
      if (self._work / "clock.txt").exists():
        self.faults.append(Fault(CLOCK))
      else:  # It ended before anybody asked for the time: the next one, then.
        self._clock_turns.add(len(self._turns) - 1)
    return life, fault

  def _moment(self, trainer: Trainer, phase: str) -> Moment:
    rng = self._rng
    if phase == "time":
      seconds = sum(self._seconds) / len(self._seconds)
      return trainer.after(rng.uniform(0, seconds))
    begin, seconds = {
      "compiling": (trainer.is_compiling, 1.0),
      "saving": (trainer.is_saving, 0.05),
      "evaluating": (trainer.is_evaluating, 0.1),
      "report": (trainer.is_drawing, 1.0),
    }[phase]
    # In the first, second or third epoch, or in a later one if that is done;
    # mostly the last where there is little to damage afterwards.
    few = len(trainer.checkpoints()) < 2
    first = rng.choice([4, 12, 12] if few else [4, 8, 12])
    return trainer.after(rng.uniform(0, seconds), lambda: begin(first))

  def _any_moment(self, trainer: Trainer) -> Moment:
    return self._moment(trainer, self._rng.choice(list(KILLS)))

  def _kill(self, trainer: Trainer, fault: Fault, clock: int | None) -> Life:
    phase = next(name for name, kind in KILLS.items() if kind == fault.kind)
    life = trainer.live(
      self._moment(trainer, phase), subprocess.Popen.kill, clock=clock
    )
    if life.injected and life.code not in (0, -signal.SIGKILL):
      fault.problems.append(f"exit status {life.code} before the kill")
    return life

  def _terminate(
    self, trainer: Trainer, fault: Fault, clock: int | None
  ) -> Life:
    moment = self._any_moment(trainer)
    life = trainer.live(
      lambda: trainer.heeds_sigterm() and moment(),
      subprocess.Popen.terminate,
      clock=clock,
    )
    if life.injected:
      self.sigterm_seconds.append(life.seconds_after)
      # 0: it came when all was done.
      if life.code not in (0, preemption.EXIT_CODE):
        fault.problems.append(f"exit status {life.code}")
      if life.seconds_after > SIGTERM_SECONDS:
        fault.problems.append(f"took {life.seconds_after:.1f} s")
    return life

  def _fill_disk(
    self, trainer: Trainer, fault: Fault, clock: int | None
  ) -> Life:
    if not self._own_disk:
      limit = self._rng.randrange(2_000, 300_000)
      life = trainer.live(clock=clock, max_file_bytes=limit)
    else:
      filler = self._work / "runs" / "filler"
      left = self._rng.randrange(0, 200_000)
      life = trainer.live(
        self._any_moment(trainer), lambda _: _fill(filler, left), clock=clock
      )
      filler.unlink(missing_ok=True)
    if life.injected and life.code:
      fault.problems += life.error()
    return life

  def _take_data_away(
    self, trainer: Trainer, fault: Fault, clock: int | None
  ) -> Life:
    # Masks of unlabelled images are not needed.
    images = sorted((self._work / "data" / "JPEGImages").iterdir())
    path = self._rng.choice(images)
    away = self._work / path.name
    moment = self._moment(trainer, "compiling")
    if self._rng.random() < 0.5:
      # Before all, for what is checked at the start.
      moment = trainer.after(0)
    life = trainer.live(moment, lambda _: path.rename(away), clock=clock)
    if away.exists():
      away.rename(path)
    if life.injected and life.code:
      fault.problems += life.error(naming=path.name)
    return life

  def _may_damage(self, trainer: Trainer) -> bool:
    return len(trainer.checkpoints()) > 1

  def _damage(self, trainer: Trainer) -> None:
    """Does the next damage to a run that is not going on."""
    rng, newest = self._rng, trainer.checkpoints()[-1]
    fault = Fault(self._damages.popleft())
    self.faults.append(fault)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    if fault.kind == DELETED:
      shutil.rmtree(newest)
    elif fault.kind == TRUNCATED:
      os.truncate(largest, rng.randrange(largest.stat().st_size))
    elif fault.kind == FLIPPED:
      path = rng.choice([largest, rng.choice(files)])
      data = bytearray(path.read_bytes())
      for _ in range(rng.randrange(1, 9)):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
      path.write_bytes(bytes(data))
    else:
      self._damage_all(trainer, fault)

  def _damage_all(self, trainer: Trainer, fault: Fault) -> None:
    """The run must refuse, change nothing, and go on after the repair."""
    backup = self._work / "backup"
    metrics = trainer.workdir / writers.METRICS_FILE
    before = metrics.read_bytes()
    for checkpoint in trainer.checkpoints():
      shutil.copytree(checkpoint, backup / checkpoint.name)
      for path in (checkpoint / "state").rglob("manifest.ocdbt"):
        path.write_bytes(b"")
    life = trainer.live()
    fault.problems += life.error(naming="can be read")
    if metrics.read_bytes() != before:
      fault.problems.append("metrics.jsonl was changed")
    for checkpoint in trainer.checkpoints():
      shutil.rmtree(checkpoint)
      shutil.copytree(backup / checkpoint.name, checkpoint)
    shutil.rmtree(backup)


def _fill(path: pathlib.Path, left: int) -> None:
  """Leaves so many bytes of the file system that a file is in."""
  with path.open("ab") as file:
    while True:
      free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize - left
      if free < 4096:
        return
      with contextlib.suppress(OSError):  # The run has been faster.
        size = file.seek(0, os.SEEK_END)
        os.posix_fallocate(file.fileno(), size, free)


# -- The command ---------------------------------------------------------------


def _own_mounts_possible() -> bool:
  """Whether this machine lets a process mount a small file system."""
  if shutil.which("unshare") is None:
    return False
  with tempfile.TemporaryDirectory() as folder:
    mount = ("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
    result = subprocess.run(
      ["unshare", "-rm", *mount], capture_output=True, check=False
    )
  return result.returncode == 0


def _mount(folder: pathlib.Path) -> None:
  size = f"size={_DISK_BYTES}"
  subprocess.run(
    ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True
  )


def table(faults: list[Fault]) -> str:
  """Faults by kind, Markdown."""
  lines = ["| fault | injected | survived |", "|---|---|---|"]
  kinds = collections.Counter(fault.kind for fault in faults)
  survived = collections.Counter(f.kind for f in faults if not f.problems)
  lines += [f"| {k} | {kinds[k]} | {survived[k]} |" for k in sorted(kinds)]
  total = f"| all | {kinds.total()} | {survived.total()} |"
  return "\n".join([*lines, total])


def main() -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    epilog=__doc__.split("\n", 1)[1],
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--kills", type=int, default=30, help="how often SIGKILL (default: 30)"
  )
  parser.add_argument("--seed", type=int, default=0, help="of the faults")
  parser.add_argument("--json", type=pathlib.Path, help="also write this file")
  options = parser.parse_args()
  if options.kills < 1:
    parser.error(f"--kills {options.kills}: must be at least 1")
  own_disk = _DISK_VARIABLE in os.environ
  if not own_disk and _own_mounts_possible():
    os.environ[_DISK_VARIABLE] = "1"
    command = ["unshare", "-rm", sys.executable, __file__, *sys.argv[1:]]
    os.execvp("unshare", command)

  start = time.monotonic()
  work = pathlib.Path(tempfile.mkdtemp(prefix="chaos_"))
  for folder in ("runs", "logs", "hook"):
    (work / folder).mkdir()
  (work / "hook" / "sitecustomize.py").write_text(_SITECUSTOMIZE)
  if own_disk:
    _mount(work / "runs")
  chaos = Chaos(work, kills=options.kills, seed=options.seed, own_disk=own_disk)
  try:
    chaos.run()
  except ChaosError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f"error: interrupted; the logs are in {work}", file=sys.stderr)
    return 130
  survived = sum(not fault.problems for fault in chaos.faults)
  how = "small tmpfs" if own_disk else "limit on the size of a file"
  print(table(chaos.faults))
  print(
    f"survived {survived} of {len(chaos.faults)} faults in {chaos.rounds} runs;"
    f" disk full by a {how}; the slowest SIGTERM took"
    f" {max(chaos.sigterm_seconds):.1f} s"
  )
  if options.json:
    kinds = sorted({fault.kind for fault in chaos.faults})
    content = {
      "injected": len(chaos.faults),
      "survived": survived,
      "bit_identical": survived == len(chaos.faults),
      "kills": options.kills,
      "seed": options.seed,
      "runs": chaos.rounds,
      "seconds": round(time.monotonic() - start, 1),
      "disk_full_by": how,
      "slowest_sigterm_seconds": round(max(chaos.sigterm_seconds), 2),
      "kinds": {
        kind: {
          "injected": sum(f.kind == kind for f in chaos.faults),
          "survived": sum(
            f.kind == kind and not f.problems for f in chaos.faults
          ),
        }
        for kind in kinds
      },
    }
    text = json.dumps(content, indent=2) + "\n"
    storage.write_whole(options.json, text.encode())
  if survived < len(chaos.faults):
    print(f"error: see {work}", file=sys.stderr)
    return 1
  if own_disk:
    subprocess.run(["umount", str(work / "runs")], check=True)
  shutil.rmtree(work)
  return 0


if __name__ == "__main__":
  sys.exit(main())
