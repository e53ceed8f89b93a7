"""The language model's own words, and relevance from them, for towers without a text tower.

    r_i = mean_t cos( e_t, x_i )

e_t are the language model's embeddings of the question's tokens, x_i the projected visual token. Only the embedding
table is loaded. GridPrune (arXiv 2511.10081) does not say what it does for such models; this is ours.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gridprune_cli.vlm.loading import load_part

if TYPE_CHECKING:
    from gridprune_cli.vlm.family import Family

# in English; of other languages every word counts
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
    words = re.findall(r"[\w'-]+", question)
    content = [word for n, word in enumerate(words) if (word if n else word.lower()) not in _STOP_WORDS.split()]
    return " ".join(content) or question


class WordRelevance:
    """The embedding table of a family's language model. Loaded at first use."""

    def __init__(self, family: "Family"):
        self.family = family
        self._last: tuple[Tensor, Tensor] | None = None  # states, and the unit vectors of their rows

    @cached_property
    def embedding(self) -> Any:
        family = self.family
        if "language" in family._loaded:
            return family.load("language").get_input_embeddings()
        without = [*family.modules["tower"], *family.modules["projector"], "lm_head"]
        without += [f"{family.text_model}.{name}" for name in ("layers", "norm")]
        return load_part(
            family.model_class, family.checkpoint.folder, without, family.dtype, family.device
        ).get_input_embeddings()

    def load(self) -> None:
        """Loads it now."""
        _ = self.embedding

    def read(self, questions: Iterable[str]) -> None:
        """Nothing: to look words up takes no time."""

    @torch.inference_mode()
    def vectors(self, text: str) -> Tensor:
        """The embeddings `(M, D)` of a text's tokens, on the model's device."""
        ids = self.family.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        # the table may lie on another device, where the language model is spread over several
        return self.embedding(ids.to(self.family.device)).to(self.family.device)

    @torch.inference_mode()
    def __call__(self, vision_features: Tensor, question: str) -> Tensor:
        """Mean cosines of visual tokens, given as states `(N, C)`, with the question's words: `(N,)` float32, CPU."""
        words = normalize(self.vectors(question).float(), dim=-1)
        if (
            self._last is None or self._last[0] is not vision_features
        ):  # an image is often asked about several times in a row
            self._last = (
                vision_features,
                normalize(self.family.text_embeds(vision_features).to(self.family.device).float(), dim=-1),
            )
        return (self._last[1] @ words.T).mean(1).cpu()
