"""Between the published state dict and flax variables, by name.

Our module names are the published ones with "/" for the dots between modules
and "_" before the index inside an nn.Sequential, so that a rule replaces a
table: `encoder/layer3_0/conv1/kernel` is `encoder.layer3.0.conv1.weight`.
The only file that knows torch's layout (OIHW kernels).
"""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

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


def load_state_dict(
  variables: Mapping, state: Mapping[str, np.ndarray], *, prefix: str = ""
) -> tuple[dict, list[str]]:
  """Replaces every variable whose name starts with `prefix`.

  Args:
    variables: {'params': ..., 'batch_stats': ...} of the target network.
    state: arrays in torch layout under published names.
    prefix: restricts what is loaded, e.g. 'encoder.' for a backbone.

  Returns:
    The new variables and the names in `state` that were not used.

  Raises:
    ValueError: a name is missing, a shape differs or a value is not finite;
      the message names the first and counts the rest.
  """
  flat = traverse_util.flatten_dict(dict(variables))
  problems, used = [], set()
  for path, old in flat.items():
    name = torch_name(path)
    if not name.startswith(prefix):
      continue
    if name not in state:
      problems.append(f"{name} is missing")
      continue
    used.add(name)
    new = np.asarray(state[name])
    if path[-1] == "kernel" and new.ndim == 4:
      new = new.transpose(2, 3, 1, 0)
    if new.shape != old.shape:
      problems.append(f"{name} has shape {new.shape}, expected {old.shape}")
    elif not np.isfinite(new).all():
      problems.append(f"{name} holds values that are not finite")
    else:
      flat[path] = jnp.asarray(new, old.dtype)
  if problems:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ValueError(f"weights do not fit the network: {problems[0]}{more}")
  unused = [
    name
    for name in state
    if name not in used and not name.endswith("num_batches_tracked")
  ]
  return traverse_util.unflatten_dict(flat), unused
