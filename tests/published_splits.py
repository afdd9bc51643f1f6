"""The published labelled lists, for tests: membership bits over sorted ids."""

import functools
import pathlib

import numpy as np

_PATH = pathlib.Path(__file__).with_name("published_splits.npz")


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
  with np.load(_PATH) as file:
    return dict(file)


def names(dataset: str) -> list[str]:
  """Such as 'u2pl/1464' of 'voc' or 'unimatch/1_16' of 'cityscapes'."""
  prefix = f"{dataset}/"
  found = {name.removeprefix(prefix) for name in _arrays() if prefix in name}
  return sorted(found - {"ids"})


@functools.cache
def read(dataset: str, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """(labelled, unlabelled) ids of a published split, sorted."""
  ids = _arrays()[f"{dataset}/ids"].tobytes().decode().split("\n")
  bits = np.unpackbits(_arrays()[f"{dataset}/{name}"])[: len(ids)]
  pairs = list(zip(ids, bits, strict=True))
  return (
    tuple(id for id, bit in pairs if bit),
    tuple(id for id, bit in pairs if not bit),
  )
