"""A random Llama of the shape of Llama 3.2 1B: a round's prefill and decode, end to end.

Part of ``python -m bench.gpu --end-to-end``. 16 agents have 4,096 tokens each and 80 % of them in
common. ``TransformersEngine`` is compared with transformers' own dense cache: a prefill of one
prompt after the other, and a decode step of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import tokendance as td
from bench.decode import make_prompts

AGENTS, CONTEXT, SHARE = 16, 4096, 0.8
TIMES, STEPS = 3, 8
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 65536,
    "max_position_embeddings": 8192,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_model(device: torch.device, rehearse: bool) -> Any:
    """With random weights: bf16, or small and in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**(SIZES | SMALL if rehearse else SIZES))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if rehearse else torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


class Best:
    """The least seconds of each named call."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], object] = lambda: None
        if device.type == "cuda":
            self._wait = torch.cuda.synchronize
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        self._wait()
        begin = time.perf_counter()
        result = call()
        self._wait()
        spent = time.perf_counter() - begin
        self.seconds[name] = min(spent, self.seconds.get(name, spent))
        return result


def measure(device: torch.device, rehearse: bool) -> dict[str, Any]:
    """Seconds, rows that were computed of all rows, and bytes of keys and values."""
    from transformers import DynamicCache

    from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of

    agents, context = (3, 256) if rehearse else (AGENTS, CONTEXT)
    times, steps = (1, 1) if rehearse else (TIMES, STEPS)
    model = make_model(device, rehearse)
    geometry, prompts = geometry_of(model), make_prompts(agents, context, SHARE)
    dense = agents * context * geometry.row_bytes
    best = Best(device)
    for _ in range(times):
        store = td.DiffStore(geometry, rope_of(model, context + 256), 2 * dense, device=device)
        engine = TransformersEngine(model, td.KVCollector(store))
        plan = best("plan", lambda engine=engine: engine.collector.plan(prompts))
        best("prefill", lambda engine=engine, plan=plan: engine.prefill(plan))
        for _ in range(steps):
            tokens = {agent: [1] for agent in prompts}
            best("decode", lambda e=engine, p=plan, t=tokens: e.decode(p, t))
        computed, rows = int(plan.rows_computed), plan.rows
        plan.commit()
        stored = store.stats().stored_bytes
        del engine, store, plan
    ids = torch.stack(
        [
            torch.cat([torch.from_numpy(one.token_ids.astype("i8")) for one in prompt])
            for prompt in prompts.values()
        ]
    ).to(device)
    with torch.inference_mode():
        for _ in range(times):

            def prefill() -> None:
                for one in ids:  # one prompt fills the device
                    model(one[None], logits_to_keep=1)

            best("dense_prefill", prefill)
            cache = DynamicCache(config=model.config)
            model(ids[:, :8], past_key_values=cache, logits_to_keep=1)
            for layer in cache.layers:  # as long as the prompts; what it holds does not matter
                shape = (agents, geometry.num_kv_heads, context, geometry.head_dim)
                layer.keys = torch.randn(shape, dtype=geometry.dtype, device=device)
                layer.values = torch.randn_like(layer.keys)
            one = torch.ones(agents, 1, dtype=torch.long, device=device)
            for _ in range(steps):
                best(
                    "dense_decode",
                    lambda c=cache, t=one: model(t, past_key_values=c, logits_to_keep=1),
                )
            del cache
    return {
        "name": "end to end",
        "agents": agents,
        "context": context,
        "rows_computed": computed,
        "rows": rows,
        "stored_bytes": stored,
        "dense_bytes": dense,
        **{f"{name}_s": seconds for name, seconds in best.seconds.items()},
    }


def lines(result: dict[str, Any]) -> str:
    return (
        f"end to end, {result['agents']} agents of {result['context']} tokens: "
        f"prefill {result['prefill_s'] * 1e3:.1f} ms of {result['rows_computed']} rows "
        f"(plan {result['plan_s'] * 1e3:.1f} ms), one prompt after the other "
        f"{result['dense_prefill_s'] * 1e3:.1f} ms of {result['rows']}; "
        f"decode step {result['decode_s'] * 1e3:.2f} ms, dense cache "
        f"{result['dense_decode_s'] * 1e3:.2f} ms; "
        f"{result['stored_bytes'] / 1e6:.1f} MB stored, {result['dense_bytes'] / 1e6:.1f} MB dense"
    )
