"""When members' decode may read Masters once, and what stands in the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def obstacles(vllm_config: Any, kv_cache_groups: Sequence[Any]) -> list[str]:
    """What of vLLM's configuration does not go together with shared decode, with the reasons.

    Args:
        vllm_config: vLLM's.
        kv_cache_groups: of its cache.
    """
    specs = [type(group.kv_cache_spec).__name__ for group in kv_cache_groups]
    graphs = vllm_config.compilation_config.cudagraph_mode
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    found = {
        "async_scheduling: expected none: a step's tokens are not known when it is planned "
        "(--no-async-scheduling)": vllm_config.scheduler_config.async_scheduling,
        "model runner: expected V1 (VLLM_USE_V2_MODEL_RUNNER=0), got V2": (
            vllm_config.use_v2_model_runner
        ),
        f"cudagraph_mode: expected NONE or PIECEWISE: attention's work differs from step to step, "
        f"got {graphs}": graphs is not None and graphs.has_full_cudagraphs(),
        "ubatching: expected none: members' rows are those of one batch": parallel.use_ubatching,
        "kv_sharing_fast_prefill: expected none: each row passes through each layer": (
            cache.kv_sharing_fast_prefill
        ),
        f"KV cache: expected one group of FullAttentionSpec, got {specs}": (
            specs != ["FullAttentionSpec"]
        ),
    }
    return [reason for reason, is_so in found.items() if is_so]
