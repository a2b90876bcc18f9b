"""Fixtures and options that several test modules share."""

from __future__ import annotations

import argparse
import os

import backends
import check_tiers
import pytest
import torch

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # one of several test processes


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=backends.NAMES,
        help="run operator tests on this backend only; may be given several times",
    )
    parser.addoption("--part", type=part, help="I/N: of all tests the I-th (from 0) of every N")


def part(text):
    """Two numbers, of which the first counts up to the second."""
    this, slash, parts = text.partition("/")
    if not (slash and this.isdecimal() and parts.isdecimal() and int(this) < int(parts)):
        raise argparse.ArgumentTypeError(f"expected I/N with I < N, got {text!r}")
    return int(this), int(parts)


def pytest_configure(config):
    """A backend that is asked for by name must exist: where nothing runs, nothing fails."""
    for name in config.getoption("--backend") or ():
        if reason := backends.missing(name):
            raise pytest.UsageError(f"--backend {name}: {reason}")


def pytest_report_header(config):
    lines = []
    for name in backends.NAMES:
        reason = backends.missing(name)
        lines.append(f"backend {name}: {'available' if reason is None else f'none, {reason}'}")
    return lines


def pytest_generate_tests(metafunc):
    """One run per backend that exists here; which do not, and why, stands in the report's head."""
    for fixture, names in (("backend", backends.NAMES), ("fast_backend", backends.FAST)):
        if fixture not in metafunc.fixturenames:
            continue
        wanted = metafunc.config.getoption("--backend") or backends.NAMES
        chosen = [
            name
            for name in names
            if name in wanted
            and backends.missing(name) is None
            and backends.has_operator(name, metafunc.module.OPERATOR)
        ]
        marked = [
            pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in chosen
        ]
        metafunc.parametrize(fixture, marked, indirect=True, scope="session")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Tiers are marked before -m looks at the marks; parts are of what -k and -m leave.

    Tests that no chosen backend runs are left out, not skipped, and dtypes that it lacks.
    """
    check_tiers.mark([item for item in items if not _lacks_backend(item)])
    yield
    without = {item for item in items if _lacks_backend(item)}
    if config.getoption("--part"):
        this, parts = config.getoption("--part")
        left = [item for item in items if item not in without]
        without |= set(left) - set(left[this::parts])
    if without:
        config.hook.pytest_deselected(items=list(without))
        items[:] = [item for item in items if item not in without]
    if IS_WORKER:  # what takes long comes first, so that no process ends long after the others
        items.sort(key=lambda item: not any(map(item.get_closest_marker, ("slow", "model", "ptx"))))


def _lacks_backend(item):
    params = item.callspec.params if getattr(item, "callspec", None) else {}
    chosen = [params[name] for name in ("backend", "fast_backend") if name in params]
    if not all(isinstance(name, str) for name in chosen):  # a placeholder for an empty list
        return True
    return not all(backends.takes(name, params) for name in chosen)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and (reason := backends.missing("cuda")):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def backend(request):
    """A backend, large or small; see backends.py."""
    return backends.backend(request.param)


@pytest.fixture(scope="session")
def fast_backend(request):
    """A backend where a large case costs little."""
    return backends.backend(request.param)


@pytest.fixture(scope="module")
def one_thread():
    """The reference makes many small calls of torch, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _a_core_for_each_model(request):
    """Test processes that run models beside each other wait for each other's threads otherwise."""
    if not IS_WORKER or not request.node.get_closest_marker("model"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in fp32 and its tokenizer; downloaded on the first use."""
    pytest.importorskip("transformers")
    from evals.models import load_model

    try:
        return load_model("smollm2")
    except RuntimeError as error:
        pytest.skip(f"SmolLM2 is not cached and could not be downloaded: {error}")
