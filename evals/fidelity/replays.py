"""Recorded rounds, what full recompute makes of them, and ways of reuse run against that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from evals.baselines import FullPrefill, PerRequestBlend
from evals.replay import divergence_of
from evals.workloads import find_workload, read_rounds, tokenize_round
from tokendance.collector import KVCollector
from tokendance.device.quantization import Quantization
from tokendance.host.segments import Segment, private, shared
from tokendance.host.selection import parse_selection
from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of
from tokendance.store import DiffStore

Prompts = Mapping[str, Sequence[Segment]]

# What is replayed of each workload: whole rounds, the same for every way of reuse.
WORKLOADS: dict[str, dict[str, Any]] = {
    "town_square": {"rounds": (1, 4)},
    "debate": {"session": "gsm_qwen3-14b/00", "rounds": (1, 3), "chat": True},
    "agentsociety": {"rounds": (1, 2), "agents": 8},
    "generative_agents_25": {"rounds": (2, 3), "agents": 8, "max_private": 2},
    "generative_agents_3": {"rounds": (1, 3)},
    "town_meetings": {"rounds": (1, 4)},
}
PIC = "pic"
BLOCK_SIZE = 8
"""Of the stores."""
NEUTRAL = "neutral"
OUTPUTS_AND_ALONE = "producer+alone"
SHORT_AND_ALONE = "master+alone"


@dataclass
class Round:
    """One recorded round and what full recompute makes of it.

    Attributes:
        prompts: per agent its segments.
        outputs: per agent the tokens that the recording says it wrote, where a later round has
            them.
        fed: per agent full recompute's greedy continuation, without its last token.
        logits: per agent ``[len(fed) + 1, vocabulary]``: of the prompt's last row and of ``fed``.
    """

    session: str
    number: int
    prompts: Prompts
    outputs: dict[str, list[int]]
    fed: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Session:
    """Rounds of one session, one after the other, and those ``before`` the first of them."""

    before: list[Round]
    rounds: list[Round]

    @property
    def name(self) -> str:
        return self.rounds[0].session


@dataclass
class Figures:
    """One way of reuse in one round; ``kl`` and ``top1`` are against full recompute, per agent."""

    session: str
    number: int
    prompt_rows: int
    rows: float
    overridden: int
    master_agents: list[str]
    kl: dict[str, float]
    top1: dict[str, float]


def read_workload(name: str, tokenizer: Any) -> list[Round]:
    """The rounds of `WORKLOADS`, without full recompute's part."""
    (session,) = read_sessions(name, tokenizer)
    return session.rounds


def read_sessions(
    name: str,
    tokenizer: Any,
    rounds: int | None = None,
    agents: int | None = None,
    before: int = 0,
    session: str | None = None,
) -> list[Session]:
    """What is measured of a workload, without full recompute's part.

    Args:
        rounds: so many in all, as far as they are recorded: the session of `WORKLOADS` from its
            first round there to its end, then the sessions behind it from that round on; None: the
            rounds of `WORKLOADS`.
        agents: the first so many of each round; None: those of `WORKLOADS`.
        before: how many rounds in front of the first one come along.
        session: the one to begin with, instead of that of `WORKLOADS`.

    Raises:
        ValueError: there is no such session.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    chosen = {**WORKLOADS[name], **({} if agents is None else {"agents": agents})}
    begin, end = chosen.pop("rounds")
    usual = chosen.pop("session", None)
    first = session if session is not None else usual
    recorded = read_rounds(find_workload(name), **chosen)
    names = list(dict.fromkeys(one.session for one in recorded))
    if first not in (None, *names):
        raise ValueError(f"session: expected one of {', '.join(names)}, got {first!r}")
    names = names[names.index(first) if first else 0 :]
    result: list[Session] = []
    for current in names if rounds is not None else names[:1]:
        left = None if rounds is None else rounds - sum(len(one.rounds) for one in result)
        if left == 0:
            break
        own = [one for one in recorded if one.session == current]
        texts = {b.block_id: b.text for one in own for a in one.agents for b in a.blocks}
        made = [
            Round(
                current,
                one.round,
                tokenize_round(one, encode),
                {a.name: encode(texts[a.output_id]) for a in one.agents if a.output_id in texts},
            )
            for one in own
            if begin - before <= one.round and (rounds is not None or one.round < end)
        ]
        measured = [one for one in made if one.number >= begin][:left]
        result.append(Session([one for one in made if one.number < begin], measured))
    return result


def recompute(model: Any, rounds: Sequence[Round], new_tokens: int) -> None:
    """Fills in what full recompute says."""
    full = FullPrefill(model)
    for one in rounds:
        rows = {agent: [row] for agent, row in full.prefill_round(one.prompts).items()}
        one.fed = {agent: [] for agent in rows}
        for _ in range(new_tokens - 1):
            for agent, so_far in rows.items():
                one.fed[agent].append(int(so_far[-1].argmax()))
            for agent, found in full.decode({a: ids[-1:] for a, ids in one.fed.items()}).items():
                rows[agent].append(found[0])
        one.logits = {agent: torch.stack(parts) for agent, parts in rows.items()}


def make_engine(
    model: Any,
    source: str | Callable[[Segment], str],
    selection: str,
    quantization: Quantization | None = None,
    block_size: int = BLOCK_SIZE,
) -> Any:
    """A collector over an empty store of its own, and the engine that runs it."""
    store = DiffStore(
        geometry_of(model),
        rope_of(model, model.config.max_position_embeddings),
        "16GiB",
        block_size=block_size,
        quantization=quantization,
    )
    return TransformersEngine(model, KVCollector(store, source, parse_selection(selection)))


def measure(
    model: Any, way: str, rounds: Sequence[Round], before: Sequence[Round] = ()
) -> list[Figures]:
    """Runs a session's rounds, one after the other, by one way of reuse.

    Args:
        way: ``pic:RATIO``, ``SOURCE/SELECTION`` (as `KVCollector` and `parse_selection` name them),
            or with a source that is none of the collector's:
            ``neutral``: ``"master"`` with one more prompt in front that holds the first agent's
            shared segments alone, so that no agent's private context is in any Master. Its rows
            count. ``producer+alone``: what agents wrote by ``"producer"``, all else ``"alone"``.
            ``master+alone``: ``"alone"`` for the segments that are longer than the workload's
            median, ``"master"`` for the others.
        rounds: to be measured.
        before: whose outputs are there when the first one begins, if the source has them; nothing
            else of them is.
    """
    kind, _, rest = way.partition(":" if way.startswith(PIC) else "/")
    if kind == PIC:
        return _measure_pic(PerRequestBlend(model, float(rest)), rounds)
    engine = make_engine(model, source_of_way(kind, [*before, *rounds]), rest)
    produces = kind.startswith("producer")
    if produces:
        for one in before:
            _produce(engine, one)
    return [measure_round(engine, one, kind == NEUTRAL, produces) for one in rounds]


def source_of_way(kind: str, rounds: Sequence[Round]) -> str | Callable[[Segment], str]:
    """The collector's source for what `measure` calls ``kind``, over rounds of one workload."""
    if kind == OUTPUTS_AND_ALONE:
        written = {shared(ids).digest for one in rounds for ids in one.outputs.values()}
        return lambda segment: "producer" if segment.digest in written else "alone"
    if kind == SHORT_AND_ALONE:
        prompts = [prompt for one in rounds for prompt in one.prompts.values()]
        lengths = {s.digest: s.length for prompt in prompts for s in prompt if s.is_shared}
        middle = median(lengths.values())
        return lambda segment: "alone" if segment.length > middle else "master"
    return "master" if kind == NEUTRAL else kind


def _produce(engine: Any, one: Round) -> None:
    """Leaves a round's outputs in the store, decoded behind prompts that reuse nothing."""
    plan = engine.collector.plan(
        {agent: [private(s.token_ids) for s in prompt] for agent, prompt in one.prompts.items()}
    )
    engine.prefill(plan)
    engine.decode(plan, one.outputs)
    plan.commit()
    for agent in one.prompts:
        engine.collector.store.release(agent)


def _measure_pic(system: PerRequestBlend, rounds: Sequence[Round]) -> list[Figures]:
    result = []
    for one in rounds:
        first = system.prefill_round(one.prompts)
        rest = system.decode(one.fed)
        logits = {agent: torch.cat([row[None], rest[agent]]) for agent, row in first.items()}
        stats = system.stats
        result.append(
            Figures(
                one.session,
                one.number,
                stats.prompt_rows,
                stats.rows,
                stats.rows_overridden,
                [],
                *compare(one.logits, logits),
            )
        )
    return result


def measure_round(
    engine: Any, one: Round, neutral: bool = False, produces: bool = False
) -> Figures:
    """Runs and commits a round, with what its agents wrote if a later round is to find it."""
    prompts = dict(one.prompts)
    if neutral:
        first = next(iter(prompts.values()))
        prompts = {NEUTRAL: [segment for segment in first if segment.is_shared], **prompts}
    plan = engine.collector.plan(prompts)
    first = engine.prefill(plan)
    rest = engine.decode(plan, one.fed)
    figures = Figures(
        one.session,
        one.number,
        sum(segment.length for prompt in one.prompts.values() for segment in prompt),
        plan.rows_computed,
        plan.rows_overridden,
        [agent for agent in plan.master_agents if agent != NEUTRAL],
        *compare(one.logits, {a: torch.cat([first[a][None], rest[a]]) for a in one.prompts}),
    )
    for agent, ids in one.fed.items():
        plan.truncate(agent, plan.length(agent) - len(ids))
    if one.outputs and produces:
        engine.decode(plan, one.outputs)
    plan.commit()
    if neutral:
        engine.collector.store.release(NEUTRAL)
    return figures


def compare(
    reference: Mapping[str, Tensor], logits: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Per agent KL(reference || logits) in nats and the share of equal likeliest tokens."""
    kl = {a: float(divergence_of(rows, logits[a]).mean()) for a, rows in reference.items()}
    top1 = {
        a: float((rows.argmax(-1) == logits[a].argmax(-1)).double().mean())
        for a, rows in reference.items()
    }
    return kl, top1
