"""A prompt's prefix through the first layers of the language model, once for all questions, and the attention to it.

In a causal language model nothing up to a prompt's last image depends on the question behind it. So that *prefix* goes
through the first `depth` layers once; a question then runs its few tokens alone against the keys and values that these
layers made of the prefix, and its attention to the image's tokens in the last of them says what it asks about. With the
hidden states that the next layer receives, a prompt also goes on from there: see `vlm.inner`. The numbers are those of
the whole model on the whole prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from gridprune_cli.errors import GridpruneError
from gridprune_cli.tokens import EncodedImage, Prefix
from gridprune_cli.vlm.attention import Combination, watch_queries
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.projection import project


def prefix_length(family: Family, prompt: Tensor) -> int:
    """P of a prompt's token ids `(L,)`: how many tokens there are up to its last placeholder."""
    return int((prompt == family.image_token).nonzero()[-1]) + 1


@torch.inference_mode()
def compute_prefix(family: Family, prompt: Tensor, images: Sequence[EncodedImage], depth: int) -> Prefix:
    """The prefix of a prompt's token ids `(L,)`, on the CPU. Loads the projector and the layers.

    Raises GridpruneError where the layers give values that are not finite.
    """
    ids = prompt[: prefix_length(family, prompt)]
    cache = DynamicCache()
    hidden_states = _run(family, ids, family.positions(ids, images), images, depth, cache)[0].cpu()  # (P, D)
    keys = torch.stack([layer.keys[0].cpu() for layer in cache.layers])  # (d, H, P, C)
    values = torch.stack([layer.values[0].cpu() for layer in cache.layers])
    if not all(bool(torch.isfinite(tensor).all()) for tensor in (keys, values, hidden_states)):
        raise GridpruneError(
            "the language model gave keys, values or hidden states that are not finite; try `dtype=float32`"
        )
    return Prefix(ids, keys, values, hidden_states)


def misfit(family: Family, prefix: Prefix) -> str:
    """Why a prefix is none of this model's, by its shapes; empty where it may be."""
    text, depth = family.config.get_text_config(), prefix.depth
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shape = (depth, text.num_key_value_heads, len(prefix.ids), width)
    for name in ("keys", "values"):
        if tuple(getattr(prefix, name).shape) != shape:
            return f"{name} of {tuple(getattr(prefix, name).shape)}, not {shape}"
    if tuple(prefix.hidden_states.shape) != (len(prefix.ids), text.hidden_size):
        return f"hidden states of {tuple(prefix.hidden_states.shape)}, not {(len(prefix.ids), text.hidden_size)}"
    return "" if 0 < depth < family.depth else f"{depth} layers, where there are {family.depth}"


@torch.inference_mode()
def attend_images(
    family: Family,
    prompt: Tensor,
    images: Sequence[EncodedImage],
    depth: int,
    prefix: Prefix | None = None,
    *,
    heads: Combination = "mean",
    queries: Combination = "mean",
) -> list[Tensor]:
    """Attention that the text behind the last image pays to each image's visual tokens, in layer `depth` - 1.

    For each image `(N,)` float32 on the CPU, in 0..1: the mean or the largest over heads and over the text's tokens.
    `prompt` `(L,)` has text behind its last image. `prefix` is the prompt's own, of this depth; without one, the whole
    prompt goes through the layers, as it must where its image sees the question.
    """
    length = prefix_length(family, prompt)
    positions = family.positions(prompt, images)  # (L,) or (3, L)
    # 1. what goes through the layers, and how much its tokens' attention counts
    cache, ids = DynamicCache(), prompt
    if prefix is not None:
        ids, positions = prompt[length:], positions[..., length:]
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(keys[None].to(family.device), values[None].to(family.device), layer)
    text = len(prompt) - length
    weight = torch.zeros(1, len(ids), device=family.device)
    weight[:, -text:] = 1 / text if queries == "mean" else 1
    # 2. the attention of layer `depth` - 1
    layer = family.first_layers(depth).get_submodule(f"{family.text_model}.layers.{depth - 1}")
    with watch_queries(layer.self_attn, weight, heads, queries) as record:
        _run(family, ids, positions, images if prefix is None else (), depth, cache)
    attention = record[0][0].cpu()  # (L,)
    if not bool(torch.isfinite(attention).all()):
        raise GridpruneError("the language model's attention holds values that are not finite; try `dtype=float32`")
    # 3. of each image its visual tokens
    counts = [len(image.placeholder_map) for image in images]
    of_images = attention[prompt == family.image_token].split(counts)  # (S,) each
    return [
        attention.new_zeros(image.count).index_copy(0, image.placeholder_map[is_token].long(), of_image[is_token])
        for image, of_image in zip(images, of_images, strict=True)
        for is_token in [image.placeholder_map >= 0]
    ]


def _run(
    family: Family, ids: Tensor, positions: Tensor, images: Sequence[EncodedImage], depth: int, cache: DynamicCache
) -> Tensor:
    """Runs tokens `(n,)` through the first layers, behind what the cache holds, as `generate` runs a prompt.

    Gives what the next layer would receive, `(1, n, D)`.
    """
    model, inputs = family.first_layers(depth), ids[None].to(family.device)
    encoder_outputs = {}
    if images:
        embeds = project(family, [(image.vision_features, image.placeholder_map) for image in images])
        encoder_outputs["mm_encoder_outputs"] = {"image": family.features([torch.cat(embeds)])}
    out = model.model(
        input_ids=inputs,
        position_ids=positions[..., None, :].to(family.device),
        past_key_values=cache,
        use_cache=True,
        **encoder_outputs,
        **(family.extras(inputs) if images else {}),
    )
    hidden_states: Tensor = out.last_hidden_state
    return hidden_states
