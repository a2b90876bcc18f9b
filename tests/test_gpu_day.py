"""The day with a GPU on a machine without one: stand-ins for what is missing, few cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from ptxrun.nvcc import find_nvcc

from tools import gpu_day
from tools.gpu_tests import TOOLS

ROOT = Path(__file__).resolve().parent.parent
# As of the programs' command lines: options, each with a value, then a command that is run.
COMMAND = """
import os, sys
rest = sys.argv[1:]
values = {}
while rest and rest[0].startswith("-"):
    option = rest.pop(0)
    values[option] = rest.pop(0) if option != "-f" else True
"""
STAND_INS = {
    "nvidia-smi": "print('580.1, 1980 MHz, 3201 MHz, 40, 300 W')",
    "compute-sanitizer": COMMAND
    + "print('========= COMPUTE-SANITIZER', flush=True)\nos.execvp(rest[0], rest)",
    "ncu": COMMAND
    + """
if "--import" in values:
    print(f"    Duration                  us       12.5\\n    of {values['--import']}")
else:
    open(values["-o"] + ".ncu-rep", "w").close()
    os.execvp(rest[0], rest)
""",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A path that begins with the stand-ins, and a folder of what was carried there."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!{sys.executable}\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), os.environ["PATH"]]))
    carried = tmp_path / "carried"
    (carried / "wheels").mkdir(parents=True)
    (carried / "aot").mkdir()
    (carried / "aot" / "kernels.so").write_text("compiled")
    with zipfile.ZipFile(carried / "wheels" / "flashinfer-0.0-py3-none-any.whl", "w") as wheel:
        facts = "flashinfer-0.0.dist-info/"
        wheel.writestr("flashinfer/__init__.py", "raise ImportError('a stand-in')\n")
        wheel.writestr(
            facts + "METADATA", "Metadata-Version: 2.1\nName: flashinfer\nVersion: 0.0\n"
        )
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(facts + "WHEEL", tags)
        wheel.writestr(facts + "RECORD", "")
    return tmp_path


def rehearse(machine, part, *more):
    command = [sys.executable, "-m", "tools.gpu_day", str(part), "--rehearse"]
    command += ["--out", str(machine / "out"), "--carried", str(machine / "carried"), *more]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    summary = (machine / "out" / f"summary{part}.txt").read_text()
    lines = [line for line in summary.splitlines() if not line.startswith("    ")]
    assert all(line.split()[1] == "status" for line in lines), summary
    statuses = {line.split()[0]: int(line.split()[2]) for line in lines}
    return finished.returncode, statuses, summary


def logs(machine, part):
    with tarfile.open(machine / "out" / f"logs{part}.tgz") as archive:
        return {Path(name).name for name in archive.getnames()}


@pytest.mark.slow
def test_the_first_part(machine):
    code, statuses, summary = rehearse(machine, 1)
    statuses.pop("nvcc")
    stages = ("device", "probe", "load", "tests", "bench", "sanitize")
    assert statuses == dict.fromkeys(stages, 0), summary
    assert code == 0
    assert summary.count(" passed  ") == 3 + len(TOOLS)
    head, *rows, after = map(json.loads, (machine / "out" / "bench.jsonl").read_text().splitlines())
    assert head["driver_version"] == "580.1"
    assert [row["difference"] for row in rows] == [0, 0]
    assert after["after"]["clocks.sm"] == "1980 MHz"
    assert logs(machine, 1) >= {"load.log", "bench.log", "memcheck_rest.log", "test_checks.log"}


@pytest.mark.slow
def test_the_second_part(machine):
    code, statuses, summary = rehearse(machine, 2)
    statuses.pop("nvcc")
    cupy = statuses.pop("cupy")
    profiled = [f"{stage}_{name}" for name in gpu_day.PROFILED for stage in ("ncu", "details")]
    stages = ("device", "probe", "load", "wheels", "larger", *profiled, "again")
    assert statuses == dict.fromkeys(stages, 0), summary
    # Its kernels are compiled where there is no GPU to launch them on.
    assert (cupy == 0) == (find_nvcc() is not None), summary
    assert code == int(cupy != 0)
    rows = list(map(json.loads, (machine / "out" / "larger.jsonl").read_text().splitlines()))
    assert all(row["peers"]["cascade fa3"] == "a stand-in" for row in rows[1:-2])
    assert rows[-2]["name"] == "end to end"
    assert summary.count("Duration                  us       12.5") == 3
    assert "4 calls of attention, decode" in summary
    assert logs(machine, 2) >= {"larger.log", "again.log", "ncu_decode.ncu-rep"}


# Stages ------------------------------------------------------------------------------------------


def python(text):
    return [sys.executable, "-c", text]


def test_a_stage_that_fails_or_hangs_does_not_end_the_day(tmp_path):
    day = gpu_day.Day(1, tmp_path, limit=600)
    assert not day.stage("fails", 30, python("print('so'); exit(3)"), python("print('not run')"))
    assert not day.stage("hangs", 1, python("import time; time.sleep(60)"))
    assert not day.stage("absent", 1, ["no-such-program"], needed=False)
    assert day.stage("passes", 30, python("print('one')"), python("print('two')"), shown=1)
    assert day.outcomes == {"fails": 3, "hangs": 124, "passes": 0}
    summary = (tmp_path / "summary1.txt").read_text().splitlines()
    assert [line.split()[:3] for line in summary[::2]][:2] == [
        ["fails", "status", "3"],
        ["hangs", "status", "124"],
    ]
    assert summary[1] == "    so"
    assert summary[-1] == "    two"
    with tarfile.open(tmp_path / "logs1.tgz") as archive:
        assert "logs1/passes.log" in archive.getnames()


def test_what_a_stage_started_ends_with_it(tmp_path):
    child = "import time; time.sleep(60)"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}])"
    day = gpu_day.Day(1, tmp_path, limit=600)
    assert day.stage("parent", 30, python(f"{parent}; print(p.pid)"))
    pid = int((day.logs / "parent.log").read_text())
    status = Path(f"/proc/{pid}/status")
    for _ in range(100):  # until the signal has arrived
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid}: expected an end, got {status.read_text()}")


def test_a_day_that_is_over_begins_nothing(tmp_path):
    day = gpu_day.Day(2, tmp_path, limit=5)
    assert not day.stage("late", 30, python("print('run')"))
    assert day.outcomes == {"late": -1}
    assert not (day.logs / "late.log").exists()


def test_what_was_carried_is_loaded_or_the_library_is_built(tmp_path, monkeypatch):
    """Carried modules are copied; where they do not load, setup.py is run, and they load then."""
    root = tmp_path / "root"
    (root / "tokendance").mkdir(parents=True)
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "_C.so").write_text("of another Python")
    (root / "setup.py").write_text(
        "import os, sys\nopen('built', 'w').write(os.environ['TOKENDANCE_CUDA_ARCHS'])\n"
    )
    monkeypatch.setattr(gpu_day, "ROOT", root)
    load = "import os, sys; sys.exit(not os.path.exists('built'))"
    monkeypatch.setattr(gpu_day, "LOAD", load)
    monkeypatch.setattr(gpu_day, "PROBE", "")
    monkeypatch.setattr(gpu_day, "ARCHITECTURE", "print(90)")
    day = gpu_day.Day(1, tmp_path / "out", limit=600)
    plan = gpu_day.Plan(tmp_path / "carried", True, tmp_path / "site")
    assert gpu_day.ready(day, plan)
    assert (root / "tokendance" / "_C.so").read_text() == "of another Python"
    assert (root / "built").read_text() == "90"
    assert day.outcomes == {"build": 0, "load2": 0}
    assert gpu_day.ready(day, plan)
    (root / "built").unlink()
    (root / "setup.py").write_text("raise SystemExit('no compiler')\n")
    assert not gpu_day.ready(day, plan)
    assert day.outcomes["build"] == 1


def test_a_failure_is_looked_at_more_closely(tmp_path):
    """Part 1 repeats failures under the sanitizer only where there are any."""
    started = []

    class Noted(gpu_day.Day):
        def stage(self, name, seconds, *commands, **options):
            started.append(name)
            return name != "tests"

    gpu_day.first_part(Noted(1, tmp_path, 600), gpu_day.Plan(tmp_path, True, tmp_path))
    assert started == ["tests", "triage", "bench", "sanitize"]
