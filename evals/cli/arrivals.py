"""``python -m evals arrivals``: agents that arrive one by one, against rounds planned at once."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from tokendance.host.selection import DEFAULT_NAME, parse_selection

SUMMARY = (
    "Let agents of recorded rounds arrive one by one, and compare with rounds planned at once."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("file", help="a .jsonl file, or the name of a recorded workload")
    parser.add_argument(
        "--model", default="smollm2", help="one of evals.models, or a local directory"
    )
    parser.add_argument("--session", help="only this session")
    parser.add_argument("--rounds", metavar="A:B", help="only rounds A <= round < B")
    parser.add_argument("--agents", type=int, help="only the first so many agents of a round")
    parser.add_argument(
        "--max-private", type=int, help="only the last so many of each list of private blocks"
    )
    parser.add_argument(
        "--selection",
        default=DEFAULT_NAME,
        help="rows to recompute: leading:COUNT[:UNSEEN[:MOST]], deviation:RATIO[:LAYER], "
        "everything or nothing (default %(default)s)",
    )
    parser.add_argument("--new-tokens", type=int, default=12, help="tokens compared per agent")
    parser.add_argument("--max-rows", type=int, default=1024, help="rows of a forward pass")
    parser.add_argument(
        "--interval", type=int, default=1, help="forward passes between two arrivals (default 1)"
    )
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", type=Path, help="write the results here")


def run(arguments: argparse.Namespace) -> int:
    """Runs both ways; returns 0, or 2 after a message about arguments, files or the model."""
    from evals.arrivals import Arrivals, ArrivalsResult, summarize
    from evals.models import load_model
    from evals.workloads import find_workload, parse_rounds, read_rounds, tokenize_round

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        selection = parse_selection(arguments.selection)
        recorded = read_rounds(
            find_workload(arguments.file),
            session=arguments.session,
            rounds=parse_rounds(arguments.rounds) if arguments.rounds else None,
            agents=arguments.agents,
            max_private=arguments.max_private,
        )
        model, tokenizer = load_model(arguments.model)
        encode = partial(tokenizer.encode, add_special_tokens=False)
        longest = model.config.max_position_embeddings - arguments.new_tokens
        prompts = [tokenize_round(one, encode, max_tokens=longest) for one in recorded]
        arrivals = Arrivals(
            model, selection, arguments.new_tokens, arguments.max_rows, arguments.interval
        )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"tokendance arrivals: {error}", file=sys.stderr)
        return 2
    results: list[ArrivalsResult] = []
    session = recorded[0].session
    for one, segments in zip(recorded, prompts, strict=True):
        if one.session != session:
            session = one.session
            arrivals.reset()
        results.append(arrivals.hold_round(segments, one.session, one.round))
        _print(f"{one.workload} {one.session} round {one.round}", results[-1])
    total = summarize(results)
    _print(f"all {len(results)} rounds", total)
    if arguments.json:
        report = {
            "model": arguments.model,
            "workload": recorded[0].workload,
            "threads": torch.get_num_threads(),
            "rounds": [asdict(result) for result in results],
            "summary": asdict(total),
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _print(title: str, result: object) -> None:
    from evals.arrivals import ArrivalsResult

    assert isinstance(result, ArrivalsResult)
    print(f"{title}: {result.agents} agents, {result.prompt_tokens} tokens")
    for name, way in (("at once", result.at_once), ("one by one", result.one_by_one)):
        siblings = "-" if way.kl_siblings is None else f"{way.kl_siblings:.2e}"
        print(
            f"  {name:<11} rows {way.rows:9.1f} ({way.rows / result.at_once.rows:.3f}x)  "
            f"forwards {way.forwards:4d}  KL {way.kl:.2e}  siblings {siblings}",
            flush=True,
        )
