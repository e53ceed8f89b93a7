"""InternVL: the picture stretched onto a grid of square tiles, then a thumbnail; blocks of 2 x 2 patches are a token.

A ViT with a CLS token. The projector works token by token once the patches are joined, so joined patches are stored.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import InternVLForConditionalGeneration, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from gridprune_cli.pruning.signals import View
from gridprune_cli.vlm.attention import watch
from gridprune_cli.vlm.family import Encoding, Family


class InternVL(Family):
    model_class = InternVLForConditionalGeneration
    processor_class = InternVLProcessor
    modules: ClassVar = {
        "tower": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    }
    batched = True

    def encode(self, pictures: Sequence[Image]) -> list[Encoding]:
        return [self._encode(picture) for picture in pictures]

    @torch.inference_mode()
    def _encode(self, picture: Image) -> Encoding:
        inputs, placeholder = self.process(picture)
        patches, attention = self.run_tower(inputs["pixel_values"].flatten(0, -4))
        vision_features = join(patches, self.side)
        saliency = join(attention[..., None], self.side).mean(-1).to(self.dtype)
        rows, cols = self.grid(picture, inputs)
        boxes = [(x / cols, y / rows, (x + 1) / cols, (y + 1) / rows) for y in range(rows) for x in range(cols)]
        across = round(vision_features.shape[1] ** 0.5)
        return Encoding(
            vision_features.flatten(0, 1).cpu(),
            saliency.flatten().cpu(),
            tuple(View(across, across, box) for box in (*boxes, (0.0, 0.0, 1.0, 1.0))),
            torch.arange(saliency.numel()),
            {"placeholder": placeholder},
        )

    @property
    def side(self) -> int:
        """How many patches are joined into one visual token, in height and in width."""
        return round(1 / self.config.downsample_ratio)

    @property
    def width(self) -> int:
        return self.side**2 * super().width

    def count_placeholders(self, size: tuple[int, int]) -> int:
        images = self.processor.image_processor
        return images.get_number_of_image_patches(*size[::-1], self._image_settings) * self.processor.image_seq_length

    def run_tower(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch states `(T, P, C)` of tiles `(T, 3, H, W)`, and the CLS token's attention to them `(T, P)`."""
        model = self.load("tower")
        tower, layer = model.model.vision_tower, model.config.vision_feature_layer
        # hidden_states[i] is what layer i - 1 gave, so the attention is that of the layer whose output is used
        attention = tower.encoder.layer[layer if layer < 0 else layer - 1].attention
        with watch(attention, cls=True) as record:
            out = tower(pixels, output_hidden_states=layer != -1)
        hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        return hidden[:, 1:], torch.cat(record)[:, 1:]  # CLS is no visual token

    def grid(self, picture: Image, inputs: dict[str, Tensor]) -> tuple[int, int]:
        """Rows and columns of the tiles beside the view of the whole; none where that view is all there is."""
        if inputs["num_patches"].item() == 1:
            return 0, 0
        settings = self.processor.image_processor
        tile = (settings.size["height"], settings.size["width"])
        fits = (settings.min_patches, settings.max_patches)
        cols, rows = get_optimal_tiled_canvas((picture.height, picture.width), tile, *fits)
        return rows, cols

    @torch.inference_mode()
    def project(self, vision_features: Tensor) -> Tensor:
        return self.projector(self.load("projector").model)(vision_features.to(self.device, self.dtype)).cpu()

    def projector(self, model: Any) -> Any:
        """The part of the model that makes rows of joined patches."""
        return model.multi_modal_projector


def join(patches: Tensor, side: int) -> Tensor:
    """Joins each block of `side` x `side` patches, what the models call pixel shuffle.

    Patches `(T, P, C)` of square tiles, row-major, become `(T, P / side**2, side**2 * C)`, row-major; within a block
    its patches in turn, row-major too.
    """
    tiles, count, channels = patches.shape
    across = round(count**0.5) // side
    blocks = patches.reshape(tiles, across, side, across, side, channels).transpose(2, 3)
    return blocks.reshape(tiles, across * across, -1)
