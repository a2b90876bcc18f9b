"""What one more agent costs, from 2 agents to 64: seconds of a decode step's attention, and bytes.

    python -m bench.scaling [--shared 4096] [--private 256] [--dtype fp32] [--calls 9]
                            [--threads 2] [--out build/scaling] [--json PATH]

Beside `collective_attention` over Masters and own rows stands the same kernel over a dense cache
per agent, and what an agent's own rows cost alone. The shared part's bytes do not grow with the
agents; its FLOPs do, so that where arithmetic binds, as on CPUs, one more agent costs what they
take at the rate of matrix products, which is printed beside. Writes JSON (``--json``, or
``scaling.json`` in ``--out``) and, with the extra ``bench``, ``scaling.png`` in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import ceilings
from bench.mirrors import FLOATS, BenchRound, make_round
from bench.plots import draw_against_agents

AGENTS = (2, 4, 8, 16, 32, 64)
HEADS: dict[str, Any] = {"num_kv_heads": 3, "group": 3, "head_dim": 64}  # of SmolLM2-135M
WAYS = ("shared", "dense", "own rows alone")


def stored_bytes(case: BenchRound) -> int:
    """Of the pages that the round's agents hold, in one layer."""
    pool = case.k_pools[0]
    return 2 * pool.numel() * pool.element_size()


def measure(
    agents: int, shared: int, private: int, dtype: torch.dtype, calls: int
) -> dict[str, dict[str, float]]:
    """Seconds and bytes of every way; the ways take turns."""
    cases = {
        "shared": make_round(agents=agents, shared=shared, private=private, dtype=dtype, **HEADS),
        "dense": make_round(
            agents=agents, shared=shared, private=private, dtype=dtype, dense=True, **HEADS
        ),
        "own rows alone": make_round(
            agents=agents, shared=0, private=private, segments=1, dtype=dtype, **HEADS
        ),
    }
    attend = {way: case.attention() for way, case in cases.items()}
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(calls + 1):
        for way, call in attend.items():
            best[way] = min(best[way], ceilings.seconds(call))
    return {way: {"seconds": best[way], "bytes": stored_bytes(cases[way])} for way in WAYS}


def text(report: dict[str, Any]) -> str:
    """Markdown of the JSON."""
    lines = [
        f"S = {report['shared']}, P = {report['private']}, {report['dtype']}, {HEADS}, "
        f"{report['threads']} threads, best of {report['calls'] + 1}",
        "",
        "| agents | ms | dense | own rows alone | MiB | dense | own rows alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = report["found"]
    for one in found:
        cells = [f"{one[way]['seconds'] * 1e3:.2f}" for way in WAYS]
        cells += [f"{one[way]['bytes'] / 2**20:.1f}" for way in WAYS]
        lines.append(f"| {one['agents']} | {' | '.join(cells)} |")
    few, many = found[0], found[-1]
    lines += [
        "",
        f"The FLOPs of one agent take {report['flops_s'] * 1e6:.1f} us in matrix products. "
        "One more agent costs, between these numbers of agents:",
        "",
    ]
    for what, unit, name in (("seconds", 1e-6, "us"), ("bytes", 2**10, "KiB")):
        agents = many["agents"] - few["agents"]
        cost = [(many[way][what] - few[way][what]) / agents for way in WAYS]
        lines.append(
            f"- {cost[0] / unit:.1f} {name} (dense {cost[1] / unit:.1f}, own rows alone "
            f"{cost[2] / unit:.1f}): {cost[0] / cost[2]:.2f} of its own rows, "
            f"{cost[1] / cost[0]:.1f}x less than dense"
        )
    return "\n".join(lines)


def draw(found: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    """Time and bytes against agents."""

    def of(figure: str, unit: float) -> dict[str, list[float]]:
        return {
            title: [ways[way][figure] / unit for ways in found.values()]
            for way, title in zip(
                WAYS, ("tokendance", "dense caches", "own rows alone"), strict=True
            )
        }

    panels = {
        "attention of a decode step, ms": of("seconds", 1e-3),
        "keys and values, MiB": of("bytes", 2**20),
    }
    draw_against_agents(path, "What one more agent costs, one layer", list(found), panels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--shared", type=int, default=4096)
    parser.add_argument("--private", type=int, default=256)
    parser.add_argument("--dtype", choices=FLOATS, default="fp32")
    parser.add_argument("--calls", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("build/scaling"))
    parser.add_argument("--json", type=Path, help="where the figures go instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype = FLOATS[options.dtype]
    found = {
        agents: measure(agents, options.shared, options.private, dtype, options.calls)
        for agents in AGENTS
    }
    gemm = ceilings.gemm()
    for _ in range(options.calls):
        gemm.sample()
    heads = HEADS["num_kv_heads"] * HEADS["group"] * HEADS["head_dim"]
    flops = 4 * (options.shared + options.private) * heads
    names = ("shared", "private", "dtype", "threads", "calls")
    report: dict[str, Any] = {"bench": "scaling"} | {one: getattr(options, one) for one in names}
    report["flops_s"] = flops / gemm.rate
    report["found"] = [{"agents": agents, **ways} for agents, ways in found.items()]
    print(text(report))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.json or options.out / "scaling.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    try:
        draw(found, options.out / "scaling.png")
    except ImportError:
        print(
            "bench.scaling: no picture without the extra: pip install 'tokendance[bench]'",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
