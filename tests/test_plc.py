"""Compression in the pipeline: pooled rows in every family, exact K, and what is recorded of it."""

import pytest
import torch
from tiny_families import open_pipeline

from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.pruning.region import inside
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm import FAMILIES
from gridprune_cli.vlm.compressor import Compressor, save_compressor

QUESTION = "what colour is the left object?"


@pytest.fixture(scope="module", params=list(FAMILIES))
def pipeline(request, checkpoint):
    return open_pipeline(checkpoint(request.param))


@pytest.fixture
def llava(tiny_llava):
    return Pipeline(str(tiny_llava), dtype="float32")


def slow_states(image, kept, region):
    """States of the kept tokens as pooling should leave them, from the definition."""
    within = inside(image.views, region).tolist() if region else [False] * image.count
    places = [(v, i // view.cols, i % view.cols) for v, view in enumerate(image.views) for i in range(view.count)]
    cells = {anchor: [anchor] for anchor in kept}
    for token, (view, row, col) in enumerate(places):
        near = [a for a in kept if places[a][0] == view and not within[a]]
        if token in cells or within[token] or not near:
            continue
        cells[min(near, key=lambda a: (places[a][1] - row) ** 2 + (places[a][2] - col) ** 2)].append(token)
    rows = []
    for anchor in kept:
        weight = image.saliency[cells[anchor]].double()
        rows.append((image.vision_features[cells[anchor]].double() * (weight / weight.sum())[:, None]).sum(0))
    return torch.stack(rows).to(image.vision_features.dtype)


@pytest.mark.parametrize("region", [(0, 0, 3, 7), "none"])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_of_a_set_are_means_of_their_cells(pipeline, noise, count, region):
    """And nothing else changes: K, what is kept, prompt, positions and separators are those of a set without."""
    pictures = [noise((100, 80)), noise((210, 70), seed=1)][:count]
    images = [pipeline.encoder.encode([picture], several=count > 1)[0] for picture in pictures]
    plain = pipeline.prune(images, QUESTION, Pruning(keep=0.3, region=region))
    pooled = pipeline.prune(images, QUESTION, Pruning(keep=0.3, region=region, plc="pool"))
    for name in ("kept", "input_ids", "position_ids"):
        assert torch.equal(getattr(plain, name), getattr(pooled, name))
    expected, first = [], 0
    for image, origin in zip(images, pooled.images, strict=True):
        kept = [int(i) - first for i in pooled.kept if first <= i < first + image.count]
        assert len(kept) == int(0.3 * image.count + 0.5)
        vision_features = image.vision_features.clone()
        vision_features[kept] = slow_states(image, kept, origin.region)
        stays = [slot for slot in image.placeholder_map.tolist() if slot in kept]
        expected.append(pipeline.family.project(vision_features[stays]))
        first += image.count
    placeholder_map = torch.cat([image.placeholder_map for image in images])
    assert len(plain.image_embeds) == len(pooled.image_embeds)
    rows = pooled.image_embeds
    if (placeholder_map < 0).any():  # separators are left as they were
        separator = (plain.image_embeds == pipeline.family.separator()).all(1)
        assert torch.equal(rows[separator], plain.image_embeds[separator])
        rows = rows[~separator]
    assert torch.allclose(rows, torch.cat(expected), atol=1e-4)
    assert not torch.allclose(pooled.image_embeds, plain.image_embeds, atol=1e-3)


def test_a_compressed_set_from_disk_answers_the_same(pipeline, noise):
    image = pipeline.encoder.encode([noise((100, 80))])[0]
    pooled = pipeline.prune(image, QUESTION, Pruning(keep=0.3, plc="pool"))
    again = PrunedSet.from_bytes(pooled.to_bytes(), "x")
    assert (again.plc, again.images[0].ratios) == ("pool", pooled.images[0].ratios)
    assert generate(pipeline.family, [again], 6)[0].ids == generate(pipeline.family, [pooled], 6)[0].ids


def test_with_everything_kept_rows_stay_as_they_are(pipeline, noise):
    image = pipeline.encoder.encode([noise((100, 80))])[0]
    plain, pooled = (pipeline.prune(image, QUESTION, Pruning(keep=1.0, plc=plc)) for plc in ("off", "pool"))
    assert torch.equal(plain.image_embeds, pooled.image_embeds)


def test_an_image_that_keeps_nothing_is_left_out(llava, noise):
    images = [llava.encoder.encode([noise((100, 80), seed)])[0] for seed in range(3)]
    pruning = Pruning(tokens=2, share_budget=True, method=make_method("fastervlm"), plc="pool")
    pooled = llava.prune(images, QUESTION, pruning)
    assert len(pooled.kept) == len(pooled.image_embeds) == 2 and torch.isfinite(pooled.image_embeds).all()
    ratios = [origin.ratios for origin in pooled.images]
    assert {"inside": None, "outside": None} in ratios


def test_ratios_split_the_budget(llava, noise):
    image = llava.encoder.encode([noise((224, 224))])[0]  # 4 x 4 tokens
    box = (0, 0, 3, 3)  # four of them

    def kept(**settings):
        pruned = llava.prune(image, QUESTION, Pruning(region=box, plc="pool", **settings))
        within = inside(image.views, box)[pruned.kept]
        record = pruned.to_json()
        assert record["plc"] == "pool" and record["tokens"]["kept"] == len(pruned.kept)
        return int(within.sum()), int((~within).sum()), record["ratios"]

    assert kept(tokens=5, inside_ratio=2.0) == (2, 3, {"inside": 2.0, "outside": 4.0})
    assert kept(tokens=5, outside_ratio=12.0) == (4, 1, {"inside": 1.0, "outside": 12.0})
    assert kept(tokens=5, inside_ratio=1.0, outside_ratio=3.0) == (4, 4, {"inside": 1.0, "outside": 3.0})
    assert kept(tokens=17, inside_ratio=1.0, outside_ratio=3.0) == kept(inside_ratio=1.0, outside_ratio=3.0)  # of 16
    assert kept(tokens=8, inside_ratio=4.0) == (2, 6, {"inside": 2.0, "outside": 2.0})  # never more than outside
    by_method = {"inside": pytest.approx(4 / 3, abs=0.01), "outside": 6.0}  # the method's own split
    assert kept(tokens=5) == (3, 2, by_method)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plc": "some"}, "plc.some: not one of off, pool, trained"),
        ({"inside_ratio": 2.0}, "inside.ratio: only with .*plc"),
        ({"plc": "pool", "outside_ratio": 0.5}, "outside.ratio.0.5: must be at least 1"),
        ({"plc": "pool", "outside_ratio": float("nan")}, "outside.ratio.nan: must be at least 1"),
        ({"plc": "pool", "inside_ratio": 4.0, "outside_ratio": 2.0}, "must not be above .*outside.ratio"),
        ({"plc": "pool", "inside_ratio": 2.0, "region": "none"}, "inside.ratio: needs a region"),
        ({"plc": "pool", "inside_ratio": 2.0, "share_budget": True}, "inside.ratio: needs a region"),
        ({"plc": "pool", "inside_ratio": 2.0, "method": make_method("fastervlm")}, "inside.ratio: needs a region"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(BadInput, match=message):
        Pruning(**settings)


def test_a_model_without_a_compressor(llava, noise, tmp_path):
    image = llava.encoder.encode([noise((100, 80))])[0]
    with pytest.raises(BadInput, match=r"plc=trained: .* no compressor/model\.safetensors; use `plc=pool`") as caught:
        llava.prune(image, QUESTION, Pruning(plc="trained"))
    assert "\n" not in str(caught.value)
    path = tmp_path / "a.png"
    noise((50, 50)).image.save(path)
    with pytest.raises(BadInput, match="plc=trained"):
        llava.ask(path, QUESTION, Pruning(plc="trained"))
    assert set(llava.family._loaded) == {"tower"}  # it was told before more was loaded


@pytest.fixture
def with_compressor(tiny_llava, tmp_path):
    """A tiny model with a compressor of random weights beside it: (pipeline, compressor)."""
    import shutil

    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    pipeline = Pipeline(str(folder), dtype="float32")
    torch.manual_seed(0)
    compressor = Compressor(pipeline.family.checkpoint.tower["hidden_size"])
    for parameter in compressor.parameters():
        parameter.data = (torch.randn_like(parameter) * 0.2).bfloat16().float()
    save_compressor(compressor, folder)
    return pipeline, compressor.eval()


@pytest.mark.parametrize("method", ["gridprune", "uniform"])
def test_trained_rows_are_what_the_compressor_makes_of_pooled_ones(with_compressor, noise, method):
    pipeline, compressor = with_compressor
    image = pipeline.encoder.encode([noise((224, 224))])[0]
    pruned = pipeline.prune(image, QUESTION, Pruning(keep=0.4, plc="trained", method=make_method(method)))
    kept, region = pruned.kept, pruned.images[0].region
    within = inside(image.views, region) if region else torch.zeros(image.count, dtype=torch.bool)
    pooled = image.vision_features[kept] if bool(within.all()) else slow_states(image, kept.tolist(), region)
    relevance = pipeline.family.relevance(image.vision_features, QUESTION)
    with torch.no_grad():
        vision_features = compressor(
            image.vision_features[None], relevance[None], within[None], pooled[None], within[kept][None]
        )[0]
    assert torch.allclose(pruned.image_embeds, pipeline.family.project(vision_features), atol=1e-4)
    again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
    assert again.plc == "trained"
    assert generate(pipeline.family, [again], 6)[0].ids == generate(pipeline.family, [pruned], 6)[0].ids


def test_a_compressor_of_cosines_on_other_relevance_is_a_remark(with_compressor, noise):
    pipeline, _ = with_compressor
    other = Pipeline(pipeline.model, dtype="float32", relevance="attention")
    remark = (
        "compressors are trained on relevance from CLIP, and here it comes from attention; compare `plc=trained` with "
        "`plc=pool`"
    )
    for asking, plc, expected in ((pipeline, "trained", ()), (other, "pool", ()), (other, "trained", (remark,))):
        (encoded,) = asking.encoder.encode([noise((224, 224))])
        assert asking.prune(encoded, QUESTION, Pruning(plc=plc)).notes == expected


def test_a_compressor_leaves_the_fingerprint_of_the_language_model(with_compressor, llava):
    assert with_compressor[0].family.fingerprint == llava.family.fingerprint


def test_a_set_of_an_older_schema_is_refused_with_what_to_do(llava, noise):
    from gridprune_cli.cache import files

    header, tensors = files.decode(llava.prune(llava.encoder.encode([noise((100, 80))])[0], QUESTION).to_bytes())
    header = {k: v for k, v in header.items() if k not in ("plc", "tensors", "digest")} | {"schema": 1}
    with pytest.raises(BadInput, match=r"^x: its schema is 1, and this version reads 5; prune again, with .*$"):
        PrunedSet.from_bytes(files.encode(tensors, header), "x")
