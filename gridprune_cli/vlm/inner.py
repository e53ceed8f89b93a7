"""Visual tokens leave inside the language model: hooks on its layers, the model and its `generate` untouched.

At a stage's layer the hidden states of what leaves are dropped from the prompt. For that layer and all after it,
position embeddings, position ids and masks are cut alike, and their part of the cache is that much shorter. Prompts of
a batch may keep different numbers of tokens, and are padded on the left again. In decoding, these layers get masks that
are made here, since the model makes its own for layers that hold the whole prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pruning.placeholders import SEPARATOR, staying
from gridprune_cli.pruning.region import inside
from gridprune_cli.pruning.schedule import Rule, Sight, Stage
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.attention import NAME, watch_queries
from gridprune_cli.vlm.family import Family

_TEXT = SEPARATOR - 1  # a place in the prompt that is no image token


@contextmanager
def prune_inside(
    family: Family, model: nn.Module, batch: Sequence[PrunedSet], ids: Tensor, mask: Tensor
) -> Iterator[None]:
    """While this lasts, one run of the model over the left-padded prompts `ids` (B, L) prunes as the sets say.

    `mask` (B, L) is 0 for padding. The prompt must be taken in one piece, with a cache that grows; rows that `generate`
    repeats, as for beams, prune alike. Raises BadInput at a run that does otherwise, and GridpruneError where
    attention is not finite, or was set to a kind that can't be followed: neither eager nor what `Family.load` sets.
    """
    if all(pruned.schedule is None for pruned in batch):
        yield
        return
    run = _Run(family, model, batch, ids, mask)
    with run.measuring, ExitStack() as hooks:
        for number, layer in enumerate(run.layers):
            if number >= run.start:
                hook = layer.register_forward_pre_hook(run.before(number), with_kwargs=True)
                hooks.callback(hook.remove)
        yield


@dataclass(frozen=True)
class _Present:
    """What of the prompts is there from some layer on: n entries each, padded on the left.

    index       (B, n) int64: place in the padded prompt, 0 for padding that a stage has put there
    there       (B, n) bool: false for padding
    compact     (B,) bool: whether the row is numbered on from 0
    renumbered  whether any row is
    whole       there is no padding
    """

    index: Tensor
    there: Tensor
    compact: Tensor
    renumbered: bool
    whole: bool

    @property
    def length(self) -> int:
        return self.index.shape[1]


class _Prompt:
    """One pruned set's stages, and what stands at each place of its padded prompt (L,)."""

    def __init__(self, pruned: PrunedSet, image_tokens: Tensor):
        self.stages = {stage.layer: stage for stage in pruned.schedule.stages} if pruned.schedule else {}
        self.visual = torch.full((len(image_tokens),), _TEXT)
        self.text = image_tokens.flip(0).cumsum(0).flip(0) == 0  # behind the last image
        self.views = tuple(view for image in pruned.images for view in image.views)
        self.weight = torch.zeros(len(image_tokens))  # of the queries whose attention is measured for rules with raters
        if pruned.placeholder_map is not None:
            self.visual[image_tokens] = pruned.placeholder_map.long()
        counts = torch.tensor([image.count for image in pruned.images])
        self.owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.within = torch.cat(
            [
                inside(image.views, image.region) if image.region else torch.zeros(image.count, dtype=torch.bool)
                for image in pruned.images
            ]
        )

    @property
    def rated(self) -> Rule | None:
        """A rule that names raters."""
        return next((stage.rule for stage in self.stages.values() if stage.rule.rated), None)

    def rate(self, rule: Rule, hidden: Tensor) -> None:
        """Has the rule name its raters, with all of the prompt's hidden states (L, D) ahead of the first layer."""
        text = self.text.nonzero()[:, 0]
        self.weight[text] = rule.raters(hidden[self.visual >= 0], hidden[text]).float().cpu()
        if not bool(self.weight.any()):
            self.weight[-1] = 1
        self.weight /= self.weight.sum()

    def stay(self, stage: Stage, present: Tensor, seen: dict[str, Tensor]) -> Tensor:
        """(n,) bool: what stays of the places `present` (n,). `seen` has n rows of all that was measured there."""
        visual = self.visual[present]
        here, behind = (visual >= 0).nonzero()[:, 0], self.text[present].nonzero()[:, 0]
        text = {f"text_{name}": rows[behind.to(rows.device)] for name, rows in seen.items() if name != "attention"}
        tokens = visual[here]
        group = self.owner[tokens] if len(stage.keep) > 1 else torch.zeros_like(tokens)
        kept = []
        for number, k in enumerate(stage.keep):
            mine = (group == number).nonzero()[:, 0]
            own = {name: rows[here[mine].to(rows.device)] for name, rows in seen.items()}
            sight = Sight(tokens[mine], self.within[tokens[mine]], self.views, **own, **text)
            kept.append(tokens[mine[stage.rule.pick(sight, min(k, len(mine)))]])
        stays = visual == _TEXT
        stays[~stays] = staying(visual[~stays], torch.cat(kept), len(self.owner))
        return stays


class _Keys:
    """Stands before the cache for one layer: passes all on, and holds the keys, some of which a window drops."""

    def __init__(self, cache: DynamicCache):
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
        self.keys = keys
        return self.cache.update(keys, values, *where)

    def of(self, row: int) -> Tensor:
        """(n, C) of one row of the batch, all heads side by side."""
        return self.keys[row].transpose(0, 1).flatten(1)


class _Run:
    """The hooks' memory of one run."""

    def __init__(self, family: Family, model: nn.Module, batch: Sequence[PrunedSet], ids: Tensor, mask: Tensor):
        self.family = family
        text: Any = model.get_submodule(family.text_model)
        self.layers, self.norm = text.layers, text.norm
        kind = text.config._attn_implementation
        if kind not in (NAME, "eager"):
            raise GridpruneError(
                f"attention by {kind}: pruning inside the language model needs eager, or as it was loaded"
            )
        self.eager = kind == "eager"
        places, self.mask = (ids.cpu() == family.image_token) & mask.cpu().bool(), mask.cpu().bool()
        self.prompts = [_Prompt(pruned, row) for pruned, row in zip(batch, places, strict=True)]
        self.first = min(layer for prompt in self.prompts for layer in prompt.stages)
        self.start = 0 if any(prompt.rated for prompt in self.prompts) else self.first - 1
        self.measuring = ExitStack()  # watches one layer at a time
        self.rows: list[Tensor] = []  # what that gave
        self.compared: _Keys | None = None  # of the layer before a stage that looks at them
        self.present: _Present | None = None  # None while all is there
        self.at: dict[int, _Present] = {}

    def stages(self, layer: int) -> list[Stage]:
        return [prompt.stages[layer] for prompt in self.prompts if layer in prompt.stages]

    def before(self, number: int) -> Any:
        """The hook ahead of a layer."""

        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, DynamicCache):
                raise BadInput("--generation: pruning inside the language model needs generate's own cache")
            if cache.get_seq_length(number) == 0:
                hidden, kwargs = self._prefill(number, layer, args[0], kwargs)
                return (hidden, *args[1:]), kwargs
            if number in self.at:
                kwargs = kwargs | self._decode(number, args[0], kwargs, cache, self.at[number])
            return args, kwargs

        return hook

    # ---- the prompt --------------------------------------------------------------------------------------------------

    def _prefill(self, number: int, layer: Any, hidden: Tensor, given: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if number == self.start:
            self.present, self.at = None, {}
            if hidden.shape[1] != self.mask.shape[1]:
                raise BadInput("--generation: pruning inside the language model needs the prompt in one piece")
            for item, prompt in enumerate(self.prompts):
                if rule := prompt.rated:
                    prompt.rate(rule, hidden[item * (len(hidden) // len(self.prompts))])
        kwargs = self._cut(given, hidden, number, layer)
        if stages := self.stages(number):
            if any(stage.rule.attention == 0 for stage in stages):
                with watch_queries(layer.self_attn, self._asking(number, hidden)) as own:
                    layer.self_attn(layer.input_layernorm(hidden), **kwargs | {"past_key_values": None})
            else:
                own = []
            self.measuring.close()
            hidden = self._drop(number, layer, hidden, own)
            kwargs = self._cut(given, hidden, number, layer)
        if self.present is not None:
            self.at[number] = self.present
        after = [stage.rule for stage in self.stages(number + 1)]
        if any(rule.attention == -1 for rule in after):
            weight = self._asking(number + 1, hidden)
            self.rows = self.measuring.enter_context(watch_queries(layer.self_attn, weight))
        if any(rule.keys == -1 for rule in after):
            self.compared = _Keys(kwargs["past_key_values"])
            kwargs = kwargs | {"past_key_values": self.compared}
        return hidden, kwargs

    def _asking(self, number: int, hidden: Tensor) -> Tensor:
        """(B, n) weights, which sum to 1, of the queries whose attention the stages at a layer want: what is there."""
        weight = torch.zeros(self.mask.shape)
        weight[:, -1] = 1
        for item, prompt in enumerate(self.prompts):
            if (stage := prompt.stages.get(number)) and stage.rule.rated:
                weight[item] = prompt.weight
        weight = weight.repeat_interleave(len(hidden) // len(self.prompts), 0).to(hidden.device)
        return weight if self.present is None else weight.gather(1, self.present.index) * self.present.there

    def _drop(self, number: int, layer: Any, hidden: Tensor, own: list[Tensor]) -> Tensor:
        """Applies the stages at a layer: hidden states (B, n', D) of what stays."""
        repeats = len(hidden) // len(self.prompts)
        if self.present is None:
            were, there = torch.arange(self.mask.shape[1]).expand(len(self.prompts), -1), self.mask
            compact = torch.zeros(len(self.prompts), dtype=torch.bool)
        else:
            parts = (self.present.index, self.present.there, self.present.compact)
            were, there, compact = (part[::repeats].cpu() for part in parts)
        local = []
        for item, prompt in enumerate(self.prompts):
            entries = there[item].nonzero()[:, 0]
            if stage := prompt.stages.get(number):
                compact[item] = stage.positions == "compact"
                rows = own if stage.rule.attention == 0 else self.rows
                seen = self._seen(stage.rule, layer, hidden, rows, item * repeats, entries)
                entries = entries[prompt.stay(stage, were[item, entries], seen)]
            local.append(entries)
        self.compared = None
        most = max(map(len, local))
        there = torch.stack([torch.arange(most) >= most - len(entries) for entries in local])
        place = torch.stack([pad(entries, (most - len(entries), 0)) for entries in local])
        index = were.gather(1, place) * there

        def spread(rows: Tensor) -> Tensor:
            return rows.repeat_interleave(repeats, 0).to(hidden.device)

        self.present = _Present(spread(index), spread(there), spread(compact), bool(compact.any()), bool(there.all()))
        return hidden.gather(1, spread(place)[..., None].expand(-1, -1, hidden.shape[-1]))

    def _seen(
        self, rule: Rule, layer: Any, hidden: Tensor, rows: list[Tensor], row: int, entries: Tensor
    ) -> dict[str, Tensor]:
        """What a rule looks at, by the names of `Sight`: of the `entries` (n,) that are there, n rows each."""
        seen: dict[str, Tensor] = {}
        here = entries.to(hidden.device)
        if rule.attention is not None:
            seen["attention"] = rows[-1][row].cpu().double()[entries]
        if rule.hidden_states:
            seen["hidden_states"] = self.norm(hidden[row, here])
        if rule.keys == 0:
            seen["keys"] = layer.self_attn.k_proj(layer.input_layernorm(hidden[row, here]))
        if rule.keys == -1:
            assert self.compared is not None
            seen["keys"] = self.compared.of(row)[here.to(self.compared.keys.device)]
        for name, values in seen.items():
            if not bool(torch.isfinite(values).all()):
                raise GridpruneError(f"the model's {name} hold values that are not finite; try --dtype float32")
        return seen

    def _cut(self, given: dict[str, Any], hidden: Tensor, number: int, layer: Any) -> dict[str, Any]:
        """A layer's arguments, cut to what is there."""
        present = self.present
        if present is None:
            return given
        index = present.index
        embeddings = tuple(
            part.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, part.shape[-1]))
            for part in given["position_embeddings"]
        )
        places = (present.there.long().cumsum(1) - 1).clamp(min=0)
        embeddings = self._numbered(embeddings, places, hidden, number, present)
        cut: dict[str, Any] = {"position_embeddings": embeddings}
        cut["attention_mask"] = self._cut_mask(given["attention_mask"], hidden, layer)
        if given.get("position_ids") is not None:
            cut["position_ids"] = given["position_ids"].expand(len(index), -1).gather(1, index)
        return given | cut

    def _cut_mask(self, mask: Tensor | None, hidden: Tensor, layer: Any) -> Tensor | None:
        present = self.present
        assert present is not None
        index, count = present.index, present.length
        if mask is None:  # causal, or everything where the layer is not
            if present.whole:
                return None
            sees = torch.ones(count, count, dtype=torch.bool, device=index.device)
            sees = sees.tril() if layer.self_attn.is_causal else sees
            return self._as_mask(sees & present.there[:, None, None], hidden)
        mask = mask.expand(len(index), -1, -1, -1)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, index[:, None, None].expand(-1, mask.shape[1], count, -1))
        if present.whole:
            return mask
        padding = ~present.there[:, None, None]
        return mask.masked_fill(padding, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)

    # ---- the answer --------------------------------------------------------------------------------------------------

    def _decode(
        self, number: int, hidden: Tensor, given: dict[str, Any], cache: DynamicCache, present: _Present
    ) -> dict[str, Any]:
        """Mask, and where they are counted on from the prompt also positions, for the answer's tokens (B, q, D)."""
        new = hidden.shape[1]
        answer = cache.get_seq_length(number) + new - present.length  # tokens of the answer, the new ones among them
        places = present.there.sum(1)[:, None] + torch.arange(answer - new, answer, device=hidden.device)
        return {
            "attention_mask": self._decode_mask(new, answer, cache, number, hidden, present),
            "position_embeddings": self._numbered(given["position_embeddings"], places, hidden, number, present),
        }

    def _decode_mask(
        self, new: int, answer: int, cache: DynamicCache, number: int, hidden: Tensor, present: _Present
    ) -> Tensor | None:
        """What new tokens see of the cache and of each other. Sliding windows count places of the whole prompt."""
        held = cache.layers[number]
        window = held.sliding_window if held.is_sliding else None
        length = self.mask.shape[1]
        if new == 1 and present.whole and (window is None or length + answer <= window):
            return None
        ahead = torch.arange(length, length + answer, device=hidden.device).expand(len(present.index), -1)
        place = torch.cat([present.index, ahead], 1)
        there = torch.cat([present.there, torch.ones_like(ahead, dtype=torch.bool)], 1)
        keys = held.get_mask_sizes(new)[0]
        distance = place[:, -new:, None] - place[:, None, -keys:]
        sees = there[:, None, -keys:] & (distance >= 0)
        if window is not None:
            sees &= distance < window
        return self._as_mask(sees[:, None], hidden)

    def _numbered(
        self, embeddings: tuple[Tensor, ...], places: Tensor, hidden: Tensor, number: int, present: _Present
    ) -> tuple[Tensor, ...]:
        """Position embeddings, for rows that are numbered on those of `places` (B, q) instead."""
        if not present.renumbered:
            return embeddings
        others = self.family.rotary(hidden, places, number)
        chosen = present.compact[:, None, None]
        return tuple(torch.where(chosen, new, old) for new, old in zip(others, embeddings, strict=True))

    def _as_mask(self, sees: Tensor, hidden: Tensor) -> Tensor:
        """A mask (B, 1, q, keys), true where a query may look, in the form that the attention takes."""
        if not self.eager:
            return sees
        return torch.zeros(sees.shape, dtype=hidden.dtype, device=sees.device).masked_fill(
            ~sees, torch.finfo(hidden.dtype).min
        )
