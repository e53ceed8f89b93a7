"""The registry of pruning methods. A new method is one file, and one line here; so is a new rule for stages."""

from dataclasses import fields
from typing import Any

from gridprune_cli.pruning.methods.adaptprune import AdaptPrune, Suppression
from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.methods.cdpruner import CDPruner
from gridprune_cli.pruning.methods.dart import Dart, Duplication
from gridprune_cli.pruning.methods.divprune import DivPrune
from gridprune_cli.pruning.methods.fastervlm import FasterVLM
from gridprune_cli.pruning.methods.fastv import FastV
from gridprune_cli.pruning.methods.gridprune import GridPrune
from gridprune_cli.pruning.methods.hired import HiRED
from gridprune_cli.pruning.methods.holov import HoloV
from gridprune_cli.pruning.methods.mmtok import MMTok
from gridprune_cli.pruning.methods.pyramiddrop import PyramidDrop
from gridprune_cli.pruning.methods.random import Random
from gridprune_cli.pruning.methods.scope import Scope
from gridprune_cli.pruning.methods.sparsevlm import RatedAttention, SparseVLM
from gridprune_cli.pruning.methods.topk_relevance import TopKRelevance
from gridprune_cli.pruning.methods.trim import Trim
from gridprune_cli.pruning.methods.uniform import Uniform
from gridprune_cli.pruning.methods.visionzip import VisionZip
from gridprune_cli.pruning.methods.vispruner import VisPruner
from gridprune_cli.pruning.methods.vtw import VTW, Withdrawal
from gridprune_cli.pruning.schedule import Attention, OwnAttention, Region, RegionAttention, Rule

METHODS: dict[str, type[Method]] = {
    GridPrune.name: GridPrune,
    TopKRelevance.name: TopKRelevance,
    FasterVLM.name: FasterVLM,
    VisionZip.name: VisionZip,
    VisPruner.name: VisPruner,
    DivPrune.name: DivPrune,
    Scope.name: Scope,
    HoloV.name: HoloV,
    CDPruner.name: CDPruner,
    MMTok.name: MMTok,
    Trim.name: Trim,
    HiRED.name: HiRED,
    Uniform.name: Uniform,
    Random.name: Random,
    FastV.name: FastV,
    PyramidDrop.name: PyramidDrop,
    SparseVLM.name: SparseVLM,
    Dart.name: Dart,
    AdaptPrune.name: AdaptPrune,
    VTW.name: VTW,
}

# by which rule tokens leave inside the language model, for stages that are read from a file
RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (Attention, OwnAttention, RatedAttention, Duplication, Suppression, Withdrawal, Region, RegionAttention)
}


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
