"""The small engine's front: over HTTP what the engine says, and what happens to bad requests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tokendance as td

transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Whitespace  # noqa: E402

from evals.serving.client import Metrics, complete, get  # noqa: E402
from evals.serving.front import CountedModel, Front  # noqa: E402
from evals.serving.prompts import Ask  # noqa: E402
from examples.engine import Engine  # noqa: E402

WORDS = {f"w{i}": i for i in range(331)}


class Running:
    """A front in a thread with a loop of its own, over a random model.

    Attributes:
        url: of the front.
        submitted: agents and rounds in the order in which the engine got them.
    """

    def __init__(self, directory: Path, patience: float) -> None:
        self.model = CountedModel(directory)
        self.store = td.DiffStore(self.model.geometry, self.model.rope, "8MiB", block_size=8)
        self.submitted: list[tuple[str, Any]] = []
        self._patience = patience
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(30)

    async def _run(self) -> None:
        tokenizer = Tokenizer(WordLevel(WORDS, unk_token="w0"))
        tokenizer.pre_tokenizer = Whitespace()
        collector = td.KVCollector(self.store, selection=td.Everything())
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        async with Engine(self.model, collector, max_rows=64) as engine:
            submit = engine.submit

            def noted(agent: str, prompt: Any, round_: Any, *more: Any) -> Any:
                self.submitted.append((agent, round_))
                return submit(agent, prompt, round_, *more)

            engine.submit = noted  # type: ignore[method-assign]
            front = Front(engine, self.model, tokenizer, patience=self._patience)
            server = await asyncio.start_server(front.handle, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            self._ready.set()
            async with server:
                await self._end.wait()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from test_engine import write_model

    directory = tmp_path_factory.mktemp("model")
    return write_model(directory, "llama"), directory


@pytest.fixture
def front(model: tuple[Any, Path]) -> Iterator[Running]:
    running = Running(model[1], patience=0.3)
    yield running
    running.end()


def expected(model: Any, ids: list[int], count: int) -> list[int]:
    import torch

    found = list(ids)
    for _ in range(count):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def asks() -> list[Ask]:
    shared = list(range(50, 90))
    return [Ask(f"agent {i}", [*range(i, i + 9), *shared, 7], [(9, 49)], 5) for i in range(3)]


def ask_all(url: str, round_: str, members: int = 3) -> list[Any]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda one: complete(url, one, round_, members), asks()))


def test_a_round_over_http_says_what_transformers_says(
    front: Running, model: tuple[Any, Path]
) -> None:
    found = ask_all(front.url, "first")
    for one, answer in zip(asks(), found, strict=True):
        assert answer.failure is None
        assert answer.token_ids == expected(model[0], one.token_ids, 5)
        assert len(answer.times) == 5
    assert front.submitted == [(f"agent {i}", "first") for i in range(3)]  # by name, together
    metrics = Metrics.parse(get(front.url, "/metrics"))
    decoded = metrics.sum("tokendance_decode_rows_total")
    assert decoded == 3 * 4
    # What is selected is everything, but the shared segment's Master serves who has it first.
    prompts = metrics.sum("tokendance_rows_total") - decoded
    assert 50 + 2 * 10 <= prompts <= 3 * 50
    assert metrics.sum("tokendance_bytes_held") > 0
    assert metrics.sum("tokendance_requests_running") == 0
    assert json.loads(get(front.url, "/reset_prefix_cache", "POST")) == {"success": True}
    assert Metrics.parse(get(front.url, "/metrics")).sum("tokendance_bytes_held") == 0


def test_a_round_whose_members_do_not_come_begins_without_them(front: Running) -> None:
    found = ask_all(front.url, "short", members=5)
    assert [one.failure for one in found] == [None] * 3
    assert len(front.submitted) == 3


def post(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    from http.client import HTTPConnection

    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_prompt_may_be_text_and_an_answer_whole(front: Running, model: tuple[Any, Path]) -> None:
    body = {"prompt": "w5 w9 w14", "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}
    status, found = post(front.url, body)
    ids = expected(model[0], [5, 9, 14], 4)
    assert status == 200
    assert found["choices"][0]["token_ids"] == ids
    assert found["choices"][0]["text"] == " ".join(f"w{token}" for token in ids)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt"),
        ({"prompt": [1], "temperature": 1}, "temperature: expected 0"),
        ({"prompt": [1, 5000]}, "prompt: expected 1.."),
        (
            {"prompt": [1, 2], "kv_transfer_params": {"tokendance": {"shared": [[1, 3]]}}},
            "shared: expected ascending spans",
        ),
    ],
)
def test_what_is_not_understood_is_told(front: Running, body: Any, message: str) -> None:
    status, found = post(front.url, body)
    assert status == 400
    assert message in found["error"]["message"]


def test_a_client_that_goes_away_is_no_longer_served(front: Running) -> None:
    import socket
    import time

    body = {"prompt": [5, 6], "max_tokens": 900, "ignore_eos": True, "stream": True}
    sent = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
    host, port = front.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + sent)
        got = b""
        while got.count(b"data: ") < 2:
            got += connection.recv(4096)
    for _ in range(100):
        metrics = Metrics.parse(get(front.url, "/metrics"))
        if metrics.sum("tokendance_requests_running") == 0:
            break
        time.sleep(0.1)
    assert metrics.sum("tokendance_requests_running") == 0
    assert metrics.sum("tokendance_decode_rows_total") < 800
    assert json.loads(get(front.url, "/v1/models"))["data"][0]["id"] == "model"
