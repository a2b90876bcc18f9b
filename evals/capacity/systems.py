"""How systems plan what one device computes next. Each keeps its own books of one pool of KV rows.

All of them batch continuously: the decode rows of every running request are in each forward pass,
and prompts' rows fill it up to ``max_rows``. Requests are admitted in the order of their arrival as
long as prompt and output fit, and none is preempted.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from evals.capacity.cost import Work
from evals.capacity.rounds import Request
from tokendance.host.segments import Segment

BLOCK = 16
"""Rows of a block or page, in every system."""


@dataclass
class Pass:
    """One forward pass: what it does, and who gets a token by it."""

    work: Work
    sampled: list[Request] = field(default_factory=list)


class System(Protocol):
    """A way of serving rounds.

    Attributes:
        name: as on the command line.
        peak_rows: the most rows of keys and values that were in the pool, padding included.
    """

    name: str

    @property
    def peak_rows(self) -> int: ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Requests that have come together."""
        ...

    def forward(self) -> Pass | None:
        """Plans and books the next forward pass; None where there is nothing to do."""
        ...


def blocks_for(rows: int) -> int:
    return -(-rows // BLOCK)


class PrefixCache:
    """Blocks of rows found by all tokens up to their end, the longest unused evicted first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.users: dict[int, int] = {}  # by hash of all tokens up to the block's end
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.private = 0  # blocks that are not full, or whose contents nobody may find
        self.peak = 0

    @property
    def held(self) -> int:
        """Blocks that somebody uses."""
        return len(self.users) - len(self.idle) + self.private

    def matched(self, hashes: Sequence[int]) -> int:
        """How many of the first blocks are there."""
        for index, key in enumerate(hashes):
            if key not in self.users:
                return index
        return len(hashes)

    def take(self, hashes: Sequence[int], private: int) -> bool:
        """Uses these blocks and so many without a hash, or none if there is no room."""
        new = sum(key not in self.users for key in hashes)
        woken = sum(key in self.idle for key in hashes)
        if self.held + woken + new + private > self.capacity:
            return False
        for key in hashes:
            if key in self.users:
                self.idle.pop(key, None)
                self.users[key] += 1
            else:
                self.users[key] = 1
        self.private += private
        while len(self.users) + self.private > self.capacity:
            gone, _ = self.idle.popitem(last=False)
            del self.users[gone]
        self.peak = max(self.peak, self.held)
        return True

    def give_back(self, hashes: Sequence[int], private: int) -> None:
        for key in hashes:
            self.users[key] -= 1
            if not self.users[key]:
                self.idle[key] = None
        self.private -= private


def hashes_of(prompt: Sequence[Segment]) -> list[int]:
    """Of every full block of a prompt, by all tokens up to its end."""
    ids = np.concatenate([segment.token_ids for segment in prompt])
    before, found = 0, []
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        before = hash((before, ids[end - BLOCK : end].tobytes()))
        found.append(before)
    return found


@dataclass(eq=False)
class Running:
    """A request that has its blocks."""

    request: Request
    hashes: list[int]
    private: int
    computed: int  # rows of prompt and output
    decoded: int = 0


class Dense:
    """Dense paged KV per request, with prefix caching: vLLM's way.

    What is told apart are full blocks by all tokens up to their end. Room for the whole output is
    kept from the start.

    Args:
        caches: whether prefixes are found.
    """

    def __init__(self, pool_rows: int, num_layers: int, max_rows: int, caches: bool = True) -> None:
        self.name = "prefix" if caches else "plain"
        self.caches = caches
        self.cache = PrefixCache(pool_rows // BLOCK)
        self.num_layers = num_layers
        self.max_rows = max_rows
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []

    @property
    def peak_rows(self) -> int:
        return self.cache.peak * BLOCK

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

    def forward(self) -> Pass | None:
        made = Pass(Work())
        room = self._decode(made)
        self._prefill(made, room)
        if not made.work.row_layers:
            return None
        self._end()
        return made

    def _decode(self, made: Pass) -> int:
        """Adds the decode rows; returns how many rows there is room for."""
        room = self.max_rows
        for one in self._running:
            if one.computed < one.request.length:
                continue
            self._add(made.work, 1, one.computed)
            one.computed += 1
            one.decoded += 1
            made.sampled.append(one.request)
            made.work.logit_rows += 1
            room -= 1
        return room

    def _prefill(self, made: Pass, room: int) -> None:
        for one in self._running:
            room -= self._prefill_one(made, one, room)
        while room > 0 and self._waiting:
            admitted = self._admit(self._waiting[0])
            if admitted is None:
                return
            self._waiting.popleft()
            self._running.append(admitted)
            room -= self._prefill_one(made, admitted, room)

    def _prefill_one(self, made: Pass, one: Running, room: int) -> int:
        rows = min(one.request.length - one.computed, max(room, 0))
        if rows <= 0:
            return 0
        self._add(made.work, rows, one.computed)
        one.computed += rows
        if one.computed == one.request.length:
            made.sampled.append(one.request)
            made.work.logit_rows += 1
        return rows

    def _admit(self, request: Request) -> Running | None:
        hashes = hashes_of(request.prompt) if self.caches else []
        found = min(self.cache.matched(hashes), (request.length - 1) // BLOCK)
        private = blocks_for(request.length + request.output) - len(hashes)
        if not self.cache.take(hashes, private):
            return None
        return Running(request, hashes, private, found * BLOCK)

    def _add(self, work: Work, rows: int, before: int) -> None:
        """``rows`` rows behind ``before`` that were computed."""
        layers = self.num_layers
        work.row_layers += rows * layers
        work.pairs += (before + 1 + before + rows) * rows // 2 * layers
        work.kv_rows += (before + rows) * layers

    def _end(self) -> None:
        # The first token comes with the prompt's last row; the last one is never fed.
        for one in self._running:
            if one.computed >= one.request.length and one.decoded >= one.request.output - 1:
                self.cache.give_back(one.hashes, one.private)
                one.decoded = -1
        self._running = [one for one in self._running if one.decoded >= 0]


class PerRequestBlend(Dense):
    """CacheBlend (2405.16444), request by request, on top of prefix caching.

    Shared segments that are not stored are computed alone first. A request then takes copies of
    all its shared rows behind its own prefix, moved to their places; all its rows are computed at
    the first layer, and from there on its private rows and `ratio` of the shared ones. Its cache is
    dense, and nobody else finds it but by the exact prefix in front of the first shared segment
    that was moved. Stored segments take rows of the same pool. A forward pass takes one request.

    Args:
        ratio: of the reused rows, the share that is computed again; 0 repairs nothing (dense
            reuse, as KVCOMM's anchors have it).
    """

    def __init__(self, pool_rows: int, num_layers: int, max_rows: int, ratio: float) -> None:
        super().__init__(pool_rows, num_layers, max_rows)
        self.name = "blend" if ratio else "reuse"
        self.ratio = ratio
        self._stored: OrderedDict[bytes, int] = OrderedDict()  # blocks, by segment

    def _prefill(self, made: Pass, room: int) -> None:
        if not self._waiting:
            return
        request = self._waiting[0]
        front = _front(request.prompt)
        hashes = hashes_of(front)
        private = blocks_for(request.length + request.output) - len(hashes)
        reused = [one for one in request.prompt[len(front) :] if one.is_shared]
        missing = {one.digest: one for one in reused if one.digest not in self._stored}
        needed = sum(blocks_for(one.length) for one in missing.values())
        for one in reused:
            if one.digest in self._stored:
                self._stored.move_to_end(one.digest)
        found = self.cache.matched(hashes) * BLOCK
        while not self.cache.take(hashes, private + needed):
            kept = {one.digest for one in reused}
            digest = next((one for one in self._stored if one not in kept), None)
            if digest is None:
                return
            self.cache.private -= self._stored.pop(digest)
        self._waiting.popleft()
        self._stored |= {digest: blocks_for(one.length) for digest, one in missing.items()}
        for one in missing.values():
            self._add(made.work, one.length, 0)
        rows = sum(one.length for one in reused)
        made.work.moved_rows += rows
        fresh = request.length - found
        selected = fresh - rows + int(np.ceil(self.ratio * rows))
        first = 1 if self.ratio else 0  # without repair no layer sees all rows
        layers = first * fresh + (self.num_layers - first) * selected
        made.work.row_layers += layers
        made.work.pairs += layers * (found + request.length) // 2
        made.work.kv_rows += request.length * self.num_layers
        made.work.logit_rows += 1
        made.sampled.append(request)
        self._running.append(Running(request, hashes, private, request.length))


def _front(prompt: Sequence[Segment]) -> list[Segment]:
    """What stands in front of the first shared segment that does not begin the prompt."""
    index = 0
    while index < len(prompt) and prompt[index].is_shared:
        index += 1
    while index < len(prompt) and not prompt[index].is_shared:
        index += 1
    return list(prompt[:index])
