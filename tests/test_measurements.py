"""Tables of the documentation are what the kept measurements give (tools/measurements.py)."""

from __future__ import annotations

import json
import re

import pytest

from tools import measurements, plots

TABLE = "| what | s |\n| --- | --- |\n| a | 1.5 |\n| b | 20 |\n"


def test_every_table_of_figures_is_a_measurement_that_is_kept():
    assert measurements.check() == []


@pytest.fixture
def docs(monkeypatch, tmp_path):
    """A documentation of two pages and one measurement."""
    monkeypatch.setattr(measurements, "ROOT", tmp_path)
    monkeypatch.setattr(measurements, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(measurements, "PICTURES", {})
    monkeypatch.setattr(measurements, "PAGES", ("performance.md", "measurements"))
    (tmp_path / "docs" / "measurements").mkdir(parents=True)
    (tmp_path / "docs" / "performance.md").write_text("# Speed\n\nNothing yet.\n")
    rows = [{"what": "a", "s": 1.5}, {"what": "b", "s": 20}]
    one = tmp_path / "docs" / "measurements" / "one.json"
    one.write_text(json.dumps({"question": "bytes", "rows": rows}))
    (tmp_path / "docs" / "measurements" / "page.md").write_text(f"# Page\n\n{TABLE}")
    return tmp_path / "docs"


def test_tables_are_rendered_from_json(docs):
    assert measurements.rendered(docs / "measurements" / "one.json") == TABLE
    assert measurements.check() == []


def test_a_table_without_json_is_an_error(docs):
    page = docs / "performance.md"
    typed = TABLE.replace("1.5", "1.4")
    page.write_text(f"# Speed\n\n{typed}")
    assert measurements.check() == ["docs/performance.md: expected JSON of the table | what | s |"]
    page.write_text(f"# Speed\n\n{measurements.NOT_KEPT}; on one machine.\n\n{typed}")
    assert measurements.check() == []
    page.write_text(f"# Speed\n\n{measurements.NOT_KEPT}.\n\n## Another section\n\n{typed}")
    assert len(measurements.check()) == 1
    page.write_text("# Speed\n\n| name | means |\n| --- | --- |\n| 1 | words and 2 figures |\n")
    assert measurements.check() == []


def test_json_that_no_page_shows_is_an_error(docs):
    (docs / "measurements" / "page.md").write_text("# Page\n")
    assert measurements.check() == [
        "docs/measurements/one.json: expected its table on a page, found it on none"
    ]


def test_a_new_measurement_takes_the_place_of_the_one_before(docs, monkeypatch):
    def run(command, **_):
        assert command[1:4] == ["-m", "evals", "capacity"]
        written = command[command.index("--json") + 1]
        rows = [{"what": "a", "s": 2.5}]
        with open(written, "w") as file:
            json.dump({"question": "bytes", "rows": rows}, file)

    monkeypatch.setattr(measurements.subprocess, "run", run)
    monkeypatch.setattr(measurements, "COMMANDS", {"measurements/one": "evals capacity bytes"})
    assert measurements.main([]) == 0
    page = (docs / "measurements" / "page.md").read_text()
    assert page == "# Page\n\n| what | s |\n| --- | --- |\n| a | 2.5 |\n"
    assert measurements.main(["--check"]) == 0


def test_a_picture_is_that_of_its_json(docs, monkeypatch):
    def draw(made):
        return f"{len(made['rows'])} rows"

    monkeypatch.setattr(measurements, "PICTURES", {"measurements/one": draw})
    wrong = ["docs/measurements/one.svg: expected what is drawn of its JSON"]
    assert measurements.check() == wrong
    picture = docs / "measurements" / "one.svg"
    picture.write_text("3 rows")
    assert measurements.check() == wrong
    picture.write_text("2 rows")
    assert measurements.check() == []


def test_lines_and_bars_are_scaled_by_the_greatest():
    rows = [
        {"system": system, "agents": agents, "round p50, s": agents * s, "KV, MB": 9.0}
        for system, s in (("vllm", 1.0), ("mine", 0.5))
        for agents in (1, 4)
    ]
    drawn = plots.rounds_by_agents({"rows": rows})
    assert '<polyline points="106.0,215.0 268.0,50.0"' in drawn  # 4 of 4 s, 4 of 4 agents
    assert '<polyline points="106.0,242.5 268.0,160.0"' in drawn
    one = {"session": "s", "number": 1, "prompt_rows": 100, "overridden": 5, "master_agents": []}
    ways = {
        way: [{**one, "rows": computed, "kl": {"a": kl}, "top1": {"a": 1.0}}]
        for way, computed, kl in (("pic:0.15", 50, 0.2), ("master/leading:8", 40, 0.05))
    }
    drawn = plots.siblings_by_reuse({"result": {"town": ways}})
    assert re.findall(r'width="([\d.]+)" height="20"', drawn) == ["82.5", "330.0"]
    assert "0.050, 40% of the rows computed" in drawn


def test_benchmarks_render_their_own_json(docs):
    ways = {way: {"seconds": 1e-3, "bytes": 1 << 20} for way in ("dense", "own rows alone")}
    found = [
        {"agents": n, "shared": {"seconds": n * 1e-3, "bytes": n << 20}, **ways} for n in (2, 4)
    ]
    for one in found:
        for way in ways:
            one[way] = {"seconds": 2 * one["shared"]["seconds"], "bytes": one["agents"] << 21}
    report = {"bench": "scaling", "shared": 64, "private": 8, "dtype": "fp32", "threads": 1}
    path = docs / "measurements" / "one.json"
    path.write_text(json.dumps({**report, "calls": 2, "flops_s": 5e-6, "found": found}))
    lines = measurements.rendered(path).splitlines()
    assert "| 2 | 2.00 | 4.00 | 4.00 | 2.0 | 4.0 | 4.0 |" in lines
    assert "The FLOPs of one agent take 5.0 us in matrix products." in lines[7]
    assert lines[-1].startswith("- 1024.0 KiB (dense 2048.0, own rows alone 2048.0): 0.50 of its")
