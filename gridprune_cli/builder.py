"""From kept tokens to pruned sets: what the language model receives, the prompt around it, and where all of it is from.

Only the kept tokens go through the projector. It works token by token, so that is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.compress import cell_weights, cells, pool, ratios
from gridprune_cli.pruning.methods import Method
from gridprune_cli.pruning.placeholders import staying
from gridprune_cli.pruning.region import inside
from gridprune_cli.pruning.schedule import LayerSchedule, Region, RegionAttention, Rule, Stage, plan
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.selector import EncodedRequest, join_signals, relevance_source, within_region, write_prompts
from gridprune_cli.settings import RELEVANCE, Pruning
from gridprune_cli.tokens import EncodedImage, Origin, PrunedSet
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.projection import concatenate, project

ILP_LAYER = 3  # at whose input tokens leave the language model, where the pruning names no layer


@dataclass(frozen=True)
class _Draft:
    """A pruned set whose kept tokens are not projected yet.

    vision_features  (N, C) of all images in turn, those of kept tokens as merging or compression leaves them
    placeholder_map  (S,)   which visual token each placeholder that stays stands for, -1 for a separator
    rest                    the other fields of `PrunedSet`
    """

    vision_features: Tensor
    placeholder_map: Tensor
    rest: dict[str, Any]


def build_pruned_sets(
    family: Family,
    requests: Sequence[EncodedRequest],
    signals: Sequence[Sequence[Signals]],
    kept: Sequence[Sequence[Tensor]],
) -> list[PrunedSet]:
    """The pruned set of every request, from the signals of its images and the tokens that `select_tokens` kept.

    Raises BadInput where a pruning does not fit its images, a prompt can't be written, or has more positions than the
    model.
    """
    prompts = write_prompts(family, requests, [request.request.question for request in requests])
    drafts = [_draft(family, *parts) for parts in zip(requests, signals, kept, prompts, strict=True)]
    for draft in drafts:
        last = int(draft.rest["position_ids"].max())
        family.check_length(last + 1, "ask shorter, of fewer images, or take `positions=compact`")
    embeds = project(family, [(draft.vision_features, draft.placeholder_map) for draft in drafts])
    return [
        PrunedSet(image_embeds=kept_embeds, **draft.rest) for kept_embeds, draft in zip(embeds, drafts, strict=True)
    ]


def remarks(family: Family, pruning: Pruning, images: Sequence[Origin] = ()) -> tuple[str, ...]:
    """What a user should know of how this model prunes, and pruned these images."""
    out = []
    # where the CLIP was not looked for yet, nothing was pruned by it
    if pruning.needs_relevance and "clip" in vars(family) and family.clip:
        if pruning.method.relevance_sign == 0:
            out.append(
                f"{pruning.method.name} turns CLIP's relevance round, as published; its option relevance_sign=1 takes "
                "it as it is"
            )
        if family.tower_differs:
            out.append(
                f"this model's tower has other weights than {family.clip.name}, from which its relevance comes; "
                "compare it with `relevance=attention`"
            )
    for image in images:
        if image.localizer and not image.localizer.get("parsed", True):
            out.append(
                f"{image.name}: the localiser {image.localizer['name']} answered {image.localizer['answer']!r}, "
                "which is no region; the one of the relevance was taken"
            )
    return tuple(out)


def _draft(
    family: Family, request: EncodedRequest, signals: Sequence[Signals], kept_by_pool: Sequence[Tensor], prompt: Tensor
) -> _Draft:
    """The pruned set of one request, not yet projected. `prompt` (L,) has all placeholders of all images."""
    images, pruning = request.images, request.pruning
    counts = [image.count for image in images]
    firsts = [sum(counts[:n]) for n in range(len(counts))]  # where each image's tokens begin among all N
    # 1. kept tokens, counted over all images and for each image
    if request.shares_budget:
        (kept,) = kept_by_pool  # (K,)
        owner = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(counts))  # (N,)
        kept_of = [kept[owner[kept] == n] - first for n, first in enumerate(firsts)]
    else:
        kept = torch.cat([first + indices for first, indices in zip(firsts, kept_by_pool, strict=True)])  # (K,)
        kept_of = list(kept_by_pool)
    # 2. features of kept tokens, into which others may have been merged or compressed
    if pruning.plc != "off":  # takes the place of what the method merges
        compressed = zip(images, signals, kept_of, strict=True)
        vision_features = torch.cat([_compress(family, *of_image, pruning.plc) for of_image in compressed])  # (N, C)
    elif request.shares_budget:
        whole = torch.cat([image.vision_features for image in images])
        vision_features = _merge(pruning.method, join_signals(signals), kept, whole)  # (N, C)
    else:
        merged = zip(signals, kept_by_pool, [image.vision_features for image in images], strict=True)
        vision_features = concatenate([_merge(pruning.method, *of_image) for of_image in merged])  # (N, C)
    # 3. which placeholders stay, and so which tokens of the prompt
    placeholder_map = torch.cat(
        [
            torch.where(image.placeholder_map < 0, image.placeholder_map, image.placeholder_map + first)
            for image, first in zip(images, firsts, strict=True)
        ]
    ).long()  # before pruning, separators among it
    stays = staying(placeholder_map, kept, sum(counts))
    in_prompt = torch.ones(len(prompt), dtype=torch.bool)
    in_prompt[prompt == family.image_token] = stays
    input_ids = prompt[in_prompt]
    if pruning.positions == "original":
        position_ids = family.positions(prompt, images)[..., in_prompt]
    else:
        position_ids = torch.arange(len(input_ids))
    # 4. what leaves later, inside the language model, and where everything came from
    schedule = _schedule(family, pruning, signals, kept_by_pool)
    origins = tuple(_origin(request, n, signals[n], kept_of[n]) for n in range(len(images)))
    known = signals[0].relevance is not None
    rest: dict[str, Any] = {
        "kept": kept,
        "input_ids": input_ids,
        "position_ids": position_ids,
        "saliency": concatenate([image.saliency for image in images]),
        "relevance": concatenate([of_image.need("relevance") for of_image in signals]) if known else None,
        "images": origins,
        "model": family.checkpoint.name,
        "fingerprint": family.fingerprint,
        "question": request.request.question,
        "method": pruning.method.to_json(),
        "positions": pruning.positions,
        "placeholder_map": placeholder_map[stays] if schedule else None,
        "schedule": schedule,
        "plc": pruning.plc,
        "relevance_source": relevance_source(family, pruning),
        "remarks": remarks(family, pruning, origins),
    }
    return _Draft(vision_features, placeholder_map[stays], rest)


def _merge(method: Method, signals: Signals, kept: Tensor, vision_features: Tensor) -> Tensor:
    """The features (N, C), with those of kept tokens that a method merges others into."""
    weights = method.merge(signals, kept)  # sparse (K, N)
    if weights is None:
        return vision_features
    merged = torch.sparse.mm(weights, vision_features.float())  # (K, C)
    return vision_features.index_copy(0, kept, merged.to(vision_features.dtype))


@torch.inference_mode()
def _compress(family: Family, image: EncodedImage, signals: Signals, kept: Tensor, plc: str) -> Tensor:
    """The features (N, C) of an image, those of kept tokens as compression leaves them (CROP's PLC)."""
    features, k = image.vision_features, len(kept)
    if plc == "off" or k in (0, image.count):  # with nothing dropped there is nothing to compress
        return features
    in_region = within_region(signals)  # (N,)
    cell = cells(image.views, kept, in_region)  # (N,)
    pooled = pool(features, cell, cell_weights(cell, image.saliency, k), k)  # (K, C)
    if plc == "trained":
        inputs = (features.float(), signals.need("relevance"), in_region, pooled.float(), in_region[kept])
        pooled = family.compressor(*(tensor[None] for tensor in inputs))[0].to(pooled.dtype)
    return features.index_put((kept,), pooled)


def _schedule(
    family: Family, pruning: Pruning, signals: Sequence[Signals], kept_by_pool: Sequence[Tensor]
) -> LayerSchedule | None:
    """What leaves inside the language model; None where nothing does. Raises BadInput for a layer where none can."""
    if pruning.ilp is None and not pruning.method.inner:
        return None
    layers = range(family.first_inner, family.depth)
    counts = [of_image.count for of_image in signals]
    if len(kept_by_pool) < len(signals):  # a shared budget
        counts = [sum(counts)]
    if pruning.ilp is None:
        stages = pruning.method.stages(counts, [pruning.count(n) for n in counts], layers)
        if not stages:
            return None
    else:
        nearest = min(max(ILP_LAYER, layers.start), layers.stop - 1)
        layer = nearest if pruning.ilp_layer is None else pruning.ilp_layer
        rule, budgets = _ilp(pruning.ilp, signals, counts, kept_by_pool)
        stages = (Stage(layer, rule, budgets, pruning.positions),)
    for stage in stages:
        if stage.layer not in layers:
            raise BadInput(
                f"in this model tokens can leave at the layers {layers.start} to {layers.stop - 1}",
                field="method_option" if pruning.ilp is None else "ilp_layer",
                value=f"layer={stage.layer}" if pruning.ilp is None else stage.layer,
            )
    return plan(stages, [len(kept) for kept in kept_by_pool], layers.stop)


def _ilp(
    ilp: float | str, signals: Sequence[Signals], counts: Sequence[int], kept: Sequence[Tensor]
) -> tuple[Rule, tuple[int, ...]]:
    """The rule and the budgets of `Pruning.ilp`. Raises BadInput where it is the region's, and an image has none."""
    if isinstance(ilp, float):
        return RegionAttention(), tuple(max(1, int(ilp * count + 0.5)) for count in counts)
    budgets = []
    for of_image in signals:
        if of_image.region is None:
            raise BadInput(
                "there is no region; it takes `method=gridprune`, without `region=none` and, for several images, "
                "without `share_budget`. Or give a share as `ilp`",
                field="ilp",
                value=ilp,
            )
    for of_image, indices in zip(signals, kept, strict=True):
        assert of_image.region is not None
        budgets.append(int(inside(of_image.views, of_image.region)[indices].sum()))
    return Region(), tuple(budgets)


def _origin(request: EncodedRequest, n: int, signals: Signals, kept: Tensor) -> Origin:
    """What image `n` of a request was, and how it was divided; `kept` (K,) counts its tokens alone."""
    image, pruning = request.images[n], request.pruning
    localizer = None
    if request.localized:
        localizer = request.localized[n].to_json()
    elif signals.region and pruning.region == "auto":
        localizer = {"name": RELEVANCE}
    return Origin(
        key=image.key,
        image=image.image,
        name=image.name,
        views=image.views,
        region=signals.region,
        zones=_zones(pruning.method, signals, kept),
        localizer=localizer,
        ratios=None if pruning.plc == "off" else ratios(kept, within_region(signals)),
        notes=image.notes,
    )


def _zones(method: Method, signals: Signals, kept: Tensor) -> dict[str, Any] | None:
    """Rows, columns and budgets of the zones, for methods that have them; lists of rows and columns for several views.

    The budgets are how many tokens of each zone were kept.
    """
    zoned = method.zones(signals)
    if zoned is None:
        return None
    zone_of, zones = zoned
    rows, cols = (list(sides) for sides in zip(*zones.grids, strict=True))
    budgets = torch.bincount(zone_of[kept], minlength=zones.count).tolist()
    single = len(zones.grids) == 1
    return {"rows": rows[0] if single else rows, "cols": cols[0] if single else cols, "budgets": budgets}
