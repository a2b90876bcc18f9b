"""`tools/paths.py`: what a thread executes on its way, and that the table of it is right."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import ptxrun
import pytest
import torch
from ptx_backend import PtxBackend

from tokendance import testing
from tools import paths, sass

ROOT = Path(__file__).resolve().parent.parent
PTX = """\
.version 8.0
.target sm_80
.address_size 64
.visible .entry chain(.param .u64 chain_param_0)
{{
  .reg .pred %p<2>;
  .reg .b32 %r<12>;
  .reg .b64 %rd<6>;
  .shared .align 16 .b8 stage[64];
  ld.param.u64 %rd1, [chain_param_0];
{body}
  ret;
}}
"""
# Of two indices that do not wait for each other, one leads to the row.
LOOK_UP = """\
  ld.global.nc.u32 %r1, [%rd1];
  ld.global.nc.u32 %r2, [%rd1+4];
  mul.wide.u32 %rd2, %r1, 16;
  add.s64 %rd3, %rd1, %rd2;
"""
ROW = "  ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd3];\n"
DECIDE = """\
  setp.eq.s32 %p1, %r2, 77;
  @%p1 bra end;
  ld.global.u32 %r8, [%rd1+8];
end:
"""
COPY = """\
  mov.u32 %r3, stage;
  cp.async.cg.shared.global [%r3], [%rd3], 16;
  cp.async.commit_group;
"""
SHARE = """\
  st.shared.u32 [stage+32], %r1;
  bar.sync 0;
"""


def way(body: str, **options: bool) -> paths.Way:
    module = ptxrun.Module(PTX.format(body=body))
    stats = module.launch("chain", 1, 1, [np.ones(64, "u4")], follow=0)
    return paths.way(module.instructions("chain"), stats.path, **options)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # The row waits for an index; nothing waits for the row.
        (LOOK_UP + ROW, paths.Way(before=5, loads=1, trips=1, nbytes=16)),
        # Both indices have come when the jump is decided, so that the row waits for one trip.
        (LOOK_UP + DECIDE + ROW, paths.Way(before=8, loads=1, trips=1, nbytes=16)),
        # Whoever needs the row waits once more.
        (LOOK_UP + ROW + "  add.s32 %r9, %r4, %r5;\n", paths.Way(5, 1, 2, 16)),
        (LOOK_UP + DECIDE + "  ld.global.v2.u32 {%r4, %r5}, [%rd1];\n", paths.Way(8, 1, 1, 8)),
        # What came through a barrier decides, too.
        (LOOK_UP + SHARE + "  ld.global.v2.u32 {%r4, %r5}, [%rd1];\n", paths.Way(7, 1, 1, 8)),
        # Copies are waited for by groups; beside them vectors are not rows.
        (ROW.replace("%rd3", "%rd1") + LOOK_UP + COPY, paths.Way(7, 1, 1, 16)),
        (LOOK_UP + COPY + "  cp.async.wait_group 0;\n", paths.Way(6, 1, 2, 16)),
        (LOOK_UP + COPY + "  cp.async.wait_group 1;\n", paths.Way(6, 1, 1, 16)),
        (LOOK_UP + COPY + "  cp.async.wait_all;\n", paths.Way(6, 1, 2, 16)),
        ("", paths.Way(0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_a_way(body, expected):
    assert way(body) == expected


def test_vectors_of_floats_are_rows_only_where_asked_for():
    load = "  ld.global.v4.f32 {%f4, %f5, %f6, %f7}, [%rd1];\n"
    body = "  .reg .f32 %f<8>;\n" + load
    assert way(body).nbytes == 0
    assert way(body, floats=True) == paths.Way(before=1, loads=0, trips=0, nbytes=16)


@pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or "")
@pytest.mark.usefixtures("one_thread")
def test_the_table_is_what_is_executed():
    assert sass.differences(paths.TABLE.read_text(), paths.lines()) == []


@pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or "")
@pytest.mark.usefixtures("one_thread")
def test_a_first_copy_of_own_rows_waits_for_as_few_loads_as_one_of_a_master():
    def rounds():
        for seed in itertools.count():
            case = testing.random_round(
                seed, agents=2, masters=(), private_length=150, rows=1, num_kv_heads=1,
                num_q_heads=4, head_dim=128, dtype=torch.bfloat16, work="planned", slack=False,
            )  # fmt: skip
            arrays = case.arrays
            lengths = arrays["own_length"][arrays["row_agent"]]
            sees_all = (arrays["row_position"] >= lengths - 1).all()
            if len(lengths) > 0 and lengths[0] > 100 and sees_all:
                yield case

    ptx = PtxBackend(race=False, stats=False, follow=0)
    paths.attend(ptx, next(rounds()))
    assert paths.way_of(ptx, 0).loads == 3


def test_docs_say_what_the_table_says():
    page = (ROOT / "docs" / "kernels.md").read_text()
    ways, _, expected = paths.TABLE.read_text().partition("\n")[2].strip("\n").split("\n\n")

    def written(title):
        rows = page.partition(title)[2].partition("\n\n")[0].splitlines()[2:]
        return [row.strip("| ").split(" | ") for row in rows]

    rows = [line.split() for line in ways.splitlines()[1:]]
    assert written("| kernel | instructions before |") == [
        [f"`{name}`", *numbers[:3], numbers[4]] for name, *numbers in rows
    ]
    shapes = [line.rsplit(maxsplit=2) for line in expected.splitlines()[1:]]
    assert written("| shape, bf16 | floor |") == [
        [shape, f"{floor} us", f"{time} us"] for shape, floor, time in shapes
    ]


def test_expectations():
    """Of a kernel that has little under way more is expected than its floor."""
    kernels = (
        "rope_rotate_bf16_half_wide",
        "key_deviation_bf16_half_wide",
        "diff_encode_compare_bf16_half_wide",
        "diff_restore_bf16_half_wide",
        "collective_attention_bf16_d128",
        "collective_attention_merge_bf16",
    )
    lines = dict.fromkeys(kernels, paths.Line(paths.Way(9, 2, 3, 64), 7.0))
    kernel = "collective_attention_bf16_d128"
    steps = {
        f"{kernel}: source, a thread": 1830,
        f"{kernel}: ldmatrix of 100 mma, tall tiles": 50.0,
    }
    found = paths.expected(lines, steps)
    floor, time = found["key_deviation, 8 agents, 32768 tokens of 8x128"]
    assert floor == pytest.approx(604e6 / 4.8e6)
    assert time == pytest.approx(2 + 604e6 * 0.7 / (132 * 7 * 1024))
    floor, time = found["diff_restore, the same"]
    assert time == pytest.approx(2 + floor)
    [(floor, time)] = (found[shape] for shape in found if "decode" in shape)
    assert floor == pytest.approx(7.0)
    # A launch, five trips to L2, two instructions a clock of 1830 each, the bytes, the merge.
    assert time == pytest.approx(2 + 5 * 0.3 + 2 + 7 + 1)
    [(floor, time)] = (found[shape] for shape in found if "prefill" in shape)
    # 256 bytes of shared memory for an mma of 4096 FLOP: twice what they take.
    assert time == pytest.approx(2 + 567.2e9 / 16 / 30.9e6)
