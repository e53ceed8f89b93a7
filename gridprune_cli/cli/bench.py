"""`gridprune bench`: what pruning saves, measured."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli import choices
from gridprune_cli.cli import options
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.output import emit_json, progress, put, say, set_quiet, size, table
from gridprune_cli.errors import BadInput
from gridprune_cli.text import printable

if TYPE_CHECKING:
    from gridprune_cli.bench.measure import Report, Spread
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.settings import Pruning


def subject(
    model: options.Model = None,
    shape: Annotated[
        choices.Shape | None, options.option("Random weights in a published shape, instead of a model.", options.MODEL)
    ] = None,
    layers: Annotated[
        int | None, options.option("Only the first N layers of the shape's language model.", options.MODEL)
    ] = None,
    clip: options.Clip = None,
    relevance: options.Relevance = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> Callable[[], "Pipeline"]:
    """Opens what is measured; nothing comes from the cache. A shape goes before a model, whatever names that."""
    from gridprune_cli.opening import open_pipeline

    if shape is None:
        if layers is not None:
            raise BadInput("only with --shape; a checkpoint has the layers that it has", field="layers")
        checkpoint = {"model": model, "clip": clip, "relevance": relevance, "device": device, "dtype": dtype}
        return lambda: open_pipeline(checkpoint | {"no_cache": True})
    if clip is not None:
        raise BadInput("not with --shape, which has no checkpoint", field="clip", value=clip)
    if device == "map":
        raise BadInput("not with --shape, whose random weights lie on one device", field="device", value=device)
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.vlm.placement import place
    from gridprune_cli.vlm.shapes import build, find_shape

    placed, published = place(device, dtype, shape), find_shape(shape)
    return lambda: Pipeline(build(published, placed.dtype, placed.device, layers, relevance))


@examples(
    "gridprune bench --keep 0.11",
    "gridprune bench photo.jpg --shape llava-1.5-7b --layers 8 --dtype bfloat16 --keep 0.111",
)
@options.takes(opened=subject, pruning=options.pruning)
def bench(
    opened: Callable[[], "Pipeline"],
    pruning: "Pruning",
    image: Annotated[
        str | None, typer.Argument(metavar="IMAGE", help="Image file.", show_default="a drawn scene")
    ] = None,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")] = "What is left of the star?",
    repeat: Annotated[
        int, options.option("How often each answer is measured, after a first time.", options.WORK, min=1)
    ] = 5,
    new_tokens: Annotated[int, options.option("Tokens to generate, no more and no fewer.", options.WORK, min=2)] = 16,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what an answer costs from all visual tokens and from the kept ones: time, memory, operations."""
    from dataclasses import replace

    import torch

    from gridprune_cli.bench.measure import measure, sample_scene
    from gridprune_cli.builder import remarks
    from gridprune_cli.image_files import read_source
    from gridprune_cli.images import load_image
    from gridprune_cli.selector import relevance_source

    set_quiet(quiet)
    source = read_source(image) if image else None
    picture = load_image(source) if source else None  # a bad picture is reported before anything is built
    pipeline = opened()
    if source is None or picture is None:
        source = sample_scene(pipeline.model)
        picture = load_image(source)
        picture = replace(picture, name=f"a scene of {picture.image.width} x {picture.image.height} pixels")
    with progress("measuring", 3 * (repeat + 1)) as step:
        report = measure(pipeline, source, question, pruning, repeat=repeat, new_tokens=new_tokens, step=step)
    device = pipeline.family.device
    place = {
        "model": pipeline.model,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "dtype": str(pipeline.family.dtype).removeprefix("torch."),
    }
    if json:
        question_and_method = {"image": picture.name, "question": question, "method": pruning.method.name}
        of_relevance = {
            "relevance": relevance_source(pipeline.family, pruning),
            "notes": list(remarks(pipeline.family, pruning)),
        }
        counts = {"repeat": repeat, "new_tokens": new_tokens}
        emit_json(place | question_and_method | of_relevance | counts | report.to_json())
        return
    where = place["device"] if device.startswith("cuda") else f"{device}, {place['threads']} threads"
    put(printable(f"{pipeline.model}, {place['dtype']}, {where}; {picture.name}; medians of {repeat}, quartiles"))
    table(("", "full ", "pruned ", "full / pruned"), _lines(report))
    put(
        f"The prefill is {report.prefill.median:.2f} times faster with {report.flops:.2f} times fewer operations: "
        f"{report.achieved:.2f} of the ratio.\n"
        f"Selecting takes {report.selecting.median:.1%} of the pruned prefill."
    )
    for note in remarks(pipeline.family, pruning):
        say(note)


def _lines(report: "Report") -> list[tuple[str, str, str, str]]:
    full, pruned = report.full, report.pruned

    def counts(name: str, a: int, b: int, text: Any = "{:,}".format) -> tuple[str, str, str, str]:
        return name, text(a), text(b), f"{a / b:.2f}"

    def times(name: str, a: "Spread", b: "Spread", ratio: "Spread | None") -> tuple[str, str, str, str]:
        shown = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
        return name, f"{a.median:,.1f} ms", f"{b.median:,.1f} ms", shown

    lines = [counts("visual tokens", full.tokens, pruned.tokens)]
    if sum(pruned.inside) < pruned.tokens * len(pruned.inside):
        a, b = (sum(side.inside) / len(side.inside) for side in (full, pruned))
        lines.append(("visual tokens, mean of the layers", f"{a:,.1f}", f"{b:,.1f}", f"{a / b:.2f}"))
    lines.append(counts("tokens of the prompt", full.prompt, pruned.prompt))
    if report.load is not None:
        lines.append(("load", f"{report.load:,.1f} ms", f"{report.load:,.1f} ms", ""))
    lines.append(times("encode", report.encode, report.encode, None))
    if pruned.localize.median:
        lines.append(times("localize", full.localize, pruned.localize, None))
    lines += [
        times("select", full.select, pruned.select, None),
        times("prefill", full.prefill, pruned.prefill, report.prefill),
        times("decode, a token", full.decode, pruned.decode, report.decode),
        times("question to last token", full.answer, pruned.answer, report.answer),
        counts("prefill operations", full.prefill_flops, pruned.prefill_flops, "{:.3g}".format),
        counts("keys and values", full.kv_bytes, pruned.kv_bytes, size),
    ]
    if full.peak_bytes and pruned.peak_bytes:
        lines.append(counts("most memory held", full.peak_bytes, pruned.peak_bytes, size))
    return lines
