"""Tests of tokendance inside vLLM, which `make test-vllm` builds an environment for.

Without vLLM nothing here is collected.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


_BEGIN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, help="seconds after which no further test begins")
    parser.addoption("--rounds", type=int, default=200, help="of the test of random rounds")


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--budget", None)
    if budget is not None and time.monotonic() - _BEGIN > budget:
        pytest.skip(f"NOT RUN: {budget:g} seconds are over")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that is quick."""
    from tiny_model import write_tiny_model

    directory = tmp_path_factory.mktemp("model") / "tiny"
    return write_tiny_model(directory, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the connector logs.

    A filter gets it: vLLM removes handlers of others when its first engine is made.
    """
    text: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        text.append(record.getMessage())
        return True

    log = logging.getLogger("vllm.tokendance")
    log.addFilter(keep)
    yield text
    log.removeFilter(keep)
