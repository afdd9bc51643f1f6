"""scripts/compile_for_gpu.py: reading by hand, and the command."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import compile_for_gpu
import pytest

_SCRIPT = pathlib.Path(compile_for_gpu.__file__)

_HLO = """
  %cudnn-conv.1 = (bf16[32,65,65,256]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), \
window={size=3x3 pad=2_2x2_2 rhs_dilate=2x2}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", metadata={op_name="a"}
  %cudnn-conv.2 = (bf16[32,65,65,256]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward"
  %cudnn-conv.3 = (bf16[256,3,3,256]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g), \
window={size=65x65 stride=2x2 pad=2_2x2_2}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward"
  %cudnn-conv-bw-filter = (bf16[64,1,1,256]{3,2,1,0}, u8[0]{0}) custom-call(\
%x, %g), window={size=1x1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  %dot = f32[2,2]{1,0} custom-call(%a, %b), custom_call_target="__cublas$gemm"
"""


def test_convolutions_by_hand():
  assert compile_for_gpu.count_convolutions(_HLO) == {
    ("forward", "3x3"): 2,
    ("forward", "65x65"): 1,
    ("gradient of the kernel", "1x1"): 1,
  }


def run(*args):
  return subprocess.run(
    [sys.executable, str(_SCRIPT), "--config=configs/testing.py", *args],
    cwd=_SCRIPT.parent.parent,
    capture_output=True,
    text=True,
    timeout=600,
  )


def _has_plugin():
  # Of a namespace package: its parent may be missing.
  if importlib.util.find_spec("jax_plugins") is None:
    return False
  return any(
    importlib.util.find_spec(f"jax_plugins.xla_cuda{version}")
    for version in (12, 13)
  )


@pytest.mark.skipif(_has_plugin(), reason="jax has its plugin for CUDA")
def test_without_the_plugin(tmp_path):
  result = run(f"--json={tmp_path / 'gpu.json'}")
  assert result.returncode == 1
  assert result.stdout == "" and not list(tmp_path.iterdir())
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: jax's plugin for CUDA is not installed (")
  assert "pip install 'jax[cuda12]==" in line


@pytest.mark.skipif(not _has_plugin(), reason="jax has no plugin for CUDA")
def test_the_step_for_a_gpu(tmp_path):
  path = tmp_path / "gpu.json"
  result = run(f"--json={path}")
  assert result.returncode == 0, result.stderr
  numbers = json.loads(path.read_text())
  assert f"{numbers['peak_bytes'] / 2**30:.2f} GiB" in result.stdout
  assert 0 < numbers["state_bytes"] < numbers["peak_bytes"]
  # No kernel is larger than 3x3, and no gradient is taken literally.
  sides = {
    int(side)
    for entry in numbers["convolutions"]
    for side in entry["window"].split("x")
  }
  assert max(sides) == 3
  kinds = {entry["kind"] for entry in numbers["convolutions"]}
  assert {"gradient of the input", "gradient of the kernel"} <= kinds
