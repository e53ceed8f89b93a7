"""`gridprune eval`: pruning methods on the same questions, compared."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli import choices
from gridprune_cli.cli import options
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.output import progress, put, say, set_quiet
from gridprune_cli.cli.values import read_schedules
from gridprune_cli.errors import BadInput

if TYPE_CHECKING:
    from PIL import Image

    from gridprune_cli.evaluation.data import Item
    from gridprune_cli.evaluation.run import Cell, Plan, Rows
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.settings import Pruning


@examples(
    "gridprune eval scenes:200 -o run",
    "gridprune eval questions.jsonl -o run --methods 'gridprune, gridprune --region none, uniform' --keep 0.22,0.11",
)
@options.takes(pipeline=options.pipeline, prompt=options.prompt)
def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="scenes or scenes:N, held-out scenes of the embedded model, or a file of questions as of `batch`, "
            "each with `answers`; - for stdin.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the results; a run that was stopped there goes on."),
    ],
    pipeline: "Pipeline",
    prompt: dict[str, Any],
    methods: Annotated[
        list[str],
        options.option(
            "Methods, commas between; each may have options of `ask` and its own, as in 'gridprune --literal, random "
            "--seed 3'.",
            options.PRUNING,
        ),
    ] = ["gridprune, uniform, random"],  # noqa: B006
    keep: Annotated[
        str, options.option("Shares of the tokens to keep, commas between.", options.PRUNING)
    ] = "0.33,0.22,0.11,0.05",
    metric: Annotated[choices.Metric, options.option("How answers are scored.", options.WORK)] = "exact",
    suffix: Annotated[
        str, options.option("What follows each question in the prompt; relevance does not see it.", options.PROMPT)
    ] = "",
    max_new_tokens: options.MaxNewTokens = 16,
    batch_size: Annotated[int, options.option("Questions that are answered at once.", options.WORK, min=1)] = 16,
    quiet: options.Quiet = False,
) -> None:
    """Compare methods at equal K on the same questions, with all tokens as the measure."""
    from gridprune_cli.builder import remarks
    from gridprune_cli.evaluation.data import open_data
    from gridprune_cli.evaluation.run import Plan, fill, resume

    set_quiet(quiet)
    cells = read_cells(methods, keep)
    plan = Plan(open_data(data), cells, metric, suffix, prompt, max_new_tokens, batch_size)
    with pipeline:
        answers = resume(pipeline, plan, output)
        if answers:
            say(f"{output}: going on after {len(answers)} of {plan.count} answers")
        for remark in dict.fromkeys(remark for cell in cells for remark in remarks(pipeline.family, cell.pruning)):
            say(remark)
        try:
            with progress("answering", plan.count - len(answers)) as step:
                fill(pipeline, plan, output, answers, step)
        except KeyboardInterrupt:
            say(f"stopped after {len(answers)} of {plan.count} answers; the same command goes on from there")
            raise
        _write(pipeline, plan, answers, output)


_FLAGS = ("literal", "share_budget")  # options without a value

# between two methods: a comma before a letter, outside of quotes; a region's box has commas, too
_BETWEEN = re.compile(r""",\s*(?=[A-Za-z])(?=(?:[^"']|"[^"]*"|'[^']*')*$)""")


def read_cells(methods: list[str], keeps: str) -> tuple["Cell", ...]:
    """The cells of a table: every method at every keep. Raises BadInput for what names none.

    A method is followed by options as `gridprune ask` takes them, and by those of its own.
    """
    from dataclasses import replace

    from gridprune_cli.evaluation.run import Cell

    shares = read_shares(keeps)
    prunings = []
    for text in methods:
        for line in _BETWEEN.split(text.strip().strip(",")):
            try:
                arguments = shlex.split(line)
            except ValueError as fault:
                reason = f"can't be read as a shell would ({fault})"
                raise BadInput(reason, field="methods", value=line) from fault
            if not arguments:
                raise BadInput("names none; `gridprune ask --help` lists them", field="methods")
            prunings.append((" ".join(arguments), read_pruning(arguments)))
    # all tokens are part of every table, so a keep of 1 would mostly say it again
    return tuple(
        Cell(name, replace(p, keep=share)) for share in shares for name, p in prunings if share != 1 or _says_more(p)
    )


def read_shares(keeps: str) -> list[float]:
    """Numbers with commas between. Raises BadInput for a text that is none."""
    shares = []
    for text in keeps.split(","):
        try:
            shares.append(float(text))
        except ValueError as fault:
            reason = f"{text.strip()!r} is no number; give shares, as in 0.22,0.11"
            raise BadInput(reason, field="keep", value=keeps) from fault
    return shares


def _says_more(pruning: "Pruning") -> bool:
    """Whether a keep of 1 gives something else than all tokens: fewer, further inside too, or other positions."""
    inside = pruning.method.stages([1], [1], range(1, 2))
    return (
        pruning.ilp not in (None, "selection")
        or any(stage.budgets != (1,) for stage in inside)
        or bool(pruning.inside_ratio and pruning.outside_ratio)
        or pruning.positions != "original"
    )


def read_pruning(arguments: Sequence[str]) -> "Pruning":
    """The pruning of a method's name and the options behind it, `--NAME VALUE` or `--NAME=VALUE`, or flags alone.

    Raises BadInput, with all of them, for what the method does not take.
    """
    from gridprune_cli.settings import Pruning

    method, *rest = arguments
    settings: dict[str, Any] = {"method": method, "keep": 1.0}
    try:
        while rest:
            flag, equals, value = rest.pop(0).partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            if not flag.startswith("--"):
                raise BadInput(f"{flag!r} is no option; give those of a method as --NAME VALUE")
            if name in ("keep", "tokens", "method"):
                raise BadInput("shares go to eval's own --keep, and a method is named first")
            if not equals and name not in _FLAGS:
                if not rest:
                    raise BadInput(f"{flag} needs a value")
                value = rest.pop(0)
            if name == "method_option":
                settings.setdefault(name, []).extend(read_schedules([value]))
            else:
                settings[name] = value if equals or name not in _FLAGS else True
        return Pruning.from_options(settings)
    except BadInput as fault:
        raise fault.at(f"--methods {' '.join(arguments)}") from fault


def _write(pipeline: "Pipeline", plan: "Plan", answers: "Rows", folder: Path) -> None:
    """The results, as JSON, Markdown and, where the extra is there, HTML; the table also to stdout."""
    import json

    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.drawing import figure_of
    from gridprune_cli.evaluation import report
    from gridprune_cli.evaluation.results import markdown, summarise
    from gridprune_cli.evaluation.run import encode, prune
    from gridprune_cli.figure import draw

    runner = pipeline.runner(questions=plan.batch)
    results = plan.settings(pipeline) | summarise(plan, answers)
    table = markdown(results)

    def picture(cell: "Cell", item: "Item", answer: str) -> "Image.Image":
        encoded = encode(runner, plan.data, [item], {}, plan.optional)
        (pruned,) = prune(runner, plan, cell, [item], encoded)
        return draw(figure_of(plan.data.find(item.images[0]), pruned, answer))

    write_atomic(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode(), sync=True)
    write_atomic(folder / "results.md", table.encode("utf-8", "backslashreplace"), sync=True)
    put(table, end="")
    if line := report.lacking():
        say(line)
    else:
        page = report.html(plan, results, answers, picture)
        write_atomic(folder / "report.html", page.encode("utf-8", "backslashreplace"), sync=True)
    written = [name for name in ("results.json", "results.md", "report.html") if (folder / name).exists()]
    say(f"{folder}: {', '.join(written)}, and every answer in samples.jsonl")
