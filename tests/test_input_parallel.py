import threading
import time

import pytest

from input_pipeline import parallel


def test_results_are_in_the_order_of_the_items():
  def slow_first(i):
    time.sleep(0.05 * (i == 0))
    return i, threading.current_thread().name

  results = parallel.map_in_threads(slow_first, range(20), "looking", "image")
  assert [i for i, _ in results] == list(range(20))
  assert len({name for _, name in results}) > 1


def test_first_exception_stops():
  done = []

  def fail_on_second(i):
    if i == 1:
      raise ValueError("number 1")
    time.sleep(0.02)
    done.append(i)

  with pytest.raises(ValueError, match="number 1"):
    parallel.map_in_threads(fail_on_second, range(500), "looking", "image")
  assert len(done) < 100


def test_a_bar_for_long_work_alone(capsys, monkeypatch):
  parallel.map_in_threads(str, range(3), "looking", "image")
  assert capsys.readouterr().err == ""
  monkeypatch.setattr(parallel, "_SILENT_SECONDS", 0.01)
  monkeypatch.setattr(parallel, "_LOG_SECONDS", 0.01)
  parallel.map_in_threads(lambda i: time.sleep(0.05), range(3), "looking", "im")
  text = capsys.readouterr().err
  assert "looking: 100%" in text and "3/3" in text
