"""Eight bits a number: how far vision features may be off, and what an entry in eight bits is."""

import dataclasses
import hashlib
import math
from pathlib import Path

import pytest
import torch
from fuzz.files import ENTRY_FAULTS, changed, put, swap
from hypothesis import given
from hypothesis import strategies as st

from gridprune_cli.cache import files
from gridprune_cli.cache.files import RawTensor
from gridprune_cli.cache.quantize import KINDS, Packed, pack
from gridprune_cli.cache.store import open_store
from gridprune_cli.errors import BadInput
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning

EIGHT = sorted(KINDS)
SIMPLE = st.one_of(
    st.floats(-(2.0**120), 2.0**120, width=32), st.floats(-5, 5), st.sampled_from([0.0, -0.0, 1e-44, 1e-38, 448.0])
)
ROWS = st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(SIMPLE, min_size=n, max_size=n), min_size=1, max_size=4))


def float8_numbers() -> list[float]:
    """The numbers of e4m3, from its specification: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity."""
    numbers = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    numbers += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return [sign * number for number in numbers[:-1] for sign in (1, -1)]  # the last code is no number


def allowed(storage: str, top: float, x: float) -> float:
    """How far a number of a row with the largest magnitude `top` may be off, by the formats' steps."""
    if storage == "int8":
        return max(top / 127, 2.0**-126) / 2
    scale = max(top / 448, 2.0**-126)
    return max(abs(x) / 16, scale * 2.0**-10)  # half a step: of 3 bits of mantissa, and of the smallest exponent


@pytest.mark.parametrize("storage", EIGHT)
@given(features=ROWS)
def test_no_number_is_off_by_more_than_half_a_step(storage: str, features: list[list[float]]) -> None:
    given_features = torch.tensor(features, dtype=torch.float32)
    back = pack(given_features, storage).unpack(torch.float32)
    for row, unpacked in zip(given_features.tolist(), back.tolist(), strict=True):
        top = max(map(abs, row))
        for x, y in zip(row, unpacked, strict=True):
            assert math.isfinite(y) and abs(y - x) <= allowed(storage, top, x) * (1 + 1e-5)


@pytest.mark.parametrize("storage", EIGHT)
def test_codes_are_the_nearest_that_the_format_has(storage: str) -> None:
    features = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    features[0] *= torch.logspace(-8, 0, 50)  # far apart
    packed = pack(features, storage)
    assert packed.codes.dtype == KINDS[storage] and packed.scales.dtype == torch.float32
    numbers = torch.tensor([*map(float, range(-127, 128))] if storage == "int8" else float8_numbers())
    exact = features / packed.scales[:, None]
    nearest = (exact[..., None] - numbers).abs().amin(-1)
    assert torch.equal((exact - packed.codes.float()).abs(), nearest)
    assert packed.codes.float().abs().amax(1).tolist() == [numbers.max().item()] * 20  # all of the format is used


@pytest.mark.parametrize("storage", EIGHT)
def test_rows_do_not_depend_on_each_other(storage: str) -> None:
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1e-9], [1], [9], [1e9], [0]]
    )
    whole = pack(features, storage).unpack(torch.float32)
    for n in range(5):
        assert torch.equal(whole[n], pack(features[n : n + 1], storage).unpack(torch.float32)[0])
    assert torch.equal(whole[4], torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", EIGHT)
def test_what_comes_back_has_the_dtype_asked_for_and_is_finite(storage: str, dtype: torch.dtype) -> None:
    largest = torch.tensor([[65504.0, 1.0, -65504.0]]).to(dtype)
    back = pack(largest, storage).unpack(dtype)
    assert back.dtype == dtype and torch.isfinite(back).all()
    assert back[0].tolist() == pytest.approx(largest[0].tolist(), rel=1e-6, abs=65504 / 254)


def test_codes_and_scales_must_fit() -> None:
    for scales in (torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="scales"):
            Packed(torch.zeros(2, 4, dtype=torch.int8), scales)


# ---- entries ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=EIGHT)
def pipeline(request, tiny_llava: Path) -> Pipeline:
    return Pipeline(str(tiny_llava), store=open_store(), dtype="bfloat16", cache_dtype=request.param)


def test_an_answer_is_the_same_from_a_new_entry_an_old_one_and_none(pipeline: Pipeline, noise, tmp_path, tiny_llava):
    path = tmp_path / "a.png"
    noise((90, 70)).image.save(path)
    asked = "what is left?", Pruning(keep=0.5)
    new = pipeline.ask(path, *asked, max_new_tokens=4)
    old = Pipeline(str(tiny_llava), store=open_store(), dtype="bfloat16", cache_dtype=pipeline.encoder.cache_dtype).ask(
        path, *asked, max_new_tokens=4
    )
    uncached = Pipeline(str(tiny_llava), dtype="bfloat16", cache_dtype=pipeline.encoder.cache_dtype).ask(
        path, *asked, max_new_tokens=4
    )
    assert (new.hit, old.hit, uncached.hit) == (False, True, False)
    assert new.pruned.to_bytes() == old.pruned.to_bytes() == uncached.pruned.to_bytes()
    assert new.text == old.text == uncached.text


def test_an_entry_holds_codes_and_scales_and_gives_the_dtype_of_the_tower(pipeline: Pipeline, noise) -> None:
    picture = noise((90, 70))
    full = Pipeline(pipeline.model, store=open_store(), dtype="bfloat16")
    exact, packed = full.encoder.encode([picture])[0], pipeline.encoder.encode([picture])[0]
    assert packed.key != exact.key and full.encoder.key(picture.sha256) == exact.key
    assert exact.packed is None and "storage" not in exact.encoder and exact.encoder == full.family.encoder
    assert packed.encoder == exact.encoder | {"storage": pipeline.encoder.cache_dtype}
    _, tensors = pipeline.store.get(pipeline.encoder.identity(), packed.key)
    count, width = exact.vision_features.shape
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    assert kinds == {
        "vision_features": ({"float8": "F8_E4M3", "int8": "I8"}[pipeline.encoder.cache_dtype], (count, width)),
        "scales": ("F32", (count,)),
        "saliency": ("BF16", (count,)),
        "placeholder_map": ("I32", (count,)),
    }
    hit = pipeline.encoder.look_up(picture.sha256, "again")
    assert hit.vision_features.dtype == torch.bfloat16 and torch.equal(hit.vision_features, packed.vision_features)
    assert torch.equal(
        hit.vision_features, pack(exact.vision_features, pipeline.encoder.cache_dtype).unpack(torch.bfloat16)
    )
    assert torch.equal(hit.saliency, exact.saliency)
    assert hit.nbytes == count * (width + 4 + 2 + 4) < exact.nbytes
    assert dataclasses.replace(hit, name=packed.name).to_bytes() == packed.to_bytes()


def _codes_as(dtype: str):
    def spoil(header, tensors):
        return tensors | {
            "vision_features": RawTensor(dtype, tensors["vision_features"].shape, tensors["vision_features"].data)
        }

    return spoil


SPOILT = {
    "no scales": lambda header, tensors: {
        name: tensors[name] for name in ("vision_features", "saliency", "placeholder_map")
    },
    "too few scales": lambda header, tensors: tensors | {"scales": RawTensor("F32", (1,), bytes(4))},
    "scales of another dtype": lambda header, tensors: (
        tensors | {"scales": RawTensor("I32", tensors["scales"].shape, tensors["scales"].data)}
    ),
    "codes of another dtype": _codes_as("U8"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_parts_that_do_not_fit_are_a_miss(pipeline: Pipeline, noise, how: str) -> None:
    picture = noise((90, 70))
    image = pipeline.encoder.encode([picture])[0]
    header, tensors = files.decode(image.to_bytes())
    pipeline.store.put(pipeline.encoder.identity(), image.key, files.encode(SPOILT[how](header, tensors), header))
    assert pipeline.encoder.look_up(picture.sha256, "a") is None


def test_an_entry_of_no_sense_is_a_miss_and_is_written_anew(tiny_llava: Path, noise) -> None:
    """Digests are right, contents are not. The last of them only the model can tell."""
    pipeline, picture = Pipeline(str(tiny_llava), store=open_store(), dtype="bfloat16"), noise((90, 70))
    (image,) = pipeline.encoder.encode([dataclasses.replace(picture, notes=("noise",))])
    wider = torch.cat([image.vision_features, image.vision_features], 1)
    faults = ENTRY_FAULTS | {
        "wider states": swap("vision_features", lambda _: wider),
        "another placeholder": put("prompt", "placeholder", value="<image>"),
        "separators": swap(
            "placeholder_map", lambda placeholder_map: torch.cat([placeholder_map, placeholder_map[:1] * 0 - 1])
        ),
        "another image": put("image", value="0" * 64),
    }
    accepted = []
    for what, fault in faults.items():
        data = changed(image.to_bytes(), fault)
        assert pipeline.store.put(pipeline.encoder.identity(), image.key, data)
        if pipeline.encoder.look_up(picture.sha256, "a") is not None:
            accepted.append(what)
    assert not accepted
    (again,) = pipeline.encoder.encode([dataclasses.replace(picture, notes=("noise",))])
    assert again.to_bytes() == image.to_bytes() and pipeline.encoder.look_up(picture.sha256, "a") is not None


def test_every_flipped_bit_of_codes_and_scales_is_a_miss(pipeline: Pipeline, noise) -> None:
    picture = noise((90, 70))
    image = pipeline.encoder.encode([picture])[0]
    data = image.to_bytes()
    for place in range(len(data) - image.nbytes, len(data), 97):
        broken = bytearray(data)
        broken[place] ^= 8
        pipeline.store.put(pipeline.encoder.identity(), image.key, bytes(broken))
        assert pipeline.encoder.look_up(picture.sha256, "a") is None
    pipeline.store.put(pipeline.encoder.identity(), image.key, data)
    assert pipeline.encoder.look_up(picture.sha256, "a") is not None


def test_a_localizer_stores_as_the_model_does(pipeline: Pipeline) -> None:
    localizer = pipeline.localizers.find(Pruning(localizer=pipeline.model))
    assert localizer is not None and localizer.cache_dtype == pipeline.encoder.cache_dtype


def test_an_entry_in_full_is_what_it_always_was() -> None:
    """Its bytes are frozen: a change of them would lose every cache there is."""
    from test_tokens import encoded_image

    vision_features = torch.arange(102, dtype=torch.bfloat16).view(17, 6)
    image = dataclasses.replace(
        encoded_image(torch.bfloat16), vision_features=vision_features, saliency=vision_features[:, 0]
    )
    image = dataclasses.replace(image, encoder={"family": "llava"}, prompt={"grid": [1, 2]})
    frozen = "0e5c6e517bf6d9d04abd3835557e01baf28e495f6fd54b463f054228fa1ceddc"
    assert hashlib.sha256(image.to_bytes()).hexdigest() == frozen


def test_another_name_is_refused(tiny_llava: Path) -> None:
    with pytest.raises(BadInput, match="cache_dtype=float4: not one of full, float8, int8"):
        Pipeline(str(tiny_llava), cache_dtype="float4")
