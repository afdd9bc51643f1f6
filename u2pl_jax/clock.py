"""How fast a run goes, how long it takes, and whether it waits for data."""

import contextlib
import time
from collections.abc import Iterator

# Share of the time that the device may wait for images. A fifth: workers are
# cheaper than that.
DATA_WAIT_LIMIT = 0.2
DATA_WAIT_ADVICE = (
  "Raise config.input.num_workers (PNG) or num_threads (JPEG), and prefetch if"
  " the reads are uneven; keep the data on a local disk, or write shards with"
  " scripts/write_tfds.py; docs/input_speed.md has the numbers."
)
# A warning at every line would bury the lines.
_LINES_BETWEEN_WARNINGS = 20


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


class StallWarning:
  """Decides which lines of a run come with a warning about slow input."""

  def __init__(self):
    self._quiet_lines = 0

  def stream_opens(self) -> None:
    """The readers start: the next line says nothing about their speed."""
    self._quiet_lines = max(self._quiet_lines, 1)

  def of_line(self, data_wait_share: float) -> str | None:
    """The warning that belongs to the next line of the log, if any.

    Args:
      data_wait_share: of the time since the line before.

    Returns:
      One line, or None: the share is within DATA_WAIT_LIMIT, or one of the
      last lines had a warning.
    """
    if self._quiet_lines:
      self._quiet_lines -= 1
      return None
    if data_wait_share <= DATA_WAIT_LIMIT:
      return None
    self._quiet_lines = _LINES_BETWEEN_WARNINGS
    return (
      f"slow input: {data_wait_share:.0%} of the time since the last line the"
      f" device had no images to work on. {DATA_WAIT_ADVICE}"
    )


def duration(seconds: float) -> str:
  """Seconds as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}"
