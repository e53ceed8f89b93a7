"""CoViPAL (arXiv 2508.17243): the tokens that a small module, trained for the model, finds most important."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.signals import Signals


@dataclass(frozen=True)
class CoViPAL(Method):
    """The K tokens of the highest score of the plug-and-play pruning module, `vlm.pruning_module`.

    The module lies beside a checkpoint; without it `Signals.importance` can't be had, and a model is refused.

    Departures: the module's layers and sizes, and much of its training, see docs/methods.md. It scores once, before the
    first layer of the language model. The tokens of all views compete for one K.
    """

    name: ClassVar[str] = "covipal"
    requires: ClassVar[frozenset[str]] = frozenset({"importance"})

    def score(self, signals: Signals) -> Tensor:
        return values(signals, "importance")
