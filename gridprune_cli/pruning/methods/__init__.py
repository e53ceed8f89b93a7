"""The registry of pruning methods. A new method is one file, and one line in `METHODS`."""

from dataclasses import fields
from typing import Any

from gridprune_cli.pruning.methods.adaptprune import AdaptPrune
from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.methods.btp import BTP
from gridprune_cli.pruning.methods.cdpruner import CDPruner
from gridprune_cli.pruning.methods.covipal import CoViPAL
from gridprune_cli.pruning.methods.dart import Dart
from gridprune_cli.pruning.methods.divprune import DivPrune
from gridprune_cli.pruning.methods.fastervlm import FasterVLM
from gridprune_cli.pruning.methods.fastv import FastV
from gridprune_cli.pruning.methods.fopru import FoPru
from gridprune_cli.pruning.methods.g_search import GSearch
from gridprune_cli.pruning.methods.gridprune import GridPrune
from gridprune_cli.pruning.methods.hiprune import HiPrune
from gridprune_cli.pruning.methods.hired import HiRED
from gridprune_cli.pruning.methods.hivtp import HIVTP
from gridprune_cli.pruning.methods.holov import HoloV
from gridprune_cli.pruning.methods.ivc_prune import IVCPrune
from gridprune_cli.pruning.methods.mmtok import MMTok
from gridprune_cli.pruning.methods.ptp import PTP
from gridprune_cli.pruning.methods.pyramiddrop import PyramidDrop
from gridprune_cli.pruning.methods.random import Random
from gridprune_cli.pruning.methods.rate import RATE
from gridprune_cli.pruning.methods.scope import Scope
from gridprune_cli.pruning.methods.sparsevlm import SparseVLM
from gridprune_cli.pruning.methods.topk_relevance import TopKRelevance
from gridprune_cli.pruning.methods.trim import Trim
from gridprune_cli.pruning.methods.uniform import Uniform
from gridprune_cli.pruning.methods.vflowopt import VFlowOpt
from gridprune_cli.pruning.methods.visionzip import VisionZip
from gridprune_cli.pruning.methods.vispruner import VisPruner
from gridprune_cli.pruning.methods.vtw import VTW
from gridprune_cli.pruning.schedule import Region, RegionAttention, Rule, Selection

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        GridPrune,
        TopKRelevance,
        FasterVLM,
        VisionZip,
        VisPruner,
        DivPrune,
        Scope,
        HoloV,
        CDPruner,
        MMTok,
        Trim,
        HiRED,
        HiPrune,
        HIVTP,
        FoPru,
        VFlowOpt,
        RATE,
        CoViPAL,
        Uniform,
        Random,
        FastV,
        PyramidDrop,
        SparseVLM,
        Dart,
        AdaptPrune,
        PTP,
        IVCPrune,
        BTP,
        GSearch,
        VTW,
    )
}

# the rules of stages, for those that are read from a file: the methods', and those of `Pruning.ilp`
_RULES: tuple[type[Rule], ...] = (
    *(rule for method in METHODS.values() for rule in method.rules),
    Region,
    RegionAttention,
    Selection,
)
RULES: dict[str, type[Rule]] = {rule.name: rule for rule in _RULES}

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def make_method(name: str, **options: Any) -> Method:
    """A method by name. Raises ValueError for an unknown name or option, and for a value of no use to it."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    known = {field.name: type(field.default) for field in fields(METHODS[name])}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"method {name} has no option {option!r}; its options: {', '.join(known) or 'none'}")
        kinds = (int, float) if known[option] is float else known[option]
        if not isinstance(value, kinds) or (isinstance(value, bool) and known[option] is not bool):
            raise ValueError(f"{option} must be {_KINDS[known[option]]}, not {value!r}")
    return METHODS[name](**options)


def with_image_seed(method: Any, sha256: str) -> Method:
    """A method with a seed for one image, made from the method's seed and `sha256` of the image's bytes, in hex.

    Comparisons take this, so that their score does not hang on a single draw for all images. A method without a seed
    is returned as it is.
    """
    if not hasattr(method, "seed"):
        return method
    return method.with_options(seed=(method.seed + int(sha256[:8], 16)) % 2**32)
