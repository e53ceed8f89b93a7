"""What `encode` says that it will write, against what it writes."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gridprune_cli.cache.store import open_store
from gridprune_cli.errors import BadInput
from gridprune_cli.images import Picture, load_image, measure
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.runners import forecast as module
from gridprune_cli.runners.forecast import entry_bytes, forecast, free_bytes, may_lack_room
from gridprune_cli.scenes.scene import draw, make_scene
from gridprune_cli.vlm import FAMILIES


@pytest.fixture(scope="module", params=[*FAMILIES, "llava_siglip"])
def pipeline(request, checkpoint):
    return Pipeline(str(checkpoint(request.param)), dtype="bfloat16")


def test_no_weights_are_read_to_count_tokens(pipeline):
    assert pipeline.family.count_placeholders((640, 480)) > 0 and pipeline.family.width > 0
    assert not pipeline.family._loaded


@settings(max_examples=12)
@example((640, 480))
@example((210, 70))
@example((31, 29))
@example((1, 300))
@given(st.tuples(*[st.integers(1, 400)] * 2))
def test_a_familys_settings_give_the_tokens_of_a_size_and_their_width(pipeline, size):
    picture = Picture(Image.new("RGB", size, "red"), "0" * 64, "a", ())
    try:
        count = pipeline.family.count_placeholders(size)
    except ValueError:
        with pytest.raises(BadInput, match=f"a picture of {size[0]} x {size[1]}: "):
            pipeline.encoder.encode([picture])
        return
    encoded = pipeline.encoder.encode([picture])[0]
    assert (count, pipeline.family.width) == (len(encoded.placeholder_map), encoded.vision_features.shape[1])
    assert encoded.vision_features.dtype == encoded.saliency.dtype == torch.bfloat16  # so that one tells the other's


def test_encode_of_any_family(pipeline, noise, command, tmp_path):
    noise((210, 70)).image.save(tmp_path / "a.png")
    options = ("--model", pipeline.family.checkpoint.folder, "--dtype", "bfloat16")
    code, out, err = command("encode", tmp_path / "a.png", "--dry-run", *options)
    assert (code, err) == (0, "") and out.startswith("1 images, 0 of them cached already, 1 to encode")
    code, out, err = command("encode", tmp_path / "a.png", *options)
    assert (code, out) == (0, "") and err.startswith("1 images, 0 of them cached already")


@pytest.fixture
def scenes(tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    for seed in range(4):
        draw(make_scene(seed))[0].save(folder / f"{seed}.png")
    return folder


@pytest.mark.parametrize("storage", ["full", "float8", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_an_entry_are_about_those_said(scenes, storage, dtype):
    pipeline = Pipeline(store=open_store(), cache_dtype=storage, dtype=dtype)
    encoded = pipeline.encode(scenes / "0.png")[0]
    written = len(encoded.to_bytes())
    assert written == pipeline.store.bytes_of(pipeline.encoder.identity(), encoded.key)
    assert abs(entry_bytes(pipeline.encoder, encoded.size) / written - 1) < 0.05


@pytest.mark.parametrize("storage", ["full", "int8"])
def test_the_bytes_of_prefixes_are_counted_where_they_lack(scenes, storage):
    pipeline = Pipeline("scenes", store=open_store(), cache_dtype=storage, dtype="bfloat16")
    images = sorted(scenes.iterdir())
    bare = forecast(pipeline.encoder, pipeline.store, images)
    first = forecast(pipeline.encoder, pipeline.store, images, with_prefix=True)
    assert may_lack_room(pipeline.encoder, pipeline.store, images) is False
    pipeline.store.limit = (bare.total + first.total) // 2
    assert not may_lack_room(pipeline.encoder, pipeline.store, images)
    assert may_lack_room(pipeline.encoder, pipeline.store, images, with_prefix=True)
    pipeline.store.limit = None
    list(pipeline.encode_all(images[:1]))
    lacks = forecast(pipeline.encoder, pipeline.store, images, with_prefix=True)
    assert (lacks.hits, lacks.encode) == (1, 3) and lacks.total == pytest.approx(first.total, rel=0.01)
    assert first.bytes - lacks.bytes == pytest.approx(bare.bytes / 4, rel=0.01)
    list(pipeline.encode_all(images, with_prefix=True))
    for entry in pipeline.store.entries():
        os.utime(entry.path, (1, 1))
    done = forecast(pipeline.encoder, pipeline.store, images, with_prefix=True)
    assert {entry.used for entry in pipeline.store.entries()} == {1}  # none counts as used
    assert (done.hits, done.bytes, done.growth) == (4, 0, 0)
    written = sum(entry.bytes for entry in pipeline.store.entries())
    assert done.total == written and first.total == pytest.approx(written, rel=0.15)  # the prompt's text is a guess
    again = forecast(pipeline.encoder, pipeline.store, images, with_prefix=True, refresh=True)
    assert again.bytes == first.bytes and again.growth < 0.15 * again.bytes


def test_images_are_counted_as_encode_counts_them(scenes, command):
    (scenes / "twin.png").write_bytes((scenes / "1.png").read_bytes())
    (scenes / "broken.png").write_bytes(b"x")
    assert command("encode", scenes / "0.png")[0] == 0
    pipeline = Pipeline(store=open_store())
    images = sorted(scenes.iterdir())
    seen = []
    expected = forecast(pipeline.encoder, pipeline.store, images, step=lambda: seen.append(1))
    assert (expected.images, expected.hits, expected.encode, expected.unreadable, len(seen)) == (6, 2, 3, 1, 6)
    assert expected.bytes == expected.growth == pytest.approx(expected.total * 3 / 4, rel=0.05)
    assert "5 images, 2 of them cached already" in command("encode", scenes)[2]
    again = forecast(pipeline.encoder, pipeline.store, images, refresh=True)
    assert (again.hits, again.encode) == (1, 4) and again.bytes == again.total
    assert again.growth < 0.1 * again.bytes  # what is replaced takes no more room
    done = forecast(pipeline.encoder, pipeline.store, images)
    assert (done.hits, done.encode, done.bytes) == (5, 0, 0)
    assert done.total == sum(entry.bytes for entry in pipeline.store.entries())
    assert not pipeline.family._loaded


def test_a_dry_run_writes_nothing_and_reads_no_weights(scenes, run, tmp_path, monkeypatch, tiny_llava):
    from gridprune_cli.vlm import parts

    monkeypatch.setattr(parts, "load_part", None)
    code, out, err = run("encode", scenes, "--dry-run")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == "4 images, 0 of them cached already, 4 to encode"
    assert second.startswith("about ") and "to write; limit 20.0 GiB, " in second
    record = json.loads(run("encode", scenes, "--dry-run", "--json")[1])
    assert {name: record[name] for name in ("images", "hits", "encode", "unreadable")} == {
        "images": 4,
        "hits": 0,
        "encode": 4,
        "unreadable": 0,
    }
    assert record["limit"] == 20 << 30 and record["free"] > 0 and 0 < record["bytes"] == record["growth"]
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_leaves_an_entrys_time_and_a_broken_entry_alone(scenes, run, tmp_path):
    run("encode", scenes)
    paths = sorted((tmp_path / "cache").rglob("*.safetensors"))
    paths[0].write_bytes(b"broken")
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert run("encode", scenes, "--dry-run")[0] == 0
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_more_than_the_limit_holds_is_refused_before_anything_is_done(scenes, command, tmp_path, monkeypatch):
    size = entry_bytes(Pipeline().encoder, measure(scenes / "0.png"))
    for dry in ((), ("--dry-run",)):
        code, out, err = command("encode", scenes, "--cache-limit", 3 * size, *dry)
        assert code == 1 and err.count("\n") == 1 and bool(out) == bool(dry)
        assert "--cache-limit 5" in err and "0 for none, or --cache-dtype float8" in err
        assert not list(tmp_path.rglob("*.safetensors"))
    assert command("encode", scenes, "--cache-limit", 3 * size, "--cache-dtype", "float8")[0] == 0
    assert command("encode", scenes, "--cache-limit", 0)[0] == 0


def test_equal_files_and_entries_that_are_there_do_not_count_twice(scenes, command):
    size = entry_bytes(Pipeline().encoder, measure(scenes / "0.png"))
    for copy in range(4):
        shutil.copy(scenes / "0.png", scenes / f"copy-{copy}.png")
    assert command("encode", scenes, "--cache-limit", 5 * size)[0] == 0
    assert command("encode", scenes, "--cache-limit", 5 * size)[0] == 0


def test_more_than_the_disk_has_is_refused_but_not_what_is_there(scenes, command, tmp_path, monkeypatch):
    size = entry_bytes(Pipeline().encoder, measure(scenes / "0.png"))
    monkeypatch.setattr(module, "free_bytes", lambda folder: 2 * size)
    code, _, err = command("encode", scenes)
    assert code == 1 and err.startswith(f"gridprune: {tmp_path / 'cache'}: about ") and err.count("\n") == 1
    assert "name another --cache-dir, or --cache-dtype float8" in err
    assert "--cache-dtype" not in command("encode", scenes, "--cache-dtype", "int8")[2]
    assert command("encode", scenes / "0.png", scenes / "1.png")[0] == 0
    assert command("encode", scenes)[0] == 0
    monkeypatch.setattr(module, "free_bytes", lambda folder: 0)
    assert command("encode", scenes)[0] == 0


def test_some_headers_speak_for_all_images(scenes, monkeypatch):
    pipeline = Pipeline(store=open_store())
    looked = []
    monkeypatch.setattr(module, "measure", lambda image: looked.append(image) or measure(image))
    images = sorted(scenes.iterdir()) * 300
    pipeline.store.limit = 1205 * entry_bytes(pipeline.encoder, measure(images[0]))
    assert not may_lack_room(pipeline.encoder, pipeline.store, images)
    assert len(looked) == 240
    assert may_lack_room(pipeline.encoder, pipeline.store, images + images[:8])
    pipeline.store.limit = None
    assert not may_lack_room(pipeline.encoder, pipeline.store, [])


def test_a_pipe_is_left_to_be_encoded(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    looked = []
    monkeypatch.setattr(module, "measure", lambda image: looked.append(image) or (9, 9))
    pipeline = Pipeline(store=open_store())
    assert not may_lack_room(pipeline.encoder, pipeline.store, [tmp_path / "pipe"]) and looked == []


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path, monkeypatch):
    disks = {tmp_path: shutil.disk_usage(tmp_path)}  # asked once: others write to the disk
    monkeypatch.setattr(shutil, "disk_usage", disks.__getitem__)
    assert free_bytes(tmp_path / "a" / "b") == disks[tmp_path].free > 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_header_gives_the_size_that_the_image_will_have(tmp_path, kind):
    path = tmp_path / "a"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    saving = {"exif": exif} if kind in ("JPEG", "WEBP", "TIFF") else {}
    Image.new("RGB", (40, 30)).save(path, kind, **saving)
    upright = (30, 40) if saving else (40, 30)
    assert measure(path) == measure(path.read_bytes()) == load_image(path).image.size == upright
