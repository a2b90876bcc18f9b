"""Trajectories: for how long do greedy agents say what they would say under full recompute?

Societies talk live under full recompute. Every other way of reuse gets the same prompts, round
after round, and is asked for its likeliest token after each of full recompute's. Up to the first
message that differs this is what a society of its own would have said; behind it, it says how often
a message differs that has the same past.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from evals.baselines import FullPrefill, PerRequestBlend, System
from evals.fidelity.samples import ratio_of_means, ratio_text
from evals.replay import CollectiveReuse
from evals.society import PERSONAS, TOPICS, Meeting
from evals.society.speech import clean_message, is_over, stop_tokens
from evals.workloads import tokenize_round
from tokendance.host.segments import Segment
from tokendance.host.selection import parse_selection

PIC = "pic:0.15"
WAYS = (PIC, "leading:12", "leading:16", "everything")
HISTORY = 3


class Scene(NamedTuple):
    """A society: its topic, who is the first of its people in `PERSONAS`, and how many talk."""

    topic: str
    first: int
    agents: int

    @property
    def name(self) -> str:
        return f"{self.topic}, {self.agents} from {PERSONAS[self.first].name} on"


SCENES = (
    Scene("bridge", 0, 3),
    Scene("market", 3, 4),
    Scene("festival", 6, 3),
    Scene("bell", 9, 5),
    Scene("bridge", 8, 4),
    Scene("market", 1, 5),
    Scene("festival", 4, 6),
    Scene("bell", 2, 3),
)
Json = list[dict[str, Any]]
"""Per society its ``scene``, ``prompt_rows``, ``rows`` computed by way, and ``rounds``: per round
and way each agent's ``[tokens said, tokens before the first that differs]``."""


def run(
    model: Any,
    tokenizer: Any,
    known: Sequence[dict[str, Any]],
    societies: int,
    rounds: int,
    new_tokens: int,
    save: Callable[[Json], None] = lambda _: None,
) -> Json:
    """Measures the first ``societies`` of `SCENES` that are not ``known``.

    Args:
        rounds: that each of them talks.
        new_tokens: of a message at most.
        save: is handed everything that is known after every society.
    """
    result = list(known)
    there = {one["scene"] for one in known}
    full: System = FullPrefill(model)
    systems: dict[str, System] = {
        way: PerRequestBlend(model)
        if way == PIC
        else CollectiveReuse(model, selection=parse_selection(way))
        for way in WAYS
    }
    for seed, scene in enumerate(SCENES[:societies]):
        if scene.name in there:
            continue
        for system in (full, *systems.values()):
            system.reset()
        people = PERSONAS[scene.first : scene.first + scene.agents]
        meeting = Meeting(people, TOPICS[scene.topic], seed, HISTORY)
        result.append(_measure(full, systems, tokenizer, meeting, scene.name, rounds, new_tokens))
        save(result)
        print(f"{scene.name}: {_parted(result[-1])}", flush=True)
    return result


def _measure(
    full: System,
    systems: Mapping[str, System],
    tokenizer: Any,
    meeting: Meeting,
    name: str,
    rounds: int,
    new_tokens: int,
) -> dict[str, Any]:
    encode = partial(tokenizer.encode, add_special_tokens=False)
    found: dict[str, Any] = {
        "scene": name,
        "prompt_rows": 0,
        "rows": dict.fromkeys(systems, 0.0),
        "rounds": [],
    }
    for _ in range(rounds):
        prompts = tokenize_round(meeting.prompts(), encode)
        labels = {agent: encode(f"{agent}:") for agent in prompts}
        tokens, said = speak(full, prompts, labels, tokenizer, new_tokens)
        found["prompt_rows"] += full.stats.prompt_rows
        found["rounds"].append({})
        for way, system in systems.items():
            found["rounds"][-1][way] = follow(system, prompts, labels, tokens)
            found["rows"][way] += system.stats.rows
        meeting.add({agent: f"{agent}: {text}\n" for agent, text in said.items()})
    return found


def speak(
    system: System,
    prompts: Mapping[str, Sequence[Segment]],
    labels: Mapping[str, Sequence[int]],
    tokenizer: Any,
    new_tokens: int,
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """A round of a system.

    Args:
        labels: tokens that each agent begins with.

    Returns:
        Per agent its likeliest tokens with the one that ends them, and what the others hear of it.
    """
    stop = stop_tokens(tokenizer)
    system.prefill_round(prompts)
    tokens: dict[str, list[int]] = {agent: [] for agent in prompts}
    said: dict[str, str] = {}
    rows = system.decode(labels)
    while rows:
        fed = {}
        for agent, logits in rows.items():
            own = tokens[agent]
            own.append(int(logits[-1].argmax()))
            spoken = own[:-1] if own[-1] in stop else own
            text = tokenizer.decode(spoken)
            over = own[-1] in stop or is_over(text)
            if over or len(own) == new_tokens:
                said[agent] = clean_message(text, over)
            else:
                fed[agent] = own[-1:]
        rows = system.decode(fed) if fed else {}
    return tokens, {agent: said[agent] for agent in prompts}


def follow(
    system: System,
    prompts: Mapping[str, Sequence[Segment]],
    labels: Mapping[str, Sequence[int]],
    tokens: Mapping[str, Sequence[int]],
) -> dict[str, list[int]]:
    """Per agent how many tokens were said, and how many of them come before the first that is not
    the system's likeliest."""
    system.prefill_round(prompts)
    rows = system.decode({agent: [*labels[agent], *own[:-1]] for agent, own in tokens.items()})
    found = {}
    for agent, own in tokens.items():
        likeliest = rows[agent][len(labels[agent]) - 1 :].argmax(-1).tolist()
        pairs = zip(likeliest, own, strict=True)
        same = next((at for at, (mine, other) in enumerate(pairs) if mine != other), len(own))
        found[agent] = [len(own), same]
    return found


def _parted(society: Mapping[str, Any]) -> dict[str, int | None]:
    """Per way the first round, from 1, in which somebody says something else; None: never."""
    return {
        way: next(
            (
                number
                for number, one in enumerate(society["rounds"], start=1)
                if any(same < said for said, same in one[way].values())
            ),
            None,
        )
        for way in WAYS
    }


def _messages(society: Mapping[str, Any], way: str) -> Iterator[list[int]]:
    for one in society["rounds"]:
        yield from one[way].values()


def text(result: Json) -> str:
    """Markdown. Intervals are those of `ratio_of_means`, over societies and their messages."""
    rounds = sum(len(one["rounds"]) for one in result)
    messages = sum(1 for society in result for _ in _messages(society, PIC))
    lines = [
        f"{len(result)} societies, {rounds} rounds, {messages} messages.",
        "",
        "| reuse | rows computed | parts in round | rounds without a difference | "
        "messages that differ (95 %) | of pic's (95 %) | tokens before it, median |",
        "| --- |" + " --- |" * 6,
    ]
    differ = {way: [_differ(society, way) for society in result] for way in WAYS}
    for way in WAYS:
        parted = [_parted(society)[way] for society in result]
        same = sum(
            all(same == said for said, same in one[way].values())
            for society in result
            for one in society["rounds"]
        )
        before = [
            same for society in result for said, same in _messages(society, way) if same < said
        ]
        # Over 1 of each message: the share that differs, and its interval.
        share = ratio_of_means([(one, [1.0] * len(one)) for one in differ[way]])
        rows = sum(one["rows"][way] for one in result) / sum(one["prompt_rows"] for one in result)
        cells = (
            way,
            f"{rows:.1%}",
            ", ".join("none" if one is None else str(one) for one in parted),
            f"{same} of {rounds}",
            f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})",
            ratio_text(list(zip(differ[way], differ[PIC], strict=True))),
            f"{median(before):.0f}" if before else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Societies, in this order: " + "; ".join(one["scene"] for one in result) + "."]
    return "\n".join(lines)


def _differ(society: Mapping[str, Any], way: str) -> list[float]:
    return [float(same < said) for said, same in _messages(society, way)]
