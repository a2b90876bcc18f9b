"""Every operator in plain PyTorch, written to be read: what the C++ and CUDA operators are held to.

Where the operators promise bits (rotation, encode, restore), these functions give exactly those
bits, from an exact emulation of the fused multiply-adds of ``rope.h``. Where they promise a
tolerance (deviation, attention, merging), these functions compute in fp64 and return fp64.

Arguments are those of ``torch.ops.tokendance.*``, with a
:class:`~tokendance.device.rounds.RoundTensors` for ``round`` and ``extents``. Nothing here is fast,
and nothing reads the work list: the reference
materialises every Mirror, row by row.

Shapes: ``R`` query rows, ``N`` agents, ``L`` layers, ``T`` columns of a slot mapping, ``Hq``/``Hk``
query and KV heads, ``D`` head dim. A *row tensor* is ``[rows, heads, D]``, or paged
``[pages, block_size, heads, D]`` where row ``r`` is row ``r % block_size`` of page
``r // block_size``.

Keys and values may be quantized where the operators take it: to e4m3 or int8, with a scale per KV
head (:func:`quantize_rows`, :func:`dequantize_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendance.device.rounds import RoundTensors
from tokendance.testing.exact_rows import (
    dequantize_rows,
    exact_rotation,
    fused_multiply_add,
    gather_rows,
    move_rows,
    quantize_rows,
    scatter_rows,
)

__all__ = [
    "MirrorRows",
    "collective_attention",
    "decode_pages",
    "dequantize_rows",
    "diff_encode",
    "diff_restore",
    "encode_pages",
    "exact_rotation",
    "fused_multiply_add",
    "gather_rows",
    "key_deviation",
    "merge_states",
    "mirror_rows",
    "move_rows",
    "quantize_rows",
    "rope_rotate",
    "rope_rotate_",
    "rope_rotate_out",
    "scatter_rows",
]


def _all_rows(x: Tensor) -> Tensor:
    return torch.arange(math.prod(x.shape[:-2]), device=x.device)


def rope_rotate(
    x: Tensor,
    row_in: Tensor | None,
    position_from: Tensor | None,
    position_to: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    attention_factor: float = 1.0,
) -> Tensor:
    """Moves row ``row_in[i]`` of ``x`` from ``position_from[i]`` to ``position_to[i]``.

    Args:
        x: row tensor.
        row_in: int64 ``[n]``; None for all rows in order.
        position_from: int32 ``[n]``; None for 0, that is a fresh key, not rotated yet.
        position_to: int32 ``[n]``; None copies the rows as they are.
        cos, sin: fp32 ``[max_position, rotary_dim / 2]``.
        interleaved: pairs ``(2i, 2i+1)`` instead of ``(i, i + rotary_dim/2)``.
        attention_factor: multiplies the rotary dims after the rotation (YaRN's attention factor).

    Returns:
        ``[n, heads, D]`` of the dtype of ``x``.
    """
    rows = gather_rows(x, _all_rows(x) if row_in is None else row_in)
    if position_to is None:
        return rows.clone()
    shift = position_to.long()
    if position_from is not None:
        shift = shift - position_from.long()
    return move_rows(rows, shift, cos, sin, interleaved, attention_factor)


def rope_rotate_out(
    x: Tensor,
    row_in: Tensor | None,
    row_out: Tensor | None,
    position_from: Tensor | None,
    position_to: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    attention_factor: float,
    out: Tensor,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> None:
    """:func:`rope_rotate` into the rows ``row_out`` of ``out``, one or several per row of ``x``.

    Args:
        row_out: int64 ``[n]`` or ``[n, destinations]``, negative to skip; None for ``0 .. n-1``.
        position_to: int32 of the shape of ``row_out`` (``[n]`` without it).
        out: row tensor, written; of the dtype of ``x``, or one of the two is quantized.
        x_scale, out_scale: fp32 ``[heads]`` of what is quantized; None for 1.
    """
    if position_to is None:  # a copy
        attention_factor = 1.0
    if row_in is None:
        row_in = _all_rows(x)
    if row_out is None:
        row_out = torch.arange(row_in.numel(), device=x.device)
    destinations = row_out if row_out.dim() == 2 else row_out[:, None]
    to = None if position_to is None else position_to.reshape(destinations.shape)
    for column in range(destinations.shape[1]):
        written = destinations[:, column] >= 0
        rows = gather_rows(x, row_in[written])
        shift = torch.zeros_like(row_in[written]) if to is None else to[written, column].long()
        if position_from is not None:
            shift = shift - position_from[written].long()
        moved = move_rows(
            rows, shift, cos, sin, interleaved, attention_factor, out.dtype, x_scale, out_scale
        )
        scatter_rows(out, destinations[written, column], moved)


def rope_rotate_(
    x: Tensor,
    rows: Tensor | None,
    position_from: Tensor | None,
    position_to: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    attention_factor: float = 1.0,
) -> None:
    """:func:`rope_rotate` in place on the distinct rows ``rows`` of ``x`` (None for all)."""
    rows = _all_rows(x) if rows is None else rows
    moved = rope_rotate(
        x, rows, position_from, position_to, cos, sin, interleaved, attention_factor
    )
    scatter_rows(x, rows, moved)


def key_deviation(
    fresh: Tensor,
    fresh_row: Tensor,
    fresh_position: Tensor | None,
    cached: Tensor,
    cached_row: Tensor,
    cached_position: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    attention_factor: float = 1.0,
) -> Tensor:
    """Squared distance between the fresh and the cached key of each token (CacheBlend, 2405.16444).

    Each fresh key is moved to the position of the cached one, so that a group of agents that see
    the token at different positions adds up to one figure.

    Args:
        fresh: row tensor of fresh keys.
        fresh_row: int64 ``[agents, tokens]``, negative where the agent lacks the token.
        fresh_position: int32 ``[agents, tokens]``; None for 0, that is keys not rotated yet.
        cached: row tensor of cached keys, rotated.
        cached_row: int64 ``[tokens]``.
        cached_position: int32 ``[tokens]``.
        cos, sin, interleaved: as for :func:`rope_rotate`.
        attention_factor: multiplies the rotary dims of the moved fresh keys.

    Returns:
        fp64 ``[tokens]``, summed over agents, heads and dims.
    """
    held = gather_rows(cached, cached_row).double()
    deviation = torch.zeros(cached_row.numel(), dtype=torch.float64, device=fresh.device)
    for agent in range(fresh_row.shape[0]):
        has = fresh_row[agent] >= 0
        shift = cached_position.long()
        if fresh_position is not None:
            shift = shift - fresh_position[agent].long()
        moved = exact_rotation(
            gather_rows(fresh, fresh_row[agent, has]),
            shift[has],
            cos,
            sin,
            interleaved,
            attention_factor,
        )
        deviation[has] += (moved - held[has]).square().sum(dim=(1, 2))
    return deviation


# Mirrors ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MirrorRows:
    """All rows of one agent, in no particular order: where each stands and where it is stored.

    Attributes:
        position: int64 ``[n]`` position in the agent's prompt.
        pool_row: int64 ``[n]`` row of the pool.
        shift: int64 ``[n]`` by which its key is to be moved; 0 for own rows.
    """

    position: Tensor
    pool_row: Tensor
    shift: Tensor


def _master_rows(round: RoundTensors, use: int) -> Tensor:
    """Pool rows of the Master rows that a use spans, hidden or not."""
    size = round.extents.block_size
    first_page = int(round.master_page_indptr[int(round.use_master[use])])
    row = torch.arange(int(round.use_length[use]), device=round.device)
    return round.master_pages[first_page + row // size].long() * size + row % size


def _hidden(round: RoundTensors, use: int) -> Tensor:
    """Which rows of a use its override masks hide: bool ``[use_length]``."""
    size = round.extents.block_size
    row = torch.arange(int(round.use_length[use]), device=round.device)
    mask = round.use_masks[int(round.use_page_indptr[use]) + row // size].long()
    return mask >> (row % size) & 1 == 1


def _own_rows(round: RoundTensors, agent: int, count: int) -> Tensor:
    """Pool rows of the first ``count`` rows of an agent's own pages."""
    size = round.extents.block_size
    row = torch.arange(count, device=round.device)
    return round.own_pages[int(round.own_page_indptr[agent]) + row // size].long() * size + (
        row % size
    )


def _uses_of(round: RoundTensors, agent: int) -> range:
    indptr = round.agent_use_indptr
    return range(int(indptr[agent]), int(indptr[agent + 1]))


def mirror_rows(round: RoundTensors, agent: int) -> MirrorRows:
    """Lists the rows of an agent: what its uses leave visible, and its own rows."""
    position, pool_row, shift = [], [], []
    for use in _uses_of(round, agent):
        visible = ~_hidden(round, use)
        rows = _master_rows(round, use)[visible]
        row_of_use = torch.arange(visible.numel(), device=round.device)[visible]
        position.append(int(round.use_delta[use]) + row_of_use)
        pool_row.append(rows)
        shift.append(torch.full_like(rows, int(round.use_shift[use])))
    count = int(round.own_length[agent])
    start = int(round.own_page_indptr[agent]) * round.extents.block_size
    position.append(round.own_position[start : start + count].long())
    pool_row.append(_own_rows(round, agent, count))
    shift.append(torch.zeros_like(pool_row[-1]))
    return MirrorRows(torch.cat(position), torch.cat(pool_row), torch.cat(shift))


def diff_encode(
    k_in: Sequence[Tensor],
    v_in: Sequence[Tensor],
    slot_mapping: Tensor,
    length: Tensor,
    k_pool: Sequence[Tensor],
    v_pool: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    round: RoundTensors,
    atol: float = 0.0,
    rtol: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Stores dense KV of agents as diffs against the Masters of their uses.

    A row of a use stays with the Master if moving the Master row reproduces K and V of every layer
    within ``|in - moved| <= atol + rtol * |moved|`` (0/0: bit for bit); every other row of the
    agent becomes an own row, in the order of positions. Rows beyond the capacity of the agent's own
    pages are counted in ``own_length`` and not written.

    Args:
        k_in, v_in: per layer, a row tensor with the agents' dense KV.
        slot_mapping: int64 ``[N, T]``, row of ``k_in``/``v_in`` of position p of agent a.
        length: int32 ``[N]`` tokens of each agent, at most T.
        k_pool, v_pool: per layer ``[num_pages, block_size, Hk, D]``; own pages are written.
        cos, sin, interleaved: as for :func:`rope_rotate`.
        round: its uses (``use_delta >= 0``), Masters and own pages are read; ``use_masks``,
            ``own_length`` and ``own_position`` are written. Rows of a use at positions from the
            agent's length on are not compared and count as the Master's.
        atol, rtol: tolerances; NaN never lies within one.
        k_scale, v_scale: fp32 ``[L, Hk]`` of quantized keys and values, by which ``atol`` becomes a
            difference of elements.
    """
    size = round.extents.block_size
    for agent in range(round.extents.agents):
        tokens = int(length[agent])
        own = torch.ones(tokens, dtype=torch.bool, device=round.device)
        for use in _uses_of(round, agent):
            delta = int(round.use_delta[use])
            compared = max(0, min(int(round.use_length[use]), tokens - delta))
            slots = slot_mapping[agent, delta : delta + compared]
            rows = _master_rows(round, use)[:compared]
            shift = torch.full_like(rows, int(round.use_shift[use]))
            same = torch.ones(compared, dtype=torch.bool, device=round.device)
            for layer in range(len(k_in)):
                moved = move_rows(gather_rows(k_pool[layer], rows), shift, cos, sin, interleaved)
                dense = gather_rows(k_in[layer], slots)
                same &= _same_rows(dense, moved, atol, rtol, _of_layer(k_scale, layer))
                held = gather_rows(v_pool[layer], rows)
                dense = gather_rows(v_in[layer], slots)
                same &= _same_rows(dense, held, atol, rtol, _of_layer(v_scale, layer))
            own[delta : delta + compared] = ~same
            for page in range(-(-int(round.use_length[use]) // size)):
                mask = 0
                for bit, row_is_same in enumerate(same[page * size : (page + 1) * size].tolist()):
                    mask |= 0 if row_is_same else 1 << bit
                signed = mask - (1 << 32) if mask >= 1 << 31 else mask
                round.use_masks[int(round.use_page_indptr[use]) + page] = signed
        position = own.nonzero().flatten()
        first = int(round.own_page_indptr[agent])
        capacity = (int(round.own_page_indptr[agent + 1]) - first) * size
        stored = position[:capacity]
        round.own_length[agent] = position.numel()
        round.own_position[first * size : first * size + stored.numel()] = stored.int()
        destination = _own_rows(round, agent, stored.numel())
        for layer in range(len(k_in)):
            slots = slot_mapping[agent, stored]
            scatter_rows(k_pool[layer], destination, gather_rows(k_in[layer], slots))
            scatter_rows(v_pool[layer], destination, gather_rows(v_in[layer], slots))


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def _of_layer(scales: Tensor | None, layer: int) -> Tensor | None:
    return None if scales is None else scales[layer]


def _same_rows(
    dense: Tensor, moved: Tensor, atol: float, rtol: float, scale: Tensor | None
) -> Tensor:
    """Whether each row ``[heads, D]`` of ``dense`` may be stored as ``moved``: bool ``[n]``."""
    if atol == 0.0 and rtol == 0.0:
        bits = _BITS[dense.element_size()]
        same = dense.contiguous().view(bits) == moved.contiguous().view(bits)
    else:
        absolute = torch.tensor(atol, dtype=torch.float32, device=dense.device)
        if scale is not None:
            absolute = (absolute / scale)[:, None]
        same = (dense.float() - moved.float()).abs() <= absolute + rtol * moved.float().abs()
    return same.flatten(1).all(dim=1)


def diff_restore(
    k_pool: Sequence[Tensor],
    v_pool: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    round: RoundTensors,
    slot_mapping: Tensor,
    k_out: Sequence[Tensor],
    v_out: Sequence[Tensor],
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Rebuilds the dense KV of every agent from its Mirror.

    Args:
        k_pool, v_pool: per layer ``[num_pages, block_size, Hk, D]``.
        cos, sin, interleaved: as for :func:`rope_rotate`.
        round: uses, Masters and own rows.
        slot_mapping: int64 ``[N, T]``, row of ``k_out``/``v_out`` for position p of agent a;
            negative to skip. Positions from T on are skipped.
        k_out, v_out: per layer, a row tensor; the rows named are written. Of the dtype of the
            pools, or of quantized pools what the elements stand for.
        k_scale, v_scale: fp32 ``[L, Hk]`` of quantized pools, not read if ``k_out`` is quantized.
    """
    for agent in range(round.extents.agents):
        rows = mirror_rows(round, agent)
        inside = (rows.position >= 0) & (rows.position < slot_mapping.shape[1])
        slot = slot_mapping[agent, rows.position[inside]]
        written = slot >= 0
        pool_row = rows.pool_row[inside][written]
        shift = rows.shift[inside][written]
        for layer in range(len(k_pool)):
            dtype = k_out[layer].dtype
            widened = dtype != k_pool[layer].dtype
            keys = move_rows(
                gather_rows(k_pool[layer], pool_row),
                shift,
                cos,
                sin,
                interleaved,
                dtype=dtype,
                x_scale=_of_layer(k_scale, layer) if widened else None,
            )
            values = gather_rows(v_pool[layer], pool_row)
            if widened:
                values = dequantize_rows(values, _of_layer(v_scale, layer)).to(dtype)
            scatter_rows(k_out[layer], slot[written], keys)
            scatter_rows(v_out[layer], slot[written], values)


# Attention --------------------------------------------------------------------------------------


def collective_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    round: RoundTensors,
    softmax_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    attention_factor: float = 1.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query row over its agent's Mirror: dense, masked, in fp64.

    Each agent's cache is materialised, its keys moved to its own positions without rounding; the
    operator moves the queries instead, which gives the same scores.

    Args:
        q: ``[R, Hq, D]`` before RoPE.
        k_pool, v_pool: ``[num_pages, block_size, Hk, D]``, ``Hq`` a multiple of ``Hk``.
        cos, sin, interleaved: as for :func:`rope_rotate`.
        round: query rows, uses, Masters and own rows; the work list is not read.
        softmax_scale: of the scores.
        window: a row sees keys fewer than ``window`` positions back; 0 for all.
        soft_cap: ``soft_cap * tanh(score / soft_cap)`` after scaling; 0 for none.
        sinks: fp32 ``[Hq]`` logits that enter the denominator of the output and not ``lse``.
        attention_factor: multiplies the rotary dims of the queries.
        k_scale, v_scale: fp32 ``[Hk]`` of quantized pools; None for 1.

    Returns:
        ``out`` fp64 ``[R, Hq, D]`` and ``lse`` fp64 ``[R, Hq]``, natural. A row that sees nothing,
        like a padding row, has output 0 and LSE -inf.
    """
    num_q_heads, num_kv_heads = q.shape[1], k_pool.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device=q.device)
    for agent in range(round.extents.agents):
        query = (round.row_agent == agent).nonzero().flatten()
        if query.numel() == 0:
            continue
        rows = mirror_rows(round, agent)
        position = round.row_position[query].long()
        queries = exact_rotation(q[query], position, cos, sin, interleaved, attention_factor)
        keys = exact_rotation(gather_rows(k_pool, rows.pool_row), rows.shift, cos, sin, interleaved)
        values = gather_rows(v_pool, rows.pool_row).double()
        if k_scale is not None:
            keys = keys * k_scale.double()[:, None]
        if v_scale is not None:
            values = values * v_scale.double()[:, None]
        keys, values = (
            rows.repeat_interleave(num_q_heads // num_kv_heads, dim=1) for rows in (keys, values)
        )
        score = torch.einsum("rhd,khd->rhk", queries, keys) * softmax_scale
        if soft_cap > 0:
            score = soft_cap * torch.tanh(score / soft_cap)
        distance = position[:, None] - rows.position[None, :]
        visible = distance >= 0
        if window > 0:
            visible &= distance < window
        score = score.masked_fill(~visible[:, None, :], -math.inf)
        lse[query] = torch.logsumexp(score, dim=2)
        out[query] = torch.einsum("rhk,khd->rhd", _weights(score, lse[query], sinks), values)
    return out, lse


def _weights(score: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of ``score [..., K]`` over its last dim, with a sink logit in the denominator."""
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double().expand_as(lse))
    total = torch.where(lse == -math.inf, 0.0, total)  # nothing is seen: exp(-inf - 0) = 0
    return (score - total[..., None]).exp()


def merge_states(
    partial_out: Tensor, partial_lse: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Combines attention over disjoint sets of keys (Milakov and Gimelshein, 1805.02867).

    Args:
        partial_out: ``[K, R, H, D]``, each normalised by its own sum.
        partial_lse: fp32 ``[K, R, H]``, natural, without sinks.
        sinks: fp32 ``[H]`` logits that enter the denominator of the output and not ``lse``.

    Returns:
        ``out`` fp64 ``[R, H, D]`` and ``lse`` fp64 ``[R, H]``. Rows that no partial saw anything
        for have output 0 and LSE -inf.
    """
    score = partial_lse.double().movedim(0, -1)  # [R, H, K]
    lse = torch.logsumexp(score, dim=-1)
    out = torch.einsum("rhk,krhd->rhd", _weights(score, lse, sinks), partial_out.double())
    return out, lse


_LARGEST_CODE = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0}


def encode_pages(
    pool: Tensor,
    page: Tensor,
    rows: Tensor,
    code: str,
    per_channel: bool,
    coded: Tensor,
    slot: Tensor | None = None,
) -> None:
    """``tokendance::encode_pages``: pages of keys or values in fewer bits.

    Bits are promised; ``coded_pages.h`` says how they lie.
    """
    slots = torch.arange(len(page), device=page.device) if slot is None else slot
    for number, count, where in zip(page.tolist(), rows.tolist(), slots.tolist(), strict=True):
        rows_of_page = torch.zeros_like(pool[number], memory_format=torch.contiguous_format)
        rows_of_page[:count] = pool[number, :count]
        if code == "exact":
            coded[where] = rows_of_page.view(torch.uint8).flatten()
            continue
        magnitudes = rows_of_page.float().abs()
        scale = magnitudes.amax(dim=0 if per_channel else 2, keepdim=True)
        scale[scale < 2.0**-100] = 0.0
        factor = torch.where(scale == 0, 0.0, torch.full_like(scale, _LARGEST_CODE[code]) / scale)
        codes = _codes_of(rows_of_page.float() * factor, code)
        stored = _with_nan_of_cuda(scale, pool.dtype).flatten().view(torch.uint8)
        coded[where] = torch.cat([stored, codes])


def _with_nan_of_cuda(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded; all payload bits of a NaN are set."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    nan = torch.tensor(torch.iinfo(bits).max, dtype=bits, device=x.device).view(dtype)
    return torch.where(x.isnan(), nan, x.to(dtype))


def _codes_of(parts: Tensor, code: str) -> Tensor:
    """Fractions of the largest code as bytes."""
    if code == "e4m3":
        limited = parts.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.where(parts.isnan(), 0x7F, limited).flatten()
    whole = parts.nan_to_num(0.0, 127.0, -127.0).clamp(-127.0, 127.0).round().to(torch.int8)
    if code == "int8":
        return whole.view(torch.uint8).flatten()
    halves = ((whole & 15) ^ 8).view(torch.uint8).view(-1, 2, 8)
    return (halves[:, 0] | halves[:, 1] << 4).flatten()


def decode_pages(
    coded: Tensor,
    slot: Tensor | None,
    rows: Tensor,
    code: str,
    per_channel: bool,
    pool: Tensor,
    page: Tensor,
) -> None:
    """``tokendance::decode_pages``: the inverse of :func:`encode_pages`."""
    slots = torch.arange(len(page), device=page.device) if slot is None else slot
    block, heads, dims = pool.shape[1:]
    for number, count, where in zip(page.tolist(), rows.tolist(), slots.tolist(), strict=True):
        raw = coded[where].contiguous()
        if code == "exact":
            pool[number, :count] = raw.view(pool.dtype).view(block, heads, dims)[:count]
            continue
        shape = (1, heads, dims) if per_channel else (block, heads, 1)
        end = math.prod(shape) * pool.element_size()
        scale = raw[:end].view(pool.dtype).view(shape).float()
        codes = raw[end:]
        if code == "int4":
            halves = codes.view(-1, 8)
            codes = torch.stack([halves & 15, halves >> 4], dim=1)
            numbers = codes.float() - 8.0
        else:
            numbers = codes.view(torch.float8_e4m3fn if code == "e4m3" else torch.int8).float()
        fractions = numbers.view(block, heads, dims) * (1.0 / _LARGEST_CODE[code])
        found = (fractions * scale)[:count]
        pool[number, :count] = _with_nan_of_cuda(found, pool.dtype)
