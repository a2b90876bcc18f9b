"""Rounds of societies of agents, as traffic: who asks for what, and when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
from numpy.typing import NDArray

from tokendance.host.segments import Segment, private, shared


@dataclass(frozen=True)
class Shape:
    """What the prompts of a round hold, in tokens.

    A prompt is a system prompt that all agents have, the agent's own persona and memory, what is
    handed to everybody, the last round's outputs of all agents in one order, and a tail.

    Attributes:
        system: at the front of every prompt of a society.
        own: private to an agent, the same in every round.
        output: what an agent writes in a round, and everybody reads in the next.
        board: handed to everybody besides, new in every round.
        tail: private, new in every round.
    """

    system: int = 512
    own: int = 512
    output: int = 64
    board: int = 0
    tail: int = 16

    def scaled(self, factor: float) -> Shape:
        """All lengths divided by ``factor``, rounded, what is there to one token at least."""
        return Shape(*(max(round(one / factor), min(one, 1)) for one in astuple(self)))


SHAPES = {
    "all-gather": Shape(),
    # KVCMAS's parameters: a large board, a hop's output of 128 tokens.
    "board-2k": Shape(system=1024, own=512, output=128, board=2048, tail=5),
    "board-8k": Shape(system=1024, own=512, output=128, board=8192, tail=5),
}


@dataclass(eq=False)
class Request:
    """One agent's prompt in one round.

    Attributes:
        agent: its name.
        prompt: segments.
        output: tokens that it decodes.
        arrival: seconds.
        tokens: that it has.
        first, last: when its first and its last token were there, or None.
    """

    agent: str
    prompt: list[Segment]
    output: int
    arrival: float
    tokens: int = 0
    first: float | None = None
    last: float | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return sum(segment.length for segment in self.prompt)

    def sampled(self, now: float) -> None:
        """It has one token more."""
        self.tokens += 1
        if self.first is None:
            self.first = now
        if self.tokens == self.output:
            self.last = now


@dataclass(eq=False)
class Round:
    """The requests of one round of one society, which come together."""

    society: int
    number: int
    arrival: float
    requests: list[Request] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return all(request.last is not None for request in self.requests)

    @property
    def latency(self) -> float:
        """Seconds from the arrival to the last token of the last agent."""
        return max(request.last or 0.0 for request in self.requests) - self.arrival

    @property
    def first_latency(self) -> float:
        """Seconds from the arrival until every agent has its first token."""
        return max(request.first or 0.0 for request in self.requests) - self.arrival


class Society:
    """Makes the prompts of one society's rounds.

    Args:
        index: of the society.
        agents: how many.
        shape: of the prompts.
        text: token ids that prompts are cut out of, one piece after the other; without it every
            token is another one, and stands for a text of its own.
    """

    PERIOD = 1 << 30  # of token ids that are told apart

    def __init__(
        self, index: int, agents: int, shape: Shape, text: NDArray[np.int32] | None = None
    ) -> None:
        self.index = index
        self.shape = shape
        self._text = text
        self.names = [f"{index}/{agent}" for agent in range(agents)]
        self._next = index * 7_368_787  # societies share no text
        self._system = shared(self._tokens(shape.system))
        self._own = [private(self._tokens(shape.own)) for _ in self.names]
        self._said = [shared(self._tokens(shape.output)) for _ in self.names]

    def _tokens(self, count: int) -> np.ndarray:
        ids = (self._next + np.arange(count, dtype=np.int64)) % self.PERIOD
        self._next = (self._next + count) % self.PERIOD
        return ids.astype(np.int32) if self._text is None else self._text[ids % len(self._text)]

    def round(
        self, number: int, arrival: float, said: Mapping[str, Sequence[int]] | None = None
    ) -> Round:
        """The next round; rounds are asked for in order.

        Args:
            said: token ids that each agent wrote in the round before; made up by default.
        """
        shape = self.shape
        if said is not None:
            self._said = [shared(said[name]) for name in self.names if len(said[name])]
        board = [shared(self._tokens(shape.board))] if shape.board else []
        made = Round(self.index, number, arrival)
        for name, own in zip(self.names, self._own, strict=True):
            tail = private(self._tokens(shape.tail))
            prompt = [self._system, own, *board, *self._said, tail]
            made.requests.append(Request(name, prompt, shape.output, arrival))
        self._said = [shared(self._tokens(shape.output)) for _ in self.names]
        return made


def arrivals(
    agents: int, shape: Shape, rate: float, rounds: int, societies: int = 1, lead: float = 0.0
) -> Iterator[Round]:
    """Rounds at equal intervals, of societies in turn.

    Args:
        agents: of a society.
        shape: of the prompts.
        rate: rounds a second.
        rounds: how many.
        societies: how many take turns. A society's next round comes at its time even if the one
            before has not ended; it waits then, and the wait counts.
        lead: seconds by which all rounds but the societies' first ones come later: in those
            everything is new.
    """
    all_of_them = [Society(index, agents, shape) for index in range(societies)]
    for index in range(rounds):
        society = all_of_them[index % societies]
        wait = lead if index >= societies else 0.0
        yield society.round(index // societies, wait + index / rate)
