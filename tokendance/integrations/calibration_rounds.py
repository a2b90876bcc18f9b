"""Rounds that a model is calibrated on: of one's own, from a file, or a small one that is here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokendance.host.segments import Segment, private, shared

Round = Mapping[str, Sequence[Segment]]

_SETTING = (
    "You are {name}, {who}. The six of you share a workshop in an old mill and meet every Monday "
    "to agree on one thing. Today's question: shall the mill's river turbine be repaired this "
    "year, or shall the money go into a new roof? Speak plainly, answer the others by name, and "
    "keep to three sentences.\n"
)
_PEOPLE = {
    "Ines": "a carpenter who has rented the ground floor for eleven years and knows every beam. "
    "You lost two weeks of work in March, when rain came through onto a finished table",
    "Tomas": "a clockmaker on the second floor. You pay the largest share of the electricity, "
    "and last winter's bill was 412 euros",
    "Wanda": "a weaver who keeps the common accounts: 9,300 euros are left, of which 1,200 are "
    "promised to the fire inspection",
    "Yusuf": "a potter. Your kiln needs 11 kilowatts for nine hours at a time, and the turbine "
    "gave 14 when it last ran; your grandfather built its gate",
    "Klara": "a bookbinder under the north gable. Paper and damp do not go together, and you have "
    "an offer for a dry room in town that is good until the end of the month",
    "Bram": "a violin maker who came two years ago. You were a roofer before that and still own "
    "the ladders; you would rather not stand on one again",
}
_MESSAGES = {
    "Ines": "Ines: The roof over the north gable will not see another winter. Two of the rafters "
    "are soft to the depth of my thumb, and the tarpaulin is held by bricks. If we wait, we pay "
    "for the floor below it as well.\n",
    "Tomas": "Tomas: I asked the engineer in the valley, and she says that the turbine needs a "
    "new bearing and a new gate, 5,600 euros in all. It would pay for itself in four years. "
    "Wanda, does that leave enough for a patch on the roof?\n",
    "Wanda": "Wanda: It leaves 2,500 euros, and the cheapest offer for the gable alone is 3,900. "
    "We could ask the town: there is a fund for old mills, and it closes on the last day of "
    "April. I can write the letter if somebody measures the roof.\n",
    "Yusuf": "Yusuf: My brother and I can make the gate from the oak that lies in the yard, so "
    "strike 1,500 from that sum. Tomas, would the engineer come for the bearing only? And Ines, "
    "please tell us how long the tarpaulin will hold.\n",
    "Klara": "Klara: If I go, so does a sixth of the rent, and nobody has counted that yet. I "
    "would stay for a dry corner, not for a whole roof: four square metres over my press are "
    "enough. Bram, you know roofs, what would that take?\n",
    "Bram": "Bram: Two days, thirty slates and one person to hold the ladder. I will do it once, "
    "for Klara's press, if the turbine is what we vote for. But the rafters that Ines found are "
    "another matter: those need a carpenter before they need a roofer.\n",
}
_QUESTION = "What do you say now, {name}?\n{name}:"


def sample_round(tokenizer: Any) -> Round:
    """Six agents who have heard each other, each in an order of its own, and are to answer."""
    names = list(_PEOPLE)
    agents = {}
    for index, name in enumerate(names):
        others = [*names[index + 1 :], *names[: index + 1]]
        agents[name.lower()] = [
            {"private": _SETTING.format(name=name, who=_PEOPLE[name])},
            *({"shared": _MESSAGES[other]} for other in others),
            {"private": _QUESTION.format(name=name)},
        ]
    return round_of(agents, tokenizer)


def read_rounds(path: Path, tokenizer: Any) -> list[Round]:
    """Rounds of one's own: JSON lines, one round each.

    A round is an object: per agent the parts of its prompt in order, each an object with one key,
    ``"private"`` or ``"shared"``, and its text::

        {"ada": [{"private": "You are Ada."}, {"shared": "Bo says: ..."}], "bo": [...]}

    Parts are tokenised one by one, without special tokens, and nothing is put between them.

    Raises:
        ValueError: a line is not of this form; the message begins with ``path:line:``.
        OSError: the file cannot be read.
    """
    rounds = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rounds.append(round_of(json.loads(line), tokenizer))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    return rounds


def round_of(agents: Any, tokenizer: Any) -> Round:
    """One round of `read_rounds`, read from JSON.

    Raises:
        ValueError: something else.
    """
    if not isinstance(agents, dict) or not agents:
        raise ValueError(f"expected an object of agents, got {_shown(agents)}")
    encode = partial(tokenizer.encode, add_special_tokens=False)
    result = {agent: list(_segments(agent, parts, encode)) for agent, parts in agents.items()}
    for agent, prompt in result.items():
        if not prompt:
            raise ValueError(f"{agent}: expected a prompt with at least one token, got none")
    return result


def _segments(agent: str, parts: Any, encode: Any) -> Iterator[Segment]:
    if not isinstance(parts, list):
        raise ValueError(f"{agent}: expected a list of parts, got {_shown(parts)}")
    for part in parts:
        one = part if isinstance(part, dict) and len(part) == 1 else {}
        for kind, make in (("private", private), ("shared", shared)):
            if isinstance(one.get(kind), str):
                if token_ids := encode(one[kind]):
                    yield make(token_ids)
                break
        else:
            raise ValueError(
                f'{agent}: expected parts {{"private": TEXT}} or {{"shared": TEXT}}, '
                f"got {_shown(part)}"
            )


def _shown(value: Any) -> str:
    return f"{json.dumps(value):.60}"
