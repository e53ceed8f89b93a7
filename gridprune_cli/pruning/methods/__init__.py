"""The registry of pruning methods. A new method is one file, and one line here."""

from dataclasses import fields
from typing import Any

from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.methods.fastv import FastV
from gridprune_cli.pruning.methods.gridprune import GridPrune
from gridprune_cli.pruning.methods.pyramiddrop import PyramidDrop
from gridprune_cli.pruning.methods.random import Random
from gridprune_cli.pruning.methods.topk import TopK
from gridprune_cli.pruning.methods.topk_relevance import TopKRelevance
from gridprune_cli.pruning.methods.uniform import Uniform

METHODS: dict[str, type[Method]] = {
    GridPrune.name: GridPrune,
    TopK.name: TopK,
    TopKRelevance.name: TopKRelevance,
    Uniform.name: Uniform,
    Random.name: Random,
    FastV.name: FastV,
    PyramidDrop.name: PyramidDrop,
}


def make(name: str, **options: Any) -> Method:
    """A method by name. Raises ValueError for an unknown name or option, and for a value out of its range."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    known = [field.name for field in fields(METHODS[name])]
    for option in options:
        if option not in known:
            raise ValueError(f"method {name} has no option {option!r}; its options: {', '.join(known) or 'none'}")
    return METHODS[name](**options)
