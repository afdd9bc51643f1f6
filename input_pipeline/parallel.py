"""Long work: a progress bar, a clock, and threads for many files."""

import collections
import concurrent.futures
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import cv2
import tqdm

# Before the first sign of life, and between lines of a log file.
_SILENT_SECONDS = 0.5
_LOG_SECONDS = 30

# Of several processes that do the same only one shows it.
_is_shown = True

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def show_no_progress() -> None:
  """From now on no bar of this process is shown."""
  global _is_shown
  _is_shown = False


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
    disable=not _is_shown,
  )


@contextlib.contextmanager
def elapsed(what: str) -> Iterator[None]:
  """Says on stderr what goes on and, on a terminal, for how long."""
  begin, done = time.monotonic(), threading.Event()
  print(f"{what} ...", end="", file=sys.stderr, flush=True)

  def tick():
    while not done.wait(1):
      print(
        f"\r{what} ... {time.monotonic() - begin:.0f} s",
        end="",
        file=sys.stderr,
        flush=True,
      )

  ticker = threading.Thread(target=tick, daemon=True)
  if sys.stderr.isatty():
    ticker.start()
  try:
    yield
  finally:
    done.set()
    if ticker.is_alive():
      ticker.join()
      print(f"\r{what} ...", end="", file=sys.stderr)
    print(f" {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


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


def map_ahead(
  function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
  """Yields function(item) in order, computed by threads a little ahead.

  Unlike `map_in_threads` never more than `ahead` results wait to be taken:
  they may be large.

  Args:
    function: its first exception is raised where its result is due.
    items: also an endless one.
    ahead: results that are computed or kept at a time, at least 1.
  """
  cv2.setNumThreads(1)
  num_threads = min(ahead, 2 * (os.cpu_count() or 1))
  waiting: collections.deque[concurrent.futures.Future] = collections.deque()
  executor = concurrent.futures.ThreadPoolExecutor(num_threads)
  try:
    for item in items:
      waiting.append(executor.submit(function, item))
      if len(waiting) == ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    # The caller may have had enough, or one function may have failed.
    executor.shutdown(cancel_futures=True)
