"""Prompts that go on from their cached prefixes: only the text behind the last image goes through the first layers.

The first d layers run that text against the prefixes' keys and values. At layer d the prefixes' hidden states are put
in front of the text's, and from there on everything is as if the whole prompts had gone through all layers.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.family import Family


class PrefixBatch:
    """The prefixes of a batch of B prompts, and what a layer gets for the prompts as a whole.

    All prefixes have the same d layers. Prompts are laid out as [padding][prefix][padding][text], so that all prefixes
    end at column P, and the last T = L - P columns are text. `generate` may repeat each prompt, as for beams; tensors
    of the model then have B * repeats prompts.

    depth   d
    length  P
    """

    def __init__(
        self, family: Family, model: Any, batch: Sequence[PrunedSet], ids: Tensor, mask: Tensor, positions: Tensor
    ):
        """`ids` and `mask` (B, L) and `positions` (B, L) or (3, B, L) are those of the whole prompts."""
        self.family, self.model = family, model
        self.prefixes = [pruned.prefix for pruned in batch if pruned.prefix is not None]  # of all B
        self.depth = self.prefixes[0].depth
        self.length = max(len(prefix.ids) for prefix in self.prefixes)
        self.ids, self.mask, self.positions = ids, mask, positions
        self._whole: dict[str | None, dict[str, Any]] = {}  # by kind of layer: `arguments`
        self._masks: Any = None  # of the whole prompts: one, or by kind of layer

    def cached(self, number: int) -> int:
        """How many columns a layer's cache holds before the text is run."""
        return self.length if number < self.depth else 0

    def cache(self, repeats: int) -> DynamicCache:
        """A new cache that holds the prefixes in the first d layers, and nothing in the others."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for layer in range(self.depth):
            keys, values = (
                self._stack([getattr(prefix, name)[layer] for prefix in self.prefixes], repeats)
                for name in ("keys", "values")
            )
            cache.update(keys, values, layer)
        return cache

    def prepend_keys(self, keys: Tensor) -> Tensor:
        """The keys (B * repeats, H, L, C) of layer d - 1, also those that its window drops, from the text's."""
        repeats = len(keys) // len(self.prefixes)
        return torch.cat([self._stack([prefix.keys[-1] for prefix in self.prefixes], repeats).to(keys), keys], 2)

    def join(self, hidden: Tensor) -> Tensor:
        """The hidden states (B * repeats, L, D) of the prompts at layer d, from those of their text (.., T, D)."""
        self._whole, self._masks = {}, None  # a new run begins
        stacked = self._stack([prefix.hidden_states for prefix in self.prefixes], len(hidden) // len(self.prefixes))
        return torch.cat([stacked.to(hidden), hidden], 1)

    def arguments(self, number: int, hidden: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer from d on, which gets `hidden` (B * repeats, ., D), for the whole prompts."""
        kind = self._kinds[number] if self._kinds else None
        if kind not in self._whole:
            repeats = len(hidden) // len(self.prefixes)
            positions = self.positions.repeat_interleave(repeats, -2).to(hidden.device)
            if self._masks is None:
                self._masks = self._create_masks(hidden, repeats)
            self._whole[kind] = {
                "position_embeddings": self.family.rotary(hidden, positions, number),
                "attention_mask": self._masks[kind] if isinstance(self._masks, dict) else self._masks,
                "position_ids": positions if positions.dim() == 2 else None,
            }
        return arguments | self._whole[kind]

    @cached_property
    def _kinds(self) -> list[str] | None:
        """The kind of each layer, for models that have several."""
        return getattr(self.model.config.get_text_config(), "layer_types", None)

    def _create_masks(self, hidden: Tensor, repeats: int) -> Any:
        """What the model would make as its masks for the whole prompts: one (B, 1, L, L) or None, or by kind."""
        create: Callable[..., Any] = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)
        ids, mask = (values.repeat_interleave(repeats, 0) for values in (self.ids, self.mask))
        return create(
            config=self.model.config,
            inputs_embeds=hidden.new_empty(len(ids), ids.shape[1], 0),
            attention_mask=None if bool(mask.all()) else mask.to(hidden.device),
            past_key_values=None,
            position_ids=None,
            **{name: values.to(hidden.device) for name, values in self.family.extras(ids).items()},
        )

    def _stack(self, tensors: Sequence[Tensor], repeats: int) -> Tensor:
        """Tensors (.., P_i, C) of the prompts, padded on the left to P: (B * repeats, .., P, C), on the device.

        A prefix that several prompts share crosses to the device once.
        """
        placed: dict[int, Tensor] = {}
        for prefix, tensor in zip(self.prefixes, tensors, strict=True):
            if id(prefix) not in placed:
                missing = self.length - len(prefix.ids)
                placed[id(prefix)] = pad(tensor.to(self.family.device, self.family.dtype), (0, 0, missing, 0))
        whole = [placed[id(prefix)] for prefix in self.prefixes]
        if len(placed) == 1:  # a view, which the first layer that grows copies
            return whole[0].expand(len(whole) * repeats, *whole[0].shape)
        return torch.stack(whole).repeat_interleave(repeats, 0)


def has_sliding_layers(model: Any) -> bool:
    """Whether some layers count columns of the prompt, so that padding between prefix and text would not do."""
    return any(DynamicCache(config=model.config.get_text_config(decoder=True)).is_sliding)
