"""Recorded rounds through all systems: prefill, decode, bytes and divergence, against agents.

    python -m bench.rounds [town_square agentsociety ...] [--agents 2,4,6] [--rounds 1:2]
                           [--repeat 3] [--threads 2] [--out build/rounds] [--json PATH]

Every number of agents is replayed ``--repeat`` times by fresh systems, one system after the other,
so that all meet the same noise; times are the best of them. Beside the times stand the ratios that
rows and FLOPs promise (those of linear layers and attention together, and of each), and what part
of them was reached.

Writes JSON (``--json``, or ``rounds.json`` in ``--out``) and, with the extra ``bench``, one picture
per workload into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.plots import draw_against_agents
from evals.replay import SystemResult, make_system, replay_round, summarize
from evals.workloads import find_workload, parse_rounds, read_rounds, tokenize_round

TITLES = {  # in pictures
    "full": "full recompute",
    "prefix": "prefix caching",
    "pic": "CacheBlend",
    "tokendance": "tokendance",
}
SYSTEMS = tuple(TITLES)
FASTEST = {"prefill_s": min, "decode_tokens_per_s": max}


@dataclass
class Cell:
    """One workload with one number of agents.

    Attributes:
        agents, prompt_tokens: of all replayed rounds together; ``agents`` of one round.
        systems: by name; times are the best of the repeats.
    """

    workload: str
    agents: int
    rounds: int
    prompt_tokens: int
    systems: dict[str, SystemResult]

    def over(self, other: str, figure: str) -> float:
        """How many times as much of ``figure`` the other system takes as tokendance."""
        mine = getattr(self.systems["tokendance"], figure)
        return float(getattr(self.systems[other], figure) / mine)


def replay(
    model_and_tokenizer: tuple[Any, Any],
    workload: str,
    agents: int,
    rounds: tuple[int | None, int | None] | None,
    repeat: int,
    new_tokens: int,
    **options: Any,
) -> Cell:
    model, tokenizer = model_and_tokenizer
    encode = partial(tokenizer.encode, add_special_tokens=False)
    recorded = read_rounds(find_workload(workload), agents=agents, rounds=rounds, **options)
    recorded = [one for one in recorded if one.session == recorded[0].session]
    prompts = [tokenize_round(one, encode) for one in recorded]
    best: dict[str, SystemResult] = {}
    results = []
    for _ in range(repeat):
        systems = [make_system(name, model) for name in SYSTEMS]
        results = [
            replay_round(systems, segments, new_tokens, one.session, one.round)
            for one, segments in zip(recorded, prompts, strict=True)
        ]
        for name, total in summarize(results).items():
            found = SystemResult(**total)  # type: ignore[arg-type]
            for figure, fastest in FASTEST.items():
                if name in best:
                    value = fastest(getattr(best[name], figure), getattr(found, figure))
                    setattr(found, figure, value)
            best[name] = found
    tokens = sum(result.prompt_tokens for result in results)
    return Cell(workload, results[0].agents, len(results), tokens, best)


def table(cells: Sequence[Cell]) -> str:
    """Markdown."""
    lines = [
        "| workload | agents | tokens | system | prefill s | rows | linear TFLOP | attention TFLOP "
        "| stored MiB | decode tokens/s | siblings' KL | top-1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        for name, result in cell.systems.items():
            kl = result.kl_siblings
            lines.append(
                f"| {cell.workload} | {cell.agents} | {cell.prompt_tokens} | {name} "
                f"| {result.prefill_s:.2f} | {result.rows:.0f} "
                f"| {result.linear_flops / 1e12:.3f} | {result.attention_flops / 1e12:.3f} "
                f"| {result.kv_bytes_stored / 2**20:.1f} | {result.decode_tokens_per_s:.1f} "
                f"| {'-' if kl is None else format(kl, '.4f')} "
                f"| {'-' if result.top1 is None else format(result.top1, '.3f')} |"
            )
    lines += [
        "",
        "| workload | agents | prefill over full | rows promise | reached | prefill over pic "
        "| FLOPs promise | linear | attention | reached | decode over full | bytes over full |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        full, rows = cell.over("full", "prefill_s"), cell.over("full", "rows")
        pic, flops = cell.over("pic", "prefill_s"), cell.over("pic", "flops")
        decode = 1 / cell.over("full", "decode_tokens_per_s")
        lines.append(
            f"| {cell.workload} | {cell.agents} | {full:.2f}x | {rows:.2f}x | {full / rows:.2f} "
            f"| {pic:.2f}x | {flops:.2f}x | {cell.over('pic', 'linear_flops'):.2f}x "
            f"| {cell.over('pic', 'attention_flops'):.2f}x | {pic / flops:.2f} | {decode:.2f}x "
            f"| {cell.over('full', 'kv_bytes_stored'):.2f}x |"
        )
    return "\n".join(lines)


def text(report: dict[str, Any]) -> str:
    """Markdown of the JSON."""
    cells = [
        Cell(**{**one, "systems": {k: SystemResult(**v) for k, v in one["systems"].items()}})
        for one in report["cells"]
    ]
    head = f"{report['model']}, {report['threads']} threads, best of {report['repeat']}"
    return f"{head}\n\n{table(cells)}"


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Prefill time and stored bytes against agents, of one workload."""

    def of(value: Callable[[SystemResult], float]) -> dict[str, list[float]]:
        return {
            title: [value(cell.systems[name]) for cell in cells] for name, title in TITLES.items()
        }

    panels = {
        "prefill, seconds": of(lambda result: result.prefill_s),
        "stored keys and values, MiB": of(lambda result: result.kv_bytes_stored / 2**20),
    }
    rounds = cells[0].rounds
    title = f"{Path(cells[0].workload).stem}, {rounds} recorded round{'s' if rounds > 1 else ''}"
    draw_against_agents(path, title, [cell.agents for cell in cells], panels)


def main(arguments: Sequence[str] | None = None) -> int:
    from evals.models import load_model

    parser = argparse.ArgumentParser(
        prog="python -m bench.rounds", description=__doc__.split("\n")[0]
    )
    parser.add_argument("workloads", nargs="*", default=["town_square"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--agents", default="2,4,6", help="comma-separated")
    parser.add_argument("--rounds", default="1:2", metavar="A:B", help="rounds A <= round < B")
    parser.add_argument("--max-private", type=int)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("build/rounds"))
    parser.add_argument("--json", type=Path, help="where the figures go instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        loaded = load_model(options.model)
        cells = [
            replay(
                loaded,
                workload,
                int(agents),
                parse_rounds(options.rounds),
                options.repeat,
                options.new_tokens,
                max_private=options.max_private,
                chat=options.chat,
            )
            for workload in options.workloads
            for agents in options.agents.split(",")
        ]
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"bench.rounds: {error}", file=sys.stderr)
        return 2
    names = ("model", "threads", "repeat")
    report: dict[str, Any] = {"bench": "rounds"} | {one: getattr(options, one) for one in names}
    report["cells"] = [asdict(cell) for cell in cells]
    print(text(report))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.json or options.out / "rounds.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    try:
        for workload in options.workloads:
            own = [cell for cell in cells if cell.workload == workload]
            draw(own, options.out / f"{Path(workload).stem}.png")
    except ImportError:
        print(
            "bench.rounds: no pictures without the extra: pip install 'tokendance[bench]'",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
