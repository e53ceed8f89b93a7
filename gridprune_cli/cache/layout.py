"""Where the cache's files lie, and how one of them is read, found and removed.

    <root>/visual-v1/<16 hex of the encoder's digest>/<2 hex of the key>/<key>.safetensors    an entry
    <root>/visual-v1/<16 hex of the encoder's digest>/encoder.json                            what its entries share
    <root>/remembered.json, CACHEDIR.TAG, .gitignore                                          see `cache.root`

Every function takes paths and holds nothing. Below the root no walk follows a link, and nothing is written behind one.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gridprune_cli.cache import files
from gridprune_cli.cache.files import FileFault, RawTensor

SCHEMA = 2  # of an entry; another one is a miss, and its image is encoded again
BUCKET = "visual-v1"  # of the layout above; a later gridprune with another layout takes another bucket

BUCKETS = re.compile(r"visual-v(\d+)")  # of every version
TEMPORARY = re.compile(r"\.([0-9a-f]{64}\.safetensors|encoder\.json)\.\d+\.[0-9a-f]{8}\.tmp")
_ENCODER = re.compile(r"[0-9a-f]{16}")
_FAN = re.compile(r"[0-9a-f]{2}")
_ENTRY = re.compile(r"([0-9a-f]{64})\.safetensors")


def entry_path(root: Path, encoder: Mapping[str, Any], key: str) -> Path:
    """The file of an entry. Raises ValueError for a key that is not 64 hex digits."""
    if not re.fullmatch(r"[0-9a-f]{64}", key):
        raise ValueError(f"not a key: {key!r}")
    return root / BUCKET / _encoder_name(encoder) / key[:2] / f"{key}.safetensors"


def _encoder_name(encoder: Any) -> str:
    return files.digest(encoder)[:16]


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache as a walk finds it. `used` is in seconds since 1970."""

    key: str
    encoder: str  # the folder's 16 hex digits
    path: str
    bytes: int
    used: float

    def header(self) -> dict[str, Any]:
        """The header of the file. Raises FileFault, or OSError where it has gone."""
        return files.read_header(self.path)


def load(path: Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """Header and tensors of a whole entry, checked against its place. Raises FileFault, or OSError."""
    header, tensors = files.read_path(path)
    if header.get("schema") != SCHEMA:
        raise FileFault(f"schema {header.get('schema')!r}, not {SCHEMA}")
    if header.get("key") != path.stem:
        raise FileFault("another entry's file")
    if _encoder_name(header.get("encoder")) != path.parent.parent.name:
        raise FileFault("another encoder's file")
    return header, tensors


def entries(root: Path, prefix: str = "") -> Iterator[Entry]:
    """Every entry whose key starts with `prefix`, in no order; those that vanish meanwhile are left out.

    What has an entry's name and is no regular file, as a pipe or a folder, is one too: a broken one, of 0 bytes.
    """
    for item, encoder in walk(root / BUCKET, fan=prefix[:2]):
        if (entry := as_entry(item, encoder)) and entry.key.startswith(prefix):
            yield entry


def as_entry(item: os.DirEntry[str], encoder: str) -> Entry | None:
    """The entry that a file of the walk is; None where it is another file, or has gone."""
    match = _ENTRY.fullmatch(item.name)
    if not match:
        return None
    try:
        status = item.stat(follow_symlinks=False)
    except OSError:
        return None
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return Entry(match[1], encoder, item.path, size, status.st_mtime)


def walk(bucket: Path, fan: str = "") -> Iterator[tuple[os.DirEntry[str], str]]:
    """The cache's files in a bucket, each with its encoder folder's name: entries, temporary files and encoder.json.

    Links are left out. Pipes, folders and the like in an entry's place are not, so that they are found and removed.
    `fan` limits the walk to one of the folders that split the keys.
    """
    if os.path.islink(bucket):
        return
    for encoder in folders(bucket, _ENCODER):
        for folder in [encoder, *folders(encoder, re.compile(fan) if fan else _FAN)]:
            with suppress(OSError), os.scandir(folder) as items:
                for item in items:
                    name = item.name
                    entry = _ENTRY.fullmatch(name) is not None
                    belongs = entry or name == "encoder.json" or TEMPORARY.fullmatch(name)
                    if belongs and (item.is_file(follow_symlinks=False) or (entry and not item.is_symlink())):
                        yield item, encoder.name


def folders(parent: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Real folders in `parent`, not links, whose whole name fits."""
    with suppress(OSError), os.scandir(parent) as items:
        return [Path(i.path) for i in items if pattern.fullmatch(i.name) and i.is_dir(follow_symlinks=False)]
    return []


def irregular(path: Path) -> bool:
    """Whether there is something that is no regular file, nor a link to one or to nothing."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def remove(path: str) -> bool:
    """Removes a file, or an empty folder in its place: a full one is not the cache's. Whether this call removed it."""
    try:
        os.unlink(path)
    except OSError:
        try:
            os.rmdir(path)
        except OSError:
            return False
    return True


def remove_empty(bucket: Path) -> None:
    """Removes the folders of a bucket that are empty, and the bucket if it is."""
    for encoder in folders(bucket, _ENCODER):
        for folder in [*folders(encoder, _FAN), encoder]:
            with suppress(OSError):
                folder.rmdir()
    with suppress(OSError):
        bucket.rmdir()
