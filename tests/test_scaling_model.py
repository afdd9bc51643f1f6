"""The scaling model: its formulas, by hand."""

import json
import math
import subprocess
import sys

import pytest

from configs import testing
from u2pl_jax import roofline, scaling
from u2pl_jax.config_checks import ConfigError
from u2pl_jax.scaling import (
  GRADIENTS,
  NORMS_BACKWARD,
  NORMS_FORWARD,
  OTHER,
  Exchange,
  Gpus,
  Torus,
)

# 100 bytes a second inside, 10 between.
GPUS = Gpus(100.0, 10.0, 5.0, "", node=8, start=1.0, hop_inside=0.1)


def entry(instruction, num_bytes, *, purpose="batch statistics", **more):
  return {
    "kind": "all-reduce",
    "instruction": instruction,
    "purpose": purpose,
    "num_bytes": num_bytes,
    "count": 1,
  } | more


STEP = {
  "config": "testing",
  "crop_size": [33, 33],
  "memory_bank": "replicated",
  "labelled": 4,
  "devices": 4,
  "operations": {},
  "collectives": [
    entry("a", 400),
    entry("a", 600, purpose="anchors"),
    entry("s", 1000),
    entry("b", 32 * 8, count=32, purpose="thresholds"),
    entry("c", 2_000_000, purpose="gradients"),
    # Gradients of a norm are waited for like its statistics.
    entry("d", 2_000, purpose="gradients"),
    entry("e", 3_000, kind="collective-permute", purpose="mixing"),
  ],
}


class TestGpus:
  def test_latency(self):
    assert GPUS.latency(1) == 1
    # There and back through 7 others.
    assert GPUS.latency(8) == pytest.approx(1 + 2 * 0.7)
    # 1.8 times as slow within; up and down a tree of 4 nodes.
    assert GPUS.latency(32) == pytest.approx(1 + 2 * (0.7 * 1.8 + 2 * 5))

  def test_bandwidth(self):
    assert GPUS.seconds_per_byte(1) == 0
    assert GPUS.seconds_per_byte(4) == pytest.approx(2 * 3 / 4 / 100)
    # In each of two nodes everything, and an eighth of it between them.
    assert GPUS.seconds_per_byte(16) == pytest.approx(
      2 * 7 / 8 / 100 + 2 * 1 / 2 / 8 / 10
    )

  def test_neighbour(self):
    assert GPUS.neighbour_seconds(8, 50) == pytest.approx(1 + 0.1 + 0.5)
    assert GPUS.neighbour_seconds(16, 50) == pytest.approx(1 + 5 + 5)


class TestTorus:
  torus = Torus(out=400.0, source="", start=0.0, hop=1.0)

  def test_latency(self):
    assert self.torus.latency(2) == 2  # 2x1
    assert self.torus.latency(8) == 2 * (3 + 1)  # 4x2
    assert self.torus.latency(64) == 2 * (7 + 7)
    # Two closed rings: half the way round each.
    assert self.torus.latency(256) == 2 * (8 + 8)
    assert self.torus.latency(128) == 2 * (8 + 7)

  def test_bandwidth(self):
    # One link of four; one link of either side; all of them.
    assert self.torus.seconds_per_byte(2) == pytest.approx(2 / 2 / 100)
    assert self.torus.seconds_per_byte(64) == pytest.approx(2 * 63 / 64 / 200)
    assert self.torus.seconds_per_byte(256) == pytest.approx(
      2 * 255 / 256 / 400
    )


def test_exchanges_are_instructions():
  found = scaling.read_exchanges(STEP)
  assert found == [
    # Of the purpose of its largest array.
    Exchange("all-reduce", OTHER, 1, 1000),
    Exchange("all-reduce", NORMS_FORWARD, 1, 1000),
    Exchange("all-reduce", OTHER, 32, 8),
    Exchange("all-reduce", GRADIENTS, 1, 2_000_000),
    Exchange("all-reduce", NORMS_BACKWARD, 1, 2000),
    Exchange("collective-permute", OTHER, 1, 3000),
  ]


def test_time_of_the_exchanges():
  exchanges = [
    Exchange("all-reduce", NORMS_FORWARD, 32, 8),
    Exchange("all-gather", OTHER, 1, 300),
    Exchange("collective-permute", OTHER, 3, 40),
    Exchange("all-reduce", GRADIENTS, 2, 1000),
  ]
  sent = scaling.exchange(exchanges, GPUS, 4, images=2.0)
  latency, per_byte = 1 + 2 * 0.3, 2 * 3 / 4 / 100
  # A gather is half an all-reduce.
  assert sent.waiting == pytest.approx(32.5 * latency + 3 * 1.1)
  # Twice the images, twice the bytes to the neighbour.
  assert sent.moving == pytest.approx(
    (32 * 8 + 150) * per_byte + 3 * 2 * 40 / 100
  )
  assert sent.gradients == pytest.approx(2 * (latency + 1000 * per_byte))
  assert scaling.exchange(exchanges, GPUS, 1).seconds == 0


def predict(step=STEP, **overrides):
  config = testing.get_config()
  config.update_from_flattened_dict(overrides)
  return scaling.predict(
    config,
    step,
    num_classes=7,
    device=roofline.DEVICES["h200"],
    network=GPUS,
    share=0.5,
    images=[1, 4],
  )


def test_tables():
  result = predict()
  assert result["exchanges"] == {
    OTHER: 1 + 32 + 1, NORMS_FORWARD: 1, GRADIENTS: 1, NORMS_BACKWARD: 1
  }  # fmt: skip
  assert result["gradient_bytes"] == 2_000_000
  config = testing.get_config()
  floors = [
    roofline.cost(
      roofline.count(config, num_classes=7, num_devices=n),
      roofline.DEVICES["h200"],
      "float32",
    ).seconds
    for n in (1, 4)
  ]
  # 4+4 images: no more than 4 devices can share them.
  assert [row["devices"] for row in result["strong"]] == [1, 2, 4]
  one, _, four = result["strong"]
  assert one["step_ms"] == one["compute_ms"]
  assert one["compute_ms"] == pytest.approx(1e3 * floors[0] / 0.5)
  assert four["compute_ms"] == pytest.approx(1e3 * floors[1] / 0.5)
  parts = [four[f"{k}_ms"] for k in ("waiting", "moving", "gradients")]
  assert four["step_ms"] == pytest.approx(four["compute_ms"] + sum(parts))
  # 8 images.
  assert four["images_per_second"] == pytest.approx(8e3 / four["step_ms"])
  assert four["efficiency"] == pytest.approx(
    one["step_ms"] / four["step_ms"] / 4
  )
  weak = result["weak"]["4"]
  assert [row["devices"] for row in weak] == list(scaling.DEVICES)
  assert weak[0]["step_ms"] == pytest.approx(one["step_ms"])
  assert weak[-1]["compute_ms"] == pytest.approx(weak[0]["compute_ms"])
  assert weak[-1]["images_per_second"] == pytest.approx(
    256 * 8e3 / weak[-1]["step_ms"]
  )
  # Four times the images of the compiled step go to the neighbour.
  assert weak[2]["moving_ms"] - result["weak"]["1"][2]["moving_ms"] == (
    pytest.approx(1e3 * 3 * 3000 / 100)
  )
  assert "a PREDICTION" in scaling.table(result)


def test_changes():
  changes = predict()["changes"]
  after = changes["1 labelled images on each of 4 devices"]
  assert list(after) == [change[0] for change in scaling.CHANGES]
  plain, hidden, once, together, none = after.values()
  latency = 1e3 * GPUS.latency(4)
  assert plain["waiting_ms"] == pytest.approx(35 * latency + 1e3 * 1.1)
  # Of the gradients what the backward pass does not cover; here it is short.
  assert 0 < plain["step_ms"] - hidden["step_ms"] < 1
  assert hidden["waiting_ms"] == plain["waiting_ms"]
  # One norm forward and one backward: half of each, then a quarter forward.
  for row, left in ((once, 1.0), (together, 0.75), (none, 0.0)):
    assert row["waiting_ms"] == pytest.approx((33 + left) * latency + 1e3 * 1.1)
    assert row["step_ms"] < plain["step_ms"]


@pytest.mark.parametrize(
  ("step", "message"),
  [
    (STEP | {"config": "voc"}, "made for config voc, not testing"),
    (STEP | {"crop_size": [65, 65]}, "crop_size"),
    (STEP | {"memory_bank": "classes"}, "memory_bank classes, not replicated"),
    (STEP | {"collectives": []}, "--devices=8"),
  ],
)
def test_another_step_is_refused(step, message):
  with pytest.raises(ConfigError, match=message):
    predict(step)


def test_real_rates():
  gpus = scaling.make_network("h200", "infiniband")
  # As NCCL's own tables: 6.8 + 2 * 7 * 0.6 us within a node.
  assert gpus.latency(8) == pytest.approx(15.2e-6)
  assert gpus.inside == pytest.approx(360e9)
  assert gpus.between == pytest.approx(45e9)
  slow = scaling.make_network("h200", "ethernet")
  assert slow.between == pytest.approx(0.9 * 100e9 / 8 / 8)
  assert slow.latency(16) > gpus.latency(16)
  tpu = scaling.make_network("tpu-v5e", "infiniband")
  assert tpu.latency(256) == pytest.approx(34e-6)
  for name in roofline.DEVICES:
    assert math.isfinite(
      scaling.make_network(name, "infiniband").seconds_per_byte(256)
    )


def test_plots_are_reproducible(tmp_path):
  result = predict()
  files = [tmp_path / "a.svg", tmp_path / "b.svg"]
  for file in files:
    scaling.plot(result, str(file))
  assert files[0].read_bytes() == files[1].read_bytes()
  assert b"prediction" in files[0].read_bytes()


def test_the_command(tmp_path):
  step, path = tmp_path / "step.json", tmp_path / "scaling.json"
  command = [sys.executable, "scripts/scaling_model.py", f"--step={step}"]
  command += ["--config=configs/testing.py", f"--json={path}"]

  def run(*more):
    return subprocess.run([*command, *more], capture_output=True, text=True)

  failed = run()
  assert failed.returncode == 1
  assert failed.stderr == (
    f"error: --step={step}: cannot be read (No such file or directory)\n"
  )
  step.write_text(json.dumps(STEP))
  done = run("--images=2", "--device=tpu-v5e")
  assert done.returncode == 0, done.stderr
  assert done.stdout == scaling.table(json.loads(path.read_text())) + "\n"
  assert list(json.loads(path.read_text())["weak"]) == ["2"]
