"""The live society: what it says and records, what it counts, its page, its command."""

from __future__ import annotations

import json
import re
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("transformers")
from tiny_model import write_tiny_model

import tokendance as td
from evals.cli import main
from evals.models import load_model
from evals.society import (
    Meeting,
    Options,
    Persona,
    RoundReport,
    Society,
)
from evals.society.figures import figures_of, table, total
from evals.society.meeting import REQUESTS
from evals.society.page import page
from evals.society.speech import clean_message, is_over
from evals.society.svg import nice_ticks
from evals.workloads import WorkloadError, read_rounds, tokenize_round
from tokendance.host.decide import RowKind

PEOPLE = (
    Persona("Ann", "a smith", "You are Ann & you mend <things>."),
    Persona("Bob", "a cook", "You are Bob, and you cook soup for whoever comes in from the rain."),
    Persona("Cy", "a fool", "You are Cy."),
)
TOPIC = "Who feeds the cat?"
pytestmark = pytest.mark.usefixtures("one_thread")
COMPUTED = (RowKind.OWN, RowKind.MASTER, RowKind.REPAIRED)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny: Path, one_thread: None) -> tuple[Any, Any]:
    return load_model(tiny)


def hold(
    model_and_tokenizer: tuple[Any, Any],
    rounds: int,
    seed: int = 0,
    audit: bool = False,
    **options: Any,
) -> tuple[Society, list[RoundReport], list[dict[str, Any]]]:
    """A society after some rounds, its reports, and the lines of its recording."""
    meeting = Meeting(PEOPLE, TOPIC, seed)
    society = Society(
        *model_and_tokenizer,
        meeting,
        Options(**{"new_tokens": 12, "seed": seed, **options}),
        audit,
    )
    reports, lines = [], []
    for _ in range(rounds):
        lines.append(meeting.line())
        reports.append(society.hold_round())
    lines[-1]["final"] = meeting.blocks(rounds - 1)
    return society, reports, lines


@pytest.fixture(scope="module")
def audited(
    model_and_tokenizer: tuple[Any, Any],
) -> tuple[Society, list[RoundReport], list[dict[str, Any]]]:
    return hold(model_and_tokenizer, 3, audit=True)


def without_times(report: RoundReport) -> dict[str, Any]:
    return {key: value for key, value in figures_of(report).items() if not key.endswith("_s")}


# The meeting -------------------------------------------------------------------------------------


def test_prompts_are_persona_scene_history_messages_task() -> None:
    meeting = Meeting(PEOPLE, TOPIC, seed=1, history=2)
    for number in range(4):
        meeting.add({person.name: f"{person.name}: {number}\n" for person in PEOPLE})
    orders = []
    for person, agent in zip(PEOPLE, meeting.prompts().agents, strict=True):
        prompt = "".join(block.text for block in agent.blocks)
        assert prompt.startswith(f"<|im_start|>system\n{person.biography}<|im_end|>\n")
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert TOPIC in prompt
        shared = [block.block_id for block in agent.blocks if block.is_shared]
        assert shared[:3] == ["scene", f"1.{person.name}", f"2.{person.name}"]
        assert sorted(str(one) for one in shared[3:]) == ["3.Ann", "3.Bob", "3.Cy"]
        orders.append(tuple(shared[3:]))
        private = "".join(block.text for block in agent.blocks if not block.is_shared)
        assert not any(other.biography in private for other in PEOPLE if other is not person)
    assert len(set(orders)) > 1


def test_prompts_stop_growing() -> None:
    meeting = Meeting(PEOPLE, TOPIC)
    sizes = []
    for _ in range(4 + 2 * len(REQUESTS)):
        prompts = meeting.prompts().agents
        sizes.append([sum(len(block.text) for block in agent.blocks) for agent in prompts])
        meeting.add({person.name: f"{person.name}: well said\n" for person in PEOPLE})
    assert all(before < after for before, after in pairwise(map(sum, sizes[:3])))
    cycle = len(REQUESTS)
    assert sizes[4 : 4 + cycle] == sizes[4 + cycle :]


def test_a_meeting_needs_people_and_everybodys_message() -> None:
    with pytest.raises(ValueError, match="people: expected at least one, got none"):
        Meeting([], TOPIC)
    with pytest.raises(ValueError, match="history: expected at least 0, got -1"):
        Meeting(PEOPLE, TOPIC, history=-1)
    with pytest.raises(ValueError, match=r"messages: expected one of each of \['Ann', .* got \["):
        Meeting(PEOPLE, TOPIC).add({"Ann": "Ann: hm\n"})


@pytest.mark.parametrize(
    ("text", "complete", "message"),
    [
        (" I agree. So do", False, "I agree."),
        (" I agree. So do", True, "I agree. So do"),
        (' "Yes!" she said', False, '"Yes!"'),
        ("It costs 3.50 a day", False, "It costs 3.50 a day"),
        (" one \t two\nthree. Four", False, "one two"),
        ("fine<|im_end|>\nno", False, "fine"),
        ("\n\n first\nsecond", False, "first"),
        (" a\x0fb\u2028c", True, "ab c"),
        ("   ", True, "..."),
        ("", False, "..."),
    ],
)
def test_messages_are_cleaned(text: str, complete: bool, message: str) -> None:
    assert clean_message(text, complete) == message


def test_a_message_ends_with_its_line() -> None:
    assert is_over("one\n")
    assert is_over("one <|im")
    assert not is_over("\n\none. two")


# Rounds ------------------------------------------------------------------------------------------


def test_the_seed_decides_what_is_said(
    model_and_tokenizer: tuple[Any, Any],
    audited: tuple[Society, list[RoundReport], list[dict[str, Any]]],
) -> None:
    _, again, lines = hold(model_and_tokenizer, 3)
    assert lines == audited[2]
    for one, other in zip(again, audited[1], strict=True):
        assert one.messages == other.messages
        assert one.prompts == other.prompts
        mine, audits = without_times(one), without_times(other)
        assert mine == {**audits, "kl": None, "kl_siblings": None, "top1": None}
    _, others, _ = hold(model_and_tokenizer, 1, seed=1)
    assert others[0].messages != again[0].messages
    _, greedy, _ = hold(model_and_tokenizer, 1, seed=1, temperature=0.0)
    _, also, _ = hold(model_and_tokenizer, 1, seed=2, temperature=0.0)
    assert greedy[0].messages == also[0].messages


def test_a_recording_replays_as_what_was_run(
    tmp_path: Path,
    model_and_tokenizer: tuple[Any, Any],
    audited: tuple[Society, list[RoundReport], list[dict[str, Any]]],
) -> None:
    society, reports, lines = audited
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encode = partial(model_and_tokenizer[1].encode, add_special_tokens=False)
    meeting = Meeting(PEOPLE, TOPIC)
    for recorded, report in zip(read_rounds(path), reports, strict=True):
        expected = meeting.prompts()
        assert recorded.agents == expected.agents
        assert tokenize_round(recorded, encode) == tokenize_round(expected, encode)
        assert [len(prompt.blocks) for prompt in report.prompts] == [
            len(agent.blocks) for agent in recorded.agents
        ]
        meeting.add({name: f"{name}: {text}\n" for name, text in report.messages.items()})
    assert lines[-1]["final"] == society.meeting.blocks(2)
    assert all(block["synthetic"] for line in lines for block in line["shared"])


def test_maps_tile_the_prompts_and_count_what_was_computed(
    audited: tuple[Society, list[RoundReport], list[dict[str, Any]]],
) -> None:
    for report in audited[1]:
        computed = repaired = 0
        for prompt in report.prompts:
            for parts in (prompt.spans, prompt.blocks):
                assert [0, *[part.end for part in parts]] == [
                    *[part.begin for part in parts],
                    prompt.length,
                ]
            computed += prompt.rows_of(*COMPUTED)
            repaired += prompt.rows_of(RowKind.REPAIRED)
        assert computed == report.rows
        assert repaired == report.rows_overridden
        assert sum(prompt.length for prompt in report.prompts) == report.prompt_tokens
        assert report.rows < 0.8 * report.prompt_tokens
        assert report.distinct_tokens < report.prompt_tokens
    moved = [
        block.shift for prompt in audited[1][1].prompts for block in prompt.blocks if block.shift
    ]
    assert min(moved) < 0 < max(moved)


def test_rows_that_are_chosen_while_the_round_runs_are_on_the_map(
    model_and_tokenizer: tuple[Any, Any],
) -> None:
    _, reports, _ = hold(model_and_tokenizer, 2, selection=td.KeyDeviation(0.2))
    repaired = sum(prompt.rows_of(RowKind.REPAIRED) for prompt in reports[1].prompts)
    assert repaired == reports[1].rows_overridden > 0
    assert [0, *[s.end for s in reports[1].prompts[0].spans]][:-1] == [
        s.begin for s in reports[1].prompts[0].spans
    ]


def test_everything_is_full_recompute(model_and_tokenizer: tuple[Any, Any]) -> None:
    for source in ("master", "producer"):
        _, reports, _ = hold(
            model_and_tokenizer, 2, audit=True, selection=td.Everything(), source=source
        )
        for report in reports:
            assert report.audit is not None
            assert report.audit.kl < 1e-6
            assert report.audit.top1 == 1.0
            assert report.audit.prefill_s > 0


def test_a_gate_audits_every_round_and_falls_back(model_and_tokenizer: tuple[Any, Any]) -> None:
    gate = td.Gate(deviation=0.0, action="fall back")
    with pytest.warns(td.ReuseWarning, match="expected deviation <= 0"):
        society, reports, _ = hold(model_and_tokenizer, 2, gate=gate, audited_rows=0.5)
    stats = society.collector.stats()
    found = reports[1].gate
    assert found is not None
    assert 0 < found.rows < reports[1].prompt_tokens
    assert stats.audits == 2
    assert set(found.fallen_segments) <= society.collector.opted_out.segments
    assert stats.segments_opted_out > 0
    _, free, _ = hold(model_and_tokenizer, 2)
    _, watched, _ = hold(model_and_tokenizer, 2, gate=td.Gate())
    assert free[1].gate is None
    assert [one.messages for one in free] == [one.messages for one in watched]


def test_what_was_said_is_not_computed_again_by_whoever_said_it(
    model_and_tokenizer: tuple[Any, Any],
) -> None:
    """With the source "producer" a message's Master is its decoded rows."""
    _, reports, _ = hold(model_and_tokenizer, 2, source="producer")
    made = [
        span
        for prompt in reports[1].prompts
        for span in prompt.spans
        if span.kind is RowKind.MASTER
    ]
    kept = 0
    for prompt in reports[1].prompts:
        for block in prompt.blocks:
            if block.block_id and block.block_id.startswith("0."):
                kept += block.shift is not None
    assert kept == 9
    # A message whose bytes are no text is handed on as other tokens than those decoded.
    broken = sum("\ufffd" in text for text in reports[0].messages.values())
    assert len(made) <= broken


def test_memory_by_agents_is_that_of_the_round(model_and_tokenizer: tuple[Any, Any]) -> None:
    society, reports, _ = hold(model_and_tokenizer, 1)
    points = society.memory_by_agents()
    assert [count for count, _, _ in points] == [1, 2, 3]
    assert points[-1][1:] == (reports[0].kv_bytes_dense, reports[0].kv_bytes_stored)
    for before, after in pairwise(points):
        assert after[1] - before[1] > after[2] - before[2] > 0


def test_prompts_that_may_outgrow_the_model_are_refused(tmp_path: Path) -> None:
    model, tokenizer = load_model(write_tiny_model(tmp_path, max_position_embeddings=700))
    message = r"agents: expected prompts within the model's 700 positions, got up to \d+ with 3 age"
    with pytest.raises(ValueError, match=message):
        Society(model, tokenizer, Meeting(PEOPLE, TOPIC))
    assert issubclass(WorkloadError, ValueError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_tokens": 0}, "new_tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, r"temperature: expected 0, or a number in .* got -1\.0"),
        ({"top_p": 0.0}, r"top_p: expected 0 < top_p <= 1, got 0\.0"),
        ({"audited_rows": 2.0}, r"audited_rows: expected 0 < audited_rows <= 1, got 2\.0"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**changes)


# Numbers and page --------------------------------------------------------------------------------


def test_totals() -> None:
    keys = [
        "agents", "rows", "prompt_tokens", "decode_s", "decode_tokens", "decode_tokens_per_s",
        "kv_bytes_held", "kl", "kl_siblings", "top1",
    ]  # fmt: skip
    one = dict(zip(keys, (3, 10.0, 20, 2.0, 8, 4.0, 7, 0.1, None, 1.0), strict=True))
    two = dict(zip(keys, (4, 30.0, 60, 1.0, 10, 10.0, 5, 0.3, 0.2, 0.5), strict=True))
    assert total([one, two]) == {
        "agents": 4,
        "rows": 40.0,
        "prompt_tokens": 80,
        "decode_s": 3.0,
        "decode_tokens": 18,
        "decode_tokens_per_s": 6.0,
        "kv_bytes_held": 7,
        "kl": pytest.approx(0.2),
        "kl_siblings": 0.2,
        "top1": 0.75,
    }


def test_the_table_has_audited_columns_only_when_audited(
    model_and_tokenizer: tuple[Any, Any],
    audited: tuple[Society, list[RoundReport], list[dict[str, Any]]],
) -> None:
    head, rows = table([figures_of(report) for report in audited[1]])
    assert {"KL", "KL siblings", "top-1", "full prefill s"} <= set(head)
    assert [row[0] for row in rows] == ["1", "2", "3", "all"]
    assert {len(row) for row in rows} == {len(head)}
    _, reports, _ = hold(model_and_tokenizer, 1)
    head, rows = table([figures_of(report) for report in reports])
    assert not {"KL", "KL siblings", "top-1", "full prefill s"} & set(head)
    assert rows[0][1:] == rows[1][1:]


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [
        (0.0, [0.0, 1.0]),
        (1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (97.0, [0.0, 25.0, 50.0, 75.0, 100.0]),
        (0.013, [0.0, 0.005, 0.01, 0.015]),
    ],
)
def test_axes_end_at_round_numbers(largest: float, ticks: list[float]) -> None:
    assert nice_ticks(largest) == pytest.approx(ticks)


class Elements(HTMLParser):
    """Start tags with their attributes, and a check that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_every_span_and_needs_nothing_else(
    audited: tuple[Society, list[RoundReport], list[dict[str, Any]]],
) -> None:
    society, reports, _ = audited
    facts = {"versions": {"torch": "2 & more"}}
    made = page(reports, society.memory_by_agents(), society.meeting, "run it --now", "tiny", facts)
    elements = Elements(made)
    assert elements.open == []
    rects = [attrs.get("class") for tag, attrs in elements.found if tag == "rect"]
    for kind in RowKind:
        spans = [
            span
            for report in reports
            for prompt in report.prompts
            for span in prompt.spans
            if span.kind is kind
        ]
        assert rects.count(f"o-{kind.value}") == len(spans)
    assert not re.search(r"https?://|url\(|@import|src=|<script|<link", made)
    pictures = re.findall(r"<svg.*?</svg>", made, re.DOTALL)
    assert len(pictures) == 6
    for one in pictures:
        ElementTree.fromstring(one)
    for report in reports:
        assert f"{report.rows:,.0f} of {report.prompt_tokens:,} rows" in made
    assert "You are Ann &amp; you mend &lt;things&gt;." in made
    assert "<things>" not in made
    assert "2 &amp; more" in made
    assert "run it --now" in made


def test_bars_are_as_long_as_their_spans(
    audited: tuple[Society, list[RoundReport], list[dict[str, Any]]],
) -> None:
    from evals.society.prompt_map import prompt_map

    report = audited[1][1]
    longest = max(prompt.length for prompt in report.prompts)
    root = ElementTree.fromstring(prompt_map(report, longest))
    rects = [one for one in root.iter("rect") if one.get("class", "").startswith("o-")]
    spans = [span for prompt in report.prompts for span in prompt.spans]
    scale = float(rects[0].get("width", 0)) / (spans[0].end - spans[0].begin)
    for rect, span in zip(rects, spans, strict=True):
        assert float(rect.get("width", 0)) == pytest.approx(
            (span.end - span.begin) * scale, abs=0.02
        )
        title = rect.find("title")
        assert title is not None
        assert f"rows {span.begin} to {span.end - 1} " in (title.text or "")


# The command -------------------------------------------------------------------------------------


def test_the_command_writes_page_numbers_and_a_recording_that_replays(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"said.{name}" for name in ("html", "json", "record")}
    arguments = ["simulate", "--agents", "2", "--rounds", "2", "--new-tokens", "6", "--audit"]
    arguments += ["--model", str(tiny), "--topic", "Is it late?"]
    for name, path in files.items():
        arguments += [f"--{name}", str(path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "round 2 of 2" in printed
    assert printed.count("  Ada: ") == printed.count("  Ben: ") == 2
    assert "prompt rows" in printed
    assert files["html"].read_text().count("<svg") == 5

    found = json.loads(files["json"].read_text())
    assert found["topic"] == "Is it late?"
    assert f"--model {tiny}" in found["command"]
    assert [one["round"] for one in found["rounds"]] == [0, 1]
    assert found["summary"]["rows"] == sum(one["rows"] for one in found["rounds"])
    assert found["summary"]["kl"] >= 0
    assert len(found["memory_by_agents"]) == 2
    for one in found["rounds"]:
        assert set(one["messages"]) == {"Ada", "Ben"}
        assert {"prefill_s", "rows", "kv_bytes_dense", "kv_bytes_stored", "top1"} <= set(one)

    again = tmp_path / "again.json"
    replay = ["replay", str(files["record"]), "--model", str(tiny), "--new-tokens", "2"]
    assert main([*replay, "--systems", "tokendance", "--json", str(again)]) == 0
    rounds = json.loads(again.read_text())["rounds"]
    assert [one["prompt_tokens"] for one in rounds] == [
        one["prompt_tokens"] for one in found["rounds"]
    ]
    assert [one["systems"]["tokendance"]["rows"] for one in rounds] == [
        one["rows"] for one in found["rounds"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "name_or_path: expected one of smollm2, "),
        (["--agents", "0"], r"--agents: expected 1\.\.14, got 0"),
        (["--agents", "99"], r"--agents: expected 1\.\.14, got 99"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--threads", "-2"], "--threads: expected at least 1, got -2"),
        (["--new-tokens", "0"], "new_tokens: expected at least 1, got 0"),
        (["--history", "-1"], "history: expected at least 0, got -1"),
        (["--selection", "leading"], "selection: expected leading:COUNT"),
        (["--source", "nobody"], "source: expected one of"),
        (["--block-size", "12"], r"block_size: expected one of \(8, 16, 32\), got 12"),
        (["--html", "/nowhere/page.html"], "--html: expected a file in a folder that exists"),
        (["--new-tokens", "2000"], "agents: expected prompts within the model's 4096 positions"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--model", str(tiny), *arguments]) == 2
    printed = capsys.readouterr()
    assert re.search(f"^evals simulate: {message}", printed.err)
    assert printed.err.count("\n") == 1
    assert "round 1" not in printed.out
