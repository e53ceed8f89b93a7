"""Options that several commands share, in groups.

A group is a function: its parameters are the options, and what it returns is what a command works with. `@takes`
puts the options of a group in the place of one parameter of a command.
"""

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.errors import BadInput
from gridprune_cli.questions import check_text

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.runners.ray import Ray
    from gridprune_cli.settings import Pruning

DEVICE = "auto, cpu, cuda, ..., or map: the language model over all GPUs."

CacheDir = Annotated[
    Path | None,
    typer.Option(envvar="GRIDPRUNE_CACHE_DIR", help="Folder of the cache.", rich_help_panel="Model and cache"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per result.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices.")]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Do one share of N alone, I from 0 to N-1. An image's name alone decides which, whatever else is given.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, envvar="GRIDPRUNE_MAX_NEW_TOKENS", help="Longest answer, in tokens.")]


def takes(**groups: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces each named parameter of a command by the options of its group."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters
        shared = {name: inspect.signature(group).parameters for name, group in groups.items()}

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = {
                name: groups[name](**{option: values.pop(option) for option in options})
                for name, options in shared.items()
            }
            command(**values, **made)

        parameters = [p for name, p in own.items() if name not in groups]
        for options in shared.values():
            parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in options.values()]
        parameters.sort(key=lambda p: p.kind)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def in_shard(shard: str | None) -> Callable[[str], bool] | None:
    """Whether a name belongs to a share as given by --shard; None where all is to be done."""
    if shard is None:
        return None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise BadInput(f"--shard {shard[:40]}: not I/N with I from 0 to N-1, as in 0/4")
    share, shares = int(match[1]), int(match[2])

    def mine(name: str) -> bool:
        hashed = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(hashed[:8], "big") % shares == share

    return mine


def _option(text: str, panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


_MODEL = "Model and cache"
_PRUNING = "Pruning"
_PROMPT = "Prompt and answer"
_PAPERS = "What the papers leave open"
_ENGINE = "Engine"


Model = Annotated[
    str | None,
    _option(
        "Model: `scenes`, a folder with a checkpoint, or a hub name, OWNER/NAME or OWNER/NAME@REVISION.",
        _MODEL,
        envvar="GRIDPRUNE_MODEL",
        show_default="the one of gridprune models default; else scenes, for scenes alone",
    ),
]
Revision = Annotated[str | None, _option("Branch, tag or commit of a hub model.", _MODEL)]
Clip = Annotated[
    str | None, _option("CLIP that the model's tower was taken from, for relevance: a folder or hub name.", _MODEL)
]
Relevance = Annotated[
    str,
    _option(
        "What relevance comes from: clip, the CLIP of the model's tower; words, the language model's embeddings; auto: "
        "clip where the tower is a CLIP's, else words.",
        _MODEL,
        envvar="GRIDPRUNE_RELEVANCE",
    ),
]
Device = Annotated[str, _option(DEVICE, _MODEL, envvar="GRIDPRUNE_DEVICE")]
Dtype = Annotated[str, _option("auto, float32, bfloat16 or float16.", _MODEL, envvar="GRIDPRUNE_DTYPE")]


def pipeline(
    model: Model = None,
    revision: Revision = None,
    clip: Clip = None,
    relevance: Relevance = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    cache_dir: CacheDir = None,
    cache_limit: Annotated[
        str | None,
        _option("Size that the cache may grow to, as in 20G; 0 for no limit.", _MODEL, envvar="GRIDPRUNE_CACHE_LIMIT"),
    ] = None,
    storage: Annotated[
        str,
        _option(
            "How states are stored: full, as the tower gives them, or in 8 bits, float8 or int8, which is less exact.",
            _MODEL,
            "--store",
            envvar="GRIDPRUNE_STORE",
        ),
    ] = "full",
    no_cache: Annotated[bool, _option("Neither read nor write the cache.", _MODEL, "--no-cache")] = False,
) -> "Pipeline":
    """The model with its cache."""
    from gridprune_cli.cache.store import open_store, parse_size
    from gridprune_cli.cli.output import warn
    from gridprune_cli.config import choose_model
    from gridprune_cli.pipeline import Pipeline

    choice = choose_model(model)
    store = None if no_cache else open_store(cache_dir, warn)
    if store and cache_limit is not None:
        store.limit = parse_size(cache_limit, "--cache-limit") or None
    return Pipeline(
        choice.model,
        revision=revision,
        clip=clip,
        relevance=relevance,
        store=store,
        device=device,
        dtype=dtype,
        cache_dtype=storage,
        flag=choice.flag,
    )


def engine(
    engine: Annotated[
        str, _option("local: this process; ray: workers of Ray, also on other machines.", _ENGINE)
    ] = "local",
    address: Annotated[
        str | None,
        _option(
            "Ray to use, HOST:PORT, or auto for the one of this machine.",
            _ENGINE,
            show_default="RAY_ADDRESS, else Ray is started here",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        _option("Workers of Ray, each with a model.", _ENGINE, min=1, show_default="one per GPU, else one per 4 CPUs"),
    ] = None,
) -> "Ray | None":
    """Ray, where the work is not to be done in this process."""
    from gridprune_cli.runners.ray import Ray

    if engine not in ("local", "ray"):
        raise BadInput(f"--engine {engine}: not one of local, ray")
    if engine == "ray":
        return Ray(address, workers)
    if address is not None or workers is not None:
        raise BadInput(f"{'--workers' if address is None else '--address'}: only with --engine ray")
    return None


def pruning(
    keep: Annotated[
        float, _option("Share of the visual tokens to keep, above 0, at most 1.", _PRUNING, envvar="GRIDPRUNE_KEEP")
    ] = 0.11,
    tokens: Annotated[int | None, _option("How many visual tokens to keep, instead of --keep.", _PRUNING)] = None,
    method: Annotated[
        str,
        _option(
            "gridprune, topk-relevance, fastervlm, visionzip, vispruner, divprune, scope, holov, cdpruner, mmtok, "
            "trim, hired, uniform, random, fastv, pyramiddrop, sparsevlm, dart, adaptprune or vtw.",
            _PRUNING,
            envvar="GRIDPRUNE_METHOD",
        ),
    ] = "gridprune",
    method_option: Annotated[
        list[str] | None,
        _option("Option of the method, as step=4; can be given several times.", _PRUNING, metavar="NAME=VALUE"),
    ] = None,
    region: Annotated[
        str | None,
        _option(
            "Contextual region: auto, none, or X0,Y0,X1,Y1 on the 8x8 grid, 0 to 7, inclusive.",
            _PRUNING,
            show_default="auto, where the method has regions",
        ),
    ] = None,
    localizer: Annotated[
        str | None,
        _option(
            "What finds the region: relevance; vlm, a small model that comes with `scenes`; or a model's name.",
            _PRUNING,
            show_default="relevance",
        ),
    ] = None,
    localizer_template: Annotated[
        str | None,
        _option("Text with {question} that asks the localiser for [x0,y0,x1,y1].", _PRUNING, show_default="our own"),
    ] = None,
    positions: Annotated[
        str,
        _option("original: kept tokens keep their place; compact: they are numbered on.", _PRUNING),
    ] = "original",
    query: Annotated[
        str | None, _option("What relevance is measured against, instead of the question.", _PRUNING)
    ] = None,
    share_budget: Annotated[
        bool, _option("Several images share one budget, without regions.", _PRUNING, "--share-budget")
    ] = False,
    ilp: Annotated[
        str | None,
        _option(
            "What stays inside the language model: a share of all visual tokens, the region's first, or region.",
            _PRUNING,
            metavar="SHARE|region",
            show_default="everything",
        ),
    ] = None,
    ilp_layer: Annotated[
        int | None,
        _option("Layer, from 0, at whose input the others leave.", _PRUNING, show_default="3"),
    ] = None,
    plc: Annotated[
        str,
        _option(
            "Compression before the language model: pool (rows outside the region are means of their cells), trained "
            "(by the checkpoint's compressor) or off.",
            _PRUNING,
            envvar="GRIDPRUNE_PLC",
        ),
    ] = "off",
    inside_ratio: Annotated[
        float | None,
        _option(
            "With --plc: visual tokens per row inside the region; with --outside-ratio too, instead of --keep.",
            _PRUNING,
            show_default="the method's split",
        ),
    ] = None,
    outside_ratio: Annotated[
        float | None,
        _option("With --plc: visual tokens per row outside.", _PRUNING, show_default="the method's split"),
    ] = None,
    literal: Annotated[
        bool, _option("GridPrune as published: T = 1, saliency unscaled, no region.", _PRUNING, "--literal")
    ] = False,
    zone: Annotated[int | None, _option("Side of a zone, in tokens.", _PAPERS)] = None,
    alpha: Annotated[float | None, _option("Weight of saliency against relevance, 0 to 1.", _PAPERS)] = None,
    temperature: Annotated[
        float | None, _option("T of the softmax over zones: small is sharp, large is even.", _PAPERS)
    ] = None,
    saliency_scale: Annotated[
        str | None, _option("How saliency is scaled before it is weighed: none, minmax, max or rank.", _PAPERS)
    ] = None,
    region_share: Annotated[
        float | None, _option("Share of the kept tokens that come from the contextual region.", _PAPERS)
    ] = None,
    relevance_sign: Annotated[int | None, _option("1, or -1 to turn the relevance round.", _PAPERS)] = None,
    layer: Annotated[int | None, _option("Layer of fastv, dart, adaptprune or vtw, from 0.", _PAPERS)] = None,
    seed: Annotated[int | None, _option("Seed of the method random.", _PAPERS)] = None,
) -> "Pruning":
    """What to keep."""
    from gridprune_cli.pruning.methods import make
    from gridprune_cli.pruning.methods.gridprune import LITERAL
    from gridprune_cli.settings import Pruning

    given = {
        "zone": zone,
        "alpha": alpha,
        "temperature": temperature,
        "saliency_scale": saliency_scale,
        "region_share": region_share,
        "relevance_sign": relevance_sign,
        "layer": layer,
        "seed": seed,
    }
    if method != "gridprune" and (literal or region not in (None, "none")):
        raise BadInput(f"{'--literal' if literal else '--region'}: only for --method gridprune, not for {method}")
    if localizer not in (None, "relevance") and (method != "gridprune" or literal or region not in (None, "auto")):
        raise BadInput(f"--localizer {localizer}: only for --method gridprune with --region auto, and not --literal")
    if localizer_template and localizer in (None, "relevance"):
        raise BadInput("--localizer-template: only with a --localizer that is a model")
    if literal and region not in (None, "none"):
        raise BadInput("--region: not with --literal, since GridPrune as published has no region")
    options = (LITERAL if literal else {}) | {name: value for name, value in given.items() if value is not None}
    named = _named(method_option or [], "--method-option")
    if twice := [name for name in named if given.get(name) is not None]:
        raise BadInput(f"--method-option {twice[0]}: given twice, also as --{twice[0].replace('_', '-')}")
    options |= named
    try:
        made = make(method, **options)
    except ValueError as fault:
        raise BadInput(f"--method {method}: {fault}") from fault
    box = "none" if literal else region or "auto"
    return Pruning(
        keep=keep,
        tokens=tokens,
        method=made,
        region=box,
        localizer=localizer or "relevance",
        localizer_template=localizer_template or "",
        positions=positions,
        query=query,
        share_budget=share_budget,
        ilp=ilp,
        ilp_layer=ilp_layer,
        plc=plc,
        inside_ratio=inside_ratio,
        outside_ratio=outside_ratio,
    )


def prompt(
    system: Annotated[str | None, _option("System message, for models that take one.", _PROMPT)] = None,
    prompt_template: Annotated[
        str | None,
        _option("Text with {image} and {question}, instead of the model's chat template.", _PROMPT),
    ] = None,
) -> dict[str, str | None]:
    """How the question is put to the model."""
    for flag, text in (("--system", system), ("--prompt-template", prompt_template)):
        if text is not None:
            check_text(text, flag)
    return {"system": system, "template": prompt_template}


def generation(
    generation: Annotated[
        list[str] | None,
        _option(
            "Option of transformers' generate, as do_sample=true or top_p=0.9; can be given several times.",
            _PROMPT,
            metavar="NAME=VALUE",
        ),
    ] = None,
) -> dict[str, Any]:
    """Options for `generate`, by transformers' names. Without any, answers are greedy."""
    if not generation:
        return {}
    from transformers import GenerationConfig

    from gridprune_cli.generation import check_options

    options = _named(generation, "--generation")
    check_options(options)
    if "max_new_tokens" in options:
        raise BadInput("--generation max_new_tokens: has an option of its own, --max-new-tokens")
    known = vars(GenerationConfig())
    for name in options:
        if name not in known or name.startswith("_"):
            raise BadInput(f"--generation {name}={options[name]}: no option that transformers' generate knows")
    return options


def _named(given: list[str], flag: str) -> dict[str, Any]:
    """Options that are given as NAME=VALUE. A value that is no JSON is a text."""
    options = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise BadInput(f"{flag} {pair}: not NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options
