"""Pruned sets in the form that vLLM takes: image embeds in place of the image.

The prompt of a LLaVA-like model has one image token for each image in vLLM, which expands it to as many as there are
image embeds, and numbers all tokens of the prompt from 0 on. So any number of embeds will do, but tokens can't have
their original positions, and none can leave inside the language model. What is said here of vLLM is from its source,
version 0.33 (`model_executor/models`, `multimodal`).
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
    """What vLLM's `LLM.generate` needs to answer from a pruned set of I images, with S image embeds of width H each.

    prompt_token_ids (P,)       the prompt, with one image token for each image
    image_embeds     (I, S, H)  what the language model receives in the image tokens' place, in the set's own dtype
    uuids            (I,)       ids by which vLLM may cache each image's embeds
    """

    prompt_token_ids: Tensor
    image_embeds: Tensor
    uuids: tuple[str, ...]
    model: str
    question: str

    def parts(self) -> list[dict[str, Any]]:
        """The images as parts of a chat message, for vLLM's HTTP interface: embeds as base64 of what torch saves."""
        return [
            {"type": "image_embeds", "image_embeds": _base64_of(embeds), "uuid": uuid}
            for embeds, uuid in zip(self.image_embeds, self.uuids, strict=True)
        ]

    def to_bytes(self) -> bytes:
        """A safetensors file: the two tensors, and the rest as JSON in its metadata, under `vllm`."""
        header = {"uuids": list(self.uuids), "model": self.model, "question": self.question}
        tensors = {"prompt_token_ids": self.prompt_token_ids, "image_embeds": self.image_embeds}
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
    check_model(family, pruned)
    if pruned.schedule:
        raise BadInput(
            "tokens leave inside the language model, which vLLM can't do; prune without `ilp`, or by another `method`"
        )
    if not len(pruned.image_embeds):
        raise BadInput("the pruned set holds a prefix in place of its image embeds; prune without `with_prefix`")
    ids = pruned.input_ids
    if not torch.equal(pruned.position_ids, torch.arange(len(ids))):
        raise BadInput(
            "its tokens keep their original positions, and vLLM numbers them without gaps, so that it would answer "
            "something else; prune with `positions=compact`"
        )
    values, lengths = torch.unique_consecutive(ids, return_counts=True)
    runs = lengths[values == family.image_token]
    count = len(pruned.images)
    if len(runs) != count or len(runs.unique()) != 1:
        raise BadInput(
            f"vLLM needs equally many image embeds for each of the {count} images, and text between them, but the "
            f"prompt has runs of {runs.tolist()}; prune with `tokens`, or each image by itself"
        )
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = (ids[1:] != family.image_token) | (ids[:-1] != family.image_token)
    embeds = pruned.image_embeds.view(count, -1, pruned.image_embeds.shape[-1])
    return VllmRequest(ids[first], embeds, tuple(map(_digest, embeds)), pruned.model, pruned.question)


def _base64_of(tensor: Tensor) -> str:
    with io.BytesIO() as buffer:
        torch.save(tensor.clone(), buffer)  # a view would bring all that it is a view of
        return base64.b64encode(buffer.getvalue()).decode("ascii")


def _digest(image_embeds: Tensor) -> str:
    """sha256 of an image's embeds with their shape and dtype."""
    return hashlib.sha256(save({"image_embeds": image_embeds.contiguous()})).hexdigest()
