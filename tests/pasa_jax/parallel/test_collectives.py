"""The check of compiled programs, on programs written here, each with a fault or none."""

import pytest

from tests.pasa_jax.parallel.aot import Case, examined
from tests.pasa_jax.parallel.collectives import collectives

PART = "bf16[1,16384,8,128]{3,1,2,0:T(8,128)(2,1)}"
START = (
    "  %permute.{i} = ({p}, {p}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%x.{i}), "
    "channel_id=1, source_target_pairs={{{{0,1}},{{1,2}},{{2,3}},{{3,0}}}}"
)
DONE = "  %done.{i} = {p} collective-permute-done(%permute.{i})"
HOP = "  %hop.{i} = f32[8] conditional(%x), branch_computations={{%some, %none}}"
GATHERED = f"  %g = {PART} all-gather(%x), replica_groups={{{{0,1,2,3}}}}\n"
HEAD = """HloModule jit_f, is_scheduled=true

%product (a: f32[8,8]) -> f32[8,8] {
  ROOT %dot.1 = f32[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%some (a: f32[8]) -> f32[8] {
  ROOT %f = f32[8]{0} fusion(%a), kind=kOutput, calls=%product
}

%none (a: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} add(%a, %a)
}

ENTRY %main (p: /*index=5*/bf16[8]) -> f32[8] {
"""
CASE = Case(topology="v5e:2x2", scheme="ring")


def ring(hops=3, part=PART, done_first=False, hop=HOP):
    """A ring of four devices: each hop sends keys and values, computes, and receives."""
    lines = []
    for i in range(hops):
        starts = [START.format(i=f"{i}{x}", p=part) for x in "kv"]
        ends = [DONE.format(i=f"{i}{x}", p=part) for x in "kv"]
        work = [hop.format(i=i)]
        lines += starts + ends + work if done_first else starts + work + ends
    return HEAD + "\n".join(lines) + "\n}\n"


def test_a_ring():
    found = examined(CASE, ring())
    assert found.why == ""
    assert found.sent == found.on_paper == 6 * 16384 * 8 * 128 * 2
    assert (found.permutes, found.overlapped) == (6, 6)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (ring(hops=4), "8"),  # a hop too many
        (ring(hops=2), "4"),
        (ring(part=PART.replace("bf16", "f32")), "384.0 MiB are sent, not 192.0"),
        (ring(done_first=True), "0 of 6 transfers overlap"),
        (ring(hop=HOP.replace("%some", "%none")), "0 of 6 transfers overlap"),
        (
            HEAD + f"  %g = {PART} all-gather(%x), replica_groups={{{{0,1,2,3}}}}\n}}\n",
            "all-gather",
        ),
    ],
)
def test_a_faulty_ring_is_refused(program, why):
    assert why in examined(CASE, program).why


@pytest.mark.parametrize("scheme", ["all_gather", "ulysses", "ring_ulysses"])
def test_a_ring_in_place_of_another_scheme_is_refused(scheme):
    case = Case(topology="v5e:2x2", scheme=scheme, ulysses_devices=2)
    assert "collectives are {'collective-permute': 6}, not " in examined(case, ring()).why


def test_what_a_device_sends():
    """On a TPU, where a reduce-scatter is a computation, and on a GPU, where all have two ends."""
    groups = "replica_groups={{0,1,2,3}}"
    text = f"""HloModule jit_f, is_scheduled=true

%all-reduce-scatter (input: bf16[64,8]) -> bf16[16,8] {{
  %all-reduce.2 = bf16[64,8]{{1,0:T(8,128)(2,1)}} all-reduce(%input), {groups}, to_apply=%sum
}}

ENTRY %main (p: bf16[16,8]) -> bf16[16,8] {{
  %g = (bf16[16,8]{{1,0}}, bf16[64,8]{{1,0}}) all-gather-start(%p), {groups}, dimensions={{0}}
  %gd = bf16[64,8]{{1,0}} all-gather-done(%g)
  %a = ((bf16[16,8]{{1,0}}), bf16[16,8]{{1,0}}) all-to-all-start(%p), {groups}
  %ad = bf16[16,8]{{1,0}} all-to-all-done(%a)
  %r = ((f32[64,8]{{1,0}}), f32[16,8]{{1,0}}) reduce-scatter-start(%q), {groups}
  %rd = f32[16,8]{{1,0}} reduce-scatter-done(%r)
}}
"""
    found = [(x.kind, x.sent) for x in collectives(text)]
    assert found == [
        ("reduce-scatter", 64 * 8 * 2 * 3 / 4),
        ("all-gather", 64 * 8 * 2 * 3 / 4),
        ("all-to-all", 16 * 8 * 2 * 3 / 4),
        ("reduce-scatter", 16 * 8 * 4 * 3),
    ]
