"""Between the published state dict and flax variables, by name.

Our module names are the published ones with "/" for the dots between modules
and "_" before the index inside an nn.Sequential, so that a rule replaces a
table: `encoder/layer3_0/conv1/kernel` is `encoder.layer3.0.conv1.weight`.
The only file that knows torch's layout (OIHW kernels).
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from u2pl_jax.models import weight_files
from u2pl_jax.models.deeplab import DeepLab
from u2pl_jax.models.resnet import BACKBONES

_LEAVES = {
  ("params", "kernel"): "weight",
  ("params", "scale"): "weight",
  ("params", "bias"): "bias",
  ("batch_stats", "mean"): "running_mean",
  ("batch_stats", "var"): "running_var",
}


def torch_name(path: tuple[str, ...]) -> str:
  """Published name of a variable.

  Args:
    path: collection, modules and leaf, e.g. ('params', 'encoder', 'layer3_0',
      'conv1', 'kernel').

  Returns:
    E.g. 'encoder.layer3.0.conv1.weight'.
  """
  collection, *modules, leaf = path
  modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
  return ".".join([*modules, _LEAVES[collection, leaf]])


def to_state_dict(variables: Mapping) -> dict[str, np.ndarray]:
  """Flax variables -> published names and layout (no num_batches_tracked)."""
  state = {}
  for path, value in traverse_util.flatten_dict(dict(variables)).items():
    value = np.asarray(value)
    if path[-1] == "kernel":
      value = value.transpose(3, 2, 0, 1)
    state[torch_name(path)] = value
  return state


def shapes(
  variables: Mapping, *, prefix: str = ""
) -> dict[str, tuple[int, ...]]:
  """Published names that begin with `prefix`, and shapes in torch's layout."""
  found = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
    name = torch_name(path)
    if name.startswith(prefix):
      shape = leaf.shape
      if path[-1] == "kernel":
        shape = tuple(shape[i] for i in (3, 2, 0, 1))
      found[name] = shape
  return found


def replace(variables: Mapping, state: Mapping[str, np.ndarray]) -> dict:
  """Replaces the variables that `state` names.

  Args:
    variables: {'params': ..., 'batch_stats': ...}.
    state: arrays in torch's layout under published names.

  Returns:
    The new variables, in the types of the old ones.

  Raises:
    ValueError: a name is no variable's, or a shape differs.
  """
  flat = traverse_util.flatten_dict(dict(variables))
  paths = {torch_name(path): path for path in flat}
  for name, value in state.items():
    if name not in paths:
      raise ValueError(f"{name} belongs to no layer of this network")
    path, new = paths[name], np.asarray(value)
    if path[-1] == "kernel" and new.ndim == 4:
      new = new.transpose(2, 3, 1, 0)
    old = flat[path]
    if new.shape != old.shape:
      raise ValueError(f"{name} has shape {new.shape}, expected {old.shape}")
    flat[path] = jnp.asarray(new, old.dtype)
  return traverse_util.unflatten_dict(flat)


# -- What network a state dict belongs to --------------------------------------

_HEADS = ("decoder.", "auxor.")
# Layers whose size is the number of classes.
CLASS_LAYERS = ("decoder.classifier.8.", "decoder.head.4.", "auxor.aux.4.")


@dataclasses.dataclass(frozen=True)
class Description:
  """The network that a state dict belongs to.

  Attributes:
    backbone, stem: see `DeepLab`.
    head: see `DeepLab`, or None if there is an encoder only.
    num_classes: None without heads.
    auxiliary: there is an auxiliary head.
  """

  backbone: str
  stem: str
  head: str | None = None
  num_classes: int | None = None
  auxiliary: bool = False

  def __str__(self) -> str:
    parts = [self.backbone, f"{self.stem} stem"]
    if self.head is not None:
      parts += [self.head, f"{self.num_classes} classes"]
      parts.append("auxiliary head" if self.auxiliary else "no auxiliary head")
    else:
      parts.append("no heads")
    return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Match:
  """A state dict beside the network that it belongs to.

  Attributes:
    description: of that network.
    matched: names that fit.
    ignored: names that are not part of any network here and are known to be
      harmless: the classifier of ImageNet, torch's counters of batches.
    problems: what does not fit, one phrase each, that begins with the name.
  """

  description: Description
  matched: tuple[str, ...]
  ignored: tuple[str, ...]
  problems: tuple[str, ...]


def published_name(name: str) -> str:
  """Names of a backbone alone get their 'encoder.' back."""
  if re.match(r"(conv1|bn1|layer[1-4])\.", name):
    return "encoder." + name
  return name


def _describe(state: Mapping[str, np.ndarray]) -> Description:
  """ValueError if there is no ResNet in it."""
  blocks = [0, 0, 0, 0]
  for name in state:
    found = re.match(r"encoder\.layer([1-4])\.(\d+)\.", name)
    if found:
      stage = int(found[1]) - 1
      blocks[stage] = max(blocks[stage], int(found[2]) + 1)
  if not any(blocks):
    first = ", ".join(list(state)[:3])
    raise ValueError(
      f"no ResNet in it: there is no layer1.0.*, the first names are {first}"
    )
  bottleneck = any(
    re.match(r"encoder\.layer\d\.\d+\.conv3\.", name) for name in state
  )
  # The nearest one: what a damaged file lacks is then named.
  backbone = min(
    (name for name, s in BACKBONES.items() if s.bottleneck == bottleneck),
    key=lambda name: sum(
      abs(a - b) for a, b in zip(BACKBONES[name].blocks, blocks, strict=True)
    ),
  )
  stem = "conv7" if "encoder.conv1.weight" in state else "deep"
  if not any(name.startswith(_HEADS) for name in state):
    return Description(backbone, stem)
  last_layers = {
    "deeplabv3plus": "decoder.classifier.8.weight",
    "deeplabv3": "decoder.head.4.weight",
  }
  heads = [head for head, name in last_layers.items() if name in state]
  if not heads:
    raise ValueError(
      "heads without a last layer: neither "
      + " nor ".join(last_layers.values())
      + " is in it"
    )
  num_classes = _outputs(state[last_layers[heads[0]]])
  auxiliary = any(name.startswith("auxor.") for name in state)
  return Description(backbone, stem, heads[0], num_classes, auxiliary)


def _outputs(weight: np.ndarray) -> int:
  """Of a layer; at least 1, so that a wrong shape is found as one."""
  return max((1, *np.shape(weight)[:1]))


def match(state: Mapping[str, np.ndarray]) -> Match:
  """Finds the network of a state dict and compares every tensor with it.

  Args:
    state: arrays in torch layout; names with 'encoder.' or, of a backbone
      alone, without.

  Raises:
    ValueError: no ResNet in it at all, or two with one name.
  """
  own_names = {published_name(name): name for name in state}
  if len(own_names) < len(state):
    twice = next(
      name for name in state if own_names[published_name(name)] != name
    )
    raise ValueError(f"{twice} is there with and without 'encoder.'")
  state = {published_name(name): value for name, value in state.items()}
  description = _describe(state)
  whole = description.head is not None
  rep_features = 256
  if whole and "decoder.representation.8.weight" in state:
    rep_features = _outputs(state["decoder.representation.8.weight"])
  model = DeepLab(
    num_classes=description.num_classes or 2,
    backbone=description.backbone,
    head=description.head or "deeplabv3plus",
    stem=description.stem,
    rep_features=rep_features,
    auxiliary=description.auxiliary,
  )
  variables = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 65, 65, 3)), train=False
    )
  )
  expected = shapes(variables, prefix="" if whole else "encoder.")

  matched, ignored, problems = [], [], []
  for name, shape in expected.items():
    if name not in state:
      problems.append(f"{name} is missing")
      continue
    value = state[name]
    if np.shape(value) != shape:
      problems.append(f"{name} has shape {np.shape(value)}, expected {shape}")
    elif not np.issubdtype(value.dtype, np.floating):
      problems.append(f"{name} is of type {value.dtype}, expected a float")
    elif not np.isfinite(value).all():
      problems.append(f"{name} holds values that are not finite")
    else:
      matched.append(own_names[name])
    weight_files.release(value)
  for name in state:
    if name.startswith("fc.") or name.endswith("num_batches_tracked"):
      ignored.append(own_names[name])
    elif name not in expected:
      problems.append(f"{name} belongs to no layer of this network")
  return Match(description, tuple(matched), tuple(ignored), tuple(problems))
