"""`gridprune calibrate`: what relevance is best taken from for a model, by questions of the user's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gridprune_cli import choices
from gridprune_cli.cli import options
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.evaluate import read_shares
from gridprune_cli.cli.output import check_target, emit_json, progress, say, set_quiet, table
from gridprune_cli.errors import BadInput

if TYPE_CHECKING:
    from gridprune_cli.evaluation.calibrate import Measured
    from gridprune_cli.evaluation.run import Plan
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.vlm.relevance import Calibration


_KEEP = "0.11"


@examples(
    "gridprune calibrate questions.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct",
    "gridprune calibrate questions.jsonl --keep 0.22,0.11 --dry-run",
    "gridprune calibrate questions.jsonl --schedule g-search -o schedule.json",
)
@options.takes(pipeline=options.pipeline, prompt=options.prompt)
def calibrate(
    questions: Annotated[
        str,
        typer.Argument(
            metavar="QUESTIONS",
            help="File of questions as of `batch`, without answers, 10 at the least and 50 or more for a verdict; "
            "- for stdin.",
            show_default=False,
        ),
    ],
    pipeline: "Pipeline",
    prompt: dict[str, Any],
    keep: Annotated[
        str, options.option("Shares of the tokens to keep, commas between; all count alike.", options.PRUNING)
    ] = _KEEP,
    limit: Annotated[
        int, options.option("Questions that are asked, drawn from the file where it has more.", options.WORK, min=1)
    ] = 50,
    schedule: Annotated[
        choices.Schedule | None,
        options.option(
            "Instead of relevance, find the layers at which this method drops tokens, and write them to --output, for "
            "--method-option @FILE.",
            options.WORK,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        options.option("File for the schedule.", options.OUTPUT, "--output", "-o", show_default=False),
    ] = None,
    seed: Annotated[int, options.option("Seed of that draw.", options.WORK)] = 0,
    max_new_tokens: options.MaxNewTokens = 16,
    batch_size: Annotated[int, options.option("Questions that are answered at once.", options.WORK, min=1)] = 16,
    dry_run: Annotated[bool, options.option("Remember nothing.", options.OUTPUT, "--dry-run")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose what a model's relevance comes from, by its own answers from all tokens, and remember it for that model.

    Tried are CLIP, where the tower is a CLIP's, and the language model's attention at several depths; with CLIP also
    the sign that cdpruner and trim take. What is in force stays unless another choice is better beyond the error.
    """
    from gridprune_cli.config import remember_settings
    from gridprune_cli.evaluation.calibrate import choose, compare, list_choices, new_settings, sample
    from gridprune_cli.evaluation.data import read_jsonl
    from gridprune_cli.evaluation.run import Plan
    from gridprune_cli.vlm.checkpoint import model_key

    set_quiet(quiet)
    if schedule is not None or output is not None:
        if schedule is None or output is None:
            missing, there = ("schedule", "output") if schedule is None else ("output", "schedule")
            raise BadInput(f"--{there} needs it, too", field=missing)
        if dry_run:
            raise BadInput("not with --schedule, which remembers nothing but writes its file", field="dry_run")
        if keep != _KEEP:
            raise BadInput("not with --schedule, which finds its own share", field="keep", value=keep)
        check_target(output, "output")
        data = sample(read_jsonl(questions, scored=False), limit, seed)
        plan = Plan(data, (), prompt=prompt, max_new_tokens=max_new_tokens, batch=batch_size)
        _find_schedule(schedule, output, pipeline, plan, json)
        return
    # 1. what is tried, on what
    groups = list_choices(pipeline.family, read_shares(keep))
    data = sample(read_jsonl(questions, scored=False), limit, seed)
    plan = Plan(data, groups[0][0].cells, prompt=prompt, max_new_tokens=max_new_tokens, batch=batch_size)
    total = len(data.items) * (1 + sum(len(choice.cells) for group in groups for choice in group))
    # 2. the answers, compared
    with pipeline, progress("answering", total) as step:
        measured = compare(pipeline, plan, groups, step)
    chosen = [choose(group) for group in measured]
    # 3. what is remembered
    family, key, path = pipeline.family, model_key(pipeline.model), None
    settings = new_settings(family, chosen)
    if settings != family.calibration and not dry_run:
        path = remember_settings(key, to_table(settings, family.fingerprint))
    if json:
        emit_json(
            {
                "model": pipeline.model,
                "fingerprint": family.fingerprint,
                "questions": len(data.items),
                "images": len({image for item in data.items for image in item.images}),
                "keep": [cell.pruning.keep for cell in plan.cells[1:]],
                "choices": [[choice.to_json() for choice in group] for group in measured],
                "chosen": [choice.to_json() for choice in chosen],
                "remembered": None if path is None else str(path),
            }
        )
    else:
        heads = ("relevance", "same answer ", "tokens alike ", "against the one in force ", "verdict")
        table(heads, [_row(choice, group) for group in measured for choice in group])
    for group, best in zip(measured, chosen, strict=True):
        say(_verdict(group, best))
    if path is not None:
        say(f"{path}: remembered for {key}; `gridprune models forget {key}` takes it back")


def _find_schedule(method: str, output: Path, pipeline: "Pipeline", plan: "Plan", as_json: bool) -> None:
    """Finds the schedule of a method and writes it to a file, with the model that it is for."""
    import json

    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.evaluation.schedules import count_answers, find_schedule

    questions = len(plan.data.items)
    with pipeline, progress("answering", count_answers(method, pipeline, questions)) as step:
        result = find_schedule(method, pipeline, plan, step)
    record = result.to_json() | {"model": pipeline.model, "questions": questions}
    record["fingerprint"] = pipeline.family.fingerprint
    write_atomic(output, (json.dumps(record, indent=1) + "\n").encode(), sync=True)
    if as_json:
        emit_json(record)
    share = f" --keep {result.figures['keep']:g}" if "keep" in result.figures else ""
    pairs = " ".join(f"{name}={value}" for name, value in result.options.items())
    say(f"{pairs}: use it by --method {method} --method-option @{output}{share}")


def to_table(settings: "Calibration", fingerprint: str) -> dict[str, str | int]:
    """The settings as the config file holds them, with the weights that they were chosen for."""
    chosen = {name: value for name, value in vars(settings).items() if value not in (None, "auto")}
    return {"fingerprint": fingerprint} | chosen


def _name(choice: "Measured") -> str:
    """A choice in a few words."""
    calibration = choice.calibration
    if calibration.relevance_sign is not None:
        return f"{calibration.relevance}, sign {calibration.relevance_sign:+d}"
    if calibration.relevance_depth is not None:
        return f"{calibration.relevance}, {calibration.relevance_depth} layers"
    return calibration.relevance


def _row(choice: "Measured", group: list["Measured"]) -> tuple[str, ...]:
    """A line of the table, in per cent with standard errors."""
    figures = f"{100 * choice.agreement:.1f} ± {100 * choice.error:.1f}", f"{100 * choice.tokens:.1f}"
    if choice is group[0]:
        return _name(choice), *figures, "", "in force"
    difference = f"{100 * choice.difference:+.1f} ± {100 * choice.difference_error:.1f}"
    verdict = "better" if choice.better else "within the error" if choice.difference > 0 else "not better"
    return _name(choice), *figures, difference, verdict


def _verdict(group: list["Measured"], best: "Measured") -> str:
    """What is taken of a group, and why."""
    if best is group[0]:
        unsure = any(choice.difference > 0 for choice in group)
        hint = "; more questions or a smaller --keep may tell" if unsure else ""
        return f"{_name(best)}: stays, since nothing that was tried is better beyond the error{hint}"
    return f"{_name(best)}: taken, since it is better than {_name(group[0])} beyond the error"
