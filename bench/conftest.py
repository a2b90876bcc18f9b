"""The fixture that measures, and the report: one line per shape.

Between two calls of the operator its ceilings and peers are called, so that all of them meet the
same noise of the machine. All figures are those of the best call. What is saved with
``--benchmark-json`` has them as ``extra_info``, for ``bench/compare.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from bench.ceilings import Ceiling, seconds

_LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--calls", type=int, default=9, help="timed calls of every operator")
    parser.addoption("--warm", action="store_true", help="whatever fits in the cache, decode too")
    parser.addoption("--threads", type=int, default=torch.get_num_threads())


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LINES] = []
    torch.set_num_threads(config.getoption("--threads"))


class Measure:
    """Measures one operator; see `__call__`."""

    def __init__(self, benchmark: Any, config: pytest.Config, name: str) -> None:
        self._benchmark = benchmark
        self._config = config
        self._name = name

    def __call__(
        self,
        call: Callable[[], object],
        *,
        ceilings: Mapping[str, Ceiling],
        floor: Callable[[Mapping[str, float]], float],
        bytes: float = 0,
        flops: float = 0,
        peers: Mapping[str, Callable[[], object]] | None = None,
        facts: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
        warm: bool = True,
    ) -> None:
        """
        Args:
            call: the operator, with all of its arguments.
            ceilings: sampled between the calls.
            floor: the least seconds that the call can take, from the ceilings' rates.
            bytes, flops: that one call moves or computes, for the rate in the report.
            peers: other ways to the same result; the report has their times over ours.
            facts: numbers to print beside, from the seconds of the best call (under "call") and
                of the peers.
            warm: a call of the operator or a peer is timed after one that is not, so that what fits
                in the cache is there. Without, ceilings and peers have come between, as the other
                layers of a model do.
        """
        best: dict[str, float] = {}
        warm = warm or self._config.getoption("--warm")

        def between_calls() -> None:
            for ceiling in ceilings.values():
                ceiling.sample()
            for name, peer in (peers or {}).items():
                if warm:
                    peer()
                best[name] = min(best.get(name, float("inf")), seconds(peer))
            if warm:
                call()

        self._benchmark.pedantic(
            call,
            setup=between_calls,
            rounds=self._config.getoption("--calls"),
            warmup_rounds=1,
        )
        took = self._benchmark.stats.stats.min
        fraction = floor({name: ceiling.rate for name, ceiling in ceilings.items()}) / took
        info = {"fraction_of_ceiling": fraction}
        info |= {f"over_{name}": time / took for name, time in best.items()}
        if facts:
            info |= facts({"call": took, **best})
        self._benchmark.extra_info.update(info)
        rate = f"{bytes / took / 1e9:7.2f} GB/s" if bytes else f"{flops / took / 1e9:7.1f} GFLOP/s"
        rest = "  ".join(
            f"{key.removeprefix('over_')} {value:.2f}{'x' if key.startswith('over_') else ''}"
            for key, value in info.items()
            if key != "fraction_of_ceiling"
        )
        self._config.stash[_LINES].append(
            f"{self._name:<64} {took * 1e3:9.3f} ms  {rate}  {fraction:5.2f} of ceiling  {rest}"
        )


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    return Measure(benchmark, request.config, request.node.name)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[_LINES]:
        terminalreporter.section(f"best of calls, {torch.get_num_threads()} threads")
        for line in config.stash[_LINES]:
            terminalreporter.write_line(line)
