"""LLaVA-1.5 and its like: a CLIP or SigLIP tower, one square view, a projector that works token by token."""

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gridprune_cli.pruning.signals import View
from gridprune_cli.vlm.attention import middle_layer, split_signals, stack_records, watch_tower
from gridprune_cli.vlm.family import Encoding, Family


class Llava(Family):
    model_class = LlavaForConditionalGeneration
    processor_class = LlavaProcessor
    patches_normed: ClassVar[bool | None] = False
    vllm = ""
    modules: ClassVar = {
        "tower": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    }

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        pixels = torch.cat([self.process(picture)[0]["pixel_values"] for picture in pictures])
        vision_features, attention = (values.cpu() for values in self.run_tower(pixels, optional))
        side = round(vision_features.shape[1] ** 0.5)
        placeholder = self.processor.image_token * (side * side)
        encodings = []
        for i, picture in enumerate(pictures):
            saliency, signals = split_signals(attention[i], optional)
            view = View(side, side, self._visible_box(picture))
            tokens = torch.arange(side * side)
            encodings.append(
                Encoding(vision_features[i], saliency, (view,), tokens, {"placeholder": placeholder}, signals)
            )
        return encodings

    def count_placeholders(self, size: tuple[int, int]) -> int:
        """A picture of any size is brought to that of the tower."""
        tower = self.config.vision_config
        return (tower.image_size // tower.patch_size) ** 2

    def unread(self) -> list[str]:
        layers = self.checkpoint.tower.get("num_hidden_layers")
        layer = self.checkpoint.config.get("vision_feature_layer")
        if layers is None or layer is None:  # not in the config: then all are built
            return []
        return [f"model.vision_tower.encoder.layers.{i}" for i in range(layer % (layers + 1), layers)]

    def run_tower(self, pixels: Tensor, optional: Collection[str] = ()) -> tuple[Tensor, Tensor]:
        """The patches' hidden states `(B, N, C)` in the layer that the projector reads, and attention to them.

        That is `(B, N, 1 + M)`: saliency, then the M optional signals. Both on the device.
        """
        model = self.load("tower")
        tower, layer = model.model.vision_tower, model.config.vision_feature_layer
        cls = model.config.vision_feature_select_strategy == "default"
        layer %= model.config.vision_config.num_hidden_layers + 1  # layers behind it may be missing
        # hidden_states[i] is what layer i - 1 gave, so the saliency is that of the layer whose output is used
        layers = tower.encoder.layers
        middle = layers[middle_layer(range(layer), model.config.vision_config.num_hidden_layers)].self_attn
        with watch_tower(layers[layer - 1].self_attn, middle, cls=cls, optional=optional) as records:
            hidden = tower(pixels, output_hidden_states=True).hidden_states[layer]
        first = int(cls)  # CLS is no visual token
        return hidden[:, first:], stack_records(records)[:, first:].to(self.dtype)

    def _visible_box(self, picture: Image) -> tuple[float, float, float, float]:
        """The part of the picture that the processor's centre crop leaves, in fractions of the picture."""
        settings = self.processor.image_processor
        if not settings.do_center_crop or "shortest_edge" not in settings.size:
            return 0.0, 0.0, 1.0, 1.0
        scale = settings.size["shortest_edge"] / min(picture.size)
        crop_size = (settings.crop_size["width"], settings.crop_size["height"])
        half = [crop / (scale * side) / 2 for crop, side in zip(crop_size, picture.size, strict=True)]
        return 0.5 - half[0], 0.5 - half[1], 0.5 + half[0], 0.5 + half[1]

    @torch.inference_mode()
    def project(self, vision_features: Tensor) -> Tensor:
        projector = self.load("projector").model.multi_modal_projector
        return projector(vision_features.to(self.device, self.dtype)).cpu()
