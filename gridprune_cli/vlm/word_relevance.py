"""Relevance from the language model's own words, for towers without a text tower.

    r_i = mean_t cos( e_t, x_i )

e_t are the language model's embeddings of the question's tokens, x_i the projected visual token. Only the embedding
table is loaded. What GridPrune (arXiv 2511.10081) does for such models is in nothing that was read of it; this is ours.
"""

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gridprune_cli.vlm.loading import load_part
from gridprune_cli.vlm.parts import ModelParts

# English function words, chosen by us; in other languages every word counts
_STOP_WORDS = (
    "a about also am an and any are as at be been being but by can could did do does doing each for from had has have "
    "having he her here his how I i if in into is it its just may me might more most must my no nor not of on or other "
    "our please shall she should so some such than that the their them then there these they this those to too us very "
    "was we were what when where which who whom whose why will with would you your"
)


def keywords(question: str) -> str:
    """The question without punctuation and English words that carry no content; as it is where nothing else is left.

    But for the first, only small words are such: an A within a question is a letter.
    """
    matches = re.findall(r"[\w'-]+", question)
    content = [word for n, word in enumerate(matches) if (word if n else word.lower()) not in _STOP_WORDS.split()]
    return " ".join(content) or question


class WordRelevance:
    """The embedding table of a language model. Loaded at first use.

    `text_embeds` makes of vision features `(N, C)` what stands in the place of text embeddings, `(N, D)`.
    """

    def __init__(self, parts: ModelParts, text_embeds: Callable[[Tensor], Tensor]):
        self.parts, self.text_embeds = parts, text_embeds
        self._last: tuple[Tensor, Tensor] | None = None  # vision features, and unit vectors of their text embeds

    @cached_property
    def embedding(self) -> Any:
        parts = self.parts
        if "language" in parts._loaded:
            return parts.load("language").get_input_embeddings()
        without = [*parts.modules["tower"], *parts.modules["projector"], "lm_head"]
        without += [f"{parts.text_model}.{name}" for name in ("layers", "norm")]
        model = load_part(parts.model_class, parts.checkpoint.folder, without, parts.dtype, parts.device)
        return model.get_input_embeddings()

    def load(self) -> None:
        """Loads it now."""
        _ = self.embedding

    def read(self, questions: Iterable[str]) -> None:
        """Does nothing, since looking words up takes no time. `ClipRelevance.read` does something."""

    @torch.inference_mode()
    def vectors(self, text: str) -> Tensor:
        """The embeddings `(M, D)` of a text's tokens, on the model's device."""
        ids = self.parts.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        # the table may lie on another device, where the language model is sharded
        return self.embedding(ids.to(self.parts.device)).to(self.parts.device)

    @torch.inference_mode()
    def __call__(self, vision_features: Tensor, question: str) -> Tensor:
        """Mean cosines of visual tokens `(N, C)` with the question's tokens: `(N,)` float32 on the CPU."""
        question_embeds = normalize(self.vectors(question).float(), dim=-1)  # (M, D)
        if self._last is None or self._last[0] is not vision_features:  # an image has often several questions in turn
            embeds = self.text_embeds(vision_features).to(self.parts.device)
            self._last = vision_features, normalize(embeds.float(), dim=-1)
        return (self._last[1] @ question_embeds.T).mean(1).cpu()
