"""What is asked for: which visual tokens to keep (`Pruning`), and a question about images with it (`Request`)."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from math import isfinite
from typing import Any, get_args, get_origin

from gridprune_cli.choices import DEFAULT_METHOD, Plc, Positions
from gridprune_cli.errors import BadInput
from gridprune_cli.images import Source
from gridprune_cli.pruning.methods import METHODS, Method, make_method
from gridprune_cli.pruning.methods.gridprune import LITERAL
from gridprune_cli.pruning.region import parse_box
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, Box
from gridprune_cli.questions import Exchange, check_text
from gridprune_cli.tokens import EncodedImage

POSITIONS = get_args(Positions)
PLC = get_args(Plc)
RELEVANCE = "relevance"  # the localiser that is no model: the region is found from the relevance


@dataclass(frozen=True)
class Pruning:
    """What to keep of an image for a question.

    keep       share of the visual tokens, in (0, 1]; K = keep * N, rounded to the nearest, at least 1
    tokens     K itself, instead of `keep`
    method     how to choose them
    region     "auto" (found from the relevance), "none", or a box; only methods with `takes_region` (GridPrune) use it
    positions  "original": kept tokens keep their place in the prompt; "compact": they are numbered on
    localizer  what finds the region "auto": "relevance", "vlm" (the embedded model's own), or a model by name
    localizer_template  how such a model is asked, a text with `{question}`; "" is our own (`regions.TEMPLATE`)
    query      what relevance is measured against, and a localiser is asked about, where that is not the question
    share_budget  several images share one K instead of each having its own; then there is no region
    ilp        what stays inside the language model: "region", exactly the tokens inside the contextual region; a share
               of the image's N tokens, those inside first; or "selection", what the method selects, and then the first
               layers see all N tokens. Several shares, which fall, leave one after the other; the first of them may be
               "region". A tuple, or a text with commas between. None: everything
    ilp_layer  the layer, from 0, at whose input the others leave, or as many as there are shares; None: for "selection"
               `Family.relevance_depth`, else `ILP_LAYER`; or the nearest that the model has
    plc        "pool" replaces the features of each kept token outside the region by the mean of its cell, "trained" has
               the checkpoint's compressor refine these, "off" leaves features as they are
    inside_ratio, outside_ratio  visual tokens per kept one, inside and outside of the region, instead of the method's
               own split of K; both together take the place of `keep` and `tokens`
    """

    keep: float = 0.11
    tokens: int | None = None
    method: Method = field(default_factory=lambda: make_method(DEFAULT_METHOD))
    region: str | Box = "auto"
    localizer: str = RELEVANCE
    localizer_template: str = ""
    positions: str = "original"
    query: str | None = None
    share_budget: bool = False
    ilp: float | str | tuple[float | str, ...] | None = None
    ilp_layer: int | str | tuple[int, ...] | None = None
    plc: str = "off"
    inside_ratio: float | None = None
    outside_ratio: float | None = None

    def __post_init__(self) -> None:
        """Reads a region that is a text or a list. Raises BadInput, with the setting, for what can't be."""
        if self.region not in ("auto", "none"):
            corners = self.region if isinstance(self.region, str) else ",".join(map(str, self.region))
            try:
                object.__setattr__(self, "region", parse_box(corners))
            except ValueError as fault:
                raise BadInput(f"{fault}, or auto, or none", field="region") from fault
        if not 0 < self.keep <= 1:
            raise BadInput("must be above 0 and at most 1", field="keep", value=self.keep)
        if self.tokens is not None and self.tokens < 1:
            raise BadInput("must be at least 1", field="tokens", value=self.tokens)
        if self.share_budget and self.method.single_image:
            raise BadInput(
                f"not with `method={self.method.name}`, which splits the budget of one image", field="share_budget"
            )
        if self.localizer != RELEVANCE and (not self.method.takes_region or self.region != "auto"):
            raise BadInput(
                f"only for `method={DEFAULT_METHOD}` with `region=auto`, and not `literal`",
                field="localizer",
                value=self.localizer,
            )
        if self.localizer_template and self.localizer == RELEVANCE:
            raise BadInput("only with a `localizer` that is a model", field="localizer_template")
        if self.localizer_template and "{question}" not in self.localizer_template:
            raise BadInput("needs {question}, where the question goes", field="localizer_template")
        if self.query is not None and not self.query.strip():
            raise BadInput("is empty; give a text, or leave it out to take the question", field="query")
        check_text(self.query or "", "`query`")
        check_text(self.localizer_template, "`localizer_template`")
        if self.positions not in POSITIONS:
            raise BadInput(f"not one of {', '.join(POSITIONS)}", field="positions", value=self.positions)
        if self.positions == "compact" and self.method.inner:
            raise BadInput(
                f"not with `method={self.method.name}`, whose stages say how what stays is numbered; leave it out",
                field="positions",
                value=self.positions,
            )
        self._check_ilp()
        _check_plc(self)

    def _check_ilp(self) -> None:
        """Reads a share that is a text. Raises BadInput for what can't stay inside the language model.

        Of "selection" all tokens enter it with the features that they have, so there nothing is merged or compressed.
        """
        if self.ilp is None and self.ilp_layer is not None:
            raise BadInput("only with `ilp`, which says what stays", field="ilp_layer")
        if self.ilp is None:
            return
        if self.ilp != "selection":
            stays = [_read_share(share) for share in _several(self.ilp)]
            object.__setattr__(self, "ilp", stays[0] if len(stays) == 1 else tuple(stays))
        object.__setattr__(self, "ilp_layer", _read_layers(self.ilp_layer, self.ilp))
        if self.method.inner:
            raise BadInput(f"not with `method={self.method.name}`, which prunes there by itself", field="ilp")
        if self.ilp == "selection" and self.method.merges:
            raise BadInput(
                f"not with `method={self.method.name}`, which merges tokens ahead of the language model; take another "
                "method, or a share as `ilp`",
                field="ilp",
                value=self.ilp,
            )
        if self.ilp == "selection" and self.plc != "off":
            raise BadInput(
                "not with `plc`, since all tokens enter the language model; leave one of them out",
                field="ilp",
                value=self.ilp,
            )

    @property
    def ilp_stages(self) -> tuple[tuple[float | str, int | None], ...]:
        """What stays by `ilp`, and from which layer on, None for the usual one; empty without it."""
        if self.ilp is None:
            return ()
        shares = self.ilp if isinstance(self.ilp, tuple) else (self.ilp,)
        layers = self.ilp_layer if isinstance(self.ilp_layer, tuple) else (self.ilp_layer,)
        return tuple(
            (share, None if layer is None else int(layer)) for share, layer in zip(shares, layers, strict=True)
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Pruning":
        """The pruning that options of the command line name, with `_` for `-`: from there, a file or a request.

        options  settings of this class, where `method` is a name; `method_option`, options of the method, as a mapping
                 or as texts NAME=VALUE; `literal`, GridPrune as published; and options of the method by their own
                 names. Values may be texts, as on a command line. None is as if it were left out

        Raises BadInput, with the option, for a name that there is not, and a value of no use.
        """
        named = {name: value for name, value in options.items() if value is not None}
        # 1. the method, with its options
        method = named.pop("method", DEFAULT_METHOD)
        literal = _read("literal", named.pop("literal", False), bool)
        pairs = named.pop("method_option", {})
        if not isinstance(pairs, Mapping | list | tuple):
            raise BadInput("must be a list of NAME=VALUE, or an object", field="method_option", value=pairs)
        if not isinstance(method, str) or method not in METHODS:
            raise BadInput(f"unknown method {method!r}: choose from {', '.join(METHODS)}", field="method", value=method)
        texts = {option.name for option in fields(METHODS[method]) if isinstance(option.default, str)}
        chosen = dict(pairs) if isinstance(pairs, Mapping) else parse_pairs(pairs, "method_option", texts)
        for name in named.keys() & {option.name for option in fields(METHODS[method])}:
            if name in chosen:
                raise BadInput(f"given twice, also as `{name}`", field="method_option", value=name)
            value = named.pop(name)
            chosen[name] = _as_text(value) if name in texts else _from_text(value)
        # 2. settings of methods with a region, before their values
        _check_region(method, literal, named)
        # 3. the values
        kinds = {setting.name: setting.type for setting in fields(cls) if setting.name != "method"}
        if unknown := sorted(named.keys() - kinds.keys()):
            known = [*kinds, "method", "method_option", "literal", *(option.name for option in fields(METHODS[method]))]
            reason = f"neither a setting of pruning nor an option of the method {method}; there are {', '.join(known)}"
            raise BadInput(reason, field=unknown[0])
        settings = {name: _read(name, value, kinds[name]) for name, value in named.items()}
        try:
            chooser = make_method(method, **(LITERAL if literal else {}) | chosen)
        except (ValueError, OverflowError) as fault:
            raise BadInput(str(fault), field="method", value=method) from fault
        return cls(method=chooser, **settings | ({"region": "none"} if literal else {}))

    @property
    def needs_relevance(self) -> bool:
        return "relevance" in self.method.needs or self.plc == "trained"

    @property
    def optional(self) -> tuple[str, ...]:
        """The optional signals of an encoded image that the method needs."""
        return tuple(name for name in OPTIONAL_SIGNALS if name in self.method.needs)

    def count(self, full: int) -> int:
        """K for an image of `full` tokens, by `keep` or `tokens`. Raises BadInput for more than there are.

        With both ratios `tokens` has no say, since K follows from them (`ratio_budget`).
        """
        if self.tokens is None or (self.inside_ratio and self.outside_ratio):
            return max(1, int(self.keep * full + 0.5))
        if self.tokens > full:
            raise BadInput(f"the image has {full} visual tokens", field="tokens", value=self.tokens)
        return self.tokens

    def heeds_region(self, images: int) -> bool:
        """Whether there is a region of each image to heed."""
        return self.method.takes_region and self.region != "none" and not (self.share_budget and images > 1)


@dataclass(frozen=True)
class Request:
    """A question about one image or several.

    images    image files, or images that are encoded already
    pruning   what to keep of them
    system    a system message, for models that take one
    template  a text with `{image}` and `{question}` that takes the place of the model's chat template
    history   earlier turns of the conversation, as the model's chat template writes them; the images that are of none
              of them come with the question. What is kept depends on the question alone
    """

    images: tuple[Source | EncodedImage, ...]
    question: str
    pruning: Pruning = field(default_factory=Pruning)
    system: str | None = None
    template: str | None = None
    history: tuple[Exchange, ...] = ()


def _check_plc(pruning: Pruning) -> None:
    """Raises BadInput for a compression that can't be, or that this pruning leaves no place for."""
    if pruning.plc not in PLC:
        raise BadInput(f"not one of {', '.join(PLC)}", field="plc", value=pruning.plc)
    if pruning.plc != "off" and pruning.method.inner:
        raise BadInput(
            f"not with `method={pruning.method.name}`, which prunes inside the language model alone", field="plc"
        )
    if pruning.plc != "off" and pruning.method.merges:
        raise BadInput(
            f"not with `method={pruning.method.name}`, which merges tokens in a way of its own; take another method, "
            "or leave it out",
            field="plc",
            value=pruning.plc,
        )
    for name in ("inside_ratio", "outside_ratio"):
        ratio = getattr(pruning, name)
        if ratio is None:
            continue
        if not (ratio >= 1 and isfinite(ratio)):
            raise BadInput("must be at least 1, in visual tokens per kept one", field=name, value=ratio)
        if pruning.plc == "off":
            raise BadInput("only with `plc=pool` or `plc=trained`", field=name)
        if pruning.share_budget or pruning.region == "none" or not pruning.method.takes_region:
            raise BadInput("needs a region; leave out what takes it away", field=name)
    if pruning.inside_ratio and pruning.outside_ratio and pruning.inside_ratio > pruning.outside_ratio:
        raise BadInput("must not be above `outside_ratio`", field="inside_ratio", value=pruning.inside_ratio)


def check_pin(pruning: Pruning) -> None:
    """Raises BadInput for a pruning whose kept tokens a conversation can't reuse for later turns (`chat --pin`).

    These are prunings by which what is kept depends on more than the query.
    """
    if pruning.method.inner:
        reason = f"not with `method={pruning.method.name}`, which chooses anew for every prompt; leave one of them out"
        raise BadInput(reason, field="pin")
    if pruning.ilp is not None:
        raise BadInput("not with `ilp`, where tokens leave as each prompt goes through the layers", field="pin")


def parse_pairs(pairs: Iterable[str], setting: str, texts: Collection[str] = ()) -> dict[str, Any]:
    """Options that are texts NAME=VALUE, the values as JSON, but those of the names in `texts` as texts.

    Raises BadInput, with the setting that they are of, where one is no such text.
    """
    options = {}
    for pair in pairs:
        name, equals, value = str(pair).partition("=")
        if not equals:
            raise BadInput("not NAME=VALUE", field=setting, value=pair)
        options[name] = _as_text(value) if name in texts else _from_text(value)
    return options


def _several(value: Any) -> list[Any]:
    """The values of a setting that takes one or several: a sequence, or a text with commas between."""
    if isinstance(value, str):
        return value.split(",")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _listed(values: Iterable[Any]) -> str:
    """Values with commas between, as `_several` reads them."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _read_share(value: Any) -> float | str:
    """A share of `Pruning.ilp`, or "region". Raises BadInput for what is neither."""
    if isinstance(value, str) and value.strip() == "region":
        return "region"
    try:
        share = float(value)
    except (ValueError, TypeError, OverflowError) as fault:
        raise BadInput("neither selection, nor region, nor a share", field="ilp", value=value) from fault
    if not 0 < share <= 1:
        raise BadInput("must be above 0 and at most 1, or selection, or region", field="ilp", value=value)
    return share


def _read_layers(layer: Any, ilp: Any) -> int | tuple[int, ...] | None:
    """The layer of `Pruning.ilp`, or as many as that has shares. Raises BadInput where they do not fit each other."""
    shares = ilp if isinstance(ilp, tuple) else (ilp,)
    numbers = [share for share in shares if isinstance(share, float)]
    if "region" in shares[1:]:
        raise BadInput("the region comes first, and shares behind it", field="ilp", value=_listed(shares))
    if any(low >= high for high, low in pairwise(numbers)):
        raise BadInput("several shares must fall", field="ilp", value=_listed(shares))
    if layer is None and len(shares) == 1:
        return None
    try:
        layers = [] if layer is None else [_whole(value) for value in _several(layer)]
    except ValueError as fault:
        reason = "must be a whole number, or as many as `ilp` has shares, with commas between"
        raise BadInput(reason, field="ilp_layer", value=layer) from fault
    if len(layers) != len(shares):
        reason = f"name a layer for each of the {len(shares)} shares of `ilp`, as in `ilp_layer=2,4`"
        raise BadInput(reason, field="ilp_layer", value=None if layer is None else _listed(layers))
    if any(low >= high for low, high in pairwise(layers)):
        raise BadInput("several layers must ascend", field="ilp_layer", value=_listed(layers))
    return layers[0] if len(layers) == 1 else tuple(layers)


def _whole(value: Any) -> int:
    """A whole number, or the text of one. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    return int(value)


def _from_text(value: Any) -> Any:
    """What a text says as JSON; one that is no JSON is itself, and so is what is no text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return value


def _finite(text: str) -> float:
    """Raises ValueError for what JSON can't write again: NaN, infinity, and a number as large as 1e999."""
    if not isfinite(number := float(text)):
        raise ValueError(f"{text} is no JSON")
    return number


def _as_text(value: Any) -> Any:
    """A value as it stands, or the text that it is as JSON: an option that is a text may be 3, 2,4 or "2,4"."""
    read = _from_text(value)
    return read if isinstance(read, str) else value


def _check_region(method: str, literal: bool, named: Mapping[str, Any]) -> None:
    """Raises BadInput for settings of a region that this method does not have."""
    region = named.get("region", "none")
    if not METHODS[method].takes_region and (literal or region != "none"):
        raise BadInput(
            f"only for `method={DEFAULT_METHOD}`, not for {method}", field="literal" if literal else "region"
        )
    if literal and region != "none":
        raise BadInput("not with `literal`, since GridPrune as published has no region", field="region")


def _read(name: str, value: Any, kind: Any) -> Any:
    """A value, or the text of one, as a setting of type `kind` holds it. Raises BadInput where that can't be."""
    kinds = get_args(kind) or (kind,)
    wanted = next(one for one in (str, bool, int, float) if one in kinds)
    if wanted is str:
        others: list[type] = [number for number in (int, float) if number in kinds or float in kinds]
        others += [list, tuple] if any(get_origin(one) is tuple for one in kinds) else []
        if isinstance(value, bool) or not isinstance(value, (str, *others)):
            raise BadInput("must be a text", field=name, value=value)
        return value  # what it may say, the setting itself checks
    try:
        number = float(value) if wanted is float else _from_text(value)
    except (ValueError, TypeError, OverflowError):
        number = None
    if isinstance(value, bool) != (wanted is bool and not isinstance(value, str)) or not isinstance(number, wanted):
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        raise BadInput(f"must be {names[wanted]}", field=name, value=value)
    return number
