"""What a step is predicted to need, against the compiler and by hand."""

import dataclasses
import json
import subprocess
import sys

import pytest

from configs import camvid_46, testing, voc_1464
from input_pipeline import costs
from u2pl_jax import build as build_lib
from u2pl_jax import memory_plan, step_shapes
from u2pl_jax.config_checks import ConfigError

GIB = 2**30


@pytest.fixture(scope="module")
def config():
  return testing.get_config()


@pytest.fixture(scope="module")
def network(config):
  return memory_plan.trace_network(config, 6)


def predict(config, network, *, num_devices=1, **changes):
  return memory_plan.predict(
    memory_plan._changed(config, changes),
    num_classes=6,
    num_devices=num_devices,
    network=network,
  )


@pytest.mark.slow
def test_the_peak_is_within_a_fifth_of_the_compilers(config, network):
  program = build_lib.build(
    config, build_lib.DataSpec(6, (120.0,) * 3, (60.0,) * 3, 8)
  )
  state = build_lib.abstract_state(config, program)
  halves = step_shapes.training_batches(config, program.mesh)
  lowered = program.semi_supervised_step.lower(state, *halves)
  measured = step_shapes.peak_bytes(lowered.compile())
  predicted = predict(config, network)
  assert measured / 1.2 < predicted.peak < 1.2 * measured
  # What does not depend on the compiler is exact, but for a few counters.
  num_bytes = memory_plan._num_bytes(state)
  exact = (
    predicted.parts["student, teacher, optimiser"]
    + predicted.parts["memory bank"]
  )
  assert 0 <= num_bytes - exact < 256


def test_what_the_backward_pass_keeps(config, network):
  # One norm more in bytes: of the stem's first layer, 17x17x16 in float32, a
  # quarter of that for the sign of its output, and the output itself.
  layer = 17 * 17 * 16 * 4
  assert network.kept > 2.25 * layer
  assert network.largest == 17 * 17 * 32 * 4
  half = memory_plan.trace_network(
    memory_plan._changed(config, {"model.dtype": "bfloat16"}), 6
  )
  # All but the signs halves, with a few arrays at the float32 ends.
  assert 0.5 < half.kept / network.kept < 0.65
  remat = memory_plan.trace_network(
    memory_plan._changed(config, {"model.remat": True}), 6
  )
  assert remat.kept < network.kept
  assert remat.outputs == network.outputs
  assert network.outputs.logits.shape == (1, 9, 9, 6)


def test_what_micro_batches_and_devices_divide(config, network):
  kept, bank = "kept for the backward pass", "memory bank"
  whole = predict(config, network)
  assert whole.parts[kept] == 8 * network.kept
  halved = predict(config, network, **{"batch.microbatches": 2})
  assert halved.parts[kept] == 4 * network.kept
  # The outputs are still of the whole batch.
  outputs = "outputs of the networks"
  assert halved.parts[outputs] == whole.parts[outputs]
  two = predict(config, network, num_devices=2)
  assert two.parts[kept] == 4 * network.kept
  assert two.parts[outputs] == whole.parts[outputs] // 2
  assert two.parts[bank] == whole.parts[bank]
  split = predict(
    config, network, num_devices=2, **{"sharding.memory_bank": "classes"}
  )
  assert split.parts[bank] == whole.parts[bank] // 2
  small = predict(config, network, **{"memory_bank.dtype": "bfloat16"})
  keys = (60 + 5 * 40) * 16
  assert whole.parts[bank] - small.parts[bank] == 2 * keys


def test_a_supervised_step_has_no_second_half(config, network):
  alone = predict(config, network, method="supervised")
  assert alone.parts["kept for the backward pass"] == 4 * network.kept
  assert "contrastive loss" not in alone.parts


@pytest.fixture(scope="module")
def found(config):
  # As many as the devices of the last settings can have.
  config = memory_plan._changed(
    config, {"batch.labelled": 8, "batch.unlabelled": 8}
  )
  return config, list(
    memory_plan.settings(config, num_classes=6, num_devices=1)
  )


def test_settings_in_order_of_cost(found):
  _, listed = found
  overrides = [setting.overrides for setting in listed]
  dtype, remat = {"model.dtype": "bfloat16"}, {"model.remat": True}
  micro = {"batch.microbatches": 4}
  bank = {"memory_bank.dtype": "bfloat16"}
  assert overrides == [
    {},
    dtype,
    dtype | remat,
    dtype | {"batch.microbatches": 2},
    dtype | micro,
    dtype | remat | micro,
    dtype | remat | micro | bank,
    dtype | remat | bank | {"batch.microbatches": 4},
    dtype | remat | bank | {"batch.microbatches": 2},
  ]
  # 8 images do not divide over 8 devices of which each needs eval.batch=4.
  assert [s.num_devices for s in listed] == [1] * 7 + [2, 4]
  # Of 4.5 passes: one more.
  assert listed[3].work == pytest.approx(5.5 / 4.5)
  assert listed[1].work == 1


def test_the_first_that_fits_is_proposed(found):
  config, listed = found
  peaks = [setting.prediction.peak for setting in listed]
  assert "the config fits as it is" in memory_plan.report(config, listed, GIB)
  # Room for the second setting, not for the first.
  memory = int(peaks[1] / 0.75) + 2
  assert memory < peaks[0] / 0.75
  text = memory_plan.report(config, listed, memory)
  assert "the first that fits: --config.model.dtype=bfloat16\n" in text + "\n"
  assert memory_plan.as_json(config, listed, memory)["proposal"] == 1
  text = memory_plan.report(config, listed, 1000)
  assert "nothing fits: the least is" in text
  assert memory_plan.as_json(config, listed, 1000)["proposal"] is None


def test_more_devices_are_said(found):
  config, listed = found
  big = dataclasses.replace(
    listed[0], prediction=memory_plan.Prediction({"all": 10**12}, "losses")
  )
  text = memory_plan.report(config, [big, listed[-1]], GIB)
  assert "the first that fits on 4 devices: --config" in text


@pytest.mark.parametrize(
  ("text", "num_bytes"),
  [("24GiB", 24 * GIB), ("11GB", 11 * 10**9), ("1.5 GiB", 3 * 2**29)],
)
def test_sizes(text, num_bytes):
  assert memory_plan.parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["24Gb", "much", "0GiB", "", "-1GiB"])
def test_sizes_that_are_none(text):
  with pytest.raises(ConfigError, match="such as 24GiB"):
    memory_plan.parse_memory(text)


def test_command(tmp_path):
  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "u2pl_jax.plan", *arguments],
      capture_output=True,
      text=True,
      check=False,
    )

  path = tmp_path / "plan.json"
  # Nothing but the class names is read of the data set.
  result = run(
    "--config=configs/testing.py",
    "--device-memory=1GiB",
    f"--json={path}",
    "--config.dataset.name=camvid",
  )
  assert result.returncode == 0, result.stderr
  assert "the config fits as it is" in result.stdout
  assert json.loads(path.read_text())["proposal"] == 0
  result = run("--config=configs/testing.py", "--device-memory=24Gb")
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith(
    "error: --device-memory=24Gb"
  )


@pytest.mark.parametrize(
  ("config", "num_classes"), [(voc_1464, 21), (camvid_46, 11)]
)
def test_the_doctors_estimate_is_that_of_the_plan(config, num_classes):
  """Measured constants a pixel, and a count of what the network keeps."""
  config = config.get_config()
  rough = costs.estimate(
    config, num_classes=num_classes, num_unlabelled=1000
  ).memory_bytes
  planned = memory_plan.predict(
    config,
    num_classes=num_classes,
    num_devices=1,
    network=memory_plan.trace_network(config, num_classes),
  ).peak
  assert planned / 1.2 < rough < 1.2 * planned
