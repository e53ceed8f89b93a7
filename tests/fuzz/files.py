"""Mutated cache entries and pruned sets, from whole ones and a `random.Random`.

`raw` changes bytes, so that the digests tell. `semantic` changes what a file says and writes the digests anew, so that
only a look at the contents tells: the result is refused, or as good as any other file. `PRUNED_FAULTS`,
`SELECTION_FAULTS` (of a set whose schedule lists what stays), `PREFIX_FAULTS` (of one that holds its prefix) and
`ENTRY_FAULTS` are changes that must be refused.
"""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.cache import files
from gridprune_cli.tokens import _tensor, raw_tensor

Header = dict[str, Any]
Tensors = dict[str, Tensor]
Fault = Callable[[Header, Tensors], None]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.bool)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    7,
    2**31,
    2**63,
    10**400,
    0.5,
    -1e308,
    "",
    "x",
    "\x1b]0;x\x07",
    "\ud800",
    [],
    [[]],
    [-1],
    {},
    {"name": 3},
)


def parts(data: bytes) -> tuple[Header, Tensors]:
    """Header and tensors of a whole file, to be changed."""
    header, tensors = files.decode(data)
    return header, {name: _tensor(tensor) for name, tensor in tensors.items()}


def join(header: Header, tensors: Tensors) -> bytes:
    """The file of a header and tensors, whatever they hold, with digests that are right."""
    return files.encode({name: raw_tensor(tensor) for name, tensor in tensors.items()}, header)


def changed(data: bytes, fault: Fault) -> bytes:
    """A whole file with one change, and digests that are right."""
    header, tensors = parts(data)
    fault(header, tensors)
    return join(header, tensors)


def raw(rng: random.Random, data: bytes) -> bytes:
    """A whole file with one to three changes of its bytes."""
    out = bytearray(data)
    while bytes(out) == data:
        for _ in range(rng.randint(1, 3)):
            head = 8 + int.from_bytes(data[:8], "little")
            at = rng.randrange(max(1, rng.choice((8, head, len(out))))) if out else 0
            length = rng.choice((1, 2, 8, 100, len(out)))
            kind = rng.randrange(6)
            if kind == 0 and at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del out[at:]
            elif kind == 2:
                out[at:at] = rng.randbytes(min(length, 1000))
            elif kind == 3:
                del out[at : at + length]
            elif kind == 4:
                out[at : at + length] = bytes(len(out[at : at + length]))
            else:
                out[at : at + length] = out[:length]
    return bytes(out)


def semantic(rng: random.Random, data: bytes) -> bytes:
    """A whole file with one to three changes of its header or tensors, and digests that are right."""
    header, tensors = parts(data)
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5 and tensors:
            _change_tensor(rng, tensors)
        else:
            _change_header(rng, header)
    for name in {"tensors", "digest"} & header.keys():
        del header[name]
    return join(header, tensors)


def _change_header(rng: random.Random, header: Header) -> None:
    holder, name = rng.choice(list(places(header)))
    kind = rng.randrange(4)
    if kind == 0:
        del holder[name]
    elif kind == 1 and isinstance(holder[name], int | float):
        holder[name] = rng.choice((holder[name] + 1, holder[name] - 1, -holder[name], holder[name] * 1000))
    elif kind == 2:
        other, there = rng.choice(list(places(header)))
        holder[name] = copy.deepcopy(other[there])
    else:
        holder[name] = copy.deepcopy(rng.choice(VALUES))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and object of JSON, with each index or name in it."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, below in items:
        yield value, name
        yield from places(below)


def _change_tensor(rng: random.Random, tensors: Tensors) -> None:
    name = rng.choice(sorted(tensors))
    tensor, kind = tensors[name], rng.randrange(7)
    if kind == 0:
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[rng.choice([*sorted(tensors), "other"])] = tensor
    elif kind == 3:
        tensors[name] = rng.choice((tensor[None], tensor.flatten(), tensor[:0], tensor[:-1], tensor[1:]))
    elif kind == 4:
        tensors[name] = torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor
    elif kind == 5 and tensor.dim():
        tensors[name] = tensor[torch.tensor(rng.sample(range(len(tensor)), len(tensor)), dtype=torch.long)]
    elif tensor.numel():
        flat = tensor.clone().flatten()
        values = (-(2.0**14), -1.0, 0.0, 5.0, 100.0, torch.inf, torch.nan)
        value = rng.choice(values if tensor.is_floating_point() else values[:5])
        flat[rng.randrange(len(flat))] = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
        tensors[name] = flat.reshape(tensor.shape)


# ---- what must be refused --------------------------------------------------------------------------------------------


def put(*path: Any, value: Any) -> Fault:
    """Sets a value somewhere in the header."""

    def fault(header: Header, _: Tensors) -> None:
        holder: Any = header
        for name in path[:-1]:
            holder = holder[name]
        holder[path[-1]] = copy.deepcopy(value)

    return fault


def swap(name: str, change: Callable[[Tensor], Tensor]) -> Fault:
    """Puts another tensor in a tensor's place."""
    return lambda _, tensors: tensors.update({name: change(tensors[name])})


def drop(name: str) -> Fault:
    return lambda header, tensors: header.pop(name, None) if name in header else tensors.pop(name)


def _first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        flat = tensor.clone().flatten()
        flat[0] = value
        return flat.reshape(tensor.shape)

    return change


def _tensor_faults(floats: tuple[str, ...], whole: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Fault]:
    """Of every tensor: absent, of other dtypes, of other shapes, with values that are none."""
    out: dict[str, Fault] = {"a tensor more": lambda _, tensors: tensors.update(other=torch.zeros(1))}
    for name in (*floats, *whole):
        if name not in optional:
            out[f"{name} gone"] = drop(name)
        for dtype in (torch.float64, torch.uint8, torch.bool):
            out[f"{name} as {dtype}"] = swap(name, lambda tensor, dtype=dtype: tensor.to(dtype))
        out[f"{name} with an axis more"] = swap(name, lambda tensor: tensor[None])
        out[f"{name} without an axis"] = swap(name, lambda tensor: tensor.flatten()[0])
        out[f"{name} empty"] = swap(name, lambda tensor: tensor[:0])
        out[f"{name} too short"] = swap(name, lambda tensor: tensor[..., :-1] if tensor.dim() == 1 else tensor[:-1])
        out[f"{name} too long"] = swap(name, lambda tensor: torch.cat([tensor, tensor[-1:]]))
        values = (torch.nan, torch.inf, -torch.inf) if name in floats else (-2, 1 << 30)
        for value in values[: 1 if name == "input_ids" else None]:  # how many token ids there are a model tells
            out[f"{name} holds {value}"] = swap(name, _first(value))
    return out


def _text_faults(*paths: tuple[Any, ...]) -> dict[str, Fault]:
    return {f"{path} is {value!r}": put(*path, value=value) for path in paths for value in (None, 3, [], {}, True)}


_VIEWS: dict[str, Any] = {
    "no views": [],
    "views no list": 3,
    "a view no object": [3],
    "a view without sides": [{"box": [0, 0, 1, 1]}],
    "sides below 1": [{"rows": 0, "cols": 6, "box": [0, 0, 1, 1]}],
    "sides no numbers": [{"rows": "2", "cols": True, "box": [0, 0, 1, 1]}],
    "more tokens": [{"rows": 10**400, "cols": 6, "box": [0, 0, 1, 1]}],
    "a box of three": [{"rows": 1, "cols": 2, "box": [0, 0, 1]}],
    "a box turned round": [{"rows": 1, "cols": 2, "box": [1, 0, 0, 1]}],
    "beside the picture": [{"rows": 2, "cols": 3, "box": [2, 0, 3, 1]}],
    "a box without end": [{"rows": 1, "cols": 2, "box": [0, 0, 10**400, 1]}],
}

ENTRY_FAULTS: dict[str, Fault] = {
    **_tensor_faults(("vision_features", "saliency"), ("placeholder_map",)),
    **_text_faults(("model",), ("image",), ("name",), ("prompt", "placeholder"), ("notes", 0)),
    **{what: put("views", value=views) for what, views in _VIEWS.items()},
    "a token in two places": swap(
        "placeholder_map", lambda placeholder_map: torch.where(placeholder_map == 1, 0, placeholder_map)
    ),
    "saliency below 0": swap("saliency", _first(-1)),
    "vision_features of another dtype": swap(
        "vision_features", lambda vision_features: vision_features.to(torch.float16)
    ),
    "saliency of another dtype": swap("saliency", lambda saliency: saliency.to(torch.float16)),
    "another kind": put("kind", value="pruned"),
    "another count": put("tokens", value=3),
    "no size": put("size", value=[0, 5]),
    "a size of text": put("size", value=["7", "9"]),
    "no prompt": put("prompt", value=[]),
    "no notes": put("notes", value="first of 2 frames"),
}

_SCHEDULES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "inside a list": ((), []),
    "inside a number": ((), 3),
    "no stages": (("stages",), []),
    "a stage no object": (("stages", 0), 3),
    "a layer below 0": (("stages", 0, "layer"), -1),
    "a layer beyond": (("stages", 0, "layer"), 1000),
    "a layer of text": (("stages", 0, "layer"), "1"),
    "an unknown rule": (("stages", 0, "rule", "name"), "guess"),
    "a rule without a name": (("stages", 0, "rule"), {}),
    "a rule of a list": (("stages", 0, "rule"), {"name": []}),
    "another option": (("stages", 0, "rule", "speed"), 3),
    "another rule's region": (("stages", 0, "rule"), {"name": "region"}),
    "keep below 0": (("stages", 0, "keep"), [-1]),
    "keep more": (("stages", 0, "keep"), [1000]),
    "keep of too many": (("stages", 0, "keep"), [1, 1, 1]),
    "keep a number": (("stages", 0, "keep"), 1),
    "stage positions": (("stages", 0, "positions"), "elsewhere"),
    "no tokens": (("tokens",), []),
    "other tokens": (("tokens",), [9, 9, 9, 9]),
    "tokens of text": (("tokens",), "22"),
    "tokens of too many layers": (("tokens",), [2] * 5000),
}

PRUNED_FAULTS: dict[str, Fault] = {
    **_tensor_faults(("image_embeds", "saliency", "relevance"), ("kept", "input_ids", "position_ids"), ("relevance",)),
    **_text_faults(("model",), ("fingerprint",), ("question",), ("method", "name"), ("positions",), ("plc",)),
    **_text_faults(("images", 0, "key"), ("images", 1, "image"), ("images", 0, "name")),
    **{what: put("images", 0, "views", value=views) for what, views in _VIEWS.items()},
    **{what: put("schedule", *path, value=value) for what, (path, value) in _SCHEDULES.items()},
    "kept twice": swap("kept", lambda kept: kept[:1].repeat(len(kept))),
    "kept unsorted": swap("kept", lambda kept: kept.flip(0)),
    "kept out of range": swap("kept", lambda kept: kept + 1),
    "kept in 32 bits": swap("kept", lambda kept: kept.int()),
    "kept of none": swap("kept", lambda kept: kept[:0]),
    "another placeholder_map": swap("placeholder_map", lambda placeholder_map: placeholder_map.flip(0) * 0),
    "no placeholder_map": drop("placeholder_map"),
    "positions on two axes": swap("position_ids", lambda places: places.expand(2, -1)),
    "positions descending": swap("position_ids", lambda places: places.flip(0)),
    "positions not compact": put("positions", value="compact"),
    "fewer input_ids than image_embeds": lambda _, tensors: tensors.update(
        input_ids=tensors["input_ids"][:1], position_ids=tensors["position_ids"][:1]
    ),
    "another kind": put("kind", value="encoded"),
    "another schema": put("schema", value=9),
    "no images": put("images", value=[]),
    "images an object": put("images", value={"0": 3}),
    "an image no object": put("images", 0, value=3),
    "no region": lambda header, _: header["images"][0].pop("region"),
    "no zones": lambda header, _: header["images"][1].pop("zones"),
    "a region of three": put("images", 0, "region", value=[1, 2, 3]),
    "a region beyond": put("images", 0, "region", value=[0, 0, 8, 8]),
    "a region turned round": put("images", 0, "region", value=[3, 3, 1, 1]),
    "a region of text": put("images", 0, "region", value="all"),
    "zones a list": put("images", 0, "zones", value=[1]),
    "zones without budgets": put("images", 0, "zones", value={"rows": 1, "cols": 1}),
    "budgets below 0": put("images", 0, "zones", "budgets", value=[-1]),
    "more budgets": put("images", 0, "zones", "budgets", value=[1, 0]),
    "budgets of others": put("images", 0, "zones", "budgets", value=[0]),
    "zones of text": put("images", 0, "zones", "rows", value="1"),
    "zones without end": put("images", 0, "zones", "rows", value=10**400),
    "a localizer without a name": put("images", 0, "localizer", value={}),
    "an answer no text": put("images", 0, "localizer", value={"name": "vlm", "answer": 3, "parsed": True}),
    "ratios of text": put("images", 0, "ratios", value={"inside": "1", "outside": None}),
    "ratios of one side": put("images", 0, "ratios", value={"inside": 1}),
    "no ratios": lambda header, _: header["images"][0].pop("ratios"),
    "no localizer": lambda header, _: header["images"][0].pop("localizer"),
    "no remarks": lambda header, _: header.pop("remarks"),
    "remarks a text": put("remarks", value="turned"),
    "method a text": put("method", value="gridprune"),
}

_LISTED = ("schedule", "stages", 0, "rule", "tokens")

SELECTION_FAULTS: dict[str, Fault] = {
    "no list": put(*_LISTED, value=3),
    "a list of text": put(*_LISTED, value=["1", "5"]),
    "one twice": put(*_LISTED, value=[1, 1]),
    "unsorted": put(*_LISTED, value=[5, 1]),
    "below 0": put(*_LISTED, value=[-1, 5]),
    "out of range": put(*_LISTED, value=[1, 6]),
    "beyond 64 bits": put(*_LISTED, value=[1, 2**70]),
    "more than the budget": put(*_LISTED, value=[1, 4, 5]),
    "less than the budget": put(*_LISTED, value=[5]),
    "another image's": put(*_LISTED, value=[4, 5]),
    "no option": put("schedule", "stages", 0, "rule", value={"name": "selection"}),
    "a stage more": lambda header, _: header["schedule"]["stages"].append(
        {"layer": 3, "rule": {"name": "attention"}, "keep": [1, 1], "positions": "original"}
    ),
    "budgets of all tokens": put("images", 0, "zones", "budgets", value=[2]),
    "another rule's compact positions": put("schedule", "stages", 0, "rule", value={"name": "attention"}),
}

PREFIX_FAULTS: dict[str, Fault] = {
    **_tensor_faults(("prefix_keys", "prefix_values", "prefix_hidden_states"), ("prefix_ids",)),
    "no placeholder_map": drop("placeholder_map"),
    "placeholder_map without an axis": swap("placeholder_map", lambda places: places[0]),
    "image_embeds beside it": lambda _, tensors: tensors.update(image_embeds=torch.zeros(6, 4)),
    "another prompt's": swap("prefix_ids", lambda ids: ids + 1),
    "of a longer prompt": lambda _, tensors: tensors.update(
        input_ids=tensors["input_ids"][:6], position_ids=tensors["position_ids"][:6]
    ),
    "of other tokens": lambda _, tensors: tensors.update(
        kept=tensors["kept"][:5], placeholder_map=tensors["placeholder_map"][:5]
    ),
}
