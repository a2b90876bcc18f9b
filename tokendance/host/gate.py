"""The gate's accounts: what audits may find, what they found, and whom they look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokendance.host.decide import foreign_uses
from tokendance.host.mirror import Mirror
from tokendance.host.round import IntArray

ACTIONS = ("warn", "fall back")


class ReuseWarning(UserWarning):
    """An audit found reuse farther from full recompute than the gate allows."""


@dataclass(frozen=True)
class Gate:
    """What an audit may find. A limit that is None is not checked.

    Attributes:
        kl: nats, KL(full || reuse) of an agent, mean over its compared tokens.
        top1: least share of an agent's compared tokens whose likeliest token is full recompute's.
        deviation: see `SegmentAudit.deviation`.
        action: ``"warn"``: a `ReuseWarning` says what was found. ``"fall back"``: it warns, too,
            and from then on the agent, or the segment in all prompts, is reused only where that is
            exact, as under `Everything`.
    """

    kl: float | None = None
    top1: float | None = None
    deviation: float | None = None
    action: str = "warn"

    def __post_init__(self) -> None:
        for name, most in (("kl", None), ("top1", 1), ("deviation", None)):
            limit = getattr(self, name)
            if limit is not None and not (limit >= 0 and (most is None or limit <= most)):
                wanted = "at least 0" if most is None else "0 .. 1"
                raise ValueError(f"{name}: expected {wanted}, got {limit}")
        if self.action not in ACTIONS:
            raise ValueError(f"action: expected one of {list(ACTIONS)}, got {self.action!r}")


@dataclass(frozen=True, eq=False)
class SegmentAudit:
    """How far one segment of one prompt is from full recompute.

    Attributes:
        agent, index: which segment of which prompt; empty segments do not count.
        digest: of the segment.
        begin, end: its positions.
        reused: rows of it that came from a Master of another context.
        compared: rows of it that were recomputed.
        keys, values: fp64 ``[layers]``, norm of the difference over the norm of what was
            recomputed, of all compared rows together; 0 where there are none.
    """

    agent: str
    index: int
    digest: bytes
    begin: int
    end: int
    reused: int
    compared: int
    keys: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def deviation(self) -> float:
        """The greatest of ``keys`` and ``values``, over the layers."""
        return float(np.max([self.keys, self.values]))  # NaN if any is


def segments_of(full: Mirror, positions: IntArray) -> NDArray[np.int64]:
    """In which of its segments each of an agent's rows stands."""
    lengths = [segment.length for segment in full.segments]
    return np.repeat(np.arange(len(lengths)), lengths)[positions]


def segment_audits(
    agent: str,
    ours: Mirror,
    full: Mirror,
    positions: IntArray,
    sums: NDArray[np.float64],
    block_size: int,
) -> tuple[SegmentAudit, ...]:
    """What was found of each segment.

    Args:
        agent: its name.
        ours, full: what the round has of it, and what was recomputed.
        positions: of the rows that were.
        sums: as `tokendance.device.comparison.squared_differences` gives them, by segments.
        block_size: rows of a page.
    """
    relative = np.sqrt(sums[:, :, 0] / np.maximum(sums[:, :, 1], np.finfo(np.float64).tiny))
    ends = np.cumsum([segment.length for segment in full.segments])
    begins = ends - [segment.length for segment in full.segments]
    reused = np.zeros(full.length, dtype=np.int64)
    for use in foreign_uses(ours):
        reused[use.delta : use.delta + use.length] = 1
        reused[use.delta + use.overridden(block_size)] = 0
    before = np.concatenate([[0], np.cumsum(reused)])
    compared = np.bincount(segments_of(full, positions), minlength=len(full.segments))
    return tuple(
        SegmentAudit(
            agent,
            index,
            one.digest,
            int(begins[index]),
            int(ends[index]),
            int(before[ends[index]] - before[begins[index]]),
            int(compared[index]),
            relative[:, 0, index],
            relative[:, 1, index],
        )
        for index, one in enumerate(full.segments)
    )


@dataclass(frozen=True)
class AgentAudit:
    """One agent against full recompute.

    Attributes:
        rows: recomputed: what the audit of this agent cost.
        tokens: whose distributions were compared; 0 if no logits were given.
        kl: KL(recomputed || reuse) in nats, mean over the tokens, or None.
        top1: share of the tokens whose likeliest token is the same, or None.
        segments: of the prompt, and last the decoded tokens if there are any.
    """

    rows: int
    tokens: int
    kl: float | None
    top1: float | None
    segments: tuple[SegmentAudit, ...]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        agents: by name, in the order of the plan.
        findings: a sentence for each limit of the gate that was exceeded.
        fallen_agents, fallen_segments: names and digests that fall back because of this report.
    """

    agents: Mapping[str, AgentAudit]
    findings: tuple[str, ...] = ()
    fallen_agents: tuple[str, ...] = ()
    fallen_segments: tuple[bytes, ...] = ()

    @property
    def rows(self) -> int:
        """Rows that were recomputed."""
        return sum(one.rows for one in self.agents.values())

    @property
    def tokens(self) -> int:
        """Tokens whose distributions were compared."""
        return sum(one.tokens for one in self.agents.values())

    @property
    def kl(self) -> float | None:
        """Mean over all compared tokens."""
        return self._mean("kl")

    @property
    def top1(self) -> float | None:
        """Mean over all compared tokens."""
        return self._mean("top1")

    def _mean(self, name: str) -> float | None:
        if not self.tokens:
            return None
        parts = [one.tokens * getattr(one, name) for one in self.agents.values() if one.tokens]
        return float(sum(parts)) / self.tokens


@dataclass(frozen=True)
class CollectorStats:
    """What a collector's audits have found since it was made.

    Attributes:
        audits: reports.
        audited_agents, audited_rows, audited_tokens: sums over them; rows are what audits cost.
        kl, top1: means over the tokens; None before the first.
        worst_kl: of one agent in one audit; None before the first.
        findings: beyond the gate's limits.
        agents_opted_out, segments_opted_out: that are computed at present, by the gate or by
            `KVCollector.opt_out`.
    """

    audits: int = 0
    audited_agents: int = 0
    audited_rows: int = 0
    audited_tokens: int = 0
    kl: float | None = None
    top1: float | None = None
    worst_kl: float | None = None
    findings: int = 0
    agents_opted_out: int = 0
    segments_opted_out: int = 0


@dataclass
class Accounts:
    """The running sums behind `CollectorStats`."""

    reports: int = 0
    agents: int = 0
    rows: int = 0
    tokens: int = 0
    kl: float = 0.0
    top1: float = 0.0
    worst_kl: float | None = None
    findings: int = 0

    def add(self, report: AuditReport) -> None:
        self.reports += 1
        self.agents += len(report.agents)
        self.rows += report.rows
        self.tokens += report.tokens
        self.kl += (report.kl or 0.0) * report.tokens
        self.top1 += (report.top1 or 0.0) * report.tokens
        self.findings += len(report.findings)
        kls = [one.kl for one in report.agents.values() if one.kl is not None]
        if self.worst_kl is not None:
            kls.append(self.worst_kl)
        self.worst_kl = max(kls, default=None)

    def stats(self, agents_opted_out: int, segments_opted_out: int) -> CollectorStats:
        return CollectorStats(
            audits=self.reports,
            audited_agents=self.agents,
            audited_rows=self.rows,
            audited_tokens=self.tokens,
            kl=self.kl / self.tokens if self.tokens else None,
            top1=self.top1 / self.tokens if self.tokens else None,
            worst_kl=self.worst_kl,
            findings=self.findings,
            agents_opted_out=agents_opted_out,
            segments_opted_out=segments_opted_out,
        )


def judge(gate: Gate, agents: Mapping[str, AgentAudit]) -> AuditReport:
    """What lies beyond the gate's limits; nothing has fallen back yet but what the report names."""
    findings: list[str] = []
    fallen_agents: list[str] = []
    fallen_segments: dict[bytes, None] = {}
    for name, agent in agents.items():
        before = len(findings)
        if gate.kl is not None and agent.kl is not None and not agent.kl <= gate.kl:
            findings.append(f"agent {name!r}: expected KL <= {gate.kl:g}, got {agent.kl:.4g}")
        if gate.top1 is not None and agent.top1 is not None and not agent.top1 >= gate.top1:
            findings.append(
                f"agent {name!r}: expected top-1 >= {gate.top1:g}, got {agent.top1:.4g}"
            )
        if len(findings) > before:
            fallen_agents.append(name)
        for one in agent.segments:
            if gate.deviation is None or not one.reused or one.deviation <= gate.deviation:
                continue
            findings.append(
                f"agent {name!r}, segment {one.index} ({one.digest.hex()}): expected deviation <= "
                f"{gate.deviation:g}, got {one.deviation:.4g}"
            )
            fallen_segments[one.digest] = None
    if gate.action != "fall back":
        return AuditReport(agents, tuple(findings))
    return AuditReport(agents, tuple(findings), tuple(fallen_agents), tuple(fallen_segments))


def is_drawn(agent: str, fraction: float, seed: int, number: int) -> bool:
    """Whether an agent is in the sample: with the chance ``fraction``, the same for the same
    arguments."""
    name = np.frombuffer(agent.encode(), dtype=np.uint8).tolist()
    return bool(np.random.default_rng([seed, number, *name]).random() < fraction)


def draw_rows(
    agent: str, length: int, fraction: float, seed: int, number: int
) -> NDArray[np.bool_]:
    """Which of an agent's rows are in the sample, each with the chance ``fraction``."""
    name = np.frombuffer(agent.encode(), dtype=np.uint8).tolist()
    return np.random.default_rng([seed, number, *name, length]).random(length) < fraction
