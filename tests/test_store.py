import errno
import os
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from gridprune_cli.cache import files, sweep
from gridprune_cli.cache.files import RawTensor
from gridprune_cli.cache.layout import BUCKET, SCHEMA
from gridprune_cli.cache.store import DEFAULT_LIMIT, Store, entry_key, open_store, parse_age, parse_size
from gridprune_cli.errors import BadInput

ENCODER = {"family": "llava", "checkpoint": "c0ffee" * 8, "dtype": "bfloat16"}
DAY = 86_400


def made_entry(number: int, *, size: int = 100, name: str = "a.jpg", **header: object) -> tuple[str, bytes]:
    """A key, and the bytes of its entry."""
    image = f"{number:064x}"
    key = entry_key(image, ENCODER, ["saliency"])
    base = {"schema": SCHEMA, "key": key, "image": image, "encoder": ENCODER, "name": name, "tokens": size, "views": []}
    return key, files.encode({"vision_features": RawTensor("U8", (size,), bytes([number % 256]) * size)}, base | header)


def fill(store: Store, count: int, size: int = 1000) -> list[str]:
    """Entries 0 .. count - 1 through another Store, the first one used longest ago. Their keys."""
    keys = []
    other = Store(store.root, None)
    for number in range(count):
        key, data = made_entry(number, size=size)
        assert other.put(ENCODER, key, data)
        keys.append(key)
        used = time.time() - (count - number) * DAY
        os.utime(path_of(store, key), (used, used))
    return keys


def path_of(store: Store, key: str) -> Path:
    (path,) = store.root.glob(f"{BUCKET}/*/{key[:2]}/{key}.safetensors")
    return path


def keys_in(store: Store) -> set[str]:
    return {entry.key for entry in store.entries()}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", None)


# ---- keys and layout -------------------------------------------------------------------------------------------------


def test_keys_stay_what_they_are() -> None:
    encoder = {"family": "llava", "layer": -2, "scale": 0.1, "sizes": [336, 336], "name": "\u00e9"}
    frozen = "71efbcdc4229c99d8c833780d2217ee837e8d9377b773c9a0df2b7f34de4e9ad"
    assert entry_key("ab" * 32, encoder, ["saliency", "relevance"]) == frozen
    assert entry_key("ab" * 32, dict(reversed(encoder.items())), ["relevance", "saliency", "relevance"]) == frozen


@pytest.mark.parametrize(
    ("image", "encoder", "signals"),
    [
        ("cd" * 32, {"a": 1}, ["s"]),
        ("ab" * 32, {"a": 2}, ["s"]),
        ("ab" * 32, {"a": "1"}, ["s"]),
        ("ab" * 32, {"a": 1, "b": None}, ["s"]),
        ("ab" * 32, {"a": 1}, []),
        ("ab" * 32, {"a": 1}, ["s", "t"]),
    ],
)
def test_whatever_changes_the_tokens_changes_the_key(image: str, encoder: dict, signals: list[str]) -> None:
    assert entry_key(image, encoder, signals) != entry_key("ab" * 32, {"a": 1}, ["s"])


def test_layout(store: Store) -> None:
    key, data = made_entry(1)
    store.put(ENCODER, key, data)
    folder = files.digest(ENCODER)[:16]
    assert sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()) == [
        ".gitignore",
        "CACHEDIR.TAG",
        f"visual-v1/{folder}/{key[:2]}/{key}.safetensors",
        f"visual-v1/{folder}/encoder.json",
    ]
    assert (store.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert (store.root / ".gitignore").read_text() == "*\n"
    assert '\n  "family": "llava"' in (store.root / BUCKET / folder / "encoder.json").read_text()


def test_a_folder_with_other_things_is_not_hidden_from_backups_and_git(store: Store) -> None:
    store.root.mkdir()
    (store.root / "thesis.tex").write_text("x")
    assert store.put(ENCODER, *made_entry(1))
    assert sorted(path.name for path in store.root.iterdir()) == ["thesis.tex", BUCKET]


def test_a_path_is_no_key(store: Store) -> None:
    for key in ("../" * 20 + "x", "A" * 64, "a" * 63, ""):
        with pytest.raises(ValueError):
            store.get(ENCODER, key)


# ---- reading and writing ---------------------------------------------------------------------------------------------


def test_what_was_put_is_found_again_by_any_process(store: Store) -> None:
    key, data = made_entry(1)
    assert store.get(ENCODER, key) is None
    assert store.put(ENCODER, key, data)
    assert Store(store.root, None).get(dict(reversed(ENCODER.items())), key) == files.decode(data)
    assert store.get({**ENCODER, "dtype": "float32"}, key) is None


def test_a_group_shares_its_cache(store: Store) -> None:
    before = os.umask(0o002)
    try:
        key, data = made_entry(1)
        store.put(ENCODER, key, data)
    finally:
        os.umask(before)
    path = path_of(store, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path.parent, path.parent.parent)} == {0o775}


def test_a_hit_makes_an_entry_the_last_used(store: Store) -> None:
    keys = fill(store, 3)
    store.get(ENCODER, keys[0])
    assert max(store.entries(), key=lambda entry: entry.used).key == keys[0]


def _flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 4]) + data[-4:]


BREAKS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "cut header": lambda data: data[:50],
    "zeroes": lambda data: bytes(len(data)),
    "flipped bit": _flip,
    "foreign": lambda data: safetensors.numpy.save({"vision_features": np.zeros(100, np.uint8)}),
    "future schema": lambda data: made_entry(1, schema=SCHEMA + 1)[1],
    "earlier schema": lambda data: made_entry(1, schema=SCHEMA - 1)[1],
    "no schema": lambda data: files.encode(files.decode(data)[1], {"key": made_entry(1)[0]}),
    "another key": lambda data: made_entry(2)[1],
    "another encoder": lambda data: made_entry(1, encoder={})[1],
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_entry_is_a_miss_once_and_goes(store: Store, how: str) -> None:
    key, data = made_entry(1)
    store.put(ENCODER, key, data)
    path = path_of(store, key)
    path.write_bytes(BREAKS[how](data))
    ((entry, fault),) = store.verify()
    assert entry.key == key and fault
    assert store.get(ENCODER, key) is None
    assert not path.exists()
    assert store.put(ENCODER, key, data)
    assert store.get(ENCODER, key) == files.decode(data)
    assert [fault for _, fault in store.verify()] == [None]


@pytest.mark.parametrize("how", BREAKS)
def test_putting_again_mends_a_broken_entry(store: Store, how: str) -> None:
    key, data = made_entry(1)
    store.put(ENCODER, key, data)
    path_of(store, key).write_bytes(BREAKS[how](data))
    assert store.put(ENCODER, key, data)
    assert store.get(ENCODER, key) == files.decode(data)


def test_an_equal_entry_is_not_written_again_and_a_new_one_replaces_it(store: Store) -> None:
    key, data = made_entry(1)
    store.put(ENCODER, key, data)
    file = path_of(store, key).stat().st_ino
    assert store.put(ENCODER, key, data)
    assert path_of(store, key).stat().st_ino == file
    assert store.put(ENCODER, key, made_entry(1, name="b.jpg")[1])
    assert store.get(ENCODER, key)[0]["name"] == "b.jpg"


def test_the_bytes_of_an_entry_without_reading_it(store: Store) -> None:
    key, data = made_entry(1)
    assert store.bytes_of(ENCODER, key) is None
    store.put(ENCODER, key, data)
    path = path_of(store, key)
    os.utime(path, (5, 5))
    assert store.bytes_of(ENCODER, key) == len(data) and path.stat().st_mtime == 5
    path.write_bytes(b"broken")
    assert store.bytes_of(ENCODER, key) == 6
    path.unlink()
    path.mkdir()
    assert store.bytes_of(ENCODER, key) is None


def test_what_is_not_to_be_written_is_not_remembered(store: Store) -> None:
    store.writable = False
    store.remember("a" * 64, "b" * 64)
    assert not store.root.exists()
    store.writable = True
    store.remember("a" * 64, "b" * 64)
    assert store.recall("a" * 64) == "b" * 64


def test_an_entry_that_is_a_folder_or_a_dangling_link_is_a_miss(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    key, data = made_entry(1)
    store.put(ENCODER, key, data)
    path = path_of(store, key)
    path.unlink()
    path.symlink_to("nowhere")
    assert store.get(ENCODER, key) is None
    path.unlink()
    path.mkdir()
    (path / "thesis.tex").write_text("x")
    assert store.get(ENCODER, key) is None
    assert not store.put(ENCODER, key, data) and "this is no file" in caplog.text
    assert (path / "thesis.tex").exists() and store.writable  # it is the one entry that can't be written
    assert store.put(ENCODER, *made_entry(2))
    (path / "thesis.tex").unlink()
    assert store.put(ENCODER, key, data) and store.get(ENCODER, key) == files.decode(data)


PLACED: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link to a pipe": lambda path: (os.mkfifo(path.with_suffix(".x")), path.symlink_to(path.with_suffix(".x"))),
    "300 GB of nothing": lambda path: (path.touch(), os.truncate(path, 300 << 30)),
}


@pytest.mark.parametrize("what", PLACED)
def test_what_stands_in_an_entry_s_place_is_a_miss_and_goes(store: Store, what: str) -> None:
    key, data = made_entry(1)
    store.put(ENCODER, key, data)
    path = path_of(store, key)

    def place() -> None:
        path.unlink(missing_ok=True)
        PLACED[what](path)

    for act in (lambda: store.get(ENCODER, key) is None, lambda: store.put(ENCODER, key, data)):
        place()
        assert act() and store.put(ENCODER, key, data)
        assert store.get(ENCODER, key) == files.decode(data)
        path.with_suffix(".x").unlink(missing_ok=True)
    place()
    if "link" in what:  # links are never followed by a walk
        assert list(store.verify()) == [] and store.clear().entries == 0
        return
    ((entry, fault),) = store.verify()
    assert entry.key == key and ("not a safetensors file" in fault or "not a regular file" in fault)
    assert [entry.key for entry, _ in store.verify(delete=True)] == [key] and not os.path.lexists(path)
    place()
    assert store.clear().entries == 1 and not os.path.lexists(path)


def test_an_entry_too_large_to_be_read_again_is_not_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 2000)
    assert not store.put(ENCODER, *made_entry(1, size=2000)) and "not cached" in caplog.text
    assert store.writable and store.put(ENCODER, *made_entry(2))


def test_what_is_remembered_is_read_from_a_small_file_alone(store: Store) -> None:
    store.remember("a", "0" * 64)
    path = store.root / "remembered.json"
    path.unlink()
    os.mkfifo(path)
    assert store.recall("a") is None
    path.unlink()
    path.touch()
    os.truncate(path, 300 << 30)
    assert store.recall("a") is None
    store.remember("a", "0" * 64)
    assert store.recall("a") == "0" * 64


# ---- a cache that can't be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_warns_once_and_stays_readable(
    store: Store, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    key, data = made_entry(1)
    store.put(ENCODER, key, data)
    real = os.open

    def refuse(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    warnings: list[str] = []
    broken = Store(store.root, 10, warnings.append)
    assert [broken.put(ENCODER, *made_entry(number)) for number in (2, 3)] == [False, False]
    assert len(warnings) == 1 and os.strerror(code) in warnings[0] and str(store.root) in warnings[0]
    assert broken.get(ENCODER, key) == files.decode(data)
    monkeypatch.undo()
    assert keys_in(store) == {key}


@pytest.mark.parametrize("place", ["cache", f"cache/{BUCKET}"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("not a folder")
    store = Store(tmp_path / "cache", 10**6)
    key, data = made_entry(1)
    assert not store.put(ENCODER, key, data)
    assert not store.put(ENCODER, key, data)
    (record,) = caplog.records
    assert "going on without it" in record.message and record.name == "gridprune_cli.cache.store"
    assert store.get(ENCODER, key) is None
    assert list(store.entries()) == []
    store.gc(max_bytes=1)
    store.clear()
    assert (tmp_path / place).read_text() == "not a folder"


def test_a_full_disk_leaves_no_part_of_an_entry(store: Store) -> None:
    run(
        store,
        "import resource; from tests.test_store import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "warnings = []; store = Store(Path(sys.argv[1]), None, warnings.append)\n"
        "assert store.put(ENCODER, *made_entry(1)) and not store.put(ENCODER, *made_entry(2, size=200_000)), warnings\n"
        "assert len(warnings) == 1, warnings",
    )
    assert keys_in(store) == {made_entry(1)[0]}
    assert not list(store.root.rglob("*.tmp"))


# ---- several processes -----------------------------------------------------------------------------------------------


def start(store: Store, code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-B", "-c", code, str(store.root), *arguments]  # -B: a limit would cut what it writes
    root = Path(__file__).parent.parent
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root)


def run(store: Store, code: str) -> None:
    process = start(store, code)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error


def test_a_reader_never_sees_a_part_of_what_eight_writers_write(store: Store) -> None:
    code = (
        "import fcntl, sys; from pathlib import Path; from tests.test_store import *\n"
        "fcntl.flock = fcntl.lockf = lambda *a: None\n"  # file systems exist where locks hold nobody up
        "store = Store(Path(sys.argv[1]), None); me = int(sys.argv[2])\n"
        "for round in range(15):\n"
        "    for number in (0, 1, 2, 100 + me):\n"
        "        assert store.put(ENCODER, *made_entry(number, size=300_000, name=f'{me} {round}'))\n"
    )
    writers = [start(store, code, str(number)) for number in range(8)]
    keys = {made_entry(number)[0]: number for number in (0, 1, 2, *range(100, 108))}
    seen: dict[str, int] = dict.fromkeys(keys, 0)
    while any(writer.poll() is None for writer in writers):
        for key, number in keys.items():
            hit = store.get(ENCODER, key)
            assert hit or not seen[key], "an entry that was there is gone: it was read in part, and removed"
            if hit:
                seen[key] += 1
                assert hit[1]["vision_features"].data == bytes([number]) * 300_000
    assert [writer.communicate()[1] for writer in writers] == [""] * 8
    assert keys_in(store) == set(keys)
    assert all(fault is None for _, fault in store.verify())
    assert not list(store.root.rglob("*.tmp"))
    assert sum(seen.values()) > 0


def test_a_writer_that_is_killed_leaves_no_entry_and_gc_sweeps_up(store: Store) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.test_store import *\n"
        "store = Store(Path(sys.argv[1]), None); store.put(ENCODER, *made_entry(1))\n"
        "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "store.put(ENCODER, *made_entry(2))\n"
    )
    process = start(store, code)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    (left,) = store.root.rglob("*.tmp")
    assert keys_in(store) == {made_entry(1)[0]}
    assert store.get(ENCODER, made_entry(2)[0]) is None
    store.gc()
    assert left.exists()  # it could be a writer that is still at work
    os.utime(left, (time.time() - 2 * DAY,) * 2)
    store.gc(dry_run=True)
    assert left.exists()
    store.gc()
    assert not left.exists()
    assert keys_in(store) == {made_entry(1)[0]}


@pytest.mark.parametrize("name", ["CACHEDIR.TAG", ".gitignore", "remembered.json"])
def test_a_writer_that_is_killed_at_a_file_of_the_root_leaves_what_gc_and_clear_see(store: Store, name: str) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.test_store import *\n"
        "store, real = Store(Path(sys.argv[1]), None), os.replace\n"
        "def replace(old, new):\n"
        f"    os.kill(os.getpid(), signal.SIGKILL) if new.name == {name!r} else real(old, new)\n"
        "os.replace = replace\n"
        "store.remember('a', '0' * 64); store.put(ENCODER, *made_entry(1))\n"
    )
    for number, clean in enumerate((Store.clear, Store.gc)):
        process = start(store, code)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        (left,) = store.root.glob("*.tmp")
        store.gc()
        assert left.exists()  # it could be a writer that is still at work
        os.utime(left, (0, 0))
        clean(store)
        assert not list(store.root.rglob("*.tmp"))
        assert Store(store.root, None).put(ENCODER, *made_entry(2 + number))
        assert {"CACHEDIR.TAG", ".gitignore"} <= {path.name for path in store.root.iterdir()}
        for mark in ("CACHEDIR.TAG", ".gitignore", "remembered.json"):
            (store.root / mark).unlink(missing_ok=True)


def test_a_gitignore_of_somebody_else_s_marks_another_folder(store: Store) -> None:
    store.root.mkdir()
    (store.root / ".gitignore").write_text("*.pdf\n")
    assert store.put(ENCODER, *made_entry(1))
    assert not (store.root / "CACHEDIR.TAG").exists()
    assert (store.root / ".gitignore").read_text() == "*.pdf\n"


def test_nothing_is_read_wrong_or_left_behind_under_kill_9(store: Store) -> None:
    """Some seconds of what `python tests/fuzz/crash.py SECONDS` does for as long as one likes."""
    code = "import sys; from tests.fuzz.crash import *; print(soak(4, Path(sys.argv[1])))"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.root)], capture_output=True, text=True, cwd=root, timeout=60
    )
    assert done.returncode == 0 and done.stdout.endswith(", [])\n"), done.stdout + done.stderr
    assert done.stderr == "" and "'hits': " in done.stdout


def test_entries_that_vanish_during_a_walk_are_left_out(store: Store) -> None:
    fill(store, 40)
    seen = 0
    for _ in store.entries():
        seen += 1
        Store(store.root, None).clear()
    assert 1 <= seen < 40
    fill(store, 40)
    assert sum(1 for _ in store.verify() if Store(store.root, None).clear()) < 40


def test_a_clear_while_an_entry_is_written_does_not_stop_the_writer(store: Store, monkeypatch) -> None:
    write, cleared = files.write_atomic, []

    def clear_first(path: Path, data: bytes, *, sync: bool) -> None:
        if path.suffix == ".safetensors" and not cleared:
            cleared.append(Store(store.root, None).clear())
        write(path, data, sync=sync)

    monkeypatch.setattr(files, "write_atomic", clear_first)
    fill(store, 2)
    assert cleared and keys_in(store) == {made_entry(0)[0], made_entry(1)[0]}


# ---- the limit -------------------------------------------------------------------------------------------------------


def test_gc_removes_the_least_recently_used_down_to_nine_tenths(store: Store) -> None:
    keys = fill(store, 20)
    store.get(ENCODER, keys[0])
    size = path_of(store, keys[0]).stat().st_size
    before = tree(store.root)
    would = store.gc(max_bytes=10 * size, dry_run=True)
    assert tree(store.root) == before
    removed = store.gc(max_bytes=10 * size)
    assert removed == would
    assert (removed.entries, removed.bytes, removed.kept_entries, removed.kept_bytes) == (11, 11 * size, 9, 9 * size)
    assert keys_in(store) == {keys[0], *keys[12:]}


def test_what_another_process_removed_first_is_neither_kept_nor_stuck(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = path_of(store, fill(store, 10)[0]).stat().st_size
    monkeypatch.setattr(sweep.layout, "remove", lambda path: Path(path).unlink(missing_ok=True))  # not this one
    warnings: list[str] = []
    with Store(store.root, 4 * size, warnings.append) as limited:
        limited.put(ENCODER, *made_entry(100, size=1000))
    removed = store.gc(max_bytes=2 * size)
    left = [entry.bytes for entry in store.entries()]
    assert not warnings and removed == sweep.Removed(0, 0, len(left), sum(left))
    assert sweep.clear(store.root).stuck == 0


def test_gc_at_the_limit_removes_nothing(store: Store) -> None:
    keys = fill(store, 5)
    size = path_of(store, keys[0]).stat().st_size
    assert store.gc(max_bytes=5 * size).entries == 0
    assert store.gc(max_bytes=5 * size - 1).entries == 1
    assert store.gc(max_bytes=None).entries == 0


def test_gc_by_age(store: Store) -> None:
    keys = fill(store, 10)  # used 10 .. 1 days ago
    assert store.gc(older_than=3.5 * DAY).entries == 7
    assert keys_in(store) == set(keys[7:])


def test_what_a_command_wrote_outlives_its_own_clean_up(store: Store) -> None:
    old = fill(store, 10)
    size = path_of(store, old[0]).stat().st_size
    new = [made_entry(number, size=1000) for number in range(100, 105)]
    with Store(store.root, 4 * size) as limited:
        for key, data in new:
            limited.put(ENCODER, key, data)
    assert keys_in(store) == {key for key, _ in new}
    with Store(store.root, 4 * size) as limited:
        limited.put(ENCODER, *made_entry(200, size=1000))
    assert keys_in(store) < {made_entry(200)[0], *(key for key, _ in new)}
    assert made_entry(200)[0] in keys_in(store)
    assert sum(entry.bytes for entry in store.entries()) <= 4 * size


def test_what_a_command_wrote_again_outlives_its_clean_up_too(store: Store) -> None:
    old = fill(store, 10)
    size = path_of(store, old[0]).stat().st_size
    with Store(store.root, 4 * size) as limited:
        limited.put(ENCODER, *made_entry(0, size=1000))  # the one that was used longest ago, with equal bytes
        limited.put(ENCODER, *made_entry(100, size=1000))
    assert {old[0], made_entry(100)[0]} < keys_in(store)
    assert time.time() - path_of(store, old[0]).stat().st_mtime < DAY


@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_is_written_behind_a_link_where_no_walk_would_find_it(store: Store, tmp_path: Path, depth: int) -> None:
    fill(store, 1)
    place = path_of(store, made_entry(0)[0]).parents[3 - depth]
    place.rename(tmp_path / "larger disk")
    place.symlink_to(tmp_path / "larger disk")
    warnings: list[str] = []
    linked = Store(store.root, None, warnings.append)
    assert not linked.put(ENCODER, *made_entry(1)) and not linked.put(ENCODER, *made_entry(2)) and not linked.writable
    assert len(warnings) == 1 and "is a link; link the cache's folder itself, or use GRIDPRUNE" in warnings[0]
    assert len(list((tmp_path / "larger disk").rglob("*.safetensors"))) == 1


def test_a_look_without_touching_changes_nothing(store: Store) -> None:
    whole, broken = fill(store, 2)
    path_of(store, broken).write_bytes(b"x")
    before = tree(store.root)
    assert store.get(ENCODER, whole, touch=False) is not None and store.get(ENCODER, broken, touch=False) is None
    assert tree(store.root) == before


def test_what_was_released_goes_for_the_limit_like_all_else(store: Store) -> None:
    new = [made_entry(number, size=1000) for number in range(100, 105)]
    size = len(new[0][1])
    limited = Store(store.root, 4 * size)
    for key, data in new:
        limited.put(ENCODER, key, data)
    limited.finish()
    assert len(keys_in(store)) == 5
    limited.release()
    limited.put(ENCODER, *made_entry(200, size=1000))
    limited.finish()
    assert sum(entry.bytes for entry in store.entries()) <= 4 * size and made_entry(200)[0] in keys_in(store)


def test_the_limit_is_looked_at_once_in_a_tenth_of_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    trim = sweep.trim

    def count(*arguments: object, **named: object) -> object:
        nonlocal looks
        looks += 1
        return trim(*arguments, **named)

    monkeypatch.setattr(sweep, "trim", count)
    size = len(made_entry(0, size=1000)[1])
    with Store(store.root, 100 * size) as limited:
        for number in range(44):
            limited.put(ENCODER, *made_entry(number, size=1000))
        limited.finish()
        limited.get(ENCODER, made_entry(1)[0])
    assert looks == 4  # after 11, 22, 33 and 44; `finish` has nothing left to look at, and neither has a hit
    with Store(store.root, 100 * size) as limited:
        limited.put(ENCODER, *made_entry(99))
    assert looks == 5


def test_only_files_of_our_own_are_ever_removed(store: Store, tmp_path: Path) -> None:
    keys = fill(store, 2)
    encoder = path_of(store, keys[0]).parent.parent
    outside = tmp_path / "outside"
    (outside / "ab").mkdir(parents=True)
    precious = outside / "ab" / ("ab" * 32 + ".safetensors")
    precious.write_text("x")
    (store.root / BUCKET / ("0" * 16)).symlink_to(outside)
    (encoder / "ab").mkdir(exist_ok=True)
    (encoder / "ab" / ("ab" * 32 + ".safetensors")).symlink_to(precious)
    others = [
        store.root / "thesis.tex",
        encoder / "notes.txt",
        encoder / "ab" / "x.tmp",
        store.root / "visual-v0" / "x",
    ]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("x")
        os.utime(other, (0, 0))
    store.gc(max_bytes=1, older_than=0)
    store.clear()
    assert precious.exists() and all(other.exists() for other in others)
    assert keys_in(store) == set()


def test_gc_removes_the_buckets_of_earlier_layouts_and_clear_of_all(store: Store) -> None:
    (key,) = fill(store, 1)
    for version in (0, 2):
        path = store.root / f"visual-v{version}" / ("0" * 16) / key[:2] / f"{key}.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"1234")
    store.gc()
    assert sorted(path.name for path in store.root.glob("visual-*")) == ["visual-v1", "visual-v2"]
    removed = store.clear()
    assert removed.entries == 2
    assert sorted(path.name for path in store.root.iterdir()) == [".gitignore", "CACHEDIR.TAG"]


# ---- looking and removing --------------------------------------------------------------------------------------------


def test_verify_names_what_is_broken_and_removes_it_if_asked(store: Store) -> None:
    keys = fill(store, 4)
    path_of(store, keys[1]).write_bytes(b"x" * 50)
    faults = {entry.key: fault for entry, fault in store.verify()}
    assert set(faults) == set(keys)
    assert [key for key, fault in faults.items() if fault] == [keys[1]]
    assert keys_in(store) == set(keys)
    assert sum(fault is not None for _, fault in store.verify(delete=True)) == 1
    assert keys_in(store) == set(keys) - {keys[1]}


def test_an_entry_is_found_by_the_start_of_its_key(store: Store) -> None:
    keys = fill(store, 3)
    assert store.find(keys[1][:10]).key == keys[1]
    assert store.find(keys[1]).header()["image"] == f"{1:064x}"
    twin = path_of(store, keys[1]).with_name(keys[1][:-1] + ("0" if keys[1][-1] != "0" else "1") + ".safetensors")
    twin.write_bytes(b"x")
    with pytest.raises(BadInput, match="2 keys"):
        store.find(keys[1][:10])
    for wrong in ("abc", "", "ABCDEF", "../../x", "abcdxyz"):
        with pytest.raises(BadInput, match="not a key"):
            store.find(wrong)
    with pytest.raises(BadInput, match="no such key"):
        store.remove("0" * 64)
    assert store.remove(keys[2][:8]).key == keys[2]
    assert keys_in(store) == {keys[0], keys[1], twin.stem}


def test_a_missing_cache_is_an_empty_one(store: Store) -> None:
    assert list(store.entries()) == [] == list(store.verify())
    assert store.gc(max_bytes=1).entries == store.clear().entries == 0
    assert not store.root.exists()


def test_entries_come_one_at_a_time(store: Store) -> None:
    (key,) = fill(store, 1)
    folder = path_of(store, key).parent
    for number in range(5000):
        (folder / f"{key[:2]}{number:062x}.safetensors").touch()
    tracemalloc.start()
    assert sum(1 for _ in store.entries()) == 5001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # bytes; a list of them takes over a million


# ---- settings --------------------------------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", "/a/b")
    assert open_store().root == Path("/a/b")
    assert open_store(tmp_path).root == tmp_path
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", "~/b")
    assert open_store().root == Path("/home/someone/b")
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert open_store().root == Path("/x/gridprune")
    for relative in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert open_store().root == Path("/home/someone/.cache/gridprune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert open_store().root == Path("/home/someone/.cache/gridprune")


def test_how_large_it_may_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store().limit == parse_size(DEFAULT_LIMIT) == 20 * 2**30
    monkeypatch.setenv("GRIDPRUNE_CACHE_LIMIT", "500M")
    assert open_store().limit == 500 * 2**20
    monkeypatch.setenv("GRIDPRUNE_CACHE_LIMIT", "0")
    assert open_store().limit is None
    monkeypatch.setenv("GRIDPRUNE_CACHE_LIMIT", "lots")
    with pytest.raises(BadInput, match=r"^GRIDPRUNE_CACHE_LIMIT: 'lots' is no size"):
        open_store()


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("12", 12), ("3K", 3072), ("500M", 500 << 20), ("2GiB", 2 << 30), ("1T", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "20 G", "20g", "20GB", "-1", "+1", "1.5G", "1e3", "\u0663G", "20G\n", "1_0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match=r"^max_size: .*; write bytes or"):
        parse_size(text, "max_size")


@pytest.mark.parametrize(
    ("text", "age"), [("90s", 90), ("30min", 1800), ("12h", 43_200), ("7d", 7 * DAY), ("2w", 14 * DAY)]
)
def test_ages(text: str, age: int) -> None:
    assert parse_age(text) == age


@pytest.mark.parametrize("text", ["", "7", "d", "-7d", "7 d", "7m", "1.5h", "7days"])
def test_ages_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match=r"^older_than: .*; write a whole number"):
        parse_age(text, "older_than")


def test_no_warning_where_all_is_well(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    assert store.put(ENCODER, *made_entry(1))
    assert store.get(ENCODER, made_entry(1)[0]) and not caplog.records
