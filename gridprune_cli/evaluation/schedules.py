"""Finds on samples at which layers, or down to which shares, a method drops tokens inside the language model.

No true answers are needed. BTP's layers follow from hidden states; G-Search's shares from the model's own answers from
all tokens, which pruning is to leave as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gridprune_cli.errors import GridpruneError
from gridprune_cli.evaluation.calibrate import answers_of
from gridprune_cli.evaluation.run import FULL, Cell, Encoded, Plan, batches, encode
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.pruning.methods.btp import STAGES
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import PrunedSet

SHARES = (0.75, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.06, 0.045, 0.03, 0.02, 0.015, 0.01)  # that G-Search tries
TOLERANCE = 0.02  # share of answers that may change at all layers together; the paper asks for none in its metric


@dataclass(frozen=True)
class Schedule:
    """What was found: options of a method, by name, and the figures behind it."""

    method: str
    options: dict[str, str]
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, "options": self.options, "figures": self.figures}


def find_schedule(method: str, pipeline: Pipeline, plan: Plan, step: Callable[[int], None]) -> Schedule:
    """The schedule of a method, "btp" or "g-search", on a plan's questions. `step` is called as work is done.

    Raises BadInput for an image that can't be read, GridpruneError where nothing is found, and the error of the first
    question that fails.
    """
    return find_layers(pipeline, plan, step) if method == "btp" else search_shares(pipeline, plan, step)


# ---- BTP -------------------------------------------------------------------------------------------------------------


def find_layers(pipeline: Pipeline, plan: Plan, step: Callable[[int], None]) -> Schedule:
    """BTP's layers: those ahead of which the hidden states of image tokens change most, in the mean over questions.

    Change is 1 less the cosine of a token's hidden states at the input of a layer and of the one before.
    """
    family, changes = pipeline.family, []
    for pruned in _full_sets(pipeline, plan):
        with _record_inputs(pipeline) as inputs:
            pipeline.runner().generate_one(pruned, max_new_tokens=1)
        at_image = pruned.input_ids == family.image_token
        of_image = [inputs[layer][0, at_image.to(inputs[layer].device)].float() for layer in range(family.depth)]
        pairs = pairwise(of_image)
        changes.append(torch.stack([1 - cosine_similarity(*pair, dim=-1).mean() for pair in pairs]).cpu())
        step(1)
    change = torch.stack(changes).double().mean(0)  # (depth - 1,), ahead of the layers from 1 on
    layers = range(family.first_inner, family.depth)
    most = sorted(layers, key=lambda layer: -float(change[layer - 1]))[:STAGES]
    figures = {"change": {str(layer): round(float(change[layer - 1]), 6) for layer in layers}}
    return Schedule("btp", {"layers": ",".join(map(str, sorted(most)))}, figures)


def _full_sets(pipeline: Pipeline, plan: Plan) -> Iterator[PrunedSet]:
    """The pruned set of each question with all tokens, to be run whole."""
    runner = pipeline.runner(questions=plan.batch)
    encoded: Encoded = {}
    for batch in batches(plan):
        encoded = encode(runner, plan.data, batch, encoded)
        for item in batch:
            images = tuple(encoded[image, len(item.images) > 1] for image in item.images)
            request = Request(images, item.question, FULL.pruning, **plan.prompt)
            yield runner.prune_one(request, with_prefix=False).pruned


@contextmanager
def _record_inputs(pipeline: Pipeline) -> Iterator[dict[int, Tensor]]:
    """While this lasts, the hidden states (1, L, D) that each layer first receives."""
    text: Any = pipeline.family.load("language").get_submodule(pipeline.family.text_model)
    inputs: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for number, layer in enumerate(text.layers):

            def record(_layer: Any, args: tuple[Any, ...], number: int = number) -> None:
                inputs.setdefault(number, args[0])

            hooks.callback(layer.register_forward_pre_hook(record).remove)
        yield inputs


# ---- G-Search --------------------------------------------------------------------------------------------------------


def search_shares(pipeline: Pipeline, plan: Plan, step: Callable[[int], None]) -> Schedule:
    """G-Search's shares: layer by layer from the first on, the least of `SHARES` that leaves the answers as they are.

    From a layer on, its share stays in all deeper ones until the next is found. At each, answers may change for
    `TOLERANCE` of the questions, against those from all tokens. A smaller share is taken to change more, so that the
    least is found by halving.
    """
    family = pipeline.family
    full = _all_answers(pipeline, plan, FULL, step)
    chosen: dict[int, float] = {}
    agreements: dict[str, float] = {}
    for layer in range(family.first_inner, family.depth):
        smaller = [share for share in SHARES if share < min(chosen.values(), default=1.0)]
        low, high = 0, len(smaller)  # smaller[:low] leave the answers, smaller[high:] do not
        while low < high:
            middle = (low + high) // 2
            shares = chosen | {layer: smaller[middle]}
            agreement = _agreement(full, _all_answers(pipeline, plan, _cell(shares), step))
            if agreement >= 1 - TOLERANCE:
                low = middle + 1
                agreements[_text(shares)] = round(agreement, 6)
            else:
                high = middle
        if low:
            chosen[layer] = smaller[low - 1]
    if not chosen:
        raise GridpruneError(
            f"no layer can do with fewer tokens: with {SHARES[0]:.0%} of them, more than {TOLERANCE:.0%} of the "
            "answers change; try other questions",
        )
    figures = {"agreement": agreements[_text(chosen)], "keep": min(chosen.values())}
    return Schedule("g-search", {"plan": _text(chosen)}, figures)


def _cell(shares: dict[int, float]) -> Cell:
    """The pruning that a plan of shares is, at the budget of its last."""
    method = make_method("g-search", plan=_text(shares))
    return Cell(_text(shares), Pruning(keep=min(shares.values()), method=method))


def _text(shares: dict[int, float]) -> str:
    """Shares by layer as the method's option has them."""
    return ",".join(f"{layer}:{share:g}" for layer, share in shares.items())


def _all_answers(pipeline: Pipeline, plan: Plan, cell: Cell, step: Callable[[int], None]) -> list[str]:
    """The answers to all questions under a cell."""
    runner, texts = pipeline.runner(questions=plan.batch), []
    encoded: Encoded = {}
    for batch in batches(plan):
        encoded = encode(runner, plan.data, batch, encoded)
        texts += [text for text, _ in answers_of(runner, plan, cell, batch, encoded)]
        step(len(batch))
    return texts


def _agreement(full: Sequence[str], pruned: Sequence[str]) -> float:
    """The share of answers that are the same to the letter."""
    return sum(a == b for a, b in zip(full, pruned, strict=True)) / len(full)


def count_answers(method: str, pipeline: Pipeline, questions: int) -> int:
    """How many answers finding a schedule takes at most."""
    layers = pipeline.family.depth - pipeline.family.first_inner
    return questions * (1 if method == "btp" else 1 + layers * len(SHARES).bit_length())
