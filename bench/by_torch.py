"""The operators by torch's own operators, as peers: what is gained over them.

Written as one would write them for speed: results and what comes in between go to memory that is
there already, rows are turned piece by piece, so that a piece stays in the cache from one operator
to the next, and rows that lie together are sliced, not gathered. Arithmetic is in fp32, as ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import tokendance as td
from bench.mirrors import BenchRound
from tokendance.host.mirror import Use

PIECE = 1 << 19  # elements; 2 MiB in fp32


def angles(rope: td.Rope, shift: int) -> tuple[Tensor, Tensor]:
    """cos and sin ``[1, D / 2]`` of rows that all move by ``shift``, which may be negative."""
    cos, sin = rope.cos[[abs(shift)]], rope.sin[[abs(shift)]]
    return cos, sin if shift >= 0 else -sin


def _angles_at(table: Tensor, rows: slice) -> Tensor:
    return table[rows] if len(table) > 1 else table


class Rotation:
    """Half-split rotation of rows ``[rows, Hk, D]``, as `ops.rope_rotate_out`'s.

    Args:
        like: what is turned, for its shape of a row.
    """

    def __init__(self, like: Tensor, piece: int = PIECE) -> None:
        self.piece = max(piece // like[0].numel(), 1)
        self._wide, self._turned = torch.empty(2, self.piece, *like.shape[1:])

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
        """Angles: ``[rows, D / 2]``, or ``[1, D / 2]`` where all rows turn alike.
        Returns ``out``, which shares no memory with ``x``."""
        half = x.shape[-1] // 2
        for begin in range(0, len(x), self.piece):
            at = slice(begin, begin + self.piece)
            rows, to = x[at], out[at]
            c, s = (_angles_at(table, at)[:, None] for table in (cos, sin))
            wide = rows if rows.dtype == torch.float32 else self._wide[: len(rows)].copy_(rows)
            turned = to if to.dtype == torch.float32 else self._turned[: len(rows)]
            a, b = wide[..., :half], wide[..., half:]
            torch.mul(a, c, out=turned[..., :half]).addcmul_(b, s, value=-1)
            torch.mul(b, c, out=turned[..., half:]).addcmul_(a, s)
            if turned is not to:
                to.copy_(turned)
        return out


class Deviation:
    """`ops.key_deviation_out` of agents that all have every token.

    Args:
        like: cached keys ``[tokens, Hk, D]``, for their shape of a row.
    """

    def __init__(self, like: Tensor, piece: int = PIECE) -> None:
        self._rotate = Rotation(like, piece)
        self._cached, self._moved = torch.empty(2, self._rotate.piece, *like.shape[1:])

    def __call__(
        self, fresh: Tensor, cached: Tensor, cos: Tensor, sin: Tensor, out: Tensor
    ) -> Tensor:
        """``fresh``: ``[agents, tokens, Hk, D]``; ``cached``: ``[tokens, Hk, D]``; angles as of
        `Rotation`. Returns ``out``: fp32 ``[tokens]``."""
        out.zero_()
        for begin in range(0, len(cached), self._rotate.piece):
            at = slice(begin, begin + self._rotate.piece)
            c, s = (_angles_at(table, at) for table in (cos, sin))
            moved = self._moved[: len(out[at])]
            wide = self._cached[: len(moved)].copy_(cached[at])
            for agent in fresh:
                difference = self._rotate(agent[at], c, s, moved).sub_(wide).flatten(1)
                out[at] += torch.linalg.vector_norm(difference, dim=1).square_()
        return out


class Encoding:
    """`ops.diff_encode` without tolerance, of one layer and half-split rotation.

    What stays with Masters is a bool per position, and own rows go where they stood before.

    Args:
        case: whose agents' dense rows lie one after the other in ``k`` and ``v``,
            ``[N * length, Hk, D]``. Compared are keys as turned here, so that no bit of rounding
            makes a row differ.
    """

    def __init__(self, case: BenchRound, k: Tensor, v: Tensor) -> None:
        longest = max(use.length for mirror in case.mirrors for use in mirror.uses)
        self._case = case
        self._rotate = Rotation(k)
        self._moved, self._differing = (torch.empty_like(k[:longest]) for _ in range(2))
        self._k, self._v = k.clone(), v
        k_pool = case.k_pools[0].flatten(0, 1)
        for mirror, dense in zip(case.mirrors, self._k.split(case.length), strict=True):
            own = torch.from_numpy(mirror.own_position).long()
            kept = dense[own]
            for use in mirror.uses:
                self._move(k_pool, use, dense[use.delta : use.delta + use.length])
            dense[own] = kept

    def __call__(self) -> list[Tensor]:
        """The positions of every agent's own rows, which have been written to its own pages."""
        case, found = self._case, []
        k_pool, v_pool = (pools[0].flatten(0, 1) for pools in (case.k_pools, case.v_pools))
        dense = zip(self._k.split(case.length), self._v.split(case.length), strict=True)
        for mirror, (k, v) in zip(case.mirrors, dense, strict=True):
            own = torch.ones(case.length, dtype=torch.bool)
            for use in mirror.uses:
                at = slice(use.delta, use.delta + use.length)
                moved = self._move(k_pool, use, self._moved[: use.length])
                differing = self._differ(moved, k[at])
                differing |= self._differ(v_pool[case.master_rows(use)], v[at])
                own[at] = differing
            position = own.nonzero().flatten()
            first = int(mirror.own_pages[0]) * case.block_size
            for rows, pool in ((k, k_pool), (v, v_pool)):
                torch.index_select(rows, 0, position, out=pool[first : first + len(position)])
            found.append(position)
        return found

    def _move(self, k_pool: Tensor, use: Use, out: Tensor) -> Tensor:
        cos, sin = angles(self._case.rope, use.shift)
        return self._rotate(k_pool[self._case.master_rows(use)], cos, sin, out)

    def _differ(self, a: Tensor, b: Tensor) -> Tensor:
        # Ones of the storage type and their largest: several times as fast as a bool per element.
        return torch.ne(a, b, out=self._differing[: len(a)]).flatten(1).amax(dim=1).bool()


def merge_states(partial_out: Tensor, partial_lse: Tensor) -> Callable[[Tensor, Tensor], None]:
    """`ops.merge_states_out` of these, without sinks: called with ``out``, ``lse``."""
    narrow = partial_out.dtype != torch.float32
    total, part = torch.empty(2, *partial_out[0].shape) if narrow else (None, None)

    def merge(out: Tensor, lse: Tensor) -> None:
        torch.logsumexp(partial_lse, dim=0, out=lse)
        weights = (partial_lse - lse).exp_()[..., None]
        added = out if total is None else total
        torch.mul(partial_out[0], weights[0], out=added)
        for rows, weight in zip(partial_out[1:], weights[1:], strict=True):
            added.addcmul_(rows if part is None else part.copy_(rows), weight)
        if added is not out:
            out.copy_(added)

    return merge
