"""Mutations: exactly the promised changes, and a runner that tells which ones a check notices."""

from collections import Counter

import numpy as np
import pytest
from ptxrun import Module, PtxError
from ptxrun.mutate import mutations, run_mutants, sample
from ptxrun.program import DROPPED

# 64 threads: copy in 16-byte vectors, read the mirrored thread's one, fold it in a short loop, and
# store one float for each of the first n threads, after a leading float that stays as it is.
MIRROR = """.version 8.0
.target sm_80
.address_size 64
.visible .entry mirror_other() { bar.sync 0; ret; }
.visible .entry mirror(.param .u64 mirror_in, .param .u64 mirror_out, .param .u32 mirror_n)
{
    .reg .pred %p<3>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<7>;
    .reg .f32 %f<7>;
    .shared .align 16 .b8 buffer[1024];
    ld.param.u64 %rd1, [mirror_in];
    ld.param.u64 %rd2, [mirror_out];
    ld.param.u32 %r1, [mirror_n];
    mov.u32 %r2, %tid.x;
    shl.b32 %r3, %r2, 4;  // not: bar.sync 0;
    cvt.u64.u32 %rd3, %r3;
    add.s64 %rd4, %rd1, %rd3;
    mov.u32 %r4, buffer;
    add.s32 %r5, %r4, %r3;
    cp.async.cg.shared.global [%r5], [%rd4], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    sub.s32 %r6, 1008, %r3;
    add.s32 %r7, %r4, %r6;
    ld.shared.v4.f32 {%f1, %f2, %f3, %f4}, [%r7];
    mov.u32 %r8, 0;
$LOOP:
    fma.rn.f32 %f4, %f1, %f2, %f4;
    add.s32 %r8, %r8, 1;
    setp.lt.s32 %p1, %r8, 3;
    @%p1 bra $LOOP;
    setp.ge.u32 %p2, %r2, %r1;
    mul.wide.u32 %rd5, %r2, 4;
    add.s64 %rd6, %rd2, %rd5;
    @!%p2 st.global.f32 [%rd6+4], %f4;
    ret;
}
"""


def passes(module, count=40):
    """Whether the kernel writes exactly the wanted floats."""
    values = np.arange(256, dtype=np.float32).reshape(64, 4)
    output = np.full(80, -1, np.float32)
    want = output.copy()
    a, b, _, d = values[::-1].T
    want[1 : count + 1] = (a * b * 3 + d)[:count]
    module.launch("mirror", 1, 64, [values, output, count], race=True, max_steps=500)
    return np.array_equal(output, want)


def changed_lines(ptx, mutation):
    pairs = zip(ptx.split("\n"), mutation.ptx.split("\n"), strict=True)
    return [(number, new.strip()) for number, (old, new) in enumerate(pairs, 1) if old != new]


def variants(instruction):
    """New instructions of the mutants of a kernel made of one instruction."""
    ptx = ".version 8.0\n.entry k()\n{\n" + instruction + ";\nret;\n}\n"
    return [changed_lines(ptx, m)[0][1].removesuffix(";") for m in mutations(ptx, "k")]


def test_each_mutant_changes_its_line_and_no_other():
    found = list(mutations(MIRROR, "mirror"))
    for mutation in found:
        changed = changed_lines(MIRROR, mutation)
        assert [number for number, _ in changed] == [mutation.line]
        assert mutation.line > 6
    assert Counter(mutation.description.split(":")[0] for mutation in found) == {
        "drop barrier": 1,
        "drop async commit": 1,
        "drop async wait": 1,
        "loosen async wait": 1,
        "flip predicate": 2,
        "change comparison": 2,
        "shift address": 10,
        "change immediate": 8,
        "swap operands": 2,
    }
    assert len({mutation.ptx for mutation in found}) == len(found)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("bar.warp.sync -1", [""]),
        ("barrier.sync 0", [""]),
        ("bar.red.popc.u32 %r1, 0, %p1", []),
        ("cp.async.wait_all", [""]),
        ("cp.async.wait_group 1", ["", "cp.async.wait_group 2"]),
        ("@%p1 bra $L", ["@!%p1 bra $L"]),
        ("@!%p1 bra $L", ["@%p1 bra $L"]),
        ("setp.leu.f32 %p1, %f1, 0f00000000", ["setp.ltu.f32 %p1, %f1, 0f00000000"]),
        ("setp.eq.s32 %p1, %r1, %r2", ["setp.ne.s32 %p1, %r1, %r2"]),
        ("ld.param.u64 %rd1, [k_param_0+8]", []),
        (
            "ld.global.v2.f32 {%f1, %f2}, [%rd1]",
            [
                "ld.global.v2.f32 {%f1, %f2}, [%rd1+16]",
                "ld.global.v2.f32 {%f1, %f2}, [%rd1+-16]",
            ],
        ),
        (
            "st.shared.b16 [%r1+-4], %rs1",
            [
                "st.shared.b16 [%r1+0], %rs1",
                "st.shared.b16 [%r1+-8], %rs1",
                "st.shared.b16 [%r1+12], %rs1",
                "st.shared.b16 [%r1+-20], %rs1",
            ],
        ),
        ("and.b32 %r1, %r2, 0x1", ["and.b32 %r1, %r2, 0", "and.b32 %r1, %r2, 2"]),
        ("shl.b32 %r1, %r2, 0", ["shl.b32 %r1, %r2, 1"]),
        ("add.f32 %f1, %f2, 0f3F800000", []),
        ("sub.f32 %f1, %f2, %f3", ["sub.f32 %f1, %f3, %f2"]),
        ("sub.f32 %f1, %f2, %f2", []),
        ("fma.rn.f32 %f1, %f2, %f3, %f4", ["fma.rn.f32 %f1, %f2, %f4, %f3"]),
        ("mad.lo.s32 %r1, %r2, %r3, %r4", ["mad.lo.s32 %r1, %r2, %r4, %r3"]),
        ("mad.wide.s32 %rd1, %r2, %r3, %rd4", []),
        (
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            "{%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1, %c2, %c3}",
            [
                "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                f"{{%d0, %d1, %d2, %d3}}, {{{a}}}, {{{b}}}, {{%c0, %c1, %c2, %c3}}"
                for a, b in [
                    ("%a1, %a0, %a2, %a3", "%b0, %b1"),
                    ("%a0, %a2, %a1, %a3", "%b0, %b1"),
                    ("%a0, %a1, %a2, %a3", "%b1, %b0"),
                ]
            ],
        ),
    ],
)
def test_variants(instruction, expected):
    assert variants(instruction) == expected


def test_statements_that_share_or_span_lines():
    ptx = ".entry k()\n{\n{ .reg .b32 x; bar.sync 0; add.s32 x,\n x, 1; }\nret;\n}\n"
    found = list(mutations(ptx, "k"))
    assert [(m.line, m.description.split(":")[0]) for m in found] == [
        (3, "drop barrier"),
        (3, "change immediate"),
        (3, "change immediate"),
    ]
    assert all(m.ptx.count("\n") == ptx.count("\n") for m in found)


def test_entry_must_be_named():
    with pytest.raises(PtxError, match=r"entry_name: .*'nothing'"):
        mutations(MIRROR, "nothing")
    with pytest.raises(PtxError, match="entry_name"):
        mutations(MIRROR, "mirr")
    assert len(mutations(MIRROR, "other")) == 1


def test_mutants_are_made_one_by_one():
    mutants = mutations(MIRROR, "mirror")
    every = list(mutants)
    assert len(mutants) == len(every)
    assert [mutants[i] for i in (0, -1)] == [every[0], every[-1]]
    assert list(mutants[3:9:2]) == every[3:9:2]


def test_sample_is_repeatable_and_balanced():
    once, again = sample(MIRROR, "mirror", 9, 1), sample(MIRROR, "mirror", 9, 1)
    assert once == again
    assert len({mutation.description.split(":")[0] for mutation in once}) == 9
    assert [mutation.line for mutation in once] == sorted(mutation.line for mutation in once)
    assert any(sample(MIRROR, "mirror", 9, seed) != once for seed in range(2, 6))
    assert sample(MIRROR, "mirror", 1000, 3) == list(mutations(MIRROR, "mirror"))


def test_a_thorough_check_kills_every_mutant():
    seen = []
    report = run_mutants(
        MIRROR, "mirror", passes, on_result=lambda mutation, killed: seen.append(killed)
    )
    assert report.survived == []
    assert len(report.killed) == len(seen) == 28
    assert all(seen)
    reasons = {killed.mutation.description: killed.reason for killed in report.killed}
    assert reasons["drop barrier: bar.sync 0"].startswith("RaceError")
    assert "endless loop" in reasons["change immediate: add.s32 %r8, %r8, 1 -> add.s32 %r8, %r8, 0"]
    assert (
        "out-of-bounds" in reasons["change immediate: shl.b32 %r3, %r2, 4 -> shl.b32 %r3, %r2, 5"]
    )
    bound = "change comparison: setp.ge.u32 %p2, %r2, %r1 -> setp.gt.u32 %p2, %r2, %r1"
    assert reasons[bound] == "check returned False"


def test_a_weak_check_lets_mutants_survive():
    report = run_mutants(MIRROR, "mirror", lambda module: passes(module, count=64))
    assert [mutation.description for mutation in report.survived] == [
        "change comparison: setp.ge.u32 %p2, %r2, %r1 -> setp.gt.u32 %p2, %r2, %r1"
    ]
    few = run_mutants(MIRROR, "mirror", lambda module: True, count=5, seed=2)
    assert few.survived == sample(MIRROR, "mirror", 5, 2)
    assert few.killed == []


def test_the_check_must_pass_on_the_original():
    with pytest.raises(ValueError, match="unchanged PTX"):
        run_mutants(MIRROR, "mirror", lambda module: False)


def assert_same_code(module, kernel, mutation):
    """A mutant made of a module is the one that its PTX is."""
    found, expected = (
        made.compiled(kernel) for made in (mutation.of(module, kernel), Module(mutation.ptx))
    )
    made = [each for each in found.instructions if each.opcode != DROPPED]
    assert [str(each) for each in made] == [str(each) for each in expected.instructions]
    if mutation.new:
        assert found.source == expected.source
        assert [vars_of(block) for block in found.blocks] == [
            vars_of(block) for block in expected.blocks
        ]


def vars_of(block):
    """What the scheduler knows of a block."""
    names = ("index", "ending", "target", "spins", "successors", "reads", "writes", "defs")
    return [getattr(block, name) for name in names], str(block.collective), block.classes


def test_a_mutant_of_a_module_is_that_of_its_text():
    module = Module(MIRROR)
    for mutation in mutations(MIRROR, "mirror"):
        assert_same_code(module, "mirror", mutation)
    assert passes(module)


GUARDED = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 k_out)
{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [k_out];
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 32;
    @%p1 bar.warp.sync -1;
    @!%p1 bar.sync 1, 32;
    bar.sync 0;
    @%p1 shfl.sync.down.b32 %r1, %r1, 1, 31, -1;
    { .reg .b32 x; mov.u32 x, %r1; add.s32 %r1,
     x, 1; }
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd2, %rd1, %rd2;
    @%p1 st.global.u32 [%rd2], %r1;
    @%p1 exit;
    ret;
}
"""


def test_mutants_of_guarded_and_nested_statements():
    module = Module(GUARDED)
    output = np.zeros(40, np.uint32)
    module.launch("k", 1, 64, [output])
    want, found = output.copy(), list(mutations(GUARDED, "k"))
    for mutation in found:
        assert_same_code(module, "k", mutation)
        outcomes = []
        for made in (mutation.of(module, "k"), Module(mutation.ptx)):
            output[:] = 0
            try:
                made.launch("k", 1, 64, [output], race="warp", max_steps=100)
                outcomes.append(output.tolist())
            except PtxError as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1], mutation.description
    assert len(found) > 12
    output[:] = 0
    module.launch("k", 1, 64, [output])
    assert np.array_equal(output, want)


def test_a_statement_must_be_there_once():
    module = Module(GUARDED)
    with pytest.raises(PtxError, match=r"not one 'bar\.sync 0' on PTX line 3"):
        module.with_statement("k", 3, "bar.sync 0", "")
    twice = Module(GUARDED.replace("bar.sync 0;", "bar.sync 0; bar.sync 0;"))
    with pytest.raises(PtxError, match=r"not one 'bar\.sync 0' on PTX line 14"):
        twice.with_statement("k", 14, "bar.sync 0", "")
    with pytest.raises(PtxError, match="other registers in mov"):
        module.with_statement("k", 10, "mov.u32 %r1, %tid.x", "mov.u32 %r1, %r1")


def test_mutants_of_a_compiled_kernel_are_valid_ptx(load):
    gemm = load("gemm", "80")
    kernel = gemm.find("gemmI6__halfLi0E")
    chosen = sample(gemm.text, kernel, 20, 0)
    assert len({mutation.description.split(":")[0] for mutation in chosen}) >= 9
    for mutation in chosen:
        assert_same_code(gemm, kernel, mutation)
