"""``python -m evals capacity``: what a machine would serve within a limit, in simulated time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

SUMMARY = "Plan rounds with the real scheduler and time them by a model of a GPU's costs."

Row = dict[str, Any]
SOCIETY = 50
"""Agents of a society, where the scheduler itself is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "question",
        choices=("agents", "bytes", "prefill", "machines", "host", "predict"),
        help="agents: how many end a round within the limit; bytes: of a whole round's KV; "
        "prefill: seconds until all agents of a round have their first token; machines: how many "
        "serve so many agents in societies of 50, each of which holds a round every --interval; "
        "host: processor seconds "
        "of the scheduler over simulated ones of the device, societies of 50 agents at once; "
        "predict: what was served for real (--report), by figures of plain vLLM there alone",
    )
    parser.add_argument("--machine", default="a100", help="a100, h100, h200 or b200")
    parser.add_argument(
        "--model", default="qwen2.5-7b", help="qwen2.5-7b, qwen2.5-14b, llama-3.1-8b or qwen3-32b"
    )
    parser.add_argument("--shape", default="all-gather", help="all-gather, board-2k or board-8k")
    parser.add_argument("--scale", type=float, default=1.0, help="divides the shape's lengths")
    parser.add_argument("--systems", default="prefix,reuse,blend,tokendance", help="by commas")
    parser.add_argument("--agents", default="2,4,8,16,32,50", help="of a society, by commas")
    parser.add_argument("--rates", default="0.1,0.5", help="rounds a second, by commas")
    parser.add_argument("--limit", type=float, default=1.5, help="seconds of nine in ten rounds")
    parser.add_argument("--interval", type=float, default=30.0, help="seconds, for machines")
    parser.add_argument("--most", type=int, default=256, help="agents that are tried at most")
    parser.add_argument("--societies", type=int, default=1, help="that take turns")
    parser.add_argument("--rounds", type=int, default=4, help="measured ones of each society")
    parser.add_argument("--max-rows", type=int, default=8192, help="rows of a forward pass")
    parser.add_argument(
        "--slower",
        type=float,
        default=1.0,
        help="divides what our attention is assumed to reach of the machine",
    )
    parser.add_argument("--report", type=Path, help="JSON of `evals serving rounds`, for predict")
    parser.add_argument("--json", type=Path, help="write the results here")


def run(arguments: argparse.Namespace) -> int:
    """Answers a question; returns 0, or 2 after a message about the arguments."""
    if arguments.question == "predict":
        return run_predict(arguments)
    from evals.capacity.cost import ASSUMED
    from evals.capacity.limits import Setting, make
    from evals.capacity.machines import MACHINES, MODELS
    from evals.capacity.rounds import SHAPES

    try:
        counts = numbers("agents", arguments.agents, int)
        rates = numbers("rates", arguments.rates, float)
        for name in (
            "scale",
            "limit",
            "most",
            "societies",
            "rounds",
            "max_rows",
            "slower",
            "interval",
        ):
            if not getattr(arguments, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(arguments, name)}")
        setting = Setting(
            named("machine", arguments.machine, MACHINES),
            named("model", arguments.model, MODELS),
            named("shape", arguments.shape, SHAPES).scaled(arguments.scale),
            societies=arguments.societies,
            rounds=arguments.rounds,
            max_rows=arguments.max_rows,
            shares=replace(
                ASSUMED,
                shared_read=ASSUMED.shared_read / arguments.slower,
                shared_compute=ASSUMED.shared_compute / arguments.slower,
            ),
        )
        systems = arguments.systems.split(",")
        for name in systems:
            make(name, setting)
    except ValueError as error:
        print(f"tokendance capacity: {error}", file=sys.stderr)
        return 2
    if arguments.question == "agents":
        rows = agents(setting, systems, rates, arguments.limit, arguments.most)
    elif arguments.question == "machines":
        rows = machines(
            setting, systems, counts, arguments.limit, arguments.interval, arguments.most
        )
    elif arguments.question == "host":
        rows = host(setting, counts)
    else:
        rows = each_count(setting, systems, counts, arguments.question)
    print_table(rows)
    if arguments.json:
        report = {
            "question": arguments.question,
            "setting": {
                "machine": setting.machine.name,
                "model": setting.model.name,
                "shape": asdict(setting.shape),
                "shares": asdict(setting.shares),
                "societies": setting.societies,
                "rounds": setting.rounds,
                "max_rows": setting.max_rows,
                "limit": arguments.limit,
                "interval": arguments.interval,
            },
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def numbers(name: str, text: str, kind: Callable[[str], float]) -> list[Any]:
    """Positive numbers with commas between them. Raises ``ValueError``."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) <= 0:
        raise ValueError(f"{name}: expected positive numbers with commas between them, got {text}")
    return values


def named(argument: str, name: str, known: dict[str, Any]) -> Any:
    """Raises ``ValueError`` for an unknown name."""
    if name not in known:
        raise ValueError(f"{argument}: expected one of {list(known)}, got {name!r}")
    return known[name]


def agents(
    setting: Any, systems: Sequence[str], rates: Sequence[float], limit: float, most: int
) -> list[Row]:
    """By rate, how many agents each system serves within the limit."""
    from evals.capacity.limits import agents_under

    rows = []
    for rate in rates:
        at = replace(setting, rate=rate)
        found = {name: agents_under(at, name, limit, most) for name in systems}
        rows.append({"rounds/s": rate, "limit, s": limit, **found})
    return rows


def each_count(
    setting: Any, systems: Sequence[str], counts: Sequence[int], question: str
) -> list[Row]:
    """By number of agents, the bytes or the seconds of a round that has the machine for itself."""
    alone = replace(setting, rate=1e-3 / setting.societies)
    rows = []
    for count in counts:
        row: Row = {"agents": count}
        for name in systems:
            served, _ = alone.run(name, count)
            if question == "prefill":
                row[f"{name}, s"] = max(served.first)
            else:
                row[f"{name}, GB"] = served.peak_rows * setting.model.row_bytes / 1e9
        rows.append(row)
    return rows


def machines(
    setting: Any,
    systems: Sequence[str],
    counts: Sequence[int],
    limit: float,
    interval: float,
    most: int,
) -> list[Row]:
    """By system, the agents that one machine serves in societies of `SOCIETY`, and the machines
    that so many need, each a replica with societies of its own."""
    from evals.capacity.limits import agents_within

    rows = []
    for name in systems:

        def holds(societies: int, name: str = name) -> bool:
            at = replace(setting, societies=societies, rate=societies / interval)
            served, _ = at.run(name, SOCIETY, give_up=limit * 1.001)
            return bool(served.percentile(0.9) <= limit)

        agents = SOCIETY * agents_within(holds, most)
        needed = {f"machines for {n:,}": -(-n // agents) if agents else "none" for n in counts}
        rows.append({"system": name, "agents of a machine": agents, **needed})
    return rows


def host(setting: Any, counts: Sequence[int]) -> list[Row]:
    """By number of agents, what the scheduler takes beside the device.

    They belong to societies of `SOCIETY` agents at most, whose rounds come all at once, and there
    is room for all: what a scheduler has to do for many agents does not depend on how many devices
    their rows lie on.
    """
    from evals.capacity.limits import together

    rows = []
    for count in counts:
        societies = -(-count // SOCIETY)
        agents = count // societies
        served, system = together(setting, agents, societies)
        rows.append(
            {
                "agents": agents * societies,
                "societies": societies,
                "plans a second": system.plans / system.plan_seconds,
                "plan, us a segment": 1e6 * system.plan_seconds / system.uses,
                "steps": served.steps,
                "host, ms a step": 1e3 * system.host_seconds / served.steps,
                "device, ms a step": 1e3 * served.busy / served.steps,
                "host over device": system.host_seconds / served.busy,
            }
        )
    return rows


def run_predict(arguments: argparse.Namespace) -> int:
    """Compares a report of real runs with simulated ones."""
    from evals.capacity.calibration import predict

    try:
        if arguments.report is None:
            raise ValueError("report: expected JSON of `evals serving rounds`, got none")
        fitted, rows = predict(json.loads(arguments.report.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        print(f"tokendance capacity: {error}", file=sys.stderr)
        return 2
    print(
        f"plain vLLM here: {fitted.flops / 1e9:.0f} GFLOP/s, {fitted.bandwidth / 1e9:.1f} GB/s, "
        f"{1e3 * fitted.step_seconds:.1f} ms a pass",
        file=sys.stderr,
    )
    print_table(rows)
    if arguments.json:
        report = {"question": "predict", "setting": asdict(fitted), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def print_table(rows: Sequence[Row]) -> None:
    """As in the documentation."""
    names = list(rows[0])
    print("| " + " | ".join(names) + " |")
    print("| " + " | ".join("---" for _ in names) + " |")
    for row in rows:
        print("| " + " | ".join(_shown(row[name]) for name in names) + " |", flush=True)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
