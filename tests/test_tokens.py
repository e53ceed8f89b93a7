"""Encoded images and pruned sets survive the disk, and nothing else passes for one."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridprune_cli import files, store
from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.signals import View
from gridprune_cli.tokens import EncodedImage, Origin, PrunedSet, load_pruned


def same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)), field.name
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
        states=torch.randn(rows * cols + 2, 6).to(dtype),
        saliency=torch.rand(rows * cols + 2).to(dtype),
        slots=torch.tensor([*range(rows * cols), -1, rows * cols + 1, rows * cols], dtype=torch.int32),
        prompt={"placeholder": "<image>", "grid": [1, 2]},
        notes=("first of 2 frames",),
    )


def pruned_set(relevance=True):
    torch.manual_seed(0)
    return PrunedSet(
        rows=torch.randn(2, 4, dtype=torch.bfloat16),
        kept=torch.tensor([1, 5]),
        input_ids=torch.tensor([3, 4, 4, 9]),
        position_ids=torch.tensor([0, 2, 6, 7]),
        saliency=torch.rand(6),
        relevance=torch.rand(6) if relevance else None,
        images=(
            Origin("k", "i", "n", (View(1, 2),), (1, 2, 3, 4) if relevance else None, {"rows": 1, "cols": 1, "budgets": [1]}),
            Origin("l", "j", "o", (View(2, 2, (0.25, 0.0, 0.75, 1.0)),), None, None),
        ),
        model="m",
        fingerprint="f" * 64,
        question="Où?",
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
        states=torch.zeros(576, 1024, dtype=torch.bfloat16),
        saliency=torch.zeros(576, dtype=torch.bfloat16),
        slots=torch.arange(576, dtype=torch.int32),
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
    monkeypatch.setattr(store, "SCHEMA", 9)
    for data, found in ((old, False), (image.to_bytes(), True)):
        cache.put(image.encoder, image.key, data)
        assert (cache.get(image.encoder, image.key) is not None) == found


def of_schema_9(data):
    header, tensors = files.decode(data)
    return files.encode(tensors, {k: v for k, v in header.items() if k not in ("tensors", "digest")} | {"schema": 9})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:-3], "not a pruned set"),
        (lambda data: b"", "not a pruned set"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "not a pruned set"),
        (lambda data: encoded_image(torch.float32).to_bytes(), "it holds something else"),
        (lambda data: of_schema_9(data), "its schema is 9, this version reads 1"),
        (lambda data: dataclasses.replace(pruned_set(), rows=torch.zeros(1, 4)).to_bytes(), "do not fit each other"),
    ],
)
def test_what_is_no_pruned_set_is_refused_in_one_line(spoil, reason):
    with pytest.raises(BadInput, match=reason) as caught:
        PrunedSet.from_bytes(spoil(pruned_set().to_bytes()), "x.safetensors")
    assert str(caught.value).startswith("x.safetensors: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"gone\.safetensors: can't be read"):
        load_pruned(tmp_path / "gone.safetensors")
