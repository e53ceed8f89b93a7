"""Qwen3-VL: Qwen2-VL with deepstack, further rows per token from earlier blocks of the tower.

The language model adds them to its own first layers. They travel with their token: a state is the token's row and its
deepstack rows side by side, `(N, (1 + levels) * D)`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    model_class = Qwen3VLForConditionalGeneration
    processor_class = Qwen3VLProcessor

    def _states(self, out: Any) -> Tensor:
        return torch.cat([out.pooler_output[0], *(level[0] for level in out.deepstack_features)], dim=1)

    @property
    def width(self) -> int:
        return (1 + self._levels) * super().width

    @property
    def embed_width(self) -> int:
        return self.width

    @property
    def _levels(self) -> int:
        return len(self.checkpoint.config["vision_config"]["deepstack_visual_indexes"])

    def split(self, vision_features: Tensor) -> tuple[Tensor, ...]:
        """States `(N, (1 + levels) * D)` as the tokens' own rows and those of each level, `(N, D)` each."""
        return vision_features.chunk(1 + self._levels, dim=1)

    @property
    def first_inner(self) -> int:
        """Deepstack rows are added behind the first layers, for every token that was there at the start."""
        return self._levels

    def text_embeds(self, vision_features: Tensor) -> Tensor:
        """Without the deepstack rows, which never stand where words do."""
        return self.split(vision_features)[0]

    def features(self, batch: Sequence[PrunedSet]) -> Any:
        images = [self.split(pruned.image_embeds.to(self.device, self.dtype)) for pruned in batch]
        rows, *levels = (list(parts) for parts in zip(*images, strict=True))
        return BaseModelOutputWithDeepstackFeatures(pooler_output=rows, deepstack_features=levels)
