"""Requests that are computed together, as the scheduler's side knows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokendance.host.agent import Phase
from tokendance.host.plan import Plan
from tokendance.host.segments import Segment


@dataclass(eq=False)
class Member:
    """A request of a round.

    Attributes:
        request: vLLM's.
        agent: its name in the library.
        segments: of its prompt.
        namespace: of the segments.
        round: that it belongs to.
        keeps: whether the agent's rows are kept for its next prompt.
        since: when it came.
        plan: that it is in, once it is planned.
    """

    request: Any
    agent: str
    segments: list[Segment]
    namespace: str
    round: Round
    keeps: bool
    since: float
    plan: Plan | None = None

    @property
    def length(self) -> int:
        """Rows of the prompt."""
        return sum(segment.length for segment in self.segments)

    @property
    def is_ready(self) -> bool:
        """Whether all rows of the prompt are computed, or will be when orders so far are run."""
        return self.plan is not None and self.plan.phase(self.agent) is Phase.DECODE


@dataclass(eq=False)
class Round:
    """Requests that are computed together.

    Attributes:
        name: None for requests that gave none.
        agents: how many it will have, if one of them said so.
        patience: seconds without another member after which it starts.
        gathering: members that are not planned yet.
        plan: that whoever comes is added to, once there is one.
        last: when the last member came.
        untold: members that were planned and are not computed yet.
        computed: when those came whose prompts are, until the log has told of them.
        counted: rows of the plan's prompts, and of those computed, that the log has told of.
    """

    name: str | None
    patience: float
    agents: int | None = None
    gathering: list[Member] = field(default_factory=list)
    plan: Plan | None = None
    last: float = 0.0
    untold: list[Member] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    counted: tuple[int, int] = (0, 0)

    def is_due(self, now: float) -> bool:
        """Whether those that gather are to be planned."""
        if self.plan is not None or now - self.last >= self.patience:
            return True
        return self.agents is not None and len(self.gathering) >= self.agents
