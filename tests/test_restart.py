"""Runs that are killed at any moment: what is done after them is what an undisturbed run does.

`KILLS=10 pytest tests/test_restart.py` kills more often than the suite does.
"""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from gridprune_cli.cache.store import Store

KILLS = range(int(os.environ.get("KILLS", "2")))
IMAGES, QUESTIONS = 40, ("What colour is the star?", "Where is it?", "How many circles are there?")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with pictures and questions, what undisturbed runs make of them, and how to call.

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

    def call(*arguments, cache):
        environment = os.environ | {
            "GRIDPRUNE_CACHE_DIR": str(folder / cache),
        }
        return {
            "args": [sys.executable, "-m", "gridprune_cli", *arguments, "-q"],
            "env": environment,
            "cwd": folder,
        }

    subprocess.run(**call("encode", "photos", "--batch-size", "2", cache="whole"), check=True)
    subprocess.run(**call("batch", "questions.jsonl", "-o", "whole.jsonl", cache="whole"), check=True)
    return folder, call


def entries(folder):
    """Bytes of every entry by its path below the cache; those that are broken fail the test."""
    store = Store(folder, None)
    assert [fault for _, fault in store.verify() if fault] == []
    return {os.path.relpath(entry.path, folder): open(entry.path, "rb").read() for entry in store.entries()}


def kill_amid(call, progress, most, seed):
    """Starts a command, and kills it at a random moment of its work. `progress` counts what it has done of `most`."""
    dice = random.Random(seed)
    process = subprocess.Popen(**call)
    until = dice.randrange(most)
    while process.poll() is None and progress() < until:
        time.sleep(0.002)
    time.sleep(dice.random() * 0.05)
    process.kill()
    process.wait()
    assert progress() <= most


@pytest.mark.parametrize("seed", KILLS)
def test_encode_killed(work, seed):
    folder, call = work
    cache = f"encode-{seed}"
    command = call("encode", "photos", "--batch-size", "2", cache=cache)
    kill_amid(command, lambda: len(list((folder / cache).rglob("*.safetensors"))), IMAGES, seed)
    subprocess.run(**command, check=True)
    assert entries(folder / cache) == entries(folder / "whole")


@pytest.mark.parametrize("seed", KILLS)
def test_batch_killed(work, seed):
    folder, call = work
    out = folder / f"out-{seed}.jsonl"
    command = call("batch", "questions.jsonl", "--resume", out.name, "--batch-size", "1", cache=f"batch-{seed}")
    most = IMAGES * len(QUESTIONS)
    kill_amid(command, lambda: out.read_bytes().count(b"\n") if out.exists() else 0, most, seed)
    subprocess.run(**command, check=True)
    assert out.read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert entries(folder / f"batch-{seed}").keys() == entries(folder / "whole").keys()
