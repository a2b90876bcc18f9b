"""Tables of the documentation are what the kept measurements give (tools/measurements.py)."""

from __future__ import annotations

import json

import pytest

from tools import measurements

TABLE = "| what | s |\n| --- | --- |\n| a | 1.5 |\n| b | 20 |\n"


def test_every_table_of_figures_is_a_measurement_that_is_kept():
    assert measurements.check() == []


@pytest.fixture
def docs(monkeypatch, tmp_path):
    """A documentation of two pages and one measurement."""
    monkeypatch.setattr(measurements, "ROOT", tmp_path)
    monkeypatch.setattr(measurements, "DOCS", tmp_path / "docs")
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


def test_commands_measure_what_is_kept():
    names = {f"{path.parent.name}/{path.stem}" for path in measurements.kept()}
    assert set(measurements.COMMANDS) <= names
