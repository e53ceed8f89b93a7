"""The cache's root folder: where it is, what marks it as a cache, and the digests that it remembers."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from gridprune_cli.cache import files, layout
from gridprune_cli.cache.files import FileFault
from gridprune_cli.errors import BadInput, GridpruneError

TAG, IGNORE, REMEMBERED = "CACHEDIR.TAG", ".gitignore", "remembered.json"
MOST_REMEMBERED = 64  # digests, a model's folder each
_LONGEST_REMEMBERED = 1 << 16  # bytes of the file; MOST_REMEMBERED digests take 9 KiB
_TEMPORARY = re.compile(r"\.(CACHEDIR\.TAG|\.gitignore|remembered\.json)\.\d+\.[0-9a-f]{8}\.tmp")

_MARKS = {
    TAG: b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This folder holds the cache of gridprune; all of it can be made again.\n"
    b"# For information about cache directory tags, see https://bford.info/cachedir/\n",
    IGNORE: b"*\n",
}


def default_root() -> Path:
    """$GRIDPRUNE_CACHE_DIR, else gridprune in $XDG_CACHE_HOME, else ~/.cache/gridprune, on every system.

    Raises BadInput where there is no home folder.
    """
    if folder := os.environ.get("GRIDPRUNE_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification says to ignore a relative one
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        reason = "there is no home folder for the cache; set this variable to a folder"
        raise BadInput(reason, place="GRIDPRUNE_CACHE_DIR")
    return Path(base, "gridprune")


def mark(root: Path) -> None:
    """Makes the root folder, with the files that keep it out of backups and git. Raises OSError or GridpruneError.

    A folder that also holds other things than the cache gets no marks, which would hide those too.
    """
    root.mkdir(parents=True, exist_ok=True)
    missing = [name for name in _MARKS if not (root / name).exists()]  # a killed writer may have left it without
    if missing and _is_ours(root):
        for name in missing:
            files.write_atomic(root / name, _MARKS[name], sync=False)


def _is_ours(root: Path) -> bool:
    """Whether nothing but the cache is in the root."""
    with os.scandir(root) as items:
        for item in items:
            if item.name == IGNORE:
                with suppress(OSError, FileFault):
                    if files.read_bytes(item.path, len(_MARKS[IGNORE])) == _MARKS[IGNORE]:
                        continue
                return False
            known = item.name in (TAG, REMEMBERED) or layout.BUCKETS.fullmatch(item.name)
            if not (known or _TEMPORARY.fullmatch(item.name)):
                return False
    return True


def temporaries(root: Path) -> list[os.DirEntry[str]]:
    """Temporary files of the root's own files: being written now, or left behind by a killed writer."""
    with suppress(OSError), os.scandir(root) as items:
        return [i for i in items if _TEMPORARY.fullmatch(i.name) and not i.is_symlink()]
    return []


def remembered(root: Path) -> dict[str, Any]:
    """What `remember` wrote, by key; nothing where the file is missing or damaged."""
    with suppress(OSError, FileFault, ValueError, RecursionError):
        stored = json.loads(files.read_bytes(root / REMEMBERED, _LONGEST_REMEMBERED))
        return stored if isinstance(stored, dict) else {}
    return {}


def remember(root: Path, key: str, value: str) -> None:
    """Adds a digest to the last `MOST_REMEMBERED`. Of two processes that write at once, one wins. Never fails."""
    digests = {**remembered(root), key: value}
    with suppress(OSError, GridpruneError):
        mark(root)
        text = json.dumps(dict(list(digests.items())[-MOST_REMEMBERED:]))
        files.write_atomic(root / REMEMBERED, text.encode(), sync=False)
