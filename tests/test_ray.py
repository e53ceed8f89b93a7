"""Ray as the engine: what it gives is what the local engine gives, whatever dies.

`IMAGES=500 pytest tests/test_ray.py -k killed` encodes more images than the suite does.
"""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gridprune_cli.cache.store import Store, open_store
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.runners import ray as ray_runner
from gridprune_cli.runners.ray import Ray, _cache, _decode, _encode, _received, _share, _Worker
from gridprune_cli.settings import Request

IMAGES = int(os.environ.get("IMAGES", "40"))
QUESTIONS = ("What colour is the star?", "Where is it?", "How many circles are there?")
LACKS_RAY = any(find_spec(name) is None for name in ("ray", "pyarrow", "pandas"))

with_ray = pytest.mark.skipif(LACKS_RAY, reason="needs Ray: pip install 'gridprune[ray]'")


def entries(root):
    """Bytes of every entry by its path below the cache; those that are broken fail the test."""
    store = Store(root, None)
    assert [fault for _, fault in store.verify() if fault] == []
    return {os.path.relpath(entry.path, root): Path(entry.path).read_bytes() for entry in store.entries()}


# ---- with Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(server, tmp_path):
    """Starts `gridprune` in the test's folder, with what it prints in the files `out` and `err` there."""

    def run(*arguments, **environment):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment  # of Ray's workers
        with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
            streams = (None, out.fileno(), err.fileno())
            return server.start(*arguments, cwd=tmp_path, env=environment, streams=streams)

    return run


def stderr_lines(folder):
    """The lines on stderr, but for those on progress that a slow machine makes."""
    lines = (folder / "err").read_text().splitlines()
    return [line for line in lines if not line.startswith(("encoding: ", "answering: "))]


def workers_of(process):
    """Ids of the processes below one that hold a model."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,command="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def below(pid):
        while pid in parents and pid != process.pid:
            pid = parents[pid]
        return pid == process.pid

    return [int(pid) for pid, _, name in rows if name.startswith("ray::") and "_Worker" in name and below(int(pid))]


@with_ray
@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing_and_doubles_nothing(start, command, tmp_path, monkeypatch):
    from gridprune_cli.scenes.scene import draw, make_scene

    (tmp_path / "photos").mkdir()
    for seed in range(IMAGES):
        draw(make_scene(seed))[0].save(tmp_path / "photos" / f"{seed:04}.png")
    cache = tmp_path / "cache"
    process = start(
        "encode", "photos", "--batch-size", 2, "--engine", "ray", "--workers", 2, "--json",
        GRIDPRUNE_CACHE_DIR=str(cache),
    )  # fmt: skip
    workers = []
    while process.poll() is None and len(workers) < 2:
        time.sleep(0.05)
        workers = workers_of(process)
    assert len(workers) == 2, (tmp_path / "err").read_text()
    while process.poll() is None and (written := len(list(cache.rglob("*.safetensors")))) < IMAGES // 4:
        time.sleep(0.002)
    victim = random.Random(IMAGES).choice(workers)
    assert victim in workers_of(process)  # it is alive, and at work
    os.kill(victim, signal.SIGKILL)
    assert written < IMAGES
    assert process.wait() == 0, (tmp_path / "err").read_text()

    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"photos/{seed:04}.png" for seed in range(IMAGES)]
    assert len({line["key"] for line in lines}) == IMAGES
    hits = sum(line["cache"] == "hit" for line in lines)  # what the worker had written, and not told of yet
    assert hits <= 2 * ray_runner._TOGETHER
    (notices,) = stderr_lines(tmp_path)
    assert notices.startswith(f"{IMAGES} images, {hits} of them cached already")

    monkeypatch.chdir(tmp_path)
    assert command("encode", "photos", "--batch-size", 2, "--cache-dir", tmp_path / "whole")[0] == 0
    assert entries(cache) == entries(tmp_path / "whole")


@pytest.fixture
def batch(run, tmp_path, noise, monkeypatch):
    """Writes questions about so many pictures, two of which fail, and answers them by the local engine: the command,
    and the lines that it wrote."""

    def write(count):
        lines = ["no line", json.dumps({"id": 7, "image": "gone.png", "question": QUESTIONS[0]})]
        for seed in range(count):
            noise((50 + seed % 40, 60), seed).image.save(tmp_path / f"{seed}.png")
        for question in QUESTIONS:
            lines += [json.dumps({"image": f"{n}.png", "question": question, "n": n}) for n in range(count)]
        (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
        arguments = ("batch", "questions.jsonl", "--batch-size", 2, "--keep", 0.5)
        monkeypatch.chdir(tmp_path)
        assert run(*arguments, "-o", "whole.jsonl")[0] == 3
        return arguments, (tmp_path / "whole.jsonl").read_bytes()

    return write


@with_ray
@pytest.mark.slow
def test_batch_on_a_ray_that_runs_gives_the_lines_of_the_local_engine(start, batch, tmp_path, address):
    arguments, whole = batch(8)
    ray = (*arguments, "--engine", "ray", "--address", address, "--workers", 1, "-o", "ray.jsonl")
    process = start(*ray, GRIDPRUNE_CACHE_DIR=str(tmp_path / "ray-cache"))
    assert process.wait() == 3, (tmp_path / "err").read_text()
    assert (tmp_path / "ray.jsonl").read_bytes() == whole
    assert stderr_lines(tmp_path)[-1].startswith("warning: 2 lines failed")


@with_ray
@pytest.mark.slow
def test_batch_on_a_ray_goes_on_where_it_was_interrupted(start, batch, tmp_path, address):
    arguments, whole = batch(IMAGES)
    out = tmp_path / "ray.jsonl"
    ray = (*arguments, "--engine", "ray", "--address", address, "--workers", 2, "--resume", out)
    process = start(*ray, GRIDPRUNE_CACHE_DIR=str(tmp_path / "ray-cache"))
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, (tmp_path / "err").read_text()
    decoded_blocks = out.read_bytes()
    assert decoded_blocks.endswith(b"\n") and whole.startswith(decoded_blocks) and len(decoded_blocks) < len(whole)
    assert f"--resume {out}" in stderr_lines(tmp_path)[-1]

    process = start(*ray, GRIDPRUNE_CACHE_DIR=str(tmp_path / "ray-cache"))
    assert process.wait() == 3, (tmp_path / "err").read_text()
    assert out.read_bytes() == whole
    summary, failures = stderr_lines(tmp_path)
    assert " done before, " in summary and failures.startswith("warning: 2 lines failed")  # of the first run


@with_ray
def test_a_ray_that_is_not_there_is_told(start, tmp_path):
    process = start("encode", __file__, "--engine", "ray", "--address", "127.0.0.1:1")
    assert process.wait() == 1
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert line.startswith("gridprune: --address 127.0.0.1:1: can't use Ray there (")


# ---- without it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tiny_llava):
    return Pipeline(str(tiny_llava), store=open_store(), dtype="float32")


@pytest.fixture
def pictures(tmp_path, noise):
    paths = []
    for seed in range(5):
        paths.append(str(tmp_path / f"{seed}.png"))
        noise((40 + 20 * seed, 60), seed).image.save(paths[-1])
    return paths


def through(pipeline, parts, *, refresh=False, worker=None):
    """What the two stages give for parts, which lie in this process one behind the other."""
    cache = _cache(pipeline.encoder, refresh)
    rows = [
        {"number": np.array([n]), "names": [pickle.dumps(batch)], "items": [pickle.dumps(batch)]}
        for n, batch in enumerate(parts)
    ]
    decoded_blocks = [_decode(row, cache, os.getcwd()) for row in rows]
    batch = {
        "number": np.concatenate([row["number"] for row in decoded_blocks]),
        "items": [row["items"][0] for row in decoded_blocks],
        "pictures": [row["pictures"][0] for row in decoded_blocks],
    }
    return (worker or start_worker(pipeline, refresh))(batch)["done"][0], [pickle.loads(p) for p in batch["pictures"]]


def start_worker(pipeline, refresh=False):
    from functools import partial

    import torch

    job = partial(_encode, refresh=refresh, with_prefix=False)
    return _Worker(pickle.dumps((pipeline.encoder, pipeline.localizers)), job, 2, os.getcwd(), torch.get_num_threads())


def test_stages_refuse_what_the_embedded_model_does_not_know(tmp_path, noise):
    photo = tmp_path / "photo.png"
    noise((60, 60)).image.save(photo)
    for _ in range(2):
        nobodys = Pipeline(store=open_store())
        row, _ = through(nobodys, [[str(photo)]])
        ((_, ((name, result, _),)),) = _received(iter([{"done": row}]), nobodys.runner())
        assert name == str(photo) and isinstance(result, BadInput) and str(result).startswith(f"{photo}: no scene")
        Pipeline("scenes", store=open_store()).encode(photo)  # so that the second time it is in the cache


def test_stages_encode_as_bulk_does(pipeline, pictures, tmp_path, tiny_llava):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    parts = [pictures[:2], [pictures[2], str(bad)], pictures[3:]]
    row, decoded = through(pipeline, parts)
    assert [sorted(workers) for workers in decoded] == [pictures[:2], [pictures[2]], pictures[3:]]
    results = dict(_received(iter([{"done": row}]), pipeline.runner()))
    other = Pipeline(str(tiny_llava), store=open_store(tmp_path / "other"), dtype="float32")
    expected = list(other.runner(images=2).encode([name for batch in parts for name in batch]))
    for (name, result, hit), expected_one in zip([r for n in range(3) for r in results[n]], expected, strict=True):
        assert (name, hit) == (expected_one[0], expected_one[2])
        if isinstance(expected_one[1], GridpruneError):
            assert (type(result), str(result)) == (type(expected_one[1]), str(expected_one[1]))
        else:
            assert (result.key, result.count, result.nbytes) == (
                expected_one[1].key,
                expected_one[1].count,
                expected_one[1].nbytes,
            )
    assert entries(pipeline.store.root) == entries(tmp_path / "other")

    row, decoded = through(pipeline, parts)  # nothing that is there is decoded
    assert decoded == [{}, {}, {}]
    received = _received(iter([{"done": row}]), pipeline.runner())
    assert [hit for _, results in received for _, _, hit in results] == [True, True, True, False, True, True]
    row, decoded = through(pipeline, [pictures], refresh=True)
    assert sorted(decoded[0]) == pictures
    assert not any(hit for _, _, hit in dict(_received(iter([{"done": row}]), pipeline.runner()))[0])


@pytest.mark.parametrize("storage", ["float8", "int8"])
def test_what_is_stored_in_eight_bits_is_found_and_not_decoded_again(storage, pictures, tmp_path, tiny_llava):
    pipeline = Pipeline(str(tiny_llava), store=open_store(tmp_path / "small"), dtype="float32", cache_dtype=storage)
    assert sorted(through(pipeline, [pictures])[1][0]) == pictures
    assert through(pipeline, [pictures])[1] == [{}]


def test_the_worker_does_not_decode_what_comes_decoded_and_heeds_a_file_that_changed(pipeline, pictures, monkeypatch):
    worker, loaded = start_worker(pipeline), []
    decode, load = ray_runner._decode, ray_runner.load_image

    def change(*arguments):
        decoded_blocks = decode(*arguments)
        Path(pictures[1]).write_bytes(Path(pictures[4]).read_bytes())
        monkeypatch.setattr(ray_runner, "load_image", lambda data, name: loaded.append(name) or load(data, name))
        return decoded_blocks

    monkeypatch.setitem(globals(), "_decode", change)
    row, _ = through(pipeline, [pictures[:3]], worker=worker)
    assert loaded == [pictures[1]]
    ((_, results),) = _received(iter([{"done": row}]), pipeline.runner())
    assert results[1][1].key == pipeline.encode(pictures[4])[0].key
    assert worker.pictures == {}


def test_large_pictures_are_left_to_the_worker(pipeline, pictures, monkeypatch):
    monkeypatch.setattr(ray_runner, "_MOST_PIXELS", 6001)
    row, decoded = through(pipeline, [pictures])
    assert sorted(decoded[0]) == pictures[:2]
    ((_, results),) = _received(iter([{"done": row}]), pipeline.runner())
    assert [name for name, _, _ in results] == pictures


def test_the_process_that_calls_keeps_the_limit(pipeline, pictures):
    pipeline.store.limit = 1
    row, _ = through(pipeline, [pictures[:2], pictures[2:]])
    assert len(entries(pipeline.store.root)) == 5  # though the worker wrote more than the limit
    notices = []
    pipeline.store.warn = notices.append
    list(_received(iter([{"done": row}]), pipeline.runner()))
    with pipeline:
        assert len(entries(pipeline.store.root)) == 5  # what this run wrote stays
    assert len(notices) == 1 and "over its limit" in notices[0]


def test_a_cache_that_cannot_be_written_is_a_fault_of_all(tiny_llava, pictures, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    pipeline = Pipeline(str(tiny_llava), store=open_store(tmp_path / "file" / "below"), dtype="float32")
    row, _ = through(pipeline, [pictures])
    caplog.clear()  # of the worker, which is in this process here
    with pytest.raises(GridpruneError, match="can't be written; what was stored before stays"):
        list(_received(iter([{"done": row}]), pipeline.runner()))
    assert len(caplog.messages) == 1 and "can't be written" in caplog.text


def test_what_workers_log_is_logged_once(pipeline, caplog):
    done = pickle.dumps(ray_runner._Done([(0, [1])], ["a", "b"], [], None))
    received = _received(iter([{"done": done}, {"done": done}]), pipeline.runner())
    assert list(received) == [(0, [1])] * 2
    assert caplog.messages == ["a", "b"]


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64])
def test_workers_leave_cpus_to_what_decodes(cpus, workers):
    assert 0 < workers * _share(cpus, 2 * workers) + _share(cpus, 2) <= cpus


def test_without_ray_a_line_says_what_to_install(run, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_runner, "find_spec", lambda name: None)
    code, out, err = run("encode", tmp_path, "--engine", "ray")
    assert (code, out) == (2, "")
    assert err == "gridprune: --engine ray: ray and pyarrow and pandas missing; pip install 'gridprune[ray]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "spark"), "Invalid value for '--engine': 'spark' is not one of 'local', 'ray'"),
        (("--workers", "2"), "--workers: only with --engine ray"),
        (("--address", "auto"), "--address: only with --engine ray"),
    ],
)
@pytest.mark.parametrize("name", ["encode", "batch"])
def test_options_that_do_not_fit(run, tmp_path, name, arguments, message):
    code, out, err = run(name, tmp_path / "a", *arguments)
    assert (code, out) == (2, "") and err.startswith(f"gridprune: {message}") and err.count("\n") == 1


def test_a_device_that_workers_cannot_have_is_refused(pipeline, pictures, monkeypatch):
    monkeypatch.setattr(ray_runner, "find_spec", lambda name: True)
    pipeline.family.sharded = True
    with pytest.raises(BadInput, match="a worker has one device"):
        list(Ray().encode(pipeline.runner(), pictures))
    assert list(Ray().answer(pipeline.runner(), [])) == []  # nothing to do, and no Ray for it


def test_a_clip_that_is_missing_is_told_before_ray_starts(tiny_llava, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_runner, "find_spec", lambda name: True)
    monkeypatch.setattr(Ray, "_run", lambda *_: pytest.fail("started"))
    bare = shutil.copytree(tiny_llava, tmp_path / "bare", ignore=shutil.ignore_patterns("clip"))
    with pytest.raises(BadInput, match="take `relevance=attention`"):
        Ray().answer(Pipeline(str(bare)).runner(), [Request(("0.png",), "What?")])


def test_questions_about_one_image_share_a_part(pipeline, monkeypatch):
    monkeypatch.setattr(ray_runner, "find_spec", lambda name: True)
    arguments = []

    def run(self, runner, items, *rest):
        arguments.extend(items)
        yield from (ask.question for ask in items)

    monkeypatch.setattr(Ray, "_run", run)
    requests = [Request((f"{n % 3}.png",), str(n)) for n in range(9)]
    assert list(Ray().answer(pipeline.runner(), requests)) == [str(n) for n in range(9)]
    assert [ask.images[0] for ask in arguments] == ["0.png"] * 3 + ["1.png"] * 3 + ["2.png"] * 3
