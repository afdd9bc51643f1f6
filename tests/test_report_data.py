"""Which pictures a report shows, and the method's decisions in them."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import testing
from input_pipeline.dataset_config import load_info, prepare_dataset
from u2pl_jax import report, report_data
from u2pl_jax.build import DataSpec, build
from u2pl_jax.data import load_data
from u2pl_jax.report_data import Reporter, pick_images
from u2pl_jax.run_log import RunError
from u2pl_jax.train_state import Variables

IDS = ("a", "b", "c", "d", "e", "f", "g")
SCORES = dict(zip(IDS, (0.1, 0.9, 0.5, np.nan, 0.7, 0.3, 0.5), strict=True))


@pytest.mark.parametrize(
  ("count", "expected"),
  [
    (0, []),
    (1, [("c", "median")]),
    (2, [("b", "best"), ("a", "worst")]),
    (3, [("b", "best"), ("c", "median"), ("a", "worst")]),
    (
      5,
      [
        ("b", "best"),
        ("e", "best"),
        ("c", "median"),
        ("f", "worst"),
        ("a", "worst"),
      ],
    ),
    # Six were judged, d has no labelled pixel; no image is shown twice.
    (
      9,
      [
        ("b", "best"),
        ("e", "best"),
        ("c", "median"),
        ("g", "median"),
        ("f", "worst"),
        ("a", "worst"),
      ],
    ),
  ],
)
def test_best_median_and_worst(count, expected):
  picked = pick_images(IDS, SCORES, count)
  if count == 1:
    assert picked[0][1] == "median" and SCORES[picked[0][0]] == 0.5
  else:
    assert picked == expected


def test_without_scores_the_first_images():
  assert pick_images(IDS, None, 2) == [("a", "first"), ("b", "first")]


# -- On the devices ------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(config, program, data, state) of the tiny config; nothing is trained."""
  config = testing.get_config()
  config.dataset.root = str(tmp_path_factory.mktemp("data"))
  # No schedule epoch has the same alpha as its neighbour.
  config.reliability.decay = "step"
  info = load_info(config.dataset)
  prepare_dataset(config.dataset)
  data = load_data(config, info)
  program = build(
    config,
    DataSpec(info.num_classes, info.mean, info.std, len(data.unlabelled)),
  )
  return config, program, data, program.create_state()


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / "config.json").write_text('{"name": "trial"}')
  (tmp_path / "metrics.jsonl").write_text('{"step": 8, "eval/miou": 0.5}\n')
  return tmp_path


def _reporter(run, workdir) -> Reporter:
  config, program, data, _ = run
  return Reporter(config, program, data, workdir, devices="1 x cpu")


def _percentile(values, percent):
  """numpy's, in the precision of the values."""
  return np.percentile(values, percent).astype(values.dtype)


def test_decisions_on_unlabelled_images(run, workdir):
  config, program, data, state = run
  recipe, step = program.recipe, 5
  shown = _reporter(run, workdir).take(
    state.student, network="teacher", step=step, scores=None
  )
  # Equation 7 at the last update, which was number 4 of 12 counted from 0.
  assert recipe.total_steps == 12
  assert shown.alpha == pytest.approx(20 * (1 - 4 / 12), rel=1e-6)
  assert (shown.low_rank, shown.high_rank) == (1, 6)
  # Four from all over the list of 16.
  ids = [data.unlabelled[i] for i in (0, 5, 10, 15)]
  assert [entry.id for entry in shown.method] == ids
  entropies = np.concatenate([entry.entropy.ravel() for entry in shown.method])
  low = _percentile(entropies, shown.alpha)
  high = _percentile(entropies, 100 - shown.alpha)
  for entry in shown.method:
    # Not cut by eval.pad_to, and without its padding.
    assert entry.image.shape[:2] == entry.entropy.shape
    assert max(entry.image.shape[:2]) <= min(config.eval.pad_to)
    np.testing.assert_array_equal(entry.keep_mask, entry.entropy < high)
    np.testing.assert_array_equal(entry.unreliable_mask, ~entry.keep_mask)
    np.testing.assert_array_equal(entry.reliable_mask, entry.entropy <= low)


def test_negatives_are_ranks_of_the_teacher(run, workdir):
  """Against a plain sort, where the feature grid is the pixel grid's."""
  _, program, data, state = run
  recipe = program.recipe
  height, width = 64, 64
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (3, height, width, 3)).astype(np.uint8)
  whole, upper = [0, 0, height, width], [0, 0, 32, 64]
  valid_box = np.array([whole, upper, whole], np.int32)
  batch = {
    "image": image,
    "valid_box": valid_box,
    # The last one only fills the batch.
    "is_real": np.array([True, True, False]),
  }
  step = report_data.make_method_step(program.model, recipe)
  result = jax.device_get(jax.jit(step)(state.student, batch, 30.0))
  logits = jax.jit(
    lambda variables, x: program.model.apply(variables, x, train=False).logits
  )(state.student.for_apply(), _normalised(image, valid_box, recipe))
  ranks = (-np.asarray(logits)).argsort(-1, kind="stable").argsort(-1)
  grid = ranks.shape[1:3]
  rows = np.arange(grid[0]) * height // grid[0]
  cols = np.arange(grid[1]) * width // grid[1]
  unreliable = result["unreliable_mask"][:, rows][:, :, cols]
  expected = (ranks >= 1) & (ranks < 6) & unreliable[..., None]
  np.testing.assert_array_equal(result["negative_mask"], expected)
  assert 0 < expected.sum() < expected.size
  # Padding has neither pseudo label nor place in the percentiles.
  assert (result["pseudo_labels"][1, 32:] == recipe.ignore_label).all()
  for name in ("keep_mask", "reliable_mask", "unreliable_mask"):
    assert not result[name][1, 32:].any() and not result[name][2].any()
    assert result[name][1, :32].any()


def _normalised(image, valid_box, recipe):
  images = (image.astype(np.float32) - np.float32(recipe.mean)) / np.float32(
    recipe.std
  )
  for row, (top, left, bottom, right) in enumerate(valid_box):
    outside = np.ones(image.shape[1:3], bool)
    outside[top:bottom, left:right] = False
    images[row][outside] = 0
  return jnp.asarray(images)


def test_samples_are_those_that_were_picked(run, workdir):
  _, _, data, state = run
  scores = {image_id: float(i) for i, image_id in enumerate(data.validation)}
  shown = _reporter(run, workdir).take(
    state.student, network="student", step=3, scores=scores
  )
  assert [(s.id, s.group) for s in shown.samples] == [
    (data.validation[-1], "best"),
    (data.validation[0], "worst"),
  ]
  assert shown.method == () and shown.alpha is None


def test_labelled_pixels_are_counted_once_a_workdir(run, workdir, monkeypatch):
  config, _, data, state = run
  reporter = _reporter(run, workdir)
  reporter.draw(state.student, network="student", step=8)
  counts = report.labelled_pixels(workdir)
  expected = np.zeros(data.info.num_classes, np.int64)
  for image_id in data.labelled:
    with Image.open(data.source.mask_path(image_id)) as mask:
      values, number = np.unique(np.asarray(mask), return_counts=True)
    for value, n in zip(values, number, strict=True):
      if value != config.dataset.ignore_label:
        expected[value] += n
  assert counts == expected.tolist() and sum(counts) > 0
  monkeypatch.setattr(Reporter, "_labelled_pixels", None)
  _reporter(run, workdir).draw(state.student, network="student", step=9)
  assert report.pictured_step(workdir) == 9
  assert report.labelled_pixels(workdir) == counts


def test_a_report_that_fails_is_a_warning_then_an_error(
  run, workdir, monkeypatch, caplog
):
  """draw goes on, finish tries again and says what is wrong."""
  _, _, _, state = run
  reporter = _reporter(run, workdir)
  (workdir / "report").write_text("a file in the way")
  # Other tests of the session may have cut the loggers off from the root.
  monkeypatch.setattr(logging.getLogger("u2pl_jax"), "propagate", True)
  with caplog.at_level(logging.WARNING):
    reporter.draw(state.student, network="student", step=8)
  assert "report of step 8 could not be drawn" in caplog.text
  arguments = {"network": "student", "step": 12, "best_step": 8}
  with pytest.raises(RunError, match="the report cannot be written"):
    reporter.finish(state.student, **arguments)
  (workdir / "report").unlink()
  reporter.finish(state.student, **arguments)
  assert reporter.page.is_file()
  # With the pictures that draw had taken.
  assert report.pictured_step(workdir) == 8


def test_finish_keeps_the_pictures_of_the_best_network(run, workdir):
  _, _, _, state = run
  _reporter(run, workdir).draw(state.student, network="student", step=8)
  (workdir / "report" / "index.html").unlink()
  arguments = {"network": "student", "step": 12}
  broken = Variables({}, {})  # Whoever used it would fail.
  _reporter(run, workdir).finish(broken, best_step=8, **arguments)
  assert report.pictured_step(workdir) == 8
  # Pictures of another step are not those of the best one.
  _reporter(run, workdir).finish(state.student, best_step=9, **arguments)
  assert report.pictured_step(workdir) == 12
