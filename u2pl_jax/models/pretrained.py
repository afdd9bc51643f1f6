"""Initialises a network from a file of weights."""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

from u2pl_jax.models import torch_weights
from u2pl_jax.models.deeplab import DeepLab
from u2pl_jax.models.weight_files import WeightsError, read_weights


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """Weights of an encoder, and perhaps of heads.

  Attributes:
    path: where they come from, for messages.
    description: of the network they belong to.
    network: which network of the file.
    tensors: under published names, all finite, all of that network.
  """

  path: str
  description: torch_weights.Description
  network: str
  tensors: Mapping[str, np.ndarray]


def read_pretrained(
  path: str | os.PathLike, *, network: str | None = None
) -> Pretrained:
  """Reads a .pth or .npz of a backbone or of a whole network.

  Args:
    path: of the file.
    network: see `read_weights`.

  Raises:
    WeightsError: the file cannot be read, or is not whole; one line.
  """
  file = read_weights(path, network=network)
  try:
    match = torch_weights.match(file.tensors)
  except ValueError as error:
    raise WeightsError(f"{path}: {error}") from error
  if match.problems:
    raise WeightsError(f"{path}: {first_problems(match.problems)}")
  return Pretrained(
    str(path),
    match.description,
    file.network,
    {
      torch_weights.published_name(name): file.tensors[name]
      for name in match.matched
    },
  )


def first_problems(problems: tuple[str, ...]) -> str:
  """The first three, and how many more."""
  more = len(problems) - 3
  return "; ".join(problems[:3]) + (f"; and {more} more" if more > 0 else "")


def check_pretrained(pretrained: Pretrained, model: DeepLab) -> None:
  """Raises WeightsError if the encoder is not the one of `model`."""
  for key in ("backbone", "stem"):
    theirs, ours = getattr(pretrained.description, key), getattr(model, key)
    if theirs != ours:
      raise WeightsError(
        f"{pretrained.path}: weights of a network with {key} {theirs!r}, but"
        f" config.model.{key} is {ours!r}: set --config.model.{key}={theirs}"
      )


def load_pretrained(
  variables: dict, pretrained: Pretrained
) -> tuple[dict, list[str]]:
  """Replaces the encoder's variables, and those of heads that fit.

  A head is loaded whole or not at all, except that its last layer may be of
  other classes and then keeps its initial weights.

  Args:
    variables: {'params', 'batch_stats'} of a `DeepLab` that passed
      `check_pretrained`.
    pretrained: from `read_pretrained`.

  Returns:
    The new variables and lines for the log that say what was loaded.
  """
  tensors = pretrained.tensors
  where = f"{pretrained.path} ({pretrained.network})"
  report = [f"weights: {pretrained.description}, from {where}"]
  for head in ("encoder.", "decoder.", "auxor."):
    wanted = torch_weights.shapes(variables, prefix=head)
    if not wanted:
      if any(name.startswith(head) for name in tensors):
        report.append(f"weights: {head}* not used, the network has none")
      continue
    differing = [
      name
      for name, shape in wanted.items()
      if np.shape(tensors.get(name)) != shape or name not in tensors
    ]
    if any(not n.startswith(torch_weights.CLASS_LAYERS) for n in differing):
      # The encoder always fits here.
      report.append(
        f"weights: {head}* starts from random weights: "
        + (
          f"{differing[0]} is of another shape"
          if differing[0] in tensors
          else "the file has none"
        )
      )
      continue
    loaded = {n: tensors[n] for n in wanted if n not in differing}
    variables = torch_weights.replace(variables, loaded)
    line = f"weights: {head}* loaded, {len(loaded)} tensors"
    if differing:
      line += f"; of other classes, so random: {', '.join(differing)}"
    report.append(line)
  return variables, report
