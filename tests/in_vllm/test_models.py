"""Models with sliding windows, and weights that change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import serving, token_ids
from small_rounds import EXACT, a_round, alone, answers, drawn, join, nothing_left
from tiny_architectures import tiny_model
from tiny_model import write_tiny_model

import tokendance as td


def written(name: str, tiny: Path, directory: Path) -> str:
    """A model directory with the tiny model's tokenizer."""
    from transformers import AutoTokenizer

    tiny_model(name).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    return str(directory)


def longer(prompts: Any, said: dict[str, list[int]]) -> Any:
    """The same agents' next prompts."""
    return {
        agent: [*segments, td.private([*said[agent], *drawn(5, 9)]), td.shared(drawn(6, 40))]
        for agent, segments in prompts.items()
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_layers_see_their_windows(tiny: Path, tmp_path: Path, name: str, shared: bool) -> None:
    """All layers have one, or some: vLLM keeps all rows of these, and drops old ones of those."""
    model = written(name, tiny, tmp_path / name)
    options = dict(EXACT, shared_decode=shared)
    with serving(options, model=model, enable_prefix_caching=True, block_size=32) as engine:
        assert max(engine.worker.windows) == 20
        assert (engine.rounds.shared is not None) == (shared and name == "gemma2")
        free = engine.free_blocks()
        prompts = a_round(40)
        for number in range(3):
            found = engine.serve(f"round {number}", prompts, new=60)
            assert engine.counts()["members"] == len(prompts)
            assert found == alone(engine, f"round {number}", prompts, new=60)
            prompts = longer(prompts, found)
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)


def test_several_groups_of_caches_are_refused_by_vllm(tiny: Path, tmp_path: Path) -> None:
    model = written("gemma2", tiny, tmp_path / "gemma2")
    with (
        pytest.raises(ValueError, match="does not support HMA"),
        serving(EXACT, model=model, disable_hybrid_kv_cache_manager=False),
    ):
        pass


def test_layers_without_attention_are_refused_before_the_model_is_loaded(
    tiny: Path, tmp_path: Path
) -> None:
    """They have caches of another kind, in groups of their own."""
    from transformers import AutoTokenizer, Lfm2Config

    config = Lfm2Config(
        vocab_size=331,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        architectures=["Lfm2ForCausalLM"],
    )
    config.save_pretrained(tmp_path)  # without weights
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match="expected attention in every layer: a state is not made"),
        serving(EXACT, model=str(tmp_path)),
    ):
        pass


def test_new_weights_answer_as_if_nothing_was_stored(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_model(
        tmp_path / "other", num_attention_heads=4, num_key_value_heads=2, initializer_range=0.25
    )
    prompts = a_round(41)
    with serving(EXACT, model=str(tiny), enable_prefix_caching=True) as engine:
        free = engine.free_blocks()
        before = engine.serve("before", prompts)
        assert engine.rounds.host.books.used_pages > 0
        for weights in (other, tiny):
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
            assert engine.llm.reset_prefix_cache(reset_connector=True)
            assert engine.rounds.host.books.used_pages == 0
            after = engine.serve(f"{weights.name} after", prompts)
            assert after == alone(engine, f"{weights.name} after", prompts)
            assert (after == before) == (weights == tiny)
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)


@pytest.mark.parametrize("level", [0, 1])
def test_an_engine_that_sleeps_ends_its_rounds_and_forgets_them(tiny: Path, level: int) -> None:
    prompts = a_round(42)
    with serving(EXACT, model=str(tiny), enable_prefix_caching=True) as engine:
        free = engine.free_blocks()
        expected = engine.serve("before", prompts)
        for steps in (0, 1, 4):
            for agent, segments in prompts.items():
                told = {"round": f"asleep {steps}", "agent": agent, "agents": 4}
                told |= {"shared": [[0, 100]]}
                engine.add(f"asleep {steps} {agent}", token_ids(segments), {"tokendance": told})
            for _ in range(steps):
                engine.step()
            engine.llm.sleep(level=level)
            assert not engine.rounds.members
            assert bool(engine.rounds.host.books.used_pages) == (level == 0)
            engine.llm.wake_up(tags=["scheduling"] if level == 0 else None)
            engine.run()
            assert engine.serve(f"awake {steps}", prompts) == expected
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)


def test_the_store_is_cleared_at_once_when_a_round_has_ended(tiny: Path) -> None:
    """No block waits for being read, which would keep vLLM from clearing its cache."""
    prompts = a_round(43)
    with serving(EXACT, model=str(tiny), enable_prefix_caching=True) as engine:
        free = engine.free_blocks()
        for name in ("first", "second"):
            join(engine, name, prompts, agents=4)
            while len([one for one in engine.done if one.startswith(name)]) < len(prompts):
                engine.step()
            assert engine.free_blocks() == free
            if name == "first":
                assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert answers(engine, "first", prompts) == answers(engine, "second", prompts)
        engine.run()
        # What was said is kept: the next prompts are computed from there on.
        engine.counts()
        next_prompts = longer(prompts, answers(engine, "second", prompts))
        found = engine.serve("next", next_prompts)
        assert engine.counts()["rows_computed"] == 4 * (1 + 9 + 40)
        assert found == alone(engine, "next", next_prompts)
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)


def test_sleep_mode_is_refused_at_the_start(tiny: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"[Ss]leep mode"),
        serving(EXACT, model=str(tiny), enable_sleep_mode=True),
    ):
        pass
