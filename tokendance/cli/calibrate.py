"""``tokendance calibrate``: what reuse loses on a model of one's own, and what to select."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokendance.host.selection import DEFAULT_NAME, parse_selection

if TYPE_CHECKING:
    from tokendance.integrations.calibration import Calibration, Reuse
    from tokendance.stored_calibration import StoredCalibration

SUMMARY = (
    "Measure on a model of your own how far reuse is from full recompute, and which selection "
    "stays within a limit."
)

_COLUMNS = "| {:<24} | {:>8} | {:>9} | {:>9} | {:>9} | {:>9} | {:>7} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a transformers model directory, or a name that it knows")
    parser.add_argument(
        "--rounds",
        type=Path,
        metavar="FILE",
        help='JSON lines, one round each: {"AGENT": [{"private": TEXT}, {"shared": TEXT}, ...], '
        "...}; by default one small round that comes along",
    )
    parser.add_argument(
        "--kl",
        type=float,
        default=0.02,
        help="nats that siblings may be away from full recompute, on average (default "
        "%(default)s, about what a pool of e4m3 loses)",
    )
    parser.add_argument(
        "--selections",
        default="leading:8,leading:12,leading:16",
        help="comma-separated: leading:COUNT[:UNSEEN[:MOST]], nothing, everything (default "
        f"%(default)s; the collector's own default is {DEFAULT_NAME})",
    )
    parser.add_argument("--new-tokens", type=int, default=12, help="tokens compared per agent")
    parser.add_argument("--dtype", default="auto", help="of the weights, such as bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the calibration is stored")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0; 1 if no selection stays within the limit; 2 after a message about arguments."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.new_tokens < 1:
            raise ValueError(f"--new-tokens: expected at least 1, got {arguments.new_tokens}")
        selections = {name: parse_selection(name) for name in arguments.selections.split(",")}
        from tokendance.integrations import calibration, calibration_rounds
        from tokendance.integrations.transformers import fingerprint_of

        model, tokenizer = calibration.load_model(
            arguments.model, arguments.dtype, arguments.device
        )
        rounds = (
            calibration_rounds.read_rounds(arguments.rounds, tokenizer)
            if arguments.rounds
            else [calibration_rounds.sample_round(tokenizer)]
        )
        found = calibration.calibrate(
            model, rounds, list(selections.values()), arguments.new_tokens
        )
        _print(found, list(selections), arguments.kl)
        if arguments.json:
            fingerprint = fingerprint_of(model)
            _stored(arguments, fingerprint, found, list(selections)).write(arguments.json)
    except (ValueError, OSError, ImportError) as error:
        print(f"tokendance calibrate: {error}", file=sys.stderr)
        return 2
    return 0 if _chosen(found, list(selections), arguments.kl) else 1


def _print(found: Calibration, names: list[str], limit: float) -> None:
    print(f"{found.prompt_rows} prompt tokens, {len(found.reuses[0].kl)} siblings")
    print(
        "full recompute against itself: KL "
        f"{found.noise.chunks:.1e} in other chunks, {found.noise.batch:.1e} in another batch"
    )
    print(_COLUMNS.format("selection", "rows", "KL mean", "at most", "median", "90 %", "top-1"))
    for name, one in zip(names, found.reuses, strict=True):
        print(
            _COLUMNS.format(
                name,
                f"{one.rows / found.prompt_rows:.1%}",
                f"{one.mean:.5f}",
                f"{one.upper:.5f}",
                f"{one.percentile(50):.5f}",
                f"{one.percentile(90):.5f}",
                f"{one.top1:.3f}",
            )
        )
    print(_recommendation(found, names, limit))


def _chosen(found: Calibration, names: list[str], limit: float) -> tuple[str, Reuse] | None:
    """The recommended selection, with its name; None where none is within a limit that means
    something."""
    best = None if limit < found.noise.floor else found.recommended(limit)
    pairs = zip(names, found.reuses, strict=True)
    return next((pair for pair in pairs if pair[1] is best), None)


def _stored(
    arguments: argparse.Namespace, fingerprint: str, found: Calibration, names: list[str]
) -> StoredCalibration:
    from tokendance.stored_calibration import StoredCalibration

    chosen = _chosen(found, names, arguments.kl)
    return StoredCalibration(
        model=arguments.model,
        fingerprint=fingerprint,
        limit=arguments.kl,
        chosen=chosen[0] if chosen else None,
        prompt_rows=found.prompt_rows,
        noise={"chunks": found.noise.chunks, "batch": found.noise.batch},
        selections={
            name: {
                "rows": one.rows,
                "kl": one.kl,
                "mean": one.mean,
                "upper": one.upper,
                "top1": one.top1,
            }
            for name, one in zip(names, found.reuses, strict=True)
        },
    )


def _recommendation(found: Calibration, names: list[str], limit: float) -> str:
    if limit < found.noise.floor:
        return (
            f"No answer: the limit of {limit:g} is below what full recompute differs from itself "
            f"({found.noise.floor:.1e})."
        )
    chosen = _chosen(found, names, limit)
    if chosen is None:
        return (
            f"None of these stays within {limit:g}. Try more rows (--selections "
            "leading:32,leading:64), or everything."
        )
    name, best = chosen
    return (
        f"Recommended: {best.selection}, or {name}: siblings are {best.mean:.5f} nats away on "
        f"average (at most {best.upper:.5f}, by a 95 % interval), within {limit:g}, and no other "
        "that is computes fewer rows."
    )
