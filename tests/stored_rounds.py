"""Rounds that tests of a store's directory play, and what is in it afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from driving import GEOMETRY, ROPE, restored, run_prefill, run_step, tokens
from torch import Tensor

import tokendance as td
from tokendance.files.directory import Directory


def open_store(path: Path, capacity: str | int = "64MiB", **options: object) -> td.DiffStore:
    return td.DiffStore.open(path, GEOMETRY, ROPE, capacity, block_size=8, **options)


def prompts(seed: int = 0) -> dict[str, list[td.Segment]]:
    news = [td.shared(tokens(10 + i, 40 + 7 * i)) for i in range(3)]
    return {
        "a": [td.private(tokens(seed + 1, 9)), *news],
        "b": [td.private(tokens(seed + 2, 21)), *news[::-1], td.private(tokens(seed + 3, 4))],
        "c": [news[1], td.private(tokens(seed + 4, 2)), news[0]],
    }


def output(agent: str) -> list[int]:
    return [500 + 10 * ord(agent) % 100 + token for token in range(6)]


def play(
    collector: td.KVCollector, round_: dict[str, list[td.Segment]], durable: bool = False
) -> td.Plan:
    """A round with six decoded tokens of each agent."""
    plan = collector.plan(round_)
    run_prefill(collector, plan)
    for token in range(6):
        run_step(collector.step({agent: [output(agent)[token]] for agent in round_}, prefill=()))
    plan.commit(durable=durable)
    return plan


def continued(round_: dict[str, list[td.Segment]]) -> dict[str, list[td.Segment]]:
    """The next round: every agent has heard what every other said."""
    said = {agent: td.shared(output(agent)) for agent in round_}
    return {
        agent: [*segments, said[agent], *[said[other] for other in said if other != agent]]
        for agent, segments in round_.items()
    }


def put(store: td.DiffStore, rows: dict[str, int]) -> dict[str, Tensor]:
    """Stores agents of random rows, so many of each, of which all but the first five are of a
    segment of their own; returns keys, then values, ``[2, L, rows, 1, 64]``, by agent."""
    dense = {
        agent: torch.randn(2, GEOMETRY.num_layers, count, 1, 64, dtype=torch.float32, device="cpu")
        for agent, count in rows.items()
    }
    store.put_round(
        {agent: (list(one[0]), list(one[1])) for agent, one in dense.items()},
        {
            agent: [td.private(range(5)), td.shared(tokens(hash_of(agent), count - 5))]
            for agent, count in rows.items()
        },
    )
    return dense


def hash_of(agent: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(agent)) % 100_003


def contents(store: td.DiffStore, agents: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Dense rows of agents (default: all), as `put` gives them."""
    found = {}
    for agent in store.agents if agents is None else agents:
        layers = restored(store, agent)
        found[agent] = torch.stack([torch.stack([pair[i] for pair in layers]) for i in range(2)])
    return found


def same_contents(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[a], other[a]) for a in one)


def files_of(path: Path) -> list[str]:
    """Names of the page files."""
    return sorted(one.name for one in path.glob("*.safetensors"))


def group_of(path: Path, agent: str) -> tuple[Path, int]:
    """Where the own rows of an agent lie: the file, and the first byte."""
    directory = Directory.open(path, writable=False)
    try:
        [row] = [
            row for row in directory.contents.rows["mirrors"].values() if row[0] == agent.encode()
        ]
        group = row[-1]
        number = directory.groups[group].file
        with directory.file(number) as file:
            begin = file._entries[str(group)][1] + file._start
        return path / f"{number:08d}.safetensors", begin
    finally:
        directory.close()


def flip(path: Path, at: int, bit: int = 4) -> None:
    """Damages one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= bit
    path.write_bytes(raw)
