import hashlib
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gridprune_cli.cache import files
from gridprune_cli.cache.files import ITEM_BYTES, FileFault, RawTensor, decode, encode, read_header, write_atomic
from gridprune_cli.errors import BadInput, GridpruneError

TENSORS = {
    "tokens": RawTensor("BF16", (2, 3), bytes(range(12))),
    "saliency": RawTensor("F32", (2,), bytes(range(8))),
    "flag": RawTensor("BOOL", (), b"\1"),
    "none": RawTensor("I64", (0, 4), b""),
}
HEADER = {
    "schema": 1,
    "key": "ab",
    "views": [{"rows": 1, "box": [0.1, 1e-9]}],
    "name": "caf\u00e9 \udce9.png",
    "no": None,
}


@st.composite
def raw_tensors(draw: st.DrawFn) -> RawTensor:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = math.prod(shape) * ITEM_BYTES[dtype]
    return RawTensor(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
headers = st.dictionaries(st.text().filter(lambda name: name not in ("tensors", "digest")), values, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, raw_tensors(), max_size=4), headers)
def test_what_was_encoded_is_decoded_and_safetensors_reads_the_same(tensors: dict, header: dict) -> None:
    data = encode(tensors, header)
    assert decode(data) == (header, tensors)
    theirs = {
        name: RawTensor(t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(data)
    }
    assert theirs == tensors


def test_the_header_is_one_key_of_canonical_json_with_a_digest_per_tensor() -> None:
    data = encode(TENSORS, HEADER)
    outer = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(outer["__metadata__"]) == ["gridprune"]
    text = outer["__metadata__"]["gridprune"]
    assert text.isascii()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert json.loads(text)["tensors"]["tokens"] == hashlib.sha256(b"BF16|[2,3]|" + bytes(range(12))).hexdigest()


def test_tensors_lie_at_multiples_of_their_items() -> None:
    data = encode(TENSORS, {})
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % ITEM_BYTES[entry["dtype"]] == 0


def test_equal_contents_give_equal_bytes_in_every_process() -> None:
    code = (
        "import hashlib; from gridprune_cli.cache.files import *\n"
        "t = {n: RawTensor('U8', (1,), n.encode()) for n in set('abcdef')}\n"
        "print(hashlib.sha256(encode(t, {n: {m: 1 for m in set('xyz')} for n in set('uvw')})).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in "123"
    }
    assert len(seen) == 1


def test_every_flipped_bit_is_found() -> None:
    data = encode(TENSORS, HEADER)
    for place in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[place] ^= 1 << bit
            with pytest.raises(FileFault):
                decode(bytes(broken))


def test_every_cut_and_any_addition_is_found() -> None:
    data = encode(TENSORS, HEADER)
    for length in range(len(data)):
        with pytest.raises(FileFault):
            decode(data[:length])
    with pytest.raises(FileFault):
        decode(data + b"\0")


def _file(head: object, data: bytes = b"") -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + data


def _ours(**entry: object) -> bytes:
    header = {"tensors": {"a": "0"}}
    meta = files.canonical(header | {"digest": files.digest(header)})
    return _file({"__metadata__": {"gridprune": meta}, "a": entry}, b"1234")


@pytest.mark.parametrize(
    "data",
    [
        bytes(1000),
        b"\xff" * 1000,
        b"GIF89a" * 100,
        safetensors.numpy.save({"a": np.zeros(3)}),
        safetensors.numpy.save({"a": np.zeros(3)}, {"gridprune": "{}"}),
        safetensors.numpy.save({"a": np.zeros(3)}, {"gridprune": '{"digest":NaN,"tensors":{}}'}),
        _file(b"[" * 100_000),
        _file([]),
        _file({"__metadata__": []}),
        _file({"__metadata__": {"gridprune": 3}}),
        _file({"__metadata__": {"gridprune": "[" * 100_000}}),
        _ours(dtype="U8", shape=[4], data_offsets=[0, 4]),
        _ours(dtype="U8", shape=[4], data_offsets=[-4, None]),
        _ours(dtype="U8", shape=[4], data_offsets=[0, 4.0]),
        _ours(dtype="U8", shape=[4], data_offsets=[]),
        _ours(dtype="U8", shape=["4"], data_offsets=[0, 4]),
        _ours(dtype="U8", shape=[True, 4], data_offsets=[0, 4]),
        _ours(dtype="U8", shape=[10**30], data_offsets=[0, 10**30]),
        _ours(dtype=["U8"], shape=[4], data_offsets=[0, 4]),
        _ours(shape=[4]),
    ],
)
def test_foreign_and_contradictory_files_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(FileFault) as caught:
        decode(data)
    assert 0 < len(str(caught.value)) < 100 and "\n" not in str(caught.value)
    assert isinstance(caught.value, BadInput)


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({}, {"tensors": {}}),
        ({}, {"digest": ""}),
        ({}, {"x": math.nan}),
        ({}, {"x": "y" * files.MAX_HEADER}),
        ({"a": RawTensor("U8", (3,), b"12")}, {}),
        ({"a": RawTensor("float32", (1,), b"1234")}, {}),
        ({"a": RawTensor("U8", (-1, -2), b"12")}, {}),
    ],
)
def test_what_could_not_be_read_back_is_not_encoded(tensors: dict, header: dict) -> None:
    with pytest.raises(ValueError):
        encode(tensors, header)


@pytest.mark.parametrize("padding", [0, 3000, 4096, 100_000])
def test_a_header_is_read_without_the_tensors(tmp_path: Path, padding: int) -> None:
    header = {"padding": "x" * padding, "schema": 1}
    data = encode({"a": RawTensor("U8", (4,), b"1234")}, header)
    (tmp_path / "whole").write_bytes(data)
    (tmp_path / "head").write_bytes(data[:-4])
    assert read_header(tmp_path / "whole") == read_header(tmp_path / "head") == header


@pytest.mark.parametrize("data", [b"", b"1234567", bytes(100), encode({}, {"a": 1})[:-20]])
def test_a_header_that_is_broken_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FileFault, match=str(tmp_path / "x")):
        read_header(tmp_path / "x")


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_the_mode(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "x", b"new", sync=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


def test_writing_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / ("\u00e9" * 127)  # 254 bytes: no room for a longer temporary name
    write_atomic(path, b"old", sync=False)
    write_atomic(path, b"new", sync=True)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sync", [True, False])
def test_the_bytes_are_on_the_disk_before_the_rename_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    calls = []
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_atomic(tmp_path / "x", b"1", sync=sync)
    assert calls == (["fsync", "replace", "fsync"] if sync else ["replace"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_a_failed_write_keeps_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "x"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(GridpruneError if isinstance(error, OSError) else type(error)) as caught:
        write_atomic(path, b"new", sync=False)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"
    if isinstance(error, OSError):
        assert str(path) in str(caught.value) and "No space left" in str(caught.value)


def test_pipes_devices_and_folders_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "missing/x"):
        with pytest.raises(GridpruneError, match=name):
            write_atomic(tmp_path / name, b"1", sync=False)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_no_tensor_library_is_imported() -> None:
    code = "import sys, gridprune_cli.cache.store; print({'torch', 'numpy', 'safetensors'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
