"""Rounds with what attention on CUDA must not follow: items, pages and indices that they lack."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from attention_rounds import attention_round
from test_collective_attention import scales_of

from tokendance.device.rounds import RoundTensors

INDICES = [
    ("source", 1 << 20), ("source", -(1 << 20)), ("later source", 1 << 20),
    ("later source", -(1 << 20)), ("rows", 1 << 20), ("rows", -1), ("page list", 1 << 20),
    ("page list", -1), ("later page list", -1), ("own page list", 1 << 20), ("use", 1 << 20),
    ("use", -2), ("later use", 1 << 20), ("agent", 1 << 20), ("first own rows", 1 << 20),
    ("masks", 1 << 20),
]  # fmt: skip


def illegal_items(**options):
    """A round, and what puts items that it does not have into its work list's slack."""
    case = attention_round(25, **{"masters": (150, 20), **options})
    filled = case.filled
    room = {
        "work": filled.work + 9,
        "work_rows": filled.work_rows + 2,
        "work_chunks": filled.work_chunks + 1,
        "work_uses": filled.work_uses + 1,
        "partials": filled.partials + 1,
    }
    extents = replace(case.round.extents, **room)
    case = replace(case, round=RoundTensors.from_arrays(case.arrays, filled, extents))

    def damage(given):
        round_, extents = given.round, given.round.extents
        last_row, last_chunk, last_use = extents.work_rows, extents.work_chunks, extents.work_uses
        round_.work_rows[last_row - 2 :] = torch.tensor([extents.rows, -1])
        for item, fields in enumerate(
            (
                [0, last_row + 1, 0, 1, -1, 0, 1],
                [-1, 1, 0, 1, -1, 0, 1],
                [0, 1, 0, last_chunk + 1, -1, 0, 1],
                [0, 1, -1, 1, -1, 0, 1],
                [0, 2, 0, 1, extents.partials - 1, 0, 1],
                [last_row - 2, last_row, 0, 1, -1, 0, 1],
                [0, 2, 0, 1, -1, last_use - 1, 2],
                [0, 1, 0, 1, -1, -1, 1],
                [0, 1, 0, 1, -1, 0, 0],
            ),
            filled.work,
        ):
            round_.work[item, :7] = torch.tensor(fields, dtype=torch.int32)

    return case, damage


def missing_pages(missing, legal=2, **options):
    """A round whose uses and own rows end early, and what lets them go on in pages of this id.

    Args:
        missing: a page id that the pool does not have.
        legal: pages of each Master before the first such one; of own rows half as many.
    """
    options = {"masters": (150, 20), "masks": "none", "work": "planned", **options}
    case = attention_round(25, **options)
    size = case.filled.block_size
    known = case.copy()
    for use in range(case.filled.uses):
        known.round.use_length[use] = min(int(case.round.use_length[use]), legal * size)
    known.round.own_length[: case.filled.agents].clamp_(max=legal // 2 * size)
    chunks = known.round.work_chunks[: case.filled.work_chunks]
    own = chunks[:, 0] < 0
    chunks[own, 1:3] = chunks[own, 1:3].clamp(max=legal // 2 * size)

    def damage(given):
        given.round.use_length.copy_(case.round.use_length)
        given.round.own_length.copy_(case.round.own_length)
        given.round.work_chunks.copy_(case.round.work_chunks)
        for indptr, pages, kept in (
            (case.round.master_page_indptr, given.round.master_pages, legal),
            (case.round.own_page_indptr, given.round.own_pages, legal // 2),
        ):
            for first, end in itertools.pairwise(indptr.tolist()):
                pages[first + kept : end] = missing

    return known, damage


def check_illegal_index(backend, field, value, **options):
    """Nothing is read for such indices; what is computed is finite."""
    case = attention_round(25, **{"masters": (150, 20), **options})
    round_ = case.round
    if field == "source":
        round_.work_chunks[:, 0] = value
    elif field == "later source":
        round_.work_chunks[1::2, 0] = value
    elif field == "rows":
        round_.work_chunks[:, 1 if value < 0 else 2] = value
    elif field == "page list":
        round_.work_chunks[:, 3] = value
    elif field == "later page list":
        later = torch.ones(len(round_.work_chunks), dtype=torch.bool)
        later[round_.work[: case.filled.work, 2].long()] = False  # but the first of an item
        round_.work_chunks[later, 3] = value
    elif field == "own page list":
        round_.work_chunks[round_.work_chunks[:, 0] < 0, 3] = value
    elif field == "first own rows":
        for first, end in round_.work[: case.filled.work, 2:4].tolist():
            round_.work_chunks[first:end] = round_.work_chunks[first:end].flip(0)
        round_.work_chunks[round_.work_chunks[:, 0] < 0, 2] = value
    elif field == "use":
        round_.work_uses[:] = value
    elif field == "later use":
        round_.work_uses[1::2] = value
    elif field == "agent":
        round_.row_agent[case.real_rows] = value
    else:
        round_.use_page_indptr[:] = value
    mine = case.copy(backend.device)
    rows, heads, head_dim = mine.q.shape
    out = torch.zeros_like(mine.q)
    partials = mine.round.extents.partials * heads * (head_dim + 1)
    backend.collective_attention_out(
        mine.q,
        mine.k_pool[0],
        mine.v_pool[0],
        *(mine.cos, mine.sin, mine.interleaved, mine.round.buffer, mine.extents),
        *(mine.scale, 0, 0.0, None, 1.0),
        torch.zeros(partials, device=backend.device),
        out,
        torch.zeros(rows, heads, device=backend.device),
        *scales_of(mine),
    )
    assert out.isfinite().all()
