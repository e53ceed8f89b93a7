"""What `benchmarks.gpu` checks: each check gives rows of its table, and says which targets were met.

On a GPU the shapes are those of 7B models in bfloat16. Elsewhere they are those of the tiny checkpoints of `tests/`, in
float32: everything runs, but times say nothing, so that no target is held against them.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import SHAPES, Machine, Row, timed
from benchmarks.parity import QUESTION, parity
from gridprune_cli.bench.measure import measure, sample_scene
from gridprune_cli.errors import GridpruneError
from gridprune_cli.images import load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.runners import local
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import make_scene
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.prefix import pad_left

KEEP = Pruning(keep=1 / 9)  # 64 of LLaVA's 576 tokens
LLAVA = "llava-1.5-7b"
BATCHES = (1, 8, 64)
NEW_TOKENS = 16
PREFILL, SELECT, ENCODE = 0.95, 0.10, 0.95  # targets: of the ratio of operations, of the prefill, of the bare tower


# ---- speed -----------------------------------------------------------------------------------------------------------


def answers(machine: Machine) -> Iterator[Row]:
    """One question about one image, from all tokens and from a ninth: time, memory, and what the operations allow."""
    for shape in SHAPES:
        pipeline = machine.open(shape)
        repeat = 7 if machine.is_gpu else 1
        report = measure(pipeline, sample_scene(shape), QUESTION, KEEP, repeat=repeat, new_tokens=NEW_TOKENS)
        full, pruned = report.full, report.pruned
        name = f"{shape if machine.is_gpu else 'tiny ' + SHAPES[shape]}, {pipeline.family.depth} layers"
        times = f"{full.prefill.median:.1f} / {pruned.prefill.median:.1f} ms"
        yield Row(f"{name}: prefill, {full.tokens} / {pruned.tokens} tokens", times)
        achieved = f"{report.achieved:.2f} ({report.prefill.median:.2f} of {report.flops:.2f})"
        met = machine.judge(report.achieved >= PREFILL)
        yield Row(f"{name}: ratio of prefills over that of operations", achieved, f"at least {PREFILL}", met)
        met = machine.judge(report.selecting.median <= SELECT)
        share = f"{report.selecting.median:.1%} ({pruned.select.median:.1f} ms)"
        yield Row(f"{name}: select, of the pruned prefill", share, f"at most {SELECT:.0%}", met)
        yield Row(f"{name}: decode, a token", f"{full.decode.median:.2f} / {pruned.decode.median:.2f} ms")
        peaks = [f"{side.peak_bytes / 1e9:.2f}" if side.peak_bytes else "?" for side in (full, pruned)]
        yield Row(f"{name}: most memory held", f"{' / '.join(peaks)} GB")
        del pipeline
        machine.release()


def encoding(machine: Machine) -> Iterator[Row]:
    """Image files to cache, decoding among it, against a bare loop over the tower's layers that are read."""
    pipeline = machine.open(LLAVA)
    family, batch = pipeline.family, 16 if machine.is_gpu else 4
    tower = family.load("tower").model.vision_tower
    pixels = [family.process(load_image(path).image)[0]["pixel_values"] for path in machine.scenes[: 4 * batch]]
    batches = [torch.cat(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
    rounds = -(-len(machine.scenes) // len(pixels))  # of the batches, which are fewer so that they fit
    times: dict[str, list[float]] = {"engine": [], "tower": []}
    for _ in range(3):
        with timed(machine, times["engine"]), pipeline:
            hits = [hit for _, _, hit in pipeline.encode_all(machine.scenes, batch=batch, refresh=True)]
        assert not any(hits)
        with timed(machine, times["tower"]), torch.inference_mode():
            for of_batch in batches * rounds:
                tower(of_batch, output_hidden_states=True)
    done = len(machine.scenes), len(pixels) * rounds
    engine, bare = (median(count / t for t in times[name][1:]) for count, name in zip(done, times, strict=True))
    met = machine.judge(engine / bare >= ENCODE)
    yield Row("encode: images a second, and of the bare tower", f"{engine:.1f} / {bare:.1f}")
    yield Row("encode: of the bare tower", f"{engine / bare:.2f}", f"at least {ENCODE}", met)


def batches(machine: Machine) -> Iterator[Row]:
    """Questions a second in batches, against transformers' `generate` of the whole model on the same batches."""
    pipeline = machine.open(LLAVA)
    family = pipeline.family
    whole = family.load("language") if machine.is_gpu else _whole(machine, family)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    for size in BATCHES if machine.is_gpu else BATCHES[:2]:
        requests = make_requests(machine, max(size, 8))
        inputs = [_whole_inputs(pipeline, requests[i : i + size]) for i in range(0, len(requests), size)]
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(2):  # the first warms up
            with timed(machine, times["ours"]):
                replies = list(pipeline.runner(questions=size).answer(requests, **options))
            failed = [reply for reply in replies if isinstance(reply, GridpruneError)]
            if failed:
                raise failed[0]
            try:
                with timed(machine, times["theirs"]), torch.inference_mode():
                    for batch in inputs:
                        whole.generate(**batch, do_sample=False, **options)
            except torch.OutOfMemoryError:  # ours are halved where that happens
                times["theirs"].append(float("inf"))
                machine.release()
        ours, theirs = (len(requests) / of[-1] for of in times.values())
        value = f"{ours:.1f} / {theirs:.1f} = {ours / theirs:.2f}" if theirs else f"{ours:.1f} / out of memory"
        met = machine.judge(ours >= theirs)
        yield Row(f"questions a second in batches of {size}, ours / transformers'", value, "not below 1", met)


def make_requests(machine: Machine, count: int) -> list[Request]:
    """Questions about scenes, eight for each image."""
    texts = [
        (path, question.text)
        for path in machine.scenes[: -(-count // 8)]
        for question in questions(make_scene(int(path.stem)), 8, random.Random(path.name))
    ]
    return [Request((path,), text, KEEP) for path, text in texts[:count]]


def _whole(machine: Machine, family: Any) -> Any:
    return family.model_class.from_pretrained(family.checkpoint.folder, dtype=torch.float32).eval().to(machine.device)


def _whole_inputs(pipeline: Pipeline, requests: Sequence[Request]) -> dict[str, Tensor]:
    """A batch for the whole model, with all tokens of all images, on the device."""
    family, everything = pipeline.family, Pruning(keep=1.0, method=make_method("uniform"))
    prompts = [pipeline.prune(request.images, request.question, everything).input_ids for request in requests]
    images = [load_image(str(request.images[0])).image for request in requests]
    mask = pad_left([torch.ones_like(prompt) for prompt in prompts], 0)
    return {
        "input_ids": pad_left(prompts, family.filler).to(family.device),
        "attention_mask": mask.to(family.device),
        "pixel_values": torch.cat([family.process(image)[0]["pixel_values"] for image in images]),
    }


# ---- memory and training ---------------------------------------------------------------------------------------------


def out_of_memory(machine: Machine) -> Iterator[Row]:
    """A batch that does not fit is halved until it does, and every question is answered.

    On a GPU memory is filled up until there is room for little more than four questions; elsewhere memory is said to
    have run out where more are answered at once.
    """
    pipeline = machine.open(LLAVA)
    whole = Pruning(keep=1.0, method=make_method("uniform"))
    requests = [replace(request, pruning=whole) for request in make_requests(machine, 64 if machine.is_gpu else 16)]
    runner = pipeline.runner(questions=len(requests))
    with _room_for_four(machine, pipeline, requests):
        replies = list(runner.answer(requests, max_new_tokens=2))
    answered = sum(not isinstance(reply, GridpruneError) for reply in replies)
    size = runner._to_answer.size
    how = "memory filled up" if machine.is_gpu else "said to run out"
    value = f"{answered} of {len(requests)} answered, in batches of {size}"
    met = answered == len(requests) and size < len(requests)
    yield Row(f"out of memory ({how})", value, "all, in smaller batches", met)


@contextmanager
def _room_for_four(machine: Machine, pipeline: Pipeline, requests: Sequence[Request]) -> Iterator[None]:
    """Leaves memory for about four questions at a time."""
    if machine.is_gpu:
        for _ in pipeline.runner(questions=4).answer(requests[:4], max_new_tokens=2):
            pass
        held = torch.cuda.memory_allocated(machine.device)
        torch.cuda.reset_peak_memory_stats(machine.device)
        for _ in pipeline.runner(questions=4).answer(requests[:4], max_new_tokens=2):
            pass
        needed = torch.cuda.max_memory_allocated(machine.device) - held
        torch.cuda.empty_cache()
        left = torch.cuda.mem_get_info(machine.device)[0]
        filler = torch.empty(max(0, left - 2 * needed), dtype=torch.uint8, device=machine.device)
        yield
        del filler
        return
    unlimited = local.generate

    def limited(family: Any, sets: Sequence[PrunedSet], *arguments: Any, **options: Any) -> Any:
        if len(sets) > 4:
            raise torch.OutOfMemoryError(f"{len(sets)} questions")
        return unlimited(family, sets, *arguments, **options)

    local.generate = limited  # type: ignore[assignment]
    try:
        yield
    finally:
        local.generate = unlimited


def training(machine: Machine) -> Iterator[Row]:
    """Steps of the recipe's first stage: the tower, with its optimiser, in mixed precision."""
    from training.data import Pool
    from training.plan import TOWER
    from training.run import optimise
    from training.tower import Tower

    if machine.device == "pretend":
        yield Row("training", "not on the pretend device, for which torch has no fused optimiser")
        return
    steps, batch = (60, TOWER.batch) if machine.is_gpu else (2, 4)
    work = Path(tempfile.mkdtemp(dir=machine.folder))
    pool = Pool(work, TOWER.first_seed, 8 * batch)
    tower, device = Tower().to(machine.device), torch.device(machine.device)
    seconds: list[float] = []
    for name in ("warm-up", "measured"):
        with timed(machine, seconds):
            optimise(name, tower, pool, replace(TOWER, steps=steps, batch=batch), work, device)
    yield Row("training: scenes a second in the tower's stage", f"{steps * batch / seconds[-1]:.1f}")


CHECKS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    "parity": parity,
    "answers": answers,
    "encoding": encoding,
    "batches": batches,
    "out-of-memory": out_of_memory,
    "training": training,
}
