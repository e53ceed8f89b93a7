"""Self-describing safetensors files, read and written without torch.

One metadata key, `gridprune`, holds canonical JSON: the caller's header, a sha256 per tensor, and a sha256 over all of
that. Equal contents give equal bytes in every process, so a file is whole exactly when writing its contents again
gives the same bytes.
"""

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gridprune_cli.errors import BadInput, GridpruneError

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
MAX_HEADER = 1 << 20  # bytes; a damaged length must not make a reader ask for terabytes
_FIRST_READ = 8192  # bytes; holds most headers, so that reading one costs one read

_to_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


class FileFault(BadInput):
    """A file that is damaged, or not ours. The message is the reason, after the path where one is known."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor's bytes, row-major and little-endian. `dtype` is safetensors' name for it, such as BF16."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def canonical(value: object) -> str:
    """JSON with sorted keys, no spaces and ASCII alone: equal values, equal text. ValueError on NaN or infinity."""
    return _to_json(value)


def digest(value: object) -> str:
    """sha256, as hex, of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def encode(tensors: Mapping[str, RawTensor], header: Mapping[str, Any]) -> bytes:
    """A whole file. ValueError where a tensor's bytes don't fit its shape, or the header uses one of our two names."""
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
    return b"".join([len(head).to_bytes(8, "little"), head, *(tensors[name].data for name in names)])


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """The header as it was given to `encode` (tuples become lists), and the tensors. Checks every byte.

    Raises FileFault on anything that `encode` would not have written.
    """
    start = 8 + _head_length(data)
    layout, header = _parse_head(data[8:start])
    try:
        spans = [entry["data_offsets"] for entry in layout.values()]
        expected = start + max((end for _, end in spans), default=0)
        if len(data) < expected:
            raise FileFault(f"cut short: {len(data)} bytes of {expected}")
        tensors = {
            name: RawTensor(entry["dtype"], tuple(entry["shape"]), data[start + first : start + end])
            for (name, entry), (first, end) in zip(layout.items(), spans, strict=True)
        }
        whole = encode(tensors, header) == data
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise FileFault("damaged: its header contradicts itself") from error
    if not whole:
        raise FileFault("damaged: its bytes don't match their sha256")
    return header, tensors


def read_header(path: str | Path) -> dict[str, Any]:
    """The header alone, some tens of microseconds. Raises FileFault, with the path; OSError where it can't be read."""
    handle = os.open(path, os.O_RDONLY)  # plain calls: `open` makes several more of them, and a cache has many files
    try:
        data = os.read(handle, _FIRST_READ)
        missing = 8 + _head_length(data, whole=False) - len(data)
        if missing > 0:
            data += os.read(handle, missing)
        return _parse_head(data[8 : 8 + _head_length(data)])[1]
    except FileFault as fault:
        raise FileFault(f"{path}: {fault}") from fault
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes, *, sync: bool) -> None:
    """Write a file so that it is there whole or not at all; the umask decides its mode. Replaces an earlier file.

    `sync` waits until the bytes are on the disk: for files a user asked for. Raises GridpruneError, and leaves nothing
    behind.
    """
    if not path.name:
        raise BadInput(f"{path}: no name of a file")
    stem = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes
    temporary = path.with_name(f".{stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and not path.is_file():  # replacing /dev/null or a pipe would break more than this call
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
            reason = error.strerror or error
            raise GridpruneError(f"{path}: can't be written ({reason}); check its folder and the disk") from error
        raise
    if sync:
        _sync_folder(path.parent)


def _check(name: str, tensor: RawTensor) -> None:
    if tensor.dtype not in ITEM_BYTES or any(type(side) is not int or side < 0 for side in tensor.shape):
        raise ValueError(f"tensor {name}: {tensor.dtype} {tensor.shape} can't be stored")
    if len(tensor.data) != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
        raise ValueError(f"tensor {name}: {len(tensor.data)} bytes don't make {tensor.dtype} {tensor.shape}")


def _tensor_digest(tensor: RawTensor) -> str:
    hasher = hashlib.sha256(f"{tensor.dtype}|{canonical(tensor.shape)}|".encode())
    hasher.update(tensor.data)
    return hasher.hexdigest()


def _head_length(data: bytes, whole: bool = True) -> int:
    """Bytes of JSON after the first eight. `whole` demands that they are all there."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8:
        raise FileFault(f"cut short: {len(data)} bytes")
    if not 2 <= length <= MAX_HEADER:
        raise FileFault("not a safetensors file, or damaged")
    if whole and len(data) < 8 + length:
        raise FileFault(f"cut short: {len(data)} bytes, its header alone has {length}")
    return length


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
    return layout, header


def _sync_folder(folder: Path) -> None:
    """Make a rename last. Not every file system can, and the file itself is already safe."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
