"""Who imports whom: the rules that the packages' docstrings state, and no circles."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tokendance", "evals")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")
}
"""By name. Compiled modules are leaves: they import none of these."""


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Names that a module imports when it is run; what only type checkers import is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for one in node.orelse:
                yield from imports_of(one)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES or inside in COMPILED else node.module
        else:
            yield from imports_of(node)


COMPILED = {"tokendance._planner", "tokendance._C"}
IMPORTS = {
    name: set(imports_of(ast.parse(path.read_text(encoding="utf-8"))))
    for name, path in MODULES.items()
}


def is_of(module: str, names: frozenset[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


STANDARD = frozenset(sys.stdlib_module_names)
FRONT = frozenset(
    f"tokendance.{name}"
    for name in (
        *("audit", "collector", "decoder", "encoding", "lock", "sizes", "stats", "step", "store"),
        *("stored_calibration", "tenants", "tiers"),
    )
)
RECORD = frozenset(f"tokendance.host.{name}" for name in ("record", "round", "uncopied"))
HOST, DEVICE, FILES = (frozenset({f"tokendance.{name}"}) for name in ("host", "device", "files"))
INTEGRATIONS = frozenset({"tokendance.integrations", "transformers", "vllm"})
# vLLM's scheduler has no device.
VLLM_SCHEDULER = frozenset(
    f"tokendance.integrations.vllm.{name}"
    for name in (
        "audits",
        "null_blocks",
        "options",
        "orders",
        "rounds",
        "scheduler_decode",
        "scheduler_side",
        "sharing",
        "stats",
        "wishes",
    )
)
SOURCE_TREE = frozenset({"tokendance.source_tree"})  # says why compiled modules are missing
ARRAYS = frozenset({"numpy", "torch", "typing_extensions"})
MAY_IMPORT = {
    "tokendance.host": HOST | {"tokendance._planner", "numpy"},
    "tokendance.device": DEVICE | RECORD | ARRAYS | SOURCE_TREE,
    "tokendance.files": FILES | HOST | DEVICE | ARRAYS,
    **dict.fromkeys(FRONT, FRONT | HOST | DEVICE | FILES | ARRAYS),
    "tokendance.metrics": FRONT | {"prometheus_client"},
    **dict.fromkeys(VLLM_SCHEDULER, VLLM_SCHEDULER | HOST | {"numpy", "vllm"}),
    "tokendance.integrations": FRONT | HOST | DEVICE | ARRAYS | INTEGRATIONS,
    "tokendance.testing": HOST | DEVICE | ARRAYS | {"tokendance.testing", "tokendance._planner"},
    "tokendance.cli": frozenset({"tokendance", "tqdm"}) | ARRAYS,
    "tokendance.source_tree": STANDARD,
    "tokendance.__main__": frozenset({"tokendance.cli"}),
}


def package_of(module: str) -> str:
    return next(name for name in MAY_IMPORT if is_of(module, frozenset({name})))


@pytest.mark.parametrize(
    "module", sorted(name for name in MODULES if name.startswith("tokendance."))
)
def test_a_module_imports_what_its_package_may(module: str) -> None:
    allowed = STANDARD | MAY_IMPORT[package_of(module)]
    assert {name for name in IMPORTS[module] if not is_of(name, allowed)} == set()


def test_importing_the_library_imports_nothing_of_it() -> None:
    """What it exports comes with its first use, so that the host half does without torch."""
    assert {name for name in IMPORTS["tokendance"] if not is_of(name, STANDARD)} == set()


def test_every_package_says_what_it_may_import() -> None:
    packages = [path for path in MODULES.values() if path.name == "__init__.py"]
    tops = [path for path in packages if path.parent.parent in (ROOT, ROOT / "tokendance")]
    for path in tops:
        if path.parent.name != "tokendance":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert "ay import" in docstring, path


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        name: {one for one in found if one in MODULES and one not in ("tokendance", "evals")}
        for name, found in IMPORTS.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_nothing_of_the_library_imports_what_measures_it() -> None:
    users = [name for name in MODULES if name.startswith("tokendance")]
    assert not [name for name in users if any(is_of(one, {"evals"}) for one in IMPORTS[name])]


def test_a_circle_and_a_forbidden_import_would_be_seen() -> None:
    source = (
        "from __future__ import annotations\nimport torch.nn\nfrom tokendance.host import plan\n"
        "if TYPE_CHECKING:\n    from tokendance import store\n"
        "def late():\n    from tokendance.store import DiffStore\n"
    )
    found = set(imports_of(ast.parse(source)))
    assert found == {"__future__", "torch.nn", "tokendance.host.plan", "tokendance.store"}
    allowed = STANDARD | MAY_IMPORT["tokendance.host"]
    assert {name for name in found if not is_of(name, allowed)} == {"torch.nn", "tokendance.store"}
