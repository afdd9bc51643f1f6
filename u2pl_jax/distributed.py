"""Several processes, on one machine or on many, that train together.

Who starts them says so: SLURM by its variables, a TPU pod by jax's own
detection, anybody else by flags. Afterwards all processes run the same program
in step; what they must agree on besides, and how one that fails ends the
others, is here too. With one process nothing here does anything.
"""

import contextlib
import glob
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import cloud_tpu_init
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from input_pipeline import ConfigError, parallel

# Seconds. Nodes of a job may boot minutes apart.
START_TIMEOUT = 300
# After this much silence jax takes a process for dead and ends the others.
HEARTBEAT_TIMEOUT = 100
# A barrier is no place to notice that: process 0 may draw for a long time.
_BARRIER_TIMEOUT = 24 * 3600
# Between two looks for the failure of another process, how long one that fails
# waits until the others have seen it, and what an announced exit still takes.
_POLL, _GRACE, _EXIT = 0.5, 10, 0.5

# Exit codes that all processes end with: after a signal that all agreed upon.
_IN_ORDER = (0, None, os.EX_TEMPFAIL)

_FAILURE, _SEEN = "u2pl_jax/failure", "u2pl_jax/seen/"
_TPU_FIX = (
  "give --coordinator, --num_processes and --process_id, or --num_processes=1"
  " for this process alone"
)

_counter = itertools.count()
# Whoever ends the process never gives it back: the thread that fails, or the
# one that finds the failure of another process.
_ending = threading.Lock()


def initialize(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: float = START_TIMEOUT,
) -> None:
  """Joins the processes of the run; call it before any other use of jax.

  In this order:
  1. the arguments, if they are given;
  2. SLURM, if `srun` started more than one task;
  3. a TPU pod, if this is a TPU machine;
  4. otherwise this process is alone.

  Args:
    coordinator: host:port of process 0.
    num_processes: of the run; 1 alone means this process, whoever started it.
    process_id: in 0 ... num_processes - 1.
    timeout: seconds to wait for the others. After it the program ends with one
      line.

  Raises:
    ConfigError: the arguments or SLURM's variables cannot work, the coordinator
      is not reachable, or the processes differ in their devices.
  """
  if num_processes == 1 and coordinator is None and not process_id:
    return
  given = {
    "--coordinator": coordinator,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  if any(value is not None for value in given.values()):
    _check_arguments(given)
    _join(
      coordinator,
      num_processes,
      process_id,
      timeout=timeout,
      fix="start all of them with the same --coordinator and --num_processes",
    )
  elif (slurm := slurm_task(os.environ)) is not None:
    _join(
      *slurm[:3],
      local_device_ids=slurm[3],
      timeout=timeout,
      fix="see the logs of the other tasks; another port: JAX_COORDINATOR_PORT",
    )
  elif cloud_tpu_init.running_in_cloud_tpu_vm:
    _join_pod(timeout)
  else:
    return
  if jax.default_backend() == "cpu":
    # There the processes look for their programs under different names, so that
    # one runs a stored program and another a new one, whose collectives come in
    # another order: gloo aborts.
    jax.config.update("jax_enable_compilation_cache", False)
  counts = np.bincount([device.process_index for device in jax.devices()])
  if counts.min() < counts.max():
    few, many = int(counts.argmin()), int(counts.argmax())
    raise ConfigError(
      f"process {few} has {counts[few]} devices and process {many} has"
      f" {counts[many]}: all must have the same number"
    )
  if jax.process_index() > 0:
    parallel.show_no_progress()


def slurm_task(
  variables: Mapping[str, str],
) -> tuple[str, int, int, list[int] | None] | None:
  """What SLURM's variables say of this process.

  jax's own reading of them gives every task one GPU, also where the task has
  several.

  Args:
    variables: of the environment.

  Returns:
    (coordinator, number of processes, process, GPUs among the visible ones or
    None for all); None if this is no task of several.

  Raises:
    ConfigError: the job has several tasks, but `srun` did not start this
      process; or the GPUs do not divide over the tasks of a node.
  """
  if "SLURM_JOB_ID" not in variables:
    return None
  num_tasks = int(variables.get("SLURM_NTASKS", 1))
  if "SLURM_STEP_NODELIST" not in variables:
    if num_tasks == 1:
      return None
    raise ConfigError(
      f"SLURM job {variables['SLURM_JOB_ID']} has {num_tasks} tasks, but this"
      " process is none of them: put srun before the command, or add"
      " --num_processes=1 for this process alone"
    )
  num_tasks = int(variables.get("SLURM_STEP_NUM_TASKS", num_tasks))
  if num_tasks == 1:
    return None
  # As jax does: the same for all tasks of a job, rarely for two jobs of a node.
  port = 61440 + int(variables["SLURM_JOB_ID"]) % 4096
  port = variables.get("JAX_COORDINATOR_PORT", port)
  host = first_host(variables["SLURM_STEP_NODELIST"])
  return (
    f"{host}:{port}",
    num_tasks,
    int(variables["SLURM_PROCID"]),
    _slurm_gpus(variables),
  )


def first_host(nodes: str) -> str:
  """The first of SLURM's list of nodes: 'gpu[007-9,12]-a,x' -> 'gpu007-a'."""
  host = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
  return re.sub(r"\[(\w+)[^\]]*\]", r"\1", host)


def _slurm_gpus(variables: Mapping[str, str]) -> list[int] | None:
  """The share of this task in the GPUs that it can see; None for all.

  With --gpus-per-task a task sees only its own; with --gpus-per-node it sees
  those of all tasks of the node.
  """
  if "SLURM_GPUS_PER_TASK" in variables:
    return None
  # '4(x2),3': how many tasks each node has.
  per_node = []
  for part in variables.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
    count, _, times = part.rstrip(")").partition("(x")
    per_node += [int(count)] * int(times or 1)
  num_tasks = per_node[int(variables.get("SLURM_NODEID", 0)) % len(per_node)]
  visible = variables.get("CUDA_VISIBLE_DEVICES") or variables.get(
    "ROCR_VISIBLE_DEVICES"
  )
  if visible is None:
    num_gpus = len(glob.glob("/dev/nvidia[0-9]*"))
  else:
    num_gpus = len(visible.split(","))
  if num_tasks == 1 or num_gpus < num_tasks:
    return None  # Fewer than tasks: bound to them by --gpu-bind.
  if num_gpus % num_tasks:
    raise ConfigError(
      f"SLURM: the {num_gpus} GPUs of this node do not divide over its"
      f" {num_tasks} tasks: set --gpus-per-task, or another --ntasks-per-node"
    )
  share = num_gpus // num_tasks
  first = int(variables["SLURM_LOCALID"]) * share
  return list(range(first, first + share))


def _check_arguments(given: Mapping[str, str | int | None]) -> None:
  missing = [name for name, value in given.items() if value is None]
  if missing:
    raise ConfigError(
      f"{' and '.join(missing)} missing: several processes need --coordinator,"
      " --num_processes and --process_id, as in"
      " --coordinator=host0:8476 --num_processes=2 --process_id=0"
    )
  address, count, process = given.values()
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ConfigError(
      f"--coordinator={address}: needs host:port of process 0, such as"
      " host0:8476"
    )
  if not 0 <= process < count:
    raise ConfigError(
      f"--process_id={process}: must be between 0 and --num_processes - 1,"
      f" {count - 1}"
    )


def _join(
  coordinator: str,
  num_processes: int,
  process_id: int,
  *,
  timeout: float,
  fix: str,
  local_device_ids: list[int] | None = None,
) -> None:
  end = time.monotonic() + timeout
  if process_id > 0:
    _wait_for_coordinator(coordinator, end, timeout)
  late = (
    f"not all of the {num_processes} processes came to {coordinator} within"
    f" {timeout:g} s: {fix}"
  )
  try:
    with _ending_at(end, late):
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids=local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout) + 60,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
      )
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f"process {process_id} of {num_processes} cannot join at {coordinator}"
      f" ({_first_line(error)}): {fix}"
    ) from error


def _join_pod(timeout: float) -> None:
  late = (
    f"the hosts of the TPU pod did not find each other within {timeout:g} s:"
    f" start the same command on all of them, or {_TPU_FIX}"
  )
  try:
    with _ending_at(time.monotonic() + timeout, late):
      jax.distributed.initialize(
        initialization_timeout=int(timeout) + 60,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
      )
  except Exception as error:  # Its detection asks the network, in many ways.
    raise ConfigError(
      f"this is a TPU machine, but not of a pod that jax knows"
      f" ({_first_line(error)}): {_TPU_FIX}"
    ) from error


def _wait_for_coordinator(address: str, end: float, timeout: float) -> None:
  """Returns once somebody listens there: jax would abort, not raise."""
  host, _, port = address.rpartition(":")
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), 5).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise ConfigError(
          f"the coordinator {address} is not reachable within {timeout:g} s"
          f" ({error.strerror or error}): start process 0 on that host, and see"
          " that its port is open"
        ) from None
    time.sleep(0.5)


@contextlib.contextmanager
def _ending_at(end: float, message: str) -> Iterator[None]:
  """Within, at a time: ends the program with one line.

  jax waits in C++, which nothing can interrupt, and then aborts.
  """

  def end_program() -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)

  timer = threading.Timer(max(0.0, end - time.monotonic()), end_program)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


# -- Together ------------------------------------------------------------------


def wait_for_all() -> None:
  """Returns when every process has come here, however long one takes."""
  if jax.process_count() > 1:
    _client().wait_at_barrier(
      f"u2pl_jax/{next(_counter)}", _BARRIER_TIMEOUT * 1000
    )


def compile_together(function: Callable, *args: Any) -> None:
  """Compiles for a first call; returns when all processes have done so.

  The call itself would begin as soon as this process is ready, and end the
  others if one takes longer, say because it finds nothing in its cache: on CPUs
  a collective waits for 40 s.

  Args:
    function: jitted.
    args: of the call that follows.
  """
  if jax.process_count() > 1:
    function.lower(*args).compile()
    wait_for_all()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
  """The processes run the block one after another, process 0 first."""
  for _ in range(jax.process_index()):
    wait_for_all()
  yield
  for _ in range(jax.process_count() - jax.process_index()):
    wait_for_all()


def gather(array: np.ndarray) -> np.ndarray:
  """[...] of each process, same shape and type -> [processes, ...] on all."""
  array = np.ascontiguousarray(array)
  if jax.process_count() == 1:
    return array[None]
  # First a barrier: collectives have timeouts of their own.
  wait_for_all()
  # As bytes: jax has no 64 bits.
  own = array.reshape(-1).view(np.uint8)
  parts = np.ascontiguousarray(multihost_utils.process_allgather(own))
  return parts.view(array.dtype).reshape(-1, *array.shape)


def share(text: str, *, source: int = 0) -> str:
  """The text of process `source`, on every process."""
  if jax.process_count() == 1:
    return text
  key = f"u2pl_jax/{next(_counter)}"
  if jax.process_index() == source:
    _client().key_value_set(key, text)
  return _client().blocking_key_value_get(key, _BARRIER_TIMEOUT * 1000)


def first_problem(problem: str) -> str:
  """What went wrong on the first process that has a problem; '' if none has."""
  has_problem = gather(np.asarray(bool(problem)))
  if not has_problem.any():
    return ""
  source = int(has_problem.argmax())
  return share(error_prefix() + problem, source=source)


def check_equal(digest: str, message: str) -> None:
  """Raises unless all processes call it with the same digest.

  Args:
    digest: hexadecimal, of one length.
    message: of the ConfigError; begins after 'process 3 has '.

  Raises:
    ConfigError: on all processes, names the first one that differs.
  """
  digests = gather(np.frombuffer(digest.encode(), np.uint8))
  differing = np.flatnonzero((digests != digests[0]).any(1))
  if differing.size:
    raise ConfigError(f"process {differing[0]} has {message}")


# -- One ends, all end ---------------------------------------------------------


@contextlib.contextmanager
def end_together() -> Iterator[None]:
  """An exception that leaves the block of one process ends all processes.

  Without it the others would wait in a collective for one that does not come.
  The others print its first line; all exit with its code, without clean-up.
  jax alone would notice no earlier than at the end of its timeouts.
  """
  if jax.process_count() == 1:
    yield
    return
  done = threading.Event()
  threading.Thread(target=_watch, args=(done,), daemon=True).start()
  try:
    yield
  except BaseException as error:
    if not isinstance(error, SystemExit) or error.code not in _IN_ORDER:
      done.set()
      _end(error)
    raise
  finally:
    done.set()


def error_prefix() -> str:
  """'process 3: ' in front of an error, '' on process 0."""
  index = jax.process_index()
  return f"process {index}: " if index else ""


def _end(error: BaseException) -> None:
  """Ends this process, and the others, after an exception of its own."""
  _ending.acquire()
  cause, code = error, 1
  if isinstance(error, SystemExit):
    # Somebody has printed what happened, and exits while he handles it.
    cause = error.__context__ or error
    code = error.code if isinstance(error.code, int) else 1
  else:
    traceback.print_exc()
    if isinstance(error, jax.errors.JaxRuntimeError):
      print(
        f"error: {error_prefix()}the devices or a collective failed, perhaps"
        " because another process was killed: run the same command again; it"
        " goes on from the last checkpoint",
        file=sys.stderr,
      )
  failure = {
    "process": jax.process_index(),
    "code": code,
    "message": _first_line(cause)
    if cause is error
    else " ".join(str(cause).split()),
  }
  client = _client()
  was_first = True
  try:
    client.key_value_set(_FAILURE, json.dumps(failure))
  except RuntimeError:
    # Of several failures the first one counts: a key is set once.
    was_first = False
    with contextlib.suppress(RuntimeError):
      first = _failure(client)
      if first is not None:
        code = _print_failure(first)
  _leave(client, code, was_first=was_first)


def _watch(done: threading.Event) -> None:
  """Ends this process when another one has failed."""
  client = _client()
  while not done.wait(_POLL):
    try:
      failure = _failure(client)
    except RuntimeError:
      return  # The coordinator is gone: jax ends this process.
    if failure is None:
      continue
    if failure["process"] == jax.process_index():
      return
    _ending.acquire()
    _leave(client, _print_failure(failure), was_first=False)


def _failure(client) -> dict[str, Any] | None:
  """What the first process that failed has said of it."""
  # A folder that does not exist is no error, as a missing key is.
  found = dict(client.key_value_dir_get(_FAILURE.rpartition("/")[0]))
  return json.loads(found[_FAILURE]) if _FAILURE in found else None


def _print_failure(failure: dict[str, Any]) -> int:
  """Says why this process ends; returns the code to end with."""
  print(
    f"error: {error_prefix()}ended, since process {failure['process']}"
    f" failed: {failure['message']}",
    file=sys.stderr,
  )
  return failure["code"]


def _wait_for_others(client) -> None:
  """Until all of them have announced their exit, or _GRACE is over."""
  end = time.monotonic() + _GRACE
  with contextlib.suppress(RuntimeError):
    for index in range(jax.process_count()):
      if index != jax.process_index():
        left = max(1, int(1000 * (end - time.monotonic())))
        client.blocking_key_value_get(f"{_SEEN}{index}", left)


def _leave(client, code: int, *, was_first: bool) -> None:
  """Announces the exit of this process, and exits."""
  keeps_the_keys = jax.process_index() == 0
  if was_first and not keeps_the_keys:
    # Once it is gone, a collective of the others may fail before they look.
    _wait_for_others(client)
  with contextlib.suppress(RuntimeError):
    client.key_value_set(f"{_SEEN}{jax.process_index()}", "")
  if keeps_the_keys:
    # jax aborts whoever is still there when the keys are gone.
    _wait_for_others(client)
    time.sleep(_EXIT)
  _exit(code)


def _exit(code: int) -> None:
  # Not sys.exit: jax would wait at exit for processes that do not come.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _client():
  # multihost_utils has no barrier without a collective, and no way to tell.
  return jax_distributed.global_state.client


def _first_line(error: BaseException) -> str:
  text = str(error).strip().splitlines()
  return f"{type(error).__name__}: {text[0][:200] if text else ''}"
