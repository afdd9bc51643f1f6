"""Compiles the training step for an H200 that need not be there.

  pip install 'jax[cuda12]'    # of the version in requirements.txt
  python scripts/compile_for_gpu.py --config=configs/voc_1464.py \
    --config.model.dtype=bfloat16

Says how much memory the compiler lays out for the semi-supervised step on one
device, and which convolutions it hands to cuDNN: a window as large as the
feature map is a gradient that it has not recognised, and slow. Runs nothing and
reads no image. On a GPU the compiler would also try algorithms out, which takes
longer and may take other memory.
"""

import collections
import os
import pathlib
import re
import sys
import time

from absl import app, flags
from absl import logging as absl_logging

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from input_pipeline.command_line import CONFIG, fail, parse_flags, write_json
from input_pipeline.parallel import elapsed

# By NVIDIA's data sheet of the H200 and its CUDA programming guide (compute
# capability 9.0); cuDNN and CUDA as jax[cuda12] brings them.
_H200 = """
  platform_name: "CUDA"
  device_description_str: "NVIDIA H200"
  dnn_version_info { major: 9 minor: 10 }
  runtime_version { major: 12 minor: 9 }
  gpu_device_info {
    cuda_compute_capability { major: 9 }
    core_count: 132
    fpus_per_core: 128
    clock_rate_ghz: 1.98
    device_memory_size: 151397597184
    memory_bandwidth: 4800000000000
    l2_cache_size: 52428800
    threads_per_warp: 32
    threads_per_block_limit: 1024
    threads_per_core_limit: 2048
    registers_per_block_limit: 65536
    registers_per_core_limit: 65536
    shared_memory_per_block: 49152
    shared_memory_per_block_optin: 232448
    shared_memory_per_core: 233472
    block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535
    block_dim_limit_z: 65535
  }
"""

_KINDS = {
  "__cudnn$convForward": "forward",
  "__cudnn$convBiasActivationForward": "forward, and what follows",
  "__cudnn$convBackwardInput": "gradient of the input",
  "__cudnn$convBackwardFilter": "gradient of the kernel",
}


def count_convolutions(text: str) -> collections.Counter:
  """How often cuDNN convolves: {(kind, window size such as '3x3'): number}.

  Args:
    text: compiled HLO.
  """
  found = collections.Counter()
  for line in text.splitlines():
    target = re.search(r'custom_call_target="(__cudnn\$conv\w+)"', line)
    if target:
      size = re.search(r"window=\{size=(\w+)", line)
      found[_KINDS.get(target[1], target[1]), size[1]] += 1
  return found


def compile_step(config, devices) -> dict:
  """Compiles the semi-supervised step of a config.

  Args:
    config: complete.
    devices: a single one, which may be described only.

  Returns:
    JSON-ready: 'peak_bytes' and 'state_bytes' of the device, 'compile_s' with
    tracing, 'convolutions' as a list of kind, window and number.

  Raises:
    ConfigError, DataError: the config cannot work.
  """
  import jax

  from u2pl_jax import step_shapes

  begin = time.perf_counter()
  with elapsed("tracing"):
    lowered, _, _ = step_shapes.lower_semi_supervised(config, devices)
  with elapsed("compiling, some two minutes for ResNet-101"):
    compiled = lowered.compile()
  compile_s = time.perf_counter() - begin
  found = count_convolutions(compiled.as_text())
  return {
    "config": config.name,
    "jax": jax.__version__,
    "crop_size": list(config.input.crop_size),
    "labelled": config.batch.labelled,
    "unlabelled": config.batch.unlabelled,
    "dtype": config.model.dtype,
    "microbatches": config.batch.microbatches,
    "remat": config.model.remat,
    "compile_s": compile_s,
    "peak_bytes": step_shapes.peak_bytes(compiled),
    "state_bytes": compiled.memory_analysis().argument_size_in_bytes,
    "convolutions": [
      {"kind": kind, "window": size, "number": number}
      for (kind, size), number in sorted(found.items())
    ],
  }


def table(result: dict) -> str:
  """The result as text."""
  height, width = result["crop_size"]
  lines = [
    f"{result['config']}: {result['labelled']}+{result['unlabelled']} images of"
    f" {height}x{width}, {result['dtype']}, {result['microbatches']}"
    f" micro-batches{', remat' if result['remat'] else ''}",
    f"compiled for an NVIDIA H200 in {result['compile_s']:.0f} s,"
    f" jax {result['jax']}",
    f"peak memory {result['peak_bytes'] / 2**30:.2f} GiB, of which state and"
    f" batch {result['state_bytes'] / 2**30:.2f} GiB",
    f"{'convolutions':<28}{'window':>8}{'number':>8}",
  ]
  lines += [
    f"{entry['kind']:<28}{entry['window']:>8}{entry['number']:>8}"
    for entry in result["convolutions"]
  ]
  return "\n".join(lines)


def main(_: list[str]) -> None:
  # Before jax is imported. There is nothing to try algorithms out on.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
  )
  absl_logging.set_verbosity(absl_logging.ERROR)
  import jax
  from jax.experimental import topologies

  # What little is computed.
  jax.config.update("jax_platforms", "cpu")

  from input_pipeline import DataError
  from u2pl_jax.config_checks import ConfigError

  try:
    topology = topologies.get_topology_desc(
      platform="cuda", target_config=_H200, topology="1x1x1"
    )
  except NotImplementedError as error:
    fail(
      f"jax's plugin for CUDA is not installed ({error}): pip install"
      f" 'jax[cuda12]=={jax.__version__}', which needs no GPU"
    )
  try:
    result = compile_step(CONFIG.value, topology.devices)
  except (ConfigError, DataError) as error:
    fail(str(error))
  except KeyboardInterrupt:
    fail("interrupted; nothing was written", 130)
  print(table(result))
  if flags.FLAGS.json:
    write_json(flags.FLAGS.json, result)


if __name__ == "__main__":
  # Here, for tests that import it beside other commands.
  flags.DEFINE_string("json", None, "Also write the numbers here.")
  app.run(main, flags_parser=parse_flags)
