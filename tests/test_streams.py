"""Streams that are closed, full, or can't say everything: one line, an exit code, and nothing unexpected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PICTURE = Path(__file__).parent.parent / "sample_images" / "scene-1.png"
FULL = Path("/dev/full")


def run(folder, command, variables):
    """Runs a shell's command in a folder: (exit code, stdout, stderr)."""
    environment = os.environ | variables
    out = subprocess.run(["sh", "-c", command], cwd=folder, env=environment, capture_output=True, timeout=120)
    return out.returncode, out.stdout.decode(), out.stderr.decode()


@pytest.fixture
def shell(server, tmp_path):
    """Runs `gridprune` in a shell, with redirections: (exit code, stdout, stderr)."""
    return lambda line, **variables: run(tmp_path, f'"{server.program}" {line}', variables)


@pytest.mark.slow
def test_streams_that_are_closed_when_python_starts(tmp_path):
    """As below, where `gridprune` is forked with its streams closed: here Python itself finds them so."""
    python = f'"{sys.executable}" -m gridprune_cli'
    code, _, err = run(tmp_path, f"{python} ask {PICTURE} 'What?' >&-", {})
    assert code == 1 and err == "gridprune: stdout is closed; send it somewhere, as to /dev/null\n"
    code, out, err = run(tmp_path, f"{python} batch - <&-", {})
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("gridprune: -: ")
    assert run(tmp_path, f"{python} cache dir 2>&- <&-", {}) == (0, f"{tmp_path / 'cache'}\n", "")


@pytest.mark.parametrize("line", ["ask {} 'What?'", "batch nothing.jsonl", "encode {} --json", "models", "--help"])
def test_a_closed_stdout_is_told_before_anything_is_done(shell, tmp_path, line):
    code, _, err = shell(line.format(PICTURE) + " >&-")
    assert code == 1 and err == "gridprune: stdout is closed; send it somewhere, as to /dev/null\n"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "line", ["ask - 'What?'", "ask {} -", "chat {}", "batch -", "encode -", "generate -", "eval - -o run"]
)
def test_a_closed_stdin_is_bad_input(shell, line):
    code, out, err = shell(line.format(PICTURE) + " <&-")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("gridprune: -: ")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("line", ["models", "models --json", "--help", "ask {} 'What?' -q"])
def test_a_full_stdout_is_told(shell, line):
    code, _, err = shell(line.format(PICTURE) + " >/dev/full")
    assert (
        code == 1
        and err == "gridprune: stdout: can't be written (No space left on device); send it where there is room\n"
    )


def test_without_stderr_nothing_else_comes_to_stdout(shell):
    """Nor into a file: the first that is opened would take the place of a closed stream."""
    code, out, _ = shell(f"ask {PICTURE} 'Which object has the T?' --save set.safetensors 2>&- <&-")
    assert (code, out) == (0, "red star\n")
    assert shell("generate set.safetensors -q")[1] == "red star\n"
    assert "1 checked, 0 broken" in shell("cache verify")[2]


def test_a_stdout_without_unicode_shows_escapes(shell, tmp_path):
    (tmp_path / "é.txt").write_bytes(b"no image")
    code, out, _ = shell("cache dir --cache-dir é", PYTHONIOENCODING="ascii")
    assert code == 0 and out.strip().endswith("\\xe9")
