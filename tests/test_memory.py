"""What a round allocates besides the store: the workspace of a layer, and nothing per agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tokendance as td

transformers = pytest.importorskip("transformers")
from tokendance.integrations.transformers import (  # noqa: E402
    TransformersEngine,
    geometry_of,
    rope_of,
)

AGENTS, SEGMENTS, LENGTH = 16, 4, 256


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors that ``call`` holds at a time, its operators' own included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=331,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _echo(module: Any, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2), None


transformers.AttentionInterface.register("echo", _echo)


@torch.inference_mode()
def layer_workspace(model: Any, rows: int) -> int:
    """Bytes that a layer takes for ``rows`` rows, its attention left out, with its input."""
    ones = torch.ones(1, 1, model.config.head_dim)
    model.config._attn_implementation = "echo"

    def call() -> None:
        hidden = torch.zeros(1, rows, model.config.hidden_size)
        model.model.layers[0](
            hidden, attention_mask=None, position_embeddings=(ones, torch.zeros_like(ones))
        )

    return peak_bytes(call)


def planned(model: Any) -> tuple[TransformersEngine, td.Plan]:
    def ids(seed: int, count: int) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 331, count)

    news = [td.shared(ids(seed, LENGTH)) for seed in range(SEGMENTS)]
    prompts = {
        f"agent {a}": [td.private(ids(100 + a, 20)), *np.roll(news, a), td.private(ids(200 + a, 5))]
        for a in range(AGENTS)
    }
    store = td.DiffStore(geometry_of(model), rope_of(model, 4096), "64MiB", block_size=16)
    engine = TransformersEngine(model, td.KVCollector(store, selection=td.LeadingTokens(4)))
    return engine, engine.collector.plan(prompts)


@pytest.mark.parametrize("max_rows", [8192, 400])
def test_a_prefill_needs_the_workspace_of_a_layer(max_rows: int) -> None:
    """And no agent's keys and values, dense: those of all agents would be twice as much."""
    model = llama()
    engine, plan = planned(model)
    dense = plan.rows * engine.collector.store.geometry.row_bytes // model.config.num_hidden_layers
    found = peak_bytes(lambda: engine.prefill(plan, max_rows))
    allowed = 1.2 * layer_workspace(model, min(max_rows, round(plan.rows_computed)))
    assert dense > 1.5 * allowed
    assert found <= allowed


def test_a_decode_step_allocates_nothing_that_grows_with_the_context() -> None:
    model = llama()
    engine, plan = planned(model)
    engine.prefill(plan)
    dense = plan.rows * engine.collector.store.geometry.row_bytes // model.config.num_hidden_layers
    found = peak_bytes(lambda: engine.decode(plan, {agent: [1] for agent in plan.agents}))
    assert found < dense / 40
