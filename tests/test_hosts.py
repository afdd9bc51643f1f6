"""Several processes: how they find each other, train, evaluate, save and end.

For real, on this machine: each process has its own pretended CPU devices, and
what they exchange goes through sockets (gloo).
"""

import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zlib

import jax
import numpy as np
import pytest

from configs import testing
from input_pipeline import ConfigError, decode
from input_pipeline.dataset_config import load_info, prepare_dataset
from tests import pretended
from u2pl_jax import checkpoint, checksum, distributed
from u2pl_jax import data as data_lib
from u2pl_jax.checkpoint import read_checkpoint
from u2pl_jax.evaluation import Protocol

_ROOT = pathlib.Path(__file__).parent.parent
STEPS_PER_EPOCH = 4
# Where sums are rounded in another order, a rectified number close to 0 passes
# its gradient on in one of two runs only, now and then: 2e-4 of its norm, as in
# runs whose first weights differ by 1e-7. The steps after it differ too: equal
# numbers are asked of steps that begin with the same state.
LIMIT, LIMIT_OF_GRADIENT = 1e-5, 3e-3


def start(module, processes, devices, *arguments, own=(), groups=False):
  """Starts processes of `devices` each; `own` are flags of one each.

  With `groups` each is the first of a process group, with what it starts.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = []
  for index in range(processes):
    flags = []
    if processes > 1:
      flags += [
        f"--coordinator=localhost:{port}",
        f"--num_processes={processes}",
        f"--process_id={index}",
      ]
    if own:
      flags += own[index]
    started.append(
      subprocess.Popen(
        [sys.executable, "-m", module, *arguments, *flags],
        cwd=_ROOT,
        # NPROC are threads of the CPU: XLA takes one a device at least, and
        # sums over them in another order.
        env=pretended.environment(devices, NPROC="4"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=groups,
      )
    )
  return started


def finish(started, code=0):
  """What the processes wrote to stderr; they must end with `code`."""
  found = []
  try:
    for process in started:
      _, err = process.communicate(timeout=1500)
      found.append(err)
  finally:
    for process in started:
      process.kill()
  for process, err in zip(started, found, strict=True):
    assert process.returncode == code, err[-3000:]
  return found


def start_training(folder, processes, devices, *arguments, **options):
  """Trains configs/testing.py in folder/run, of the data in folder/../data."""
  return start(
    "tests.host_runs",
    processes,
    devices,
    "--config=configs/testing.py",
    f"--workdir={folder}/run",
    f"--config.dataset.root={folder.parent}/data",
    "--config.checkpoint.keep=3",
    "--config.log.every_steps=1",
    "--config.log.report_images=0",
    "--config.log.images_every_epochs=0",
    *arguments,
    **options,
  )


def train(folder, processes, devices, *arguments, code=0, own=()):
  """`start_training`, and waits for the end."""
  started = start_training(folder, processes, devices, *arguments, own=own)
  return finish(started, code=code)


def lines(workdir):
  """metrics.jsonl without what depends on the clock."""
  text = (workdir / "metrics.jsonl").read_text()
  return [
    {name: x for name, x in json.loads(line).items() if name[:5] != "time/"}
    for line in text.splitlines()
  ]


def assert_same_run(workdir, expected, *, step=None):
  """Bit for bit: metrics, meta data and every array of the last checkpoint."""
  assert lines(workdir) == lines(expected)
  found, wanted = (
    read_checkpoint(workdir, step),
    read_checkpoint(expected, step),
  )
  assert found.meta == wanted.meta
  assert found.arrays.keys() == wanted.arrays.keys()
  for name, array in wanted.arrays.items():
    np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)


def assert_close(found, expected, step):
  """Metrics of a step up to rounding; counts and NaN (null) alike."""
  (line,) = (x for x in found if x["step"] == step)
  (wanted,) = (x for x in expected if x["step"] == step)
  assert line.keys() == wanted.keys()
  for name, value in wanted.items():
    if isinstance(value, float):
      limit = LIMIT_OF_GRADIENT if name == "train/grad_norm" else LIMIT
      value = pytest.approx(value, rel=limit, abs=limit)
    assert line[name] == value, (step, name)


def cut_back(workdir, target, step):
  """A copy of a workdir as if the run had been killed after `step`."""
  shutil.copytree(workdir, target)
  for path in (target / checkpoint.FOLDER).iterdir():
    if path.name.isdecimal() and int(path.name) > step:
      shutil.rmtree(path)


# -- Who is who ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("nodes", "host"),
  [
    ("n1", "n1"),
    ("n1,n2", "n1"),
    ("gpu[007-9,12],x", "gpu007"),
    ("gpu[3,5-7]", "gpu3"),
    ("rack[1-2]-a,rack3-b", "rack1-a"),
    ("a[2-3]b[04-05]", "a2b04"),
  ],
)
def test_first_host(nodes, host):
  assert distributed.first_host(nodes) == host


STEP = {
  "SLURM_JOB_ID": "70003",
  "SLURM_NTASKS": "6",
  "SLURM_STEP_NUM_TASKS": "6",
  "SLURM_STEP_NODELIST": "gpu[07-09]",
  "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
  "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
  ("variables", "gpus"),
  [
    # All tasks of the node see its GPUs: the second one has the second half.
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2, 3]),
    ({"ROCR_VISIBLE_DEVICES": "0,1"}, [1]),
    # Those of --gpus-per-task and of --gpu-bind are its own.
    ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
    ({"CUDA_VISIBLE_DEVICES": "0"}, None),
    # The only task of its node.
    (
      {
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "SLURM_STEP_TASKS_PER_NODE": "3,1,2",
      },
      None,
    ),
  ],
)
def test_slurm_task(variables, gpus):
  # 70003 = 17 * 4096 + 371.
  assert distributed.slurm_task(STEP | variables) == (
    "gpu07:61811", 6, 3, gpus
  )  # fmt: skip


def test_slurm_without_several_tasks_is_one_process():
  assert distributed.slurm_task({}) is None
  # A shell of salloc with one task, and one task of srun in a larger job.
  assert distributed.slurm_task({"SLURM_JOB_ID": "1"}) is None
  one = STEP | {"SLURM_STEP_NUM_TASKS": "1"}
  assert distributed.slurm_task(one) is None


@pytest.mark.parametrize(
  ("variables", "message"),
  [
    (
      {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
      "job 7 has 4 tasks, but this process is none of them: put srun before",
    ),
    (
      STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2"},
      "the 3 GPUs of this node do not divide over its 2 tasks",
    ),
  ],
)
def test_slurm_that_cannot_work(variables, message):
  with pytest.raises(ConfigError, match=message) as info:
    distributed.slurm_task(variables)
  assert "\n" not in str(info.value)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_processes": 2}, "--coordinator and --process_id missing"),
    ({"process_id": 1}, "--coordinator and --num_processes missing"),
    (
      {"coordinator": "h", "num_processes": 2, "process_id": 0},
      "--coordinator=h: needs host:port",
    ),
    (
      {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
      "--process_id=2: must be between 0 and --num_processes - 1, 1",
    ),
  ],
)
def test_flags_that_cannot_work(arguments, message):
  with pytest.raises(ConfigError, match=message):
    distributed.initialize(**arguments)


def test_one_process_asks_nobody(monkeypatch):
  monkeypatch.setattr(distributed, "_join", lambda *_, **__: 1 / 0)
  distributed.initialize()
  # Also where a cluster would say otherwise.
  monkeypatch.setattr(os, "environ", dict(STEP))
  distributed.initialize(num_processes=1)
  with pytest.raises(ZeroDivisionError):
    distributed.initialize()


def test_coordinator_that_is_not_there():
  with socket.socket() as taken:
    taken.bind(("localhost", 0))  # And does not listen.
    address = f"localhost:{taken.getsockname()[1]}"
    with pytest.raises(ConfigError) as info:
      distributed.initialize(
        coordinator=address, num_processes=2, process_id=1, timeout=0.1
      )
  assert f"the coordinator {address} is not reachable within 0.1 s" in str(
    info.value
  )


def test_process_that_does_not_come():
  code = """if True:
    from u2pl_jax import distributed
    distributed.initialize(
      coordinator="localhost:%d", num_processes=2, process_id=0, timeout=1)"""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  result = subprocess.run(
    [sys.executable, "-c", code % port],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1] == (
    f"error: not all of the 2 processes came to localhost:{port} within 1 s:"
    " start all of them with the same --coordinator and --num_processes"
  )


@pytest.mark.parametrize("first", [0, 1, 2])
def test_processes_that_fail_at_the_same_time(first):
  """Each says so and ends with the code of the first; jax aborts none."""
  code = """if True:
    import sys, time
    from u2pl_jax import distributed
    own = int(sys.argv[2])
    distributed.initialize(
      coordinator=sys.argv[1], num_processes=3, process_id=own)
    with distributed.end_together():
      distributed.gather(own)
      time.sleep(0 if own == %d else 0.2)
      raise SystemExit(3) if own == 2 else ValueError(f"of {own}")"""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  started = [
    subprocess.Popen(
      [sys.executable, "-c", code % first, address, str(index)],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(3)
  ]
  errors = finish(started, code=3 if first == 2 else 1)
  for index, error in enumerate(errors):
    ended = f"ended, since process {first} failed: "
    assert (ended in error) == (index != first), error


@pytest.mark.parametrize("status", [0, 1, 75])
def test_batch_script_is_queued_again_after_75(tmp_path, status):
  (tmp_path / "srun").write_text(
    f'#!/bin/bash\necho "srun $@"\nkill -TERM $PPID\nexit {status}\n'
  )
  (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $@"\n')
  for name in ("srun", "scontrol"):
    (tmp_path / name).chmod(0o755)
  path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
  result = subprocess.run(
    ["bash", _ROOT / "scripts/slurm/train.sbatch"],
    env={"PATH": path, "SLURM_JOB_ID": "42"},
    capture_output=True,
    text=True,
    timeout=60,
  )
  first, *others = result.stdout.splitlines()
  assert first.startswith("srun --kill-on-bad-exit=0 .venv/bin/python -u -m")
  assert others == (["scontrol requeue 42"] if status == 75 else [])
  assert result.returncode == status
  # SLURM reads its lines up to the first command.
  text = (_ROOT / "scripts/slurm/train.sbatch").read_text()
  head = itertools.takewhile(
    lambda line: not line or line[0] == "#", text.splitlines()
  )
  assert sum(line.startswith("#SBATCH") for line in head) == 11
  assert text.count("#SBATCH") == 11


# -- Shares --------------------------------------------------------------------


def parts_of(monkeypatch, open_stream, count, num_batches):
  """The batches of each of `count` processes, one behind the other."""
  monkeypatch.setattr(jax, "process_count", lambda: count)
  found = []
  for index in range(count):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    with open_stream() as stream:
      found.append(list(itertools.islice(stream, num_batches)))
  return [
    {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for parts in zip(*found, strict=True)
  ]


@pytest.fixture(scope="module")
def run_data(tmp_path_factory):
  """(config, data) of configs/testing.py."""
  config = testing.get_config()
  config.dataset.root = str(tmp_path_factory.mktemp("rows") / "data")
  prepare_dataset(config.dataset)
  return config, data_lib.load_data(config, load_info(config.dataset))


@pytest.mark.parametrize("kind", ["labelled", "unlabelled", "padded", "whole"])
def test_rows_of_all_processes_are_the_batch(monkeypatch, run_data, kind):
  config, data = run_data
  monkeypatch.setattr(jax, "device_count", lambda: 4)

  def open_stream():
    if kind.endswith("labelled"):
      return data_lib.open_train_stream(
        config,
        data,
        types.SimpleNamespace(quirks=()),
        labelled=kind == "labelled",
        step=3,
      )
    # 5 images in batches of 4: one process has nothing but fillers.
    protocol = Protocol(kind, (64, 64) if kind == "padded" else None)
    ids = (*data.validation, data.labelled[0])
    return data_lib.open_eval_stream(config, data, ids, protocol=protocol)

  expected = parts_of(monkeypatch, open_stream, 1, 3)
  assert len(expected[0]["image"]) == 4
  for count in (2, 4):
    found = parts_of(monkeypatch, open_stream, count, 3)
    assert len(found) == len(expected)
    for batch, wanted in zip(found, expected, strict=True):
      assert batch.keys() == wanted.keys()
      for name, value in wanted.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)


def test_other_images_are_not_decoded(monkeypatch, run_data):
  config, data = run_data
  decoded = []
  original = decode.image_from_bytes

  def image_from_bytes(content, path):
    decoded.append(pathlib.Path(path).stem)
    return original(content, path)

  monkeypatch.setattr(decode, "image_from_bytes", image_from_bytes)
  parts_of(
    monkeypatch,
    lambda: data_lib.open_eval_stream(config, data, data.validation),
    2,
    1,
  )
  assert sorted(decoded[:2]) == list(data.validation[:2])
  assert sorted(decoded[2:]) == list(data.validation[2:])


def test_checksum_of_parts_is_that_of_the_whole(monkeypatch):
  whole = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  expected = zlib.crc32(whole.tobytes(), zlib.crc32(b"keys"))
  assert checksum.checksum(["keys"], [whole]) == expected
  # Two processes with two devices each, whose rows lie anywhere.
  own = [
    [((slice(4, 6),), whole[4:6]), ((slice(0, 3),), whole[:3])],
    [((slice(6, 7),), whole[6:]), ((slice(3, 4),), whole[3:4])],
  ]
  of_others = []
  monkeypatch.setattr(
    distributed, "gather", lambda x: np.stack([*of_others, x])
  )
  for parts in own:
    shards = [types.SimpleNamespace(index=i, data=x) for i, x in parts]
    array = types.SimpleNamespace(addressable_shards=shards)
    found = checksum._of_split(array, zlib.crc32(b"keys"))
    of_others.append(
      np.asarray(
        [(i[0].start, x.nbytes, zlib.crc32(x.tobytes())) for i, x in parts]
      )
    )
  assert found == expected


# -- Two processes -------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """Two processes of one device: (workdir, what each wrote to stderr)."""
  folder = tmp_path_factory.mktemp("hosts") / "two"
  errors = train(folder, 2, 1)
  return folder / "run", errors


def test_the_first_process_speaks(two):
  workdir, errors = two
  assert "2 process(es)" in errors[0]
  best = max(line.get("eval/miou", -1) for line in lines(workdir))
  assert f"best mIoU {best:.4f}" in errors[0]
  # Progress and log of the other one, but not what its libraries say.
  assert "step" not in errors[1] and "it/s" not in errors[1]
  saved = sorted(int(x.name) for x in (workdir / checkpoint.FOLDER).iterdir())
  assert saved == [4, 8, 12]


def test_two_processes_are_one_on_the_same_data(two, trained_run):
  """One process of one device, in the warm-up."""
  found, expected = lines(two[0]), lines(trained_run.workdir)
  assert [line["step"] for line in found] == list(range(1, 13))
  assert [line["step"] for line in expected] == list(range(2, 13, 2))
  for step in (2, STEPS_PER_EPOCH):
    assert_close(found, expected, step)


@pytest.mark.slow
def test_one_process_of_two_devices_goes_on_bit_by_bit(two):
  """From the end of the warm-up: the semi-supervised steps are the same."""
  workdir, _ = two
  folder = workdir.parent.parent / "one"
  cut_back(workdir, folder / "run", STEPS_PER_EPOCH)
  train(folder, 1, 2)
  assert_same_run(folder / "run", workdir)


def test_error_of_one_process_ends_all(two):
  """Process 1 alone cannot find its list; process 0 waits for it."""
  folder = two[0].parent.parent / "error"
  missing = "--config.dataset.labelled_list=none.txt"
  errors = train(folder, 2, 1, code=1, own=([], [missing]))
  one = errors[1].splitlines()[-1]
  assert one.startswith("error: process 1: ") and "none.txt" in one
  assert errors[0].splitlines()[-1] == one.replace(
    "error: process 1:", "error: ended, since process 1 failed:"
  )


# -- Four processes, and what takes longer -------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ("to_one", "to_all_and_their_workers"))
def test_sigterm_stops_both_processes(two, how):
  """At the same step; the same command goes on to the same end."""
  workdir, _ = two
  folder = workdir.parent.parent / how
  # Worker processes that read files, which must outlive the signal.
  workers = ["--config.input.num_workers=1"] if how != "to_one" else []
  started = start_training(folder, 2, 1, *workers, groups=True)
  metrics = folder / "run" / "metrics.jsonl"
  while not (metrics.exists() and metrics.read_text()):
    assert all(process.poll() is None for process in started)
    time.sleep(0.01)
  if how == "to_one":
    started[1].send_signal(signal.SIGTERM)
  else:
    for process in started:
      os.killpg(process.pid, signal.SIGTERM)
  errors = finish(started, code=75)
  last = [error.splitlines()[-1] for error in errors]
  assert last[0].startswith("error: SIGTERM: stopped after step ")
  assert last[1] == last[0].replace("error: ", "error: process 1: ")
  train(folder, 2, 1)
  assert_same_run(folder / "run", workdir)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
  """Four processes of one device, with the bank split over them, and a page."""
  folder = tmp_path_factory.mktemp("hosts_of_four") / "four"
  run_with_page(folder, 4, 1)
  return folder / "run"


def run_with_page(folder, processes, devices, *arguments, code=0):
  return finish(
    start(
      "u2pl_jax.main",
      processes,
      devices,
      "--config=configs/testing.py",
      f"--workdir={folder}/run",
      f"--config.dataset.root={folder.parent}/data",
      "--config.sharding.memory_bank=classes",
      "--config.checkpoint.keep=3",
      "--config.log.every_steps=1",
      *arguments,
    ),
    code=code,
  )


@pytest.mark.slow
def test_four_processes_are_four_devices(four, trained_run):
  """And one, in the warm-up."""
  found = lines(four)
  for step in (2, STEPS_PER_EPOCH):
    assert_close(found, lines(trained_run.workdir), step)
  folder = four.parent.parent / "one_of_four"
  cut_back(four, folder / "run", STEPS_PER_EPOCH)
  run_with_page(folder, 1, 4)
  # Not bit for bit: gloo adds four numbers in another order.
  expected = lines(folder / "run")
  assert len(found) == len(expected)
  assert_close(found, expected, STEPS_PER_EPOCH + 1)
  assert (four / "report" / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["whole", "sliding_window"])
def test_evaluate_with_four_processes(four, protocol):
  """Scales, flips and boundaries, with a remainder."""
  (four.parent / "list.txt").write_text(
    "\n".join(f"val_{i:06}" for i in (0, 1, 2))
    + "\n"
    + "\n".join(f"train_{i:06}" for i in (0, 1, 2))
  )
  found = []
  for processes, devices in ((4, 1), (1, 4)):
    output = four.parent / f"{protocol}_{processes}"
    finish(
      start(
        "u2pl_jax.evaluate",
        processes,
        devices,
        f"--checkpoint={four}",
        f"--output={output}",
        f"--list={four.parent}/list.txt",
        f"--protocol={protocol}",
        "--window=33,33",
        "--scales=0.5,1.0",
        "--flip",
      )
    )
    with np.load(output / "images.npz") as stored:
      found.append(dict(stored))
  four_of_one, one_of_four = found
  assert four_of_one.keys() == one_of_four.keys()
  for name, value in one_of_four.items():
    np.testing.assert_array_equal(four_of_one[name], value, err_msg=name)


@pytest.mark.slow
def test_goes_on_with_other_devices(two):
  """Two processes of one device -> one of four: rounded in another order."""
  workdir, _ = two
  folder = workdir.parent.parent / "one_of_four_later"
  cut_back(workdir, folder / "run", STEPS_PER_EPOCH)
  train(folder, 1, 4)
  found, expected = lines(folder / "run"), lines(workdir)
  assert len(found) == len(expected)
  assert_close(found, expected, STEPS_PER_EPOCH + 1)


@pytest.mark.slow
def test_image_that_one_process_cannot_read_ends_all(two):
  """In the middle of an epoch, while the other one waits in a collective."""
  workdir, _ = two
  folder = workdir.parent.parent / "broken"
  cut_back(workdir, folder / "run", STEPS_PER_EPOCH)
  images = folder.parent / "data" / "JPEGImages"
  whole = {path: path.read_bytes() for path in images.glob("train*9.png")}
  for path, content in whole.items():
    path.write_bytes(content[:-50])
  try:
    errors = train(folder, 2, 1, code=1)
  finally:
    for path, content in whole.items():
      path.write_bytes(content)
  last = [error.splitlines()[-1] for error in errors]
  assert all(line.startswith("error: ") for line in last)
  assert all("9.png" in line for line in last)
  assert sum("ended, since process" in line for line in last) == 1
