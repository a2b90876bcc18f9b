"""`Rope.from_model`, and configs without a model: what changes angles is read or refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_rope import rotate
from tiny_architectures import ARCHITECTURES, LLAMA3, UNLISTED, WINDOWED, YARN, tiny_model

from tokendance import Rope

transformers = pytest.importorskip("transformers")

LAYERS = 3
pytestmark = pytest.mark.usefixtures("one_thread")


def per_layer(rope: Rope | list[Rope | None]) -> list[Rope | None]:
    return rope if isinstance(rope, list) else [rope] * LAYERS


def fingerprints(rope: Rope | list[Rope | None]) -> list[bytes | None]:
    return [one and one.fingerprint for one in per_layer(rope)]


@pytest.mark.parametrize(
    "parameters",
    [{"rope_type": "default", "rope_theta": 1e6}, LLAMA3, YARN],
    ids=["default", "llama3", "yarn"],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_frequencies_are_the_models_own_bit_for_bit(model_type: str, parameters: Any) -> None:
    model = tiny_model(model_type, rope_parameters=dict(parameters))
    own = model.model.rotary_emb
    expected = Rope(own.inv_freq.double(), 300, attention_factor=own.attention_scaling)
    rope = Rope.from_model(model, 300)
    read = Rope.from_config(model.config, 300)
    for one in (rope, read):
        assert one.fingerprint == expected.fingerprint
        assert torch.equal(one.cos, expected.cos)
        assert torch.equal(one.sin, expected.sin)
        assert one.attention_factor == own.attention_scaling
    assert Rope.from_model(model.model, 300).fingerprint == expected.fingerprint


@pytest.mark.parametrize("name", [*ARCHITECTURES, *UNLISTED])
def test_every_layer_turns_as_the_models_own_does(name: str, monkeypatch: Any) -> None:
    """The queries that attention is handed at positions of a lone token, layer by layer."""
    model = tiny_model(name)
    ropes = per_layer(Rope.from_model(model, 512))
    seen: list[torch.Tensor] = []

    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        seen.append(key[0, :, 0])
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // value.shape[1], 2), None

    transformers.AttentionInterface.register("tokendance_test", attend)
    model.config._attn_implementation = "tokendance_test"
    token = torch.tensor([[7]])
    for position in (0, 300):
        with torch.inference_mode():
            model(token, position_ids=torch.tensor([[position]]), use_cache=False)
    turned = seen[LAYERS:]
    for rope, before, after in zip(ropes, seen[:LAYERS], turned, strict=True):
        expected = before
        if rope is not None:
            head = before.clone()
            head[:, : rope.rotary_dim] /= rope.attention_factor  # position 0 holds it already
            expected = rotate(rope, head[:, None], torch.tensor([300]))[:, 0]
        torch.testing.assert_close(after, expected, atol=2e-3, rtol=0)


def test_layers_of_a_type_share_a_rope() -> None:
    local, full, again = Rope.from_model(tiny_model("gemma3"), 64)
    assert local is again
    assert local.fingerprint == Rope.default(64, 1e4, 64).fingerprint
    assert full.fingerprint != local.fingerprint
    assert isinstance(Rope.from_model(tiny_model("olmo3"), 64), Rope)  # two types, one embedding


def test_layers_without_rope_are_none() -> None:
    assert [rope is None for rope in Rope.from_model(tiny_model("smollm3"), 64)] == [0, 1, 0]
    interleaved, none, _ = Rope.from_model(tiny_model("cohere2"), 64)
    assert interleaved.interleaved
    assert none is None


def test_frequencies_that_change_with_the_length_are_taken_as_far_as_they_hold() -> None:
    model = tiny_model("phi3-longrope")
    rope = Rope.from_model(model, 512)
    assert rope.attention_factor == model.model.rotary_emb.attention_scaling != 1
    with torch.inference_mode():
        model(torch.arange(600)[None] % 331)  # the model's buffer is that of long prompts now
    assert Rope.from_model(model, 512).fingerprint == rope.fingerprint
    with pytest.raises(ValueError, match=r"max_position: expected at most 512, .*longrope.* 513"):
        Rope.from_model(model, 513)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=dynamic)
    assert Rope.from_model(model).max_position == 4096
    with pytest.raises(ValueError, match=r"max_position: expected at most 4096, .*dynamic.* got"):
        Rope.from_model(model, 5000)


def test_frequencies_that_were_cast_are_those_that_the_model_uses() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    rope = Rope.from_model(model, 64)
    assert rope.fingerprint != Rope.from_config(model.config, 64).fingerprint
    expected = Rope(model.model.rotary_emb.inv_freq.double(), 64)
    assert rope.fingerprint == expected.fingerprint


def test_models_that_are_not_understood_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected one rotary module .* none in GPT2Model"):
        Rope.from_model(tiny_model("gpt2"))
    model = tiny_model("llama")
    model.model.second = type(model.model.rotary_emb)(model.config)
    with pytest.raises(ValueError, match=r"model: expected one rotary module .* 'second'\]"):
        Rope.from_model(model)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny_model("llama").config)
    with pytest.raises(ValueError, match=r"model: expected loaded weights, got .* meta device"):
        Rope.from_model(model)
    with pytest.raises(ValueError, match="model: expected a function apply_rotary_pos_emb"):
        Rope.from_model(tiny_model("llama4_text"))


def test_another_rotation_is_refused(monkeypatch: Any) -> None:
    from transformers.models.llama import modeling_llama

    model = tiny_model("llama")
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos, k * cos)
    )
    with pytest.raises(ValueError, match="model: expected a rotation of halves or of neighbouring"):
        Rope.from_model(model)


# Configs that transformers 4 wrote ----------------------------------------------------------------

GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_size": 640,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32768,
    "layer_types": WINDOWED,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def test_gemma_3_of_transformers_4_has_two_embeddings() -> None:
    local, full, again = Rope.from_config(SimpleNamespace(**GEMMA3), 1001)
    assert local is again
    assert local.fingerprint == Rope.default(256, 1e4, 8).fingerprint
    # transformers 5 reads the same file.
    fields = without(GEMMA3, "model_type")
    new = transformers.AutoConfig.for_model("gemma3_text", **json.loads(json.dumps(fields)))
    expected = Rope.from_config(new, 1001)
    assert fingerprints(expected) == [one.fingerprint for one in (local, full, again)]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            "gemma3_text", **{**fields, "vocab_size": 64, "intermediate_size": 64}
        )
    )
    assert fingerprints(Rope.from_model(model, 1001)) == fingerprints(expected)
    assert (local.cos[1000] - full.cos[1000]).abs().max() > 1.9


def test_gemma_3_of_transformers_4_without_scaling_or_with_a_period() -> None:
    plain = SimpleNamespace(**{**GEMMA3, "rope_scaling": None})
    _, full, _ = Rope.from_config(plain, 16)
    assert full.fingerprint == Rope.default(256, 1e6, 8).fingerprint
    old = {**without(GEMMA3, "layer_types"), "sliding_window_pattern": 2}
    assert fingerprints(Rope.from_config(SimpleNamespace(**old), 16)) == fingerprints(
        Rope.from_config(SimpleNamespace(**GEMMA3), 16)
    )
    with pytest.raises(ValueError, match="sliding_window_pattern: expected in the config, got non"):
        Rope.from_config(SimpleNamespace(**without(old, "sliding_window_pattern")), 16)
    with pytest.raises(ValueError, match="rope_local_base_freq: expected a number beside"):
        Rope.from_config(SimpleNamespace(**without(GEMMA3, "rope_local_base_freq")), 16)


def test_layers_without_rope_follow_from_the_interval() -> None:
    fields = {
        "model_type": "smollm3",
        "head_dim": 64,
        "num_hidden_layers": 4,
        "rope_theta": 1e4,
        "no_rope_layer_interval": 2,
    }
    ropes = Rope.from_config(SimpleNamespace(**fields), 16)
    assert [rope is None for rope in ropes] == [False, True, False, True]
    del fields["no_rope_layer_interval"]
    with pytest.raises(ValueError, match="no_rope_layer_interval: expected in the config, got no"):
        Rope.from_config(SimpleNamespace(**fields), 16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_local_base_freq", 1e4),
        ("rope_local_theta", 1e4),
        ("local_rope_theta", 1e4),
        ("rotary_emb_base", 10000),
        ("rotary_pct", 0.25),
        ("rotary_dim", 32),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("rope_interleave", True),
        ("qk_rope_head_dim", 64),
        ("rope_ratio", 50),
        ("no_rope_layer_interval", 4),
        ("alibi", True),
        ("position_embedding_type", "alibi"),
        ("position_scale", 2.0),
        ("llama_4_scaling_beta", 0.1),
        ("attn_temperature_tuning", True),
    ],
)
def test_fields_that_change_angles_are_refused(field: str, value: Any) -> None:
    fields = {
        "model_type": "llama",
        "head_dim": 64,
        "num_hidden_layers": 2,
        "rope_theta": 1e4,
        "rope_interleaved": False,
        "rotary_pct": None,
    }
    Rope.from_config(SimpleNamespace(**fields), 16)
    with pytest.raises(ValueError, match=f"{field}: expected none .* got {value!r}"):
        Rope.from_config(SimpleNamespace(**{**fields, field: value}), 16)


def test_contradictions_are_refused() -> None:
    fields = {"model_type": "llama", "head_dim": 64, "rope_theta": 1e4}
    two = {"rope_parameters": dict(LLAMA3), "rope_scaling": dict(YARN)}
    with pytest.raises(ValueError, match="rope_scaling: expected none beside rope_parameters"):
        Rope.from_config(SimpleNamespace(**fields, **two), 16)
    nested = {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in set(WINDOWED)
        }
    }
    for field in ("rope_theta", "rope_local_base_freq"):
        gemma = without(GEMMA3, "rope_theta", "rope_local_base_freq", "rope_scaling") | nested
        with pytest.raises(ValueError, match=f"{field}: expected none beside rope_parameters per"):
            Rope.from_config(SimpleNamespace(**gemma, **{field: 1e4}), 16)
