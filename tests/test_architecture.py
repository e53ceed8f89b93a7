"""The house: imports run down the layers that docs/architecture.md draws, names are the field's, files stay small."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
SOURCES = sorted((ROOT / "gridprune_cli").rglob("*.py"))

# what a thing is goes into its name; of these none says it. Grids and tables have rows, and --keep is an option
BANNED = {
    *("states", "slots", "Asked", "Ask", "see", "_cut", "Inside", "_together", "lucky", "heavy", "weighty"),
    *("dwindling", "spread", "words", "part", "none", "make", "own", "said", "told", "made", "found", "given", "mine"),
}
MAX_LINES, MAX_CLASS = 400, 200


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """The package's modules that a file imports, also inside functions and for types alone."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gridprune_cli"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name.startswith("gridprune_cli")}
    return imported - {module_of(path)}


def room_of(module: str) -> str:
    """What a module is listed as: the name below the package."""
    return module.split(".")[1] if "." in module else module


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}
LAYERS = [line.split() for line in re.search(r"```text layers\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()]
HEIGHT = {name: len(LAYERS) - n for n, layer in enumerate(LAYERS) for name in layer}
ENTRANCES = {"gridprune_cli", "__main__"}  # the package's own namespace, and `python -m`


def test_every_module_has_its_place_in_the_drawing():
    assert {room_of(module) for module in MODULES} - ENTRANCES == set(HEIGHT)
    assert len(HEIGHT) == sum(len(layer) for layer in LAYERS)


def test_imports_run_down_as_drawn():
    up = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if room_of(module) not in ENTRANCES and room_of(module) != room_of(other)
        if room_of(other) in ENTRANCES or HEIGHT[room_of(other)] >= HEIGHT[room_of(module)]
    ]
    assert not up


def test_no_module_imports_itself_by_way_of_others():
    def reach(module: str, seen: set[str]) -> set[str]:
        for other in IMPORTS.get(module, set()) - seen:
            seen.add(other)
            reach(other, seen)
        return seen

    assert not [module for module in MODULES if module in reach(module, set())]


def test_the_way_of_a_question_names_files_that_are_there_each_once():
    way = re.search(r"## The way of a question.*?```text\n(.*?)```", PAGE, re.DOTALL)[1]
    named = [name for name in re.findall(r"[a-z_/]+\.py", way)]
    assert all((ROOT / "gridprune_cli" / name).is_file() for name in named)
    assert {name for name in named if named.count(name) > 1} <= {"cache/store.py"}  # read, and on a miss written


def identifiers(tree: ast.AST) -> set[tuple[int, str]]:
    """Names that a file gives to things: variables, arguments, attributes, functions and classes, with their lines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            names.add((node.lineno, node.arg))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add((node.lineno, node.attr))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add((node.lineno, node.name))
    return names


@pytest.mark.parametrize("folder", ["gridprune_cli", "training", "benchmarks", "docs", "tests"])
def test_names_say_what_a_thing_is(folder):
    bad = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in sorted(identifiers(ast.parse(path.read_text())))
        if name in BANNED
    ]
    assert not bad


def test_files_and_classes_can_be_read_in_one_go():
    long = [
        f"{module}: {n} lines" for module, path in MODULES.items() if (n := path.read_text().count("\n")) > MAX_LINES
    ]
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 > MAX_CLASS:
                long.append(f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert not long
