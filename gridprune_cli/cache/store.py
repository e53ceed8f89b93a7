"""The cache of encoded images: one entry is one file, found by a key of what it was computed from.

Correctness rests on no lock: files appear whole by a rename, are never changed, and are checked in full when read.
Any trouble with an entry is a miss. A file's modification time is when it was last used. See `cache.layout` for where
files lie, `cache.sweep` for how they are removed.
"""

import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gridprune_cli.cache import files, layout, sweep
from gridprune_cli.cache import root as roots
from gridprune_cli.cache.files import FileFault, RawTensor
from gridprune_cli.cache.layout import BUCKET, Entry, entry_path
from gridprune_cli.cache.sweep import Removed
from gridprune_cli.errors import BadInput, GridpruneError

DEFAULT_LIMIT = "20G"
_TRIES = 3  # to write an entry whose folder another process removes meanwhile

_log = logging.getLogger(__name__)


def entry_key(image_sha256: str, encoder: Mapping[str, Any], signals: Sequence[str]) -> str:
    """The key, 64 hex digits: of the image's bytes, how it is encoded, and the set of signals stored beside it."""
    return files.digest({"image": image_sha256, "encoder": encoder, "signals": sorted(set(signals))})


class Written(NamedTuple):
    """An entry that was written: its path, its bytes, and whether the limit leaves it alone until this run ends."""

    path: str
    bytes: int
    kept_for_run: bool = True


class Store:
    """The cache under `root`, at most `limit` bytes of entries (None: no limit).

    Use it as a context manager, or call `finish`, so that the limit is kept; before that it is looked at each time a
    tenth of it was written. Entries written through this object are not removed for it, unless `put` allows it. `warn`
    takes the warnings, which are logged by default.
    """

    def __init__(self, root: Path, limit: int | None, warn: Callable[[str], None] = _log.warning) -> None:
        self.root = root
        self.limit = limit
        self.warn = warn
        self.writable = True  # until a write fails, or the user wants none
        self._over = False  # whether the warning of a limit that can't be kept was given
        self._marked = False  # whether the root was looked at for its marks
        self._written: set[str] = set()  # paths of entries
        self._unchecked = 0  # bytes written since the last look at the limit

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    # ---- entries, one at a time --------------------------------------------------------------------------------------

    def get(
        self, encoder: Mapping[str, Any], key: str, *, touch: bool = True
    ) -> tuple[dict[str, Any], dict[str, RawTensor]] | None:
        """Header and tensors of an entry, or None. A broken entry is removed, and is None.

        Without `touch` nothing on the disk changes: a broken entry stays, and a whole one does not count as used.
        """
        path = entry_path(self.root, encoder, key)
        try:
            entry = layout.load(path)
        except FileFault:
            if touch:
                layout.remove(str(path))
            return None
        except OSError:
            return None
        if touch:
            with suppress(OSError):  # every hit: beside reading and checking it costs nothing, and the order is exact
                os.utime(path)
        return entry

    def put(self, encoder: Mapping[str, Any], key: str, data: bytes, *, kept_for_run: bool = True) -> bool:
        """Stores an encoded file whose header has at least schema, key and encoder. Of an equal file, only the time of
        its last use changes.

        One that is not `kept_for_run` may be removed for the limit like those that were there before.

        False where it can't be written, with one warning per Store: work goes on without the cache. False too, with a
        warning for each, for an entry that is too large to be read again, or whose place something else holds.
        """
        # 1. what can't be an entry, or is one already
        path = entry_path(self.root, encoder, key)
        if len(data) > files.MAX_BYTES:
            self.warn(f"{path}: not cached, since {len(data)} bytes are more than the {files.MAX_BYTES} of an entry")
            return False
        with suppress(OSError, FileFault):
            if files.read_bytes(path, len(data)) == data:
                if kept_for_run:
                    self._written.add(str(path))
                with suppress(OSError):
                    os.utime(path)
                return True
        if layout.irregular(path) and not layout.remove(str(path)) and layout.irregular(path):
            self.warn(f"{path}: not cached, since this is no file and can't be removed; remove it")
            return False
        # 2. folders and file, again where another process that clears the cache removes a folder in between
        for more in reversed(range(_TRIES)):
            try:
                self._prepare(path.parent.parent, encoder)
                path.parent.mkdir(exist_ok=True)
                files.write_atomic(path, data, sync=False)
                break
            except (OSError, GridpruneError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__ or error
            if more and isinstance(cause, FileNotFoundError | FileExistsError):
                continue
            if self.writable:
                self.writable = False
                reason = getattr(cause, "strerror", None) or cause
                self.warn(f"{self.root}: the cache can't be written ({reason}); going on without it")
            return False
        # 3. the limit
        self.adopt([Written(str(path), len(data), kept_for_run)])
        return True

    def adopt(self, written: Sequence[Written]) -> None:
        """Takes entries as written through this object, also those that another process of the run wrote."""
        self._written.update(entry.path for entry in written if entry.kept_for_run)
        self._unchecked += sum(entry.bytes for entry in written)
        if self.limit is not None and self._unchecked > self.limit // 10:
            self.finish()

    def holds(self, encoder: Mapping[str, Any], key: str) -> bool:
        """Whether there is a file for an entry. Only `get` tells whether it is whole."""
        return self.bytes_of(encoder, key) is not None

    def bytes_of(self, encoder: Mapping[str, Any], key: str) -> int | None:
        """Bytes of an entry, or None where there is none. It is neither read nor checked, nor counts as used."""
        try:
            status = entry_path(self.root, encoder, key).lstat()
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def _prepare(self, folder: Path, encoder: Mapping[str, Any]) -> None:
        """Makes an encoder's folder and, beside its entries, encoder.json, which says for a reader whose they are.

        Raises GridpruneError where the folder, or the bucket around it, is a link: no walk would find what lies behind.
        """
        for place in (self.root / BUCKET, folder):
            if place.is_symlink():
                name = place.relative_to(self.root)
                raise GridpruneError(f"{name} is a link; link the cache's folder itself, or use GRIDPRUNE_CACHE_DIR")
        if not self._marked:
            roots.mark(self.root)
            self._marked = True
        if (folder / "encoder.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(encoder, indent=2, sort_keys=True) + "\n"
        files.write_atomic(folder / "encoder.json", text.encode(), sync=False)

    # ---- digests that take long to compute ---------------------------------------------------------------------------

    def recall(self, key: str) -> str | None:
        """The digest in hex that was remembered under a key, if it still is."""
        value = roots.remembered(self.root).get(key)
        return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else None

    def remember(self, key: str, value: str) -> None:
        """Stores a digest for later, the last few of them. It may be lost at any time, to another process above all."""
        if self.writable:
            roots.remember(self.root, key, value)

    # ---- all entries -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Keeps the limit, if anything was written since the last look: one walk over the cache."""
        if self.limit is not None and self._unchecked:
            self._unchecked = 0
            left = sweep.trim(self.root, self.limit, None, spare=self._written).kept_bytes
            if left > self.limit and not self._over:
                self._over = True
                self.warn(
                    f"{self.root}: over its limit of {self.limit} bytes, since what is being written stays; "
                    "set a higher `cache_limit`, or it goes with the next command"
                )

    def release(self) -> None:
        """Lets what was written so far be removed for the limit; in a process that stays, nothing would be else."""
        self._written.clear()

    def entries(self) -> Iterator[Entry]:
        """Every entry, in no order, as `layout.entries` finds them."""
        return layout.entries(self.root)

    def verify(self, *, delete: bool = False) -> Iterator[tuple[Entry, str | None]]:
        """Every entry, read in full, and what is wrong with it, or None. `delete` removes the broken."""
        return sweep.verify(self.root, delete=delete)

    def gc(self, *, max_bytes: int | None = None, older_than: float | None = None, dry_run: bool = False) -> Removed:
        """Removes entries as `sweep.trim` does, then what killed writers and earlier layouts left behind."""
        removed = sweep.trim(self.root, max_bytes, older_than, spare=self._written, dry_run=dry_run)
        if not dry_run:
            sweep.remove_leftovers(self.root)
        return removed

    def find(self, prefix: str) -> Entry:
        """The one entry whose key starts with `prefix`. Raises BadInput as `sweep.find` does."""
        return sweep.find(self.root, prefix)

    def remove(self, prefix: str) -> Entry:
        """Removes the entry that `find` finds, and returns it. Raises BadInput as `find` does."""
        return sweep.remove(self.root, prefix)

    def clear(self) -> Removed:
        """Removes every file of the cache, of every layout's version."""
        return sweep.clear(self.root)


def open_store(root: Path | None = None, warn: Callable[[str], None] = _log.warning) -> Store:
    """The cache at `root`, or where the environment says. Raises BadInput on a variable that can't be used."""
    try:
        limit = parse_size(os.environ.get("GRIDPRUNE_CACHE_LIMIT") or DEFAULT_LIMIT)
    except BadInput as fault:
        raise fault.at("GRIDPRUNE_CACHE_LIMIT") from fault
    return Store(Path(os.path.expanduser(root or roots.default_root())), limit or None, warn)


def parse_size(text: str, field: str | None = None) -> int:
    """Bytes in `500M`, `20GiB` or `1000`; units are powers of 1024. Raises BadInput about the setting `field`."""
    match = re.fullmatch(r"(\d{1,15})(?:([KMGT])(?:iB)?)?", text, re.ASCII)
    if not match:
        reason = f"{text[:40]!r} is no size; write bytes or 500M, 20G, 1T (powers of 1024), 0 for no limit"
        raise BadInput(reason, field=field)
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def parse_age(text: str, field: str | None = None) -> int:
    """Seconds in `90s`, `30min`, `12h`, `7d` or `2w`. Raises BadInput about the setting `field`."""
    match = re.fullmatch(r"(\d{1,9})(s|min|h|d|w)", text, re.ASCII)
    if not match:
        reason = f"{text[:40]!r} is no age; write a whole number and a unit, such as 30min, 12h, 7d or 2w"
        raise BadInput(reason, field=field)
    return int(match[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}[match[2]]
