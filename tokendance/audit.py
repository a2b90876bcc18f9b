"""The gate: rounds that reuse KV are compared with full recompute, a sample at a time.

An audit recomputes some agents' prompts, and the tokens that they decoded, and compares
distributions and KV: whole prompts without reusing anything, or a sample of their rows over what
the round has of the others. It is run like a prefill, by whatever runs the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokendance import ops
from tokendance.arrays import Array, as_tensor
from tokendance.layout import ORIGINS, AgentLayout, Origin, Source, foreign_uses, lay_out
from tokendance.mirror import Mirror, round_arrays, slots_of
from tokendance.plan import AgentState, Phase, Plan
from tokendance.rounds import IntArray, RoundTensors
from tokendance.segments import Segment, private
from tokendance.selection import Everything
from tokendance.step import Step
from tokendance.store import DiffStore
from tokendance.uncopied import Uncopied

if TYPE_CHECKING:
    from tokendance.collector import KVCollector

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
        action: ``"warn"``: a `ReuseWarning` says what was found. ``"fall back"``: besides, the
            agent, or the segment in all prompts, is computed from then on, as by `Everything`.
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
        findings: a sentence for everything beyond the gate's limits.
        fallen_agents, fallen_segments: names and digests that have fallen back because of it.
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


class Audit(Uncopied, instead="make another by KVCollector.audit; its report can be copied"):
    """Recompute of some agents of a plan, or of some of their rows; made by `KVCollector.audit`.

    Run `steps`, hand every step's logits to `add`, then ask for the `report`. Agents are recomputed
    one after the other; the pages of one prompt are leased at a time and given back. The plan must
    not be committed before that.

    Attributes:
        agents: who is recomputed; may be nobody.
    """

    def __init__(
        self,
        collector: KVCollector,
        plan: Plan,
        agents: Sequence[str],
        tokens: int,
        draw_rows: Callable[[str, int], NDArray[np.bool_]] | None,
        finish: Callable[[AuditReport], AuditReport],
    ) -> None:
        """``draw_rows`` says of an agent and its length which rows are recomputed; None: all."""
        self.agents = list(agents)
        self._collector = collector
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
            ValueError: ``max_rows < 1``, an audit that has been run, an agent in prefill or ended,
                a step left unfinished or without its logits.
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
            state = self._plan.state(agent)
            if state.phase is Phase.PREFILL:
                raise ValueError(f"audit: expected a finished prefill, got {agent!r} in prefill")
            if not state.layout.length:
                self._found[agent] = (0, ())
                continue
            reference = self._reference(agent, state)
            positions = reference.state(agent).pending
            try:
                for step in self._collector.prefill(reference, max_rows):
                    self._step = step
                    yield step
                    if self._step is not None and len(step.logit_rows):
                        raise ValueError("audit: expected add() after every step, got none")
                full = reference.state(agent)
                compared = _compare_rows(self._plan.store, agent, state, full, positions)
                self._found[agent] = (len(positions), compared)
            finally:
                if not reference.ended:
                    reference.abort()

    def _reference(self, agent: str, state: AgentState) -> Plan:
        """A plan of the agent's tokens that computes all rows, or those that are drawn."""
        decoded = state.output_ids[: self._tokens]
        segments = tuple(one for one in (*state.segments, private(decoded)) if one.length)
        store = self._plan.store
        if self._draw_rows is not None:
            length = sum(segment.length for segment in segments)
            drawn = self._draw_rows(agent, length)
            drawn[length - 1 - len(decoded) :] = True
            return _probe(store, agent, segments, state, np.flatnonzero(drawn), 1 + len(decoded))
        block = store.block_size
        layouts = lay_out(
            {agent: segments},
            _nothing,
            {},
            Everything(),
            Source.MASTER,
            block,
            store.max_position,
        )
        layouts[0].logit_rows = 1 + len(decoded)
        return Plan(store, layouts, [agent], Everything(), Source.MASTER)

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


@dataclass
class Record:
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


def tell(report: AuditReport) -> None:
    """Warns of everything that was found."""
    for finding in report.findings:
        warnings.warn(finding, ReuseWarning, stacklevel=4)


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
    layout = AgentLayout(
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
        origins=np.array([ORIGINS.index(Origin.OWN)], dtype=np.uint8),
        exact_length=0,
        logit_rows=logit_rows,
    )
    plan = Plan(store, [layout], [agent], Everything(), Source.MASTER)
    try:
        probe = plan.state(agent)
        probe.pending = computed
        sources = torch.from_numpy(slots_of(state.own_pages, len(kept), block)).to(store.device)
        targets = torch.from_numpy(probe.slots(kept, block)).to(store.device)
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
    rows, device = full.length, store.device
    lengths = [segment.length for segment in full.segments]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    arrays, extents = round_arrays([ours, full], store.block_size)
    round_ = RoundTensors.from_arrays(arrays, extents, device=device)
    slots = torch.full((2, max(ours.length, rows)), -1, dtype=torch.int64, device=device)
    slots[:, :rows] = torch.arange(2 * rows, device=device).view(2, rows)
    geometry = store.geometry
    shape = (2 * rows, geometry.num_kv_heads, geometry.head_dim)
    k, v = (torch.empty(shape, dtype=geometry.dtype, device=device) for _ in range(2))
    of_rows = np.repeat(np.arange(len(lengths)), lengths)[positions]
    segment = torch.from_numpy(of_rows).to(device)
    at = torch.from_numpy(positions.astype(np.int64)).to(device)
    sums = []
    for layer in range(geometry.num_layers):
        rope = store.layer_rope(layer)
        ops.diff_restore(
            [store.pool.k_pools[layer]],
            [store.pool.v_pools[layer]],
            rope.cos,
            rope.sin,
            rope.interleaved,
            round_,
            slots,
            [k],
            [v],
            *store.pool.scales_of([layer]),
        )
        for x in (k.double(), v.double()):
            recomputed = x[rows + at]
            difference = (x[at] - recomputed).square().sum((1, 2))
            for each in (difference, recomputed.square().sum((1, 2))):
                sums.append(each.new_zeros(len(lengths)).index_add_(0, segment, each))
    # [layers, keys or values, difference or norm, segments]
    found = torch.stack(sums).cpu().numpy().reshape(-1, 2, 2, len(lengths))
    relative = np.sqrt(found[:, :, 0] / np.maximum(found[:, :, 1], np.finfo(np.float64).tiny))
    reused = np.zeros(rows, dtype=np.int64)
    for use in foreign_uses(ours):
        reused[use.delta : use.delta + use.length] = 1
        reused[use.delta + use.overridden(store.block_size)] = 0
    before = np.concatenate([[0], np.cumsum(reused)])
    compared = np.bincount(of_rows, minlength=len(lengths))
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
