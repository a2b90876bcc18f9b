"""What a machine that has served for real reaches, and what that says of other runs on it.

Three figures of the machine are fitted to the runs of plain vLLM alone, to whose seconds nothing of
tokendance contributes. Those of all other systems are predicted with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import log
from typing import Any

import numpy as np

from evals.capacity.cost import CostModel, Shares, Work
from evals.capacity.limits import Setting, make
from evals.capacity.machines import MODELS, Machine
from evals.capacity.rounds import SHAPES, Society
from tokendance.host.selection import parse_selection

SIMULATED = {
    "vllm": "plain",
    "vllm_prefix": "prefix",
    "tokendance": "tokendance",
    "tokendance_shared": "tokendance",
    "engine": "tokendance",
}
"""How the simulation calls what was served. vLLM with tokendance inside and the small engine have
the same scheduler."""
_ALL = Shares(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0)  # what is fitted is reached


@dataclass(frozen=True)
class Fitted:
    """What a machine reaches.

    Attributes:
        flops: a second.
        bandwidth: bytes a second.
        step_seconds: of a forward pass that are neither.
    """

    flops: float
    bandwidth: float
    step_seconds: float


def predict(report: Mapping[str, Any]) -> tuple[Fitted, list[dict[str, Any]]]:
    """Fits the runs of plain vLLM in a report of ``evals serving rounds``, and predicts all.

    Only rounds of one society that come one after the other are taken, of a made-up shape. Of what
    was written it is known which outputs were the same, and how long they were.

    Returns:
        What was fitted, and a row for each run: seconds of a round, and until all of its agents
        have their first tokens, the middle of the rounds each, and what the simulation says.

    Raises:
        ValueError: the report has no such runs of plain vLLM.
    """
    given = report["setting"]
    runs = [one for one in report.get("runs", []) if one["rounds/s"] == "closed"]
    plain = [one for one in runs if one["system"] == "vllm"]
    if given["workload"] not in SHAPES or given["societies"] != 1 or not plain:
        raise ValueError("report: expected closed rounds of one society of a shape, with vllm")
    model = MODELS["smollm2"]
    # As much memory as leaves for keys and values what the servers had for them.
    memory = ((given["cache_gib"] + 2) << 30) + model.memory_bytes
    setting = Setting(
        Machine("served", int(memory / 0.9) + 1, 1.0, 1.0, 1.0),
        model,
        SHAPES[given["workload"]].scaled(given["scale"]),
        rounds=given["rounds"],
        max_rows=given["max_rows"],
        selection=parse_selection(given["selection"]),
    )

    # What is computed does not depend on how long it takes: nothing else is there meanwhile.
    planned = [rounds_of(setting, one) for one in plain]

    def error(fitted: Fitted) -> float:
        found = 0.0
        for run, rounds in zip(plain, planned, strict=True):
            pairs = zip(measured(run), seconds_of(rounds, at(setting, fitted)), strict=True)
            found += sum(log(said / real) ** 2 for real, said in pairs)
        return found

    fitted = least(error, Fitted(1e11, 1e10, 1e-2))
    rows = []
    for one in runs:
        rounds = rounds_of(setting, one)
        real, said = measured(one), seconds_of(rounds, at(setting, fitted))
        rows.append(
            {
                "agents": one["agents"],
                "system": one["system"],
                "first tokens, s": real[1],
                "simulated, s": said[1],
                "off": f"{said[1] / real[1] - 1:+.0%}",
                "round, s": real[0],
                "simulated round, s": said[0],
                "round off": f"{said[0] / real[0] - 1:+.0%}",
            }
        )
    return fitted, rows


@dataclass
class Passes:
    """What is computed in a round.

    Attributes:
        works: of its forward passes.
        until_first: how many of them until all agents have their first tokens.
    """

    works: list[Work] = field(default_factory=list)
    until_first: int = 0


def rounds_of(setting: Setting, run: Mapping[str, Any]) -> list[Passes]:
    """The rounds of one society that come one after the other, without the first one.

    Outputs are the same where they were in the run: what several agents have written alike is
    reused where it would else be computed.
    """
    system, found = make(SIMULATED[run["system"]], setting), []
    society = Society(0, run["agents"], setting.shape)
    said = None
    for number, outputs in enumerate(run["outputs alike"]):
        one = society.round(number, float(number), said)
        said = {
            name: _written(int(output), setting.shape.output)
            for name, output in zip(society.names, outputs.split(), strict=True)
        }
        system.submit(one.requests)
        passes = Passes()
        while made := system.forward():
            passes.works.append(made.work)
            for request in made.sampled:
                request.sampled(float(len(passes.works)))
        passes.until_first = max(int(request.first or 0) for request in one.requests)
        found.append(passes)
    return found[1:]


def _written(number: int, length: int) -> list[int]:
    """Token ids of an output, which no other output has, nor anything else in a prompt."""
    begin = Society.PERIOD + number * length
    return [*range(begin, begin + length)]


def seconds_of(rounds: Sequence[Passes], setting: Setting) -> tuple[float, float]:
    """Seconds of a round, and until all have their first tokens; the middle of the rounds."""
    cost = CostModel(setting.machine, setting.model, setting.shares)
    seconds = [[cost.seconds(work) for work in one.works] for one in rounds]
    first = [sum(each[: one.until_first]) for one, each in zip(rounds, seconds, strict=True)]
    return float(np.median([sum(each) for each in seconds])), float(np.median(first))


def measured(run: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of a round, and until all have their first tokens."""
    return run["round p50, s"], run["all first tokens p50, s"]


def at(setting: Setting, fitted: Fitted) -> Setting:
    """The setting on a machine that reaches what was fitted."""
    machine = replace(setting.machine, flops=fitted.flops, bandwidth=fitted.bandwidth)
    shares = replace(_ALL, step_seconds=fitted.step_seconds)
    return replace(setting, machine=machine, shares=shares)


def least(error: Callable[[Fitted], float], start: Fitted) -> Fitted:
    """Where an error is least: figures go up and down by a factor, also several at once, as long as
    that helps, and then by smaller and smaller ones."""
    best, value, factor = start, error(start), 2.0
    while factor > 1.001:
        steps = product((1 / factor, 1.0, factor), repeat=3)
        others = [_times(best, by) for by in steps]
        errors = [error(one) for one in others]
        found = min(errors)
        if found < value:
            best, value = others[errors.index(found)], found
        else:
            factor = factor**0.5
    return best


def _times(fitted: Fitted, by: Sequence[float]) -> Fitted:
    flops, bandwidth, step_seconds = by
    return Fitted(
        fitted.flops * flops, fitted.bandwidth * bandwidth, fitted.step_seconds * step_seconds
    )
