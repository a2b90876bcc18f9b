"""vLLM in this process, with and without the connector, and recorded rounds for it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

from evals.models import model_path
from evals.workloads import find_workload, parse_rounds, read_rounds, tokenize_round
from tokendance.host.segments import Segment

Prompts = Mapping[str, list[Segment]]


@cache
def recorded_rounds(workload: str = "town_square", agents: int = 6, which: str = "1:4") -> Any:
    """Per round, agent -> segments of its prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"), local_files_only=True)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    found = read_rounds(find_workload(workload), agents=agents, rounds=parse_rounds(which))
    found = [one for one in found if one.session == found[0].session]
    return [tokenize_round(one, encode) for one in found]


def token_ids(segments: list[Segment]) -> list[int]:
    return [int(token) for segment in segments for token in segment.token_ids]


def spans(segments: list[Segment]) -> list[list[int]]:
    """Where the shared segments stand in their prompt."""
    found, at = [], 0
    for segment in segments:
        if segment.is_shared:
            found.append([at, at + segment.length])
        at += segment.length
    return found


def told(round_: str, agent: str, segments: list[Segment], **more: Any) -> dict[str, Any]:
    """A request's ``kv_transfer_params``."""
    given = {"round": round_, "agent": agent, "shared": spans(segments), **more}
    return {"tokendance": given}


def sampling(parameters: dict[str, Any] | None = None, new_tokens: int = 12) -> Any:
    from vllm import SamplingParams

    extra = None if parameters is None else {"kv_transfer_params": parameters}
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, extra_args=extra)


class Serving:
    """An engine, driven step by step."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.cached: dict[str, int] = {}
        self.done: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}
        self._counted: dict[str, int] = {}

    @property
    def scheduler(self) -> Any:
        """vLLM's."""
        return self.engine.engine_core.engine_core.scheduler

    @property
    def rounds(self) -> Any:
        """The connector's side in the scheduler."""
        return self.scheduler.connector.rounds

    @property
    def worker(self) -> Any:
        """The connector's side in the worker."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker

    def add(self, name: str, prompt: list[int], parameters: Any = None, new: int = 12) -> None:
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling(parameters, new))

    def step(self) -> None:
        for one in self.engine.step():
            if one.finished:
                self.done[one.request_id] = list(one.outputs[0].token_ids)
                self.reasons[one.request_id] = one.outputs[0].finish_reason
                self.cached[one.request_id] = one.num_cached_tokens or 0

    def run(self, most: int = 10_000) -> None:
        """Until all requests have ended and nothing waits for the connector."""
        for _ in range(most):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"requests that do not end: {list(self.scheduler.requests)}")

    def serve(
        self, name: str, prompts: Prompts, *, joining: bool = True, new: int = 12, **more: Any
    ) -> dict[str, list[int]]:
        """All prompts of a round at once; the agents' outputs."""
        for agent, segments in prompts.items():
            parameters = told(name, agent, segments, agents=len(prompts), **more)
            self.add(f"{name} {agent}", token_ids(segments), parameters if joining else None, new)
        self.run()
        return {agent: self.done[f"{name} {agent}"] for agent in prompts}

    def counts(self) -> dict[str, int]:
        """What the connector has counted since this was asked last."""
        totals = dict(self.rounds.totals.data)
        before, self._counted = self._counted, totals
        return {name: count - before.get(name, 0) for name, count in totals.items()}

    def free_blocks(self) -> int:
        """Of vLLM's cache."""
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


@contextmanager
def configured(change: Callable[[Any], None]) -> Iterator[None]:
    """Has engines be made with a change of what vLLM has decided for a CPU."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def updated(cls: type, vllm_config: Any) -> None:
        update(vllm_config)
        change(vllm_config)

    CpuPlatform.check_and_update_config = classmethod(updated)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = update


def asynchronously(is_so: bool = True) -> AbstractContextManager[None]:
    """Has engines schedule a step while the one before it runs, which vLLM leaves out on a CPU."""

    def change(vllm_config: Any) -> None:
        vllm_config.scheduler_config.async_scheduling = is_so

    return configured(change)


@contextmanager
def serving(
    connector: Mapping[str, Any] | None = None,
    kv_role: str = "kv_both",
    kv_load_failure_policy: str = "fail",
    **options: Any,
) -> Iterator[Serving]:
    """An engine with the connector's options, or plain."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    more: dict[str, Any] = {}
    if connector is not None:
        more["kv_transfer_config"] = KVTransferConfig(
            kv_connector="TokenDanceConnector",
            kv_role=kv_role,
            kv_load_failure_policy=kv_load_failure_policy,
            kv_connector_extra_config=dict(connector),
        )
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.1,  # on a CPU, of its memory; the cache has a variable
    }
    settings = {"model": str(model_path("smollm2")), **settings, **more, **options}
    llm = None
    try:
        llm = LLM(**settings)
        yield Serving(llm)
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
