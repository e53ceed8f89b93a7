"""From pruned sets to text: the language model alone, driven through transformers' own `generate`.

Image embeds take the place of what the vision tower would give. What leaves inside the language model does so by hooks,
in `vlm.inner`.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from gridprune_cli.errors import BadInput
from gridprune_cli.settings import parse_pairs
from gridprune_cli.text import visible
from gridprune_cli.tokens import Prefix, PrunedSet
from gridprune_cli.vlm.conversations import Conversations, can_continue
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.inner import PrefixBatch, has_sliding_layers, prune_inside
from gridprune_cli.vlm.prefix import misfit, pad_left

# Given at each call, since a checkpoint's own settings may differ: training leaves `use_cache: false` behind.
_FIXED = {
    "num_return_sequences": (1, "a question has one answer"),
    "return_dict_in_generate": (False, "a question has one answer"),
    "use_cache": (True, "without the cache each step would read image tokens as words"),
}
MAX_BEAMS = 256  # each holds a KV cache of its own

Watcher = Callable[[Sequence[int]], bool]
"""Gets the token ids of an answer so far, after each new one. True ends the answer there."""


@dataclass(frozen=True)
class Generated:
    """The answer, its token ids, and milliseconds of its batch until the first token and from there to the end.

    ended  whether the model ended it, with an end token that is the last of `ids`
    """

    text: str
    ids: tuple[int, ...]
    prefill: float
    decode: float
    ended: bool = True


class _Clock(LogitsProcessor):
    """Notes when the first logits came. Changes nothing."""

    first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.first is None:
            if scores.is_cuda:
                torch.cuda.synchronize()
            self.first = time.perf_counter()
        return scores


class _Stream(TextStreamer):
    """Writes the answer to a stream as it comes; what a terminal would obey in it is made visible."""

    def __init__(self, tokenizer: Any, stream: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(visible(text), end="\n" if stream_end else "", file=self._stream, flush=True)


class _Watch(StoppingCriteria):
    """Shows each answer of a batch to its watcher, and ends those whose watcher says so.

    answers  token ids of each, up to its end: without what fills it up to the longest of the batch
    """

    def __init__(self, watchers: Sequence[Watcher], stops: set[int | None]):
        self.answers: list[list[int]] = [[] for _ in watchers]
        self._watchers, self._stops = watchers, stops
        self._ended = [False] * len(watchers)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """(B,) whether each answer has ended, from ids (B, L + tokens so far)."""
        for i, token in enumerate(input_ids[:, -1].tolist()):
            if not self._ended[i]:
                self.answers[i].append(token)
                wanted = self._watchers[i](self.answers[i])  # also of the end token, which may end a piece of text
                self._ended[i] = wanted or token in self._stops
        return torch.tensor(self._ended, device=input_ids.device)


def prompts(family: Family, batch: Sequence[PrunedSet]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids `(B, L)`, mask `(B, L)` and positions `(B, L)` or `(3, B, L)` of the prompts, padded on the left.

    The prefixes of prompts that have one end at the same column; what follows these is padded on its left again.
    """
    lengths = [len(pruned.prefix.ids) if pruned.prefix else 0 for pruned in batch]

    def pad_halves(tensors: list[Tensor], value: int) -> Tensor:
        halves = [tensor.tensor_split([length], -1) for tensor, length in zip(tensors, lengths, strict=True)]
        # the prefixes, and the rest
        return torch.cat([pad_left(half, value) for half in zip(*halves, strict=True)], -1).to(family.device)

    ids = pad_halves([pruned.input_ids for pruned in batch], family.filler)  # (B, L)
    mask = pad_halves([torch.ones_like(pruned.input_ids) for pruned in batch], 0)  # (B, L); a prompt may hold pad ids
    axes = max(pruned.position_ids.dim() for pruned in batch)  # compact positions are (L,) beside (3, L)
    places = [p.position_ids if p.position_ids.dim() == axes else p.position_ids.expand(3, -1) for p in batch]
    positions = pad_halves(places, 0)  # (B, L) or (B, 3, L)
    return ids, mask, positions if positions.dim() == 2 else positions.transpose(0, 1)


def check_model(family: Family, pruned: PrunedSet) -> None:
    """Raises BadInput for a set that was made for another model, or does not fit the model that it names."""
    if pruned.fingerprint != family.fingerprint:
        raise BadInput(
            f"the pruned set was made for another model ({pruned.model}) than `model={family.checkpoint.name}`; "
            "name that one, or prune again"
        )
    if reason := _misfit(family, pruned):
        raise BadInput(f"the pruned set does not fit its own model ({reason}); prune again")


def _misfit(family: Family, pruned: PrunedSet) -> str:
    """What of a set this model can't work with, or nothing. Indices out of range would end a GPU's whole process."""
    ids, text = pruned.input_ids, family.text_config
    images = ids == family.image_token
    if int(images.sum()) != pruned.placeholders:
        return f"{int(images.sum())} image tokens for {pruned.placeholders} image embeds"
    if not images.all() and int(ids[~images].max()) >= text.vocab_size:
        return f"a token id of {int(ids[~images].max())}, where there are {text.vocab_size}"
    if pruned.prefix is None and pruned.image_embeds.shape[1] != family.embed_width:
        return f"image embeds of {pruned.image_embeds.shape[1]} numbers, not {family.embed_width}"
    if pruned.position_ids.dim() == 2 and family.axes != len(pruned.position_ids):
        return f"positions in {len(pruned.position_ids)} axes, not {family.axes}"
    if pruned.schedule and len(pruned.schedule.tokens) != family.depth:
        return f"a schedule for {len(pruned.schedule.tokens)} layers of {family.depth}"
    if pruned.schedule and pruned.schedule.stages[0].layer < family.first_inner:
        return f"tokens leave at layer {pruned.schedule.stages[0].layer}, before layer {family.first_inner}"
    return _misfit_of_prefix(family, pruned, pruned.prefix) if pruned.prefix else ""


def _misfit_of_prefix(family: Family, pruned: PrunedSet, prefix: Prefix) -> str:
    """Why this model can't go on from a set's prefix, or nothing."""
    length, stages = len(prefix.ids), pruned.schedule.stages if pruned.schedule else ()
    if family.sees_question:
        return "a prefix, where the image sees the question"
    if reason := misfit(family, prefix):
        return f"a prefix with {reason}"
    if not length < len(pruned.input_ids) or not torch.equal(prefix.ids, pruned.input_ids[:length]):
        return "the prefix of another prompt"
    if (pruned.input_ids[length:] == family.image_token).any():
        return "a prefix that ends before the last image"
    if prefix.depth < family.first_inner:
        return f"a prefix of {prefix.depth} layers, where the image enters {family.first_inner}"
    if stages and (stages[0].layer < prefix.depth or any(stage.rule.rated for stage in stages)):
        return f"a prefix of {prefix.depth} layers, where tokens leave before, or as rated by the first"
    return ""


def check_options(options: Mapping[str, Any]) -> None:
    """Raises BadInput for options of transformers' `generate` that make something else of a prompt than its answer."""
    for name, (value, reason) in _FIXED.items():
        if options.get(name) not in (None, value):
            raise BadInput(f"{reason}; leave it out", field="generation", value=f"{name}={options[name]}")
    beams = options.get("num_beams")
    if isinstance(beams, int) and beams > MAX_BEAMS:
        raise BadInput(f"at most {MAX_BEAMS}", field="generation", value=f"num_beams={str(beams)[:40]}")


def parse_generation(pairs: Sequence[str] | None, max_new_tokens: int) -> dict[str, Any]:
    """Options for `generate` from texts NAME=VALUE. Raises BadInput for what is no such option, or none of a prompt."""
    options = parse_pairs(pairs or (), "generation")
    if "max_new_tokens" in options:
        raise BadInput("has an option of its own, `max_new_tokens`", field="generation", value="max_new_tokens")
    return check_generation(options | {"max_new_tokens": max_new_tokens})


def check_generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for `generate`, by transformers' names, as they are. Raises BadInput as `parse_generation` does."""
    check_options(options)
    known = vars(GenerationConfig())
    for name, value in options.items():
        if name not in known or name.startswith("_"):
            raise BadInput("no option that transformers' generate knows", field="generation", value=f"{name}={value}")
    return dict(options)


@torch.inference_mode()
def generate(
    family: Family,
    batch: Sequence[PrunedSet],
    max_new_tokens: int,
    *,
    stream: TextIO | None = None,
    watchers: Sequence[Watcher] | None = None,
    conversations: Conversations | None = None,
    **options: Any,
) -> list[Generated]:
    """Answers from pruned sets, greedily, in one left-padded batch. Loads the language model only.

    Of sets with a prefix only the text behind that goes through the prefix's layers. They make a batch of their own, or
    several where the prefixes have different depths, or the model's sliding windows count what a batch is padded with.

    The answer of a batch of one is written to `stream` as it comes. `watchers`, one for each set, see the answers as
    they come, and may end them; not with beams, of which none is the answer before the end. A batch of one goes on from
    the keys and values that `conversations` hold of its prompt, and leaves its own there. `options` go to transformers'
    `generate`. Raises BadInput for a set that was made for another model, as `check_options` does, and
    for options that transformers can't use.
    """
    # 1. nothing is run that can't be answered
    check_options(options)
    for pruned in batch:
        check_model(family, pruned)
    model = family.load("language")
    # 2. sets that can't be padded to one another are run by themselves
    by_length = any(pruned.prefix for pruned in batch) and has_sliding_layers(model)
    groups: dict[Hashable, list[int]] = {}
    for n, pruned in enumerate(batch):
        groups.setdefault(_alike(pruned, by_length), []).append(n)
    answers: dict[int, Generated] = {}
    for places in groups.values():
        group = [batch[n] for n in places]
        of_group = watchers and [watchers[n] for n in places]
        held = conversations if len(batch) == 1 and can_continue(family, batch[0], model, options) else None
        of_places = _generate(family, group, max_new_tokens, stream, of_group, held, options)
        answers |= zip(places, of_places, strict=True)
    return [answers[n] for n in range(len(batch))]


def _alike(pruned: PrunedSet, by_length: bool) -> Hashable:
    """What sets must have in common to be run in one batch: with prefixes, `by_length` also how long the text is."""
    if pruned.prefix is None:
        return None
    text = len(pruned.input_ids) - len(pruned.prefix.ids)
    return pruned.prefix.depth, text if by_length else None


def _generate(
    family: Family,
    batch: Sequence[PrunedSet],
    max_new_tokens: int,
    stream: TextIO | None,
    watchers: Sequence[Watcher] | None,
    conversations: Conversations | None,
    options: dict[str, Any],
) -> list[Generated]:
    """`generate` for sets that are run together: all with a prefix, or all without; one alone with `conversations`."""
    # 1. one padded batch; the image embeds stand in for the tower, which is not loaded
    model, tokenizer = family.load("language"), family.processor.tokenizer
    ids, mask, positions = prompts(family, batch)  # (B, L), (B, L), (B, L) or (3, B, L)
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    stops = set(ends if isinstance(ends, list) else [ends])
    watch = _Watch(watchers, stops) if watchers is not None else None
    length, clock, start = ids.shape[1], _Clock(), time.perf_counter()
    prefixes = continued = None
    if conversations is not None:
        places = positions[..., 0, :].cpu()  # of the only prompt, (L,) or (3, L)
        continued = conversations.take(batch[0], places, family.image_token)
    if continued is not None and continued.get_seq_length():  # all images are behind it
        inputs: dict[str, Any] = {"past_key_values": continued}
    elif batch[0].prefix is None:
        images = {"mm_encoder_outputs": {"image": family.features([pruned.image_embeds for pruned in batch])}}
        inputs = images | family.extras(ids) | ({} if continued is None else {"past_key_values": continued})
    else:
        prefixes = PrefixBatch(family, model, batch, ids, mask, positions)
        beams = options.get("num_beams") or model.generation_config.num_beams
        inputs = {"past_key_values": prefixes.cache(beams if isinstance(beams, int) else 1)}
    # 2. the model's own generate
    with prune_inside(family, model, batch, ids, mask, prefixes):
        try:
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                **inputs,
                max_new_tokens=max_new_tokens,
                logits_processor=LogitsProcessorList([clock]),
                stopping_criteria=StoppingCriteriaList([watch] if watch else []),
                streamer=_Stream(tokenizer, stream) if stream else None,
                **{"do_sample": False} | options | {name: value for name, (value, _) in _FIXED.items()},
            )  # (B, L + new tokens)
        except (ValueError, TypeError, ImportError) as fault:  # of option values that transformers checks itself
            if not options:
                raise
            first_line = (str(fault).splitlines() or [""])[0].strip()
            raise BadInput(
                f"transformers can't use it ({first_line})", field="generation", value=", ".join(options)
            ) from fault
    end = time.perf_counter()
    if conversations is not None and continued is not None:
        conversations.put(batch[0], places, out[0], continued)
    # 3. token ids behind the prompt, each answer up to its end
    first = clock.first or end
    answers = watch.answers if watch else [_until(stops, answer) for answer in out[:, length:].tolist()]
    return [
        Generated(
            tokenizer.decode(answer, skip_special_tokens=True).strip(),
            tuple(answer),
            1e3 * (first - start),
            1e3 * (end - first),
            bool(answer) and answer[-1] in stops,
        )
        for answer in answers
    ]


def _until(stops: set[int | None], answer: list[int]) -> list[int]:
    """The answer with its first end token, without what filled it up to the longest of its batch."""
    for i, token in enumerate(answer):
        if token in stops:
            return answer[: i + 1]
    return answer
