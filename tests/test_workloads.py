"""Recorded rounds: what is read, what is selected, how prompts are tokenised, what is refused."""

from __future__ import annotations

import json

import pytest

from evals import workloads
from evals.workloads import (
    RecordedBlock,
    WorkloadError,
    find_workload,
    parse_rounds,
    read_rounds,
    tokenize_round,
)
from tokendance.host.segments import private, shared


def block(block_id, text):
    return {"id": block_id, "text": text}


def line(session, number, agents, defs=(), gathered=()):
    return {
        "workload": "tiny",
        "session": session,
        "round": number,
        "t": f"day {number}",
        "defs": list(defs),
        "shared": list(gathered),
        "agents": agents,
    }


def two_rounds(session="a"):
    persona = {"kind": "system", "ref": "p", "role": "system"}
    first = [
        {"id": name, "segments": [persona, {"kind": "task", "text": "say"}], "out": f"0.{name}"}
        for name in ("x", "y", "z")
    ]
    second = [
        {
            "id": name,
            "segments": [
                persona,
                {"kind": "private", "ref": ["m1", "m2", "m3"]},
                {"kind": "private", "ref": f"0.{name}", "role": "assistant"},
                {"kind": "shared", "ref": [f"0.{other}" for other in others]},
                {"kind": "task", "text": f"now {name}"},
            ],
        }
        for name, others in (("x", "yz"), ("y", "zx"), ("z", "xy"))
    ]
    memories = [block("m1", "one "), block("m2", "two "), block("m3", "three ")]
    said = [block(f"0.{name}", f"{session} said {name}. ") for name in "xyz"]
    return [
        line(session, 0, first, defs=[block("p", "You are. ")]),
        line(session, 1, second, defs=memories, gathered=said),
    ]


@pytest.fixture
def write(tmp_path):
    def written(lines):
        path = tmp_path / "tiny.jsonl"
        text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    return written


def test_rounds_are_resolved(write):
    path = write(two_rounds())
    first, second = read_rounds(path)
    assert (first.workload, first.session, first.round, first.time) == ("tiny", "a", 0, "day 0")
    assert (first.source, second.source) == (f"{path}:1", f"{path}:2")
    assert [agent.name for agent in second.agents] == ["x", "y", "z"]
    assert [agent.output_id for agent in first.agents] == ["0.x", "0.y", "0.z"]
    assert second.agents[0].output_id is None
    assert second.agents[1].blocks == (
        RecordedBlock("system", "You are. ", "p"),
        RecordedBlock("private", "one ", "m1"),
        RecordedBlock("private", "two ", "m2"),
        RecordedBlock("private", "three ", "m3"),
        # Its own message was handed to everybody: history that was once shared stays shared.
        RecordedBlock("shared", "a said y. ", "0.y"),
        RecordedBlock("shared", "a said z. ", "0.z"),
        RecordedBlock("shared", "a said x. ", "0.x"),
        RecordedBlock("task", "now y"),
    )
    assert [one.is_shared for one in second.agents[1].blocks] == [False] * 4 + [True] * 3 + [False]


def test_selection(write):
    path = write([*two_rounds("a"), "", *two_rounds("b")])
    every = read_rounds(path)
    assert [(one.session, one.round) for one in every] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [one.source for one in read_rounds(path, session="b")] == [f"{path}:4", f"{path}:5"]
    assert [one.round for one in read_rounds(path, rounds=(1, None))] == [1, 1]
    assert [one.round for one in read_rounds(path, rounds=(0, 1), session="a")] == [0]
    # Fewer agents: the prompts of those that stay still hold everybody's messages.
    cut = read_rounds(path, agents=1)
    assert [len(one.agents) for one in cut] == [1] * 4
    assert cut[1].agents[0] == every[1].agents[0]
    assert read_rounds(path, agents=9) == every


@pytest.mark.parametrize(("limit", "kept"), [(0, []), (1, ["m3"]), (2, ["m2", "m3"]), (9, None)])
def test_max_private_keeps_the_most_recent(write, limit, kept):
    second = read_rounds(write(two_rounds()), max_private=limit)[1]
    ids = [one.block_id for one in second.agents[0].blocks if one.kind == "private"]
    assert ids == (["m1", "m2", "m3"] if kept is None else kept)
    # A reference to a single block is no list of memories, and stays.
    assert "0.x" in [one.block_id for one in second.agents[0].blocks]


def test_chat_markers_stand_where_the_role_changes(write):
    second = read_rounds(write(two_rounds()), chat=True, max_private=1)[1]
    assert "".join(one.text for one in second.agents[0].blocks) == (
        "<|im_start|>system\nYou are. <|im_end|>\n<|im_start|>user\nthree <|im_end|>\n"
        "<|im_start|>assistant\na said x. <|im_end|>\n"
        "<|im_start|>user\na said y. a said z. now x<|im_end|>\n<|im_start|>assistant\n"
    )
    markers = [one for one in second.agents[0].blocks if one.kind == "template"]
    assert len(markers) == 9
    assert not any(one.is_shared for one in markers)


def test_each_block_is_tokenised_alone_and_once(write):
    calls = []

    def encode(text):
        calls.append(text)
        return [ord(character) for character in text]

    second = read_rounds(write(two_rounds()))[1]
    prompts = tokenize_round(second, encode, namespace="n")
    assert list(prompts) == ["x", "y", "z"]
    assert prompts["y"][0] == private(encode("You are. "), namespace="n")
    assert prompts["y"][4] == shared(encode("a said y. "), namespace="n")
    assert prompts["y"][5] is prompts["x"][6]  # z's message, in two prompts
    assert len(prompts["y"]) == 8
    assert len(calls[:-2]) == len(set(calls))
    expected = r"tiny.jsonl:2: agent 'x': expected at least one token, got none"
    with pytest.raises(WorkloadError, match=expected):
        tokenize_round(second, lambda text: [])


def test_prompts_beyond_the_models_positions_name_the_line(write):
    path = write(two_rounds())
    second = read_rounds(path)[1]
    longest = max(sum(len(one.text) for one in agent.blocks) for agent in second.agents)
    encode = lambda text: list(range(len(text)))  # noqa: E731
    assert len(tokenize_round(second, encode, max_tokens=longest)) == 3
    message = rf"tiny\.jsonl:2: agent 'x': expected a prompt of at most {longest - 1} tokens, got "
    with pytest.raises(WorkloadError, match=message):
        tokenize_round(second, encode, max_tokens=longest - 1)


def broken(change):
    lines = json.loads(json.dumps(two_rounds()))  # nothing in it is the same object twice
    change(lines)
    return lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.insert(1, "{]"), ":2: expected a line of JSON, got "),
        (lambda f: f.insert(1, "[1]"), r":2: expected a JSON object, got \[1\]"),
        (lambda f: f[1].pop("session"), ":2: session: expected a string, got None"),
        (lambda f: f[1].update(round="1"), ":2: round: expected an integer, got '1'"),
        (lambda f: f[0].update(agents=[]), ":1: agents: expected at least one agent"),
        (lambda f: f[0].pop("defs"), ":1: defs: expected a list of objects, got None"),
        (lambda f: f[0].update(shared=[3]), r":1: shared\[0\]: expected an object, got 3"),
        (
            lambda f: f[1]["defs"].append({"id": "q"}),
            r":2: defs\[3\]: text: expected a string, got None",
        ),
        (
            lambda f: f[1]["defs"].append(block("p", "other")),
            r":2: defs\[3\]: id: expected an id that has no other text yet, got 'p'",
        ),
        (
            lambda f: f[1]["agents"].append(f[1]["agents"][0]),
            r":2: agents\[3\]: id: expected a name that no other agent of the round has, got 'x'",
        ),
        (
            lambda f: f[1]["agents"][1]["segments"][3]["ref"].append("0.w"),
            r":2: agents\[1\]: segments\[3\]: ref: expected the id of a block .* got '0\.w'",
        ),
        (
            lambda f: f[1]["agents"][1]["segments"][0].update(kind="secret"),
            r":2: agents\[1\]: segments\[0\]: kind: expected one of system, .* got 'secret'",
        ),
        (
            lambda f: f[1]["agents"][1]["segments"][0].update(text="both"),
            r":2: agents\[1\]: segments\[0\]: segment: expected either text or ref",
        ),
        (
            lambda f: f[1]["agents"][1]["segments"][0].update(role=3),
            r":2: agents\[1\]: segments\[0\]: role: expected a string, got 3",
        ),
    ],
)
def test_bad_files_name_the_line(write, change, message):
    path = write(broken(change))
    with pytest.raises(WorkloadError, match=rf"tiny\.jsonl{message}"):
        read_rounds(path)


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    path = tmp_path / "tiny.jsonl"
    path.write_bytes(json.dumps(two_rounds()[0]).encode() + b'\n{"\xff": 1}\n')
    with pytest.raises(WorkloadError, match=r"tiny\.jsonl:2: expected a line of JSON"):
        read_rounds(path)


def test_blocks_of_another_session_are_unknown(write):
    lines = [two_rounds("a")[0], two_rounds("b")[1]]
    with pytest.raises(WorkloadError, match=r":2: .* ref: expected the id of a block"):
        read_rounds(write(lines))


def test_selections_of_nothing_are_refused(write):
    path = write(two_rounds())
    with pytest.raises(ValueError, match="session: expected one of a, got 'b'"):
        read_rounds(path, session="b")
    with pytest.raises(ValueError, match=r"rounds: expected rounds that are in .* got 5:"):
        read_rounds(path, rounds=(5, None))
    with pytest.raises(ValueError, match="agents: expected at least 1, got 0"):
        read_rounds(path, agents=0)
    with pytest.raises(ValueError, match="max_private: expected at least 0, got -1"):
        read_rounds(path, max_private=-1)
    with pytest.raises(FileNotFoundError):
        read_rounds(path.with_name("none.jsonl"))


def test_parse_rounds():
    assert parse_rounds("1:3") == (1, 3)
    assert parse_rounds(":3") == (None, 3)
    assert parse_rounds("2:") == (2, None)
    assert parse_rounds(":") == (None, None)
    assert parse_rounds("4") == (4, 5)
    for text in ("", "a:b", "-1:2", "1:2:3", "1-2"):
        with pytest.raises(ValueError, match="rounds: expected A:B or A"):
            parse_rounds(text)


def test_find_workload(write, monkeypatch, tmp_path):
    path = write(two_rounds())
    assert find_workload(path) == path
    monkeypatch.setenv("TOKENDANCE_WORKLOADS", str(tmp_path))
    assert workloads.workloads_directory() == tmp_path
    assert find_workload("tiny") == find_workload("tiny.jsonl") == path
    monkeypatch.setenv("TOKENDANCE_WORKLOADS", str(tmp_path / "none"))
    assert workloads.workloads_directory() is None
    with pytest.raises(FileNotFoundError, match=r"workload: expected a \.jsonl file.* got 'tiny'"):
        find_workload("tiny")


@pytest.mark.parametrize(
    ("name", "sessions", "rounds", "agents"),
    [
        ("debate", 39, 117, {5, 7}),
        ("agentsociety", 1, 5, {50}),
        ("generative_agents_25", 1, 54, {25}),
        ("generative_agents_3", 1, 36, {3}),
    ],
)
def test_recorded_workloads(name, sessions, rounds, agents):
    if workloads.workloads_directory() is None:
        pytest.skip("the recorded workloads are absent (TOKENDANCE_WORKLOADS)")
    found = read_rounds(find_workload(name), chat=name == "debate")
    assert len({one.session for one in found}) == sessions
    assert len(found) == rounds
    assert {len(one.agents) for one in found} == agents
    for one in found:
        # What is shared in a round has an id, and under it one text in every prompt.
        seen = [block for agent in one.agents for block in agent.blocks if block.is_shared]
        assert len({block.block_id for block in seen}) == len({(b.block_id, b.text) for b in seen})
        assert all(block.block_id for block in seen)
    last = found[-1].agents[0].blocks
    assert any(block.is_shared for block in last)
    if name == "debate":  # its third round repeats the messages of the first as history
        first_round = {block.block_id for block in last if block.is_shared}
        assert any(block_id.startswith("0.") for block_id in first_round)
        assert last[-1].text == "<|im_start|>assistant\n"
