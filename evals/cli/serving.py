"""``python -m evals serving``: real servers over HTTP, asked by rounds of agents."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.cli.capacity import numbers, print_table
from tokendance.host.selection import DEFAULT_NAME, parse_selection

if TYPE_CHECKING:
    from evals.serving.prompts import Society
    from evals.serving.rounds import Arrivals, Served
    from evals.serving.servers import Server

SUMMARY = "Serve rounds of agents by real servers over HTTP, and count agents within a limit."
ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]
Societies = "Callable[[int], list[Society]]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "question",
        choices=("rounds", "agents"),
        help="rounds: latencies, bytes and outputs by number of agents; agents: how many end nine "
        "in ten rounds within the limit",
    )
    parser.add_argument(
        "--workload",
        default="all-gather",
        help="a shape of `evals capacity`, or recorded rounds: a .jsonl file or a name",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="divides the lengths of a shape")
    parser.add_argument("--text", default="town_square", help="recording that shapes' words are of")
    parser.add_argument(
        "--systems",
        default="vllm,vllm_prefix,tokendance,tokendance_shared,engine",
        help="by commas",
    )
    parser.add_argument("--agents", default="1,2,4,8", help="of a society, by commas, for rounds")
    parser.add_argument("--societies", type=int, default=1, help="that hold rounds at once")
    parser.add_argument("--rounds", type=int, default=3, help="measured ones of each society")
    parser.add_argument(
        "--rates", default="closed", help="rounds a second, by commas; closed: one after the other"
    )
    parser.add_argument("--think", type=float, default=0.0, help="seconds between closed rounds")
    parser.add_argument(
        "--times", type=float, default=4.0, help="the limit, in rounds of one agent on plain vLLM"
    )
    parser.add_argument("--most", type=int, default=64, help="agents that are tried at most")
    parser.add_argument("--max-rows", type=int, default=512, help="rows of a forward pass")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--cache", type=int, default=2, help="GiB of KV of each server")
    parser.add_argument(
        "--selection", default=DEFAULT_NAME, help="which reused rows tokendance computes again"
    )
    parser.add_argument("--environment", type=Path, help="a virtual environment that has vLLM")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw latencies and bytes against agents (a PNG)")


def run(arguments: argparse.Namespace) -> int:
    """Answers a question; returns 0, or 2 after a message about arguments or servers."""
    from evals.models import model_path
    from evals.serving.servers import VLLM, Setup, command_of, running
    from tools.test_vllm import environment

    try:
        counts = numbers("agents", arguments.agents, int)
        rates = [
            None if one == "closed" else float(numbers("rates", one, float)[0])
            for one in arguments.rates.split(",")
        ]
        for name in ("scale", "societies", "rounds", "times", "most", "max_rows", "threads"):
            if not getattr(arguments, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(arguments, name)}")
        names = arguments.systems.split(",")
        if arguments.question == "agents" and names[0] != "vllm":
            raise ValueError(f"systems: expected vllm first, for the limit, got {names[0]!r}")
        parse_selection(arguments.selection)
        model = model_path("smollm2")
        societies = societies_of(arguments, model)
        societies(counts[-1])
        config = json.loads((model / "config.json").read_text())
        setup = Setup(
            model,
            config["max_position_embeddings"],
            arguments.max_rows,
            arguments.threads,
            arguments.cache,
            selection=arguments.selection,
            vllm=environment(arguments.environment) if set(names) & set(VLLM) else None,
        )
        for name in names:
            command_of(name, setup, 0)
        with running(names, setup, arguments.logs) as servers:
            report = answer(arguments, servers, societies, counts, rates)
    except (ValueError, OSError, RuntimeError, HTTPException, subprocess.SubprocessError) as error:
        print(f"evals serving: {error}", file=sys.stderr)
        return 2
    print_table(report["rows"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(arguments.plot, report)
    return 0


def answer(
    arguments: argparse.Namespace,
    servers: Sequence[Server],
    societies: Callable[[int], list[Society]],
    counts: Sequence[int],
    rates: Sequence[float | None],
) -> Row:
    """A question's setting, its rows, and what they were made of."""
    from evals.serving.rounds import Arrivals

    arrivals = [Arrivals(rate, arguments.think, arguments.rounds) for rate in rates]
    setting = {
        name: getattr(arguments, name)
        for name in (
            *("workload", "scale", "societies", "rounds", "think", "max_rows", "threads"),
            "selection",
        )
    }
    report: Row = {
        "question": arguments.question,
        "setting": setting | {"cache_gib": arguments.cache},
    }
    if arguments.question == "rounds":
        return report | rounds(servers, societies, counts, arrivals)
    return report | agents(servers, societies, arrivals, arguments.times, arguments.most)


def societies_of(arguments: argparse.Namespace, model: Path) -> Callable[[int], list[Society]]:
    """What makes the societies of so many agents each, from a workload.

    Raises:
        ValueError, OSError: a workload that cannot be had, or has too few sessions.
    """
    from transformers import AutoTokenizer

    from evals.capacity.rounds import SHAPES
    from evals.serving.prompts import Recorded, Trace, text_of
    from evals.workloads import RecordedRound, find_workload, read_rounds

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    workload, count = arguments.workload, arguments.societies
    if workload in SHAPES:
        shape = SHAPES[workload].scaled(arguments.scale)
        text = text_of(find_workload(arguments.text), encode)
        return lambda agents: [
            Trace(f"{workload}-{agents}-{index}", index, agents, shape, text)
            for index in range(count)
        ]
    if arguments.scale != 1:
        raise ValueError(f"scale: expected 1 for recorded rounds, got {arguments.scale}")
    sessions: dict[str, list[RecordedRound]] = {}
    for one in read_rounds(find_workload(workload)):
        sessions.setdefault(one.session, []).append(one)
    if len(sessions) < count:
        raise ValueError(f"societies: expected 1..{len(sessions)} for {workload}, got {count}")
    chosen = [*sessions.values()][:count]
    return lambda agents: [
        Recorded(f"{workload}-{agents}-{index}", recorded, encode, agents)
        for index, recorded in enumerate(chosen)
    ]


def rounds(
    servers: Sequence[Server],
    societies: Callable[[int], list[Society]],
    counts: Sequence[int],
    arrivals: Sequence[Arrivals],
) -> Row:
    """By arrivals, number of agents and system, the figures of a run; servers take turns."""
    from evals.serving.figures import figures_of, row_of
    from evals.serving.rounds import serve

    runs: list[Row] = []
    for one in arrivals:
        for count in counts:
            plain: Served | None = None
            for server in servers:
                served = serve(server, societies(count), one)
                plain = served if server.name == "vllm" else plain
                head = {"rounds/s": told(one), "agents": count, "system": server.name}
                runs.append(head | figures_of(served, plain))
                print(runs[-1], file=sys.stderr, flush=True)
    return {"rows": [row_of(one) for one in runs], "runs": runs}


def agents(
    servers: Sequence[Server],
    societies: Callable[[int], list[Society]],
    arrivals: Sequence[Arrivals],
    times: float,
    most: int,
) -> Row:
    """By arrivals, how many agents each system serves within ``times`` rounds of one agent on plain
    vLLM, which is measured before and after."""
    from evals.serving.figures import figures_of, percentile
    from evals.serving.limits import agents_of_each
    from evals.serving.rounds import Arrivals, serve

    by_name = {server.name: server for server in servers}

    def alone() -> float:
        served = serve(by_name["vllm"], societies(1)[:1], Arrivals(rounds=3))
        return percentile([one.latency for one in served.rounds], 0.5)

    rows, probes = [], []
    for one in arrivals:
        unit = alone()
        limit = times * unit

        def holds(name: str, count: int, one: Any = one, limit: float = limit) -> bool:
            served = serve(by_name[name], societies(count), one, limit)
            figures = figures_of(served)
            ended = len(served.rounds) and figures["round p90, s"] <= limit
            head = {"rounds/s": told(one), "agents": count, "system": name, "holds": bool(ended)}
            probes.append(head | figures)
            print(probes[-1], file=sys.stderr, flush=True)
            return bool(ended)

        found = agents_of_each([*by_name], holds, most)
        row = {"rounds/s": told(one), "limit, s": limit, **found}
        rows.append(row | {"one agent, s": unit, "one agent afterwards, s": alone()})
    return {"times": times, "rows": rows, "probes": probes}


def told(arrivals: Arrivals) -> float | str:
    """A rate, or that there is none."""
    return "closed" if arrivals.rate is None else arrivals.rate


def draw(path: Path, report: Row) -> None:
    """Latencies and bytes of all systems against the numbers of agents, at the first rate."""
    from bench.plots import draw_against_agents

    runs = report["runs"]
    rows = [one for one in runs if one["rounds/s"] == runs[0]["rounds/s"]]
    counts = sorted({one["agents"] for one in rows})
    systems = list(dict.fromkeys(one["system"] for one in rows))

    def lines(figure: str) -> dict[str, list[float]]:
        found = {(one["system"], one["agents"]): one[figure] for one in rows}
        return {name: [found[name, count] for count in counts] for name in systems}

    draw_against_agents(
        path,
        f"{report['setting']['workload']}, scaled by {report['setting']['scale']:g}",
        counts,
        {
            "seconds of a round, p90": lines("round p90, s"),
            "KV at its most, MB": lines("peak KV, MB"),
        },
    )
