"""scripts/profile_step.py: traces made by hand, and a real one."""

import profile_step as script
import pytest
from jax.profiler import ProfileData

from configs import testing


def make_trace(planes):
  """{plane: {line: [(begin ms, end ms, kernel, instruction)]}} as a trace."""
  text = []
  for plane, lines in planes.items():
    names = sorted({e[2] for events in lines.values() for e in events})
    text.append(f'planes {{ name: "{plane}"')
    for line, events in lines.items():
      text.append(f'lines {{ name: "{line}" timestamp_ns: 0')
      for begin, end, kernel, instruction in events:
        text.append(
          f"events {{ metadata_id: {1 + names.index(kernel)} offset_ps:"
          f" {round(begin * 1e9)} duration_ps: {round((end - begin) * 1e9)}"
        )
        if instruction:
          text.append(f'stats {{ metadata_id: 1 str_value: "{instruction}" }}')
        text.append("}")
      text.append("}")
    for i, name in enumerate(names):
      text.append(
        f'event_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "{name}" }}'
        " }"
      )
    text.append('stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }')
  return ProfileData.from_serialized_xspace(
    ProfileData.text_proto_to_serialized_xspace("\n".join(text))
  )


HOST = {"worker": [(0, 9, "thunk", "fusion.9")], "python": [(0, 9, "run", "")]}


def test_kernels_of_a_gpu_by_hand():
  """Two steps on two queues, of which the second one idles for 1 ms of 10."""
  data = make_trace(
    {
      "/host:CPU": HOST,
      "/device:GPU:0": {
        "Stream #1(Compute)": [
          (0, 2, "gemm", "conv.1"),
          (2, 3, "fusion_7", "fusion.7"),
          (5, 8, "gemm", "conv.2"),
          (9, 10, "copy", ""),
        ],
        "Stream #2(Compute)": [(1, 5, "gemm", "conv.1")],
        "XLA Modules": [(0, 10, "jit_step", "")],
      },
    }
  )
  places = {"conv.1": "DeepLab/encoder", "conv.2": "DeepLab/head"}
  profile = script.read_profile(data, places, 2)
  assert profile.kernels == [
    script.Kernel("gemm", 4.5, 1.5, "DeepLab/encoder"),
    script.Kernel("fusion_7", 0.5, 0.5, ""),
    script.Kernel("copy", 0.5, 0.5, ""),
  ]
  assert profile.ms == 5.5
  assert profile.busy == pytest.approx(0.9)
  lines = script.table(profile, 2).splitlines()
  assert lines[1].split() == ["4.50", "81.8%", "1.5", "gemm"]
  assert lines[2].split() == ["DeepLab/encoder"]
  assert lines[4].split() == ["0.50", "9.1%", "0.5", "1", "others"]


def test_kernels_of_a_cpu_by_hand():
  """A loop of 8 ms whose body takes 5 of them, and 2 of those a call."""
  data = make_trace(
    {
      "/host:CPU": {
        "worker": [
          (0, 8, "while.1", "while.1"),
          (1, 3, "dot.1", "dot.1"),
          (3, 6, "call.1", "call.1"),
          (3, 5, "dot.2", "dot.2"),
          (8, 9, "dot.1", "dot.1"),
          (0, 20, "ThunkExecutor::Execute", ""),
        ]
      }
    }
  )
  profile = script.read_profile(data, {}, 1)
  assert {k.name: (k.ms, k.calls) for k in profile.kernels} == {
    "while.1": (3, 1),
    "dot.1": (3, 2),
    "dot.2": (2, 1),
    "call.1": (1, 1),
  }
  assert profile.busy == 1


def test_kernels_of_a_tpu_by_hand():
  """Named by their whole text; the lines of steps and modules do not count."""
  dot = "%fusion.7 = bf16[8,128]{1,0:T(8,128)} fusion(%p), kind=kOutput"
  data = make_trace(
    {
      "/host:CPU": HOST,
      "/device:TPU:0": {
        "Steps": [(0, 10, "0", "")],
        "XLA Modules": [(0, 10, "jit_step(7)", "")],
        "XLA Ops": [
          (0, 6, dot, ""),
          (6, 7, "%copy.1 = f32[] copy(%a)", ""),
          (9, 10, dot, ""),
        ],
        "Async XLA Ops": [(0, 10, "%all-reduce.1 = f32[] copy(%a)", "")],
      },
    }
  )
  profile = script.read_profile(data, {"fusion.7": "DeepLab/head"}, 1)
  assert profile.kernels == [
    script.Kernel("fusion.7", 7, 2, "DeepLab/head"),
    script.Kernel("copy.1", 1, 1, ""),
  ]
  assert profile.busy == pytest.approx(0.8)


def test_a_trace_without_kernels_says_so():
  data = make_trace({"/host:CPU": {"python": [(0, 1, "run", "")]}})
  with pytest.raises(ValueError, match=r"no kernels; its planes are \['/host"):
    script.read_profile(data, {}, 1)


def test_places_by_hand():
  text = """
  %fusion.7 = f32[2]{0} fusion(%p), metadata={op_name="jit(s)/jvp(keys)/sum"}
  ROOT conv-2 = (f32[2], u8[0]) custom-call(%a), metadata={op_type="conv" \
op_name="jit(step)/DeepLab/encoder" source_file="x.py"}
  %none = f32[] constant(0)
"""
  assert script.read_places(text) == {
    "fusion.7": "jvp(keys)/sum",
    "conv-2": "DeepLab/encoder",
  }


@pytest.mark.slow
def test_the_step_on_this_cpu():
  case = script.workload.Case("testing", testing.get_config(), 6)
  profile, ms = script.trace_step(case, 2)
  assert ms > 0
  assert 0 < profile.busy <= 1
  # Where most of the time goes is known by name.
  named = sum(k.ms for k in profile.kernels if k.where)
  assert named > 0.5 * profile.ms
  assert any("DeepLab" in k.where for k in profile.kernels[:15])
