import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.golden import IGNORE, cases, close, fixtures, load, real, same
from u2pl_jax import losses

FILES = [load(path) for path in fixtures("supervised_loss*.npz")]
CASES = [
  pytest.param(arrays, prefix, name.split(":")[0], id=name.split(":")[0])
  for arrays in FILES
  for prefix in cases(arrays, "main")
  for name in arrays
  if name.startswith(f"{prefix}_") and name.endswith(":loss")
]
THRESHOLD = 0.7
AUX_WEIGHT = 0.4


@pytest.mark.parametrize("arrays,prefix", [
  pytest.param(a, p, id=p) for a in FILES for p in cases(a, "main")
])  # fmt: skip
def test_true_class_probabilities(arrays, prefix):
  labels = jnp.asarray(arrays[f"{prefix}_label"])
  ce, valid = losses.pixel_cross_entropy(
    real(arrays[f"{prefix}_main"]), labels, IGNORE
  )
  same("supervised", prefix, valid.sum(), arrays[f"{prefix}_num_valid"])
  close(
    "supervised loss",
    f"{prefix} probabilities",
    np.sort(np.exp(-np.asarray(ce)[np.asarray(valid)])),
    arrays[f"{prefix}_sorted_gt_prob_main"],
    rtol=5e-6,
  )


@pytest.mark.parametrize("arrays,prefix,case", CASES)
def test_loss(arrays, prefix, case):
  ohem = "_ohem_" in case
  ignored = "allignored" in case
  min_kept = arrays.get(f"{case}:min_kept")
  if min_kept is None:
    min_kept = 0 if case.endswith("minkept0") else 1
  labels = jnp.asarray(
    arrays[f"{prefix}_label_half" if "half" in case else f"{prefix}_label"]
  )
  if ignored:
    labels = jnp.full_like(labels, IGNORE)
  has_aux = f"{case}:grad_aux" in arrays

  def one(logits):
    if ohem:
      return losses.ohem_cross_entropy(
        logits,
        labels,
        ignore_label=IGNORE,
        threshold=THRESHOLD,
        min_kept=int(min_kept),
      )
    return losses.cross_entropy(logits, labels, ignore_label=IGNORE)

  def loss(main, aux):
    return one(main) + (AUX_WEIGHT * one(aux) if has_aux else 0)

  main, aux = real(arrays[f"{prefix}_main"]), real(arrays[f"{prefix}_aux"])
  value, (grad_main, grad_aux) = jax.value_and_grad(loss, argnums=(0, 1))(
    main, aux
  )
  recorded = arrays[f"{case}:loss"]
  if np.isnan(recorded):
    # Deliberate: where no pixel counts the original's loss is NaN, ours 0. The
    # gradient is 0 in both.
    assert value == 0
    assert bool(arrays[f"{case}:grad_main_all_zero"])
    assert not bool(arrays[f"{case}:grad_main_any_nan"])
    assert not np.asarray(grad_main).any()
    return
  close("supervised loss", f"{case} loss", value, recorded, rtol=5e-6)
  pairs = [("main", main, grad_main)] + [("aux", aux, grad_aux)] * has_aux
  for name, logits, grad in pairs:
    close(
      "supervised gradient",
      f"{case} {name}",
      grad,
      arrays[f"{case}:grad_{name}"],
      atol=1e-7,
    )
    kept = losses.ohem_mask(
      logits,
      labels,
      ignore_label=IGNORE,
      threshold=THRESHOLD,
      min_kept=int(min_kept) if ohem else 0,
    )
    recorded_kept = arrays[f"{case}:kept_{name}"]
    same("supervised", f"{case} {name}", kept.sum(), recorded_kept)
