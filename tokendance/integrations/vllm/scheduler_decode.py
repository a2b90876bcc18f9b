"""Members that vLLM decodes while their rows are in the store alone: the scheduler's side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokendance.host.mirror import pages_for
from tokendance.integrations.vllm.orders import Decoding

if TYPE_CHECKING:
    from tokendance.integrations.vllm.rounds import Member
    from tokendance.integrations.vllm.scheduler_side import SchedulerSide


class SharedDecode:
    """Room for members' decoded rows, and what is computed of them in vLLM's own forward pass.

    No room is set aside for what members may say: many say little. Where the store is full, what
    was kept for next prompts is forgotten, then members that vLLM has preempted are planned anew
    when there is room; and if that does not suffice, vLLM is told that there are no blocks, and
    preempts.

    Args:
        rounds: the requests.
    """

    def __init__(self, rounds: SchedulerSide) -> None:
        self._rounds = rounds
        self._promised: dict[str, int] = {}  # pages, in the step that is being scheduled
        self._stopped: dict[str, None] = {}  # preempted members, whose rows are still there

    # What vLLM's books ask ------------------------------------------------------------------------

    def is_member(self, request_id: str) -> bool:
        return request_id in self._rounds.members

    def has_room(self, request_id: str, length: int) -> bool:
        member = self._rounds.members[request_id]
        if member.plan is None or not member.is_ready:
            return False  # its rows were given up: when it is preempted, it is planned again
        host, rows = self._rounds.host, member.plan.length(member.agent)
        if member.request.num_computed_tokens > rows:
            return False  # they were planned again before it was preempted
        had = rows - member.length
        said = length - member.length
        block = host.profile.block_size
        needed = max(0, pages_for(said, block) - pages_for(had, block))
        self._promised.pop(request_id, None)
        others = sum(self._promised.values())
        while needed + others > host.books.free_pages + host.books.evictable_pages:
            if not self._rounds.release_oldest() and not self._give_up_rows(request_id):
                return False
        self._promised[request_id] = needed
        return True

    def _give_up_rows(self, wanted_by: str) -> bool:
        """Gives the pages of a preempted member back, the one that was preempted last."""
        for request_id in reversed(self._stopped):
            if request_id != wanted_by:
                del self._stopped[request_id]
                self._rounds.plan_again(self._rounds.members[request_id])
                self._rounds.count(planned_again=1)
                return True
        return False

    def stop(self, request_id: str) -> None:
        """It was preempted: its rows stay as long as nobody needs their pages."""
        self._promised.pop(request_id, None)
        if self._rounds.members[request_id].plan is not None:
            self._stopped[request_id] = None

    # What the scheduler's side asks ---------------------------------------------------------------

    def rows_for(self, member: Member) -> int | None:
        """Rows that vLLM need not compute of a member that is ready; None: it has to wait."""
        assert member.plan is not None
        request = member.request
        if self.has_room(request.request_id, request.num_tokens):
            return min(member.plan.length(member.agent), int(request.num_tokens) - 1)
        if any(
            other is not member
            and other.plan is not None
            and other.request.request_id not in self._stopped
            for other in self._rounds.members.values()
        ):
            return None  # until those have ended
        self._rounds.drop(member, "the store is too small for what it says")
        return 0

    def go_on(self, request_id: str) -> None:
        """vLLM runs the member, for the first time or again."""
        self._stopped.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """The request is no member any more."""
        self._stopped.pop(request_id, None)
        self._promised.pop(request_id, None)

    def record(self, scheduled: Mapping[str, int]) -> Decoding | None:
        """What is computed of members in an engine step, or None if nothing is.

        Args:
            scheduled: by request, the tokens that vLLM computes.
        """
        self._promised.clear()
        decode: dict[str, list[int]] = {}
        again: list[str] = []
        requests: dict[str, str] = {}
        for request_id, count in scheduled.items():
            member = self._rounds.members.get(request_id)
            if member is None:
                continue
            assert member.plan is not None
            begin, length = member.request.num_computed_tokens, member.plan.length(member.agent)
            assert length - 1 <= begin <= length
            if begin < length:
                again.append(member.agent)  # of the prompt's last row vLLM has no logits yet
            tokens = list(member.request.all_token_ids[length : begin + count])
            if tokens:
                decode[member.agent] = tokens
            requests[member.agent] = request_id
        step = self._rounds.host.step(decode, prefill=(), again=again) if requests else None
        if step is None:
            return None
        step.finish()
        agents = [agent for agent in dict.fromkeys(step.agents) if agent is not None]
        return Decoding(step.record, [requests[agent] for agent in agents])
