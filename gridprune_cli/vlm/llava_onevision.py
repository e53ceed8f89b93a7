"""LLaVA-OneVision: LLaVA-NeXT's views over a SigLIP tower; the mosaic of a large picture is shrunk.

Shrinking follows the projector and mixes tokens, so states are stored projected. A picture is encoded in tiles however
many are asked about, as the processor does for a flat list of pictures; of a nested list it makes base views alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from gridprune_cli.vlm.family import Encoding
from gridprune_cli.vlm.llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    model_class = LlavaOnevisionForConditionalGeneration
    processor_class = LlavaOnevisionProcessor

    @property
    def width(self) -> int:
        return self.config.get_text_config().hidden_size

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image]) -> list[Encoding]:
        self.load("tower", "projector")
        return super().encode(pictures)

    def _stored(self, states: Tensor) -> Tensor:
        return self.load("projector").model.multi_modal_projector(states.to(self.device))

    def project(self, states: Tensor) -> Tensor:
        return states

    def _packing(self) -> dict[str, Any]:
        return {"vision_aspect_ratio": self.load("tower").config.vision_aspect_ratio}
