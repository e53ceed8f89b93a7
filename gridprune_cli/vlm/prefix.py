"""A prompt's prefix through the first layers of the language model, once for all questions, and the attention to it.

In a causal language model nothing up to a prompt's last image depends on the question behind it. So that *prefix* goes
through the first `depth` layers once; a question then runs its few tokens alone against the keys and values that these
layers made of the prefix, and its attention to the image's tokens in the last of them says what it asks about. With the
hidden states that the next layer receives, a prompt also goes on from there: see `vlm.inner`. The numbers are those of
the whole model on the whole prompt.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from gridprune_cli.errors import GridpruneError
from gridprune_cli.tokens import EncodedImage, Prefix
from gridprune_cli.vlm.attention import Combination, watch_queries
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.projection import project
from gridprune_cli.vlm.relevance import FULL

MAX_BYTES = 1 << 30  # that a batch of questions may hold at once: the prefixes, and what one layer makes of the batch


def prefix_length(family: Family, prompt: Tensor) -> int:
    """P of a prompt's token ids `(L,)`: how many tokens there are up to its last placeholder."""
    return int((prompt == family.image_token).nonzero()[-1]) + 1


def keys_shape(family: Family, depth: int, length: int) -> tuple[int, int, int, int]:
    """(d, H, P, C): the shape of the keys, and of the values, of a prefix of `length` tokens in `depth` layers."""
    text = family.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return depth, text.num_key_value_heads, length, width


@torch.inference_mode()
def compute_prefix(family: Family, prompt: Tensor, images: Sequence[EncodedImage], depth: int) -> Prefix:
    """The prefix of a prompt's token ids `(L,)`, on the CPU. Loads the projector and the layers.

    Raises GridpruneError where the layers give values that are not finite.
    """
    ids = prompt[: prefix_length(family, prompt)]
    cache = DynamicCache()
    positions = family.positions(ids, images)[..., None, :]  # (1, P) or (3, 1, P)
    hidden_states = _run(family, ids[None], None, positions, [images], depth, cache)[0].cpu()  # (P, D)
    keys = torch.stack([layer.keys[0].cpu() for layer in cache.layers])  # (d, H, P, C)
    values = torch.stack([layer.values[0].cpu() for layer in cache.layers])
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (keys, values, hidden_states)):
        raise GridpruneError(
            "the language model gave keys, values or hidden states that are not finite; try `dtype=float32`"
        )
    return Prefix(ids, keys, values, hidden_states)


def misfit(family: Family, prefix: Prefix) -> str:
    """Why a prefix is none of this model's, by its shapes; empty where it may be."""
    depth, shape = prefix.depth, keys_shape(family, prefix.depth, len(prefix.ids))
    for name in ("keys", "values"):
        if tuple(getattr(prefix, name).shape) != shape:
            return f"{name} of {tuple(getattr(prefix, name).shape)}, not {shape}"
    hidden = len(prefix.ids), family.text_config.hidden_size
    if tuple(prefix.hidden_states.shape) != hidden:
        return f"hidden states of {tuple(prefix.hidden_states.shape)}, not {hidden}"
    return "" if 0 < depth < family.depth else f"{depth} layers, where there are {family.depth}"


@torch.inference_mode()
def attend_images(
    family: Family,
    prompts: Sequence[Tensor],
    images: Sequence[Sequence[EncodedImage]],
    depth: int,
    find_prefix: Callable[[Tensor, Sequence[EncodedImage]], Prefix] | None = None,
    *,
    heads: Combination = "mean",
    queries: Combination = "mean",
) -> list[list[Tensor]]:
    """Attention that the text behind each prompt's last image pays to its visual tokens, in layer `depth` - 1.

    For each prompt, for each of its images, `(N,)` float32 on the CPU, in 0..1: the mean or the largest over heads and
    over the text's tokens. Each of the prompts `(L,)` has text behind its last image. `find_prefix` gives the prefix of
    a prompt and its images, of this depth, and is asked for those of one batch at a time. Without it, whole prompts go
    through the layers, as they must where an image sees the question. Raises GridpruneError for values that are not
    finite.
    """
    attention: dict[int, list[Tensor]] = {}
    for batch in _batches(family, prompts, images, depth, shared=find_prefix is not None):
        of_batch = [(prompts[n], images[n]) for n in batch]
        prefixes = None if find_prefix is None else [find_prefix(*pair) for pair in of_batch]
        attention |= zip(batch, _attend_batch(family, of_batch, depth, prefixes, heads, queries), strict=True)
    return [attention[n] for n in range(len(prompts))]


def align(
    prompts: Sequence[Tensor], positions: Sequence[Tensor], lengths: Sequence[int], filler: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of which the first `lengths` tokens are in a cache, as one batch: [padding][prefix][padding][text].

    So prefixes end in one column P, and texts in another. Gives the token ids `(B, T)` of the texts, padded with
    `filler`, the mask `(B, P + T)`, which is 0 in both paddings, and the texts' positions `(B, T)` or `(3, B, T)`.
    A layer with a sliding window counts columns: there all texts must be of one length.
    """
    texts = [prompt[length:] for prompt, length in zip(prompts, lengths, strict=True)]
    places = [of_prompt[..., length:] for of_prompt, length in zip(positions, lengths, strict=True)]
    are_tokens = [
        pad_left([torch.ones(count, dtype=torch.long) for count in counts], 0)
        for counts in (lengths, [len(text) for text in texts])
    ]
    return pad_left(texts, filler), torch.cat(are_tokens, 1), pad_left(places, 0).movedim(0, -2)


def pad_left(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors `(..., n)` as one `(B, ..., longest n)`, the shorter ones padded in front."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([pad(tensor, (longest - tensor.shape[-1], 0), value=value) for tensor in tensors])


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values of a batch's prefixes, padded on the left to the longest, P tokens.

    At each call the batch is put together anew, in front of the call's own keys and values, which are not kept. So only
    one layer's are copied at a time, and prompts of one prefix share it until then, also on its way to the device.
    """

    def __init__(self, prefixes: Sequence[Prefix], layer: int) -> None:
        super().__init__()
        self.prefixes, self.layer = prefixes, layer
        self.is_initialized = True
        self.length = max(len(prefix.ids) for prefix in prefixes)  # P

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._join("keys", key_states), self._join("values", value_states)

    def _join(self, name: str, of_call: Tensor) -> Tensor:
        """(B, H, P + n, C) of the prefixes' keys or values `(H, p, C)` each, and the call's `(B, H, n, C)`."""
        batch, heads, count, width = of_call.shape
        joined = of_call.new_empty(batch, heads, self.length + count, width)
        distinct = {id(prefix): prefix for prefix in self.prefixes}
        placed = {place: getattr(prefix, name)[self.layer].to(of_call.device) for place, prefix in distinct.items()}
        for of_prompt, prefix in zip(joined, self.prefixes, strict=True):
            of_prefix = placed[id(prefix)]
            start = self.length - of_prefix.shape[1]
            of_prompt[:, :start] = 0
            of_prompt[:, start : self.length] = of_prefix
        joined[:, :, self.length :] = of_call
        return joined


def _attend_batch(
    family: Family,
    batch: Sequence[tuple[Tensor, Sequence[EncodedImage]]],
    depth: int,
    prefixes: Sequence[Prefix] | None,
    heads: Combination,
    queries: Combination,
) -> list[list[Tensor]]:
    """`attend_images` of prompts and their images that go through the layers together, with their prefixes."""
    prompts, images = [prompt for prompt, _ in batch], [of_prompt for _, of_prompt in batch]
    # 1. what goes through the layers
    lengths = [len(prefix.ids) for prefix in prefixes] if prefixes else [0] * len(batch)
    positions = [family.positions(*pair) for pair in batch]  # (L,) or (3, L) each
    ids, mask, places = align(prompts, positions, lengths, family.filler)  # (B, T), (B, P + T), (B, T) or (3, B, T)
    cache = Cache(layers=[_PrefixLayer(prefixes, layer) for layer in range(depth)]) if prefixes else None
    # 2. how much the attention of its tokens counts
    weight = torch.zeros(ids.shape)
    for of_prompt, prompt in zip(weight, prompts, strict=True):
        text = len(prompt) - prefix_length(family, prompt)
        of_prompt[-text:] = 1 / text if queries == "mean" else 1
    # 3. the attention of layer `depth` - 1
    layer = family.first_layers(depth).get_submodule(f"{family.text_model}.layers.{depth - 1}")
    with watch_queries(layer.self_attn, weight.to(family.device), heads, queries) as record:
        _run(family, ids, mask, places, None if prefixes else images, depth, cache)
    attention = record[0].cpu()  # (B, P + T)
    if not bool(torch.isfinite(attention).all()):
        raise GridpruneError("the language model's attention holds values that are not finite; try `dtype=float32`")
    # 4. of each prompt the visual tokens of its images
    of_prompts = []
    for (prompt, of_prompt), to_keys, is_token in zip(batch, attention, mask.bool(), strict=True):
        to_images = to_keys[is_token][prompt == family.image_token]  # (S,), of all its images
        of_images = to_images.split([len(image.placeholder_map) for image in of_prompt])
        of_prompts.append([_of_tokens(*pair) for pair in zip(of_prompt, of_images, strict=True)])
    return of_prompts


def _of_tokens(image: EncodedImage, of_placeholders: Tensor) -> Tensor:
    """Values `(N,)` of an image's visual tokens, from those `(S,)` of its placeholders."""
    is_token = image.placeholder_map >= 0
    tokens = image.placeholder_map[is_token].long()
    return of_placeholders.new_zeros(image.count).index_copy(0, tokens, of_placeholders[is_token])


def _batches(
    family: Family,
    prompts: Sequence[Tensor],
    images: Sequence[Sequence[EncodedImage]],
    depth: int,
    *,
    shared: bool,
) -> Iterator[list[int]]:
    """Indices of the prompts that go through the layers at once, within `MAX_BYTES`; those of one prefix in turn.

    `shared`: their prefixes are there; else the whole prompts go through.
    """
    text, itemsize = family.text_config, family.dtype.itemsize
    of_token = 2 * math.prod(keys_shape(family, 1, 1)) * itemsize  # its key and value in one layer
    of_prefix = depth * of_token + text.hidden_size * itemsize  # for each token of it
    of_query = 8 * text.hidden_size * itemsize  # what a layer's feed-forward network makes of it, about
    ends = [prefix_length(family, prompt) if shared else 0 for prompt in prompts]
    texts = [len(prompt) - end for prompt, end in zip(prompts, ends, strict=True)]
    slides = shared and any(kind != FULL for kind in (getattr(text, "layer_types", None) or [])[:depth])

    def order(n: int) -> tuple[Any, ...]:
        return texts[n] if slides else 0, ends[n], [image.key for image in images[n]]

    def size(batch: Sequence[int]) -> int:
        """Bytes of the batch in one layer, and of its prefixes in all."""
        queries = max(texts[n] for n in batch)
        in_layer = len(batch) * (of_token * (max(ends[n] for n in batch) + queries) + of_query * queries)
        distinct = {(ends[n], *(image.key for image in images[n])): ends[n] for n in batch}
        return in_layer + of_prefix * sum(distinct.values())

    batch: list[int] = []
    for n in sorted(range(len(prompts)), key=order):
        if batch and (size([*batch, n]) > MAX_BYTES or (slides and texts[n] != texts[batch[0]])):
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _run(
    family: Family,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    images: Sequence[Sequence[EncodedImage]] | None,
    depth: int,
    cache: Cache | None,
) -> Tensor:
    """Runs tokens `(B, n)` through the first layers, behind what the cache holds, as `generate` runs prompts.

    `mask` is (B, P + n), `positions` are (B, n) or (3, B, n). `images` are those whose placeholders are among the
    tokens, for each prompt. Gives what the next layer would receive, `(B, n, D)`.
    """
    inputs = ids.to(family.device)
    encoder_outputs = {}
    if images:
        embeds = project(family, [(i.vision_features, i.placeholder_map) for of_prompt in images for i in of_prompt])
        of_images = iter(embeds)
        of_prompts = [torch.cat([next(of_images) for _ in of_prompt]) for of_prompt in images]
        encoder_outputs["mm_encoder_outputs"] = {"image": family.features(of_prompts)}
    out = family.first_layers(depth).model(
        input_ids=inputs,
        attention_mask=None if mask is None else mask.to(family.device),
        position_ids=positions.to(family.device),
        past_key_values=cache,
        use_cache=cache is not None,
        **encoder_outputs,
        **(family.extras(inputs) if images else {}),
    )
    hidden_states: Tensor = out.last_hidden_state
    return hidden_states
