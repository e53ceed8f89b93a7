"""LLaVA-NeXT (LLaVA-1.6): a base view of the whole picture, and a mosaic of tiles with a newline behind each row.

Two views: the base, then the mosaic as one grid, without the rows or columns that are padding.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.image_processing_utils import get_patch_output_size
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from gridprune_cli.pruning.placeholders import SEPARATOR
from gridprune_cli.pruning.signals import View
from gridprune_cli.vlm.attention import split_signals
from gridprune_cli.vlm.family import Encoding, Family
from gridprune_cli.vlm.llava import Llava

_TILES = 8  # tiles at a time, to bound memory: attention of dozens of tiles at 577 x 577 each and 16 heads is GBs


class LlavaNext(Llava):
    model_class = LlavaNextForConditionalGeneration
    processor_class = LlavaNextProcessor

    count_placeholders = Family.count_placeholders

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        return [self._encode_tiles(*self.process(picture), optional=optional) for picture in pictures]

    def _encode_tiles(
        self,
        inputs: dict[str, Tensor],
        placeholder: str,
        box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
        optional: Collection[str] = (),
    ) -> Encoding:
        """The base view, which covers the part `box` of the picture, and the mosaic where there are tiles besides."""
        size = inputs["image_sizes"].cpu()  # (1, 2), height and width
        chunks = [self.run_tower(pixels, optional) for pixels in inputs["pixel_values"][0].split(_TILES)]
        vision_features, attention = (torch.cat(values) for values in zip(*chunks, strict=True))  # (T, N, .) each
        attention = attention.cpu()
        tiles, in_tile, _ = attention.shape
        marks = self._pack(torch.zeros(tiles, in_tile, 1), size)[:, 0]
        token = marks != SEPARATOR
        height = int((~token).sum())  # rows of the mosaic, each with a newline behind it
        width = (int(token.sum()) - in_tile) // height if height else 0
        side = round(in_tile**0.5)
        views = [View(side, side, box)]
        if width:  # nothing is left between the padding of a picture that is hardly more than a line, or without tiles
            views.append(View(height, width, self._mosaic(size[0], side)))
        saliency, signals = split_signals(self._pack(attention, size)[token], optional)
        return Encoding(
            self._pack(self._stored(vision_features), size).cpu()[token],
            saliency,
            tuple(views),
            torch.where(token, token.cumsum(0) - 1, SEPARATOR),
            {"placeholder": placeholder},
            signals,
        )

    def _stored(self, vision_features: Tensor) -> Tensor:
        """What is stored of the tower's features `(T, N, C)`, on the device."""
        return vision_features

    def _pack(self, values: Tensor, size: Tensor) -> Tensor:
        """Values of tiles `(T, N, C)` as the model packs them, `(S, C)`, with `SEPARATOR` for the newlines."""
        newline = torch.full(values.shape[-1:], float(SEPARATOR), device=values.device)
        packed, _ = self.load("tower").model.pack_image_features(
            [values], size, image_newline=newline, **self._packing()
        )
        return packed[0]

    def _packing(self) -> dict[str, Any]:
        return {"vision_feature_select_strategy": self.load("tower").config.vision_feature_select_strategy}

    def _mosaic(self, size: Tensor, side: int) -> tuple[float, float, float, float]:
        """The part of a picture of `size` (height, width) that its unpadded mosaic covers, in fractions of it.

        The picture was fitted into the tiles and centred, in pixels; padding is cut off in whole patches.
        """
        config = self.load("tower").config
        tile = config.vision_config.image_size
        shape = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
        places = torch.meshgrid(*(torch.arange(n * side) for n in shape), indexing="ij")
        visible = unpad_image(torch.stack(places), size)
        fit = tuple(n * tile for n in shape)
        blank = torch.empty(3, *size.tolist(), device="meta")
        ends = []
        for first, last, whole, inside in zip(
            visible[:, 0, 0].tolist(),
            visible[:, -1, -1].tolist(),
            fit,
            get_patch_output_size(blank, fit, ChannelDimension.FIRST),
            strict=True,
        ):
            before, pixels = (whole - inside) // 2, tile / side
            ends.append(((first * pixels - before) / inside, ((last + 1) * pixels - before) / inside))
        (top, bottom), (left, right) = ends
        return left, top, right, bottom

    def separator(self) -> Tensor:
        return self.load("projector").model.image_newline.detach().cpu()
