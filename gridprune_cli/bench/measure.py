"""Full against pruned: one question answered from all visual tokens and from the kept ones, in turn, all measured.

Where a selection leaves inside the language model, the same choice is also measured before it, and inside from scratch,
without the prefix that the first layers' work on the image is taken from.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch

from gridprune_cli.bench.cost import Decoder, Rates, Roofline, kv_bytes, prefill_flops, prefill_steps
from gridprune_cli.bench.rates import measure_rates, weight_bytes
from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate
from gridprune_cli.images import Source, load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.runners.batches import Stopwatch
from gridprune_cli.scenes.scene import SAMPLES, SIZE, draw, make_scene
from gridprune_cli.selector import find_relevance
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import EncodedImage
from gridprune_cli.vlm.checkpoint import EMBEDDED
from gridprune_cli.vlm.quantized import linear_layers

_SIDE = 672  # pixels; LLaVA-NeXT makes its full number of tiles of it
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of what was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)


@dataclass(frozen=True)
class Side:
    """One of the ways to answer. Times are milliseconds.

    localize       by a localiser that is a model, reading and encoding the image among it; 0 without one
    decode         per token after the first
    answer         localize, select, prefill and decode together
    tokens         visual tokens
    inside         visual tokens in each layer of the language model
    prefix_layers  how many of them run only the text behind the image, the rest being cached
    prompt         tokens of the whole prompt
    kv_bytes       of the prompt, by formula
    prefill_flops  by formula
    roofline       of the prefill: the seconds of its operations and bytes at the machine's rates
    peak_bytes     most memory held while answering, weights among it; None where the system does not tell
    """

    tokens: int
    inside: tuple[int, ...]
    prefix_layers: int
    prompt: int
    localize: Spread
    select: Spread
    prefill: Spread
    decode: Spread
    answer: Spread
    kv_bytes: int
    prefill_flops: int
    roofline: Roofline
    peak_bytes: int | None


@dataclass(frozen=True)
class Report:
    """What `measure` found. Ratios are full over pruned, of answers that were measured one after the other.

    before      what is selected inside, pruned before the language model; None but for `ilp` "selection"
    scratch     the pruned answer without the prefix; None likewise
    of_before, of_scratch  the pruned prefill over these
    load        milliseconds to read all of the model; None where it was in memory already, as random weights are
    encode      milliseconds for the picture, which is done once however many questions there are
    selecting   the pruned answer's `select` as a share of its `prefill`
    achieved    measured ratio of the prefills over that of their operations: 1 where time goes with operations
    rates       what the machine reached with the language model's matrices, in the same run
    limit       ratio of the prefills' rooflines, where computing and reading overlap
    apart       the same where they don't
    """

    load: float | None
    encode: Spread
    encode_peak_bytes: int | None
    full: Side
    pruned: Side
    prefill: Spread
    decode: Spread
    answer: Spread
    selecting: Spread
    rates: Rates
    before: Side | None = None
    scratch: Side | None = None
    of_before: Spread | None = None
    of_scratch: Spread | None = None

    @property
    def flops(self) -> float:
        return self.full.prefill_flops / self.pruned.prefill_flops

    @property
    def others(self) -> list[tuple[str, Side, Spread]]:
        """The further ways that there are: name, what was measured, and the pruned prefill over theirs."""
        ways = (("before", self.before, self.of_before), ("scratch", self.scratch, self.of_scratch))
        return [(name, way, prefill) for name, way, prefill in ways if way and prefill]

    @property
    def achieved(self) -> float:
        return self.prefill.median / self.flops

    @property
    def limit(self) -> float:
        return self.full.roofline.overlapped / self.pruned.roofline.overlapped

    @property
    def apart(self) -> float:
        return self.full.roofline.apart / self.pruned.roofline.apart

    def to_json(self) -> dict[str, Any]:
        """Times end in `_ms`."""

        def side(one: Side) -> dict[str, Any]:
            names = ("localize", "select", "prefill", "decode", "answer")
            times = {f"{name}_ms": asdict(getattr(one, name)) for name in names}
            times["roofline_ms"] = {name: 1e3 * seconds for name, seconds in asdict(one.roofline).items()}
            return {name: value for name, value in asdict(one).items() if f"{name}_ms" not in times} | times

        return {
            "load_ms": self.load,
            "encode_ms": asdict(self.encode),
            "encode_peak_bytes": self.encode_peak_bytes,
            "full": side(self.full),
            "pruned": side(self.pruned),
            "before": side(self.before) if self.before else None,
            "scratch": side(self.scratch) if self.scratch else None,
            "ratio": {
                **{name: asdict(getattr(self, name)) for name in ("prefill", "decode", "answer")},
                "flops": self.flops,
                "kv": self.full.kv_bytes / self.pruned.kv_bytes,
                "roofline": {"overlapped": self.limit, "apart": self.apart},
            },
            "pruned_of": {
                name: {"prefill": asdict(prefill), "flops": self.pruned.prefill_flops / other.prefill_flops}
                for name, other, prefill in self.others
            },
            "achieved": self.achieved,
            "of_roofline": {
                "overlapped": self.prefill.median / self.limit,
                "apart": self.prefill.median / self.apart,
            },
            "rates": {"flops_per_s": self.rates.flops, "bytes_per_s": self.rates.nbytes},
            "selecting": asdict(self.selecting),
        }


@dataclass(frozen=True)
class _Run:
    """One answer: visual tokens, in each layer too, tokens of its prompt, milliseconds, bytes."""

    tokens: int
    inside: tuple[int, ...]  # empty where none leaves inside the language model
    prompt: int
    prefix_layers: int  # 0 without a prefix
    prefix_tokens: int
    localize: float
    select: float
    prefill: float
    decode: float  # of all tokens after the first
    peak: int | None

    @property
    def answer(self) -> float:
        return self.localize + self.select + self.prefill + self.decode


def measure(
    pipeline: Pipeline,
    source: Source,
    question: str,
    pruning: Pruning,
    *,
    repeat: int,
    new_tokens: int,
    step: Callable[[], None] = lambda: None,
) -> Report:
    """Encodes an image and answers from all of its tokens and from the kept ones, `repeat` times each.

    The ways to answer take turns, and so does which of them is first; a first round of everything is not counted, since
    much is set up in it, a prefix among it. `new_tokens` are generated, whatever the model wants to stop at. Each time
    relevance is measured against a text that was not seen before, since what a text tower makes of a question is kept;
    a localiser sees the picture anew. The full answer has no relevance to compute, and asks no localiser. `step` is
    called after each encoding and answer, `count_steps` times.

    Raises BadInput where `repeat` is below 1 or `new_tokens` below 2, and what `Pipeline` raises.
    """
    if repeat < 1 or new_tokens < 2:
        raise BadInput("--repeat must be at least 1, and --new-tokens 2: the first token is part of the prefill")
    family, picture = pipeline.family, load_image(source)
    find_relevance(family, pruning)
    held = {"tower", "projector", "language"} <= family._loaded.keys()
    start = time.perf_counter()
    family.load("tower", "projector", "language")
    if localizer := pipeline.localizers.find(pruning):
        localizer.family.load("tower", "projector", "language")
    if pruning.needs_relevance:
        family.load_relevance()
    load = None if held else _since(start)

    encodes, peaks = [], []
    for _ in range(repeat + 1):
        _reset_peak(family.device)
        start = time.perf_counter()
        (image,) = pipeline.encoder.encode([picture])
        encodes.append(_since(start))
        peaks.append(_peak(family.device))
        step()

    image = replace(image, source=source)  # a localiser sees the picture anew
    whole = Pruning(keep=1.0, method=make_method("uniform"), positions=pruning.positions)
    rounds = []
    for turn in range(repeat + 1):
        fresh = replace(pruning, query=f"{pruning.query or question} {turn}")
        ways = [("full", whole, False), ("pruned", fresh, None)]
        if pruning.ilp == "selection":
            ways += [("before", replace(fresh, ilp=None, ilp_layer=None), False), ("scratch", fresh, False)]
        runs = {}
        for name, kept, with_prefix in ways if turn % 2 else reversed(ways):
            runs[name] = _answer(pipeline, image, question, kept, new_tokens, with_prefix)
            step()
        rounds.append(runs)
    runs_of = {name: [runs[name] for runs in rounds[1:]] for name in rounds[0]}
    full, pruned = runs_of["full"], runs_of["pruned"]
    language = family.load("language")
    decoder = Decoder.of(language.config)
    linear = list(linear_layers(language, family.text_model).values())
    rates, of_weight = measure_rates(linear, family.dtype), weight_bytes(linear)

    def side(runs: Sequence[_Run]) -> Side:
        prompt = median_low(run.prompt for run in runs)  # separators come and go with the tokens of their row
        inside = runs[0].inside or (runs[0].tokens,) * decoder.layers
        layers = [prompt - runs[0].tokens + there for there in inside]
        text = prompt - runs[0].prefix_tokens  # what is run of the prompt in the prefix's layers
        run = [text if layer < runs[0].prefix_layers else n for layer, n in enumerate(layers)]
        steps = prefill_steps(decoder, layers, run, itemsize=family.dtype.itemsize, weight_bytes=of_weight)
        return Side(
            tokens=runs[0].tokens,
            inside=inside,
            prefix_layers=runs[0].prefix_layers,
            prompt=prompt,
            localize=Spread.of([run.localize for run in runs]),
            select=Spread.of([run.select for run in runs]),
            prefill=Spread.of([run.prefill for run in runs]),
            decode=Spread.of([run.decode / (new_tokens - 1) for run in runs]),
            answer=Spread.of([run.answer for run in runs]),
            kv_bytes=kv_bytes(decoder, layers, family.dtype.itemsize),
            prefill_flops=prefill_flops(decoder, layers, run),
            roofline=Roofline.of(steps, rates),
            peak_bytes=_largest([run.peak for run in runs]),
        )

    def ratio(of: Callable[[_Run], float]) -> Spread:
        return Spread.of([of(a) / of(b) for a, b in zip(full, pruned, strict=True)])

    def prefill_of(name: str) -> Spread:
        return Spread.of([a.prefill / b.prefill for a, b in zip(pruned, runs_of[name], strict=True)])

    further: dict[str, Any] = {}
    for name in runs_of.keys() - {"full", "pruned"}:
        further |= {name: side(runs_of[name]), f"of_{name}": prefill_of(name)}
    return Report(
        load=load,
        encode=Spread.of(encodes[1:]),
        encode_peak_bytes=_largest(peaks[1:]),
        full=side(full),
        pruned=side(pruned),
        prefill=ratio(lambda run: run.prefill),
        decode=ratio(lambda run: run.decode),
        answer=ratio(lambda run: run.answer),
        selecting=Spread.of([run.select / run.prefill for run in pruned]),
        rates=rates,
        **further,
    )


def count_steps(pruning: Pruning, repeat: int) -> int:
    """How often `measure` calls its `step`."""
    return (5 if pruning.ilp == "selection" else 3) * (repeat + 1)


def sample_scene(model: str) -> bytes:
    """An image file to measure with: a scene, as it is for the embedded model, else enlarged to 672 x 672 pixels."""
    side = SIZE if model == EMBEDDED else _SIDE
    png = io.BytesIO()
    draw(make_scene(SAMPLES))[0].resize((side, side)).save(png, "PNG")
    return png.getvalue()


def _answer(
    pipeline: Pipeline,
    image: EncodedImage,
    question: str,
    pruning: Pruning,
    new_tokens: int,
    with_prefix: bool | None,
) -> _Run:
    """One answer from an encoded image, measured. `with_prefix` is that of `build_pruned_sets`."""
    device, stopwatch = pipeline.family.device, Stopwatch()
    _reset_peak(device)
    request = Request((image,), question, pruning)
    pruned = pipeline.runner(stopwatch=stopwatch).prune_one(request, with_prefix=with_prefix).pruned
    (generated,) = generate(pipeline.family, [pruned], new_tokens, min_new_tokens=new_tokens)
    return _Run(
        tokens=len(pruned.kept),
        inside=pruned.schedule.tokens if pruned.schedule else (),
        prompt=len(pruned.input_ids),
        prefix_layers=pruned.prefix.depth if pruned.prefix else 0,
        prefix_tokens=len(pruned.prefix.ids) if pruned.prefix else 0,
        localize=stopwatch.ms.get("localize", 0.0),
        select=stopwatch.ms["select"],
        prefill=generated.prefill,
        decode=generated.decode,
        peak=_peak(device),
    )


def _since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)


def _largest(peaks: Sequence[int | None]) -> int | None:
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def _reset_peak(device: str) -> None:
    """Has `_peak` begin anew. On a CPU, Linux does it for the whole process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # proc(5): the peak of resident memory becomes what it is now


def _peak(device: str) -> int | None:
    """Most bytes held since `_reset_peak`: of tensors on a GPU, else resident; None where the system doesn't tell."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if not _CLEAR.exists():
        return None
    status = _CLEAR.with_name("status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
