"""A model whose heads are spread over workers: every worker runs the same records."""

from __future__ import annotations

from pathlib import Path

from serving import serving
from small_rounds import EXACT, a_round, alone, nothing_left


def test_two_workers_answer_as_vllm_alone(tiny: Path) -> None:
    with serving(
        EXACT,
        model=str(tiny),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        enable_prefix_caching=True,
    ) as engine:
        free = engine.free_blocks()
        for seed in (1, 2):
            prompts = a_round(seed)
            found = engine.serve(f"round {seed}", prompts)
            assert engine.counts()["members"] == len(prompts)
            assert found == alone(engine, f"round {seed}", prompts)
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)
