"""How fast a run goes, and how long it takes."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
  """Speed since the last written line, without compilation and evaluation."""

  def __init__(self):
    self._begin = time.perf_counter()
    self.restart()

  def restart(self) -> None:
    """Begins a new line."""
    self._start = time.perf_counter()
    self._waited = 0.0
    self._steps = self._images = 0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time that does not count."""
    start = time.perf_counter()
    yield
    self._start += time.perf_counter() - start

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """Time that counts, and is the input's."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  def count(self, num_images: int) -> None:
    """Counts a step of so many images."""
    self._steps += 1
    self._images += num_images

  def read(self) -> dict[str, float]:
    """All that depends on the clock: the metrics named time/."""
    elapsed = max(time.perf_counter() - self._start, 1e-9)
    return {
      "time/images_per_second": self._images / elapsed,
      "time/seconds_per_step": elapsed / max(self._steps, 1),
      "time/data_wait_share": self._waited / elapsed,
      "time/seconds": time.perf_counter() - self._begin,
    }


def duration(seconds: float) -> str:
  """Seconds as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"
