"""One engine for `evals.vllm`, in vLLM's own environment: a line of JSON for every round, one back.

The first line says what the engine is, each other one a round's name and prompts, and false if its
requests are to be in no round. A round is measured by driving the engine step by step, with
a request of nobody's running beside it, whose longest wait for a token is measured too.
"""

from __future__ import annotations

import functools
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "result: "
_BYSTANDER = "bystander"


class Hooks:
    """Seconds that an engine spends in the connector: in whatever vLLM may call of it, in the
    scheduler and in the worker, and in what it has put around attention.

    The clocks are read inside of what they measure. What they take, found by measuring nothing, is
    left out.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._name = ""
        self._since: tuple[float, float] | None = None
        self._clocks = 0.0, 0.0
        nothing = self._inside("nothing", lambda: None)
        for _ in range(10_000):
            nothing()
        ((_, count, wall, processor),) = self._seconds.values()
        self._clocks = wall / count, processor / count
        self._seconds = {}

    def watch(self) -> None:
        """Times the hooks of engines that are made from now on."""
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

        from tokendance.integrations.vllm import worker_side
        from tokendance.integrations.vllm.connector import TokenDanceConnector

        for name in dir(TokenDanceConnector):
            hook = inspect.getattr_static(TokenDanceConnector, name)
            if not name.startswith("_") and inspect.isfunction(hook):
                setattr(TokenDanceConnector, name, self._inside(name, hook))
        CPUAttentionBackendImpl.forward = self._outside(CPUAttentionBackendImpl.forward)
        divert = worker_side._divert

        def watched(layer: Any, *args: Any) -> None:
            divert(layer, *args)
            layer.impl.forward = self._inside("attention", layer.impl.forward)

        worker_side._divert = watched

    def _inside(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def hook(*args: Any, **more: Any) -> Any:
            if self._since is not None:  # one that another calls
                return function(*args, **more)
            self._name = name
            self._seconds.setdefault(name, [0, 0, 0.0, 0.0])[0] += 1
            self._go_on()
            try:
                return function(*args, **more)
            finally:
                self._stop()

        return hook

    def _outside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of vLLM's own, which a hook calls."""

        @functools.wraps(function)
        def own(*args: Any, **more: Any) -> Any:
            if self._since is None:
                return function(*args, **more)
            self._stop()
            try:
                return function(*args, **more)
            finally:
                self._go_on()

        return own

    def _go_on(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def _stop(self) -> None:
        processor, wall = time.process_time(), time.perf_counter()
        assert self._since is not None
        spent = self._seconds[self._name]
        spent[1] += 1
        spent[2] += wall - self._since[0]
        spent[3] += processor - self._since[1]
        self._since = None

    def take(self) -> dict[str, tuple[float, float, float]]:
        """Since the last call, by hook: calls, seconds of the wall and of the processor."""
        taken, self._seconds = self._seconds, {}
        return {
            name: (calls, wall - count * self._clocks[0], processor - count * self._clocks[1])
            for name, (calls, count, wall, processor) in taken.items()
        }


def made(task: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    ours: dict[str, Any] = {}
    if task["connector"] is not None:
        ours["kv_transfer_config"] = KVTransferConfig(
            kv_connector="TokenDanceConnector",
            kv_role="kv_both",
            kv_connector_extra_config=task["connector"],
        )
    if task.get("layers"):
        ours["hf_overrides"] = {"num_hidden_layers": task["layers"]}
        ours["load_format"] = "dummy"
    return LLM(
        task["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=task["prefix_caching"],
        max_model_len=task["max_tokens"],
        max_num_batched_tokens=task["max_rows"],
        max_num_seqs=256,
        gpu_memory_utilization=0.1,  # on a CPU, of its memory; the cache has a variable
        **ours,
    )


def bytes_held(engine: Any) -> int:
    """Of keys and values that requests and agents hold: blocks of vLLM's cache and pages of the
    store. What only lies there until its place is needed does not count."""
    scheduler = engine.engine_core.engine_core.scheduler
    pool, config = scheduler.kv_cache_manager.block_pool, scheduler.kv_cache_config
    blocks = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one is the null block
    held: int = blocks * sum(one.size for one in config.kv_cache_tensors) // config.num_blocks
    if scheduler.connector is not None:
        host = scheduler.connector.rounds.host
        pages = host.books.used_pages - host.books.evictable_pages
        held += pages * host.profile.page_bytes
    return held


def serve(engine: Any, name: str, prompts: Any, new_tokens: int, joins: bool) -> dict[str, Any]:
    """Serves a round. Seconds are of the wall but for those of the processor, and of a decode step:
    of the processor too, the median of the steps in which each agent says another token; None if
    there are none."""
    from vllm import SamplingParams

    def sampling(count: int, told: Any = None) -> SamplingParams:
        extra = None if told is None else {"kv_transfer_params": {"tokendance": told}}
        return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, extra_args=extra)

    engine.add_request(_BYSTANDER, {"prompt_token_ids": [5] * 16}, sampling(2000))
    for _ in range(3):
        engine.step()
    begin, processor = time.perf_counter(), time.process_time()
    for agent, (ids, spans) in prompts.items():
        told = {"round": name, "agent": agent, "agents": len(prompts), "shared": spans}
        parameters = sampling(new_tokens, told if joins else None)
        engine.add_request(agent, {"prompt_token_ids": ids}, parameters)
    first: dict[str, float] = {}
    output: dict[str, list[int]] = {}
    longest, at, steps, held = 0.0, begin, 0, 0
    decode: list[float] = []
    while len(output) < len(prompts):
        steps += 1
        goes_on, began = len(first) == len(prompts), time.process_time()
        outputs = engine.step()
        if goes_on and len(outputs) == len(prompts) + 1:
            decode.append(time.process_time() - began)
        held = max(held, bytes_held(engine))
        for one in outputs:
            now = time.perf_counter()
            if one.request_id == _BYSTANDER:
                longest, at = max(longest, now - at), now
                continue
            first.setdefault(one.request_id, now - begin)
            if one.finished:
                output[one.request_id] = list(one.outputs[0].token_ids)
    last, processor = time.perf_counter() - begin, time.process_time() - processor
    engine.abort_request([_BYSTANDER], internal=False)
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "first": max(first.values()),
        "last": last,
        "processor": processor,
        "longest_step": longest,
        "decode_step": statistics.median(decode) if decode else None,
        "bytes_held": held,
        "steps": steps,
        "tokens": output,
    }


def main() -> None:
    task = json.loads(sys.stdin.readline())
    hooks = Hooks()
    if task.get("hooks"):
        hooks.watch()
    engine = made(task).llm_engine
    serve(engine, "warm-up", {"nobody": [[7] * 64, []]}, 2, False)
    hooks.take()
    print(MARK + "{}", flush=True)
    for line in sys.stdin:
        name, prompts, *joins = json.loads(line)
        joining = task["connector"] is not None and joins != [False]
        found = serve(engine, name, prompts, task["new_tokens"], joining)
        found["hooks"] = hooks.take()
        print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
