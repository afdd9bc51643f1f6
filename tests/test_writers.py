"""metrics.jsonl, config.json and TensorBoard files."""

import json
import logging
import math
import sys

import numpy as np
import pytest

from configs import testing
from u2pl_jax import writers
from u2pl_jax.config_checks import ConfigError

NAMES = ("sky", "road")


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
  """Its import takes seconds; the one test that wants it undoes this."""
  monkeypatch.setitem(sys.modules, "tensorflow", None)


def open_writer(workdir, last_step=0):
  return writers.open_writer(
    workdir, testing.get_config(), class_names=NAMES, last_step=last_step
  )


def read_lines(workdir):
  text = (workdir / writers.METRICS_FILE).read_text()
  assert text == "" or text.endswith("\n")

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  return [json.loads(x, parse_constant=refuse) for x in text.splitlines()]


def write_steps(workdir, steps, last_step=0):
  writer = open_writer(workdir, last_step)
  for step in steps:
    writer.write(step, {"train/sup_loss": step / 10})
  writer.sync()
  writer.close()


def test_a_line_holds_numbers_and_classes(tmp_path):
  writer = open_writer(tmp_path)
  writer.write(
    3,
    {
      "train/sup_loss": np.float32(0.5),
      "train/keys_enqueued": np.array([1, 2], np.int32),
      "eval/miou": 0.25,
      "count": 7,
    },
  )
  writer.close()
  assert read_lines(tmp_path) == [
    {
      "step": 3,
      "train/sup_loss": 0.5,
      "train/keys_enqueued/sky": 1,
      "train/keys_enqueued/road": 2,
      "eval/miou": 0.25,
      "count": 7,
    }
  ]


def test_not_finite_is_null(tmp_path):
  writer = open_writer(tmp_path)
  writer.write(1, {"a": math.nan, "b": np.array([np.inf, 1.0], np.float32)})
  writer.close()
  assert read_lines(tmp_path) == [
    {"step": 1, "a": None, "b/sky": None, "b/road": 1.0}
  ]


def test_float32_survives_exactly(tmp_path):
  value = np.float32(0.1)
  writer = open_writer(tmp_path)
  writer.write(1, {"a": value})
  writer.close()
  assert np.float32(read_lines(tmp_path)[0]["a"]) == value


def test_vector_of_another_length(tmp_path):
  with pytest.raises(ValueError, match="train/x has shape"):
    open_writer(tmp_path).write(1, {"train/x": np.zeros(3)})


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
  write_steps(tmp_path, (2, 4, 6, 8))
  whole = (tmp_path / writers.METRICS_FILE).read_bytes()
  write_steps(tmp_path, (6, 8), last_step=5)
  assert (tmp_path / writers.METRICS_FILE).read_bytes() == whole


def test_fresh_start_drops_all(tmp_path):
  write_steps(tmp_path, (2, 4))
  write_steps(tmp_path, ())
  assert read_lines(tmp_path) == []


@pytest.mark.parametrize(
  "rest", ['{"step": 4, "tra', '{"step": 4}', "\x00" * 9]
)
def test_line_that_a_kill_cut_off(tmp_path, caplog, rest):
  write_steps(tmp_path, (2,))
  with (tmp_path / writers.METRICS_FILE).open("a") as file:
    file.write(rest)
  with caplog.at_level(logging.WARNING):
    write_steps(tmp_path, (6,), last_step=4)
  assert [line["step"] for line in read_lines(tmp_path)] == [2, 6]
  assert not caplog.records
  assert sorted(p.name for p in tmp_path.iterdir()) == [writers.METRICS_FILE]


def test_damaged_line_in_the_middle_is_named(tmp_path, caplog):
  path = tmp_path / writers.METRICS_FILE
  path.write_text('{"step": 2}\nnonsense\n{"step": 4}\n')
  with caplog.at_level(logging.WARNING):
    write_steps(tmp_path, (), last_step=4)
  assert [line["step"] for line in read_lines(tmp_path)] == [2, 4]
  assert f"{path}: dropped line 2" in caplog.text


def test_without_tensorflow_says_so_once(tmp_path, caplog):
  with caplog.at_level(logging.INFO, logger="u2pl_jax"):
    write_steps(tmp_path, (2, 4, 6))
  text = "TensorBoard files are off (tensorflow is not installed)"
  assert caplog.text.count(text) == 1


def test_tensorboard_files(tmp_path, monkeypatch):
  monkeypatch.undo()
  tf = pytest.importorskip("tensorflow")
  write_steps(tmp_path, (2, 4))
  (path,) = tmp_path.glob("events*")
  found = {}
  for event in tf.compat.v1.train.summary_iterator(str(path)):
    for value in event.summary.value:
      found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
  assert found == {
    (2, "train/sup_loss"): pytest.approx(0.2),
    (4, "train/sup_loss"): pytest.approx(0.4),
  }


# -- config.json -----------------------------------------------------------


def test_same_config_may_go_on(tmp_path):
  config = testing.get_config()
  writers.check_workdir(tmp_path / "a" / "run", config)
  writers.write_config(tmp_path / "a" / "run", config)
  writers.check_workdir(tmp_path / "a" / "run", testing.get_config())
  names = [path.name for path in (tmp_path / "a" / "run").iterdir()]
  assert names == [writers.CONFIG_FILE]


def test_another_config_names_the_first_key(tmp_path):
  writers.write_config(tmp_path, testing.get_config())
  config = testing.get_config()
  config.model.rep_features = 32
  config.seed = 5
  with pytest.raises(ConfigError) as info:
    writers.check_workdir(tmp_path, config)
  message = str(info.value)
  assert "config.model.rep_features is 16 there and 32 here" in message
  assert str(tmp_path) in message and "\n" not in message


def test_a_key_that_an_older_version_lacked(tmp_path):
  config = testing.get_config()
  values = config.to_dict()
  del values["teacher"]["ema_decay"]
  (tmp_path / writers.CONFIG_FILE).write_text(json.dumps(values))
  with pytest.raises(ConfigError, match="ema_decay is absent there and 0.99"):
    writers.check_workdir(tmp_path, config)


@pytest.mark.parametrize("key", writers.MAY_CHANGE)
def test_keys_that_may_change(tmp_path, key):
  old, new = testing.get_config(), testing.get_config()
  section, name = key.split(".")
  new[section][name] += "x" if isinstance(new[section][name], str) else 1
  writers.write_config(tmp_path, old)
  writers.check_workdir(tmp_path, new)
  assert writers.config_digest(old) == writers.config_digest(new)


def test_digest_sees_other_keys():
  config = testing.get_config()
  config.optimizer.learning_rate *= 2
  before = writers.config_digest(testing.get_config())
  assert writers.config_digest(config) != before


@pytest.mark.parametrize("name", ["", "below"])
def test_workdir_that_cannot_be_written(tmp_path, name):
  # A file in place of a folder stops root too.
  (tmp_path / "file").write_text("")
  workdir = tmp_path / "file" / name
  with pytest.raises(ConfigError, match="cannot write there") as info:
    writers.check_workdir(workdir, testing.get_config())
  assert f"--workdir={workdir}" in str(info.value)


def test_unreadable_config_file(tmp_path):
  (tmp_path / writers.CONFIG_FILE).write_text("{")
  with pytest.raises(ConfigError, match="config.json: cannot be read"):
    writers.check_workdir(tmp_path, testing.get_config())
