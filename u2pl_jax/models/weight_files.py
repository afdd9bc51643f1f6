"""Files of weights: torch's .pth, and .npz under the published names.

Reading is safe: nothing of what a file holds is run. A .pth needs torch, which
nothing else here imports.
"""

import contextlib
import ctypes
import dataclasses
import mmap
import os
import pathlib
import pickle
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping

import numpy as np

# In the order in which they are chosen: the teacher is what the published code
# evaluates. 'state_dict' and the rest hold one network.
_NETWORKS = {"teacher": ("teacher_state",), "student": ("model_state",)}
_SINGLE = ("state_dict", "model", "network")


class WeightsError(ValueError):
  """A file of weights that cannot be used; one line that names it."""


@dataclasses.dataclass(frozen=True)
class WeightFile:
  """Contents of a file.

  Attributes:
    tensors: in torch's layout, without wrapper prefixes ('module.').
    network: which of several in the file, or 'the only one'.
    others: what else the file holds, e.g. 'epoch', 'optimizer_state'.
  """

  tensors: dict[str, np.ndarray]
  network: str
  others: tuple[str, ...] = ()


def read_weights(
  path: str | os.PathLike, *, network: str | None = None
) -> WeightFile:
  """Reads a .npz, or anything else as a file of torch.save.

  Args:
    path: of the file.
    network: 'teacher' or 'student' of a checkpoint that holds both; None takes
      the teacher, as the published evaluation does.

  Raises:
    WeightsError: the file is missing, unreadable, damaged, holds anything but
      tensors and plain values, or has no such network.
  """
  path = pathlib.Path(path)
  try:
    if path.is_dir():
      raise WeightsError(f"{path}: is a directory, not a file of weights")
    with open(path, "rb") as file:
      start = file.read(2)
  except FileNotFoundError:
    raise WeightsError(f"{path}: there is no such file") from None
  except OSError as error:
    raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
  if not start:
    raise WeightsError(f"{path}: the file is empty")
  if path.suffix == ".npz":
    if network not in (None, "teacher"):
      raise WeightsError(f"{path}: a .npz holds one network, not a student")
    return WeightFile(_read_npz(path), "the only one")
  content = _read_torch(path)
  return _choose(path, content, network)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with np.load(path, allow_pickle=False) as archive:
      return {name: archive[name] for name in archive.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    text = " ".join(str(error).split())
    raise WeightsError(f"{path}: not a readable .npz file ({text})") from error


def _import_torch(path: pathlib.Path):
  try:
    import torch
  except ImportError:
    raise WeightsError(
      f"{path}: files of torch need torch, which is not installed: pip install"
      " torch==2.13.0, or convert the file elsewhere with"
      " scripts/convert_weights.py"
    ) from None
  return torch


def _numpy_globals() -> list:
  """What a pickled numpy scalar (best_miou) names, under old and new names."""
  from numpy._core import multiarray

  floats = (np.float64, np.float32, np.int64, np.int32, np.bool_)
  return [
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    (multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(t)) for t in floats),
  ]


def _read_torch(path: pathlib.Path) -> object:
  torch = _import_torch(path)
  try:
    with (
      torch.serialization.safe_globals(_numpy_globals()),
      warnings.catch_warnings(),
    ):
      # Of pickles by another program than torch.save: it fails or it does not.
      warnings.simplefilter("ignore", UserWarning)
      # Mapped: pages are read as they are converted. Older files cannot be.
      return torch.load(
        path,
        map_location="cpu",
        weights_only=True,
        mmap=zipfile.is_zipfile(path),
      )
  except pickle.UnpicklingError as error:
    named = re.search(
      r"(?:Unsupported (?:global|class)[^A-Za-z]*(?:GLOBAL )?|GLOBAL )"
      r"([\w.]+)",
      str(error),
    )
    if named:
      raise WeightsError(
        f"{path}: refused: it holds {named[1]}, and reading anything but"
        " tensors and numbers could run code; save its state_dict alone"
      ) from error
    raise _damaged(path) from error
  except RuntimeError as error:
    # What torch's reader says of archives, up to its advice for developers.
    raise _damaged(path, str(error).split(". ")[0]) from error
  except (EOFError, OSError, ValueError, KeyError) as error:
    raise _damaged(path) from error


def _damaged(path: pathlib.Path, detail: str = "") -> WeightsError:
  detail = f" ({' '.join(detail.split())})" if detail else ""
  return WeightsError(
    f"{path}: not a file of torch.save, or damaged{detail}: download or copy it"
    " again"
  )


def _is_state(value: object) -> bool:
  return isinstance(value, Mapping) and any(
    hasattr(v, "detach") for v in value.values()
  )


def _choose(
  path: pathlib.Path, content: object, network: str | None
) -> WeightFile:
  """The wanted network of a checkpoint, as arrays."""
  if not isinstance(content, Mapping):
    raise WeightsError(
      f"{path}: holds a {type(content).__name__}, not a state dict"
    )
  found = {
    name: key
    for name, keys in _NETWORKS.items()
    for key in keys
    if _is_state(content.get(key))
  }
  if found:
    chosen = network or next(iter(found))
    if chosen not in found:
      raise WeightsError(f"{path}: has no {chosen}, only {', '.join(found)}")
    key = found[chosen]
    state, label = content[key], f"{chosen} ({key})"
  else:
    if network is not None:
      raise WeightsError(f"{path}: holds one network, no {network} beside it")
    key = next((k for k in _SINGLE if _is_state(content.get(k))), None)
    state, label = (content[key], key) if key else (content, "the only one")
    if not _is_state(state):
      raise WeightsError(
        f"{path}: no state dict in it, only {sorted(map(str, content))[:8]}"
      )
  others = tuple(str(k) for k in content if state is not content and k != key)
  tensors = {}
  for name, value in state.items():
    if not hasattr(value, "detach"):
      others += (str(name),)
      continue
    name = re.sub(r"^(module\.)+", "", str(name))
    if name in tensors:
      raise WeightsError(f"{path}: {name} is there with and without 'module.'")
    tensors[name] = _to_numpy(value)
  return WeightFile(tensors, label, others)


def _to_numpy(tensor) -> np.ndarray:
  tensor = tensor.detach()
  if str(tensor.dtype) == "torch.bfloat16":
    tensor = tensor.float()  # Exact; numpy has no such type.
  return tensor.numpy()


def release(array: np.ndarray) -> None:
  """Advises the system that the memory of a mapped tensor can be taken back.

  What a file of weights needs is then one tensor at a time instead of the file.
  Only advice: contents stay what they are, wherever they are.
  """
  if not sys.platform.startswith("linux") or not array.nbytes:
    return
  address = array.ctypes.data
  start = address // mmap.PAGESIZE * mmap.PAGESIZE
  pageout = 21  # MADV_PAGEOUT of Linux 5.4; older ones refuse it.
  ctypes.CDLL(None).madvise(
    ctypes.c_void_p(start),
    ctypes.c_size_t(address + array.nbytes - start),
    pageout,
  )


# -- Writing -------------------------------------------------------------------


def write_npz(
  path: str | os.PathLike, tensors: Mapping[str, np.ndarray], *, force: bool
) -> None:
  """Writes the arrays whole or not at all.

  Raises:
    WeightsError: the destination exists and `force` is not set, or cannot be
      written; what was there is untouched.
  """
  with _replacing(path, force=force) as temporary:
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
      # As np.savez, which takes names as keyword arguments only.
      for name, value in tensors.items():
        # torch's int64 scalars and the like stay what they are.
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
          np.lib.format.write_array(
            member, np.asanyarray(value), allow_pickle=False
          )
        release(value)


def write_torch(
  path: str | os.PathLike, tensors: Mapping[str, np.ndarray], *, force: bool
) -> None:
  """Writes a plain state dict for torch.load; errors as `write_npz`."""
  torch = _import_torch(pathlib.Path(path))
  state = {
    # Copied: torch wants to own writable memory.
    name: torch.from_numpy(np.array(value))
    for name, value in tensors.items()
  }
  with _replacing(path, force=force) as temporary:
    torch.save(state, temporary)


def check_destination(path: str | os.PathLike, *, force: bool) -> None:
  """Raises WeightsError if the file could not be written."""
  path = pathlib.Path(path)
  if path.is_dir():
    raise WeightsError(f"{path}: is a directory: name a file to write")
  if path.exists() and not force:
    raise WeightsError(f"{path}: exists: add --force to replace it")
  if not path.absolute().parent.is_dir():
    raise WeightsError(f"{path}: its folder does not exist: make it first")


@contextlib.contextmanager
def _replacing(path: str | os.PathLike, *, force: bool):
  """Yields a file beside `path` that takes its place if all went well."""
  path = pathlib.Path(path)
  check_destination(path, force=force)
  temporary = None
  try:
    try:
      handle, name = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent
      )
      temporary = pathlib.Path(name)
      with os.fdopen(handle, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      os.chmod(temporary, 0o666 & ~_umask())
      os.replace(temporary, path)
      temporary = None
    finally:
      if temporary is not None:
        temporary.unlink(missing_ok=True)
  except OSError as error:
    text = error.strerror or error
    raise WeightsError(f"{path}: could not be written: {text}") from error
  except RuntimeError as error:
    # All that torch's writer says of a full disk is where it stopped.
    raise WeightsError(
      f"{path}: could not be written whole: is the disk full?"
      f" ({' '.join(str(error).split())})"
    ) from error


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
