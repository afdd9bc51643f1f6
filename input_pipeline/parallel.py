"""Long work on many files: a progress bar, and threads."""

import concurrent.futures
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import cv2
import tqdm

# Before the first sign of life, and between lines of a log file.
_SILENT_SECONDS = 0.5
_LOG_SECONDS = 30

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def progress(
  total: int, description: str, unit: str, *, scale: bool = False
) -> tqdm.tqdm:
  """A bar with ETA on stderr; `update(n)` moves it, `close()` ends it.

  Args:
    total: units of work.
    description, unit: such as 'reading' and 'image'.
    scale: write thousands as k, M, G.
  """
  return tqdm.tqdm(
    total=total,
    desc=description,
    unit=unit,
    unit_scale=scale,
    delay=_SILENT_SECONDS,
    mininterval=0.2 if sys.stderr.isatty() else _LOG_SECONDS,
  )


def map_in_threads(
  function: Callable[[_Item], _Result],
  items: Sequence[_Item],
  description: str,
  unit: str,
) -> list[_Result]:
  """[function(item) for item in items], with progress and ETA on stderr.

  Threads suffice where the time goes into reading and decoding, which release
  the interpreter lock.

  Args:
    function: its first exception stops everything.
    items: in the order of the results.
    description, unit: of the progress bar, such as 'reading' and 'image'.
  """
  # OpenCV's own threads would only compete with these.
  cv2.setNumThreads(1)
  # More than cores: some of them wait for the disk, or for a bucket.
  num_threads = 2 * (os.cpu_count() or 1)
  results = []
  with (
    concurrent.futures.ThreadPoolExecutor(num_threads) as executor,
    progress(len(items), description, unit) as bar,
  ):
    for result in executor.map(function, items):
      results.append(result)
      bar.update()
  return results
