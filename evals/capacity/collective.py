"""tokendance as a system of the simulation: its own scheduler plans, nothing computes."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evals.capacity.cost import Work
from evals.capacity.machines import ModelShape
from evals.capacity.rounds import Request
from evals.capacity.systems import BLOCK, Pass, blocks_for
from tokendance.host.agent import Phase
from tokendance.host.books import OutOfPagesError
from tokendance.host.plan import Plan, Policy
from tokendance.host.record import DeviceProfile, StepRecord, WorkShape
from tokendance.host.round import IntArray
from tokendance.host.scheduler import Scheduler
from tokendance.host.selection import DEFAULT, Selection

_TILE = 64
"""Query rows that meet a stored row at a time; those of a group of heads count each."""


class Collective:
    """Rounds by the host half of the library. What is planned is what an engine would run.

    An agent is committed when it ends, so that its next prompt finds its rows. When a round finds
    no room, the agents that were committed longest ago are released.

    Args:
        pool_rows: rows of KV that there is room for.
        model: whose records are made.
        max_rows: rows of a forward pass.
        max_position: of the longest prompt and output.
        selection: which reused rows are computed again.

    Attributes:
        host_seconds: of the processor, spent in the scheduler.
        plan_seconds: of them, in plans of rounds.
        plans: rounds, or parts of rounds, that were planned.
        uses: segments of all prompts that were planned.
    """

    name = "tokendance"

    def __init__(
        self,
        pool_rows: int,
        model: ModelShape,
        max_rows: int,
        max_position: int = 1 << 17,
        selection: Selection = DEFAULT,
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        profile = DeviceProfile(
            num_layers=model.num_layers,
            num_pages=pool_rows // BLOCK,
            block_size=BLOCK,
            page_bytes=model.row_bytes * BLOCK,
            max_position=max_position,
            work=WorkShape(max_tile_rows=_TILE, read_bound_rows=_TILE, target_items=264),
        )
        self.scheduler = Scheduler(profile)
        self.policy = Policy(selection=selection)
        self.host_seconds = 0.0
        self.plan_seconds = 0.0
        self.plans = 0
        self.uses = 0
        self._peak_pages = 0
        self._waiting: deque[Request] = deque()
        self._plans: dict[str, Plan] = {}
        self._running: dict[str, Request] = {}
        self._sampled: dict[str, int] = {}
        self._kept: OrderedDict[str, None] = OrderedDict()  # committed, longest ago first

    @property
    def peak_rows(self) -> int:
        return self._peak_pages * BLOCK

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

    def forward(self) -> Pass | None:
        began = time.thread_time()
        self._admit()
        self.plan_seconds += time.thread_time() - began
        decode = {
            agent: [count]
            for agent, count in self._sampled.items()
            if count and self._plans[agent].phase(agent) is Phase.DECODE
        }
        step = self.scheduler.step(decode, max_rows=self.max_rows)
        if step is None:
            self.host_seconds += time.thread_time() - began
            return None
        sampled = step.logit_agents
        self.host_seconds += time.thread_time() - began
        work = work_of(step.record, self.model)
        began = time.thread_time()
        step.finish()
        made = Pass(work, [self._running[agent] for agent in sampled])
        for agent in sampled:
            self._sampled[agent] += 1
            if self._sampled[agent] == self._running[agent].output:
                self._end(agent)
        books = self.scheduler.books
        self._peak_pages = max(self._peak_pages, books.used_pages - books.evictable_pages)
        self.host_seconds += time.thread_time() - began
        return made

    def _end(self, agent: str) -> None:
        self._plans.pop(agent).commit(agent)
        del self._sampled[agent], self._running[agent]
        self._kept[agent] = None
        self._kept.move_to_end(agent)

    def _admit(self) -> None:
        """Plans those who wait together, as many as there is room for."""
        while self._waiting:
            first = self._waiting[0].arrival
            together = [one for one in self._waiting if one.arrival == first]
            while together and not self._plan(together):
                if not self._release_one(together):
                    together = together[: len(together) // 2]
            if not together:
                return

    def _plan(self, requests: Sequence[Request]) -> bool:
        prompts = {one.agent: one.prompt for one in requests}
        room = self._pages_left() - sum(self._output_pages(one) for one in requests)
        # Where dense prompts would fit there is no doubt.
        dense = sum(blocks_for(one.length) for one in requests)
        if dense > room and self.scheduler.pages_needed(prompts, self.policy) > room:
            return False
        try:
            plan = self.scheduler.plan(prompts, self.policy)
        except OutOfPagesError:
            return False
        self.plans += 1
        for one in requests:
            self._waiting.remove(one)
            self._plans[one.agent] = plan
            self._running[one.agent] = one
            self._sampled[one.agent] = 0
            self._kept.pop(one.agent, None)
            self.uses += len(one.prompt)
        return True

    def _pages_left(self) -> int:
        """Pages for new prompts: without what the running ones' outputs will take."""
        books = self.scheduler.books
        outputs = sum(self._output_pages(one) for one in self._running.values())
        return books.free_pages + books.evictable_pages - outputs

    def _output_pages(self, request: Request) -> int:
        return blocks_for(request.output) + 1

    def _release_one(self, requests: Sequence[Request]) -> bool:
        """Forgets who was committed longest ago, but for those whose prompts are asked for."""
        asked = {one.agent for one in requests}
        for agent in self._kept:
            if agent not in asked and agent not in self._running:
                del self._kept[agent]
                self.scheduler.books.drop(agent)
                return True
        return False


def work_of(record: StepRecord, model: ModelShape) -> Work:
    """What a planned step has to do.

    A Master's rows are read once for every `_TILE` query rows of agents that use it, whoever's they
    are; an agent's own rows once for every `_TILE` of its query rows.
    """
    packed = record.rounds[0]
    offsets, _ = packed.extents.offsets()

    def field(name: str) -> IntArray:
        begin, count = offsets[name]
        return packed.buffer[begin : begin + count]

    group, layers = model.num_q_heads // model.num_kv_heads, model.num_layers
    queries = group * np.bincount(field("row_agent"), minlength=packed.extents.agents)
    master, used = field("use_master"), field("use_length")
    seeing = np.zeros(packed.extents.masters, dtype=np.int64)
    np.add.at(seeing, master, queries[field("use_agent")])
    length = np.zeros_like(seeing)
    np.maximum.at(length, master, used)
    read = int((_tiles(seeing) * length).sum() + (_tiles(queries) * field("own_length")).sum())
    seen = int((record.positions.astype(np.int64) + 1).sum())
    return Work(
        row_layers=record.num_rows * layers,
        logit_rows=len(record.logit_rows),
        pairs=seen * layers,
        kv_rows=read * layers,
        is_collective=True,
    )


def _tiles(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return -(-rows // _TILE)
