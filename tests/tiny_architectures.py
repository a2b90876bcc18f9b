"""Random models of many transformers architectures, small enough to run in a moment."""

from __future__ import annotations

from typing import Any

import torch

SMALL = {
    "vocab_size": 331,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "head_dim": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
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
LONGROPE = {
    "rope_type": "longrope",
    "factor": 8.0,
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 32 for i in range(32)],
    "long_factor": [2.0 + i for i in range(32)],
    "original_max_position_embeddings": 512,
}
# Windows are shorter than the prompts of the tests.
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 20,
            "layer_types": WINDOWED,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 20,
            "layer_types": WINDOWED,
            "query_pre_attn_scalar": 48,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "phi3": (
        "phi3",
        {
            "sliding_window": 20,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "phi3-longrope": (
        "phi3",
        {
            "hidden_size": 256,
            "original_max_position_embeddings": 512,
            "rope_parameters": LONGROPE,
        },
    ),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "gpt_oss": (
        "gpt_oss",
        {
            "sliding_window": 20,
            "layer_types": WINDOWED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "mixtral": (
        "mixtral",
        {"sliding_window": 20, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
    "cohere2": ("cohere2", {"sliding_window": 20, "layer_types": WINDOWED, "logit_scale": 0.5}),
}
# They have no entry in `MODEL_TYPES`, so that the engine tries them.
UNLISTED: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("glm", {"head_dim": 128}),
    "olmo3": ("olmo3", {"sliding_window": 20, "layer_types": WINDOWED}),
    "exaone4": ("exaone4", {"sliding_window": 20, "layer_types": WINDOWED}),
    "starcoder2": ("starcoder2", {"sliding_window": 20}),
    "helium": ("helium", {"hidden_size": 256}),
}


def tiny_model(name: str, **changes: Any) -> Any:
    """A random model by a name of `ARCHITECTURES` or `UNLISTED`, or by a model type."""
    import transformers

    known = {**ARCHITECTURES, **UNLISTED}
    model_type, own = known.get(name, (name, {}))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **own, **changes})
    # What SDPA leaves out (soft caps, sinks) the models' own eager attention has.
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # transformers starts them at zero
                torch.nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() == 1:  # norms' weights and sinks
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()
