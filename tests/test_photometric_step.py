"""The photometric augmentation inside the step: who sees what."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import testing
from tests import pretended
from u2pl_jax import build as build_lib
from u2pl_jax import halves, photometric, rngs, train_step
from u2pl_jax.config_checks import ConfigError
from u2pl_jax.images import normalise

DATA = build_lib.DataSpec(6, (120.0,) * 3, (60.0,) * 3, num_unlabelled=8)


def random_batch(seed, *, labelled):
  rng = np.random.default_rng(seed)
  batch = {
    "image": rng.integers(0, 256, (4, 33, 33, 3), dtype=np.uint8),
    "valid_box": np.asarray([[0, 0, 33, 33], [3, 2, 30, 31]] * 2, np.int32),
  }
  if labelled:
    batch["label"] = rng.integers(0, 6, (4, 33, 33), dtype=np.uint8)
  return batch


BATCH_L = random_batch(0, labelled=True)
BATCH_U = random_batch(1, labelled=False)


def get_config(probability):
  config = testing.get_config()
  config.schedule.warmup_epochs = 0
  config.strong.photometric = probability
  config.strong.mix_probability = 1.0
  return config


@pytest.fixture(scope="module")
def state():
  return build_lib.build(get_config(1.0), DATA).create_state()


@pytest.mark.slow
def test_the_teacher_sees_clean_images_and_the_student_strong_ones(state):
  program = build_lib.build(get_config(1.0), DATA)
  recipe = program.recipe

  def step(state):
    draws = rngs.draw_semi_supervised(
      jax.random.key(0),
      state.step,
      mix=recipe.mix,
      mix_probability=recipe.mix_probability,
      unlabelled_shape=(4, 33, 33),
      num_classes=6,
      num_anchors=recipe.num_anchors,
      num_negatives=recipe.num_negatives,
      max_keys=recipe.max_keys_per_step,
      photometric=recipe.photometric,
    )
    _, metrics = train_step.semi_supervised_step(
      state,
      train_step.LabelledBatch(**BATCH_L),
      train_step.UnlabelledBatch(**BATCH_U),
      draws,
      model=program.model,
      tx=program.tx,
      recipe=recipe,
      trace=True,
    )
    return draws, metrics["trace"]

  draws, trace = jax.device_get(jax.jit(step)(state))
  keep = trace["mix_mask"][..., None]
  assert not keep.all()
  box = BATCH_U["valid_box"]

  def mixed(images):
    images = np.asarray(normalise(images, box, DATA.mean, DATA.std))
    return np.where(keep, images, np.roll(images, -1, axis=0))

  strong = photometric.apply_photometric(
    draws.photometric, BATCH_U["image"], box, max_sigma=2.0
  )
  labelled = normalise(
    BATCH_L["image"], BATCH_L["valid_box"], DATA.mean, DATA.std
  )
  for view, images_u in (
    ("images", BATCH_U["image"]),
    ("student_images", strong),
  ):
    np.testing.assert_allclose(trace[view][:4], labelled, atol=1e-4)
    np.testing.assert_allclose(trace[view][4:], mixed(images_u), atol=1e-4)
  difference = np.abs(trace["images"] - trace["student_images"])
  assert difference[4:].max() > 0.1
  # The mean colour lies where it lay.
  for images in (trace["images"], trace["student_images"]):
    assert (images[4:] == 0).all(-1).sum() == (
      mixed(BATCH_U["image"]) == 0
    ).all(-1).sum()
  # The networks did see these images: each of its own makes its output.

  @jax.jit
  def forward(variables, images, key):
    outputs, _ = program.model.apply(
      variables.for_apply(),
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    return outputs.logits

  def run(variables, images, key):
    # In the order of the network's batch: dropout is drawn by position.
    images = halves.interleave(images[:4], images[4:])
    return halves.labelled_first(forward(variables, images, key), 4)

  for name, variables, key, own, other in (
    (
      "teacher",
      trace["teacher_used"],
      draws.teacher_dropout,
      "images",
      "student_images",
    ),
    (
      "student",
      state.student,
      draws.student_dropout,
      "student_images",
      "images",
    ),
  ):
    logits = trace[name].logits
    np.testing.assert_allclose(
      run(variables, trace[own], key), logits, atol=1e-3
    )
    changed = run(variables, trace[other], key) - logits
    assert np.abs(changed[4:]).max() > 0.01


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_off_the_step_does_not_contain_it(probability, state):
  program = build_lib.build(get_config(probability), DATA)
  text = program.semi_supervised_step.lower(state, BATCH_L, BATCH_U).as_text(
    debug_info=True
  )
  assert ("photometric/" in text) == (probability > 0)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("photometric", 1.5),
    ("jitter_probability", -0.1),
    ("grey_probability", 2.0),
    ("blur_probability", 7.0),
    ("jitter", (0.5, 0.5, 0.5)),
    ("jitter", (0.5, 0.5, 0.5, 0.6)),
    ("jitter", (-0.5, 0.5, 0.5, 0.1)),
    ("blur_sigma", (2.0, 0.1)),
    ("blur_sigma", (0.0, 2.0)),
  ],
)
def test_impossible_values_are_refused(key, value):
  config = get_config(1.0)
  config.strong[key] = value
  with pytest.raises(ConfigError, match=rf"config\.strong\.{key}="):
    build_lib.build(config, DATA)


MULTI_DEVICE = """
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from u2pl_jax import photometric, sharding
settings = photometric.PhotometricSettings(
  1.0, (0.5, 0.5, 0.5, 0.25), 0.8, 0.2, 0.5, (0.1, 2.0))
images = np.random.default_rng(0).integers(0, 256, (8, 17, 17, 3), np.uint8)
box = np.asarray([[0, 0, 17, 17]] * 8, np.int32)
def run(images, box):
  draw = photometric.draw_photometric(jax.random.key(1), settings, 8)
  return photometric.apply_photometric(draw, images, box, max_sigma=2.0)
results = []
assert len(jax.devices()) == 4
for devices in (jax.devices()[:1], jax.devices()):
  split = sharding.batch_sharded(sharding.create_mesh(devices))
  results.append(np.asarray(
    jax.jit(run, in_shardings=split, out_shardings=split)(images, box)))
np.testing.assert_allclose(*results, atol=1e-3)
assert np.abs(results[0] - images).max() > 20
print("equal")
"""


def test_four_devices_equal_one():
  result = subprocess.run(
    [sys.executable, "-c", MULTI_DEVICE],
    cwd=os.path.dirname(os.path.dirname(__file__)),
    env=pretended.environment(4),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.stdout.strip().endswith("equal"), result.stderr[-3000:]


def test_every_value_off_the_neutral_one_reaches_the_draws():
  config = get_config(1.0)
  config.strong.jitter_probability = 1.0
  config.strong.jitter = (0.1, 0.2, 0.3, 0.0)
  config.strong.grey_probability = 0.0
  config.strong.blur_probability = 1.0
  config.strong.blur_sigma = (3.0, 3.0)
  draw = photometric.draw_photometric(
    jax.random.key(0), build_lib.make_photometric(config), 500
  )
  for name, reach in (
    ("brightness", 0.1),
    ("contrast", 0.2),
    ("saturation", 0.3),
  ):
    change = jnp.abs(getattr(draw, name) - 1)
    assert 0.9 * reach < change.max() <= reach + 1e-6
  assert not draw.hue.any() and not draw.grey.any()
  assert (draw.sigma == 3).all()
