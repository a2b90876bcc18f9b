"""A live society: people who talk in rounds, on one KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from evals.society.meeting import REQUESTS, Meeting
from evals.society.options import Options
from evals.society.recompute import Recompute
from evals.society.report import RoundReport, map_prompt
from evals.society.speech import Speech
from evals.workloads import tokenize_round
from tokendance.collector import KVCollector
from tokendance.host.decide import RowKind
from tokendance.host.plan import Plan
from tokendance.host.segments import Segment
from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of
from tokendance.store import DiffStore

__all__ = ["Society"]


class Society:
    """Runs a meeting on a model.

    Args:
        model: see `TransformersEngine`.
        tokenizer: of transformers, of that model.
        meeting: its state; `hold_round` moves it on.
        options: see `Options`.
        audit: compare every round with full recompute.

    Raises:
        ValueError: options that do not fit, a model that is not supported, or a meeting whose
            prompts may outgrow the model's positions.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        meeting: Meeting,
        options: Options | None = None,
        audit: bool = False,
    ) -> None:
        self.meeting = meeting
        self.options = options or Options()
        self._model = model
        self._tokenizer = tokenizer
        self._encode: Callable[[str], list[int]] = partial(
            tokenizer.encode, add_special_tokens=False
        )
        self._max_position = int(model.config.max_position_embeddings)
        self._engine = TransformersEngine(
            model, self._collector(self._empty_store(self.options.capacity))
        )
        self._audit = Recompute(model) if audit else None
        self._last_prompts: dict[str, list[Segment]] = {}
        self._check_positions()

    @property
    def store(self) -> DiffStore:
        """Where the society's KV is kept."""
        return self.collector.store

    @property
    def collector(self) -> KVCollector:
        """What decides which rows are reused."""
        return self._engine.collector

    def hold_round(self, on_message: Callable[[str, str], None] | None = None) -> RoundReport:
        """Runs the meeting's next round, and hands its messages to everybody.

        Args:
            on_message: called with name and message as soon as somebody has finished.

        Raises:
            WorkloadError: a prompt is beyond the model's positions.
            OutOfPagesError: the store is too small.
        """
        recorded = self.meeting.prompts()
        prompts = tokenize_round(recorded, self._encode, max_tokens=self._longest_prompt)
        self._last_prompts = prompts
        began = time.perf_counter()
        plan = self._engine.collector.plan(prompts)
        planned = time.perf_counter()
        self._engine.prefill(plan)
        prefilled = time.perf_counter()
        stored = plan.stored_bytes
        speech = Speech(self._engine, plan, self._tokenizer, self.options)
        labels = {name: self._encode(f"{name}:") for name in prompts}
        speech.run(labels, self.meeting.round, on_message, self._audit is not None)
        decoded = time.perf_counter()
        gate = None
        if self.options.gate is not None:
            gate = self._engine.audit(plan, seed=self.options.seed, rows=self.options.audited_rows)
        audit = None
        if self._audit is not None:
            audit = self._audit.check(
                prompts,
                {name: plan.output(name) for name in prompts},
                {name: torch.stack(rows) for name, rows in speech.logits.items()},
                plan.master_agents,
            )
        maps = [
            map_prompt(plan, one, self._encode, self.options.block_size) for one in recorded.agents
        ]
        distinct = {one.digest: one.length for prompt in prompts.values() for one in prompt}
        report = RoundReport(
            round=self.meeting.round,
            agents=len(prompts),
            prompt_tokens=plan.rows,
            distinct_tokens=sum(distinct.values()),
            rows=plan.rows_computed,
            rows_overridden=sum(prompt.rows_of(RowKind.REPAIRED) for prompt in maps),
            plan_s=planned - began,
            prefill_s=prefilled - planned,
            decode_s=decoded - prefilled,
            decode_tokens=sum(len(plan.output(name)) for name in prompts),
            kv_bytes_dense=plan.rows * self.store.geometry.row_bytes,
            kv_bytes_stored=stored,
            kv_bytes_held=self.store.stats().used_pages * self.store.pool.page_bytes,
            messages=dict(speech.messages),
            prompts=maps,
            master_agents=plan.master_agents,
            audit=audit,
            gate=gate,
        )
        said = {name: f"{name}: {text}\n" for name, text in report.messages.items()}
        self._commit(plan, said)
        self.meeting.add(said)
        return report

    def memory_by_agents(self) -> list[tuple[int, int, int]]:
        """KV bytes of the last round's prompts, if only the first n people had met.

        Nothing is computed: the first n prompts are planned in an empty store, which leases the
        very pages that would hold them.

        Returns:
            ``(n, dense bytes, stored bytes)`` for n = 1 .. N.
        """
        geometry = self.store.geometry
        block_size = self.options.block_size
        points = []
        names = list(self._last_prompts)
        for count in range(1, len(names) + 1):
            prompts = {name: self._last_prompts[name] for name in names[:count]}
            rows = sum(one.length for prompt in prompts.values() for one in prompt)
            parts = sum(len(prompt) + 1 for prompt in prompts.values())
            store = self._empty_store((rows + parts * block_size) * geometry.row_bytes)
            plan = self._collector(store).plan(prompts)
            points.append((count, rows * geometry.row_bytes, plan.stored_bytes))
            plan.abort()
        return points

    def _empty_store(self, capacity: int | str) -> DiffStore:
        return DiffStore(
            geometry_of(self._model),
            rope_of(self._model, self._max_position),
            capacity,
            block_size=self.options.block_size,
        )

    def _collector(self, store: DiffStore) -> KVCollector:
        options = self.options
        return KVCollector(store, options.source, options.selection, options.gate)

    @property
    def _longest_message(self) -> int:
        labels = [len(self._encode(f"{person.name}:")) for person in self.meeting.people]
        return max(labels) + self.options.new_tokens + 1

    @property
    def _longest_prompt(self) -> int:
        return self._max_position - self._longest_message

    def _check_positions(self) -> None:
        """Prompts stop growing once the history is full: what fits then always fits."""
        names = [person.name for person in self.meeting.people]
        history = self.meeting.history
        silent = Meeting(self.meeting.people, self.meeting.topic, history=history)
        fixed = 0
        for _ in range(history + 1 + len(REQUESTS)):
            for agent in silent.prompts().agents:
                fixed = max(fixed, sum(len(self._encode(block.text)) for block in agent.blocks))
            silent.add(dict.fromkeys(names, ""))
        needed = fixed + (len(names) + history + 1) * self._longest_message
        if needed > self._max_position:
            raise ValueError(
                f"agents: expected prompts within the model's {self._max_position} positions, "
                f"got up to {needed} with {len(names)} agents, {history} earlier messages and "
                f"{self.options.new_tokens} new tokens"
            )

    def _commit(self, plan: Plan, said: Mapping[str, str]) -> None:
        """Commits with each output cut to what others will be handed of it."""
        for name in plan.agents:
            fed, kept = plan.output(name), 0
            for token, other in zip(fed, self._encode(said[name]), strict=False):
                if token != other:
                    break
                kept += 1
            plan.truncate(name, plan.length(name) - len(fed) + kept)
        plan.commit()
