"""The rotations of a transformers model: what its rotary module holds, and how it turns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from tokendance.device.rotation import Rotation, required


def rotations_of_model(model: Any, max_position: int) -> list[Rotation | None]:
    """One per layer; see `Rope.from_model`. Layers of one rotation have one object."""
    body = getattr(model, "base_model", model)
    config = model.config
    rotary = _rotary_module(body)
    types = list(getattr(config, "layer_types", None) or [])
    names = [name for name in dict.fromkeys(types) if hasattr(rotary, f"{name}_inv_freq")]
    count = int(required(config, "num_hidden_layers"))
    made: dict[str | None, Rotation] = {}
    for name in names or [None]:
        mine = _rotation_of_module(body, rotary, name, max_position)
        same = [one for one in made.values() if _is_equal(one, mine)]
        made[name] = same[0] if same else mine
    # A layer type without frequencies of its own, beside others that have some, has no RoPE.
    layers = [made.get(name) for name in types[:count]] if names else [made[None]] * count
    if len(layers) != count:
        raise ValueError(f"layer_types: expected {count} entries, got {len(types)}")
    return [
        None if _has_no_rope(config, layer) else one
        for layer, one in zip(_layers_of(body, count), layers, strict=True)
    ]


def _rotary_module(body: Any) -> Any:
    """The one module of a transformers body that holds rotary frequencies."""
    found = {
        name: module
        for name, module in body.named_modules()
        if any(key == "inv_freq" or key.endswith("_inv_freq") for key in module._buffers)
    }
    if len(found) != 1:
        raise ValueError(
            "model: expected one rotary module (a buffer inv_freq, or one per layer type), "
            f"got {list(found) or 'none'} in {type(body).__name__}; give its frequencies to "
            "Rope(inv_freq, max_position)"
        )
    return next(iter(found.values()))


def _layers_of(body: Any, count: int) -> list[Any]:
    layers = getattr(body, "layers", None)
    if layers is None or len(layers) != count:
        got = "none" if layers is None else len(layers)
        raise ValueError(f"model: expected {count} decoder layers in its body, got {got}")
    return list(layers)


def _has_no_rope(config: Any, layer: Any) -> bool:
    """Whether a layer leaves queries and keys as they are (NoPE)."""
    attention = getattr(layer, "self_attn", layer)
    if not getattr(attention, "use_rope", True):  # SmolLM3, Llama 4
        return True
    if config.model_type in ("cohere2", "cohere2_moe"):
        return getattr(attention, "sliding_window", None) is None
    if config.model_type.startswith("exaone"):
        window = getattr(attention, "sliding_window", None)
        return window is not None and not getattr(attention, "is_sliding", True)
    return False


def _rotation_of_module(
    body: Any, rotary: Any, layer_type: str | None, max_position: int
) -> Rotation:
    """The rotation of a rotary module, or of one layer type in it."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    kinds = getattr(rotary, "rope_type", "default")
    kind = kinds.get(layer_type, "default") if isinstance(kinds, Mapping) else kinds
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    if inv_freq.is_meta:
        raise ValueError("model: expected loaded weights, got frequencies on the meta device")
    if kind in ("dynamic", "longrope"):
        limit = _positions_of_one_kind(rotary, layer_type, kind)
        if max_position > limit:
            raise ValueError(
                f"max_position: expected at most {limit}, since the model's frequencies "
                f"({kind}) are others in longer prompts, got {max_position}"
            )
        inv_freq = getattr(rotary, f"{prefix}original_inv_freq")
    scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    pairing = _is_interleaved(body, rotary, inv_freq, scaling, layer_type)
    return Rotation(inv_freq, pairing, scaling)


def _is_equal(one: Rotation, other: Rotation) -> bool:
    return one[1:] == other[1:] and torch.equal(one.inv_freq, other.inv_freq)


def _positions_of_one_kind(rotary: Any, layer_type: str | None, kind: str) -> int:
    """Longest prompt whose angles are of ``original_inv_freq``."""
    if kind == "dynamic":
        return int(rotary.original_max_seq_len)
    parameters = rotary.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    return int(parameters["original_max_position_embeddings"])


def _is_interleaved(
    body: Any, rotary: Any, inv_freq: torch.Tensor, scaling: float, layer_type: str | None
) -> bool:
    """Tries which dimensions the model's own function turns together."""
    rotate = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        rotate = getattr(sys.modules[type(body).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise ValueError(
            f"model: expected a function apply_rotary_pos_emb beside {type(rotary).__name__}, "
            "got none; give the frequencies to Rope(inv_freq, max_position, interleaved)"
        )
    count, device = inv_freq.numel(), inv_freq.device
    x = torch.linspace(1, 2, 2 * count, dtype=torch.float32, device=device)[None, None, None]
    one = torch.ones(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        cos, sin = rotary(x, one) if layer_type is None else rotary(x, one, layer_type)
        turned = rotate(x, x, cos, sin)[0].flatten().cpu()
    angle, x = inv_freq.detach().float().cpu(), x.flatten().cpu()
    cos, sin = angle.cos() * scaling, angle.sin() * scaling
    for interleaved, a, b in ((False, x[:count], x[count:]), (True, x[0::2], x[1::2])):
        parts = (a * cos - b * sin, a * sin + b * cos)
        own = torch.stack(parts, dim=-1).flatten() if interleaved else torch.cat(parts)
        if turned.shape == own.shape and bool(((turned - own).abs() < 1e-3).all()):
            return interleaved
    raise ValueError(
        f"model: expected a rotation of halves or of neighbouring dimensions, got another "
        f"({rotate.__module__}.{rotate.__name__})"
    )
