"""What a round reuses and what it computes: decided by content, before any page is taken.

The result for each agent is a list of spans that tile its prompt. Nothing here touches a device or
changes a store; `KVCollector.plan` leases pages for what this decides. The loops over places and
rows are C++ (csrc/planner/decide.cpp): here prompts become numbers, and numbers decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import chain as put_together
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokendance import _planner
from tokendance.host.mirror import Master, Mirror, Use, Uses, pages_for
from tokendance.host.round import IntArray
from tokendance.host.segments import Segment, chain, repeated
from tokendance.host.selection import Everything, KeyDeviation, LeadingTokens, Selection

Find = Callable[[Segment], tuple[Master, int] | None]
"""The stored Master of a segment and how many of the segment's rows it has, or None."""


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


Sources: TypeAlias = Source | Callable[[Segment], str]
"""One for all segments, or the name of each one's by the segment."""


def source_of(source: Sources, segment: Segment) -> Source:
    """Raises ``ValueError`` for a name that is none of a `Source`."""
    if isinstance(source, Source):
        return source
    name = source(segment)
    try:
        return Source(name)
    except ValueError:
        known = [one.value for one in Source]
        raise ValueError(f"source: expected one of {known}, got {name!r} of {segment}") from None


class RowKind(Enum):
    """Where rows of a prompt come from."""

    EARLIER = "earlier"  # the agent's own KV of an earlier round, at the same positions
    OWN = "own"  # computed, kept by this agent
    MASTER = "master"  # computed, the first copy, kept as a Master
    EXACT = "exact"  # reused from a Master of the same context
    REUSED = "reused"  # reused from a Master of another context
    REPAIRED = "repaired"  # reused, but recomputed in this agent's context and overridden


@dataclass(frozen=True)
class Company:
    """What agents that join a round know of those that came before.

    Attributes:
        segments: digests, of those among the joining agents' segments that agents before have.
        replaceable: digests of segments whose Master one of them made, in no other's place, and
            that no other takes over exactly. An agent that has more in front may make such a Master
            again.
    """

    segments: Set[bytes]
    replaceable: Set[bytes]


@dataclass(frozen=True)
class OptedOut:
    """Agents and segments restricted to exact reuse, as under `Everything`.

    Attributes:
        agents: names. Such an agent takes over no inexact row; others may reuse what it computes.
        segments: digests. Such a segment is computed in every prompt.
    """

    agents: frozenset[str] = frozenset()
    segments: frozenset[bytes] = frozenset()


_MAX_LENGTH = np.iinfo(np.int32).max  # positions are int32

ROW_KINDS = tuple(RowKind)
"""By the numbers that the planner has for them."""


class Span(NamedTuple):
    """Rows ``begin .. end - 1`` of a prompt and where they come from."""

    begin: int
    end: int
    kind: RowKind


@dataclass(eq=False)
class AgentDecision:
    """What one agent reuses and computes.

    Attributes:
        agent: its name; of a segment that is computed alone, None.
        segments, length: the prompt.
        earlier: the agent's Mirror whose first ``prefix`` rows are taken over, or None.
        prefix: rows taken over.
        uses: of the whole prompt; overrides of selected rows are marked.
        made: uses among ``uses`` whose Master this agent computes.
        candidates: uses whose rows `KeyDeviation` chooses while the round runs.
        own: int32, positions that the agent computes and keeps, ascending.
        ends, kinds: of the spans that tile the prompt: where each ends, int32, and the number in
            `ROW_KINDS` of where its rows come from, uint8.
        exact_length: rows before the first inexact one.
        logit_rows: how many of the last rows the engine wants logits of.
    """

    agent: str | None
    segments: tuple[Segment, ...]
    length: int
    earlier: Mirror | None
    prefix: int
    uses: Uses
    made: list[Use]
    candidates: list[Use]
    own: IntArray
    ends: IntArray
    kinds: NDArray[np.uint8]
    exact_length: int
    logit_rows: int = 1

    @property
    def spans(self) -> list[Span]:
        ends = self.ends.tolist()
        kinds = [ROW_KINDS[number] for number in self.kinds]
        return [Span(*span) for span in zip([0, *ends], ends, kinds, strict=False)]

    @cached_property
    def context(self) -> bytes:
        """Chained digest of the whole prompt."""
        context = b""
        for segment in self.segments:
            context = chain(context, segment.digest)
        return context


def decide(
    prompts: Mapping[str, Sequence[Segment]],
    find: Find,
    mirrors: Mapping[str, Mirror],
    selection: Selection,
    source: Sources,
    block_size: int,
    max_length: int = _MAX_LENGTH,
    opted_out: OptedOut = OptedOut(),
    company: Company | None = None,
) -> list[AgentDecision]:
    """Decides a round. The decisions come in the order in which they must be computed.

    Args:
        prompts: the segments of every agent's prompt. Empty segments do not count.
        find: looks a segment up among the stored Masters.
        mirrors: the agents' KV of earlier rounds.
        selection: which reused rows are recomputed.
        source: where Masters that are not stored come from.
        block_size: rows of a page. A shared segment shorter than half a page is not worth a page of
            its own: every agent computes it.
        max_length: of a prompt, in tokens.
        opted_out: who and what is computed whatever the selection.
        company: the round's agents that came before; None where these are the first.

    Raises:
        ValueError: a prompt is longer than that, or an unknown source of a segment.
    """
    numbers = _Numbers(prompts, _is_alone(selection, source))
    for agent, length in zip(prompts, numbers.lengths.tolist(), strict=True):
        if length > max_length:
            raise ValueError(
                f"prompts[{agent!r}]: expected at most {max_length} tokens (the rotation tables' "
                f"positions), got {length}"
            )
    if isinstance(selection, Everything):
        opted_out = OptedOut(frozenset(prompts))
    earlier = [
        _taken_over(agent, numbers.prompts[a], mirrors.get(agent), opted_out)
        for a, agent in enumerate(prompts)
    ]
    prefix = np.array([rows for _, rows in earlier], dtype=np.int32)
    round_ = _planner.RoundDecision(
        numbers.indptr, numbers.segment, numbers.is_shared, numbers.length, prefix
    )
    masters = _match(round_, numbers, find, earlier, selection, block_size, opted_out, company)
    repaired = np.zeros(len(numbers.segment), dtype=np.int32)
    if isinstance(selection, LeadingTokens):
        unseen = round_.unseen
        starts = np.flatnonzero(unseen >= 0)
        prompt = np.repeat(numbers.lengths, np.diff(numbers.indptr))
        repaired[starts] = selection.rows_of(unseen[starts], prompt[starts])
    return _decisions(numbers, masters, earlier, round_, repaired, selection, block_size)


def _is_alone(selection: Selection, source: Sources) -> Callable[[Segment], bool]:
    """Which segments are computed alone."""
    # Without context almost nothing is exact: under Everything no Master is worth computing alone.
    if isinstance(selection, Everything):
        return lambda _: False
    return lambda segment: segment.is_shared and source_of(source, segment) is Source.ALONE


_Earlier = tuple[Mirror | None, int]
"""An agent's earlier KV, and how many of its rows the prompt takes over; None where none."""


def _match(
    round_: _planner.RoundDecision,
    numbers: _Numbers,
    find: Find,
    earlier: Sequence[_Earlier],
    selection: Selection,
    block_size: int,
    opted_out: OptedOut,
    company: Company | None,
) -> list[Master]:
    """Finds what the round reuses and makes; returns all Masters, by number."""
    context = np.full(len(numbers.segment), -1, dtype=np.int32)
    for a, (mirror, _) in enumerate(earlier):
        if mirror is not None:
            context[numbers.places(a)] = numbers.contexts_of(mirror, a)
    found = [find(one) if one.is_shared else None for one in numbers.segments]
    masters = [one[0] for one in found if one]
    stored = np.full(len(found), -1, dtype=np.int32)
    stored[[e for e, one in enumerate(found) if one]] = np.arange(len(masters))
    computed = numbers.of_content(opted_out.segments)
    chooses_lone = isinstance(selection, LeadingTokens)
    if chooses_lone and company is not None:
        lone = numbers.lone(company.segments, (numbers.is_alone == 0) & (stored >= 0))
        computed |= numbers.among(lone)
    round_.match(
        exact_prefix=np.array(
            [min(rows, mirror.exact_length) if mirror else 0 for mirror, rows in earlier],
            dtype=np.int32,
        ),
        earlier_context=context,
        agent_computes=np.array([a in opted_out.agents for a in numbers.agents], dtype=np.uint8),
        segment_computes=computed,
        stored=stored,
        stored_rows=np.array([one[1] if one else 0 for one in found], dtype=np.int32),
        master_context=np.array([numbers.context(m.context) for m in masters], dtype=np.int32),
        master_is_exact=np.array([m.exact for m in masters], dtype=np.uint8),
        master_has_seen=numbers.seen_by(masters),
        known=numbers.among(company.segments if company else frozenset()),
        replaceable=numbers.among(company.replaceable if company else frozenset()),
        shortest=block_size // 2,
        alone=numbers.is_alone,
        # Only where inexact rows are reused does it matter what a Master has seen.
        informed=isinstance(selection, LeadingTokens | KeyDeviation),
        lone=chooses_lone and company is None,
        chain=numbers.chain,
    )
    for agent, segment, origin, number, place, is_exact in round_.made:
        digest, length = numbers.segments[segment].digest, int(numbers.length[segment])
        seen = numbers.shared_before(agent, place)
        made = Master(digest, length, origin, numbers.digests[number], is_exact, seen)
        made.replaces = bool(stored[segment] >= 0)
        masters.append(made)
    return masters


def _decisions(
    numbers: _Numbers,
    masters: Sequence[Master],
    earlier: Sequence[_Earlier],
    round_: _planner.RoundDecision,
    repaired: IntArray,
    selection: Selection,
    block_size: int,
) -> list[AgentDecision]:
    """The decisions in the order in which they must be computed."""
    made = round_.made
    decisions = [
        _decided_alone(master, numbers.segments[segment], block_size)
        for master, (agent, segment, *_) in zip(
            masters[len(masters) - len(made) :], made, strict=True
        )
        if agent < 0
    ]
    tiles = round_.tile(repaired, block_size)
    serial = np.array([master.serial for master in masters], dtype=np.int64)
    exact_length = round_.exact_length.tolist()
    makers = {agent for agent, *_ in made}
    chooses = isinstance(selection, KeyDeviation)
    for a in round_.order.tolist():
        use, mask = _of(tiles["use_indptr"], a), _of(tiles["mask_indptr"], a)
        span, own = _of(tiles["span_indptr"], a), _of(tiles["own_indptr"], a)
        # Copies: who keeps a part does not keep the round.
        uses = Uses(
            [masters[master] for master in tiles["use_master"][use].tolist()],
            tiles["use_delta"][use].copy(),
            tiles["use_length"][use].copy(),
            tiles["masks"][mask].copy(),
            block_size,
            serial[tiles["use_master"][use]],
        )
        mirror, prefix = earlier[a]
        carried = 0
        if mirror is not None:
            taken = mirror.uses.cut(prefix)
            uses, carried = taken.followed_by(uses), len(taken)
        made_uses: list[Use] = []
        candidates: list[Use] = []
        if a in makers or chooses:
            for i, number in enumerate(tiles["use_kind"][use].tolist(), carried):
                if ROW_KINDS[number] is RowKind.MASTER:
                    made_uses.append(uses[i])
                elif ROW_KINDS[number] is RowKind.REUSED and chooses:
                    candidates.append(uses[i])
        decisions.append(
            AgentDecision(
                numbers.agents[a],
                numbers.prompts[a],
                int(numbers.lengths[a]),
                mirror,
                prefix,
                uses,
                made_uses,
                candidates,
                tiles["own"][own].copy(),
                tiles["span_end"][span].copy(),
                tiles["span_kind"][span].copy(),
                exact_length[a],
            )
        )
    return decisions


def _of(indptr: IntArray, index: int) -> slice:
    return slice(int(indptr[index]), int(indptr[index + 1]))


def _decided_alone(master: Master, segment: Segment, block_size: int) -> AgentDecision:
    """Of a segment that is computed without a context, for no agent."""
    length = master.length
    masks = np.zeros(pages_for(length, block_size), dtype=np.uint32)
    uses = Uses.of([Use(master, 0, length, masks)], block_size)
    return AgentDecision(
        None,
        (segment,),
        length,
        None,
        0,
        uses,
        [uses[0]],
        [],
        np.empty(0, dtype=np.int32),
        np.array([length], dtype=np.int32),
        np.array([ROW_KINDS.index(RowKind.MASTER)], dtype=np.uint8),
        length,
    )


class _Numbers:
    """The prompts of a round in numbers: segments of one digest have one, contexts too.

    A shared segment that a prompt holds again has another number there (`repeated`), unless it is
    computed alone: then it is the same wherever it stands.

    Attributes:
        agents: their names.
        prompts: each agent's segments, without empty ones.
        lengths: int64, tokens of each prompt.
        indptr: int32 ``[N + 1]``, places of each prompt.
        segment: int32, by place, the number of its segment.
        is_shared: uint8, by place.
        segments: by number; of several with one digest, one that is shared if there is one.
        contents: by number, the digest of the segment's content.
        is_alone: uint8, by number, whether it is computed alone.
        length: int32, by number, tokens.
        number: of a digest.
        digests: of contexts, by number; 0 is the empty context.
    """

    def __init__(
        self, prompts: Mapping[str, Sequence[Segment]], is_alone: Callable[[Segment], bool]
    ) -> None:
        self.agents = list(prompts)
        self.prompts = [tuple(segments) for segments in prompts.values()]
        # A segment stands in many prompts: what is asked of it is asked once.
        everywhere = list(put_together.from_iterable(self.prompts))
        keys = list(map(id, everywhere))
        objects = dict(zip(keys, everywhere, strict=True))
        if not all(map(len, objects.values())):
            self.prompts = [tuple(filter(len, segments)) for segments in self.prompts]
            keys = list(map(id, put_together.from_iterable(self.prompts)))
            objects = {key: one for key, one in objects.items() if len(one)}
        self.number: dict[bytes, int] = {}
        self.segments: list[Segment] = []
        for one in objects.values():
            e = self.number.setdefault(one.digest, len(self.segments))
            if e == len(self.segments):
                self.segments.append(one)
            elif one.is_shared:
                self.segments[e] = one
        every = list(objects.values())
        number = np.array([self.number[one.digest] for one in every], dtype=np.int32)
        shared = np.array([one.is_shared for one in every], dtype=np.uint8)
        self.contents = [one.digest for one in self.segments]
        alone = [is_alone(one) for one in self.segments]
        self.indptr = np.zeros(len(self.prompts) + 1, dtype=np.int32)
        np.cumsum([len(segments) for segments in self.prompts], out=self.indptr[1:])
        index = {key: i for i, key in enumerate(objects)}
        places = np.fromiter(map(index.__getitem__, keys), dtype=np.intp, count=len(keys))
        self.segment = number[places]
        self.is_shared = shared[places]
        self.is_alone = np.array(alone, dtype=np.uint8)
        self._tell_repeats_apart()
        self.length = np.array([len(one) for one in self.segments], dtype=np.int32)
        ends = np.concatenate([[0], np.cumsum(self.length[self.segment], dtype=np.int64)])
        self.lengths = np.diff(ends[self.indptr])
        self.digests = [b""]
        self._context = {b"": 0}
        self._shared: dict[int, tuple[list[bytes], list[int]]] = {}

    def _tell_repeats_apart(self) -> None:
        """Gives places of a segment that stood in the same prompt before other numbers."""
        agent = np.repeat(np.arange(len(self.prompts)), np.diff(self.indptr))
        places = np.flatnonzero((self.is_shared != 0) & (self.is_alone[self.segment] == 0))
        pairs = agent[places] * len(self.segments) + self.segment[places]
        order = np.argsort(pairs, kind="stable")
        is_first = np.diff(pairs[order], prepend=-1) != 0
        if is_first.all():
            return
        starts = np.flatnonzero(is_first)
        index = np.arange(len(order)) - starts[np.cumsum(is_first) - 1]
        for place, i in zip(places[order[~is_first]].tolist(), index[~is_first], strict=True):
            e = int(self.segment[place])
            again = repeated(self.segments[e], int(i))
            number = self.number.setdefault(again.digest, len(self.segments))
            if number == len(self.segments):
                self.segments.append(again)
                self.contents.append(self.contents[e])
            self.segment[place] = number
        self.is_alone = np.pad(self.is_alone, (0, len(self.segments) - len(self.is_alone)))

    def context(self, digest: bytes) -> int:
        """The number of a context."""
        number = self._context.setdefault(digest, len(self.digests))
        if number == len(self.digests):
            self.digests.append(digest)
        return number

    def chain(self, context: int, segment: int) -> int:
        """The number of a context followed by a segment."""
        return self.context(chain(self.digests[context], self.contents[segment]))

    def places(self, agent: int) -> slice:
        """Of an agent's prompt."""
        return _of(self.indptr, agent)

    def contexts_of(self, mirror: Mirror, agent: int) -> IntArray:
        """Of the agent's places: where a Master of its earlier KV begins, that Master's context."""
        lengths = self.length[self.segment[self.places(agent)]]
        begins = np.cumsum(lengths) - lengths
        earlier = {use.delta: self.context(use.master.context) for use in mirror.uses}
        return np.array([earlier.get(begin, -1) for begin in begins.tolist()], dtype=np.int32)

    def seen_by(self, masters: Sequence[Master]) -> NDArray[np.uint8]:
        """Which segments of the round Masters have seen, as 0 and 1."""
        seen = np.zeros((len(masters), len(self.segments)), dtype=np.uint8)
        for line, master in zip(seen, masters, strict=True):
            line[[self.number[digest] for digest in master.seen if digest in self.number]] = 1
        return seen

    def among(self, digests: Set[bytes]) -> NDArray[np.uint8]:
        """Which segments are among these, as 0 and 1."""
        return np.array([one.digest in digests for one in self.segments], dtype=np.uint8)

    def of_content(self, digests: Set[bytes]) -> NDArray[np.uint8]:
        """Which segments have a content of these digests, as 0 and 1."""
        return np.array([one in digests for one in self.contents], dtype=np.uint8)

    def lone(self, company: Set[bytes], among: NDArray[np.bool_]) -> frozenset[bytes]:
        """Digests of the segments that one of these agents has, and none that came before.

        Args:
            company: digests of the segments that agents have who came before.
            among: which segments are asked for: those that have a Master of another context. One
                that is computed alone carries nothing of any context, and a new one is the agent's
                own.
        """
        agent = np.repeat(np.arange(len(self.prompts)), np.diff(self.indptr))
        pairs = np.unique(np.stack([self.segment, agent]), axis=1)
        users = np.bincount(pairs[0], minlength=len(self.segments))
        lone = (users == 1) & among
        return frozenset(self.segments[e].digest for e in np.flatnonzero(lone)) - company

    def shared_before(self, agent: int, place: int) -> frozenset[bytes]:
        """Digests of the shared segments of the agent's prompt in front of a place."""
        if agent < 0:
            return frozenset()
        if agent not in self._shared:
            shared = self.is_shared[self.places(agent)] != 0
            mine = self.segment[self.places(agent)][shared].tolist()
            digests = [self.segments[number].digest for number in mine]
            self._shared[agent] = digests, np.cumsum(shared).tolist()
        digests, counts = self._shared[agent]
        index = place - int(self.indptr[agent])
        return frozenset(digests[: counts[index - 1] if index else 0])


def foreign_uses(mirror: Mirror) -> list[Use]:
    """Uses whose Master was computed in another context than the agent's own."""
    contexts, context, position = {}, b"", 0
    for segment in mirror.segments:
        contexts[position] = context
        context = chain(context, segment.digest)
        position += segment.length
    contexts[position] = context
    return [use for use in mirror.uses if use.master.context != contexts[use.delta]]


def _taken_over(
    agent: str, segments: Sequence[Segment], mirror: Mirror | None, opted_out: OptedOut
) -> _Earlier:
    """The agent's earlier KV and its rows that the prompt begins with; never the prompt's last row.

    They end before whatever has opted out since it was reused.
    """
    if mirror is None:
        return None, 0
    prefix = _common_rows(segments, mirror.segments)
    if agent in opted_out.agents:
        prefix = min(prefix, mirror.exact_length)
    elif opted_out.segments:
        # By the segment, not by its Master: one that was found by its stem has the stem's digest.
        starts = np.cumsum([0, *[segment.length for segment in mirror.segments]]).tolist()
        out = {
            start
            for start, segment in zip(starts, mirror.segments, strict=False)
            if segment.length and segment.digest in opted_out.segments
        }
        foreign = [use.delta for use in foreign_uses(mirror) if use.delta in out]
        prefix = min([prefix, *foreign])
    total = sum(segment.length for segment in segments)
    prefix = min(prefix, max(total - 1, 0))
    return (mirror if prefix else None), prefix


def _common_rows(segments: Sequence[Segment], before: Sequence[Segment]) -> int:
    """Rows that both begin with.

    A private segment is compared by its tokens, however the earlier prompt was cut there: what was
    decoded is a segment of its own, and part of a longer one in the next prompt. A shared one may
    be there as a Master, which may have all its rows: it is compared so only where the earlier
    prompt ends in it and has half of it at least, as what was decoded and a separator behind it.
    """
    rows, at, inside = 0, 0, 0  # `inside` tokens of the earlier segment `at` are compared
    for new in segments:
        if at == len(before):
            break
        old = before[at]
        if not inside and new.digest == old.digest:
            rows, at = rows + new.length, at + 1
            continue
        if not inside and new.stem == old.digest:  # an output whose last token was never fed
            return rows + old.length
        if new.is_shared:
            left = sum(one.length for one in before[at:]) - inside
            if not left <= new.length <= 2 * left:
                break
        compared = 0
        while compared < new.length and at < len(before) and before[at].space == new.space:
            theirs = before[at].token_ids[inside:]
            mine = new.token_ids[compared : compared + len(theirs)]
            differs = np.flatnonzero(mine != theirs[: len(mine)])
            if len(differs):
                return rows + (0 if new.is_shared else compared + int(differs[0]))
            compared += len(mine)
            inside += len(mine)
            if inside == before[at].length:
                at, inside = at + 1, 0
        if new.is_shared and at < len(before):  # of another tenant
            break
        rows += compared
        if compared < new.length:
            break
    return rows
