"""The noise floor: KL of full recompute against itself, in other dtypes, chunks and batches.

A divergence below it says nothing about reuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from evals.fidelity.replays import read_workload
from tokendance.audit import divergence_of
from tokendance.integrations.full_recompute import (
    CHUNK,
    Continuation,
    continue_greedily,
    noise_of,
    recompute,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Json = dict[str, Any]


def run(
    load: Callable[[torch.dtype], tuple[Any, Any]],
    workload: str,
    prompts: int,
    new_tokens: int,
    save: Callable[[Json], None] = lambda _: None,
) -> Json:
    """KL in nats, means over the first agents of a workload's first round and their tokens.

    Every dtype is fed the greedy continuation of fp32. One model is in memory at a time.

    Args:
        load: the model in a dtype, and its tokenizer.
        prompts: how many agents.
        save: is handed the result after every dtype; some take long on a CPU.
    """
    model, tokenizer = load(torch.float32)
    (one, *_) = read_workload(workload, tokenizer)
    found = [
        continue_greedily(model, [int(t) for s in prompt for t in s.token_ids], new_tokens)
        for prompt in list(one.prompts.values())[:prompts]
    ]
    dtypes: dict[str, dict[str, float]] = {}
    result: Json = {
        "workload": workload,
        "prompts": len(found),
        "rows": sum(len(one.token_ids) for one in found),
        "chunk": CHUNK,
        "dtypes": dtypes,
    }
    for dtype in DTYPES:
        if dtype != torch.float32:
            del model
            model, _ = load(dtype)
        own = [Continuation(one.token_ids, one.fed, recompute(model, one)) for one in found]
        noise = noise_of(model, own)
        divergences = [divergence_of(a.logits, b.logits) for a, b in zip(found, own, strict=True)]
        name = str(dtype).removeprefix("torch.")
        dtypes[name] = {
            "against float32": float(torch.cat(divergences).mean()),
            "chunks": noise.chunks,
            "batch": noise.batch,
        }
        save(result)
        print(name, dtypes[name], flush=True)
    return result


def text(result: Json) -> str:
    """Markdown."""
    lines = [
        f"| dtype | against float32 | in chunks of {result['chunk']} rows | twice in one batch |",
        "| --- |" + " --- |" * 3,
    ]
    for name, one in result["dtypes"].items():
        first = "-" if name == "float32" else f"{one['against float32']:.1e}"
        lines.append(f"| {name} | {first} | {one['chunks']:.1e} | {one['batch']:.1e} |")
    prompts = "1 prompt" if result["prompts"] == 1 else f"{result['prompts']} prompts"
    lines += ["", f"{prompts} of {result['workload']}, {result['rows']} tokens."]
    return "\n".join(lines)


def sentence(result: Json) -> str:
    """What stands beside other tables."""
    found = result["dtypes"]
    floors = ", ".join(
        f"{max(one['chunks'], one['batch']):.0e} in {name}" for name, one in found.items()
    )
    others = ", ".join(
        f"{one['against float32']:.0e} in {name}"
        for name, one in found.items()
        if name != "float32"
    )
    return (
        f"Noise floor: full recompute differs from itself in other chunks or batches by {floors}; "
        f"from fp32 by {others}."
    )
