"""The documentation: its code runs, its commands exist, its pictures and pages are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ptx_backend import find_nvcc

import tokendance

ROOT = Path(__file__).resolve().parent.parent
PTXRUN = ROOT / "tools" / "ptxrun" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_TOKENISE = re.compile(r"\btokenizer(?:\.encode|\.__call__)?\(.*")
LANGUAGES = {"python", "sh", ""}  # what is run, commands, and drawings


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """``(line, text)`` of the blocks of a language."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start(2)), match[2])
        for match in _BLOCK.finditer(text)
        if match[1] == language
    ]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_python_blocks(page: Path) -> dict[str, Any]:
    """One after the other, in one namespace."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page, request, capsys):
    if any("load_model" in text for _, text in blocks(page, "python")):
        request.getfixturevalue("smollm2")  # skips where the model cannot be had
    run_python_blocks(page)


def test_python_blocks_of_ptxrun_run(monkeypatch, tmp_path, capsys):
    """In a folder with the kernel that they are about."""
    if find_nvcc() is None:
        pytest.skip("needs nvcc")
    monkeypatch.chdir(tmp_path)
    [(_, kernel)] = blocks(PTXRUN, "cuda")
    (tmp_path / "kernel.cu").write_text(kernel)
    namespace = run_python_blocks(PTXRUN)
    assert np.array_equal(namespace["y"], 0.5 * namespace["x"])
    assert namespace["report"].killed


def test_blocks_are_of_known_languages():
    used = {(match[1], name(page)) for page in PAGES for match in _BLOCK.finditer(page.read_text())}
    assert {language for language, _ in used} <= LANGUAGES, used


def test_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text()
    named = set(re.findall(r"^::: tokendance\.(\w+)$", text, re.M))
    for members in re.findall(r"members: \[(.*)\]", text):
        named |= set(re.split(r",\s*", members))
    assert set(tokendance.__all__) - {"__version__"} <= named


def test_make_targets_that_are_named_exist():
    named = set()
    for page in PAGES:
        commands = "\n".join(re.sub("#.*", "", text) for _, text in blocks(page, "sh"))
        commands += "\n".join(re.findall(r"`(make [^`]*)`", page.read_text()))
        named |= {
            word for line in re.findall(r"\bmake ([a-z -]+)", commands) for word in line.split()
        }
    assert "test" in named
    dry = subprocess.run(["make", "--dry-run", *named], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


def test_segments_are_tokenised_without_special_tokens():
    """A BOS belongs in front of a prompt, not of each of its segments."""
    texts = {name(page): "\n".join(text for _, text in blocks(page, "python")) for page in PAGES}
    texts |= {str(path): path.read_text() for path in (ROOT / "examples").glob("*.py")}
    calls = [(where, call) for where, text in texts.items() for call in _TOKENISE.findall(text)]
    assert calls
    assert [one for one in calls if "add_special_tokens=False" not in one[1]] == []
