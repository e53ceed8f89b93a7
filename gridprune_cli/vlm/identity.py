"""What identifies the contents of a folder with a checkpoint, without reading all of it every time."""

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gridprune_cli.cache import files
from gridprune_cli.vlm.weights import weight_files

if TYPE_CHECKING:
    from gridprune_cli.cache.store import Store

SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
SETTLED = 2_000_000_000  # ns; file systems note times in ticks of up to two seconds, those of FAT


def identify_folder(folder: Path, store: "Store | None") -> str:
    """sha256 over the names and contents of all config and weight files of the folder, not of its sub-folders.

    Pickled weights count where they are read, which is where there are no others.

    A store remembers it for the state that the file system reports of the files. A file's bytes can't change without
    its change time doing so, which nobody can set; and a state with a change so fresh that another one could fall into
    the same tick is not remembered. So what is remembered can be lost, never wrong.
    """
    began = time.time_ns()
    state = list_files(folder)
    if store and (known := store.recall(files.digest(state))):
        return known
    total = hashlib.sha256()
    for name, *_ in state:
        with (folder / name).open("rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    identity = total.hexdigest()
    if store and list_files(folder) == state and max(changed for *_, changed in state) < began - SETTLED:
        store.remember(files.digest(state), identity)
    return identity


def list_files(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """What the file system says of the files of a checkpoint, which is another where any of them has changed.

    Name, inode, bytes, and times in ns of the last write and the last change, of each file by name.
    """
    entries = []
    weights = weight_files(folder)
    for path in sorted(folder.iterdir()):
        if (path.suffix in SUFFIXES or path in weights) and path.is_file():
            status = path.stat()
            entries.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return entries
