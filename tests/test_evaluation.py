"""Protocols on the device, against NumPy and plain loops."""

import json
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import pretended
from u2pl_jax import evaluation, sharding
from u2pl_jax.evaluation import EvalSettings, Protocol
from u2pl_jax.evaluator import Evaluator
from u2pl_jax.models.deeplab import Outputs
from u2pl_jax.models.layers import resize_bilinear
from u2pl_jax.train_state import Variables

MEAN, STD = (100.0,) * 3, (50.0,) * 3
NOTHING = Variables({}, {})
KERNEL = np.random.default_rng(1).normal(size=(5, 5, 3, 3))


class RedMeansOne(nn.Module):
  """Two classes at full resolution: class 1 where red is above the mean."""

  @nn.compact
  def __call__(self, images, *, train):
    red = images[..., :1]
    return Outputs(jnp.concatenate([-red, red], -1), images, None)


class Asymmetric(nn.Module):
  """Three classes at half resolution; sees mirroring, position and borders."""

  @nn.compact
  def __call__(self, images, *, train):
    logits = jax.lax.conv_general_dilated(
      images,
      jnp.asarray(KERNEL, jnp.float32),
      (2, 2),
      ((2, 2), (2, 2)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # As the image pooling of ASPP: every pixel depends on the whole input.
    logits = logits - logits.mean((1, 2), keepdims=True)
    return Outputs(logits, images, None)


def settings(num_classes):
  return EvalSettings(num_classes, 255, MEAN, STD)


# -- A batch by hand -----------------------------------------------------------


def batch():
  image = np.zeros((2, 2, 3, 3), np.uint8)
  image[0, 0, :2] = 255
  box = np.asarray([[0, 0, 2, 2]] * 2, np.int32)
  return {
    "image": image,
    "label": np.asarray([[[1, 0, 1], [0, 255, 0]]] * 2, np.uint8),
    # The last column of both images is padding.
    "valid_box": box,
    "scaled_box": box,
    "is_real": np.asarray([True, False]),
  }


def counts(name):
  step = evaluation.make_eval_step(
    RedMeansOne(), Protocol(name, (2, 3)), settings(2)
  )
  return jax.device_get(jax.jit(step)(NOTHING, batch()))


def test_padding_void_and_fillers_do_not_count():
  # Image 0: (1, predicted 1), (0, predicted 1), (0, predicted 0).
  found, classes = counts("padded")
  assert found["confusions"].tolist() == [[[1, 1], [0, 1]], [[0, 0], [0, 0]]]
  assert classes[0].tolist() == [[1, 1, 0], [0, 0, 0]]


def test_published_protocol_counts_padding_as_class_0():
  # Padding is the mean colour, a tie, which is class 0: two more right pixels.
  found, _ = counts("center_crop")
  assert found["confusions"][0].tolist() == [[3, 1], [0, 1]]
  assert found["confusions"][1].sum() == 0


def test_confidence_of_what_counts():
  # Logits +-3.1 (red 255), +-2 (red 0), and a tie in the padding.
  bright, dark = 1 / (1 + np.exp(-6.2)), 1 / (1 + np.exp(-4.0))
  found, _ = counts("padded")
  # Of the image, and of the filler.
  calibration = np.zeros((2, 15, 2), int)
  calibration[0, 14] = 3, 2
  assert found["calibration"].tolist() == calibration.tolist()
  np.testing.assert_allclose(
    found["confidence"],
    [[0] * 14 + [2 * bright + dark], [0] * 15],
    rtol=1e-5,
  )
  found, _ = counts("center_crop")
  # 0.5 lies in (7 / 15, 8 / 15].
  assert found["calibration"][0, 7].tolist() == [2, 2]
  assert found["confidence"][0, 7] == pytest.approx(1)


def test_predict_step_gives_classes_and_entropy():
  step = evaluation.make_predict_step(RedMeansOne(), mean=MEAN, std=STD)
  classes, entropies = step(NOTHING, batch())
  assert classes[0].tolist() == [[1, 1, 0], [0, 0, 0]]
  # Logits -3.1 and 3.1; a tie has ln 2.
  p = 1 / (1 + np.exp(-6.2))
  expected = -p * np.log(p) - (1 - p) * np.log(1 - p)
  np.testing.assert_allclose(entropies[0, 0, 0], expected, rtol=1e-4)
  np.testing.assert_allclose(entropies[0, 0, 2], np.log(2), rtol=1e-5)


# -- Resizing ------------------------------------------------------------------


@pytest.mark.parametrize("new", [(13, 21), (4, 3), (1, 30), (7, 9)])
def test_content_of_a_box_is_resized_as_a_whole_image(new):
  content = np.random.default_rng(0).normal(size=(7, 9, 2)).astype(np.float32)
  x = np.full((1, 12, 14, 2), 1e6, np.float32)
  x[0, 2:9, 3:12] = content
  result = evaluation.resize_boxes(
    jnp.asarray(x),
    jnp.asarray([[2, 3, 9, 12]]),
    jnp.asarray([[1, 5, 1 + new[0], 5 + new[1]]]),
    (20, 40),
  )[0]
  expected = resize_bilinear(jnp.asarray(content)[None], new)[0]
  inside = np.s_[1 : 1 + new[0], 5 : 5 + new[1]]
  np.testing.assert_allclose(result[inside], expected, atol=2e-5)
  rest = np.array(result)
  rest[inside] = 0
  assert not rest.any()


# -- Protocols against plain loops ---------------------------------------------

SIZES = ((23, 31), (40, 17), (23, 31), (9, 50), (31, 30))


def photographs():
  """Images of odd sizes and their masks of 3 classes; one all ignored."""
  rng = np.random.default_rng(2)
  pairs = []
  for number, size in enumerate(SIZES):
    label = rng.choice([0, 1, 2, 255], size).astype(np.uint8)
    if number == 3:
      label[:] = 255
    pairs.append((rng.integers(0, 256, (*size, 3)).astype(np.uint8), label))
  return pairs


def network(image):
  """[h, w, 3] normalised -> [h, w, 3] logits, as Asymmetric."""
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
  views = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (0, 1))
  logits = np.einsum("hwcij,ijck->hwk", views[::2, ::2], KERNEL)
  return resized(logits - logits.mean((0, 1)), image.shape[:2])


def resized(x, size):
  """Bilinear, corners on corners, one axis after the other."""
  for axis in (0, 1):
    position = np.linspace(0, x.shape[axis] - 1, size[axis])
    low = np.minimum(position.astype(int), max(x.shape[axis] - 2, 0))
    high = np.minimum(low + 1, x.shape[axis] - 1)
    share = np.expand_dims(position - low, (1, 2) if axis == 0 else (0, 2))
    x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
  return x


WINDOW, STRIDE = (20, 24), (14, 16)


def sliding(x, function):
  """A plain loop over windows, as the published evaluation has it."""
  height, width = x.shape[:2]
  rows, columns = max(WINDOW[0] - height, 0), max(WINDOW[1] - width, 0)
  top, left = rows // 2, columns // 2
  x = np.pad(x, ((top, rows - top), (left, columns - left), (0, 0)))
  total, weight = np.zeros(x.shape), np.zeros((*x.shape[:2], 1))
  for i in range(int(np.ceil((x.shape[0] - WINDOW[0]) / STRIDE[0])) + 1):
    for j in range(int(np.ceil((x.shape[1] - WINDOW[1]) / STRIDE[1])) + 1):
      bottom = min(i * STRIDE[0] + WINDOW[0], x.shape[0])
      right = min(j * STRIDE[1] + WINDOW[1], x.shape[1])
      part = np.s_[bottom - WINDOW[0] : bottom, right - WINDOW[1] : right]
      total[part] += function(x[part])
      weight[part] += 1
  return (total / weight)[top : top + height, left : left + width]


def padded(x, function, scale):
  """What is mirrored is the padded image, (48, 56) at scale 1."""
  canvas = np.zeros((round(48 * scale), round(56 * scale), 3))
  canvas[: x.shape[0], : x.shape[1]] = x
  return function(canvas)[: x.shape[0], : x.shape[1]]


def mirrored_network(x):
  return network(x[:, ::-1])[:, ::-1]


def probabilities(image, name, scales, flip):
  """Average over scales and flips, one pass after the other."""
  x = (image.astype(np.float64) - 100) / 50
  found = []
  for scale in scales:
    size = [round(n * scale) for n in image.shape[:2]]
    scaled = resized(x, size)
    for function in (network, mirrored_network)[: 1 + flip]:
      if name == "sliding_window":
        logits = sliding(scaled, function)
      elif name == "padded":
        logits = padded(scaled, function, scale)
      else:
        logits = function(scaled)
      logits = resized(logits, image.shape[:2])
      exp = np.exp(logits - logits.max(-1, keepdims=True))
      found.append(exp / exp.sum(-1, keepdims=True))
  return np.mean(found, 0)


def protocol(name, scales, flip):
  size = {"padded": (48, 56), "whole": None, "sliding_window": WINDOW}[name]
  stride = STRIDE if name == "sliding_window" else None
  return Protocol(name, size, stride, scales, flip)


def batches(name, rows):
  """The stream's batches, made by hand; `rows` images of a size at once."""
  groups = {}
  for index, (image, _) in enumerate(photographs()):
    size = {
      "padded": (48, 56),
      "whole": image.shape[:2],
      "sliding_window": tuple(
        w + max(0, int(np.ceil((n - w) / s))) * s
        for n, w, s in zip(image.shape, WINDOW, STRIDE, strict=False)
      ),
    }[name]
    groups.setdefault(size, []).append(index)
  for size, members in groups.items():
    for start in range(0, len(members), rows):
      chosen = members[start : start + rows]
      made = {
        "image": np.zeros((rows, *size, 3), np.uint8),
        "label": np.full((rows, *size), 255, np.uint8),
        "valid_box": np.zeros((rows, 4), np.int32),
        "index": np.resize(chosen, rows).astype(np.int32),
        "is_real": np.arange(rows) < len(chosen),
      }
      for row, index in enumerate(made["index"]):
        image, label = photographs()[index]
        h, w = label.shape
        top = left = 0
        if name == "sliding_window":
          top = max(WINDOW[0] - h, 0) // 2
          left = max(WINDOW[1] - w, 0) // 2
        made["image"][row, top : top + h, left : left + w] = image
        # Fillers too: nothing but is_real keeps them out.
        made["label"][row, top : top + h, left : left + w] = label
        made["valid_box"][row] = top, left, top + h, left + w
      yield made


@pytest.mark.parametrize("flip", [False, True])
def test_scaled_crop_counts_its_padding(flip):
  """The crop with its padding is the image that is resized."""
  image, label = photographs()[0]
  made = {
    "image": np.zeros((1, 27, 35, 3), np.uint8),
    "label": np.full((1, 27, 35), 255, np.uint8),
    "valid_box": np.asarray([[2, 2, 25, 33]], np.int32),
    "index": np.zeros(1, np.int32),
    "is_real": np.ones(1, bool),
  }
  made["image"][0, 2:25, 2:33], made["label"][0, 2:25, 2:33] = image, label
  evaluator = Evaluator(
    Asymmetric(),
    sharding.create_mesh(jax.devices()[:1]),
    Protocol("center_crop", (27, 35), None, (1.0, 1.3), flip),
    settings(3),
  )
  counted = evaluator.count(NOTHING, [made], 1)
  x = np.zeros((27, 35, 3))
  x[2:25, 2:33] = (image.astype(float) - 100) / 50
  found = []
  for size in ((27, 35), (35, 46)):
    for function in (network, mirrored_network)[: 1 + flip]:
      logits = resized(function(resized(x, size)), (27, 35))
      exp = np.exp(logits - logits.max(-1, keepdims=True))
      found.append(exp / exp.sum(-1, keepdims=True))
  truth = np.zeros((27, 35), int)
  truth[2:25, 2:33] = label
  confusion = np.zeros((3, 3), int)
  valid = truth != 255
  np.add.at(confusion, (truth[valid], np.mean(found, 0).argmax(-1)[valid]), 1)
  np.testing.assert_array_equal(counted.confusions[0], confusion)


def test_many_compilations_are_announced(monkeypatch, caplog):
  monkeypatch.setattr("u2pl_jax.evaluator._MANY_SHAPES", 3)
  evaluator = Evaluator(
    Asymmetric(),
    sharding.create_mesh(jax.devices()[:1]),
    Protocol("whole"),
    settings(3),
  )
  evaluator.count(NOTHING, batches("whole", 2), len(SIZES))
  assert evaluator.num_compilations == 4
  assert caplog.text.count("compiles the network for every size") == 1


def counted_on(num_devices, rows):
  """[[n, k, k]] of two protocols, as JSON."""
  found = []
  for name, scale in (("padded", 1.0), ("sliding_window", 0.5)):
    evaluator = Evaluator(
      Asymmetric(),
      sharding.create_mesh(jax.devices()[:num_devices]),
      protocol(name, (scale,), False),
      settings(3),
    )
    counted = evaluator.count(NOTHING, batches(name, rows), len(SIZES))
    found.append(counted.confusions.tolist())
  return found


def test_three_devices_with_a_remainder_are_one():
  """5 images in batches of 3; groups of 2 and of 1 image have fillers."""
  result = subprocess.run(
    [
      sys.executable,
      "-c",
      "from tests import test_evaluation as t; print(t.counted_on(3, 3))",
    ],
    cwd=pathlib.Path(__file__).parent.parent,
    env=pretended.environment(3),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout) == counted_on(1, 1)


@pytest.mark.parametrize(
  ("name", "scales", "flip", "compilations"),
  [
    ("whole", (1.0,), False, 4),
    ("padded", (1.0,), False, 1),
    ("sliding_window", (1.0,), False, 3),
    ("whole", (1.0, 1.5), True, 8),
    ("padded", (0.75, 1.0, 1.5), True, 3),
    ("sliding_window", (0.75, 1.0, 1.5), True, 9),
    ("sliding_window", (0.5,), False, 3),
  ],
)
def test_protocol_is_the_plain_loop(name, scales, flip, compilations):
  evaluator = Evaluator(
    Asymmetric(),
    sharding.create_mesh(jax.devices()[:1]),
    protocol(name, scales, flip),
    settings(3),
  )
  found = {}

  def keep(truth, prediction):
    found[truth.tobytes(), truth.shape] = prediction
    return np.zeros((3, 2), np.int64)

  updates = []
  counted = evaluator.count(
    NOTHING,
    batches(name, 2),
    len(SIZES),
    boundary=keep,
    update=updates.append,
  )
  calibration = np.zeros((15, 3))
  for index, (image, label) in enumerate(photographs()):
    average = probabilities(image, name, scales, flip)
    predicted = found[label.tobytes(), label.shape]
    differing = predicted != average.argmax(-1)
    # Rounding may decide where two classes are equally likely.
    best = np.sort(average, -1)
    assert (best[..., -1] - best[..., -2])[differing].max(initial=0) < 1e-4
    assert differing.sum() <= 1
    expected, valid = predicted, label != 255
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (label[valid], expected[valid]), 1)
    np.testing.assert_array_equal(counted.confusions[index], confusion)
    for confidence, right in zip(
      average.max(-1)[valid], (label == expected)[valid], strict=True
    ):
      calibration[int(np.ceil(confidence * 15)) - 1] += 1, confidence, right
  np.testing.assert_allclose(counted.calibration, calibration, atol=1.01)
  assert counted.confusions[3].sum() == 0  # All of it is ignored.
  assert counted.calibration[:, 0].sum() == counted.confusions.sum()
  assert sum(updates) == len(SIZES)
  assert evaluator.num_compilations == compilations
