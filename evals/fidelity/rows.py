"""Rows that selections would compute of a whole recorded round, by its decision: no model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from evals.workloads import find_workload, read_rounds, tokenize_round
from tokendance.host.decide import RowKind, Source, decide
from tokendance.host.selection import parse_selection

SELECTIONS = (
    "nothing",
    "leading:1",
    "leading:4",
    "leading:4:96:24",
    "leading:8",
    "leading:12",
    "leading:16",
)
_BLOCK_SIZE = 8
_COMPUTED = (RowKind.OWN, RowKind.MASTER, RowKind.REPAIRED)


def run(
    tokenizer: Any, workload: str, number: int, selections: Sequence[str] = SELECTIONS
) -> dict[str, dict[str, int]]:
    """Per selection the rows of all prompts, those computed, and those of them repaired.

    Args:
        workload: any that `find_workload` finds; all its agents take part.
        number: of the round.
    """
    (one, *_) = read_rounds(find_workload(workload), rounds=(number, number + 1))
    prompts = tokenize_round(one, partial(tokenizer.encode, add_special_tokens=False))
    result = {}
    for name in selections:
        decisions = decide(
            prompts, lambda _: None, {}, parse_selection(name), Source.MASTER, _BLOCK_SIZE
        )
        spans = [span for decision in decisions for span in decision.spans]
        result[name] = {
            "prompt_rows": sum(decision.length for decision in decisions),
            "computed": sum(s.end - s.begin for s in spans if s.kind in _COMPUTED),
            "repaired": sum(s.end - s.begin for s in spans if s.kind is RowKind.REPAIRED),
        }
    return result


def text(result: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown."""
    lines = ["| selection | prompt rows | computed | repaired |", "| --- |" + " --- |" * 3]
    for name, one in result.items():
        lines.append(f"| {name} | {one['prompt_rows']} | {one['computed']} | {one['repaired']} |")
    return "\n".join(lines)
