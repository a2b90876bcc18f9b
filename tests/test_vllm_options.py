"""What the connector's options and requests may say, and what it refuses; no vLLM is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokendance as td
from tokendance.host.decide import Source
from tokendance.host.gate import Gate
from tokendance.integrations.vllm.options import AuditOptions, Options, joining, refusals
from tokendance.integrations.vllm.sharing import obstacles


def test_options_are_read() -> None:
    assert Options.parse({}) == Options()
    given = {
        "capacity": "2GiB",
        "block_size": 8,
        "max_rows": 256,
        "patience": 1,
        "selection": "leading:8",
        "source": "producer",
        "separator": [5, 6],
        "shared_decode": True,
    }
    options = Options.parse(given)
    chosen = td.LeadingTokens(8), Source.PRODUCER, (5, 6)
    assert options == Options("2GiB", 8, 256, 1, *chosen, shared_decode=True)
    assert options.policy.selection == td.LeadingTokens(8)
    assert options.policy.source is Source.PRODUCER
    gate = Options.parse({"gate": {"fraction": 0.5, "deviation": 0.4, "action": "fall back"}}).gate
    assert gate == AuditOptions(0.5, Gate(deviation=0.4, action="fall back"))
    assert Options.parse({"gate": {}}).gate == AuditOptions(0.02, Gate())
    assert Options.parse({"gate": None}).gate is None
    assert Options.parse({"selection": "everything", "separator": "<|im_end|>"}) == Options(
        selection=td.Everything(), separator="<|im_end|>"
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"pages": 3}, r"kv_connector_extra_config: expected options among .* got \['pages'\]"),
        ({"gate": {"kl": 0.1}}, r"gate: expected an object of .*'deviation'.* logits .* vLLM's"),
        ({"gate": 0.5}, r"gate: expected an object of .* got 0.5"),
        ({"gate": {"fraction": 0}}, r"gate.fraction: expected 0 < fraction <= 1, got 0"),
        ({"gate": {"seed": -1}}, r"gate.seed: expected an int of at least 0, got -1"),
        ({"gate": {"deviation": -1}}, r"gate.deviation: expected at least 0, got -1"),
        ({"gate": {"action": "stop"}}, r"gate.action: expected one of .* got 'stop'"),
        ({"block_size": "8"}, r"block_size: expected a number of at least 0, got '8'"),
        ({"patience": -1}, r"patience: expected a number of at least 0, got -1"),
        ({"max_rows": 0}, r"max_rows: expected at least 1, got 0"),
        ({"shared_decode": 1}, r"shared_decode: expected true or false, got 1"),
        ({"max_rows": True}, r"max_rows: expected a number of at least 0, got True"),
        ({"selection": "some"}, r"selection: expected leading:COUNT, .* got 'some'"),
        ({"selection": "deviation:0.15"}, r"selection: expected one that is known when a round"),
        ({"source": "nobody"}, r"source: expected one of .* got 'nobody'"),
        ({"separator": 7}, r"separator: expected text or token ids, got 7"),
        ({"separator": ""}, r"separator: expected at least one token, got none"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Options.parse(given)


def test_a_request_is_cut_at_its_spans() -> None:
    told = {"round": "r", "agent": "Ada", "agents": 3, "patience": 2, "shared": [[1, 3], [3, 4]]}
    wish = joining([9, 1, 2, 3, 4], told, None, "tenant")
    assert wish is not None
    assert (wish.round, wish.agent, wish.agents, wish.patience) == ("r", "tenant/Ada", 3, 2)
    assert wish.segments == [
        td.private([9], namespace="tenant"),
        td.shared([1, 2], namespace="tenant"),
        td.shared([3], namespace="tenant"),
        td.private([4], namespace="tenant"),
    ]
    assert wish.segments[1] != td.shared([1, 2])
    assert td.shared([9]) == joining([9], {"shared": [[0, 1]]}, None, "").segments[0]  # type: ignore[union-attr]


def test_a_request_is_cut_behind_separators() -> None:
    wish = joining([1, 2, 0, 3, 0, 4], None, [0], "")
    assert wish is not None
    assert wish.round is None
    assert wish.segments == [td.shared([1, 2, 0]), td.shared([3, 0]), td.shared([4])]
    # Its name is how its prompt begins: the same in its next round.
    later = joining([1, 2, 0, 5, 0], None, [0], "")
    other = joining([1, 3, 0, 5, 0], None, [0], "")
    assert later is not None
    assert other is not None
    assert wish.agent == later.agent != other.agent
    assert joining([1, 2, 3], None, [0], "") is None  # nothing to be cut
    assert joining([1, 0, 3], False, [0], "") is None  # it does not want to
    assert joining([1, 0, 3], None, None, "") is None
    named = joining([1, 2, 3], {"agent": "Ada"}, [0], "")
    assert named is not None
    assert named.agent == "/Ada"


def config(**changes: Any) -> Any:
    """vLLM's, as far as it is asked."""
    model = {
        "dtype": torch.float32,
        "is_multimodal_model": False,
        "use_mla": False,
        "is_encoder_decoder": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "enable_sleep_mode": False,
        "runner_type": "generate",
    }
    parallel = {
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "decode_context_parallel_size": 1,
    }
    rest = {"cache_dtype": "auto", "kv_role": "kv_both", "lora": None, "speculative": None}
    passes = {"fuse_attn_quant": False}
    schedule = {"async_scheduling": False}
    rest["kv_load_failure_policy"] = "fail"
    for part in (model, parallel, rest, passes, schedule):
        part.update({name: value for name, value in changes.items() if name in part})
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(cache_dtype=rest["cache_dtype"]),
        kv_transfer_config=SimpleNamespace(
            kv_role=rest["kv_role"], kv_load_failure_policy=rest["kv_load_failure_policy"]
        ),
        scheduler_config=SimpleNamespace(**schedule),
        lora_config=rest["lora"],
        speculative_config=rest["speculative"],
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(**passes)),
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_role": "kv_producer"}, "kv_role: expected kv_both"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1"),
        ({"data_parallel_size": 2}, "data_parallel_size: expected 1"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size: expected 1"),
        ({"lora": object()}, "enable_lora: expected no LoRA"),
        ({"speculative": object()}, "speculative_config: expected none"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype: expected the model's dtype, got fp8"),
        ({"is_multimodal_model": True}, "model: expected one for text"),
        ({"use_mla": True}, "model: expected no MLA"),
        ({"is_encoder_decoder": True}, "model: expected a decoder"),
        ({"is_hybrid": True}, "model: expected attention in every layer"),
        ({"is_attention_free": True}, "model: expected attention in every layer"),
        ({"enable_sleep_mode": True}, "enable_sleep_mode: expected none"),
        ({"fuse_attn_quant": True}, "fuse_attn_quant: expected none"),
        (
            {"kv_load_failure_policy": "recompute", "async_scheduling": True},
            "kv_load_failure_policy: expected fail with asynchronous scheduling",
        ),
        ({"runner_type": "pooling"}, "runner: expected generate"),
    ],
)
def test_what_cannot_be_done_beside_it_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str
) -> None:
    assert refusals(config()) == []
    assert refusals(config(cache_dtype="float32")) == []
    assert refusals(config(kv_load_failure_policy="recompute")) == []
    assert refusals(config(async_scheduling=True)) == []
    (found,) = refusals(config(**changes))
    assert found.startswith(reason)


class FullAttentionSpec:
    """As vLLM's is called."""


class SlidingWindowSpec:
    pass


def sharing_config(**changes: Any) -> Any:
    """Of vLLM, one in which members' decode can be shared, but for the changes."""
    has = {
        "graphs": None,
        "async_scheduling": False,
        "use_v2_model_runner": False,
        "use_ubatching": False,
        "kv_sharing_fast_prefill": False,
        **changes,
    }
    one = SimpleNamespace(**has)
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=one.graphs),
        scheduler_config=one,
        parallel_config=one,
        cache_config=one,
        use_v2_model_runner=one.use_v2_model_runner,
    )


def groups(*specs: type) -> list[Any]:
    return [SimpleNamespace(kv_cache_spec=spec()) for spec in specs]


@pytest.mark.parametrize(
    ("changes", "specs", "reason"),
    [
        ({"async_scheduling": True}, [FullAttentionSpec], "async_scheduling: expected none"),
        ({"use_v2_model_runner": True}, [FullAttentionSpec], "model runner: expected V1"),
        (
            {"graphs": SimpleNamespace(has_full_cudagraphs=lambda: True)},
            [FullAttentionSpec],
            "cudagraph_mode: expected NONE or PIECEWISE",
        ),
        ({"use_ubatching": True}, [FullAttentionSpec], "ubatching: expected none"),
        ({"kv_sharing_fast_prefill": True}, [FullAttentionSpec], "kv_sharing_fast_prefill: "),
        ({}, [SlidingWindowSpec], "KV cache: expected one group of FullAttentionSpec, got"),
        ({}, [FullAttentionSpec] * 2, "KV cache: expected one group of FullAttentionSpec, got"),
    ],
)
def test_decode_is_not_shared_where_something_stands_in_the_way(
    changes: dict[str, Any], specs: list[type], reason: str
) -> None:
    piecewise = SimpleNamespace(has_full_cudagraphs=lambda: False)
    assert obstacles(sharing_config(), groups(FullAttentionSpec)) == []
    assert obstacles(sharing_config(graphs=piecewise), groups(FullAttentionSpec)) == []
    (found,) = obstacles(sharing_config(**changes), groups(*specs))
    assert found.startswith(reason)
