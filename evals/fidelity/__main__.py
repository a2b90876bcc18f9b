"""How true reuse stays to full recompute, on recorded and on live rounds.

    python -m evals.fidelity [--model qwen0.5b] [--selection leading:16] [--threads 1]
                             [--out build/fidelity] [--json PATH] COMMAND

    front [town_square debate ...] [--ways master/leading:8,pic:0.15] [--new-tokens 12]
          [--rounds 8] [--agents 4] [--session NAME]
    noise [town_square] [--prompts 2]
    drift [--agents 4] [--rounds 10] [--seeds 2] [--new-tokens 32]
    leakage [town_square] [--secrets 3] [--rounds 2]
    tolerance [town_square]
    audits [town_square]
    ideas [town_square] [--only collecting,leading] [--rounds 4] [--agents 4]
    rows [agentsociety] [--round 1]
    answers [--sessions 4]
    trajectories [--societies 8] [--rounds 10] [--new-tokens 32]
    quantized [town_square debate] [--agents 4]
    codecs [town_square debate] [--agents 4] [--bytes agentsociety]
    render PATH [--pictures build/fidelity]

``--selection`` says which rows are repaired, where ways do not. Each writes JSON (``--json``, or
its name in ``--out``) and makes its Markdown of that, as ``render`` does again at any time. What
the JSON of ``front``, ``answers``, ``trajectories`` or ``codecs`` holds already is not measured
again, so that they can be stopped and continued. ``noise`` of the same model in ``--out`` stands
beside all tables that are made after it. ``front`` writes one picture per workload, too, with the
extra ``bench``.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from evals.fidelity import (
    answers,
    audits,
    codecs,
    document,
    drift,
    front,
    ideas,
    leakage,
    noise,
    quantized,
    rows,
    tolerance,
    trajectories,
)
from evals.fidelity.document import Document
from evals.models import load_model, origin_of
from evals.workloads import find_workload, read_rounds
from tokendance.host.selection import DEFAULT_NAME

TABLES: dict[str, Callable[[Any], str]] = {
    "front": front.text,
    "noise": noise.text,
    "drift": drift.text,
    "leakage": leakage.text,
    "tolerance": tolerance.text,
    "audits": audits.text,
    "ideas": ideas.text,
    "rows": rows.text,
    "answers": answers.text,
    "quantized": quantized.text,
    "trajectories": trajectories.text,
    "codecs": codecs.text,
}
"""Per command what makes Markdown of its result."""

_REPAIRING = ("drift", "leakage", "tolerance", "audits", "ideas", "answers", "quantized")
_SETTINGS = {
    "front": ("new_tokens", "agents"),
    "trajectories": ("rounds", "new_tokens"),
    **dict.fromkeys(_REPAIRING, ("selection",)),
    "codecs": ("selection", "agents", "bytes"),
}
"""Arguments that must be the same where a file is continued."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "render":
            made = document.read(options.path)
            print(_text(made))
            if options.pictures is not None and made.command == "front":
                _draw(made, options.pictures)
        else:
            _measure(options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"evals.fidelity: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.fidelity", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="smollm2", help="one of evals.models, or a directory")
    parser.add_argument("--selection", default=DEFAULT_NAME, help="which rows are repaired")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("build/fidelity"))
    parser.add_argument("--json", type=Path, help="where the figures go instead")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("front")
    known = functools.partial(_one_of, front.WORKLOADS)
    one.add_argument("workloads", nargs="*", type=known, default=list(front.WORKLOADS))
    one.add_argument("--ways", default=",".join(front.WAYS), help="comma-separated")
    one.add_argument("--new-tokens", type=int, default=12)
    one.add_argument("--rounds", type=int, help="of each workload, as far as it is recorded")
    one.add_argument("--agents", type=int, help="the first of each round")
    one.add_argument("--session", help="to begin with, instead of the workload's usual one")
    one = commands.add_parser("noise")
    one.add_argument("workload", nargs="?", type=known, default="town_square")
    one.add_argument("--prompts", type=int, default=2)
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
        if name == "ideas":
            one.add_argument("--only", default="", help="ideas whose names contain one of these")
            one.add_argument("--rounds", type=int, help="as of front")
            one.add_argument("--agents", type=int, help="as of front")
    one = commands.add_parser("rows")
    one.add_argument("workload", nargs="?", default="agentsociety")
    one.add_argument("--round", type=int, default=1)
    one = commands.add_parser("answers")
    one.add_argument("--sessions", type=int, default=4)
    one = commands.add_parser("trajectories")
    one.add_argument("--societies", type=int, default=len(trajectories.SCENES))
    one.add_argument("--rounds", type=int, default=10)
    one.add_argument("--new-tokens", type=int, default=32)
    for name in ("quantized", "codecs"):
        one = commands.add_parser(name)
        known = functools.partial(_one_of, quantized.SAMPLED)
        one.add_argument("workloads", nargs="*", type=known, default=list(quantized.SAMPLED))
        one.add_argument("--agents", type=int, help="the first of the round; all by default")
    one.add_argument("--bytes", default="agentsociety", help="the workload whose bytes are counted")
    one = commands.add_parser("render")
    one.add_argument("path", type=Path)
    one.add_argument("--pictures", type=Path, help="of front: a folder to draw them in")
    return parser


def _one_of(workloads: Iterable[str], name: str) -> str:
    """An argument; argparse's own ``choices`` refuse a default of several."""
    if name not in workloads:
        raise argparse.ArgumentTypeError(f"{name}: expected one of {', '.join(workloads)}")
    return name


def _measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    path: Path = options.json or options.out / f"{options.command}.json"
    settings = {name: getattr(options, name) for name in _SETTINGS.get(options.command, ())}
    made = Document(options.command, options.model, origin_of(options.model), settings, None)
    beside = options.out / "noise.json"
    if options.command != "noise" and beside.is_file():
        found = document.read(beside)
        made.noise = found.result if found.model == made.model else None
    known = None
    if options.command in ("front", "answers", "trajectories", "codecs"):
        known = document.read_known(path, made)

    def save(result: Any) -> None:
        made.result = result
        made.write(path)

    save(_run(options, known, save))
    text = _text(made)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.command}.md").write_text(text + "\n")
    if options.command == "front":
        _draw(made, options.out)


def _run(options: argparse.Namespace, known: Any, save: Callable[[Any], None]) -> Any:
    """The command's result, for JSON; some ``save`` what they have so far."""
    if options.command == "noise":
        load = functools.partial(load_model, options.model)
        return noise.run(load, options.workload, options.prompts, options.new_tokens, save)
    loaded = load_model(options.model)
    chosen: str = options.selection
    if options.command == "front":
        ways = options.ways.split(",")
        which = options.new_tokens, options.rounds, options.agents, options.session
        return front.run(*loaded, known or {}, options.workloads, ways, *which, save)
    if options.command == "drift":
        numbers = options.agents, options.rounds, options.seeds, options.new_tokens
        return drift.run(*loaded, *numbers, chosen)
    if options.command == "leakage":
        return leakage.run(*loaded, options.workload, options.secrets, options.rounds, chosen)
    if options.command == "tolerance":
        return tolerance.run(*loaded, options.workload, chosen)
    if options.command == "quantized":
        return quantized.run(*loaded, options.workloads, chosen, options.agents)
    if options.command == "codecs":
        which = options.workloads, chosen, options.agents, options.bytes
        return codecs.run(*loaded, known or {}, *which, save)
    if options.command == "audits":
        return audits.run(*loaded, options.workload, chosen)
    if options.command == "ideas":
        some = options.only.split(","), options.rounds, options.agents
        return ideas.run(*loaded, options.workload, chosen, *some)
    if options.command == "trajectories":
        many = options.societies, options.rounds, options.new_tokens
        return trajectories.run(*loaded, known or [], *many, save)
    if options.command == "rows":
        return rows.run(loaded[1], options.workload, options.round)
    rounds = read_rounds(find_workload("debate"), rounds=(0, 1))
    sessions = list(dict.fromkeys(one.session for one in rounds))[: options.sessions]
    return answers.run(*loaded, sessions, chosen, known or [], save)


def _text(made: Document) -> str:
    if made.command not in TABLES:
        raise ValueError(f"command: expected one of {', '.join(TABLES)}, got {made.command!r}")
    return document.text(made, TABLES[made.command])


def _draw(made: Document, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for workload, points in front.read(made.result).items():
            if front.REFERENCE in points:
                front.draw(workload, points, directory / f"{workload}.png")
    except ImportError:
        print(
            "evals.fidelity: no pictures without the extra: pip install 'tokendance[bench]'",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
