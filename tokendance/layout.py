"""What a round reuses and what it computes: decided by content, before any page is taken.

The result for each agent is a list of spans that tile its prompt. Nothing here touches a device or
changes a store; `KVCollector.plan` leases pages for what this decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokendance.mirror import Master, Mirror, Use, masks_of_first
from tokendance.rounds import IntArray
from tokendance.segments import Segment, chain
from tokendance.selection import Everything, KeyDeviation, LeadingTokens, Selection

Find = Callable[[Segment], tuple[Master, int] | None]
"""The stored Master of a segment and how many of the segment's rows it has, or None."""


_ROUNDING = 1e-6  # of shares that are compared
_COMPARED_AT_ONCE = 1 << 22  # (segment, agent, segment) triples


class Source(Enum):
    """Where the Master of a segment that is not stored comes from.

    MASTER: an agent of the round computes it in its own prompt (docs/guide.md).
    ALONE: it is computed without any context, as position-independent caching does (PIC).
    PRODUCER: as MASTER, but the decoded output of an agent becomes a stored Master at commit, as
        the agent that wrote it computed it.
    """

    MASTER = "master"
    ALONE = "alone"
    PRODUCER = "producer"


class Origin(Enum):
    """Where rows of a prompt come from."""

    EARLIER = "earlier"  # the agent's own KV of an earlier round, at the same positions
    OWN = "own"  # computed, kept by this agent
    MASTER = "master"  # computed, the first copy, kept as a Master
    EXACT = "exact"  # reused from a Master of the same context
    REUSED = "reused"  # reused from a Master of another context
    REPAIRED = "repaired"  # reused, but recomputed in this agent's context and overridden


@dataclass(frozen=True)
class OptedOut:
    """Who and what takes part in no reuse but the exact one, as under `Everything`.

    Attributes:
        agents: names. Such an agent takes over no inexact row; others may reuse what it computes.
        segments: digests. Such a segment is computed in every prompt.
    """

    agents: frozenset[str] = frozenset()
    segments: frozenset[bytes] = frozenset()

    def holds(self, agent: str | None, segment: Segment) -> bool:
        """Whether the agent computes the segment."""
        return agent in self.agents or segment.digest in self.segments


class Span(NamedTuple):
    """Rows ``begin .. end - 1`` of a prompt and where they come from."""

    begin: int
    end: int
    origin: Origin


@dataclass(eq=False)
class AgentLayout:
    """What one agent reuses and computes.

    Attributes:
        agent: its name; of a segment that is computed alone, None.
        segments, length: the prompt.
        earlier: the agent's Mirror whose first ``prefix`` rows are taken over, or None.
        prefix: rows taken over.
        uses: of the whole prompt, ascending by delta; overrides of selected rows are marked.
        made: uses among ``uses`` whose Master this agent computes.
        candidates: uses whose rows `KeyDeviation` chooses while the round runs.
        own: int32, positions that the agent computes and keeps, ascending.
        ends, origins: of the spans that tile the prompt: where each ends, where its rows come from.
        exact_length: rows before the first inexact one.
        logit_rows: how many of the last rows the engine wants logits of.
    """

    agent: str | None
    segments: tuple[Segment, ...]
    length: int
    earlier: Mirror | None = None
    prefix: int = 0
    uses: list[Use] = field(default_factory=list)
    made: list[Use] = field(default_factory=list)
    candidates: list[Use] = field(default_factory=list)
    own: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    ends: list[int] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    exact_length: int = 0
    logit_rows: int = 1

    def append(self, end: int, origin: Origin) -> None:
        """Rows from the last end on."""
        self.ends.append(end)
        self.origins.append(origin)

    @property
    def spans(self) -> list[Span]:
        return [
            Span(begin, end, origin)
            for begin, end, origin in zip([0, *self.ends], self.ends, self.origins, strict=False)
        ]

    @cached_property
    def context(self) -> bytes:
        """Chained digest of the whole prompt."""
        return _Contexts(self.segments).before(len(self.segments))


def lay_out(
    prompts: Mapping[str, Sequence[Segment]],
    find: Find,
    mirrors: Mapping[str, Mirror],
    selection: Selection,
    source: Source,
    block_size: int,
    opted_out: OptedOut = OptedOut(),
) -> list[AgentLayout]:
    """Decides a round. The layouts come in the order in which they must be computed.

    Args:
        prompts: the segments of every agent's prompt. Empty segments do not count.
        find: looks a segment up among the stored Masters.
        mirrors: the agents' KV of earlier rounds.
        selection: which reused rows are recomputed.
        source: where Masters that are not stored come from.
        block_size: rows of a page. A shared segment shorter than half a page is not worth a page of
            its own: every agent computes it.
        opted_out: who and what is computed whatever the selection.
    """
    tokens = {
        agent: tuple(segment for segment in segments if segment.length)
        for agent, segments in prompts.items()
    }
    if isinstance(selection, Everything):
        opted_out = OptedOut(frozenset(tokens))
    shortest = block_size // 2
    places = {agent: _with_positions(segments) for agent, segments in tokens.items()}
    prefixes = {
        agent: _own_prefix(agent, segments, mirrors.get(agent), opted_out)
        for agent, segments in tokens.items()
    }
    wanted = {
        agent: [
            segment
            for segment, begin, end in places[agent]
            if _may_share(segment, end - begin, shortest)
            and begin >= prefixes[agent]
            and find(segment) is None
        ]
        for agent in tokens
    }
    made: dict[bytes, Master] = {}
    layouts: list[AgentLayout] = []
    repairs_runs = isinstance(selection, LeadingTokens) and source is not Source.ALONE
    lone = _lone(tokens) if repairs_runs else frozenset[bytes]()
    shared = {s.digest for segments in tokens.values() for s in segments if s.is_shared}
    builder = _Builder(find, made, selection, block_size, shortest, lone, opted_out, shared)
    # Without context almost nothing is exact: under Everything no Master is worth computing alone.
    if source is Source.ALONE and not isinstance(selection, Everything):
        alone = {
            segment.digest: segment
            for agent, segments in wanted.items()
            for segment in segments
            if not opted_out.holds(agent, segment)
        }
        for segment in alone.values():
            place = [(segment, 0, segment.length)]
            layouts.append(builder.build(None, (segment,), place, None, 0, {segment.digest}))
        order, makes = list(tokens), dict.fromkeys(tokens, frozenset[bytes]())
    else:
        # Only where inexact rows are reused does it matter what a Master has seen.
        repairs = isinstance(selection, LeadingTokens | KeyDeviation)
        order, makes = _master_agents(wanted, tokens if repairs else {})
    for agent in order:
        mirror, prefix = mirrors.get(agent), prefixes[agent]
        layouts.append(
            builder.build(agent, tokens[agent], places[agent], mirror, prefix, makes[agent])
        )
    return layouts


Place = tuple[Segment, int, int]
"""A segment, and the positions at which it begins and ends in a prompt."""


def _with_positions(segments: Sequence[Segment]) -> list[Place]:
    result, position = [], 0
    for segment in segments:
        end = position + segment.length
        result.append((segment, position, end))
        position = end
    return result


def _may_share(segment: Segment, length: int, shortest: int) -> bool:
    return segment.is_shared and length >= shortest


class _Contexts:
    """Chained digests of a prompt, made as far as they are asked for."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._made = [b""]

    def before(self, index: int) -> bytes:
        """Of all that stands left of a segment."""
        while len(self._made) <= index:
            self._made.append(chain(self._made[-1], self._segments[len(self._made) - 1].digest))
        return self._made[index]


def foreign_uses(mirror: Mirror) -> list[Use]:
    """Uses whose Master was computed in another context than the agent's own."""
    contexts, context, position = {}, b"", 0
    for segment in mirror.segments:
        contexts[position] = context
        context = chain(context, segment.digest)
        position += segment.length
    contexts[position] = context
    return [use for use in mirror.uses if use.master.context != contexts[use.delta]]


def _own_prefix(
    agent: str, segments: Sequence[Segment], mirror: Mirror | None, opted_out: OptedOut
) -> int:
    """Rows of the agent's earlier KV that the prompt begins with; never its last row.

    It ends before whatever has opted out since it was reused.
    """
    if mirror is None:
        return 0
    prefix = 0
    for new, old in zip(segments, mirror.segments, strict=False):
        if new.digest == old.digest:
            prefix += new.length
            continue
        if new.stem == old.digest:  # a decoded output whose last token was never fed
            prefix += old.length
        elif not new.is_shared:
            length = min(new.length, old.length)
            differs = np.flatnonzero(new.token_ids[:length] != old.token_ids[:length])
            prefix += int(differs[0]) if len(differs) else length
        break
    if agent in opted_out.agents:
        prefix = min(prefix, mirror.exact_length)
    elif opted_out.segments:
        foreign = [u.delta for u in foreign_uses(mirror) if u.master.digest in opted_out.segments]
        prefix = min([prefix, *foreign])
    total = sum(segment.length for segment in segments)
    return min(prefix, max(total - 1, 0))


def _lone(prompts: Mapping[str, Sequence[Segment]]) -> frozenset[bytes]:
    """Segments that one agent of the round has, if there are several agents."""
    users: dict[bytes, int] = {}
    for segments in prompts.values():
        for digest in {segment.digest for segment in segments}:
            users[digest] = users.get(digest, 0) + 1
    return frozenset(d for d, count in users.items() if count == 1 and len(prompts) > 1)


def _master_agents(
    wanted: Mapping[str, Sequence[Segment]], prompts: Mapping[str, Sequence[Segment]]
) -> tuple[list[str], dict[str, frozenset[bytes]]]:
    """Greedy cover: who computes which segment, and in which order the agents come.

    An agent that covers the most tokens which others want too comes first; then the next, over what
    is still uncovered. A segment that only one agent wants is computed by that agent, in place.
    With ``prompts``, a second agent takes over what `_better_informed` says.
    """
    users: dict[bytes, int] = {}
    length: dict[bytes, int] = {}
    digests = {agent: {s.digest for s in segments} for agent, segments in wanted.items()}
    for segments in wanted.values():
        for segment in segments:
            length[segment.digest] = segment.length
    for mine in digests.values():
        for digest in mine:
            users[digest] = users.get(digest, 0) + 1
    makes = {
        agent: {digest for digest in mine if users[digest] == 1} for agent, mine in digests.items()
    }
    uncovered = {digest for digest, count in users.items() if count > 1}
    order: list[str] = []
    while uncovered:
        best = max(digests, key=lambda agent: sum(length[d] for d in digests[agent] & uncovered))
        covered = digests[best] & uncovered
        makes[best] |= covered
        uncovered -= covered
        order.append(best)
        if len(order) == 1 and prompts:
            second, taken = _better_informed(best, covered, digests, prompts)
            if taken:
                makes[best] -= taken
                makes[second] |= taken | (digests[second] & uncovered)
                uncovered -= digests[second]
                order.append(second)
    leaders = set(order)
    order += [agent for agent in wanted if agent not in leaders]
    return order, {agent: frozenset(mine) for agent, mine in makes.items()}


def _better_informed(
    first: str,
    covered: set[bytes],
    digests: Mapping[str, set[bytes]],
    prompts: Mapping[str, Sequence[Segment]],
) -> tuple[str, set[bytes]]:
    """The agent in whose prompt Masters of the first Master agent would have seen more, and which.

    What a Master never attended to is missing from it, and a repair of its first rows does not
    bring it back; what it has seen too much does far less harm. Where agents have the segments in
    orders of their own, the first agent's first segments have seen nothing of what other prompts
    have in front of them. The other agent's Masters cost their rows once more, whatever the number
    of siblings: the first agent keeps a copy of its own.

    A segment is taken over if its users' left contexts are unseen by more than a quarter on average
    and the other agent brings that down by a third. One that a user has in the first agent's very
    context, where it is reused exactly, stays.
    """
    agents = list(prompts)
    shared = {s.digest: s.length for segments in prompts.values() for s in segments if s.is_shared}
    index = {digest: e for e, digest in enumerate(shared)}
    length = np.array(list(shared.values()), dtype=np.float32)
    # Where a segment first stands in a prompt, and what stands left of it there, as a number.
    place = np.full((len(agents), len(index)), np.iinfo(np.int32).max, dtype=np.int32)
    context = np.full((len(agents), len(index)), -1, dtype=np.int32)
    wanted = np.zeros((len(agents), len(index)), dtype=bool)
    contexts: dict[tuple[int, bytes], int] = {}
    for a, agent in enumerate(agents):
        left = 0
        for i, segment in enumerate(prompts[agent]):
            if segment.is_shared and context[a, index[segment.digest]] < 0:
                place[a, index[segment.digest]] = i
                context[a, index[segment.digest]] = left
            left = contexts.setdefault((left, segment.digest), len(contexts) + 1)
        wanted[a, [index[digest] for digest in digests[agent]]] = True

    maker = agents.index(first)
    takes = np.zeros_like(wanted)
    gain = np.zeros(len(agents))
    columns = np.array(sorted(index[digest] for digest in covered))
    at_once = max(1, _COMPARED_AT_ONCE // wanted.size)
    for d in np.split(columns, range(at_once, len(columns), at_once)):
        # [segment, user, other segment]: what stands before the segment
        before = (place < place.T[d, :, None]) & wanted.T[d, :, None]
        seen = before.astype(np.float32)
        tokens = seen * length
        total = tokens.sum(axis=2, keepdims=True)
        # [segment, user, maker]: share of the shared tokens in front that the maker never saw
        unseen = (total - tokens @ seen.transpose(0, 2, 1)) / np.maximum(total, 1)
        users = wanted.T[d]
        users[:, maker] = False
        alike = users & (context.T[d] == context[maker, d, None])
        # What follows holds for each agent as the other maker, who is no user of its own Masters.
        others = users.sum(axis=1, keepdims=True) - users
        sum_now = (unseen[:, :, maker] * users).sum(axis=1, keepdims=True)
        now = (sum_now - unseen[:, :, maker] * users) / np.maximum(others, 1)
        then = (unseen * users[:, :, None]).sum(axis=1) / np.maximum(others, 1)
        takes_over = users & (others > 0) & (alike.sum(axis=1, keepdims=True) - alike == 0)
        takes_over &= (now > 1 / 4 + _ROUNDING) & (then <= 2 / 3 * now + _ROUNDING)
        takes[:, d] = takes_over.T
        gain += ((now - then) * takes_over).sum(axis=0)
    best = int(np.argmax(gain >= gain.max() - _ROUNDING))  # the first of equals
    if gain[best] <= 0:
        return first, set()
    return agents[best], {digest for digest in covered if takes[best, index[digest]]}


class _Builder:
    """Lays out one agent after the other; later ones see the Masters that earlier ones make."""

    def __init__(
        self,
        find: Find,
        made: dict[bytes, Master],
        selection: Selection,
        block_size: int,
        shortest: int,
        lone: frozenset[bytes],
        opted_out: OptedOut,
        shared: Iterable[bytes],
    ) -> None:
        self._find = find
        self._made = made
        self._selection = selection
        self._block_size = block_size
        self._shortest = shortest
        self._lone = lone
        self._opted_out = opted_out
        self._index = {digest: i for i, digest in enumerate(shared)}
        self._seen: dict[int, NDArray[np.int64]] = {}
        self._chained: dict[tuple[bytes, bytes], bytes] = {}

    def build(
        self,
        agent: str | None,
        segments: tuple[Segment, ...],
        places: Sequence[Place],
        mirror: Mirror | None,
        prefix: int,
        makes: frozenset[bytes] | set[bytes],
    ) -> AgentLayout:
        length = places[-1][2] if places else 0
        layout = AgentLayout(agent, segments, length, mirror if prefix else None, prefix)
        exact = True
        if prefix:
            assert mirror is not None
            layout.uses = [
                use.cut(prefix - use.delta, self._block_size)
                for use in mirror.uses
                if use.delta < prefix
            ]
            layout.append(prefix, Origin.EARLIER)
            exact = mirror.exact_length >= prefix
            layout.exact_length = min(prefix, mirror.exact_length)
        earlier = {use.delta: use.master for use in layout.uses}
        # `run` is the context in which the last reused Master was computed, followed by what has
        # come since: a Master of that very context continues a run.
        contexts = _Contexts(segments)
        run = b""
        left = np.zeros(len(self._index), dtype=np.int64)  # shared tokens so far, by segment
        left_tokens = 0
        repair = self._selection.rows_of if isinstance(self._selection, LeadingTokens) else None
        for i, (segment, begin, end) in enumerate(places):
            source_context = run
            if begin < prefix:
                if begin in earlier:
                    source_context = earlier[begin].context
                self._compute(layout, max(begin, prefix), end)
            elif not _may_share(segment, end - begin, self._shortest):
                self._compute(layout, begin, end)
            elif segment.digest in makes and segment.digest not in self._made:
                source_context = contexts.before(i)
                self._make(layout, segment, begin, source_context, exact, places[:i])
            else:
                found = self._lookup(segment)
                is_exact = (
                    found is not None
                    and exact
                    and found[0].exact
                    and found[0].context == contexts.before(i)
                )
                computes = segment.digest in self._lone or self._opted_out.holds(agent, segment)
                if found is None or (computes and not is_exact):
                    self._compute(layout, begin, end)
                else:
                    master, rows = found
                    repaired = 0
                    if repair and not is_exact and master.context != run:
                        unseen = left_tokens - int(left @ self._seen_by(master))
                        repaired = min(repair(unseen, length), rows)
                    self._reuse(layout, master, begin, rows, is_exact, repaired)
                    self._compute(layout, begin + rows, end)
                    exact = exact and is_exact
                    source_context = master.context
            if exact:
                layout.exact_length = end
            if segment.is_shared:
                left[self._index[segment.digest]] += end - begin
                left_tokens += end - begin
            run = self._chain(source_context, segment.digest)
        self._always_compute_last_row(layout)
        self._collect_own(layout)
        return layout

    def _lookup(self, segment: Segment) -> tuple[Master, int] | None:
        if segment.digest in self._made:
            return self._made[segment.digest], segment.length
        return self._find(segment)

    def _make(
        self,
        layout: AgentLayout,
        segment: Segment,
        begin: int,
        context: bytes,
        exact: bool,
        left: Sequence[Place],
    ) -> None:
        seen = frozenset(other.digest for other, _, _ in left if other.is_shared)
        length = segment.length
        master = Master(segment.digest, length, begin, context, exact, seen)
        self._made[segment.digest] = master
        use = Use(master, begin, length, masks_of_first(0, length, self._block_size))
        layout.uses.append(use)
        layout.made.append(use)
        layout.append(begin + length, Origin.MASTER)

    def _seen_by(self, master: Master) -> NDArray[np.int64]:
        """Which of the round's shared segments a Master has seen, as 0 and 1."""
        if id(master) not in self._seen:
            known = [self._index[digest] for digest in master.seen if digest in self._index]
            seen = self._seen[id(master)] = np.zeros(len(self._index), dtype=np.int64)
            seen[known] = 1
        return self._seen[id(master)]

    def _chain(self, context: bytes, digest: bytes) -> bytes:
        """`chain`, once: runs behind one Master are alike in all prompts."""
        chained = self._chained.get((context, digest))
        if chained is None:
            chained = self._chained[context, digest] = chain(context, digest)
        return chained

    def _compute(self, layout: AgentLayout, begin: int, end: int) -> None:
        if begin < end:
            layout.append(end, Origin.OWN)

    def _reuse(
        self,
        layout: AgentLayout,
        master: Master,
        delta: int,
        rows: int,
        is_exact: bool,
        repaired: int,
    ) -> None:
        use = Use(master, delta, rows, masks_of_first(repaired, rows, self._block_size))
        layout.uses.append(use)
        if is_exact:
            layout.append(delta + rows, Origin.EXACT)
            return
        if repaired:
            layout.append(delta + repaired, Origin.REPAIRED)
        if isinstance(self._selection, KeyDeviation):
            layout.candidates.append(use)
        if repaired < rows:
            layout.append(delta + rows, Origin.REUSED)

    def _always_compute_last_row(self, layout: AgentLayout) -> None:
        """Its logits are what the prompt is for."""
        if not layout.ends or layout.agent is None:
            return
        if layout.origins[-1] not in (Origin.EXACT, Origin.REUSED):
            return
        use = layout.uses[-1]
        use.override(np.array([layout.length - 1 - use.delta], dtype=np.int32), self._block_size)
        begin = layout.ends[-2] if len(layout.ends) > 1 else 0
        if layout.length - begin == 1:
            layout.origins[-1] = Origin.REPAIRED
            return
        layout.ends[-1] = layout.length - 1
        layout.append(layout.length, Origin.REPAIRED)

    def _collect_own(self, layout: AgentLayout) -> None:
        ranges = [
            np.arange(begin, end, dtype=np.int32)
            for begin, end, origin in layout.spans
            if origin in (Origin.OWN, Origin.REPAIRED)
        ]
        if ranges:
            layout.own = np.concatenate(ranges)
