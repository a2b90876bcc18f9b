"""`python -m tools.mutate`: a sample of mutants does not get past the cases."""

from __future__ import annotations

import zlib
from dataclasses import replace

import kernel_cases
import pytest
from ptx_backend import PtxBackend
from ptxrun.mutate import Mutation

from tools import equivalent_mutants, kernel_ptx, mutate
from tools.equivalent_mutants import EQUIVALENT, Equivalent, explanation

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or ""),
]


@pytest.mark.slow
def test_a_sample_of_mutants_is_killed():
    """Of 20 mutants of all operators at least 95 % are noticed, or explained.

    Which ones follows from the kernels' instructions: when they change, others are drawn.
    """
    kernels = [
        kernel
        for operator in kernel_ptx.operators()
        for kernel in mutate.kernels_of(operator, kernel_cases.REPRESENTATIVE)
    ]
    seed = zlib.crc32("".join(kernel.digest for kernel in kernels).encode())
    found = [
        verdict
        for kernel, indices in mutate.sampled(kernels, 20, seed)
        for verdict in mutate.verdicts(kernel, indices)
    ]
    assert len(found) == 20
    survived = [verdict for verdict in found if mutate.outcome(verdict) == "survived"]
    assert len(survived) <= 1, survived
    assert sum(verdict.killed for verdict in found) >= 14


def test_a_sample_is_repeatable_and_even():
    kernels = mutate.kernels_of("rope_rotate", kernel_cases.REPRESENTATIVE[:1])
    kernels += mutate.kernels_of("merge_states", kernel_cases.REPRESENTATIVE[:1])
    chosen = mutate.sampled(kernels, 7, seed=3)
    assert chosen == mutate.sampled(kernels, 7, seed=3)
    assert chosen != mutate.sampled(kernels, 7, seed=4)
    assert [len(indices) for _, indices in chosen] == [3, 4]


def test_mutants_of_some_lines_of_the_source():
    [kernel] = mutate.kernels_of("rope_rotate", kernel_cases.REPRESENTATIVE[:1])
    found = mutate.of_lines(kernel, r"rope\.h:.*max_position")
    assert 0 < len(found) < len(kernel.mutations) / 4
    assert all("max_position" in verdict.source for verdict in mutate.verdicts(kernel, found))
    assert mutate.of_lines(kernel, "") == list(range(len(kernel.mutations)))


def test_a_survivor_comes_with_its_source(monkeypatch):
    """Cases that look at nothing let everything past, and the line is named."""
    [kernel] = mutate.kernels_of("rope_rotate", kernel_cases.REPRESENTATIVE[:1])
    monkeypatch.setattr(mutate, "killing_case", lambda kernel, mutation, cases: "")
    found = list(mutate.verdicts(kernel, range(30)))
    assert {mutate.outcome(verdict) for verdict in found} <= {"survived", "equivalent"}
    assert any("rope_rotate.cuh" in verdict.source for verdict in found)


def test_a_later_run_goes_on_where_one_ended(monkeypatch, tmp_path):
    """Killed mutants are not run again, and survivors only in cases that they have not passed.

    Cases that do not execute what was changed are never run, and few of what is explained.
    """
    [kernel] = mutate.kernels_of("rope_rotate", kernel_cases.REPRESENTATIVE[:1])
    path = tmp_path / "verdicts.jsonl"
    asked: list[list[str]] = []
    answers = ["some case", "", "another", "", "", "found later", "", ""]

    def names(cases):
        return [measured.case.name for measured in cases]

    def killing_case(kernel, mutation, cases):
        asked.append(names(cases))
        return answers[len(asked) - 1]

    def explanation(name, mutation, source):
        return "a reason" if mutation == kernel.mutations[4] else ""

    monkeypatch.setattr(mutate, "killing_case", killing_case)
    monkeypatch.setattr(mutate, "explanation", explanation)
    first = list(mutate.verdicts(kernel, range(4), known=mutate.Verdicts(path)))
    assert [verdict.killed_by for verdict in first] == answers[:4]
    second = list(mutate.verdicts(kernel, range(5), known=mutate.Verdicts(path)))
    assert [verdict.killed_by for verdict in second] == ["some case", "", "another", *answers[5:7]]
    assert [verdict.explanation for verdict in second] == [""] * 4 + ["a reason"]
    executing = [names(kernel.cases_of(mutation, False)) for mutation in kernel.mutations[:5]]
    assert len(executing[4]) > mutate.FEW
    assert asked == [*executing[:4], [], [], executing[4][: mutate.FEW]]
    assert len(path.read_text().splitlines()) == 6
    assert mutate.Verdicts(path).killed_by(kernel, 3) == "found later"

    third = list(mutate.verdicts(kernel, range(4, 5), known=mutate.Verdicts(path)))
    assert third == second[4:]
    assert asked[7] == []
    kernel.cases[0].executed = frozenset()
    assert names(kernel.cases_of(kernel.mutations[0], False)) == [
        name for name in executing[0] if name != kernel.cases[0].case.name
    ]

    other = replace(kernel, ptx=kernel.ptx.replace("mad.lo.s32", "mad.lo.u32", 1))
    known = mutate.Verdicts(path)
    assert known.killed_by(kernel, 0) == "some case"
    assert known.killed_by(other, 0) == ""


def test_a_kernel_is_the_same_where_only_others_change():
    text = "//\n.entry {0}(\n)\n{{\n.loc {2} 1\n$L__BB{1}_3:\nbra $L__BB{1}_3; \n}}\n"
    alone = mutate.Kernel("", "a", [], text.format("a", 0, 1))
    after = mutate.Kernel("", "a", [], text.format("b", 0, 1) + text.format("a", 1, 2))
    assert alone.digest == after.digest
    changed = mutate.Kernel("", "a", [], alone.ptx.replace("}", "ret;\n}"))
    assert changed.digest != alone.digest


def test_a_kernel_is_the_same_wherever_its_source_lies():
    kernel = ".entry a(\n)\n{\nret;\n}\n"
    of_a_folder = '\t.file\t1 "/folder/a.cu"\n\t.section\t.debug_str\n\t{\n.b8 95,90,0\n\t}\n'
    last = mutate.Kernel("", "a", [], kernel + of_a_folder)
    assert last.digest == mutate.Kernel("", "a", [], kernel).digest


def test_cases_that_kill_most_come_first(monkeypatch):
    ran = []

    def case(name, fails=False):
        def run(backend):
            ran.append(name)
            assert not fails

        return kernel_cases.Case(name, run)

    ptx = ".entry k()\n{\n.reg .b32 %r<2>;\nadd.s32 %r1, %r1, 1;\nret;\n}\n"
    cases = [
        mutate.MeasuredCase(case("slow"), 100, frozenset()),
        mutate.MeasuredCase(case("quick"), 20, frozenset()),
        mutate.MeasuredCase(case("kills", fails=True), 50, frozenset()),
    ]
    kernel = mutate.Kernel("rope_rotate", "k", cases, ptx)
    [mutation, *_] = kernel.mutations
    for expected in (["quick", "kills"], ["quick", "kills"], ["kills"]):
        ran.clear()
        assert mutate.killing_case(kernel, mutation, cases) == "kills"
        assert ran == expected
    ran.clear()
    assert mutate.killing_case(kernel, mutation, cases[:1]) == ""
    assert ran == ["slow"]


def test_kernels_apart_keep_their_lines():
    ptx = "head\n.visible .entry a(\n)\n{\nret;\n}\n.visible .entry b()\n{\nret;\n}\n"
    assert kernel_ptx.only_kernels(ptx, {"a", "b"}) == ptx
    assert kernel_ptx.only_kernels(ptx, {"b"}).split("\n")[6:] == ptx.split("\n")[6:]
    assert "entry a" not in kernel_ptx.only_kernels(ptx, {"b"})


KERNEL = """\
.visible .entry k()
{
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 3;
mov.u32 %r3, 0;
$L:
add.s32 %r3, %r3, 4;
or.b32 %r4, %r2, %r3;
and.b32 %r5, %r4, MASK;
setp.eq.s32 %p1, %r1, 0;
@%p1 bra $L;
sub.s32 %r6, %r1, %r5;
setp.eq.s32 %p2, %r6, 0;
ret;
}
"""


def masked(old, new):
    """A mutant of the mask of a number whose last two bits are 0."""
    ptx = KERNEL.replace("MASK", str(new))
    description = f"change immediate: and.b32 %r5, %r4, {old} -> and.b32 %r5, %r4, {new}"
    return Mutation(description, 9, ptx)


def test_explanations_look_at_change_and_source():
    assert all(
        entry.reason and entry.change and (entry.source or entry.operands) for entry in EQUIVALENT
    )
    swapped = Mutation("swap operands: sub.f32 %f1, %f2, %f3 -> sub.f32 %f1, %f3, %f2", 1, "")
    assert "distance" in explanation("key_deviation_f32", swapped, "x_difference = fresh_x[j]")
    assert explanation("rope_rotate_f32", swapped, "float x = a - b;") == ""


def test_masks_of_zeros_are_found_through_loops():
    for old, new in ((-8, -7), (60, 61), (28, 31), (28, 30)):
        assert "mask" in explanation("k", masked(old, new), "")
    for old, new in ((60, 56), (28, 27), (-4, -5), (4, 3)):
        assert explanation("k", masked(old, new), "") == ""


def test_bits_that_nothing_reads_are_found():
    for old, new, use, known in (
        (7, 6, "shr.u32 %r6, %r5, 1", True),
        (7, 3, "shr.u32 %r6, %r5, 1", False),
        (7, 5, "or.b32 %r6, %r3, %r5", False),
        (7, 6, "or.b32 %r6, %r3, %r5", True),
        (7, 6, "shr.u32 %r6, %r2, %r5", False),
        (7, 6, "add.s32 %r6, %r2, %r5", False),
        (7, 3, "and.b32 %r6, %r5, 3", True),
    ):
        after = "and.b32 %r7, %r6, 14;\nst.u32 [%rd1], %r7;"
        ptx = (
            masked(old, new)
            .ptx.replace("%r4, %r2, %r3", "%r4, %r1, %r3")
            .replace("sub.s32 %r6, %r1, %r5;\nsetp.eq.s32 %p2, %r6, 0;", f"{use};\n{after}")
        )
        mutant = masked(old, new)._replace(ptx=ptx)
        assert ("mask" in explanation("k", mutant, "")) is known, use
        stored = mutant._replace(ptx=ptx.replace(after, "st.u32 [%rd1], %r5;"))
        assert explanation("k", stored, "") == ""


def test_bits_added_to_zeros_that_nothing_reads_are_found():
    """%r2 ends with three zeros."""
    for old, new, uses, known in (
        (2, 3, "shr.u32 %r6, %r5, 3;\nand.b32 %r7, %r5, 6;", True),
        (2, 1, "shr.u32 %r6, %r5, 2;", True),
        (2, 3, "and.b32 %r7, %r5, 7;", False),
        (2, 10, "and.b32 %r7, %r5, 7;", False),  # of a sum the fourth bit may carry
        (2, 3, "st.u32 [%rd1], %r5;", False),
    ):
        ptx = KERNEL.replace("and.b32 %r5, %r4, MASK", f"add.s32 %r5, %r2, {new}").replace(
            "sub.s32 %r6, %r1, %r5;", f"{uses}\nst.v2.u32 [%rd1], {{%r6, %r7}};"
        )
        change = f"change immediate: add.s32 %r5, %r2, {old} -> add.s32 %r5, %r2, {new}"
        assert bool(explanation("k", Mutation(change, 9, ptx), "")) is known, (old, new, uses)


def test_bits_of_a_lane_that_is_compared_or_halved():
    ptx = KERNEL.replace("or.b32 %r4, %r2, %r3", "and.b32 %r4, %r1, 31").replace("MASK", "2")
    change = "change immediate: and.b32 %r5, %r4, 3 -> and.b32 %r5, %r4, 2"
    for use, known in (
        ("shr.u32 %r6, %r5, 1", True),
        ("or.b32 %r6, %r1, %r5", False),
        ("add.s32 %r6, %r1, %r5", False),
    ):
        used = ptx.replace("sub.s32 %r6, %r1, %r5", f"setp.ne.s32 %p3, %r5, 0;\n{use}")
        mutant = Mutation(change, 9, used)
        assert ("LSE" in explanation("collective_attention", mutant, "")) is known, use


def test_explanations_look_at_what_is_compared():
    source = "file.cuh:1: if (lane == 0) range[warp] = make_int2(low, high);"
    flipped = Mutation("flip predicate: @%p1 bra $L -> @!%p1 bra $L", 11, KERNEL)
    assert "every lane" in explanation("k", flipped, source)
    other = Mutation(
        flipped.description,
        11,
        KERNEL.replace("setp.eq.s32 %p1, %r1, 0", "setp.lt.s32 %p1, %r1, 9"),
    )
    assert explanation("k", other, source) == ""
    for changed, known in (("setp.eq.s32 %p1, %r1, 1", True), ("setp.eq.s32 %p1, %r1, -1", False)):
        mutant = Mutation(f"change immediate: setp.eq.s32 %p1, %r1, 0 -> {changed}", 10, KERNEL)
        assert bool(explanation("k", mutant, source)) is known
    source = "key_deviation.cuh:29: const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;"
    swapped = "swap operands: sub.s32 %r6, %r1, %r5 -> sub.s32 %r6, %r5, %r1"
    assert "lane 0" in explanation("key_deviation_f32", Mutation(swapped, 12, KERNEL), source)
    used = KERNEL.replace("ret;", "add.s32 %r7, %r6, 1;\nret;")
    assert explanation("key_deviation_f32", Mutation(swapped, 12, used), source) == ""
    of_thread = KERNEL.replace("%r4, MASK", "%r1, -31")
    change = "change immediate: and.b32 %r5, %r1, -32 -> and.b32 %r5, %r1, -31"
    assert "lane 0" in explanation("key_deviation_f32", Mutation(change, 9, of_thread), source)
    used = of_thread.replace("ret;", "add.s32 %r7, %r6, 1;\nret;")
    assert explanation("key_deviation_f32", Mutation(change, 9, used), source) == ""


def test_explanations_look_at_the_statement_before(monkeypatch):
    entry = Equivalent("a jump", "change", "", above=r"^@%p1 bra")
    monkeypatch.setattr(equivalent_mutants, "EQUIVALENT", (entry,))
    jumped = KERNEL.replace("sub.s32 %r6", "\t.loc\t1 1\n// a comment\nsub.s32 %r6")
    assert explanation("k", Mutation("change", 14, jumped), "") == entry.reason
    assert explanation("k", Mutation("change", 10, jumped), "") == ""


def test_instructions_whose_result_nothing_reads_are_found():
    changed = Mutation("change immediate: sub.s32", 12, KERNEL)
    assert explanation("k", changed, "") == ""
    unread = KERNEL.replace("setp.eq.s32 %p2, %r6, 0;\n", "")
    assert "nothing reads" in explanation("k", changed._replace(ptx=unread), "")


def test_operands_of_vector_loads_are_found(monkeypatch):
    loaded = Equivalent("a parameter", "change", "", operands=r"ld\.param\.v2.*\[%rd1\+8\]")
    monkeypatch.setattr(equivalent_mutants, "EQUIVALENT", (loaded,))
    ptx = KERNEL.replace("mov.u32 %r3, 0;", "ld.param.v2.u32 {%r3, %r8}, [%rd1+8];").replace(
        "$L:\nadd.s32 %r3, %r3, 4;", "$L:\nsetp.lt.s32 %p3, %r8, 1;"
    )
    ptx = ptx.replace("@%p1 bra", "@%p3 bra")
    change = "change immediate: setp.lt.s32 %p3, %r8, 1 -> setp.lt.s32 %p3, %r8, 0"
    assert explanation("k", Mutation(change, 7, ptx), "") == loaded.reason
    other = ptx.replace("+8]", "+16]")
    assert explanation("k", Mutation(change, 7, other), "") == ""
