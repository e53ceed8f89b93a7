"""The prefixes of prompts: out of the cache where they are there, else through the language model's first layers.

An entry of the cache is the prefix of one prompt up to its last image, for all questions behind it. Its key is that of
what it was computed from: the encoded images in their order, the token ids, the language model, dtype and depth; and
of how it is stored. Questions are answered from what is stored, also where it was just computed or is not stored.
"""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from gridprune_cli.cache import files, layout
from gridprune_cli.cache.files import RawTensor
from gridprune_cli.cache.quantize import KINDS, Packed, pack
from gridprune_cli.cache.store import Store
from gridprune_cli.contents import PREFIX_TENSORS, check_prefix, check_range
from gridprune_cli.tokens import EncodedImage, Prefix, load_tensors, raw_tensor
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.prefix import compute_prefix, misfit, prefix_length

VERSION = 2  # part of every key: raise it when `compute_prefix` changes what it gives
MAX_BYTES = 1 << 28  # of prefixes that are held
_VECTORS = tuple(name for name in PREFIX_TENSORS if name != "ids")  # which may be stored in eight bits, with scales


class Prefixes:
    """The prefixes of a model's prompts, in a cache if there is one, stored as `cache_dtype` says: see `Encoder`.

    The last ones are held, since an image has often several questions in turn, and a batch needs a prefix twice: for
    relevance, and to go on from.
    """

    def __init__(self, family: Family, store: Store | None = None, cache_dtype: str = "full") -> None:
        self.family, self.store, self.cache_dtype = family, store, cache_dtype
        self._held: dict[str, Prefix] = {}  # by their keys, the one that was used last at the end

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
        prefix = self._held.pop(key, None) or self._look_up(key, ids)
        if prefix is None:
            if not compute:
                return None
            prefix = self._compute(key, prompt, images)
        self._held[key] = prefix
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > MAX_BYTES:
            del self._held[next(iter(self._held))]
        return prefix

    def store_for_image(self, image: EncodedImage, *, refresh: bool = False) -> None:
        """Puts the prefix of a question about this one image, in the model's own chat template, into the cache.

        `refresh`: computed again where it is there. Raises BadInput as `Family.write_prompt`, else as `compute_prefix`.
        """
        prompt = self.family.write_prompt("?", [image])  # whatever the question
        if refresh:
            self._compute(self.key(prompt[: prefix_length(self.family, prompt)], [image]), prompt, [image])
        else:
            self.find(prompt, [image])

    def bytes_of(self, image: EncodedImage) -> int | None:
        """Bytes of the entry that `store_for_image` stores, or None where there is none. It is not read."""
        prompt = self.family.write_prompt("?", [image])
        key = self.key(prompt[: prefix_length(self.family, prompt)], [image])
        return None if self.store is None else self.store.bytes_of(self.identity, key)

    def _compute(self, key: str, prompt: Tensor, images: Sequence[EncodedImage]) -> Prefix:
        """The prefix as the cache gives it back, stored under its key."""
        tensors = self._pack(compute_prefix(self.family, prompt, images, self.family.relevance_depth))
        if self.store is not None:
            self.store.put(self.identity, key, self._to_bytes(key, tensors, images), kept_for_run=False)
        return self._unpack(tensors)

    @property
    def identity(self) -> dict[str, Any]:
        """What prefixes depend on besides images and token ids. The projector is in the keys of the images.

        Quantised layers make other keys and values of the same images, so theirs are entries of their own.
        """
        storage = {} if self.cache_dtype == "full" else {"storage": self.cache_dtype}
        quantized = {"quantize": self.family.quantize} if self.family.quantize else {}
        return (
            storage
            | quantized
            | {
                "kind": "prefix",
                "family": self.family.checkpoint.family,
                "language_model": self.family.fingerprint,
                "dtype": str(self.family.dtype).removeprefix("torch."),
                "depth": self.family.relevance_depth,
                "version": VERSION,
            }
        )

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

    def _pack(self, prefix: Prefix) -> dict[str, Tensor]:
        """The tensors of the entry of a prefix."""
        tensors = {name: getattr(prefix, name) for name in PREFIX_TENSORS}
        if self.cache_dtype != "full":
            for name in _VECTORS:
                packed = pack(tensors[name], self.cache_dtype)
                tensors |= {name: packed.codes, f"{name}_scales": packed.scales}
        return tensors

    def _unpack(self, tensors: Mapping[str, Tensor]) -> Prefix:
        """The inverse of `_pack`, as exact as the storage is. Raises ValueError for tensors that it does not give."""
        vectors = {name: tensors[name] for name in _VECTORS if name in tensors}
        names = set(PREFIX_TENSORS)
        if self.cache_dtype != "full":
            names |= {f"{name}_scales" for name in _VECTORS}
            for name, codes in vectors.items():
                scales = tensors.get(f"{name}_scales")
                if scales is None or codes.dtype != KINDS[self.cache_dtype]:
                    raise ValueError(f"{name} are not stored as {self.cache_dtype}")
                vectors[name] = Packed(codes, scales).unpack(self.family.dtype)
                check_range(f"{name}_scales", scales, 0)
        if tensors.keys() != names:
            raise ValueError(f"it holds {', '.join(sorted(tensors))}, not {', '.join(sorted(names))}")
        return Prefix(tensors["ids"], **vectors)

    def _to_bytes(self, key: str, tensors: Mapping[str, Tensor], images: Sequence[EncodedImage]) -> bytes:
        """The entry. Its fields are those of an encoded image, as far as `gridprune cache` lists them."""
        header = {
            "kind": "prefix",
            "schema": layout.SCHEMA,
            "key": key,
            "model": self.family.checkpoint.name,
            "image": ", ".join(image.image for image in images),
            "name": f"prefix of {', '.join(image.name for image in images)}",
            "encoder": self.identity,
            "tokens": len(tensors["ids"]),
        }
        return files.encode({name: raw_tensor(tensor) for name, tensor in tensors.items()}, header)

    def _from_parts(self, header: dict[str, Any], raw: dict[str, RawTensor], ids: Tensor) -> Prefix:
        """The inverse of `_to_bytes`. Raises ValueError for what is none of this model's, or of other token ids."""
        prefix = self._unpack(load_tensors(raw))
        check_prefix(header, {name: getattr(prefix, name) for name in PREFIX_TENSORS})
        if prefix.depth != self.family.relevance_depth or (reason := misfit(self.family, prefix)):
            raise ValueError(f"{prefix.depth} layers" if prefix.depth != self.family.relevance_depth else reason)
        if prefix.keys.dtype != self.family.dtype or not torch.equal(prefix.ids, ids):
            raise ValueError("of another dtype, or other token ids")
        return prefix
