"""Qwen2.5-VL: Qwen2-VL with a tower whose blocks look at windows, but for a few that look at everything."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from gridprune_cli.pruning.signals import View
from gridprune_cli.vlm.qwen2_vl import Qwen2VL


class Qwen2_5VL(Qwen2VL):
    model_class = Qwen2_5_VLForConditionalGeneration
    processor_class = Qwen2_5_VLProcessor

    def _whole_blocks(self, tower: Any) -> Sequence[int]:
        return tower.fullatt_block_indexes

    def _row_major(self, received: Tensor, view: View, tower: Any) -> Tensor:
        side = tower.window_size // tower.spatial_merge_size // tower.patch_size  # of a window, in tokens
        index = torch.arange(view.count, device=received.device)
        window = index // view.cols // side * view.cols + index % view.cols // side
        order = window.argsort(stable=True)  # the tower's: window by window, each row-major
        return torch.empty_like(received).index_copy_(0, order, received)
