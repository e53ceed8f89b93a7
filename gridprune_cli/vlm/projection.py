"""Vision features to the image embeds that a prompt's placeholders stand for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gridprune_cli.vlm.family import Family


def project(family: Family, wanted: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For each pair of vision features `(N, C)` and placeholder map `(S,)` the image embeds `(S, D)`, separators too.

    All of them go through the projector together.
    """
    are_tokens = [placeholder_map >= 0 for _, placeholder_map in wanted]  # (S,) bool each
    features = [
        vision_features[placeholder_map[is_token]]
        for (vision_features, placeholder_map), is_token in zip(wanted, are_tokens, strict=True)
    ]
    projected = list(family.project(concatenate(features)).split([len(chunk) for chunk in features]))
    for n, is_token in enumerate(are_tokens):
        if not bool(is_token.all()):
            embeds = family.separator().to(projected[n].dtype).repeat(len(is_token), 1)  # (S, D)
            embeds[is_token] = projected[n]
            projected[n] = embeds
    return projected


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors in turn as one; a single one as it is, since concatenating would copy it."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
