"""`python -m tools.sass`: reading ptxas and nvdisasm, occupancy, and what must not be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools import sass

ROOT = Path(__file__).resolve().parent.parent
PTXAS = """\
ptxas info    : Compiling entry function 'one_wide' for 'sm_80'
ptxas info    : Function properties for one_wide
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 2048 bytes smem, 560 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 560 bytes cmem[0]
"""
SASS = """\
	.section	.text.one_wide,"ax",@progbits
.text.one_wide:
        /*0010*/                   LDG.E R4, [R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R2, R8 ;
.text.two:
        /*0010*/                   STG.E.128 [R2.64], R4 ;
        /*0020*/                   LDL.LU R4, [R1] ;
"""


def test_reads_ptxas():
    assert sass.parse_resources(PTXAS) == {"one_wide": (96, 16, 2048), "two": (32, 0, 0)}


def test_reads_sass():
    counts = {
        name: dict(zip(sass.INSTRUCTIONS, found, strict=True))
        for name, (found, _) in sass.parse_sass(SASS).items()
    }
    assert {k: n for k, n in counts["one_wide"].items() if n} == {
        "HMMA": 1,
        "LDGSTS": 1,
        "LDG.128": 1,
    }
    assert {k: n for k, n in counts["two"].items() if n} == {"STG.128": 1, "LDL": 1}
    assert {name: before for name, (_, before) in sass.parse_sass(SASS).items()} == {
        "one_wide": 1,
        "two": 0,
    }


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("80", 256, 32, 0, 8),  # 64 warps
        ("80", 256, 33, 0, 6),  # 40 registers are handed out: 48 warps
        ("80", 256, 128, 0, 2),
        ("80", 1024, 65, 0, 0),
        ("80", 32, 32, 0, 32),  # blocks
        ("80", 128, 32, 40 * 1024, 4),  # shared memory: 41 KB each of 164
        ("90", 128, 32, 99 * 1024, 2),
        ("120", 128, 32, 99 * 1024, 1),
    ],
)
def test_occupancy(arch, threads, registers, shared, blocks):
    assert sass.blocks_per_multiprocessor(arch, threads, registers, shared) == blocks


def test_complaints():
    counts = tuple(1 if name in ("LDG.128", "STG.128") else 0 for name in sass.INSTRUCTIONS)
    good = sass.Kernel("rope_rotate_wide", "80", 256, 64, 0, 0, 4, 32, counts, 9)
    assert sass.complaints(good) == []
    for bad, complaint in [
        (replace(good, spills=4), "uses local memory"),
        (replace(good, shared=100 * 1024), "shared memory"),
        (replace(good, blocks=0), "does not fit"),
        (replace(good, counts=(0,) * len(counts)), "no loads of 16 bytes"),
        (
            replace(good, name="merge_states_f32", counts=(0,) * len(counts)),
            "no loads of 16 bytes",
        ),
        (replace(good, name="collective_attention_f16_d64"), "tensor cores"),
    ]:
        assert any(complaint in found for found in sass.complaints(bad))


def test_plans_give_every_kernel_a_block():
    demands = sass.demands()
    assert {
        "tokendance_rope_rotate_bf16_half_wide",
        "tokendance_key_deviation_f32_half_narrow",
        "tokendance_diff_encode_compare_f16_interleaved_wide",
        "tokendance_diff_encode_compact_b32_narrow",
        "tokendance_diff_restore_f32_interleaved_wide",
        "tokendance_merge_states_f16",
        "tokendance_rope_rotate_e4m3_half_wide",
        "tokendance_rope_rotate_f32_to_e4m3_interleaved_narrow",
        "tokendance_diff_restore_e4m3_to_bf16_half_wide",
        "tokendance_diff_encode_compare_e4m3_half_narrow",
        "tokendance_collective_attention_bf16_e4m3_d80",
    } <= set(demands)
    assert all(demand.shared_bytes <= sass.MAX_SHARED_BYTES for demand in demands.values())


# Kernels that stand for others in docs/kernels.md.
IN_DOCS = {
    "rope_rotate": "rope_rotate_bf16_half_wide",
    "key_deviation": "key_deviation_bf16_half_wide",
    "diff_encode, compare": "diff_encode_compare_bf16_half_wide",
    "diff_encode, compact": "diff_encode_compact_b16_wide",
    "diff_restore": "diff_restore_bf16_half_wide",
    "merge_states": "merge_states_bf16",
    "collective_attention": "collective_attention_bf16_d128",
    "rope_rotate, bf16 to e4m3": "rope_rotate_bf16_to_e4m3_half_wide",
    "rope_rotate, e4m3": "rope_rotate_e4m3_half_wide",
    "diff_encode, compare, e4m3": "diff_encode_compare_e4m3_half_wide",
    "diff_restore, e4m3": "diff_restore_e4m3_half_wide",
    "collective_attention, e4m3": "collective_attention_bf16_e4m3_d128",
    "collective_attention, merge": "collective_attention_merge_bf16",
}


def table() -> dict[tuple[str, str], list[str]]:
    """The checked table: by kernel and architecture, what follows."""
    _, _, *lines = sass.TABLE.read_text().splitlines()
    return {(name, arch): rest for name, arch, *rest in map(str.split, lines)}


def test_docs_say_what_the_table_says():
    page = (ROOT / "docs" / "kernels.md").read_text()
    _, _, after = page.partition("| kernel | threads | registers | shared memory |")
    rows = [line.strip("| ").split(" | ") for line in after.partition("\n\n")[0].splitlines()[2:]]
    assert {name for name, *_ in rows} == set(IN_DOCS)
    compiled = table()
    for name, *written in rows:
        old, new = (compiled[IN_DOCS[name], arch] for arch in ("80", "90"))
        threads, _, _, shared = old[:4]
        (registers, blocks, warps) = (
            f"{of_old}, {of_new}"
            for of_old, of_new in zip(
                (old[1], old[4], old[5].partition("/")[0]),
                (new[1], new[4], new[5].partition("/")[0]),
                strict=True,
            )
        )
        memory = f"{int(shared):,} B" if int(shared) else "none"
        assert written == [threads, registers, memory, blocks, warps], name


def test_the_table_has_every_kernel_for_both_architectures_and_attention_has_few():
    compiled = set(table())
    names = {name.removeprefix("tokendance_") for name in sass.demands()}
    assert compiled == {(name, arch) for name in names for arch in ("80", "90")}
    assert len([name for name in names if name.startswith("collective_attention")]) <= 100
