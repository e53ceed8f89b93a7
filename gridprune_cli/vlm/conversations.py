"""Keys and values of conversations, so that a turn runs only the tokens that the turn before has not.

A turn's prompt begins with the prompt and the answer of the turn before it, as far as the chat template writes them
alike. Where the visual tokens are the same, too, what the language model made of all that stays true: a token's keys
and values depend on nothing behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.family import Family

MAX_BYTES = 1 << 30  # of keys and values that are held beside those of the latest turn
_OPTIONS = {  # of `generate` that choose tokens, and no cache
    *("do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
}


@dataclass(frozen=True)
class _Turn:
    """What the language model has gone through for a turn: M tokens of prompt and answer.

    ids        (M,), positions (M,) or (3, M)
    embeds     (S, D), the image embeds of its placeholders
    cache      keys and values of all layers
    """

    fingerprint: str
    ids: Tensor
    positions: Tensor
    embeds: Tensor
    cache: DynamicCache

    def shared(self, pruned: PrunedSet, positions: Tensor, image_token: int) -> int:
        """How many tokens at the beginning of a set's prompt are these. 0 where not all its image tokens are."""
        if pruned.fingerprint != self.fingerprint:
            return 0
        most = min(len(self.ids), len(pruned.input_ids) - 1)  # one is run at least, for the logits behind it
        same = self.ids[:most] == pruned.input_ids[:most]
        same &= (self.positions[..., :most] == positions[..., :most]).reshape(-1, most).all(0)
        count = int(same.long().cumprod(0).sum())
        images = (pruned.input_ids == image_token).nonzero()
        if len(images) and count <= int(images[-1]):
            return 0
        return count if torch.equal(self.embeds, pruned.image_embeds) else 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.cache.layers for tensor in (layer.keys, layer.values))


class Conversations:
    """The keys and values of the latest turns of conversations, on the model's device.

    max_bytes  of those beside the latest
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._turns: list[_Turn] = []  # the latest last

    def take(self, pruned: PrunedSet, positions: Tensor, image_token: int) -> DynamicCache:
        """What is held of a set's prompt, with `positions` (L,) or (3, L): the keys and values of its first tokens.

        An empty one, where there is nothing. It is held no longer, since who takes it adds to it.
        """
        counts = [turn.shared(pruned, positions, image_token) for turn in self._turns]
        if not any(counts):
            return DynamicCache()
        best = max(range(len(counts)), key=counts.__getitem__)
        cache = self._turns.pop(best).cache
        if surplus := max(0, cache.get_seq_length() - counts[best]):
            cache.crop(-surplus)  # negative: how many to remove
        return cache

    def put(self, pruned: PrunedSet, positions: Tensor, ids: Tensor, cache: DynamicCache) -> None:
        """Holds what has become of a cache: the keys and values of a prompt and its answer, `ids` (M,)."""
        length = cache.get_seq_length()  # that of the last token was not needed
        following = positions[..., -1:] + 1 + torch.arange(max(0, length - positions.shape[-1]))
        turn = _Turn(
            pruned.fingerprint,
            ids[:length].cpu(),
            torch.cat([positions, following], -1)[..., :length],
            pruned.image_embeds,
            cache,
        )
        self._turns.append(turn)
        while len(self._turns) > 1 and sum(turn.nbytes for turn in self._turns[:-1]) > self._max_bytes:
            del self._turns[0]


def can_continue(family: Family, pruned: PrunedSet, model: Any, options: Mapping[str, Any]) -> bool:
    """Whether the keys and values of a set's prompt are in one plain cache, of all its tokens in all layers.

    They are not where tokens leave inside the language model, or `options` of `generate` or the checkpoint's own ask
    for beams or another cache. Where the image sees the question, they are those of that question alone.
    """
    if family.sees_question:
        return False
    settings = model.generation_config
    plain = settings.num_beams in (None, 1) and settings.cache_implementation is None
    return plain and pruned.schedule is None and pruned.prefix is None and options.keys() <= _OPTIONS
