"""What every pruning method is: its options, the signals that it needs, and how it selects tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import floor
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gridprune_cli.pruning.schedule import Rule, Stage
from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import Signals, View
from gridprune_cli.pruning.zones import Zones


@dataclass(frozen=True)
class Method(ABC):
    """A pruning method. The fields of a sub-class are its options.

    A method implements `score`, and keeps the K tokens of the highest score; or `select`, where it chooses otherwise;
    or `select_alike`, where it is faster on many questions at once. One that merges tokens implements `merge_weights`.
    Callers use `select_batch` and `merge`, which do the checks.

    name          what `--method` takes; its file is called so, with `_` for `-`
    requires      the fields of `Signals` that it looks at; no others are computed, but for those that options add
    single_image  whether it splits the budget of one image over its views, so that images can't share a budget
    takes_region  whether it keeps more tokens inside the contextual region
    inner         whether it prunes inside the language model, by its `stages`, and gives it all tokens
    rules         the rules of its stages, so that a schedule can be read from a file, where rules go by their names
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    single_image: ClassVar[bool] = False
    takes_region: ClassVar[bool] = False
    inner: ClassVar[bool] = False
    rules: ClassVar[tuple[type[Rule], ...]] = ()
    relevance_sign = 1  # what relevance is multiplied with; an option of some methods, see `signed_relevance`

    def to_json(self) -> dict[str, Any]:
        """Its name and options."""
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in fields(self)}

    def with_options(self, **options: Any) -> Self:
        """The same method with other values for some of its options. Raises ValueError for values out of range."""
        return replace(self, **options)

    @property
    def merges(self) -> bool:
        """Whether other tokens are merged into those that it keeps."""
        return type(self).merge_weights is not Method.merge_weights

    @property
    def needs(self) -> frozenset[str]:
        """The signals that it looks at with the options that it has: those it `requires`, and what options add."""
        return self.requires

    def needs_for(self, k: int, views: tuple[View, ...], relevance_kind: str) -> frozenset[str]:
        """Those of `needs` that it looks at to keep k tokens of these views, with relevance from there."""
        return self.needs

    def unused_options(self, k: int, views: tuple[View, ...], relevance_kind: str) -> tuple[str, ...]:
        """Options that were set, but have no part in which k tokens of these views are kept."""
        return ()

    # ---- for callers -------------------------------------------------------------------------------------------------

    def select_batch(self, signals: Sequence[Signals], ks: Sequence[int]) -> list[Tensor]:
        """For each of several questions the K tokens to keep: sorted unique indices (K,), int64 on the CPU.

        Where K is N all tokens stay, whatever the signals. Raises ValueError where a K is not in 1..N, or a signal that
        the method requires was not computed.
        """
        # 1. every K must be possible
        for image_signals, k in zip(signals, ks, strict=True):
            if not 1 <= k <= image_signals.count:
                raise ValueError(
                    f"can't keep {k} of {image_signals.count} visual tokens: keep 1 to {image_signals.count}"
                )
        # 2. nothing has to be computed where everything stays
        kept = [torch.arange(k) for k in ks]
        # 3. the others, those in one call whose signals can be stacked
        alike: dict[tuple[Any, bool], list[int]] = {}
        for n, image_signals in enumerate(signals):
            if ks[n] < image_signals.count:
                alike.setdefault((image_signals.views, image_signals.region is None), []).append(n)
        for group in alike.values():
            selected = self.select_alike([signals[n] for n in group], [ks[n] for n in group])
            for n, indices in zip(group, selected, strict=True):
                kept[n] = indices
        return kept

    def merge(self, signals: Signals, kept: Tensor) -> Tensor | None:
        """What the kept tokens (K,) that `select_batch` gave are made of, for a method that merges others into them.

        Sparse weights (K, N) of all tokens' vision features, float32 on the CPU; None where nothing is merged.
        """
        return None if len(kept) == signals.count else self.merge_weights(signals, kept)

    # ---- for methods -------------------------------------------------------------------------------------------------

    def score(self, signals: Signals) -> Tensor:
        """(N,) float64 on the CPU: the K tokens of the highest score are kept, ties to the lower index."""
        raise NotImplementedError(f"{type(self).__name__} implements none of score, select and select_alike")

    def select(self, signals: Signals, k: int) -> Tensor:
        """The k tokens to keep: sorted unique indices (k,), int64 on the CPU. Called for 1 <= k < N only."""
        return top(self.score(signals), k)

    def select_alike(self, signals: Sequence[Signals], ks: Sequence[int]) -> list[Tensor]:
        """`select` for several questions about images of the same views, all with a region or all without."""
        return [self.select(image_signals, k) for image_signals, k in zip(signals, ks, strict=True)]

    def merge_weights(self, signals: Signals, kept: Tensor) -> Tensor | None:
        """`merge` for K < N."""
        return None

    def zones(self, signals: Signals) -> tuple[Tensor, Zones] | None:
        """Each token's zone, (N,) int64, and the zones, for a method that has a budget per zone; else None."""
        return None

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        """Which tokens leave at which layer of the language model: none, for a method that is not `inner`."""
        return ()


@dataclass(frozen=True)
class InnerMethod(Method):
    """A method that gives the language model all tokens, and drops them inside of it."""

    inner: ClassVar[bool] = True

    def select(self, signals: Signals, k: int) -> Tensor:
        """All N of them, whatever k."""
        return torch.arange(signals.count)

    @abstractmethod
    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        """The stages, in the order of their layers, for images of `counts` tokens, N each, and `budgets`, K each.

        Tokens can leave at `layers`, which ends with the model's last one.
        """


def geometric_counts(count: int, k: int, stages: int) -> tuple[int, ...]:
    """How many of `count` tokens are there after each stage, where the same share stays at each and `k` in the end.

    Rounded down, as PyramidDrop's published code has it.
    """
    noise = 1e-9  # of the power, which must not take a token from a whole number
    before_last = [max(k, floor(count * (k / count) ** (stage / stages) + noise)) for stage in range(1, stages)]
    return (*before_last, k)


def layers_at(depths: Sequence[float], layers: range) -> list[int]:
    """The layer at each share of the model's depth, rounded, or the nearest of `layers`, at which tokens can leave."""
    return [min(max(layers.start, floor(depth * layers.stop + 0.5)), layers.stop - 1) for depth in depths]


def values(signals: Signals, name: str) -> Tensor:
    """A signal, (N,) float64 on the CPU: what is kept must not depend on the dtype's rounding or the device."""
    return signals.need(name).cpu().double()


def signed_relevance(signals: Signals, sign: int) -> Tensor:
    """Relevance times its sign, (N,) float64. Sign 0 stands for the model's, `Signals.relevance_sign`."""
    return values(signals, "relevance") * (sign or signals.relevance_sign)


def merge_matrix(
    kept: Tensor, kept_weight: Tensor, merged: Tensor, target: Tensor, merged_weight: Tensor, count: int
) -> Tensor:
    """Sparse weights (K, N) for N = `count` tokens, of which the R `merged` (R,) go into the kept ones.

    kept (K,) and merged (R,) are indices among the N tokens, target (R,) places in `kept`. A kept token has
    `kept_weight` (K,) of itself, and `merged_weight` (R,) of the tokens that are merged into it.
    """
    places = torch.cat([torch.arange(len(kept)), target])
    indices = torch.stack([places, torch.cat([kept, merged])])  # (2, K + R)
    weights = torch.cat([kept_weight, merged_weight]).float()
    return torch.sparse_coo_tensor(indices, weights, (len(kept), count), check_invariants=False).coalesce()


def min_max(numbers: Tensor) -> Tensor:
    """Numbers (N,) brought linearly to 0..1; 0 where all are equal."""
    low, high = numbers.aminmax()
    return (numbers - low) / (high - low) if bool(high > low) else torch.zeros_like(numbers)


def check_sign(sign: int, allowed: tuple[int, ...] = (1, -1)) -> None:
    """CLIP's patches can be *less* similar to what a question is about, so methods may turn relevance around.

    Raises ValueError where the sign is not one of those `allowed`.
    """
    if sign not in allowed:
        *others, last = allowed
        raise ValueError(f"relevance_sign must be {', '.join(map(str, others))} or {last}, not {sign}")


def check_seed(seed: int) -> None:
    """Raises ValueError where the seed is none that torch takes."""
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be from -2^63 to 2^63 - 1, not {seed}")
