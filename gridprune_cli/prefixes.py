"""The prefixes of prompts, each computed once for all questions about its images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gridprune_cli.tokens import EncodedImage
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.prefix import Prefix, compute_prefix, prefix_length


class Prefixes:
    """The prefixes of a model's prompts. The last one is held, since an image has often several questions in turn."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._latest: tuple[tuple[str, ...], Prefix] | None = None  # keys of the encoded images, and theirs

    def find(self, prompt: Tensor, images: Sequence[EncodedImage]) -> Prefix:
        """The prefix of a prompt's token ids `(L,)`, of the depth that relevance needs. Raises as `compute_prefix`."""
        keys, ids = tuple(image.key for image in images), prompt[: prefix_length(self.family, prompt)]
        if self._latest is None or self._latest[0] != keys or not torch.equal(self._latest[1].ids, ids):
            self._latest = keys, compute_prefix(self.family, prompt, images, self.family.relevance_depth)
        return self._latest[1]
