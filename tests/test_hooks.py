"""The hook that looks at a commit's message."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HOOK = Path(__file__).resolve().parent.parent / "tools" / "hooks" / "commit-msg"


def outcome(message: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "message"
    file.write_text(message)
    return subprocess.run([HOOK, file], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "message",
    [
        "store: keep one Master per segment\n",
        "host, device: pass records of copies\n\nThe reason.\n\nMore of it.\n",
        "README: show the loop first\n# a comment of git\n",
        "store: keep one Master\n# ---- >8 ----\ndiff --git a/x b/x\n",
        "Merge branch 'of somebody'\n",
        f"docs: {'x' * 66}\n",
    ],
)
def test_messages_of_the_form_pass(message, tmp_path):
    ran = outcome(message, tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("Keep one Master per segment\n", 'a subject "area: imperative"'),
        ("store: Keep one Master\n", 'a subject "area: imperative"'),
        ("store: keep one Master.\n", "without a full stop"),
        (f"docs: {'x' * 67}\n", "at most 72 characters in the subject (it has 73)"),
        ("store: keep one Master\nThe reason.\n", "an empty line behind the subject"),
        ("\n", 'a subject "area: imperative"'),
    ],
)
def test_others_are_refused_with_the_reason(message, wanted, tmp_path):
    ran = outcome(message, tmp_path)
    assert ran.returncode == 1
    assert wanted in ran.stderr
