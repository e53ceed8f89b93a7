"""How the language model's attention is best turned into relevance: `python -m benchmarks.attention --questions 240`.

The whole model runs once over each prompt with all visual tokens, and what the text behind the image attends to is
reduced to maps of one value per visual token. Each map then takes the place of CLIP's relevance, and the questions are
answered from the tokens that it selects. The scenes are those of `benchmarks.sweeps`: neither trained on nor reported.
The table `selection` compares how tokens are selected, before the language model and at a layer inside it.

Layers count from 0. Attention of layer n is there once a question has gone through d = n + 1 layers.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gridprune_cli.builder import build_pruned_sets
from gridprune_cli.evaluation.data import Data, Item, scenes
from gridprune_cli.evaluation.metrics import METRICS
from gridprune_cli.evaluation.results import clustered_error
from gridprune_cli.evaluation.run import FULL, Plan, encode, prune
from gridprune_cli.generation import prompts
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.pruning.region import contextual_regions
from gridprune_cli.pruning.schedule import Selection, Stage, plan
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.runners.batches import in_order, result_or_raise
from gridprune_cli.scenes.scene import TUNE
from gridprune_cli.selector import EncodedRequest, select_tokens
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.word_relevance import keywords

SHARES = (0.11, 0.05, 0.02)  # of 256 visual tokens: 28, 13 and 5
MAPS_BATCH = 16  # prompts whose whole attention is held at once
TOPK, GRIDPRUNE = Pruning(method=make_method("topk-relevance"), region="none"), Pruning()

Attention = Tensor
"""(layers, heads, T, N) of one prompt: from the T text tokens behind the image to its N visual tokens."""


# ---- attention, and what is made of it -------------------------------------------------------------------------------


@torch.inference_mode()
def read_attention(family: Family, sets: Sequence[PrunedSet]) -> Iterator[Attention]:
    """The attention of each set's prompt, float32, by eager attention. The sets hold all visual tokens of one image.

    Leaves the language model of `family` with eager attention.
    """
    model = family.load("language")
    model.set_attn_implementation({"text_config": "eager"})
    for start in range(0, len(sets), MAPS_BATCH):
        batch = sets[start : start + MAPS_BATCH]
        ids, mask, positions = prompts(family, batch)  # (B, L)
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            mm_encoder_outputs={"image": family.features([pruned.image_embeds for pruned in batch])},
            **family.extras(ids),
            output_attentions=True,
            use_cache=False,
        )
        whole = torch.stack(out.attentions, 1).float()  # (B, layers, heads, L, L)
        for attention, is_image in zip(whole, ids == family.image_token, strict=True):
            places = is_image.nonzero()[:, 0]
            yield attention[:, :, int(places[-1]) + 1 :, places].clone()  # not a view of all L x L


def text_masks(family: Family, item: Item, prompt: Tensor) -> dict[str, Tensor]:
    """Which of the T text tokens behind the image a map is taken from, (T,) bool each, by the name of the choice.

    all       the question and the template behind it
    question  the question alone
    content   its tokens that carry content; a token is a word of the embedded model
    last      the last token of the prompt, from which the answer begins
    """
    tail = prompt[int((prompt == family.image_token).nonzero()[-1]) + 1 :]
    tokenizer = family.processor.tokenizer
    question = len(tokenizer(item.question, add_special_tokens=False).input_ids)
    places = torch.arange(len(tail))
    contents = keywords(item.question).split()
    is_content = torch.tensor([token in contents for token in tokenizer.convert_ids_to_tokens(tail.tolist())])
    return {
        "all": torch.ones(len(tail), dtype=torch.bool),
        "question": places < question,
        "content": is_content & (places < question),
        "last": places == len(tail) - 1,
    }


def reduced(values: Tensor, dim: int, how: str) -> Tensor:
    """The mean or the max along a dimension."""
    return values.mean(dim) if how == "mean" else values.amax(dim)


def minmax(maps: Tensor) -> Tensor:
    """Maps (Q, N), each from 0 to 1; a flat one is 0."""
    low, high = maps.aminmax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def ranks(maps: Tensor) -> Tensor:
    """The share of a map's other tokens that lie below each token, (Q, N)."""
    return torch.searchsorted(maps.sort().values, maps.contiguous()).double() / (maps.shape[-1] - 1)


def zscore(maps: Tensor) -> Tensor:
    """Standard deviations from the map's mean, clipped at 3, as -1..1."""
    centred = maps - maps.mean(-1, keepdim=True)
    return (centred / maps.std(-1, keepdim=True)).clamp(-3, 3) / 3


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda maps: maps,
    "square root": torch.sqrt,
    "min-max, 0..1": minmax,
    "min-max, -1..1": lambda maps: 2 * minmax(maps) - 1,
    "square root, min-max, 0..1": lambda maps: minmax(maps.sqrt()),
    "log, min-max, 0..1": lambda maps: minmax(maps.clamp(min=1e-12).log()),
    "rank, 0..1": ranks,
    "z-score": zscore,
}
"""How maps (Q, N) of attention are brought to the scale of relevance."""


def without_common(maps: Tensor, images: np.ndarray) -> Tensor:
    """Maps (Q, N) less the mean map of the other questions about the same image; `images` (Q,) names it."""
    out = maps.clone()
    for image in np.unique(images):
        of_image = torch.from_numpy((images == image).nonzero()[0])
        if len(of_image) > 1:
            others = (maps[of_image].sum(0) - maps[of_image]) / (len(of_image) - 1)
            out[of_image] = maps[of_image] - others
    return out


def without_top(maps: Tensor) -> Tensor:
    """Maps (Q, N) with the median in the place of each map's highest value."""
    return maps.scatter(1, maps.argmax(1, keepdim=True), maps.median(1, keepdim=True).values)


# ---- selection inside the language model -----------------------------------------------------------------------------


def select_inside(family: Family, whole: PrunedSet, kept: Tensor, layer: int) -> PrunedSet:
    """A set of all N tokens of one image, of which only those in `kept` (K,) stay from a layer on."""
    stage = Stage(layer, Selection(tuple(kept.tolist())), (len(kept),))
    schedule = plan([stage], [len(whole.kept)], family.depth)
    return replace(whole, placeholder_map=whole.kept, schedule=schedule)


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """Scores at `SHARES`, over that of all tokens, with the clustered standard error of the paired difference."""

    of_full: tuple[float, ...]
    errors: tuple[float, ...]


class Trial:
    """Questions, their attention, and the score of answers from tokens that some relevance selects."""

    def __init__(self, data: Data, model: str = "scenes"):
        """Encodes the images, answers from all tokens, and reads the attention of every prompt."""
        pipeline, self.items = Pipeline(model), data.items
        self.family, self.runner = pipeline.family, pipeline.runner(questions=128)
        plan = Plan(data, (FULL,))
        encoded = encode(self.runner, data, list(self.items), {})
        self.encoded = [encoded[item.images[0], False] for item in self.items]
        self.images = np.array([image.key for image in self.encoded])  # (Q,)
        sets = prune(self.runner, plan, FULL, list(self.items), encoded)
        self.whole = sets  # all tokens, as the language model gets them
        self.full = self._scores(sets)  # (Q,)
        watched = Pipeline(model).family  # a second one, since reading attention leaves it eager
        self.attention = list(read_attention(watched, sets))
        self.masks = [
            text_masks(self.family, item, pruned.input_ids) for item, pruned in zip(self.items, sets, strict=True)
        ]

    @cached_property
    def clip(self) -> Tensor:
        """CLIP's relevance (Q, N), float64."""
        self.family.relevance.read([item.question for item in self.items])
        pairs = zip(self.encoded, self.items, strict=True)
        maps = [self.family.relevance(image.vision_features, item.question) for image, item in pairs]
        return torch.stack(maps).double()

    def maps(self, layer: int, heads: str = "max", tokens: str = "all", over: str = "max") -> Tensor:
        """Attention (Q, N), float64, of a layer: mean or max over heads, then over the text tokens of a choice."""
        pairs = zip(self.attention, self.masks, strict=True)
        return torch.stack(
            [reduced(reduced(attention[layer], 0, heads)[masks[tokens]], 0, over) for attention, masks in pairs]
        ).double()

    def figure(self, relevance: Tensor, pruning: Pruning, layer: int = 0) -> Figure:
        """What answers are worth when the tokens are selected by a relevance (Q, N), and the others leave at a layer.

        Layer 0 is before the language model.
        """
        of_full, errors = [], []
        for share in SHARES:
            sets = self._select(relevance, replace(pruning, keep=share))
            if layer > 0:
                pairs = zip(self.whole, sets, strict=True)
                sets = [select_inside(self.family, whole, pruned.kept, layer) for whole, pruned in pairs]
            scores = self._scores(sets)
            of_full.append(float(scores.mean() / self.full.mean()))
            errors.append(clustered_error(scores - self.full, self.images))
        return Figure(tuple(of_full), tuple(errors))

    def _select(self, relevance: Tensor, pruning: Pruning) -> list[PrunedSet]:
        regions = [None] * len(relevance)
        if pruning.heeds_region(1):
            regions = contextual_regions(relevance, self.encoded[0].views)  # type: ignore[assignment]
        requests, signals = [], []
        for item, image, of_question, region in zip(self.items, self.encoded, relevance, regions, strict=True):
            requests.append(EncodedRequest(Request((image,), item.question, pruning), (image,)))
            saliency, features = image.saliency.float(), image.vision_features
            signals.append([Signals(image.views, of_question.float(), saliency, region, features)])
        return build_pruned_sets(self.family, requests, signals, select_tokens(requests, signals))

    def _scores(self, sets: Sequence[PrunedSet]) -> np.ndarray:
        answers = in_order(self.runner.generate(sets, max_new_tokens=16))
        pairs = zip(answers, self.items, strict=True)
        return np.array([METRICS["exact"](result_or_raise(answer).text, item.answers) for answer, item in pairs])


# ---- tables ----------------------------------------------------------------------------------------------------------

Entry = tuple[str, Tensor, Pruning] | tuple[str, Tensor, Pruning, int]
"""A line of a table: name, relevance (Q, N), what is selected by it, and where the others leave, as of `figure`."""


def gridprune(region: bool = True, **options: float | str) -> Pruning:
    """GridPrune's default but for some options."""
    return Pruning(method=make_method("gridprune", **options), region="auto" if region else "none")


def layers(trial: Trial) -> Iterator[Entry]:
    """Top-k by every layer and reduction, beside CLIP."""
    yield "CLIP", trial.clip, TOPK
    for layer in range(trial.family.depth):
        for heads in ("max", "mean"):
            for tokens in ("all", "question", "content"):
                for over in ("max", "mean"):
                    name = f"layer {layer}, {heads} over heads, {over} over {tokens} tokens"
                    yield name, trial.maps(layer, heads, tokens, over), TOPK
            yield f"layer {layer}, {heads} over heads, last token", trial.maps(layer, heads, "last"), TOPK


def scales(trial: Trial, layer: int) -> Iterator[Entry]:
    """GridPrune by one layer's map in every scale; then by the map in 0..1 at other options."""
    maps = trial.maps(layer)
    yield "CLIP", trial.clip, GRIDPRUNE
    for name, scale in SCALES.items():
        yield name, scale(maps), GRIDPRUNE
    for temperature in (0.05, 0.1, 0.3, 1.0):
        for alpha in (0.0, 0.2):
            for region in (True, False):
                name = f"min-max, 0..1, T {temperature}, a {alpha}, {'region share 0.5' if region else 'no region'}"
                yield name, minmax(maps), gridprune(region, temperature=temperature, alpha=alpha)


def sinks(trial: Trial, layer: int) -> Iterator[Entry]:
    """What leaving out attention that is common to all questions, or stands out, changes."""
    maps = trial.maps(layer)
    variants = {
        "as it is": maps,
        "less the image's other questions": without_common(maps, trial.images),
        "less the mean of all images": maps - maps.mean(0),
        "top token left out": without_top(maps),
    }
    for name, variant in variants.items():
        yield f"{name}, top-k", minmax(variant), TOPK
        yield f"{name}, gridprune", minmax(variant), GRIDPRUNE


def sources(trial: Trial, layer: int) -> Iterator[Entry]:
    """CLIP, attention, the mean of both, and the mean of two layers, as top-k and GridPrune use them."""
    attention, clip = minmax(trial.maps(layer)), minmax(trial.clip)
    relevance = {
        "CLIP": trial.clip,
        f"layer {layer}": attention,
        f"layer {layer}, last token": minmax(trial.maps(layer, tokens="last")),
        f"layer {layer}, mean over heads": minmax(trial.maps(layer, heads="mean")),
        f"half CLIP, half layer {layer}": (clip + attention) / 2,
    }
    if layer + 1 < trial.family.depth:
        after = minmax(trial.maps(layer + 1))
        relevance |= {
            f"layer {layer + 1}": after,
            f"half layer {layer}, half layer {layer + 1}": (attention + after) / 2,
        }
    for name, maps in relevance.items():
        yield f"{name}, top-k", maps, TOPK
        yield f"{name}, gridprune", maps, GRIDPRUNE
        yield f"{name}, gridprune without region", maps, gridprune(region=False)


def selection(trial: Trial, layer: int) -> Iterator[Entry]:
    """GridPrune, few tokens in each way, with and without region, before the language model and behind a layer."""
    attention = minmax(trial.maps(layer))
    relevance = {"attention": attention, "CLIP": trial.clip, "half each": (attention + minmax(trial.clip)) / 2}
    for leaving, where in ((layer + 1, "inside"), (0, "before")):
        for name, maps in relevance.items():
            for few in ("top", "apart", "unlike"):
                for region in (True, False):
                    pruning = gridprune(region, few=few)
                    yield (
                        f"{where}, {name}, {few}{'' if region else ', no region'}",
                        maps,
                        pruning,
                        leaving,
                    )


TABLES: dict[str, Callable[[Trial, int], Iterator[Entry]]] = {
    "layers": lambda trial, _: layers(trial),
    "scales": scales,
    "sinks": sinks,
    "sources": sources,
    "selection": selection,
}


def table(trial: Trial, entries: Iterator[Entry]) -> Iterator[str]:
    """The lines of a table in Markdown, each as soon as its answers are there."""
    yield "| relevance | " + " | ".join(f"{share:g}" for share in SHARES) + " |"
    yield "|---|" + "---:|" * len(SHARES)
    for name, relevance, pruning, *layer in entries:
        figure = trial.figure(relevance, pruning, *layer)
        values = zip(figure.of_full, figure.errors, strict=True)
        yield (
            f"| {name} | " + " | ".join(f"{100 * of_full:.1f} ± {100 * error:.1f}" for of_full, error in values) + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--skip", type=int, default=0, help="scenes left out first, to confirm a choice on other ones")
    parser.add_argument("--layer", type=int, default=2, help="whose maps the tables but for `layers` are about")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args()
    trial = Trial(scenes(args.questions, TUNE + args.skip, "tune"))
    score = f"{100 * trial.full.mean():.1f} ± {100 * clustered_error(trial.full, trial.images):.1f}"
    print(
        f"{args.questions} questions about {len(set(trial.images))} images; from all tokens {score} % are answered "
        "right. Shares of that in per cent, ± one standard error of the paired difference, clustered by image."
    )
    for name in args.tables:
        print(f"\n{name}\n")
        for line in table(trial, TABLES[name](trial, args.layer)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
