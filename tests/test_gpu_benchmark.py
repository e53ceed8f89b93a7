"""`benchmarks.gpu`: what it does without its requirements, without time, with a check that fails; and a few checks."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import acceptance, gpu, parity
from benchmarks.machine import LAYER_BYTES, OTHER_BYTES, Machine, Row, attempt, find_tests
from gridprune_cli.errors import GridpruneError
from gridprune_cli.vlm.llava import Llava


@pytest.fixture
def machine(tmp_path):
    return Machine("cpu", "cpu", None, tmp_path)


def test_what_is_missing_is_installed(monkeypatch):
    commands = []
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=3)
    )
    gpu.install()
    assert commands == []
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "rich" else name)
    with pytest.raises(SystemExit, match="pip failed with 3"):
        gpu.install()
    (command,) = commands
    assert command[1:] == ["-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", "."]
    assert all((gpu.ROOT / name).exists() for name in ("constraints.txt", "pyproject.toml", "tests/tiny_families"))


def test_a_check_that_fails_is_a_row_and_the_others_run(machine, monkeypatch, capsys):
    def broken(_):
        yield Row("first", "1", "1", True)
        raise ValueError("of no use\nat all")

    checks = {"broken": broken, "works": lambda _: iter([Row("works", "2")])}
    monkeypatch.setattr(acceptance, "CHECKS", checks)
    rows = list(gpu.run(machine, ["broken", "works"], seconds=60))
    assert rows == [
        Row("first", "1", "1", True),
        Row("broken", "ValueError: of no use", "run", False),
        Row("works", "2"),
    ]
    assert "Traceback" in capsys.readouterr().err
    gpu.write_table(rows)
    assert "| broken | ValueError: of no use | run | **no** |" in capsys.readouterr().out
    assert [row.value for row in gpu.run(machine, ["works"], seconds=-1)] == ["not run: out of time"]


@pytest.mark.parametrize(("met", "code"), [(True, 0), (None, 0), (False, 1)])
def test_one_table_and_one_file(monkeypatch, tmp_path, capsys, met, code):
    monkeypatch.setattr(acceptance, "CHECKS", {"only": lambda _: iter([Row("only", "2", "3", met)])})
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == code and "| only | 2 | 3 |" in capsys.readouterr().out
    assert f'"met": {str(met).lower() if met is not None else "null"}' in (tmp_path / "out.json").read_text()


def test_a_gpu_that_is_not_there(machine):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="finds no GPU"):
        gpu.find_machine("cuda", machine.folder)


def test_layers_fit_the_memory(machine, monkeypatch):
    built = []
    monkeypatch.setattr("benchmarks.machine.build", lambda *_, layers: built.append(layers))
    monkeypatch.setattr("benchmarks.machine.Pipeline", lambda *_, **__: None)
    for free in (OTHER_BYTES + 3.5 * LAYER_BYTES, 80e9):
        Machine("cuda", "", int(free), machine.folder).open("llava-1.5-7b")
    assert built == [3, 32]
    with pytest.raises(GridpruneError, match=r"4\.0 GB are free"):
        Machine("cuda", "", int(4e9), machine.folder).open("llava-1.5-7b")


@pytest.mark.slow
def test_parity_and_memory_on_the_cpu(machine, monkeypatch):
    find_tests(gpu.ROOT)
    monkeypatch.setattr(parity, "METHODS", {name: parity.METHODS[name] for name in ("gridprune", "divprune")})
    rows = list(attempt("llava", lambda: parity._parity(machine, "llava")))
    assert [row.met for row in rows] == [True] * 3
    (row,) = acceptance.out_of_memory(machine)
    assert row.met and row.value == "16 of 16 answered, in batches of 4"


def test_parity_finds_other_answers(machine, monkeypatch):
    """A set with other features is no longer the masked model's, nor the whole model's answer."""
    find_tests(gpu.ROOT)
    monkeypatch.setattr(parity, "METHODS", {})
    right = Llava.project
    monkeypatch.setattr(Llava, "project", lambda self, features: -right(self, features))
    assert [row.met for row in parity._parity(machine, "llava")][:2] == [False, False]
