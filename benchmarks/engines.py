"""The embedded model in vLLM, from pruned sets, against `gridprune batch`: `python -m benchmarks.engines`.

vLLM runs on the CPU, in an environment of its own, which is made where there is none (see `benchmarks.environments` for
what has to be done to it). It answers questions about held-out scenes in float32 in three ways:

    picture  from the picture, as everybody uses it: vLLM runs the vision tower, and all tokens go into the model
    full     from exported sets with all tokens
    pruned   from exported sets with the share `--keep`

Answers are held against those of `generate` from the same sets, token by token. Then all ways take turns with `batch`
in this process, whose images are in the cache. Between two turns vLLM forgets prompts and pictures, so in each the
tower runs once for every picture, whose tokens vLLM's prefix cache has for the other questions about it. Seconds are of
the clock and of CPU; on a busy machine only those of CPU say much.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.engines_vllm import MAX_TOKENS
from benchmarks.environments import VLLM, vllm_environment
from gridprune_cli.cache.store import open_store
from gridprune_cli.integrations.vllm import to_vllm
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.runners.batches import in_order, result_or_raise
from gridprune_cli.scenes import CHECKPOINT
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import PrunedSet

PER_IMAGE = 4
WAYS = ("picture", "full", "pruned")


@dataclass(frozen=True)
class Measured:
    """What a way took for all questions: seconds by the clock, and of CPU."""

    seconds: float
    cpu: float


@dataclass(frozen=True)
class Generated:
    """Token ids of the answers, and of the prompts that they were made from, in the order of the questions."""

    ids: list[list[int]]
    prompts: list[list[int]]


class Worker:
    """vLLM with its requests, in a process of its environment."""

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process
        self._read()

    def answer(self, way: str) -> tuple[Generated, Measured]:
        assert self._process.stdin
        print(way, file=self._process.stdin, flush=True)
        reply = json.loads(self._read())
        return Generated(reply["ids"], reply["prompts"]), Measured(reply["seconds"], reply["cpu"])

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"vLLM ended with {self._process.wait()}; its log is above")
        return line


@contextmanager
def run_vllm(python: Path, folder: Path, threads: int) -> Iterator[Worker]:
    script = Path(__file__).with_name("engines_vllm.py")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(
        [python, script, CHECKPOINT, folder], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.wait()


def write_questions(folder: Path, count: int) -> list[tuple[str, str]]:
    """Draws held-out scenes into a folder: image file and question of each of `count` questions."""
    asked: list[tuple[str, str]] = []
    for seed in range(HELDOUT, HELDOUT + -(-count // PER_IMAGE)):
        scene, path = make_scene(seed), folder / f"{seed}.png"
        draw(scene)[0].save(path)
        asked += [(str(path), q.text) for q in questions(scene, PER_IMAGE, random.Random(f"engines-{seed}"))]
    return asked[:count]


def export(pipeline: Pipeline, requests: Sequence[Request], folder: Path) -> list[PrunedSet]:
    """Pruned sets of requests, each written for vLLM as `gridprune export` does."""
    folder.mkdir()
    results = in_order(pipeline.runner().prune(requests, with_prefix=False))
    sets = [result_or_raise(result).pruned for result in results]
    for number, pruned in enumerate(sets):
        (folder / f"{number:05}.vllm.safetensors").write_bytes(to_vllm(pipeline.family, pruned).to_bytes())
    return sets


def generate(pipeline: Pipeline, sets: Sequence[PrunedSet]) -> list[list[int]]:
    answers = in_order(pipeline.runner().generate(sets, max_new_tokens=MAX_TOKENS))
    return [list(result_or_raise(answer).ids) for answer in answers]


def differences(
    pipeline: Pipeline, sets: Sequence[PrunedSet], expected: Sequence[Sequence[int]], answered: Generated
) -> list[dict[str, Any]]:
    """The questions that vLLM answers in another way: with what, and from which token and which prompt on."""
    decode = pipeline.family.processor.tokenizer.decode
    result = []
    for pruned, ours, theirs, prompt in zip(sets, expected, answered.ids, answered.prompts, strict=True):
        if list(ours) != theirs:
            pairs = enumerate(zip(ours, theirs, strict=False))
            first = next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
            result.append(
                {
                    "image": pruned.images[0].name,
                    "question": pruned.question,
                    "generate": decode(ours, skip_special_tokens=True).strip(),
                    "vllm": decode(theirs, skip_special_tokens=True).strip(),
                    "from_token": first,
                    "same_prompt": prompt == pruned.input_ids.tolist(),
                }
            )
    return result


def measure(act: Callable[[], object]) -> Measured:
    seconds, cpu = time.perf_counter(), time.process_time()
    act()
    return Measured(time.perf_counter() - seconds, time.process_time() - cpu)


def compare(python: Path, count: int, share: float, rounds: int, threads: int) -> dict[str, Any]:
    """Runs everything: what `--output` has of it."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        # 1. questions, and what is asked of both sides
        folder = Path(name)
        for place in ("pictures", "requests", "requests/picture"):
            (folder / place).mkdir()
        asked = write_questions(folder / "pictures", count)
        store = open_store(folder / "cache")
        pipeline = Pipeline("scenes", dtype="float32", device="cpu", store=store)
        shares = {"full": Pruning(keep=1.0, positions="compact"), "pruned": Pruning(keep=share, positions="compact")}
        requests = {way: [Request((image,), text, pruning) for image, text in asked] for way, pruning in shares.items()}
        sets = {way: export(pipeline, requests[way], folder / "requests" / way) for way in shares}
        token = pipeline.family.image_token
        prompts = [  # with one image token, from which vLLM makes as many as its tower gives
            [id for n, id in enumerate(ids) if id != token or n == ids.index(token)]
            for ids in (pruned.input_ids.tolist() for pruned in sets["full"])
        ]
        listed = [(prompt, image) for prompt, (image, _) in zip(prompts, asked, strict=True)]
        (folder / "requests" / "picture" / "questions.json").write_text(json.dumps(listed), "utf-8")
        expected = {way: generate(pipeline, sets[way]) for way in shares}
        expected["picture"], sets["picture"] = expected["full"], sets["full"]
        # 2. answers; the first turn of everything also warms it up
        runner = pipeline.runner()
        acts: dict[str, Callable[[], object]] = {
            "prune alone": lambda: list(runner.prune(requests["pruned"], with_prefix=False)),
            "batch full": lambda: list(runner.answer(requests["full"], max_new_tokens=MAX_TOKENS)),
            "batch pruned": lambda: list(runner.answer(requests["pruned"], max_new_tokens=MAX_TOKENS)),
        }
        measured: dict[str, list[Measured]] = {}
        with run_vllm(python, folder / "requests", threads) as worker:
            answered = {way: worker.answer(way)[0] for way in WAYS}
            for act in acts.values():
                act()
            # 3. turns
            for _ in range(rounds):
                for way in WAYS:
                    measured.setdefault(f"vLLM {way}", []).append(worker.answer(way)[1])
                for what, act in acts.items():
                    measured.setdefault(what, []).append(measure(act))
        different = {way: differences(pipeline, sets[way], expected[way], answered[way]) for way in WAYS}
    return {
        "engine": VLLM,
        "questions": count,
        "images": len({image for image, _ in asked}),
        "tokens": {way: len(sets[way][0].kept) for way in shares},
        "threads": threads,
        "same": {way: count - len(different[way]) for way in WAYS},
        "different": different,
        "measured": {what: [vars(turn) for turn in turns] for what, turns in measured.items()},
    }


def report(result: dict[str, Any]) -> Iterator[str]:
    """The table, and what differs."""
    count, tokens, measured = result["questions"], result["tokens"], result["measured"]
    names = {
        "vLLM picture": f"vLLM, from the picture ({tokens['full']} tokens)",
        "vLLM full": f"vLLM, from exported sets with all {tokens['full']} tokens",
        "vLLM pruned": f"vLLM, from exported sets with {tokens['pruned']} tokens",
        "prune alone": f"pruning to {tokens['pruned']} tokens here, which exported sets come from",
        "prune, vLLM": "both of these, one after the other",
        "batch full": f"`gridprune batch`, all {tokens['full']} tokens",
        "batch pruned": f"`gridprune batch`, {tokens['pruned']} tokens",
    }
    yield f"{count} questions about {result['images']} held-out scenes, float32, {result['engine']}"
    for way in WAYS:
        yield f"answers as of `generate`, token by token, from {way}: {result['same'][way]} of {count}"
        for case in result["different"][way]:
            yield f"  {json.dumps(case)}"
    if not measured:
        return
    yield "| | questions for a second of CPU, median turn | questions/s by the clock, best turn |"
    yield "|---|---:|---:|"
    both = zip(measured["prune alone"], measured["vLLM pruned"], strict=True)
    measured = measured | {"prune, vLLM": [{key: a[key] + b[key] for key in a} for a, b in both]}
    for what, name in names.items():
        cpu = median(count / turn["cpu"] for turn in measured[what])
        clock = max(count / turn["seconds"] for turn in measured[what])
        yield f"| {name} | {cpu:.0f} | {clock:.0f} |"
    for what, other in (
        ("vLLM pruned", "vLLM picture"),
        ("vLLM pruned", "vLLM full"),
        ("prune, vLLM", "vLLM picture"),
        ("prune, vLLM", "batch pruned"),
        ("batch pruned", "batch full"),
    ):
        pairs = list(zip(measured[other], measured[what], strict=True))
        cpu = median(slow["cpu"] / fast["cpu"] for slow, fast in pairs)
        clock = median(slow["seconds"] / fast["seconds"] for slow, fast in pairs)
        yield f"{what} : {other} = {cpu:.2f} of CPU, {clock:.2f} by the clock (medians of {len(pairs)} turns)"


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=cache / "gridprune-vllm", help="folder of vLLM's own")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--keep", type=float, default=Pruning().keep)
    parser.add_argument("--rounds", type=int, default=5, help="turns that are measured; 0: answers alone")
    parser.add_argument("--threads", type=int, default=1, help="of either side")
    parser.add_argument("-o", "--output", type=Path, help="file for everything, as JSON")
    options = parser.parse_args()
    python = vllm_environment(options.environment)
    result = compare(python, options.questions, options.keep, options.rounds, options.threads)
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print("\n".join(report(result)))


if __name__ == "__main__":
    main()
