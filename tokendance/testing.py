"""Random ragged rounds, and comparisons, for testing an operator or an engine that calls them.

A round made here is legal and as unkind as the contract (``round.h``) allows: whatever must not be
read is NaN (rows and pages without content, gaps between strides) or an absurd number (page ids,
positions and indices in slots beyond the filled part), and fields have more capacity than content.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendance.reference import quantize_rows
from tokendance.rope import Rope
from tokendance.rounds import CHUNK_FIELDS, WORK_FIELDS, IntArray, RoundExtents, RoundTensors

__all__ = [
    "ABSURD",
    "EDGE_CASES",
    "LAYOUTS",
    "QUANTIZED",
    "DenseCache",
    "Layout",
    "Masks",
    "RandomRound",
    "StorageCopies",
    "assert_close",
    "assert_same_bits",
    "assert_same_storage",
    "assert_work_covers",
    "dense_cache",
    "far_apart",
    "is_quantized",
    "poison",
    "pools",
    "random_round",
    "random_work",
    "same_bits",
    "tolerance",
    "whole_storage",
]

ABSURD = 1_900_000_001
"""Stands in every int32 slot that must not be read: no page, row or position is so large."""

QUANTIZED = (torch.float8_e4m3fn, torch.int8)
"""Dtypes of keys and values that stand for themselves times a scale per KV head."""


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether the elements of keys and values of this dtype have scales."""
    return dtype in QUANTIZED


def poison(dtype: torch.dtype) -> float:
    """What stands where nothing is to be read: NaN, or in int8 the number that is never made."""
    return torch.nan if dtype.is_floating_point else -128


# Pools ------------------------------------------------------------------------------------------

Layout = Literal["separate", "interleaved", "heads_first", "packed", "padded", "unaligned", "mixed"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def pools(
    num_pages: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype, layout: Layout
) -> tuple[Tensor, Tensor]:
    """K and V of one layer, ``[num_pages, block_size, heads, head_dim]`` each, NaN throughout.

    In int8, which has no NaN, all elements are -128 (:func:`poison`).

    Args:
        layout: how they lie in memory. ``separate``: each contiguous. ``interleaved``: K and V
            pages alternate in one allocation. ``heads_first``: so, too, and the heads of a page lie
            apart (HND). ``packed``: K and V of a head lie side by side. ``padded``: gaps between
            heads, rows and pages, all multiples of 16 bytes. ``unaligned``: gaps of one element.
            ``mixed``: K heads first, V padded.
    """

    def allocate(*shape: int) -> Tensor:
        return torch.full(shape, poison(dtype), dtype=dtype)

    def padded(gap: int = 16) -> Tensor:
        pages = allocate(num_pages, block_size + 1, heads + 1, head_dim + gap)
        return pages[:, :block_size, :heads, :head_dim]

    if layout == "separate":
        shape = (num_pages, block_size, heads, head_dim)
        return allocate(*shape), allocate(*shape)
    if layout == "interleaved":
        both = allocate(num_pages, 2, block_size, heads, head_dim)
        return both[:, 0], both[:, 1]
    if layout == "heads_first":
        both = allocate(num_pages, 2, heads, block_size, head_dim).transpose(2, 3)
        return both[:, 0], both[:, 1]
    if layout == "packed":
        both = allocate(num_pages, block_size, heads, 2, head_dim)
        return both[:, :, :, 0], both[:, :, :, 1]
    if layout == "padded":
        return padded(), padded()
    if layout == "unaligned":
        return padded(1), padded(1)
    return allocate(num_pages, heads, block_size, head_dim).transpose(1, 2), padded()


_MAP_NORESERVE = 0x4000  # Linux's; Python's mmap has no name for it before 3.13


def far_apart(pages: Tensor, stride: int = 1_100_000_000) -> Tensor:
    """A copy of ``[pages, block_size, heads, D]`` whose pages lie ``stride`` elements apart.

    At 16 bits and the stride by default, page 2 lies 4.4 GB behind page 0. The memory is reserved
    and not filled: only what is touched exists. Linux only.
    """
    nbytes = ((len(pages) - 1) * stride + pages[0].numel()) * pages.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=pages.dtype)
    return memory.as_strided(pages.shape, (stride, *pages[0].contiguous().stride())).copy_(pages)


class StorageCopies:
    """Copies tensors with their whole storages: strides, gaps and sharing stay as they are.

    Tensors that share a storage share its copy, so K and V of one allocation stay interleaved.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() == 0:
            return tensor.to(self._device, copy=True)
        if key not in self._copies:
            # The original is kept alive, or its address could be another's by the next call.
            self._copies[key] = tensor, whole_storage(tensor).to(self._device, copy=True)
        whole = self._copies[key][1]
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def whole_storage(tensor: Tensor) -> Tensor:
    """The storage of a tensor as a 1-D tensor of its dtype, gaps included."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return whole.set_(tensor.untyped_storage())


# Rounds -----------------------------------------------------------------------------------------

Masks = Literal["random", "none", "all", "leading"]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class RandomRound:
    """A round, the pools it refers to, and queries.

    Attributes:
        round: the packed round.
        arrays: the fields that were packed, at the sizes of ``filled``.
        filled: how much of each capacity is filled.
        k_pool, v_pool: per layer ``[num_pages, block_size, Hk, D]``, strided.
        q: ``[R, Hq, D]`` before RoPE, strided; padding rows are NaN.
        cos, sin: fp32 ``[max_position, rotary_dim / 2]``.
        interleaved: the style of the rotation.
        scale: of the attention scores.
        length: int32 ``[N]`` tokens of each prompt.
        k_scale, v_scale: fp32 ``[L, Hk]`` of quantized pools, else None.
    """

    round: RoundTensors
    arrays: dict[str, IntArray]
    filled: RoundExtents
    k_pool: list[Tensor]
    v_pool: list[Tensor]
    q: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool
    scale: float
    length: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def extents(self) -> list[int]:
        """Capacities, as operators take them."""
        return self.round.extents.as_list()

    @property
    def real_rows(self) -> Tensor:
        """Indices of the query rows that are not padding."""
        return (self.round.row_agent >= 0).nonzero().flatten()

    def copy(self, device: torch.device | str = "cpu") -> RandomRound:
        """A copy on ``device`` with the same strides, gaps and shared storages."""
        to = StorageCopies(device)
        return replace(
            self,
            round=RoundTensors(to(self.round.buffer), self.round.extents),
            k_pool=[to(pool) for pool in self.k_pool],
            v_pool=[to(pool) for pool in self.v_pool],
            q=to(self.q),
            cos=to(self.cos),
            sin=to(self.sin),
            length=to(self.length),
            k_scale=None if self.k_scale is None else to(self.k_scale),
            v_scale=None if self.v_scale is None else to(self.v_scale),
        )


EDGE_CASES: dict[str, dict[str, Any]] = {
    "no_agents": {"agents": 0},
    "one_agent": {"agents": 1, "masters": 3},
    "no_masters": {"masters": 0},
    "empty_masters": {"masters": (0, 5, 0), "whole_uses": True},
    "one_row_tails": {"masters": (1, 17, 33), "whole_uses": True},
    "full_pages": {"masters": (32, 16), "whole_uses": True, "private_length": 32},
    "all_overridden": {"masks": "all"},
    "none_overridden": {"masks": "none", "whole_uses": True},
    "only_shared": {"masks": "none", "private_length": 0},
    "leading": {"masks": "leading", "masters": 4, "master_length": 12},
    "repeat": {"repeat": True, "masters": 3},
    "late_start": {"start": 70},
    "no_slack": {"slack": False},
    "table_slack": {"table_slack": 40},
    "many_agents": {
        "agents": 19,
        "masters": 2,
        "master_length": 21,
        "private_length": 3,
        "rows": 2,
    },
    "many_masters": {"agents": 4, "masters": 11, "master_length": 9},
}
"""Arguments of :func:`random_round` for rounds that an operator may get wrong."""


@dataclass
class _Use:
    master: int
    delta: int
    length: int
    hidden: BoolArray


@dataclass
class _Agent:
    uses: list[_Use]
    own: list[int]
    length: int
    rows: list[int]


def random_round(
    seed: int,
    *,
    agents: int = 3,
    masters: int | Sequence[int] = 2,
    master_length: int = 40,
    private_length: int = 9,
    rows: int = 3,
    start: int = 0,
    num_layers: int = 1,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    block_size: int = 16,
    layout: Layout = "separate",
    masks: Masks = "random",
    whole_uses: bool = False,
    repeat: bool = False,
    cut: bool = False,
    holes: bool = False,
    room_for_all: bool = False,
    slack: bool = True,
    table_slack: int = 0,
    work: Literal["random", "planned"] = "random",
    rows_per_item: int = 16,
    window: int = 0,
) -> RandomRound:
    """Makes a random round on the CPU; the same arguments give the same round.

    Each agent takes a random part of the Masters in random order, with private tokens between them
    (so that a Master stands first in some prompts), and computes some rows of its prompt. Masters
    stand where one of their users has them or anywhere else: shifts are zero, positive, negative.

    Args:
        agents: N; some have no uses, no own rows or no query rows.
        masters: how many, of random lengths from 0 to ``master_length``; or their exact lengths.
        private_length: longest run of private tokens between uses.
        rows: most query rows per agent; the last ones of the prompt, or any.
        start: prompts begin at a random position up to this (what lies before is nobody's).
        rotary_dim: rotated dims of a head, 0 for none; all by default.
        dtype: of the pools; a quantized one has random scales.
        query_dtype: of the queries; that of the pools by default, or fp32 if that is quantized.
        layout: of the pools, see :func:`pools`.
        masks: which rows of uses are overridden: none, all, the first four, or by chance.
        whole_uses: every agent uses every Master to its last row; else some uses are prefixes.
        repeat: agents may use a Master twice in a prompt.
        cut: the first use of a prompt may begin before position 0, with those rows hidden.
        holes: some private tokens have no row (so that rows exist that see nothing).
        room_for_all: agents' own pages have room for their whole prompts, as encode wants them;
            otherwise page ids beyond the own rows are absurd.
        slack: fields have capacity beyond their content, filled with absurd numbers.
        table_slack: rows of the tables beyond the longest prompt, whose last row is the last
            position.
        work: a work list that covers everything (:func:`random_work`), or the planner's.
        rows_per_item: most query rows of a work item.
        window: the window that a planned work list may rely on.
    """
    rng = np.random.default_rng(seed)
    torch_rng = torch.Generator().manual_seed(seed)
    if isinstance(masters, int):
        lengths = [int(n) for n in rng.integers(0, master_length + 1, masters)]
    else:
        lengths = list(masters)
    copies = 2 if repeat else 1

    prompts = [
        _random_agent(
            rng,
            lengths,
            private_length=private_length,
            rows=rows,
            start=start,
            masks=masks,
            whole_uses=whole_uses,
            copies=copies,
            cut=cut,
            holes=holes,
        )
        for _ in range(agents)
    ]
    needed = [prompt.length for prompt in prompts]
    needed += [1 - use.delta for prompt in prompts for use in prompt.uses]
    # An empty use past the only position: no table of one row has a shift for it.
    needed += [2 for prompt in prompts for use in prompt.uses if use.delta > 0]
    max_position = max([1, *needed]) + table_slack
    origins = _random_origins(rng, lengths, prompts, max_position)

    pages_of_master = [-(-length // block_size) for length in lengths]
    pages_of_agent = [-(-len(prompt.own) // block_size) for prompt in prompts]
    if room_for_all:
        pages_of_agent = [-(-prompt.length // block_size) for prompt in prompts]
    elif slack:
        pages_of_agent = [pages + int(rng.integers(0, 2)) for pages in pages_of_agent]
    num_pages = sum(pages_of_master) + sum(pages_of_agent) + int(rng.integers(1, 4))
    free_pages = iter(rng.permutation(num_pages).tolist())
    master_pages = [[next(free_pages) for _ in range(pages)] for pages in pages_of_master]
    own_pages = [[next(free_pages) for _ in range(pages)] for pages in pages_of_agent]

    filled, arrays = _round_arrays(
        rng, prompts, origins, master_pages * copies, own_pages, block_size, room_for_all
    )
    if work == "planned":
        arrays |= _planned_work(arrays, filled, rng, rows_per_item, window)
    else:
        arrays |= random_work(arrays, filled, rng, rows_per_item)
    filled = replace(
        filled,
        work=len(arrays["work"]),
        work_rows=len(arrays["work_rows"]),
        work_chunks=len(arrays["work_chunks"]),
        partials=len(arrays["row_partials"]),
    )
    capacity = _with_slack(filled, rng) if slack else filled
    round = RoundTensors.from_arrays(arrays, filled, capacity)
    _spoil_unfilled(round, filled)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch_rng)

    def stored(rows: int, scales: Tensor | None, layer: int) -> Tensor:
        x = normal(rows, num_kv_heads, head_dim)
        return x.to(dtype) if scales is None else quantize_rows(x, scales[layer], dtype)

    k_scale = v_scale = None
    if is_quantized(dtype):
        # The largest element stands for 2 to 6: some of what is normally distributed is limited.
        largest = 448.0 if dtype.is_floating_point else 127.0
        scales = torch.rand(2, num_layers, num_kv_heads, generator=torch_rng)
        k_scale, v_scale = ((2 + 4 * scales) / largest).unbind()
    k_pool, v_pool = [], []
    used = _rows_in_use(lengths, prompts)
    for layer in range(num_layers):
        k, v = pools(num_pages, block_size, num_kv_heads, head_dim, dtype, layout)
        contents = list(zip(master_pages, used, strict=True))
        contents += [(own_pages[a], len(prompt.own)) for a, prompt in enumerate(prompts)]
        for page_list, count in contents:
            for index, page in enumerate(page_list):
                filled_rows = min(block_size, count - index * block_size)
                if filled_rows > 0:
                    k[page, :filled_rows] = stored(filled_rows, k_scale, layer)
                    v[page, :filled_rows] = stored(filled_rows, v_scale, layer)
        k_pool.append(k)
        v_pool.append(v)

    # Queries are a slice of a fused projection, as models make them.
    if query_dtype is None:
        query_dtype = torch.float32 if is_quantized(dtype) else dtype
    projection = torch.full(
        (capacity.rows, num_q_heads + 2 * num_kv_heads, head_dim), torch.nan, dtype=query_dtype
    )
    q = projection[:, :num_q_heads]
    q[: filled.rows] = normal(filled.rows, num_q_heads, head_dim)

    cos, sin = _tables(head_dim if rotary_dim is None else rotary_dim, max_position, interleaved)
    length = torch.zeros(capacity.agents, dtype=torch.int32)
    length[:agents] = torch.tensor([prompt.length for prompt in prompts], dtype=torch.int32)
    return RandomRound(
        round=round,
        arrays=arrays,
        filled=filled,
        k_pool=k_pool,
        v_pool=v_pool,
        q=q,
        cos=cos,
        sin=sin,
        interleaved=interleaved,
        scale=head_dim**-0.5,
        length=length,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _tables(rotary_dim: int, max_position: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if rotary_dim == 0:
        return torch.empty(max_position, 0), torch.empty(max_position, 0)
    rope = Rope.default(rotary_dim, 10000.0, max_position, interleaved=interleaved)
    return rope.cos, rope.sin


def _random_agent(
    rng: np.random.Generator,
    lengths: list[int],
    *,
    private_length: int,
    rows: int,
    start: int,
    masks: Masks,
    whole_uses: bool,
    copies: int,
    cut: bool,
    holes: bool,
) -> _Agent:
    masters = len(lengths)
    order = rng.permutation(masters * copies).tolist()
    if not whole_uses:
        order = [master for master in order if rng.random() < 0.75]
        order = [] if rng.random() < 0.1 else order
    if masks == "random" and rng.random() < 0.1:  # nothing of its own
        masks, private_length, cut = "none", 0, False
    uses: list[_Use] = []
    private: list[int] = []
    position = int(rng.integers(0, start + 1))
    for index, master in enumerate(order):
        if rng.random() < 0.7:
            gap = int(rng.integers(0, private_length + 1))
            private += range(position, position + gap)
            position += gap
        length = lengths[master % masters]
        if not whole_uses and rng.random() < 0.25:
            length = int(rng.integers(0, length + 1))
        hidden = _random_mask(rng, length, masks)
        delta = position
        if cut and index == 0 and position == 0 and length > 1:
            delta = -int(rng.integers(0, length))
            hidden[:-delta] = True
        uses.append(_Use(master, delta, length, hidden))
        position = delta + length
    if rng.random() < 0.8:
        gap = int(rng.integers(0, private_length + 1))
        private += range(position, position + gap)
        position += gap
    if holes:
        private = [p for p in private if rng.random() < 0.7]
    overridden = [
        use.delta + row
        for use in uses
        for row in np.flatnonzero(use.hidden).tolist()
        if use.delta + row >= 0
    ]
    count = 0 if rng.random() < 0.15 else int(rng.integers(0, rows + 1))
    count = min(count, max(1, position))
    if rng.random() < 0.5:
        queries = list(range(max(1, position) - count, max(1, position)))
    else:
        queries = sorted(rng.choice(max(1, position), count, replace=False).tolist())
    return _Agent(uses, sorted(private + overridden), position, queries)


def _random_mask(rng: np.random.Generator, length: int, masks: Masks) -> BoolArray:
    hidden: BoolArray = np.zeros(length, dtype=np.bool_)
    kind: str = masks
    if kind == "random":
        kind = str(rng.choice(["none", "all", "leading", "sparse", "half"]))
    if kind == "all":
        hidden[:] = True
    elif kind == "leading":
        hidden[:4] = True
    elif kind in ("sparse", "half"):
        hidden[:] = rng.random(length) < (0.1 if kind == "sparse" else 0.5)
    return hidden


def _random_origins(
    rng: np.random.Generator, lengths: list[int], prompts: list[_Agent], max_position: int
) -> list[int]:
    """Where each Master was computed: ``|delta - origin| < max_position`` for all its uses."""
    origins = []
    for master in range(len(lengths)):
        deltas = [
            use.delta
            for prompt in prompts
            for use in prompt.uses
            if use.master % len(lengths) == master
        ]
        highest = max_position - 1 + min([0, *deltas])
        lowest = max([0, *deltas]) - (max_position - 1)  # an empty use may stand past the end
        origin = int(rng.integers(0, highest + 1))
        if deltas and rng.random() < 0.5:
            origin = int(rng.choice(deltas))
        origins.append(min(max(origin, lowest, 0), highest))
    return origins


def _rows_in_use(lengths: list[int], prompts: list[_Agent]) -> list[int]:
    """Rows of each Master that any use spans; the others are never read."""
    used = [0] * len(lengths)
    for prompt in prompts:
        for use in prompt.uses:
            master = use.master % len(lengths)
            used[master] = max(used[master], use.length)
    return used


def _int32(values: object) -> IntArray:
    return np.asarray(values, dtype=np.int64).astype(np.int32)


def _indptr(counts: Sequence[int]) -> IntArray:
    return _int32([0, *np.cumsum(counts, dtype=np.int64).tolist()])


def _round_arrays(
    rng: np.random.Generator,
    prompts: list[_Agent],
    origins: list[int],
    master_pages: list[list[int]],
    own_pages: list[list[int]],
    block_size: int,
    room_for_all: bool,
) -> tuple[RoundExtents, dict[str, IntArray]]:
    """The fields of a round but for its work list."""
    uses = [(agent, use) for agent, prompt in enumerate(prompts) for use in prompt.uses]
    words: list[int] = []
    agent_use = np.full((len(prompts), len(master_pages)), -1, dtype=np.int32)
    for index, (agent, use) in enumerate(uses):
        agent_use[agent, use.master] = index
        for page in range(-(-use.length // block_size)):
            bits = np.flatnonzero(use.hidden[page * block_size : (page + 1) * block_size])
            words.append(sum(1 << bit for bit in bits.tolist()))
    own_page_ids = [list(pages) for pages in own_pages]
    own_position: list[int] = []
    for agent, prompt in enumerate(prompts):
        room = len(own_pages[agent]) * block_size
        own_position += prompt.own + [ABSURD] * (room - len(prompt.own))
        if not room_for_all:
            for page in range(-(-len(prompt.own) // block_size), len(own_pages[agent])):
                own_page_ids[agent][page] = ABSURD
    with_rows = [
        (agent, position)
        for agent in rng.permutation(len(prompts)).tolist()
        for position in prompts[agent].rows
    ]
    arrays = {
        "row_agent": _int32([agent for agent, _ in with_rows]),
        "row_position": _int32([position for _, position in with_rows]),
        "use_agent": _int32([agent for agent, _ in uses]),
        "use_master": _int32([use.master for _, use in uses]),
        "use_delta": _int32([use.delta for _, use in uses]),
        "use_shift": _int32([use.delta - origins[use.master % len(origins)] for _, use in uses]),
        "use_length": _int32([use.length for _, use in uses]),
        "use_page_indptr": _indptr([-(-use.length // block_size) for _, use in uses]),
        "use_masks": _int32(words),
        "agent_use_indptr": _indptr([len(prompt.uses) for prompt in prompts]),
        "agent_use": agent_use,
        "master_page_indptr": _indptr([len(pages) for pages in master_pages]),
        "master_pages": _int32([page for pages in master_pages for page in pages]),
        "own_length": _int32([len(prompt.own) for prompt in prompts]),
        "own_page_indptr": _indptr([len(pages) for pages in own_pages]),
        "own_pages": _int32([page for pages in own_page_ids for page in pages]),
        "own_position": _int32(own_position),
    }
    extents = RoundExtents(
        rows=len(with_rows),
        uses=len(uses),
        use_pages=len(words),
        agents=len(prompts),
        masters=len(master_pages),
        master_pages=sum(map(len, master_pages)),
        own_pages=sum(map(len, own_pages)),
        block_size=block_size,
    )
    return extents, arrays


def _with_slack(filled: RoundExtents, rng: np.random.Generator) -> RoundExtents:
    names = [field.name for field in fields(filled) if field.name != "block_size"]
    return replace(filled, **{n: getattr(filled, n) + int(rng.integers(0, 6)) for n in names})


# Fields whose empty slots hold nothing in particular; the others say "none" there (round.h).
_UNSPECIFIED = (
    "row_position",
    "use_master",
    "use_delta",
    "use_shift",
    "use_masks",
    "master_pages",
    "own_pages",
    "own_position",
    "work_rows",
    "work_chunks",
    "row_partials",
)


def _spoil_unfilled(round: RoundTensors, filled: RoundExtents) -> None:
    ranges, _ = round.extents.offsets()
    ends = [at + length for at, length in ranges.values()]
    for end, (following, _) in zip(ends, [*ranges.values()][1:], strict=False):
        round.buffer[end:following] = ABSURD  # between fields
    round.buffer[ends[-1] :] = ABSURD
    for name in _UNSPECIFIED:
        getattr(round, name)[filled.shapes()[name][0] :] = ABSURD


# Work lists -------------------------------------------------------------------------------------


def random_work(
    arrays: dict[str, IntArray], extents: RoundExtents, rng: np.random.Generator, max_rows: int
) -> dict[str, IntArray]:
    """A work list for collective attention that no planner would make, and that is right.

    Pages of Masters and own pages are cut into random chunks and dealt to random groups; the rows
    that may see something of a group are cut into random tiles, agents mixed. Items that do
    nothing, items without chunks and chunks without pages are among them.

    Args:
        arrays: the other fields of the round, at the sizes of ``extents``.
        max_rows: most query rows of an item.

    Returns:
        The fields ``work``, ``work_rows``, ``work_chunks``, ``row_partial_indptr`` and
        ``row_partials``.
    """
    size = extents.block_size
    row_agent = arrays["row_agent"].tolist()
    with_rows = set(row_agent)
    pages_of_source: dict[int, int] = {}
    agents_of_source: dict[int, set[int]] = {}
    for agent, master, length in zip(
        *(arrays[name].tolist() for name in ("use_agent", "use_master", "use_length")), strict=True
    ):
        if agent in with_rows:
            pages_of_source[master] = max(pages_of_source.get(master, 0), -(-length // size))
            agents_of_source.setdefault(master, set()).add(agent)
    for agent in with_rows:
        pages_of_source[-1 - agent] = -(-int(arrays["own_length"][agent]) // size)
        agents_of_source[-1 - agent] = {agent}

    pieces: list[tuple[int, int, int]] = []
    for source, pages in pages_of_source.items():
        cuts = sorted({0, pages, *rng.integers(0, pages + 1, int(rng.integers(0, 3))).tolist()})
        pieces += [(source, begin, end) for begin, end in pairwise(cuts)]
        if rng.random() < 0.2:
            pieces.append((source, pages, pages))
    groups: list[list[tuple[int, int, int]]] = [[] for _ in range(int(rng.integers(1, 4)))]
    for index in rng.permutation(len(pieces)).tolist():
        groups[int(rng.integers(0, len(groups)))].append(pieces[index])

    chunks: list[list[int]] = []
    items: list[tuple[list[int], int, int]] = []
    seen: set[int] = set()
    for group in groups:
        agents = set().union(*(agents_of_source[source] for source, _, _ in group))
        rows = [row for row, agent in enumerate(row_agent) if agent in agents]
        begin = len(chunks)
        chunks += [[source, first, last, 0] for source, first, last in group]
        items += [(tile, begin, len(chunks)) for tile in _tiles(rng, rows, max_rows)]
        seen.update(rows)
    unseen = [row for row in range(len(row_agent)) if row not in seen]
    items += [(tile, 0, 0) for tile in _tiles(rng, unseen, max_rows)]
    for _ in range(int(rng.integers(0, 3))):
        items.insert(int(rng.integers(0, len(items) + 1)), ([], 0, len(chunks)))

    times = np.zeros(len(row_agent), dtype=np.int64)
    for tile, _, _ in items:
        times[tile] += 1
    work: list[list[int]] = []
    work_rows: list[int] = []
    partials_of_row: list[list[int]] = [[] for _ in row_agent]
    partials = 0
    for tile, chunk_begin, chunk_end in items:
        alone = all(times[row] == 1 for row in tile) and rng.random() < 0.8
        partial_begin = -1 if alone else partials
        if not alone:
            for offset, row in enumerate(tile):
                partials_of_row[row].append(partials + offset)
            partials += len(tile)
        row_begin = len(work_rows)
        work_rows += tile
        work.append(
            [row_begin, len(work_rows), chunk_begin, chunk_end, partial_begin]
            + [0] * (WORK_FIELDS - 5)
        )
    merged = [rng.permutation(row).astype(int).tolist() for row in partials_of_row]
    return {
        "work": _int32(work).reshape(-1, WORK_FIELDS),
        "work_rows": _int32(work_rows),
        "work_chunks": _int32(chunks).reshape(-1, CHUNK_FIELDS),
        "row_partial_indptr": _indptr([len(row) for row in merged]),
        "row_partials": _int32([partial for row in merged for partial in row]),
    }


def _planned_work(
    arrays: dict[str, IntArray],
    extents: RoundExtents,
    rng: np.random.Generator,
    max_rows: int,
    window: int,
) -> dict[str, IntArray]:
    """The planner's work list, for a device of random size."""
    from tokendance import _planner

    planned = _planner.plan_work(
        **{name: arrays[name] for name in _PLANNED_FROM},
        block_size=extents.block_size,
        max_tile_rows=max_rows,
        target_items=int(rng.choice([1, 8, 132])),
        max_splits=int(rng.choice([1, 4, 32])),
        window=window,
    )
    return {name: np.asarray(field) for name, field in planned.items()}


_PLANNED_FROM = (
    "row_agent",
    "row_position",
    "use_agent",
    "use_master",
    "use_delta",
    "use_length",
    "master_page_indptr",
    "own_length",
    "own_page_indptr",
    "own_position",
)


def _tiles(rng: np.random.Generator, rows: list[int], max_rows: int) -> list[list[int]]:
    """Cuts rows into tiles of random sizes and members, ascending within a tile."""
    shuffled = rng.permutation(rows).astype(int).tolist()
    tiles = []
    while shuffled:
        count = int(rng.integers(1, max_rows + 1))
        tiles.append(sorted(shuffled[:count]))
        shuffled = shuffled[count:]
    return tiles


def assert_work_covers(round: RoundTensors, max_rows: int, window: int = 0) -> None:
    """Checks a work list: each row meets each page that it sees a key of, and none twice.

    Also that items have at most ``max_rows`` rows, ascending and not padding; that each other row
    has an item; that a row with several items has a partial of each, in its own slot, and a row
    with one either writes its output or has one partial. Raises ``AssertionError``.
    """
    size = round.extents.block_size
    row_agent, row_position = round.row_agent.tolist(), round.row_position.tolist()
    met: list[list[tuple[int, int]]] = [[] for _ in row_agent]
    items: list[int] = [0] * len(row_agent)
    partials: list[list[int]] = [[] for _ in row_agent]
    work_rows, work_chunks = round.work_rows.tolist(), round.work_chunks.tolist()
    for row_begin, row_end, chunk_begin, chunk_end, partial_begin, *rest in round.work.tolist():
        assert rest == [0] * len(rest)
        rows = work_rows[row_begin:row_end]
        assert len(rows) == row_end - row_begin <= max_rows
        assert rows == sorted(set(rows)), f"rows of an item ascend, got {rows}"
        pages = [
            (source, page)
            for source, first, last, _ in work_chunks[chunk_begin:chunk_end]
            for page in range(first, last)
        ]
        for offset, row in enumerate(rows):
            assert row_agent[row] >= 0, f"row {row} is padding"
            items[row] += 1
            met[row] += pages
            if partial_begin >= 0:
                partials[row].append(partial_begin + offset)
    merged = round.row_partials.tolist()
    indptr = round.row_partial_indptr.tolist()
    every_partial = [partial for row in partials for partial in row]
    assert len(set(every_partial)) == len(every_partial), "two rows write one partial"
    assert all(partial < round.extents.partials for partial in every_partial)
    for row, agent in enumerate(row_agent):
        assert sorted(merged[indptr[row] : indptr[row + 1]]) == sorted(partials[row])
        if agent < 0:
            continue
        assert items[row] >= 1, f"row {row} has no item"
        assert len(partials[row]) == items[row] or (items[row] == 1 and not partials[row])
        own = [page for page in met[row] if page[0] == -1 - agent]
        uses = [
            (source, page)
            for source, page in met[row]
            if source >= 0 and int(round.agent_use[agent, source]) >= 0
        ]
        assert len(set(own + uses)) == len(own + uses), f"row {row} meets a page twice"
        needed = _pages_seen(round, agent, row_position[row], size, window)
        missing = needed - set(own + uses)
        assert not missing, f"row {row} does not meet {sorted(missing)}"


def _pages_seen(
    round: RoundTensors, agent: int, position: int, size: int, window: int
) -> set[tuple[int, int]]:
    """(source, page) of every page with a key that the row sees, whatever the masks are."""

    def sees(key: int) -> bool:
        return key <= position and (window == 0 or position - key < window)

    seen = set()
    for use in range(int(round.agent_use_indptr[agent]), int(round.agent_use_indptr[agent + 1])):
        delta, master = int(round.use_delta[use]), int(round.use_master[use])
        rows = range(int(round.use_length[use]))
        seen |= {(master, row // size) for row in rows if sees(delta + row)}
    begin = int(round.own_page_indptr[agent]) * size
    own = round.own_position[begin : begin + int(round.own_length[agent])].tolist()
    return seen | {(-1 - agent, row // size) for row, key in enumerate(own) if sees(key)}


# Dense caches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseCache:
    """Where dense KV of a round's agents lies, or is to lie.

    Attributes:
        k, v: per layer a row tensor, ``[rows, Hk, D]`` or paged.
        slot_mapping: int64 ``[N, T]`` row of ``k`` and ``v`` of position p of agent a.
    """

    k: list[Tensor]
    v: list[Tensor]
    slot_mapping: Tensor

    def copy(self, device: torch.device | str = "cpu") -> DenseCache:
        """A copy on ``device`` with the same strides, gaps and shared storages."""
        to = StorageCopies(device)
        return DenseCache([to(k) for k in self.k], [to(v) for v in self.v], to(self.slot_mapping))


def dense_cache(
    case: RandomRound,
    seed: int,
    *,
    page_size: int | None = 16,
    layout: Layout = "separate",
    skip: float = 0.0,
    spare_columns: int = 3,
    beyond: int = -1,
    dtype: torch.dtype | None = None,
) -> DenseCache:
    """Room for the dense KV of all agents, in random slots, NaN throughout.

    Args:
        page_size: rows of a page; None for ``[rows, Hk, D]``.
        layout: as for :func:`pools`.
        skip: share of slots that are -1.
        spare_columns: T is so much more than the longest prompt.
        beyond: the slot of positions beyond an agent's prompt.
        dtype: that of the pools by default.
    """
    rng = np.random.default_rng(seed)
    length = case.length.tolist()
    total = sum(length)
    rows_per_page = 1 if page_size is None else page_size
    num_pages = total // rows_per_page + 2
    k, v = [], []
    for pool in case.k_pool:
        k_rows, v_rows = pools(
            num_pages, rows_per_page, pool.shape[2], pool.shape[3], dtype or pool.dtype, layout
        )
        k.append(k_rows if page_size else k_rows[:, 0])
        v.append(v_rows if page_size else v_rows[:, 0])
    slots = torch.from_numpy(rng.permutation(num_pages * rows_per_page)[:total])
    slot_mapping = torch.full(
        (len(length), max([0, *length]) + spare_columns), beyond, dtype=torch.int64
    )
    begin = 0
    for agent, count in enumerate(length):
        chosen = slots[begin : begin + count].clone()
        chosen[torch.from_numpy(rng.random(count) < skip)] = -1
        slot_mapping[agent, :count] = chosen
        begin += count
    return DenseCache(k, v, slot_mapping)


# Comparisons ------------------------------------------------------------------------------------

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference from the fp64 reference that attention in ``dtype`` may have."""
    return _TOLERANCE[dtype]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Compares with the fp64 reference, relative to the largest value of each innermost row.

    ``-inf`` and NaN must stand at the same places. Raises ``AssertionError``.
    """
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"{what}: {actual.shape} and {expected.shape}"
    if expected.numel() == 0:
        return
    finite = expected.isfinite()
    strange = torch.where(finite, 0.0, expected)
    torch.testing.assert_close(
        torch.where(actual.isfinite(), 0.0, actual), strange, equal_nan=True, rtol=0, atol=0
    )
    magnitude = torch.where(finite, expected, 0.0).abs().amax(dim=-1, keepdim=True)
    error = torch.where(finite, (actual - expected).abs(), 0.0) / magnitude.clamp(min=1e-2)
    worst = float(error.max())
    assert worst <= tolerance(dtype), (
        f"{what}: off by {worst:.3g} relative at {_where(error == worst)}, "
        f"expected at most {tolerance(dtype):g}"
    )


def same_bits(actual: Tensor, expected: Tensor) -> Tensor:
    """Elementwise whether bits agree (NaN equals the same NaN, +0 differs from -0): bool."""
    bits = _BITS[expected.element_size()]
    return actual.contiguous().view(bits) == expected.contiguous().view(bits)


def assert_same_bits(
    actual: Tensor, expected: Tensor, what: str = "", any_nan: bool = False
) -> None:
    """Compares shape, dtype and every bit; with ``any_nan`` a NaN may be any other NaN.

    Raises ``AssertionError``.
    """
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if any_nan:
        actual = torch.where(actual.isnan(), torch.nan, actual)
        expected = torch.where(expected.isnan(), torch.nan, expected)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} and {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} and {expected.shape}"
    differs = ~same_bits(actual, expected)
    assert not differs.any(), (
        f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, first at "
        f"{_where(differs)}: {actual[differs][0].item()} instead of {expected[differs][0].item()}"
    )


def assert_same_storage(
    actual: Tensor, expected: Tensor, what: str = "", any_nan: bool = False
) -> None:
    """:func:`assert_same_bits` of whole storages: nothing beside the tensor was written, either."""
    assert actual.stride() == expected.stride(), f"{what}: {actual.stride()}, {expected.stride()}"
    assert_same_bits(actual, expected, what, any_nan)
    storages = whole_storage(actual), whole_storage(expected)
    assert_same_bits(*storages, f"{what}: whole storage", any_nan)


def _where(condition: Tensor) -> list[int]:
    return [int(index) for index in condition.nonzero()[0]]
