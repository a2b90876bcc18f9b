"""What a round of a society was and cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evals.society.recompute import Comparison
from evals.workloads import RecordedAgent
from tokendance.host.decide import RowKind, Span
from tokendance.host.gate import AuditReport
from tokendance.host.plan import Plan

__all__ = ["Block", "PromptMap", "RoundReport", "map_prompt"]


@dataclass(frozen=True)
class Block:
    """Rows ``begin .. end - 1`` of a prompt that hold one text.

    Attributes:
        kind: see `RecordedBlock`.
        block_id: what the recording calls it; None for a text of this prompt only.
        shift: how far its rows were moved from where their Master was computed; None if the prompt
            has no Master for it.
        text: itself.
    """

    begin: int
    end: int
    kind: str
    block_id: str | None
    shift: int | None
    text: str


@dataclass(frozen=True)
class PromptMap:
    """Where every row of one prompt came from. Both lists tile the prompt."""

    agent: str
    length: int
    spans: list[Span]
    blocks: list[Block]

    def rows_of(self, *kinds: RowKind) -> int:
        """Rows of these kinds."""
        return sum(span.end - span.begin for span in self.spans if span.kind in kinds)


@dataclass(frozen=True)
class RoundReport:
    """What one round was and cost. Seconds are wall time; bytes and rows are totals of the round.

    Attributes:
        round: its number, from 0.
        agents: how many prompts.
        prompt_tokens: rows of all prompts.
        distinct_tokens: those of distinct segments.
        rows: prompt rows computed, row-layers / layers.
        rows_overridden: rows of reused blocks computed again in this round.
        plan_s, prefill_s, decode_s: matching and leasing pages; the prompts; the messages.
        decode_tokens: fed by the decoding of all agents.
        kv_bytes_dense, kv_bytes_stored: one dense cache per prompt, and the pages that hold the
            prompts.
        kv_bytes_held: all pages of the store at the end of the round, Masters kept for later and
            the decoded messages among them.
        messages: what was said, by name.
        prompts: maps of the prompts.
        master_agents: see `Plan.master_agents`.
        audit: if it was asked for.
        gate: what the gate's sample found, if there is a gate.
    """

    round: int
    agents: int
    prompt_tokens: int
    distinct_tokens: int
    rows: float
    rows_overridden: int
    plan_s: float
    prefill_s: float
    decode_s: float
    decode_tokens: int
    kv_bytes_dense: int
    kv_bytes_stored: int
    kv_bytes_held: int
    messages: dict[str, str]
    prompts: list[PromptMap]
    master_agents: list[str]
    audit: Comparison | None
    gate: AuditReport | None = None

    @property
    def decode_tokens_per_s(self) -> float:
        """Of all agents together, in one batch."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


def map_prompt(
    plan: Plan, recorded: RecordedAgent, encode: Callable[[str], list[int]], block_size: int
) -> PromptMap:
    """The map of one prompt of a plan that has been prefilled.

    Args:
        plan: the round.
        recorded: the prompt's texts, as `tokenize_round` was given them.
        encode: as it was given to `tokenize_round`.
        block_size: of the plan's store.
    """
    uses = plan._live.state(recorded.name).decision.uses
    shifts = {use.delta: use.shift for use in uses}
    blocks, begin = [], 0
    for block in recorded.blocks:
        end = begin + len(encode(block.text))
        if begin < end:
            shift = shifts.get(begin)
            blocks.append(Block(begin, end, block.kind, block.block_id, shift, block.text))
        begin = end
    overridden = {use.delta + int(row) for use in uses for row in use.overridden(block_size)}
    spans = [part for span in plan.spans(recorded.name) for part in _split(span, overridden)]
    return PromptMap(recorded.name, begin, spans, blocks)


def _split(span: Span, overridden: set[int]) -> list[Span]:
    """A span with the rows taken out that were chosen to be recomputed while the round ran."""
    if span.kind is not RowKind.REUSED:
        return [span]
    parts: list[Span] = []
    for row in range(span.begin, span.end):
        kind = RowKind.REPAIRED if row in overridden else RowKind.REUSED
        if parts and parts[-1].kind is kind:
            parts[-1] = Span(parts[-1].begin, row + 1, kind)
        else:
            parts.append(Span(row, row + 1, kind))
    return parts
