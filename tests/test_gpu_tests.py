"""`python -m tools.gpu_tests` without a GPU: what it would start, and what it makes of reports."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tools import gpu_tests


def test_every_file_with_tests_for_a_gpu_is_run():
    uses = re.compile(r"^OPERATOR = |mark\.gpu\b", re.MULTILINE)  # of the backends' fixtures
    files = Path(__file__).resolve().parent.glob("test_*.py")
    found = {path.stem for path in files if uses.search(path.read_text())}
    assert found - {Path(__file__).stem} == set(gpu_tests.FILES)


def test_jobs_have_all_parts():
    jobs = gpu_tests.test_jobs(rehearse=False)
    for name, parts in gpu_tests.FILES.items():
        found = [job.command for job in jobs if f"tests/{name}.py" in job.command]
        given = [command[command.index("--part") + 1] for command in found]
        assert given == [f"{this}/{parts}" for this in range(parts)]
        assert all("cuda" in command for command in found)


def test_the_sanitizer_sees_all_compact_cases_with_every_tool():
    jobs = gpu_tests.sanitizer_jobs(rehearse=False)
    assert [job.name for job in jobs] == [
        f"{tool}_{subject}"
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
        for subject in ("attention", "rest")
    ]
    for job in jobs:
        assert job.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        # initcheck has to see what other kernels write.
        filtered = "kernel_substring=tokendance" in job.command
        assert filtered == ("initcheck" not in job.name)
        assert ("--error-exitcode" in job.command) == filtered


PASSED = "....\n========= ERROR SUMMARY: 0 errors\n4 passed in 3.2s\n"
READ = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at {kernel}+0x70 in file.cu:12
4 passed in 3.2s
"""


@pytest.mark.parametrize(
    ("name", "code", "output", "passed", "text"),
    [
        ("memcheck_rest", 0, PASSED, True, "4 passed in 3.2s; ERROR SUMMARY: 0 errors"),
        ("memcheck_rest", 1, PASSED, False, "4 passed in 3.2s; ERROR SUMMARY: 0 errors"),
        ("test_gpu", 0, "", False, "no test ended, status 0"),
        ("test_gpu", -11, "....", False, "no test ended, status -11"),
        ("test_arrays", 0, "4 skipped in 1s\n", True, "4 skipped in 1s"),
        (
            "initcheck_rest",
            0,
            READ.format(kernel="at::native::fill"),
            True,
            "4 passed in 3.2s",
        ),
        (
            "initcheck_rest",
            0,
            READ.format(kernel="tokendance_merge_states_f32"),
            False,
            "4 passed in 3.2s; 1 reads of what nobody wrote",
        ),
    ],
)
def test_verdicts(name, code, output, passed, text):
    job = gpu_tests.Job(name, [], {})
    assert gpu_tests.verdict(job, code, output) == gpu_tests.Outcome(name, passed, text)


def script(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


def test_what_hangs_or_dies_is_a_failure(tmp_path, capsys):
    jobs = [
        gpu_tests.Job("hangs", script("import time; time.sleep(60)"), {}),
        gpu_tests.Job("dies", script("import os; os.kill(os.getpid(), 9)"), {}),
        gpu_tests.Job("passes", script("print('3 passed in 0.1s')"), {}),
    ]
    assert not gpu_tests.run_all(jobs, at_once=3, logs=tmp_path / "logs", limit=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["hangs", "FAILED", "still", "running", "after", "2", "s,", "killed"],
        ["dies", "FAILED", "no", "test", "ended,", "status", "-9"],
        ["passes", "passed", "3", "passed", "in", "0.1s"],
    ]
    assert lines[3] == f"failed: hangs, dies; their output is in {tmp_path / 'logs'}"
    assert gpu_tests.run_all(jobs[2:], at_once=1, logs=tmp_path / "logs", limit=9)


def test_without_the_sanitizer_it_fails_unless_told(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_tests, "run_all", lambda *arguments: True)
    for what in ("all", "sanitize"):
        with pytest.raises(SystemExit):
            gpu_tests.main([what])
        assert "compute-sanitizer: expected it on PATH, got none" in capsys.readouterr().err
    assert gpu_tests.main(["tests"]) == 0
    assert capsys.readouterr().out == ""
    assert gpu_tests.main(["--without-sanitizer"]) == 0
    assert capsys.readouterr().out == "compute-sanitizer: NOT RUN\n"


def test_triage_repeats_the_first_failure_of_each_process(tmp_path, monkeypatch, capsys):
    texts = {
        "test_a": "FAILED tests/test_a.py::test_one[cuda-1] - assert\nFAILED tests/test_a.py::t\n",
        "test_b": "ERROR tests/test_b.py::test_b - RuntimeError: CUDA error\n",
        "test_c": "4 passed in 1s\n",
        "memcheck_rest": "FAILED tests/test_gpu.py::test_x\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.log").write_text(text)
    jobs = gpu_tests.triage_jobs(False, tmp_path)
    assert [job.name for job in jobs] == ["triage_test_a", "triage_test_b"]
    assert [job.command[-1] for job in jobs] == [
        "tests/test_a.py::test_one[cuda-1]",
        "tests/test_b.py::test_b",
    ]
    assert all(job.environment["CUDA_LAUNCH_BLOCKING"] == "1" for job in jobs)
    for number in range(9):
        (tmp_path / f"test_{number}.log").write_text(texts["test_a"])
    assert len(gpu_tests.triage_jobs(False, tmp_path)) == gpu_tests.TRIAGED
    said = "print('========= Invalid read\\nother\\n1 failed in 1s'); raise SystemExit(1)"
    monkeypatch.setattr(
        gpu_tests, "triage_jobs", lambda *arguments: [gpu_tests.Job("triage_x", script(said), {})]
    )
    monkeypatch.setattr(gpu_tests.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu_tests.main(["triage", "--logs", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["triage_x", "========= Invalid read"]
