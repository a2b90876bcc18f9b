"""The state machine of a store in memory, for as long as a test may take; `make soak` goes on for longer."""

from __future__ import annotations

import memory_machine
from hypothesis import HealthCheck, Phase, settings
from memory_machine import MemoryMachine

MemoryMachine.TestCase.settings = settings(
    max_examples=75,
    stateful_step_count=50,
    derandomize=True,  # a new case that is found elsewhere says nothing about the change at hand
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestMemoryMachine = MemoryMachine.TestCase


def test_the_machine_has_done_everything() -> None:
    """In this order of the file: what a rule never did is not tested by it."""
    wanted = {
        *("put", "plan", "plan, joins", "plan, waits", "step, open", "step, run", "step, cancel"),
        *("step, fail", "truncate", "suspend to nowhere", "suspend to host", "resume", "commit"),
        *("abort", "abort, in a step", "drop", "release", "evict", "restore", "reopen"),
        *("put, out of pages", "plan, out of pages", "commit, refused"),
    }
    assert wanted <= set(memory_machine.COUNTS), memory_machine.COUNTS
