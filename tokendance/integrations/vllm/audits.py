"""The gate inside vLLM: members of rounds that are compared with full recompute, a sample of them.

A member that is drawn waits, when its prompt is computed, until all its rows have been computed
once more without reusing anything, and compared. Then vLLM gets it, whatever was found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tokendance.host.agent import AgentState
from tokendance.host.books import OutOfPagesError
from tokendance.host.decide import OptedOut, Source, decide
from tokendance.host.gate import AgentAudit, is_drawn, judge, segment_audits, segments_of
from tokendance.host.plan import Plan, Policy
from tokendance.host.record import StepRecord, pack_mirrors
from tokendance.host.scheduler import Scheduler
from tokendance.host.selection import Everything
from tokendance.integrations.vllm.options import AuditOptions
from tokendance.integrations.vllm.orders import Compare

_log = logging.getLogger("vllm.tokendance")


@dataclass(eq=False)
class _Audit:
    """Of one member.

    Attributes:
        request: vLLM's name of it.
        agent: its name in the library.
        state: what the round has of it.
        number: of the audit.
        reference: its prompt without reuse, once it has pages.
        compared: whether the comparison is among the orders.
    """

    request: str
    agent: str
    state: AgentState
    number: int
    reference: Plan | None = None
    compared: bool = False


@dataclass
class Audits:
    """Who is compared, and who is not to reuse what because of it.

    Attributes:
        options: of the connector, or None: nobody is compared.
        host: gives the library's scheduler.
        count: is told what is counted.
        opted_out: segments that are computed in all prompts from now on.
    """

    options: AuditOptions | None
    host: Callable[[], Scheduler]
    count: Callable[..., None]
    opted_out: OptedOut = field(default_factory=OptedOut)
    _drawn: int = 0
    _all: dict[str, _Audit] = field(default_factory=dict)  # those that run, by request

    def consider(self, request: str, agent: str, plan: Plan) -> None:
        """A member's prompt is computed: it may be drawn, if any of its rows are inexact."""
        state = plan._live.state(agent)
        if self.options is None or state.exact_length >= state.length:
            return
        self._drawn += 1
        if is_drawn(agent, self.options.fraction, self.options.seed, self._drawn):
            self._all[request] = _Audit(request, agent, state, self._drawn)

    def holds(self, request: str) -> bool:
        """Whether the member is to wait."""
        return request in self._all

    def forget(self, request: str) -> None:
        """The member has ended, or its rows are gone."""
        audit = self._all.pop(request, None)
        if audit is not None and audit.reference is not None:
            audit.reference.abort()

    def clear(self) -> None:
        """What is stored is forgotten, and so is what was found of it."""
        for request in list(self._all):
            self.forget(request)
        self.opted_out = OptedOut()

    def step(self, max_rows: int) -> list[StepRecord | Compare]:
        """The orders of an engine step: some rows of the audit that came first, or its end."""
        audit = next((one for one in self._all.values() if not one.compared), None)
        if audit is None or max_rows < 1:
            return []
        if audit.reference is None:
            audit.reference = self._recompute(audit)
            if audit.reference is None:
                del self._all[audit.request]
                return []
        host = self.host()
        planned = host.step_of(audit.reference, max_rows)
        if planned is not None:
            planned.finish()
            return [planned.record]
        audit.compared = True
        full = audit.reference._live.state(audit.agent)
        positions = np.arange(full.length, dtype=np.int32)
        packed = pack_mirrors([audit.state, full], host.profile.block_size)
        parts = segments_of(full, positions)
        return [Compare(audit.number, packed, positions, parts, len(full.segments))]

    def _recompute(self, audit: _Audit) -> Plan | None:
        host = self.host()
        decisions = decide(
            {audit.agent: audit.state.segments},
            lambda segment: None,
            {},
            Everything(),
            Source.MASTER,
            host.profile.block_size,
            host.profile.max_position,
        )
        try:
            return host.probe(decisions, [audit.agent], Policy(Everything()))
        except OutOfPagesError:
            _log.warning("tokendance: no audit of %s: the store is full", audit.agent)
            return None

    def take(self, found: dict[int, NDArray[np.float64]]) -> None:
        """What workers have found, of all their heads."""
        assert self.options is not None
        for audit in [one for one in self._all.values() if one.number in found]:
            assert audit.reference is not None
            full = audit.reference._live.state(audit.agent)
            positions = np.arange(full.length, dtype=np.int32)
            block = self.host().profile.block_size
            segments = segment_audits(
                audit.agent, audit.state, full, positions, found[audit.number], block
            )
            report = judge(
                self.options.gate,
                {audit.agent: AgentAudit(full.length, 0, None, None, segments)},
            )
            self.forget(audit.request)
            worst = max((one.deviation for one in segments if one.reused), default=0.0)
            _log.info(
                "tokendance: audit of %s: %d rows recomputed, deviation %.3f at most",
                audit.agent,
                full.length,
                worst,
            )
            for finding in report.findings:
                _log.warning("tokendance: audit: %s", finding)
            fallen = self.opted_out.segments | set(report.fallen_segments)
            self.opted_out = OptedOut(segments=frozenset(fallen))
            self.count(audits=1, rows_audited=full.length, findings=len(report.findings))
