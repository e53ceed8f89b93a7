"""Hooks on the layers of a language model, by which visual tokens leave the sequence at the stages of a schedule.

At a stage's layer the hidden states of what leaves are dropped from the prompt. For that layer and all after it,
position embeddings, position ids and masks are cut alike, and their part of the cache is that much shorter. Prompts of
a batch may keep different numbers of tokens, and are padded on the left again. In decoding, these layers get masks that
are made here, since the model makes its own for layers that hold the whole prompt. Prompts that go on from a cached
prefix have no other hooks than these: see `prefix.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pruning.schedule import Rule, Stage
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.attention import NAME, watch_queries
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.inner.masks import cut_embeddings, cut_prefill_mask, decode_mask
from gridprune_cli.vlm.inner.prefix import PrefixBatch
from gridprune_cli.vlm.inner.prompt import PromptStages, Remaining


@contextmanager
def prune_inside(
    family: Family,
    model: nn.Module,
    batch: Sequence[PrunedSet],
    ids: Tensor,
    mask: Tensor,
    prefixes: PrefixBatch | None = None,
) -> Iterator[None]:
    """While this lasts, one run of the model over the left-padded prompts `ids` (B, L) prunes as the sets say.

    `mask` (B, L) is 0 for padding. With `prefixes` the run must be given their cache, and only the text behind them is
    run through their layers. The prompt must be taken in one piece, with a cache that grows; prompts that
    `generate` repeats, as for beams, prune alike. Raises BadInput at a run that does otherwise, and GridpruneError
    where attention is not finite, or was set to a kind that can't be followed: neither eager nor what `Family.load`
    sets.
    """
    if prefixes is None and all(pruned.schedule is None for pruned in batch):
        yield
        return
    run = _Run(family, model, batch, ids, mask, prefixes)
    with run.watching, ExitStack() as hooks:
        for number, layer in enumerate(run.layers):
            if number >= run.start:
                hook = layer.register_forward_pre_hook(run.hook(number), with_kwargs=True)
                hooks.callback(hook.remove)
        yield


class _KeyRecorder:
    """Stands before the cache for one layer: passes all on, and holds the keys, some of which a window drops.

    `prefixes` are those whose keys the cache may hold already, in layer `number`.
    """

    def __init__(self, cache: DynamicCache, prefixes: PrefixBatch | None, number: int):
        self.cache = cache
        self.prefixes = prefixes if prefixes and number < prefixes.depth else None

    def update(self, keys: Tensor, values: Tensor, *layer: Any) -> tuple[Tensor, Tensor]:
        self.keys = self.prefixes.prepend_keys(keys) if self.prefixes else keys  # (B, heads, n, C)
        return self.cache.update(keys, values, *layer)

    def of_prompt(self, number: int) -> Tensor:
        """(n, heads * C) of one prompt of the batch, all heads side by side."""
        return self.keys[number].transpose(0, 1).flatten(1)


class _Run:
    """The hooks of one run, and what they remember from layer to layer.

    `generate` may repeat each of the B prompts, as for beams; tensors of the model then have B * repeats prompts.
    """

    def __init__(
        self,
        family: Family,
        model: nn.Module,
        batch: Sequence[PrunedSet],
        ids: Tensor,
        mask: Tensor,
        prefixes: PrefixBatch | None,
    ):
        self.family, self.prefixes = family, prefixes
        text: Any = model.get_submodule(family.text_model)
        self.layers, self.norm = text.layers, text.norm
        kind = text.config._attn_implementation
        if kind not in (NAME, "eager"):
            raise GridpruneError(
                f"attention by {kind}: pruning inside the language model needs eager, or as it was loaded"
            )
        self.eager = kind == "eager"
        self.mask = mask.cpu().bool()  # (B, L)
        is_image_token = (ids.cpu() == family.image_token) & self.mask
        self.prompts = [PromptStages(*pair) for pair in zip(batch, is_image_token, strict=True)]
        hooked = [layer - 1 for prompt in self.prompts for layer in prompt.stages]
        hooked += [prefixes.depth] if prefixes else []
        self.start = 0 if any(prompt.rated for prompt in self.prompts) else min(hooked)  # the first layer with a hook
        self.watching = ExitStack()  # of the attention of one layer at a time
        self.attention: list[Tensor] = []  # what that recorded
        self.recorder: _KeyRecorder | None = None  # of the layer before a stage that looks at its keys
        self.remaining: Remaining | None = None  # None while all is there
        self.remaining_at: dict[int, Remaining] = {}  # by layer, for decoding

    def hook(self, number: int) -> Any:
        """The hook ahead of a layer."""

        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, DynamicCache):
                raise BadInput("pruning inside the language model needs generate's own cache", field="generation")
            if cache.get_seq_length(number) == (self.prefixes.cached(number) if self.prefixes else 0):
                hidden, kwargs = self._prefill(number, layer, args[0], kwargs)
                return (hidden, *args[1:]), kwargs
            if number in self.remaining_at:
                kwargs = kwargs | self._decode(number, args[0], kwargs, cache, self.remaining_at[number])
            return args, kwargs

        return before

    # ---- the prompt --------------------------------------------------------------------------------------------------

    def _prefill(
        self, number: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """A layer's input (B, n, D) without what leaves there, and its other arguments for that."""
        # 1. at the first layer with a hook: a new run begins
        if number == self.start:
            self.remaining, self.remaining_at = None, {}
            if hidden.shape[1] != self.mask.shape[1] - (self.prefixes.length if self.prefixes else 0):
                raise BadInput("pruning inside the language model needs the prompt in one piece", field="generation")
            for item, prompt in enumerate(self.prompts):
                if rule := prompt.rated:
                    prompt.rate(rule, hidden[item * (len(hidden) // len(self.prompts))])
        if self.prefixes and number == self.prefixes.depth:
            hidden = self.prefixes.join(hidden)
        kwargs = self._layer_arguments(arguments, hidden, number, layer)
        # 2. at a stage: measure what is still missing, and drop what leaves
        if stages := self._stages(number):
            stage_attention: dict[str, list[Tensor]] = {}  # by how the queries are combined
            for queries in {stage.rule.queries for stage in stages if stage.rule.attention == 0}:
                weights = self._query_weights(number, hidden)
                with watch_queries(layer.self_attn, weights, queries=queries) as stage_attention[queries]:
                    layer.self_attn(layer.input_layernorm(hidden), **kwargs | {"past_key_values": None})
            self.watching.close()
            hidden = self._drop(number, layer, hidden, stage_attention, kwargs["position_embeddings"])
            kwargs = self._layer_arguments(arguments, hidden, number, layer)
        if self.remaining is not None:
            self.remaining_at[number] = self.remaining
        # 3. ahead of a stage: have this layer's attention and keys recorded
        next_rules = [stage.rule for stage in self._stages(number + 1)]
        if any(rule.attention == -1 for rule in next_rules):
            weights = self._query_weights(number + 1, hidden)
            self.attention = self.watching.enter_context(watch_queries(layer.self_attn, weights))
        if any(rule.keys == -1 for rule in next_rules):
            self.recorder = _KeyRecorder(kwargs["past_key_values"], self.prefixes, number)
            kwargs = kwargs | {"past_key_values": self.recorder}
        return hidden, kwargs

    def _stages(self, layer: int) -> list[Stage]:
        """The stages at a layer, of all prompts that have one there."""
        return [prompt.stages[layer] for prompt in self.prompts if layer in prompt.stages]

    def _query_weights(self, number: int, hidden: Tensor) -> Tensor:
        """(B, n) weights, which sum to 1 per prompt, of the queries whose attention the stages at a layer want."""
        weights = torch.zeros(self.mask.shape)
        weights[:, -1] = 1
        for item, prompt in enumerate(self.prompts):
            if (stage := prompt.stages.get(number)) and stage.rule.rated:
                weights[item] = prompt.rater_weights
        weights = weights.repeat_interleave(len(hidden) // len(self.prompts), 0).to(hidden.device)
        text = weights[:, -hidden.shape[1] :]  # which is all of the prompt but in a layer of a prefix
        return text if self.remaining is None else weights.gather(1, self.remaining.places) * self.remaining.valid

    def _drop(
        self,
        number: int,
        layer: Any,
        hidden: Tensor,
        stage_attention: dict[str, list[Tensor]],
        embeddings: tuple[Tensor, ...],
    ) -> Tensor:
        """Applies the stages at a layer with these position embeddings: hidden states (B, n', D) of what stays."""
        repeats = len(hidden) // len(self.prompts)
        # 1. what is there, once per prompt, on the CPU
        if self.remaining is None:
            places, valid = torch.arange(self.mask.shape[1]).expand(len(self.prompts), -1), self.mask  # (B, n)
            compact = torch.zeros(len(self.prompts), dtype=torch.bool)
        else:
            before = (self.remaining.places, self.remaining.valid, self.remaining.compact)
            places, valid, compact = (values[::repeats].cpu() for values in before)
        # 2. which of the entries of each prompt stay
        entries_of = []
        for item, prompt in enumerate(self.prompts):
            entries = valid[item].nonzero()[:, 0]
            if stage := prompt.stages.get(number):
                compact[item] = stage.positions == "compact"
                attention = stage_attention[stage.rule.queries] if stage.rule.attention == 0 else self.attention
                number_in_batch = item * repeats
                measured = _measure(
                    stage.rule,
                    layer,
                    self.norm,
                    hidden[number_in_batch],
                    entries,
                    attention,
                    self.recorder,
                    embeddings,
                    number_in_batch,
                )
                entries = entries[prompt.stays(stage, places[item, entries], measured)]
            entries_of.append(entries)
        self.recorder = None
        # 3. the same of all prompts, padded on the left to the longest
        longest = max(map(len, entries_of))
        valid = torch.stack([torch.arange(longest) >= longest - len(entries) for entries in entries_of])  # (B, n')
        index = torch.stack([pad(entries, (longest - len(entries), 0)) for entries in entries_of])
        places = places.gather(1, index) * valid

        def repeated(values: Tensor) -> Tensor:
            return values.repeat_interleave(repeats, 0).to(hidden.device)

        self.remaining = Remaining(repeated(places), repeated(valid), repeated(compact))
        return hidden.gather(1, repeated(index)[..., None].expand(-1, -1, hidden.shape[-1]))

    def _layer_arguments(self, arguments: dict[str, Any], hidden: Tensor, number: int, layer: Any) -> dict[str, Any]:
        """A layer's arguments, cut to what remains of the prompts."""
        if self.prefixes and number >= self.prefixes.depth:
            arguments = self.prefixes.arguments(number, hidden, arguments)
        remaining = self.remaining
        if remaining is None:
            return arguments
        embeddings = cut_embeddings(arguments["position_embeddings"], remaining)
        mask, causal = arguments["attention_mask"], layer.self_attn.is_causal
        cut: dict[str, Any] = {
            "position_embeddings": self._renumbered(embeddings, remaining.positions(), hidden, number, remaining),
            "attention_mask": cut_prefill_mask(mask, remaining, hidden, causal=causal, eager=self.eager),
        }
        if (position_ids := arguments.get("position_ids")) is not None:
            cut["position_ids"] = position_ids.expand(len(remaining.places), -1).gather(1, remaining.places)
        return arguments | cut

    def _renumbered(
        self, embeddings: tuple[Tensor, ...], positions: Tensor, hidden: Tensor, number: int, remaining: Remaining
    ) -> tuple[Tensor, ...]:
        """Position embeddings; for prompts that are compact, those of `positions` (B, q) instead."""
        if not remaining.any_compact:
            return embeddings
        others = self.family.rotary(hidden, positions, number)
        compact = remaining.compact[:, None, None]
        return tuple(torch.where(compact, new, old) for new, old in zip(others, embeddings, strict=True))

    # ---- the answer --------------------------------------------------------------------------------------------------

    def _decode(
        self, number: int, hidden: Tensor, arguments: dict[str, Any], cache: DynamicCache, remaining: Remaining
    ) -> dict[str, Any]:
        """Mask, and for compact prompts positions, for the answer's tokens (B, q, D)."""
        new = hidden.shape[1]
        answer = cache.get_seq_length(number) + new - remaining.length  # tokens of the answer, the new ones among them
        counted = remaining.valid.sum(1)[:, None] + torch.arange(answer - new, answer, device=hidden.device)
        embeddings = self._renumbered(arguments["position_embeddings"], counted, hidden, number, remaining)
        length, layer_cache = self.mask.shape[1], cache.layers[number]
        return {
            "attention_mask": decode_mask(new, answer, layer_cache, length, remaining, hidden, eager=self.eager),
            "position_embeddings": embeddings,
        }


def _measure(
    rule: Rule,
    layer: Any,
    norm: Any,
    hidden: Tensor,
    entries: Tensor,
    attention: Sequence[Tensor],
    recorder: _KeyRecorder | None,
    embeddings: tuple[Tensor, ...],
    item: int,
) -> dict[str, Tensor]:
    """What a rule looks at, by the names of `LayerSignals`: of the `entries` (n,) of a prompt, (n, ...) each.

    The prompt is the `item`-th of the batch; `hidden` (L, D) is its input of the layer, `norm` that behind the last.
    """
    measured: dict[str, Tensor] = {}
    here = entries.to(hidden.device)
    if rule.attention is not None:
        to_keys = attention[-1][item]  # (n,), or fewer: of a prefix, a window's cache holds the last keys alone
        measured["attention"] = pad(to_keys, (len(hidden) - len(to_keys), 0)).cpu().double()[entries]
    if rule.hidden_states:
        measured["hidden_states"] = norm(hidden[here])
    if rule.keys == 0:
        measured["keys"] = layer.self_attn.k_proj(layer.input_layernorm(hidden[here]))
    if rule.keys == -1:
        assert recorder is not None
        measured["keys"] = recorder.of_prompt(item)[here.to(recorder.keys.device)]
    if rule.values:
        measured["values"] = layer.self_attn.v_proj(layer.input_layernorm(hidden[here]))
    if rule.rotary:  # one for all prompts, or one for each
        angles = [of_angle[min(item, len(of_angle) - 1)].float().mean(-1) for of_angle in embeddings]  # (L,) each
        measured["rotary"] = torch.stack(angles, -1).cpu()[entries]
    _check_finite(measured)
    return measured


def _check_finite(measured: Mapping[str, Tensor]) -> None:
    """Raises GridpruneError where what a rule looks at can't be compared."""
    for name, values in measured.items():
        if not bool(torch.isfinite(values).all()):
            raise GridpruneError(f"the model's {name} hold values that are not finite; try `dtype=float32`")
