"""`gridprune eval`: pruning methods on the same questions, compared."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli.cli import options
from gridprune_cli.cli.output import progress, put, say, set_quiet
from gridprune_cli.errors import BadInput, GridpruneError

if TYPE_CHECKING:
    from PIL import Image

    from gridprune_cli.evaluation.data import Item
    from gridprune_cli.evaluation.run import Cell, Plan, Rows
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.settings import Pruning


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
        typer.Option(
            help="Methods, commas between; each may have options of `ask`, as in 'gridprune --literal, fastervlm'.",
        ),
    ] = ["gridprune, uniform, random"],  # noqa: B006
    keep: Annotated[str, typer.Option(help="Shares of the tokens to keep, commas between.")] = "0.33,0.22,0.11,0.05",
    metric: Annotated[str, typer.Option(help="exact, vqa, pope, relaxed or anls.")] = "exact",
    suffix: Annotated[
        str, typer.Option(help="What follows each question in the prompt; relevance does not see it.")
    ] = "",
    max_new_tokens: options.MaxNewTokens = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
    quiet: options.Quiet = False,
) -> None:
    """Compare methods at equal K on the same questions, with all tokens as the measure."""
    from gridprune_cli.builder import remarks
    from gridprune_cli.evaluation.data import open_data
    from gridprune_cli.evaluation.metrics import METRICS
    from gridprune_cli.evaluation.run import Plan, fill, resume

    set_quiet(quiet)
    if metric not in METRICS:
        raise BadInput(f"--metric {metric}: not one of {', '.join(METRICS)}")
    cells = read_cells(methods, keep)
    plan = Plan(open_data(data), cells, metric, suffix, prompt, max_new_tokens, batch_size)
    with pipeline:
        rows = resume(pipeline, plan, output)
        if rows:
            say(f"{output}: going on after {len(rows)} of {plan.count} answers")
        for remark in dict.fromkeys(remark for cell in cells for remark in remarks(pipeline.family, cell.pruning)):
            say(remark)
        try:
            with progress("answering", plan.count - len(rows)) as step:
                fill(pipeline, plan, output, rows, step)
        except KeyboardInterrupt:
            say(f"stopped after {len(rows)} of {plan.count} answers; the same command goes on from there")
            raise
        _write(pipeline, plan, rows, output)


evaluate.examples = (  # type: ignore[attr-defined]
    "Examples: `gridprune eval scenes:200 -o run`, "
    "`gridprune eval questions.jsonl -o run --methods 'gridprune, gridprune --region none, uniform' --keep 0.22,0.11`"
)


# between two methods: a comma before a letter, outside of quotes; a region's box has commas, too
_BETWEEN = re.compile(r""",\s*(?=[A-Za-z])(?=(?:[^"']|"[^"]*"|'[^']*')*$)""")


def read_cells(methods: list[str], keeps: str) -> tuple["Cell", ...]:
    """The cells of a table: every method at every keep. Raises BadInput for what names none.

    A method is followed by its options just as `gridprune ask` takes them, and they are read by the same code.
    """
    from dataclasses import replace

    from gridprune_cli.evaluation.run import Cell

    shares = []
    for text in keeps.split(","):
        try:
            shares.append(float(text))
        except ValueError as fault:
            raise BadInput(f"--keep {keeps}: {text.strip()!r} is no number; give shares, as in 0.22,0.11") from fault
    found = []
    for text in methods:
        for given in _BETWEEN.split(text.strip().strip(",")):
            try:
                words = shlex.split(given)
            except ValueError as fault:
                raise BadInput(f"--methods {given}: can't be read as a shell would ({fault})") from fault
            if not words:
                raise BadInput("--methods: names none; `gridprune ask --help` lists them")
            found.append((" ".join(words), _pruning(words)))
    # all tokens are part of every table, so a keep of 1 would mostly say it again
    return tuple(
        Cell(name, replace(p, keep=share)) for share in shares for name, p in found if share != 1 or _says_more(p)
    )


def _says_more(pruning: "Pruning") -> bool:
    """Whether a keep of 1 gives something else than all tokens: fewer, further inside too, or other positions."""
    inside = pruning.method.stages([1], [1], range(1, 2))
    return (
        pruning.ilp is not None
        or any(stage.keep != (1,) for stage in inside)
        or bool(pruning.inside_ratio and pruning.outside_ratio)
        or pruning.positions != "original"
    )


def _pruning(words: list[str]) -> "Pruning":
    from typer.main import get_command

    read: list[Pruning] = []
    app = typer.Typer(add_completion=False)

    @app.command()
    @options.takes(pruning=options.pruning)
    def ask(pruning: "Pruning") -> None:
        read.append(pruning)

    if any(word.partition("=")[0] in ("--keep", "--tokens", "--method", "--help") for word in words):
        raise BadInput(f"--methods {' '.join(words)}: shares go to eval's own --keep, and a method is named first")
    try:
        get_command(app).main(["--keep", "1", "--method", *words], prog_name="gridprune ask", standalone_mode=False)
    except GridpruneError as fault:
        raise BadInput(f"--methods {' '.join(words)}: {fault}") from fault
    return read[0]


def _write(pipeline: "Pipeline", plan: "Plan", rows: "Rows", folder: Path) -> None:
    """The results, as JSON, Markdown and, where the extra is there, HTML; the table also to stdout."""
    import json

    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.cli.show import figure_of
    from gridprune_cli.evaluation import report
    from gridprune_cli.evaluation.results import markdown, summarise
    from gridprune_cli.evaluation.run import encode, prune
    from gridprune_cli.figure import draw

    runner = pipeline.runner(questions=plan.batch)
    results = plan.settings(pipeline) | summarise(plan, rows)
    table = markdown(results)

    def picture(cell: "Cell", item: "Item", answer: str) -> "Image.Image":
        encoded = encode(runner, plan.data, [item], {})
        (pruned,) = prune(runner, plan, cell, [item], encoded)
        return draw(figure_of(plan.data.find(item.images[0]), pruned, answer))

    write_atomic(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode(), sync=True)
    write_atomic(folder / "results.md", table.encode("utf-8", "backslashreplace"), sync=True)
    put(table, end="")
    if line := report.lacking():
        say(line)
    else:
        page = report.html(plan, results, rows, picture)
        write_atomic(folder / "report.html", page.encode("utf-8", "backslashreplace"), sync=True)
    written = [name for name in ("results.json", "results.md", "report.html") if (folder / name).exists()]
    say(f"{folder}: {', '.join(written)}, and every answer in samples.jsonl")
