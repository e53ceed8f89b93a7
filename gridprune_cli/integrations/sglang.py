"""Pruned sets in the form that SGLang's Engine takes: embeddings in place of an image, and every token's position.

SGLang's processor of the Qwen-VL families takes an image as a dict of its own output (`format` "processor_output"). It
may hold `precomputed_embeddings`, which then go to the language model as they are, and `mrope_positions`, which are
then used instead of positions counted from the image's grid. So kept tokens can have their original positions. What is
said here of SGLang is from its source, version 0.5.23 (`srt/multimodal/processors/qwen_vl.py`, `base_processor.py`,
`srt/managers/mm_schedule.py`).
"""

from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from gridprune_cli.cache.files import canonical
from gridprune_cli.errors import BadInput
from gridprune_cli.integrations.vllm import check_exportable
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.family import Family


@dataclass(frozen=True)
class SglangRequest:
    """What SGLang's `Engine.generate` needs to answer from a pruned set of one image. L tokens, K of them of the image.

    input_ids              (L,)    the prompt, with K image tokens
    precomputed_embeddings (K, D)  what the language model receives in their place; of Qwen3-VL each token's embedding
                                   and its deepstack features side by side
    mrope_positions        (3, L)  the position of each token of the prompt: time, row, column
    mrope_position_delta   (1, 1)  what is added to the index of a token of the answer for its position
    image_grid_thw         (1, 3)  patches of the whole image: time, rows, columns
    """

    input_ids: Tensor
    precomputed_embeddings: Tensor
    mrope_positions: Tensor
    mrope_position_delta: Tensor
    image_grid_thw: Tensor
    model: str
    question: str

    def to_bytes(self) -> bytes:
        """A safetensors file: the tensors, and model and question as JSON in its metadata, under `sglang`."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return save(tensors, {"sglang": canonical({"model": self.model, "question": self.question})})


def to_sglang(family: Family, pruned: PrunedSet) -> SglangRequest:
    """The request that has SGLang answer as `generate` does, from original or compact positions. Loads no weights.

    Raises BadInput where SGLang can't be told the set's positions, the set is not of one image, or it was made for
    another model.
    """
    if family.axes != 3:
        kind = family.checkpoint.family
        raise BadInput(
            f"model type {kind} can't go to SGLang, which takes positions beside image embeds for the Qwen-VL families "
            "alone; use `gridprune generate`"
        )
    check_exportable(family, pruned, "SGLang")
    if len(pruned.images) != 1:
        raise BadInput(
            f"it is of {len(pruned.images)} images, and SGLang divides embeddings between images by their grids, which "
            "a pruned set no longer fills; prune each image by itself"
        )
    length = len(pruned.input_ids)
    positions = pruned.position_ids.expand(3, length)  # compact ones are (L,)
    (view,) = pruned.images[0].views
    side = family.config.vision_config.spatial_merge_size  # patches of a token, in each direction
    return SglangRequest(
        input_ids=pruned.input_ids,
        precomputed_embeddings=pruned.image_embeds,
        mrope_positions=positions,
        mrope_position_delta=(positions.max() + 1 - length).view(1, 1),
        image_grid_thw=torch.tensor([[1, view.rows * side, view.cols * side]]),
        model=pruned.model,
        question=pruned.question,
    )
