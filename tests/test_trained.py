"""Networks from workdirs and from files of weights."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import torch
from flax import traverse_util

from configs import testing
from input_pipeline import dataset_info
from input_pipeline.dataset_config import load_info
from u2pl_jax.build import make_model
from u2pl_jax.checkpoint import (
  CheckpointError,
  Checkpoints,
  read_checkpoint,
)
from u2pl_jax.models import torch_weights
from u2pl_jax.models.weight_files import WeightsError
from u2pl_jax.trained import TrainedError, load_trained

# Of the run: 16 unlabelled images in batches of 4, three epochs, one warm-up.
WARMUP_STEP, LAST_STEP = 4, 12


def copy_run(run, folder):
  """A workdir to damage."""
  return shutil.copytree(run.workdir, folder / "run")


def assert_variables_equal(variables, arrays, prefix):
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert isinstance(leaf, np.ndarray)
    np.testing.assert_array_equal(leaf, arrays[f"{prefix}/{name}"])
  assert len(leaves) == sum(name.startswith(prefix + "/") for name in arrays)


def test_best_checkpoint_of_a_workdir(trained_run):
  trained = load_trained(trained_run.workdir)
  rows = [
    json.loads(line)
    for line in (trained_run.workdir / "metrics.jsonl").read_text().splitlines()
  ]
  scores = {r["step"]: r["eval/miou"] for r in rows if "eval/miou" in r}
  best = max(scores, key=scores.get)
  assert trained.step == best
  assert trained.weights == ("teacher" if best > WARMUP_STEP else "student")
  stored = read_checkpoint(trained_run.workdir, best)
  assert_variables_equal(trained.variables, stored.arrays, trained.weights)
  info = dataset_info("shapes")
  for field in ("class_names", "palette", "mean", "std"):
    assert getattr(trained.info, field) == getattr(info, field)
  assert trained.ignore_label == 255
  assert trained.config.model.backbone == "tiny"


def test_network_and_step_can_be_chosen(trained_run):
  stored = read_checkpoint(trained_run.workdir, LAST_STEP)
  for name in ("teacher", "student"):
    trained = load_trained(trained_run.workdir, weights=name, step=LAST_STEP)
    assert (trained.weights, trained.step) == (name, LAST_STEP)
    assert_variables_equal(trained.variables, stored.arrays, name)
  with pytest.raises(CheckpointError, match="no checkpoint of step 5, only of"):
    load_trained(trained_run.workdir, step=5)


def test_teacher_of_a_supervised_run_is_refused(trained_run, tmp_path):
  workdir = copy_run(trained_run, tmp_path)
  meta = workdir / "checkpoints" / str(LAST_STEP) / "meta" / "metadata"
  content = json.loads(meta.read_text()) | {"network": "student"}
  del content["meta_checksum"]  # As of versions that saved none.
  meta.write_text(json.dumps(content))
  assert load_trained(workdir, step=LAST_STEP).weights == "student"
  with pytest.raises(TrainedError, match="teacher has had no update"):
    load_trained(workdir, step=LAST_STEP, weights="teacher")


def test_damage_names_the_other_steps(trained_run, tmp_path):
  workdir = copy_run(trained_run, tmp_path)
  folder = workdir / "checkpoints" / str(LAST_STEP)
  largest = max(
    (folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size
  )
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 0xFF
  largest.write_bytes(bytes(data))
  with pytest.raises(CheckpointError, match="choose another step: .*8") as info:
    load_trained(workdir, step=LAST_STEP)
  assert "\n" not in str(info.value)
  assert folder.is_dir()


def test_no_run_and_no_checkpoint(trained_run, tmp_path):
  with pytest.raises(TrainedError, match="no such workdir or file"):
    load_trained(tmp_path / "absent")
  with pytest.raises(TrainedError, match="no run here"):
    load_trained(trained_run.workdir / "checkpoints")
  workdir = copy_run(trained_run, tmp_path)
  shutil.rmtree(workdir / "checkpoints")
  with pytest.raises(CheckpointError, match="no checkpoint yet"):
    load_trained(workdir)
  assert not (workdir / "checkpoints").exists()
  (workdir / "dataset.json").unlink()
  with pytest.raises(TrainedError, match="dataset.json: there is no such file"):
    load_trained(workdir)


def test_config_of_another_network(trained_run, tmp_path):
  config = testing.get_config()
  config.model.dtype = "bfloat16"  # Not another network.
  load_trained(trained_run.workdir, config=config)
  config.model.rep_features = 8
  with pytest.raises(TrainedError, match="rep_features=16, but --config says"):
    load_trained(trained_run.workdir, config=config)

  workdir = copy_run(trained_run, tmp_path)
  own = json.loads((workdir / "config.json").read_text())
  own["model"]["rep_features"] = 8
  (workdir / "config.json").write_text(json.dumps(own))
  with pytest.raises(TrainedError, match="of different networks: params/"):
    load_trained(workdir)
  own["model"]["rep_features"] = 16
  (workdir / "config.json").write_text(json.dumps(own))
  dataset = json.loads((workdir / "dataset.json").read_text())
  dataset["class_names"].pop(), dataset["palette"].pop()
  (workdir / "dataset.json").write_text(json.dumps(dataset))
  with pytest.raises(TrainedError, match="of different networks: params/"):
    load_trained(workdir)


@pytest.fixture(scope="module")
def published(trained_run, tmp_path_factory):
  """(config, .pth with both networks) of a small ResNet in published form."""
  config = testing.get_config()
  config.model.backbone = "resnet18"
  config.dataset.root = str(trained_run.data)
  model = make_model(config, load_info(config.dataset).num_classes)
  variables = jax.jit(
    lambda key: model.init(key, np.zeros((1, 65, 65, 3)), train=False)
  )(jax.random.key(0))
  state = {
    f"module.{name}": torch.tensor(value)
    for name, value in torch_weights.to_state_dict(variables).items()
  }
  other = {name: value + 1 for name, value in state.items()}
  path = tmp_path_factory.mktemp("published") / "ckpt_best.pth"
  torch.save({"teacher_state": state, "model_state": other, "epoch": 3}, path)
  return config, variables, path


def test_published_file(published):
  config, variables, path = published
  trained = load_trained(path, config=config)
  assert (trained.weights, trained.step) == ("teacher", None)
  for ours, theirs in (
    (trained.variables.params, variables["params"]),
    (trained.variables.batch_stats, variables["batch_stats"]),
  ):
    jax.tree.map(np.testing.assert_array_equal, ours, dict(theirs))
  student = load_trained(path, config=config, weights="student")
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, np.asarray(b) + 1),
    student.variables.params,
    dict(variables["params"]),
  )


def test_published_file_without_its_config(published, tmp_path):
  config, _, path = published
  with pytest.raises(TrainedError, match="knows neither its dilations"):
    load_trained(path)
  with pytest.raises(TrainedError, match="has no --step"):
    load_trained(path, config=config, step=3)
  config = config.copy_and_resolve_references()
  config.dataset.name = "voc"
  with pytest.raises(TrainedError, match="number of classes is .* but 21"):
    load_trained(path, config=config)
  config.model.backbone = "resnet34"
  with pytest.raises(WeightsError, match="resnet18"):
    load_trained(path, config=config)


def test_weights_that_are_not_finite(published, trained_run, tmp_path):
  config, _, path = published
  content = torch.load(path, weights_only=True)
  content["teacher_state"]["module.encoder.layer1.0.conv1.weight"][0] = np.nan
  bad = tmp_path / "bad.pth"
  torch.save(content, bad)
  with pytest.raises(WeightsError, match="encoder.*not finite"):
    load_trained(bad, config=config)
  load_trained(bad, config=config, weights="student")

  workdir = copy_run(trained_run, tmp_path)
  stored = read_checkpoint(workdir, LAST_STEP)
  name = next(name for name in stored.arrays if "student/params/enc" in name)
  stored.arrays[name].flat[0] = np.inf
  state = traverse_util.unflatten_dict(stored.arrays, sep="/")
  checkpoints = Checkpoints(workdir, keep=3)
  checkpoints.save(state, dataclasses.replace(stored.meta, step=99))
  checkpoints.close()
  load_trained(workdir, step=99, weights="teacher")
  with pytest.raises(TrainedError, match="params/encoder/.*not finite"):
    load_trained(workdir, step=99, weights="student")
