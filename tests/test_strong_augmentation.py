import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2pl_jax import strong_augmentation as strong


@pytest.mark.parametrize(("height", "width"), [(65, 65), (33, 47), (64, 80)])
def test_box_law(height, width):
  boxes = np.asarray(strong.draw_boxes(jax.random.key(0), 4000, height, width))
  top, left, h, w = boxes.T
  assert (top >= 0).all() and (top + h <= height).all()
  assert (left >= 0).all() and (left + w <= width).all()
  assert set(w) == set(range(width // 2 + 1, width))
  np.testing.assert_array_equal(h, np.round(height * width / 2 / w))
  # Uniform widths: the mean of n values is within 5 standard deviations.
  expected = (width // 2 + 1 + width - 1) / 2
  assert abs(w.mean() - expected) < 5 * w.std() / np.sqrt(len(w))
  room = width - w
  position = left[room > 4] / room[room > 4]
  assert abs(position.mean() - 0.5) < 0.03


def apply(mix, draw, labels, ignore_label=255):
  b, h, w = labels.shape
  images = jnp.broadcast_to(
    jnp.arange(1.0, b + 1)[:, None, None, None], (b, h, w, 3)
  )
  confidence = images[..., 0] / 10
  keep = strong.mix_mask(draw, mix, labels, ignore_label=ignore_label)
  return *(
    strong.fill(x, strong.partners(x), keep, mix, blank)
    for x, blank in ((images, 0), (labels, ignore_label), (confidence, 0))
  ), keep


def box_draw(apply_mix=True):
  keep = strong.outside_boxes(jnp.asarray([[0, 0, 1, 2], [1, 1, 1, 1]]), 2, 2)
  return strong.MixDraw(jnp.asarray(apply_mix), keep, None)


def test_cutmix_by_hand():
  labels = jnp.asarray([[[0, 1], [2, 3]], [[4, 5], [255, 7]]])
  images, mixed, confidence, keep = apply("cutmix", box_draw(), labels)
  # Image 0 takes its upper row from image 1, image 1 one pixel from image 0.
  assert mixed.tolist() == [[[4, 5], [2, 3]], [[4, 5], [255, 3]]]
  assert images[..., 0].tolist() == [[[2, 2], [1, 1]], [[2, 2], [2, 1]]]
  np.testing.assert_allclose(confidence, images[..., 0] / 10)
  assert keep.tolist() == [
    [[False, False], [True, True]],
    [[True, True], [True, False]],
  ]


def test_cutout_by_hand():
  labels = jnp.asarray([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
  images, mixed, confidence, _ = apply("cutout", box_draw(), labels)
  assert mixed.tolist() == [[[255, 255], [2, 3]], [[4, 5], [6, 255]]]
  assert images[..., 1].tolist() == [[[0, 0], [1, 1]], [[2, 2], [2, 0]]]
  assert confidence[0, 0].tolist() == [0, 0]


def test_classmix_keeps_half_of_the_classes():
  labels = jnp.asarray([[[0, 1], [2, 255]], [[3, 3], [3, 3]]])
  scores = jnp.asarray([[0.1, 0.9, 0.2, 0.99, 0.8], [0.5, 0.5, 0.5, 0.5, 0.5]])
  draw = strong.MixDraw(jnp.asarray(True), None, scores)
  _, mixed, _, keep = apply("classmix", draw, labels)
  # Of 0, 1, 2 and ignore (slot 4) the two best are 1 and ignore; a single class
  # keeps none of its pixels.
  assert keep[0].tolist() == [[False, True], [False, True]]
  assert not keep[1].any()
  assert mixed.tolist() == [[[3, 1], [3, 255]], [[0, 1], [2, 255]]]


@pytest.mark.parametrize("mix", ["cutmix", "cutout", "none"])
def test_coin_says_no(mix):
  labels = jnp.asarray([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
  images, mixed, _, keep = apply(mix, box_draw(apply_mix=False), labels)
  assert (mixed == labels).all() and keep.all()
  assert images[0].max() == 1


def test_coin_has_the_probability():
  draws = jax.vmap(
    lambda key: (
      strong.draw_mix(
        key,
        "cutmix",
        probability=0.3,
        batch=1,
        height=9,
        width=9,
        num_classes=2,
      ).apply
    )
  )(jax.random.split(jax.random.key(3), 4000))
  assert abs(draws.mean() - 0.3) < 0.03


def test_unknown_mix_lists_the_choices():
  with pytest.raises(ValueError, match="cutmix"):
    apply("mixup", box_draw(), jnp.zeros((2, 2, 2), jnp.int32))
