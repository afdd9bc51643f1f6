import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.golden import IGNORE, cases, fixtures, load, real, same
from u2pl_jax import strong_augmentation as strong

FILES = [load(path) for path in fixtures("mixing*.npz")]
CASES = [
  pytest.param(arrays, prefix, mix, id=f"{prefix}-{mix}")
  for arrays in FILES
  for prefix in cases(arrays, "data")
  for mix in ("cutout", "cutmix", "classmix")
]
BOXES = [
  pytest.param(arrays, name.removesuffix("_boxes"), id=name)
  for arrays in FILES
  for name in arrays
  if name.endswith("_boxes")
]


@pytest.mark.parametrize("arrays,prefix,mix", CASES)
def test_mix(arrays, prefix, mix):
  labels = arrays[f"{prefix}_target"]
  mask = arrays[f"{prefix}_{mix}:mask"] > 0
  scores = None
  if mix == "classmix":
    # The recorded choice of classes, as scores: the kept ones get the higher.
    num_classes = int(labels[labels != IGNORE].max()) + 1
    slots = np.where(labels == IGNORE, num_classes, labels)
    scores = np.zeros((len(labels), num_classes + 1), np.float32)
    for image, (slot, kept) in enumerate(zip(slots, mask, strict=True)):
      scores[image, np.unique(slot[kept])] = 1
  draw = strong.MixDraw(
    jnp.asarray(True),
    None if mix == "classmix" else jnp.asarray(mask),
    None if scores is None else jnp.asarray(scores),
  )
  labels = jnp.asarray(labels)
  keep_mask = strong.mix_mask(draw, mix, labels, ignore_label=IGNORE)
  images, mixed, confidence = (
    strong.fill(x, strong.partners(x), keep_mask, mix, blank)
    for x, blank in (
      (real(arrays[f"{prefix}_data"]), 0),
      (labels, IGNORE),
      (real(arrays[f"{prefix}_logits"]), 0),
    )
  )
  same("mixing", "mask", keep_mask, mask)
  same("mixing", "data", images, arrays[f"{prefix}_{mix}:data"])
  same("mixing", "target", mixed, arrays[f"{prefix}_{mix}:target"])
  same("mixing", "logits", confidence, arrays[f"{prefix}_{mix}:logits"])


@pytest.mark.parametrize("arrays,name", BOXES)
def test_box_law(arrays, name):
  """Heights follow from widths exactly, and both laws agree in distribution."""
  # "box65" is square, "box64x80" is not.
  sizes = [int(size) for size in re.findall(r"\d+", name)]
  height, width = sizes[0], sizes[-1]
  recorded = arrays[f"{name}_boxes"]
  ours = np.asarray(
    strong.draw_boxes(jax.random.key(0), len(recorded), height, width)
  )
  law = {w: h for _, _, h, w in ours.tolist()}
  for top, left, h, w in recorded.tolist():
    assert width // 2 + 1 <= w < width
    assert h == law.get(w, h) == round(height * width / 2 / w)
    assert 0 <= top <= height - h and 0 <= left <= width - w

  def quantities(boxes):
    top, left, h, w = boxes.astype(np.float64).T
    room_y, room_x = h < height, w < width
    return {
      "h": h,
      "w": w,
      "area": h * w / (height * width),
      "y_rel": (top[room_y] / (height - h[room_y])),
      "x_rel": (left[room_x] / (width - w[room_x])),
    }

  mine, theirs = quantities(ours), quantities(recorded)
  for key, values in mine.items():
    mean, std, low, high = arrays[f"{name}_{key}_stats"]
    # The recorded summary is that of the recorded boxes ...
    summary = theirs[key]
    np.testing.assert_allclose(
      [summary.mean(), summary.std(), summary.min(), summary.max()],
      [mean, std, low, high],
      rtol=1e-6,
      atol=1e-9,
    )
    # ... and ours is from the same law: 5 standard errors of a difference.
    error = std * np.sqrt(2 / len(recorded))
    assert abs(values.mean() - mean) < 5 * error + 1e-9, key
    assert abs(values.std() - std) < 0.1 * std + 1e-9, key
    assert abs(values.min() - low) <= 0.05 * abs(high - low) + 1e-9, key
    assert abs(values.max() - high) <= 0.05 * abs(high - low) + 1e-9, key
