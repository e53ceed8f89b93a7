"""Masks and position embeddings of a layer, cut to what is still in the sequence. Pure functions.

q are the queries of a call, n what remains of the prompt, and masks are `(B, heads or 1, q, keys)`.
"""

from typing import Any

import torch
from torch import Tensor

from gridprune_cli.vlm.inner.prompt import Remaining


def cut_embeddings(embeddings: tuple[Tensor, ...], remaining: Remaining) -> tuple[Tensor, ...]:
    """Position embeddings `(B or 1, L, C)` of the whole prompt for what remains of it, `(B, n, C)`."""
    places = remaining.places[..., None]
    return tuple(
        values.expand(len(places), -1, -1).gather(1, places.expand(-1, -1, values.shape[-1])) for values in embeddings
    )


def cut_prefill_mask(
    mask: Tensor | None, remaining: Remaining, hidden: Tensor, *, causal: bool, eager: bool
) -> Tensor | None:
    """The mask `(B, 1, L, L)` of the whole prompt for what remains of it, `(B, 1, n, n)`.

    None stands for a causal mask, or where the layer is not causal for none. `hidden` tells dtype and device.
    """
    places, n = remaining.places, remaining.length
    padding = ~remaining.valid[:, None, None]  # (B, 1, 1, n)
    if mask is None:
        if not remaining.padded:
            return None
        sees = torch.ones(n, n, dtype=torch.bool, device=places.device)
        return as_mask((sees.tril() if causal else sees) & ~padding, hidden.dtype, eager=eager)
    mask = mask.expand(len(places), -1, -1, -1)
    mask = mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, places[:, None, None].expand(-1, mask.shape[1], n, -1))  # (B, 1, n, n)
    if not remaining.padded:
        return mask
    return mask.masked_fill(padding, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def decode_mask(
    new: int, answer: int, layer_cache: Any, prompt_length: int, remaining: Remaining, hidden: Tensor, *, eager: bool
) -> Tensor | None:
    """What `new` tokens, the last of `answer` tokens of the answer, see of a layer's cache and of each other.

    A sliding window counts places of the whole prompt, of `prompt_length`. None where they see everything.
    """
    window = layer_cache.sliding_window if layer_cache.is_sliding else None
    if new == 1 and not remaining.padded and (window is None or prompt_length + answer <= window):
        return None
    ahead = torch.arange(prompt_length, prompt_length + answer, device=hidden.device)
    ahead = ahead.expand(len(remaining.places), -1)  # (B, answer)
    places = torch.cat([remaining.places, ahead], 1)
    valid = torch.cat([remaining.valid, torch.ones_like(ahead, dtype=torch.bool)], 1)
    keys = layer_cache.get_mask_sizes(new)[0]
    distance = places[:, -new:, None] - places[:, None, -keys:]  # (B, q, keys)
    sees = valid[:, None, -keys:] & (distance >= 0)
    if window is not None:
        sees &= distance < window
    return as_mask(sees[:, None], hidden.dtype, eager=eager)


def as_mask(sees: Tensor, dtype: torch.dtype, *, eager: bool) -> Tensor:
    """A mask that is true where a query may look, in the form that the attention takes: eager attention adds it."""
    if not eager:
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
