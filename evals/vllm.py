"""Recorded rounds through vLLM: plain, with prefix caching, and with tokendance inside.

    python -m evals.vllm [town_square] [--agents 6] [--rounds 1:4] [--new-tokens 12] [--repeat 1]
                         [--max-rows 512] [--threads 1] [--out build/vllm.json]

Each system is a process with an engine of its own, on a CPU in fp32. They take turns round by
round, so that whatever else the machine does meets all of them. A round comes at once, beside a
request of nobody's that decodes all the time. Measured are the seconds to the first token of all
agents, to their last, those of the processor, and the longest time that the request beside them
waits for a token. The first run makes an environment (3.4 GB) under ``build/``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evals.vllm_worker import MARK

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("first", "last", "processor", "longest_step")


class Engine:
    """One system's process."""

    def __init__(self, python: Path, environment: dict[str, str], task: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [str(python), "-m", "evals.vllm_worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ask(task)

    def ask(self, what: Any) -> Any:
        """The answer to one line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise RuntimeError(f"vLLM ended with {self._process.wait()}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    from transformers import AutoTokenizer

    from evals.models import model_path
    from evals.workloads import find_workload, parse_rounds, read_rounds, tokenize_round
    from tools.test_vllm import environment

    parser = argparse.ArgumentParser(
        prog="python -m evals.vllm", description=__doc__.split("\n")[0]
    )
    parser.add_argument("workload", nargs="?", default="town_square")
    parser.add_argument("--agents", type=int, default=6)
    parser.add_argument("--rounds", default="1:4", metavar="A:B", help="rounds A <= round < B")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=1, help="the best of so many counts")
    parser.add_argument("--max-rows", type=int, default=512, help="rows of an engine step at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "vllm.json")
    options = parser.parse_args(arguments)
    model = model_path("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    recorded = read_rounds(
        find_workload(options.workload), agents=options.agents, rounds=parse_rounds(options.rounds)
    )
    recorded = [one for one in recorded if one.session == recorded[0].session]
    rounds = [_prompts(tokenize_round(one, encode)) for one in recorded]
    longest = max(len(ids) for prompts in rounds for ids, _ in prompts.values())
    task = {
        "model": str(model),
        "new_tokens": options.new_tokens,
        "max_tokens": max(longest + options.new_tokens + 16, 2048),
        "max_rows": options.max_rows,
    }
    python, variables = environment()
    variables |= {
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    systems = {
        "vllm": {"prefix_caching": False, "connector": None},
        "vllm_prefix": {"prefix_caching": True, "connector": None},
        "tokendance": {"prefix_caching": True, "connector": {"max_rows": options.max_rows}},
    }
    best: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    agree = dict.fromkeys(systems, 0)
    for _ in range(options.repeat):
        engines = {name: Engine(python, variables, task | own) for name, own in systems.items()}
        try:
            for number, prompts in enumerate(rounds):
                tokens = {}
                for name, engine in engines.items():
                    found = engine.ask([f"round {number}", prompts])
                    tokens[name] = found.pop("tokens")
                    if len(best[name]) <= number:
                        best[name].append(found)
                    best[name][number] = {
                        figure: min(best[name][number][figure], found[figure]) for figure in FIGURES
                    }
                    first = {agent: ids[0] for agent, ids in tokens[name].items()}
                    plain = {agent: ids[0] for agent, ids in tokens["vllm"].items()}
                    agree[name] += sum(first[agent] == plain[agent] for agent in prompts)
        finally:
            for engine in engines.values():
                engine.end()
    count = sum(map(len, rounds)) * options.repeat
    print(f"{options.workload}, {options.agents} agents, {len(rounds)} rounds, seconds:")
    for name, found in best.items():
        sums = {figure: sum(one[figure] for one in found) for figure in FIGURES[:3]}
        worst = max(one["longest_step"] for one in found)
        print(
            f"  {name:<12} first tokens {sums['first']:7.2f}  last {sums['last']:7.2f}  "
            f"processor {sums['processor']:7.2f}  longest wait beside {worst:5.2f}  "
            f"first tokens as plain {agree[name]}/{count}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"workload": options.workload, "agents": options.agents, "threads": options.threads}
    options.out.write_text(json.dumps(report | {"systems": best}, indent=1) + "\n")
    return 0


def _prompts(segments: Any) -> dict[str, tuple[list[int], list[list[int]]]]:
    """Per agent its token ids, and where shared segments stand in them."""
    result = {}
    for agent, parts in segments.items():
        ids: list[int] = []
        spans = []
        for part in parts:
            if part.is_shared:
                spans.append([len(ids), len(ids) + part.length])
            ids += part.token_ids.tolist()
        result[agent] = ids, spans
    return result


if __name__ == "__main__":
    sys.exit(main())
