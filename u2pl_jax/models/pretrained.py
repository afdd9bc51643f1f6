"""Initialises the encoder from a file of weights."""

import pathlib
import zipfile

import numpy as np

from u2pl_jax.models.torch_weights import load_state_dict


def load_pretrained(variables: dict, *, path: str) -> dict:
  """Replaces the encoder's variables; the heads stay as they are.

  Args:
    variables: {'params', 'batch_stats'} of a `DeepLab`.
    path: .npz whose arrays carry the published names, with or without the
      leading 'encoder.' (`fc.*` is ignored).

  Returns:
    The new variables.

  Raises:
    ValueError: the file is missing, is no .npz, or does not fit the network;
      one line that names the file and the first problem.
  """
  source = f"config.model.pretrained={path}"
  if pathlib.Path(path).suffix != ".npz":
    raise ValueError(f"{source}: must be a .npz file of weights")
  try:
    with np.load(path, allow_pickle=False) as archive:
      state = {name: archive[name] for name in archive.files}
  except FileNotFoundError:
    raise ValueError(f"{source}: there is no such file") from None
  except (OSError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{source}: not a readable .npz file ({error})") from error
  prefix = "encoder."
  state = {
    name if name.startswith(prefix) else prefix + name: value
    for name, value in state.items()
    if not name.startswith(("fc.", "decoder.", "auxor."))
  }
  try:
    variables, _ = load_state_dict(variables, state, prefix=prefix)
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from error
  return variables
