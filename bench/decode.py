"""Decode steps of a real model: a round's agents together against transformers' dense cache.

    python -m bench.decode [--model smollm2] [--agents 8,16,32] [--context 4096] [--share 0.8]
                           [--steps 5] [--threads 2] [--json build/decode.json]

All agents hold ``--share`` of their context in common, in orders of their own. The dense cache that
transformers decodes from is restored out of the store, so that both start from the same KV; steps
alternate, and the best of each counts; the ratio is over the faster of transformers' two caches.
Beside it stands the ratio of the bytes that a step reads, weights and keys and values: what sharing
could give if nothing but bytes cost time, and the time of the model's linear layers alone, which is
part of every system's step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokendance as td
from evals.models import load_model
from tokendance.integrations.transformers import TransformersEngine, geometry_of, rope_of

SEGMENTS = 8
CACHES = ("dynamic", "static")


def make_prompts(agents: int, context: int, share: float) -> dict[str, list[td.Segment]]:
    """``SEGMENTS`` shared segments in an order of its own per agent, behind private tokens."""
    rng = np.random.default_rng(0)
    length = int(context * share) // SEGMENTS
    private = context - SEGMENTS * length
    segments = [td.shared(rng.integers(100, 40000, length)) for _ in range(SEGMENTS)]
    return {
        f"agent {a}": [
            td.private(rng.integers(100, 40000, private)),
            *[segments[i] for i in rng.permutation(SEGMENTS)],
        ]
        for a in range(agents)
    }


def dense_cache(kind: str, store: td.DiffStore, model: Any, steps: int) -> Any:
    """All agents' KV as a transformers cache: ``"dynamic"``, which copies itself to grow, or
    ``"static"``, which has room for what ``steps`` steps append and masks what is not filled."""
    from transformers import DynamicCache, StaticCache

    geometry, agents = store.geometry, store.agents
    length = store.length(agents[0])
    slots = torch.arange(len(agents) * length).view(len(agents), length)
    cache: Any
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=length + steps)
    else:
        cache = DynamicCache(config=model.config)
    shape = (len(agents), length, geometry.num_kv_heads, geometry.head_dim)
    for layer in range(geometry.num_layers):
        k, v = torch.empty(2, len(agents) * length, *shape[2:], dtype=geometry.dtype)
        store.restore(agents, layer, k, v, slots)
        keys, values = (x.view(shape).transpose(1, 2).contiguous() for x in (k, v))
        cache.update(keys, values, layer)
    return cache


def best_seconds(calls: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Of each call, made in turn."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(steps):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
    return best


def linear_layers(model: Any, rows: int) -> Callable[[], None]:
    """All of the model's products with weights, of so many rows."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}

    @torch.inference_mode()
    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def measure(model: Any, agents: int, context: int, share: float, steps: int) -> dict[str, float]:
    geometry = geometry_of(model)
    prompts = make_prompts(agents, context, share)
    rows = context * agents
    store = td.DiffStore(geometry, rope_of(model, context + 256), rows * geometry.row_bytes)
    engine = TransformersEngine(model, td.KVCollector(store))
    plan = engine.collector.plan(prompts)
    engine.prefill(plan)
    plan.commit()
    stored = store.stats().stored_bytes
    plan = engine.collector.plan(
        {agent: [*segments, td.private([1])] for agent, segments in prompts.items()}
    )
    engine.prefill(plan)
    ids = torch.ones(agents, 1, dtype=torch.long)
    best: dict[str, float] = {}
    for kind in CACHES:
        cache = dense_cache(kind, store, model, steps)

        @torch.inference_mode()
        def dense(cache: Any = cache) -> None:
            model(ids, past_key_values=cache, logits_to_keep=1)

        def together() -> None:
            engine.decode(plan, {agent: [1] for agent in prompts})

        calls = {kind: dense, "tokendance": together, "linear": linear_layers(model, agents)}
        for name, seconds in best_seconds(calls, steps).items():
            best[name] = min(best.get(name, seconds), seconds)
        del cache, dense
    plan.abort()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    linear = best.pop("linear")
    faster = min(best[kind] for kind in CACHES)
    return {
        "agents": agents,
        "context": context,
        **{f"{name}_tokens_per_s": agents / seconds for name, seconds in best.items()},
        "over_dense": faster / best["tokendance"],
        "linear_share": linear / best["tokendance"],
        "over_dense_besides": (faster - linear) / (best["tokendance"] - linear),
        "bytes_bound": (weights + rows * geometry.row_bytes) / (weights + stored),
        "dense_bytes": rows * geometry.row_bytes,
        "stored_bytes": stored,
    }


def text(report: dict[str, Any]) -> str:
    """Markdown of the JSON."""
    lines = [
        f"{report['model']}, {report['threads']} threads, best of {report['steps']} steps",
        "",
        "| agents | transformers' DynamicCache, tokens/s | StaticCache | tokendance "
        "| over the faster | bytes would give | linear layers, of the step | besides them "
        "| dense KV, MiB | stored |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in report["found"]:
        lines.append(
            f"| {one['agents']} | {one['dynamic_tokens_per_s']:.1f} "
            f"| {one['static_tokens_per_s']:.1f} | {one['tokendance_tokens_per_s']:.1f} "
            f"| {one['over_dense']:.2f}x | {one['bytes_bound']:.2f}x | {one['linear_share']:.2f} "
            f"| {one['over_dense_besides']:.2f}x | {one['dense_bytes'] / 2**20:.0f} "
            f"| {one['stored_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--agents", default="8,16,32", help="comma-separated")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path("build/decode.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        model, _ = load_model(options.model)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"bench.decode: {error}", file=sys.stderr)
        return 2
    found = [
        measure(model, int(agents), options.context, options.share, options.steps)
        for agents in options.agents.split(",")
    ]
    names = ("model", "context", "share", "steps", "threads")
    report: dict[str, Any] = {"bench": "decode"} | {one: getattr(options, one) for one in names}
    report["found"] = found
    print(text(report))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
