"""What every pruning method is: options, the signals it needs, and a rule that picks tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import floor
from typing import Any, ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.schedule import Stage
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.zones import Zones


@dataclass(frozen=True)
class Method(ABC):
    """A method's options. `requires` names the signals that it looks at.

    one_picture   whether it splits the budget of a single picture, so that several can't share one
    takes_region  whether it keeps more of what lies in the contextual region
    inner         whether it keeps all tokens here and drops them inside the language model, by `stages`
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    one_picture: ClassVar[bool] = False
    takes_region: ClassVar[bool] = False
    inner: ClassVar[bool] = False

    def to_json(self) -> dict[str, Any]:
        """Its name and options."""
        return {"name": self.name} | {field.name: getattr(self, field.name) for field in fields(self)}

    def select(self, signals: Signals, k: int) -> Tensor:
        """Kept: sorted unique indices, (k,) int64 on the CPU. All tokens where k is N, whatever the signals.

        Raises ValueError where k is not in 1..N, or a signal that the method requires was not computed.
        """
        return self.select_each([signals], [k])[0]

    def select_each(self, signals: Sequence[Signals], ks: Sequence[int]) -> list[Tensor]:
        """`select` for each of several questions."""
        for own, k in zip(signals, ks, strict=True):
            if not 1 <= k <= own.count:
                raise ValueError(f"can't keep {k} of {own.count} visual tokens: keep 1 to {own.count}")
        some = [n for n, own in enumerate(signals) if ks[n] < own.count]
        picked = iter(self._pick_each([signals[n] for n in some], [ks[n] for n in some]))
        return [next(picked) if k < own.count else torch.arange(k) for own, k in zip(signals, ks, strict=True)]

    def _pick_each(self, signals: Sequence[Signals], ks: Sequence[int]) -> list[Tensor]:
        """`_pick` for each; for methods that can do several at once."""
        return [self._pick(own, k) for own, k in zip(signals, ks, strict=True)]

    @abstractmethod
    def _pick(self, signals: Signals, k: int) -> Tensor:
        """`select` for 1 <= k < N."""

    def merge(self, signals: Signals, kept: Tensor) -> Tensor | None:
        """What `select` gave as kept (K,) is made of: sparse weights (K, N) of the tokens' states, float32 on the CPU.

        None where every kept token is itself alone.
        """
        return None if len(kept) == signals.count else self._merge(signals, kept)

    def _merge(self, signals: Signals, kept: Tensor) -> Tensor | None:
        """`merge` for K < N."""
        return None

    def zones(self, signals: Signals) -> tuple[Tensor, Zones] | None:
        """Each token's zone, (N,) int64, and the zones, for a method that has a budget per zone; else None."""
        return None

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        """What leaves inside the language model, for methods that are `inner`: nothing here."""
        return ()


@dataclass(frozen=True)
class InnerMethod(Method):
    """A method that gives the language model all tokens, and drops them inside of it."""

    inner: ClassVar[bool] = True

    def _pick(self, signals: Signals, k: int) -> Tensor:
        """All of them."""
        return torch.arange(signals.count)

    @abstractmethod
    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        """The stages, in the order of their layers, for images of `counts` tokens, N each, and `budgets`, K each.

        Tokens can leave at `layers`, which ends with the model's last one.
        """


def dwindling(count: int, k: int, stages: int) -> tuple[int, ...]:
    """How many of `count` tokens are there after each stage, where the same share stays at each and `k` in the end."""
    left = [max(k, floor(count * (k / count) ** (stage / stages) + 0.5)) for stage in range(1, stages)]
    return (*left, k)


def values(signals: Signals, name: str) -> Tensor:
    """A signal, (N,) float64 on the CPU: what is kept must not depend on the dtype's rounding or the device."""
    return signals.need(name).cpu().double()


def signed_relevance(signals: Signals, sign: int) -> Tensor:
    """Relevance times its sign, (N,) float64. Sign 0 stands for -1 with CLIP's relevance and 1 with that of words."""
    return values(signals, "relevance") * (sign or (1 if signals.relevance_by_words else -1))


def weights(kept: Tensor, own: Tensor, rest: Tensor, into: Tensor, share: Tensor, count: int) -> Tensor:
    """Sparse weights (K, N): `own` (K,) of the kept tokens, and `share` (R,) of `rest` (R,) in places `into` (R,)."""
    places = torch.stack([torch.cat([torch.arange(len(kept)), into]), torch.cat([kept, rest])])
    shares = torch.cat([own, share]).float()
    return torch.sparse_coo_tensor(places, shares, (len(kept), count), check_invariants=False).coalesce()


def check_sign(sign: int) -> None:
    """CLIP's patches can be *less* similar to what a question is about, so methods may turn relevance around."""
    if sign not in (1, -1):
        raise ValueError(f"relevance_sign must be 1 or -1, not {sign}")
