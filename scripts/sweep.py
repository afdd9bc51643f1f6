"""Trains a config with several seeds, and writes the table and README row.

  python scripts/sweep.py configs/shapes.py --seeds 3
  python scripts/sweep.py configs/camvid_46.py:cpu --seeds 2,3,4 \
    --methods supervised,u2pl --set optimizer.learning_rate=0.01

Each run is a python -m u2pl_jax.main of its own in WORKDIR/<method>/seed_<n>,
with its output in log.txt there. Run the same command again after whatever went
wrong: finished runs are skipped, interrupted ones go on, failed ones begin
where they stopped. SIGTERM, which a cluster sends before it takes the machine,
ends the sweep and its runs with status 75; so does one that reaches a run
alone, since it asks for the machine too.

More seeds or another method may be added later in the same folder; other
settings need another one. When all is done, WORKDIR/sweep.md has the table of
all finished runs in the folder, sweep.json the same as numbers.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from input_pipeline import ConfigError, storage
from input_pipeline.command_line import load_config
from u2pl_jax import preemption, writers
from u2pl_jax.clock import duration
from u2pl_jax.config_checks import METHODS
from u2pl_jax.run_log import RunError, read_run

TRAINER = (sys.executable, "-m", "u2pl_jax.main")
_POLL_SECONDS = 1.0
# Between lines of a log file; on a terminal the lines are drawn again.
_LOG_SECONDS = 30.0
# What a run may take to end after an interrupt; it loses nothing if killed.
_GRACE_SECONDS = 60.0
# Enough for some lines of metrics with many classes.
_TAIL_BYTES = 200_000


class _Preempted(Exception):
  """SIGTERM, to the sweep or to one of its runs."""


class SweepError(ValueError):
  """One line that names the flag or the file and the fix."""


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of the sweep."""

  method: str
  seed: int
  workdir: pathlib.Path

  @property
  def name(self) -> str:
    return f"{self.method} seed {self.seed}"


def parse_seeds(text: str) -> list[int]:
  """'3' -> [0, 1, 2]; '2,5' -> [2, 5]; '5,' -> [5].

  Raises:
    SweepError: anything else.
  """
  try:
    if "," in text:
      seeds = [int(part) for part in text.split(",") if part.strip()]
    else:
      seeds = list(range(int(text)))
  except ValueError:
    seeds = []
  if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
    raise SweepError(
      f"--seeds {text}: give how many (3 means 0,1,2), or a list of different"
      " seeds such as 2,5"
    )
  return seeds


def format_seeds(seeds: Sequence[int]) -> str:
  """The way back."""
  if list(seeds) == list(range(len(seeds))):
    return str(len(seeds))
  return ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")


def parse_methods(text: str) -> list[str]:
  """'supervised,u2pl' -> a list.

  Raises:
    SweepError: an unknown method, or one twice.
  """
  methods = text.split(",")
  for method in methods:
    if method not in METHODS or methods.count(method) > 1:
      raise SweepError(
        f"--methods {text}: choose one or more of {', '.join(METHODS)},"
        " separated by commas"
      )
  return methods


def override_arguments(settings: Sequence[str]) -> list[str]:
  """'key=value' of --set -> arguments of the trainer.

  Raises:
    SweepError: no '=', a key twice, or a key that has a flag of its own.
  """
  keys = []
  for setting in settings:
    key, equals, _ = setting.partition("=")
    if not key or not equals:
      raise SweepError(
        f"--set {setting}: needs key=value, such as optimizer.learning_rate=0.1"
      )
    if key in ("seed", "method"):
      raise SweepError(f"--set {setting}: use --{key}s")
    if key in keys:
      raise SweepError(f"--set {setting}: {key} is set twice")
    keys.append(key)
  return [f"--config.{setting}" for setting in settings]


# -- What the folder knows -----------------------------------------------------


def read_entries(workdir: pathlib.Path) -> dict[tuple[str, int], dict]:
  """(method, seed) -> what sweep.json says of the run.

  Raises:
    SweepError: the file is damaged.
  """
  path = workdir / "sweep.json"
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return {(entry["method"], entry["seed"]): entry for entry in entries}
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise SweepError(
      f"{path}: cannot be read ({error}): delete it; the runs are not lost"
    ) from None


def find_jobs(workdir: pathlib.Path) -> list[Job]:
  """The runs that the folder holds, of this or an earlier command."""
  jobs = []
  for method in METHODS:
    for path in workdir.glob(f"{method}/seed_*/{writers.CONFIG_FILE}"):
      number = path.parent.name.removeprefix("seed_")
      if number.isdecimal():
        jobs.append(Job(method, int(number), path.parent))
  return jobs


def is_finished(job: Job, entry: Mapping[str, Any] | None) -> bool:
  """Whether a command saw the run end well, and its metrics are still there."""
  if entry is None or not entry["finished"]:
    return False
  try:
    rows = read_run(job.workdir).rows
  except RunError:
    return False
  return bool(rows) and rows[-1]["step"] == entry["steps"]


def make_entry(job: Job, error: str | None) -> dict[str, Any]:
  """What sweep.json says of a run that has just ended.

  Args:
    job: of the run.
    error: why it ended badly; None if it did not.
  """
  entry = {"method": job.method, "seed": job.seed, "finished": error is None}
  if error is None:
    try:
      run = read_run(job.workdir)
      best, last = run.best_evaluation, run.last("eval/miou")
    except RunError as broken:
      return make_entry(job, str(broken))
    if best is None:
      return make_entry(job, "metrics.jsonl has no eval/miou")
    entry |= {
      "steps": int(run.rows[-1]["step"]),
      "miou_last": last,
      "miou_best": best[1],
      "best_step": best[0],
      "date": datetime.date.today().isoformat(),
    }
  else:
    entry["error"] = error
  return entry


# -- The table -----------------------------------------------------------------


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
  return {
    "mean": statistics.fmean(values),
    "std": statistics.stdev(values) if len(values) > 1 else None,
    "n": len(values),
  }


def summarise(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
  """method -> mean, standard deviation (n - 1) and n over the finished runs.

  Args:
    entries: of sweep.json.

  Returns:
    The baseline first; methods without a finished run are left out. mIoU from
    0 to 1.
  """
  summary = {}
  for method in reversed(METHODS):
    done = [e for e in entries if e["method"] == method and e["finished"]]
    if done:
      summary[method] = {
        "seeds": sorted(entry["seed"] for entry in done),
        "miou_last": _spread([entry["miou_last"] for entry in done]),
        "miou_best": _spread([entry["miou_best"] for entry in done]),
        "date": max(entry["date"] for entry in done),
      }
  return summary


def _row(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"


def _spread_cell(spread: Mapping[str, Any], sign: str = "") -> str:
  std = "–" if spread["std"] is None else f"{100 * spread['std']:.2f}"
  return f"{100 * spread['mean']:{sign}.2f} ({std}, {spread['n']})"


def _seed_table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
  """A row a seed and a row of means; of two methods also their difference."""
  summary = summarise(entries)
  by_run = {(e["method"], e["seed"]): e for e in entries if e["finished"]}
  methods = list(summary)
  columns = ["seed"]
  for method in methods:
    columns += [f"{method}, last", f"{method}, best (step)"]
  if len(methods) == 2:
    columns.append(f"{methods[1]} - {methods[0]}, last")
  lines = [_row(columns), "|" + "---|" * len(columns)]
  differences = []
  for seed in sorted({seed for _, seed in by_run}):
    cells = [str(seed)]
    found = [by_run.get((method, seed)) for method in methods]
    for entry in found:
      cells += (
        ["–", "–"]
        if entry is None
        else [
          f"{100 * entry['miou_last']:.2f}",
          f"{100 * entry['miou_best']:.2f} ({entry['best_step']:,})",
        ]
      )
    if len(methods) == 2:
      cells.append("–")
      if None not in found:
        differences.append(found[1]["miou_last"] - found[0]["miou_last"])
        cells[-1] = f"{100 * differences[-1]:+.2f}"
    lines.append(_row(cells))
  cells = ["mean (standard deviation, n)"]
  for method in methods:
    cells.append(_spread_cell(summary[method]["miou_last"]))
    cells.append(_spread_cell(summary[method]["miou_best"]))
  if len(methods) == 2:
    cells.append(
      _spread_cell(_spread(differences), "+") if differences else "–"
    )
  return [*lines, _row(cells)]


def _plus_minus(spread: Mapping[str, Any]) -> str:
  text = f"{100 * spread['mean']:.2f}"
  return (
    text if spread["std"] is None else f"{text} ± {100 * spread['std']:.2f}"
  )


def _readme_rows(
  summary: Mapping[str, Mapping], config: str, settings: Sequence[str]
) -> list[str]:
  columns = ("config", "method", "mIoU, last", "mIoU, best", "seeds", "date")
  columns += ("command",)
  lines = [_row(columns), "|" + "---|" * len(columns)]
  for method, numbers in summary.items():
    command = ["python", "scripts/sweep.py", config]
    command += ["--seeds", format_seeds(numbers["seeds"]), "--methods", method]
    for setting in settings:
      command += ["--set", setting]
    cells = (
      f"`{config}`",
      method,
      _plus_minus(numbers["miou_last"]),
      _plus_minus(numbers["miou_best"]),
      ", ".join(map(str, numbers["seeds"])),
      numbers["date"],
      f"`{shlex.join(command)}`",
    )
    lines.append(_row(cells))
  return lines


def sweep_text(
  entries: Sequence[Mapping[str, Any]],
  *,
  config: str,
  settings: Sequence[str],
  protocol: str,
) -> str:
  """sweep.md.

  Args:
    entries: of sweep.json.
    config: with its argument, as on the command line.
    settings: of --set.
    protocol: one phrase: how mIoU was measured, and on which images.

  Returns:
    Markdown; without tables if no run is finished.
  """
  lines = [f"# Sweep of {config}", ""]
  summary = summarise(entries)
  if summary:
    lines += [
      f"mIoU in percent, {protocol}. 'last' is the last evaluation of a run,"
      " 'best' that of the checkpoint that is kept as the best: chosen on the"
      " same images, so it flatters."
      " Standard deviations are over seeds, with n - 1.",
      "",
      *_seed_table(entries),
      "",
      "For the README:",
      "",
      *_readme_rows(summary, config, settings),
    ]
  unfinished = [entry for entry in entries if not entry["finished"]]
  if unfinished:
    lines += ["", "Not finished:", ""]
  lines += [
    f"- {entry['method']} seed {entry['seed']}: {entry['error']}"
    for entry in unfinished
  ]
  return "\n".join(lines) + "\n"


# -- Running -------------------------------------------------------------------


class _Display:
  """Lines on stderr that stay, and one progress line a run that does not."""

  def __init__(self):
    self._is_terminal = sys.stderr.isatty()
    self._lines = 0
    self._shown = -_LOG_SECONDS

  def say(self, text: str) -> None:
    self._erase()
    print(text, file=sys.stderr, flush=True)

  def show(self, lines: Sequence[str]) -> None:
    if self._is_terminal:
      self._erase()
      width = shutil.get_terminal_size().columns - 1
      text = "".join(f"{line[:width]}\n" for line in lines)
      self._lines = len(lines)
    elif time.monotonic() - self._shown < _LOG_SECONDS:
      return
    else:
      self._shown = time.monotonic()
      text = "".join(f"{line}\n" for line in lines)
    sys.stderr.write(text)
    sys.stderr.flush()

  def _erase(self) -> None:
    if self._lines:
      sys.stderr.write(f"\x1b[{self._lines}F\x1b[0J")
      self._lines = 0


class _Process:
  """A run that is going on."""

  def __init__(
    self,
    job: Job,
    label: str,
    arguments: Sequence[str],
    epochs: int,
    lock: int,
  ):
    self.job, self._label, self._epochs = job, label, epochs
    self._begin = time.monotonic()
    self._latest: dict[str, Any] = {}
    self._log = job.workdir / "log.txt"
    with self._log.open("ab") as log:
      self._log_start = log.tell()
      path = os.pathsep.join(filter(None, (str(ROOT), os.getenv("PYTHONPATH"))))
      # A session of its own: an interrupt from the terminal reaches the sweep
      # alone, which hands it on once.
      self._process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
        pass_fds=(lock,),
      )

  def poll(self) -> int | None:
    return self._process.poll()

  def stop(self, number: int) -> None:
    """Sends the signal on."""
    with contextlib.suppress(ProcessLookupError):
      self._process.send_signal(number)

  def end(self) -> None:
    """Waits for the end; the run goes on from its last checkpoint if killed."""
    try:
      self._process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()

  @property
  def seconds(self) -> float:
    return time.monotonic() - self._begin

  def error(self) -> str:
    """The last line of the log that says what went wrong."""
    with self._log.open("rb") as log:
      log.seek(self._log_start)
      text = log.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    said = (errors or lines or ["no output"])[-1].removeprefix("error: ")
    code = self._process.returncode
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    return f"{how}: {said} (log: {self._log})"

  def progress_line(self) -> str:
    """'2/6 u2pl seed 1: step 620 of 1,488, mIoU 71.20, ETA 0:03:10'."""
    for row in _last_rows(self.job.workdir / writers.METRICS_FILE):
      self._latest |= {k: v for k, v in row.items() if v is not None}
    latest = self._latest
    epoch = latest.get("train/epoch")
    if not epoch:
      return f"{self._label}: starting, {duration(self.seconds)}"
    # The line of an evaluation alone has no epoch.
    step = latest["train/step"]
    total = round(step / epoch * self._epochs)
    parts = [f"step {step:,} of {total:,}"]
    if "eval/miou" in latest:
      parts.append(f"mIoU {100 * latest['eval/miou']:.2f}")
    left = (total - step) * latest.get("time/seconds_per_step", 0.0)
    # A step of the warm-up takes less time than those that follow.
    is_short = self.job.method == "u2pl" and "train/unsup_loss" not in latest
    parts.append(f"ETA {'over ' if is_short else ''}{duration(left)}")
    return f"{self._label}: {', '.join(parts)}"


def _last_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The last complete lines of metrics, oldest first; `train/step` added.

  The run may be writing the file at this moment, or not have begun to.
  """
  try:
    with path.open("rb") as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - _TAIL_BYTES))
      lines = file.read().split(b"\n")
  except FileNotFoundError:
    return
  for line in lines:
    try:
      row = json.loads(line)
    except ValueError:  # Cut off at either end.
      continue
    if isinstance(row, dict) and "step" in row:
      if "train/epoch" in row:
        row["train/step"] = row["step"]
      yield row


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[int]:
  """Keeps a second sweep out of the folder.

  The runs inherit the open file, so that the lock holds as long as one of them
  lives, also if the sweep itself was killed.

  Yields:
    The file's number.

  Raises:
    SweepError: one is running, or the folder cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    handle = os.open(workdir / ".sweep.lock", os.O_RDWR | os.O_CREAT, 0o666)
  except OSError as error:
    raise SweepError(
      f"--workdir {workdir}: cannot write there ({error.strerror}): choose a"
      " folder that you may write"
    ) from None
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise SweepError(
        f"--workdir {workdir}: a sweep or one of its runs is still going on"
        " there: wait for it, or end it"
      ) from None
    yield handle
  finally:
    os.close(handle)


@dataclasses.dataclass
class Sweep:
  """What the command line asks for.

  Attributes:
    config: file with its argument.
    settings: of --set.
    jobs: the runs that are wanted, in order.
    workdir: of the sweep.
    at_once: runs at the same time.
    trainer: the command of a run.
    protocol: see `sweep_text`.
    epochs: of a run.
    entries: (method, seed) -> of sweep.json.
  """

  config: str
  settings: Sequence[str]
  jobs: Sequence[Job]
  workdir: pathlib.Path
  at_once: int
  trainer: Sequence[str]
  protocol: str
  epochs: int
  entries: dict[tuple[str, int], dict]

  def run(self, lock: int) -> list[Job]:
    """Runs what is not finished; returns the jobs that failed.

    Args:
      lock: see `_locked`.

    Whatever it raises, no run of it goes on afterwards.
    """
    display, failed, active = _Display(), [], []
    pending = []
    for number, job in enumerate(self.jobs, start=1):
      entry = self.entries.get((job.method, job.seed))
      if is_finished(job, entry):
        display.say(f"{job.name}: finished, mIoU {_mious(entry)}")
      else:
        pending.append((f"{number}/{len(self.jobs)} {job.name}", job))
    try:
      while pending or active:
        while pending and len(active) < self.at_once:
          label, job = pending.pop(0)
          arguments = self._arguments(job)
          display.say(f"{label}: {shlex.join(['python', *arguments[1:]])}")
          active.append(_Process(job, label, arguments, self.epochs, lock))
        display.show([process.progress_line() for process in active])
        time.sleep(_POLL_SECONDS)
        for process in [p for p in active if p.poll() is not None]:
          active.remove(process)
          job = process.job
          error = process.error() if process.poll() else None
          entry = make_entry(job, error)
          self.entries[job.method, job.seed] = entry
          self.write()
          if entry["finished"]:
            took = duration(process.seconds)
            display.say(f"{job.name}: done in {took}, mIoU {_mious(entry)}")
          else:
            failed.append(job)
            display.say(f"{job.name}: FAILED, {entry['error']}")
          if process.poll() == preemption.EXIT_CODE:
            raise _Preempted
    except BaseException as error:
      # Also a full disk, or a terminal that is gone.
      is_preempted = isinstance(error, _Preempted)
      for process in active:
        process.stop(signal.SIGTERM if is_preempted else signal.SIGINT)
      for process in active:
        process.end()
      raise
    return failed

  def _arguments(self, job: Job) -> list[str]:
    return [
      *self.trainer,
      f"--config={self.config}",
      *override_arguments(self.settings),
      f"--config.method={job.method}",
      f"--config.seed={job.seed}",
      f"--workdir={job.workdir}",
    ]

  def write(self) -> str:
    """Writes sweep.json and sweep.md; returns the latter's text."""
    entries = [self.entries[key] for key in sorted(self.entries)]
    values = {
      "config": self.config,
      "set": list(self.settings),
      "summary": summarise(entries),
      "runs": entries,
    }
    text = sweep_text(
      entries,
      config=self.config,
      settings=self.settings,
      protocol=self.protocol,
    )
    encoded = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    storage.write_whole(self.workdir / "sweep.json", encoded.encode())
    storage.write_whole(self.workdir / "sweep.md", text.encode())
    return text


def _mious(entry: Mapping[str, Any]) -> str:
  return (
    f"{100 * entry['miou_last']:.2f} last, {100 * entry['miou_best']:.2f} best"
    f" at step {entry['best_step']:,}"
  )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    epilog=__doc__.split("\n", 1)[1],
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("config", help="experiment file, perhaps with :argument")
  parser.add_argument(
    "--seeds", default="3", help="how many, or a list such as 2,5 (default: 3)"
  )
  parser.add_argument(
    "--methods",
    help=f"one or more of {', '.join(METHODS)} with commas (default: the"
    " config's)",
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="a key of the config for all runs; may be given several times",
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    help="of the sweep (default: runs/sweep_<config.name>)",
  )
  parser.add_argument(
    "--jobs",
    type=int,
    default=1,
    help="runs at the same time (default: 1); each takes the memory of a run"
    " alone, so on a GPU leave it",
  )
  return parser.parse_args(arguments)


def _prepare(
  options: argparse.Namespace, trainer: Sequence[str]
) -> tuple[Sweep, Any]:
  """Checks the command line; returns the sweep and its resolved config."""
  seeds = parse_seeds(options.seeds)
  overrides = override_arguments(options.set)
  if options.jobs < 1:
    raise SweepError(f"--jobs {options.jobs}: must be at least 1")
  config = load_config([f"--config={options.config}", *overrides])
  methods = parse_methods(options.methods or config.method)
  workdir = options.workdir or pathlib.Path("runs", f"sweep_{config.name}")
  sweep = Sweep(
    config=options.config,
    settings=options.set,
    jobs=[
      Job(method, seed, workdir / method / f"seed_{seed}")
      for seed in seeds
      for method in methods
    ],
    workdir=workdir,
    at_once=options.jobs,
    trainer=trainer,
    protocol=f"protocol {config.eval.protocol}, images of"
    f" {config.dataset.validation_list}",
    epochs=config.schedule.epochs,
    entries={},
  )
  return sweep, config


def main(
  arguments: Sequence[str] | None = None, trainer: Sequence[str] = TRAINER
) -> int:
  """The command line; returns the exit status.

  Args:
    arguments: of the command line; None takes this process's.
    trainer: the command of a run, to which its flags are added.
  """
  try:
    sweep, config = _prepare(_parse(arguments), trainer)
    with _locked(sweep.workdir) as lock:
      # A folder holds one set of settings, whichever command began it.
      for job in [*find_jobs(sweep.workdir), *sweep.jobs]:
        config.method, config.seed = job.method, job.seed
        writers.check_workdir(job.workdir, config)
      sweep.entries = read_entries(sweep.workdir)
      failed = sweep.run(lock)
      print(sweep.write(), end="")
  except (SweepError, ConfigError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except _Preempted:
    print(
      "error: stopped by SIGTERM; run the same command again to go on",
      file=sys.stderr,
    )
    return preemption.EXIT_CODE
  except KeyboardInterrupt:
    print(
      "error: interrupted; run the same command again to go on", file=sys.stderr
    )
    return 130
  if failed:
    names = ", ".join(job.name for job in failed)
    print(
      f"error: {len(failed)} of {len(sweep.jobs)} runs failed: {names}; run the"
      " same command again to try them again",
      file=sys.stderr,
    )
    return 1
  return 0


def _interrupt(*_: Any) -> None:
  raise KeyboardInterrupt


def _preempt(*_: Any) -> None:
  raise _Preempted


def heed_signals() -> None:
  """Has what ends the sweep end its runs too."""
  # The end of a cluster's job, or of a terminal; nohup has a word in this.
  handlers = ((signal.SIGTERM, _preempt), (signal.SIGHUP, _interrupt))
  for number, handler in handlers:
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, handler)
  # A script's shell has what it starts in the background ignore interrupts. The
  # runs would inherit that, and an interrupt is how they are ended.
  signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
  heed_signals()
  sys.exit(main())
