"""A town meeting: who has said what, and the prompts that follow from it.

Prompts are made as a workload file holds them (see `evals.workloads`), so that what is written
with `Meeting.line` replays as the very prompts that were run.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from evals.society.personas import TOWN, Persona
from evals.workloads import RecordedAgent, RecordedBlock, RecordedRound

__all__ = ["REQUESTS", "WORKLOAD", "Meeting"]

WORKLOAD = "town_square"
_SCENE = "scene"
# What people are asked for, round by round: a small model that is asked the same repeats itself.
REQUESTS = (
    "Say what you think about it and why.",
    "Say which neighbour you agree with, and which one is wrong.",
    "Say what should be done instead.",
    "Say yes or no, and why.",
)


class Meeting:
    """The state of one conversation in All-Gather rounds.

    The prompt of a person is its persona, the scene, its own messages of some rounds before the
    last, everybody's messages of the last round in an order of its own, and the task. The markers
    are those of ChatML.

    Args:
        people: at least one.
        topic: what is talked about, a sentence or two.
        seed: of the orders in which people hear each other.
        history: own earlier messages that a prompt repeats at most; it keeps prompts bounded.
        session: name of the conversation in a recording.
    """

    def __init__(
        self,
        people: Sequence[Persona],
        topic: str,
        seed: int = 0,
        history: int = 3,
        session: str = "meeting",
    ) -> None:
        if not people:
            raise ValueError("people: expected at least one, got none")
        if history < 0:
            raise ValueError(f"history: expected at least 0, got {history}")
        self.people = list(people)
        self.topic = topic
        self.history = history
        self.session = session
        self._seed = seed
        self._said: list[dict[str, str]] = []
        self._defined = {_SCENE: f"{TOWN}\n\nTonight the town meets at the inn. {topic}\n\n"}
        for person in self.people:
            self._defined[_persona_id(person.name)] = (
                f"<|im_start|>system\n{person.biography}<|im_end|>\n<|im_start|>user\n"
            )

    @property
    def round(self) -> int:
        """Number of the round that is to be held, from 0."""
        return len(self._said)

    def prompts(self) -> RecordedRound:
        """The prompts of the present round."""
        messages = {
            _message_id(number, name): text
            for number, said in enumerate(self._said)
            for name, text in said.items()
        }

        def blocks(segment: Mapping[str, Any]) -> list[RecordedBlock]:
            if "text" in segment:
                return [RecordedBlock(segment["kind"], segment["text"])]
            refs = segment["ref"] if isinstance(segment["ref"], list) else [segment["ref"]]
            return [
                RecordedBlock("shared", messages[ref], ref)
                if ref in messages
                else RecordedBlock(segment["kind"], self._defined[ref], ref)
                for ref in refs
            ]

        agents = tuple(
            RecordedAgent(
                person.name,
                tuple(block for segment in self._segments(person) for block in blocks(segment)),
                _message_id(self.round, person.name),
            )
            for person in self.people
        )
        return RecordedRound(
            WORKLOAD, self.session, self.round, self._time, agents, f"round {self.round + 1}"
        )

    def line(self) -> dict[str, Any]:
        """The present round as a line of a workload file, to be written as JSON."""
        return {
            "workload": WORKLOAD,
            "session": self.session,
            "round": self.round,
            "t": self._time,
            "defs": [
                {"id": name, "kind": "shared" if name == _SCENE else "system", "text": text}
                for name, text in self._defined.items()
            ]
            if self.round == 0
            else [],
            "shared": self.blocks(self.round - 1) if self.round else [],
            "agents": [
                {
                    "id": person.name,
                    "segments": self._segments(person),
                    "out": _message_id(self.round, person.name),
                }
                for person in self.people
            ],
        }

    def blocks(self, number: int) -> list[dict[str, Any]]:
        """What was said in a round, as a workload file holds it; a last line's ``final``."""
        return [
            {"id": _message_id(number, name), "author": name, "synthetic": True, "text": text}
            for name, text in self._said[number].items()
        ]

    def add(self, messages: Mapping[str, str]) -> None:
        """Ends the round: hands everybody's message to everybody.

        Args:
            messages: by name, as they stand in later prompts.
        """
        if set(messages) != {person.name for person in self.people}:
            raise ValueError(
                f"messages: expected one of each of {[person.name for person in self.people]}, "
                f"got {list(messages)}"
            )
        self._said.append({person.name: messages[person.name] for person in self.people})

    @property
    def _time(self) -> str:
        return f"round {self.round + 1}"

    def _segments(self, person: Persona) -> list[dict[str, Any]]:
        """One prompt as a workload file holds it."""
        name, last = person.name, self.round - 1
        segments: list[dict[str, Any]] = [
            {"kind": "system", "ref": _persona_id(name)},
            {"kind": "shared", "ref": _SCENE},
        ]
        before = range(max(last - self.history, 0), max(last, 0))
        if before:
            segments += [
                {"kind": "private", "text": "You said earlier this evening:\n"},
                {"kind": "private", "ref": [_message_id(number, name) for number in before]},
                {"kind": "private", "text": "\n"},
            ]
        if last >= 0:
            segments.append({"kind": "private", "text": "This was said just now:\n"})
            segments += [
                {"kind": "shared", "ref": _message_id(last, other)} for other in self._order(name)
            ]
            segments.append({"kind": "private", "text": "\n"})
        request = REQUESTS[self.round % len(REQUESTS)]
        task = (
            f"Write what {name}, {person.role}, says next. {request} "
            "One or two sentences, no stage directions.<|im_end|>\n<|im_start|>assistant\n"
        )
        segments.append({"kind": "task", "text": task})
        return segments

    def _order(self, name: str) -> list[str]:
        """Whom a person hears in which order: one of its own in every round."""
        names = [person.name for person in self.people]
        random.Random(f"{self._seed}/{self.round}/{name}").shuffle(names)
        return names


def _persona_id(name: str) -> str:
    return f"persona.{name}"


def _message_id(number: int, name: str) -> str:
    return f"{number}.{name}"
