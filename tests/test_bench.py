"""What the benchmarks do with their figures."""

from __future__ import annotations

import json

import pytest
import torch

import tokendance as td
from bench import by_torch, compare, mirrors, rounds, scaling, sharing
from bench.ceilings import Ceiling
from bench.rounds import Cell, table
from evals.fidelity import __main__ as fidelity
from evals.fidelity import (
    answers,
    drift,
    ideas,
    leakage,
    quantized,
    replays,
    rows,
)
from evals.replay import SystemResult
from evals.workloads import RecordedAgent, RecordedBlock, RecordedRound
from tokendance.device import operators as ops


def run_of(path, fractions, times=()):
    runs = [
        {"name": name, "extra_info": {} if value is None else {compare.FIGURE: value}}
        for name, value in fractions.items()
    ]
    runs += [{"name": name, "extra_info": {key: value}} for name, key, value in times]
    path.write_text(json.dumps({"benchmarks": runs}))
    return str(path)


def test_compare_notices_a_lower_fraction_of_the_ceiling(tmp_path, capsys):
    before = run_of(tmp_path / "a.json", {"x": 0.9, "y": 0.8, "gone": 0.5, "plan": None})
    after = run_of(tmp_path / "b.json", {"x": 0.7, "y": 0.78, "new": 0.5, "plan": None})
    assert compare.main([before, after]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("worse")] == ["x"]
    assert any("only before" in line for line in lines)
    assert any("only after" in line for line in lines)
    assert compare.main([before, after, "--tolerance", "0.3"]) == 0


def test_compare_shows_times_and_judges_none(tmp_path, capsys):
    before = run_of(tmp_path / "a.json", {"x": 0.9}, [("plan[16]", "us_per_use", 1.0)])
    after = run_of(
        tmp_path / "b.json",
        {"x": 0.9},
        [("plan[16]", "us_per_use", 3.0), ("call", "us_per_layer", 47.0)],
    )
    assert compare.main([before, after]) == 0
    _, times = capsys.readouterr().out.split("not judged")
    call, plan = times.splitlines()[1:]
    assert call.split() == ["call,", "us", "per", "layer", "only", "after"]
    assert plan.split() == ["plan[16],", "us", "per", "use", "1.00", "3.00", "x3.00"]


def test_a_ceiling_is_the_best_sample_of_the_best_way():
    calls = []
    ceiling = Ceiling("B/s", 100.0, [lambda: calls.append("a"), lambda: calls.append("b")])
    ceiling.sample()
    first = ceiling.rate
    ceiling.sample()
    assert calls == ["a", "b", "a", "b"]
    assert ceiling.rate >= first > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_states_by_torch_is_the_operator(dtype):
    partial_out, partial_lse = torch.randn(4, 5, 3, 64).to(dtype), torch.randn(4, 5, 3)
    out, lse = torch.empty_like(partial_out[0]), torch.empty_like(partial_lse[0])
    by_torch.merge_states(partial_out, partial_lse)(out, lse)
    expected = ops.merge_states(partial_out, partial_lse)
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_by_torch_are_the_operators(dtype):
    """More rows than a piece, and one shift for all or a position of its own per row."""
    rope = td.Rope.default(head_dim=64, theta=1e4, max_position=64)
    tables = rope.cos, rope.sin, rope.interleaved
    fresh, cached = torch.randn(3, 10, 2, 64).to(dtype), torch.randn(5, 2, 2, 64).to(dtype)
    at = torch.arange(10, dtype=torch.int32)
    row = torch.arange(30).view(3, 10)
    keys, piece = cached.flatten(0, 1), 4 * 2 * 64
    deviate, rotate = by_torch.Deviation(keys, piece), by_torch.Rotation(keys, piece)
    for origin, cos_sin in (
        (at + 7, by_torch.angles(rope, -7)),
        (None, (rope.cos[at], rope.sin[at])),
    ):
        moved = rotate(fresh[0], *cos_sin, torch.empty_like(fresh[0]))
        expected = ops.rope_rotate(fresh[0], None, origin, at, *tables)
        torch.testing.assert_close(moved, expected)
        position = None if origin is None else origin.repeat(3, 1)
        found = deviate(fresh, keys, *cos_sin, torch.empty(10))
        expected = ops.key_deviation(
            fresh.flatten(0, 1), row, position, cached, row[0], at, *tables
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_by_torch_is_the_operator(dtype):
    case = mirrors.make_round(
        agents=3, shared=96, private=5, segments=3, overridden=4, head_dim=64, pool_dtype=dtype
    )
    slots = torch.arange(3 * case.length).view(3, case.length)
    k, v = ([torch.empty(slots.numel(), 8, 64, dtype=dtype)] for _ in range(2))
    pools = case.k_pools, case.v_pools
    ops.diff_restore(*pools, *case.tables, case.round, slots, k, v)
    encode = by_torch.Encoding(case, *k, *v)
    length = torch.full((3,), case.length, dtype=torch.int32)
    ops.diff_encode(k, v, slots, length, *pools, *case.tables, case.round)
    written = [pool.clone() for (pool,) in pools]
    for (pool,) in pools:
        for mirror in case.mirrors:
            pool[torch.from_numpy(mirror.own_pages).long()] = 0
    positions = encode()
    assert case.round.own_length.tolist() == [len(position) for position in positions]
    for agent, position in enumerate(positions):
        first = int(case.round.own_page_indptr[agent]) * case.block_size
        torch.testing.assert_close(
            case.round.own_position[first : first + len(position)], position.int()
        )
    for (pool,), expected in zip(pools, written, strict=True):
        rows = pool.flatten(0, 1), expected.flatten(0, 1)
        for mirror, position in zip(case.mirrors, positions, strict=True):
            first = int(mirror.own_pages[0]) * case.block_size
            got, want = (each[first : first + len(position)] for each in rows)
            assert torch.equal(got, want)


def test_growth_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    result = SystemResult(4.0, 900, 0, 700, 300, 100 << 20, 100 << 20, 10.0, 0.1, None, 1.0)
    systems = dict.fromkeys(rounds.SYSTEMS, result)
    cells = [Cell("tiny", agents, 1, 900, systems) for agents in (2, 4)]
    rounds.draw(cells, tmp_path / "rounds.png")
    ways = {way: {"seconds": 1e-3, "bytes": 1e6} for way in scaling.WAYS}
    scaling.draw({2: ways, 64: ways}, tmp_path / "scaling.png")
    for name in ("rounds", "scaling"):
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        assert width > 1000 < 3 * height


def test_rounds_are_held_against_what_rows_and_flops_promise():
    def result(seconds, rows, linear, attention, stored, rate):
        flops, stored = (linear * 10**12, attention * 10**12), stored << 20
        return SystemResult(seconds, rows, 0, *flops, 100 << 20, stored, rate, 0.1, None, 1.0)

    cell = Cell(
        "tiny",
        3,
        1,
        900,
        {
            "full": result(8.0, 900, 700, 300, 100, 10.0),
            "pic": result(4.0, 500, 500, 100, 100, 10.0),
            "tokendance": result(2.0, 300, 200, 100, 25, 20.0),
        },
    )
    assert cell.over("full", "prefill_s") == pytest.approx(4.0)
    lines = table([cell]).splitlines()
    assert lines[2].startswith("| tiny | 3 | 900 | full | 8.00 | 900 | 700.000 | 300.000 | 100.0 |")
    assert lines[-1] == (
        "| tiny | 3 | 4.00x | 3.00x | 1.33 | 2.00x | 2.00x | 2.50x | 1.00x | 1.00 | 2.00x | 4.00x |"
    )
    for head, row in (lines[0:3:2], lines[-3::2]):
        assert head.count("|") == row.count("|")


def test_other_tables_of_fidelity():
    one = {"top1": 1.0, "rows": 100, "computed": 40.0, "audited": 10}
    seeds = [[{**one, "kl": kl} for kl in kls] for kls in ((0.1, 0.3, 0.2, 0.4), (0.1, 0.1, 0, 0))]
    assert drift.text({"master": seeds}).splitlines()[-1] == (
        "| master | 0.1000 | 0.2000 | 0.1000 | 0.2000 | 0.1500 | 0.1500 | 0.2500, 0.0500 "
        "| 40.0% | 10.0% |"
    )
    full = {"secret": -9.0, "control": -9.5, "told": -1.0}
    samples = [{**full, "secret": secret} for secret in (-8.0, -9.25)]
    told = leakage.text({leakage.FULL: [full, full], "master/nothing": samples}).splitlines()
    assert told[-1] == (
        "| master/nothing | 2 | -8.625 | -9.500 | +0.375 | -0.250 | +1.000 | -1.000 |"
    )


def test_answers_are_scored_between_the_floor_and_full_recompute():
    one = {
        "recorded": "5",
        answers.FLOOR: {"a": "4", "b": "5", "c": "1"},
        "full": {"a": "5", "b": "5 ", "c": "5"},
        "pic": {"a": "4", "b": "5", "c": "5"},
        "tokendance": {"a": "5", "b": "5", "c": "5"},
    }
    lines = answers.text([one, one]).splitlines()
    assert [line.count("|") for line in lines] == [6] * 6
    assert lines[2].endswith("| 100.0% (100.0% to 100.0%) | 1.000 (no interval) |")
    assert lines[3].startswith(
        "| pic | 6 | 66.7% (33.3% to 100.0%) | 66.7% (33.3% to 100.0%) | 0.500 "
    )
    assert lines[4].startswith("| tokendance | 6 | 100.0% (100.0% to 100.0%) | 100.0% (100.0% to ")
    assert lines[5].startswith(
        "| no context | 6 | 33.3% (0.0% to 66.7%) | 33.3% (0.0% to 66.7%) | 0."
    )
    nothing = {**one, "full": one[answers.FLOOR]}
    assert answers.text([nothing]).splitlines()[2].endswith(" | - |")
    all_of_it = {**one, answers.FLOOR: {"a": "4", "b": "4", "c": "1"}}
    assert answers.text([all_of_it]).splitlines()[3].endswith("| 0.667 (0.000 to 1.000) |")


def test_without_messages_the_question_is_left():
    blocks = [RecordedBlock("task", "What?"), RecordedBlock("shared", "5!", "0.a")]
    agents = tuple(RecordedAgent(name, tuple(blocks)) for name in "ab")
    one = RecordedRound("debate", "s", 1, "", agents, "x:1")
    found = answers.without_messages(one)
    assert [agent.blocks for agent in found.agents] == [(blocks[0],)] * 2
    assert [agent.name for agent in found.agents] == ["a", "b"]


@pytest.mark.parametrize("command", ["front", "quantized", "ideas"])
def test_fidelity_knows_its_workloads(command, capsys):
    with pytest.raises(SystemExit):
        fidelity.main([command, "town"])
    assert "town: expected one of town_square, debate" in capsys.readouterr().err


def test_answers_go_on_where_they_were_stopped(monkeypatch):
    found = [{"session": "a", "recorded": "5", **{key: {"x": "5"} for key in answers.SYSTEMS}}]
    monkeypatch.setattr(answers, "make_system", lambda name, model, selection: None)
    again = answers.run(None, Characters(), ["a"], "leading:4", found)
    assert again == found  # nothing is left to run


class Characters:
    """A tokenizer."""

    def encode(self, text, add_special_tokens):
        return [ord(character) % 1000 for character in text]


def test_rows_of_selections_are_those_of_a_plan():
    found = rows.run(Characters(), "town_square", 1, ["nothing", "leading:4", "everything"])
    assert found["everything"]["computed"] == found["everything"]["prompt_rows"]
    nothing, leading = found["nothing"], found["leading:4"]
    assert nothing["repaired"] <= 6  # last rows of prompts
    assert leading["computed"] - nothing["computed"] >= leading["repaired"] > 0  # and more Masters
    assert rows.text(found).splitlines()[2].startswith("| nothing | ")


def test_mixtures_name_a_source_by_the_segment():
    short, long, written = td.shared([1] * 3), td.shared([2] * 9), td.shared([3] * 5)
    prompts = {"a": [td.private([7] * 40), short, long, written]}
    recorded = [replays.Round("", 0, {}, {"a": [3] * 5}), replays.Round("", 1, prompts, {})]
    mixed = replays.source_of_way("producer+alone", recorded)
    assert [mixed(one) for one in prompts["a"][1:]] == ["alone", "alone", "producer"]
    mixed = replays.source_of_way("master+alone", recorded)
    assert [mixed(one) for one in prompts["a"][1:]] == ["master", "alone", "master"]
    assert replays.source_of_way("neutral", recorded) == "master"
    assert replays.source_of_way("producer", recorded) == "producer"


def test_repairs_that_siblings_could_share_are_counted():
    one, two, three = (td.shared([number] * 40) for number in (1, 2, 3))
    prompts = {
        "a": [td.private([10] * 9), one, two, three],
        "b": [td.private([11] * 5), two, three, td.private([5])],
        "c": [td.private([12] * 6), two, three, td.private([5])],
        "d": [td.private([13] * 7), three, one, td.private([5])],
    }
    # b and c repair the run of `two` and `three` at its start; d repairs `three`, then `one`, which
    # has not seen `three`.
    found = ideas.shared_repairs([replays.Round("", 1, prompts, {})], "leading:4:96")
    assert found["unseen"] == found["context"] == 4
    assert found["repaired"] == 3 * 4 + 24


def test_the_table_of_quantized_pools():
    names = ("kl", "worst_kl", "siblings_kl", "top1", "stored_mib", "dense_mib")
    figures = dict(zip(names, (0.01, 0.02, 0.015, 0.9, 19.7, 152.0), strict=True))
    text = quantized.text({"debate": {"everything": {"e4m3": figures}}})
    head, *_, row = [line for line in text.splitlines() if line.startswith("|")]
    assert head.count("|") == row.count("|")
    assert row == "| everything | e4m3 | 0.01000 | 0.02000 | 0.01500 | 0.900 | 19.7 | 152.0 |"


def test_load_counts_what_a_store_takes(capsys):
    from bench import load

    load.main(["--agents", "96", "--rounds", "2", "--many", "64", "--turns", "3"])
    rounds, round_, process, books, many = capsys.readouterr().out.splitlines()
    assert rounds == "96 agents, 2 rounds, 64 in a company"
    assert round_.startswith("round: 1.00x of the first 10's")
    assert process.startswith("process: +0.0 MiB since then")
    share = books.split(", ")[1]
    assert share == "nothing was taken" or float(share.split()[0]) > 0
    assert many.startswith("plan and commit of 64 agents beside 64: ")


def test_moves_are_rated_by_what_the_machine_does(tmp_path, capsys):
    from bench import moves

    path, threads = tmp_path / "moves.json", torch.get_num_threads()
    moves.main(["--mib", "28", "--turns", "2", "--path", str(tmp_path), "--json", str(path)])
    torch.set_num_threads(threads)
    report = json.loads(path.read_text())
    assert report["host"]["bytes"] == report["disk"]["bytes"] == 28 << 20
    assert report["step"]["moves"] > 0
    assert capsys.readouterr().out == moves.text(report) + "\n"
    assert sorted(tmp_path.iterdir()) == [path]  # what it has written is gone
    host = {"mib_s": {"copy": 1000.0, "down": 900.0, "up": 800.0}}
    disk = {"mib_s": {"write": 500.0, "down": 250.0, "read": 4e3, "up": 400.0, "checksum": 900.0}}
    times = {"alone": 0.5, "meanwhile": 0.55}
    step = {"moves": 7, "clock_s": times, "processor_s": {"alone": 1.0, "meanwhile": 1.02}}
    rows = moves.text({"host": host, "disk": disk, "step": step}).splitlines()
    assert rows[2] == "| to host memory | 900 | copy | 1000 | 0.90 | 0.8 |"
    assert rows[5] == "| from disk | 400 | read | 4000 | 0.10 | 0.8 |"
    assert rows[7] == "Checksums of as many bytes alone: 900 MiB/s."
    assert rows[9].startswith("A step while agents move: 1.10x by the clock, 1.02x of the")


def test_sharing_counts_what_could_be_saved():
    heard, system = RecordedBlock("shared", "h" * 40, "h"), RecordedBlock("system", "s" * 16)

    def round_of(*names):
        agents = [
            RecordedAgent(name, (system, RecordedBlock("private", name * (20 + i)), heard))
            for i, name in enumerate(names)
        ]
        return RecordedRound("made", "one", 0, "", tuple(agents), "made:1")

    town = sharing.Town([], lambda text: list(text.encode()), block_size=8)
    town.play(round_of("a", "b"), ["a", "b"])
    # a: 36 own rows; b: 37, 4 that it repairs, and the last; the Master: 40. Both agents have the
    # system prompt's 16 rows: 2 pages fewer each, and 2 for their Master.
    assert town.counted() == {"pages": 5 + 6 + 5, "fold": 0, "remaster": 0, "promote": 2}
    town.scheduler.books.drop("a")
    # 42 own rows and 35 are 77: 10 pages instead of 6 and 5.
    assert town.counted() == {"pages": 6 + 5, "fold": 1, "remaster": 0, "promote": 0}
