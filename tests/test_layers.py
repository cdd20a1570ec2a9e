"""The house: packages stand in floors, and a module imports only from its own floor and from those below.

Imports inside functions and under TYPE_CHECKING count. Within a floor no two modules may need each other.
"""

import ast
import re
from functools import cache
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    *("errors", "paths", "files", "tables", "assets", "plugins"),
    *("questions", "models", "runs", "training"),
    *("analyses", "experiments", "bridges", "findings", "cli"),
)
"""From the ground up (docs/architecture.md)."""
MOST_LINES = 500


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file; `analyses/` is installed as `sst_interp.analyses`."""
    named = {}
    for folder, package in (("sst_interp", "sst_interp"), ("analyses", "sst_interp.analyses")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            named[".".join([package, *parts]).removesuffix(".__init__")] = file
    return named


def imported(name: str) -> set[str]:
    """The modules of ours that a module names in any import statement."""
    names = set()
    for node in ast.walk(ast.parse(modules()[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative imports hide where they lead"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = set()
    for each in names:
        while each and each not in modules():
            each = each.rpartition(".")[0]
        ours |= {each} - {"", name}
    return ours


def floor(name: str) -> int:
    parts = name.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 else len(FLOORS)


def test_every_module_stands_on_a_floor():
    for name in modules():
        assert name == "sst_interp" or name.split(".")[1] in FLOORS, name


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_lead_down(name):
    upward = {other for other in imported(name) if floor(other) > floor(name)}
    if name == "sst_interp":  # the front door: names that are looked up when they are asked for
        return
    assert not upward - {"sst_interp"}, f"{name} imports from a floor above: {sorted(upward)}"


def test_no_two_modules_need_each_other():
    graph = {name: imported(name) for name in modules()}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_a_file_is_one_idea():
    long = {
        name: lines
        for name, file in modules().items()
        if (lines := len(file.read_text("utf-8").splitlines())) > MOST_LINES
    }
    assert not long


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    """Run-time dependencies only; a package's name on the index and its module's differ for a few."""
    module_of = {"scikit-learn": "sklearn", "huggingface-hub": "huggingface_hub"}
    module_of |= {"transformer-lens": "transformer_lens"}
    optional = {"diptest", "IPython", "reasoning_gym", "lm_eval", "inspect_ai", "anyio", "ray", "datasets"}
    declared = {
        module_of.get(package, package)
        for package in (
            re.split(r"[<>=;\[ ]", r)[0] for r in requires("sst-interp") or [] if "extra ==" not in r
        )
    }
    third = set()
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                third |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                third.add(node.module.split(".")[0])
    import sys

    third -= set(sys.stdlib_module_names) | {"sst_interp", "__future__"}
    assert third - optional <= declared, "imported and not declared"
    assert declared <= third, "declared and never imported"
