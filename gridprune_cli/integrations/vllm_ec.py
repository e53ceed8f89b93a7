"""Whole encodings as files for vLLM's encoder cache, so that no engine has to run the vision tower for them.

vLLM can take what its encoder would give for an image from outside its process, by an encoder cache connector. Its
`ECExampleConnector` looks in a folder, for `UUID/encoder_cache.safetensors` with one tensor `ec_cache` (S, H): what the
language model receives in place of the image's S tokens. UUID is the id that a request gives the image. What is said
here of vLLM is from its source, version 0.32 (`distributed/ec_transfer/ec_connector/example_connector.py`).
"""

from dataclasses import dataclass

from safetensors.torch import save
from torch import Tensor

from gridprune_cli.errors import BadInput
from gridprune_cli.integrations.vllm import check_exportable
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.family import Family

FILE = "encoder_cache.safetensors"  # in a folder for each image


@dataclass(frozen=True)
class EncoderCacheEntry:
    """All that the language model receives for one image.

    uuid                 the id to give the image in requests, and the name of the folder: the encoded image's key
    image_embeds (S, H)  projected, with separators, in the set's own dtype
    """

    uuid: str
    image_embeds: Tensor
    model: str

    def to_bytes(self) -> bytes:
        """The file that vLLM reads."""
        return save({"ec_cache": self.image_embeds})


def to_encoder_cache(family: Family, pruned: PrunedSet) -> EncoderCacheEntry:
    """The whole encoding of a set's image. The set keeps all tokens; its question and positions do not matter.

    The id can be the key of the encoded image, which names image, checkpoint and dtype, since nothing depends on a
    question. Loads no weights.

    Raises BadInput for a set that does not hold its image's whole encoding or is not of one image, and for a family
    that was not tried.
    """
    if family.vllm:
        kind = family.checkpoint.family
        raise BadInput(f"model type {kind} was not tried with vLLM's encoder cache; let vLLM encode its images")
    check_exportable(family, pruned, "vLLM")
    if len(pruned.images) != 1:
        raise BadInput(f"it is of {len(pruned.images)} images, and vLLM caches each by itself; prune each by itself")
    if len(pruned.kept) != pruned.count:
        raise BadInput(
            f"it keeps {len(pruned.kept)} of {pruned.count} visual tokens, and vLLM's encoder cache holds all of them; "
            "prune with `keep=1.0`, or export to vllm"
        )
    return EncoderCacheEntry(pruned.images[0].key, pruned.image_embeds, pruned.model)
