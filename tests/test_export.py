"""A network as a file that runs without this package."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from u2pl_jax import predict
from u2pl_jax.export import export_stablehlo
from u2pl_jax.models import convolution
from u2pl_jax.trained import load_trained

REPOSITORY = pathlib.Path(__file__).parent.parent


def documented_example():
  """The program in docs/predict.md that begins with its imports."""
  text = (REPOSITORY / "docs" / "predict.md").read_text()
  (block,) = re.findall(r"(?m)^    import json, sys\n(?:    .*\n?)+", text)
  lines = [line[4:] for line in block.splitlines()]
  assert len(lines) == 10
  return "\n".join(lines)


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("export") / "model"
  arguments = [
    f"--checkpoint={trained_run.workdir}",
    f"--output={folder}",
    "--export=stablehlo",
    "--tile=48x65",
  ]
  assert predict.main(arguments) == 0
  return folder


def test_an_export_is_not_made_for_this_cpu(trained_run, monkeypatch):
  monkeypatch.setattr(convolution, "_WORTH_PRODUCTS", 0)
  trained = load_trained(trained_run.workdir)
  assert trained.model.conv_products
  neutral = dataclasses.replace(
    trained, model=trained.model.clone(conv_products=False)
  )
  exported = [
    export_stablehlo(x, (33, 33)).mlir_module_serialized
    for x in (trained, neutral)
  ]
  assert exported[0] == exported[1]


def images(number, seed=0):
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (number, 6, 9, 3), dtype=np.uint8)
  return np.kron(small, np.ones((1, 8, 8, 1), np.uint8))[:, :48, :65]


def test_the_documented_example_gives_the_same_mask(
  trained_run, exported, tmp_path
):
  Image.fromarray(images(1)[0]).save(tmp_path / "a.png")
  code = (
    "import importlib.util, sys\n"
    "assert importlib.util.find_spec('u2pl_jax') is None\n"
  )
  # Isolated and elsewhere, so that nothing of the package can be imported.
  subprocess.run(
    [sys.executable, "-I", "-c", code + documented_example()]
    + [str(exported), "a.png", "mask.png"],
    cwd=tmp_path,
    check=True,
    timeout=100,
  )
  predict.main(
    [
      f"--checkpoint={trained_run.workdir}",
      f"--images={tmp_path}/a.png",
      f"--output={tmp_path}/out",
      "--tile=48x65",
    ]
  )
  mask = Image.open(tmp_path / "mask.png")
  wanted = Image.open(tmp_path / "out" / "masks" / "a.png")
  assert len(set(np.asarray(wanted).ravel())) > 1
  np.testing.assert_array_equal(np.asarray(mask), np.asarray(wanted))
  np.testing.assert_array_equal(
    np.asarray(mask.convert("RGB")), np.asarray(wanted.convert("RGB"))
  )


def test_platforms_shapes_and_any_batch(exported):
  about = json.loads((exported / "model.json").read_text())
  model = jax.export.deserialize((exported / "model.stablehlo").read_bytes())
  assert model.platforms == ("cpu", "cuda", "tpu")
  assert about["platforms"] == ["cpu", "cuda", "tpu"]
  assert about["input"] == {
    "shape": ["batch", 48, 65, 3],
    "dtype": "uint8",
    "colour": "RGB",
  }
  assert about["output"]["shape"] == ["batch", 48, 65]
  assert len(about["class_names"]) == len(about["palette"]) == 7
  batch = images(3)
  classes = np.asarray(model.call(batch))
  assert classes.dtype == np.uint8
  assert classes.shape == (3, 48, 65)
  for row in range(3):
    alone = np.asarray(model.call(batch[row : row + 1]))
    np.testing.assert_array_equal(alone[0], classes[row])
  with pytest.raises(ValueError, match="48"):
    model.call(images(1)[:, :40])


def test_bad_input_is_one_line(trained_run, exported, tmp_path, capsys):
  checkpoint = f"--checkpoint={trained_run.workdir}"
  stablehlo = "--export=stablehlo"
  old = (exported / "model.stablehlo").read_bytes()
  (tmp_path / "file").write_text("")
  for arguments, part in (
    ((f"--output={exported}",), "exists"),
    ((f"--output={tmp_path}/x", "--images=a"), "leave --images out"),
    ((f"--output={tmp_path}/x", "--entropy"), "leave --entropy out"),
    ((f"--output={tmp_path}/file/x",), "cannot write"),
  ):
    with pytest.raises(SystemExit) as exit:
      predict.main([checkpoint, stablehlo, *arguments])
    assert exit.value.code == 1
    assert part in capsys.readouterr().err.splitlines()[-1]
  assert (exported / "model.stablehlo").read_bytes() == old
  assert not (tmp_path / "x").exists()
