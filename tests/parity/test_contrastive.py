import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.golden import (
  DTYPE,
  IGNORE,
  cases,
  close,
  fixtures,
  load,
  real,
  same,
)
from u2pl_jax import contrastive, memory_bank

FILES = [load(path) for path in fixtures("contrastive*.npz")]
SERIES = [
  pytest.param(arrays, series, variant, id=f"{series}-{variant}")
  for arrays in FILES
  for series in cases(arrays, "hyper")
  for variant in ("released", "paper")
  if f"{series}_{variant}_call0:loss" in arrays
]


@pytest.mark.parametrize("arrays", FILES)
def test_onehot_quirk(arrays):
  labels = jnp.asarray(arrays["onehot_in"])
  for key, quirk in (("onehot_proper", False), ("onehot_upstream", True)):
    recorded = arrays[key]
    # Stored with the classes first or last; ours are last.
    k = next(n for n in recorded.shape if n not in labels.shape)
    axis = recorded.shape.index(k)
    ours = contrastive.class_membership(
      labels, num_classes=k, ignore_label=IGNORE, batch_onehot=quirk
    )
    same("one-hot", key, ours, np.moveaxis(recorded, axis, -1) > 0)


@pytest.mark.parametrize("arrays,series,variant", SERIES)
def test_series(arrays, series, variant):
  released = variant == "released"
  capacities = arrays[f"{series}_queue_size"].tolist()
  num_labelled = int(arrays[f"{series}_num_labeled"])
  delta_p, delta_n, low_rank, high_rank, temperature, num_anchors, num_neg = (
    arrays[f"{series}_hyper"].tolist()
  )
  k, a, m = len(capacities), int(num_anchors), int(num_neg)

  @functools.partial(jax.jit, static_argnames="batch_onehot")
  def call(reps, teacher_reps, labels, probs, low, high, bank, anchors, negs,
           *, batch_onehot):  # fmt: skip
    membership = jnp.concatenate([
      contrastive.class_membership(
        half, num_classes=k, ignore_label=IGNORE, batch_onehot=batch_onehot
      )
      for half in (labels[:num_labelled], labels[num_labelled:])
    ])  # fmt: skip

    def loss(reps):
      result = contrastive.contrastive_loss(
        reps,
        teacher_reps,
        membership=membership,
        valid_mask=labels != IGNORE,
        reliable_mask=low,
        unreliable_mask=high,
        teacher_probs=probs,
        num_labelled=num_labelled,
        memory_bank=bank,
        anchor_bits=anchors,
        negative_bits=negs,
        key_bits=None,
        max_keys=None,
        low_rank=int(low_rank),
        high_rank=int(high_rank),
        anchor_min_probability=delta_p,
        negative_max_probability=delta_n,
        temperature=temperature,
        class_index_mixup=released,
        own_label_negatives=released,
      )
      return result.loss, result

    value, grad = jax.value_and_grad(loss, has_aux=True)(reps)
    return *value, grad, membership

  bank = None
  for t in range(len([n for n in arrays if n.startswith(f"{series}_call")
                      and n.endswith(":rep")])):  # fmt: skip
    given, out = f"{series}_call{t}:", f"{series}_{variant}_call{t}:"
    reps = real(arrays[f"{given}rep"])
    if bank is None:
      bank = memory_bank.create(capacities, reps.shape[-1], DTYPE)
    batch_onehot = released and f"{given}label_multihot" in arrays
    loss, result, grad, membership = call(
      reps,
      real(arrays[f"{given}rep_teacher"]),
      jnp.asarray(arrays[f"{given}label"]),
      real(arrays[f"{given}prob"]),
      jnp.asarray(arrays[f"{given}low_mask"] > 0),
      jnp.asarray(arrays[f"{given}high_mask"] > 0),
      bank,
      jnp.asarray(arrays[f"{out}anchor_idx"].astype(np.uint32)),
      jnp.asarray(arrays[f"{out}neg_idx"].astype(np.uint32)).reshape(k, a, m),
      batch_onehot=batch_onehot,
    )
    bank = result.memory_bank
    if batch_onehot:
      recorded = arrays[f"{given}label_multihot"] > 0
      same("contrastive", "multi-hot", membership, recorded)
    close(
      "contrastive loss", f"{out}loss", loss, arrays[f"{out}loss"], rtol=1e-5
    )
    close(
      "contrastive gradient",
      f"{out}grad_rep",
      grad,
      arrays[f"{out}grad_rep"],
      atol=1e-6,
    )
    # The lists of the call are those of the labels that were given to it; the
    # paper's rule sees the proper one-hot in every series.
    if released or f"{given}label_multihot" not in arrays:
      same("contrastive", "present", result.present, arrays[f"{given}present"])
      for ours, key in (
        (result.num_reliable, "n_low"),
        (result.num_anchors, "n_anchor"),
      ):
        same("contrastive", key, ours, arrays[f"{given}{key}"])
    same(
      "contrastive",
      "new_keys",
      result.num_candidates.sum(0),
      arrays[f"{out}new_keys"],
    )
    same("contrastive", "queue_len", bank.count, arrays[f"{out}queue_len"])
    for c in range(k):
      recorded = arrays[f"{out}queue{c}"]
      same("contrastive", f"queue{c}", memory_bank.queue(bank, c), recorded)
    recorded_source = arrays[f"{out}anchor_src"]
    ours = np.where(result.active, result.source, -1)
    same("contrastive", "anchor_src", ours, recorded_source)
