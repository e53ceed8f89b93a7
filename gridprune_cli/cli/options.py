"""Options that several commands share, in groups.

A group is a function: its parameters are the options, and what it returns is what a command works with. `@takes`
puts the options of a group in the place of one parameter of a command.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from gridprune_cli import choices
from gridprune_cli.cli.values import read_schedules
from gridprune_cli.errors import BadInput
from gridprune_cli.questions import check_text

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.runners.ray import Ray
    from gridprune_cli.settings import Pruning

MODEL, PRUNING, PROMPT, OUTPUT = "Model and cache", "Pruning", "Prompt and answer", "Output"
SERVER = "Server"
WORK = "Work"  # how it is done: in which batches, where, how often
REGIONS = "Inner pruning (ILP), compression (PLC) and localisers"
_PANELS = (None, SERVER, MODEL, PRUNING, WORK, PROMPT, OUTPUT, REGIONS)  # in this order in help; None is for arguments


def option(text: str, panel: str, *names: str, **settings: Any) -> Any:
    """What Typer is told about an option; `names` where they are not those of the parameter."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


def _complete(*values: str) -> dict[str, Any]:
    """For an option that takes other values, too: what shell completion proposes."""
    return {"autocompletion": lambda: list(values)}


CacheDir = Annotated[Path | None, option("Folder of the cache.", MODEL, envvar="GRIDPRUNE_CACHE_DIR")]
Json = Annotated[bool, option("Print one JSON object per result.", OUTPUT, "--json")]
Quiet = Annotated[bool, option("No progress and no notices.", OUTPUT, "--quiet", "-q")]
Shard = Annotated[
    str | None,
    option(
        "Do one share of N, numbered I from 0 to N-1; the image's path decides which share it is in.",
        WORK,
        metavar="I/N",
    ),
]
MaxNewTokens = Annotated[
    int, option("Longest answer, in tokens.", PROMPT, min=1, metavar="N", envvar="GRIDPRUNE_MAX_NEW_TOKENS")
]
Model = Annotated[
    str | None,
    option(
        "`scenes`, a folder, or OWNER/NAME[@REVISION] on the hub.",
        MODEL,
        metavar="NAME",
        envvar="GRIDPRUNE_MODEL",
        show_default="that of `gridprune models default`",
    ),
]
Clip = Annotated[
    str | None,
    option("CLIP or SigLIP that the model's tower was taken from, for relevance: a folder or hub name.", MODEL),
]
Relevance = Annotated[
    choices.Relevance,
    option(
        "What relevance comes from: the CLIP or SigLIP of the model's tower, the language model's attention, both, or "
        "its word embeddings; auto: clip where the tower is a CLIP's or --clip is named, else attention.",
        MODEL,
        envvar="GRIDPRUNE_RELEVANCE",
    ),
]
Keep = Annotated[float, option("Share of visual tokens to keep.", PRUNING, metavar="SHARE", envvar="GRIDPRUNE_KEEP")]
Method = Annotated[
    choices.MethodName,
    option(f"{', '.join(choices.list_methods())}.", PRUNING, metavar="NAME", envvar="GRIDPRUNE_METHOD"),
]
Device = Annotated[
    str,
    option(
        "auto, cpu, cuda, ..., or map: all GPUs.",
        MODEL,
        metavar="NAME",
        envvar="GRIDPRUNE_DEVICE",
        **_complete("auto", "cpu", "cuda", "map"),
    ),
]
Dtype = Annotated[
    choices.Dtype,
    option("auto, float32, bfloat16 or float16.", MODEL, metavar="NAME", envvar="GRIDPRUNE_DTYPE"),
]
Quantize = Annotated[
    choices.Quantize | None,
    option(
        "Hold the weights of the language model's layers in 8 or 4 bits: int8 or int4.",
        MODEL,
        metavar="NAME",
        envvar="GRIDPRUNE_QUANTIZE",
        show_default="as they are stored",
    ),
]

System = Annotated[str | None, option("System message, if the model takes one.", PROMPT, metavar="TEXT")]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Print the answer as it comes.", show_default="at a terminal"),
]

RARE = (  # options that the help of commands for people leaves out
    *("clip", "relevance", "cache_dir", "cache_limit", "cache_dtype", "quantize"),
    *("positions", "query", "share_budget", "literal", "prompt_template", "stream"),
    *("localizer_template", "ilp_layer", "inside_ratio", "outside_ratio"),
    *("server", "no_server", "api_key"),
)


def takes(
    *, hidden: Collection[str] = (), **groups: Callable[..., Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces each named parameter of a command by the options of its group.

    With the group `server`, the first, a server may do the work: what that gives for the options of the other groups
    takes the place of what they would give. See `cli.remote`.

    `hidden` options are taken as ever, but the help of this command leaves them out.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        of_command = [p for name, p in inspect.signature(command).parameters.items() if name not in groups]
        of_groups = {name: inspect.signature(group).parameters for name, group in groups.items()}
        of_replaced = inspect.signature(command).parameters.keys()  # of `server`, only where the command asks for it

        @functools.wraps(command)
        def run(**values: Any) -> None:
            results: dict[str, Any] = {}
            for name in groups:
                if name in results:
                    continue
                named = {group: {option: values[option] for option in of_groups[group]} for group in groups}
                results[name] = groups[name](**named[name])
                if name == "server":
                    results |= results[name](values, named)
            for options in of_groups.values():
                for option in options:
                    values.pop(option)
            command(**values, **{name: results[name] for name in groups if name in of_replaced})

        parameters = [*of_command, *(p for options in of_groups.values() for p in options.values())]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        parameters = [_without_help(p) if p.name in hidden else p for p in parameters]
        parameters.sort(key=lambda p: _PANELS.index(_panel(p)))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def unopened(group: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The options of a group by name, for a command that does with them later what the group would do at once."""

    @functools.wraps(group)
    def collect(**options: Any) -> dict[str, Any]:
        return options

    return collect


def _panel(parameter: inspect.Parameter) -> str | None:
    """The panel of a parameter in help."""
    info = get_args(parameter.annotation)[1]
    return info.rich_help_panel or (None if isinstance(info, type(typer.Argument())) else OUTPUT)


def _without_help(parameter: inspect.Parameter) -> inspect.Parameter:
    kind, info = get_args(parameter.annotation)
    info = copy.copy(info)
    info.hidden = True
    return parameter.replace(annotation=Annotated[kind, info])


def pipeline(
    model: Model = None,
    clip: Clip = None,
    relevance: Relevance = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    cache_dir: CacheDir = None,
    cache_limit: Annotated[
        str | None,
        option("Size that the cache may grow to, as in 20G; 0 for no limit.", MODEL, envvar="GRIDPRUNE_CACHE_LIMIT"),
    ] = None,
    cache_dtype: Annotated[
        choices.CacheDtype,
        option(
            "How vision features and prefixes are stored: as computed (full), or in 8 bits, which is less exact.",
            MODEL,
            envvar="GRIDPRUNE_CACHE_DTYPE",
        ),
    ] = "full",
    no_cache: Annotated[bool, option("Neither read nor write the cache.", MODEL, "--no-cache")] = False,
) -> "Pipeline":
    """The model with its cache."""
    options = locals()  # the parameters, by their names
    from gridprune_cli.opening import open_pipeline

    return open_pipeline(options)


Address = Annotated[
    str | None,
    option(
        "Ray to use, HOST:PORT, or auto for the one of this machine.",
        WORK,
        show_default="RAY_ADDRESS, else Ray is started here",
    ),
]
Workers = Annotated[
    int | None,
    option("Workers of Ray, each with a model.", WORK, min=1, show_default="one per GPU, else one per 4 CPUs"),
]


def encoding_engine(
    engine: Annotated[
        choices.EncodingEngine, option("local: this process; ray: workers of Ray, also on other machines.", WORK)
    ] = "local",
    address: Address = None,
    workers: Workers = None,
) -> "Ray | None":
    """Ray, where the work is not to be done in this process."""
    from gridprune_cli.runners.ray import Ray

    if engine == "ray":
        return Ray(address, workers)
    if address is not None or workers is not None:
        raise BadInput("only with `engine=ray`", field="workers" if address is None else "address")
    return None


def engine(
    engine: Annotated[
        choices.Engine,
        option(
            "local: this process; ray: workers of Ray, also on other machines; vllm: tokens are pruned here, and the "
            "vLLM at --server answers.",
            WORK,
        ),
    ] = "local",
    address: Address = None,
    workers: Workers = None,
) -> "Ray | None":
    """`encoding_engine` for questions, of which vLLM can answer some: `cli.remote` has it from here."""
    assert engine != "vllm"
    return encoding_engine(engine, address, workers)


def pruning(
    keep: Keep = 0.11,
    tokens: Annotated[int | None, option("How many to keep, instead.", PRUNING, metavar="K")] = None,
    method: Method = "gridprune",
    method_option: Annotated[
        list[str] | None,
        option(
            "Of it: zone=2, or @FILE of a schedule.",
            PRUNING,
            metavar="NAME=VALUE",
            callback=lambda pairs: pairs and read_schedules(pairs),
        ),
    ] = None,
    region: Annotated[
        str | None,
        option(
            "Contextual region: auto, none, or X0,Y0,X1,Y1, from 0 to 7.",
            PRUNING,
            metavar="BOX",
            show_default="auto",
            **_complete("auto", "none"),
        ),
    ] = None,
    positions: Annotated[
        choices.Positions,
        option("original: kept tokens keep their place in the prompt; compact: they are numbered on.", PRUNING),
    ] = "original",
    query: Annotated[
        str | None, option("What relevance is measured against, instead of the question.", PRUNING)
    ] = None,
    share_budget: Annotated[
        bool, option("Several images share one budget, without regions.", PRUNING, "--share-budget")
    ] = False,
    literal: Annotated[
        bool, option("GridPrune as published: T = 1, saliency unscaled, by score, no region.", PRUNING, "--literal")
    ] = False,
    localizer: Annotated[
        str | None,
        option(
            "What finds the region: relevance, vlm (for `scenes`), or the name of a model.",
            REGIONS,
            metavar="NAME",
            show_default="relevance",
            **_complete("relevance", "vlm"),
        ),
    ] = None,
    localizer_template: Annotated[
        str | None,
        option("Text with {question} that asks the localiser for [x0,y0,x1,y1].", REGIONS, show_default="our own"),
    ] = None,
    ilp: Annotated[
        str | None,
        option(
            "What stays inside the language model: selection (by --keep), region, or shares.",
            REGIONS,
            metavar="SHARE",
            show_default="everything",
            **_complete("selection", "region"),
        ),
    ] = None,
    ilp_layer: Annotated[
        str | None,
        option(
            "Layer, from 0, at whose input the others leave; one for each share.",
            REGIONS,
            metavar="LAYER",
            show_default="3; for selection the depth of relevance from attention",
        ),
    ] = None,
    plc: Annotated[
        choices.Plc,
        option(
            "Compression outside the region: pool (means of cells), trained, or off.",
            REGIONS,
            metavar="NAME",
            envvar="GRIDPRUNE_PLC",
        ),
    ] = "off",
    inside_ratio: Annotated[
        float | None,
        option(
            "With --plc: visual tokens per kept one inside the region; with --outside-ratio too, instead of --keep.",
            REGIONS,
            show_default="the method's split",
        ),
    ] = None,
    outside_ratio: Annotated[
        float | None,
        option("With --plc: visual tokens per kept one outside.", REGIONS, show_default="the method's split"),
    ] = None,
) -> "Pruning":
    """What to keep."""
    options = locals()  # the parameters, by their names
    from gridprune_cli.settings import Pruning

    return Pruning.from_options(options)


def prompt(
    system: System = None,
    prompt_template: Annotated[
        str | None,
        option("Text with {image} and {question}, instead of the model's chat template.", PROMPT),
    ] = None,
) -> dict[str, str | None]:
    """How the question is put to the model."""
    check_text(system or "", "`system`")
    check_text(prompt_template or "", "`template`")
    return {"system": system, "template": prompt_template}


def generation(
    max_new_tokens: MaxNewTokens = 128,
    generation: Annotated[
        list[str] | None,
        option(
            "Of transformers' generate, as top_p=0.9.",
            PROMPT,
            metavar="NAME=VALUE",
        ),
    ] = None,
) -> dict[str, Any]:
    """Options for `generate`, by transformers' names. Answers are greedy where these say nothing else."""
    if not generation:
        return {"max_new_tokens": max_new_tokens}
    from gridprune_cli.generation import parse_generation

    return parse_generation(generation, max_new_tokens)


GROUPS = (pipeline, engine, pruning, prompt, generation)
