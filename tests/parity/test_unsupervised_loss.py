import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.golden import IGNORE, close, fixtures, load, real, same
from u2pl_jax import losses, reliability

CASES = [
  pytest.param(arrays, name.split(":")[0], id=name.split(":")[0])
  for arrays in map(load, fixtures("unsupervised_loss*.npz"))
  for name in arrays
  if name.endswith(":loss")
]


@pytest.mark.parametrize("arrays,case", CASES)
def test_filter_and_loss(arrays, case):
  prefix, kind, _ = case.split("_")
  target = arrays[f"{prefix}_target255" if kind == "ig" else f"{prefix}_target"]
  teacher = arrays[
    f"{prefix}_pred_teacher_saturated"
    if kind == "sat"
    else f"{prefix}_pred_teacher"
  ]
  labels = jnp.asarray(target)
  valid = labels != IGNORE
  same("unsupervised", case, valid.sum(), arrays[f"{case}:n_valid"])
  split = reliability.assess(
    reliability.entropy(real(teacher)),
    valid,
    real(100 - arrays[f"{case}:percent"]),
  )
  close(
    "entropy threshold",
    case,
    split.keep_threshold,
    arrays[f"{case}:thresh"],
    atol=1e-6,
  )
  kept_labels = jnp.where(split.keep_mask, labels, IGNORE)
  same("unsupervised", case, kept_labels, arrays[f"{case}:target_after"])
  same("unsupervised", case, split.keep_mask.sum(), arrays[f"{case}:kept"])
  value, grad = jax.value_and_grad(
    lambda x: losses.unsupervised_loss(x, kept_labels, ignore_label=IGNORE)
  )(real(arrays[f"{prefix}_predict"]))
  if np.isnan(arrays[f"{case}:loss"]):
    assert value == 0  # Deliberate, as in test_supervised_loss.
  else:
    close("unsupervised loss", case, value, arrays[f"{case}:loss"], rtol=5e-6)
  close("unsupervised gradient", case, grad, arrays[f"{case}:grad"], atol=1e-7)
