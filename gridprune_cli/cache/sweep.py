"""Removes entries of a cache: by age, by size, by key, or all of them; and the files that killed writers left."""

import os
import re
import time
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gridprune_cli.cache import layout
from gridprune_cli.cache.files import FileFault
from gridprune_cli.cache.layout import BUCKET, BUCKETS, TEMPORARY, Entry, as_entry, entries, folders, walk
from gridprune_cli.cache.root import REMEMBERED, temporaries
from gridprune_cli.errors import BadInput, GridpruneError

TEMPORARY_LIFE = 86_400.0  # seconds, a day, after which a writer's temporary file counts as left behind


@dataclass(frozen=True)
class Removed:
    """What was removed, or would be, and which entries stay. `stuck` of these should have been removed, but can't."""

    entries: int
    bytes: int
    kept_entries: int
    kept_bytes: int
    stuck: int = 0


def verify(root: Path, *, delete: bool) -> Iterator[tuple[Entry, str | None]]:
    """Reads every entry in full: the entry and what is wrong with it, or None. `delete` removes the broken."""
    for entry in entries(root):
        fault = None
        try:
            layout.load(Path(entry.path))
        except FileNotFoundError:
            continue
        except FileFault as error:
            fault = str(error)
        except OSError as error:
            fault = f"can't be read ({error.strerror or error})"
        if fault and delete:
            layout.remove(entry.path)
        yield entry, fault


def find(root: Path, prefix: str) -> Entry:
    """The one entry whose key starts with `prefix`, four hex digits or more. Raises BadInput for none or several."""
    if not re.fullmatch(r"[0-9a-f]{4,64}", prefix):
        raise BadInput("not a key; give four or more of the hex digits that `gridprune cache ls` prints", place=prefix)
    matching = list(entries(root, prefix))
    if not matching:
        raise BadInput(f"no such key in {root}; see `gridprune cache ls`", place=prefix)
    if len(matching) > 1:
        raise BadInput(f"{len(matching)} keys start so; give more digits", place=prefix)
    return matching[0]


def remove(root: Path, prefix: str) -> Entry:
    """Removes the entry that `find` finds, and returns it. Raises BadInput as `find` does."""
    entry = find(root, prefix)
    if not layout.remove(entry.path) and os.path.lexists(entry.path):
        raise GridpruneError("can't be removed; see to the permissions of its folder", place=entry.path)
    return entry


def clear(root: Path) -> Removed:
    """Removes every file of the cache, of every layout's version. Whatever else lies in the folder stays."""
    count = size = left = left_size = 0
    for bucket in folders(root, BUCKETS):
        for item, encoder in walk(bucket):
            entry, gone = as_entry(item, encoder), layout.remove(item.path)
            if entry and gone:
                count, size = count + 1, size + entry.bytes
            elif entry and os.path.lexists(item.path):  # else another process removed it first
                left, left_size = left + 1, left_size + entry.bytes
        layout.remove_empty(bucket)
    layout.remove(os.path.join(root, REMEMBERED))
    for item in temporaries(root):
        layout.remove(item.path)
    return Removed(count, size, left, left_size, stuck=left)


def trim(
    root: Path, max_bytes: int | None, older_than: float | None, *, spare: Container[str] = (), dry_run: bool = False
) -> Removed:
    """Removes entries unused for `older_than` seconds; then, if more than `max_bytes` are left, the least recently used
    ones, down to 90 % of it, so that not every further entry is over it again. Paths in `spare` are not removed for it.
    """
    # 1. all entries, the least recently used first
    oldest = time.time() - older_than if older_than is not None else float("-inf")
    every = sorted((entry.used, entry.bytes, entry.path) for entry in entries(root))
    # 2. which of them go
    stale = [entry for entry in every if entry[0] < oldest]
    fresh = every[len(stale) :]
    kept = sum(size for _, size, _ in fresh)
    if max_bytes is not None and kept > max_bytes:
        for entry in fresh:
            if kept <= max_bytes * 9 // 10:
                break
            if entry[2] not in spare:
                stale.append(entry)
                kept -= entry[1]
    # 3. remove them; what another process removed first counts as neither gone nor stuck
    gone, gone_before, stuck = [], [], 0  # bytes of entries, and how many are stuck
    for _, size, path in stale:
        if dry_run or layout.remove(path):
            gone.append(size)
        elif os.path.lexists(path):
            stuck += 1
        else:
            gone_before.append(size)
    left = len(every) - len(gone) - len(gone_before)
    left_bytes = sum(size for _, size, _ in every) - sum(gone) - sum(gone_before)
    return Removed(len(gone), sum(gone), left, left_bytes, stuck)


def remove_leftovers(root: Path) -> None:
    """Removes temporary files that are older than `TEMPORARY_LIFE`, and buckets of earlier layouts."""
    oldest = time.time() - TEMPORARY_LIFE
    current = int(BUCKET.removeprefix("visual-v"))
    for item in temporaries(root):
        with suppress(OSError):
            if item.stat(follow_symlinks=False).st_mtime < oldest:
                os.unlink(item.path)
    for bucket in folders(root, BUCKETS):
        outdated = int(bucket.name.removeprefix("visual-v")) < current  # a newer gridprune may be using a newer one
        for item, _ in walk(bucket):
            with suppress(OSError):
                temporary = TEMPORARY.fullmatch(item.name)
                if outdated or (temporary and item.stat(follow_symlinks=False).st_mtime < oldest):
                    os.unlink(item.path)
        if outdated:
            layout.remove_empty(bucket)
