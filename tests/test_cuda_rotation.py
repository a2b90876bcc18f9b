"""How often collective_attention turns its queries, and what a turn costs: by executed PTX."""

from __future__ import annotations

import itertools

import pytest
import torch
from ptx_backend import PtxBackend

from tokendance import testing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(PtxBackend.missing() is not None, reason=PtxBackend.missing() or ""),
]
MASTERS, TILE = 50, 64
ROWS, GROUP, HEAD_DIM = 4, 16, 128  # a full tile: the query rows of four warps
WARPS = 4


@pytest.fixture(scope="module")
def ptx():
    return PtxBackend(race=False)


def segments():
    """Rows of four agents, which see Masters of one tile of keys each in one item."""
    rounds = (
        testing.random_round(
            seed, agents=ROWS, masters=(TILE,) * MASTERS, private_length=3, rows=1,
            whole_uses=True, masks="none", num_kv_heads=1, num_q_heads=GROUP, head_dim=HEAD_DIM,
            dtype=torch.bfloat16, work="planned", rows_per_item=ROWS, slack=False,
            room_for_all=True,
        )
        for seed in itertools.count()
    )  # fmt: skip
    return next(case for case in rounds if case.filled.rows == ROWS and sees_every_use(case))


def sees_every_use(case):
    arrays = case.arrays
    if [ROWS, MASTERS] not in [[item[1] - item[0], item[3] - item[2]] for item in arrays["work"]]:
        return False
    position = dict(zip(arrays["row_agent"], arrays["row_position"], strict=True))
    uses = zip(arrays["use_agent"], arrays["use_delta"], strict=True)
    return all(position[agent] >= delta for agent, delta in uses)


def executed(ptx, case, run):
    """Instructions of all warps without register moves, which the assembler drops, and bytes of
    tables, when the Masters are moved alike in runs of so many, in the order of the work list."""
    case = case.copy()
    uses = case.filled.uses
    met = [source for source in case.arrays["work_chunks"][:, 0].tolist() if source >= 0]
    shifts = [3 + met.index(int(master)) // run for master in case.round.use_master[:uses]]
    case.round.use_shift[:uses] = torch.tensor(shifts, dtype=torch.int32)
    rows, heads, head_dim = case.q.shape
    ptx.collective_attention_out(
        case.q,
        case.k_pool[0],
        case.v_pool[0],
        *(case.cos, case.sin, case.interleaved, case.round.buffer, case.extents),
        *(case.scale, 0, 0.0, None, 1.0),
        torch.empty(case.round.extents.partials * heads * (head_dim + 1)),
        torch.empty_like(case.q),
        torch.empty(rows, heads),
    )
    stats = ptx.stats[0]
    tables = ptx.traffic()["tables"].load_bytes
    return stats.warp_instructions - stats.by_class.get("mov", 0), tables


@pytest.fixture(scope="module")
def case():
    return segments()


def turn(ptx, case):
    """Instructions of a warp for a turn."""
    always, never = (executed(ptx, case, run)[0] for run in (1, MASTERS))
    return (always - never) / (MASTERS - 1) / WARPS


def test_queries_turn_where_their_shift_changes(ptx, case):
    """Tables are read for a turn alone: two rows of cos and of sin for four heads of a row."""
    bytes_of_turn = ROWS * GROUP // 4 * 2 * 2 * (HEAD_DIM // 2) * 4
    _, never = executed(ptx, case, MASTERS)
    for run in (1, 5):
        _, tables = executed(ptx, case, run)
        assert tables == never + (MASTERS // run - 1) * bytes_of_turn


def test_instructions_of_a_turn(ptx, case):
    """As nvcc writes them; the assembler folds 40 negations into other instructions."""
    assert turn(ptx, case) <= 540


@pytest.mark.parametrize(("run", "part"), [(MASTERS, 0.02), (5, 0.15)])
def test_turns_are_a_small_part_of_decoding_segments(ptx, case, run, part):
    """50 Masters of 64 tokens; those of a run share a shift."""
    total, _ = executed(ptx, case, run)
    assert turn(ptx, case) * WARPS * MASTERS / run <= part * total
