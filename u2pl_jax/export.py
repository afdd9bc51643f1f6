"""A trained network as a file that runs without this package."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import DataError, storage
from u2pl_jax.evaluation import predict_logits
from u2pl_jax.trained import Trained

PLATFORMS = ("cpu", "cuda", "tpu")
MODEL_FILE, ABOUT_FILE = "model.stablehlo", "model.json"


def export_stablehlo(
  trained: Trained, shape: tuple[int, int]
) -> jax.export.Exported:
  """Lowers `uint8 RGB [b, *shape, 3] -> class ids uint8 [b, *shape]`.

  Weights, normalisation, resizing and argmax are inside. The batch is symbolic:
  any size runs. Height and width are fixed, since the network's resizes are
  matrices made for one size.

  Args:
    trained: the network.
    shape: height and width.

  Returns:
    For `PLATFORMS`, whatever this machine has.
  """
  info = trained.info
  variables = jax.tree.map(jnp.asarray, trained.variables)
  # Wherever it runs: not as this machine would run it.
  model = trained.model.clone(conv_products=False)

  def segment(images: jax.Array) -> jax.Array:
    box = jnp.array((0, 0, *shape), jnp.int32)
    logits = predict_logits(
      model,
      variables,
      images,
      jnp.broadcast_to(box, (images.shape[0], 4)),
      mean=info.mean,
      std=info.std,
    )
    return logits.argmax(-1).astype(jnp.uint8)

  (batch,) = jax.export.symbolic_shape("b")
  return jax.export.export(jax.jit(segment), platforms=PLATFORMS)(
    jax.ShapeDtypeStruct((batch, *shape, 3), jnp.uint8)
  )


def write_export(
  trained: Trained,
  shape: tuple[int, int],
  folder: str | os.PathLike,
  *,
  overwrite: bool,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes `MODEL_FILE` and what to know of it as `ABOUT_FILE`.

  Args:
    trained: the network.
    shape: height and width of its images.
    folder: made at need.
    overwrite: replace files of an earlier export.

  Returns:
    The two paths.

  Raises:
    DataError: the folder cannot be written, or has such files.
  """
  folder = pathlib.Path(folder)
  model, about = folder / MODEL_FILE, folder / ABOUT_FILE
  for path in (model, about):
    if path.exists() and not overwrite:
      raise DataError(f"{path} exists: choose another --output, or --overwrite")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    exported = export_stablehlo(trained, shape)
    facts = {
      "format": "jax.export",
      "jax": jax.__version__,
      "calling_convention_version": exported.calling_convention_version,
      "platforms": list(exported.platforms),
      "input": {
        "shape": ["batch", *shape, 3],
        "dtype": "uint8",
        "colour": "RGB",
      },
      "output": {"shape": ["batch", *shape], "dtype": "uint8"},
      "height": shape[0],
      "width": shape[1],
      "class_names": list(trained.info.class_names),
      "palette": np.asarray(trained.info.palette).tolist(),
      "checkpoint": trained.path,
      "weights": trained.weights,
      "step": trained.step,
    }
    # The model last: where it lies, the other is there too.
    storage.write_whole(about, (json.dumps(facts, indent=2) + "\n").encode())
    storage.write_whole(model, bytes(exported.serialize()))
  except OSError as error:
    raise DataError(
      f"--output={folder}: cannot write there ({error.strerror}): choose a"
      " folder that you may write"
    ) from None
  return model, about
