"""Servers as processes of their own, started and stopped here, and what their metrics say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from evals.serving.client import Metrics, get
from tokendance.host.selection import DEFAULT_NAME

ROOT = Path(__file__).resolve().parents[2]
STARTS_WITHIN = 900.0  # seconds
BLOCK = 32
"""Rows of a block of vLLM's cache: its CPU backend wants multiples of it."""
VLLM: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "vllm": (False, None),
    "vllm_prefix": (True, None),
    "tokendance": (True, {}),
    "tokendance_shared": (True, {"shared_decode": True}),
}
"""Whether vLLM caches prefixes, and the connector's options if it is there."""
ENGINE = "engine"
"""The small engine of the repository."""
SYSTEMS = (*VLLM, ENGINE)


@dataclass(frozen=True)
class Held:
    """What a server's metrics say.

    Attributes:
        kv_bytes: of keys and values that requests and agents hold.
        rows: prompt rows that it has computed since it was started.
    """

    kv_bytes: int
    rows: int


class Server(Protocol):
    """One that answers.

    Attributes:
        name: one of `SYSTEMS`.
        url: without a path.
    """

    name: str
    url: str

    def held(self) -> Held:
        """Asks for its metrics. Raises ``OSError`` or ``HTTPException`` if it does not answer."""
        ...

    def forget(self) -> None:
        """Empties its caches, while nobody is served."""
        ...


@dataclass(frozen=True)
class Setup:
    """What all servers have in common.

    Attributes:
        model: a directory.
        max_tokens: of the longest prompt and output.
        max_rows: rows of a forward pass.
        threads: of each server.
        cache_gib: of keys and values in each server. vLLM's cache and tokendance's store each have
            a half of it; where decode is shared, the store has all but 1 GiB.
        patience: seconds without another member after which a round of tokendance begins.
        selection: which reused rows tokendance computes again, as `parse_selection` reads it.
        vllm: the interpreter of an environment that has vLLM, and its variables; None where no
            system needs it.
    """

    model: Path
    max_tokens: int
    max_rows: int
    threads: int = 1
    cache_gib: int = 2
    patience: float = 1.0
    selection: str = DEFAULT_NAME
    vllm: tuple[Path, Mapping[str, str]] | None = None


@dataclass
class Process:
    """A server in a process of this one.

    Attributes:
        log: what it writes.
        row_bytes: of keys and values of one token.
    """

    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes]
    row_bytes: int

    def held(self) -> Held:
        metrics = Metrics.parse(get(self.url, "/metrics"))
        if self.name == ENGINE:
            rows = metrics.sum("tokendance_rows_total") - metrics.sum(
                "tokendance_decode_rows_total"
            )
            return Held(int(metrics.sum("tokendance_bytes_held")), int(rows))
        blocks = int(metrics.label("vllm:cache_config_info", "num_gpu_blocks"))
        used = metrics.sum("vllm:kv_cache_usage_perc") * blocks * BLOCK * self.row_bytes
        rows = metrics.sum("vllm:prompt_tokens_by_source_total", source="local_compute")
        rows += metrics.sum("vllm:tokendance_rows_computed_total")
        return Held(int(used + metrics.sum("vllm:tokendance_bytes_held")), int(rows))

    def forget(self) -> None:
        for _ in range(100):
            # The first is the small engine's answer while somebody is served, the second vLLM's.
            try:
                found = get(self.url, "/reset_prefix_cache?reset_external=true", "POST")
                if json.loads(found)["success"]:
                    return
            except ValueError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"{self.name}: expected to be idle, but its caches are in use")


def command_of(name: str, setup: Setup, port: int) -> tuple[list[str], dict[str, str]]:
    """How a server is started: arguments, and variables.

    Raises:
        ValueError: an unknown name, or one that needs vLLM where there is none.
    """
    threads = {"OMP_NUM_THREADS": str(setup.threads)}
    if name == ENGINE:
        command = [sys.executable, "-m", "evals.serving.front", str(setup.model)]
        command += ["--port", str(port), "--capacity", f"{setup.cache_gib}GiB"]
        command += ["--max-rows", str(setup.max_rows), "--patience", str(setup.patience)]
        command += ["--selection", setup.selection]
        return command, {**os.environ, **threads}
    if name not in VLLM or setup.vllm is None:
        raise ValueError(f"system: expected one of {SYSTEMS}, got {name!r}")
    python, variables = setup.vllm
    caches, connector = VLLM[name]
    cache = setup.cache_gib
    if connector is not None:
        cache = 1 if connector.get("shared_decode") else max(cache // 2, 1)
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(setup.model), "--served-model-name", "model"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--block-size", str(BLOCK), "--gpu-memory-utilization", "0.1"]
    command += ["--max-model-len", str(setup.max_tokens)]
    command += ["--max-num-batched-tokens", str(setup.max_rows)]
    command += ["--max-num-seqs", str(min(256, setup.max_rows))]
    command += ["--enable-prefix-caching" if caches else "--no-enable-prefix-caching"]
    if connector is not None:
        store = f"{max(setup.cache_gib - cache, 1)}GiB"
        extra = {"capacity": store, "max_rows": setup.max_rows, **connector}
        transfer = {
            "kv_connector": "TokenDanceConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra
            | {"patience": setup.patience, "selection": setup.selection},
        }
        command += ["--kv-transfer-config", json.dumps(transfer)]
    own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": str(cache)}
    return command, {**variables, **threads, **own}


@contextmanager
def running(names: Sequence[str], setup: Setup, logs: Path) -> Iterator[list[Process]]:
    """Servers that answer, ended with the block.

    Args:
        logs: a folder for what they write.

    Raises:
        RuntimeError: one does not start; the message has the end of what it wrote.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        found = [stack.enter_context(_started(name, setup, logs / f"{name}.log")) for name in names]
        for one in found:
            _wait_for(one)
        yield found


@contextmanager
def _started(name: str, setup: Setup, log: Path) -> Iterator[Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, variables = command_of(name, setup, port)
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        yield Process(name, url, log, process, row_bytes(setup.model))
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(server: Process) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until and server.process.poll() is None:
        try:
            get(server.url, "/health")
            return
        except (OSError, HTTPException, ValueError):
            time.sleep(0.25)
    raise RuntimeError(f"{server.name} does not answer:\n{server.log.read_text()[-3000:]}")


def row_bytes(model: Path) -> int:
    """Bytes of fp32 keys and values of one token in all layers."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim: int = config.get("head_dim") or config["hidden_size"] // heads
    layers: int = config["num_hidden_layers"]
    kv_heads: int = config.get("num_key_value_heads", heads)
    return 4 * 2 * layers * kv_heads * head_dim
