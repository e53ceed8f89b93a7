"""Placeholders: the image tokens of a prompt, and which of them stay when visual tokens are dropped."""

import torch
from torch import Tensor

SEPARATOR = -1  # in a placeholder map: stands for no visual token, as the newline behind a row of tiles


def staying(placeholder_map: Tensor, kept: Tensor, count: int) -> Tensor:
    """(S,) bool: which placeholders stay when of `count` visual tokens the `kept` (K,) ones do.

    placeholder_map (S,) holds each placeholder's visual token, or `SEPARATOR`. A separator closes the run of
    placeholders behind the separator before it, or behind the start, and stays where a token of its run is kept. So a
    row of tiles of which nothing is kept leaves no newline behind. The first row's run also has the tokens of the base
    view before it. A separator whose run has no token at all stays. Separators are no part of K.
    """
    stays = torch.zeros(count, dtype=torch.bool)
    stays[kept] = True
    separator = placeholder_map == SEPARATOR
    if not bool(separator.any()):
        return stays[placeholder_map.long()]
    token_stays = stays[placeholder_map.long().clamp(min=0)] & ~separator
    run = separator.long().cumsum(0) - separator.long()  # each separator closes its run
    bare = torch.zeros(int(run[-1]) + 1, dtype=torch.long)
    lost = (bare.index_add(0, run, token_stays.long()) == 0) & (bare.index_add(0, run, (~separator).long()) > 0)
    return token_stays | (separator & ~lost[run])
