"""Slots: the image tokens of a prompt, and which of them stay when visual tokens go."""

import torch
from torch import Tensor

SEPARATOR = -1  # a slot that stands for no visual token: the newline behind a row of tiles


def staying(placeholder_map: Tensor, kept: Tensor, count: int) -> Tensor:
    """(S,) bool: which slots stay when of `count` visual tokens the `kept` (K,) ones do.

    slots (S,) holds each slot's visual token, or `SEPARATOR`. A separator stays where a token of its run does: the
    slots between the separator before it, or the start, and itself. So a row of which nothing is kept leaves no
    newline behind, but for the first behind a base view, whose tokens are part of its run; one of a row that never had
    a token stays. Separators are no part of K.
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
