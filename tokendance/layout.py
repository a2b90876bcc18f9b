"""What a round reuses and what it computes: decided by content, before any page is taken.

The result for each agent is a list of spans that tile its prompt. Nothing here touches a device or
changes a store; `KVCollector.plan` leases pages for what this decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from tokendance.mirror import Master, Mirror, Use, empty_masks
from tokendance.rounds import IntArray
from tokendance.segments import Segment, chain
from tokendance.selection import Everything, KeyDeviation, LeadingTokens, Selection

Find = Callable[[Segment], tuple[Master, int] | None]
"""The stored Master of a segment and how many of the segment's rows it has, or None."""


_ROUNDING = 1e-9  # of shares that are compared


class Source(Enum):
    """Where the Master of a segment that is not stored comes from.

    MASTER: an agent of the round computes it in its own prompt (DESIGN.md section 4).
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


@dataclass(frozen=True)
class Span:
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
        spans: they tile the prompt.
        context: chained digest of the whole prompt.
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
    spans: list[Span] = field(default_factory=list)
    context: bytes = b""
    exact_length: int = 0
    logit_rows: int = 1


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
    prefixes = {
        agent: _own_prefix(agent, segments, mirrors.get(agent), opted_out)
        for agent, segments in tokens.items()
    }
    wanted = {
        agent: [
            segment
            for segment, begin in _with_positions(segments)
            if _may_share(segment, shortest) and begin >= prefixes[agent] and find(segment) is None
        ]
        for agent, segments in tokens.items()
    }
    made: dict[bytes, Master] = {}
    layouts: list[AgentLayout] = []
    repairs_runs = isinstance(selection, LeadingTokens) and source is not Source.ALONE
    lone = _lone(tokens) if repairs_runs else frozenset[bytes]()
    builder = _Builder(find, made, selection, block_size, shortest, lone, opted_out)
    # Without context almost nothing is exact: under Everything no Master is worth computing alone.
    if source is Source.ALONE and not isinstance(selection, Everything):
        alone = {
            segment.digest: segment
            for agent, segments in wanted.items()
            for segment in segments
            if not opted_out.holds(agent, segment)
        }
        for segment in alone.values():
            layouts.append(builder.build(None, (segment,), None, 0, {segment.digest}))
        order, makes = list(tokens), dict.fromkeys(tokens, frozenset[bytes]())
    else:
        # Only where inexact rows are reused does it matter what a Master has seen.
        repairs = isinstance(selection, LeadingTokens | KeyDeviation)
        order, makes = _master_agents(wanted, tokens if repairs else {})
    for agent in order:
        layouts.append(
            builder.build(agent, tokens[agent], mirrors.get(agent), prefixes[agent], makes[agent])
        )
    return layouts


def _with_positions(segments: Sequence[Segment]) -> list[tuple[Segment, int]]:
    result, position = [], 0
    for segment in segments:
        result.append((segment, position))
        position += segment.length
    return result


def _may_share(segment: Segment, shortest: int) -> bool:
    return segment.is_shared and segment.length >= shortest


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
    length = np.array(list(shared.values()), dtype=np.float64)
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
    for digest in covered:
        d = index[digest]
        users = wanted[:, d].copy()
        users[maker] = False
        before = (place < place[:, d : d + 1]) & wanted[:, d : d + 1]
        tokens = before * length
        total = tokens.sum(axis=1, keepdims=True)
        # [user, maker]: share of the shared tokens in front of the segment that the maker never saw
        unseen = (total - tokens @ before.T) / np.maximum(total, 1)
        alike = users & (context[:, d] == context[maker, d])
        # What follows holds for each agent as the other maker, who is no user of its own Masters.
        others = users.sum() - users
        now = (unseen[users, maker].sum() - unseen[:, maker] * users) / np.maximum(others, 1)
        then = unseen[users].sum(axis=0) / np.maximum(others, 1)
        takes[:, d] = users & (others > 0) & (alike.sum() - alike == 0)
        takes[:, d] &= (now > 1 / 4 + _ROUNDING) & (then <= 2 / 3 * now + _ROUNDING)
        gain += (now - then) * takes[:, d]
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
    ) -> None:
        self._find = find
        self._made = made
        self._selection = selection
        self._block_size = block_size
        self._shortest = shortest
        self._lone = lone
        self._opted_out = opted_out

    def build(
        self,
        agent: str | None,
        segments: tuple[Segment, ...],
        mirror: Mirror | None,
        prefix: int,
        makes: frozenset[bytes] | set[bytes],
    ) -> AgentLayout:
        length = sum(segment.length for segment in segments)
        layout = AgentLayout(agent, segments, length, mirror if prefix else None, prefix)
        exact = True
        if prefix:
            assert mirror is not None
            layout.uses = [
                use.cut(prefix - use.delta, self._block_size)
                for use in mirror.uses
                if use.delta < prefix
            ]
            layout.spans.append(Span(0, prefix, Origin.EARLIER))
            exact = mirror.exact_length >= prefix
            layout.exact_length = min(prefix, mirror.exact_length)
        earlier = {use.delta: use.master for use in layout.uses}
        # `run` is the context in which the last reused Master was computed, followed by what has
        # come since: a Master of that very context continues a run. `context` is the prompt's own.
        context = run = b""
        left: dict[bytes, int] = {}  # shared tokens so far, by digest
        left_tokens = 0
        for segment, begin in _with_positions(segments):
            end = begin + segment.length
            source_context = run
            if begin < prefix:
                if begin in earlier:
                    source_context = earlier[begin].context
                self._compute(layout, max(begin, prefix), end)
            elif not _may_share(segment, self._shortest):
                self._compute(layout, begin, end)
            elif segment.digest in makes and segment.digest not in self._made:
                seen = frozenset(left)
                master = Master(segment.digest, segment.length, begin, context, exact, seen)
                self._made[segment.digest] = master
                use = Use(master, begin, segment.length, empty_masks(end - begin, self._block_size))
                layout.uses.append(use)
                layout.made.append(use)
                layout.spans.append(Span(begin, end, Origin.MASTER))
                source_context = context
            else:
                found = self._lookup(segment)
                is_exact = (
                    found is not None and exact and found[0].exact and found[0].context == context
                )
                computes = segment.digest in self._lone or self._opted_out.holds(agent, segment)
                if found is None or (computes and not is_exact):
                    self._compute(layout, begin, end)
                else:
                    master, rows = found
                    repaired = 0
                    if isinstance(self._selection, LeadingTokens) and master.context != run:
                        seen_tokens = 0
                        if self._selection.unseen is not None:
                            seen_tokens = sum(map(left.__getitem__, left.keys() & master.seen))
                        repaired = self._selection.rows_of(left_tokens - seen_tokens)
                    self._reuse(layout, master, begin, rows, is_exact, repaired)
                    self._compute(layout, begin + rows, end)
                    exact = exact and is_exact
                    source_context = master.context
            if exact:
                layout.exact_length = end
            if segment.is_shared:
                left[segment.digest] = left.get(segment.digest, 0) + segment.length
                left_tokens += segment.length
            context = chain(context, segment.digest)
            run = chain(source_context, segment.digest)
        layout.context = context
        self._always_compute_last_row(layout)
        self._collect_own(layout)
        return layout

    def _lookup(self, segment: Segment) -> tuple[Master, int] | None:
        if segment.digest in self._made:
            return self._made[segment.digest], segment.length
        return self._find(segment)

    def _compute(self, layout: AgentLayout, begin: int, end: int) -> None:
        if begin < end:
            layout.spans.append(Span(begin, end, Origin.OWN))

    def _reuse(
        self,
        layout: AgentLayout,
        master: Master,
        delta: int,
        rows: int,
        is_exact: bool,
        repaired: int,
    ) -> None:
        use = Use(master, delta, rows, empty_masks(rows, self._block_size))
        layout.uses.append(use)
        if is_exact:
            layout.spans.append(Span(delta, delta + rows, Origin.EXACT))
            return
        repaired = min(repaired, rows)
        if repaired:
            use.override_first(repaired, self._block_size)
            layout.spans.append(Span(delta, delta + repaired, Origin.REPAIRED))
        if isinstance(self._selection, KeyDeviation):
            layout.candidates.append(use)
        if repaired < rows:
            layout.spans.append(Span(delta + repaired, delta + rows, Origin.REUSED))

    def _always_compute_last_row(self, layout: AgentLayout) -> None:
        """Its logits are what the prompt is for."""
        if not layout.spans or layout.agent is None:
            return
        last = layout.spans[-1]
        if last.origin not in (Origin.EXACT, Origin.REUSED):
            return
        use = layout.uses[-1]
        use.override(np.array([layout.length - 1 - use.delta], dtype=np.int32), self._block_size)
        layout.spans[-1:] = [
            Span(last.begin, last.end - 1, last.origin),
            Span(last.end - 1, last.end, Origin.REPAIRED),
        ]
        if last.end - last.begin == 1:
            del layout.spans[-2]

    def _collect_own(self, layout: AgentLayout) -> None:
        ranges = [
            np.arange(span.begin, span.end, dtype=np.int32)
            for span in layout.spans
            if span.origin in (Origin.OWN, Origin.REPAIRED)
        ]
        if ranges:
            layout.own = np.concatenate(ranges)
