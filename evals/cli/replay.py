"""``python -m evals replay``: recorded rounds through the systems that exist, and ours."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from tokendance.host.selection import DEFAULT_NAME, parse_selection

SUMMARY = "Replay recorded multi-agent rounds and compare what systems compute, store and lose."


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
    parser.add_argument("--chat", action="store_true", help="put ChatML markers into the prompts")
    parser.add_argument(
        "--systems",
        default="full,prefix,pic,tokendance",
        help="comma-separated (default %(default)s)",
    )
    parser.add_argument(
        "--selection",
        default=DEFAULT_NAME,
        help="rows that tokendance recomputes: leading:COUNT[:UNSEEN[:MOST]], "
        "deviation:RATIO[:LAYER], everything or nothing (default %(default)s)",
    )
    parser.add_argument("--new-tokens", type=int, default=12, help="tokens compared per agent")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", type=Path, help="write the results here")


def run(arguments: argparse.Namespace) -> int:
    """Replays; returns 0, or 2 after a message about arguments, files or the model."""
    from evals.models import load_model
    from evals.replay import RoundResult, make_system, replay_round, summarize
    from evals.workloads import find_workload, parse_rounds, read_rounds, tokenize_round

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        selection = parse_selection(arguments.selection)
        path = find_workload(arguments.file)
        recorded = read_rounds(
            path,
            session=arguments.session,
            rounds=parse_rounds(arguments.rounds) if arguments.rounds else None,
            agents=arguments.agents,
            max_private=arguments.max_private,
            chat=arguments.chat,
        )
        model, tokenizer = load_model(arguments.model)
        encode = partial(tokenizer.encode, add_special_tokens=False)
        names = [name for name in arguments.systems.split(",") if name]
        names.sort(key=lambda name: name != "full")
        systems = [make_system(name, model, selection) for name in names]
        longest = model.config.max_position_embeddings - arguments.new_tokens
        prompts = [tokenize_round(one, encode, max_tokens=longest) for one in recorded]
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"evals replay: {error}", file=sys.stderr)
        return 2
    results: list[RoundResult] = []
    session = None
    for one, segments in zip(recorded, prompts, strict=True):
        if one.session != session:
            session = one.session
            for system in systems:
                system.reset()
        result = replay_round(systems, segments, arguments.new_tokens, one.session, one.round)
        results.append(result)
        print(
            f"{one.workload} {one.session} round {one.round}: {result.agents} agents, "
            f"{result.prompt_tokens} tokens ({result.distinct_tokens} distinct)"
        )
        for name, row in result.systems.items():
            print("  " + _line(name, asdict(row)))
        sys.stdout.flush()
    summary = summarize(results)
    print(f"all {len(results)} rounds")
    for name, total in summary.items():
        print("  " + _line(name, total))
    if arguments.json:
        report = {
            "model": arguments.model,
            "workload": recorded[0].workload,
            "threads": torch.get_num_threads(),
            "rounds": [asdict(result) for result in results],
            "summary": summary,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _line(name: str, row: dict[str, float | None]) -> str:
    def number(key: str, form: str) -> str:
        value = row[key]
        return "-" if value is None else format(value, form)

    return (
        f"{name:<11} prefill {number('prefill_s', '7.2f')} s  rows {number('rows', '9.1f')}  "
        f"GFLOP linear {(row['linear_flops'] or 0) / 1e9:9.1f} "
        f"attention {(row['attention_flops'] or 0) / 1e9:9.1f}  "
        f"stored {(row['kv_bytes_stored'] or 0) / 2**20:8.1f} of "
        f"{(row['kv_bytes_dense'] or 0) / 2**20:8.1f} MiB  "
        f"decode {number('decode_tokens_per_s', '6.1f')}/s  KL {number('kl', '.2e')}  "
        f"siblings {number('kl_siblings', '.2e')}  top-1 {number('top1', '.3f')}"
    )
