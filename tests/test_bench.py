"""What the benchmarks do with their figures."""

from __future__ import annotations

import json

import pytest

from bench import compare
from bench.ceilings import Ceiling
from bench.rounds import Cell, table
from tokendance.replay import SystemResult


def run_of(path, fractions):
    runs = [
        {"name": name, "extra_info": {} if value is None else {compare.FIGURE: value}}
        for name, value in fractions.items()
    ]
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


def test_a_ceiling_is_the_best_sample_of_the_best_way():
    calls = []
    ceiling = Ceiling("B/s", 100.0, [lambda: calls.append("a"), lambda: calls.append("b")])
    ceiling.sample()
    first = ceiling.rate
    ceiling.sample()
    assert calls == ["a", "b", "a", "b"]
    assert ceiling.rate >= first > 0


def test_rounds_are_held_against_what_rows_and_flops_promise():
    def result(seconds, rows, flops, stored, rate):
        return SystemResult(seconds, rows, 0, flops, 100 << 20, stored << 20, rate, 0.1, None, 1.0)

    cell = Cell(
        "tiny",
        3,
        1,
        900,
        {
            "full": result(8.0, 900, 1000, 100, 10.0),
            "pic": result(4.0, 500, 600, 100, 10.0),
            "tokendance": result(2.0, 300, 300, 25, 20.0),
        },
    )
    assert cell.over("full", "prefill_s") == pytest.approx(4.0)
    last = table([cell]).splitlines()[-1]
    assert last == "| tiny | 3 | 4.00x | 3.00x | 1.33 | 2.00x | 2.00x | 1.00 | 2.00x | 4.00x |"
