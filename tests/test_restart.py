"""Runs that are killed at any moment: what is done after them is what an undisturbed run does."""

import json
import os
import random
import shutil
import signal
import time

import pytest

from gridprune_cli.cache.store import Store

KILLS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
IMAGES, QUESTIONS = 24, ("What colour is the star?", "Where is it?", "How many circles are there?")


@pytest.fixture(scope="module")
def work(tmp_path_factory, server):
    """A folder with pictures and questions, the results of undisturbed runs, and `start`, which starts `gridprune`.

    Of the embedded model: a tiny one's matrix products round by how many images are in a batch.
    """
    from gridprune_cli.scenes.scene import draw, make_scene

    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    lines = []
    for seed in range(IMAGES):
        draw(make_scene(seed))[0].save(folder / "photos" / f"{seed}.png")
        lines += [json.dumps({"image": f"photos/{seed}.png", "question": question}) for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")

    def start(*arguments, cache):
        environment = os.environ | {"GRIDPRUNE_CACHE_DIR": str(folder / cache)}
        return server.start(*arguments, "-q", cwd=folder, env=environment)

    assert start("encode", "photos", "--batch-size", "2", cache="whole").wait() == 0
    assert start("batch", "questions.jsonl", "-o", "whole.jsonl", cache="whole").wait() == 0
    return folder, start


def entries(folder):
    """Bytes of every entry by its path below the cache; those that are broken fail the test."""
    store = Store(folder, None)
    assert [fault for _, fault in store.verify() if fault] == []
    return {os.path.relpath(entry.path, folder): open(entry.path, "rb").read() for entry in store.entries()}


def kill_amid(begin, progress, most, seed):
    """Kills a process that `begin` starts at a random moment of its work, of which `progress` counts how much is done
    of `most`. One that a busy machine let end before that is started anew."""
    dice = random.Random(seed)
    for _ in range(5):
        until = dice.randrange(1, most * 3 // 4)
        process = begin()
        while process.poll() is None and progress() < until:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.02)
        process.kill()
        if process.wait() == -signal.SIGKILL and until <= progress() < most:
            return
    pytest.fail("it ended by itself each time")


@pytest.mark.parametrize("seed", KILLS)
def test_encode_killed(work, seed):
    folder, start = work
    cache = folder / f"encode-{seed}"
    command = ("encode", "photos", "--batch-size", "2")

    def begin():
        shutil.rmtree(cache, ignore_errors=True)
        return start(*command, cache=cache)

    def progress():
        return len(list(cache.rglob("*.safetensors")))

    kill_amid(begin, progress, IMAGES, seed)
    assert start(*command, cache=cache).wait() == 0
    assert entries(cache) == entries(folder / "whole")


@pytest.mark.parametrize("seed", KILLS)
def test_batch_killed(work, seed):
    folder, start = work
    out, cache = folder / f"out-{seed}.jsonl", folder / f"batch-{seed}"
    command = ("batch", "questions.jsonl", "--resume", out.name, "--batch-size", "1")

    def begin():
        shutil.rmtree(cache, ignore_errors=True)
        out.unlink(missing_ok=True)
        return start(*command, cache=cache)

    def progress():
        return out.read_bytes().count(b"\n") if out.exists() else 0

    kill_amid(begin, progress, IMAGES * len(QUESTIONS), seed)
    assert start(*command, cache=cache).wait() == 0
    assert out.read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert entries(cache).keys() == entries(folder / "whole").keys()
