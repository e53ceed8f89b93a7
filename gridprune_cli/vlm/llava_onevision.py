"""LLaVA-OneVision: LLaVA-NeXT's views over a SigLIP tower; the mosaic of a large picture is shrunk.

Shrinking follows the projector and mixes tokens, so vision features are stored projected. Of several pictures in a
prompt each has a base view alone, of the picture padded to a square, and one newline.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from PIL import Image as PIL
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from gridprune_cli.vlm.family import Encoding
from gridprune_cli.vlm.llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    model_class = LlavaOnevisionForConditionalGeneration
    processor_class = LlavaOnevisionProcessor
    encodes_multi_image = True
    patches_normed = None

    @property
    def width(self) -> int:
        return self.text_config.hidden_size

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        self.load("tower", "projector")
        return super().encode(pictures, optional)

    @torch.inference_mode()
    def encode_multi_image(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        self.load("tower", "projector")
        return [self._encode_base(picture, optional) for picture in pictures]

    def _encode_base(self, picture: Image, optional: Collection[str]) -> Encoding:
        beside = PIL.new(
            "RGB", (1, 1)
        )  # the processor takes the picture for one of several; what it gives for this is dropped
        data, (placeholder, _) = self.processor._process_images([[picture, beside]], **self.image_settings)
        inputs = {name: value[:1] for name, value in self.to_device(data).items()}
        return self._encode_tiles(inputs, placeholder, _square(*picture.size), optional)

    def _stored(self, vision_features: Tensor) -> Tensor:
        return self.load("projector").model.multi_modal_projector(vision_features)

    def project(self, vision_features: Tensor) -> Tensor:
        return vision_features

    def _packing(self) -> dict[str, Any]:
        return {"vision_aspect_ratio": self.load("tower").config.vision_aspect_ratio}


def _square(width: int, height: int) -> tuple[float, float, float, float]:
    """A picture padded on both sides to a square of whole pixels, in fractions of the picture."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return -left / width, -top / height, (side - left) / width, (side - top) / height
