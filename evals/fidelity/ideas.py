"""Ideas that are no part of the library, measured in the place of what they would change.

Each takes a workload's rounds and one way of reuse, and changes one thing: which agent comes first
among those that could be Master agents, in which layers a repaired row replaces the Master's, whose
keys rank the rows of `KeyDeviation`, or which rows are repaired beside the leading ones or instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from evals.fidelity.front import siblings, siblings_kl
from evals.fidelity.repairs import repaired_beside
from evals.fidelity.replays import (
    BLOCK_SIZE,
    Prompts,
    Round,
    measure,
    read_sessions,
    recompute,
)
from evals.fidelity.samples import spread
from evals.fidelity.signals import SCORES, Signals
from evals.fidelity.token_kinds import collecting_tokens, every
from tokendance.device import operators as ops
from tokendance.device.executor import Executor
from tokendance.host.decide import RowKind, Source, decide
from tokendance.host.mirror import slots_of
from tokendance.host.planned_step import StepPart
from tokendance.host.selection import parse_selection
from tokendance.step import Step


def run(
    model: Any,
    tokenizer: Any,
    workload: str,
    selection: str,
    only: Sequence[str] = ("",),
    rounds: int | None = None,
    agents: int | None = None,
    new_tokens: int = 12,
) -> dict[str, dict[str, float]]:
    """Per idea the rows computed and overridden, and KL of the siblings and of all agents.

    Args:
        selection: what most ideas change something of.
        only: ideas whose names contain one of these.
        rounds, agents: see `read_sessions`.
    """
    sessions = read_sessions(workload, tokenizer, rounds, agents)
    for session in sessions:
        recompute(model, session.rounds, new_tokens)
    collecting = every(collecting_tokens(tokenizer))
    signals = Signals(model)
    reuse = f"master/{selection}"
    layers = model.config.num_hidden_layers
    half = layers // 2
    recorded = [one for session in sessions for one in session.rounds]
    result: dict[str, dict[str, float]] = {"shared repairs": shared_repairs(recorded, selection)}
    print(result, flush=True)
    ideas: dict[str, tuple[str, Callable[[Prompts], str] | None, AbstractContextManager[Any]]] = {
        "as it is": (reuse, None, nullcontext()),
        f"repaired in layers 0 to {half - 1}": (reuse, None, repaired_only_in(range(half))),
        f"repaired in layers {half} to {layers - 1}": (
            reuse,
            None,
            repaired_only_in(range(half, layers)),
        ),
        "Master agent of middle private length": (reuse, _middle, nullcontext()),
        "Master agent of least private length": (reuse, _shortest, nullcontext()),
        "last agent as Master agent": (reuse, lambda prompts: list(prompts)[-1], nullcontext()),
        "deviation of all siblings": ("master/deviation:0.15", None, nullcontext()),
        "deviation of one sibling": ("master/deviation:0.15", None, ranked_by_one_sibling()),
        **{
            f"{count} leading rows": (f"master/leading:{count}", None, nullcontext())
            for count in (8, 12, 16, 24, 32)
        },
        **{
            f"{count} leading rows and collecting tokens": (
                f"master/leading:{count}",
                None,
                repaired_beside(collecting, BLOCK_SIZE),
            )
            for count in (1, 4, 8, 16)
        },
        **{
            f"{share:.0%} of the rows by {score}": (
                "master/leading:1",
                None,
                repaired_beside(signals.most(score, share), BLOCK_SIZE),
            )
            for score in SCORES
            for share in (0.15, 0.25)
        },
    }
    for name, (way, first, changed) in ideas.items():
        if not any(part in name for part in only):
            continue
        figures = []
        with changed:
            for session in sessions:
                figures += measure(model, way, [_led(one, first) for one in session.rounds])
        kls = [kl for one in figures for kl in one.kl.values()]
        result[name] = {
            "rows": sum(one.rows for one in figures),
            "overridden": sum(one.overridden for one in figures),
            "siblings": siblings_kl(figures),
            "p90": spread([kl for own, _ in siblings(figures, figures) for kl in own]).p90,
            "all": sum(kls) / len(kls),
        }
        print(name, result[name], flush=True)
    return result


def shared_repairs(rounds: Iterable[Round], selection: str) -> dict[str, float]:
    """How many repaired rows a sibling could take from another.

    ``unseen``: rows of one Master that an earlier sibling repairs too, behind the same segments
    unseen by the Master. ``context``: behind the same shared segments in the same order.
    """
    repaired = unseen_alike = context_alike = 0
    for one in rounds:
        decisions = decide(
            one.prompts, lambda _: None, {}, parse_selection(selection), Source.MASTER, 8
        )
        known: dict[object, int] = {}
        for decision in decisions:
            starts = {span.begin: span for span in decision.spans if span.kind is RowKind.REPAIRED}
            for use in decision.uses:
                if use.delta not in starts:
                    continue
                rows = starts[use.delta].end - use.delta
                repaired += rows
                left, position = [], 0
                for segment in decision.segments:
                    if position < use.delta and segment.is_shared:
                        left.append(segment.digest)
                    position += segment.length
                unseen = frozenset(left) - use.master.seen
                for kind in (unseen, tuple(left)):
                    key = (use.master.digest, kind)
                    alike = min(rows, known.get(key, 0))
                    known[key] = max(rows, known.get(key, 0))
                    if kind is unseen:
                        unseen_alike += alike
                    else:
                        context_alike += alike
    return {"repaired": repaired, "unseen": unseen_alike, "context": context_alike}


@contextmanager
def repaired_only_in(layers: Iterable[int]) -> Iterator[None]:
    """In other layers the rows of the Master stand where a repaired row would."""
    repaired = frozenset(layers)
    enter, write = Step.__enter__, Executor.write
    steps: list[Step] = []

    def entered(step: Step) -> Step:
        steps[:] = [step]
        return enter(step)

    def changed(
        executor: Executor, layer: int, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor
    ) -> None:
        write(executor, layer, k, v, slots, positions)
        if layer not in repaired:
            for part in steps[0]._planned._parts:
                if not part.is_decode:
                    _put_back(executor, part, layer)

    with (
        mock.patch.object(Step, "__enter__", entered),
        mock.patch.object(Executor, "write", changed),
    ):
        yield


def _put_back(executor: Executor, part: StepPart, layer: int) -> None:
    block, rope, pool = executor.pool.block_size, executor.ropes[layer], executor.pool
    tables = (rope.cos, rope.sin, rope.interleaved)
    last = part.state.decision.length - 1  # whose logits the prompt is for; it is no repair
    for use in part.state.uses:
        over = use.overridden(block)
        over = over[np.isin(use.delta + over, part.positions[part.positions < last])]
        if not len(over):
            continue
        at = torch.from_numpy((use.delta + over).astype(np.int32))
        origin = torch.from_numpy((use.master.origin + over).astype(np.int32))
        source = torch.from_numpy(slots_of(use.master.pages, use.length, block)[over])
        target = torch.from_numpy(part.state.slots(at.numpy()))
        k, v = pool.k_pools[layer], pool.v_pools[layer]
        ops.rope_rotate_out(k, source, target, origin, at, *tables, 1.0, k)
        ops.rope_rotate_out(v, source, target, None, None, *tables, 1.0, v)


def ranked_by_one_sibling() -> AbstractContextManager[Any]:
    """The first user of a Master chooses for all."""
    deviation = ops.key_deviation

    def changed(k: Tensor, fresh: Tensor, *others: Any) -> Tensor:
        return deviation(k, fresh[:1], *others)

    return mock.patch.object(ops, "key_deviation", changed)


def _led(one: Round, first: Callable[[Prompts], str] | None) -> Round:
    if first is None:
        return one
    name = first(one.prompts)
    return replace(one, prompts={name: one.prompts[name], **one.prompts})


def _by_private_length(prompts: Prompts) -> Sequence[str]:
    length = {
        agent: sum(segment.length for segment in segments if not segment.is_shared)
        for agent, segments in prompts.items()
    }
    return sorted(prompts, key=lambda agent: length[agent])


def _middle(prompts: Prompts) -> str:
    return _by_private_length(prompts)[len(prompts) // 2]


def _shortest(prompts: Prompts) -> str:
    return _by_private_length(prompts)[0]


def text(result: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| idea | rows computed | overridden | siblings' KL | 90 % | KL |",
        "| --- |" + " --- |" * 5,
    ]
    for name, one in result.items():
        if name == "shared repairs":
            continue
        lines.append(
            f"| {name} | {one['rows']:.0f} | {one['overridden']:.0f} | {one['siblings']:.4f} "
            f"| {one['p90']:.4f} | {one['all']:.4f} |"
        )
    shared = result["shared repairs"]
    lines += [
        "",
        f"Of {shared['repaired']:.0f} repaired rows {shared['unseen']:.0f} are repaired by an "
        "earlier sibling behind the same unseen segments, "
        f"{shared['context']:.0f} behind the same shared segments.",
    ]
    return "\n".join(lines)
