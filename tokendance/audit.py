"""The gate: rounds that reuse KV are compared with full recompute, a sample at a time.

An audit recomputes some agents' prompts, and the tokens that they decoded, and compares
distributions and KV: whole prompts without reusing anything, or a sample of their rows over what
the round has of the others. It is run like a prefill, by whatever runs the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendance.device.arrays import Array, as_tensor
from tokendance.device.comparison import squared_differences
from tokendance.host.agent import AgentState, Phase
from tokendance.host.decide import ROW_KINDS, AgentDecision, RowKind, Source, decide
from tokendance.host.gate import (
    AgentAudit,
    AuditReport,
    ReuseWarning,
    SegmentAudit,
    segment_audits,
    segments_of,
)
from tokendance.host.mirror import Mirror, slots_of
from tokendance.host.plan import LivePlan, Plan, Policy
from tokendance.host.reading import Reading
from tokendance.host.record import pack_mirrors
from tokendance.host.round import IntArray
from tokendance.host.segments import Segment, private
from tokendance.host.selection import Everything
from tokendance.host.uncopied import Uncopied
from tokendance.step import Step
from tokendance.store import DiffStore


class Audit(Uncopied, instead="make another by KVCollector.audit; its report can be copied"):
    """Recompute of some agents of a plan, or of some of their rows; made by `KVCollector.audit`.

    Run `steps`, hand every step's logits to `add`, then ask for the `report`. Agents are recomputed
    one after the other, so that the pages of only one prompt are leased at a time. Commit the plan
    only after the report.

    Attributes:
        agents: names of those that are recomputed; may be empty.
    """

    def __init__(
        self,
        store: DiffStore,
        plan: LivePlan,
        agents: Sequence[str],
        tokens: int,
        draw_rows: Callable[[str, int], NDArray[np.bool_]] | None,
        finish: Callable[[AuditReport], AuditReport],
    ) -> None:
        """``draw_rows`` returns the rows to recompute, by an agent's name and length; None: all."""
        self.agents = list(agents)
        self._store = store
        self._plan = plan
        self._tokens = tokens
        self._draw_rows = draw_rows
        self._finish = finish
        self._step: Step | None = None
        self._logits: dict[str, list[Tensor]] = {agent: [] for agent in agents}
        self._found: dict[str, tuple[int, tuple[SegmentAudit, ...]]] = {}
        self._begun = self._reported = False

    def steps(self, max_rows: int = 8192) -> Iterator[Step]:
        """The steps that recompute the agents: enter and finish each, and `add` its logits.

        Their ``logit_rows`` are the last row of each prompt and the rows of the decoded tokens.

        Args:
            max_rows: rows of a step at most.

        Raises:
            ValueError: ``max_rows < 1``, an audit that has been run, an agent in prefill, suspended
                or ended, a step left unfinished or without its logits.
            OutOfPagesError: a prompt does not fit beside the round; the store is as it was, but for
                evictions.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows: expected at least 1, got {max_rows}")
        if self._begun:
            raise ValueError("audit: expected one that has not been run, got one that has")
        self._begun = True
        return self._steps(max_rows)

    def _steps(self, max_rows: int) -> Iterator[Step]:
        for agent in self.agents:
            with ExitStack() as stack:
                with self._store.lock:
                    state = self._plan.state(agent)
                    stack.enter_context(Reading(self._store.scheduler, [state]))
                if state.phase is not Phase.DECODE:
                    raise ValueError(
                        f"audit: expected a finished prefill, got {agent!r} in {state.phase.value}"
                    )
                if state.decision.length:
                    yield from self._steps_of(agent, state, max_rows)
                else:
                    self._found[agent] = (0, ())

    def _steps_of(self, agent: str, state: AgentState, max_rows: int) -> Iterator[Step]:
        reference = self._reference(agent, state)
        full = self._store.live(reference).state(agent)
        positions = full.pending
        step = None
        try:
            while planned := self._store.scheduler.step_of(reference, max_rows):
                step = Step(self._store.executor, planned, None)
                self._step = step
                yield step
                if planned.is_open:
                    raise ValueError(
                        "step: expected each step to be run before the next, got one left"
                    )
                if self._step is not None and step.logit_agents:
                    raise ValueError("audit: expected add() after every step, got none")
            compared = _compare_rows(self._store, agent, state, full, positions)
            self._found[agent] = (len(positions), compared)
        except BaseException as error:
            if step is not None:
                step.abandon()
            reference.abandon()
            if not isinstance(
                error, GeneratorExit
            ):  # perhaps of garbage, in the middle of anything
                self._store.scheduler.collect()
            raise
        reference.abort()

    def _reference(self, agent: str, state: AgentState) -> Plan:
        """A plan of the agent's tokens that computes all rows, or those that are drawn."""
        decoded = state.output_ids[: self._tokens]
        segments = tuple(one for one in (*state.segments, private(decoded)) if one.length)
        store = self._store
        if self._draw_rows is not None:
            length = sum(segment.length for segment in segments)
            drawn = self._draw_rows(agent, length)
            drawn[length - 1 - len(decoded) :] = True
            return _probe(store, agent, segments, state, np.flatnonzero(drawn), 1 + len(decoded))
        block = store.block_size
        decisions = decide(
            {agent: segments},
            _nothing,
            {},
            Everything(),
            Source.MASTER,
            block,
            store.max_position,
        )
        decisions[0].logit_rows = 1 + len(decoded)
        return store.scheduler.probe(decisions, [agent], Policy(Everything()))

    def add(self, logits: Array) -> None:
        """Takes the logits of the step that was run last.

        Args:
            logits: ``[len(step.logit_rows), vocabulary]``.

        Raises:
            ValueError: no step has been run since the last call, or another number of rows.
        """
        if self._step is None:
            raise ValueError("audit: expected a step that was run before add(), got none")
        names = self._step.logit_agents
        rows = as_tensor(logits)
        if rows.dim() != 2 or len(rows) != len(names):
            raise ValueError(f"logits: expected [{len(names)}, vocabulary], got {list(rows.shape)}")
        if names:
            self._logits[names[0]].append(rows)
        self._step = None

    def report(self, logits: Mapping[str, Array] | None = None) -> AuditReport:
        """Compares, applies the collector's gate, and adds to its statistics.

        Args:
            logits: per agent what the round had: ``[vocabulary]`` of the prompt's last row, or
                ``[rows, vocabulary]`` of that row and of the decoded tokens in order. Agents that
                are left out are compared by their KV alone; others than `agents` are ignored.

        Raises:
            ValueError: the steps have not all been run, there has been a report, or logits of
                another shape.
        """
        if len(self._found) != len(self.agents):
            raise ValueError("audit: expected all steps to be run before the report")
        if self._reported:
            raise ValueError("audit: expected one report, got a second")
        found: dict[str, AgentAudit] = {}
        for agent, (rows, segments) in self._found.items():
            kl = top1 = None
            tokens = 0
            if agent in (logits or {}) and self._logits[agent]:
                assert logits is not None
                full = torch.cat(self._logits[agent])
                given = as_tensor(logits[agent])
                ours = given[None] if given.dim() == 1 else given
                if ours.dim() != 2 or ours.shape[1] != full.shape[1] or not len(ours):
                    raise ValueError(
                        f"logits[{agent!r}]: expected [rows, {full.shape[1]}], "
                        f"got {list(given.shape)}"
                    )
                tokens = min(len(full), len(ours))
                full, ours = full[:tokens], ours[:tokens].to(full.device)
                kl = float(divergence_of(full, ours).mean())
                top1 = float((full.argmax(-1) == ours.argmax(-1)).double().mean())
            found[agent] = AgentAudit(rows, tokens, kl, top1, segments)
        self._reported = True
        return self._finish(AuditReport(found))


def tell(report: AuditReport) -> None:
    """Warns of everything that was found."""
    for finding in report.findings:
        warnings.warn(finding, ReuseWarning, stacklevel=4)


def divergence_of(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) in nats of each row: two ``[rows, vocabulary]``, fp64 ``[rows]``."""
    p = torch.log_softmax(reference.double(), -1)
    q = torch.log_softmax(logits.double(), -1)
    # A token of no probability, as of a padded vocabulary, adds nothing, whatever q says.
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


def _nothing(_: Segment) -> None:
    return None


def _probe(
    store: DiffStore,
    agent: str,
    segments: tuple[Segment, ...],
    state: AgentState,
    positions: NDArray[np.int64],
    logit_rows: int,
) -> Plan:
    """A plan that computes some rows of an agent and sees the round's rows everywhere else.

    The Masters are shared; the agent's own rows are copied, for those that are computed again
    stand among them.
    """
    block = store.block_size
    length = sum(segment.length for segment in segments)
    computed = positions.astype(np.int32)
    uses = state.uses.cut(length)
    for use in uses:
        inside = computed[(computed >= use.delta) & (computed < use.delta + use.length)]
        use.override(inside - use.delta, block)
    kept = state.own_position[: np.searchsorted(state.own_position, length)]
    own = np.union1d(kept, computed).astype(np.int32)
    decision = AgentDecision(
        agent,
        segments,
        length,
        earlier=None,
        prefix=0,
        uses=uses,
        made=[],
        candidates=[],
        own=own,
        ends=np.array([length], dtype=np.int32),
        kinds=np.array([ROW_KINDS.index(RowKind.OWN)], dtype=np.uint8),
        exact_length=0,
        logit_rows=logit_rows,
    )
    plan = store.scheduler.probe([decision], [agent], Policy(Everything()))
    try:
        probe = store.live(plan).state(agent)
        probe.pending = computed
        sources = torch.from_numpy(slots_of(state.own_pages, len(kept), block)).to(store.device)
        targets = torch.from_numpy(probe.slots(kept)).to(store.device)
        for layer in range(store.pool.num_layers):
            pools = store.pool.k_pools[layer], store.pool.v_pools[layer]
            store.pool.write_rows(layer, *pools, targets, sources)
    except BaseException:
        plan.abort()
        raise
    return plan


def _compare_rows(
    store: DiffStore,
    agent: str,
    ours: AgentState,
    full: Mirror,
    positions: IntArray,
) -> tuple[SegmentAudit, ...]:
    """Both agents' rows, restored side by side layer by layer, those at ``positions`` summed up by
    segments."""
    of_rows = segments_of(full, positions)
    packed = pack_mirrors([ours, full], store.block_size)
    sums = squared_differences(store.executor, packed, positions, of_rows, len(full.segments))
    return segment_audits(agent, ours, full, positions, sums, store.block_size)
