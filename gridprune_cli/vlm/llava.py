"""LLaVA-1.5 and its like: a CLIP tower, one square view, a projector that works row by row."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gridprune_cli.pruning.signals import View
from gridprune_cli.tokens import EncodedImage, PrunedSet
from gridprune_cli.vlm.attention import NAME, cls_saliency, watch
from gridprune_cli.vlm.family import Encoding, Family


class Llava(Family):
    model_class = LlavaForConditionalGeneration
    processor_class = LlavaProcessor
    modules: ClassVar = {
        "tower": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    }

    def _prepare(self, model: Any, parts: Sequence[str]) -> None:
        if "tower" in parts:
            model.set_attn_implementation({"vision_config": NAME})

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image]) -> list[Encoding]:
        model = self.load("tower").model
        pixels = self.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        layer: int = self.checkpoint.config["vision_feature_layer"]
        # hidden_states[i] is what layer i - 1 gave, so the saliency is that of the layer whose output is used
        attention = model.vision_tower.encoder.layers[layer if layer < 0 else layer - 1].self_attn
        with watch(attention, slice(0, 1)) as record:
            hidden = model.vision_tower(pixels.to(self.device, self.dtype), output_hidden_states=True).hidden_states
        states = hidden[layer][:, 1:].cpu()  # without CLS
        saliency = cls_saliency(record).to(self.dtype).cpu()
        side = round(states.shape[1] ** 0.5)
        return [
            Encoding(states[i], saliency[i], (View(side, side, self._seen(picture)),))
            for i, picture in enumerate(pictures)
        ]

    def _seen(self, picture: Image) -> tuple[float, float, float, float]:
        """The part of the picture that the processor's centre crop leaves, in fractions of the picture."""
        settings = self.processor.image_processor
        if not settings.do_center_crop or "shortest_edge" not in settings.size:
            return 0.0, 0.0, 1.0, 1.0
        scale = settings.size["shortest_edge"] / min(picture.size)
        seen = (settings.crop_size["width"], settings.crop_size["height"])
        half = [crop / (scale * side) / 2 for crop, side in zip(seen, picture.size, strict=True)]
        return 0.5 - half[0], 0.5 - half[1], 0.5 + half[0], 0.5 + half[1]

    @torch.inference_mode()
    def project(self, states: Tensor) -> Tensor:
        projector = self.load("projector").model.multi_modal_projector
        return projector(states.to(self.device, self.dtype)).cpu()

    def write_prompt(self, question: str, encoded: EncodedImage) -> Tensor:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        text = text.replace(self.processor.image_token, self.processor.image_token * encoded.count)
        return torch.tensor(self.processor.tokenizer(text).input_ids)

    def features(self, batch: Sequence[PrunedSet]) -> Any:
        return BaseModelOutputWithPooling(pooler_output=[p.rows.to(self.device, self.dtype) for p in batch])
