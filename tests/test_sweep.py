"""Several runs by one command, with a trainer that only pretends.

It writes the metrics that the tests told it to; scripts/sweep.py cannot see the
difference, but for the seconds.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from input_pipeline.command_line import load_config
from scripts import sweep
from u2pl_jax import writers

REPOSITORY = pathlib.Path(__file__).parent.parent
CONFIG = "configs/testing.py"  # 3 epochs, method u2pl.

# Reads CONTROL/<method>_<seed>.json: mious, one an epoch of 10 steps, 'fail' or
# 'wait' for an interrupt after the first epoch. Goes on where it stopped.
TRAINER = """
import json, os, pathlib, signal, sys, time
control = pathlib.Path(sys.argv[1])
options = dict(a.lstrip('-').split('=', 1) for a in sys.argv[2:])
name = options['config.method'] + '_' + options['config.seed']
with open(control / 'calls.txt', 'a') as file:
  file.write(' '.join(sys.argv[2:]) + chr(10))
told = json.loads((control / (name + '.json')).read_text())
metrics = pathlib.Path(options['workdir']) / 'metrics.jsonl'
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
print('some words of the log', flush=True)
for epoch in range(done + 1, 1 + len(told['mious'])):
  if told.get('fail') and epoch == 2:
    print(told.get('says', 'error: out of memory'), file=sys.stderr)
    print('last words', file=sys.stderr)
    sys.exit(told['fail'])
  with open(metrics, 'a') as file:
    file.write(json.dumps({
      'step': 10 * epoch, 'train/epoch': float(epoch),
      'time/seconds_per_step': 2.0, 'eval/miou': told['mious'][epoch - 1],
    }) + chr(10))
  if told.get('wait') and epoch == 1:
    def stop(*_):
      print('error: SIGTERM: stopped after step 10', file=sys.stderr)
      sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (control / 'pid.txt.part').write_text(str(os.getpid()))
    os.rename(control / 'pid.txt.part', control / 'pid.txt')
    try:
      time.sleep(60)
    except KeyboardInterrupt:
      print('error: interrupted at step 10', file=sys.stderr)
      sys.exit(130)
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
  """Folder of what the trainer is told; `tell` writes there."""
  monkeypatch.chdir(REPOSITORY)
  monkeypatch.setattr(sweep, "_POLL_SECONDS", 0.02)
  folder = tmp_path / "control"
  folder.mkdir()
  (folder / "trainer.py").write_text(TRAINER)
  return folder


def tell(control, method, seed, mious, **how):
  text = json.dumps({"mious": mious, **how})
  (control / f"{method}_{seed}.json").write_text(text)


def trainer(control):
  return (sys.executable, str(control / "trainer.py"), str(control))


def run(control, *arguments):
  workdir = control.parent / "sweep"
  arguments = [CONFIG, f"--workdir={workdir}", *arguments]
  return sweep.main(arguments, trainer(control))


def calls(control) -> list[str]:
  path = control / "calls.txt"
  return path.read_text().splitlines() if path.exists() else []


def read_json(control):
  return json.loads((control.parent / "sweep" / "sweep.json").read_text())


def test_three_seeds_of_two_methods(control, capsys):
  # Last: 0.50, 0.52, 0.54 and 0.60, 0.64, 0.62; the best of seed 1 is epoch 2.
  for seed in range(3):
    tell(control, "supervised", seed, [0.1, 0.2, 0.5 + 0.02 * seed])
  tell(control, "u2pl", 0, [0.1, 0.2, 0.60])
  tell(control, "u2pl", 1, [0.1, 0.66, 0.64])
  tell(control, "u2pl", 2, [0.1, 0.2, 0.62])
  arguments = ("--methods=u2pl,supervised", "--set=optimizer.momentum=0.5")
  assert run(control, *arguments) == 0
  output = capsys.readouterr()
  lines = output.out.splitlines()
  table = [line for line in lines if line.startswith("|")]
  assert table[0] == (
    "| seed | supervised, last | supervised, best (step) | u2pl, last |"
    " u2pl, best (step) | u2pl - supervised, last |"
  )
  assert table[2:6] == [
    "| 0 | 50.00 | 50.00 (30) | 60.00 | 60.00 (30) | +10.00 |",
    "| 1 | 52.00 | 52.00 (30) | 64.00 | 66.00 (20) | +12.00 |",
    "| 2 | 54.00 | 54.00 (30) | 62.00 | 62.00 (30) | +8.00 |",
    # Deviations of 2 with n - 1; best: (-2.67, 3.33, -0.67), so 3.06.
    "| mean (standard deviation, n) | 52.00 (2.00, 3) | 52.00 (2.00, 3) |"
    " 62.00 (2.00, 3) | 62.67 (3.06, 3) | +10.00 (2.00, 3) |",
  ]
  rows = [[c.strip() for c in row.strip("|").split("|")] for row in table[6:]]
  assert rows[0][-1] == "command"
  command = "`python scripts/sweep.py configs/testing.py --seeds 3 --methods"
  command += " {} --set optimizer.momentum=0.5`"
  date = rows[2][5]
  assert rows[2:] == [
    ["`configs/testing.py`", "supervised", "52.00 ± 2.00", "52.00 ± 2.00"]
    + ["0, 1, 2", date, command.format("supervised")],
    ["`configs/testing.py`", "u2pl", "62.00 ± 2.00", "62.67 ± 3.06"]
    + ["0, 1, 2", date, command.format("u2pl")],
  ]
  assert time.strptime(date, "%Y-%m-%d")
  workdir = control.parent / "sweep"
  assert (workdir / "sweep.md").read_text() == output.out
  values = read_json(control)
  assert values["summary"]["u2pl"]["miou_last"]["mean"] == pytest.approx(0.62)
  assert values["summary"]["u2pl"]["miou_last"]["n"] == 3
  assert len(values["runs"]) == 6
  # What each run was told, and where its words went.
  assert len(calls(control)) == 6
  assert calls(control)[0].split() == [
    "--config=configs/testing.py",
    "--config.optimizer.momentum=0.5",
    "--config.method=u2pl",
    "--config.seed=0",
    f"--workdir={workdir}/u2pl/seed_0",
  ]
  log = (workdir / "u2pl" / "seed_0" / "log.txt").read_text()
  assert log == "some words of the log\n"
  assert "u2pl seed 1: done in" in output.err
  assert "64.00 last, 66.00 best at step 20" in output.err


def test_finished_runs_are_skipped_and_seeds_can_be_added(control, capsys):
  for seed in range(3):
    tell(control, "u2pl", seed, [0.1, 0.2, 0.3])
  assert run(control, "--seeds=2") == 0
  assert run(control, "--seeds=2") == 0
  assert len(calls(control)) == 2
  assert "u2pl seed 0: finished, mIoU 30.00 last" in capsys.readouterr().err
  assert run(control, "--seeds=3") == 0
  assert len(calls(control)) == 3
  # The table is of the folder, not of the last command.
  assert run(control, "--seeds=0,") == 0
  assert "(0.00, 3)" in capsys.readouterr().out.splitlines()[-1 - 6]
  # Runs that were deleted, or put back to an earlier step, are not finished.
  (control.parent / "sweep/u2pl/seed_0/metrics.jsonl").unlink()
  metrics = control.parent / "sweep/u2pl/seed_1/metrics.jsonl"
  metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
  assert run(control, "--seeds=3") == 0
  assert len(calls(control)) == 5


def test_one_failure_does_not_stop_the_others(control, capsys):
  tell(control, "u2pl", 0, [0.1, 0.2, 0.3])
  tell(control, "u2pl", 1, [0.1, 0.2, 0.9], fail=3)
  tell(control, "u2pl", 2, [0.1, 0.2, 0.5])
  assert run(control) == 1
  output = capsys.readouterr()
  last = output.err.splitlines()[-1]
  assert last.startswith("error: 1 of 3 runs failed: u2pl seed 1;")
  why = "exit status 3: out of memory (log: "
  assert f"u2pl seed 1: FAILED, {why}" in output.err
  # The unfinished run is in no mean.
  assert "| mean (standard deviation, n) | 40.00 (14.14, 2) |" in output.out
  assert f"- u2pl seed 1: {why}" in output.out
  assert (
    "`python scripts/sweep.py configs/testing.py --seeds 0,2 " in output.out
  )
  # Another reason: nothing of the first attempt is told again.
  tell(control, "u2pl", 1, [0.1, 0.2, 0.9], fail=4, says="no reason")
  assert run(control) == 1
  assert "seed 1: exit status 4: last words (log: " in capsys.readouterr().out
  # Tried again, it goes on after the line that it has.
  tell(control, "u2pl", 1, [0.1, 0.2, 0.4])
  assert run(control) == 0
  output = capsys.readouterr()
  assert len(calls(control)) == 5
  assert "| mean (standard deviation, n) | 40.00 (10.00, 3) |" in output.out
  assert "Not finished" not in output.out


def test_all_failed(control, capsys):
  tell(control, "u2pl", 0, [0.1, 0.2], fail=1)
  assert run(control, "--seeds=1") == 1
  output = capsys.readouterr()
  assert "|" not in output.out and "- u2pl seed 0: exit status 1" in output.out


def test_a_run_without_evaluation_is_no_success(control, capsys):
  tell(control, "u2pl", 0, [])
  workdir = control.parent / "sweep/u2pl/seed_0"
  workdir.mkdir(parents=True)
  (workdir / "metrics.jsonl").write_text('{"step": 1}\n')
  assert run(control, "--seeds=1") == 1
  assert "metrics.jsonl has no eval/miou" in capsys.readouterr().err


def test_one_seed_has_no_spread(control, capsys):
  tell(control, "u2pl", 5, [0.1, 0.2, 0.3])
  assert run(control, "--seeds=5,") == 0
  lines = capsys.readouterr().out.splitlines()
  assert (
    "| mean (standard deviation, n) | 30.00 (–, 1) | 30.00 (–, 1) |" in lines
  )
  assert "| 30.00 | 30.00 | 5 |" in lines[-1] and "--seeds 5, --" in lines[-1]


def test_two_at_once(control):
  # Each waits until it is ended: one after the other would take forever.
  tell(control, "u2pl", 0, [0.1, 0.2, 0.3], wait=True)
  tell(control, "u2pl", 1, [0.1, 0.2, 0.3])
  process = start(control, "--seeds=2", "--jobs=2")
  wait_for(lambda: len(calls(control)) == 2 and finished(control, 1))
  process.send_signal(signal.SIGINT)
  assert process.wait(20) == 130


def start(control, *arguments) -> subprocess.Popen:
  """The sweep in a process of its own, as a script's shell starts it with &."""
  code = f"""
    import sys
    from scripts import sweep
    sweep._POLL_SECONDS = 0.02
    sweep.heed_signals()
    arguments = [{CONFIG!r}, '--workdir={control.parent}/sweep']
    sys.exit(sweep.main(arguments + sys.argv[1:], {trainer(control)!r}))
  """
  return subprocess.Popen(
    # The shell's name, then what it becomes.
    ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    + [sys.executable, "-c", textwrap.dedent(code), *arguments],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(condition) -> None:
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def finished(control, seed) -> bool:
  try:
    entries = read_json(control)["runs"]
  except FileNotFoundError:
    return False
  return any(e["seed"] == seed and e["finished"] for e in entries)


def is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


@pytest.mark.parametrize(
  "number, code, says, run_says",
  [
    (signal.SIGINT, 130, "interrupted;", "interrupted at step 10"),
    (signal.SIGTERM, 75, "stopped by SIGTERM;", "stopped after step 10"),
  ],
)
def test_interrupted_it_ends_its_runs_and_goes_on(
  control, number, code, says, run_says
):
  tell(control, "u2pl", 0, [0.1, 0.2, 0.3])
  tell(control, "u2pl", 1, [0.1, 0.2, 0.5], wait=True)
  process = start(control, "--seeds=2")
  wait_for((control / "pid.txt").exists)
  process.send_signal(number)
  _, err = process.communicate(timeout=20)
  assert process.returncode == code
  assert err.splitlines()[-1].startswith(f"error: {says} run the same")
  assert "Traceback" not in err
  assert not is_alive(int((control / "pid.txt").read_text()))
  log = (control.parent / "sweep/u2pl/seed_1/log.txt").read_text()
  assert log.count(run_says) == 1
  # The same command: the first is skipped, the second goes on.
  assert run(control, "--seeds=2") == 0
  assert len(calls(control)) == 3
  assert read_json(control)["summary"]["u2pl"]["miou_last"] == {
    "mean": pytest.approx(0.4),
    "std": pytest.approx(0.1414, abs=1e-4),
    "n": 2,
  }


def test_a_run_that_is_terminated_ends_the_sweep(control, capsys):
  """Whoever wants the machine back does not want the next run on it."""
  told = {"fail": 75, "says": "error: SIGTERM: stopped after step 10"}
  tell(control, "u2pl", 0, [0.1, 0.2, 0.3], **told)
  tell(control, "u2pl", 1, [0.1, 0.2, 0.3])
  assert run(control, "--seeds=2") == 75
  last = capsys.readouterr().err.splitlines()[-1]
  assert last == (
    "error: stopped by SIGTERM; run the same command again to go on"
  )
  assert len(calls(control)) == 1
  assert "stopped after step 10" in read_json(control)["runs"][0]["error"]
  tell(control, "u2pl", 0, [0.1, 0.2, 0.3])
  assert run(control, "--seeds=2") == 0


def test_no_second_sweep_while_a_run_lives(control, capsys):
  tell(control, "u2pl", 0, [0.1, 0.2, 0.3], wait=True)
  process = start(control, "--seeds=1")
  wait_for((control / "pid.txt").exists)
  process.kill()
  process.communicate()
  pid = int((control / "pid.txt").read_text())
  # The sweep is gone, its run is not: two would write the same folder.
  assert is_alive(pid)
  assert run(control, "--seeds=1") == 1
  assert "still going on there" in capsys.readouterr().err
  os.kill(pid, signal.SIGKILL)
  wait_for(lambda: run(control, "--seeds=1") == 0)


def test_other_settings_in_the_same_folder_are_refused(control, capsys):
  # As a real run leaves it; of a seed that is not asked for again.
  workdir = control.parent / "sweep/u2pl/seed_7"
  workdir.mkdir(parents=True)
  config = load_config(
    [f"--config={CONFIG}", "--config.optimizer.momentum=0.5"]
  )
  config.seed = 7
  writers.write_config(workdir, config)
  tell(control, "u2pl", 0, [0.1, 0.2, 0.3])
  assert run(control, "--seeds=1", "--set=optimizer.momentum=0.6") == 1
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and str(workdir) in error
  assert "config.optimizer.momentum is 0.5 there and 0.6 here" in error
  assert calls(control) == []
  assert run(control, "--seeds=1", "--set=optimizer.momentum=0.5") == 0


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--seeds=0"], "--seeds 0: give how many"),
    (["--seeds=-1"], "--seeds -1"),
    (["--seeds=two"], "--seeds two"),
    (["--seeds=1,1"], "--seeds 1,1"),
    (["--jobs=0"], "--jobs 0: must be at least 1"),
    (["--set=momentum"], "needs key=value"),
    (["--set=seed=1"], "use --seeds"),
    (["--set=method=supervised"], "use --methods"),
    (["--set=eval.batch=4", "--set=eval.batch=2"], "eval.batch is set twice"),
    (["--methods=fixmatch"], "choose one or more of u2pl, supervised"),
    (["--methods=u2pl,u2pl"], "choose one or more of"),
    (["--workdir=README.md"], "cannot write there"),
  ],
)
def test_refused_in_one_line(control, capsys, arguments, said):
  assert run(control, *arguments) == 1
  output = capsys.readouterr()
  assert output.out == ""
  assert output.err.startswith("error: ") and output.err.count("\n") == 1
  assert said in output.err
  assert calls(control) == []


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["configs/missing.py"], "no such key or file"),
    ([f"{CONFIG}:colour=red"], "config argument 'colour' is unknown"),
    ([CONFIG, "--set=optimizer.momentun=1"], 'Did you mean "momentum"'),
    ([CONFIG, "--set=optimizer.momentum=high"], "momentum=high"),
  ],
)
def test_a_wrong_config_is_refused(control, capsys, arguments, said):
  workdir = control.parent / "sweep"
  with pytest.raises(SystemExit) as ended:
    sweep.main([*arguments, f"--workdir={workdir}"], trainer(control))
  assert ended.value.code == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  assert said in error
  assert not workdir.exists()


def test_a_damaged_record_is_named(control, capsys):
  tell(control, "u2pl", 0, [0.1, 0.2, 0.3])
  assert run(control, "--seeds=1") == 0
  path = control.parent / "sweep/sweep.json"
  path.write_text("{")
  assert run(control, "--seeds=1") == 1
  assert f"{path}: cannot be read" in capsys.readouterr().err
  path.unlink()
  assert run(control, "--seeds=1") == 0


def test_progress_line(control):
  workdir = control.parent / "u2pl"
  workdir.mkdir()
  job = sweep.Job("u2pl", 1, workdir)
  with sweep._locked(control.parent / "sweep") as lock:
    process = sweep._Process(
      job, "2/6 u2pl seed 1", [sys.executable, "-c", ""], 3, lock
    )
  process.end()
  assert process.progress_line().startswith("2/6 u2pl seed 1: starting, 0:00")
  rows = [{"step": 10, "train/epoch": 1.0, "time/seconds_per_step": 2.0}]
  rows += [{"step": 12, "eval/miou": 0.5}]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  # Half a line: the run is writing it.
  (workdir / "metrics.jsonl").write_text(text + '{"step": 20, "train/ep')
  # 20 steps of 2 s are left, and the warm-up tells less than all.
  line = "2/6 u2pl seed 1: step 10 of 30, mIoU 50.00, ETA over 0:00:40"
  assert process.progress_line() == line
  row = {"step": 20, "train/epoch": 2.0, "train/unsup_loss": 0.1}
  row |= {"time/seconds_per_step": 360.0}
  (workdir / "metrics.jsonl").write_text(text + json.dumps(row) + "\n")
  line = "2/6 u2pl seed 1: step 20 of 30, mIoU 50.00, ETA 1:00:00"
  assert process.progress_line() == line
