"""Shared by all tests: one CPU, a compilation cache, and a trained run."""

import dataclasses
import fcntl
import os
import pathlib

# Before jax is imported anywhere: tests never look for an accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax
import ml_collections
import pytest

from configs import testing
from u2pl_jax.xla_flags import set_xla_flags

# As the trainer: what its commands have compiled the tests find in the cache.
set_xla_flags()
# Unoptimised code takes half as long to compile and twice as long to run, and
# tests compile for minutes what they run for seconds.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

# The files that take longest, longest first: of two processes neither is left
# with one of them when the other has done all the rest. The trajectories wait
# until the first, a single test, has ended: both need some 7 GB.
_LONGEST = (
  "parity/test_x64.py",
  "test_hosts.py",
  "test_devices.py",
  "test_train_loop.py",
  "test_chaos.py",
  "test_bad_records.py",
  "test_sweep.py",
  "test_configs.py",
  "test_evaluate.py",
  "test_schedules.py",
  "parity/test_trajectory.py",
  "test_train_step.py",
  "test_weights.py",
  "parity/test_golden.py",
  "test_sinks.py",
)


def pytest_collection_modifyitems(config, items):
  """Several processes begin with the longest files."""
  # One keeps the order of the alphabet, in which a file is found again.
  if not _shares_the_session(config):
    return
  folder = pathlib.Path(__file__).parent
  rank = {folder / name: place for place, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: rank.get(item.path, len(rank)))


def _shares_the_session(config):
  """Whether this is one of several processes."""
  # Not by the environment: a session that a test starts inherits it.
  return hasattr(config, "workerinput")


def _session_folder(config, tmp_path_factory):
  """Temporary folder that the processes of a session share."""
  folder = tmp_path_factory.getbasetemp()
  return folder.parent if _shares_the_session(config) else folder


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(pytestconfig, tmp_path_factory):
  """Programs that several tests compile are compiled once.

  Subprocesses of the tests share it through the environment, later sessions
  through its place.
  """
  session = _session_folder(pytestconfig, tmp_path_factory)
  path = str(session.parent / "jax-cache")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = path
  jax.config.update("jax_compilation_cache_dir", path)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
  """A finished run of `configs/testing.py`; its files must not be changed."""

  config: ml_collections.ConfigDict
  data: pathlib.Path
  workdir: pathlib.Path


@pytest.fixture(scope="session")
def trained_run(pytestconfig, tmp_path_factory):
  """Three epochs of 'shapes', the last two semi-supervised."""
  from u2pl_jax import train

  folder = _session_folder(pytestconfig, tmp_path_factory) / "trained"
  folder.mkdir(exist_ok=True)
  config = testing.get_config()
  config.dataset.root = str(folder / "data")
  with (folder / "lock").open("w") as lock:
    # The first process to want it trains; another one waits.
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / "done").exists():
      train.train_and_evaluate(config, folder / "run")
      (folder / "done").touch()
  return TrainedRun(config, folder / "data", folder / "run")
