"""From encoded images and a question to kept tokens: signals are computed, and the method chooses by them.

Everything is done for many requests at once, since what a text tower makes of several questions, and what a method does
for several images of the same views, costs little more than for one.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.errors import BadInput
from gridprune_cli.prefixes import Prefixes
from gridprune_cli.pruning.compress import ratio_budget
from gridprune_cli.pruning.methods import Method
from gridprune_cli.pruning.methods.gridprune import GridPrune
from gridprune_cli.pruning.region import contextual_regions, inside
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, Signals, View
from gridprune_cli.regions import Localized
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import EncodedImage
from gridprune_cli.vlm.attention_relevance import attention_relevance, join_relevance
from gridprune_cli.vlm.checkpoint import CLIP_NAMES
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.word_relevance import keywords

# fields of `Signals` that have a value or a vector for each visual token
_PER_TOKEN = (
    "relevance",
    "saliency",
    "vision_features",
    "image_embeds",
    "importance",
    "patch_lengths",
    *OPTIONAL_SIGNALS,
)


@dataclass(frozen=True)
class EncodedRequest:
    """A request whose images are encoded, with what a localiser answered for each, where one was asked.

    prompt  (L,), token ids of its unpruned prompt, where they are written already
    """

    request: Request
    images: tuple[EncodedImage, ...]
    localized: tuple[Localized, ...] | None = None
    prompt: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def pruning(self) -> Pruning:
        return self.request.pruning

    @property
    def alone(self) -> "EncodedRequest":
        """The request without earlier turns: what relevance is taken from, so that a turn keeps what `ask` keeps."""
        if not self.request.history:
            return self
        return replace(self, request=replace(self.request, history=()), prompt=None)

    @property
    def query(self) -> str:
        """What relevance is measured against."""
        return self.pruning.query or self.request.question

    @property
    def shares_budget(self) -> bool:
        """Whether its images share one K, so that tokens are chosen among those of all of them."""
        return self.pruning.share_budget and len(self.images) > 1


def find_relevance(family: Family, pruning: Pruning) -> None:
    """Finds, and fetches where it is not here, the CLIP that relevance comes from, where the pruning needs one.

    To be called before long work, so that what is missing is known at once. Raises BadInput where there is none that
    is the tower's, or the method needs what this relevance does not have; GridpruneError where the hub fails.
    """
    if "patch_lengths" in pruning.method.needs and family.relevance_kind not in CLIP_NAMES:
        raise BadInput(
            f"cosine=false only with relevance from CLIP or SigLIP, here it comes from {family.relevance_kind}; leave "
            "it out, or take `relevance=clip`",
            field="method",
            value=pruning.method.name,
        )
    if pruning.needs_relevance and family.clip:
        _ = family.tower_differs  # which every pruned set has a remark about


def relevance_source(family: Family, pruning: Pruning) -> dict[str, Any] | None:
    """What relevance comes from, as results have it; None where the pruning needs none. Raises as `Family.clip`.

    Of a method that leaves the sign of relevance to the model, also that.
    """
    if not pruning.needs_relevance:
        return None
    sign = {"sign": family.relevance_sign} if pruning.method.relevance_sign == 0 else {}
    return family.relevance_source | sign


def compute_signals(
    family: Family, requests: Sequence[EncodedRequest], prefixes: Prefixes | None = None
) -> list[list[Signals]]:
    """The signals of every image of every request, with the contextual region where the method takes one.

    `prefixes` are the model's, which relevance from attention needs; without them they are computed anew. Raises as
    `Family.clip`, `Family.relevance` and `attention_relevance`, and BadInput where a prompt can't be written.
    """
    # 1. relevance, for requests whose pruning needs it
    relevance: list[Sequence[Tensor] | list[None]] = [[None] * len(request.images) for request in requests]
    needing = [n for n, request in enumerate(requests) if request.pruning.needs_relevance]
    for n, of_images in zip(needing, _relevance(family, [requests[n] for n in needing], prefixes), strict=True):
        relevance[n] = of_images
    # 2. what else there is of each image and question
    signals = [
        [_image_signals(family, request, n, of_image) for n, of_image in enumerate(of_images)]
        for request, of_images in zip(requests, relevance, strict=True)
    ]
    # 3. regions that are to be found from the relevance, those of images with the same views together
    by_views: dict[tuple[View, ...], list[tuple[int, int, Tensor]]] = {}
    for r, request in enumerate(requests):
        if not (request.pruning.heeds_region(len(request.images)) and request.pruning.region == "auto"):
            continue
        sign = request.pruning.method.relevance_sign
        for n, image_signals in enumerate(signals[r]):
            if image_signals.region is None and image_signals.relevance is not None:
                by_views.setdefault(image_signals.views, []).append((r, n, image_signals.relevance * sign))
    for views, places in by_views.items():
        regions = contextual_regions(torch.stack([relevance for _, _, relevance in places]), views)  # of (B, N)
        for (r, n, _), region in zip(places, regions, strict=True):
            signals[r][n] = replace(signals[r][n], region=region)
    return signals


def read_queries(family: Family, requests: Sequence[Request]) -> None:
    """Has the text tower that relevance comes from, if any, read what many requests ask, in few large batches.

    What fails here fails again where a request is pruned for, and is told there.
    """
    queries = [request.pruning.query or request.question for request in requests if request.pruning.needs_relevance]
    if queries and family.relevance_kind != "attention":
        with suppress(Exception):
            family.relevance.read(queries)


def _relevance(
    family: Family, requests: Sequence[EncodedRequest], prefixes: Prefixes | None
) -> Sequence[Sequence[Tensor]]:
    """For each request the relevance `(N,)` of each of its images."""
    queries = [request.query for request in requests]
    if family.relevance_kind == "attention":
        return _relevance_from_attention(family, requests, queries, prefixes or Prefixes(family))
    if queries:
        family.relevance.read(queries)  # those that `read_queries` has not; each call below then only compares
    by_tower = [[family.relevance(image.vision_features, r.query) for image in r.images] for r in requests]
    if family.relevance_kind != "both":
        return by_tower
    by_attention = _relevance_from_attention(family, requests, queries, prefixes or Prefixes(family))
    return [
        join_relevance(of_tower, of_attention, request.shares_budget)
        for request, of_tower, of_attention in zip(requests, by_tower, by_attention, strict=True)
    ]


def _relevance_from_attention(
    family: Family, requests: Sequence[EncodedRequest], queries: Sequence[str], prefixes: Prefixes
) -> list[list[Tensor]]:
    """`_relevance` from the language model's attention: from prefixes, but where the images see the question."""
    prompts = write_prompts(family, [request.alone for request in requests], queries)
    by_way: dict[bool, list[int]] = {}
    for n, request in enumerate(requests):
        by_way.setdefault(image_sees_question(family, request), []).append(n)
    relevance: dict[int, list[Tensor]] = {}
    for sees_question, places in by_way.items():
        of_places = attention_relevance(
            family,
            [prompts[n] for n in places],
            [requests[n].images for n in places],
            [requests[n].shares_budget for n in places],
            None if sees_question else prefixes.find,
        )
        relevance |= zip(places, of_places, strict=True)
    return [relevance[n] for n in range(len(requests))]


def image_sees_question(family: Family, request: EncodedRequest) -> bool:
    """Whether what the language model makes of the images depends on the question, so that each has its own."""
    template = request.request.template
    return family.sees_question or (template is not None and template.find("{question}") < template.rfind("{image}"))


def with_prompts(family: Family, requests: Sequence[EncodedRequest]) -> list[EncodedRequest]:
    """The requests with their prompts, so that these are written once. Raises BadInput as `write_prompts`."""
    prompts = write_prompts(family, requests, [request.request.question for request in requests])
    return [replace(request, prompt=prompt) for request, prompt in zip(requests, prompts, strict=True)]


def write_prompts(family: Family, requests: Sequence[EncodedRequest], questions: Sequence[str]) -> list[Tensor]:
    """Token ids `(L,)` of the unpruned prompt of each request, with one of the questions in the place of its own.

    The tokenizer is called once for those that are written alike. Raises BadInput as `Family.write_prompts`.
    """
    prompts: dict[int, Tensor] = {}
    alike: dict[tuple[str | None, str | None], list[int]] = {}
    for n, (request, question) in enumerate(zip(requests, questions, strict=True)):
        if request.prompt is not None and question == request.request.question:
            prompts[n] = request.prompt
        else:
            alike.setdefault((request.request.system, request.request.template), []).append(n)
    for (system, template), places in alike.items():
        of_places = [(questions[n], requests[n].images) for n in places]
        histories = [requests[n].request.history for n in places]
        prompts |= zip(places, family.write_prompts(of_places, system, template, histories), strict=True)
    return [prompts[n] for n in range(len(requests))]


def _image_signals(family: Family, request: EncodedRequest, n: int, relevance: Tensor | None) -> Signals:
    """The signals of one image of a request; its region only where it is given, or a localiser named it."""
    image, pruning = request.images[n], request.pruning
    of_pool = request.images if request.shares_budget else (image,)  # images whose tokens share one K
    views = tuple(view for of_image in of_pool for view in of_image.views)
    k = pruning.count(sum(view.count for view in views))
    needs = pruning.method.needs_for(k, views, family.relevance_kind if pruning.needs_relevance else "")
    region = None
    if pruning.heeds_region(len(request.images)):
        if isinstance(pruning.region, tuple):
            region = pruning.region
        elif request.localized:
            region = request.localized[n].box
    features = image.vision_features
    if missing := [name for name in pruning.optional if name not in image.optional]:
        raise BadInput(
            f"{image.name}: encoded without {missing[0]}, which this method needs; give the image file, or encode it "
            f"with `optional={','.join(pruning.optional)}`",
            field="method",
            value=pruning.method.name,
        )
    return Signals(
        views=image.views,
        relevance=relevance,  # (N,)
        saliency=image.saliency.float(),  # (N,)
        region=region,
        vision_features=features.to(family.device) if "vision_features" in needs else None,  # (N, C)
        image_embeds=family.text_embeds(features).to(family.device) if "image_embeds" in needs else None,  # (N, D)
        question_embeds=(
            family.vocabulary.vectors(keywords(request.query)) if "question_embeds" in needs else None  # (M, D)
        ),
        importance=family.importance(features, request.query) if "importance" in needs else None,  # (N,)
        patch_lengths=family.patch_lengths(features) if "patch_lengths" in needs else None,  # (N,)
        relevance_sign=family.relevance_sign,
        relevance_kind=family.relevance_kind if pruning.needs_relevance else "",
        **{name: image.optional[name].float() for name in pruning.optional},  # (N,) each
    )


def select_tokens(requests: Sequence[EncodedRequest], signals: Sequence[Sequence[Signals]]) -> list[list[Tensor]]:
    """Kept tokens of every request: (K,) int64, sorted, for each image; for all in one where they share a budget.

    Indices count the image's tokens, or those of all images in turn. Raises BadInput where more tokens are asked for
    than there are.
    """
    # 1. pools of tokens, each with a budget of its own
    pools = [
        [join_signals(image_signals)] if request.shares_budget else list(image_signals)
        for request, image_signals in zip(requests, signals, strict=True)
    ]
    # 2. what one method does for several pools at once it does together
    jobs: dict[Method, list[tuple[Signals, int]]] = {}
    methods = []
    for request, request_pools in zip(requests, pools, strict=True):
        for pool in request_pools:
            method, k = _budget(pool, request.pruning)
            jobs.setdefault(method, []).append((pool, k))
            methods.append(method)
    kept = {method: iter(method.select_batch(*zip(*job, strict=True))) for method, job in jobs.items()}
    # 3. back in the order of the requests
    in_turn = iter([next(kept[method]) for method in methods])
    return [[next(in_turn) for _ in request_pools] for request_pools in pools]


def within_region(signals: Signals) -> Tensor:
    """(N,) bool: which tokens lie in the region; none without one."""
    return inside(signals.views, signals.region) if signals.region else torch.zeros(signals.count, dtype=torch.bool)


def join_signals(signals: Sequence[Signals]) -> Signals:
    """The signals of several images as those of one, without a region: images have no place in one picture."""
    first = signals[0]
    joined: dict[str, Any] = {
        name: torch.cat([image_signals.need(name) for image_signals in signals])
        for name in _PER_TOKEN
        if getattr(first, name) is not None
    }
    views = tuple(view for image_signals in signals for view in image_signals.views)
    return replace(first, views=views, region=None, **joined)


def _budget(signals: Signals, pruning: Pruning) -> tuple[Method, int]:
    """How to choose among the tokens of one pool, and K. With ratios, K and the region's share of it follow from them.

    Raises BadInput as `Pruning.count`.
    """
    k, method = pruning.count(signals.count), pruning.method
    if signals.region is not None and (pruning.inside_ratio or pruning.outside_ratio):
        in_region = int(within_region(signals).sum())
        k, share = ratio_budget(k, in_region, signals.count, pruning.inside_ratio, pruning.outside_ratio)
        # each side gets exactly what its ratio says, not at least
        assert isinstance(method, GridPrune)  # which alone heeds a region
        few = "top" if method.few == "top" else "apart"
        method = method.with_options(region_share=share, few=few)
    return method, k
