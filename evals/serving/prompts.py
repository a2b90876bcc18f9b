"""What the agents of a round ask, and how what they write is handed out for the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evals.capacity.rounds import Shape
from evals.capacity.rounds import Society as MadeUp
from evals.workloads import RecordedAgent, RecordedRound, read_rounds
from tokendance.host.segments import Segment, private, shared

Encode = Callable[[str], list[int]]
Said = Mapping[str, Sequence[int]]
"""By agent, the token ids that it wrote in the round before."""


@dataclass(frozen=True)
class Ask:
    """One agent's request in a round.

    Attributes:
        agent: its name.
        token_ids: of the prompt.
        shared: where shared segments stand in it, ``(begin, end)``, ascending.
        output: tokens that it writes, neither more nor less.
    """

    agent: str
    token_ids: list[int]
    shared: list[tuple[int, int]]
    output: int


class Society(Protocol):
    """Agents that hold rounds together.

    Attributes:
        name: societies' names differ.
        rounds: how many they can hold.
    """

    name: str
    rounds: int

    def asks(self, number: int, said: Said) -> list[Ask]:
        """Of a round; rounds are asked for in order, with what was written in the one before."""
        ...


class Recorded:
    """Recorded rounds, in which what agents now write takes the place of what they once wrote.

    It is as long as what was recorded, so that prompts keep their lengths, whoever serves them.

    Args:
        name: of the society.
        recorded: rounds of one session. The last one is not held: how much was written in it
            stands in none that follows.
        encode: text to token ids, no special tokens added.
        agents: only the first so many. What the others wrote is in no prompt.

    Raises:
        ValueError: there are fewer agents, or there is one round.
    """

    def __init__(
        self, name: str, recorded: Sequence[RecordedRound], encode: Encode, agents: int
    ) -> None:
        self._recorded = recorded
        self.name = name
        self.rounds = len(recorded) - 1
        most = min(len(one.agents) for one in recorded)
        if not 1 <= agents <= most:
            raise ValueError(f"agents: expected 1..{most} of {recorded[0].source}, got {agents}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected two or more at {recorded[0].source}, got 1")
        self._agents = agents
        self._encode = lru_cache(maxsize=None)(encode)
        texts = {
            block.block_id: block.text
            for one in recorded
            for agent in one.agents
            for block in agent.blocks
        }
        self._written: dict[str, str] = {}  # by the id of a block, what was recorded
        self._others: set[str] = set()
        for one in recorded:
            for index, agent in enumerate(one.agents):
                if agent.output_id is None:
                    continue
                if index < agents:
                    self._written[agent.output_id] = texts.get(agent.output_id, "")
                else:
                    self._others.add(agent.output_id)
        self._now: dict[str, Sequence[int]] = {}  # what was written here

    def asks(self, number: int, said: Said) -> list[Ask]:
        if number == 0:
            self._now = {}
        else:
            for agent in self._agents_of(self._recorded[number - 1]):
                if agent.output_id is not None:
                    self._now[agent.output_id] = said[agent.name]
        return [
            ask(agent.name, [*self._segments(agent)], self._length(agent.output_id))
            for agent in self._agents_of(self._recorded[number])
        ]

    def _agents_of(self, recorded: RecordedRound) -> Sequence[RecordedAgent]:
        return recorded.agents[: self._agents]

    def _length(self, output_id: str | None) -> int:
        return max(len(self._encode(self._written.get(output_id or "", ""))), 1)

    def _segments(self, agent: RecordedAgent) -> Sequence[Segment]:
        found = []
        for block in agent.blocks:
            if block.block_id in self._others:
                continue
            ids = self._now.get(block.block_id or "")
            if ids is None:
                ids = self._encode(block.text)
            if len(ids):
                found.append((shared if block.is_shared else private)(ids))
        return found


class Trace:
    """Made-up prompts of a given shape, cut out of a text.

    Args:
        name: of the society.
        index: societies of different indices have different texts.
        agents: how many.
        shape: of the prompts.
        text: token ids.
        rounds: how many they can hold.
    """

    def __init__(
        self,
        name: str,
        index: int,
        agents: int,
        shape: Shape,
        text: NDArray[np.int32],
        rounds: int = 1 << 30,
    ) -> None:
        self.name, self.rounds = name, rounds
        self._made = MadeUp(index, agents, shape, text)

    def asks(self, number: int, said: Said) -> list[Ask]:
        made = self._made.round(number, 0.0, said if number else None)
        return [ask(one.agent, one.prompt, one.output) for one in made.requests]


def ask(agent: str, segments: Sequence[Segment], output: int) -> Ask:
    """The request of a prompt of segments."""
    ids: list[int] = []
    spans = []
    for segment in segments:
        if segment.is_shared:
            spans.append((len(ids), len(ids) + segment.length))
        ids += segment.token_ids.tolist()
    return Ask(agent, ids, spans, output)


def text_of(path: Path, encode: Encode) -> NDArray[np.int32]:
    """Token ids of a recording's texts, each once, one after the other."""
    texts = {
        block.text: None
        for one in read_rounds(path)
        for agent in one.agents
        for block in agent.blocks
    }
    return np.concatenate([np.array(encode(text), dtype=np.int32) for text in texts])
