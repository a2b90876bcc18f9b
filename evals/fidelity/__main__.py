"""How true reuse stays to full recompute, on recorded and on live rounds.

    python -m evals.fidelity [--threads 1] [--out build/fidelity] COMMAND

    front [town_square debate ...] [--ways master/leading:8,pic:0.15] [--new-tokens 12]
    drift [--agents 4] [--rounds 10] [--seeds 2] [--new-tokens 32]
    leakage [town_square] [--secrets 3] [--rounds 2]
    tolerance [town_square]
    audits [town_square]
    ideas [town_square]
    rows [agentsociety] [--round 1]
    answers [--sessions 4]
    quantized [town_square debate] [--agents 4]

``front`` runs every way of reuse over every workload. What its ``front.json`` holds already is not
measured again, so that it can be stopped and continued; so can ``answers``. It writes ``front.md``
and, with the extra ``bench``, one picture per workload. The others write JSON and Markdown of their
names.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from evals.fidelity import answers, audits, drift, front, ideas, leakage, quantized, rows, tolerance
from evals.workloads import find_workload, read_rounds


def main(arguments: Sequence[str] | None = None) -> int:
    from evals.models import load_model

    parser = argparse.ArgumentParser(
        prog="python -m evals.fidelity", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("build/fidelity"))
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("front")
    known = functools.partial(_one_of, front.WORKLOADS)
    one.add_argument("workloads", nargs="*", type=known, default=list(front.WORKLOADS))
    one.add_argument("--ways", default=",".join(front.WAYS), help="comma-separated")
    one.add_argument("--new-tokens", type=int, default=12)
    one = commands.add_parser("drift")
    one.add_argument("--agents", type=int, default=4)
    one.add_argument("--rounds", type=int, default=10)
    one.add_argument("--seeds", type=int, default=2)
    one.add_argument("--new-tokens", type=int, default=32)
    for name in ("leakage", "tolerance", "audits", "ideas"):
        one = commands.add_parser(name)
        one.add_argument("workload", nargs="?", type=known, default="town_square")
        if name == "leakage":
            one.add_argument("--secrets", type=int, default=3)
            one.add_argument("--rounds", type=int, default=2)
    one = commands.add_parser("rows")
    one.add_argument("workload", nargs="?", default="agentsociety")
    one.add_argument("--round", type=int, default=1)
    one = commands.add_parser("answers")
    one.add_argument("--sessions", type=int, default=4)
    one = commands.add_parser("quantized")
    known = functools.partial(_one_of, quantized.SAMPLED)
    one.add_argument("workloads", nargs="*", type=known, default=list(quantized.SAMPLED))
    one.add_argument("--agents", type=int, help="the first of the round; all by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "front":
        _front(loaded, options)
        return 0
    if options.command == "drift":
        numbers = options.agents, options.rounds, options.seeds, options.new_tokens
        result, write = drift.run(*loaded, *numbers), drift.text
    elif options.command == "leakage":
        numbers = options.secrets, options.rounds
        result, write = leakage.run(*loaded, options.workload, *numbers), leakage.text
    elif options.command == "tolerance":
        result, write = tolerance.run(*loaded, options.workload), tolerance.text
    elif options.command == "quantized":
        result, write = quantized.run(*loaded, options.workloads, options.agents), quantized.text
    elif options.command == "audits":
        result, write = audits.run(*loaded, options.workload), audits.text
    elif options.command == "ideas":
        result, write = ideas.run(*loaded, options.workload), ideas.text
    elif options.command == "rows":
        result, write = rows.run(loaded[1], options.workload, options.round), rows.text
    else:
        rounds = read_rounds(find_workload("debate"), rounds=(0, 1))
        sessions = list(dict.fromkeys(one.session for one in rounds))[: options.sessions]
        result = answers.run(*loaded, sessions, options.out / "answers.json")
        write = answers.text
    text = write(result)
    print(text)
    (options.out / f"{options.command}.md").write_text(text + "\n")
    (options.out / f"{options.command}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _one_of(workloads: Iterable[str], name: str) -> str:
    """An argument; argparse's own ``choices`` refuse a default of several."""
    if name not in workloads:
        raise argparse.ArgumentTypeError(f"{name}: expected one of {', '.join(workloads)}")
    return name


def _front(loaded: tuple[object, object], options: argparse.Namespace) -> None:
    table = front.run(
        *loaded,
        options.out / "front.json",
        options.workloads,
        options.ways.split(","),
        options.new_tokens,
    )
    (options.out / "front.md").write_text(front.text(table) + "\n")
    try:
        for workload, points in table.items():
            front.draw(workload, points, options.out / f"{workload}.png")
    except ImportError:
        print(
            "evals.fidelity: no pictures without the extra: pip install 'tokendance[bench]'",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
