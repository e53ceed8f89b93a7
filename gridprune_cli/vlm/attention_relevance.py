"""Relevance from the language model's attention: which visual tokens the question looks at, in a middle layer.

    a_i = max_{h, t} A_{h, t, i}        r_i = min(1, (a_i - min a) / (c - min a))

A is the attention of head h and text token t to visual token i in the last of the `relevance_depth` first layers, t all
tokens behind the last image, with the end of the chat prompt, which collects what the answer needs. c is the attention
below which all but one in a hundred tokens are, so that the few *sinks* that large models attend to whatever is asked
(arXiv 2503.03321) don't set the scale. What GridPrune (arXiv 2511.10081) does for towers without a text tower is in
nothing that was read of it; this is ours. Chosen on tuning seeds of the synthetic scenes, see docs/method.md.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gridprune_cli.errors import BadInput
from gridprune_cli.tokens import EncodedImage, Prefix
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.prefix import attend_images, prefix_length

SINKS = 100  # one token in so many may have more than c; where there are no sinks, as in the scenes, it changes nothing


def attention_relevance(
    family: Family,
    prompts: Sequence[Tensor],
    images: Sequence[Sequence[EncodedImage]],
    one_scale: Sequence[bool],
    find_prefix: Callable[[Tensor, Sequence[EncodedImage]], Prefix] | None = None,
) -> list[list[Tensor]]:
    """The relevance of each image's visual tokens to the text behind the images: `(N,)` float32 in 0..1, on the CPU.

    `prompts` are token ids `(L,)` with all placeholders, each with its images. Each image has a scale of its own, or
    all of a prompt's have one, as `one_scale` says of each prompt. `find_prefix` gives the prefix of a prompt and its
    images, of `relevance_depth` layers; without it all of each prompt goes through the layers. Raises BadInput where
    there is no text behind the last image, GridpruneError as `attend_images`.
    """
    if any(prefix_length(family, prompt) == len(prompt) for prompt in prompts):
        raise BadInput(
            "relevance from attention is that of the text behind the last image, and there is none; put the question "
            "behind it",
            field="template",
        )
    depth = family.relevance_depth
    attention = attend_images(family, prompts, images, depth, find_prefix, heads="max", queries="max")
    return [_scale_images(*of_prompt) for of_prompt in zip(attention, one_scale, strict=True)]


def join_relevance(by_clip: Sequence[Tensor], by_attention: Sequence[Tensor], one_scale: bool) -> list[Tensor]:
    """Half of CLIP's relevance and half of attention's, of each image `(N,)` in 0..1.

    CLIP's cosines are brought linearly to 0..1, as attention is already: of each image, or of all with `one_scale`.
    CLIP rates all that the question names, attention what the model looks at for its answer.
    """
    joined = torch.cat(list(by_clip)).split(sum(map(len, by_clip)) if one_scale else [len(r) for r in by_clip])
    scaled = torch.cat([_min_max(relevance.float()) for relevance in joined]).split([len(r) for r in by_clip])
    return [(clip + attention) / 2 for clip, attention in zip(scaled, by_attention, strict=True)]


def _min_max(values: Tensor) -> Tensor:
    """Values `(N,)`, brought linearly to 0..1: 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


def _scale_images(attention: Sequence[Tensor], one_scale: bool) -> list[Tensor]:
    """Attention to each image's visual tokens `(N,)`, brought to 0..1: each image's by itself, or all on one scale."""
    if one_scale:
        return list(scale_attention(torch.cat(list(attention))).split([len(of_image) for of_image in attention]))
    return [scale_attention(of_image) for of_image in attention]


def scale_attention(attention: Tensor) -> Tensor:
    """Attention `(N,)`, brought linearly to 0..1: 0 where all of it is equal. The highest hundredth becomes 1."""
    ascending = attention.sort().values
    low, high = ascending[0], ascending[-1 - (len(attention) - 1) // SINKS]
    if high <= low:  # but for a few, all are equal
        high = ascending[-1]
    return ((attention - low) / (high - low).clamp(min=torch.finfo(attention.dtype).tiny)).clamp(max=1)
