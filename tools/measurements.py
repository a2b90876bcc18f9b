"""Measures what the documentation shows and puts it there: `make measurements`.

    python -m tools.measurements                   runs every command of ``COMMANDS``: hours
    python -m tools.measurements smollm2_rows      runs some
    python -m tools.measurements --check           runs none: do pages show what is kept?

A measurement is a JSON file in docs/measurements or docs/serving. A page shows it as a table that
is rendered from the file and from nothing else, and some as a picture, too (``PICTURES``). When a
command has run, its JSON takes the place of the one before, and the new table that of the old one
on every page that has it. A table of figures on the pages of ``PAGES`` that is rendered from no
file needs ``NOT_KEPT`` in its section.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from evals.cli.capacity import print_table
from evals.fidelity import __main__ as fidelity
from tools import plots

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FOLDERS = ("measurements", "serving")
PAGES = ("performance.md", "store.md", "vllm.md", "measurements")
NOT_KEPT = "No JSON of these figures was kept"
"""What a section says whose tables were copied from what a command had printed."""

_QWEN = "evals.fidelity --model qwen0.5b --threads 1"
_SMOLLM2 = "evals.fidelity --threads 1"
_WAYS = "--ways pic:0.15,master/leading:4:96:24,master/leading:16"
_SERVERS = "--systems vllm,vllm_prefix,tokendance_shared,engine"
_SERVING = "evals serving {} --workload board-2k --scale 8 --rounds 3 " + _SERVERS
COMMANDS = {
    "measurements/qwen0.5b_noise": f"{_QWEN} noise town_square --prompts 1",
    "measurements/qwen0.5b_town_square": f"{_QWEN} front town_square {_WAYS}",
    "measurements/qwen0.5b_debate": f"{_QWEN} front debate --agents 4 {_WAYS}",
    "measurements/qwen0.5b_debates": f"{_QWEN} front debate --session gsm_qwen3-14b/09 --agents 3 "
    f"--rounds 8 {_WAYS},master/leading:12",
    "measurements/qwen0.5b_town_meetings": f"{_QWEN} front town_meetings --agents 4 --rounds 9 "
    f"{_WAYS},master/leading:12",
    "measurements/smollm2_town_meetings": f"{_SMOLLM2} front town_meetings "
    f"--agents 4 --rounds 9 {_WAYS},master/leading:12",
    "measurements/smollm2_rows": f"{_SMOLLM2} rows agentsociety",
    "measurements/smollm2_front": f"{_SMOLLM2} front",
    "measurements/smollm2_leakage": f"{_SMOLLM2} leakage",
    "measurements/smollm2_quantized": f"{_SMOLLM2} quantized town_square",
    "measurements/smollm2_tolerance": f"{_SMOLLM2} tolerance",
    "measurements/smollm2_noise": f"{_SMOLLM2} noise town_square",
    "measurements/smollm2_codecs": f"{_SMOLLM2} codecs town_square debate agentsociety --agents 3",
    "measurements/smollm2_trajectories": f"{_SMOLLM2} trajectories --rounds 5",
    "serving/agents_7b": "evals capacity agents --societies 4 --rates 0.2,1,2 --rounds 2",
    "serving/agents_7b_slower": "evals capacity agents --slower 2 --systems tokendance",
    "serving/agents_14b": "evals capacity agents --model qwen2.5-14b",
    "serving/agents_8b_h200": "evals capacity agents --machine h200 --model llama-3.1-8b "
    "--shape board-2k --rates 0.2,1 --limit 3",
    "serving/prefill_7b": "evals capacity prefill --agents 2,4,8,16,32",
    "serving/bytes_14b": "evals capacity bytes --model qwen2.5-14b --agents 2,10,50",
    "serving/host_7b": "evals capacity host --agents 64,1000 --rounds 1",
    "serving/host_7b_short": "evals capacity host --agents 64,1000,10000 --scale 8 --rounds 1 "
    "--max-rows 65536",
    "serving/cpu_agents": f"{_SERVING.format('agents')} --times 4 --most 48",
    "serving/cpu_rounds": f"{_SERVING.format('rounds')} --agents 1,4,8,16",
    "serving/cpu_agentsociety": f"evals serving rounds --workload agentsociety --agents 8 "
    f"--rounds 2 {_SERVERS}",
    "serving/cpu_predicted": "evals capacity predict --report docs/serving/cpu_rounds.json",
    "measurements/sharing": "bench.sharing",
    "measurements/cpu_moves": "bench.moves",
    "measurements/cpu_scaling": "bench.scaling",
    "measurements/cpu_decode": "bench.decode",
    "measurements/cpu_town_square": "bench.rounds town_square --rounds 1:3 --repeat 2",
    "measurements/cpu_agentsociety": "bench.rounds agentsociety --agents 4,8 --repeat 1 "
    "--new-tokens 6",
}
"""By the name of the JSON in docs/ what measures it: ``python -m`` this. Of a new one somebody puts
the table on a page."""

PICTURES = {
    "serving/cpu_rounds": plots.rounds_by_agents,
    "measurements/smollm2_town_meetings": plots.siblings_by_reuse,
    "measurements/qwen0.5b_debates": plots.siblings_by_reuse,
}
"""By the name of the JSON what draws the SVG beside it."""

_TABLE = re.compile(r"(?:^\|.*\n)+", re.M)
_FIGURE = re.compile(r"[-+*]*\d")


def kept() -> list[Path]:
    """The files of all measurements."""
    return sorted(path for folder in FOLDERS for path in (DOCS / folder).glob("*.json"))


def rendered(path: Path) -> str:
    """The Markdown of a measurement, with a line break at its end."""
    made = json.loads(path.read_text())
    with contextlib.redirect_stdout(io.StringIO()) as written:
        if "question" in made:
            print_table(made["rows"])
        elif "bench" in made:
            print(import_module(f"bench.{made['bench']}").text(made))
        elif fidelity.main(["render", str(path)]) != 0:
            raise ValueError(f"{path}: expected a measurement, got another file")
    return written.getvalue()


def drawn(name: str) -> str:
    """The SVG of a measurement of ``PICTURES``."""
    return PICTURES[name](json.loads((DOCS / f"{name}.json").read_text()))


def pages() -> list[Path]:
    """Those whose tables must be measurements."""
    found = [DOCS / name for name in PAGES]
    return sorted(page for one in found for page in (one.glob("*.md") if one.is_dir() else [one]))


def tables_without_json(page: Path, texts: Sequence[str]) -> Iterator[str]:
    """First lines of tables of figures that are in none of the rendered ``texts`` and in no section
    that says ``NOT_KEPT``."""
    for section in re.split(r"^(?=#)", page.read_text(), flags=re.M):
        if NOT_KEPT in section:
            continue
        for table in _TABLE.findall(section):
            if has_figures(table) and not any(table in text for text in texts):
                yield table.splitlines()[0]


def has_figures(table: str) -> bool:
    """Whether at least half of what stands behind its first column begins with a number."""
    rows = [line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]]
    cells = [cell for row in rows for cell in row if cell.strip()]
    return 2 * sum(bool(_FIGURE.match(cell)) for cell in cells) >= len(cells) > 0


def not_shown(texts: dict[Path, str]) -> list[Path]:
    """Measurements whose table stands on no page."""
    written = [page.read_text() for page in DOCS.rglob("*.md")]
    return [path for path, text in texts.items() if not any(text in page for page in written)]


def replace(old: str, new: str) -> None:
    """The table on every page that has it."""
    for page in DOCS.rglob("*.md"):
        before = page.read_text()
        if old in before:
            page.write_text(before.replace(old, new))


def measure(name: str) -> None:
    """Runs the command, then keeps what it has written and shows it."""
    path, out = DOCS / f"{name}.json", ROOT / "build" / "measurements"
    out.mkdir(parents=True, exist_ok=True)
    module, *arguments = shlex.split(COMMANDS[name])
    written = out / path.name
    written.unlink(missing_ok=True)  # a measurement that goes on would measure nothing
    if module == "evals.fidelity":
        # What `noise` finds of a model stands beside its other tables.
        beside = out / Path(name).name.partition("_")[0]
        arguments = ["--out", str(beside), "--json", str(written), *arguments]
    else:
        arguments += ["--json", str(written)]
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)
    if module == "evals.fidelity" and path.stem.endswith("_noise"):
        shutil.copyfile(written, beside / "noise.json")
    old = rendered(path) if path.exists() else None
    shutil.copyfile(written, path)
    if old is not None:
        replace(old, rendered(path))
    if name in PICTURES:
        path.with_suffix(".svg").write_text(drawn(name))


def check() -> list[str]:
    """What is wrong with the pages, a line each."""
    texts = {path: rendered(path) for path in kept()}
    wrong = [
        f"{path.relative_to(ROOT)}: expected its table on a page, found it on none"
        for path in not_shown(texts)
    ]
    for name in PICTURES:
        path = DOCS / f"{name}.svg"
        if not path.exists() or path.read_text() != drawn(name):
            wrong.append(f"{path.relative_to(ROOT)}: expected what is drawn of its JSON")
    for page in pages():
        for line in tables_without_json(page, list(texts.values())):
            wrong.append(f"{page.relative_to(ROOT)}: expected JSON of the table {line}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.measurements", description=__doc__.split("\n")[0]
    )
    parser.add_argument("name", nargs="*", help="of its JSON; all by default")
    parser.add_argument("--check", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    names = {Path(name).name: name for name in COMMANDS}
    if unknown := set(options.name) - set(names):
        parser.error(f"name: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if not options.check:
        for name in options.name or names:
            measure(names[name])
    wrong = check()
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
