"""InternVL: the picture stretched onto a grid of square tiles, then a thumbnail; blocks of 2 x 2 patches are a token.

A ViT with a CLS token. The projector works token by token once the patches are joined, so joined patches are stored.
"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import InternVLForConditionalGeneration, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from gridprune_cli.pruning.signals import View
from gridprune_cli.vlm.attention import each_signal, middle_layer, split_signals, stack_records, watch_tower
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
    vllm = ""
    vllm_wraps = True  # <img> and </img>

    def encode(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        return [self._encode(picture, optional) for picture in pictures]

    @torch.inference_mode()
    def _encode(self, picture: Image, optional: Collection[str]) -> Encoding:
        inputs, placeholder = self.process(picture)
        patches, attention = self.run_tower(inputs["pixel_values"].flatten(0, -4), optional)
        vision_features = join(patches, self.side)
        of_tokens = each_signal(lambda signal: join(signal[..., None], self.side).mean(-1), attention)  # (T, ., 1 + M)
        saliency, signals = split_signals(of_tokens.flatten(0, 1).to(self.dtype).cpu(), optional)
        height, width = self.grid(picture, inputs)
        boxes = [
            (x / width, y / height, (x + 1) / width, (y + 1) / height) for y in range(height) for x in range(width)
        ]
        across = round(vision_features.shape[1] ** 0.5)
        return Encoding(
            vision_features.flatten(0, 1).cpu(),
            saliency,
            tuple(View(across, across, box) for box in (*boxes, (0.0, 0.0, 1.0, 1.0))),
            torch.arange(saliency.numel()),
            {"placeholder": placeholder},
            signals,
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
        return images.get_number_of_image_patches(*size[::-1], self.image_settings) * self.processor.image_seq_length

    def run_tower(self, pixels: Tensor, optional: Collection[str] = ()) -> tuple[Tensor, Tensor]:
        """The patches' hidden states `(T, P, C)` for tiles `(T, 3, H, W)`, and attention to them `(T, P, 1 + M)`.

        That is saliency, CLS' attention, then the M optional signals.
        """
        model = self.load("tower")
        tower, layer = model.model.vision_tower, model.config.vision_feature_layer
        # hidden_states[i] is what layer i - 1 gave, so the attention is that of the layer whose output is used
        layers, last = tower.encoder.layer, layer if layer < 0 else layer - 1
        middle = layers[middle_layer(range(len(layers)), len(layers))].attention
        with watch_tower(layers[last].attention, middle, cls=True, optional=optional) as records:
            out = tower(pixels, output_hidden_states=layer != -1)
        hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        return hidden[:, 1:], stack_records(records)[:, 1:]  # CLS is no visual token

    def grid(self, picture: Image, inputs: dict[str, Tensor]) -> tuple[int, int]:
        """How many rows and columns of tiles there are beside the view of the whole; 0, 0 where there are none."""
        if inputs["num_patches"].item() == 1:
            return 0, 0
        settings = self.processor.image_processor
        tile = (settings.size["height"], settings.size["width"])
        fits = (settings.min_patches, settings.max_patches)
        width, height = get_optimal_tiled_canvas((picture.height, picture.width), tile, *fits)
        return height, width

    @torch.inference_mode()
    def project(self, vision_features: Tensor) -> Tensor:
        return self.projector(self.load("projector").model)(vision_features.to(self.device, self.dtype)).cpu()

    def projector(self, model: Any) -> Any:
        """The sub-module that projects joined patches."""
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
