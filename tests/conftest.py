"""Shared by all tests: one CPU, and a compilation cache for the session."""

import os

# Before jax is imported anywhere: tests never look for an accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Programs that several tests compile are compiled once.

  Subprocesses of the tests share it through the environment.
  """
  path = str(tmp_path_factory.getbasetemp().parent / "jax-cache")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = path
  jax.config.update("jax_compilation_cache_dir", path)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
