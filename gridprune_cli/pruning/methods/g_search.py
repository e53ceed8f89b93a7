"""G-Search (arXiv 2412.00556): how many visual tokens each layer needs, searched on samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, floor, log
from typing import ClassVar

from gridprune_cli.pruning.methods.base import InnerMethod
from gridprune_cli.pruning.schedule import Attention, Rule, Stage

# without a plan, a sigmoid over the depth: the share that is half gone at a third of the layers, and how fast it falls
_CENTRE, _STEEPNESS = 1 / 3, 12.0


@dataclass(frozen=True)
class GSearch(InnerMethod):
    """At each layer those tokens stay that the prompt's last token attends to most in the layer before, K in the end.

    plan  the share of tokens from a layer on, LAYER:SHARE with commas between, as `gridprune calibrate` with
          `--schedule g-search` finds it on samples: going from the first layers to the last, the least at which the
          model still answers as from all tokens. With K the last share of N, that is what stays. With another K, shares
          are raised to the power at which the last one is K / N. "": shares fall as a sigmoid of the depth, whose shape
          is a guess

    What stays keeps its positions. The paper finds the parameters of its sigmoid, for a budget, by Bayesian
    optimisation; the power is ours.
    """

    name: ClassVar[str] = "g-search"
    rules: ClassVar[tuple[type[Rule], ...]] = (Attention,)
    plan: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError where the plan is none."""
        self._shares()

    def _shares(self) -> dict[int, float]:
        """The plan's shares by layer, those from which on fewer stay."""
        try:
            pairs = [text.split(":") for text in self.plan.split(",")] if self.plan else []
            shares = {int(layer): float(share) for layer, share in pairs}
        except ValueError as fault:
            raise ValueError(f"plan must be LAYER:SHARE with commas between, not {self.plan!r}") from fault
        layers, values = list(shares), list(shares.values())
        if layers != sorted(layers) or len(layers) < len(pairs) or (layers and layers[0] < 1):
            raise ValueError(f"the layers of a plan must ascend from 1 on, not {self.plan!r}")
        if any(not 0 < low < high for high, low in zip([1.0, *values], values, strict=False)):
            raise ValueError(f"the shares of a plan must fall, below 1 and above 0, not {self.plan!r}")
        return shares

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        fallen = _exponents(self._shares()) if self.plan else _sigmoid(layers)
        stages: list[Stage] = []
        left = tuple(counts)
        for layer, exponent in fallen.items():
            after = tuple(max(k, floor(n * (k / n) ** exponent + 0.5)) for n, k in zip(counts, budgets, strict=True))
            if after != left:
                stages.append(Stage(layer, Attention(), after))
                left = after
        return tuple(stages)


def _exponents(shares: dict[int, float]) -> dict[int, float]:
    """By layer, the logarithm of its share in that of the last: 1 for the last."""
    last = log(list(shares.values())[-1])
    return {layer: log(share) / last for layer, share in shares.items()}


def _sigmoid(layers: range) -> dict[int, float]:
    """By layer, a sigmoid of the depth, brought to 0 ahead of the first and to 1 at the last of `layers`."""

    def height(depth: float) -> float:
        return 1 / (1 + exp(-_STEEPNESS * (depth - _CENTRE)))

    span = range(layers.start, layers.stop)
    low, high = height(0.0), height((span.stop - 1) / layers.stop)
    if len(span) == 1 or high <= low:
        return {span[-1]: 1.0}
    return {layer: (height(layer / layers.stop) - low) / (high - low) for layer in span}
