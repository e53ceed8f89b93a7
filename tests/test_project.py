"""What the repository says of itself outside of its code: README, the map in CONTRIBUTING, versions, workflow."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ONE_LINE = re.compile(r"^```sh\n(.+)\n```$", re.MULTILINE)
MACHINE = ("cache ls", "env", "models default", "serve")  # output that depends on the machine, or never ends


def shown(page: str) -> list[tuple[str, list[str]]]:
    """The commands of a page with what it shows of their output, in turn."""
    commands: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^(?:    .*\n)+", (ROOT / page).read_text("utf-8"), re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("    $ "):
                commands.append((line[6:], []))
            elif block.startswith("    $ "):
                commands[-1][1].append(line[4:])
    return [
        (text, output) for text, output in commands if output and not any(f"gridprune {m}" in text for m in MACHINE)
    ]


def without_measures(lines: list[str]) -> list[str]:
    """Lines without times, rates and sizes, and without the white space that lines up a table."""
    return [re.sub(r"\d+\.\d+ (s|[KM]iB|images/s)\b", r"# \1", " ".join(line.split())) for line in lines]


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize("page", ["README.md", "docs/tour.md"])
def test_commands_print_what_the_page_shows(page, command, tmp_path, monkeypatch):
    (tmp_path / "sample_images").symlink_to(ROOT / "sample_images")
    monkeypatch.chdir(tmp_path)
    for text, output in shown(page):
        if page != "README.md" and (text, output) in shown("README.md"):
            continue
        call, *pipe = text.split(" | ", 1)
        arguments: list[str] = []
        for argument in shlex.split(call)[1:]:
            arguments += sorted(map(str, Path().glob(argument))) if "*" in argument else [argument]
        code, out, err = command(*arguments)
        assert code == 0, f"{text}\n{err}"
        if pipe:
            out = subprocess.run(["bash", "-c", pipe[0]], input=out, capture_output=True, text=True, check=True).stdout
        assert without_measures([*out.splitlines(), *err.splitlines()]) == without_measures(output), text


def test_readme_begins_with_two_commands_to_paste():
    text = (ROOT / "README.md").read_text("utf-8")
    run, check = ONE_LINE.findall(text)[:2]
    assert text.index(check) < text.index("\n## ")
    assert run.startswith("pip install -c constraints.txt -e . && gridprune ask sample_images/")
    install, *checks = check.split(" && ")
    assert install == "pip install -c constraints.txt -e '.[test]'"
    script = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert set(checks) <= {line.removesuffix(" &") for line in script}


def test_the_map_is_that_of_the_tree():
    (block,) = re.findall(
        r"^```text\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    paths: list[Path] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = next((path for path in reversed(paths) if len(path.parts) == depth), Path())
        paths.append(above / line.split()[0])
    assert [str(path) for path in paths if not (ROOT / path).exists()] == []
    package = {path.name for path in (ROOT / "gridprune_cli").iterdir() if re.fullmatch(r"[a-z]\w*(\.py)?", path.name)}
    assert package <= {path.name for path in paths}, "not in the map"


def test_the_package_is_typed():
    import gridprune_cli

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert Path(gridprune_cli.__file__).with_name("py.typed").is_file()
    assert "py.typed" in setuptools["package-data"]["gridprune_cli"]


def test_the_wheel_has_every_file_that_the_package_reads():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    package, patterns = ROOT / "gridprune_cli", setuptools["package-data"]["gridprune_cli"]
    listed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data <= listed and package / "serve" / "page.html" in listed
    assert [pattern for pattern in patterns if not any(package.glob(pattern))] == []


def test_versions_are_said_once_or_agree():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    classified = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    (tried,) = re.findall(r"^ +python: \[(.*)\]$", workflow, re.MULTILINE)
    assert re.findall(r"[\d.]+", tried) == classified
    assert PROJECT["requires-python"] == f">={classified[0]}"


def test_what_contributing_asks_for_is_what_is_run():
    """Recipes of the justfile and hooks name the tools that the workflow and the README run."""
    recipes = (ROOT / "justfile").read_text("utf-8")
    for name in ("lint", "test", "docs", "bench", "train", "fuzz"):
        assert re.search(rf"^{name}\b.*:$", recipes, re.MULTILINE), name
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    for tool in ("ruff check", "ruff format", "mypy"):
        assert tool in recipes and f"entry: {tool}" in hooks and f"- run: {tool}" in workflow
