"""MMTok (arXiv 2508.18264): tokens that cover the question's words and the other tokens."""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.similarity import cosines, cover, summable


@dataclass(frozen=True)
class MMTok(Method):
    """Greedy coverage of M words and N tokens at once.

        P_mj = softmax_j( cos(t_m, x_j) / text_temperature ) / M
        Q_ij = softmax_j( cos(h_i, h_j) / vision_temperature ) / N
        argmax_j sum_r max(0, C_rj - max_{s taken} C_rs) over the rows r of C = [P; alpha * Q], the last max 0 at first

    alpha               weight of covering tokens against covering words, 0 or more
    text_temperature    above 0; published: 0.02 for LLaVA, 0.01 for Qwen2.5-VL
    vision_temperature  above 0

    Departures: the words are those that `vlm.word_relevance` finds, with a list of stop words of our own; the
    published code takes all of them with Qwen2.5-VL. There it also covers patches as they are before the merger, and
    here visual tokens, which are of four patches. The tokens of all views compete for one K; the published code gives
    each tile the same.
    """

    name: ClassVar[str] = "mmtok"
    requires: ClassVar[frozenset[str]] = frozenset({"vision_features", "image_embeds", "question_embeds"})
    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if not (self.alpha >= 0 and isfinite(self.alpha)):
            raise ValueError(f"alpha must be 0 or more, not {self.alpha}")
        for option in ("text_temperature", "vision_temperature"):
            if not (getattr(self, option) > 0 and isfinite(getattr(self, option))):
                raise ValueError(f"{option} must be above 0, not {getattr(self, option)}")

    def select(self, signals: Signals, k: int) -> Tensor:
        to_words = cosines(signals.need("question_embeds"), signals.need("image_embeds"))
        to_tokens = cosines(signals.need("vision_features"))
        word_cover = torch.softmax(to_words / self.text_temperature, dim=1) / len(to_words)
        token_cover = torch.softmax(to_tokens / self.vision_temperature, dim=1) / len(to_tokens)
        return cover(summable(torch.cat([word_cover, self.alpha * token_cover])), k).sort().values
