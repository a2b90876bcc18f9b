"""Rounds on real architectures: `Everything()` must give transformers' own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tokendance as td

transformers = pytest.importorskip("transformers")
from tokendance.integrations.transformers import (  # noqa: E402
    TransformersEngine,
    fingerprint_of,
    geometry_of,
    quantization_of,
    rope_of,
)

SMALL = {
    "vocab_size": 331,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "max_position_embeddings": 4096,
    "head_dim": 64,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
# Sums in another order, through all layers of a random model; how work is cut depends on threads.
CLOSE = {"rtol": 1e-4, "atol": 1e-3}
MODELS = {
    "llama": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama3-scaling": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "rope_parameters": LLAMA3},
    ),
    "yarn": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "rope_parameters": YARN},
    ),
    "qwen2": (
        "Qwen2",
        {
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "hidden_size": 448,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "qwen3": ("Qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
    "mistral-window": (
        "Mistral",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 50},
    ),
}


def tiny(name: str) -> Any:
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # transformers starts them at zero
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens(seed: int, count: int, vocabulary: int = 331) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, count)


def own_logits(model: Any, segments: list[td.Segment]) -> torch.Tensor:
    """Logits of the last row, by the model itself."""
    ids = torch.from_numpy(np.concatenate([segment.token_ids for segment in segments])).long()
    with torch.inference_mode():
        logits: torch.Tensor = model(ids[None], logits_to_keep=1).logits[0, -1]
    return logits


def engine(model: Any, selection: Any, block_size: int = 8, source: str = "master") -> Any:
    store = td.DiffStore(geometry_of(model), rope_of(model, 4096), "256MiB", block_size=block_size)
    return TransformersEngine(model, td.KVCollector(store, source, selection))


A, B, C = (tokens(seed, count) for seed, count in ((1, 70), (2, 45), (3, 26)))


def prompts() -> dict[str, list[td.Segment]]:
    return {
        "a": [td.private(tokens(4, 31)), td.shared(A), td.shared(B), td.private(tokens(5, 6))],
        "b": [td.shared(C), td.private(tokens(6, 57)), td.shared(B), td.shared(A), td.shared(B)],
        "c": [td.shared(C), td.shared(A), td.private(tokens(7, 3))],
        "d": [td.private(tokens(8, 1))],
    }


@pytest.mark.parametrize("name", MODELS)
def test_everything_gives_the_models_own_logits(name: str) -> None:
    model = tiny(name)
    expected = {agent: own_logits(model, segments) for agent, segments in prompts().items()}
    for max_rows, block_size, source in (
        (8192, 16, "master"),
        (37, 8, "alone"),
        (8, 32, "producer"),
    ):
        one = engine(model, td.Everything(), block_size, source)
        plan = one.collector.plan(prompts())
        logits = one.prefill(plan, max_rows)
        for agent, row in expected.items():
            torch.testing.assert_close(logits[agent], row, **CLOSE)
        plan.commit()


def test_steps_have_1024_rows_at_most_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    one = engine(model, None)
    prompt = [td.private(tokens(10, 2100))]
    plan = one.collector.plan({"a": prompt})
    rows: list[int] = []
    forward = one._forward
    monkeypatch.setattr(
        one, "_forward", lambda step: (rows.append(step.num_rows), forward(step))[1]
    )
    logits = one.prefill(plan)
    torch.testing.assert_close(logits["a"], own_logits(model, prompt), **CLOSE)
    assert rows == [1024, 1024, 52]
    rows.clear()
    report = one.audit(plan, logits, "a")
    assert report.kl is not None
    assert report.kl < 1e-6
    assert rows == [1024, 1024, 52]


@pytest.mark.parametrize("selection", [td.Everything(), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["llama", "yarn", "qwen3"])
def test_quantized_stores_stay_near_plain_ones(name: str, dtype: torch.dtype, selection) -> None:
    model = tiny(name)
    scales = quantization_of(model, [A.tolist(), [*C.tolist(), *B.tolist()]], dtype, margin=1.3)
    found = []
    for quantization in (None, scales):
        store = td.DiffStore(
            geometry_of(model), rope_of(model, 4096), "256MiB", quantization=quantization
        )
        one = TransformersEngine(model, td.KVCollector(store, selection=selection))
        plan = one.collector.plan(prompts())
        logits = one.prefill(plan)
        decoded = one.decode(plan, {agent: [5, 6] for agent in logits})
        plan.commit()
        found.append({a: torch.cat([logits[a][None], decoded[a]]) for a in logits})
    for agent, plain in found[0].items():
        distance = (found[1][agent] - plain).norm(dim=1) / plain.norm(dim=1)
        assert (distance > 0).all()
        assert (distance < 0.4).all()  # a random model is no calm one
        assert distance.mean() < 0.25


@pytest.mark.parametrize("name", ["llama", "yarn", "mistral-window"])
def test_segmentation_order_and_grouping_do_not_matter_under_everything(name: str) -> None:
    model = tiny(name)
    expected = {agent: own_logits(model, segments) for agent, segments in prompts().items()}
    rng = np.random.default_rng(0)
    one = engine(model, td.Everything())
    names = list(prompts())
    for _ in range(3):
        group = {}
        for agent in rng.permutation(names)[: rng.integers(1, 5)]:
            ids = np.concatenate([segment.token_ids for segment in prompts()[agent]])
            cuts = np.sort(rng.integers(0, len(ids) + 1, 3))
            kinds = rng.integers(0, 2, 4)
            group[str(agent)] = [
                td.shared(part) if kind else td.private(part)
                for part, kind in zip(np.split(ids, cuts), kinds, strict=True)
            ]
        plan = one.collector.plan(group)
        logits = one.prefill(plan, int(rng.integers(5, 400)))
        for agent in group:
            torch.testing.assert_close(logits[agent], expected[agent], **CLOSE)
        plan.commit()


@pytest.mark.parametrize("name", ["llama", "qwen3", "yarn"])
def test_greedy_tokens_and_later_rounds_equal_the_models_own(name: str) -> None:
    model = tiny(name)
    one = engine(model, td.Everything())
    plan = one.collector.plan(prompts())
    output = one.generate(plan, one.prefill(plan), 6)
    plan.commit()
    for agent, segments in prompts().items():
        ids = torch.from_numpy(np.concatenate([segment.token_ids for segment in segments])).long()
        with torch.inference_mode():
            own = model.generate(ids[None], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert output[agent] == own[0, len(ids) :].tolist()
    later = {
        agent: [*segments, td.shared(output[agent]), td.shared(output["a"]), td.private([1, 2])]
        for agent, segments in prompts().items()
    }
    plan = one.collector.plan(later)
    logits = one.prefill(plan)
    for agent, segments in later.items():
        torch.testing.assert_close(logits[agent], own_logits(model, segments), **CLOSE)
    assert plan.rows_computed < plan.rows / 4


def test_key_deviation_of_everything_is_full_recompute() -> None:
    """Ratio 1 drops no row, and up to the selection layer all rows are fresh anyway."""
    model = tiny("llama")
    one = engine(model, td.KeyDeviation(1.0, layer=0))
    plan = one.collector.plan(prompts())
    logits = one.prefill(plan)
    for agent, segments in prompts().items():
        torch.testing.assert_close(logits[agent], own_logits(model, segments), **CLOSE)


def test_reuse_is_close_where_attention_is_local() -> None:
    """With a window shorter than the segments, rows beyond it see nothing of another context."""
    model = tiny("mistral-window")
    model.config.sliding_window = 8
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 8
    segments = td.shared(tokens(1, 200))
    round_ = {
        "a": [td.private(tokens(2, 20)), segments],
        "b": [td.private(tokens(3, 50)), segments],
    }
    one = engine(model, td.Nothing())
    plan = one.collector.plan(round_)
    logits = one.prefill(plan)
    assert plan.rows_computed == 20 + 200 + 50 + 1
    for agent, prompt in round_.items():
        torch.testing.assert_close(logits[agent], own_logits(model, prompt), **CLOSE)


def test_sampling_follows_the_distribution() -> None:
    model = tiny("llama")
    one = engine(model, td.Everything())
    generator = torch.Generator().manual_seed(0)
    plan = one.collector.plan({"a": [td.private(A)]})
    logits = one.prefill(plan)
    likely = set(logits["a"].softmax(-1).sort(descending=True).indices[:3].tolist())
    drawn = {
        one.generate(plan, logits, 1, temperature=1.0, top_p=1e-6, generator=generator)["a"][0]
        for _ in range(3)
    }
    assert drawn == {int(logits["a"].argmax())}
    drawn = {
        one.generate(plan, logits, 1, temperature=0.05, generator=generator)["a"][0]
        for _ in range(20)
    }
    assert drawn & likely
    stopped = one.generate(plan, logits, 5, stop=[int(logits["a"].argmax())])
    assert stopped["a"] == [int(logits["a"].argmax())]


def test_what_does_not_fit_is_refused() -> None:
    model = tiny("llama")
    store = td.DiffStore(geometry_of(tiny("qwen3")), rope_of(model), "4MiB", block_size=8)
    with pytest.raises(ValueError, match="collector: expected a store of KVGeometry"):
        TransformersEngine(model, td.KVCollector(store))
    for rope in (
        rope_of(tiny("llama3-scaling"), 4096),
        td.Rope.default(head_dim=64, theta=11000.0, max_position=4096),
        td.Rope.default(head_dim=64, theta=10000.0, max_position=4096, interleaved=True),
        [rope_of(model, 4096), None, rope_of(model, 4096)],
    ):
        other = td.DiffStore(geometry_of(model), rope, "4MiB", block_size=8)
        with pytest.raises(ValueError, match=r"collector: .* rotation tables .* got others in lay"):
            TransformersEngine(model, td.KVCollector(other))
    shorter = td.DiffStore(geometry_of(model), rope_of(model, 100), "4MiB", block_size=8)
    TransformersEngine(model, td.KVCollector(shorter))
    longer = td.Rope.default(head_dim=64, theta=10000.0, max_position=9000)
    TransformersEngine(model, td.KVCollector(td.DiffStore(geometry_of(model), longer, "4MiB")))


def test_decode_takes_iterators_and_nothing() -> None:
    model = tiny("llama")
    one = engine(model, td.Everything())
    plan = one.collector.plan({"a": [td.private(A)], "b": [td.private(B)]})
    one.prefill(plan)
    assert one.decode(plan, {}) == {}
    assert not plan.ended
    rows = one.decode(plan, {"a": iter([1, 2]), "b": [3]})
    assert [len(rows["a"]), len(rows["b"])] == [2, 1]
    expected = own_logits(model, [td.private(A), td.private([1, 2])])
    torch.testing.assert_close(rows["a"][1], expected, **CLOSE)
    plan.commit()


def test_audit_compares_with_the_models_own_logits() -> None:
    model = tiny("llama")
    one = engine(model, td.LeadingTokens(4))
    plan = one.collector.plan(prompts())
    logits = one.prefill(plan)
    rest = one.decode(plan, {agent: [3, 4] for agent in prompts()})
    rows = {agent: torch.cat([row[None], rest[agent]]) for agent, row in logits.items()}
    report = one.audit(plan, rows, max_rows=50)
    assert list(report.agents) == ["a", "c"]  # "b" makes all Masters, "d" shares nothing
    for agent, found in report.agents.items():
        segments = prompts()[agent]
        full = [own_logits(model, [*segments, td.private([3, 4][:n])]) for n in range(3)]
        p, q = torch.stack(full).double().log_softmax(-1), rows[agent].double().log_softmax(-1)
        assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
        assert (found.tokens, found.rows) == (3, plan.length(agent))
    only = one.audit(plan, rows, agents="c", fraction=1.0, seed=3, tokens=0)
    assert [found.tokens for found in only.agents.values()] == [1]
    plan.commit()


@pytest.mark.model
def test_smollm2_everything_equals_transformers_over_1500_tokens(smollm2: Any) -> None:
    model, tokenizer = smollm2
    text = "The agents met at noon and told each other what they had seen in the town. " * 100
    ids = tokenizer(text).input_ids
    assert len(ids) >= 1500
    ids = ids[:1500]
    other = tokenizer("Isabella walks to the cafe and opens the door. " * 20).input_ids
    round_ = {
        "a": [td.private(ids[:400]), td.shared(ids[400:900]), td.shared(ids[900:])],
        "b": [td.private(other), td.shared(ids[900:]), td.shared(ids[400:900]), td.private([28])],
    }
    one = engine(model, td.Everything())
    plan = one.collector.plan(round_)
    logits = one.prefill(plan, max_rows=700)
    output = one.generate(plan, logits, 8)
    for agent, segments in round_.items():
        own = own_logits(model, segments)
        assert (logits[agent] - own).abs().max() <= 2e-3
        prompt = torch.from_numpy(np.concatenate([s.token_ids for s in segments])).long()[None]
        with torch.inference_mode():
            greedy = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
            )
        assert output[agent] == greedy[0, prompt.shape[1] :].tolist()


def test_fingerprints_tell_weights_apart():
    model = tiny("llama")
    mine = fingerprint_of(model)
    assert mine == fingerprint_of(tiny("llama"))
    assert mine != fingerprint_of(tiny("llama").to(torch.bfloat16))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert mine != fingerprint_of(model)
