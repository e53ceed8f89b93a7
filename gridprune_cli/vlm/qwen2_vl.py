"""Qwen2-VL: pictures of any shape on a grid of their own, and positions in three axes (time, row, column).

The tower merges 2 x 2 patches into a token, so what is stored is what the language model receives.
"""

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.signals import View
from gridprune_cli.tokens import EncodedImage
from gridprune_cli.vlm.attention import each_signal, middle_layer, split_signals, stack_records, watch_tower
from gridprune_cli.vlm.family import Encoding, Family


class Qwen2VL(Family):
    model_class = Qwen2VLForConditionalGeneration
    processor_class = Qwen2VLProcessor
    modules: ClassVar = {
        "tower": ("model.visual",),
        "projector": (),
        "language": ("model.language_model", "lm_head"),
    }

    axes: ClassVar[int] = 3
    vllm = ""

    @property
    def width(self) -> int:
        return self.text_config.hidden_size

    def check(self, image: EncodedImage) -> None:
        super().check(image)
        if len(image.views) != 1:
            raise ValueError(f"{len(image.views)} views, not one")

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        return [self._encode(picture, optional) for picture in pictures]

    def _encode(self, picture: Image, optional: Collection[str]) -> Encoding:
        try:
            inputs, placeholder = self.process(picture)
        except ValueError as fault:  # too long a strip
            raise BadInput(f"a picture of {picture.width} x {picture.height}: {fault}") from fault
        model = self.load("tower").model
        merge: int = model.visual.spatial_merge_size
        _, height, width = inputs["image_grid_thw"][0].tolist()
        view = View(height // merge, width // merge)
        blocks, whole = model.visual.blocks, self._whole_blocks(model.visual)
        middle = blocks[middle_layer(whole, len(blocks))].attn
        with watch_tower(blocks[max(whole)].attn, middle, cls=False, optional=optional) as records:
            out = model.get_image_features(**inputs)
        patches = stack_records(records)[0]  # (P, 1 + M); a token's patches follow one another
        received = each_signal(lambda signal: signal.view(view.count, merge * merge).mean(1), patches)
        attention = self._row_major(received, view, model.visual).to(self.dtype).cpu()
        saliency, signals = split_signals(attention, optional)
        return Encoding(
            self._vision_features(out).cpu(),
            saliency,
            (view,),
            torch.arange(view.count),
            {"placeholder": placeholder},
            signals,
        )

    def _whole_blocks(self, tower: Any) -> Sequence[int]:
        """The blocks of the tower that attend to the whole picture; the attention of the last of them is saliency."""
        return range(len(tower.blocks))

    def _vision_features(self, out: Any) -> Tensor:
        """Vision features `(N, C)` from what the tower gave for one picture."""
        return out.pooler_output[0]

    def _row_major(self, received: Tensor, view: View, tower: Any) -> Tensor:
        """Values `(N, .)` in the tower's own order of tokens, row-major."""
        return received

    def positions(self, ids: Tensor, images: Sequence[EncodedImage]) -> Tensor:
        """Position ids `(3, L)`. Text counts on in all axes; an image has one time, and its rows and columns count from
        there. What follows it begins behind its longer side."""
        places = torch.empty(3, len(ids), dtype=torch.long)
        placeholders = (ids == self.image_token).nonzero()[:, 0].tolist()
        token = place = done = 0  # next token, its position, placeholders of the images before
        for image in images:
            (view,) = image.views
            start, end = placeholders[done], placeholders[done] + view.count
            places[:, token:start] = torch.arange(start - token) + place
            place += start - token
            index = torch.arange(view.count)
            places[:, start:end] = torch.stack([index * 0, index // view.cols, index % view.cols]) + place
            place += max(view.rows, view.cols)
            token, done = end, done + view.count
        places[:, token:] = torch.arange(len(ids) - token) + place
        return places

    def rotary(self, hidden_states: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """In a text all axes count on alike."""
        return super().rotary(hidden_states, positions if positions.dim() == 3 else positions[None], layer)
