"""`collective_attention` against its roofline, and against attention over copies per agent.

The floor is the sum of the shared and the own part, each the longer of its bytes at the rate of
reading and its FLOPs at the rate of fp32 matrix products. Beside it: our own kernel over a dense
cache per agent, torch's scaled_dot_product_attention agent by agent and batched, and two bounds on
what sharing can give over copies: where bytes decide, N (S + P) / (S + N P), and by the floors of
both, whose FLOPs are the same. `resident`: the same round over pages that stay in the cache, what
the instructions alone take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import ceilings
from bench.mirrors import DECODE, QUANTIZED, make_round

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (Hk, G, D), N, S, P
PREFILL = [((3, 3, 64), 4, 2048, 64), ((4, 7, 128), 2, 2048, 64), ((8, 4, 128), 2, 2048, 64)]


def _sdpa(heads: tuple[int, int, int], agents: int, length: int, dtype: torch.dtype) -> Any:
    num_kv_heads, group, head_dim = heads
    q = torch.randn(agents, num_kv_heads * group, 1, head_dim, dtype=dtype)
    k, v = torch.randn(2, agents, num_kv_heads, length, head_dim, dtype=dtype)
    options = {"enable_gqa": group > 1}

    def per_agent() -> None:
        for a in range(agents):
            F.scaled_dot_product_attention(q[a : a + 1], k[a : a + 1], v[a : a + 1], **options)

    return per_agent, lambda: F.scaled_dot_product_attention(q, k, v, **options)


@pytest.fixture
def gemm() -> ceilings.Ceiling:
    return ceilings.gemm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "agents", "shared", "private"), DECODE)
def bench_decode(
    measure: Any, gemm: Any, heads: Any, agents: int, shared: int, private: int, dtype: str
) -> None:
    num_kv_heads, group, head_dim = heads
    options = {
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "dtype": DTYPES[dtype],
    }
    case = make_round(agents=agents, shared=shared, private=private, **options)
    copies = make_round(agents=agents, shared=shared, private=private, dense=True, **options)
    resident = make_round(
        agents=agents, shared=shared, private=private, resident_pages=4, **options
    )
    per_agent, batched = _sdpa(heads, agents, shared + private, DTYPES[dtype])
    row_bytes = 2 * num_kv_heads * head_dim * DTYPES[dtype].itemsize
    row_flops = 4 * agents * num_kv_heads * group * head_dim  # of one row that all agents see

    def floor(rates: Any) -> float:
        shared_part = max(
            shared * row_bytes / rates["read"],
            shared * row_flops / rates["gemm"],
        )
        own_part = max(
            agents * private * row_bytes / rates["read"],
            private * row_flops / rates["gemm"],
        )
        return shared_part + own_part

    moved = (shared + agents * private) * row_bytes
    read = ceilings.read(moved)

    def bounds(seconds: Mapping[str, float]) -> dict[str, float]:
        copied = agents * (shared + private) * row_bytes
        multiplied = (shared + private) * row_flops
        floor_of_copies = max(copied / read.rate, multiplied / gemm.rate)
        return {
            "bytes_bound": copied / moved,
            "floors_bound": floor_of_copies / floor({"read": read.rate, "gemm": gemm.rate}),
            "resident_of_gemm": multiplied / gemm.rate / seconds["resident"],
        }

    measure(
        case.attention(),
        ceilings={"read": read, "gemm": gemm},
        floor=floor,
        bytes=moved,
        peers={
            "copies": copies.attention(),
            "resident": resident.attention(),
            "sdpa": per_agent,
            "sdpa_batched": batched,
        },
        facts=bounds,
        warm=False,
    )


@pytest.mark.parametrize("pool", QUANTIZED)
@pytest.mark.parametrize(("heads", "agents", "shared", "private"), DECODE[1:3])
def bench_quantized_decode(
    measure: Any, gemm: Any, heads: Any, agents: int, shared: int, private: int, pool: str
) -> None:
    """bf16 queries over keys and values of eight bits; beside it, over bf16."""
    num_kv_heads, group, head_dim = heads
    options = {
        "agents": agents,
        "shared": shared,
        "private": private,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "dtype": torch.bfloat16,
    }
    case = make_round(**options, pool_dtype=QUANTIZED[pool])
    moved = (shared + agents * private) * 2 * num_kv_heads * head_dim
    flops = 4 * agents * (shared + private) * num_kv_heads * group * head_dim
    measure(
        case.attention(),
        ceilings={"read": ceilings.read(moved), "gemm": gemm},
        floor=lambda rates: max(moved / rates["read"], flops / rates["gemm"]),
        bytes=moved,
        peers={"bf16": make_round(**options).attention()},
        warm=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "agents", "shared", "private"), PREFILL)
def bench_prefill(
    measure: Any, gemm: Any, heads: Any, agents: int, shared: int, private: int, dtype: str
) -> None:
    """Every agent computes the second half of its prompt."""
    num_kv_heads, group, head_dim = heads
    rows = shared // 2
    case = make_round(
        agents=agents,
        shared=shared,
        private=private,
        rows=rows,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
    )
    seen = private + shared - rows + (rows + 1) / 2  # rows that a query row sees, on average
    flops = 4 * agents * rows * seen * num_kv_heads * group * head_dim
    measure(
        case.attention(),
        ceilings={"gemm": gemm},
        floor=lambda rates: flops / rates["gemm"],
        flops=flops,
    )
