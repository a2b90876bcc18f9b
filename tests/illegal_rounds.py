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
    ("later source", -(1 << 20)), ("pages", 1 << 20), ("pages", -1), ("use", 1 << 20),
    ("later use", 1 << 20), ("agent", 1 << 20), ("own page", 1 << 20), ("own page", -1),
    ("own length", 1 << 20), ("first own length", 1 << 20), ("master page", 1 << 20),
    ("master page", -1), ("masks", 1 << 20),
]  # fmt: skip


def illegal_items(**options):
    """A round, and what puts items that it does not have into its work list's slack."""
    case = attention_round(25, **{"masters": (150, 20), **options})
    filled = case.filled
    room = {
        "work": filled.work + 6,
        "work_rows": filled.work_rows + 2,
        "work_chunks": filled.work_chunks + 1,
        "partials": filled.partials + 1,
    }
    extents = replace(case.round.extents, **room)
    case = replace(case, round=RoundTensors.from_arrays(case.arrays, filled, extents))

    def damage(given):
        round_, extents = given.round, given.round.extents
        last_row, last_chunk = extents.work_rows, extents.work_chunks
        round_.work_rows[last_row - 2 :] = torch.tensor([extents.rows, -1])
        for item, fields in enumerate(
            (
                [0, last_row + 1, 0, 1, -1],
                [-1, 1, 0, 1, -1],
                [0, 1, 0, last_chunk + 1, -1],
                [0, 1, -1, 1, -1],
                [0, 2, 0, 1, extents.partials - 1],
                [last_row - 2, last_row, 0, 1, -1],
            ),
            filled.work,
        ):
            round_.work[item, :5] = torch.tensor(fields, dtype=torch.int32)

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

    def damage(given):
        given.round.use_length.copy_(case.round.use_length)
        given.round.own_length.copy_(case.round.own_length)
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
    elif field == "pages":
        round_.work_chunks[:, 1 if value < 0 else 2] = value
    elif field == "use":
        round_.agent_use[:, 1] = value
    elif field == "later use":
        round_.agent_use[1::2, 1] = value
    elif field == "agent":
        round_.row_agent[case.real_rows] = value
    elif field == "own page":
        round_.own_page_indptr[:] = value
    elif field in ("own length", "first own length"):
        round_.own_length[:] = value
        for first, end in round_.work[: case.filled.work, 2:4].tolist():
            if field == "first own length":  # own rows are the first of an item
                round_.work_chunks[first:end] = round_.work_chunks[first:end].flip(0)
    elif field == "master page":
        round_.master_page_indptr[:] = value
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
