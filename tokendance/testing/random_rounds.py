"""Random ragged rounds, legal and as unkind as the contract (``round.h``) allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendance.device.rope import Rope
from tokendance.device.rounds import RoundTensors
from tokendance.host.round import IntArray, RoundExtents, agent_use
from tokendance.testing.layouts import ABSURD, Layout, StorageCopies, is_quantized, pools
from tokendance.testing.reference import quantize_rows
from tokendance.testing.work_lists import index_pointers, int32_array, planned_work, random_work

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
    def use_table(self) -> IntArray:
        """The agent's use of each Master, ``[agents, masters]``: -1 where it has none."""
        table: IntArray = np.full((self.filled.agents, self.filled.masters), -1, dtype=np.int32)
        uses = np.arange(self.filled.uses, dtype=np.int32)
        table[self.arrays["use_agent"], self.arrays["use_master"]] = uses
        return table

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
        arrays |= planned_work(arrays, filled, rng, rows_per_item, window)
    else:
        arrays |= random_work(arrays, filled, rng, rows_per_item)
    filled = replace(
        filled,
        work=len(arrays["work"]),
        work_rows=len(arrays["work_rows"]),
        work_chunks=len(arrays["work_chunks"]),
        work_uses=len(arrays["work_uses"]),
        partials=len(arrays["row_partials"]),
    )
    capacity = _with_slack(filled, rng) if slack else filled
    round = RoundTensors.from_arrays(arrays, filled, capacity)
    _spoil_unfilled(round, filled)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch_rng, dtype=torch.float32, device="cpu")

    def stored(rows: int, scales: Tensor | None, layer: int) -> Tensor:
        x = normal(rows, num_kv_heads, head_dim)
        return x.to(dtype) if scales is None else quantize_rows(x, scales[layer], dtype)

    k_scale = v_scale = None
    if is_quantized(dtype):
        # The largest element stands for 2 to 6: some of what is normally distributed is limited.
        largest = 448.0 if dtype.is_floating_point else 127.0
        scales = torch.rand(
            (2, num_layers, num_kv_heads), generator=torch_rng, dtype=torch.float32, device="cpu"
        )
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
        (capacity.rows, num_q_heads + 2 * num_kv_heads, head_dim),
        torch.nan,
        dtype=query_dtype,
        device="cpu",
    )
    q = projection[:, :num_q_heads]
    q[: filled.rows] = normal(filled.rows, num_q_heads, head_dim)

    cos, sin = _tables(head_dim if rotary_dim is None else rotary_dim, max_position, interleaved)
    length = torch.zeros(capacity.agents, dtype=torch.int32, device="cpu")
    length[:agents] = torch.from_numpy(int32_array([prompt.length for prompt in prompts]))
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
        empty = torch.empty(max_position, 0, dtype=torch.float32, device="cpu")
        return empty, empty.clone()
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
    for _, use in uses:
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
    use_agent = int32_array([agent for agent, _ in uses])
    use_master = int32_array([use.master for _, use in uses])
    arrays = {
        "row_agent": int32_array([agent for agent, _ in with_rows]),
        "row_position": int32_array([position for _, position in with_rows]),
        "use_agent": use_agent,
        "use_master": use_master,
        "use_delta": int32_array([use.delta for _, use in uses]),
        "use_shift": int32_array(
            [use.delta - origins[use.master % len(origins)] for _, use in uses]
        ),
        "use_length": int32_array([use.length for _, use in uses]),
        "use_page_indptr": index_pointers([-(-use.length // block_size) for _, use in uses]),
        "use_masks": int32_array(words),
        "agent_use_indptr": index_pointers([len(prompt.uses) for prompt in prompts]),
        "agent_use": agent_use(use_agent, use_master),
        "master_page_indptr": index_pointers([len(pages) for pages in master_pages]),
        "master_pages": int32_array([page for pages in master_pages for page in pages]),
        "own_length": int32_array([len(prompt.own) for prompt in prompts]),
        "own_page_indptr": index_pointers([len(pages) for pages in own_pages]),
        "own_pages": int32_array([page for pages in own_page_ids for page in pages]),
        "own_position": int32_array(own_position),
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
    "work_uses",
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
