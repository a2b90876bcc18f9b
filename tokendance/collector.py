"""`KVCollector`: one collective reuse step for all agents of a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from tokendance.audit import Audit, tell
from tokendance.decoder import Decoder
from tokendance.device.executor import Reduce
from tokendance.device.ranges import marked
from tokendance.host.decide import OptedOut, Source, Sources
from tokendance.host.gate import (
    Accounts,
    AuditReport,
    CollectorStats,
    Gate,
    draw_rows,
    is_drawn,
    judge,
)
from tokendance.host.plan import Plan, Policy
from tokendance.host.segments import Segment, TokenIds
from tokendance.host.selection import (
    DEFAULT,
    Everything,
    KeyDeviation,
    LeadingTokens,
    Nothing,
    Selection,
)
from tokendance.host.uncopied import Uncopied
from tokendance.step import Step
from tokendance.store import DiffStore


class KVCollector(
    Uncopied, instead="make another KVCollector over a store that DiffStore.open has read"
):
    """Decides what a round reuses and recomputes, and runs it step by step (docs/guide.md).

    Args:
        store: where Masters and Mirrors are kept.
        source: where the Master of a segment that is not stored comes from. ``"master"``: one agent
            of the round computes it in its own prompt, so that the attention between the shared
            segments is kept. ``"alone"``: it is computed without any context, as
            position-independent caching does (EPIC, CacheBlend); no trace of an agent's private
            context reaches another. ``"producer"``: as ``"master"``, and decoded outputs become
            Masters as their agents computed them. A function of a segment that returns one of these
            names is taken, too. It is asked about the shared segments of each planned round, and
            about decoded outputs when they are committed. If it returns ``"producer"`` for outputs
            and ``"alone"`` for the rest, what agents wrote is kept as they wrote it, and what they
            were given is computed without a context.
        selection: which reused rows are recomputed; default ``LeadingTokens(12)``.
        gate: what `audit` may find before it warns, or makes agents and segments fall back.

    Raises:
        ValueError: an unknown source, selection or gate.

    Any number of threads may use it; see `DiffStore`.
    """

    def __init__(
        self,
        store: DiffStore,
        source: str | Callable[[Segment], str] = "master",
        selection: Selection | None = None,
        gate: Gate | None = None,
    ) -> None:
        known = [one.value for one in Source]
        if not callable(source) and source not in known:
            raise ValueError(f"source: expected one of {known}, got {source!r}")
        selection = DEFAULT if selection is None else selection
        if not isinstance(selection, LeadingTokens | KeyDeviation | Everything | Nothing):
            raise ValueError(
                "selection: expected LeadingTokens, KeyDeviation, Everything or Nothing, "
                f"got {selection!r}"
            )
        if gate is not None and not isinstance(gate, Gate):
            raise ValueError(f"gate: expected a Gate, got {gate!r}")
        self.store = store
        self.source: Sources = source if callable(source) else Source(source)
        self.selection = selection
        self.gate = gate
        self._opted_out = OptedOut()
        self._accounts = Accounts()
        self._audits = 0

    def __repr__(self) -> str:
        source = "a function" if callable(self.source) else self.source.value
        return f"KVCollector({self.store!r}, source={source}, selection={self.selection})"

    @property
    def policy(self) -> Policy:
        """What the next plan reuses and recomputes."""
        return Policy(self.selection, self.source, self.opted_out)

    def plan(self, prompts: Mapping[str, Iterable[Segment]], *, wait: bool = False) -> Plan:
        """Matches prompts with what is stored or being computed, and leases the pages they need.

        Args:
            prompts: per agent the segments of its prompt, made by `private` and `shared`. Any
                number of agents; any lengths, orders, subsets and repeats. An agent's own earlier
                KV is taken over as far as the prompt begins with the same tokens.
            wait: prompts that do not fit now get their pages in a later `step`, in the order in
                which they came.

        Raises:
            TypeError: something else than segments.
            ValueError: an agent's name is no str or is that of an agent that has not ended, a
                prompt is longer than the rotation tables, or an unknown source of a segment.
            OutOfPagesError: the store has too few pages, now or, with ``wait``, ever; it is as it
                was, but for evictions.
        """
        with marked(self.store.device, "tokendance plan"):
            return self.store.scheduler.plan(prompts, self.policy, wait=wait)

    def pages_needed(self, prompts: Mapping[str, Iterable[Segment]]) -> int:
        """Pages that planning these prompts now needs.

        Fresh pages count, and pages of idle Masters that the plan would hold. `plan` succeeds
        exactly if the number is at most ``stats().free_pages + stats().evictable_pages`` of the
        store.

        Raises:
            TypeError, ValueError: as `plan`.
        """
        return self.store.scheduler.pages_needed(prompts, self.policy)

    def step(
        self,
        decode: Mapping[str, TokenIds | Iterator[int]] | None = None,
        prefill: Iterable[str] | None = None,
        max_rows: int = 2048,
        *,
        reduce: Reduce | None = None,
        timeout: float = 0.0,
    ) -> Step | None:
        """The next forward pass of any live plans of the store: decode rows, then prompts' rows.

        Every key that a row sees is computed in this step or in an earlier one. Until the step
        ends, its agents can be in no other one.

        Args:
            decode: per agent the tokens to feed; several are a draft, see `Plan.truncate`.
            prefill: agents whose prompts may be computed, together with what they wait for; None:
                all.
            max_rows: rows of a step at most. Decode rows are never left out, and with
                `KeyDeviation` all rows of an agent are in one step; both may exceed it.
            reduce: sums fp32 key deviations over the ranks of a tensor-parallel engine.
                `KeyDeviation` needs it there: without it the ranks would keep different rows.
            timeout: seconds to wait at most for a step that another thread runs, if wanted rows are
                in it or see rows of it.

        Returns:
            The step, or None where there is nothing to compute.

        Raises:
            KeyError: an agent of no live plan.
            TypeError: token ids that are no integers.
            ValueError: ``max_rows < 1``; an agent to decode that is in an open step or not in
                decode, has no tokens, or would grow beyond the rotation tables; a token id out of
                range.
            OutOfPagesError: too few pages for the decoded rows; nothing has changed, but for
                evictions.
        """
        if not timeout >= 0:
            raise ValueError(f"timeout: expected at least 0 seconds, got {timeout}")
        scheduler, lock, until = self.store.scheduler, self.store.lock, time.monotonic() + timeout
        names = list(prefill) if isinstance(prefill, Iterator) else prefill
        while True:
            before = lock.changes
            with marked(self.store.device, "tokendance plan a step"):
                planned = scheduler.step(decode, names, max_rows)
            if planned is not None:
                return Step(self.store.executor, planned, reduce)
            if time.monotonic() >= until:
                return None
            held_up = scheduler.holds_up(names)
            # What was held up when the step was planned may have ended before that was asked.
            if not lock.wait_for_change(before, until if held_up else 0.0):
                return None

    def decoder(
        self,
        max_agents: int,
        max_rows: int,
        max_pages: int,
        max_masters: int | None = None,
        max_uses: int | None = None,
        windows: Sequence[int] = (0,),
    ) -> Decoder:
        """Buffers of fixed size at fixed addresses for decode steps: a whole step can be captured.

        Args:
            max_agents, max_rows: of a step.
            max_pages: pages of all Masters in a step, outputs included. Own rows may take as many
                again.
            max_masters: Masters in a step, each agent's output among them; default 64 besides the
                outputs.
            max_uses: uses of Masters in a step, of all agents together; default 32 of each agent.
            windows: sliding windows of the model's layers, 0 for none.

        Raises:
            ValueError: a number that is not positive.
        """
        return Decoder(self.store, max_agents, max_rows, max_pages, max_masters, max_uses, windows)

    # The gate ------------------------------------------------------------------------------------

    def opt_out(
        self, agents: str | Iterable[str] = (), segments: Iterable[Segment | bytes] = ()
    ) -> None:
        """From the next plan on, restricts agents or segments to exact reuse, as `Everything` does.

        An agent that has opted out takes over only exact rows, also of its own earlier KV. A
        segment that has opted out is computed in every prompt where its reuse would not be exact.
        What such an agent computes may still become a Master that others reuse. To prevent that,
        make the agent's segments by `private`.

        Args:
            agents: names; they need not be known yet.
            segments: segments or their digests.
        """
        names, digests = _names_and_digests(agents, segments)
        with self.store.lock:
            opted = self._opted_out
            self._opted_out = OptedOut(opted.agents | names, opted.segments | digests)

    def opt_in(
        self, agents: str | Iterable[str] = (), segments: Iterable[Segment | bytes] = ()
    ) -> None:
        """Ends `opt_out`, whether a caller or the gate has asked for it."""
        names, digests = _names_and_digests(agents, segments)
        with self.store.lock:
            opted = self._opted_out
            self._opted_out = OptedOut(opted.agents - names, opted.segments - digests)

    @property
    def opted_out(self) -> OptedOut:
        """The agents, and the digests of the segments, that have opted out."""
        with self.store.lock:
            return self._opted_out

    def audit(
        self,
        plan: Plan,
        agents: str | Iterable[str] | None = None,
        fraction: float = 1.0,
        seed: int = 0,
        tokens: int = 16,
        rows: float = 1.0,
    ) -> Audit:
        """Full recompute of a sample of a plan's agents, to be run like a prefill.

        It computes all rows of a sampled prompt, so that audits cost ``fraction`` of full prefill
        on average, and leases the pages of one prompt at a time. Neither the plan nor the store
        changes, but for evictions.

        With ``rows < 1`` it computes only a sample of each prompt's rows, for that share of the
        cost, and besides them the last row and the decoded tokens. Where no row is sampled, they
        attend to the round's own rows. The audit then finds how far the sampled rows are from their
        repair, and how much that repair would move the distributions. Both are less than what full
        recompute would show.

        Args:
            plan: prefilled before the audit is run, and not committed or aborted.
            agents: whom to draw from; None: those whose prompts hold inexact rows.
            fraction: the chance of each to be drawn. 1 draws all.
            seed: the same draws for the same seed, collector history and names.
            tokens: decoded tokens of each agent that are compared as well, at most.
            rows: the chance of each row of a drawn agent's prompt to be recomputed.

        Raises:
            KeyError: an unknown agent.
            ValueError: an agent that has ended, or a number that is out of range.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected 0 < fraction <= 1, got {fraction}")
        if not 0 < rows <= 1:
            raise ValueError(f"rows: expected 0 < rows <= 1, got {rows}")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if tokens < 0:
            raise ValueError(f"tokens: expected at least 0, got {tokens}")
        live = self.store.live(plan)
        wanted = [agents] if isinstance(agents, str) else agents and list(agents)
        with self.store.lock:
            if wanted is None:
                of = {name for name, one in live.by_name.items() if one.exact_length < one.length}
            else:
                of = {name for name in wanted if live.state(name)}
            number = self._audits
            self._audits += 1
            names = [name for name in plan.agents if name in of]
        drawn = [name for name in names if is_drawn(name, fraction, seed, number)]
        draw = partial(draw_rows, fraction=rows, seed=seed, number=number)
        return Audit(
            self.store, live, drawn, tokens, draw if rows < 1 else None, self._finish_audit
        )

    def _finish_audit(self, report: AuditReport) -> AuditReport:
        if self.gate is not None:
            report = judge(self.gate, report.agents)
        self.opt_out(report.fallen_agents, report.fallen_segments)
        with self.store.lock:
            self._accounts.add(report)
        tell(report)
        return report

    def stats(self) -> CollectorStats:
        """What audits have cost and found, and how many agents and segments have opted out."""
        with self.store.lock:
            opted = self._opted_out
            return self._accounts.stats(len(opted.agents), len(opted.segments))


def _names_and_digests(
    agents: str | Iterable[str], segments: Iterable[Segment | bytes]
) -> tuple[frozenset[str], frozenset[bytes]]:
    names = [agents] if isinstance(agents, str) else list(agents)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"agents: expected names, got {type(name).__name__}")
    if isinstance(segments, Segment | bytes):
        segments = [segments]
    digests = []
    for segment in segments:
        if not isinstance(segment, Segment | bytes):
            raise TypeError(
                f"segments: expected segments or their digests, got {type(segment).__name__}"
            )
        digests.append(segment.digest if isinstance(segment, Segment) else segment)
    return frozenset(names), frozenset(digests)
