"""How true reuse stays to full recompute, on recorded and on live rounds.

    python -m bench.fidelity [--threads 1] [--out build/fidelity] COMMAND

    front [town_square debate ...] [--ways master/leading:8,pic:0.15] [--new-tokens 12]
    drift [--agents 4] [--rounds 12]
    leakage [town_square]
    tolerance [town_square]
    audits [town_square]
    answers [--sessions 4]
    quantized [town_square debate]

``front`` runs every way of reuse over every workload. What its ``front.json`` holds already is not
measured again, so that it can be stopped and continued. It writes ``front.md`` and, with
matplotlib, one picture per workload. The others write JSON and Markdown of their names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.fidelity import answers, audits, drift, front, leakage, quantized, tolerance
from tokendance.workloads import find_workload, read_rounds


def main(arguments: Sequence[str] | None = None) -> int:
    from tokendance.models import load_model

    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("build/fidelity"))
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("front")
    one.add_argument("workloads", nargs="*", default=list(front.WORKLOADS))
    one.add_argument("--ways", default=",".join(front.WAYS), help="comma-separated")
    one.add_argument("--new-tokens", type=int, default=12)
    one = commands.add_parser("drift")
    one.add_argument("--agents", type=int, default=4)
    one.add_argument("--rounds", type=int, default=12)
    for name in ("leakage", "tolerance", "audits"):
        one = commands.add_parser(name)
        one.add_argument("workload", nargs="?", default="town_square")
    one = commands.add_parser("answers")
    one.add_argument("--sessions", type=int, default=4)
    one = commands.add_parser("quantized")
    one.add_argument("workloads", nargs="*", default=list(quantized.WORKLOADS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "front":
        _front(loaded, options)
        return 0
    if options.command == "drift":
        result, write = drift.run(*loaded, options.agents, options.rounds), drift.text
    elif options.command == "leakage":
        result, write = leakage.run(*loaded, options.workload), leakage.text
    elif options.command == "tolerance":
        result, write = tolerance.run(*loaded, options.workload), tolerance.text
    elif options.command == "quantized":
        result, write = quantized.run(*loaded, options.workloads), quantized.text
    elif options.command == "audits":
        result, write = audits.run(*loaded, options.workload), audits.text
    else:
        rounds = read_rounds(find_workload("debate"), rounds=(0, 1))
        sessions = list(dict.fromkeys(one.session for one in rounds))[: options.sessions]
        result, write = answers.run(*loaded, sessions), answers.text
    text = write(result)
    print(text)
    (options.out / f"{options.command}.md").write_text(text + "\n")
    (options.out / f"{options.command}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


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
        print("bench.fidelity: no pictures without matplotlib", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
