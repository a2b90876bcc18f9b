"""Dense caches that an engine made, encoded against Masters: what `DiffStore.put_round` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokendance.device import operators as ops
from tokendance.device.layer_ropes import same_rope
from tokendance.device.rounds import RoundTensors
from tokendance.host.decide import AgentDecision, Source, decide
from tokendance.host.mirror import (
    Master,
    Mirror,
    Pages,
    Use,
    no_pages,
    no_positions,
    pages_for,
    round_arrays,
    slots_of,
)
from tokendance.host.segments import Segment
from tokendance.host.selection import Nothing

if TYPE_CHECKING:
    from tokendance.store import DiffStore

Dense = Mapping[str, tuple[Sequence[Tensor], Sequence[Tensor]]]
"""Per agent its keys and values, ``[tokens, Hk, D]`` per layer."""


def encode_round(
    store: DiffStore,
    dense: Dense,
    prompts: Mapping[str, Sequence[Segment]],
    atol: float,
    rtol: float,
) -> None:
    """Checks ``dense``, and stores Masters that are missing and a Mirror of every agent; if that
    fails, the store is as it was, but for evictions."""
    prompts = store.scheduler.checked(prompts)
    _check_dense(store, dense, prompts)
    dense = {agent: _as_stored(store, k, v) for agent, (k, v) in dense.items()}

    def stored(segment: Segment) -> tuple[Master, int] | None:
        found = store.scheduler.find(segment)  # also what a plan is still computing
        return found if found is not None and found[0].is_computed else None

    held: list[Master] = []
    taken: list[Pages] = []
    try:
        with store.lock:
            decisions = decide(
                prompts,
                stored,
                {},
                Nothing(),
                Source.MASTER,
                store.block_size,
                store.max_position,
            )
            # No Master of the round is evicted for the pages of another, nor by another thread.
            for decision in decisions:
                store.books.hold(decision.uses.masters)
                held += decision.uses.masters
            for decision in decisions:
                for use in decision.made:
                    needed = pages_for(use.length, store.block_size)
                    use.master.pages = store.books.take_pages(needed)
                    use.master.computed = use.length
        mirrors = _encode(store, decisions, dense, atol, rtol, taken)
        with store.lock:
            for decision in decisions:
                for use in decision.made:
                    store.books.publish(use.master)
            for agent, mirror in mirrors:
                store.books.put(agent, mirror)
            taken.clear()
    finally:
        with store.lock:
            for pages in taken:
                store.books.drop_pages(pages)
            store.books.let_go(held)


def _encode(
    store: DiffStore,
    decisions: list[AgentDecision],
    dense: Dense,
    atol: float,
    rtol: float,
    taken: list[Pages],
) -> list[tuple[str, Mirror]]:
    """Fills the Masters' pages, and takes and fills those of own rows."""
    for decision in decisions:
        for use in decision.made:
            _copy_rows(store, decision, use, dense)
    mirrors: list[tuple[str, Mirror]] = []
    for decision in decisions:
        assert decision.agent is not None
        mirror = _encode_agent(store, decision, dense[decision.agent], atol, rtol)
        needed = pages_for(len(mirror.own_position), store.block_size)
        with store.lock:
            mirror.own_pages = store.books.take_pages(needed)
            taken.append(mirror.own_pages)
        rows = torch.from_numpy(mirror.own_position.astype(np.int64)).to(store.device)
        slots = _slots(store, mirror.own_pages, len(rows))
        keys, values = dense[decision.agent]
        for layer in range(store.geometry.num_layers):
            store.pool.write_rows(layer, keys[layer], values[layer], slots, rows)
        mirrors.append((decision.agent, mirror))
    return mirrors


def _encode_agent(
    store: DiffStore,
    decision: AgentDecision,
    dense: tuple[Sequence[Tensor], Sequence[Tensor]],
    atol: float,
    rtol: float,
) -> Mirror:
    """The agent's Mirror, as yet without pages: which rows of its uses are overridden.

    A row is overridden if any layer differs, and layers of different tables are compared by
    launches of their own; so only the masks are taken from them, and own rows are copied once
    all are known.
    """
    decision.uses.masks[:] = 0
    exact = decision.length if atol == 0 and rtol == 0 else _approximate_from(decision)
    mirror = Mirror(
        decision.segments, decision.length, decision.uses, no_pages(), no_positions(), exact
    )
    arrays, extents = round_arrays([mirror], store.block_size)
    slots = torch.arange(mirror.length, dtype=torch.int64, device=store.device)[None]
    length = torch.tensor([mirror.length], dtype=torch.int32, device=store.device)
    keys, values = dense
    masks = np.zeros(extents.use_pages, dtype=np.uint32)
    layers = range(store.geometry.num_layers)
    for same in same_rope(layers, store.executor.ropes):
        round_ = RoundTensors.from_arrays(arrays, extents, device=store.device)
        rope = store.executor.ropes[same[0]]
        ops.diff_encode(
            [keys[i] for i in same],
            [values[i] for i in same],
            slots,
            length,
            [store.pool.k_pools[i] for i in same],
            [store.pool.v_pools[i] for i in same],
            rope.cos,
            rope.sin,
            rope.interleaved,
            round_,
            atol,
            rtol,
            *store.pool.scales_of(same),
        )
        masks |= round_.use_masks.cpu().numpy().view(np.uint32)
    own = np.ones(mirror.length, dtype=bool)
    mirror.uses.masks[:] = masks
    for use in mirror.uses:
        own[use.delta : use.delta + use.length] = False
        own[use.delta + use.overridden(store.block_size)] = True
    mirror.own_position = np.flatnonzero(own).astype(np.int32)
    return mirror


def _copy_rows(
    store: DiffStore,
    decision: AgentDecision,
    use: Use,
    dense: Dense,
) -> None:
    assert decision.agent is not None
    keys, values = dense[decision.agent]
    begin, end = use.delta, use.delta + use.length
    slots = _slots(store, use.master.pages, use.length)
    for layer in range(store.geometry.num_layers):
        store.pool.write_rows(layer, keys[layer][begin:end], values[layer][begin:end], slots)


def _slots(store: DiffStore, pages: Pages, rows: int) -> Tensor:
    """int64 ``[rows]`` on the store's device."""
    return torch.from_numpy(slots_of(pages, rows, store.block_size)).to(store.device)


def _as_stored(
    store: DiffStore, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Dense rows in the pool's dtype."""
    stored: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer, rows in enumerate(zip(keys, values, strict=True)):
        rope = store.executor.ropes[layer]
        for x, scale, to in zip(rows, store.pool.scales(layer), stored, strict=True):
            out = x
            if x.dtype != store.pool.dtype:
                out = torch.empty(x.shape, dtype=store.pool.dtype, device=x.device)
                ops.rope_rotate_out(
                    *(x, None, None, None, None, rope.cos, rope.sin, rope.interleaved, 1.0),
                    out,
                    out_scale=scale,
                )
            to.append(out)
    return stored


def _check_dense(
    store: DiffStore,
    dense: Dense,
    prompts: Mapping[str, Sequence[Segment]],
) -> None:
    if set(dense) != set(prompts):
        raise ValueError(f"prompts: expected agents {sorted(dense)}, got {sorted(prompts)}")
    heads = [store.geometry.num_kv_heads, store.geometry.head_dim]
    for agent, (keys, values) in dense.items():
        length = sum(segment.length for segment in prompts[agent])
        if length > store.max_position:
            raise ValueError(
                f"prompts[{agent!r}]: expected at most {store.max_position} tokens, got {length}"
            )
        for name, tensors in (("keys", keys), ("values", values)):
            if len(tensors) != store.geometry.num_layers:
                raise ValueError(
                    f"dense[{agent!r}] {name}: expected {store.geometry.num_layers} layers, "
                    f"got {len(tensors)}"
                )
            for layer, tensor in enumerate(tensors):
                if list(tensor.shape) != [length, *heads]:
                    raise ValueError(
                        f"dense[{agent!r}] {name}[{layer}]: expected {[length, *heads]}, "
                        f"got {list(tensor.shape)}"
                    )
                known = tensor.dtype in (store.geometry.dtype, store.pool.dtype)
                if not known or tensor.device != store.device:
                    raise ValueError(
                        f"dense[{agent!r}] {name}[{layer}]: expected {store.geometry.dtype} on "
                        f"{store.device}, got {tensor.dtype} on {tensor.device}"
                    )


def _approximate_from(decision: AgentDecision) -> int:
    """First row that a tolerance may have changed: those of a Master that was copied from this
    agent, where it was copied, are as they were put."""
    copied = {use.delta for use in decision.made}
    return min(
        (use.delta for use in decision.uses if use.delta not in copied), default=decision.length
    )
