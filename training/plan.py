"""How long each stage trains, on what, and at which rate."""

import math
from dataclasses import dataclass, replace

from gridprune_cli.scenes.questions import KINDS
from gridprune_cli.scenes.scene import TRAIN
from training import model as built

N = built.GRID * built.GRID
LOCALIZER_N = built.LOCALIZER_GRID * built.LOCALIZER_GRID


@dataclass(frozen=True)
class Plan:
    """Sizes of a stage.

    steps       that the learning rate's schedule spans
    batch       scenes a step
    scenes      how many it has, of consecutive seeds from `first_seed` on
    rate        the highest learning rate
    tokens      (share of the steps, visual tokens shown), in turn
    start       number of the first step: a stage that goes on with another's scenes counts on from it, and so takes
                them in new order and asks new questions
    stop        steps after which it ends, before the end of its schedule
    kinds       of questions, in turn; a kind named twice comes twice as often
    led         (layer of the language model, how many of its heads): heads whose attention is pulled to the patches
                asked for, at a question's last token
    closely     pulls it at the answer's first token too, and not to the neighbour that a relation asks for
    placed      the last of these heads also learn to tell, together, where the objects asked for are
    trains      of the localiser: "tower" or "language", or "" for both
    warm        steps over which the learning rate rises
    """

    steps: int
    batch: int
    scenes: int
    first_seed: int
    rate: float
    tokens: tuple[tuple[float, int], ...]
    start: int = 0
    stop: int | None = None
    kinds: tuple[str, ...] = KINDS
    led: tuple[tuple[int, int], ...] = ((2, 2),)
    closely: bool = False
    placed: bool = False
    trains: str = ""
    warm: int = 200

    @property
    def last(self) -> int:
        """The step after the last one."""
        return self.start + (self.stop or self.steps)

    def tokens_at(self, step: int) -> int:
        passed = 0.0
        for share, tokens in self.tokens:
            passed += share
            if step - self.start < passed * self.steps:
                return tokens
        return self.tokens[-1][1]

    def rate_at(self, step: int) -> float:
        done = step - self.start
        warm = min(1.0, (done + 1) / self.warm)
        return self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / self.steps)))


TOWER = Plan(4000, 32, 50_000, TRAIN, 1.2e-3, ((0.85, 128), (0.15, N)))
TOWER_AGAIN = Plan(2000, 32, 50_000, TRAIN, 6e-4, ((0.8, 128), (0.2, N)), start=4000)
LANGUAGE = Plan(2200, 24, 16_000, TRAIN + 50_000, 1.5e-3, ((0.2, 32), (0.8, 64)), stop=500)
LANGUAGE_AGAIN = Plan(
    1700,
    24,
    16_000,
    TRAIN + 50_000,
    1.2e-3,
    ((0.82, 64), (0.18, N)),
    start=500,
    stop=1300,
    kinds=(*KINDS, "character", "count", "place", "relation", "relation"),
    led=((2, 2), (3, 4)),
    closely=True,
)
LANGUAGE_LAST = replace(
    LANGUAGE_AGAIN,
    steps=1200,
    rate=8e-4,
    tokens=((0.78, 64), (0.22, N)),
    start=1800,
    stop=None,
    kinds=(*KINDS, "character", "count", "count", "place", "relation", "relation"),
)
LANGUAGE_COUNTS = replace(
    LANGUAGE_LAST,
    steps=1400,
    tokens=((0.72, 64), (0.28, N)),
    start=3000,
    kinds=(*KINDS, "character", "count", "count", "relation", "relation"),
    placed=True,
)
LOCALIZER = Plan(
    1600,
    24,
    50_000,
    TRAIN,
    1.2e-3,
    ((0.8, 72), (0.2, LOCALIZER_N)),
    kinds=(*KINDS, "character", "count", "place", "relation", "relation"),
    led=((1, 2), (2, 3)),
    closely=True,
)
LOCALIZER_TOWER = replace(
    LOCALIZER, steps=500, scenes=16_000, first_seed=TRAIN + 50_000, rate=1e-3, start=1600, trains="tower"
)
LOCALIZER_AGAIN = replace(
    LOCALIZER_TOWER,
    steps=800,
    tokens=((0.75, 72), (0.25, LOCALIZER_N)),
    start=2100,
    kinds=(*KINDS, "count", "object", "relation"),
    led=((2, 2), (3, 4)),
    trains="language",
)
COMPRESSOR = Plan(500, 128, 4_000, TRAIN + 66_000, 2e-3, ((0.1, 28), (0.1, 13)) * 5)
PRUNER = Plan(250, 16, 2_000, TRAIN + 70_000, 3e-3, ((1.0, N),), warm=30)
PRUNER_AGAIN = replace(
    PRUNER, steps=60, batch=32, rate=5e-4, tokens=((0.05, 28), (0.05, 13), (0.05, 5)) * 7, start=250, warm=10
)
