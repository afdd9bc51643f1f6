"""Shared by all tests: one CPU, a compilation cache, and a trained run."""

import dataclasses
import os
import pathlib

# Before jax is imported anywhere: tests never look for an accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax
import ml_collections
import pytest

from configs import testing


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Programs that several tests compile are compiled once.

  Subprocesses of the tests share it through the environment.
  """
  path = str(tmp_path_factory.getbasetemp().parent / "jax-cache")
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
def trained_run(tmp_path_factory):
  """Three epochs of 'shapes', the last two semi-supervised."""
  from u2pl_jax import train

  folder = tmp_path_factory.mktemp("trained")
  config = testing.get_config()
  config.dataset.root = str(folder / "data")
  train.train_and_evaluate(config, folder / "run")
  return TrainedRun(config, folder / "data", folder / "run")
