"""``python -m evals simulate``: a live society of agents on one KV cache."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokendance.host.selection import DEFAULT_NAME, parse_selection

if TYPE_CHECKING:
    from evals.society import RoundReport, Society

SUMMARY = "Let a small town of agents talk in rounds, and show what their prompts cost."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--agents", type=int, default=6, help="people who talk (default 6)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds (default 4)")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="tokens of a message at most (default 64)"
    )
    parser.add_argument(
        "--model", default="smollm2", help="one of evals.models, or a local directory"
    )
    parser.add_argument("--topic", default="bridge", help="name of a topic, or a topic of your own")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of orders (default 0)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.9, help="(default 0.9)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead")
    parser.add_argument("--history", type=int, default=3, help="own earlier messages in a prompt")
    parser.add_argument("--source", default="master", help="master, alone or producer")
    parser.add_argument(
        "--selection",
        default=DEFAULT_NAME,
        help="rows to recompute: leading:COUNT[:UNSEEN[:MOST]], deviation:RATIO[:LAYER], "
        "everything or nothing (default %(default)s)",
    )
    parser.add_argument("--block-size", type=int, default=8, help="rows of a page: 8, 16 or 32")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument(
        "--audit", action="store_true", help="compare every round with full recompute"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page about the run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the rounds, to be replayed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Simulates; returns 0, or 2 after a message about arguments, files or the model."""
    from tokendance.host.books import OutOfPagesError

    try:
        _check(arguments)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        society = _make_society(arguments)
        _simulate(society, arguments)
    except (ValueError, OSError, RuntimeError, ImportError, OutOfPagesError) as error:
        print(f"evals simulate: {error}", file=sys.stderr)
        return 2
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from evals.society import PERSONAS

    for name, most in (("agents", len(PERSONAS)), ("rounds", None), ("threads", None)):
        value = getattr(arguments, name)
        if value is not None and (value < 1 or (most is not None and value > most)):
            wanted = f"1..{most}" if most else "at least 1"
            raise ValueError(f"--{name}: expected {wanted}, got {value}")
    if any("\ud800" <= character <= "\udfff" for character in arguments.topic):
        raise ValueError(f"--topic: expected text, got bytes that are none, {arguments.topic!a}")
    for name in ("html", "json", "record"):
        path = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"--{name}: expected a file in a folder that exists, got {path}")


def _make_society(arguments: argparse.Namespace) -> Society:
    from evals.models import load_model
    from evals.society import PERSONAS, TOPICS, Meeting, Options, Society

    options = Options(
        new_tokens=arguments.new_tokens,
        temperature=0.0 if arguments.greedy else arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        source=arguments.source,
        selection=parse_selection(arguments.selection),
        block_size=arguments.block_size,
    )
    meeting = Meeting(
        PERSONAS[: arguments.agents],
        TOPICS.get(arguments.topic, arguments.topic),
        arguments.seed,
        arguments.history,
        session=f"{arguments.agents}x{arguments.rounds}/{arguments.seed}",
    )
    model, tokenizer = load_model(arguments.model)
    return Society(model, tokenizer, meeting, options, arguments.audit)


def _simulate(society: Society, arguments: argparse.Namespace) -> None:
    from evals.society.figures import figures_of, table, total

    meeting = society.meeting
    print(f"{arguments.agents} agents, {arguments.rounds} rounds, model {arguments.model}")
    print(f"topic: {meeting.topic}")
    reports: list[RoundReport] = []
    lines: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        print(f"\nround {number + 1} of {arguments.rounds}", flush=True)
        lines.append(meeting.line())
        report = society.hold_round(lambda name, text: print(f"  {name}: {text}", flush=True))
        reports.append(report)
        print("  " + _sentence(report), flush=True)
    lines[-1]["final"] = meeting.blocks(meeting.round - 1)
    rounds = [figures_of(report) for report in reports]
    print()
    _print_table(*table(rounds))

    memory = society.memory_by_agents()
    if arguments.record:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        arguments.record.write_text(text, encoding="utf-8")
    if arguments.json:
        result = {
            "command": _command(arguments),
            "model": arguments.model,
            "topic": meeting.topic,
            "threads": torch.get_num_threads(),
            "rounds": [
                {"round": report.round, **figures, "messages": report.messages}
                for report, figures in zip(reports, rounds, strict=True)
            ],
            "summary": total(rounds),
            "memory_by_agents": [
                {"agents": count, "kv_bytes_dense": dense, "kv_bytes_stored": stored}
                for count, dense, stored in memory
            ],
            "store": asdict(society.store.stats()),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.html:
        from evals.society.page import page
        from tokendance.cli.info import report as machine_report

        facts = machine_report()
        text = page(reports, memory, meeting, _command(arguments), arguments.model, facts)
        arguments.html.write_text(text, encoding="utf-8")
    for path in (arguments.record, arguments.json, arguments.html):
        if path:
            print(f"wrote {path}")


def _sentence(report: RoundReport) -> str:
    text = (
        f"[{report.prompt_tokens:,} prompt rows, {report.rows:,.0f} computed; prefill "
        f"{report.plan_s + report.prefill_s:.2f} s; {report.decode_tokens_per_s:.1f} tokens/s; "
        f"{report.kv_bytes_stored / 2**20:.1f} of {report.kv_bytes_dense / 2**20:.1f} MiB"
    )
    if report.audit:
        text += f"; KL {report.audit.kl:.1e}, top-1 {report.audit.top1:.3f}"
    return text + "]"


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = zip(row, widths, strict=True)
        print("  ".join(cell.rjust(width) for cell, width in cells))


def _command(arguments: argparse.Namespace) -> str:
    """The command that gives this run again, every option written out."""
    parts = ["python -m evals simulate"]
    for name, value in vars(arguments).items():
        option = "--" + name.replace("_", "-")
        if value is True:
            parts.append(option)
        elif value is not None and value is not False:
            parts.append(f"{option} {shlex.quote(str(value))}")
    return " ".join(parts)
