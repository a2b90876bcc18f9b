"""Societies of agents hold their rounds through a server: all of a round at once, then gathered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException

from evals.serving.client import Answer, complete
from evals.serving.prompts import Ask, Society
from evals.serving.servers import Server

SETTLES = 0.3  # seconds until a server's metrics have what its last answer has changed


@dataclass(frozen=True)
class Arrivals:
    """When rounds come.

    Attributes:
        rate: rounds a second of all societies together, at equal intervals, in turns. None: a
            society's next round comes when its last one has ended, and the agents have thought.
        think: seconds that they think, where there is no rate.
        rounds: that each society holds, without its first one, in which everything is new and
            which has ended before the others come.
    """

    rate: float | None = None
    think: float = 0.0
    rounds: int = 3

    def due(self, index: int, number: int, societies: int) -> float:
        """Seconds after the first rounds at which a round is due, where there is a rate."""
        assert self.rate is not None
        return ((number - 1) * societies + index) / self.rate


@dataclass
class RoundServed:
    """One round.

    Attributes:
        society, number: which.
        late: seconds by which it began after it was due, since the one before had not ended.
        latency: seconds from when it was due to the last token of the last agent.
        first: per agent, seconds from its request to its first token.
        between: per agent, the mean seconds between its tokens; of those that have two.
        said: per agent, the token ids that it wrote.
        failures: per agent that has not got what it asked for, why.
        prompt_rows: of all its prompts.
    """

    society: str
    number: int
    late: float
    latency: float
    first: dict[str, float]
    between: dict[str, float]
    said: dict[str, list[int]]
    failures: dict[str, str]
    prompt_rows: int


@dataclass
class Served:
    """A run.

    Attributes:
        rounds: in the order of their ends, without the first ones.
        peak_bytes: of keys and values, the most that the metrics said while rounds were served.
        between_bytes: the most that they said when no round was.
        rows_computed: prompt rows, without those of the first rounds.
        seconds: from the end of the first rounds to that of the last.
        firsts: the first round of each society, which is not measured.
    """

    rounds: list[RoundServed] = field(default_factory=list)
    peak_bytes: int = 0
    between_bytes: int = 0
    rows_computed: int = 0
    seconds: float = 0.0
    firsts: list[RoundServed] = field(default_factory=list)


def serve(
    server: Server,
    societies: Sequence[Society],
    arrivals: Arrivals,
    limit: float | None = None,
    watch_every: float = 0.5,
) -> Served:
    """Lets societies hold their rounds. The server's caches are emptied before.

    Args:
        limit: seconds. When a round has taken longer, no further one begins.
        watch_every: seconds between two looks at the server's metrics.
    """
    server.forget()
    served, stop = Served(), threading.Event()
    said: dict[str, Mapping[str, Sequence[int]]] = {}
    with ThreadPoolExecutor(len(societies)) as pool:
        served.firsts = [*pool.map(lambda one: hold(server.url, one, 0, {}), societies)]
        said = {one.society: one.said for one in served.firsts}
    time.sleep(SETTLES)
    before = server.held()
    served.between_bytes = before.kv_bytes
    began = time.monotonic()

    def hold_rounds(index: int) -> None:
        society = societies[index]
        last = said[society.name]
        for number in range(1, min(arrivals.rounds + 1, society.rounds)):
            due = time.monotonic() + arrivals.think
            if arrivals.rate is not None:
                due = began + arrivals.due(index, number, len(societies))
            if stop.wait(max(due - time.monotonic(), 0.0)):
                return
            late = max(time.monotonic() - due, 0.0)
            one = hold(server.url, society, number, last)
            one = replace(one, late=late, latency=one.latency + late)
            served.rounds.append(one)
            last = one.said
            if limit is not None and one.latency > limit:
                stop.set()

    with _watching(server, served, watch_every), ThreadPoolExecutor(len(societies)) as pool:
        list(pool.map(hold_rounds, range(len(societies))))
        served.seconds = time.monotonic() - began
    time.sleep(SETTLES)
    after = server.held()
    served.between_bytes = max(served.between_bytes, after.kv_bytes)
    served.peak_bytes = max(served.peak_bytes, served.between_bytes)
    served.rows_computed = after.rows - before.rows
    return served


def hold(url: str, society: Society, number: int, said: Mapping[str, Sequence[int]]) -> RoundServed:
    """One round: asks for all agents at once, and gathers what they write."""
    asks = society.asks(number, said)
    name = f"{society.name} {number}"
    begun = time.monotonic()

    def one(ask: Ask) -> Answer:
        own = replace(ask, agent=f"{society.name}/{ask.agent}")
        return complete(url, own, name, len(asks))

    with ThreadPoolExecutor(len(asks)) as pool:
        answers = dict(zip([ask.agent for ask in asks], pool.map(one, asks), strict=True))
    ended = time.monotonic()
    return RoundServed(
        society=society.name,
        number=number,
        late=0.0,
        latency=ended - begun,
        first={who: a.times[0] - begun for who, a in answers.items() if a.times},
        between={
            who: (a.times[-1] - a.times[0]) / (len(a.times) - 1)
            for who, a in answers.items()
            if len(a.times) > 1
        },
        said={who: a.token_ids for who, a in answers.items()},
        failures={who: a.failure for who, a in answers.items() if a.failure is not None},
        prompt_rows=sum(len(ask.token_ids) for ask in asks),
    )


@contextmanager
def _watching(server: Server, served: Served, every: float) -> Iterator[None]:
    """Notes the most bytes that the server holds within the block."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every):
            try:
                served.peak_bytes = max(served.peak_bytes, server.held().kv_bytes)
            except (OSError, HTTPException):  # it fails its requests too, which tell of it
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
