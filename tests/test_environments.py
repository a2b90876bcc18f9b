"""`python -m tools.environments` without an environment: what it says of what cannot be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import environments


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No interpreters on the path or of pyenv, and an empty cache."""
    for name in ("PATH", "PYENV_ROOT", "TOKENDANCE_CACHE"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return tmp_path


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)


def test_without_an_interpreter_nothing_was_run(bare, capsys):
    assert environments.main(["3.99:2.10.0"]) == 0
    said = capsys.readouterr().out
    assert said == (
        "Python 3.99, torch 2.10.0: NOT RUN: there is no python3.99 that can make environments\n"
    )


def test_a_shim_that_runs_nothing_is_no_interpreter(bare):
    script(bare / "path" / "python3.99", "raise SystemExit(127)")
    with pytest.raises(environments.NotRunError, match=r"no python3\.99"):
        environments.interpreter("3.99")
    script(bare / "pyenv_root" / "versions" / "3.99.1" / "bin" / "python3.99", "print('3.99')")
    assert environments.interpreter("3.99") == str(
        bare / "pyenv_root" / "versions" / "3.99.1" / "bin" / "python3.99"
    )


VENV = """
import os, sys
if "-c" in sys.argv:
    print("3.99")
else:
    os.makedirs(sys.argv[-1] + "/bin")
    with open(sys.argv[-1] + "/bin/python", "w") as file:
        file.write({pip!r})
    os.chmod(sys.argv[-1] + "/bin/python", 0o755)
"""


def test_without_a_torch_nothing_was_run(bare, capsys):
    pip = f"#!{sys.executable}\nraise SystemExit('ERROR: No matching distribution\\nnote')\n"
    script(bare / "path" / "python3.99", VENV.format(pip=pip))
    assert environments.main(["3.99:9.0.0"]) == 0
    said = capsys.readouterr().out
    assert said == "Python 3.99, torch 9.0.0: NOT RUN: pip: ERROR: No matching distribution\n"
    assert not list((bare / "tokendance_cache" / "environments").glob("python*"))


def test_an_environment_is_made_once(bare):
    script(bare / "path" / "python3.99", VENV.format(pip=f"#!{sys.executable}\n"))
    wanted = environments.Environment("3.99", "9.0.0")
    made = environments.python_of(wanted)
    (bare / "path" / "python3.99").unlink()
    assert environments.python_of(wanted) == made
    (made.parent.parent / "ready").write_text("torch==9.0.0")  # of fewer packages
    with pytest.raises(environments.NotRunError):
        environments.python_of(wanted)


def test_what_fails_is_a_failure(monkeypatch, capsys):
    def fail(environment):
        if environment.torch == "1":
            raise subprocess.CalledProcessError(3, ["python", "-c", "..."])

    monkeypatch.setattr(environments, "check", fail)
    assert environments.main(["3.12:1", "3.13:2"]) == 1
    assert capsys.readouterr().out == (
        "Python 3.12, torch 1: failed: python ended with 3\nPython 3.13, torch 2: passed\n"
    )
    assert environments.main(["3.13:2"]) == 0


@pytest.mark.parametrize("text", ["3.12", ":2.10.0", "3.12:"])
def test_a_pair_is_asked_for(text, capsys):
    with pytest.raises(SystemExit):
        environments.main([text])
    assert "expected PYTHON:TORCH as 3.12:2.10.0" in capsys.readouterr().err


def test_trees_have_no_other_modules(tmp_path):
    library, planner = tmp_path / "mine.so", tmp_path / "_planner.x.so"
    library.write_text("operators")
    planner.write_text("planner")
    with environments.tree_with(library, planner) as tree:
        assert sorted(path.name for path in tree.rglob("*.so")) == ["_C.so", "_planner.x.so"]
        assert (tree / "tokendance" / "_C.so").read_text() == "operators"
        assert (tree / "tests" / "test_rope_rotate.py").exists()
