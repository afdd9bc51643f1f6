"""The same work on many files, in threads, with a progress bar."""

import concurrent.futures
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import cv2
import tqdm

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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
  executor = concurrent.futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1))
  try:
    return list(
      tqdm.tqdm(
        executor.map(function, items),
        total=len(items),
        desc=description,
        unit=unit,
        # Lines of a log file are few.
        mininterval=0.2 if sys.stderr.isatty() else 30,
      )
    )
  finally:
    executor.shutdown(cancel_futures=True)
