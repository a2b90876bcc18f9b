"""Architectures of transformers under `Everything()`: logits are those of their own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_architectures import ARCHITECTURES, UNLISTED, tiny_model

import tokendance as td

transformers = pytest.importorskip("transformers")
from tokendance.integrations import transformers as integration  # noqa: E402
from tokendance.integrations.model_trial import try_model  # noqa: E402
from tokendance.integrations.transformers import (  # noqa: E402
    MODEL_TYPES,
    TransformersEngine,
    geometry_of,
    rope_of,
)

# Sums in another order, through all layers of a random model.
CLOSE = {"rtol": 1e-4, "atol": 1e-3}
pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 331, count)


A, B, C = (tokens(seed, count) for seed, count in ((1, 70), (2, 45), (3, 26)))


def prompts() -> dict[str, list[td.Segment]]:
    return {
        "a": [td.private(tokens(4, 31)), td.shared(A), td.shared(B), td.private(tokens(5, 6))],
        "b": [td.shared(C), td.private(tokens(6, 57)), td.shared(B), td.shared(A), td.shared(B)],
        "c": [td.shared(C), td.shared(A), td.private(tokens(7, 3))],
        "d": [td.private(tokens(8, 1))],
    }


def engine(model: Any, selection: Any, block_size: int = 8) -> TransformersEngine:
    store = td.DiffStore(geometry_of(model), rope_of(model, 512), "64MiB", block_size=block_size)
    return TransformersEngine(model, td.KVCollector(store, selection=selection))


def own_logits(model: Any, segments: list[td.Segment]) -> torch.Tensor:
    """Logits of the last row, by the model itself."""
    ids = torch.from_numpy(np.concatenate([segment.token_ids for segment in segments])).long()
    with torch.inference_mode():
        logits: torch.Tensor = model(ids[None], logits_to_keep=1).logits[0, -1]
    return logits


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNLISTED])
def test_everything_gives_the_models_own_logits(name: str) -> None:
    model = tiny_model(name)
    assert (model.config.model_type in MODEL_TYPES) == (name in ARCHITECTURES)
    expected = {agent: own_logits(model, segments) for agent, segments in prompts().items()}
    for max_rows, block_size in ((None, 16), (37, 8), (8, 32)):
        one = engine(model, td.Everything(), block_size)
        plan = one.collector.plan(prompts())
        logits = one.prefill(plan, max_rows)
        for agent, row in expected.items():
            torch.testing.assert_close(logits[agent], row, **CLOSE)
        rows = one.decode(plan, {"a": [5, 6], "c": [7]})
        for agent, fed in (("a", [5, 6]), ("c", [7])):
            own = own_logits(model, [*prompts()[agent], td.private(fed)])
            torch.testing.assert_close(rows[agent][-1], own, **CLOSE)
        plan.commit()
        later = {"a": [*prompts()["a"], td.private([5, 6, 7])]}
        again = one.collector.plan(later)
        torch.testing.assert_close(one.prefill(again)["a"], own_logits(model, later["a"]), **CLOSE)
        assert again.rows_computed < 4
        again.commit()


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt_oss", "cohere2", "mixtral"])
def test_rows_that_are_dropped_between_layers_leave_the_others(name: str) -> None:
    """Ratio 1 drops no row; less drops some, and the forward goes on with the rest."""
    model = tiny_model(name)
    one = engine(model, td.KeyDeviation(1.0, layer=0))
    plan = one.collector.plan(prompts())
    logits = one.prefill(plan)
    for agent, segments in prompts().items():
        torch.testing.assert_close(logits[agent], own_logits(model, segments), **CLOSE)
    few = engine(model, td.KeyDeviation(0.1, layer=1))
    plan = few.collector.plan(prompts())
    assert set(few.prefill(plan)) == set(prompts())
    assert plan.rows_computed < plan.rows


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gemma3")
    before = own_logits(model, prompts()["a"])
    one = engine(model, None)
    one.prefill(one.collector.plan(prompts()))
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(own_logits(model, prompts()["a"]), before)


# Models that nobody has listed, and models that do not fit ----------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNLISTED])
def test_the_trial_passes_what_fits_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).to(dtype)
    try_model(model, geometry_of(model), 512)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        # Queries and keys are normed after the rotation; the norms' weights do not commute with it.
        ("hunyuan_v1_dense", "the attention of layer 0 within .* of its own forward"),
        ("mamba", "logits without attention within .* of those of another order"),
        ("nemotron", "attention: expected a step among the keyword arguments"),
        ("ministral3", "the attention of layer 0 within .* of itself at its first positions"),
    ],
)
def test_the_trial_says_what_does_not_fit(name: str, reason: str) -> None:
    model = tiny_model(name)
    if name == "ministral3":  # queries are scaled by their position, from some position on
        model.config.rope_parameters |= {
            "original_max_position_embeddings": 256,
            "llama_4_scaling_beta": 0.5,
        }
    expected = f"model: expected an architecture whose attention is .* {reason}"
    with pytest.raises(ValueError, match=expected):
        try_model(model, geometry_of(model), 4096)


def changed(model: Any, name: str, **changes: Any) -> Any:
    """The model under the name of a type that is not listed."""
    model.config.model_type = name
    for layer in model.model.layers:
        for key, value in changes.items():
            setattr(layer.self_attn, key, value)
    return model


def test_the_trial_sees_windows_that_a_short_forward_does_not() -> None:
    """Attention is handed another window than the mask's, and both are longer than the trial."""
    model = tiny_model("gemma2", sliding_window=1000)
    try_model(model, geometry_of(model), 4096)
    gemma = changed(tiny_model("gemma2", sliding_window=1000), "other", sliding_window=None)
    with pytest.raises(ValueError, match=r"expected a causal mask of the window .* layer 0"):
        try_model(gemma, geometry_of(gemma), 4096)


def test_the_engine_tries_a_type_that_is_not_listed(monkeypatch: Any) -> None:
    for name in ("glm", "llama"):
        model = tiny_model(name)
        tried: list[Any] = []
        monkeypatch.setattr(integration, "try_model", lambda *a, tried=tried: tried.append(a))
        engine(model, None)
        assert tried == ([(model, geometry_of(model), 512)] if name == "glm" else [])


class Wrapper(torch.nn.Module):
    """As DistributedDataParallel and others wrap models."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model
        self.config = model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype


class Adapted(Wrapper):
    """As a PeftModel."""

    def get_base_model(self) -> Any:
        return self.module


def test_wrapped_headless_and_other_models_are_refused() -> None:
    model = tiny_model("llama")
    collector = engine(model, None).collector
    head = r"model: expected a transformers model with a language-model head \(AutoModelForCausalLM"
    wanted = {
        Wrapper(model): r"\), got Wrapper; give it model\.module",
        Adapted(model): r"\), got Adapted; give it model\.get_base_model\(\)",
        torch.compile(model): r"\), got OptimizedModule; give it model\._orig_mod",
        model.model: r"\), got LlamaModel, which has no such head",
        transformers.LlamaForSequenceClassification(model.config): r"\), got LlamaForSeq.* no such",
        torch.nn.Linear(2, 2): r"\), got Linear$",
    }
    for other, message in wanted.items():
        with pytest.raises(ValueError, match=head + message):
            TransformersEngine(other, collector)
    model.train()
    with pytest.raises(ValueError, match=r"model: expected eval mode \(model.eval\(\)\)"):
        TransformersEngine(model, collector)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", r"model: expected 3 layers in GPT2LMHeadModel.base_model.layers, got none"),
        ("deepseek_v3", r"model: expected keys and values per head, got .* \(MLA\)"),
        ("gemma3_both_ways", r"model: expected causal attention, got another in layers.0"),
    ],
)
def test_what_can_not_fit_is_refused_with_the_reason(name: str, message: str) -> None:
    if name == "gemma3_both_ways":
        model = tiny_model("gemma3", use_bidirectional_attention=True)
    else:
        model = tiny_model(name)
    collector = engine(tiny_model("llama"), None).collector
    with pytest.raises(ValueError, match=message):
        TransformersEngine(model, collector)


def test_a_text_model_is_wanted() -> None:
    import transformers.models.gemma3 as gemma3

    text = tiny_model("gemma3").config
    config = gemma3.Gemma3Config(
        text_config=text.to_dict(),
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 14,
            "patch_size": 14,
        },
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    collector = engine(tiny_model("llama"), None).collector
    with pytest.raises(ValueError, match=r"model: expected .* for text alone, got Gemma3ForCondit"):
        TransformersEngine(model, collector)


def test_stores_hold_the_models_frequencies_to_the_bit() -> None:
    model = tiny_model("gemma3")
    ropes = rope_of(model, 512)
    off = td.Rope(model.model.rotary_emb.full_attention_inv_freq.double() * (1 + 2e-7), 512)
    for given in (ropes[0], [ropes[0], off, ropes[2]], ropes[::-1][1:] + ropes[:1]):
        store = td.DiffStore(geometry_of(model), given, "4MiB")
        with pytest.raises(ValueError, match=r"collector: .* rotation tables .* got others in lay"):
            TransformersEngine(model, td.KVCollector(store))
    model = tiny_model("phi3-longrope")
    store = td.DiffStore(geometry_of(model), rope_of(model, 512), "4MiB")
    TransformersEngine(model, td.KVCollector(store))
    further = td.Rope(
        model.model.rotary_emb.original_inv_freq.double(),
        600,
        False,
        model.model.rotary_emb.attention_scaling,
    )
    store = td.DiffStore(geometry_of(model), further, "4MiB")
    with pytest.raises(ValueError, match="max_position: expected at most 512"):
        TransformersEngine(model, td.KVCollector(store))
