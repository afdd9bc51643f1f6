"""SIGTERM: what a cluster sends some seconds before it takes the machine away.

The loop asks between steps, and between the batches of an evaluation, whether
to stop. A thread watches over it, since the main one may be inside a
compilation when the signal comes: with nothing to save it ends the process at
once, otherwise at the latest after GRACE_SECONDS. That may be done at any
moment, because a run survives SIGKILL at any moment; it costs the steps since
the last checkpoint, not the result.

Several processes stop together, at the step that JAX's preemption service finds
for them: it takes the signal over, and the thread then has nothing to do.

Imports JAX only when asked, so that the first second of a process is covered.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: run the same command again.
EXIT_CODE = 75
# From the signal to the begin of the save, or to the end without one.
GRACE_SECONDS = 25.0
_POLL_SECONDS = 0.1


class Preempted(Exception):
  """One line: where the run stopped and how to go on."""


class Preemption:
  """Whether this run has been asked to stop.

  Hears of no signal before `install`; without it, as in a test, a run goes on
  to its end.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._signalled = self._reached = self._stopped = False
    self._saving = False
    self._checks = 0
    # What the process does while there is nothing to save; None while there is.
    self._idle: str | None = "while the run was starting"

  def install(self) -> None:
    """Takes SIGTERM over, for the rest of the process; main thread only."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Written to by the C handler, whatever the main thread is in.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _ignore_interrupts)
    # A worker process that is terminated would write into the same pipe.
    os.register_at_fork(
      before=_hold_back, after_in_parent=_let_through, after_in_child=_forget
    )
    threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

  def reached(self) -> bool:
    """Whether to stop here or has been before; the same on every process.

    Every process must call it equally often.
    """
    import jax
    from jax.experimental import multihost_utils

    self._checks += 1
    if jax.process_count() == 1:
      self._reached = self._signalled
    elif not self._reached:
      # True at the one check that all processes agree on.
      self._reached = multihost_utils.reached_preemption_sync_point(
        self._checks
      )
    return self._reached

  def check(self, *_: Any) -> None:
    """Raises Preempted if `reached`; takes arguments to be a callback."""
    if self.reached():
      raise Preempted("SIGTERM")

  def hold(self) -> None:
    """From now on there are updates that no checkpoint has."""
    with self._lock:
      self._idle = None

  def release(self, doing: str) -> None:
    """From now on every update is saved.

    Args:
      doing: 'while ...' for the last line of the process.
    """
    with self._lock:
      self._idle = doing

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """A save is not cut short: it takes what the disk needs."""
    with self._lock:
      self._saving = True
    try:
      yield
    finally:
      with self._lock:
        self._saving = False
        self._stopped = True

  def _watch(self, reader: int) -> None:
    while signal.SIGTERM not in os.read(reader, 64):
      pass
    with self._lock:
      self._signalled = True
      if self._idle is not None:
        _leave(
          f"SIGTERM {self._idle}: nothing is lost; run the same command again"
          " to go on"
        )
    logger.info("SIGTERM: stopping after this step")
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
      time.sleep(_POLL_SECONDS)
      if time.monotonic() < deadline:
        continue
      with self._lock:
        if self._stopped:
          os._exit(EXIT_CODE)  # The main thread has said all there is to say.
        if not self._saving:
          _leave(
            f"SIGTERM: the step did not end within {GRACE_SECONDS:g} s, so what"
            " came after the last checkpoint will be done again; run the same"
            " command again to go on"
          )


def _leave(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr, flush=True)
  os._exit(EXIT_CODE)


def _ignore_interrupts(*_: Any) -> None:
  # One that follows, as of a sweep that ends too, would break off the save.
  signal.signal(signal.SIGINT, signal.SIG_IGN)


def _hold_back() -> None:
  signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))


def _let_through() -> None:
  signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


def _forget() -> None:
  signal.set_wakeup_fd(-1)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  _let_through()
