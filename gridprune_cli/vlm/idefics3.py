"""Idefics3: tiles with row and column tags in the prompt, then the whole picture; several patches make a token.

A SigLIP tower without a CLS token. The processor stretches a picture to whole tiles, so that none of its tiles is
padded and the tower needs no mask: only pictures that are processed together pad each other, with blank tiles.
"""

from collections.abc import Collection
from typing import Any, ClassVar

from PIL.Image import Image
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from gridprune_cli.vlm.attention import middle_layer, stack_records, watch_tower
from gridprune_cli.vlm.internvl import InternVL


class Idefics3(InternVL):
    model_class: ClassVar = Idefics3ForConditionalGeneration
    processor_class: ClassVar = Idefics3Processor
    modules: ClassVar = {
        "tower": ("model.vision_model",),
        "projector": ("model.connector",),
        "language": ("model.text_model", "lm_head"),
    }
    text_model = "model.text_model"
    batched = False
    patches_normed: ClassVar[bool | None] = True
    vllm = "vLLM counts its image tokens by the picture's size and takes no image embeds in their place"

    @property
    def side(self) -> int:
        return self.config.scale_factor

    def count_placeholders(self, size: tuple[int, int]) -> int:
        tiles, *_ = self.processor.image_processor.get_number_of_image_patches(*size[::-1], self.image_settings)
        return tiles * self.processor.image_seq_len

    def run_tower(self, pixels: Tensor, optional: Collection[str] = ()) -> tuple[Tensor, Tensor]:
        """The patches' hidden states `(T, P, C)` for tiles `(T, 3, H, W)`, and attention to them `(T, P, 1 + M)`.

        That is saliency, attention received, then the M optional signals.
        """
        tower = self.load("tower").model.vision_model
        layers = tower.encoder.layers
        middle = layers[middle_layer(range(len(layers)), len(layers))].self_attn
        with watch_tower(layers[-1].self_attn, middle, cls=False, optional=optional) as records:
            vision_features = tower(pixels).last_hidden_state
        return vision_features, stack_records(records)

    def grid(self, picture: Image, inputs: dict[str, Tensor]) -> tuple[int, int]:
        return int(inputs["rows"].item()), int(inputs["cols"].item())

    def projector(self, model: Any) -> Any:
        return model.connector.modality_projection
