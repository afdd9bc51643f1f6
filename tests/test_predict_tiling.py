"""Tiles and shapes: by hand, and against plain NumPy loops."""

import math
import tracemalloc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from u2pl_jax import tiling
from u2pl_jax.models.deeplab import Outputs
from u2pl_jax.reliability import entropy
from u2pl_jax.tiling import (
  Blender,
  Grid,
  Predictor,
  ladder,
  make_blended_maps,
  make_maps,
  tent,
  tile_positions,
)
from u2pl_jax.train_state import Variables
from u2pl_jax.trained import load_trained

MEAN, STD = (110.0, 120.0, 130.0), (50.0, 60.0, 70.0)


class PixelNetwork(nn.Module):
  """Logits of a pixel from that pixel alone."""

  num_classes: int

  @nn.compact
  def __call__(self, images, *, train):
    logits = nn.Conv(self.num_classes, (1, 1))(images)
    return Outputs(logits, logits, None)


def pixel_predictor(grid, batch=2, num_classes=4, **options):
  model = PixelNetwork(num_classes)
  params = model.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), train=False)
  params = jax.tree.map(lambda x: 3 * x, params["params"])
  return Predictor(
    model,
    Variables(params, {}),
    num_classes=num_classes,
    mean=MEAN,
    std=STD,
    grid=grid,
    batch=batch,
    **options,
  ), params["Conv_0"]["kernel"][0, 0]


def noise(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def softmax(logits):
  shifted = np.exp(logits - logits.max(-1, keepdims=True))
  return shifted / shifted.sum(-1, keepdims=True)


def assert_maps(prediction, probs):
  """The maps are those of [h, w, k] float64 probabilities."""
  ordered = np.sort(probs, -1)
  is_clear = ordered[..., -1] - ordered[..., -2] > 1e-5
  assert is_clear.mean() > 0.99
  np.testing.assert_array_equal(
    prediction.classes[is_clear], probs.argmax(-1)[is_clear]
  )
  confidence = probs.max(-1)
  nats = -(probs * np.log(probs)).sum(-1)
  for found, exact in (
    (prediction.confidence, 255 * confidence),
    (prediction.entropy, 255 * nats / math.log(probs.shape[-1])),
  ):
    assert found.dtype == np.uint8
    assert np.abs(found - exact).max() < 0.51
  assert prediction.mean_confidence == pytest.approx(
    confidence.mean(), abs=1e-5
  )
  assert prediction.mean_entropy == pytest.approx(nats.mean(), abs=1e-5)


# -- Shapes --------------------------------------------------------------------


def test_positions_by_hand():
  # Stride 22: four steps for the 67 pixels that the first tile leaves.
  assert tile_positions(100, 33) == (0, 16, 33, 50, 67)
  assert tile_positions(99, 66) == (0, 33)
  assert tile_positions(66, 66) == tile_positions(5, 66) == (0,)
  # A 20-megapixel image in 8 x 11 tiles.
  assert len(tile_positions(3648, 769)) == 7
  assert len(tile_positions(5472, 769)) == 11


def test_positions_cover_and_overlap():
  for side in (33, 64, 769):
    for size in (*range(side, side + 90), 3 * side + 1, 5472):
      starts = np.array(tile_positions(size, side))
      assert starts[0] == 0
      assert starts[-1] + side == size
      assert (np.diff(starts) > 0).all()
      assert (starts[:-1] + side - starts[1:] >= side // 3).all()


def test_ladder_and_input_shapes():
  sides = [769, 609, 481, 385, 305, 241, 193, 153, 121, 97, 73, 57, 41, 33]
  assert ladder(769) == sides
  grid = Grid((769, 769), one_shape=False)
  assert grid.input_shape(375, 500) == (385, 609)
  assert grid.input_shape(1, 33) == (33, 33)
  assert grid.input_shape(385, 386) == (385, 481)
  assert grid.input_shape(600, 3000) == (609, 769)
  assert grid.input_shape(769, 9000) == (769, 769)
  # All pairs of 14 sides for whole images; for tiles those with a longest side.
  assert grid.num_shapes() == 14 * 14 + 27
  for size in range(33, 770):
    assert size <= grid.input_shape(size, 1)[0] <= 1.25 * size + 8
  padded = Grid((360, 480), one_shape=True)
  assert padded.input_shape(1, 480) == padded.input_shape(999, 3) == (360, 480)
  assert padded.num_shapes() == 2
  assert padded.fits(360, 480)
  assert not padded.fits(361, 480)


def test_bands_run_along_the_shorter_side():
  grid = Grid((60, 60), one_shape=False)
  assert grid.corners(100, 60) == [[(0, 0)], [(40, 0)]]
  assert grid.corners(61, 100) == [[(0, 0), (1, 0)], [(0, 40), (1, 40)]]
  assert grid.corners(100, 61) == [[(0, 0), (0, 1)], [(40, 0), (40, 1)]]


def test_tent_by_hand():
  np.testing.assert_allclose(tent(5), np.array([1, 2, 3, 2, 1]) / 3)
  np.testing.assert_allclose(tent(4), [0.5, 1, 1, 0.5])


# -- Maps and blending ---------------------------------------------------------


def test_maps_are_those_of_the_training_code():
  logits = jax.random.normal(jax.random.key(1), (7, 9, 5)) * 2
  maps = jax.device_get(make_maps(5)(jax.nn.softmax(logits)))
  nats = np.asarray(entropy(logits))
  np.testing.assert_allclose(maps["exact_entropy"], nats, atol=1e-6)
  np.testing.assert_array_equal(maps["classes"], logits.argmax(-1))
  assert np.abs(maps["entropy"] - 255 * nats / math.log(5)).max() < 0.51
  # Certain, and as uncertain as can be.
  ends = make_maps(4)(jnp.array([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]))
  assert ends["entropy"].tolist() == [0, 255]
  assert ends["confidence"].tolist() == [255, 64]


@pytest.mark.parametrize(
  ("height", "width"), [(150, 61), (61, 150), (100, 100), (40, 170), (65, 66)]
)
def test_any_tiles_blend_as_in_a_plain_loop(monkeypatch, height, width):
  # A band has several pieces, the last of which is not full.
  monkeypatch.setattr(tiling, "_CHUNK", 1000)
  # Probabilities that have nothing to do with each other: every weight counts.
  rng = np.random.default_rng(height)
  grid = Grid((65, 57), one_shape=False)
  shape, bands = (
    grid.input_shape(height, width),
    grid.corners(height, width),
  )
  weight = np.minimum(np.arange(shape[0]) + 1, shape[0] - np.arange(shape[0]))
  across = np.minimum(np.arange(shape[1]) + 1, shape[1] - np.arange(shape[1]))
  weight = weight[:, None] / weight.max() * (across / across.max())
  sums = np.zeros((height, width, 3))
  total = np.zeros((height, width, 1))
  to_maps = jax.jit(make_blended_maps(3))
  blender = Blender(
    height,
    width,
    num_classes=3,
    bands=bands,
    shape=shape,
    to_maps=to_maps,
  )
  done = 0
  for band, corners in enumerate(bands):
    for top, left in corners:
      probs = softmax(rng.normal(0, 2, (*shape, 3)))
      weighted = probs * weight[..., None]
      done += blender.add(band, (top, left), weighted.astype(np.float32))
      for y in range(shape[0]):
        for x in range(shape[1]):
          if top + y < height and left + x < width:
            sums[top + y, left + x] += weighted[y, x]
            total[top + y, left + x] += weight[y, x]
  prediction, last = blender.finish()
  assert done + last == height * width
  assert_maps(prediction, sums / total)


@pytest.mark.parametrize(("height", "width"), [(130, 41), (50, 140), (90, 90)])
def test_tiles_equal_the_whole_for_a_network_of_one_pixel(height, width):
  image = noise(height, width)
  pixels = []
  tiled, kernel = pixel_predictor(
    Grid((49, 49), one_shape=False), batch=3, on_pixels=pixels.append
  )
  probs = softmax((image - np.array(MEAN)) / STD @ np.asarray(kernel, float))
  ((_, _, prediction),) = tiled.predict([("a", image)])
  assert prediction.num_inputs > 1
  assert sum(pixels) == height * width
  assert_maps(prediction, probs)
  whole, _ = pixel_predictor(Grid((153, 153), one_shape=True))
  ((_, _, one),) = whole.predict([("a", image)])
  assert one.num_inputs == 1
  assert_maps(one, probs)


def test_memory_is_that_of_a_band():
  # As the host allocates; all probabilities at once would take 50 MB.
  height, width, classes, side = 2000, 300, 21, 65
  grid = Grid((side, side), one_shape=False)
  bands = grid.corners(height, width)
  to_maps = jax.jit(make_blended_maps(classes))
  tile = np.ones((side, side, classes), np.float32)
  to_maps(np.zeros((1 << 16, classes), np.float32))  # Compiling allocates too.
  tracemalloc.start()
  blender = Blender(
    height,
    width,
    num_classes=classes,
    bands=bands,
    shape=(side, side),
    to_maps=to_maps,
  )
  for band, corners in enumerate(bands):
    for corner in corners:
      blender.add(band, corner, tile)
  blender.finish()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # Sums 1.6 MB, a chunk of pixels and its maps 6 MB, the outputs 1.8 MB.
  assert peak < 14e6
  assert height * width * classes * 4 == 50.4e6


# -- The network ---------------------------------------------------------------


def test_tiles_of_the_real_network_equal_a_plain_loop(trained_run):
  trained = load_trained(trained_run.workdir)
  info = trained.info
  image = noise(70, 101)
  predictor = Predictor(
    trained.model,
    trained.variables,
    num_classes=info.num_classes,
    mean=info.mean,
    std=info.std,
    grid=Grid((49, 49), one_shape=False),
    batch=2,
  )
  ((_, _, prediction),) = predictor.predict([("a", image)])
  sums = np.zeros((70, 101, info.num_classes))
  total = np.zeros((70, 101, 1))
  weight = np.minimum(np.arange(49) + 1, 49 - np.arange(49)) / 25
  weight = (weight[:, None] * weight)[..., None]
  apply = jax.jit(
    lambda x: (
      trained.model.apply(trained.variables.for_apply(), x, train=False).logits
    )
  )
  # Strides of 33: 70 - 49 in one step, 101 - 49 in two.
  for top in (0, 21):
    for left in (0, 26, 52):
      tile = image[None, top : top + 49, left : left + 49]
      logits = np.asarray(
        apply((tile - np.array(info.mean, np.float32)) / info.std)
      )
      probs = softmax(_resize(logits[0].astype(float), 49, 49))
      sums[top : top + 49, left : left + 49] += probs * weight
      total[top : top + 49, left : left + 49] += weight
  assert prediction.num_inputs == 6
  assert_maps_close(prediction, sums / total)


def _resize(x, height, width):
  """Bilinear with aligned corners, one axis after the other."""
  for axis, size in ((0, height), (1, width)):
    n = x.shape[axis]
    at = np.arange(size) * (n - 1) / (size - 1)
    low = np.minimum(at.astype(int), n - 2)
    shape = [1, 1, 1]
    shape[axis] = size
    part = (at - low).reshape(shape)
    x = np.take(x, low, axis) * (1 - part) + np.take(x, low + 1, axis) * part
  return x


def assert_maps_close(prediction, probs):
  """As `assert_maps`, with the float32 noise of a network."""
  ordered = np.sort(probs, -1)
  is_clear = ordered[..., -1] - ordered[..., -2] > 1e-3
  assert is_clear.mean() > 0.95
  np.testing.assert_array_equal(
    prediction.classes[is_clear], probs.argmax(-1)[is_clear]
  )
  assert np.abs(prediction.confidence - 255 * probs.max(-1)).max() < 0.6
  assert prediction.mean_confidence == pytest.approx(
    probs.max(-1).mean(), abs=1e-4
  )


def test_a_stream_keeps_order_and_compiles_each_shape_once():
  grid = Grid((97, 97), one_shape=False)
  predictor, kernel = pixel_predictor(grid, batch=2)
  sizes = [(30, 30), (1, 1), (33, 20), (90, 97), (3, 5), (120, 40), (200, 97)]
  sizes += [(33, 33), (41, 41), (40, 38)]
  images = [(i, noise(*size, seed=i)) for i, size in enumerate(sizes)]
  found = list(predictor.predict(images))
  assert [key for key, _, _ in found] == list(range(len(sizes)))
  for _, image, prediction in found:
    assert prediction.classes.shape == image.shape[:2]
    probs = softmax((image - np.array(MEAN)) / STD @ np.asarray(kernel, float))
    np.testing.assert_array_equal(prediction.classes, probs.argmax(-1))
  # Whole: 33x33, 97x97, 41x41; in tiles: 97x41 and 97x97.
  assert predictor.whole_step._cache_size() == 3
  assert predictor.tile_step._cache_size() == 2
