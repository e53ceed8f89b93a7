"""Qwen3-VL: Qwen2-VL with deepstack, further features of each token from earlier blocks of the tower.

The language model adds them to the output of its first layers. They travel with their token: its vision features are
its embedding and its deepstack features side by side, `(N, (1 + levels) * D)`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from gridprune_cli.vlm.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    model_class = Qwen3VLForConditionalGeneration
    processor_class = Qwen3VLProcessor

    def _vision_features(self, out: Any) -> Tensor:
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
        """Vision features `(N, (1 + levels) * D)` as the embeddings and the features of each level, `(N, D)` each."""
        return vision_features.chunk(1 + self._levels, dim=1)

    @property
    def first_inner(self) -> int:
        """Deepstack features are added behind the first layers, for every token that was there at the start."""
        return self._levels

    def text_embeds(self, vision_features: Tensor) -> Tensor:
        """Without the deepstack features, which never stand where text embeddings do."""
        return self.split(vision_features)[0]

    def features(self, image_embeds: Sequence[Tensor]) -> Any:
        images = [self.split(of_prompt.to(self.device, self.dtype)) for of_prompt in image_embeds]
        embeds, *levels = (list(features) for features in zip(*images, strict=True))
        return BaseModelOutputWithDeepstackFeatures(pooler_output=embeds, deepstack_features=levels)
