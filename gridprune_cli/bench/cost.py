"""The cost of a language model's answer from its sizes alone: operations and bytes of the prefill, and its roofline.

The formulas count matrix products, two operations per multiply-add. They fit decoders whose layers have grouped-query
attention and a gated MLP of three matrices, as those of all families here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """Sizes of a language model.

    windows  for each layer, how many of the last tokens it looks at; None for all of them
    """

    width: int  # d
    heads: int  # H
    kv_heads: int  # KV
    head_width: int  # h
    mlp_width: int  # m
    vocabulary: int  # V
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any) -> "Decoder":
        """From a model's config, of transformers."""
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        return cls(
            width=text.hidden_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            mlp_width=text.intermediate_size,
            vocabulary=text.vocab_size,
            windows=tuple(text.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        )

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def layer_weights(self) -> int:
        """How many weights the matrices of a layer have: of queries and outputs, of keys and values, of the MLP."""
        inner = self.heads * self.head_width
        return self.width * (2 * inner + 2 * self.kv_heads * self.head_width + 3 * self.mlp_width)


@dataclass(frozen=True)
class Rates:
    """What a machine reaches: operations a second, and bytes a second."""

    flops: float
    nbytes: float


@dataclass(frozen=True)
class Step:
    """A step of the prefill: its operations, and the bytes that it can't do without reading."""

    flops: int
    nbytes: float


def prefill_flops(decoder: Decoder, tokens: Sequence[int], run: Sequence[int] | None = None) -> int:
    """Operations until the first new token, with n = tokens[l] tokens in layer l, of which q = run[l] are run.

        sum over layers of  4 q d H h + 4 q d KV h + 4 q n H h + 6 q d m,  and 2 d V for the logits of the last token

    The others' keys and values are there already, those of a prefix; without `run` all are run. The terms are the
    projections of queries and outputs, those of keys and values, attention, and the MLP. Attention is counted in full,
    every token with every other, as torch's own counter does; kernels that leave out what a causal mask hides do half
    of that term. Raises ValueError where there is not a count for each layer.
    """
    return sum(step.flops for step in prefill_steps(decoder, tokens, run))


def prefill_steps(
    decoder: Decoder,
    tokens: Sequence[int],
    run: Sequence[int] | None = None,
    *,
    itemsize: int = 2,
    weight_bytes: float | None = None,
) -> list[Step]:
    """The steps of a prefill: for each layer its matrices and its attention, and the logits. Tokens as `prefill_flops`.

    itemsize      bytes of a value in the dtype that is computed in, in which keys, values and the head's weights are
    weight_bytes  bytes of a weight of the layers, scales among it, where they are quantised

    Bytes are those of the weights and of n tokens' keys and values. What goes from one step to the next is left out:
    it is less than a tenth of them for prompts of some hundred tokens, and stays in a cache for the most part. Raises
    ValueError where there is not a count for each layer.
    """
    run = tokens if run is None else run
    _check(decoder, tokens)
    _check(decoder, run)
    weights, inner = decoder.layer_weights, decoder.heads * decoder.head_width
    held = 2 * decoder.kv_heads * decoder.head_width * itemsize  # of a token's keys and values
    steps = []
    for n, q in zip(tokens, run, strict=True):
        steps.append(Step(2 * q * weights, weights * (itemsize if weight_bytes is None else weight_bytes)))
        steps.append(Step(4 * q * n * inner, n * held))
    head = decoder.width * decoder.vocabulary
    return [*steps, Step(2 * head, head * itemsize)]


@dataclass(frozen=True)
class Roofline:
    """Seconds of steps one after the other, at a machine's rates.

    overlapped  the least: each step reads while it computes, and takes as long as the slower of both
    apart       where each step reads first, and computes then
    reading     of these, those in which it reads
    """

    overlapped: float
    apart: float
    reading: float

    @classmethod
    def of(cls, steps: Sequence[Step], rates: Rates) -> "Roofline":
        computing = [step.flops / rates.flops for step in steps]
        reading = [step.nbytes / rates.nbytes for step in steps]
        return cls(sum(map(max, computing, reading)), sum(computing) + sum(reading), sum(reading))


def kv_bytes(decoder: Decoder, tokens: Sequence[int], itemsize: int) -> int:
    """Bytes of the keys and values of tokens[l] tokens in layer l, with `itemsize` bytes a value.

        sum over layers of  2 KV h min(n, window - 1) itemsize

    A layer with a window keeps one token less than it looks at: the next one comes with the next step. Raises
    ValueError where there is not a count for each layer.
    """
    _check(decoder, tokens)
    held = sum(n if window is None else min(n, window - 1) for n, window in zip(tokens, decoder.windows, strict=True))
    return 2 * decoder.kv_heads * decoder.head_width * itemsize * held


def _check(decoder: Decoder, tokens: Sequence[int]) -> None:
    if len(tokens) != decoder.layers:
        raise ValueError(f"{len(tokens)} counts of tokens for {decoder.layers} layers")
