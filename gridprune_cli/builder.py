"""From kept tokens to pruned sets: what the language model receives, the prompt around it, and where all of it is from.

Only the kept tokens go through the projector. It works token by token, so that is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.errors import BadInput
from gridprune_cli.prefixes import Prefixes
from gridprune_cli.pruning.compress import cell_weights, cells, pool, ratios
from gridprune_cli.pruning.methods import Method
from gridprune_cli.pruning.placeholders import staying
from gridprune_cli.pruning.region import inside
from gridprune_cli.pruning.schedule import LayerSchedule, Region, RegionAttention, Rule, Selection, Stage, plan
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.selector import (
    EncodedRequest,
    image_sees_question,
    join_signals,
    relevance_source,
    within_region,
    write_prompts,
)
from gridprune_cli.settings import RELEVANCE, Pruning
from gridprune_cli.tokens import EncodedImage, Origin, Prefix, PrunedSet
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.prefix import prefix_length
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
    prefixes: Prefixes | None = None,
    with_prefix: bool | None = None,
) -> list[PrunedSet]:
    """The pruned set of every request, from the signals of its images and the tokens that `select_tokens` kept.

    prefixes     the model's
    with_prefix  True: each set holds its prefix, and no image embeds. False: none holds a prefix. None: a set that can
                 go on from a prefix also holds that, where it is there and not in eight bits; of `ilp` "selection" it
                 is computed

    Raises BadInput where a pruning does not fit its images or its set can't go on from a prefix, and a prompt can't be
    written, or has more positions than the model.
    """
    prompts = write_prompts(family, requests, [request.request.question for request in requests])
    drafts = [_draft(family, *parts) for parts in zip(requests, signals, kept, prompts, strict=True)]
    for request, draft in zip(requests, drafts, strict=True):
        last = int(draft.rest["position_ids"].max())
        remedy = "begin a new conversation" if request.request.history else "ask shorter, of fewer images"
        family.check_length(last + 1, f"{remedy}, or take `positions=compact`")
    if with_prefix:
        prefixes = prefixes or Prefixes(family)
        return [_set_with_prefix(family, prefixes, *parts) for parts in zip(requests, drafts, prompts, strict=True)]
    embeds = project(family, [(draft.vision_features, draft.placeholder_map) for draft in drafts])
    shared = [
        None if with_prefix is False else _find_prefix(family, prefixes, *parts)
        for parts in zip(requests, drafts, prompts, strict=True)
    ]
    return [
        PrunedSet(image_embeds=kept_embeds, prefix=prefix, **draft.rest)
        for kept_embeds, prefix, draft in zip(embeds, shared, drafts, strict=True)
    ]


def _set_with_prefix(
    family: Family, prefixes: Prefixes, request: EncodedRequest, draft: _Draft, prompt: Tensor
) -> PrunedSet:
    """The set with its prefix in place of image embeds. Raises BadInput where it can't go on from one."""
    if obstacle := _prefix_obstacle(family, request, draft, prompt):
        raise BadInput(f"{obstacle}, or leave this out", field="with_prefix")
    prefix = prefixes.find(prompt, request.images)
    rest = draft.rest | {"placeholder_map": draft.placeholder_map}
    return PrunedSet(image_embeds=prefix.hidden_states[:0], prefix=prefix, **rest)


def _find_prefix(
    family: Family, prefixes: Prefixes | None, request: EncodedRequest, draft: _Draft, prompt: Tensor
) -> Prefix | None:
    """The prefix that a set can go on from, where it is held or in the cache. `prompt` (L,) is the unpruned one.

    Of a selection it is computed where it is not there, so that the next question costs what pruning before does. One
    in eight bits, from which answers are others, is for selections alone: what the cache holds must decide no answer.
    """
    compute = request.pruning.ilp == "selection"
    if prefixes is None or not (compute or prefixes.cache_dtype == "full"):
        return None
    if _prefix_obstacle(family, request, draft, prompt):
        return None
    return prefixes.find(prompt, request.images, compute=compute)


def _prefix_obstacle(family: Family, request: EncodedRequest, draft: _Draft, prompt: Tensor) -> str:
    """Why the language model can't go on from the cached prefix for this set, as the beginning of an error message.

    Empty where it can. `prompt` (L,) is the unpruned one.
    """
    images, depth = request.images, family.relevance_depth
    stages = draft.rest["schedule"].stages if draft.rest["schedule"] else ()
    # 1. the text behind the visual tokens is there, and not to be seen by them
    if family.sees_question:
        return "this model's image tokens see the question, so that no prefix is free of it; take another model"
    if image_sees_question(family, request):
        return "the image sees the question; put that behind all images in `template`"
    if prefix_length(family, prompt) == len(prompt):
        return "there is no text behind the last image; put the question there"
    # 2. all visual tokens enter and stay for d layers, and nothing rates them there
    if len(draft.rest["kept"]) < sum(image.count for image in images):
        return "visual tokens are left out before the language model; take `ilp=selection`"
    if not family.first_inner <= depth < family.depth:
        return f"a prefix of {depth} layers does not do for this model of {family.depth}; take another model"
    if any(stage.layer < depth for stage in stages):
        return f"tokens leave before the prefix ends; let them leave at layer {depth} or later"
    if any(stage.rule.rated for stage in stages):
        return "the method lets the text rate the tokens in the first layer; take another method"
    # 3. with the positions and the features of the unpruned prompt
    positions = family.positions(prompt, images)
    if not torch.equal(draft.rest["position_ids"].expand_as(positions), positions):
        return "positions differ from those of the whole prompt; take `positions=original`"
    if not torch.equal(draft.vision_features, concatenate([image.vision_features for image in images])):
        return "tokens are merged before the language model; take `plc=off`"
    return ""


def remarks(family: Family, pruning: Pruning, images: Sequence[Origin] = ()) -> tuple[str, ...]:
    """What a user should know of how this model prunes, and pruned these images."""
    out = []
    # where the CLIP was not looked for yet, nothing was pruned by it
    if pruning.needs_relevance and family.knows_clip and family.clip:
        sign, measured = pruning.method.relevance_sign, family.calibration.relevance_sign
        if sign and measured and sign != measured:
            out.append(
                f"{pruning.method.name} takes relevance with the sign {sign:+d}, and `gridprune calibrate` measured "
                f"{measured:+d} for this model"
            )
        if sign == 0 and family.relevance_sign < 0:
            out.append(
                f"{pruning.method.name} turns CLIP's relevance round, as published; its option relevance_sign=1 takes "
                "it as it is"
            )
        if family.tower_differs:
            out.append(
                f"this model's tower has other weights than {family.clip.name}, from which its relevance comes; "
                "compare it with `relevance=attention`"
            )
    if pruning.plc == "trained" and family.relevance_kind != "clip":
        out.append(
            "compressors are trained on relevance from CLIP, and here it comes from "
            f"{family.relevance_kind}; compare `plc=trained` with `plc=pool`"
        )
    for image in images:
        if image.localizer and not image.localizer.get("parsed", True):
            out.append(
                f"{image.name}: the localiser {image.localizer['name']} answered {image.localizer['answer']!r}, "
                "which is no region; the one of the relevance was taken"
            )
    return tuple(out)


def _unused(pruning: Pruning, signals: Sequence[Signals], kept_by_pool: Sequence[Tensor]) -> tuple[str, ...]:
    """A line about options of the method that had no part in what was kept, if there are any."""
    if pruning.inside_ratio or pruning.outside_ratio:  # which take tokens in a way of their own, where they are few
        return ()
    views_of = [of_image.views for of_image in signals]
    pools = views_of if len(kept_by_pool) == len(signals) else [sum(views_of, ())]
    for kept, views in zip(kept_by_pool, pools, strict=True):
        if names := pruning.method.unused_options(len(kept), views, signals[0].relevance_kind):
            return (f"with fewer tokens than zones {', '.join(names)} had no part; `few=top` goes by budgets alone",)
    return ()


def _draft(
    family: Family, request: EncodedRequest, signals: Sequence[Signals], kept_by_pool: Sequence[Tensor], prompt: Tensor
) -> _Draft:
    """The pruned set of one request, not yet projected. `prompt` (L,) has all placeholders of all images."""
    images, pruning = request.images, request.pruning
    counts = [image.count for image in images]
    firsts = [sum(counts[:n]) for n in range(len(counts))]  # where each image's tokens begin among all N
    # 1. the tokens that the method selected, counted over all images and for each image; kept are those that enter the
    #    language model
    if request.shares_budget:
        (selected,) = kept_by_pool  # (K,)
        owner = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(counts))  # (N,)
        selected_of = [selected[owner[selected] == n] - first for n, first in enumerate(firsts)]
    else:
        selected = torch.cat([first + indices for first, indices in zip(firsts, kept_by_pool, strict=True)])  # (K,)
        selected_of = list(kept_by_pool)
    kept = torch.arange(sum(counts)) if pruning.ilp == "selection" else selected
    # 2. features of kept tokens, into which others may have been merged or compressed
    if pruning.plc != "off":  # only with methods that merge nothing
        compressed = zip(images, signals, selected_of, strict=True)
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
    if pruning.positions == "original" or pruning.ilp == "selection":  # which numbers on where tokens leave
        position_ids = family.positions(prompt, images)[..., in_prompt]
    else:
        position_ids = torch.arange(len(input_ids))
    # 4. what leaves later, inside the language model, and where everything came from
    schedule = _schedule(family, pruning, signals, kept_by_pool, selected)
    origins = tuple(_origin(request, n, signals[n], selected_of[n]) for n in range(len(images)))
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
        "remarks": (*remarks(family, pruning, origins), *_unused(pruning, signals, kept_by_pool)),
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
        pooled = family.compressor(*(tensor[None].to(family.device) for tensor in inputs))[0].to(pooled.dtype).cpu()
    return features.index_put((kept,), pooled)


def _schedule(
    family: Family, pruning: Pruning, signals: Sequence[Signals], kept_by_pool: Sequence[Tensor], selected: Tensor
) -> LayerSchedule | None:
    """What leaves inside the language model; None where nothing does. `selected` (K,) count the tokens of all images.

    Raises BadInput for a layer where none can leave.
    """
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
        usual = family.relevance_depth if pruning.ilp == "selection" else ILP_LAYER
        nearest = min(max(usual, layers.start), layers.stop - 1)
        stages = ()
        for stays, layer in pruning.ilp_stages:
            rule: Rule
            if stays == "selection":
                rule, budgets = Selection(tuple(selected.tolist())), tuple(len(indices) for indices in kept_by_pool)
            else:
                rule, budgets = _ilp(stays, signals, counts, kept_by_pool)
            stages += (Stage(nearest if layer is None else layer, rule, budgets, pruning.positions),)
    for stage in stages:
        if stage.layer not in layers:
            raise BadInput(
                f"in this model tokens can leave at the layers {layers.start} to {layers.stop - 1}",
                field="method_option" if pruning.ilp is None else "ilp_layer",
                value=f"layer={stage.layer}" if pruning.ilp is None else stage.layer,
            )
    present = counts if pruning.ilp == "selection" else [len(indices) for indices in kept_by_pool]
    return plan(stages, present, layers.stop)


def _ilp(
    ilp: float | str, signals: Sequence[Signals], counts: Sequence[int], kept: Sequence[Tensor]
) -> tuple[Rule, tuple[int, ...]]:
    """The rule and the budgets of one of `Pruning.ilp_stages` that is a share, or the region.

    Raises BadInput where it is the region, and an image has none.
    """
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


def _origin(request: EncodedRequest, n: int, signals: Signals, selected: Tensor) -> Origin:
    """What image `n` of a request was, and how it was divided; `selected` (K,) counts its tokens alone."""
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
        zones=_zones(pruning.method, signals, selected),
        localizer=localizer,
        ratios=None if pruning.plc == "off" else ratios(selected, within_region(signals)),
        notes=image.notes,
    )


def _zones(method: Method, signals: Signals, selected: Tensor) -> dict[str, Any] | None:
    """Rows, columns and budgets of the zones, for methods that have them; lists of rows and columns for several views.

    The budgets are how many tokens of each zone were selected.
    """
    zoned = method.zones(signals)
    if zoned is None:
        return None
    zone_of, zones = zoned
    rows, cols = (list(sides) for sides in zip(*zones.grids, strict=True))
    budgets = torch.bincount(zone_of[selected], minlength=zones.count).tolist()
    single = len(zones.grids) == 1
    return {"rows": rows[0] if single else rows, "cols": cols[0] if single else cols, "budgets": budgets}
