"""Recorded rounds through vLLM: plain, with prefix caching, and with tokendance inside.

    python -m evals.vllm [town_square] [--agents 6] [--rounds 1:4] [--new-tokens 12] [--repeat 1]
                         [--max-rows 512] [--threads 1] [--systems vllm,tokendance_shared]
                         [--out build/vllm.json]
    python -m evals.vllm untouched [--repeat 40] [--layers 30]

Each system is a process with an engine of its own, on a CPU in fp32. They take turns round by
round, so that whatever else the machine does meets all of them. A round comes at once, beside a
request of nobody's that decodes all the time. Measured are the seconds to the first token of all
agents, to their last, those of the processor, the longest time that the request beside them waits
for a token, the most bytes of keys and values that are held, and the processor's seconds of a step
in which all agents say another token: for that ``--new-tokens`` has to be more than the steps that
their prompts take.

``untouched`` asks what the connector costs requests that are in no round: the same ones are served
with it, without it, and without it by a third engine, which says what nothing differs by. A fourth
engine has it with clocks around whatever vLLM calls of it, which say its share of the engine's time
whatever else the machine does.
``--layers`` leaves layers of the model out, so that a step is short and what the connector adds to
it is seen.

The first run makes an environment (3.4 GB); ``--environment`` names another one that has vLLM.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evals.vllm_worker import MARK
from tools.test_vllm import environment

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("first", "last", "processor", "longest_step", "decode_step", "bytes_held")
SYSTEMS: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "vllm": (False, None),
    "vllm_prefix": (True, None),
    "tokendance": (True, {}),
    "tokendance_shared": (True, {"shared_decode": True}),
}
"""Whether vLLM caches prefixes, and the connector's options if it is there."""
UNTOUCHED = {"requests": 16, "prompt": 64, "new_tokens": 32}
DRAWS = 2000

Prompts = dict[str, tuple[list[int], list[list[int]]]]
"""Per agent its token ids, and where shared segments stand in them."""


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
    parser = argparse.ArgumentParser(
        prog="python -m evals.vllm", description=__doc__.split("\n")[0]
    )
    parser.add_argument("workload", nargs="?", default="town_square", help="or `untouched`")
    parser.add_argument("--agents", type=int, default=6)
    parser.add_argument("--rounds", default="1:4", metavar="A:B", help="rounds A <= round < B")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--repeat", type=int, help="the best of so many counts (1); pairs (40)")
    parser.add_argument("--max-rows", type=int, default=512, help="rows of an engine step at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which, comma-separated")
    parser.add_argument("--layers", type=int, help="of the model, for `untouched`; others are left")
    parser.add_argument("--environment", type=Path, help="a virtual environment that has vLLM")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "vllm.json")
    options = parser.parse_args(arguments)
    unknown = [one for one in options.systems.split(",") if one not in SYSTEMS]
    if unknown:
        parser.error(f"--systems: expected some of {list(SYSTEMS)}, got {unknown}")
    python, variables = environment(options.environment)
    is_untouched = options.workload == "untouched"
    variables |= {
        "OMP_NUM_THREADS": str(options.threads),
        "VLLM_CPU_KVCACHE_SPACE": "1" if is_untouched else "3",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    start = partial(Engine, python, variables)
    report = measure_untouched if is_untouched else measure_rounds
    found = {"workload": options.workload, "threads": options.threads} | report(options, start)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measure_rounds(options: argparse.Namespace, start: Any) -> dict[str, Any]:
    """Serves recorded rounds by all systems in turns, and prints a table."""
    from evals.models import model_path

    rounds = recorded(options.workload, options.agents, options.rounds)
    longest = max(len(ids) for prompts in rounds for ids, _ in prompts.values())
    task = {
        "model": str(model_path("smollm2")),
        "new_tokens": options.new_tokens,
        "max_tokens": max(longest + options.new_tokens + 16, 2048),
        "max_rows": options.max_rows,
    }
    systems = {}
    for name in options.systems.split(","):
        caches, connector = SYSTEMS[name]
        ours = None if connector is None else {"max_rows": options.max_rows, **connector}
        systems[name] = {"prefix_caching": caches, "connector": ours}
    repeat = options.repeat or 1
    best: dict[str, list[dict[str, float | None]]] = {name: [] for name in systems}
    agree = dict.fromkeys(systems, 0)
    for _ in range(repeat):
        engines = {name: start(task | own) for name, own in systems.items()}
        try:
            for number, prompts in enumerate(rounds):
                tokens = {}
                for name, engine in engines.items():
                    found = engine.ask([f"round {number}", prompts])
                    tokens[name] = found.pop("tokens")
                    if len(best[name]) <= number:
                        best[name].append(found)
                    best[name][number] = {
                        figure: _least(best[name][number][figure], found[figure])
                        for figure in FIGURES
                    }
                    first = {agent: ids[0] for agent, ids in tokens[name].items()}
                    plain = {agent: ids[0] for agent, ids in tokens[next(iter(systems))].items()}
                    agree[name] += sum(first[agent] == plain[agent] for agent in prompts)
        finally:
            for engine in engines.values():
                engine.end()
    count = sum(map(len, rounds)) * repeat
    print(f"{options.workload}, {options.agents} agents, {len(rounds)} rounds, seconds:")
    print("\n".join(table(best, agree, count)))
    return {"agents": options.agents, "systems": best}


def table(
    best: Mapping[str, Sequence[Mapping[str, Any]]], agree: Mapping[str, int], count: int
) -> list[str]:
    """A line for each system: sums over the rounds, the longest wait of all, the most bytes and the
    longest decode step, and how many of the ``count`` first tokens are those of the first system.
    """
    lines = []
    for name, found in best.items():
        sums = {figure: sum(one[figure] for one in found) for figure in FIGURES[:3]}
        longest = max(one["longest_step"] for one in found)
        held = max(one["bytes_held"] for one in found)
        steps = [one["decode_step"] for one in found if one["decode_step"] is not None]
        step = f"{max(steps) * 1e3:6.1f} ms" if steps else "   none"
        lines.append(
            f"  {name:<17} first tokens {sums['first']:7.2f}  last {sums['last']:7.2f}  "
            f"processor {sums['processor']:7.2f}  longest wait beside {longest:5.2f}  "
            f"KV held {held / 1e6:6.0f} MB  decode step {step}  "
            f"first tokens as {next(iter(best))} {agree[name]}/{count}"
        )
    return lines


def _least(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)


def measure_untouched(options: argparse.Namespace, start: Any) -> dict[str, Any]:
    """Serves requests that are in no round without the connector, with it, and without it by a
    third engine, in turns. What the first and the third differ by is what nothing differs by. A
    fourth has it with clocks around its hooks."""
    from evals.models import model_path

    count, length = UNTOUCHED["requests"], UNTOUCHED["prompt"]
    random = np.random.default_rng(0)
    task = {
        "model": str(model_path("smollm2")),
        "layers": options.layers,
        "new_tokens": UNTOUCHED["new_tokens"],
        "max_tokens": 2048,
        "max_rows": options.max_rows,
        "prefix_caching": True,
    }
    cuts = {"separator": "<|im_end|>"}
    connectors = {"without": None, "with": cuts, "control": None, "clocks": cuts}
    seconds: dict[str, list[float]] = {name: [] for name in connectors}
    engines: dict[str, Any] = {}
    turns: list[dict[str, Any]] = []  # of the one with clocks
    steps = 0
    try:
        for name, connector in connectors.items():
            engines[name] = start(task | {"connector": connector, "hooks": name == "clocks"})
        for number in range(options.repeat or 40):
            ids = random.integers(10, 40_000, (count, length)).tolist()
            prompts = {f"request {i}": (one, []) for i, one in enumerate(ids)}
            # Who comes first changes, so that whatever grows with time meets all.
            first = number % len(connectors)
            order = [*connectors][first:] + [*connectors][:first]
            for name in order:
                found = engines[name].ask([f"turn {number}", prompts, False])
                seconds[name].append(found["processor"])
                steps = found["steps"]
                if name == "clocks":
                    turns.append({key: found[key] for key in ("last", "processor", "hooks")})
    finally:
        for engine in engines.values():
            engine.end()
    print(f"{count} requests at once that are in no round, {length} tokens each:")
    for name in ("with", "control"):
        print("\n".join(compare(name, seconds["without"], seconds[name], steps)))
    print("\n".join(shares(turns, steps)))
    return {"layers": options.layers, "steps": steps, "seconds": seconds, "hooks": turns}


def compare(name: str, before: Sequence[float], after: Sequence[float], steps: int) -> list[str]:
    """Processor seconds of pairs: the median of their ratios and of their differences a step, each
    with the middle 95 % of what the medians of samples drawn from the pairs would be."""
    one, other = np.array(before), np.array(after)
    drawn = np.random.default_rng(0).integers(0, len(one), (DRAWS, len(one)))
    lines = [f"  {name}: {len(one)} pairs, {np.median(one):.3f} s of the processor without it"]
    for what, values, unit in (
        ("more", (other / one - 1) * 100, "%"),
        ("a step", (other - one) / steps * 1e6, "us"),
    ):
        low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
        lines.append(
            f"    {what:<7} {np.median(values):+7.2f} {unit} (95 %: {low:+.2f} .. {high:+.2f})"
        )
    return lines


def shares(turns: Sequence[Mapping[str, Any]], steps: int) -> list[str]:
    """What part of an engine's time is spent in the connector's hooks: the median of the turns, the
    most of one, and seconds a step; then the hooks that take the most of it."""
    hooks = sorted({name for one in turns for name in one["hooks"]})
    calls = np.array([[one["hooks"].get(name, [0])[0] for name in hooks] for one in turns])
    count = calls.sum() / len(turns) / steps
    lines = [f"  in its hooks: {len(turns)} turns, {count:.0f} calls a step"]
    spent = {}
    for what, whole, place in (("wall", "last", 1), ("processor", "processor", 2)):
        by = np.array([[one["hooks"].get(name, [0] * 3)[place] for name in hooks] for one in turns])
        inside, all_ = by.sum(axis=1), np.array([one[whole] for one in turns])
        share = inside / all_ * 100
        lines.append(
            f"    of the {what:<9} {np.median(share):6.3f} % (most of a turn {share.max():.3f} %), "
            f"{np.median(inside) / steps * 1e6:.0f} us a step"
        )
        spent = dict(zip(hooks, np.median(by, axis=0) / steps * 1e6, strict=True))
    most = sorted(spent, key=lambda name: -spent[name])[:5]
    lines.append("    us a step: " + ", ".join(f"{name} {spent[name]:.1f}" for name in most))
    return lines


def recorded(workload: str, agents: int, rounds: str) -> list[Prompts]:
    """The rounds of a workload's first session."""
    from transformers import AutoTokenizer

    from evals.models import model_path
    from evals.workloads import find_workload, parse_rounds, read_rounds, tokenize_round

    tokenizer = AutoTokenizer.from_pretrained(model_path("smollm2"), local_files_only=True)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    found = read_rounds(find_workload(workload), agents=agents, rounds=parse_rounds(rounds))
    found = [one for one in found if one.session == found[0].session]
    return [_prompts(tokenize_round(one, encode)) for one in found]


def _prompts(segments: Any) -> Prompts:
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
