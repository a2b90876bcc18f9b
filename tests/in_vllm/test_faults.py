"""What goes wrong: workers that die, loads that fail, stores and caches that are full."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from server import running
from serving import serving
from small_rounds import EXACT, NEVER, a_round, alone, drawn, join, nothing_left

PAGE = 8 * 2 * 2 * 2 * 64 * 4  # rows, keys and values, layers, KV heads, elements, bytes


@pytest.mark.slow
def test_a_worker_that_is_killed_in_a_round_ends_the_engine_with_an_error(
    tiny: Path, tmp_path: Path
) -> None:
    from openai import APIError, OpenAI

    parallel = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "mp"]
    with running(tiny, tmp_path, EXACT | {"max_rows": 8}, parallel) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)

        def ask(agent: int) -> Any:
            told = {"agent": f"agent {agent}", "agents": 4, "shared": [[9, 2000]]}
            return client.completions.create(
                model="tiny",
                prompt=[*drawn(agent, 9), *drawn(99, 1991), 7],
                max_tokens=500,
                extra_body={"ignore_eos": True, "kv_transfer_params": {"tokendance": told}},
            )

        below = psutil.Process(server.process.pid).children(recursive=True)
        workers = [one for one in below if "Worker" in " ".join([one.name(), *one.cmdline()])]
        assert len(workers) == 2
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, agent) for agent in range(4)]
            server.wait_until(num_requests_waiting=4)  # of which none has a block yet
            workers[-1].kill()
            for one in asked:
                with pytest.raises(APIError):
                    one.result(120)
        assert server.process.wait(120) is not None
        _, left = psutil.wait_procs(below, timeout=30)
        assert not left


def test_a_load_that_fails_ends_its_requests_where_vllm_is_told_so(tiny: Path) -> None:
    prompts = a_round(30)
    with serving(EXACT, model=str(tiny), kv_load_failure_policy="fail") as engine:
        free = engine.free_blocks()
        expected = alone(engine, "load", prompts)
        cache = engine.worker._cache
        write, calls = cache.write, []

        def fail(*arguments: object) -> None:
            calls.append(arguments)
            if len(calls) == 2:
                raise MemoryError("no room for dense rows")
            write(*arguments)

        cache.write = fail
        join(engine, "load", prompts, agents=4, patience=NEVER)
        engine.run()
        ended = {agent: engine.reasons[f"load {agent}"] for agent in prompts}
        assert set(ended.values()) == {"error", "length"}
        for agent, reason in ended.items():
            if reason == "length":
                assert engine.done[f"load {agent}"] == expected[agent]
        assert engine.serve("after", prompts) == expected
        nothing_left(engine, free)


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_random_rounds_in_a_small_store_and_a_small_cache(
    tiny: Path, shared: bool, pytestconfig: pytest.Config
) -> None:
    store = EXACT | {"capacity": 80 * PAGE, "max_rows": 32, "shared_decode": shared}
    few = {"max_num_seqs": 5, "block_size": 32, "num_gpu_blocks_override": 20, "max_model_len": 512}
    random, preempted, waited = np.random.default_rng(1), 0, 0
    rounds = [a_round(200 + number, agents=5) for number in range(5)]
    with serving(store, model=str(tiny), enable_prefix_caching=True, **few) as engine:
        free = engine.free_blocks()
        expected = [alone(engine, f"{i}", prompts, new=60) for i, prompts in enumerate(rounds)]
        engine.scheduler.reset_prefix_cache()
        asked: dict[str, list[int]] = {}
        for number in range(pytestconfig.getoption("--rounds") // 4):
            which = int(random.integers(5))
            count = int(random.integers(1, 6))
            prompts = {agent: rounds[which][agent] for agent in list(rounds[which])[:count]}
            name, new = f"random {number}", int(random.integers(1, 61))
            join(engine, name, prompts, new=new, patience=float(random.choice([0.0, 0.01])))
            asked |= {f"{name} {agent}": expected[which][agent][:new] for agent in prompts}
            for _ in range(int(random.integers(0, 40))):
                engine.step()
                waiting = engine.scheduler.requests.values()
                preempted += sum(one.num_preemptions for one in waiting)
                now = engine.rounds._clock()
                waited += any(one.gathering and one.is_due(now) for one in engine.rounds._rounds)
            for agent in prompts:
                if random.random() < 0.2:
                    engine.engine.abort_request([f"{name} {agent}"], internal=False)
        engine.run(200_000)
        finished = {name: engine.done[name] for name in asked if name in engine.done}
        assert finished == {name: asked[name] for name in finished}
        assert len(finished) > len(asked) / 2
        assert preempted > 0
        assert waited > 0  # for room in the store
        assert engine.counts()["members"] > len(asked) / 4
        engine.scheduler.reset_prefix_cache()
        nothing_left(engine, free)


@pytest.mark.parametrize("shared", [False, True])
def test_aborts_in_every_phase(tiny: Path, shared: bool) -> None:
    prompts = a_round(31)
    few = {"block_size": 32, "num_gpu_blocks_override": 20, "max_model_len": 512}
    store = EXACT | {"max_rows": 32}
    if shared:  # members are preempted where the store is full, not vLLM's cache
        store |= {"capacity": 96 * PAGE, "shared_decode": True}
    met = set()
    with serving(store, model=str(tiny), **few) as engine:
        free = engine.free_blocks()
        expected = alone(engine, "abort", prompts, new=60)

        def phase(name: str) -> str:
            for member in engine.rounds.members.values():
                if member.request.request_id.startswith(name):
                    if member.request.num_preemptions:  # its rows may have been given up
                        return member.request.status.name
                    if member.plan is None:
                        return "gathers"
                    if not member.is_ready:
                        return "is computed"
                    return member.request.status.name
            return "has ended"

        for steps in (*range(0, 66, 2), 200):
            name = f"abort {steps}"
            join(engine, name, prompts, new=60, agents=4 if steps else 5, patience=NEVER)
            for _ in range(steps):
                engine.step()
            gone = ["agent 1", f"agent {2 + steps // 2 % 2}"] if steps else list(prompts)
            met |= {phase(f"{name} {agent}") for agent in gone}
            engine.engine.abort_request([f"{name} {agent}" for agent in gone], internal=False)
            engine.run()
            for agent in set(prompts) - set(gone):
                assert engine.done[f"{name} {agent}"] == expected[agent]
        wanted = {"gathers", "is computed", "WAITING", "RUNNING", "PREEMPTED", "has ended"}
        assert met >= wanted
        nothing_left(engine, free)
