"""Rows of 64 dims that show every mistake in converting e4m3, whichever lane of a vector makes it.

A thread holds two vectors of up to 8 elements, 32 dims apart if all are rotated, and converts each
element by instructions of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tokendance import testing

E4M3 = torch.float8_e4m3fn


def in_every_lane(numbers: torch.Tensor) -> torch.Tensor:
    """Rows ``[16, heads, 64]``: a number stands in every place of both vectors of a thread."""
    heads = -(-numbers.numel() // 64)
    row = numbers[torch.arange(64 * heads) % numbers.numel()]
    shifts = [half + lane for half in (0, 32) for lane in range(8)]
    return torch.stack([row.roll(shift).view(heads, 64) for shift in shifts])


def every_code() -> torch.Tensor:
    """All the elements, in 4 heads; no pair, of either style, is of two NaN."""
    return in_every_lane(torch.arange(256, dtype=torch.uint8)).view(E4M3)


def scaled_codes(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements in 7 heads, and the heads' scales.

    All the elements, and such whose scales make them halfway between two numbers of ``dtype``,
    beside elements in which any bit is set, or infinite.
    """
    heads = torch.tensor([[0x38, 0xF7], [0x38, 0xEE], [0x40, 0x08]], dtype=torch.uint8)
    lane = (torch.arange(64) % 8 != 0).long()
    rows = torch.cat([torch.arange(256, dtype=torch.uint8), *(head[lane] for head in heads)])
    halfway = 1 + torch.finfo(dtype).eps / 2
    scales = torch.tensor([1.5] * 4 + [halfway, halfway, 3e38])
    return in_every_lane(rows).view(E4M3), scales


def every_interval(dtype: torch.dtype) -> torch.Tensor:
    """What becomes e4m3, in 2 heads: its numbers, what lies halfway between two of them or just
    beside, and what is beyond the largest. What has a way of its own stands in every lane."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    numbers = codes[codes.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    step = between.abs() * 2**-7
    once = torch.cat([numbers, between, between + step, between - step])
    everywhere = [0.0, 447.0, 448.0, 464.0, 1e4, torch.inf, 432.0, 17 / 16, 19 / 16, 2**-6]
    everywhere += [15 * 2**-10, 7 * 2**-10, 3 * 2**-10, 2**-10, 2**-11, torch.nan]
    magnitudes = torch.tensor(everywhere)
    odd = torch.full((32,), 1 + 2**-7)  # the last bit of 16
    signed = torch.stack([torch.cat([magnitudes, -magnitudes]), odd], dim=1)
    rows = [in_every_lane(signed.flatten()), in_every_lane(once)[0].view(16, -1, 64)]
    return torch.cat(rows, dim=1).to(dtype)


def make_infinite(cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Angles by which elements from 2 on become infinite, and lesser ones large."""
    cos.fill_(3e38)
    sin.fill_(0.0)


def round_of(rows: torch.Tensor, **options: Any) -> testing.RandomRound:
    """Two agents of one Master, which stays for the first and is turned for the second. Its rows
    are these, as keys and as values."""
    count, heads, _ = rows.shape
    case = testing.random_round(
        19, agents=2, masters=(count,), whole_uses=True, masks="none", private_length=0,
        num_q_heads=heads, num_kv_heads=heads, dtype=rows.dtype, table_slack=9, block_size=8,
        **options,
    )  # fmt: skip
    case.round.use_shift[:2] = torch.tensor([0, 7])
    pages = case.round.master_pages[: case.filled.master_pages].long()
    for pool in case.k_pool + case.v_pool:
        pool[pages] = rows.view(len(pages), 8, heads, 64)
    return replace(case, k_scale=None, v_scale=None)
