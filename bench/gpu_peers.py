"""Other implementations of the attention that `python -m bench.gpu` measures; each is optional.

``sdpa``: torch's scaled_dot_product_attention over dense copies, one per agent, with the backend
that torch chooses and with each by name. ``cascade``, ``paged`` and ``ragged``: FlashInfer's
cascade and paged decode over the very pages, and its prefill over dense copies. FlashInfer gets the
case that it can serve: Masters at the same positions in all prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.mirrors import BenchRound

Call = Callable[[], object]
Peer = Callable[[], Call]  # makes the call; raises where this machine or the shape has none
WORKSPACE = 512 << 20  # bytes
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def of_decode(case: BenchRound) -> dict[str, Peer]:
    peers = _sdpa(case, queries=1)
    if case.geometry.dtype == torch.float32:
        return peers
    peers["paged"] = lambda: _paged(case)
    # Which of its kernels is better for few rows is not known beforehand.
    for backend in ("fa2", "fa3"):
        peers[f"cascade {backend}"] = lambda backend=backend: _cascade(case, backend)
    return peers


def of_prefill(case: BenchRound) -> dict[str, Peer]:
    peers = _sdpa(case, queries=case.length)
    if case.geometry.dtype != torch.float32:
        peers["ragged fa3"] = lambda: _ragged(case, "fa3")
    return peers


def _sdpa(case: BenchRound, queries: int) -> dict[str, Peer]:
    """Over a dense copy of every agent's KV, whose last rows ask."""
    geometry, device, agents = case.geometry, case.q.device, len(case.mirrors)
    made: list[tuple[Tensor, ...]] = []

    def dense() -> tuple[Tensor, ...]:
        if not made:  # one copy for all backends
            sizes = [(geometry.num_q_heads, queries)] + 2 * [(geometry.num_kv_heads, case.length)]
            made.append(
                tuple(
                    torch.empty(
                        agents, *size, geometry.head_dim, dtype=geometry.dtype, device=device
                    ).normal_()
                    for size in sizes
                )
            )
        return made[0]

    options: dict[str, Any] = {
        "is_causal": queries == case.length,
        "enable_gqa": geometry.num_q_heads > geometry.num_kv_heads,
    }

    def chosen() -> Call:
        tensors = dense()
        return lambda: F.scaled_dot_product_attention(*tensors, **options)

    def named(backend: SDPBackend) -> Call:
        tensors = dense()

        def call() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*tensors, **options)

        return call

    peers: dict[str, Peer] = {"sdpa": chosen}
    if device.type == "cuda" and geometry.dtype != torch.float32:
        for name, backend in BACKENDS.items():
            peers[f"sdpa {name}"] = lambda backend=backend: named(backend)
    return peers


# FlashInfer --------------------------------------------------------------------------------------


def _int32(case: BenchRound, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=case.q.device)


def _workspace(case: BenchRound) -> Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=case.q.device)


def _shared_pages(case: BenchRound) -> list[int]:
    """Of the first agent's Masters, which end with their last pages."""
    uses = case.mirrors[0].uses
    assert all(use.length % case.block_size == 0 for use in uses)
    return [int(page) for use in uses for page in use.master.pages]


def _last_rows(case: BenchRound) -> list[int]:
    """Rows of the last own page of every agent."""
    return [(len(mirror.own_position) - 1) % case.block_size + 1 for mirror in case.mirrors]


def cascade_pages(case: BenchRound) -> list[list[Tensor]]:
    """The round's pages as FlashInfer's cascade takes them: all Masters for all agents, then own
    pages.

    Returns:
        For both levels: the ranges of query rows, the ranges of pages, page ids and the rows of the
        last pages, all int32.
    """
    agents, shared = len(case.mirrors), _shared_pages(case)
    own_pages, own_indptr = [], [0]
    for mirror in case.mirrors:
        own_pages += [int(page) for page in mirror.own_pages]
        own_indptr.append(len(own_pages))
    levels = [
        [[0, agents], list(range(agents + 1))],
        [[0, len(shared)], own_indptr],
        [shared, own_pages],
        [[case.block_size], _last_rows(case)],
    ]
    return [[_int32(case, values) for values in both] for both in levels]


def paged_pages(case: BenchRound) -> list[Tensor]:
    """The same for FlashInfer's decode without sharing: ranges of pages, page ids, last rows."""
    shared, pages, indptr = _shared_pages(case), [], [0]
    for mirror in case.mirrors:
        pages += [*shared, *(int(page) for page in mirror.own_pages)]
        indptr.append(len(pages))
    return [_int32(case, values) for values in (indptr, pages, _last_rows(case))]


def _heads(case: BenchRound) -> tuple[int, int, int]:
    geometry = case.geometry
    return geometry.num_q_heads, geometry.num_kv_heads, geometry.head_dim


def _cascade(case: BenchRound, backend: str) -> Call:
    import flashinfer

    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(case), "NHD")
    for level in wrapper._batch_prefill_wrappers:
        level._backend = backend
    wrapper.plan(
        *cascade_pages(case),
        *_heads(case),
        case.block_size,
        q_data_type=case.geometry.dtype,
        kv_data_type=case.k_pools[0].dtype,
    )
    return lambda: wrapper.run(case.q, (case.k_pools[0], case.v_pools[0]))


def _paged(case: BenchRound) -> Call:
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(case), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        *paged_pages(case),
        *_heads(case),
        case.block_size,
        q_data_type=case.geometry.dtype,
        kv_data_type=case.k_pools[0].dtype,
    )
    return lambda: wrapper.run(case.q, (case.k_pools[0], case.v_pools[0]))


def _ragged(case: BenchRound, backend: str) -> Call:
    import flashinfer

    geometry, agents = case.geometry, len(case.mirrors)
    ends = _int32(case, [case.length * agent for agent in range(agents + 1)])
    shape = (agents * case.length, geometry.num_kv_heads, geometry.head_dim)
    k, v = torch.empty((2, *shape), dtype=geometry.dtype, device=case.q.device).normal_()
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        _workspace(case), "NHD", backend=backend
    )
    wrapper.plan(ends, ends, *_heads(case), causal=True, q_data_type=geometry.dtype)
    return lambda: wrapper.run(case.q, k, v)
