import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.parity.golden import X64, cases, close, fixtures, load, real, same
from tests.parity.golden import weights as recorded_weights
from tests.parity.network import load_variables, make_model
from u2pl_jax.models import resnet, torch_weights

FILES = [
  (path.stem, load(path))
  for pattern in ("model_forward*.npz", "model_r101_eval*.npz")
  for path in fixtures(pattern)
]
CASES = [
  pytest.param(name, arrays, case, id=f"{name}-{case}")
  for name, arrays in FILES
  for case in cases(arrays, "input")
]
TRAIN_CASES = [
  pytest.param(name, arrays, case, id=f"{name}-{case}")
  for name, arrays in FILES
  for case in cases(arrays, "train_pred")
]
OUTPUTS = {"pred": "logits", "rep": "reps", "aux": "aux_logits"}


@functools.cache
def setup(name):
  """(model, variables) of a file."""
  arrays = dict(FILES)[name]
  names, shapes = arrays["state_names"], arrays["state_shapes"]
  model = make_model(names, shapes)
  return model, load_variables(model, names, shapes, int(arrays["seed"]))


def tolerance(arrays, key, bound):
  """Float32: of the README. Float64: the float32 run's recorded distance."""
  if not X64:
    return bound
  # The stored float32 numbers are themselves rounded.
  return 1.01 * float(arrays[f"{key}__f64gap"]) + 1e-12


@pytest.mark.parametrize("arrays", [a for _, a in FILES])
def test_weights(arrays):
  names, shapes = arrays["state_names"], arrays["state_shapes"]
  state = recorded_weights(names, shapes, int(arrays["seed"]))
  if "n_params" in arrays:
    trained = [v.size for n, v in state.items() if "running" not in n]
    assert sum(trained) == arrays["n_params"]
    assert len(names) == arrays["n_state_entries"]
  if "state_sum" not in arrays:
    return
  for name, total, first in zip(
    names.tolist(), arrays["state_sum"], arrays["state_first"], strict=True
  ):
    if name in state:
      value = state[name].astype(np.float64)
      np.testing.assert_allclose(value.sum(), total, rtol=1e-9, atol=1e-7)
      np.testing.assert_allclose(value.flat[0], first, rtol=1e-7)
    else:
      assert total == first == 0


@pytest.mark.parametrize("name,arrays,case", CASES)
def test_eval_mode(name, arrays, case):
  model, variables = setup(name)

  @jax.jit
  def run(variables, images):
    return model.apply(
      variables,
      images,
      train=False,
      capture_intermediates=lambda module, _: isinstance(module, resnet.ResNet),
      mutable=["intermediates"],
    )

  outputs, captured = run(variables.for_apply(), real(arrays[f"{case}_input"]))
  for key, field in OUTPUTS.items():
    recorded = f"{case}_eval_{key}"
    if recorded in arrays:
      close(
        f"{name} eval",
        recorded,
        getattr(outputs, field),
        arrays[recorded],
        atol=tolerance(arrays, recorded, 5e-5),
      )
  (stages,) = captured["intermediates"]["encoder"]["__call__"]
  for i, stage in enumerate(stages, 1):
    key = f"{case}_eval_x{i}"
    stage = np.asarray(stage)
    same(f"{name} shapes", key, stage.shape, arrays[f"{key}_shape"])
    close(
      f"{name} features",
      key,
      stage[:, ::3, ::3, ::16],
      arrays[f"{key}_sample"],
      atol=tolerance(arrays, f"{key}_sample", 5e-5),
    )
    wide = stage.astype(np.float64)
    close(
      f"{name} features",
      f"{key}_meanstd",
      [wide.mean(), wide.std()],
      arrays[f"{key}_meanstd"],
      atol=tolerance(arrays, f"{key}_meanstd", 5e-5),
    )


@pytest.mark.parametrize("name,arrays,case", TRAIN_CASES)
def test_train_mode(name, arrays, case):
  model, variables = setup(name)

  @jax.jit
  def run(params, images):
    def scalar(params):
      outputs, mutated = model.apply(
        {"params": params, "batch_stats": variables.batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
      )
      # The scalar of the recorded gradient.
      value = 0.01 * jnp.square(outputs.reps).sum()
      value += (outputs.logits * real(arrays[f"{case}_grad_cot_pred"])).sum()
      if outputs.aux_logits is not None:
        cotangent = real(arrays[f"{case}_grad_cot_aux"])
        value += (outputs.aux_logits * cotangent).sum()
      return value, (outputs, mutated)

    (value, aux), grads = jax.value_and_grad(scalar, has_aux=True)(params)
    return value, *aux, grads, optax.tree.norm(grads)

  images = real(arrays[f"{case}_input"])
  value, outputs, mutated, grads, norm = run(variables.params, images)
  for key, field in OUTPUTS.items():
    recorded = f"{case}_train_{key}"
    if recorded in arrays:
      close(
        f"{name} train",
        recorded,
        getattr(outputs, field),
        arrays[recorded],
        atol=tolerance(arrays, recorded, 3e-4),
      )
  stats = torch_weights.to_state_dict(mutated)
  prefix = f"{case}_train_bn:"
  for key in arrays:
    if key.startswith(prefix) and not key.endswith("__f64gap"):
      module = key.removeprefix(prefix).replace(":", ".")
      close(
        f"{name} running statistics",
        key,
        stats[module],
        arrays[key],
        atol=tolerance(arrays, key, 1e-5),
      )
  # The image-pooling norm by hand, from what entered it: unbiased variance.
  pooled = arrays[f"{case}_train_imagepool_prebn"].astype(np.float64)
  before = torch_weights.to_state_dict({"batch_stats": variables.batch_stats})
  for leaf, moment in (
    ("running_mean", pooled.mean(0)),
    ("running_var", pooled.var(0, ddof=1)),
  ):
    entry = f"decoder.aspp.conv1.2.{leaf}"
    close(
      f"{name} running statistics",
      f"{case} image pooling {leaf}",
      stats[entry],
      0.9 * before[entry] + 0.1 * moment,
      atol=1e-5,
    )

  kind = "grad64" if X64 else "grad"
  count = len(images)
  close(
    f"{name} gradients", "value", value, arrays[f"{case}_{kind}_value"],
    rtol=1e-8 if X64 else 1e-3,
  )  # fmt: skip
  close(
    f"{name} gradients",
    "global norm",
    norm,
    arrays[f"{case}_{kind}_global_norm"],
    rtol=1e-8 if X64 else 1e-3,
  )
  ours = torch_weights.to_state_dict({"params": grads})
  prefix = f"{case}_{kind}:"
  for key in arrays:
    if not key.startswith(prefix) or key.endswith("__f64gap"):
      continue
    parameter = key.removeprefix(prefix)
    behind = parameter.startswith(("encoder.", "decoder.aspp.conv1."))
    if X64:
      rtol, group = 1e-8, "gradients"
    elif not behind:
      rtol, group = 1e-3, "gradients of the heads"
    else:
      # A ReLU that flips behind the image-pooling norm of two values.
      rtol = 3e-2 if count == 2 else 1e-2
      group = "gradients of encoder and image pooling"
    close(f"{name} {group}", key, ours[parameter], arrays[key], rtol=rtol)
