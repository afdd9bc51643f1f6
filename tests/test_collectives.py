"""Reading what devices send each other, in every form that compilers write."""

import pytest

from u2pl_jax import collectives

# As in optimised modules for GPUs and TPUs: layouts with tiles, asynchronous
# pairs, wrapped collectives, branches, and loops within loops.
_HLO = """
HloModule step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[16]) -> f32[2] {
  %p = f32[16]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], \
dimensions={0}, to_apply=%add, metadata={op_name="transpose(jvp(DeepLab))/g"}
}

%inner (p: (s32[], f32[3])) -> (s32[], f32[3]) {
  %v = f32[3]{0} get-tuple-element(%p), index=1
  %ar.inner = f32[3]{0} all-reduce(%v), replica_groups={}, to_apply=%add, \
metadata={op_name="DeepLab/encoder/bn1/reduce_sum"}
}

%outer (p: (s32[], f32[3])) -> (s32[], f32[3]) {
  %w.inner = (s32[], f32[3]{0}) while(%p), condition=%cond, body=%inner, \
backend_config={"known_trip_count":{"n":"5"}}
}

%yes (p: f32[4]) -> f32[4] {
  %a2a = (f32[2]{0}, f32[2]{0}) all-to-all(%p0, %p1), replica_groups={{0,1}}
}

%no (p: f32[4]) -> f32[4] {
  %cb = f32[4]{0} collective-broadcast(%p), replica_groups={{0,1}}
}

ENTRY %main (x: f32[16]) -> f32[8] {
  %x = f32[16]{0:T(256)} parameter(0)
  %ag = (f32[16]{0:T(256)}, f32[128]{0:T(256)}) all-gather-start(%x), \
dimensions={0}, metadata={op_name="jvp(anchors)/sum"}
  %agd = f32[128]{0:T(256)} all-gather-done(%ag)
  %ars = (f32[16]{0}, bf16[4]{0}) all-reduce-start(%x, %k), to_apply=%add
  %ard = (f32[16]{0}, bf16[4]{0}) all-reduce-done(%ars)
  %one = f32[16]{0} all-reduce-start(%x), to_apply=%add
  %oned = f32[16]{0} all-reduce-done(%one)
  %cp = (u8[9]{0}, u8[9]{0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%i), source_target_pairs={{0,1},{1,0}}
  %cpd = u8[9]{0} collective-permute-done(%cp)
  %start = ((f32[16]{0}), f32[2]{0}, s32[]) async-start(%x), calls=%wrapped
  %update = ((f32[16]{0}), f32[2]{0}, s32[]) async-update(%start), \
calls=%wrapped
  %done = f32[2]{0} async-done(%update), calls=%wrapped
  %w = (s32[], f32[3]{0}) while(%t), condition=%cond, body=%outer, \
backend_config={"known_trip_count":{"n":"7"}}
  %c = f32[4]{0} conditional(%i, %l, %r), branch_computations={%yes, %no}
}
"""


def found(text=_HLO):
  return {
    (e.instruction, e.kind, e.shape, e.count, e.num_bytes)
    for e in collectives.read(text)
  }


def test_every_kind_once():
  assert found() == {
    # The result of a gather; of a start the results alone.
    ("ag", "all-gather", "f32[128]", 1, 512),
    ("ars", "all-reduce", "f32[16]", 1, 64),
    ("ars", "all-reduce", "bf16[4]", 1, 8),
    ("one", "all-reduce", "f32[16]", 1, 64),
    ("cp", "collective-permute", "u8[9]", 1, 9),
    # What it scatters, once though start, update and done all name it.
    ("rs", "reduce-scatter", "f32[2]", 1, 64),
    # 7 times 5.
    ("ar.inner", "all-reduce", "f32[3]", 35, 35 * 12),
    # Both branches.
    ("cb", "collective-broadcast", "f32[4]", 1, 16),
    ("a2a", "all-to-all", "f32[2]", 1, 8),
  }
  assert sum(e.num_bytes for e in collectives.read(_HLO)) == (
    512 + 64 + 8 + 64 + 9 + 64 + 420 + 16 + 2 * 8
  )


def test_branches_within_a_loop():
  moved = _HLO.replace(
    "%v = f32[3]{0} get-tuple-element(%p), index=1",
    "%c2 = conditional(%p), branch_computations={%yes, %no}",
  )
  counts = {e.instruction: e.count for e in collectives.read(moved)}
  # 35 times within the loops, and once outside.
  assert (counts["cb"], counts["a2a"]) == (36, 36)


def test_operations_count_runs_not_arrays():
  assert collectives.operations(collectives.read(_HLO)) == {
    "batch statistics": 35,
    collectives.OTHER: 5,
    "anchors": 1,
    "gradients": 1,
  }


def test_what_cannot_be_counted_is_no_number():
  unknown = _HLO.replace('{"known_trip_count":{"n":"7"}}', "{}")
  # The loop within it is of a known length, how often that runs is not.
  with pytest.raises(ValueError, match="ar.inner .* loop of unknown length"):
    collectives.read(unknown)
  with pytest.raises(ValueError, match=r"f8e4m3fn\[16\]"):
    collectives.read(_HLO.replace("%one = f32[16]", "%one = f8e4m3fn[16]"))
  with pytest.raises(ValueError, match="replica groups"):
    collectives.read(_HLO.replace("replica_groups=[1,8]<=[8], ", ""))


def test_a_loop_of_unknown_length_that_sends_nothing_is_fine():
  quiet = _HLO.replace("all-reduce(%v)", "negate(%v)").replace(
    '{"known_trip_count":{"n":"7"}}', "{}"
  )
  assert ("ag", "all-gather", "f32[128]", 1, 512) in found(quiet)
