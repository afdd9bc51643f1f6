"""SIGTERM: when a run stops, what it saves, and that nothing shows of it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests import test_train_loop as loop
from u2pl_jax import checkpoint, preemption, report, train, writers
from u2pl_jax.checkpoint import Checkpoints
from u2pl_jax.preemption import Preempted, Preemption
from u2pl_jax.run_log import RunError

root, fake_steps, no_tensorflow = (
  loop.root,
  loop.fake_steps,
  loop.no_tensorflow,
)

MIOU = {4: 0.1, 8: 0.3, 12: 0.2, 16: 0.4, 20: 0.35}


@pytest.fixture
def miou(monkeypatch):
  """Evaluations that look at the images, and find what MIOU says."""
  evaluate = train.evaluate

  def made_up(config, program, data, state, step, counts, update):
    metrics = evaluate(config, program, data, state, step, counts, update)
    return metrics | {"eval/miou": MIOU[step]}

  monkeypatch.setattr(train, "evaluate", made_up)


def stopped(config, workdir, monkeypatch, owner, name, step):
  """One start that hears of SIGTERM when it calls `name` at `step`."""
  asked = Preemption()
  real = getattr(owner, name)
  reached = []
  update = train._Run._update
  done = [0]

  def count(self, state, batches):
    result = update(self, state, batches)
    done[0] = int(result[0].step)
    return result

  def call(*args, **kwargs):
    if done[0] == step or (not done[0] and name == "counts_of"):
      asked._signalled = True
      reached.append(True)
    return real(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(train._Run, "_update", count)
    patch.setattr(owner, name, call)
    with pytest.raises(Preempted) as info:
      train.train_and_evaluate(config, workdir, asked)
  assert reached
  message = str(info.value)
  assert message.startswith(f"SIGTERM: stopped after step {step} of 20")
  assert "run the same command again" in message and "\n" not in message
  return message


def newest(workdir):
  """(step, pending line) of what the next start goes on from."""
  folder = workdir / checkpoint.PREEMPTED_FOLDER
  steps = [int(path.name) for path in folder.iterdir()]
  assert len(steps) == 1
  meta, _ = checkpoint._read_meta(folder / str(steps[0]), steps[0])
  return meta.step, meta.pending_line


@pytest.mark.usefixtures("fake_steps", "miou")
@pytest.mark.slow
def test_stopped_everywhere_equals_uninterrupted(root, tmp_path, monkeypatch):
  # They take seconds, and are no matter of when a run stops.
  monkeypatch.setattr(report, "write_stats", lambda _: None)
  config = loop.make_config(root)
  config.checkpoint.every_epochs = 2
  train.train_and_evaluate(config, tmp_path / "clean")
  workdir = tmp_path / "run"

  def stop(owner, name, step):
    return stopped(config, workdir, monkeypatch, owner, name, step)

  # Between two steps; of its line of metrics, which is due every third step.
  assert "; all is saved;" in stop(writers.MetricsWriter, "write", 6)
  assert newest(workdir) == (6, None)
  assert loop.read_metrics(workdir)[-1]["step"] == 6
  # In an evaluation, of a step without a line of its own.
  message = stop(train, "counts_of", 8)
  assert "before its evaluation was done; all is saved" in message
  assert newest(workdir) == (8, {})
  assert loop.read_metrics(workdir)[-1]["step"] == 6
  # In the same evaluation once more, which has been begun again.
  stop(train, "counts_of", 8)
  assert newest(workdir) == (8, {})
  # Of a step that has a line too. Before the other images are looked at.
  stop(train, "evaluate", 12)
  step, line = newest(workdir)
  assert step == 12
  assert line["train/sup_loss"] == pytest.approx(1 / 12)
  assert loop.read_metrics(workdir)[-1]["step"] == 9
  # As if the next process had been killed between its line and its save.
  with (workdir / writers.METRICS_FILE).open("a") as file:
    file.write(json.dumps({"step": 12, "eval/miou": 0.2}) + "\n")
  # The best step is saved, and its report is not drawn.
  stop(Checkpoints, "save", 16)
  assert sorted(p.name for p in (workdir / checkpoint.FOLDER).iterdir()) == [
    "16",
    "8",
  ]
  page = workdir / "report" / "report.json"
  assert json.loads(page.read_text())["pictures"]["step"] == 8
  # In the last one. What is drawn first is the report that was left out.
  stop(train, "counts_of", 20)
  assert json.loads(page.read_text())["pictures"]["step"] == 16
  assert newest(workdir)[0] == 20

  train.train_and_evaluate(config, workdir)
  clean = tmp_path / "clean"
  assert loop.read_metrics(workdir) == loop.read_metrics(clean)
  assert (
    loop.read_state(config, workdir)[1] == loop.read_state(config, clean)[1]
  )
  assert {p.name for p in (workdir / checkpoint.FOLDER).iterdir()} == {
    p.name for p in (clean / checkpoint.FOLDER).iterdir()
  }
  assert not list((workdir / checkpoint.PREEMPTED_FOLDER).iterdir())
  assert json.loads(page.read_text())["complete_step"] == 20

  # A report that was broken off at the very end.
  text = page.read_text().replace('"complete_step": 20', '"gone": 20')
  page.write_text(text)
  train.train_and_evaluate(config, workdir)
  assert json.loads(page.read_text())["complete_step"] == 20


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EFBIG))
def test_full_disk_is_one_line(tmp_path, number):
  with pytest.raises(RunError) as info:
    with train._full_disk_in_one_line(tmp_path):
      raise OSError(number, os.strerror(number))
  assert str(info.value).startswith(
    f"{tmp_path}: cannot be written ({os.strerror(number)}): make room"
  )


def test_other_errors_of_files_keep_their_traceback(tmp_path):
  with pytest.raises(PermissionError):
    with train._full_disk_in_one_line(tmp_path):
      raise PermissionError(errno.EACCES, "no")


# -- The signal ----------------------------------------------------------------


def run_signalled(body, *numbers):
  """Runs Python that prints 'ready' when it may get the signals."""
  code = (
    "import hashlib, sys, time\n"
    "from u2pl_jax import preemption as lib\n"
    "lib.GRACE_SECONDS = 0.3\n"
    "preemption = lib.Preemption()\n"
    "preemption.install()\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code + body],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  for number in numbers:
    process.send_signal(number)
    time.sleep(0.1)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


# A call that Python cannot interrupt, as of a compiler.
FOREVER = "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2_000_000_000)\n"


def test_with_nothing_to_save_it_ends_at_once():
  code, _, err = run_signalled(
    "print('ready', flush=True)\n" + FOREVER, signal.SIGTERM
  )
  assert code == preemption.EXIT_CODE == 75
  assert err == (
    "error: SIGTERM while the run was starting: nothing is lost; run the same"
    " command again to go on\n"
  )


def test_a_step_that_does_not_end_is_left():
  body = "preemption.hold()\nprint('ready', flush=True)\n" + FOREVER
  code, _, err = run_signalled(body, signal.SIGTERM)
  assert code == preemption.EXIT_CODE
  assert err.startswith("error: SIGTERM: the step did not end within 0.3 s")
  assert err.count("\n") == 1


def test_a_save_is_not_cut_short():
  """Nor by a second signal, or an interrupt that follows."""
  body = """
preemption.hold()
print('ready', flush=True)
while not preemption._signalled:
  time.sleep(0.01)
with preemption.saving():
  end = time.monotonic() + 1
  while time.monotonic() < end:
    time.sleep(0.01)
  print('saved', flush=True)
sys.exit(lib.EXIT_CODE)
"""
  signals = (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
  code, out, err = run_signalled(body, *signals)
  assert (code, out, err) == (preemption.EXIT_CODE, "saved\n", "")


def test_a_child_that_is_terminated_is_none_of_its_business():
  body = """
import os, signal
for _ in range(20):
  child = os.fork()
  if not child:
    time.sleep(20)
    os._exit(0)
  os.kill(child, signal.SIGTERM)
  assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
time.sleep(0.3)
preemption.hold()
print('ready', preemption._signalled, flush=True)
"""
  code = (
    "import time\nfrom u2pl_jax import preemption as lib\n"
    "preemption = lib.Preemption()\npreemption.install()\n"
  )
  result = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", code + body],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (result.returncode, result.stdout) == (0, "ready False\n")
