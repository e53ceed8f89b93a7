"""Which device and dtype are taken, and what is said of it."""

import pytest
import torch

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm import placement
from gridprune_cli.vlm.checkpoint import EMBEDDED
from gridprune_cli.vlm.placement import place


@pytest.mark.parametrize(
    ("model", "stored", "able", "dtype", "reason"),
    [
        ("some/model", "bfloat16", {"avx512_bf16": True}, torch.bfloat16, "AVX512_BF16"),
        ("some/model", "float16", {"avx512_bf16": True}, torch.bfloat16, "AVX512_BF16"),
        ("some/model", "float32", {"avx512_bf16": True}, torch.float32, "as the checkpoint is stored"),
        ("some/model", "bfloat16", {"avx512_bf16": False}, torch.float32, "without AVX512_BF16"),
        ("some/model", "bfloat16", {"architecture": "aarch64", "bf16": True}, torch.float32, "without AVX512_BF16"),
        (EMBEDDED, "bfloat16", {"avx512_bf16": True}, torch.float32, "too small"),
    ],
)
def test_the_dtype_on_a_cpu(model, stored, able, dtype, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    placed = place("cpu", "auto", model, stored)
    assert placed.dtype == dtype and reason in placed.dtype_reason
    assert place("cpu", "float16", model).dtype == torch.float16


def test_an_older_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert place("cpu", "auto", "some/model").dtype == torch.float32


@pytest.mark.parametrize(("able", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_on_a_gpu(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    placed = place("auto", "auto", EMBEDDED)
    assert (placed.device, placed.dtype, placed.sharded) == ("cuda", dtype, False)


def test_map_needs_accelerate(monkeypatch):
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"^device=map: needs accelerate; install it with `pip install accelerate`$"):
        place("map", "auto", "some/model")
    monkeypatch.setattr(placement, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place("map", "float32", "some/model").device == "cuda"
    assert place("map", "float32", "some/model").sharded


@pytest.mark.parametrize(("where", "dtype", "named"), [("abacus", "auto", "device"), ("cpu", "int4", "dtype=int4")])
def test_what_is_not_there_is_named(where, dtype, named):
    with pytest.raises(BadInput, match=f"^{named}"):
        place(where, dtype, "some/model")
