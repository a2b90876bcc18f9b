"""Gathers requests to rounds, plans them, and says what the workers compute and move."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokendance.host.books import OutOfPagesError
from tokendance.host.plan import Plan, Policy
from tokendance.host.record import RestoreRecord
from tokendance.host.scheduler import Scheduler
from tokendance.host.segments import Segment
from tokendance.integrations.vllm.audits import Audits
from tokendance.integrations.vllm.options import Joining, Options
from tokendance.integrations.vllm.orders import Forget, Handshake, Orders, ReadBack
from tokendance.integrations.vllm.rounds import Member, Round
from tokendance.integrations.vllm.scheduler_decode import SharedDecode
from tokendance.integrations.vllm.stats import RoundStats
from tokendance.integrations.vllm.wishes import Wishes

_log = logging.getLogger("vllm.tokendance")
_NULL_BLOCK = 0  # vLLM's, in place of one that a request needs no more
# Of max_rows: what a round computes at least in a step that vLLM has filled.
_LEAST_SHARE = 16


class SchedulerSide:
    """The part of the connector that lives in vLLM's scheduler.

    Args:
        vllm_config: vLLM's.
        options: the connector's.
        block_size: rows of a block of vLLM's cache.
        clock: seconds.

    Attributes:
        totals: counts since the start, and the bytes that are held.
        audits: of members, if the options have a gate.
        shared: where members' rows stay in the store while vLLM decodes them; None where vLLM's
            cache gets them.
    """

    def __init__(
        self,
        vllm_config: Any,
        options: Options,
        block_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = vllm_config
        self._options = options
        self._block_size = block_size
        self._clock = clock
        self._wishes = Wishes(options.separator, vllm_config.model_config)
        self._host: Scheduler | None = None
        self._rounds: list[Round] = []
        self._members: dict[str, Member] = {}  # by request
        self._orders = Orders()
        self._loads: list[tuple[Member, NDArray[np.int64]]] = []  # of the step being scheduled
        self._stats = RoundStats()
        self.totals = RoundStats()
        self.audits = Audits(options.gate, lambda: self.host, self.count)
        self.shared: SharedDecode | None = None

    def meet(self, handshakes: Sequence[Handshake]) -> None:
        """What the workers' devices are like. A page has one number on all of them."""
        first, pages = handshakes[0], min(one.profile.num_pages for one in handshakes)
        profile = replace(first.profile, num_pages=pages)
        self._host = Scheduler(profile, windows=first.windows)

    @property
    def host(self) -> Scheduler:
        """The library's scheduler."""
        if self._host is None:
            raise RuntimeError("workers: expected their profiles before the first step, got none")
        return self._host

    @property
    def members(self) -> dict[str, Member]:
        """The requests that belong to rounds, by id; not to be changed."""
        return self._members

    # Requests -------------------------------------------------------------------------------------

    def arrive(self, request: Any) -> None:
        """A request has come; it may join a round."""
        try:
            wish = self._wishes.of(request)
        except (ValueError, TypeError) as error:
            self._leave_alone([request.request_id], str(error))
            return
        if wish is None:
            return
        # Blocks of reused rows must serve nobody else, whatever vLLM's prefix caching holds.
        request.cache_salt = f"tokendance/{request.request_id}/{request.cache_salt or ''}"
        request.block_hashes.clear()
        request.update_block_hashes()
        round_ = self._round_of(wish)
        now = self._clock()
        name, keeps = wish.agent, True
        if any(other.agent == name for other in self._members.values()):
            name, keeps = f"{name}#{request.request_id}", False
        member = Member(request, name, wish.segments, wish.namespace, round_, keeps, now)
        round_.gathering.append(member)
        round_.last = now
        round_.agents = wish.agents or round_.agents
        if wish.patience is not None:
            round_.patience = wish.patience
        self._members[request.request_id] = member

    def _round_of(self, wish: Joining) -> Round:
        for round_ in self._rounds:
            if round_.name == wish.round and (wish.round is not None or round_.plan is None):
                return round_
        self._rounds.append(Round(wish.round, self._options.patience))
        return self._rounds[-1]

    def rows_for(self, request: Any, computed: int) -> int | None:
        """Rows behind the first ``computed`` that need not be computed; None: not known yet."""
        member = self._members.get(request.request_id)
        if member is None:
            return 0
        if not member.is_ready or self.audits.holds(request.request_id):
            return None
        if self.shared is not None:
            return self.shared.rows_for(member)
        return max(0, member.length - 1 - computed)  # the last row is vLLM's: it has the logits

    def load(self, request: Any, block_ids: Sequence[int], rows: int) -> None:
        """The request has blocks: the last ``rows`` before the prompt's last go there."""
        if self.shared is not None:
            self.shared.go_on(request.request_id)
            return
        member = self._members[request.request_id]
        end = member.length - 1
        slots = np.full(end, -1, dtype=np.int64)
        slots[end - rows :] = self._slots(block_ids, end - rows, end)
        slots[slots // self._block_size == _NULL_BLOCK] = -1
        self._loads.append((member, slots))

    def _restored(self) -> Iterator[RestoreRecord]:
        """The records of all loads, one for each round, whose rows are written at once."""
        loads, self._loads = self._loads, []
        for plan in dict.fromkeys(member.plan for member, _ in loads):
            assert plan is not None
            of_plan = [(member.agent, row) for member, row in loads if member.plan is plan]
            slots = np.full((len(of_plan), max(len(row) for _, row in of_plan)), -1, np.int64)
            for into, (_, row) in zip(slots, of_plan, strict=True):
                into[: len(row)] = row
            yield plan.restore([agent for agent, _ in of_plan], slots)

    def _slots(self, block_ids: Sequence[int], begin: int, end: int) -> NDArray[np.int64]:
        at = np.arange(begin, end, dtype=np.int64)
        blocks = np.asarray(block_ids, dtype=np.int64)[at // self._block_size]
        return blocks * self._block_size + at % self._block_size

    def end(self, request: Any, block_ids: Sequence[int]) -> None:
        """The request has ended, in whatever phase.

        Its blocks are read before anything is written to them: at the start of the next step.
        """
        member = self._members.pop(request.request_id, None)
        if member is None:
            return
        self.audits.forget(request.request_id)
        if self.shared is not None:
            self.shared.forget(request.request_id)
        round_, plan = member.round, member.plan
        if plan is None:
            round_.gathering.remove(member)
            if round_.agents is not None:
                round_.agents -= 1
        elif member.is_ready and member.keeps:
            if self.shared is None:
                self._keep_output(member, plan, block_ids)
            plan.commit(member.agent, namespace=member.namespace)
        else:
            plan.abort(member.agent)
        if member in round_.untold:
            round_.untold.remove(member)
            self._tell(round_, self._clock())
        self._forget_empty_rounds()

    def _keep_output(self, member: Member, plan: Plan, block_ids: Sequence[int]) -> None:
        request, begin = member.request, member.length
        # The last token was sampled and not fed; of a step that is still running nothing is kept.
        end = min(request.num_computed_tokens, request.num_tokens - 1)
        output = list(request.all_token_ids[begin:end])
        blocks = block_ids[begin // self._block_size : -(-end // self._block_size)]
        if not output or _NULL_BLOCK in blocks:
            return  # layers that all have a window: vLLM has dropped what is in front of it
        try:
            record = plan.append({member.agent: output})
        except (OutOfPagesError, ValueError):
            return  # the prompt is kept without its answer
        self._orders.orders.append(ReadBack(record, self._slots(block_ids, begin, end)))

    # Steps ----------------------------------------------------------------------------------------

    def step(self, scheduled: Mapping[str, int]) -> Orders:
        """The orders of an engine step.

        Records are run in the order in which they are made, so what a record computes counts as
        computed as soon as it is among the orders.

        Args:
            scheduled: by request, tokens that vLLM computes in this step.
        """
        if not self._members and not self._orders.orders:
            return Orders()  # the way of engines that have nothing but other requests
        now = self._clock()
        self._orders.orders += self._restored()
        if self.shared is not None:  # before others are planned, who would take its pages
            self._orders.decoding = self.shared.record(scheduled)
        for round_ in self._rounds:
            if round_.gathering and round_.is_due(now):
                self._start(round_)
        most = self._options.max_rows
        left = self._config.scheduler_config.max_num_batched_tokens - sum(scheduled.values())
        room = min(most, max(left, most // _LEAST_SHARE, 1))
        step = self.host.step(max_rows=room) if self._members else None
        if step is not None:
            self._orders.orders.append(step.record)
            step.finish()
            room -= step.record.num_rows
        self._orders.orders += self.audits.step(room)
        for round_ in self._rounds:
            self._note_computed(round_)
            self._tell(round_, now)
        taken, self._orders = self._orders, Orders()
        return taken

    def _start(self, round_: Round) -> None:
        """Plans those that gather, in the order of their names: the same whoever came first."""
        gathering = sorted(round_.gathering, key=lambda member: member.agent)
        prompts = {member.agent: member.segments for member in gathering}
        plan = round_.plan
        if plan is not None and not set(prompts).isdisjoint(plan.agents):
            plan = None  # an agent asks a second time
        while True:
            try:
                self._check_room(plan, prompts)
                if plan is None:
                    round_.plan, round_.counted = self.host.plan(prompts, self._policy), (0, 0)
                else:
                    plan.add(prompts)
            except OutOfPagesError as full:
                if self.release_oldest(prompts):
                    continue
                if any(member.plan is not None for member in self._members.values()):
                    return  # until one of those has ended
                self._give_up(gathering, f"the store is full: {full}")
            except ValueError as error:
                self._give_up(gathering, str(error))
            else:
                for member in gathering:
                    member.plan = round_.plan
                round_.gathering = []
                round_.untold += gathering
            return

    @property
    def _policy(self) -> Policy:
        return replace(self._options.policy, opted_out=self.audits.opted_out)

    def _check_room(self, plan: Plan | None, prompts: Mapping[str, list[Segment]]) -> None:
        """Raises ``OutOfPagesError`` where members that vLLM decodes would not have a page each
        left, without which they are soon preempted."""
        others = sum(member.plan is not None for member in self._members.values())
        if self.shared is None or not others:
            return
        if plan is None:
            needed = self.host.pages_needed(prompts, self._policy)
        else:
            needed = plan.pages_needed(prompts)
        books = self.host.books
        left = books.free_pages + books.evictable_pages - needed
        if left < others:
            raise OutOfPagesError(f"capacity: expected {others} pages beside, got {left}")

    def release_oldest(self, wanted: Collection[str] = ()) -> bool:
        """Forgets the agent whose rows were kept the longest, of the ``wanted`` ones last."""
        kept = list(self.host.books.mirrors)
        for agent in [*(one for one in kept if one not in wanted), *kept]:
            self.host.books.drop(agent)
            return True
        return False

    def _give_up(self, members: Sequence[Member], reason: str) -> None:
        for member in members:
            member.round.gathering.remove(member)
            del self._members[member.request.request_id]
        self._leave_alone([member.request.request_id for member in members], reason)
        self._forget_empty_rounds()

    def plan_again(self, member: Member) -> None:
        """Gives a member's rows up; they are computed again when there is room."""
        assert member.plan is not None
        self.audits.forget(member.request.request_id)
        member.plan.abort(member.agent)
        member.plan = None
        member.round.gathering.append(member)
        if member in member.round.untold:
            member.round.untold.remove(member)

    def drop(self, member: Member, reason: str) -> None:
        """A member with a plan is vLLM's alone."""
        assert member.plan is not None
        member.plan.abort(member.agent)
        self._forget_member(member)
        self._leave_alone([member.request.request_id], reason)
        self._forget_empty_rounds()

    def _forget_member(self, member: Member) -> None:
        request_id = member.request.request_id
        del self._members[request_id]
        self.audits.forget(request_id)
        if member in member.round.untold:
            member.round.untold.remove(member)
        if self.shared is not None:
            self.shared.forget(request_id)

    def _leave_alone(self, requests: Sequence[str], reason: str) -> None:
        self.count(alone=len(requests))
        _log.warning("tokendance: left to vLLM alone: %s (%s)", ", ".join(requests), reason)

    def _note_computed(self, round_: Round) -> None:
        """Members whose prompts are computed count, and may be audited before vLLM gets them."""
        for member in [one for one in round_.untold if one.is_ready]:
            assert member.plan is not None
            round_.untold.remove(member)
            round_.computed.append(member.since)
            self.audits.consider(member.request.request_id, member.agent, member.plan)

    def _tell(self, round_: Round, now: float) -> None:
        """Tells of members once all that were planned with them are computed, or gone."""
        if round_.plan is None or round_.untold or not round_.computed:
            return
        told = round_.counted
        round_.counted = round_.plan.rows, round(round_.plan.rows_computed)
        rows, computed = (new - old for new, old in zip(round_.counted, told, strict=True))
        members, began = len(round_.computed), min(round_.computed)
        round_.computed = []
        self.count(rounds=int(not told[0]), members=members, rows=rows, rows_computed=computed)
        _log.info(
            "tokendance: round %s: %d agents, %d rows, %d computed, %d reused, after %.2f s",
            round_.name or "-",
            members,
            rows,
            computed,
            rows - computed,
            now - began,
        )

    def count(self, **counts: int) -> None:
        """Counts for what vLLM logs and exports."""
        self._stats.add(**counts)
        self.totals.add(**counts)

    def take_stats(self) -> RoundStats | None:
        """Counts since the last call and the bytes that are held, or None if nothing is new."""
        if self._host is not None:
            books = self._host.books
            held = (books.used_pages - books.evictable_pages) * self._host.profile.page_bytes
            if held != self.totals.data.get("bytes_held", 0):
                self.count(bytes_held=held)
        if self._stats.is_empty():
            return None
        taken, self._stats = self._stats, RoundStats()
        return taken

    def reset(self) -> bool:
        """Forgets everything that is stored: the weights have changed.

        Requests that vLLM runs go on in its own cache, as its alone; the others are planned again.
        Where their rows are not in its cache they are preempted, and planned again, too.
        """
        from vllm.v1.request import RequestStatus

        self.audits.clear()
        for name, member in list(self._members.items()):
            if self.shared is not None:
                self.shared.forget(name)
            if member.plan is not None:
                self.plan_again(member)
                if member.request.status == RequestStatus.RUNNING and self.shared is None:
                    member.round.gathering.remove(member)
                    del self._members[name]
        for round_ in self._rounds:
            if round_.plan is not None:
                round_.patience = 0.0  # it had begun: those who have ended do not come again
            round_.plan, round_.untold, round_.computed, round_.counted = None, [], [], (0, 0)
        self._forget_empty_rounds()
        self.host.clear()
        return True

    def lose(self, reason: str) -> None:
        """A worker has lost what is stored. All members are vLLM's alone: rows that were to be in
        its cache were reported to it, and the others are not there yet."""
        self.audits.clear()
        for name, member in self._members.items():
            if member.plan is not None:
                member.plan.abort(member.agent)
            if self.shared is not None:
                self.shared.forget(name)
        self._leave_alone(list(self._members), f"a worker failed: {reason}")
        self._members.clear()
        self._rounds.clear()
        self.host.clear()
        self._orders = Orders([Forget()])

    def _forget_empty_rounds(self) -> None:
        alive = {id(member.round) for member in self._members.values()}
        self._rounds = [one for one in self._rounds if id(one) in alive]
