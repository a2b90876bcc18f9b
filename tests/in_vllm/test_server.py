"""vLLM's own server and the `openai` client: agents that know nothing of rounds but a separator."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
OPTIONS = """{"kv_connector": "TokenDanceConnector", "kv_role": "kv_both",
  "kv_connector_extra_config": {"separator": "<|im_end|>", "block_size": 8, "patience": 0.5}}"""
TOLD = re.compile(r"round (\S+): (\d+) agents, (\d+) rows, (\d+) computed, (\d+) reused")


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address and its log."""
    directory = tmp_path_factory.mktemp("server")
    template, log = directory / "chatml.jinja", directory / "log"
    template.write_text(CHATML)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
    command += ["--chat-template", str(template), "--kv-transfer-config", OPTIONS]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            for _ in range(240):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", log
        finally:
            process.terminate()
            process.wait(30)


def ask_all(url: str, conversations: dict[str, list[dict[str, str]]], **more: Any) -> Any:
    """Every agent's answer, asked at the same time."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")

    def ask(messages: Any) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=12, **more
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(len(conversations)) as pool:
        return dict(zip(conversations, pool.map(ask, conversations.values()), strict=True))


def test_chats_that_share_messages_are_a_round(server: tuple[str, Path]) -> None:
    url, log = server
    names = ["Ada", "Ben", "Cleo", "Dan"]
    talks = {
        name: [{"role": "system", "content": f"You are {name}, who likes {name[::-1]} best."}]
        for name in names
    }
    said = {name: f"{name} says: the square is at its best in the morning." for name in names}
    for turn in range(3):
        for i, name in enumerate(names):  # each sees the messages in an order of its own
            order = names[i:] + names[:i]
            talks[name] += [{"role": "user", "content": said[other]} for other in order]
        answers = ask_all(url, talks)
        alone = {"extra_body": {"kv_transfer_params": {"tokendance": False}}}
        plain = ask_all(url, talks, **alone)
        assert answers["Ada"] == plain["Ada"]  # whose rows the others reuse
        for name in names:
            talks[name].append({"role": "assistant", "content": answers[name]})
        said = {name: f"{name} at {turn}: {answers[name]}" for name in names}
    told = [tuple(map(int, one[1:])) for one in TOLD.findall(log.read_text())]
    assert [agents for agents, *_ in told] == [4, 4, 4]
    for turn, (_, rows, computed, reused) in enumerate(told):
        assert rows == computed + reused
        assert computed < (0.75 if turn == 0 else 0.5) * rows


def test_the_api_takes_what_a_request_says_of_its_round(server: tuple[str, Path]) -> None:
    from openai import OpenAI

    url, log = server
    client = OpenAI(base_url=url, api_key="none")
    shared = list(range(10, 60))

    def ask(agent: int) -> Any:
        told = {"round": "spans", "agent": f"agent {agent}", "agents": 3, "shared": [[9, 59]]}
        return client.completions.create(
            model="tiny",
            prompt=[*range(70 + agent, 79 + agent), *shared, 7],
            temperature=0,
            max_tokens=4,
            extra_body={"kv_transfer_params": {"tokendance": told}},
        )

    with ThreadPoolExecutor(3) as pool:
        assert [one.usage.completion_tokens for one in pool.map(ask, range(3))] == [4] * 3
    found = [one for one in TOLD.findall(log.read_text()) if one[0] == "spans"]
    assert [one[1:3] for one in found] == [("3", "180")]
    assert int(found[0][3]) < 110


def test_metrics_count_rounds(server: tuple[str, Path]) -> None:
    from urllib.request import urlopen

    url, _ = server
    with urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        text = answer.read().decode()
    found = dict(re.findall(r"vllm:tokendance_(\w+)_total\{.*\} (\S+)", text))
    assert float(found["rounds"]) == 4
    assert float(found["members"]) == 4 * 3 + 3
    assert 0 < float(found["rows_computed"]) < float(found["rows"])
