"""vLLM itself answers from exported sets as `generate` does, token for token, and so from whole encodings of its cache.

Runs where VLLM_PYTHON names the Python of an environment with vLLM for the CPU: docs/vllm.md says how to make
one.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from engine_checkpoints import write_for_engines
from PIL import Image

from gridprune_cli.generation import generate
from gridprune_cli.integrations.vllm import to_vllm
from gridprune_cli.integrations.vllm_ec import FILE, to_encoder_cache
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import FAMILIES, family_class

PYTHON = os.environ.get("VLLM_PYTHON")
SCRIPT = Path(__file__).with_name("vllm_answers.py")
QUESTIONS = ("what colour is the left object?", "Is there a red circle?")
SIZES = ((100, 100), (210, 70))
TOKENS = 12  # as in the script


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON does not name a Python with vLLM")
@pytest.mark.parametrize("name", [name for name in FAMILIES if not family_class(name).vllm])
def test_vllm_answers_as_generate_does(name, checkpoint, noise, tmp_path):
    folder = write_for_engines(name, checkpoint(name), tmp_path / "model")
    pipeline = Pipeline(str(folder), dtype="float32")
    family, pictures = pipeline.family, [noise(size, seed) for seed, size in enumerate(SIZES)]
    images = pipeline.encoder.encode(pictures)
    job = {"model": str(folder), "encodings": str(tmp_path), "requests": [], "whole": []}
    sets = []
    # 1. pruned sets, as request files
    for image in images:
        for question in QUESTIONS:
            pruned = pipeline.prune(image, question, Pruning(keep=0.4, positions="compact"))
            assert len(pruned.kept) < pruned.count
            path = tmp_path / f"{len(sets)}.vllm.safetensors"
            path.write_bytes(to_vllm(family, pruned).to_bytes())
            sets.append(pruned)
            job["requests"].append(str(path))
    # 2. whole encodings in the encoder cache; the requests have other pictures of the same size, which nobody looks at
    for picture, image in zip(pictures, images, strict=True):
        whole = pipeline.prune(image, QUESTIONS[0], Pruning(keep=1.0))
        entry = to_encoder_cache(family, whole)
        (tmp_path / entry.uuid).mkdir()
        (tmp_path / entry.uuid / FILE).write_bytes(entry.to_bytes())
        blank = tmp_path / f"{entry.uuid}.png"
        Image.new("RGB", picture.image.size, (90, 20, 200)).save(blank)
        compact = pipeline.prune(image, QUESTIONS[0], Pruning(keep=1.0, positions="compact"))
        prompt = one_token_per_image(family, to_vllm(family, compact).prompt_token_ids.tolist())
        sets.append(whole)
        job["whole"].append({"prompt": prompt, "image": str(blank), "uuid": entry.uuid})
    # 3. a request that vLLM should answer otherwise, without which equal answers would say little
    negative = replace(sets[2], image_embeds=-sets[2].image_embeds)
    path = tmp_path / "negative.vllm.safetensors"
    path.write_bytes(to_vllm(family, negative).to_bytes())
    job["requests"].insert(0, str(path))

    prompts, answers = answer(job, tmp_path)
    expected = [list(generate(family, [pruned], TOKENS)[0].ids) for pruned in sets]
    assert prompts[1:] == [pruned.input_ids.tolist() for pruned in sets]
    assert answers[1:] == expected
    assert len({tuple(ids) for ids in expected}) > 2
    assert answers[0] != expected[2]


def one_token_per_image(family, ids):
    """A prompt in which each run of image tokens is one; where vLLM gets a whole image it writes them out."""
    token = family.image_token
    return [id for n, id in enumerate(ids) if id != token or ids[n - 1] != token]


def answer(job, tmp_path):
    """vLLM's prompts and answers, of the requests and then of the whole images."""
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [PYTHON, str(SCRIPT), str(tmp_path / "job.json")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(job["requests"]) + len(job["whole"])
    return [line["prompt"] for line in lines], [line["answer"] for line in lines]
