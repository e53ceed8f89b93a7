"""Chooses what a model's relevance comes from, and its sign, by the model's own answers from all tokens.

No true answers are needed: what pruning with one choice leaves of the answers from all tokens is compared with what
another leaves, on the same questions. A choice is changed only where the difference is beyond its error.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from gridprune_cli.errors import BadInput
from gridprune_cli.evaluation.data import Data, Item
from gridprune_cli.evaluation.results import clustered_error, image_clusters
from gridprune_cli.evaluation.run import FULL, Cell, Encoded, Plan, batches, encode, prune
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.runners.batches import in_order, result_or_raise
from gridprune_cli.runners.local import Runner
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.relevance import PUBLISHED_SIGN, Calibration

MIN_QUESTIONS = 10  # with fewer, a choice would need nearly all answers on its side to be told from chance
SIGNED = ("cdpruner", "trim")  # methods that turn CLIP's relevance round as published
_LEVEL = 0.05  # chance that of a group's choices, were they alike, one would seem better or worse


@dataclass(frozen=True)
class Choice:
    """A value that is tried: what is set for the model, and the prunings that show what it is worth."""

    calibration: Calibration
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Measured:
    """What a choice gave. Shares are 0 to 1; errors are standard errors, and those of paired differences.

    agreement   share of answers that are the one from all tokens, to the letter
    tokens      how much of that answer comes before the first token that differs, in the mean
    difference  of the agreement, to that of the choice in force
    better      whether the difference is above 0 by more than its error, with all other choices tried, too
    """

    calibration: Calibration
    agreement: float
    error: float
    tokens: float
    difference: float = 0.0
    difference_error: float = 0.0
    better: bool = False

    def to_json(self) -> dict[str, Any]:
        figures = ("agreement", "error", "tokens", "difference", "difference_error")
        chosen = {name: value for name, value in vars(self.calibration).items() if value is not None}
        return chosen | {name: round(getattr(self, name), 6) for name in figures} | {"better": self.better}


def sample(data: Data, limit: int, seed: int) -> Data:
    """At most `limit` of the questions, the same ones for the same seed, in their order.

    Raises BadInput where there are fewer than `MIN_QUESTIONS`.
    """
    count = min(limit, len(data.items))
    if count < MIN_QUESTIONS:
        reason = f"{count} questions, where no choice could be told from chance; give at least {MIN_QUESTIONS}"
        raise BadInput(reason, place=data.name)
    indices = sorted(random.Random(seed).sample(range(len(data.items)), count))
    return replace(data, items=tuple(data.items[index] for index in indices))


def list_choices(family: Family, shares: Sequence[float]) -> list[list[Choice]]:
    """What is tried at shares of the tokens, in groups of which the first choice is in force.

    The first group are sources of relevance, with depths; the second, where CLIP is one of them, signs of CLIP's. From
    attention, relevance has one meaning. Raises BadInput for a model whose relevance comes from words by name, and for
    models and shares that leave nothing to choose.
    """
    if family.relevance_kind == "words":
        reason = "there is nothing to choose for relevance from words; take auto, attention or clip"
        raise BadInput(reason, field="relevance", value="words")
    for share in shares:
        if not 0 < share < 1:
            reason = "must be above 0 and below 1: where all tokens stay, all choices are alike"
            raise BadInput(reason, field="keep", value=f"{share:g}")
    prunings = [Pruning(keep=share) for share in dict.fromkeys(shares)]
    cells = tuple(Cell(pruning.method.name, pruning) for pruning in prunings)
    sources = [Choice(calibration, cells) for calibration in family.relevance_choices()]
    clip = next((choice.calibration for choice in sources if choice.calibration.relevance == "clip"), None)
    if clip is None and len(sources) == 1:
        depth = sources[0].calibration.relevance_depth
        reason = (
            f"the language model has no other layers to choose from than the {depth} in force; there is nothing to do"
        )
        raise BadInput(reason, place=family.checkpoint.name)
    if clip is None:
        return [sources]
    in_force = family.calibration.relevance_sign or PUBLISHED_SIGN
    signs = []
    for sign in (in_force, -in_force):
        methods = [make_method(name, relevance_sign=sign) for name in SIGNED]
        signed = [replace(pruning, method=method) for method in methods for pruning in prunings]
        of_sign = tuple(Cell(pruning.method.name, pruning) for pruning in signed)
        signs.append(Choice(replace(clip, relevance_sign=sign), of_sign))
    return [sources, signs]


def compare(
    pipeline: Pipeline, plan: Plan, groups: Sequence[Sequence[Choice]], step: Callable[[int], None]
) -> list[list[Measured]]:
    """What every choice of each group gave on the plan's questions. `step` is called after each batch of answers.

    Answers from all tokens are generated once. What is computed for the choices goes into no cache. Raises BadInput for
    an image that can't be read, and the error of the first question that fails.
    """
    runner = pipeline.runner(questions=plan.batch)
    choices = [choice for group in groups for choice in group]
    runners = [_under(pipeline, choice.calibration).runner(questions=plan.batch) for choice in choices]
    scores: list[list[np.ndarray]] = [[] for _ in choices]  # of each choice, batch by batch (2, B)
    images: list[list[str]] = []  # of each question, the sha256 of its images
    encoded: Encoded = {}
    for batch in batches(plan):
        # 1. the answers from all tokens
        encoded = encode(runner, plan.data, batch, encoded)
        images += [[encoded[image, len(item.images) > 1].image for image in item.images] for item in batch]
        full = answers_of(runner, plan, FULL, batch, encoded)
        step(len(batch))
        # 2. those under each choice, compared with them
        for choice, under_choice, of_choice in zip(choices, runners, scores, strict=True):
            of_cells = []  # (2, B) each
            for cell in choice.cells:
                answers = answers_of(under_choice, plan, cell, batch, encoded)
                of_cells.append(np.array([_likeness(*pair) for pair in zip(full, answers, strict=True)]).T)
                step(len(batch))
            of_choice.append(np.mean(of_cells, axis=0))
    # 3. figures, choice against the one in force
    joined = iter([np.concatenate(of_choice, axis=1) for of_choice in scores])  # (2, Q) each
    return [_figures(group, [next(joined) for _ in group], image_clusters(images)) for group in groups]


def choose(measured: Sequence[Measured]) -> Measured:
    """The best of those that are better than the first, which is in force; the first where none is.

    Of equal agreement, the one with more tokens in agreement, then the one that runs fewer layers.
    """

    def rank(choice: Measured) -> tuple[float, float, int]:
        return choice.agreement, choice.tokens, -(choice.calibration.relevance_depth or 0)

    return max((choice for choice in measured[1:] if choice.better), key=rank, default=measured[0])


def new_settings(family: Family, chosen: Sequence[Measured]) -> Calibration:
    """What the model is to have from now on: what it has, with what differs in the choice of each group."""
    settings = family.calibration
    for choice in (choice for choice in chosen if choice.better):
        new = choice.calibration
        if new.relevance_sign is not None:
            settings = replace(settings, relevance_sign=new.relevance_sign)
            continue
        if new.relevance != family.relevance_kind:
            settings = replace(settings, relevance=new.relevance)
        if new.relevance_depth is not None:
            settings = replace(settings, relevance_depth=new.relevance_depth)
    return settings


Answer = tuple[str, tuple[int, ...]]  # text and token ids


def _under(pipeline: Pipeline, calibration: Calibration) -> Pipeline:
    """The pipeline with other settings of its model, whose weights are the same, and without a cache."""
    family = copy.copy(pipeline.family)
    family.calibrate(calibration)
    return Pipeline(family, cache_dtype=pipeline.encoder.cache_dtype)


def answers_of(runner: Runner, plan: Plan, cell: Cell, batch: list[Item], encoded: Encoded) -> list[Answer]:
    """The answers to a batch of questions under a cell. Raises the error of the first that fails."""
    generated = in_order(runner.generate(prune(runner, plan, cell, batch, encoded), max_new_tokens=plan.max_new_tokens))
    return [(answer.text, answer.ids) for answer in map(result_or_raise, generated)]


def _likeness(full: Answer, pruned: Answer) -> tuple[float, float]:
    """1 for the same answer, else 0; and the share of the longer one's tokens before the first that differs."""
    pairs = zip(full[1], pruned[1], strict=False)
    alike = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(full[1]), len(pruned[1])))
    return float(full[0] == pruned[0]), alike / max(len(full[1]), len(pruned[1]), 1)


def _figures(group: Sequence[Choice], scores: Sequence[np.ndarray], clusters: np.ndarray) -> list[Measured]:
    """The figures of a group of choices from the scores (2, Q) of each: agreement and tokens."""
    # Bonferroni within the group: two-sided, of which the half counts in which a choice seems better
    quantile = NormalDist().inv_cdf(1 - _LEVEL / 2 / max(1, len(group) - 1))
    measured = []
    for choice, (agreement, tokens) in zip(group, scores, strict=True):
        difference = agreement - scores[0][0]
        error = _error(difference, clusters)
        measured.append(
            Measured(
                choice.calibration,
                float(agreement.mean()),
                _error(agreement, clusters),
                float(tokens.mean()),
                float(difference.mean()),
                error,
                bool(difference.mean() > quantile * error),
            )
        )
    return measured


def _error(values: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of a mean (Q,): with questions about one image as one, or each for itself, whatever is larger.

    Of few images the first is too small, of a single one 0.
    """
    return max(clustered_error(values, clusters), clustered_error(values, np.arange(len(values))))
