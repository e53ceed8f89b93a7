"""Pruning inside the language model, in every family, against a model that holds every token and may not look."""

import json
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import slow_methods as slow
import torch
from test_placeholders import slowly
from tiny_families import write_checkpoint

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.generation import generate, prompts
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import RULES, make_method
from gridprune_cli.pruning.methods.sparsevlm import RatedAttention
from gridprune_cli.pruning.region import inside
from gridprune_cli.pruning.schedule import (
    Attention,
    LayerSignals,
    Region,
    RegionAttention,
    Rule,
    Stage,
    StageAttention,
    plan,
)
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm import FAMILIES
from gridprune_cli.vlm.inner import prune_inside

QUESTION = "what colour is the left object?"
NEW = 4  # tokens of an answer: one from the prompt, the others from what its layers hold
WITHIN, WITHOUT = (0, 0, 4, 5), (5, 6, 7, 7)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pipeline(request, checkpoint):
    return Pipeline(str(checkpoint(request.param)), dtype="float32")


@pytest.fixture(params=["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def attention(request, pipeline):
    """Both ways to attend; the model goes back to how it was loaded."""
    model = pipeline.family.load("language")
    before = model.config.get_text_config()._attn_implementation
    if request.param == "eager":
        model.set_attn_implementation({"text_config": "eager"})
    yield request.param
    model.set_attn_implementation({"text_config": before})


def run(pipeline, sets):
    """transformers' generate: new ids (B, NEW), logits (B, NEW, V), and what each layer of the cache holds."""
    model, (ids, mask, positions) = pipeline.family.load("language"), prompts(pipeline.family, sets)
    with torch.no_grad(), prune_inside(pipeline.family, model, sets, ids, mask):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            mm_encoder_outputs={"image": pipeline.family.features([pruned.image_embeds for pruned in sets])},
            **pipeline.family.extras(ids),
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    layers = range(pipeline.family.depth)
    held = [out.past_key_values.get_seq_length(layer) for layer in layers]
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1), held


class Hidden:
    """The reference: nothing leaves. From `layer` on, places of one prompt can't be looked at, by its mask alone."""

    def __init__(self, pipeline, gone):
        """`gone`: layer -> (L,) bool, the places that can't be looked at from that layer on."""
        self.pipeline, self.gone = pipeline, gone

    def __enter__(self):
        family = self.pipeline.family
        text = family.load("language").get_submodule(family.text_model)
        self.handles = [
            layer.register_forward_pre_hook(lambda m, a, k, n=n: self.hide(n, a, k), with_kwargs=True)
            for n, layer in enumerate(text.layers)
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def hide(self, number, args, kwargs):
        hides = [gone for layer, gone in self.gone.items() if layer <= number]
        if not hides:
            return args, kwargs
        gone = torch.stack(hides).any(0)
        new = args[0].shape[1]
        held = kwargs["past_key_values"].layers[number] if kwargs["past_key_values"].layers else None
        keys, start = (
            (new, 0) if held is None or not held.get_seq_length() else held.get_mask_sizes(new)
        )  # a window holds the last ones only
        mask = kwargs["attention_mask"]
        if mask is None:
            sees = torch.ones(new, keys).tril(keys - new).bool()[None, None]
        else:
            sees = mask if mask.dtype == torch.bool else mask == 0
        blind = torch.cat([gone, torch.zeros(start + keys, dtype=torch.bool)])[start : start + keys]
        sees = sees & ~blind
        if new > 1:  # what can't be looked at looks at itself, so that it stays finite
            sees = sees | torch.eye(new, dtype=torch.bool)
        if self.eager:
            sees = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": sees}

    @property
    def eager(self):
        return self.pipeline.family.load("language").config.get_text_config()._attn_implementation == "eager"


def places_gone(pipeline, pruned, staying):
    """(L,) bool: places of the prompt whose visual tokens are not in the set `staying`, or separators left alone."""
    stays = slowly(pruned.placeholder_map.tolist(), staying)
    gone = torch.zeros(len(pruned.input_ids), dtype=torch.bool)
    gone[pruned.input_ids == pipeline.family.image_token] = ~torch.tensor(stays)
    return gone


def within(pruned):
    """The kept tokens inside the regions, told from the pictures alone."""
    flags = torch.cat(
        [inside(o.views, o.region) if o.region else torch.zeros(o.count, dtype=torch.bool) for o in pruned.images]
    )
    return {int(token) for token in pruned.kept if flags[token]}


def check(pipeline, pruned, staying):
    """A set against the reference that hides from each stage's layer all but the tokens `staying[layer]`."""
    gone = {layer: places_gone(pipeline, pruned, stays) for layer, stays in staying.items()}
    ids, logits, held = run(pipeline, [pruned])
    with Hidden(pipeline, gone):
        expected_ids, expected, whole = run(pipeline, [replace(pruned, schedule=None)])
    assert torch.equal(ids, expected_ids)
    assert (logits - expected).abs().max() <= 1e-4
    left = [
        total - (int(torch.stack([g for k, g in gone.items() if k <= layer] or [gone[min(gone)] & False]).any(0).sum()))
        for layer, total in enumerate(whole)
    ]
    assert held == left
    return ids, logits


def prune(pipeline, pictures, pruning):
    """The pruned set of the pictures, whose whole prompt goes through all layers."""
    images = [pipeline.encoder.encode([picture], several=len(pictures) > 1)[0] for picture in pictures]
    return replace(pipeline.prune(images, QUESTION, pruning), prefix=None)


def last(pipeline):
    return pipeline.family.depth - 1


OTHERWISE = [pytest.param(which, keep, marks=pytest.mark.slow) for which, keep in (("first", 0.5), ("last", 1.0))]


@pytest.mark.parametrize(("which", "keep"), [("first", 1.0), ("last", 0.5), *OTHERWISE])
def test_region_equals_hiding_what_is_outside(pipeline, attention, noise, which, keep):
    layer = pipeline.family.first_inner if which == "first" else last(pipeline)
    pruning = Pruning(keep=keep, region=WITHIN, ilp="region", ilp_layer=layer)
    pruned = prune(pipeline, [noise((210, 170))], pruning)
    stays = within(pruned)
    assert 0 < len(stays) < len(pruned.kept)
    assert pruned.schedule.tokens == (len(pruned.kept),) * layer + (len(stays),) * (pipeline.family.depth - layer)
    _, logits = check(pipeline, pruned, {layer: stays})
    _, full, _ = run(pipeline, [replace(pruned, schedule=None)])
    assert (logits[:, 0] - full[:, 0]).abs().max() > 1e-3  # what left did matter
    again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
    assert generate(pipeline.family, [again], NEW)[0].ids == generate(pipeline.family, [pruned], NEW)[0].ids


def test_two_images_have_regions_of_their_own(pipeline, noise):
    pruning = Pruning(keep=0.6, region=WITHIN, ilp="region", ilp_layer=last(pipeline))
    pruned = prune(pipeline, [noise((100, 80)), noise((60, 90), seed=1)], pruning)
    assert len(pruned.schedule.stages[0].budgets) == 2
    check(pipeline, pruned, {last(pipeline): within(pruned)})


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_selection_leaves_inside(pipeline, attention, noise, positions):
    """What pruning before the language model would leave out can't be looked at from the layer on, and no earlier."""
    picture, family = noise((210, 170)), pipeline.family
    before = prune(pipeline, [picture], Pruning(keep=0.3))
    pruned = prune(pipeline, [picture], Pruning(keep=0.3, ilp="selection", positions=positions))
    layer = min(max(family.relevance_depth, family.first_inner), last(pipeline))
    stays = set(before.kept.tolist())
    assert len(pruned.kept) == pruned.count and pruned.selected.tolist() == before.kept.tolist()
    assert pruned.schedule.tokens == (pruned.count,) * layer + (len(stays),) * (family.depth - layer)
    assert pruned.images[0].zones == before.images[0].zones and sum(pruned.images[0].zones["budgets"]) == len(stays)
    assert torch.equal(pruned.position_ids, prune(pipeline, [picture], Pruning(keep=1.0)).position_ids)
    if positions == "original":
        check(pipeline, pruned, {layer: stays})
    else:
        check_compact(pipeline, pruned, layer, stays)
    again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
    assert again.schedule == pruned.schedule and again.to_json() == pruned.to_json()
    assert generate(family, [again], NEW)[0].ids == generate(family, [pruned], NEW)[0].ids


def test_two_images_have_selections_of_their_own_or_one(pipeline, noise):
    """Own budgets, which GridPrune has; and one for both, in which other methods choose."""
    pictures = [noise((100, 80)), noise((60, 90), seed=1)]
    for share in (False, True):
        method = make_method("topk-relevance")
        pruning = Pruning(keep=0.4, method=method, share_budget=share, ilp="selection", ilp_layer=last(pipeline))
        pruned = prune(pipeline, pictures, pruning)
        before = prune(pipeline, pictures, replace(pruning, ilp=None, ilp_layer=None))
        assert len(pruned.schedule.stages[0].budgets) == (1 if share else 2)
        check(pipeline, pruned, {last(pipeline): set(before.kept.tolist())})
        assert PrunedSet.from_bytes(pruned.to_bytes(), "x").selected.tolist() == before.kept.tolist()


def eager_rows(pipeline, pruned, layer):
    """Attention of the prompt's last token to its places (L,), mean over heads, from transformers' own eager."""
    model = pipeline.family.load("language")
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    ids, mask, positions = prompts(pipeline.family, [pruned])
    attention = model.get_submodule(pipeline.family.text_model).layers[layer].self_attn
    rows = []
    handle = attention.register_forward_hook(lambda m, a, out: rows.append(out[1][0, :, -1].mean(0)))
    with torch.no_grad():
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            mm_encoder_outputs={"image": pipeline.family.features([pruned.image_embeds])},
            **pipeline.family.extras(ids),
        )
    handle.remove()
    model.set_attn_implementation({"text_config": before})
    return rows[0]


def highest(pipeline, pruned, row, k, first=frozenset()):
    """The k visual tokens with the highest values in a row over the prompt's places, those in `first` before others."""
    tokens = pruned.placeholder_map.tolist()
    at = (pruned.input_ids == pipeline.family.image_token).nonzero()[:, 0].tolist()
    order = sorted(
        (token not in first, -float(row[p]), token) for p, token in zip(at, tokens, strict=True) if token >= 0
    )
    return {token for _, _, token in order[:k]}


def test_fastv_keeps_what_eager_attention_ranks_highest(pipeline, attention, noise):
    layer = last(pipeline)
    pruned = prune(pipeline, [noise((210, 170))], Pruning(keep=0.3, method=make_method("fastv", layer=layer)))
    assert len(pruned.kept) == pruned.count
    row = eager_rows(pipeline, replace(pruned, schedule=None), layer - 1)
    k = int(0.3 * pruned.count + 0.5)
    assert pruned.schedule.tokens[-1] == k
    check(pipeline, pruned, {layer: highest(pipeline, pruned, row, k)})


def test_a_budget_takes_the_region_first(pipeline, attention, noise):
    layer = last(pipeline)
    for share, region in ((0.2, WITHIN), (0.6, WITHOUT), (0.4, "none")):
        pruning = Pruning(keep=0.7, region=region, ilp=share, ilp_layer=layer)
        pruned = prune(pipeline, [noise((210, 170))], pruning)
        row = eager_rows(pipeline, replace(pruned, schedule=None), layer - 1)
        stays = highest(pipeline, pruned, row, int(share * pruned.count + 0.5), within(pruned))
        check(pipeline, pruned, {layer: stays})


def test_several_shares_leave_one_after_the_other(pipeline, noise):
    """The region, then a share of what is in it, then a smaller one, against eager attention of what is still there."""
    first, end = pipeline.family.first_inner, last(pipeline)
    if first == end:
        return
    pruning = Pruning(keep=1.0, region=WITHIN, ilp=("region", 0.2), ilp_layer=(first, end))
    pruned = prune(pipeline, [noise((210, 170))], pruning)
    region, k = within(pruned), int(0.2 * pruned.count + 0.5)
    assert pruned.schedule.tokens[first : end + 1] == (*(len(region),) * (end - first), min(k, len(region)))
    with Hidden(pipeline, {first: places_gone(pipeline, pruned, region)}):
        row = eager_rows(pipeline, replace(pruned, schedule=None), end - 1)
    at, _ = places(pipeline, pruned)
    order = sorted(region, key=lambda token: (-float(row[at[token]]), token))
    check(pipeline, pruned, {first: region, end: set(order[:k])})
    again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
    assert again.schedule == pruned.schedule


def test_pyramiddrop_ranks_by_the_layer_ahead(pipeline, attention, noise):
    """One stage, positions kept: the score against eager attention of the stage's own layer."""
    layer = last(pipeline)
    pruned = prune(pipeline, [noise((210, 170))], Pruning(keep=0.3, method=make_method("fastv", layer=layer)))
    (stage,) = pruned.schedule.stages
    pruned = replace(pruned, schedule=replace(pruned.schedule, stages=(replace(stage, rule=StageAttention()),)))
    row = eager_rows(pipeline, replace(pruned, schedule=None), layer)
    check(pipeline, pruned, {layer: highest(pipeline, pruned, row, stage.budgets[0])})


@dataclass(frozen=True)
class Whole:
    """What transformers' own eager attention makes of a prompt of L places with nothing left out."""

    embeddings: torch.Tensor  # (L, D) ahead of the first layer
    hidden_states: torch.Tensor  # (L, D) ahead of `layer`, normed as behind the last
    attention: torch.Tensor  # (L, L) of the layer before, mean over heads
    compared: torch.Tensor  # (L, C) keys of the layer before, as cached
    projected: torch.Tensor  # (L, C) keys of `layer`, as projected
    values: torch.Tensor  # (L, C) values of `layer`, as projected
    next_attention: torch.Tensor  # (L, L) of `layer`, mean over heads
    rotary: torch.Tensor  # (L, 2) mean cosine and sine of the position embeddings of `layer`

    @classmethod
    def run(cls, pipeline, pruned, layer):
        model = pipeline.family.load("language")
        before = model.config.get_text_config()._attn_implementation
        model.set_attn_implementation({"text_config": "eager"})
        ids, mask, positions = prompts(pipeline.family, [pruned])
        text, recorded = model.get_submodule(pipeline.family.text_model), {}
        hooks = [
            text.layers[0].register_forward_pre_hook(lambda m, a: recorded.update(first=a[0][0])),
            text.layers[layer].register_forward_pre_hook(lambda m, a: recorded.update(hidden_states=a[0][0])),
            text.layers[layer].self_attn.k_proj.register_forward_hook(lambda m, a, out: recorded.update(keys=out[0])),
            text.layers[layer - 1].self_attn.register_forward_hook(lambda m, a, out: recorded.update(rows=out[1][0])),
            text.layers[layer].self_attn.v_proj.register_forward_hook(lambda m, a, out: recorded.update(values=out[0])),
            text.layers[layer].self_attn.register_forward_hook(lambda m, a, out: recorded.update(next_rows=out[1][0])),
            text.layers[layer].register_forward_pre_hook(
                lambda m, a, k: recorded.update(angles=k["position_embeddings"]), with_kwargs=True
            ),
        ]
        with torch.no_grad():
            out = model.generate(  # which PaliGemma's positions need: their size tells in keys
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                mm_encoder_outputs={"image": pipeline.family.features([pruned.image_embeds])},
                **pipeline.family.extras(ids),
                max_new_tokens=1,
                return_dict_in_generate=True,
            )
            hidden_states = text.norm(recorded["hidden_states"])
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation({"text_config": before})
        cached = out.past_key_values.layers[layer - 1].keys[0].transpose(0, 1).flatten(1)
        rotary = torch.stack([values[0].mean(-1) for values in recorded["angles"]], -1)
        attention, next_attention = recorded["rows"].mean(0), recorded["next_rows"].mean(0)
        rest = (recorded["values"], next_attention, rotary)
        return cls(recorded["first"], hidden_states, attention, cached, recorded["keys"], *rest)


def places(pipeline, pruned):
    """Places of the visual tokens, by token, and of the text behind the last image."""
    at = (pruned.input_ids == pipeline.family.image_token).nonzero()[:, 0]
    return at[pruned.placeholder_map >= 0], torch.arange(int(at[-1]) + 1, len(pruned.input_ids))


def seen(pipeline, pruned, layer):
    """What the rules of methods are to look at in a prompt with one image, all tokens there."""
    whole, (at, text) = Whole.run(pipeline, pruned, layer), places(pipeline, pruned)
    views = tuple(view for image in pruned.images for view in image.views)
    common = {"tokens": torch.arange(len(at)), "within": torch.zeros(len(at), dtype=torch.bool), "views": views}
    dart = {"hidden_states": whole.hidden_states[at], "keys": whole.compared[at]}
    dart |= {"text_hidden_states": whole.hidden_states[text], "text_keys": whole.compared[text]}
    adaptprune = {"attention": whole.attention[-1, at].double(), "keys": whole.projected[at]}
    ptp = {"attention": whole.next_attention[text][:, at].amax(0).double(), "saliency": pruned.saliency}
    ivc_prune = {"values": whole.values[at], "text_values": whole.values[text], "rotary": whole.rotary[at]}
    looked_at = {"dart": dart, "adaptprune": adaptprune, "ptp": ptp, "ivc-prune": ivc_prune}
    return {name: LayerSignals(**common, **signals) for name, signals in looked_at.items()}


WRITTEN_OUT = {
    "dart": slow.duplication,
    "adaptprune": slow.suppression,
    "ptp": slow.pyramid,
    "ivc-prune": slow.coordinates,
}


@pytest.mark.parametrize(("name", "written_out"), WRITTEN_OUT.items())
def test_rules_look_at_what_is_the_models(pipeline, attention, noise, name, written_out):
    layer = last(pipeline)
    pruned = prune(pipeline, [noise((210, 170))], Pruning(keep=0.3, method=make_method(name, layer=layer)))
    (stage,) = pruned.schedule.stages
    (k,) = stage.budgets
    assert k == int(0.3 * pruned.count + 0.5)
    stays = set(written_out(seen(pipeline, pruned, layer)[name], k, stage.rule))
    assert len(stays) == k
    check(pipeline, pruned, {layer: stays})


def test_vtw_leaves_nothing_behind(pipeline, attention, noise):
    first, end, depth = pipeline.family.first_inner, last(pipeline), pipeline.family.depth
    for layer, keep in ((first, 0.05), (end, end / depth)):
        pruned = prune(pipeline, [noise((210, 170))], Pruning(keep=keep, method=make_method("vtw")))
        assert pruned.schedule.tokens == (pruned.count,) * layer + (0,) * (depth - layer)
        check(pipeline, pruned, {layer: set()})
    two = prune(pipeline, [noise((100, 80)), noise((60, 90), 1)], Pruning(keep=0.05, method=make_method("vtw")))
    check(pipeline, two, {first: set()})
    assert prune(pipeline, [noise((100, 80))], Pruning(keep=1.0, method=make_method("vtw"))).schedule is None


def test_sparsevlm_asks_the_raters(pipeline, attention, noise):
    """One stage, positions kept, and one behind another: the score against eager attention."""
    first, layer = pipeline.family.first_inner, last(pipeline)
    pruned = prune(pipeline, [noise((210, 170))], Pruning(keep=0.3, method=make_method("sparsevlm")))
    assert pruned.schedule.stages[-1].budgets == (int(0.3 * pruned.count + 0.5),)
    k = pruned.schedule.stages[-1].budgets[0]
    at, text = places(pipeline, pruned)
    whole = Whole.run(pipeline, pruned, layer)
    rates = torch.tensor(slow.raters(whole.embeddings[at], whole.embeddings[text]))
    one = staged(pruned, [Stage(layer, RatedAttention(), (k,))], pipeline.family.depth)
    stays = highest(pipeline, pruned, whole.attention[text[rates]].mean(0), k)
    check(pipeline, one, {layer: stays})
    if first == layer:
        return
    odd = set(range(1, pruned.count, 2))
    with Hidden(pipeline, {first: places_gone(pipeline, pruned, odd)}):
        rows = Whole.run(pipeline, pruned, layer).attention[text[rates]].mean(0)
    two = staged(
        pruned, [Stage(first, Odd(), (len(odd),)), Stage(layer, RatedAttention(), (3,))], pipeline.family.depth
    )
    order = sorted(odd, key=lambda token: (-float(rows[at[token]]), token))
    check(pipeline, two, {first: odd, layer: set(order[:3])})


@dataclass(frozen=True)
class Odd(Rule):
    """Every other token."""

    name: ClassVar[str] = "odd"

    def select(self, signals, k):
        return torch.arange(1, 2 * k, 2)


def staged(pruned, stages, depth):
    return replace(pruned, schedule=plan(stages, [len(pruned.kept)], depth))


def test_several_stages(pipeline, attention, noise):
    """Region first, then the highest attention among what is left of it."""
    first, end = pipeline.family.first_inner, last(pipeline)
    if first == end:
        pytest.skip("one layer only at which tokens can leave")
    pruned = prune(pipeline, [noise((210, 170))], Pruning(keep=1.0, region=WITHIN, ilp="region", ilp_layer=first))
    region = within(pruned)
    two = staged(pruned, [*pruned.schedule.stages, Stage(end, Attention(), (3,))], pipeline.family.depth)
    assert two.schedule.tokens[-1] == 3
    with Hidden(pipeline, {first: places_gone(pipeline, pruned, region)}):
        row = eager_rows(pipeline, replace(pruned, schedule=None), end - 1)
    check(pipeline, two, {first: region, end: highest(pipeline, two, row, 3)})


def test_numbered_on_equals_a_run_with_those_positions(pipeline, noise):
    """The same hidden tokens, with the rest's position embeddings put in place layer by layer."""
    layer = pipeline.family.first_inner
    pruned = prune(pipeline, [noise((210, 170))], Pruning(keep=1.0, region=WITHIN, ilp="region", ilp_layer=layer))
    (stage,) = pruned.schedule.stages
    compact = replace(pruned, schedule=replace(pruned.schedule, stages=(replace(stage, positions="compact"),)))
    _, logits = check_compact(pipeline, compact, layer, within(pruned))
    assert (logits - run(pipeline, [pruned])[1]).abs().max() > 1e-4  # positions do matter


def check_compact(pipeline, pruned, layer, staying):
    """A set that numbers on at `layer`, against the reference with those positions put in place layer by layer."""
    gone = places_gone(pipeline, pruned, staying)
    ids, logits, _ = run(pipeline, [pruned])
    text = pipeline.family.load("language").get_submodule(pipeline.family.text_model)

    def renumber(number, args, kwargs):
        if number < layer:
            return args, kwargs
        new, past = args[0].shape[1], kwargs["past_key_values"].get_seq_length(number)
        counted = ((~gone).long().cumsum(0) - 1).clamp(min=0)
        places = torch.arange(past, past + new) - int(gone.sum()) if past else counted
        return args, kwargs | {"position_embeddings": pipeline.family.rotary(args[0], places[None], number)}

    handles = [
        block.register_forward_pre_hook(lambda m, a, k, n=n: renumber(n, a, k), with_kwargs=True)
        for n, block in enumerate(text.layers)
    ]
    with Hidden(pipeline, {layer: gone}):
        expected_ids, expected, _ = run(pipeline, [replace(pruned, schedule=None)])
    for handle in handles:
        handle.remove()
    assert torch.equal(ids, expected_ids)
    assert (logits - expected).abs().max() <= 1e-4
    return ids, logits


def test_nothing_leaves_is_keep_everything(pipeline, attention, noise):
    picture = noise((100, 80))
    whole = prune(pipeline, [picture], Pruning(keep=1.0))
    ids, logits, held = run(pipeline, [whole])
    everything = [Pruning(keep=1.0, ilp=1.0, ilp_layer=last(pipeline))]
    everything += [Pruning(keep=1.0, ilp="selection")]
    everything += [Pruning(keep=1.0, ilp="region", region=(0, 0, 7, 7), ilp_layer=last(pipeline))]
    inner = ("fastv", "dart", "adaptprune")
    everything += [Pruning(keep=1.0, method=make_method(name, layer=last(pipeline))) for name in inner]
    for pruning in everything:
        other = run(pipeline, [prune(pipeline, [picture], pruning)])
        assert torch.equal(other[0], ids) and other[2] == held
        assert (other[1] - logits).abs().max() <= 1e-5


def test_a_batch_answers_as_its_prompts_do_alone(pipeline, attention, noise):
    """Prompts of different lengths, with different stages or none, and what they keep differs."""
    end = last(pipeline)
    prunings = [
        Pruning(keep=0.7, region=WITHIN, ilp="region", ilp_layer=end),
        Pruning(keep=1.0, region=WITHOUT, ilp="region", ilp_layer=pipeline.family.first_inner),
        Pruning(keep=0.5),
        Pruning(keep=0.9, ilp=0.2, ilp_layer=end),
        Pruning(keep=0.25, method=make_method("fastv", layer=end)),
        Pruning(keep=0.25, method=make_method("pyramiddrop")),
        Pruning(keep=0.2, method=make_method("dart", layer=end)),
        Pruning(keep=0.3, method=make_method("adaptprune", layer=end)),
        Pruning(keep=0.25, method=make_method("sparsevlm")),
        Pruning(keep=0.4, method=make_method("vtw", layer=end)),
        Pruning(keep=0.3, ilp="selection"),
        Pruning(keep=0.2, ilp="selection", positions="compact"),
    ]
    sizes = [(100, 80), (210, 70), (60, 200), (31, 29), (100, 80), (90, 120), (80, 80), (70, 110), (95, 60), (50, 50)]
    sizes += [(100, 80), (60, 90)]
    sets = [
        prune(pipeline, [noise(size, seed)], pruning)
        for seed, (size, pruning) in enumerate(zip(sizes, prunings, strict=True))
    ]
    for pruning in (prunings[0], *prunings[6:9], prunings[-2]):
        sets.append(prune(pipeline, [noise((100, 80)), noise((60, 90), 1)], pruning))
    ids, logits, _ = run(pipeline, sets)
    for own_ids, prompt_logits, pruned in zip(ids, logits, sets, strict=True):
        alone_ids, alone, _ = run(pipeline, [pruned])
        assert torch.equal(own_ids, alone_ids[0])
        assert (prompt_logits - alone[0]).abs().max() <= 1e-4
    for pair in ([sets[0], sets[0]], [sets[0], replace(sets[0], schedule=None)]):  # prompts of one length, no padding
        assert torch.equal(run(pipeline, pair)[0], torch.cat([run(pipeline, [one])[0] for one in pair]))


def test_beams_prune_alike(pipeline, noise):
    pruned = prune(pipeline, [noise((100, 80))], Pruning(keep=0.8, ilp=0.3, ilp_layer=last(pipeline)))
    (generated,) = generate(pipeline.family, [pruned], NEW, num_beams=3)
    row = eager_rows(pipeline, replace(pruned, schedule=None), last(pipeline) - 1)
    stays = highest(pipeline, pruned, row, pruned.schedule.tokens[-1], within(pruned))
    with Hidden(pipeline, {last(pipeline): places_gone(pipeline, pruned, stays)}):
        (expected,) = generate(pipeline.family, [replace(pruned, schedule=None)], NEW, num_beams=3)
    assert generated.ids == expected.ids


def test_layers_at_which_nothing_can_leave(pipeline, noise):
    encoded = pipeline.encoder.encode([noise((100, 80))])
    for layer in (pipeline.family.first_inner - 1, pipeline.family.depth, -1):
        with pytest.raises(BadInput, match=f"ilp_layer={layer}: .*layers {pipeline.family.first_inner} to"):
            pipeline.prune(encoded, QUESTION, Pruning(ilp=0.1, ilp_layer=layer))
    with pytest.raises(BadInput, match="layer=9"):
        pipeline.prune(encoded, QUESTION, Pruning(method=make_method("fastv", layer=9)))


@pytest.mark.parametrize("window", [6, 12, 30])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_sliding_window_reaches_no_further(tmp_path, noise, window, kind):
    """Gemma 3 with windows shorter than the prompt: they count its places, whatever has left."""
    folder = write_checkpoint("gemma3", tmp_path / "gemma3")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = window
    (folder / "config.json").write_text(json.dumps(config))
    pipeline = Pipeline(str(folder), dtype="float32")
    if kind == "eager":
        pipeline.family.load("language").set_attn_implementation({"text_config": "eager"})
    for layer in (1, 2, 3):
        pruned = prune(pipeline, [noise((100, 80))], Pruning(keep=1.0, region=WITHIN, ilp="region", ilp_layer=layer))
        check(pipeline, pruned, {layer: within(pruned)})
    sets = [
        prune(pipeline, [noise((100, 80), n)], Pruning(keep=keep, region=box, ilp="region", ilp_layer=2))
        for n, (keep, box) in enumerate([(1.0, WITHIN), (0.6, (0, 0, 7, 3))])
    ]
    together = run(pipeline, sets)[0]
    assert torch.equal(together, torch.cat([run(pipeline, [one])[0] for one in sets]))


def test_keys_beyond_a_sliding_window_are_seen(tmp_path, noise, monkeypatch):
    """The first layer's keys are the same however far it looks; its cache holds no more of them than it does."""
    recorded = []

    @dataclass(frozen=True)
    class Curious(Rule):
        name: ClassVar[str] = "curious"
        keys: ClassVar[int | None] = -1

        def select(self, signals, k):
            recorded.append((signals.keys, signals.text_keys))
            return torch.arange(k)

    monkeypatch.setitem(RULES, "curious", Curious)
    for window in (6, 512):
        folder = write_checkpoint("gemma3", tmp_path / str(window))
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["sliding_window"] = window
        (folder / "config.json").write_text(json.dumps(config))
        pipeline = Pipeline(str(folder), dtype="float32")
        pruned = prune(pipeline, [noise((100, 80))], Pruning(keep=1.0, ilp=0.5, ilp_layer=1))
        run(pipeline, [staged(pruned, [Stage(1, Curious(), (4,))], 4)])
    (short, short_text), (whole, whole_text) = recorded
    assert len(whole) == pruned.count > 6 and len(whole_text)
    assert torch.equal(short, whole) and torch.equal(short_text, whole_text)


@pytest.fixture(scope="module")
def llava(tiny_llava):
    return Pipeline(str(tiny_llava), dtype="float32")


def test_a_rule_sees_what_is_there(llava, noise, monkeypatch):
    """Normed hidden states and attention of what is left, token by token."""
    seen = []

    @dataclass(frozen=True)
    class Curious(Rule):
        name: ClassVar[str] = "curious"
        attention: ClassVar[int | None] = -1
        hidden_states: ClassVar[bool] = True

        def select(self, signals, k):
            seen.append(signals)
            return torch.arange(k)

    monkeypatch.setitem(RULES, "curious", Curious)
    pruned = prune(llava, [noise((100, 80))], Pruning(tokens=9, region=WITHIN, ilp=0.3))
    pruned = staged(pruned, [Stage(2, Curious(), (4,))], 3)
    run(llava, [pruned])
    (layer_signals,) = seen
    assert torch.equal(layer_signals.tokens, pruned.kept)
    assert {int(token) for token in layer_signals.tokens[layer_signals.within]} == within(pruned)
    at = (pruned.input_ids == llava.family.image_token).nonzero()[:, 0]
    row = eager_rows(llava, replace(pruned, schedule=None), 1)
    assert torch.allclose(layer_signals.attention, row[at].double(), atol=1e-6)
    hidden_states = []
    text = llava.family.load("language").get_submodule(llava.family.text_model)
    handle = text.layers[2].register_forward_pre_hook(lambda m, a, k: hidden_states.append(a[0]), with_kwargs=True)
    eager_rows(llava, replace(pruned, schedule=None), 1)
    handle.remove()
    assert torch.allclose(layer_signals.hidden_states, text.norm(hidden_states[0][0, at]), atol=1e-5)
    assert layer_signals.keys is None and layer_signals.views == pruned.images[0].views


def test_what_generate_must_not_do(llava, noise):
    pruned = prune(llava, [noise((100, 80))], Pruning(ilp=0.1))
    for options in ({"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}):
        with pytest.raises(BadInput, match="generation"):
            generate(llava.family, [pruned], 4, **options)
    model = llava.family.load("language")
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "flex_attention"
    with pytest.raises(GridpruneError, match="flex_attention"):
        generate(llava.family, [pruned], 4)
    config._attn_implementation = before
    assert not any(layer._forward_pre_hooks for layer in model.get_submodule(llava.family.text_model).layers)
    assert len(generate(llava.family, [pruned], 4)[0].ids) == 4


def test_attention_that_is_not_finite_is_told(llava, noise, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llava.family.checkpoint.folder, tmp_path / "broken")
    pruned = prune(llava, [noise((100, 80))], Pruning(ilp=0.1))
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "layers.1.self_attn.q_proj.weight" in n and "vision" not in n)
    weights[name] = weights[name] * torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    broken = Pipeline(str(folder), dtype="float32").family
    with pytest.raises(GridpruneError, match="not finite"):
        generate(broken, [replace(pruned, fingerprint=broken.fingerprint)], 4)


def test_settings_that_make_no_sense(llava, noise):
    encoded = llava.encoder.encode([noise((100, 80))])
    for values, message in (
        ({"ilp": 0.0}, "ilp.0.0: must be above 0"),
        ({"ilp": 1.5}, "ilp.1.5: must be above 0"),
        ({"ilp": "here"}, "ilp.here: neither selection, nor region, nor a share"),
        ({"ilp": "0.3,0.1"}, "ilp_layer: name a layer for each of the 2 shares"),
        ({"ilp": "0.3,0.1", "ilp_layer": 3}, "ilp_layer=3: name a layer for each of the 2 shares"),
        ({"ilp": 0.3, "ilp_layer": "1,2"}, "ilp_layer=1,2: name a layer for each of the 1 shares"),
        ({"ilp": "0.1,0.3", "ilp_layer": "1,2"}, "ilp=0.1,0.3: several shares must fall"),
        ({"ilp": "0.3,0.1", "ilp_layer": "2,2"}, "ilp_layer=2,2: several layers must ascend"),
        ({"ilp": "0.3,region", "ilp_layer": "1,2"}, "ilp=0.3,region: the region comes first"),
        ({"ilp": "0.3,selection", "ilp_layer": "1,2"}, "ilp=selection: neither"),
        ({"ilp": 0.3, "ilp_layer": "two"}, "ilp_layer=two: must be a whole number"),
        ({"ilp_layer": 2}, "ilp.layer: only with .*ilp"),
        ({"ilp": 0.1, "method": make_method("fastv")}, "ilp: not with .*method.fastv"),
        ({"ilp": "selection", "method": make_method("fastv")}, "ilp: not with .*method.fastv"),
        (
            {"ilp": "selection", "method": make_method("visionzip")},
            "ilp=selection: not with .*visionzip., which merges",
        ),
        ({"ilp": "selection", "method": make_method("trim")}, "ilp=selection: not with .*trim., which merges"),
        ({"ilp": "selection", "plc": "pool"}, "ilp=selection: not with .plc."),
    ):
        with pytest.raises(BadInput, match=message):
            Pruning(**values)
    with pytest.raises(BadInput, match="ilp=region: there is no region"):
        llava.prune(encoded, QUESTION, Pruning(ilp="region", region="none"))
    with pytest.raises(BadInput, match="ilp=region: there is no region"):
        llava.prune(encoded * 2, QUESTION, Pruning(ilp="region", share_budget=True))


def test_a_shared_budget_is_one_inside_too(llava, noise):
    pictures = [noise((100, 80)), noise((60, 90), 1)]
    separate = prune(llava, pictures, Pruning(keep=0.5, ilp=0.2))
    shared = prune(llava, pictures, Pruning(keep=0.5, ilp=0.2, share_budget=True))
    assert separate.schedule.stages[0].budgets == (3, 3) and shared.schedule.stages[0].budgets == (6,)
    check(
        llava,
        shared,
        {2: highest(llava, shared, eager_rows(llava, replace(shared, schedule=None), 1), 6)},
    )


def test_budgets_are_no_larger_than_what_is_there():
    stages = [Stage(1, Region(), (9, 2)), Stage(3, RegionAttention(), (4, 4)), Stage(3, Attention(), (3, 3))]
    schedule = plan(stages, [6, 5], 5)
    assert [stage.budgets for stage in schedule.stages] == [(6, 2), (3, 2)]
    assert schedule.tokens == (11, 8, 8, 5, 5)
    assert str(schedule) == "8 from layer 1 on, 5 from layer 3 on"
    assert type(schedule).from_json(json.loads(json.dumps(schedule.to_json())), RULES) == schedule
