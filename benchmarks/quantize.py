"""What `--quantize` costs and saves: `python -m benchmarks.quantize memory|speed|answers`.

memory   bytes of a 7B shape's parts, and the most that the process held while it was built: for each way, shapes of one
         and of two layers are built in processes of their own, and what a layer adds is taken for all of them
speed    two layers of a 7B shape's language model: CPU time of a prompt of 75 tokens, of one of 587, and of a further
         token, on one thread, the ways in turn; ratios of neighbours, since the machine may have other work
answers  the embedded model on held-out questions: the share that is answered as with all weights in bfloat16, and the
         share that is right
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

from gridprune_cli.bench.rates import count_bytes
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.runners.batches import result_or_raise
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.vlm.shapes import SHAPES, build

WAYS = (None, "int8", "int4")
SHAPE = "llava-1.5-7b"
PER_SCENE = 8


def measure_memory(layers: int, quantize: str | None) -> None:
    """Prints the bytes of each part of a shape, and the most that this process held."""
    family = build(SHAPES[SHAPE], torch.bfloat16, "cpu", layers, quantize=quantize)
    model = family.load("language")
    clip_model: Any = family.relevance.model  # type: ignore[union-attr]
    clip = sum(count_bytes(weight) for weight in clip_model.parameters())
    language = sum(count_bytes(weight) for weight in model.model.language_model.parameters()) + count_bytes(
        model.lm_head.weight
    )
    whole = sum(count_bytes(weight) for weight in model.parameters()) + clip
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"language": language, "whole": whole, "peak": peak}))


def memory() -> None:
    count = SHAPES[SHAPE].layers
    print(f"{SHAPE}, {count} layers, by one and two; GB      language model   all parts   most held while built")
    for quantize in WAYS:
        held = []
        for layers in (1, 2):
            arguments = ["--layers", str(layers), *(["--quantize", quantize] if quantize else [])]
            command = [sys.executable, "-m", "benchmarks.quantize", "build", *arguments]
            held.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        of_all = {name: held[0][name] + (count - 1) * (held[1][name] - held[0][name]) for name in held[0]}
        language, whole, peak = (of_all[name] / 1e9 for name in ("language", "whole", "peak"))
        print(f"{quantize or 'bfloat16':48}  {language:8.2f}  {whole:10.2f}  {peak:18.2f}", flush=True)


@torch.inference_mode()
def speed(rounds: int) -> None:
    torch.set_num_threads(1)
    times: dict[tuple[str, str | None], list[float]] = {}
    for quantize in WAYS:
        model = build(SHAPES[SHAPE], torch.bfloat16, "cpu", 2, quantize=quantize).load("language")
        for turn in range(rounds + 1):
            for tokens in (75, 587):
                cache = DynamicCache(config=model.config.get_text_config())
                for name, length in ((f"{tokens} tokens", tokens), (f"a token behind {tokens}", 1)):
                    embeds = torch.randn(1, length, 4096, dtype=torch.bfloat16)
                    start = time.process_time()
                    model.model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
                    if turn:
                        times.setdefault((name, quantize), []).append(1e3 * (time.process_time() - start))
    print(f"{'two layers, ms of CPU time':28}" + "".join(f"{way or 'bfloat16':>12}" for way in WAYS))
    for name in dict.fromkeys(name for name, _ in times):
        print(f"{name:28}" + "".join(f"{median(times[name, way]):12.1f}" for way in WAYS), flush=True)


def answers(count: int, folder: Path) -> None:
    scenes = [make_scene(HELDOUT + number) for number in range(count // PER_SCENE)]
    asked = [questions(scene, PER_SCENE, random.Random(number)) for number, scene in enumerate(scenes)]
    pictures = [folder / f"{number}.png" for number in range(len(scenes))]
    for scene, picture in zip(scenes, pictures, strict=True):
        draw(scene)[0].save(picture)
    expected = [question.answer for of_scene in asked for question in of_scene]
    answers: dict[tuple[str | None, float], list[str]] = {}
    for keep in (0.11, 1.0):
        for quantize in WAYS:
            pipeline = Pipeline("scenes", dtype="bfloat16", quantize=quantize)
            pruning = Pruning(keep=keep)
            requests = [
                Request((picture,), question.text, pruning)
                for picture, of_scene in zip(pictures, asked, strict=True)
                for question in of_scene
            ]
            replies = pipeline.runner(questions=32).answer(requests, max_new_tokens=8)
            answers[quantize, keep] = [result_or_raise(reply).text for reply in replies]
            whole = answers[None, keep]
            same = sum(a == b for a, b in zip(answers[quantize, keep], whole, strict=True)) / len(whole)
            right = sum(a == b for a, b in zip(answers[quantize, keep], expected, strict=True)) / len(whole)
            print(f"keep {keep}  {quantize or 'bfloat16':9} same {same:6.1%}  right {right:6.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "speed", "answers", "build"])
    parser.add_argument("--rounds", type=int, default=3, help="of speed")
    parser.add_argument("--questions", type=int, default=480, help="of answers")
    parser.add_argument("--layers", type=int, default=1, help="of build, which memory calls")
    parser.add_argument("--quantize", choices=["int8", "int4"], help="of build")
    options = parser.parse_args()
    match options.what:
        case "memory":
            memory()
        case "speed":
            speed(options.rounds)
        case "answers":
            with tempfile.TemporaryDirectory() as folder:
                answers(options.questions, Path(folder))
        case "build":
            measure_memory(options.layers, options.quantize)


if __name__ == "__main__":
    main()
