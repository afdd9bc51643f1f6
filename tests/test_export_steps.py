"""The steps lower for GPUs and TPUs on a machine that has neither.

Lowering stops before the compilers of those platforms, but it is where an
operation that a platform does not have, a callback to the host or a type that
cannot be turns up.
"""

import pathlib
import re
import subprocess
import sys

import pytest

from tests import pretended

_ROOT = pathlib.Path(__file__).parent.parent
_NUM_DEVICES = 8
_SETTINGS = {
  "plain": {},
  # Whatever changes the programs, at once.
  "all": {
    "model.dtype": "bfloat16",
    "model.remat": True,
    "supervised.loss": "ohem",
    "supervised.aux_weight": 0.4,
    "strong.photometric": 1.0,
    "strong.mix": "classmix",
    "memory_bank.dtype": "bfloat16",
    "memory_bank.capacity_class0": 72,
    "sharding.memory_bank": "classes",
    "optimizer.schedule": "plateau",
    "eval.protocol": "sliding_window",
    "eval.window": (33, 33),
  },
}
# What carries shardings, and nothing that only one platform knows.
_CUSTOM_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}


def check(config, num_classes, eval_shape):
  """Lowers all steps of a config; runs in a process with pretended devices.

  Args:
    config: complete.
    num_classes: of the data.
    eval_shape: height and width of the images of an evaluation.

  Returns:
    'name module-size' a step.
  """
  import jax

  from u2pl_jax import build as build_lib
  from u2pl_jax import step_shapes

  program = build_lib.build(
    config,
    build_lib.DataSpec(num_classes, (120.0,) * 3, (60.0,) * 3, 80),
    devices=jax.devices()[:_NUM_DEVICES],
  )
  mesh = program.mesh
  state = build_lib.abstract_state(config, program)
  labelled, unlabelled = step_shapes.training_batches(config, mesh)
  of_images = step_shapes.eval_batch(config, mesh, eval_shape)
  # Its jitted function is inside the evaluator, as are its shapes.
  eval_step = program.evaluator._eval_step
  found = []
  for name, step, arguments in (
    ("supervised", program.supervised_step, (state, labelled)),
    ("semi", program.semi_supervised_step, (state, labelled, unlabelled)),
    ("eval", eval_step, (state.teacher, of_images)),
    (
      "predict",
      program.predict_step,
      (state.teacher, {k: of_images[k] for k in ("image", "valid_box")}),
    ),
  ):
    exported = jax.export.export(step, platforms=("cuda", "tpu"))(*arguments)
    assert exported.platforms == ("cuda", "tpu")
    assert exported.nr_devices == _NUM_DEVICES
    text = exported.mlir_module()
    calls = set(re.findall(r"custom_call @(\w+)", text))
    assert calls <= _CUSTOM_CALLS, calls
    # No platform asks the host, and TPUs have no float64.
    assert "callback" not in text and "f64" not in text, name
    found.append(f"{name} {len(text)}")
  return found


def _run(code):
  """In a process of its own: the number of devices is fixed at its start."""
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    env=pretended.environment(_NUM_DEVICES),
    capture_output=True,
    text=True,
    timeout=1200,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return result.stdout


@pytest.mark.parametrize("name", _SETTINGS)
def test_steps_lower_for_cuda_and_tpu(name):
  printed = _run(f"""
from configs import testing
from tests.test_export_steps import _SETTINGS, check
config = testing.get_config()
config.batch.labelled = config.batch.unlabelled = config.eval.batch = 8
config.update_from_flattened_dict(_SETTINGS[{name!r}])
print(check(config, 6, (40, 70)))
""")
  assert printed.count("'") == 2 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
  ("module", "argument", "num_classes", "shape"),
  [
    ("voc_1464", None, 21, (513, 513)),
    ("voc_1464", "released,photometric", 21, (513, 513)),
    ("cityscapes_744", None, 19, (1024, 2048)),
  ],
)
def test_published_recipes_lower(module, argument, num_classes, shape):
  printed = _run(f"""
from configs import {module}
from tests.test_export_steps import check
config = {module}.get_config({argument!r})
config.model.dtype = "bfloat16"
config.model.remat = True
print(check(config, {num_classes}, {shape}))
""")
  assert printed.count("'") == 2 * 4
