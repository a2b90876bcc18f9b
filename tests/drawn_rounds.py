"""Rounds that hypothesis draws for the operators that encode and restore Mirrors."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tokendance import testing

HEAD_DIMS = (64, 80, 96, 128, 256)

ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**31),
    "agents": st.integers(0, 8),
    "masters": st.integers(0, 5),
    "num_layers": st.integers(1, 3),
    "num_kv_heads": st.sampled_from([1, 2, 5]),
    "head_dim": st.sampled_from(HEAD_DIMS),
    "part": st.sampled_from([0.0, 0.5, 1.0, 1.0]),
    "interleaved": st.booleans(),
    "layout": st.sampled_from(testing.LAYOUTS),
    "block_size": st.sampled_from([8, 16, 32]),
    "repeat": st.booleans(),
}
"""Of :func:`drawn_round`. Tests add what else ``testing.random_round`` takes."""

LENGTHS: dict[str, st.SearchStrategy[Any]] = {
    "master_length": st.sampled_from([3, 40, 100]),
    "private_length": st.sampled_from([0, 9, 50]),
}


def drawn_round(
    seed: int, *, num_kv_heads: int, head_dim: int, part: float, **options: Any
) -> testing.RandomRound:
    """A round of no queries but one per KV head; ``part`` of the dims of a head are rotary."""
    return testing.random_round(
        seed,
        num_q_heads=num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * part) // 2 * 2,
        **options,
    )
