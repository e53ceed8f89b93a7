"""Relevance from the language model's own words, for towers without a text tower.

    r_i = mean_t cos( e_t, x_i )

e_t are the language model's embeddings of the question's tokens, x_i the projected visual token. Only the embedding
table is loaded. GridPrune (arXiv 2511.10081) does not say what it does for such models; this is ours.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gridprune_cli.vlm.loading import load_part

if TYPE_CHECKING:
    from gridprune_cli.vlm.family import Family


class WordRelevance:
    """The embedding table of a family's language model. Loaded at first use."""

    def __init__(self, family: "Family"):
        self.family = family

    @cached_property
    def embedding(self) -> Any:
        family = self.family
        if "language" in family._loaded:
            return family.load("language").get_input_embeddings()
        without = [*family.modules["tower"], *family.modules["projector"], "lm_head"]
        without += [f"{family.words}.{name}" for name in ("layers", "norm")]
        return load_part(
            family.model_class, family.checkpoint.folder, without, family.dtype, family.device
        ).get_input_embeddings()

    def load(self) -> None:
        """Loads it now."""
        _ = self.embedding

    @torch.inference_mode()
    def __call__(self, states: Tensor, question: str) -> Tensor:
        """Mean cosines of visual tokens, given as states `(N, C)`, with the question's words: `(N,)` float32, CPU."""
        family = self.family
        ids = family.processor.tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids[0]
        # the table may lie on another device, where the language model is spread over several
        words = normalize(self.embedding(ids.to(family.device)).to(family.device, torch.float32), dim=-1)
        tokens = normalize(family.project(states).to(family.device).float(), dim=-1)
        return (tokens @ words.T).mean(1).cpu()
