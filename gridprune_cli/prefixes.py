"""The prefixes of prompts: out of the cache where they are there, else through the language model's first layers.

An entry of the cache is the prefix of one prompt up to its last image, for all questions behind it. Its key is that of
what it was computed from: the encoded images in their order, the token ids, the language model, dtype and depth.
"""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from gridprune_cli.cache import files, layout
from gridprune_cli.cache.files import RawTensor
from gridprune_cli.cache.store import Store
from gridprune_cli.contents import PREFIX_TENSORS, check_prefix
from gridprune_cli.tokens import EncodedImage, Prefix, load_tensors, raw_tensor
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.prefix import compute_prefix, misfit, prefix_length

VERSION = 2  # part of every key: raise it when `compute_prefix` changes what it gives


class Prefixes:
    """The prefixes of a model's prompts, in a cache if there is one.

    The last one is held, since an image has often several questions in turn.
    """

    def __init__(self, family: Family, store: Store | None = None) -> None:
        self.family, self.store = family, store
        self._latest: tuple[str, Prefix] | None = None  # with its key

    @overload
    def find(self, prompt: Tensor, images: Sequence[EncodedImage]) -> Prefix: ...

    @overload
    def find(self, prompt: Tensor, images: Sequence[EncodedImage], *, compute: bool) -> Prefix | None: ...

    def find(self, prompt: Tensor, images: Sequence[EncodedImage], *, compute: bool = True) -> Prefix | None:
        """The prefix of a prompt's token ids `(L,)`, of `relevance_depth` layers, stored where it was computed.

        Without `compute` only one that is there already, else None. Raises as `compute_prefix`.
        """
        ids = prompt[: prefix_length(self.family, prompt)]
        key = self.key(ids, images)
        if self._latest is None or self._latest[0] != key:
            prefix = self._look_up(key, ids)
            if prefix is None:
                if not compute:
                    return None
                prefix = compute_prefix(self.family, prompt, images, self.family.relevance_depth)
                if self.store is not None:
                    self.store.put(self.identity, key, self._to_bytes(key, prefix, images), spared=False)
            self._latest = key, prefix
        return self._latest[1]

    @property
    def identity(self) -> dict[str, Any]:
        """What prefixes depend on besides images and token ids. The projector is in the keys of the images."""
        return {
            "kind": "prefix",
            "family": self.family.checkpoint.family,
            "language_model": self.family.fingerprint,
            "dtype": str(self.family.dtype).removeprefix("torch."),
            "depth": self.family.relevance_depth,
            "version": VERSION,
        }

    def key(self, ids: Tensor, images: Sequence[EncodedImage]) -> str:
        """Cache key of the prefix of token ids `(P,)` with the placeholders of these images."""
        return files.digest({"encoder": self.identity, "images": [i.key for i in images], "ids": ids.tolist()})

    def _look_up(self, key: str, ids: Tensor) -> Prefix | None:
        """The prefix from the cache, or None: also where the entry is none that this model gives."""
        entry = self.store.get(self.identity, key) if self.store is not None else None
        if entry is None:
            return None
        try:
            return self._from_parts(*entry, ids)
        except ValueError:  # whole, but not what this version writes
            return None

    def _to_bytes(self, key: str, prefix: Prefix, images: Sequence[EncodedImage]) -> bytes:
        """The entry. Its fields are those of an encoded image, as far as `gridprune cache` lists them."""
        header = {
            "kind": "prefix",
            "schema": layout.SCHEMA,
            "key": key,
            "model": self.family.checkpoint.name,
            "image": ", ".join(image.image for image in images),
            "name": f"prefix of {', '.join(image.name for image in images)}",
            "encoder": self.identity,
            "tokens": len(prefix.ids),
        }
        return files.encode({name: raw_tensor(getattr(prefix, name)) for name in PREFIX_TENSORS}, header)

    def _from_parts(self, header: dict[str, Any], raw: dict[str, RawTensor], ids: Tensor) -> Prefix:
        """The inverse of `_to_bytes`. Raises ValueError for what is none of this model's, or of other token ids."""
        tensors = load_tensors(raw)
        check_prefix(header, tensors)
        prefix = Prefix(*(tensors[name] for name in PREFIX_TENSORS))
        if prefix.depth != self.family.relevance_depth or (reason := misfit(self.family, prefix)):
            raise ValueError(f"{prefix.depth} layers" if prefix.depth != self.family.relevance_depth else reason)
        if prefix.keys.dtype != self.family.dtype or not torch.equal(prefix.ids, ids):
            raise ValueError("of another dtype, or other token ids")
        return prefix
