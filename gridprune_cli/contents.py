"""What must hold of the contents of an encoded image and of a pruned set, whoever wrote the file.

Digests say that a file is as it was written; these checks say that what was written makes sense, so that nothing after
them meets an index out of range or a number that is not finite. What depends on the model is checked where the model is
known: `Family.check` and `generation.check_model`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.cache.quantize import KINDS
from gridprune_cli.pruning.methods import RULES
from gridprune_cli.pruning.region import GRID, inside
from gridprune_cli.pruning.schedule import LayerSchedule, Region, Selection, plan
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, View

MAX_NUMBERS = 1 << 28  # of vision_features or image_embeds: 16,384 visual tokens of 16,384 numbers, as of Qwen3-VL 8B
MAX_POSITION = 1 << 24  # from there on float32, in which rotary angles are computed, can't tell neighbours apart
MAX_LAYERS = 1 << 10  # of a language model; the deepest have about 130
MAX_COORDINATE = 1e6  # of a view's box, in pictures: a tile that is padded leaves 0..1, but not by far
MIN_SHARE = 1e-3  # of the picture's sides, that some view must cover; a centre crop of 200 : 1 covers five times that
PREFIX_TENSORS = ("ids", "keys", "values", "hidden_states")  # fields of `tokens.Prefix`
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # what a model computes in


def check_encoded(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, with the reason, where these are no encoded image; shapes are `EncodedImage`'s."""
    # 1. the header
    _check_texts(header, ("key", "model", "image", "name"))
    _need(header.get("kind") == "encoded", "it holds something else")
    encoder = header.get("encoder")
    _need(isinstance(encoder, dict) and isinstance(encoder.get("dtype"), str), "its encoder names no dtype")
    assert isinstance(encoder, dict)
    _need(encoder["dtype"] in FLOATS, "its encoder names no dtype")
    kind = KINDS.get(encoder["storage"]) if isinstance(encoder.get("storage"), str) else None
    _need(kind is not None or "storage" not in encoder, "its encoder names no storage")
    names = {"vision_features", "saliency", "placeholder_map"} | ({"scales"} if kind else set())
    signals = {name: tensor for name, tensor in tensors.items() if name in OPTIONAL_SIGNALS}
    _need(tensors.keys() - signals.keys() == names, f"it holds {_listed(tensors)}, not {_listed(names)}")
    count = _count(header.get("views"))
    _need(header.get("tokens") == count, "its views have another number of tokens than it tells")
    size, prompt, notes = header.get("size"), header.get("prompt"), header.get("notes")
    _need(isinstance(size, list) and len(size) == 2 and _all_whole(size, 1, 1 << 31), "its size is no width and height")
    _need(isinstance(prompt, dict) and isinstance(prompt.get("placeholder"), str), "its prompt has no placeholder")
    _need(_all_texts(notes), "its notes are no texts")
    # 2. dtypes and shapes
    dtype = FLOATS[encoder["dtype"]]
    vision_features, placeholder_map = tensors["vision_features"], tensors["placeholder_map"]
    _check_shape("vision_features", vision_features, kind or dtype, (count, -1))
    shape = tuple(vision_features.shape)
    _need(0 < vision_features.numel() <= MAX_NUMBERS, f"vision_features {shape} are empty, or too many")
    for name, tensor in {"saliency": tensors["saliency"], **signals}.items():
        _check_shape(name, tensor, dtype, (count,))
        check_range(name, tensor, 0)
    _check_shape("placeholder_map", placeholder_map, torch.int32, (-1,))
    # 3. numbers
    if kind:
        _check_shape("scales", tensors["scales"], torch.float32, (count,))
        check_range("scales", tensors["scales"], 0)
    else:
        check_range("vision_features", vision_features)
    check_range("placeholder_map", placeholder_map, -1)
    tokens = placeholder_map[placeholder_map >= 0].sort().values.long()
    _need(torch.equal(tokens, torch.arange(count)), "placeholder_map does not hold every token once")


def check_prefix(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, with the reason, where these are no prefix; shapes are `tokens.Prefix`'s."""
    _check_texts(header, ("key", "model", "image", "name"))
    _need(header.get("kind") == "prefix", "it holds something else")
    check_prefix_tensors(tensors)
    _need(header.get("tokens") == len(tensors["ids"]), "it has another number of tokens than it tells")


def check_prefix_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, with the reason, where these are not the tensors of a `tokens.Prefix`."""
    names = set(PREFIX_TENSORS)
    _need(tensors.keys() == names, f"it holds {_listed(tensors)}, not {_listed(names)}")
    ids, keys, values = (tensors[name] for name in ("ids", "keys", "values"))
    _check_shape("ids", ids, torch.int64, (-1,))
    check_range("ids", ids, 0)
    _check_shape("keys", keys, None, (-1, -1, len(ids), -1))
    _check_shape("values", values, keys.dtype, tuple(keys.shape))
    _need(keys.dtype in FLOATS.values() and keys.numel() > 0, f"keys are {_dtype_and_shape(keys)}")
    _check_shape("hidden_states", tensors["hidden_states"], keys.dtype, (len(ids), -1))
    _need(tensors["hidden_states"].numel() > 0, "hidden_states are empty")
    for name in ("keys", "values", "hidden_states"):
        check_range(name, tensors[name])


def check_pruned(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, with the reason, where these are no pruned set; shapes are `PrunedSet`'s."""
    # 1. the header: how it was pruned
    _check_texts(header, ("model", "fingerprint", "question"))
    method, images = header.get("method"), header.get("images")
    _need(isinstance(method, dict) and isinstance(method.get("name"), str), "its method has no name")
    _need(header.get("positions") in ("original", "compact"), "positions are neither original nor compact")
    _need(header.get("plc") in ("off", "pool", "trained"), "plc is none of off, pool and trained")
    source = header.get("relevance_source")
    if source is not None:
        _need(
            isinstance(source, dict) and source.get("source") in ("clip", "siglip", "attention", "both", "words"),
            "relevance has no source",
        )
        _need(isinstance(source.get("model"), str | None), "relevance has no model")
        _need(
            all(isinstance(source.get(name), int | None) for name in ("depth", "sign")),
            "relevance has no depth or sign",
        )
    _need((source is None) == ("relevance" not in tensors), "relevance and its source do not fit each other")
    _need("schedule" in header, "it does not say what leaves inside the language model")
    _need(_all_texts(header.get("remarks")), "its remarks are no texts")
    # 2. which tensors, of which images
    _need(isinstance(images, list) and len(images) > 0, "it holds no images")
    assert isinstance(images, list)
    holds_prefix = "prefix_ids" in tensors
    needed, known = {"kept", "input_ids", "position_ids", "saliency"}, {"relevance", "placeholder_map"}
    needed |= {"placeholder_map", *(f"prefix_{name}" for name in PREFIX_TENSORS)} if holds_prefix else {"image_embeds"}
    _need(needed <= tensors.keys() <= needed | known, f"it holds {_listed(tensors)}")
    counts = []
    for image in images:
        _need(isinstance(image, dict), "an image is no object")
        _check_texts(image, ("key", "image", "name"))
        _need(_all_texts(image.get("notes")), "an image's notes are no texts")
        counts.append(_count(image.get("views")))
    total = sum(counts)
    # 3. image embeds, or the prefix in their place, and the tokens that they stand for
    kept, ids, places = (tensors[name] for name in ("kept", "input_ids", "position_ids"))
    if holds_prefix:
        check_prefix_tensors({name: tensors[f"prefix_{name}"] for name in PREFIX_TENSORS})
        _check_shape("placeholder_map", tensors["placeholder_map"], torch.int64, (-1,))
        placeholders = len(tensors["placeholder_map"])
    else:
        image_embeds = tensors["image_embeds"]
        shape = _dtype_and_shape(image_embeds)
        _need(image_embeds.dtype in FLOATS.values() and image_embeds.dim() == 2, f"image_embeds are {shape}")
        _need(0 < image_embeds.numel() <= MAX_NUMBERS, f"image_embeds are {shape}, empty or too many")
        check_range("image_embeds", image_embeds)
        placeholders = len(image_embeds)
    _check_shape("kept", kept, torch.int64, (-1,))
    _need(
        0 < len(kept) <= placeholders,
        f"{len(kept)} kept tokens and {placeholders} image tokens do not fit each other",
    )
    check_range("kept", kept, 0, total - 1)
    _need(_ascending(kept), "kept is not sorted, or holds a token twice")
    # 4. the prompt
    _check_shape("input_ids", ids, torch.int64, (-1,))
    _need(len(ids) >= placeholders, f"{len(ids)} input_ids and {placeholders} image tokens do not fit each other")
    check_range("input_ids", ids, 0)
    if holds_prefix:
        prefix_ids = tensors["prefix_ids"]
        _need(torch.equal(ids[: len(prefix_ids)], prefix_ids), "its prefix is that of another prompt")
        _need(len(kept) == total, "its prefix holds all visual tokens, and kept does not")
    _check_shape("position_ids", places, torch.int64, (3, len(ids)) if places.dim() == 2 else (len(ids),))
    check_range("position_ids", places, 0, MAX_POSITION)
    if header["positions"] == "compact" and not _lists_selection(
        header["schedule"]
    ):  # which numbers on where they leave
        _need(torch.equal(places, torch.arange(len(ids))), "position_ids are not compact")
    _need(places.dim() == 2 or _ascending(places), "position_ids do not ascend")
    # 5. the signals
    _need(tensors["saliency"].dtype in FLOATS.values(), f"saliency is {_dtype_and_shape(tensors['saliency'])}")
    _check_shape("saliency", tensors["saliency"], None, (total,))
    check_range("saliency", tensors["saliency"], 0)
    if "relevance" in tensors:
        _check_shape("relevance", tensors["relevance"], torch.float32, (total,))
        check_range("relevance", tensors["relevance"])
    # 6. what needs all of these: the map, each image, the schedule
    if "placeholder_map" in tensors:
        placeholder_map = tensors["placeholder_map"]
        _check_shape("placeholder_map", placeholder_map, torch.int64, (placeholders,))
        check_range("placeholder_map", placeholder_map, -1)
        _need(
            torch.equal(placeholder_map[placeholder_map >= 0].sort().values, kept),
            "placeholder_map and kept do not fit each other",
        )
    first_tokens = torch.tensor([0, *counts]).cumsum(0)  # (images + 1,)
    kept_counts = torch.searchsorted(kept, first_tokens).diff().tolist()  # of each image
    kept_of = [group - first for group, first in zip(kept.split(kept_counts), first_tokens, strict=False)]
    for image, group in zip(images, kept_of, strict=True):
        _check_origin(image, len(group))
    selected = kept
    if header["schedule"] is not None:
        _need("placeholder_map" in tensors, "it does not say which visual tokens its image_embeds are")
        schedule = _check_schedule(header["schedule"], images, kept_of)
        if schedule.selection is not None:
            selected = torch.tensor(schedule.selection, dtype=torch.int64)
            _check_selection(schedule, selected, kept, first_tokens)
    # 7. of each image, what its zones come to
    selected_counts = torch.searchsorted(selected, first_tokens).diff().tolist()
    for image, count in zip(images, selected_counts, strict=True):
        zones = image["zones"]
        _need(zones is None or sum(zones["budgets"]) == count, "the zones' budgets are not what was kept")


def _check_origin(image: Mapping[str, Any], kept: int) -> None:
    """How an image of a pruned set, with `kept` of its tokens kept, was divided."""
    missing = {"region", "zones", "localizer", "ratios"} - image.keys()
    _need(not missing, f"an image has no {_listed(missing)}")
    region, zones, localizer, ratios = (image[name] for name in ("region", "zones", "localizer", "ratios"))
    if region is not None:
        _need(_all_whole(region, 0, GRID - 1) and len(region) == 4, "a region is no box")
        _need(region[0] <= region[2] and region[1] <= region[3], "a region is no box")
    if zones is not None:
        _need(isinstance(zones, dict) and _all_whole(zones.get("budgets"), 0, kept), "zones have no budgets")
        sides = [zones.get("rows"), zones.get("cols")]
        if len(image["views"]) == 1:
            sides = [[side] for side in sides]
        _need(all(_all_whole(side, 1, 1 << 31) and len(side) == len(image["views"]) for side in sides), "zones")
        cells = sum(high * wide for high, wide in zip(*sides, strict=True))
        _need(cells == len(zones["budgets"]), f"{cells} zones have {len(zones['budgets'])} budgets")
    if localizer is not None:
        _need(isinstance(localizer, dict) and isinstance(localizer.get("name"), str), "a localizer has no name")
        _need(isinstance(localizer.get("answer", ""), str), "a localizer's answer is no text")
        _need(isinstance(localizer.get("parsed", True), bool), "a localizer's answer was parsed or not")
    if ratios is not None:
        _need(isinstance(ratios, dict) and ratios.keys() == {"inside", "outside"}, "ratios are of two sides")
        _need(all(ratio is None or _number(ratio, 1, 1 << 31) for ratio in ratios.values()), "ratios are no numbers")


def _check_schedule(schedule: Any, images: Sequence[Mapping[str, Any]], kept: Sequence[Tensor]) -> LayerSchedule:
    """What leaves inside the language model. `kept` has the kept tokens of each image, counted within the image."""
    stages = schedule.get("stages") if isinstance(schedule, dict) else None
    _need(isinstance(stages, list) and len(stages) > 0, "no stages")
    assert isinstance(stages, list)
    tokens = schedule.get("tokens")
    _need(_all_whole(tokens, 0, 1 << 31) and 0 < len(tokens) <= MAX_LAYERS, "no number of tokens for each layer")
    for stage in stages:
        _need(isinstance(stage, dict) and isinstance(stage.get("rule"), dict), "a stage has no rule")
        _need(_whole(stage.get("layer"), 0, len(tokens) - 1), f"a stage is at none of {len(tokens)} layers")
        _need(_all_whole(stage.get("keep"), 0, 1 << 31), "a stage keeps no number of tokens")
        _need(stage.get("positions") in ("original", "compact"), "a stage's positions")
        _check_rule(stage["rule"])
    layers = [stage["layer"] for stage in stages]
    _need(layers == sorted(set(layers)), "its stages do not ascend")
    each = len(stages[0]["keep"])
    _need(each in (1, len(images)), f"a stage keeps tokens of {each} images")
    _need(all(len(stage["keep"]) == each for stage in stages), "its stages do not fit each other")
    present = [len(group) for group in kept]
    leaving = LayerSchedule.from_json(schedule, RULES)
    planned = plan(leaving.stages, present if each > 1 or len(images) == 1 else [sum(present)], len(tokens))
    _need(leaving == planned, "its stages and the tokens in each layer do not fit each other")
    for stage in leaving.stages:
        if isinstance(stage.rule, Region):
            _need(each == len(images), "a stage keeps regions of no images")
            for image, group, count in zip(images, kept, stage.budgets, strict=True):
                _need(image.get("region") is not None, "a stage keeps a region, and there is none")
                within = inside(views_of(image["views"]), tuple(image["region"]))[group]
                _need(int(within.sum()) == count, "a stage does not keep what is inside its region")
    return leaving


def _check_selection(schedule: LayerSchedule, selected: Tensor, kept: Tensor, first_tokens: Tensor) -> None:
    """The one stage that lists what stays: `selected` of the `kept` tokens, of images from `first_tokens` on."""
    _need(len(schedule.stages) == 1, "a stage lists what stays, and there are others")
    _need(_ascending(selected) and bool(torch.isin(selected, kept).all()), "a stage lists tokens that are not kept")
    (stage,) = schedule.stages
    counts = torch.searchsorted(selected, first_tokens).diff().tolist()
    counts = counts if len(stage.budgets) == len(counts) else [sum(counts)]
    _need(list(stage.budgets) == counts, "a stage does not keep what it lists")


def _lists_selection(schedule: Any) -> bool:
    """Whether a schedule, which need not be one, has a stage that lists what stays."""
    stages = schedule.get("stages") if isinstance(schedule, dict) else None
    rules = [stage.get("rule") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    return any(isinstance(rule, dict) and rule.get("name") == Selection.name for rule in rules)


def _check_rule(rule: Mapping[str, Any]) -> None:
    """The rule of a stage: its name, and options of the kinds that it has."""
    name = rule.get("name")
    _need(isinstance(name, str) and name in RULES, f"unknown rule {name!r}")
    assert isinstance(name, str)
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(RULES[name])}
    _need(rule.keys() == kinds.keys() | {"name"}, f"rule {name} has other options")
    for option, kind in kinds.items():
        value = rule[option]
        if kind is tuple:
            good = _all_whole(value, 0, 1 << 31)
        else:
            good = _whole(value, 0, 1 << 31) if kind is int else _number(value, 0, 1e9)
        _need(good, f"{option} of rule {name} is of no use")


def _count(views: Any) -> int:
    """The number of visual tokens in the views of a header, which are checked."""
    _need(isinstance(views, list) and len(views) > 0, "it has no views")
    for view in views:
        _need(isinstance(view, dict), "a view is no object")
        _need(_all_whole([view.get("rows"), view.get("cols")], 1, 1 << 31), "a view has no rows and columns")
        box = view.get("box")
        _need(isinstance(box, list) and len(box) == 4, "a view covers no box")
        _need(all(_number(side, -MAX_COORDINATE, MAX_COORDINATE) for side in box), "a view covers no box")
        _need(box[0] < box[2] and box[1] < box[3], "a view covers no box")
    _need(any(_shares_picture(view["box"]) for view in views), "no view covers the picture")
    return sum(view["rows"] * view["cols"] for view in views)


def _shares_picture(box: Sequence[float]) -> bool:
    """Whether a view's box lies on at least MIN_SHARE of the picture's width and of its height."""
    return all(min(box[axis + 2], 1) - max(box[axis], 0) >= MIN_SHARE for axis in (0, 1))


def views_of(views: Sequence[Mapping[str, Any]]) -> tuple[View, ...]:
    """The views of a header, which were checked."""
    return tuple(View(view["rows"], view["cols"], tuple(view["box"])) for view in views)


def _check_texts(header: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        _need(isinstance(header.get(name), str), f"its {name} is no text")


def _all_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _check_shape(name: str, tensor: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    """-1 is any length."""
    fits = len(shape) == tensor.dim() and all(w in (-1, g) for w, g in zip(shape, tensor.shape, strict=True))
    _need(fits and dtype in (None, tensor.dtype), f"{name}: {_dtype_and_shape(tensor)} does not fit")


def check_range(name: str, tensor: Tensor, low: float = -torch.inf, high: float = torch.inf) -> None:
    """Raises ValueError unless all numbers are finite and from `low` to `high`. Copies nothing."""
    if not tensor.numel():
        return
    least, most = (bound.item() for bound in tensor.aminmax())  # NaN where one of them is NaN, which fails below
    _need(low <= least <= most <= high and -torch.inf < least <= most < torch.inf, f"{name} from {least} to {most}")


def _ascending(values: Tensor) -> bool:
    return bool((values[1:] > values[:-1]).all())


def _need(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(reason)


def _dtype_and_shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _all_whole(values: Any, low: int, high: int) -> bool:
    return isinstance(values, list) and all(_whole(value, low, high) for value in values)


def _number(value: Any, low: float, high: float) -> bool:
    """Compared without a conversion, which fails for a whole number of 400 digits. NaN is refused."""
    return type(value) in (int, float) and low <= value <= high
