"""The documentation is true of the code: commands, links, options, defaults, examples."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from gridprune_cli.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def known_options(command: Any = None, path: str = "gridprune") -> dict[str, set[str]]:
    """Options by command line: `gridprune`, `gridprune ask`, `gridprune cache gc`, ..."""
    command = command or get_command(app)
    options = {path: {"--help", *(name for p in command.params for name in (*p.opts, *p.secondary_opts))}}
    for name, below in getattr(command, "commands", {}).items():
        options |= known_options(below, f"{path} {name}")
    return options


def code_of(text: str) -> Iterator[str]:
    """Lines of fenced and indented code, and inline code."""
    for _, block in FENCED.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    rest = FENCED.sub("", text)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    yield from INLINE.findall(rest)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    slugs: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in slugs)
        slugs.add(f"{slug}-{number}" if number else slug)
    return slugs


def table_under(heading: str, page: str = "method.md") -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    section = re.split(rf"^#+ {heading}\n", (DOCS / page).read_text("utf-8"), flags=re.M)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_commands_page_is_current_whatever_the_environment(tmp_path):
    hostile = {"COLUMNS": "40", "TERMINAL_WIDTH": "40", "FORCE_COLOR": "1", "TERM": "dumb", "TYPER_USE_RICH": "0"}
    hostile |= {"GRIDPRUNE_KEEP": "lots", "GRIDPRUNE_MODEL": "elsewhere", "HOME": str(tmp_path)}
    environment = os.environ | hostile | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    environment.pop("_TYPER_FORCE_DISABLE_TERMINAL", None)

    def check(script: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, "--check"], env=environment, capture_output=True, text=True)

    current = check(DOCS / "generate_commands.py")
    assert current.returncode == 0, current.stderr
    shutil.copy(DOCS / "generate_commands.py", tmp_path)
    old = (DOCS / "commands.md").read_text("utf-8").replace("gridprune ask", "gridprune beg", 1)
    (tmp_path / "commands.md").write_text(old, "utf-8")
    stale = check(tmp_path / "generate_commands.py")
    assert stale.returncode == 1 and "not current" in stale.stderr
    assert (tmp_path / "commands.md").read_text("utf-8") == old


@each_page
def test_links_lead_somewhere(page):
    text = INLINE.sub("", FENCED.sub("", page.read_text("utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)|(?:src|href)=\"([^\"]+)\"", text):
        target = "".join(link)
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(place), target


@each_page
def test_every_option_in_a_command_line_is_in_its_help(page):
    if page.name == "commands.md":  # it is the help
        return
    options = known_options()
    for line in code_of(page.read_text("utf-8")):
        for call in re.findall(r"(?<![\w./-])gridprune( [^|;#]*)", re.sub(r"\"[^\"]*\"|'[^']*'", "TEXT", line)):
            arguments = call.split(" gridprune ")[0].split()
            command = "gridprune"
            while arguments and f"{command} {arguments[0]}" in options:
                command += f" {arguments.pop(0)}"
            group = command in ("gridprune", "gridprune cache")
            assert not (group and arguments and re.fullmatch("[a-z]+", arguments[0])), f"no such command: {line}"
            unknown = {re.split("[=)]", word)[0] for word in arguments if re.match("--?[a-z]", word)} - options[command]
            assert not unknown, line


@each_page
def test_every_option_and_variable_named_alone_exists(page):
    text = page.read_text("utf-8")
    options = set().union(*known_options().values())
    for line in code_of(text):
        if line.startswith("-"):
            assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", line)) <= options, line
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "gridprune_cli").rglob("*.py"))
    variable = re.compile(r"GRIDPRUNE_[A-Z]+(?:_[A-Z]+)*")
    assert set(variable.findall(text)) <= set(variable.findall(sources))


def test_the_table_of_methods_and_the_help_name_every_method():
    from gridprune_cli.pruning.methods import METHODS, make_method

    rows = {
        name.strip("`"): {signal for signal in needs.split(", ") if signal}
        for name, needs, *_ in table_under("Methods", "methods.md")
    }
    assert rows == {name: set(make_method(name).needs) for name in METHODS}
    (option,) = [p for p in get_command(app).commands["ask"].params if "--method" in p.opts]
    assert set(re.findall(r"[\w-]+", option.help.replace(" or ", " "))) == set(METHODS)


def test_the_options_of_methods_are_those_of_the_code():
    from gridprune_cli.pruning.methods import METHODS

    rows = [[cell.strip("`") for cell in row[:3]] for row in table_under("Options", "methods.md")]
    others = [method for name, method in METHODS.items() if name != "gridprune"]
    assert sorted(rows) == sorted([m.name, field.name, str(field.default)] for m in others for field in fields(m))


def test_the_defaults_are_those_of_the_code():
    from gridprune_cli.pruning.methods.gridprune import GridPrune
    from gridprune_cli.pruning.region import contextual_region

    defaults = {name.strip("`"): value for name, value, *_ in table_under("Options of the method gridprune")}
    assert defaults == {f.name: str(f.default) for f in fields(GridPrune)}
    settings = inspect.signature(contextual_region).parameters
    text = (DOCS / "method.md").read_text("utf-8")
    assert f"max(0, r' - {settings['floor'].default})^2" in text
    assert f"mass inside - {settings['area_price'].default} * cells" in text


def test_the_examples_in_python_run(tmp_path, tiny_llava, monkeypatch, capsys):
    monkeypatch.setattr("gridprune_cli.vlm.checkpoint.CHECKPOINT", tiny_llava)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample_images").symlink_to(ROOT / "sample_images")
    blocks = [
        block for language, block in FENCED.findall((DOCS / "python.md").read_text("utf-8")) if language == "python"
    ]
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "python.md", "exec"), {})
    assert (tmp_path / "scene-1.safetensors").is_file()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("False [")
    assert sum(line.startswith("left out: no-such-file.png") for line in lines) == 1
    assert all(line.startswith("answered: ") for line in lines[-2:])


def test_every_family_is_in_both_tables():
    from gridprune_cli.vlm import FAMILIES

    text = (DOCS / "families.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", " ".join(rows)) == [*FAMILIES, *FAMILIES]
