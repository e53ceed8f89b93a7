"""Self-describing safetensors files, read and written without torch.

One metadata key, `gridprune`, holds canonical JSON: the caller's header, a sha256 per tensor, and a sha256 over all of
that. Equal contents give equal bytes in every process, so a file is whole exactly when writing its contents again
gives the same bytes.
"""

import errno
import hashlib
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gridprune_cli.errors import BadInput, GridpruneError

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
MAX_HEADER = 1 << 20  # bytes; a header has some KiB, with the placeholders of 16,384 visual tokens 0.3 MiB
MAX_BYTES = 640 << 20  # of a file: 16,384 visual tokens of 16,384 numbers in 16 bits are 512 MiB
MAX_TENSORS = 16  # in a file; there are at most seven
MAX_AXES = 8  # of a tensor; there are at most four
MAX_DEPTH = 64  # of lists and objects in each other in a header; there are seven, and Python's limit varies by caller
_FIRST_READ = 8192  # bytes; holds most headers, so that reading one costs one read

_to_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


class FileFault(BadInput):
    """A file that is damaged, or not of this package. Its place is the path, where one is known."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor's bytes, row-major and little-endian. `dtype` is safetensors' name for it, such as BF16."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def canonical(value: object) -> str:
    """JSON with sorted keys, no spaces and ASCII alone: equal values, equal text. ValueError on NaN or infinity."""
    return _to_json(value)


def digest(value: object) -> str:
    """sha256, as hex, of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def encode(tensors: Mapping[str, RawTensor], header: Mapping[str, Any]) -> bytes:
    """A whole file. ValueError where a tensor's bytes don't fit its shape, or the header uses "tensors" or "digest"."""
    head, names = _head(tensors, header)
    return b"".join([head, *(tensors[name].data for name in names)])


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """The header as it was given to `encode` (tuples become lists), and the tensors. Checks every byte.

    Raises FileFault on anything that `encode` would not have written.
    """
    return read(io.BytesIO(data), len(data))


def read(file: BinaryIO, size: int | None = None) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """`decode` of a binary stream, read to its end, which has `size` bytes where that is known beforehand.

    The first eight bytes, the header and the table of tensors are checked, against `size` and against bounds, before
    what follows is read. Tensors share the memory of what was read.
    """
    first = file.read(8)
    length = _head_length(first)
    if size is not None and size > MAX_BYTES:
        raise FileFault(f"{size} bytes, more than {MAX_BYTES}")
    if size is not None and size < 8 + length:
        raise FileFault(f"cut short: {size} bytes, its header alone has {length}")
    text = file.read(length)
    if len(text) < length:
        raise FileFault(f"cut short: {8 + len(text)} bytes, its header alone has {length}")
    layout, header = _parse_head(text)
    spans, total = _spans(layout)
    expected = 8 + length + total
    if expected > MAX_BYTES:
        raise FileFault(f"{expected} bytes, more than {MAX_BYTES}")
    data = b"" if size is not None and size < expected else file.read(total)
    if len(data) < total:
        raise FileFault(f"cut short: {8 + length + len(data) if size is None else size} bytes of {expected}")
    if file.read(1):
        raise FileFault(f"damaged: more than the {expected} bytes that its header says")
    view = memoryview(data)
    tensors = {
        name: RawTensor(entry["dtype"], tuple(entry["shape"]), view[slice(*spans[name])])
        for name, entry in layout.items()
    }
    try:
        whole = _head(tensors, header)[0] == first + text
    except (ValueError, RecursionError) as error:
        raise FileFault("damaged: its header contradicts itself") from error
    if not whole:
        raise FileFault("damaged: its bytes don't match their sha256")
    return header, tensors


def read_path(path: str | Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """`read` of a file. Raises FileFault, without the path, also for what is no regular file; OSError as `open`."""
    with _regular(path) as (handle, size), open(handle, "rb", closefd=False) as file:
        return read(file, size)


def read_bytes(path: str | Path, most: int) -> bytes:
    """A regular file of at most `most` bytes. Raises FileFault, without the path, for any other; OSError as `open`."""
    with _regular(path) as (handle, size), open(handle, "rb", closefd=False) as file:
        data = file.read(most + 1) if size <= most else b""
        if size > most or len(data) > most:
            raise FileFault(f"{max(size, len(data))} bytes, more than {most}")
        return data


def read_header(path: str | Path) -> dict[str, Any]:
    """The header alone, some tens of microseconds. Raises FileFault, with the path; OSError where it can't be read."""
    try:
        with _regular(path) as (handle, _):
            data = os.read(handle, _FIRST_READ)  # plain calls: `open` makes several more, and a cache has many files
            missing = 8 + _head_length(data) - len(data)
            if missing > 0:
                data += os.read(handle, missing)
            length = _head_length(data)
            if len(data) < 8 + length:
                raise FileFault(f"cut short: {len(data)} bytes, its header alone has {length}")
            return _parse_head(data[8 : 8 + length])[1]
    except FileFault as fault:
        raise fault.at(str(path)) from fault


@contextmanager
def _regular(path: str | Path) -> Iterator[tuple[int, int]]:
    """A file's handle and its size in bytes. FileFault for a folder, a pipe, a device: reading those may never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileFault("not a regular file")
        yield handle, status.st_size
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a file so that it is there whole or not at all; the umask decides its mode. Replaces an earlier file.

    `sync` waits until the bytes are on the disk: for files a user asked for. Raises GridpruneError, and leaves nothing
    behind.
    """
    if not path.name:
        raise BadInput("no name of a file", place=str(path))
    stem = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes
    temporary = path.with_name(f".{stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):  # replacing /dev/null or a pipe would break more than this call
                raise OSError(errno.EINVAL, "not a regular file")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            reason = f"can't be written ({error.strerror or error}); check its folder and the disk"
            raise GridpruneError(reason, place=str(path)) from error
        raise
    if sync:
        _sync_folder(path.parent)


def _head(tensors: Mapping[str, RawTensor], header: Mapping[str, Any]) -> tuple[bytes, list[str]]:
    """The bytes before the tensors', and the tensors' names in their order in the file. ValueError as `encode`."""
    if reserved := {"tensors", "digest"} & header.keys():
        raise ValueError(f"the header may not use {sorted(reserved)}")
    for name, tensor in tensors.items():
        _check(name, tensor)
    # widest items first keeps every tensor aligned
    names = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    described = {**header, "tensors": {name: _tensor_digest(tensors[name]) for name in names}}
    layout: dict[str, Any] = {"__metadata__": {"gridprune": canonical({**described, "digest": digest(described)})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + len(tensor.data)
        layout[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    head = canonical(layout).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > MAX_HEADER:
        raise ValueError(f"the header takes {len(head)} bytes, more than {MAX_HEADER}")
    return len(head).to_bytes(8, "little") + head, names


def _check(name: str, tensor: RawTensor) -> None:
    """Raises ValueError for a tensor of a dtype or shape that can't be stored, or whose bytes don't fit them."""
    if tensor.dtype not in ITEM_BYTES or any(type(side) is not int or side < 0 for side in tensor.shape):
        raise ValueError(f"tensor {name}: {tensor.dtype} {tensor.shape} can't be stored")
    if len(tensor.data) != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
        raise ValueError(f"tensor {name}: {len(tensor.data)} bytes don't make {tensor.dtype} {tensor.shape}")


def _tensor_digest(tensor: RawTensor) -> str:
    hasher = hashlib.sha256(f"{tensor.dtype}|{canonical(tensor.shape)}|".encode())
    hasher.update(tensor.data)
    return hasher.hexdigest()


def _head_length(first: bytes) -> int:
    """Bytes of JSON after the first eight, which say so. Raises FileFault where these can't be right."""
    if len(first) < 8:
        raise FileFault(f"cut short: {len(first)} bytes")
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= MAX_HEADER:
        raise FileFault("not a safetensors file, or damaged")
    return length


def _spans(layout: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int]], int]:
    """Each tensor's start and end among the bytes behind the header, and how many these are."""
    contradiction = FileFault("damaged: its header contradicts itself")
    if len(layout) > MAX_TENSORS:
        raise FileFault(f"{len(layout)} tensors, more than {MAX_TENSORS}")
    spans = {}
    for name, entry in layout.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise contradiction
        kind, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        sides = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) else [None]
        if any(type(side) is not int or not 0 <= side <= MAX_BYTES for side in sides):
            raise contradiction
        if not isinstance(kind, str) or kind not in ITEM_BYTES or len(shape) > MAX_AXES or len(span) != 2:
            raise contradiction
        if math.prod(shape) * ITEM_BYTES[kind] != span[1] - span[0]:
            raise contradiction
        spans[name] = (span[0], span[1])
    end = 0
    for start, stop in sorted(spans.values()):
        if start != end:
            raise contradiction
        end = stop
    return spans, end


def _parse_head(head: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Layout by tensor name, and the caller's header, which is checked against its digest."""
    try:
        layout = json.loads(head.decode())
        text = layout.pop("__metadata__")["gridprune"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileFault("not a file of gridprune, or damaged") from error
    try:
        header = json.loads(text)
        claimed = header.pop("digest")
        signed = text.replace(f'"digest":"{claimed}",', "", 1)  # never the last: "tensors" is behind it
        intact = hashlib.sha256(signed.encode()).hexdigest() == claimed
        del header["tensors"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileFault("damaged: its header can't be read") from error
    if not intact:
        raise FileFault("damaged: its header doesn't match its sha256")
    if deeper(header, MAX_DEPTH):
        raise FileFault(f"its header is nested more than {MAX_DEPTH} deep")
    return layout, header


def deeper(value: object, most: int) -> bool:
    """Whether lists and objects of JSON are nested more than `most` deep."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for holder in level
            if isinstance(holder, dict | list)
            for item in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return any(isinstance(item, dict | list) for item in level)


def _sync_folder(folder: Path) -> None:
    """Make a rename last. Not every file system can, and the file itself is already safe."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
