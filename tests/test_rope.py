"""`tokendance.Rope` against the rotary modules of transformers and against its own contract."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tokendance.device.rope import Rope
from tokendance.device.rope_config import _STYLES

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 4096}
SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3,
    "llama3_other": LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
    "yarn": YARN | {"factor": 4.0},
    "yarn_betas": YARN | {"factor": 8.0, "beta_fast": 48.0, "beta_slow": 2.0},
    "yarn_mscale": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn_mscale_equal": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn_attention_factor": YARN | {"factor": 4.0, "attention_factor": 1.25},
    "yarn_not_truncated": YARN | {"factor": 4.0, "truncate": False},
    "yarn_factor_below_one": YARN | {"factor": 1.0},
}


def config_of(model_type: str, **fields):
    return transformers.AutoConfig.for_model(model_type, **fields)


def rotary_module(config):
    """The model's own rotary embedding, found by name: one class of the module ends in it."""
    package = type(config).__module__.rsplit(".", 1)[0]
    module = importlib.import_module(f"{package}.modeling_{package.rsplit('.', 1)[1]}")
    names = [
        name
        for name in vars(module)
        if name.endswith("RotaryEmbedding") and "Vision" not in name and "DynamicNTK" not in name
    ]
    assert len(names) == 1, names
    return getattr(module, names[0])(config), module


def rotate(rope: Rope, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x ``[heads, tokens, head_dim]`` at ``positions [tokens]``, written down plainly."""
    cos = rope.cos[positions] * rope.attention_factor
    sin = rope.sin[positions] * rope.attention_factor
    turned, kept = x[..., : rope.rotary_dim], x[..., rope.rotary_dim :]
    if rope.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned, kept), dim=-1)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_frequencies_and_attention_factor_are_the_models_own(model_type, scaling):
    fields = SMALL | {"max_position_embeddings": 16384, "rope_parameters": dict(SCALINGS[scaling])}
    config = config_of(model_type, **fields)
    module, _ = rotary_module(config)
    rope = Rope.from_config(config, max_position=64)
    assert not rope.interleaved
    assert rope.rotary_dim == 2 * module.inv_freq.numel()
    assert rope.attention_factor == module.attention_scaling
    # The fingerprint covers the frequencies' bits, so equal ones mean bitwise equal frequencies.
    own = Rope(module.inv_freq.double(), 64, attention_factor=module.attention_scaling)
    assert rope.fingerprint == own.fingerprint
    assert torch.equal(rope.cos, own.cos)


def test_tables_are_fp64_angles_rounded_once():
    inv_freq = torch.tensor([1.0, 0.37, 1e-3, 0.0], dtype=torch.float64)
    rope = Rope(inv_freq, 20000)
    for position in (0, 1, 16383, 16384, 19999):  # on both sides of a chunk's edge
        for i, frequency in enumerate(inv_freq.tolist()):
            angle = position * frequency
            assert rope.cos[position, i].item() == np.float32(math.cos(angle))
            assert rope.sin[position, i].item() == np.float32(math.sin(angle))
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    assert rope.cos.shape == rope.sin.shape == (20000, 4)


# Model types of the table that can be built from their config's defaults.
@pytest.mark.parametrize("model_type", sorted(set(_STYLES) - {"gptj", "codegen"}))
def test_rotation_equals_the_models_own(model_type):
    config = config_of(model_type)
    embedding, module = rotary_module(config)
    ropes = Rope.from_config(config, max_position=512)
    layer_types = getattr(config, "layer_types", None) or [None]
    per_layer = ropes if isinstance(ropes, list) else [ropes] * len(layer_types)
    positions = torch.tensor([0, 1, 7, 100, 511])
    torch.manual_seed(0)
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    x = torch.randn(1, 3, len(positions), head_dim)
    for rope, layer_type in zip(per_layer, layer_types, strict=False):
        if rope is None:
            continue
        nested = model_type == "gemma3_text"
        arguments = (layer_type,) if nested else ()
        cos, sin = embedding(x, positions[None], *arguments)
        # Models that rotate a part and slice it themselves give tables of that part's width.
        sliced = x[..., : rope.rotary_dim]
        whole = module.apply_rotary_pos_emb(sliced, sliced, cos, sin)[0]
        expected = torch.cat((whole, x[..., rope.rotary_dim :]), dim=-1)[0]
        torch.testing.assert_close(rotate(rope, x[0], positions), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["gptj", "codegen"])
def test_rotation_equals_gptjs_own(model_type):
    config = config_of(model_type, n_embd=512, n_head=4, rotary_dim=32)
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    rope = Rope.from_config(config)
    assert rope.interleaved
    assert rope.rotary_dim == 32
    assert rope.max_position == config.n_positions
    positions = torch.tensor([0, 3, 900])
    table = module.create_sinusoidal_positions(1024, 32)[positions][None]
    sin, cos = table.chunk(2, dim=-1)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 128)
    turned = module.apply_rotary_pos_emb(x[..., :32], sin, cos)
    expected = torch.cat((turned, x[..., 32:]), dim=-1)[0].transpose(0, 1)
    torch.testing.assert_close(
        rotate(rope, x[0].transpose(0, 1), positions), expected, atol=2e-4, rtol=0
    )


def test_layer_types_with_their_own_parameters_give_one_rope_per_layer():
    config = config_of(
        "gemma3_text",
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )
    local, full, again = Rope.from_config(config, max_position=32)
    assert local is again
    assert local.fingerprint == Rope.default(256, 1e4, 32).fingerprint
    assert full.fingerprint != local.fingerprint
    expected = 1e6 ** -(torch.arange(0, 256, 2) / 256) / 8
    torch.testing.assert_close(full.sin[1], expected.sin())


def test_layers_without_positions_are_none():
    config = config_of("smollm3", **SMALL, no_rope_layers=[1, 0])
    with_rope, without = Rope.from_config(config, max_position=32)
    assert with_rope.rotary_dim == 64
    assert without is None
    everywhere = config_of("smollm3", **SMALL, no_rope_layers=[1, 1])
    assert isinstance(Rope.from_config(everywhere, max_position=32), Rope)
    config.no_rope_layers = [1]
    with pytest.raises(ValueError, match="no_rope_layers: expected 2 entries, got 1"):
        Rope.from_config(config, max_position=32)


def test_parameters_of_older_configs_are_read():
    base = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    plain = Rope.from_config(SimpleNamespace(**base), max_position=16)
    assert plain.fingerprint == Rope.default(64, 500000.0, 16).fingerprint
    scaling = {
        key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")
    }
    old = SimpleNamespace(**base, rope_scaling=scaling | {"type": "llama3"})
    new = config_of("llama", **SMALL, max_position_embeddings=8192, rope_parameters=dict(LLAMA3))
    expected = Rope.from_config(new, max_position=16).fingerprint
    assert Rope.from_config(old, max_position=16).fingerprint == expected
    partial = SimpleNamespace(**base | {"model_type": "stablelm"}, partial_rotary_factor=0.25)
    assert Rope.from_config(partial, max_position=16).rotary_dim == 16


def test_max_position_defaults_to_the_configs():
    config = config_of("llama", **SMALL, max_position_embeddings=96)
    assert Rope.from_config(config).cos.shape == (96, 32)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, r"\['rope_type'\]: expected one of .*'dynamic'"),
        (
            {"rope_type": "longrope", "factor": 2.0},
            r"\['rope_type'\]: expected one of .*'longrope'",
        ),
        ({"rope_type": "proportional"}, r"\['rope_type'\]: expected one of .*'proportional'"),
        ({"type": "mrope"}, r"\['rope_type'\]: expected one of .*'mrope'"),
        ({"rope_type": "default", "mrope_section": [8, 12, 12]}, r"got also \['mrope_section'\]"),
        ({"rope_type": "linear"}, r"\['factor'\]: expected a number > 0, got None"),
        ({"rope_type": "linear", "factor": -1}, r"\['factor'\]: expected a number > 0, got -1"),
        (LLAMA3 | {"high_freq_factor": 1.0}, r"\['high_freq_factor'\]: expected more than"),
        ({"partial_rotary_factor": 0.5}, r"\['partial_rotary_factor'\]: expected 1.0 .* got 0.5"),
    ],
)
def test_other_scalings_are_refused(parameters, message):
    config = SimpleNamespace(
        model_type="llama",
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 1e4} | parameters,
    )
    with pytest.raises(ValueError, match=message):
        Rope.from_config(config)


@pytest.mark.parametrize("model_type", ["llama4_text", "bloom", "deepseek_v3", "cohere2", "falcon"])
def test_other_model_types_are_refused(model_type):
    with pytest.raises(ValueError, match=f"model_type: expected one of .* got '{model_type}'"):
        Rope.from_config(config_of(model_type))


def test_missing_fields_are_named():
    with pytest.raises(ValueError, match="model_type: expected in the config"):
        Rope.from_config(SimpleNamespace())
    config = SimpleNamespace(model_type="llama", max_position_embeddings=8, head_dim=64)
    with pytest.raises(ValueError, match=r"rope_parameters\['rope_theta'\]: expected a number"):
        Rope.from_config(config)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 2), 8), ValueError, r"inv_freq: expected shape .* got \[2, 2\]"),
        ((torch.ones(0), 8), ValueError, r"inv_freq: expected shape .* got \[0\]"),
        ((torch.ones(2, dtype=torch.int64), 8), TypeError, "inv_freq: expected a floating-point"),
        (([1.0], 8), TypeError, "inv_freq: expected a torch.Tensor or numpy.ndarray, got list"),
        ((torch.tensor([math.nan]), 8), ValueError, "inv_freq: expected finite values"),
        ((torch.ones(2), 0), ValueError, "max_position: expected an int >= 1, got 0"),
        ((torch.ones(2), 8, False, 0.0), ValueError, "attention_factor: expected a finite value"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Rope(*arguments)


def test_bad_rotary_dims_are_named():
    with pytest.raises(ValueError, match="rotary_dim: expected an even number >= 2, got 7"):
        Rope.default(8, 1e4, 8, rotary_dim=7)
    with pytest.raises(ValueError, match="rotary_dim: expected at most head_dim = 8, got 16"):
        Rope.default(8, 1e4, 8, rotary_dim=16)


def test_fingerprint_tells_apart_what_rotates_keys_differently():
    inv_freq = torch.tensor([1.0, 0.1], dtype=torch.float64)
    base = Rope(inv_freq, 8)
    assert base.fingerprint == Rope(inv_freq.numpy(), 4000).fingerprint
    others = [
        Rope(inv_freq * (1 + 1e-15), 8),
        Rope(inv_freq, 8, interleaved=True),
        Rope(inv_freq, 8, attention_factor=1.5),
    ]
    assert len({base.fingerprint, *(rope.fingerprint for rope in others)}) == 4


def test_rope_is_immutable_and_moves_between_devices():
    rope = Rope.default(8, 1e4, 8)
    with pytest.raises(AttributeError):
        rope.cos = torch.zeros(1)
    assert rope.to("cpu") is rope
    moved = rope.to("meta")
    assert moved.device == torch.device("meta")
    assert moved.fingerprint == rope.fingerprint
    assert moved.cos.shape == rope.cos.shape
    assert "half-split" in repr(rope)
