"""Pruned sets in the form that vLLM takes: image embeds in place of the image.

vLLM numbers the tokens of a prompt itself, and none can leave inside the language model. So sets must have compact
positions and no schedule. How their image embeds go in depends on where vLLM takes an image's positions from:

- Families with positions in one axis: one item per image. The prompt has one image token for each image, which vLLM
  expands to as many as the item has embeds. For InternVL it writes `<img>` and `</img>` around them too.
- Families with positions in three axes (Qwen): vLLM counts and places an image's tokens by its grid, so an item of a
  grid of one token has the position of a text token. A pruned set goes as K such items, and its prompt as it is.

What is said here of vLLM is from its source, versions 0.32 and 0.33 (`model_executor/models`, `multimodal`).
"""

import base64
import hashlib
import io
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from gridprune_cli.cache.files import canonical
from gridprune_cli.errors import BadInput
from gridprune_cli.generation import check_model
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.family import Family


@dataclass(frozen=True)
class VllmRequest:
    """What vLLM's `LLM.generate` needs to answer from a pruned set.

    prompt_token_ids (P,)       the prompt, with one image token for each item
    image_embeds     (I, S, H)  what the language model receives in the image tokens' place, in the set's own dtype: of
                                each of I images S embeds of width H. Or (K, H) for families with positions in three
                                axes, where each of the K embeds of all images is an item by itself
    uuids                       ids by which vLLM may cache what it makes of each item, I or K
    image_grid_thw   (K, 3)     the grid of each item where there are K of them, one token each; None otherwise
    """

    prompt_token_ids: Tensor
    image_embeds: Tensor
    uuids: tuple[str, ...]
    model: str
    question: str
    image_grid_thw: Tensor | None = None

    @property
    def embeds_per_image(self) -> int | None:
        """S; None where every embed is an item by itself, whose number vLLM does not restrict."""
        return self.image_embeds.shape[1] if self.image_grid_thw is None else None

    def parts(self) -> list[dict[str, Any]]:
        """The items as parts of a chat message, for vLLM's HTTP interface: tensors as base64 of what torch saves."""
        items: list[str | dict[str, str]] = []
        if self.image_grid_thw is None:
            items += map(_base64_of, self.image_embeds)
        else:
            grids = map(_base64_of, self.image_grid_thw)
            embeds = map(_base64_of, self.image_embeds[:, None])  # each (1, H)
            items += [{"image_embeds": e, "image_grid_thw": g} for e, g in zip(embeds, grids, strict=True)]
        return [
            {"type": "image_embeds", "image_embeds": item, "uuid": uuid}
            for item, uuid in zip(items, self.uuids, strict=True)
        ]

    def to_bytes(self) -> bytes:
        """A safetensors file: the tensors, and the rest as JSON in its metadata, under `vllm`."""
        header = {"uuids": list(self.uuids), "model": self.model, "question": self.question}
        tensors = {"prompt_token_ids": self.prompt_token_ids, "image_embeds": self.image_embeds}
        if self.image_grid_thw is not None:
            tensors["image_grid_thw"] = self.image_grid_thw
        return save(tensors, {"vllm": canonical(header)})


def to_vllm(family: Family, pruned: PrunedSet) -> VllmRequest:
    """The request that has vLLM answer as `generate` does. Loads no weights.

    vLLM caches an image's embeds by an id, and takes equal ids for equal embeds. What is kept of an image differs from
    question to question, so the id is never the image's: it is the sha256 of the embeds themselves.

    Raises BadInput where vLLM can't answer from the set as `generate` does, or the set was made for another model.
    """
    if family.vllm:
        kind = family.checkpoint.family
        raise BadInput(f"model type {kind} can't go to vLLM: {family.vllm}; use `gridprune generate`")
    check_exportable(family, pruned, "vLLM")
    if not torch.equal(pruned.position_ids, torch.arange(len(pruned.input_ids))):
        raise BadInput(
            "its tokens keep their original positions, and vLLM numbers them without gaps, so that it would answer "
            "something else; prune with `positions=compact`"
        )
    return _item_per_token(family, pruned) if family.axes > 1 else _item_per_image(family, pruned)


def check_exportable(family: Family, pruned: PrunedSet, engine: str) -> None:
    """Raises BadInput where no engine can answer from a set: it is another model's, or needs work inside the model."""
    check_model(family, pruned)
    if pruned.schedule:
        raise BadInput(
            f"tokens leave inside the language model, which {engine} can't do; prune without `ilp`, or by another "
            "`method`"
        )
    if not len(pruned.image_embeds):
        raise BadInput("the pruned set holds a prefix in place of its image embeds; prune without `with_prefix`")


def image_runs(family: Family, pruned: PrunedSet) -> list[int]:
    """How many image tokens each run of them in the prompt has; with text between images, one run per image."""
    values, lengths = torch.unique_consecutive(pruned.input_ids, return_counts=True)
    runs: list[int] = lengths[values == family.image_token].tolist()
    return runs


def _item_per_image(family: Family, pruned: PrunedSet) -> VllmRequest:
    ids, runs, count = pruned.input_ids, image_runs(family, pruned), len(pruned.images)
    if len(runs) != count or len(set(runs)) != 1:
        raise BadInput(
            f"vLLM needs equally many image embeds for each of the {count} images, and text between them, but the "
            f"prompt has runs of {runs}; prune with `tokens`, or each image by itself"
        )
    is_image = ids == family.image_token
    first = is_image.clone()
    first[1:] &= ~is_image[:-1]
    stays = first | ~is_image  # one image token per image
    if family.vllm_wraps:
        starts = first.nonzero()[:, 0]
        stays[starts - 1] = stays[starts + runs[0]] = False
    embeds = pruned.image_embeds.view(count, -1, pruned.image_embeds.shape[-1])
    return VllmRequest(ids[stays], embeds, tuple(map(_digest, embeds)), pruned.model, pruned.question)


def _item_per_token(family: Family, pruned: PrunedSet) -> VllmRequest:
    side = family.config.vision_config.spatial_merge_size  # patches of a token, in each direction
    grid = torch.tensor([[1, side, side]]).repeat(len(pruned.image_embeds), 1)
    uuids = tuple(map(_digest, pruned.image_embeds))
    return VllmRequest(pruned.input_ids, pruned.image_embeds, uuids, pruned.model, pruned.question, grid)


def _base64_of(tensor: Tensor) -> str:
    with io.BytesIO() as buffer:
        torch.save(tensor.clone(), buffer)  # a view would bring all that it is a view of
        return base64.b64encode(buffer.getvalue()).decode("ascii")


def _digest(image_embeds: Tensor) -> str:
    """sha256 of an image's embeds with their shape and dtype."""
    return hashlib.sha256(save({"image_embeds": image_embeds.contiguous()})).hexdigest()
