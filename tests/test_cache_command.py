import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from gridprune_cli.cache import files
from gridprune_cli.cache.files import RawTensor
from gridprune_cli.cache.layout import SCHEMA
from gridprune_cli.cache.store import Store, entry_key
from gridprune_cli.cli import output
from gridprune_cli.cli.cache import app
from gridprune_cli.cli.describe import describe
from gridprune_cli.errors import BadInput, GridpruneError

MODELS = ["models/llava", "scenes"]
ENCODERS = [{"family": "llava", "checkpoint": "aa" * 32}, {"family": "scenes", "checkpoint": "bb" * 32}]


def call(*arguments: object) -> Result:
    with output.notices_on_stderr():
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", None)


@pytest.fixture
def keys(store: Store) -> list[str]:
    """Four entries, the first one used longest ago, and the third one the largest."""
    keys = []
    for number, (name, size) in enumerate([("c.jpg", 10), ("a.jpg", 20), ("b.jpg", 5000), ("d\x1b[31m\n.jpg", 30)]):
        encoder, image = ENCODERS[number == 3], f"{number:064x}"
        key = entry_key(image, encoder, [])
        header = {"schema": SCHEMA, "key": key, "model": MODELS[number == 3], "image": image, "name": name}
        header |= {"encoder": encoder, "tokens": size}
        store.put(encoder, key, files.encode({"a": RawTensor("U8", (size,), bytes(size))}, header))
        (path,) = store.root.rglob(f"{key}.safetensors")
        os.utime(path, (time.time() - (4 - number) * 3600 - 60,) * 2)
        keys.append(key)
    return keys


def damage(store: Store, key: str) -> Path:
    (path,) = store.root.rglob(f"{key}.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    return path


def test_dir_follows_flag_then_variable(tmp_path: Path) -> None:
    assert done("dir").stdout == f"{tmp_path / 'cache'}\n"
    assert done("dir", "--cache-dir", tmp_path / "other").stdout == f"{tmp_path / 'other'}\n"


def test_ls_shows_one_line_per_entry_the_last_used_last(keys: list[str]) -> None:
    head, *lines = done("ls").stdout.splitlines()
    assert head.split() == ["KEY", "TOKENS", "SIZE", "USED", "MODEL", "IMAGE"]
    assert [row.split()[0] for row in lines] == [key[:12] for key in keys]
    assert lines[0].endswith("  4 h  models/llava  c.jpg")
    assert lines[3].endswith(r"  1 h  scenes        d\x1b[31m\n.jpg")


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (["--sort", "used"], [0, 1, 2, 3]),
        (["--sort", "size"], [0, 1, 3, 2]),
        (["--sort", "name"], [1, 2, 0, 3]),
        (["--limit", "2"], [2, 3]),
        (["--sort", "size", "--limit", "1"], [2]),
        (["--sort", "name", "--limit", "9"], [1, 2, 0, 3]),
    ],
)
def test_ls_sorts_and_limits_alike_as_text_and_json(keys: list[str], arguments: list[str], order: list[int]) -> None:
    lines = done("ls", *arguments).stdout.splitlines()[1:]
    assert [row.split()[0] for row in lines] == [keys[number][:12] for number in order]
    lines = [json.loads(line) for line in done("ls", "--json", *arguments).stdout.splitlines()]
    assert [line["key"] for line in lines] == [keys[number] for number in order]


def test_ls_json_says_everything(keys: list[str], store: Store) -> None:
    lines = {line["key"]: line for line in map(json.loads, done("ls", "--json").stdout.splitlines())}
    assert set(lines) == set(keys)
    entry = store.find(keys[3])
    assert lines[keys[3]] == {
        "key": keys[3],
        "bytes": entry.bytes,
        "used": entry.used,
        "image": "d\x1b[31m\n.jpg",
        "sha256": f"{3:064x}",
        "model": "scenes",
        "tokens": 30,
    }


def test_ls_goes_on_past_a_damaged_entry(keys: list[str], store: Store) -> None:
    damage(store, keys[1])
    (row,) = [row for row in done("ls").stdout.splitlines() if row.startswith(keys[1][:12])]
    assert "damaged" in row
    (line,) = [line for line in map(json.loads, done("ls", "--json").stdout.splitlines()) if line["key"] == keys[1]]
    assert line["image"] is None and line["bytes"] == 40


def test_an_empty_cache(tmp_path: Path) -> None:
    assert len(done("ls").stdout.splitlines()) == 1
    assert done("ls", "--json").stdout == ""
    assert done("info").stdout == f"{tmp_path / 'cache'}: 0 entries, 0 B, limit 20.0 GiB\n"
    for command in (["verify"], ["gc"], ["clear", "--yes"]):
        assert done(*command).stdout == ""
    assert not (tmp_path / "cache").exists()


def test_info_adds_up_per_model(keys: list[str], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRIDPRUNE_CACHE_LIMIT", "5M")
    record = json.loads(done("info", "--json").stdout)
    total = sum(path.stat().st_size for path in store.root.rglob("*.safetensors"))
    assert (record["entries"], record["bytes"], record["limit"]) == (4, total, 5 << 20)
    assert {model["model"]: model["entries"] for model in record["models"]} == {
        "models/llava": 3,
        "scenes": 1,
    }
    assert sum(model["bytes"] for model in record["models"]) == total
    text = done("info").stdout
    assert "4 entries" in text and "limit 5.0 MiB" in text and "models/llava" in text
    monkeypatch.setenv("GRIDPRUNE_CACHE_LIMIT", "0")
    assert "no limit" in done("info").stdout


def test_verify_fails_while_something_broken_stays(keys: list[str], store: Store) -> None:
    assert done("verify").stderr == "4 checked, 0 broken, 0 removed\n"
    path = damage(store, keys[0])
    result = call("verify")
    assert result.exit_code == 1
    assert result.stdout.startswith(f"{path}: cut short") and result.stdout.count("\n") == 1
    assert result.stderr == "4 checked, 1 broken, 0 removed\n"
    assert done("verify", "--delete").stderr == "4 checked, 1 broken, 1 removed\n"
    assert not path.exists()
    assert done("verify").stderr == "3 checked, 0 broken, 0 removed\n"


def test_gc(keys: list[str], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "2 entries" in done("gc", "--older-than", "150min", "--dry-run").stderr
    assert len(list(store.entries())) == 4
    assert "2 entries" in done("gc", "--older-than", "150min").stderr
    assert {entry.key for entry in store.entries()} == set(keys[2:])
    done("gc", "--max-size", "0")
    assert len(list(store.entries())) == 2
    done("gc", "--max-size", "2K")
    assert {entry.key for entry in store.entries()} == {keys[3]}
    monkeypatch.setenv("GRIDPRUNE_CACHE_LIMIT", "10")
    done("gc")
    assert not list(store.entries())


@pytest.mark.parametrize("command", [["gc", "--older-than", "0s"], ["gc", "--max-size", "1"], ["clear", "--yes"]])
def test_what_cannot_be_removed_is_a_failure(
    keys: list[str], store: Store, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "unlink", refuse)
    result = call(*command)
    assert isinstance(result.exception, GridpruneError) and not isinstance(result.exception, BadInput)
    assert str(result.exception) == f"{store.root}: 4 entries can't be removed; see its permissions"
    assert "0 entries, 0 B removed" in result.output
    assert done("gc", "--older-than", "7d").exit_code == 0  # nothing was to go
    monkeypatch.undo()
    assert len(list(store.entries())) == 4


@pytest.mark.parametrize("value", [3, None, ["scenes"], {"a": 1}])
@pytest.mark.parametrize("field", ["model", "name", "image", "tokens"])
def test_a_header_of_no_sense_is_shown_as_damaged(keys: list[str], store: Store, field: str, value: object) -> None:
    """Its digests are right, so that `verify` finds nothing."""
    path = Path(store.find(keys[0]).path)
    header, tensors = files.decode(path.read_bytes())
    path.write_bytes(files.encode(tensors, header | {field: "3" if field == "tokens" else value}))
    for command in (["ls"], ["ls", "--sort", "name"], ["info"]):
        assert done(*command).stdout
    lines = [json.loads(line) for line in done("ls", "--json").stdout.splitlines()]
    assert [line["model"] for line in lines if line["key"] == keys[0]] == [None]
    assert sum(line["model"] is None for line in lines) == 1


def test_a_pipe_in_an_entry_s_place_is_seen_by_every_command(keys: list[str], store: Store) -> None:
    path = Path(store.find(keys[0]).path)
    path.unlink()
    os.mkfifo(path)
    assert "damaged" in done("ls").stdout and done("info").stdout
    result = call("verify")
    assert result.exit_code == 1 and result.stdout == f"{path}: not a regular file\n"
    assert done("verify", "--delete").stderr == "4 checked, 1 broken, 1 removed\n" and not path.exists()
    os.mkfifo(path)
    assert "4 entries" in done("clear", "--yes").stderr and not path.exists()


@pytest.mark.parametrize("arguments", [["--max-size", "much"], ["--older-than", "7"]])
def test_gc_refuses_what_it_cannot_read(keys: list[str], store: Store, arguments: list[str]) -> None:
    result = call("gc", *arguments)
    assert isinstance(result.exception, BadInput) and arguments[0] in describe(result.exception)
    assert len(list(store.entries())) == 4


def test_rm_removes_all_or_none(keys: list[str], store: Store) -> None:
    result = call("rm", keys[0][:12], "0000")
    assert isinstance(result.exception, BadInput)
    assert len(list(store.entries())) == 4
    done("rm", keys[0][:12], keys[0], keys[1][:6])
    assert {entry.key for entry in store.entries()} == set(keys[2:])


def test_clear_needs_a_yes(keys: list[str], store: Store) -> None:
    result = call("clear")
    assert isinstance(result.exception, BadInput) and "--yes" in describe(result.exception)
    assert len(list(store.entries())) == 4
    assert "4 entries" in done("clear", "--yes").stderr
    assert not list(store.entries())


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("\n", 4)])
def test_clear_asks_at_a_terminal(
    keys: list[str], store: Store, monkeypatch: pytest.MonkeyPatch, answer: str, left: int
) -> None:
    class Terminal:
        isatty = staticmethod(lambda: True)

    asked = []
    monkeypatch.setattr(typer, "confirm", lambda question, err: asked.append((question, err)) or answer == "y\n")
    monkeypatch.setattr(output.sys, "stdin", Terminal())
    monkeypatch.setattr(output.sys, "stderr", Terminal())
    assert output.confirm("sure?", False) is (answer == "y\n")
    assert output.confirm("sure?", True) and asked == [("sure?", True)]
    monkeypatch.setattr(output, "confirm", lambda question, yes: answer == "y\n")
    monkeypatch.setattr(output, "say", lambda message: None)
    from gridprune_cli.cli.cache import clear

    clear(store.root, False)
    assert len(list(store.entries())) == left


def test_no_command_touches_an_artefact_in_the_cache_folder(keys: list[str], store: Store) -> None:
    artefact = store.root / "star.safetensors"
    artefact.write_bytes(b"1234")
    done("gc", "--older-than", "0s", "--max-size", "1")
    done("verify", "--delete")
    done("clear", "--yes")
    assert artefact.read_bytes() == b"1234"


def test_help_has_an_example_for_each_command() -> None:
    for command in ("dir", "ls", "info", "verify", "gc", "rm", "clear"):
        assert " Examples:\n\n   " in done(command, "--help").stdout
    assert call().exit_code == 2


def test_no_command_imports_a_tensor_library(keys: list[str], store: Store) -> None:
    code = (
        "import sys; from gridprune_cli.cli.cache import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print({'torch', 'transformers', 'numpy', 'PIL', 'rich.progress'} & set(sys.modules), file=sys.stderr)"
    )
    for arguments in (["ls"], ["ls", "--json"], ["info"], ["verify"], ["gc"], ["rm", keys[0]], ["clear", "--yes"]):
        process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert process.returncode == 0 and process.stderr.endswith("set()\n"), process.stderr


# ---- printing --------------------------------------------------------------------------------------------------------


def test_notices_and_warnings_go_to_stderr_and_quiet_silences_notices(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        with output.notices_on_stderr():
            for quiet in (False, True):
                output.set_quiet(quiet)
                output.say("two\nlines")
                output.warn("careful")
                logging.getLogger("gridprune_cli.somewhere").warning("take `positions=compact`")
                with output.progress("working", 3) as step:
                    step()
    finally:
        output.set_quiet(False)
    warnings = "warning: careful\nwarning: take --positions compact\n"
    assert capfd.readouterr() == ("", "two\\nlines\n" + 2 * warnings)


def test_json_is_one_line_whatever_the_name(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("caf\u00e9\n", "caf\udce9"):
        output.emit_json({"image": name})
        out, _ = capfd.readouterr()
        assert out.count("\n") == 1 and json.loads(out) == {"image": name}
    output.emit_json("\u00e9")
    assert capfd.readouterr().out == '"\u00e9"\n'
    with pytest.raises(ValueError):
        output.emit_json(float("nan"))


def test_a_ctrl_c_that_a_script_has_ignored_stays_ignored(capfd, monkeypatch):
    monkeypatch.setattr(output, "put", lambda text: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        output.emit_json(1)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt):
        output.emit_json(1)


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("name", "size "), [("a", "10"), ("long\tname", "9")])
    assert capsys.readouterr().out == "NAME        SIZE\na             10\nlong\\tname     9\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_153_434, "1.1 MiB"),
        (2**20 - 1, "1.0 MiB"),
        (20 * 2**30, "20.0 GiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3 * 3600, "3 h"),
        (86_400 * 40, "40 d"),
    ],
)
def test_ages_for_people(seconds: float, text: str) -> None:
    assert output.age(seconds) == text
