"""Encoded images and pruned sets survive the disk, and nothing else passes for one."""

import dataclasses
import json
import os
import random
import tracemalloc

import pytest
import torch
from fuzz.files import ENTRY_FAULTS, PREFIX_FAULTS, PRUNED_FAULTS, SELECTION_FAULTS, changed, put, raw, semantic
from hypothesis import given, settings
from hypothesis import strategies as st

from gridprune_cli.cache import files, layout, store
from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.schedule import Attention, Selection, Stage, plan
from gridprune_cli.pruning.signals import View
from gridprune_cli.tokens import EncodedImage, Origin, Prefix, PrunedSet, load_pruned


def same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)), field.name
        elif isinstance(x, Prefix):
            same(x, y)
        else:
            assert x == y, field.name


def encoded_image(dtype, rows=3, cols=5, name="ä \n.png"):
    torch.manual_seed(0)
    return EncodedImage(
        key="k" * 64,
        model="m",
        image="i" * 64,
        name=name,
        encoder={"family": "llava", "dtype": str(dtype).removeprefix("torch.")},
        size=(7, 9),
        views=(View(rows, cols, (0.1, 0.0, 0.9, 1.0)), View(1, 2)),
        vision_features=torch.randn(rows * cols + 2, 6).to(dtype),
        saliency=torch.rand(rows * cols + 2).to(dtype),
        placeholder_map=torch.tensor([*range(rows * cols), -1, rows * cols + 1, rows * cols], dtype=torch.int32),
        prompt={"placeholder": "<image>", "grid": [1, 2]},
        notes=("first of 2 frames",),
    )


def pruned_set(relevance=True):
    torch.manual_seed(0)
    zones = {"rows": 1, "cols": 1, "budgets": [1]}
    return PrunedSet(
        image_embeds=torch.randn(2, 4, dtype=torch.bfloat16),
        kept=torch.tensor([1, 5]),
        input_ids=torch.tensor([3, 4, 4, 9]),
        position_ids=torch.tensor([0, 2, 6, 7]),
        saliency=torch.rand(6),
        relevance=torch.rand(6) if relevance else None,
        images=(
            Origin(
                "k",
                "i",
                "n",
                (View(1, 2),),
                (1, 2, 3, 4) if relevance else None,
                zones,
            ),
            Origin("l", "j", "o", (View(2, 2, (0.25, 0.0, 0.75, 1.0)),), None, None),
        ),
        model="m",
        fingerprint="f" * 64,
        question="Où?",
        relevance_source={"source": "clip", "model": "ä/clip"} if relevance else None,
        method={"name": "gridprune", "zone": 4},
        positions="original",
    )


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(1, 7),
    st.integers(1, 7),
    st.text(max_size=20),
)
def test_an_encoded_image_comes_back(dtype, rows, cols, name):
    image = encoded_image(dtype, rows, cols, name)
    same(image, EncodedImage.from_parts(*files.decode(image.to_bytes())))


@pytest.mark.parametrize("relevance", [True, False])
def test_a_pruned_set_comes_back(tmp_path, relevance):
    pruned = pruned_set(relevance)
    path = tmp_path / "p.safetensors"
    path.write_bytes(pruned.to_bytes())
    same(pruned, load_pruned(path))


def test_a_llava_image_takes_at_most_1_2_mib():
    image = dataclasses.replace(
        encoded_image(torch.bfloat16),
        views=(View(24, 24),),
        vision_features=torch.zeros(576, 1024, dtype=torch.bfloat16),
        saliency=torch.zeros(576, dtype=torch.bfloat16),
        placeholder_map=torch.arange(576, dtype=torch.int32),
    )
    assert len(image.to_bytes()) <= 1.2 * 2**20


def test_states_of_another_length_are_refused():
    header, tensors = files.decode(encoded_image(torch.float32).to_bytes())
    header["views"] = header["views"][:1]
    with pytest.raises(ValueError, match="another number of tokens"):
        EncodedImage.from_parts(header, tensors)


def test_an_encoded_image_has_the_stores_schema(tmp_path, monkeypatch):
    """Both are raised at once: what was written is read, and what the other wrote isn't."""
    image = dataclasses.replace(encoded_image(torch.float32), key="a" * 64)
    cache = store.Store(tmp_path, None)
    old = image.to_bytes()
    monkeypatch.setattr(layout, "SCHEMA", 9)
    for data, hit in ((old, False), (image.to_bytes(), True)):
        cache.put(image.encoder, image.key, data)
        assert (cache.get(image.encoder, image.key) is not None) == hit


def of_schema(schema, data):
    header, tensors = files.decode(data)
    return files.encode(
        tensors, {k: v for k, v in header.items() if k not in ("tensors", "digest")} | {"schema": schema}
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:-3], "not a pruned set"),
        (lambda data: b"", "not a pruned set"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "not a pruned set"),
        (lambda data: encoded_image(torch.float32).to_bytes(), "it holds something else"),
        (lambda data: of_schema(4, data), "its schema is 4, and this version reads 5; prune again"),
        (lambda data: of_schema("9\n" * 99, data), "its schema is '9.*; prune again"),
        (
            lambda data: dataclasses.replace(pruned_set(), image_embeds=torch.zeros(1, 4)).to_bytes(),
            "do not fit each other",
        ),
    ],
)
def test_what_is_no_pruned_set_is_refused_in_one_line(spoil, reason):
    with pytest.raises(BadInput, match=reason) as caught:
        PrunedSet.from_bytes(spoil(pruned_set().to_bytes()), "x.safetensors")
    assert str(caught.value).startswith("x.safetensors: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.safetensors: can't be read"):
        load_pruned(tmp_path / "gone.safetensors")


# ---- contents that make no sense, under digests that are right -------------------------------------------------------


def staged_set():
    """A pruned set of two images, with all that a file may hold."""
    inside = plan((Stage(1, Attention(), (1,)), Stage(3, Attention(), (0,))), [2], 5)
    return dataclasses.replace(pruned_set(), placeholder_map=torch.tensor([1, 5]), schedule=inside)


def selected_set():
    """A pruned set of two images, all tokens of which enter, and one of each stays from a layer on."""
    inside = plan((Stage(2, Selection((1, 5)), (1, 1), "compact"),), [2, 4], 5)
    return dataclasses.replace(
        pruned_set(),
        image_embeds=torch.randn(6, 4),
        kept=torch.arange(6),
        placeholder_map=torch.arange(6),
        input_ids=torch.tensor([3, 4, 4, 4, 4, 4, 4, 9]),
        position_ids=torch.tensor([0, 2, 6, 7, 8, 9, 11, 12]),
        positions="compact",
        schedule=inside,
    )


def set_with_prefix():
    """The same with a prefix of two layers in place of image embeds; the prompt's last token is behind it."""
    torch.manual_seed(0)
    pruned = selected_set()
    keys, values = torch.randn(2, 2, 3, 7, 4, dtype=torch.bfloat16)
    prefix = Prefix(pruned.input_ids[:7], keys, values, torch.randn(7, 12, dtype=torch.bfloat16))
    return dataclasses.replace(pruned, image_embeds=prefix.hidden_states[:0], prefix=prefix)


def test_what_the_faults_start_from_is_whole():
    for pruned in (staged_set(), selected_set(), set_with_prefix()):
        same(pruned, PrunedSet.from_bytes(pruned.to_bytes(), "x"))
    assert staged_set().selected.tolist() == selected_set().selected.tolist() == [1, 5]
    assert selected_set().counts == "6 of 6 visual tokens, 2 from layer 2 on"
    data = encoded_image(torch.bfloat16).to_bytes()
    assert changed(data, lambda header, tensors: None) == data


@pytest.mark.parametrize("what", PRUNED_FAULTS)
def test_a_pruned_set_of_no_sense_is_refused(what):
    data = changed(staged_set().to_bytes(), PRUNED_FAULTS[what])
    with pytest.raises(BadInput) as caught:
        PrunedSet.from_bytes(data, "x.safetensors")
    reason = "its schema is 9, and this version reads 5" if what == "another schema" else "not a pruned set ("
    assert str(caught.value).startswith(f"x.safetensors: {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", SELECTION_FAULTS)
def test_a_selection_of_no_sense_is_refused(what):
    data = changed(selected_set().to_bytes(), SELECTION_FAULTS[what])
    with pytest.raises(BadInput, match=r"^x: not a pruned set \("):
        PrunedSet.from_bytes(data, "x")


@pytest.mark.parametrize("what", PREFIX_FAULTS)
def test_a_saved_prefix_of_no_sense_is_refused(what):
    data = changed(set_with_prefix().to_bytes(), PREFIX_FAULTS[what])
    with pytest.raises(BadInput, match=r"^x: not a pruned set \("):
        PrunedSet.from_bytes(data, "x")


def test_a_file_holds_image_embeds_or_their_prefix():
    pruned = set_with_prefix()
    assert pruned.to_json()["tokens"] == {"full": 6, "kept": 6, "separators": 0}
    both = dataclasses.replace(pruned, image_embeds=torch.randn(6, 4))
    assert PrunedSet.from_bytes(both.to_bytes(), "x").prefix is None


@pytest.mark.parametrize("what", ENTRY_FAULTS)
def test_an_encoded_image_of_no_sense_is_refused(what):
    data = changed(encoded_image(torch.bfloat16).to_bytes(), ENTRY_FAULTS[what])
    with pytest.raises(ValueError):
        EncodedImage.from_parts(*files.decode(data))


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_a_changed_pruned_set_is_refused_or_as_good_as_any(seed):
    rng = random.Random(seed)
    data = rng.choice((staged_set, selected_set, set_with_prefix))().to_bytes()
    with pytest.raises(BadInput, match=r"^x: not a pruned set \("):
        PrunedSet.from_bytes(raw(rng, data), "x")
    try:
        pruned = PrunedSet.from_bytes(semantic(rng, data), "x")
    except BadInput:
        return
    json.dumps(pruned.to_json(), allow_nan=False)
    assert pruned.counts
    same(pruned, PrunedSet.from_bytes(pruned.to_bytes(), "x"))


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_a_changed_encoded_image_is_refused_or_as_good_as_any(seed):
    rng = random.Random(seed)
    data = encoded_image(torch.bfloat16).to_bytes()
    with pytest.raises(files.FileFault):
        files.decode(raw(rng, data))
    try:
        image = EncodedImage.from_parts(*files.decode(semantic(rng, data)))
    except ValueError:
        return
    same(image, EncodedImage.from_parts(*files.decode(image.to_bytes())))


def test_a_header_nested_deep_is_refused_at_any_depth_of_the_caller():
    for depth in (70, 980, 985, 990, 995):
        nested = 0
        for _ in range(depth):
            nested = [nested]
        data = changed(staged_set().to_bytes(), put("method", "zone", value=nested)) if depth < 900 else None
        if data is None:  # what Python can't write is written by hand
            header = {"tensors": {}, "x": 0}
            text = json.dumps(header).replace(": 0", ": " + "[" * depth + "]" * depth).replace(" ", "")
            digest = files.hashlib.sha256(text.encode()).hexdigest()
            meta = '{"digest":"' + digest + '",' + text[1:]
            head = json.dumps({"__metadata__": {"gridprune": meta}}).encode()
            data = len(head).to_bytes(8, "little") + head
        with pytest.raises(BadInput, match="x: not a pruned set"):
            PrunedSet.from_bytes(data, "x")


# ---- what is read of a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["zeroes", "header", "table"])
def test_a_file_of_6_gb_is_refused_by_its_first_bytes(tmp_path, start):
    path = tmp_path / "x.safetensors"
    table = {"dtype": "U8", "shape": [6 << 30], "data_offsets": [0, 6 << 30]}
    meta = {"tensors": {}}
    meta = files.canonical(meta | {"digest": files.digest(meta)})
    head = files.canonical({"__metadata__": {"gridprune": meta}, "a": table}).encode()
    begin = {
        "zeroes": b"",
        "header": (1 << 40).to_bytes(8, "little"),
        "table": len(head).to_bytes(8, "little") + head,
    }
    path.write_bytes(begin[start])
    os.truncate(path, 6 << 30)
    tracemalloc.start()
    with pytest.raises(BadInput, match=r"x\.safetensors: not a pruned set"):
        load_pruned(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * files.MAX_HEADER
    tracemalloc.stop()


def test_a_pipe_and_a_folder_are_no_pruned_set(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(BadInput, match="not a regular file"):
            load_pruned(path)


def test_a_name_too_long_is_told(tmp_path):
    with pytest.raises(BadInput, match="can't be read"):
        load_pruned(tmp_path / ("a" * 300))


def test_what_could_not_be_read_again_is_not_written(monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", files.MAX_HEADER)
    with pytest.raises(BadInput, match="a smaller `keep`"):
        pruned_set().to_bytes()
