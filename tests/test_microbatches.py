"""Micro-batches: the network sees parts of the batch, all else sees the whole.

The reference puts a network in place of the product's that cuts the batch by a
Python loop, without scan and without recomputation; the step around it is the
one for a whole batch.
"""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Var

from configs import testing
from u2pl_jax import build as build_lib
from u2pl_jax import halves, train_step
from u2pl_jax.config_checks import ConfigError, check_config
from u2pl_jax.models.deeplab import Outputs
from u2pl_jax.models.layers import BatchNorm, Conv
from u2pl_jax.train_state import create_train_state

DATA = build_lib.DataSpec(6, (120.0,) * 3, (60.0,) * 3, num_unlabelled=8)
# The groups are (0, 1 | 0), (2, 3 | 1), ...: each of two labelled images and
# one unlabelled. Micro-batch 0 has the groups 0 and 2, micro-batch 1 the rest.
NUM_L, NUM_U, SIZE = 8, 4, 33
PARTS = (np.array([0, 1, 2, 6, 7, 8]), np.array([3, 4, 5, 9, 10, 11]))


def make_config(**changes):
  config = testing.get_config()
  config.batch.labelled, config.batch.unlabelled = NUM_L, NUM_U
  config.schedule.warmup_epochs = 0
  config.strong.mix_probability = 1.0
  config.contrastive.anchor_min_probability = 0.1
  config.update_from_flattened_dict(changes)
  return config


def make_batches():
  rng = np.random.default_rng(0)

  def images(number):
    return {
      "image": rng.integers(0, 256, (number, SIZE, SIZE, 3), dtype=np.uint8),
      "valid_box": np.tile(np.int32([[0, 0, SIZE, SIZE]]), (number, 1)),
    }

  labels = rng.integers(0, 6, (NUM_L, SIZE, SIZE), dtype=np.uint8)
  labels[0, :9] = 255
  return {**images(NUM_L), "label": labels}, images(NUM_U)


class _Small(nn.Module):
  """All that the step asks of a network, and quick to compile."""

  dropout: float = 0.3

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.relu(BatchNorm()(Conv(16, 3, 4)(x), train=train))
    x = nn.Dropout(
      self.dropout, broadcast_dims=(1, 2), deterministic=not train
    )(x)
    return Outputs(*(Conv(width, 1, use_bias=True)(x) for width in (6, 16, 6)))


TX = optax.sgd(0.02, momentum=0.9)


@functools.cache
def first_state():
  bank = build_lib.make_memory_bank(make_config(), 6)
  return create_train_state(
    jax.random.key(3), _Small(), TX, image_size=(SIZE, SIZE), memory_bank=bank
  )


def cut_by_hand(model, parts):
  """A network that runs `parts` of its batch one after the other."""

  def apply(variables, images, *, train, mutable=(), rngs=None):
    if not train:
      return model.apply(variables, images, train=False)
    stats, found = variables["batch_stats"], []
    for i, part in enumerate(parts):
      outputs, mutated = model.apply(
        {"params": variables["params"], "batch_stats": stats},
        images[part],
        train=True,
        mutable=mutable,
        rngs={"dropout": jax.random.fold_in(rngs["dropout"], i)},
      )
      stats = mutated["batch_stats"]
      found.append(outputs)
    order = np.argsort(np.concatenate(parts))
    outputs = jax.tree.map(lambda *x: jnp.concatenate(x)[order], *found)
    return outputs, {"batch_stats": stats}

  return types.SimpleNamespace(apply=apply)


def run(config, model, *, microbatches, num_steps=2):
  """Traced steps from the same start -> (last state, metrics of each)."""
  recipe = build_lib.make_recipe(config, DATA)
  recipe = dataclasses.replace(recipe, microbatches=microbatches)
  batch_l, batch_u = make_batches()
  supervised, semi_supervised = build_lib.step_functions(
    config, model=model, tx=TX, recipe=recipe, trace=True
  )

  def step(state):
    if config.method == "supervised":
      return supervised(state, batch_l)
    return semi_supervised(state, batch_l, batch_u)

  step = jax.jit(step)
  state, metrics = first_state(), []
  for _ in range(num_steps):
    state, m = step(state)
    metrics.append(jax.device_get(m))
  return jax.device_get(state), metrics


def assert_close(actual, expected, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected
  )


def test_micro_batches_by_hand():
  whole = np.arange(12)
  parts = halves.micro_batches(whole, halves.num_groups(NUM_L, NUM_U), 2)
  np.testing.assert_array_equal(parts, PARTS)
  np.testing.assert_array_equal(halves.whole_batch(parts, 4), whole)
  # Images of one kind: every second one.
  np.testing.assert_array_equal(
    halves.micro_batches(np.arange(4), 4, 2), [[0, 2], [1, 3]]
  )


def test_a_semi_supervised_step_is_that_of_the_whole_batch():
  config = make_config()
  model = _Small()
  state, metrics = run(config, model, microbatches=2)
  expected_state, expected = run(
    config, cut_by_hand(model, PARTS), microbatches=1
  )
  for m, e in zip(metrics, expected, strict=True):
    trace, expected_trace = m.pop("trace"), e.pop("trace")
    # Losses and thresholds, and every decision that was taken.
    assert_close(m, e, rtol=2e-5, atol=1e-7)
    for name in ("kept_labels", "reliable_mask", "unreliable_mask"):
      np.testing.assert_array_equal(trace[name], expected_trace[name])
    np.testing.assert_array_equal(
      trace["contrast"].anchor_pixels, expected_trace["contrast"].anchor_pixels
    )
    assert_close(trace["grads"], expected_trace["grads"], rtol=1e-3, atol=1e-5)
    assert trace["contrast"].active.sum() >= 2
    assert m["grad_norm"] > 0.1
  assert_close(
    state.memory_bank.keys, expected_state.memory_bank.keys, atol=1e-4
  )
  assert (state.memory_bank.count == expected_state.memory_bank.count).all()
  for who in ("student", "teacher"):
    assert_close(getattr(state, who), getattr(expected_state, who), atol=2e-5)


def test_a_supervised_step_mines_in_the_whole_batch():
  config = make_config(
    **{
      "method": "supervised",
      "supervised.loss": "ohem",
      "supervised.ohem_threshold": 0.01,
      "supervised.ohem_min_kept": 3000,
      "supervised.aux_weight": 0.4,
    }
  )
  model = _Small()
  parts = (np.arange(0, 8, 2), np.arange(1, 8, 2))
  state, metrics = run(config, model, microbatches=2)
  expected_state, expected = run(
    config, cut_by_hand(model, parts), microbatches=1
  )
  for m, e in zip(metrics, expected, strict=True):
    np.testing.assert_allclose(m["sup_loss"], e["sup_loss"], rtol=2e-5)
    assert_close(m["trace"]["grads"], e["trace"]["grads"], rtol=1e-3, atol=1e-5)
  assert_close(state.student, expected_state.student, atol=2e-5)


@pytest.mark.slow
def test_parts_with_the_same_images_equal_the_whole(monkeypatch):
  """Their statistics are those of the batch: nothing is left to differ."""
  config = make_config(**{"strong.mix": "none"})
  batch_l, batch_u = make_batches()
  # Group 1 repeats group 0, and 3 repeats 2.
  for batch, order in (
    (batch_l, [0, 1, 0, 1, 4, 5, 4, 5]),
    (batch_u, [0, 0, 2, 2]),
  ):
    batch.update({name: value[order] for name, value in batch.items()})
  monkeypatch.setitem(globals(), "make_batches", lambda: (batch_l, batch_u))
  model = _Small(dropout=0.0)
  (state, (m,)), (whole_state, (whole,)) = (
    run(config, model, microbatches=n, num_steps=1) for n in (2, 1)
  )
  trace, whole_trace = m.pop("trace"), whole.pop("trace")
  assert_close(m, whole, rtol=2e-5, atol=1e-7)
  assert_close(trace["grads"], whole_trace["grads"], rtol=1e-3, atol=1e-5)
  for name in ("logits", "reps"):
    assert_close(
      getattr(trace["teacher"], name),
      getattr(whole_trace["teacher"], name),
      atol=1e-4,
    )
  assert_close(state.memory_bank.keys, whole_state.memory_bank.keys, atol=1e-4)


def test_no_activation_is_kept():
  model = build_lib.make_model(make_config(), 6)
  images = jax.ShapeDtypeStruct((4, SIZE, SIZE, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(
    functools.partial(model.init, train=False), key, images
  )

  def kept(microbatches):
    """Bytes for the backward pass that are no inputs."""

    def run(variables, images, key):
      def forward(params):
        outputs, _ = train_step.forward_train(
          model,
          params,
          variables["batch_stats"],
          images,
          key,
          groups=4,
          microbatches=microbatches,
        )
        return outputs

      return jax.vjp(forward, variables["params"])[1]

    jaxpr = jax.make_jaxpr(run)(variables, images, key).jaxpr
    found = {v for v in jaxpr.outvars if isinstance(v, Var)}
    found -= set(jaxpr.invars)
    return sum(v.aval.size * v.aval.dtype.itemsize for v in found)

  assert kept(1) > 4 * 400_000
  # The images in parts, and two keys and sets of running statistics.
  assert kept(2) < images.size * 4 + 50_000


class _Norm(nn.Module):
  """Only a norm, and dropout of a weight's products."""

  @nn.compact
  def __call__(self, x, *, train):
    weight = self.param("weight", nn.initializers.constant(2.0), ())
    dropped = nn.Dropout(0.5, deterministic=not train)(
      weight * jnp.ones_like(x)
    )
    return Outputs(BatchNorm()(x, train=train), dropped, None)


def run_norm(x):
  model = _Norm()
  variables = model.init(jax.random.key(0), x, train=False)
  forward = functools.partial(
    train_step.forward_train,
    model,
    batch_stats=variables["batch_stats"],
    images=x,
    dropout_key=jax.random.key(1),
    groups=4,
    microbatches=2,
  )
  return forward, variables["params"]


def test_running_statistics_by_hand():
  rng = np.random.default_rng(0)
  x = rng.normal(3, 2, (4, 5, 5, 2)).astype(np.float32)
  forward, params = run_norm(x)
  outputs, stats = jax.jit(forward)(params)
  mean, var = np.zeros(2), np.ones(2)
  for part in ([0, 2], [1, 3]):
    pixels = x[part].reshape(-1, 2)
    mean = 0.9 * mean + 0.1 * pixels.mean(0)
    var = 0.9 * var + 0.1 * pixels.var(0, ddof=1)
    normed = (x[part] - pixels.mean(0)) / np.sqrt(pixels.var(0) + 1e-5)
    np.testing.assert_allclose(
      outputs.logits[np.array(part)], normed, atol=1e-5
    )
  np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], mean, rtol=1e-5)
  np.testing.assert_allclose(stats["BatchNorm_0"]["var"], var, rtol=1e-5)


def test_dropout_differs_between_parts_and_not_between_passes():
  forward, params = run_norm(np.ones((4, 8, 8, 2), np.float32))

  @jax.jit
  def value_and_grad(params):
    def loss(params):
      reps = forward(params)[0].reps
      return (reps**2).sum(), reps

    return jax.value_and_grad(loss, has_aux=True)(params)

  (value, reps), grads = value_and_grad(params)
  # Kept units are 2 w: of n of them the sum is 4 n w^2, its slope 8 n w. With
  # other units in the second pass it would be of another n.
  np.testing.assert_allclose(grads["weight"], value, rtol=1e-6)
  kept = np.asarray(reps > 0)
  assert 0.4 < kept.mean() < 0.6
  assert (kept[[0, 2]] != kept[[1, 3]]).any()
  assert kept[[0, 2]].sum() != kept[[1, 3]].sum()


@pytest.mark.parametrize(
  ("changes", "num_devices", "message"),
  [
    ({"batch.microbatches": 3}, 1, "8 labelled and 8 unlabelled .* 1, 2, 4:"),
    # Two labelled images each.
    ({"batch.microbatches": 8}, 1, "1, 2, 4:"),
    ({"batch.microbatches": 0}, 1, "1, 2, 4:"),
    ({"batch.microbatches": 4}, 4, "on 4 device.* allow 1, 2:"),
    ({"batch.microbatches": 4, "batch.unlabelled": 4}, 2, "allow 1, 2:"),
  ],
)
def test_illegal_numbers(changes, num_devices, message):
  config = testing.get_config()
  config.batch.labelled = config.batch.unlabelled = 8
  config.update_from_flattened_dict(changes)
  with pytest.raises(
    ConfigError, match=f"config.batch.microbatches=.*{message}"
  ):
    check_config(config, num_classes=7, num_devices=num_devices)


@pytest.mark.parametrize(
  ("method", "microbatches", "num_devices"),
  [("u2pl", 4, 1), ("u2pl", 2, 2), ("supervised", 4, 2)],
)
def test_legal_numbers(method, microbatches, num_devices):
  config = testing.get_config(f"method={method}")
  config.batch.labelled = 8
  config.batch.microbatches = microbatches
  check_config(config, num_classes=7, num_devices=num_devices)
