"""Relevance from SigLIP: how well the patches of each visual token match the question, as SigLIP's text tower reads it.

    r_i = cos( head(H_i), t(Q) )

SigLIP has no CLS token. Its image embedding is what its pooling head makes of all patches: one learned query attends to
them, and a layer norm and an MLP follow. H_i are the patches of visual token i alone, behind the tower's last layer
norm, so `head(H_i)` is the embedding of an image that has no other patches. Where a token has one patch, attention
gives just that patch's value. Where a model averages the patches of a token, as Gemma 3, only their mean is stored: its
head is that of the patches with equal attention to each, since values are linear.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import SiglipModel

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint
from gridprune_cli.vlm.clip import ClipRelevance


class SiglipRelevance(ClipRelevance):
    """The companion SigLIP checkpoint of a tower, without the tower. SigLIP 2 of fixed image sizes has the same form.

    `normed` says whether vision features are behind the tower's last layer norm.
    """

    model_class: ClassVar = SiglipModel
    without: ClassVar = ("vision_model.embeddings", "vision_model.encoder")

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str, normed: bool):
        super().__init__(checkpoint, dtype, device)
        self.normed = normed

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer. Raises BadInput where the package that it needs is not installed."""
        try:
            return super().tokenizer
        except ImportError as fault:
            raise BadInput(
                "its tokenizer needs sentencepiece; install with `pip install sentencepiece protobuf`",
                field="clip",
                value=self.checkpoint.name,
            ) from fault

    def _patches(self, vision_features: Tensor) -> Tensor:
        """Embeddings `(N, D)` of visual tokens' features `(N, P * C)`, those of P patches each one after another."""
        tower = self.model.vision_model
        width = tower.config.hidden_size
        if vision_features.shape[1] % width:
            raise BadInput(
                f"its tower gives {width} numbers per patch, the model's {vision_features.shape[1]}; name the SigLIP "
                "that the model's tower was taken from",
                field="clip",
                value=self.checkpoint.name,
            )
        patches = vision_features.to(self.device, self.dtype).unflatten(1, (-1, width))  # (N, P, C)
        if not self.normed:
            patches = tower.post_layernorm(patches)
        return tower.head(patches)

    def _pieces(self, questions: Sequence[str]) -> list[list[list[int]]]:
        """Token ids of questions, filled up to the full length: SigLIP was trained on texts of that length alone.

        Both versions were trained on small letters, but SigLIP 2's tokenizer does not make them.
        """
        length = self.model.config.text_config.max_position_embeddings
        last, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        split = self._split([question.lower() for question in questions], length - 1)
        return [[[*piece, last] + [pad] * (length - 1 - len(piece)) for piece in pieces] for pieces in split]
