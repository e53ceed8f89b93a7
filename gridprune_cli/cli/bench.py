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
    from gridprune_cli.bench.measure import Report, Side, Spread
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
    quantize: options.Quantize = None,
) -> Callable[[], "Pipeline"]:
    """Opens what is measured; nothing comes from the cache. A shape goes before a model, whatever names that."""
    from gridprune_cli.opening import open_pipeline

    if shape is None:
        if layers is not None:
            raise BadInput("only with --shape; a checkpoint has the layers that it has", field="layers")
        checkpoint = {"model": model, "clip": clip, "relevance": relevance, "device": device, "dtype": dtype}
        return lambda: open_pipeline(checkpoint | {"quantize": quantize, "no_cache": True})
    if clip is not None:
        raise BadInput("not with --shape, which has no checkpoint", field="clip", value=clip)
    if device == "map":
        raise BadInput("not with --shape, whose random weights lie on one device", field="device", value=device)
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.vlm.placement import place
    from gridprune_cli.vlm.quantized import check_quantize
    from gridprune_cli.vlm.shapes import build, find_shape

    placed, published = place(device, dtype, shape), find_shape(shape)
    check_quantize(quantize, placed)
    return lambda: Pipeline(build(published, placed.dtype, placed.device, layers, relevance, quantize))


_WAYS = {"before": "before the model", "scratch": "inside from scratch"}  # titles of what `Report.others` names


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

    from gridprune_cli.bench.measure import count_steps, measure, sample_scene
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
    with progress("measuring", count_steps(pruning, repeat)) as step:
        report = measure(pipeline, source, question, pruning, repeat=repeat, new_tokens=new_tokens, step=step)
    device = pipeline.family.device
    place = {
        "model": pipeline.model,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "dtype": str(pipeline.family.dtype).removeprefix("torch."),
        "quantize": pipeline.family.quantize,
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
    numbers = f"{place['dtype']}, weights in {place['quantize']}" if place["quantize"] else place["dtype"]
    put(printable(f"{pipeline.model}, {numbers}, {where}; {picture.name}; medians of {repeat}, quartiles"))
    table(
        ("", "full ", *(f"{_WAYS[name]} " for name, _, _ in report.others), "pruned ", "full / pruned"), _lines(report)
    )
    put(
        f"The prefill is {report.prefill.median:.2f} times faster with {report.flops:.2f} times fewer operations: "
        f"{report.achieved:.2f} of the ratio.\n"
        f"At {report.rates.flops / 1e9:,.1f} GFLOP/s and {report.rates.nbytes / 1e9:,.1f} GB/s, as measured here, "
        f"operations and bytes limit it to {report.limit:.2f}, or {report.apart:.2f} where reading and computing "
        f"don't overlap: {report.prefill.median / report.limit:.2f} and "
        f"{report.prefill.median / report.apart:.2f} of these.\n"
        f"Selecting takes {report.selecting.median:.1%} of the pruned prefill."
    )
    way = "from the cached prefix" if report.pruned.prefix_layers else "without a prefix"
    for name, other, prefill in report.others:
        operations = report.pruned.prefill_flops / other.prefill_flops
        put(
            f"Inside, {way}, the prefill takes {prefill.median:.2f} of the time and {operations:.2f} of the operations "
            f"{_WAYS[name]}."
        )
    for note in remarks(pipeline.family, pruning):
        say(note)


def _lines(report: "Report") -> list[tuple[str, ...]]:
    """Rows of the table: a name, a cell for each way to answer, and full over pruned."""
    full, pruned = report.full, report.pruned
    ways = [full, *(way for _, way, _ in report.others), pruned]

    def counts(name: str, of: Callable[["Side"], float], text: Callable[[Any], str] = "{:,}".format) -> tuple[str, ...]:
        return name, *(text(of(way)) for way in ways), f"{of(full) / of(pruned):.2f}"

    def times(name: str, of: Callable[["Side"], "Spread"], ratio: "Spread | None" = None) -> tuple[str, ...]:
        shown = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
        return name, *(f"{of(way).median:,.1f} ms" for way in ways), shown

    lines = [counts("visual tokens", lambda way: way.tokens)]
    if sum(pruned.inside) < pruned.tokens * len(pruned.inside):
        mean = "visual tokens, mean of the layers"
        lines.append(counts(mean, lambda way: sum(way.inside) / len(way.inside), "{:,.1f}".format))
    lines.append(counts("tokens of the prompt", lambda way: way.prompt))
    if report.load is not None:
        lines.append(("load", *(f"{report.load:,.1f} ms" for _ in ways), ""))
    lines.append(("encode", *(f"{report.encode.median:,.1f} ms" for _ in ways), ""))
    if pruned.localize.median:
        lines.append(times("localize", lambda way: way.localize))
    lines += [
        times("select", lambda way: way.select),
        times("prefill", lambda way: way.prefill, report.prefill),
        counts("prefill, by operations and bytes", lambda way: 1e3 * way.roofline.overlapped, "{:,.1f} ms".format),
        times("decode, a token", lambda way: way.decode, report.decode),
        times("question to last token", lambda way: way.answer, report.answer),
        counts("prefill operations", lambda way: way.prefill_flops, "{:.3g}".format),
        counts("keys and values", lambda way: way.kv_bytes, size),
    ]
    if all(way.peak_bytes for way in ways):
        lines.append(counts("most memory held", lambda way: way.peak_bytes or 0, size))
    return lines
