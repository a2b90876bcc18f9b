"""One client of an OpenAI-compatible server: completions that stream token ids, and metrics."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from evals.serving.prompts import Ask

TIMEOUT = 900.0  # seconds without a byte
_SAMPLE = re.compile(r"^([^#{ ]+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Answer:
    """What came of a request.

    Attributes:
        token_ids: as they came.
        times: of `time.monotonic`, when each of them came; several may come at once.
        failure: why it has not ended as asked, or None.
    """

    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    failure: str | None = None


def complete(url: str, ask: Ask, round_name: str, agents: int) -> Answer:
    """Asks for greedy tokens, exactly as many as wanted; never raises for what a server does.

    Args:
        url: of the server, without a path.
        ask: the request.
        round_name: of the round that it belongs to, and
        agents: how many are in that round: what a server may know by ``kv_transfer_params``.
    """
    told = {"round": round_name, "agent": ask.agent, "agents": agents, "shared": ask.shared}
    body = {
        "model": "model",
        "prompt": ask.token_ids,
        "max_tokens": ask.output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "kv_transfer_params": {"tokendance": told},
    }
    answer = Answer()
    try:
        for choice in _choices(url, body):
            ids = choice.get("token_ids") or []
            answer.token_ids += ids
            answer.times += [time.monotonic()] * len(ids)
    except (OSError, HTTPException, ValueError) as error:
        answer.failure = f"{type(error).__name__}: {error}"
    if answer.failure is None and len(answer.token_ids) != ask.output:
        answer.failure = f"expected {ask.output} tokens, got {len(answer.token_ids)}"
    return answer


def _choices(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read(300).decode()}")
        for line in response:
            event = line.decode().strip().removeprefix("data: ")
            if event == "[DONE]":
                return
            if event:
                found = json.loads(event)
                if "error" in found:
                    raise ValueError(str(found["error"]))
                yield from found["choices"]
        raise ValueError("the answer ended before [DONE]")
    finally:
        connection.close()


def get(url: str, path: str, method: str = "GET") -> str:
    """The body of an answer.

    Raises:
        OSError, HTTPException: there is none.
        ValueError: its status is not 200.
    """
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        text = response.read().decode()
        if response.status != 200:
            raise ValueError(f"{path}: status {response.status}: {text[:300]}")
        return text
    finally:
        connection.close()


@dataclass(frozen=True)
class Metrics:
    """Prometheus samples: ``(name, labels, value)``."""

    samples: list[tuple[str, dict[str, str], float]]

    @classmethod
    def parse(cls, text: str) -> Metrics:
        found = []
        for line in text.splitlines():
            if match := _SAMPLE.match(line):
                name, labels, value = match.groups()
                found.append((name, dict(_LABEL.findall(labels or "")), float(value)))
        return cls(found)

    def sum(self, name: str, **labels: str) -> float:
        """Of the samples of a name that have these labels; 0 if there are none."""
        return sum(
            value for one, of, value in self.samples if one == name and labels.items() <= of.items()
        )

    def label(self, name: str, label: str) -> str:
        """A label of the first sample of a name.

        Raises:
            ValueError: there is none.
        """
        for one, of, _ in self.samples:
            if one == name and label in of:
                return of[label]
        raise ValueError(f"metrics: expected {name} with the label {label}, got none")
