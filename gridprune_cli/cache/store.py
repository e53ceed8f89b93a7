"""The cache of encoded images: one entry is one file, found by what it was made from.

Correctness rests on no lock: files appear whole by a rename, are never changed, and are checked in full when read.
Any trouble with an entry is a miss. A file's modification time is when it was last used.

    <root>/visual-v1/<16 hex of the encoder's digest>/<2 hex of the key>/<key>.safetensors
    <root>/remembered.json      a few digests that take long to compute
"""

import json
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gridprune_cli.cache import files
from gridprune_cli.cache.files import FileFault, RawTensor
from gridprune_cli.errors import BadInput, GridpruneError

SCHEMA = 2
BUCKET = "visual-v1"
DEFAULT_LIMIT = "20G"
TAG, IGNORE, REMEMBERED = "CACHEDIR.TAG", ".gitignore", "remembered.json"  # the root's own files
MOST_REMEMBERED = 64
_LONGEST_REMEMBERED = 1 << 16  # bytes; as many as there are at most take 9 KiB
_TRIES = 3  # to write an entry whose folder vanishes
TEMPORARY_LIFE = 86_400.0  # seconds after which a writer's temporary file counts as left behind

_BUCKET = re.compile(r"visual-v(\d+)")
_ENCODER = re.compile(r"[0-9a-f]{16}")
_FAN = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"([0-9a-f]{64})\.safetensors")
_TEMPORARY = re.compile(r"\.([0-9a-f]{64}\.safetensors|encoder\.json)\.\d+\.[0-9a-f]{8}\.tmp")
_ROOT_TEMPORARY = re.compile(r"\.(CACHEDIR\.TAG|\.gitignore|remembered\.json)\.\d+\.[0-9a-f]{8}\.tmp")

_EVERYTHING = b"*\n"  # what the root's .gitignore names
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder holds the cache of gridprune; all of it can be made again.\n"
    "# For information about cache directory tags, see https://bford.info/cachedir/\n"
)


def entry_key(image_sha256: str, encoder: Mapping[str, Any], signals: Sequence[str]) -> str:
    """The key, 64 hex digits: the image's bytes, how it is encoded, and what is kept beside the tokens (a set)."""
    return files.digest({"image": image_sha256, "encoder": encoder, "signals": sorted(set(signals))})


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache as a walk finds it. `used` is in seconds since 1970."""

    key: str
    encoder: str  # the folder's 16 hex digits
    path: str
    bytes: int
    used: float

    def header(self) -> dict[str, Any]:
        """What the file says about itself. Raises FileFault, or OSError where it has gone."""
        return files.read_header(self.path)


@dataclass(frozen=True)
class Removed:
    """What a clean-up took (or would take), and what entries stay. `stuck` of them should have gone, but can't."""

    entries: int
    bytes: int
    kept_entries: int
    kept_bytes: int
    stuck: int = 0


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


class Store:
    """The cache under `root`, at most `limit` bytes of entries (None: no limit).

    Use it as a context manager, or call `finish`, so that the limit is kept; before that it is looked at each time a
    tenth of it was written. Entries written through this object are never removed for it.
    """

    def __init__(self, root: Path, limit: int | None, warn: Callable[[str], None] = _warn) -> None:
        self.root = root
        self.limit = limit
        self._warn = warn
        self.writable = True  # until a write fails, or the user wants none
        self._over = False
        self._marked = False  # whether the root was looked at for its tag
        self._own: set[str] = set()
        self._unchecked = 0  # bytes written since the last look

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def get(self, encoder: Mapping[str, Any], key: str) -> tuple[dict[str, Any], dict[str, RawTensor]] | None:
        """Header and tensors of an entry, or None. A broken entry is removed, and is None."""
        path = self._path(encoder, key)
        try:
            found = _load(path)
        except FileFault:
            _remove(str(path))
            return None
        except OSError:
            return None
        with suppress(OSError):  # at every hit: beside reading and checking it costs nothing, and the order is exact
            os.utime(path)
        return found

    def put(self, encoder: Mapping[str, Any], key: str, data: bytes) -> bool:
        """Store an encoded file whose header has at least schema, key and encoder. An equal file stays untouched.

        False where it can't be written, with one warning per Store: work goes on without the cache. False too, with a
        warning of its own, for an entry that is too large to be read again, or whose place something else holds.
        """
        path = self._path(encoder, key)
        if len(data) > files.MAX_BYTES:
            self._warn(f"{path}: not cached, since {len(data)} bytes are more than the {files.MAX_BYTES} of an entry")
            return False
        with suppress(OSError, FileFault):
            if files.read_bytes(path, len(data)) == data:
                return True
        if _irregular(path) and not _remove(str(path)) and _irregular(path):
            self._warn(f"{path}: not cached, since this is no file and can't be removed; remove it")
            return False
        for more in reversed(range(_TRIES)):
            try:
                self._prepare(path.parent.parent, encoder)
                path.parent.mkdir(exist_ok=True)
                files.write_atomic(path, data, sync=False)
                break
            except (OSError, GridpruneError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__ or error
            if more and isinstance(cause, FileNotFoundError | FileExistsError):  # another process clears folders, too
                continue
            if self.writable:
                self.writable = False
                reason = getattr(cause, "strerror", None) or cause
                self._warn(f"{self.root}: the cache can't be written ({reason}); going on without it")
            return False
        self.adopt([(str(path), len(data))])
        return True

    def adopt(self, written: Sequence[tuple[str, int]]) -> None:
        """Take entries, path and bytes, as written through this object, which another process of the run wrote."""
        self._own.update(path for path, _ in written)
        self._unchecked += sum(size for _, size in written)
        if self.limit is not None and self._unchecked > self.limit // 10:
            self.finish()

    def holds(self, encoder: Mapping[str, Any], key: str) -> bool:
        """Whether there is a file for an entry. Only `get` tells whether it is whole."""
        return self.bytes_of(encoder, key) is not None

    def bytes_of(self, encoder: Mapping[str, Any], key: str) -> int | None:
        """Bytes of an entry, or None where there is none. It is neither read nor checked, nor counts as used."""
        try:
            status = self._path(encoder, key).lstat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def recall(self, key: str) -> str | None:
        """What was remembered under a key, a digest in hex."""
        value = self._remembered().get(key)
        return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else None

    def remember(self, key: str, value: str) -> None:
        """Keep a digest for later, the last few of them. It may be lost at any time, to another process above all."""
        if not self.writable:
            return
        kept = {**self._remembered(), key: value}
        with suppress(OSError, GridpruneError):
            self._make_root()
            text = json.dumps(dict(list(kept.items())[-MOST_REMEMBERED:]))
            files.write_atomic(self.root / REMEMBERED, text.encode(), sync=False)

    def _remembered(self) -> dict[str, Any]:
        with suppress(OSError, FileFault, ValueError, RecursionError):
            found = json.loads(files.read_bytes(self.root / REMEMBERED, _LONGEST_REMEMBERED))
            return found if isinstance(found, dict) else {}
        return {}

    def finish(self) -> None:
        """Keep the limit, if anything was written since the last look: one walk over the cache."""
        if self.limit is not None and self._unchecked:
            self._unchecked = 0
            left = self._trim(self.limit, older_than=None, dry_run=False).kept_bytes
            if left > self.limit and not self._over:
                self._over = True
                self._warn(
                    f"{self.root}: over its limit of {self.limit} bytes, since what is being written stays; "
                    "set a higher --cache-limit, or it goes with the next command"
                )

    def entries(self) -> Iterator[Entry]:
        """Every entry, in no order, one at a time; those that vanish meanwhile are left out.

        What has an entry's name and is no regular file, as a pipe or a folder, is one too: a broken one, of 0 bytes.
        """
        for item, encoder in _walk(self.root / BUCKET):
            if (match := _ENTRY.fullmatch(item.name)) and (found := _entry(item, encoder, match[1])):
                yield found

    def verify(self, *, delete: bool = False) -> Iterator[tuple[Entry, str | None]]:
        """Read every entry in full: the entry and what is wrong with it, or None. `delete` removes the broken."""
        for entry in self.entries():
            fault = None
            try:
                _load(Path(entry.path))
            except FileNotFoundError:
                continue
            except FileFault as error:
                fault = str(error)
            except OSError as error:
                fault = f"can't be read ({error.strerror or error})"
            if fault and delete:
                _remove(entry.path)
            yield entry, fault

    def gc(self, *, max_bytes: int | None = None, older_than: float | None = None, dry_run: bool = False) -> Removed:
        """Remove entries unused for `older_than` seconds; then, if more than `max_bytes` are left, the least recently
        used ones, down to 90 % of it. Sweeps temporary files older than a day, and buckets of earlier layouts.
        """
        removed = self._trim(max_bytes, older_than, dry_run)
        if not dry_run:
            self._sweep()
        return removed

    def find(self, prefix: str) -> Entry:
        """The one entry whose key starts with `prefix`, four hex digits or more. BadInput for none or several."""
        if not re.fullmatch(r"[0-9a-f]{4,64}", prefix):
            raise BadInput(f"{prefix}: not a key; give four or more of the hex digits that `gridprune cache ls` prints")
        found = [
            entry
            for item, encoder in _walk(self.root / BUCKET, fan=prefix[:2])
            if (match := _ENTRY.fullmatch(item.name)) and match[1].startswith(prefix)
            if (entry := _entry(item, encoder, match[1]))
        ]
        if not found:
            raise BadInput(f"{prefix}: no such key in {self.root}; see `gridprune cache ls`")
        if len(found) > 1:
            raise BadInput(f"{prefix}: {len(found)} keys start so; give more digits")
        return found[0]

    def remove(self, prefix: str) -> Entry:
        """Remove the entry that `find` finds, and return it. Raises BadInput as `find` does."""
        entry = self.find(prefix)
        if not _remove(entry.path) and os.path.lexists(entry.path):
            raise GridpruneError(f"{entry.path}: can't be removed; see to the permissions of its folder")
        return entry

    def clear(self) -> Removed:
        """Remove every file of ours, of every layout's version. Whatever else lies in the folder stays."""
        entries = size = left = left_size = 0
        for bucket in _folders(self.root, _BUCKET):
            for item, encoder in _walk(bucket):
                match = _ENTRY.fullmatch(item.name)
                entry = _entry(item, encoder, match[1]) if match else None
                gone = _remove(item.path)
                if entry and gone:
                    entries, size = entries + 1, size + entry.bytes
                elif entry:
                    left, left_size = left + 1, left_size + entry.bytes
            _remove_empty(bucket)
        _remove(os.path.join(self.root, REMEMBERED))
        for item in self._root_temporaries():
            _remove(item.path)
        return Removed(entries, size, left, left_size, stuck=left)

    def _path(self, encoder: Mapping[str, Any], key: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"not a key: {key!r}")
        return self.root / BUCKET / _encoder_name(encoder) / key[:2] / f"{key}.safetensors"

    def _prepare(self, folder: Path, encoder: Mapping[str, Any]) -> None:
        """Make the folders, mark the root as a cache, and say in words what the encoder's folder is for."""
        if not self._marked:
            self._make_root()
        if (folder / "encoder.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(encoder, indent=2, sort_keys=True) + "\n"
        files.write_atomic(folder / "encoder.json", text.encode(), sync=False)

    def _make_root(self) -> None:
        """The root's folder, and what marks it as a cache, where a killed writer left it without, too."""
        self.root.mkdir(parents=True, exist_ok=True)
        marks = {self.root / TAG: _TAG.encode(), self.root / IGNORE: _EVERYTHING}
        missing = [path for path in marks if not path.exists()]
        if missing and self._root_is_ours():
            for path in missing:
                files.write_atomic(path, marks[path], sync=False)
        self._marked = True

    def _root_is_ours(self) -> bool:
        """Whether nothing but the cache is in the root: another folder is not ours to hide from backups and git."""
        with os.scandir(self.root) as items:
            for item in items:
                if item.name == IGNORE:
                    with suppress(OSError, FileFault):
                        if files.read_bytes(item.path, len(_EVERYTHING)) == _EVERYTHING:
                            continue
                    return False
                known = item.name in (TAG, REMEMBERED) or _BUCKET.fullmatch(item.name)
                if not (known or _ROOT_TEMPORARY.fullmatch(item.name)):
                    return False
        return True

    def _root_temporaries(self) -> list[os.DirEntry[str]]:
        """What writers of the root's own files are writing, or left behind."""
        with suppress(OSError), os.scandir(self.root) as items:
            return [i for i in items if _ROOT_TEMPORARY.fullmatch(i.name) and not i.is_symlink()]
        return []

    def _trim(self, max_bytes: int | None, older_than: float | None, dry_run: bool) -> Removed:
        oldest = time.time() - older_than if older_than is not None else float("-inf")
        entries = sorted((entry.used, entry.bytes, entry.path) for entry in self.entries())  # least recently used first
        stale = [entry for entry in entries if entry[0] < oldest]
        fresh = entries[len(stale) :]
        kept = sum(size for _, size, _ in fresh)
        if max_bytes is not None and kept > max_bytes:
            for entry in fresh:
                if kept <= max_bytes * 9 // 10:
                    break
                if entry[2] not in self._own:
                    stale.append(entry)
                    kept -= entry[1]
        gone, stuck = [], 0
        for _, size, path in stale:
            if dry_run or _remove(path):
                gone.append(size)
            else:
                stuck += os.path.lexists(path)  # else another process was faster
        total = sum(size for _, size, _ in entries)
        return Removed(len(gone), sum(gone), len(entries) - len(gone), total - sum(gone), stuck)

    def _sweep(self) -> None:
        oldest = time.time() - TEMPORARY_LIFE
        current = int(BUCKET.removeprefix("visual-v"))
        for item in self._root_temporaries():
            with suppress(OSError):
                if item.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(item.path)
        for bucket in _folders(self.root, _BUCKET):
            outdated = int(bucket.name.removeprefix("visual-v")) < current  # a newer gridprune may be using a newer one
            for item, _ in _walk(bucket):
                with suppress(OSError):
                    temporary = _TEMPORARY.fullmatch(item.name)
                    if outdated or (temporary and item.stat(follow_symlinks=False).st_mtime < oldest):
                        os.unlink(item.path)
            if outdated:
                _remove_empty(bucket)


def open_store(root: Path | None = None, warn: Callable[[str], None] = _warn) -> Store:
    """The cache at `root`, or where the environment says. Raises BadInput on a setting that can't be read."""
    limit = parse_size(os.environ.get("GRIDPRUNE_CACHE_LIMIT") or DEFAULT_LIMIT, "GRIDPRUNE_CACHE_LIMIT")
    return Store(Path(os.path.expanduser(root or default_root())), limit or None, warn)


def default_root() -> Path:
    """$GRIDPRUNE_CACHE_DIR, else gridprune in $XDG_CACHE_HOME, else ~/.cache/gridprune."""
    if given := os.environ.get("GRIDPRUNE_CACHE_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification says to ignore a relative one
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise BadInput("GRIDPRUNE_CACHE_DIR: there is no home folder for the cache; set this variable to a folder")
    return Path(base, "gridprune")


def parse_size(text: str, source: str) -> int:
    """Bytes in `500M`, `20GiB` or `1000`; units are powers of 1024. BadInput names `source`, a flag or variable."""
    match = re.fullmatch(r"(\d{1,15})(?:([KMGT])(?:iB)?)?", text, re.ASCII)
    if not match:
        raise BadInput(
            f"{source}: {text[:40]!r} is no size; write bytes or 500M, 20G, 1T (powers of 1024), 0 for no limit"
        )
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def parse_age(text: str, source: str) -> int:
    """Seconds in `90s`, `30min`, `12h`, `7d` or `2w`. BadInput names `source`, a flag."""
    match = re.fullmatch(r"(\d{1,9})(s|min|h|d|w)", text, re.ASCII)
    if not match:
        raise BadInput(
            f"{source}: {text[:40]!r} is no age; write a whole number and a unit, such as 30min, 12h, 7d or 2w"
        )
    return int(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}[match[2]]


def _encoder_name(encoder: Any) -> str:
    return files.digest(encoder)[:16]


def _load(path: Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """A whole entry that is what its place says. Raises FileFault, or OSError."""
    header, tensors = files.read_path(path)
    if header.get("schema") != SCHEMA:
        raise FileFault(f"schema {header.get('schema')!r}, not {SCHEMA}")
    if header.get("key") != path.stem:
        raise FileFault("another entry's file")
    if _encoder_name(header.get("encoder")) != path.parent.parent.name:
        raise FileFault("another encoder's file")
    return header, tensors


def _folders(parent: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Real folders in `parent`, not links, whose whole name fits."""
    with suppress(OSError), os.scandir(parent) as items:
        return [Path(i.path) for i in items if pattern.fullmatch(i.name) and i.is_dir(follow_symlinks=False)]
    return []


def _walk(bucket: Path, fan: str = "") -> Iterator[tuple[os.DirEntry[str], str]]:
    """Our own files in a bucket, with the encoder folder's name: entries, temporary files, and encoder.json.

    Links are left out. Pipes, folders and the like in an entry's place are not, so that they are seen and removed.
    `fan` limits the walk to one of the folders that split the keys.
    """
    if os.path.islink(bucket):
        return
    for encoder in _folders(bucket, _ENCODER):
        for folder in [encoder, *_folders(encoder, re.compile(fan) if fan else _FAN)]:
            with suppress(OSError), os.scandir(folder) as items:
                for item in items:
                    name = item.name
                    entry = _ENTRY.fullmatch(name) is not None
                    ours = entry or name == "encoder.json" or _TEMPORARY.fullmatch(name)
                    if ours and (item.is_file(follow_symlinks=False) or (entry and not item.is_symlink())):
                        yield item, encoder.name


def _entry(item: os.DirEntry[str], encoder: str, key: str) -> Entry | None:
    try:
        status = item.stat(follow_symlinks=False)
    except OSError:
        return None
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return Entry(key, encoder, item.path, size, status.st_mtime)


def _irregular(path: Path) -> bool:
    """Whether there is something that is no regular file, nor a link to one or to nothing."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _remove(path: str) -> bool:
    """Removes a file, or an empty folder in its place: what is in a folder is not ours. Whether that is our doing."""
    try:
        os.unlink(path)
    except OSError:
        try:
            os.rmdir(path)
        except OSError:
            return False
    return True


def _remove_empty(bucket: Path) -> None:
    for encoder in _folders(bucket, _ENCODER):
        for folder in [*_folders(encoder, _FAN), encoder]:
            with suppress(OSError):
                folder.rmdir()
    with suppress(OSError):
        bucket.rmdir()
