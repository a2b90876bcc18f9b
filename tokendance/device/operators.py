"""The operators ``torch.ops.tokendance.*``: typed wrappers, and what torch asks of operators.

A wrapper takes the operator's arguments in the operator's order, with a
:class:`~tokendance.device.rounds.RoundTensors` for its ``round`` and ``extents``; it adds nothing
else.
``tokendance.testing.reference`` has the same functions in plain PyTorch.

Shapes: ``R`` query rows, ``N`` agents, ``L`` layers, ``T`` columns of a slot mapping, ``Hq``/``Hk``
query and KV heads, ``D`` head dim (64, 80, 96, 128 or 256). A *row tensor* is ``[rows, heads, D]``,
or paged ``[pages, block_size, heads, D]`` where row ``r`` is row ``r % block_size`` of page
``r // block_size``; any strides, the innermost 1. Keys, values and queries are fp32, fp16 or bf16,
all of one dtype. Some arguments may be *quantized*: e4m3 (``torch.float8_e4m3fn``), or on the CPU
int8, whose elements stand for themselves times the fp32 scale of their KV head. ``x`` with
scale ``s`` becomes ``x * (1 / s)`` in fp32, limited to +-448 (int8: +-127) and rounded to the
nearest, ties to even; NaN stays NaN in e4m3 and becomes 0 in int8. Scales are positive, finite,
fp32 contiguous; None for 1.

``cos`` and ``sin`` are fp32 contiguous ``[max_position, rotary_dim / 2]`` (see
:class:`~tokendance.device.rope.Rope`); ``interleaved`` pairs dims ``(2i, 2i+1)`` instead of
``(i, i + rotary_dim/2)``. All tensors are on one device, and work is queued on its current stream.
Every tensor may as well be an array of another library that exports itself by DLPack: see
:mod:`tokendance.device.arrays`.

Errors: ``RuntimeError`` before anything is launched, naming the argument, what was expected and
what came. On the CPU that includes every index, position and page id. A look at them on CUDA would
have to wait for the device: there, kernels skip rows, pages and work items that are out of range.
What else stands in a round, such as counts, is taken as it is.

On CUDA, pools and outputs of :func:`collective_attention` and partials of :func:`merge_states` are
read and written 16 bytes at a time: they are refused where their memory, or what lies along an axis
but the innermost, does not begin at multiples of that. All else may lie anywhere, at some cost.

Nothing is differentiable. What an operator writes counts up its version, as with torch's own
in-place operators, and is refused if it requires grad while grad mode is on.

``torch.compile(dynamic=True)`` and ``torch.export`` compile an operator once for all numbers of
rows and all extents, but for torch's own distinction of one row from many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from tokendance.device.arrays import Array, as_output, as_tensor, is_array
from tokendance.device.library import LIBRARY, OPERATORS, registered
from tokendance.device.rounds import RoundTensors

__all__ = [
    "LIBRARY",
    "OPERATORS",
    "collective_attention",
    "collective_attention_out",
    "decode_pages",
    "diff_encode",
    "diff_restore",
    "encode_pages",
    "key_deviation",
    "key_deviation_out",
    "merge_states",
    "merge_states_out",
    "registered",
    "rope_rotate",
    "rope_rotate_",
    "rope_rotate_out",
]

_ops = torch.ops.tokendance


def _call(operator: Callable[..., object], *arguments: object) -> object:
    """Calls an operator with its arrays, and those of its lists, as tensors."""
    return operator(*[_taken(argument) for argument in arguments])


_AS_THEY_ARE = (Tensor, int, float, str, type(None))  # a step calls operators for every layer


def _taken(argument: object) -> object:
    if isinstance(argument, _AS_THEY_ARE):
        return argument
    if isinstance(argument, list | tuple):
        if argument and isinstance(argument[0], int):  # extents
            return argument
        return [_taken(item) for item in argument]
    return as_tensor(argument) if is_array(argument) else argument


# Rotation ---------------------------------------------------------------------------------------


def rope_rotate(
    x: Array,
    row_in: Array | None,
    position_from: Array | None,
    position_to: Array | None,
    cos: Array,
    sin: Array,
    interleaved: bool = False,
    attention_factor: float = 1.0,
) -> Tensor:
    """Moves row ``row_in[i]`` of ``x`` from ``position_from[i]`` to ``position_to[i]``.

    One rotation by the distance, in fp32, and one rounding at the end (RoFormer, 2104.09864); a row
    that does not move keeps its bits.

    Args:
        x: row tensor, which may be quantized: its scales cancel.
        row_in: int64 ``[n]``; None for all rows in order.
        position_from: int32 ``[n]``; None for 0, that is a fresh key, not rotated yet.
        position_to: int32 ``[n]``, less than ``max_position`` away; None copies the rows.
        attention_factor: multiplies the rotary dims after the rotation (YaRN's attention factor).

    Returns:
        ``[n, heads, D]``, contiguous, of the dtype of ``x``.
    """
    return cast(
        Tensor,
        _call(
            _ops.rope_rotate,
            x,
            row_in,
            position_from,
            position_to,
            cos,
            sin,
            interleaved,
            attention_factor,
        ),
    )


def rope_rotate_out(
    x: Array,
    row_in: Array | None,
    row_out: Array | None,
    position_from: Array | None,
    position_to: Array | None,
    cos: Array,
    sin: Array,
    interleaved: bool,
    attention_factor: float,
    out: Array,
    x_scale: Array | None = None,
    out_scale: Array | None = None,
) -> None:
    """:func:`rope_rotate` into the rows ``row_out`` of ``out``, one or several per row of ``x``.

    With a quantized ``out`` it quantizes fresh rows, with a quantized ``x`` it reads rows out:
    ``x`` times ``x_scale`` is rotated, times ``attention_factor``, over ``out_scale``, and rounded
    once.

    Args:
        row_out: int64 ``[n]`` or ``[n, destinations]``, distinct, -1 to skip; None for
            ``0 .. n-1``.
        position_to: int32 of the shape of ``row_out`` (``[n]`` without it); None copies the rows.
        out: row tensor, mutated, of the dtype of ``x`` or so that one of the two is quantized. It
            may share memory with ``x`` if no row written is one read.
        x_scale, out_scale: fp32 ``[heads]`` of what is quantized. If both are, give both or None:
            one set of scales cancels, and a row that does not move keeps its bits.
    """
    _call(
        _ops.rope_rotate_out,
        x,
        row_in,
        row_out,
        position_from,
        position_to,
        cos,
        sin,
        interleaved,
        attention_factor,
        as_output(out),
        x_scale,
        out_scale,
    )


def rope_rotate_(
    x: Array,
    rows: Array | None,
    position_from: Array | None,
    position_to: Array | None,
    cos: Array,
    sin: Array,
    interleaved: bool = False,
    attention_factor: float = 1.0,
) -> None:
    """:func:`rope_rotate` in place.

    Args:
        x: row tensor, mutated; it may be quantized.
        rows: int64 ``[n]``, distinct; None for all.
    """
    _call(
        _ops.rope_rotate_,
        as_output(x),
        rows,
        position_from,
        position_to,
        cos,
        sin,
        interleaved,
        attention_factor,
    )


def key_deviation(
    fresh: Array,
    fresh_row: Array,
    fresh_position: Array | None,
    cached: Array,
    cached_row: Array,
    cached_position: Array,
    cos: Array,
    sin: Array,
    interleaved: bool = False,
    attention_factor: float = 1.0,
) -> Tensor:
    """Squared distance between the fresh and the cached key of each token (CacheBlend, 2405.16444).

    Each fresh key is moved to the position of the cached one, so that a group of agents that see
    the token at different positions adds up to one figure. Nothing is rounded to the storage dtype;
    the order of the fp32 sum is fixed.

    Args:
        fresh: row tensor of fresh keys.
        fresh_row: int64 ``[agents, tokens]``, -1 where the agent lacks the token.
        fresh_position: int32 ``[agents, tokens]``; None for 0, that is keys not rotated yet.
        cached: row tensor of cached keys, rotated.
        cached_row: int64 ``[tokens]``.
        cached_position: int32 ``[tokens]``.
        attention_factor: multiplies the rotary dims of the moved fresh keys (YaRN).

    Returns:
        fp32 ``[tokens]``, summed over agents, heads and dims.
    """
    return cast(
        Tensor,
        _call(
            _ops.key_deviation,
            fresh,
            fresh_row,
            fresh_position,
            cached,
            cached_row,
            cached_position,
            cos,
            sin,
            interleaved,
            attention_factor,
        ),
    )


def key_deviation_out(
    fresh: Array,
    fresh_row: Array,
    fresh_position: Array | None,
    cached: Array,
    cached_row: Array,
    cached_position: Array,
    cos: Array,
    sin: Array,
    interleaved: bool,
    attention_factor: float,
    out: Array,
) -> None:
    """:func:`key_deviation` into ``out``: fp32 contiguous ``[tokens]``, mutated."""
    _call(
        _ops.key_deviation_out,
        fresh,
        fresh_row,
        fresh_position,
        cached,
        cached_row,
        cached_position,
        cos,
        sin,
        interleaved,
        attention_factor,
        as_output(out),
    )


# Mirrors ----------------------------------------------------------------------------------------


def diff_encode(
    k_in: Sequence[Array],
    v_in: Sequence[Array],
    slot_mapping: Array,
    length: Array,
    k_pool: Sequence[Array],
    v_pool: Sequence[Array],
    cos: Array,
    sin: Array,
    interleaved: bool,
    round: RoundTensors,
    atol: float = 0.0,
    rtol: float = 0.0,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> None:
    """Stores dense KV of agents as block-sparse diffs against Masters (TokenDance, 2604.03143).

    A row of a use stays with the Master if :func:`diff_restore` would reproduce K and V of every
    layer within ``|in - moved| <= atol + rtol * |moved|`` (0/0: bit for bit); every other row of
    the agent becomes an own row, in the order of positions.

    Args:
        k_in, v_in: per layer a row tensor, of one shape and with the same strides: dense KV.
        slot_mapping: int64 ``[N, T]``, row of ``k_in``/``v_in`` of position p of agent a.
        length: int32 ``[N]`` tokens of each agent, at most T.
        k_pool, v_pool: per layer ``[num_pages, block_size, Hk, D]``; the rows of own pages are
            mutated. ``k_in``, ``v_in`` and pools are of one dtype, which may be quantized.
        round: uses (from position 0 on), Masters and own pages are read. ``use_masks``,
            ``own_length`` and ``own_position`` are mutated: rows beyond the capacity of the agent's
            own pages are counted in ``own_length`` and not written. Rows of a use at positions from
            ``length`` on are not compared and keep mask bit 0.
        atol, rtol: tolerances; NaN never lies within one.
        k_scale, v_scale: fp32 ``[L, Hk]`` of quantized keys and values, in ``k_in``/``v_in`` and in
            the pools: ``atol`` is a difference of what the elements stand for.
    """
    _call(
        _ops.diff_encode,
        k_in,
        v_in,
        slot_mapping,
        length,
        [as_output(pool) for pool in k_pool],
        [as_output(pool) for pool in v_pool],
        cos,
        sin,
        interleaved,
        round.buffer,
        round.extents.as_list(),
        atol,
        rtol,
        k_scale,
        v_scale,
    )


def diff_restore(
    k_pool: Sequence[Array],
    v_pool: Sequence[Array],
    cos: Array,
    sin: Array,
    interleaved: bool,
    round: RoundTensors,
    slot_mapping: Array,
    k_out: Sequence[Array],
    v_out: Sequence[Array],
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> None:
    """Writes Mirrors out as dense rows, the inverse of :func:`diff_encode` (2604.03143).

    A Master page is read once for all agents that use it and moved to each one's positions on the
    way; there is no dense copy in between.

    Args:
        k_pool, v_pool: per layer ``[num_pages, block_size, Hk, D]``; they may be quantized.
        round: uses, Masters and own rows are read.
        slot_mapping: int64 ``[N, T]``, row of ``k_out``/``v_out`` for position p of agent a,
            distinct; negative to skip. Positions from T on are skipped.
        k_out, v_out: per layer a row tensor, of one shape and with the same strides; the rows that
            the mapping names are mutated. They have the dtype of the pools, or of quantized pools
            are read out in fp32, fp16 or bf16.
        k_scale, v_scale: fp32 ``[L, Hk]`` of quantized pools; between two quantized tensors they
            cancel and are not read.
    """
    _call(
        _ops.diff_restore,
        k_pool,
        v_pool,
        cos,
        sin,
        interleaved,
        round.buffer,
        round.extents.as_list(),
        slot_mapping,
        [as_output(rows) for rows in k_out],
        [as_output(rows) for rows in v_out],
        k_scale,
        v_scale,
    )


# Attention --------------------------------------------------------------------------------------


def collective_attention(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    cos: Array,
    sin: Array,
    interleaved: bool,
    round: RoundTensors,
    softmax_scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Array | None = None,
    attention_factor: float = 1.0,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a round's rows over Masters and Mirrors as they are stored.

    Queries are rotated to where a Master's keys stand, so that the rows of all agents meet one tile
    of keys and values; own rows follow in a second pass and partial results merge by their LSE.

    Args:
        q: ``[R, Hq, D]`` before RoPE; padding rows are not read.
        k_pool, v_pool: ``[num_pages, block_size, Hk, D]``, ``Hq`` a multiple of ``Hk``; they may be
            quantized.
        round: query rows, uses, Masters, own rows and the work list.
        softmax_scale: of the scores.
        window: a row sees keys fewer than ``window`` positions back; 0 for all.
        soft_cap: ``soft_cap * tanh(score / soft_cap)`` after scaling; 0 for none.
        sinks: fp32 ``[Hq]`` logits that enter the denominator of the output and not ``lse``.
        attention_factor: multiplies the rotary dims of the queries (YaRN's attention factor).
        k_scale, v_scale: fp32 ``[Hk]`` of quantized pools. Elements are widened exactly; scores and
            outputs are multiplied.

    Returns:
        ``out`` ``[R, Hq, D]`` of the dtype of ``q`` and ``lse`` fp32 ``[R, Hq]``, natural. A row
        that sees nothing has output 0 and LSE -inf; padding rows are undefined.
    """
    return cast(
        tuple[Tensor, Tensor],
        _call(
            _ops.collective_attention,
            q,
            k_pool,
            v_pool,
            cos,
            sin,
            interleaved,
            round.buffer,
            round.extents.as_list(),
            softmax_scale,
            window,
            soft_cap,
            sinks,
            attention_factor,
            k_scale,
            v_scale,
        ),
    )


def collective_attention_out(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    cos: Array,
    sin: Array,
    interleaved: bool,
    round: RoundTensors,
    softmax_scale: float,
    window: int,
    soft_cap: float,
    sinks: Array | None,
    attention_factor: float,
    workspace: Array,
    out: Array,
    lse: Array,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> None:
    """:func:`collective_attention` without an allocation.

    Args:
        workspace: fp32 1-D, at least ``partials * Hq * (D + 1)`` elements, mutated.
        out: ``[R, Hq, D]`` of the dtype of ``q``, mutated.
        lse: fp32 contiguous ``[R, Hq]``, mutated.
    """
    _call(
        _ops.collective_attention_out,
        q,
        k_pool,
        v_pool,
        cos,
        sin,
        interleaved,
        round.buffer,
        round.extents.as_list(),
        softmax_scale,
        window,
        soft_cap,
        sinks,
        attention_factor,
        as_output(workspace),
        as_output(out),
        as_output(lse),
        k_scale,
        v_scale,
    )


def merge_states(
    partial_out: Array, partial_lse: Array, sinks: Array | None = None
) -> tuple[Tensor, Tensor]:
    """Combines attention over disjoint sets of keys (Milakov and Gimelshein, 1805.02867).

    Args:
        partial_out: contiguous ``[K, R, H, D]``, each normalised by its own sum.
        partial_lse: fp32 contiguous ``[K, R, H]``, natural, without sinks.
        sinks: fp32 ``[H]`` logits that enter the denominator of the output and not ``lse``.

    Returns:
        ``out`` ``[R, H, D]`` of the dtype of ``partial_out`` and ``lse`` fp32 ``[R, H]``. Rows that
        no partial saw anything for have output 0 and LSE -inf.
    """
    return cast(tuple[Tensor, Tensor], _call(_ops.merge_states, partial_out, partial_lse, sinks))


def merge_states_out(
    partial_out: Array, partial_lse: Array, sinks: Array | None, out: Array, lse: Array
) -> None:
    """:func:`merge_states` into ``out`` and ``lse``, contiguous, mutated."""
    _call(_ops.merge_states_out, partial_out, partial_lse, sinks, as_output(out), as_output(lse))


# Pages below the device -------------------------------------------------------------------------


def encode_pages(
    pool: Array,
    page: Array,
    rows: Array,
    code: str,
    per_channel: bool,
    coded: Array,
    slot: Array | None = None,
) -> None:
    """Keeps pages of keys or values in fewer bits (KIVI, 2402.02750).

    A scale is the largest magnitude that shares it, and comes back bit for bit. An element is off
    by half a step, the scale over 127 (int8) or 7 (int4), or by 2^-4 of itself or 2^-10 / 448 of
    the scale (e4m3), and by its rounding to the rows' dtype. Of a scale that is not finite nothing
    is. What was decoded is coded again to what gives the same elements.

    On the CPU alone: what is below the device lies in host memory.

    Args:
        pool: ``[num_pages, block_size, Hk, D]`` of keys or values, fp32, fp16 or bf16.
        page: int64 ``[n]``.
        rows: int32 ``[n]``, how many of each page's rows are coded; the others count as zeros.
        code: ``"exact"``, ``"e4m3"``, ``"int8"`` or ``"int4"``.
        per_channel: scales of heads and dims, as of keys, instead of rows and heads.
        coded: uint8 ``[slots, bytes]`` with slots at multiples of 16 bytes, mutated; the bytes are
            those of `tokendance.device.codec.PageCodec`.
        slot: int64 ``[n]``, distinct, where each page goes; None for ``0 .. n-1``.
    """
    _call(_ops.encode_pages, pool, page, rows, code, per_channel, as_output(coded), slot)


def decode_pages(
    coded: Array,
    slot: Array | None,
    rows: Array,
    code: str,
    per_channel: bool,
    pool: Array,
    page: Array,
) -> None:
    """The inverse of :func:`encode_pages`: the first ``rows[i]`` rows of ``page[i]`` are written.

    Args:
        pool: mutated; the other arguments are those of :func:`encode_pages`.
        page: int64 ``[n]``, distinct.
    """
    _call(_ops.decode_pages, coded, slot, rows, code, per_channel, as_output(pool), page)
