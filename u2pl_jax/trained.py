"""A trained network and all that is needed to use it, from one path.

A workdir says everything itself: config.json the network, dataset.json the
classes, colours and pixel statistics, checkpoints/ the weights. A file of
weights says nothing but the weights: a config says the rest.
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from input_pipeline import DatasetInfo
from input_pipeline.dataset_config import load_info
from u2pl_jax.build import make_model, runs_on_one_cpu
from u2pl_jax.checkpoint import read_checkpoint
from u2pl_jax.models import torch_weights
from u2pl_jax.models.deeplab import DeepLab
from u2pl_jax.models.pretrained import check_pretrained, read_pretrained
from u2pl_jax.train_state import Variables
from u2pl_jax.writers import CONFIG_FILE, DATASET_FILE

logger = logging.getLogger(__name__)

NETWORKS = ("teacher", "student")

# They change how the network is computed or trained, not which one it is.
_NOT_THE_NETWORK = ("dropout", "dtype", "pretrained", "remat")


class TrainedError(ValueError):
  """One line that names the path and the fix."""


@dataclasses.dataclass(frozen=True)
class Trained:
  """A network with its weights.

  Attributes:
    path: where the weights come from.
    config: complete; of the run, or the one that was given.
    info: classes, palette and pixel statistics that belong to the weights.
    ignore_label: of the masks that it was trained with.
    model: the network.
    variables: host arrays, all finite.
    weights: 'teacher' or 'student'; '' of a file that holds one network.
    step: updates done; None of a file.
  """

  path: str
  config: ml_collections.ConfigDict
  info: DatasetInfo
  ignore_label: int
  model: DeepLab
  variables: Variables
  weights: str
  step: int | None


def load_trained(
  path: str | os.PathLike,
  *,
  weights: str | None = None,
  step: int | None = None,
  config: ml_collections.ConfigDict | None = None,
) -> Trained:
  """Loads the network of a run, or of a file of weights.

  Args:
    path: a workdir, or a .pth or .npz as `config.model.pretrained` takes it.
    weights: 'teacher' or 'student'; None takes what is judged in training, the
      teacher once it has had an update, else the student. Of a file, None takes
      the teacher if it holds both.
    step: of a workdir, which checkpoint; None for the best by mIoU.
    config: of a file: says the network and the data set. Of a workdir: must
      describe the same network if it is given.

  Returns:
    `Trained`.

  Raises:
    TrainedError: the path is neither; weights and config do not belong
      together; a weight is not finite.
    CheckpointError: of a workdir, there is no such checkpoint, or it is
      damaged.
    WeightsError: the file cannot be read.
    ConfigError, DataError: of `config.dataset`.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    trained = _from_workdir(path, weights, step, config)
  elif not path.exists():
    raise TrainedError(
      f"{path}: there is no such workdir or file of weights; a workdir is the"
      " folder that a run was given with --workdir, runs/<config name> by"
      " default"
    )
  else:
    trained = _from_file(path, weights, step, config)
  _check_finite(trained)
  return trained


def _from_workdir(
  workdir: pathlib.Path,
  weights: str | None,
  step: int | None,
  config: ml_collections.ConfigDict | None,
) -> Trained:
  if not (workdir / CONFIG_FILE).is_file():
    raise TrainedError(
      f"{workdir}: no run here (there is no {CONFIG_FILE}): give the workdir of"
      " a run, not a folder inside or above it"
    )
  own_config = ml_collections.ConfigDict(_read_json(workdir / CONFIG_FILE))
  dataset = dict(_read_json(workdir / DATASET_FILE))
  ignore_label = dataset.pop("ignore_label")
  info = DatasetInfo(
    name=dataset["name"],
    class_names=tuple(dataset["class_names"]),
    palette=tuple(map(tuple, dataset["palette"])),
    mean=tuple(dataset["mean"]),
    std=tuple(dataset["std"]),
  )
  if config is not None:
    _check_same_network(workdir, own_config, config)
  stored = read_checkpoint(workdir, step)
  chosen = weights or stored.meta.network
  if chosen == "teacher" and stored.meta.network != "teacher":
    raise TrainedError(
      f"{workdir}: at step {stored.meta.step} the teacher has had no update, it"
      " is no more than the initial weights: take the student, or a later step"
    )
  model = make_model(
    own_config, info.num_classes, for_one_cpu=runs_on_one_cpu()
  )
  prefix = chosen + "/"
  arrays = {
    name.removeprefix(prefix): array
    for name, array in stored.arrays.items()
    if name.startswith(prefix)
  }
  _check_arrays(workdir, arrays, model)
  tree = traverse_util.unflatten_dict(arrays, sep="/")
  return Trained(
    path=str(workdir),
    config=own_config,
    info=info,
    ignore_label=ignore_label,
    model=model,
    variables=Variables(tree["params"], tree["batch_stats"]),
    weights=chosen,
    step=stored.meta.step,
  )


def _from_file(
  path: pathlib.Path,
  weights: str | None,
  step: int | None,
  config: ml_collections.ConfigDict | None,
) -> Trained:
  if step is not None:
    raise TrainedError(f"{path}: a file of weights has no --step: leave it out")
  if config is None:
    raise TrainedError(
      f"{path}: a file of weights knows neither its dilations nor its classes:"
      " give the config too, for example --config=configs/voc_1464.py"
    )
  info = load_info(config.dataset)
  model = make_model(config, info.num_classes, for_one_cpu=runs_on_one_cpu())
  pretrained = read_pretrained(path, network=weights)
  check_pretrained(pretrained, model)
  found = pretrained.description
  if found.head is None:
    raise TrainedError(
      f"{path}: weights of an encoder alone ({found}): it predicts nothing"
      " before it has been trained, see --config.model.pretrained"
    )
  for what, theirs, ours, fix in (
    ("head", found.head, model.head, f"set --config.model.head={found.head}"),
    (
      "number of classes",
      found.num_classes,
      info.num_classes,
      "choose the config of its data set",
    ),
  ):
    if theirs != ours:
      raise TrainedError(
        f"{path}: the {what} is {theirs} there, but {ours} in the config of"
        f" {info.name!r}: {fix}"
      )
  # An auxiliary head is for training alone: neither side needs the other's.
  model = model.clone(auxiliary=found.auxiliary)
  variables = _abstract_variables(model)
  wanted = torch_weights.shapes(variables)
  for name, shape in wanted.items():
    tensor = pretrained.tensors.get(name)
    if tensor is None or tensor.shape != shape:
      raise TrainedError(
        f"{path}: {name} is"
        f" {'absent' if tensor is None else list(tensor.shape)} there, but"
        f" {list(shape)} in the network of the config: choose the config that"
        " it was trained with"
      )
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
  tree = torch_weights.replace(
    zeros, {name: pretrained.tensors[name] for name in wanted}
  )
  name = next((n for n in NETWORKS if pretrained.network.startswith(n)), "")
  return Trained(
    path=str(path),
    config=config,
    info=info,
    ignore_label=config.dataset.ignore_label,
    model=model,
    variables=Variables(
      jax.tree.map(np.asarray, tree["params"]),
      jax.tree.map(np.asarray, tree["batch_stats"]),
    ),
    weights=name,
    step=None,
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise TrainedError(
      f"{path}: there is no such file: run the training command again, which"
      " writes it"
    ) from None
  except (OSError, ValueError) as error:
    raise TrainedError(f"{path}: cannot be read ({error})") from None
  if not isinstance(value, dict):
    raise TrainedError(f"{path}: holds no JSON object")
  return value


def _check_same_network(
  workdir: pathlib.Path,
  own: ml_collections.ConfigDict,
  given: ml_collections.ConfigDict,
) -> None:
  for key in given.model:
    if key in _NOT_THE_NETWORK:
      continue
    theirs, ours = own.model.get(key), given.model[key]
    if isinstance(ours, tuple | list):
      theirs, ours = tuple(theirs or ()), tuple(ours)
    if theirs != ours:
      raise TrainedError(
        f"{workdir}: the run has config.model.{key}={theirs!r}, but --config"
        f" says {ours!r}: leave --config out, or set it to the run's"
      )


def _abstract_variables(model: DeepLab) -> dict:
  def init():
    return model.init(jax.random.key(0), jnp.zeros((1, 65, 65, 3)), train=False)

  return dict(jax.eval_shape(init))


def _check_arrays(
  workdir: pathlib.Path, arrays: Mapping[str, np.ndarray], model: DeepLab
) -> None:
  """Names and shapes must be those of the network."""
  wanted = {
    name: tuple(leaf.shape)
    for name, leaf in traverse_util.flatten_dict(
      _abstract_variables(model), sep="/"
    ).items()
  }
  found = {name: array.shape for name, array in arrays.items()}
  for name in sorted(wanted.keys() | found.keys()):
    if wanted.get(name) != found.get(name):
      raise TrainedError(
        f"{workdir}: checkpoint and {CONFIG_FILE} are of different networks:"
        f" {name} is {found.get(name, 'absent')} in the checkpoint, but"
        f" {wanted.get(name, 'absent')} by the config"
      )


def _check_finite(trained: Trained) -> None:
  leaves = jax.tree_util.tree_leaves_with_path(trained.variables)
  for path, leaf in leaves:
    if not np.isfinite(leaf).all():
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise TrainedError(
        f"{trained.path}: {name} has values that are not finite: the weights"
        " are of a run that diverged, or damaged"
      )
