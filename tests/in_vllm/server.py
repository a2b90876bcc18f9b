"""vLLM's OpenAI server with the connector, as a process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)


@dataclass
class Server:
    """One that answers.

    Attributes:
        url: of the API.
        log: what it has written.
        process: its own.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def metrics(self) -> dict[str, float]:
        """By name without labels; the last of those that have several."""
        with urlopen(self.url.removesuffix("/v1") + "/metrics") as answer:
            lines = answer.read().decode().splitlines()
        values = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {name.split("{")[0]: float(value) for name, value in values}

    def wait_until(self, **wanted: float) -> None:
        """Until metrics of vLLM have these values, by their names behind ``vllm:``."""
        for _ in range(600):
            found = self.metrics()
            if all(found[f"vllm:{name}"] == value for name, value in wanted.items()):
                return
            time.sleep(0.1)
        raise AssertionError(f"expected {wanted}, got {found}\n{self.log.read_text()[-3000:]}")


@contextmanager
def running(
    model: Path, directory: Path, connector: Mapping[str, Any], arguments: Sequence[str] = ()
) -> Iterator[Server]:
    """A server of a model, named ``tiny``, with the connector's options and further arguments."""
    template, log = directory / "chatml.jinja", directory / "log"
    template.write_text(CHATML)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transfer = {
        "kv_connector": "TokenDanceConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": dict(connector),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
    command += ["--chat-template", str(template), "--kv-transfer-config", json.dumps(transfer)]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("w") as out:
        process = subprocess.Popen([*command, *arguments], env=environment, stdout=out, stderr=out)
        try:
            for _ in range(480):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(0.5)
            yield Server(f"http://127.0.0.1:{port}/v1", log, process)
        finally:
            process.terminate()
            process.wait(30)
