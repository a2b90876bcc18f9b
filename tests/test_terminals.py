"""Commands on terminals that lack characters, and on texts that are none."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from evals.cli import main

ROOT = Path(__file__).resolve().parent.parent
TOPIC = "Größe der 橋 – oder nicht?"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def simulate(tiny: Path, *options: str) -> list[str]:
    arguments = ["simulate", "--agents", "2", "--rounds", "1", "--new-tokens", "6"]
    return [*arguments, "--model", str(tiny), *options]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_demo_writes_its_report_whatever_the_terminal_lacks(
    tiny: Path, tmp_path: Path, encoding: str, monkeypatch: Any
) -> None:
    files = {name: tmp_path / f"said.{name}" for name in ("html", "json", "record")}
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # strict, as Python's own
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(simulate(tiny, "--topic", TOPIC, *options)) == 0
    stream.flush()
    printed = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "\\u6a4b" in printed  # what the terminal lacks
    assert ("Größe" in printed) == (encoding != "ascii")
    assert json.loads(files["json"].read_text(encoding="utf-8"))["topic"] == TOPIC
    for path in files.values():
        assert (
            "橋" in json.loads(json.dumps(path.read_text(encoding="utf-8")))
            or path.suffix == ".json"
        )


def test_messages_about_errors_are_printed_too(monkeypatch: Any) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["replay", "橋.jsonl"]) == 2
    stream.flush()
    assert b"\\u6a4b.jsonl" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_topic_that_is_no_text_is_refused(tiny: Path, capsys: Any) -> None:
    assert main(simulate(tiny, "--topic", "br\udcfcck")) == 2
    assert (
        "--topic: expected text, got bytes that are none, 'br\\udcfcck'" in capsys.readouterr().err
    )


def recording(**changes: Any) -> str:
    agent = {"id": "x", "segments": [{"kind": "task", "text": "say"}]}
    line = {"workload": "w", "session": "s", "round": 0, "t": "", "defs": [], "shared": []}
    return json.dumps({**line, "agents": [agent], **changes})


SURROGATE = "half a pair: \ud83d"
BAD = {
    "text": (
        {"agents": [{"id": "x", "segments": [{"kind": "task", "text": SURROGATE}]}]},
        "agents[0]: segments[0]: text: expected text without lone surrogates, got",
    ),
    "block": (
        {"defs": [{"id": "b", "text": SURROGATE}]},
        "defs[0]: text: expected text without lone surrogates, got",
    ),
    "session": ({"session": SURROGATE}, "session: expected text without lone surrogates, got"),
    "name": (
        {"agents": [{"id": SURROGATE, "segments": []}]},
        "agents[0]: id: expected text without lone surrogates, got",
    ),
    "no segments": (
        {"agents": [{"id": "x", "segments": []}]},
        "agent 'x': expected at least one token, got none",
    ),
    "no text": (
        {"agents": [{"id": "x", "segments": [{"kind": "task", "text": ""}]}]},
        "agent 'x': expected at least one token, got none",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_replays_of_bad_lines_end_with_the_line(
    name: str, tiny: Path, tmp_path: Path, capsys: Any
) -> None:
    changes, message = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{recording()}\n\n{recording(**{'round': 1, **changes})}\n")
    assert main(["replay", str(path), "--model", str(tiny), "--systems", "tokendance"]) == 2
    assert f"evals replay: {path}:3: {message}" in capsys.readouterr().err


def test_pairs_of_surrogates_are_characters(tiny: Path, tmp_path: Path) -> None:
    agent = {"id": "x", "segments": [{"kind": "task", "text": "a bridge \U0001f309"}]}
    path = tmp_path / "good.jsonl"
    path.write_text(recording(agents=[agent]) + "\n")
    assert "\\ud83c\\udf09" in path.read_text()
    options = ["--systems", "tokendance", "--new-tokens", "2"]
    assert main(["replay", str(path), "--model", str(tiny), *options]) == 0
