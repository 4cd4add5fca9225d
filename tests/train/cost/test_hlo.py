"""Collectives, cycles and buffers of compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from lit_fast.runtime import AXIS, make_mesh
from lit_fast.train.cost.hlo import Collective, largest_buffers, program_cost

# As the TPU compiler writes it: no trip count beside a loop, products as convolutions, and estimated cycles beside each
# kernel.
TPU = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%kernel (x: bf16[8,4], y: bf16[4,6]) -> bf16[8,6] {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[4,6]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,6]{1,0:T(8,128)(2,1)} convolution(%x, %y), dim_labels=bf_io->bf
}

%body (state: (s32[], bf16[8,4], bf16[4,6])) -> (s32[], bf16[8,4], bf16[4,6]) {
  %state = (s32[]{:T(128)}, bf16[8,4]{1,0}, /*index=2*/bf16[4,6]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x.1 = bf16[8,4]{1,0} get-tuple-element(%state), index=1
  %y.1 = bf16[4,6]{1,0} get-tuple-element(%state), index=2
  %fusion.1 = bf16[8,6]{1,0} fusion(%x.1, %y.1), kind=kOutput, calls=%kernel, backend_config={"estimated_cycles":"100"}
  %send = (bf16[8,4]{1,0}, bf16[8,4]{1,0:S(3)}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=1
  %sent = bf16[8,4]{1,0:S(3)} collective-permute-done(%send)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), backend_config={"estimated_cycles":"7"}
  ROOT %new = (s32[], bf16[8,4], bf16[4,6]) tuple(%next, %sent, %y.1)
}

%condition (state.1: (s32[], bf16[8,4], bf16[4,6])) -> pred[] {
  %state.1 = (s32[], bf16[8,4], bf16[4,6]) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (p: (s32[], bf16[8,4], bf16[4,6]), q: f32[32,16,10], r: f32[32,16,10]) -> f32[32,16,16] {
  %p = (s32[], bf16[8,4], bf16[4,6]) parameter(0)
  %q = f32[32,16,10]{2,1,0:T(8,128)} parameter(1)
  %r = f32[32,16,10]{2,1,0:T(8,128)} parameter(2)
  %loop = (s32[], bf16[8,4], bf16[4,6]) while(%p), condition=%condition, body=%body
  %sums = (f32[32,16,10]{2,1,0}, f32[32,16,10]{2,1,0:S(3)}) all-reduce(%q, %r), to_apply=%add
  ROOT %scores = f32[32,16,16]{2,1,0:T(8,128)} convolution(%q, %r), window={size=32 stride=31 lhs_dilate=32}, dim_labels=0bf_0oi->0bf, metadata={op_name="jit(step)/dot_general"}, backend_config={"estimated_cycles":"1000"}
}
"""  # noqa: E501


def test_program_cost_of_a_tpu_program():
    found = program_cost(TPU)
    assert found.cycles == 5 * (100 + 7) + 1000
    assert found.collectives == {
        "collective-permute": Collective(5, 5 * 8 * 4 * 2),
        "all-reduce": Collective(1, 2 * 32 * 16 * 10 * 4),
    }
    assert found.unknown_loops == 0
    assert largest_buffers(TPU)[0] == {
        "shape": "f32[32,16,16]",
        "bytes": 32 * 16 * 16 * 4,
        "operation": "jit(step)/dot_general",
    }


# As the compiler for GPUs writes it: fusions with a kind, trip counts beside loops, no estimates.
GPU = """
HloModule jit_step, is_scheduled=true

%fused (a: bf16[8,4], b: bf16[4,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%moved (t: f32[9,4], i: s32[2,1], u: f32[2,4]) -> f32[9,4] {
  %t = f32[9,4]{1,0} parameter(0)
  %i = s32[2,1]{1,0} parameter(1)
  %u = f32[2,4]{1,0} parameter(2)
  ROOT %scatter.1 = f32[9,4]{1,0} scatter(%t, %i, %u), to_apply=%add
}

%body (s: (s32[], bf16[8,4], bf16[4,4])) -> (s32[], bf16[8,4], bf16[4,4]) {
  %s = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%s), index=1
  %w = bf16[4,4]{1,0} get-tuple-element(%s), index=2
  %gemm_fusion = bf16[8,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %copy.1 = s32[] copy(%n)
  %start = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}) all-reduce-start(%gemm_fusion), to_apply=%add
  %reduced = bf16[8,4]{1,0} all-reduce-done(%start)
  ROOT %out = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) tuple(%copy.1, %reduced, %w)
}

%condition (c: (s32[], bf16[8,4], bf16[4,4])) -> pred[] {
  %c = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%k, %limit), direction=LT
}

%inner (q: f32[9,4], j: s32[2,1], v: f32[2,4]) -> f32[9,4] {
  %q = f32[9,4]{1,0} parameter(0)
  %j = s32[2,1]{1,0} parameter(1)
  %v = f32[2,4]{1,0} parameter(2)
  ROOT %scattered = f32[9,4]{1,0} fusion(%q, %j, %v), kind=kLoop, calls=%moved
}

ENTRY %main (p: (s32[], bf16[8,4], bf16[4,4]), t.1: f32[9,4], i.1: s32[2,1], u.1: f32[2,4]) -> f32[9,4] {
  %p = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) parameter(0)
  %t.1 = f32[9,4]{1,0} parameter(1)
  %i.1 = s32[2,1]{1,0} parameter(2)
  %u.1 = f32[2,4]{1,0} parameter(3)
  %loop = (s32[], bf16[8,4]{1,0}, bf16[4,4]{1,0}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %graph = f32[9,4]{1,0} call(%t.1, %i.1, %u.1), to_apply=%inner
  ROOT %lib = f32[9,4]{1,0} custom-call(%graph), custom_call_target="__cublas$gemm"
}
"""  # noqa: E501


def test_program_cost_counts_the_kernels_of_a_gpu_program():
    found = program_cost(GPU)
    # In the loop a product, a copy and a reduction; a scatter in a graph that is launched as one; a library.
    assert found.kernels == 7 * 3 + 1 + 1
    assert found.collectives == {"all-reduce": Collective(7, 7 * 8 * 4 * 2)}
    assert found.cycles == 0
    assert {name: u.calls for name, u in found.unestimated.items()} == {
        "fusion": 7, "copy": 7, "all-reduce": 7, "scatter": 1, "custom-call __cublas$gemm": 1
    }  # fmt: skip
    assert found.unestimated["scatter"].bytes == 9 * 4 * 4


# In the loop of TPU: a Pallas kernel, a buffer without work, a prefetch, and a sum of 16-bit numbers.
KERNELS = """
  %attention.3 = (bf16[8,4]{1,0}, f32[8]{0}) custom-call(%x.1, %y.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/while/body/attention_forward/pallas_call"}
  %buffer = bf16[8,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %fetch = (bf16[8,4]{1,0}, bf16[8,4]{1,0:S(3)}, u32[]) copy-start(%x.1)
  %double = bf16[8,4]{1,0} add(%x.1, %x.1), backend_config={"estimated_cycles":"11"}
  %one = s32[] constant(1)"""  # noqa: E501


def test_program_cost_counts_custom_kernels_and_names_what_has_no_estimate():
    text = TPU.replace("\n  %one = s32[] constant(1)", KERNELS)
    seen = []

    def cycles(name, shapes):
        seen.append((name, tuple(shapes)))
        return 1000.0 if name == "attention_forward" else None

    found, plain = program_cost(text, cycles), program_cost(text)
    assert seen == [("attention_forward", ("bf16[8,4]", "bf16[4,6]"))]
    assert found.custom == {"attention_forward": 5}
    assert found.cycles == 5 * (1000 + 100 + 7 + 11) + 1000
    assert found.half_cycles == 5 * 11
    assert plain.cycles == found.cycles - 5 * 1000
    assert plain.unestimated["custom-call attention_forward"].calls == 5
    assert set(plain.unestimated) - set(found.unestimated) == {"custom-call attention_forward"}
    assert set(found.unestimated) == {"asynchronous copy", "collective-permute", "all-reduce"}


def test_program_cost_counts_a_loop_without_trip_count_once():
    found = program_cost(TPU.replace("constant(5)", "add(%i.1, %i.1)"))
    assert found.unknown_loops == 1
    assert found.cycles == 107 + 1000


def test_program_cost_sums_the_collectives_of_four_devices():
    mesh = make_mesh(jax.devices()[:4])

    def work(x):
        def ring_step(x, _):
            x = jax.lax.ppermute(x, AXIS, [(i, (i + 1) % 4) for i in range(4)])
            return jnp.sin(x), jax.lax.psum(x.sum(), AXIS)

        x, sums = jax.lax.scan(ring_step, x, None, length=6)
        return x, sums, jax.lax.all_gather(x, AXIS)

    spec = PartitionSpec(AXIS)
    mapped = jax.shard_map(
        work, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec(), spec), check_vma=False
    )
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 16), jnp.float32)).compile().as_text()
    found = program_cost(text).collectives
    assert found["collective-permute"] == Collective(6, 6 * 2 * 16 * 4)
    assert found["all-reduce"] == Collective(6, 6 * 4)
    assert found["all-gather"] == Collective(1, 2 * 16 * 4)


@pytest.mark.parametrize("text", ["", "HloModule empty", "no program at all {"])
def test_program_cost_refuses_text_without_entry(text):
    with pytest.raises(ValueError, match="ENTRY"):
        program_cost(text)
