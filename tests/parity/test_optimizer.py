import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.parity.golden import cases, close, fixtures, load, real
from u2pl_jax import ema, optimizer

FILES = [load(path) for path in fixtures("optimizer*.npz")]


@pytest.mark.parametrize("arrays,case", [
  pytest.param(a, c, id=c) for a in FILES for c in cases(a, "hyper")
])  # fmt: skip
def test_sgd_poly_and_ema(arrays, case):
  lr, momentum, weight_decay, max_iter, power = arrays[f"{case}_hyper"]
  lr_used = arrays[f"{case}_lr_used"]
  multiplier = lr_used[0, 1] / lr_used[0, 0]
  schedule = optimizer.poly_schedule(lr, int(max_iter), power)
  tx = optimizer.sgd(
    schedule,
    momentum=momentum,
    weight_decay=weight_decay,
    head_multiplier=multiplier,
  )
  # Group 0 is the encoder, group 1 everything else.
  names = {"encoder": "g0", "decoder": "g1"}

  def tree(kind):
    return {
      part: {
        leaf: real(arrays[f"{case}_{kind}:{group}.{leaf}"])
        for leaf in ("w", "b")
      }
      for part, group in names.items()
    }

  params, average = tree("init"), tree("ema_init")
  state = tx.init(params)
  for step in range(len(lr_used)):
    rate = float(schedule(jnp.asarray(step)))
    close("learning rate", "lr", rate, lr_used[step, 0], rtol=1e-6)
    close(
      "learning rate", "head", rate * multiplier, lr_used[step, 1], rtol=1e-6
    )
    # What the original logs is one step behind.
    behind = float(schedule(jnp.asarray(max(step - 1, 0))))
    logged = arrays[f"{case}_lr_logged"][step, 0]
    close("learning rate", "logged", behind, logged, rtol=1e-6)
    updates, state = tx.update(tree(f"grad{step}"), state, params)
    params = optax.apply_updates(params, updates)
    decay = ema.ema_decay(jnp.asarray(step), 0.99)
    close(
      "EMA decay", "decay", decay, arrays[f"{case}_ema_decay"][step], atol=1e-7
    )
    average = ema.ema_update(average, params, decay)
    for kind, ours in (("param", params), ("ema", average)):
      recorded = tree(f"{kind}{step}")
      for part in names:
        for leaf in ("w", "b"):
          close(
            "SGD and EMA",
            f"{kind}{step} {part} {leaf}",
            ours[part][leaf],
            recorded[part][leaf],
            rtol=1e-6,
          )


@pytest.mark.parametrize("arrays", FILES)
def test_ema_decay_rule(arrays):
  recorded = arrays["ema_decay_rule_first200"]
  ours = np.asarray(ema.ema_decay(jnp.arange(len(recorded)), 0.99))
  close("EMA decay", "rule", ours, recorded, atol=1e-7)
