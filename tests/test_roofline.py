"""The floor of a step: counted by hand, and by the compiler."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from configs import testing, voc_1464
from u2pl_jax import build as build_lib
from u2pl_jax import roofline, step_shapes
from u2pl_jax.config_checks import ConfigError
from u2pl_jax.models.layers import BatchNorm, Conv
from u2pl_jax.roofline import Operation, Phase

# 1 TFLOP/s and 0.5 TB/s, of which all is reached.
DEVICE = roofline.Device("d", {"float32": 1.0}, 0.5, "", 1.0, 1.0)


class Small(nn.Module):
  """Three convolutions of 5x7 images, the middle one with a norm."""

  @nn.compact
  def __call__(self, x, *, train):
    x = Conv(4, 3, name="plain")(x)
    x = Conv(8, 3, dilation=2, name="dilated")(x)
    x = BatchNorm(name="norm")(x, train=train)
    return Conv(6, 3, stride=2, name="strided")(x)


@pytest.fixture(scope="module")
def small():
  return roofline.describe(Small(), (5, 7))


def test_layers_by_hand(small):
  plain, dilated, norm, strided = small.layers
  assert [layer.name for layer in small.layers] == [
    "plain", "dilated", "norm", "strided"
  ]  # fmt: skip
  # 2 * h * w * k * k * ci * co; of 3 taps an axis, the two ends see padding.
  assert plain.flops == 2 * 5 * 7 * 3 * 3 * 3 * 4
  assert plain.inside == 2 * (3 * 5 - 2) * (3 * 7 - 2) * 3 * 4
  assert (plain.in_size, plain.out_size) == (5 * 7 * 3, 5 * 7 * 4)
  assert plain.parameters == 3 * 3 * 3 * 4
  # As many taps, of which 2 rows and columns at either end are outside.
  assert dilated.flops == 2 * 5 * 7 * 3 * 3 * 4 * 8
  assert dilated.inside == 2 * (3 * 5 - 4) * (3 * 7 - 4) * 4 * 8
  # Outputs at 0 2 4 and 0 2 4 6: the first and the last have a tap outside.
  assert strided.flops == 2 * 3 * 4 * 3 * 3 * 8 * 6
  assert strided.inside == 2 * (3 * 3 - 2) * (3 * 4 - 2) * 8 * 6
  assert (strided.in_size, strided.out_size) == (5 * 7 * 8, 3 * 4 * 6)
  assert norm.is_norm and norm.out_size == 5 * 7 * 8
  assert [layer.of_images for layer in small.layers] == [
    True, False, False, False
  ]  # fmt: skip
  assert small.num_parameters == 9 * (3 * 4 + 4 * 8 + 8 * 6) + 2 * 8
  assert small.outputs.shape == (1, 3, 4, 6)


def test_passes_by_hand(small):
  # Two images in bfloat16, kernels in float32.
  train = roofline.forward(small.layers, 2, 2, train=True)
  plain = small.layers[0]
  assert train[0] == Operation(
    "plain",
    2 * plain.flops,
    2 * plain.inside,
    2 * 2 * 5 * 7 * (3 + 4) + 4 * 9 * 3 * 4,
  )
  # Read for the statistics, read and written.
  assert train[2] == Operation("norm", 0, 0, 3 * 2 * 2 * 5 * 7 * 8)
  # Running statistics fold into the convolution.
  evaluation = roofline.forward(small.layers, 2, 2, train=False)
  assert evaluation == (train[0], train[1], train[3])

  back = roofline.backward(small.layers, 2, 2)
  forward_flops = sum(o.flops for o in train)
  # Two more of each, but for the one whose input is an image.
  assert sum(o.flops for o in back) == 2 * forward_flops - train[0].flops
  assert [o.num_bytes for o in back if o.name == "norm"] == [
    5 * 2 * 2 * 5 * 7 * 8
  ]
  kernel, of_input = (
    next(o for o in back if o.name == f"strided: gradient of the {what}")
    for what in ("kernel", "input")
  )
  assert kernel.num_bytes == of_input.num_bytes == train[3].num_bytes


def test_time_is_the_larger_of_arithmetic_and_bytes():
  phases = [
    Phase("a", (Operation("x", 2e12, 1e12, 0.5e12),)),  # 2 s against 1 s
    Phase("b", (Operation("y", 1e12, 1e12, 1.5e12),)),  # 1 s against 3 s
  ]
  cost = roofline.cost(phases, DEVICE, "float32")
  assert (cost.arithmetic_s, cost.memory_s, cost.seconds) == (2, 3, 5)
  assert (cost.flops, cost.inside, cost.num_bytes) == (3e12, 2e12, 2e12)
  with pytest.raises(ConfigError, match="dtype=float32"):
    roofline.cost(phases, DEVICE, "bfloat16")


def test_rates_of_the_devices():
  h200 = roofline.DEVICES["h200"]
  # What it reaches on large matrix products and copies.
  assert h200.rate("bfloat16") == pytest.approx(790e12, rel=0.01)
  assert h200.byte_rate == pytest.approx(4.3e12, rel=0.01)


def phases_of(**overrides):
  config = testing.get_config()
  config.update_from_flattened_dict(overrides)
  return {
    phase.name: phase
    for phase in roofline.count(config, num_classes=7, num_devices=1)
  }


def flops(phase):
  return sum(operation.flops for operation in phase.operations)


def test_phases_of_the_step():
  phases = phases_of()
  strong = phases["teacher, strong view"]
  assert strong.operations == phases["student, forward"].operations
  # Half of the images, and no representations, which are a good part of it.
  share = flops(phases["teacher, clean images"]) / flops(strong)
  assert 0.3 < share < 0.5
  names = [o.name for o in phases["teacher, clean images"].operations]
  assert not any("representation" in name for name in names)

  outside = {o.name: o for o in phases["outside the network"].operations}
  # 7 classes, 8 anchors of each, 4 negatives of an anchor, 16 float32 numbers,
  # and 16 keys of a class that are read and written.
  assert outside["negatives, forward"].num_bytes == 7 * 8 * 4 * 16 * 4
  assert outside["keys that enter"].num_bytes == 2 * 7 * 16 * 16 * 4
  # 8 images on a grid of 9x9.
  assert outside["prototypes"].num_bytes == 8 * 9 * 9 * 16 * 4
  # 7 classes of float32 read and the gradient written, and labels of 33x33.
  assert outside["supervised loss"].num_bytes == 4 * (
    2 * 9 * 9 * 7 * 4 + 33 * 33
  )
  (update,) = phases["optimiser and average"].operations
  parameters = roofline.describe(
    build_lib.make_model(testing.get_config(), 7), (33, 33)
  ).num_parameters
  assert update.num_bytes == 7 * 4 * parameters


def test_settings_that_change_the_floor():
  plain = phases_of()
  remat = phases_of(**{"model.remat": True})
  # The encoder's blocks once more, which are most of the network.
  extra = flops(remat["student, backward"]) - flops(plain["student, backward"])
  assert 0.2 < extra / flops(plain["student, forward"]) < 1
  assert remat["student, forward"] == plain["student, forward"]

  # Everything once more, and with both the blocks twice more.
  parts = phases_of(**{"batch.microbatches": 2})
  again = flops(parts["student, backward"]) - flops(plain["student, backward"])
  assert again == flops(plain["student, forward"])
  both = phases_of(**{"batch.microbatches": 2, "model.remat": True})
  assert flops(both["student, backward"]) == pytest.approx(
    flops(plain["student, backward"]) + extra + again
  )

  auxiliary = phases_of(**{"supervised.aux_weight": 0.4})
  names = [o.name for o in auxiliary["student, forward"].operations]
  assert "auxor/aux_0" in names
  clean = auxiliary["teacher, clean images"]
  assert clean == plain["teacher, clean images"]

  supervised = phases_of(method="supervised")
  assert list(supervised) == [
    "student, forward", "student, backward", "outside the network",
    "optimiser and average",
  ]  # fmt: skip
  assert flops(supervised["student, forward"]) == pytest.approx(
    flops(plain["student, forward"]) / 2
  )


def test_devices_share_images_and_perhaps_the_bank():
  config = testing.get_config()
  config.memory_bank.capacity_class0 = 60 + 4  # 304 slots

  def operations(num_devices):
    phases = roofline.count(config, num_classes=7, num_devices=num_devices)
    return {o.name: o for phase in phases for o in phase.operations}

  one, four = operations(1), operations(4)
  assert four["encoder/conv1_3"].flops * 4 == one["encoder/conv1_3"].flops
  assert four["update"] == one["update"]
  assert four["negatives, forward"] == one["negatives, forward"]
  config.sharding.memory_bank = "classes"
  split = operations(4)
  name = "negatives, forward"
  assert split[name].num_bytes * 4 == one[name].num_bytes
  with pytest.raises(ConfigError, match="3 devices"):
    operations(3)


class TestAgainstTheCompiler:
  """XLA counts what is not with padding, and every other operation too."""

  def test_network(self):
    """Measured: 1.027 times ours; the rest are the norms, mostly."""
    config = testing.get_config()
    model = build_lib.make_model(config, 7)
    variables = jax.eval_shape(
      lambda: model.init(
        jax.random.key(0), jnp.zeros((1, 33, 33, 3)), train=False
      )
    )

    def scalar(params, batch_stats, images):
      outputs, _ = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
      )
      return outputs.logits.sum() + outputs.reps.sum()

    compiled = (
      jax.jit(jax.grad(scalar))
      .lower(
        variables["params"],
        variables["batch_stats"],
        jax.ShapeDtypeStruct((8, 33, 33, 3), jnp.float32),
      )
      .compile()
    )
    layers = roofline.describe(model, (33, 33)).layers
    ours = sum(
      o.inside
      for o in (
        *roofline.forward(layers, 8, 4, train=True),
        *roofline.backward(layers, 8, 4),
      )
    )
    ratio = compiled.cost_analysis()["flops"] / ours
    assert 1 < ratio < 1.05

  def test_step(self):
    """Measured: 1.036; losses, masks and the resizes, which are matrices."""
    config = testing.get_config()
    program = build_lib.build(
      config, build_lib.DataSpec(7, (120.0,) * 3, (60.0,) * 3, 80)
    )
    lowered = program.semi_supervised_step.lower(
      build_lib.abstract_state(config, program),
      *step_shapes.training_batches(config, program.mesh),
    )
    phases = roofline.count(config, num_classes=7, num_devices=1)
    ours = sum(o.inside for phase in phases for o in phase.operations)
    ratio = lowered.cost_analysis()["flops"] / ours
    assert 1 < ratio < 1.1


def test_the_paper_recipe():
  """The numbers of docs/scaling.md."""
  config = voc_1464.get_config()
  config.model.dtype = "bfloat16"
  result = roofline.floor(
    config,
    num_classes=21,
    device=roofline.find_device("h200"),
    num_devices=1,
  )
  assert result["step"]["tflop"] == pytest.approx(92.8, abs=0.05)
  assert result["step"]["ms"] == pytest.approx(168.1, abs=0.1)
  shares = [row["ms"] for row in result["phases"].values()]
  assert sum(shares) == pytest.approx(result["step"]["ms"])
  lines = roofline.table(result).splitlines()
  assert max(map(len, lines)) <= 80
  assert lines[-2].split()[:4] == ["step", "92.776", "378.90", "168.12"]
  with pytest.raises(ConfigError, match="choose one of v100, a100"):
    roofline.find_device("h2000")


def test_the_command(tmp_path):
  path = tmp_path / "folder" / "floor.json"
  command = [sys.executable, "scripts/roofline.py", "--device=v100"]
  command += ["--config=configs/testing.py", f"--json={path}"]
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  written = json.loads(path.read_text())
  assert result.stdout == roofline.table(written) + "\n"
  assert written["tflops"] == pytest.approx(15.7 * 0.8)
  result = subprocess.run(
    [*command, "--config.model.dtype=bfloat16"], capture_output=True, text=True
  )
  assert result.returncode == 1
  assert result.stderr.startswith("error: --device=v100 does not compute in")
  assert result.stderr.count("\n") == 1
