"""What members of a round are answered, by a real model.

Plain vLLM's tokens where nothing inexact is reused, those of the library's own engine where it is.
"""

from __future__ import annotations

from typing import Any

import pytest
from serving import recorded_rounds, serving

import tokendance as td

AGENTS, NEW = 4, 8
SOCIETY = 2  # agents of agentsociety, whose prompts are long

Outputs = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def rounds() -> Any:
    return recorded_rounds(agents=AGENTS)


@pytest.fixture(scope="module")
def plain(rounds: Any) -> Outputs:
    with serving() as engine:
        return [
            engine.serve(f"plain {i}", prompts, joining=False, new=NEW)
            for i, prompts in enumerate(rounds)
        ]


@pytest.fixture(scope="module")
def society() -> tuple[Any, Outputs]:
    """Two rounds of agentsociety, and what plain vLLM answers."""
    rounds = recorded_rounds("agentsociety", SOCIETY, "1:3")
    with serving() as engine:
        found = [
            engine.serve(f"plain {i}", prompts, joining=False, new=NEW)
            for i, prompts in enumerate(rounds)
        ]
    return rounds, found


@pytest.mark.parametrize("prefix_caching", [pytest.param(False, marks=pytest.mark.slow), True])
def test_where_nothing_inexact_is_reused_tokens_are_plain_vllms(
    rounds: Any, plain: Outputs, prefix_caching: bool
) -> None:
    options = {"selection": "everything", "block_size": 8}
    with serving(options, enable_prefix_caching=prefix_caching) as engine:
        free = engine.free_blocks()
        for i, prompts in enumerate(rounds):
            found = engine.serve(f"round {i}", prompts, new=NEW)
            assert found == plain[i]
            for agent, segments in prompts.items():
                length = sum(segment.length for segment in segments)
                assert engine.cached[f"round {i} {agent}"] == length - 1
        assert engine.free_blocks() == free
        assert not engine.rounds.members
        stats = engine.rounds.host.books
        assert stats.used_pages > 0
        assert engine.rounds.reset()
        assert stats.used_pages == 0


@pytest.mark.slow
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_of_agents_of_thousands_of_tokens_too(society: Any, prefix_caching: bool) -> None:
    rounds, expected = society
    options = {"selection": "everything", "max_rows": 512}
    with serving(options, enable_prefix_caching=prefix_caching) as engine:
        for i, prompts in enumerate(rounds):
            assert engine.serve(f"round {i}", prompts, new=NEW) == expected[i]
        assert engine.counts()["members"] == 2 * SOCIETY
        assert not engine.rounds.members


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "agents", "which", "prefix_caching"),
    [("town_square", AGENTS, "1:4", False), ("agentsociety", SOCIETY, "1:3", True)],
)
def test_three_workers_answer_as_vllm_alone(
    workload: str, agents: int, which: str, prefix_caching: bool
) -> None:
    """Of which each has one of the model's three KV heads; its 9 heads cannot be halved."""
    with serving(
        {"selection": "everything", "max_rows": 512},
        tensor_parallel_size=3,
        distributed_executor_backend="mp",
        enable_prefix_caching=prefix_caching,
    ) as engine:
        for i, prompts in enumerate(recorded_rounds(workload, agents, which)):
            found = engine.serve(f"round {i}", prompts, new=NEW)
            assert found == engine.serve(f"{i} alone", prompts, joining=False, new=NEW)
            assert engine.counts()["members"] == agents


@pytest.mark.slow
def test_the_default_answers_as_the_librarys_own_engine(rounds: Any, plain: Outputs) -> None:
    from evals.models import load_model
    from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of

    model, _ = load_model()
    store = td.DiffStore(geometry_of(model), rope_of(model, 4096), "512MiB", block_size=8)
    own = TransformersEngine(model, td.KVCollector(store))
    expected, computed = [], 0.0
    for prompts in rounds:
        # The connector plans agents in the order of their names.
        plan = own.collector.plan({agent: prompts[agent] for agent in sorted(prompts)})
        tokens = own.generate(plan, own.prefill(plan), NEW)
        expected.append({agent: [int(token) for token in tokens[agent]] for agent in prompts})
        computed += plan.rows_computed
        plan.commit()
    with serving({"block_size": 8}) as engine:
        found = [engine.serve(f"round {i}", prompts, new=NEW) for i, prompts in enumerate(rounds)]
        counts = engine.counts()
    assert found == expected
    assert expected != plain  # something was reused
    assert counts["rows_computed"] == computed
