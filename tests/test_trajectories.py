"""`evals.fidelity trajectories`: where a society would part, without running it on its own."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from tiny_model import write_tiny_model

import tokendance as td
from evals.baselines import FullPrefill
from evals.fidelity import __main__ as fidelity
from evals.fidelity import document, trajectories
from evals.models import load_model
from evals.replay import CollectiveReuse
from evals.society import PERSONAS, TOPICS, Meeting
from evals.workloads import tokenize_round

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_what_is_followed_is_what_would_be_said(directory):
    """The tokens before the first other one are those that a way says by itself."""
    model, tokenizer = load_model(directory)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    meeting = Meeting(PERSONAS[:3], TOPICS["bridge"])
    full, followed, free = (
        FullPrefill(model),
        *(CollectiveReuse(model, selection=td.Nothing()) for _ in range(2)),
    )
    found = {}
    for number in range(3):
        prompts = tokenize_round(meeting.prompts(), encode)
        labels = {agent: encode(f"{agent}:") for agent in prompts}
        tokens, said = trajectories.speak(full, prompts, labels, tokenizer, 12)
        assert all(0 < len(own) <= 12 for own in tokens.values())
        own, _ = trajectories.speak(free, prompts, labels, tokenizer, 12)
        for agent, pair in trajectories.follow(followed, prompts, labels, tokens).items():
            pairs = list(zip(tokens[agent], own[agent], strict=False))
            same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
            assert pair == [len(tokens[agent]), same]
            found[number, agent] = pair
        meeting.add({agent: f"{agent}: {text}\n" for agent, text in said.items()})
    assert any(same < said for said, same in found.values())
    assert any(same == said for said, same in found.values())


def test_messages_end_where_somebody_ends_them(directory):
    """At a stop token, which is no part of them, at a line break, or when they are too long."""
    _, tokenizer = load_model(directory)
    ids = {agent: tokenizer.encode(text, add_special_tokens=False) for agent, text in
           {"a": "Yes.", "b": "No\nand", "c": "A. And so"}.items()}  # fmt: skip
    ids["a"].append(tokenizer.eos_token_id)

    class Script:
        """A system whose likeliest tokens are given."""

        def prefill_round(self, prompts):
            self.at = dict.fromkeys(prompts, 0)

        def decode(self, fed):
            rows = {}
            for agent in fed:
                likeliest = torch.tensor(ids[agent][self.at[agent]])
                rows[agent] = torch.nn.functional.one_hot(likeliest, len(tokenizer))[None]
                self.at[agent] += 1
            return rows

    tokens, said = trajectories.speak(
        Script(), dict.fromkeys("abc", ()), {agent: [0] for agent in "abc"}, tokenizer, 6
    )
    assert tokens == {"a": ids["a"], "b": ids["b"][:3], "c": ids["c"][:6]}
    assert said == {"a": "Yes.", "b": "No", "c": "A."}


def society(name, *rounds):
    """Of which each way says as much of the messages of ten tokens."""
    ways = [dict(zip(trajectories.WAYS, one, strict=True)) for one in rounds]
    return {
        "scene": name,
        "prompt_rows": 100,
        "rows": dict(zip(trajectories.WAYS, (50, 40.5, 42, 95), strict=True)),
        "rounds": [
            {way: {f"a{at}": [10, same] for at, same in enumerate(sames)}
             for way, sames in one.items()}
            for one in ways
        ],
    }  # fmt: skip


def test_the_table_of_known_societies():
    one = society(
        "x", ((10, 10), (10, 10), (10, 10), (10, 10)), ((3, 2), (10, 7), (10, 10), (10, 10))
    )
    two = society(
        "y", ((0, 10), (10, 10), (10, 9), (10, 10)), ((9, 9), (10, 10), (10, 9), (10, 10))
    )
    lines = trajectories.text([one, two]).splitlines()
    assert lines[0] == "2 societies, 4 rounds, 8 messages."
    assert lines[4].startswith(
        "| pic:0.15 | 50.0% | 2, 1 | 1 of 4 | 62.5% (25.0% to 100.0%) | 1.000 "
    )
    assert lines[5].startswith("| leading:12 | 40.5% | 2, none | 3 of 4 | 12.5% (0.0% to ")
    assert lines[6].startswith("| leading:16 | 42.0% | none, 1 | 2 of 4 | 25.0% (0.0% to ")
    assert lines[7].startswith(
        "| everything | 95.0% | none, none | 4 of 4 | 0.0% (0.0% to 0.0%) | 0.000 "
    )
    assert lines[7].endswith(" | - |")
    assert lines[-1] == "Societies, in this order: x; y."
    same = society("z", ((10,), (10,), (10,), (10,)))
    assert (
        trajectories.text([same])
        .splitlines()[4]
        .endswith("| none | 1 of 1 | 0.0% (0.0% to 0.0%) | - | - |")
    )


def test_societies_are_measured_once(directory, tmp_path, capsys):
    """From the command line, and full recompute's own messages under `Everything`."""
    path = tmp_path / "trajectories.json"
    common = ["--model", str(directory), "--threads", "1", "--out", str(tmp_path)]
    common += ["--json", str(path), "trajectories", "--rounds", "2", "--new-tokens", "4"]
    assert fidelity.main([*common, "--societies", "1"]) == 0
    (one,) = document.read(path).result
    assert [list(found) for found in one["rounds"]] == [list(trajectories.WAYS)] * 2
    assert one["rows"]["leading:12"] < one["rows"]["everything"] <= one["prompt_rows"]
    messages = [pair for found in one["rounds"] for pair in found["everything"].values()]
    assert len(messages) == 6
    assert all(said == same for said, same in messages)
    changed = json.loads(path.read_text())
    changed["result"][0]["prompt_rows"] = 12345
    path.write_text(json.dumps(changed))
    assert fidelity.main([*common, "--societies", "2"]) == 0
    again, other = document.read(path).result
    assert again["prompt_rows"] == 12345  # it was not measured again
    assert other["scene"] == trajectories.SCENES[1].name
    capsys.readouterr()
    assert fidelity.main(["render", str(path)]) == 0
    assert capsys.readouterr().out == (tmp_path / "trajectories.md").read_text()


def test_scenes_are_different_societies_of_the_town():
    names = [one.name for one in trajectories.SCENES]
    assert len(set(names)) == 8
    for one in trajectories.SCENES:
        assert one.topic in TOPICS
        assert one.first + one.agents <= len(PERSONAS)
