"""What all methods promise, in one matrix; and each method against its definition in plain Python."""

import math
import statistics
from dataclasses import replace

import pytest
import slow_methods as slow
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gridprune_cli.pruning.methods import METHODS, RULES, make_method
from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.methods.gridprune import (
    FEW,
    LITERAL,
    SALIENCY_SCALES,
    GridPrune,
    above_median,
    least_share_budgets,
    region_quotas,
)
from gridprune_cli.pruning.methods.uniform import lattice
from gridprune_cli.pruning.schedule import LayerSignals, plan
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, Signals, View


def select(method, signals, k):
    return method.select_batch([signals], [k])[0]


# (method, options, the same written out; None where tests of its own below check it)
MATRIX = [
    ("gridprune", {}, None),
    ("gridprune", LITERAL, None),
    ("gridprune", {"zone": 3, "alpha": 0.5, "temperature": 0.01, "saliency_scale": "rank", "relevance_sign": -1}, None),
    ("gridprune", {"zone": 50, "saliency_scale": "max", "region_share": 1.0}, None),
    ("topk-relevance", {}, slow.top_relevance),
    ("topk-relevance", {"relevance_sign": -1}, slow.top_relevance),
    ("fastervlm", {}, slow.top_saliency),
    ("visionzip", {}, slow.visionzip),
    ("visionzip", {"contextual_share": 0.6, "merge_by": "sum"}, slow.visionzip),
    ("visionzip", {"contextual_share": 1.0}, slow.visionzip),
    ("vispruner", {}, slow.vispruner),
    ("vispruner", {"important_share": 0.0, "step": 3}, slow.vispruner),
    ("vispruner", {"important_share": 1.0}, slow.vispruner),
    ("divprune", {}, slow.divprune),
    ("scope", {}, slow.scope),
    ("scope", {"alpha": 0.0}, slow.scope),
    ("holov", {}, slow.holov),
    ("holov", {"crops": "runs"}, slow.holov),
    ("cdpruner", {}, slow.cdpruner),
    ("cdpruner", {"relevance_sign": 1}, slow.cdpruner),
    ("mmtok", {}, slow.mmtok),
    ("mmtok", {"alpha": 2.0, "text_temperature": 0.1, "vision_temperature": 0.5}, slow.mmtok),
    ("trim", {}, slow.trim),
    ("trim", {"relevance_sign": 1, "mean_token": False}, slow.trim),
    ("trim", {"cosine": False}, slow.trim),
    ("hired", {}, slow.hired),
    ("hired", {"base_share": 0.2}, slow.hired),
    ("hiprune", {}, slow.hiprune),
    ("hiprune", {"alpha": 1.0}, slow.hiprune),
    ("hivtp", {}, slow.hivtp),
    ("hivtp", {"global_share": 0.0, "regions": 3, "window": 4}, slow.hivtp),
    ("hivtp", {"global_share": 0.8, "regions": 5}, slow.hivtp),
    ("fopru", {}, slow.fopru),
    ("fopru", {"strategy": "row"}, slow.fopru),
    ("vflowopt", {}, slow.vflowopt),
    ("vflowopt", {"beta": 0.1, "recycled_share": 0.7, "cell": 2}, slow.vflowopt),
    ("rate", {}, slow.rate),
    ("covipal", {}, slow.top_importance),
    ("uniform", {}, None),
    ("random", {}, None),
    ("random", {"seed": 7}, None),
]
OUTER = [name for name, method in METHODS.items() if not method.inner]
TILES = tuple(View(5, 5, (x, y, x + 0.5, y + 0.5)) for y in (0.0, 0.5) for x in (0.0, 0.5))
MOSAIC = View(6, 9, (-0.02, 0.0, 1.02, 1.0))
LAYOUTS = [(View(8, 8),), (View(1, 17),), (View(13, 1),), (View(7, 11),), (View(1, 1),), (View(5, 5), *TILES)]
LAYOUTS += [(View(4, 4), MOSAIC), (*TILES[:2], View(3, 4), View(2, 2))]
REGIONS = [None, (0, 0, 7, 7), (2, 3, 4, 6), (0, 0, 0, 0), (7, 7, 7, 7)]
SCALARS = (*OPTIONAL_SIGNALS, "importance", "patch_lengths")  # a number for each token, beside those of all methods
VECTORS = ("vision_features", "image_embeds", "question_embeds")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def problems(draw):
    views = draw(st.sampled_from(LAYOUTS))
    count = sum(view.count for view in views)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    relevance, saliency, *others = torch.rand(7, count, generator=generator, dtype=torch.float64)
    relevance = relevance * draw(st.sampled_from([0.0, 0.1, 1.0])) - draw(st.sampled_from([0.0, 0.5]))
    saliency = saliency * draw(st.sampled_from([0.0, 1 / 576, 1.0]))
    if draw(st.booleans()):  # ties
        relevance, saliency, *others = ((signal * 4).round() / 4 for signal in (relevance, saliency, *others))
    vectors = {
        name: torch.randn(length, width, generator=generator, dtype=torch.float64)
        for name, length, width in (
            ("vision_features", count, 5),
            ("image_embeds", count, 7),
            ("question_embeds", draw(st.integers(1, 4)), 7),
        )
    }
    kind = draw(st.sampled_from(["plain", "alike", "copies", "zeros", "flat"]))
    if kind == "alike":  # as a tower's states are: most of each is the same
        vectors = {name: vector * 0.1 + 1 for name, vector in vectors.items()}
    copied = torch.randint(count, (count,), generator=generator)
    if kind == "copies":
        vectors |= {name: vectors[name][copied] for name in ("vision_features", "image_embeds")}
        if draw(st.booleans()):
            relevance, saliency = relevance[copied], saliency[copied]
    if kind == "zeros":
        for name in ("vision_features", "image_embeds"):
            vectors[name][:: draw(st.integers(1, 3))] = 0
    if kind == "flat":  # padding, seen by nobody
        vectors |= {name: torch.ones_like(vectors[name]) for name in ("vision_features", "image_embeds")}
    dtype = draw(st.sampled_from(DTYPES))
    region = draw(st.sampled_from(REGIONS))
    vectors = {name: vector.to(dtype) for name, vector in vectors.items()}
    vectors |= {name: signal.to(dtype) for name, signal in zip(SCALARS, others, strict=True)}
    sign = -1 if draw(st.booleans()) else 1
    signals = Signals(views, relevance.to(dtype), saliency.to(dtype), region, **vectors, relevance_sign=sign)
    return signals, draw(st.integers(1, count))


def test_the_matrix_has_every_method():
    assert {name for name, _, _ in MATRIX} == set(OUTER)
    assert set(METHODS) - set(OUTER) == {"fastv", "pyramiddrop", "sparsevlm", "dart", "adaptprune", "vtw"} | {
        *("ptp", "ivc-prune", "btp", "g-search")
    }
    assert all(method.name == name for name, method in METHODS.items())
    # from which help and completion take the names, without torch
    assert all(method.__module__.rpartition(".")[2].replace("_", "-") == name for name, method in METHODS.items())


def test_a_method_is_a_score_or_a_selection_of_its_own():
    class Last(Method):
        name = "last"

        def score(self, signals):
            return torch.arange(signals.count) // 2

    class Nothing(Method):
        name = "nothing"

    nine, four = Signals((View(3, 3),)), Signals((View(2, 2),))
    kept = Last().select_batch([nine, four, nine], [4, 4, 1])
    assert [indices.tolist() for indices in kept] == [[4, 6, 7, 8], [0, 1, 2, 3], [8]]
    assert Nothing().select_batch([four], [4])[0].tolist() == [0, 1, 2, 3]  # nothing to choose
    with pytest.raises(NotImplementedError, match="Nothing implements none of score, select"):
        Nothing().select_batch([nine], [4])


def test_options_are_checked_where_they_are_changed():
    assert make_method("gridprune", zone=3).with_options(region_share=0.7) == GridPrune(zone=3, region_share=0.7)
    with pytest.raises(ValueError, match="region_share must be from 0 to 1"):
        GridPrune().with_options(region_share=2.0)


each = pytest.mark.parametrize(("name", "options"), [(name, options) for name, options, _ in MATRIX])


@each
@settings(deadline=None, max_examples=25)
@given(problems())
def test_exactly_k_sorted_unique_in_range_and_the_same_again(name, options, problem):
    signals, k = problem
    method = make_method(name, **options)
    kept = select(method, signals, k)
    assert kept.dtype == torch.int64 and kept.shape == (k,)
    assert bool((kept.diff() > 0).all())
    assert int(kept[0]) >= 0 and int(kept[-1]) < signals.count
    assert torch.equal(kept, select(method, signals, k))


@pytest.mark.parametrize(("name", "options", "written_out"), [row for row in MATRIX if row[2]])
@settings(deadline=None, max_examples=25)
@given(problems())
def test_each_is_what_its_formula_says(name, options, written_out, problem):
    signals, k = problem
    method = make_method(name, **options)
    if k < signals.count:
        assert select(method, signals, k).tolist() == written_out(signals, k, method)


@each
@settings(deadline=None, max_examples=10)
@given(cases=st.lists(problems(), min_size=1, max_size=6))
def test_many_questions_are_selected_for_as_each_is_alone(name, options, cases):
    """Of the same views and of others, with a region and without, some of which keep everything."""
    method = make_method(name, **options)
    cases += [
        (replace(signals, region=region), signals.count) for signals, _ in cases for region in (None, (1, 1, 5, 4))
    ]
    cases += [(replace(signals, region=(1, 1, 5, 4)), k) for signals, k in cases]
    signals, ks = zip(*cases, strict=True)
    for kept, image_signals, k in zip(method.select_batch(signals, ks), signals, ks, strict=True):
        assert torch.equal(kept, select(method, image_signals, k))


@each
def test_all_tokens_stay_where_k_is_n(name, options):
    """Even without signals: nothing has to be computed to keep everything."""
    for views in LAYOUTS:
        signals = Signals(views)
        assert select(make_method(name, **options), signals, signals.count).tolist() == list(range(signals.count))


@each
@pytest.mark.parametrize("k", [0, -1, 65])
def test_k_out_of_range_is_an_error(name, options, k):
    with pytest.raises(ValueError, match="keep 1 to 64"):
        select(make_method(name, **options), Signals((View(8, 8),), torch.zeros(64), torch.zeros(64)), k)


@pytest.mark.parametrize("name", OUTER)
def test_a_method_needs_what_it_says_and_no_more(name):
    options = {"zone": 1} if name == "gridprune" else {}  # more zones than tokens are kept
    method, views = make_method(name, **options), (View(3, 3),)
    known = {
        signal: torch.rand(*((9, 5) if signal in VECTORS else (9,))) for signal in method.needs_for(4, views, "clip")
    }
    assert set(known) == method.needs
    assert len(select(method, Signals(views, **known), 4)) == 4
    for missing in method.needs:
        with pytest.raises(ValueError, match=missing):
            select(method, Signals(views, **{**known, missing: None}), 4)


def test_gridprune_looks_at_vision_features_where_tokens_are_few_and_relevance_is_a_cosine():
    views, least = (View(8, 8),), {"relevance", "saliency"}
    for k, few, kind, features in (
        (4, "auto", "clip", False),  # as many as there are zones
        (3, "auto", "clip", True),
        (3, "auto", "siglip", True),
        (3, "auto", "attention", False),
        (3, "unlike", "attention", True),
        (3, "apart", "clip", False),
        (3, "top", "clip", False),
    ):
        method = make_method("gridprune", few=few)
        assert method.needs_for(k, views, kind) == least | ({"vision_features"} if features else set())
        known = {"vision_features": torch.rand(64, 5)} if features else {}
        signals = Signals(views, torch.rand(64), torch.rand(64), **known, relevance_kind=kind)
        assert len(select(method, signals, k)) == k


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(OUTER)))
def test_inner_methods_give_the_language_model_everything(name):
    signals = Signals((View(3, 3),))
    assert select(make_method(name), signals, 2).tolist() == list(range(9))
    with pytest.raises(ValueError, match="keep 1 to 9"):
        select(make_method(name), signals, 10)


def test_fastv_is_one_stage():
    (stage,) = make_method("fastv").stages([576, 100], [288, 50], range(1, 32))
    assert (stage.layer, stage.budgets, stage.rule.name, stage.positions) == (2, (288, 50), "attention", "original")
    assert make_method("fastv", layer=3).stages([9], [9], range(1, 4))[0].layer == 3
    assert not any(make_method(name).stages([9], [9], range(1, 4)) for name in OUTER)


def test_pyramiddrop_halves_three_times_as_published():
    """576 tokens in 32 layers: 288 from layer 8, 144 from 16, 72 from 24 on; 270 in the mean, as the paper has it."""
    stages = make_method("pyramiddrop").stages([576], [72], range(1, 32))
    assert [(stage.layer, stage.budgets) for stage in stages] == [(8, (288,)), (16, (144,)), (24, (72,))]
    assert {(stage.rule.name, stage.positions) for stage in stages} == {("stage-attention", "compact")}
    assert sum(plan(stages, [576], 32).tokens) / 32 == 270


@settings(max_examples=60)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(2, 80), st.integers(1, 3))
def test_pyramiddrop_ends_with_k_and_never_grows(count, share, depth, first):
    k = max(1, round(share * count))
    stages = make_method("pyramiddrop").stages([count], [k], range(min(first, depth - 1), depth))
    layers, left = [stage.layer for stage in stages], [stage.budgets[0] for stage in stages]
    assert left[-1] == k and left == sorted(left, reverse=True) and left[0] <= count
    assert layers == sorted(layers) and min(first, depth - 1) <= layers[0] and layers[-1] < depth
    for number, keep in enumerate(left, 1):
        exact = count * (k / count) ** (number / 3)  # rounded down
        assert exact - 1 < keep <= exact + 1e-6


def test_dart_and_adaptprune_are_one_stage_each():
    for name, rule, options in (
        ("dart", "duplication", {"visual_pivots": 2, "text_pivots": 0}),
        ("adaptprune", "suppression", {"centre": 2.0, "radius": 3.0, "sigma": 0.7, "likeness": 0.2}),
    ):
        (stage,) = make_method(name).stages([576, 100], [64, 9], range(1, 32))
        assert (stage.layer, stage.budgets, stage.rule, stage.positions) == (2, (64, 9), RULES[rule](), "original")
        (stage,) = make_method(name, layer=5, **options).stages([576], [64], range(1, 32))
        assert (stage.layer, stage.rule) == (5, RULES[rule](**options))


def test_sparsevlm_has_three_stages_behind_layers_2_6_and_15_of_32():
    stages = make_method("sparsevlm").stages([576], [72], range(1, 32))
    assert [(stage.layer, stage.budgets) for stage in stages] == [(3, (288,)), (7, (144,)), (16, (72,))]
    assert {(stage.rule.name, stage.positions) for stage in stages} == {("rated-attention", "compact")}


@pytest.mark.parametrize(
    ("count", "k", "after"),
    [
        (576, 64, (66, 30, 17)),
        (576, 96, (238, 48, 26)),
        (576, 128, (303, 110, 36)),
        (576, 192, (300, 200, 110)),
        (576, 576, (576, 576, 576)),
        (288, 64, (151, 55, 18)),  # the share of 128 of 576
        (576, 32, (33, 15, 8)),  # half of the counts for 64
        (576, 1, (1, 1, 1)),
    ],
)
def test_sparsevlm_has_the_published_counts(count, k, after):
    stages = make_method("sparsevlm", count="published").stages([count], [k], range(1, 32))
    assert tuple(stage.budgets[0] for stage in stages) == after


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 800), st.floats(0, 1), st.integers(3, 80), st.integers(1, 3))
def test_sparsevlm_counts_what_is_left_or_the_mean(count, share, depth, first):
    k, layers = max(1, round(share * count)), range(min(first, depth - 1), depth)
    stages = make_method("sparsevlm").stages([count], [k], layers)
    assert stages[-1].budgets == (k,) and all(stage.layer in layers for stage in stages)
    stages = make_method("sparsevlm", count="mean").stages([count], [k], layers)

    def mean(stages):
        return sum(plan(stages, [count], depth).tokens) / depth

    others = [
        make_method("sparsevlm").stages([count], [last], layers)
        for last in (stages[-1].budgets[0] - 1, stages[-1].budgets[0] + 1)
    ]
    assert 1 <= stages[-1].budgets[0] <= k
    if stages[-1].budgets[0] > 1:
        assert abs(mean(stages) - k) <= abs(mean(others[0]) - k)
    if stages[-1].budgets[0] < k:
        assert abs(mean(stages) - k) <= abs(mean(others[1]) - k)


@pytest.mark.parametrize(
    ("counts", "budgets", "layer"),
    [([576], [64], 4), ([576], [270], 15), ([576], [1], 1), ([576], [575], 31), ([576, 100], [64, 100], 8)],
)
def test_vtw_leaves_where_the_mean_is_nearest_to_k(counts, budgets, layer):
    (stage,) = make_method("vtw").stages(counts, budgets, range(1, 32))
    assert (stage.layer, stage.rule.name, stage.positions) == (layer, "withdrawal", "original")
    assert stage.budgets == (0,) * len(counts)
    assert stage.rule.select(LayerSignals(torch.arange(9), torch.zeros(9, dtype=torch.bool)), 0).tolist() == []
    means = {n: abs(sum(counts) * n / 32 - sum(budgets)) for n in range(1, 32)}
    assert means[layer] == min(means.values())


def test_vtw_by_its_layer_and_with_all_tokens():
    assert [stage.layer for stage in make_method("vtw", layer=15).stages([9], [9], range(1, 32))] == [15]
    assert make_method("vtw").stages([9, 4], [9, 4], range(1, 32)) == ()


def test_ptp_and_ivc_prune_are_one_stage_each():
    (stage,) = make_method("ptp", alpha=0.2).stages([576, 100], [64, 9], range(1, 32))
    assert (stage.layer, stage.budgets, stage.rule) == (2, (64, 9), RULES["pyramid"](alpha=0.2))
    for depth, options, layer in ((32, {}, 16), (3, {}, 1), (2, {}, 1), (32, {"layer": 20}, 20)):
        (stage,) = make_method("ivc-prune", seed_share=0.1, **options).stages([576], [64], range(1, depth))
        assert (stage.layer, stage.budgets, stage.rule) == (layer, (64,), RULES["coordinates"](seed_share=0.1))


def test_btp_attends_more_the_deeper():
    for options, layers in (({}, [8, 16, 24]), ({"layers": "3, 9"}, [3, 9])):
        stages = make_method("btp", **options).stages([576], [72], range(1, 32))
        assert [stage.layer for stage in stages] == layers and stages[-1].budgets == (72,)
        shares = [stage.rule.attention_share for stage in stages]
        assert shares == [(n + 1) / len(layers) for n in range(len(layers))]
    assert [stage.layer for stage in make_method("btp").stages([9], [3], range(1, 3))] == [1, 2]


def test_g_search_is_its_plan_at_the_plans_own_budget():
    method = make_method("g-search", plan="2:0.5,5:0.25")
    stages = method.stages([400], [100], range(1, 8))
    assert [(stage.layer, stage.budgets) for stage in stages] == [(2, (200,)), (5, (100,))]
    stages = method.stages([400], [25], range(1, 8))  # (1/4)^2 = 1/16
    assert [(stage.layer, stage.budgets) for stage in stages] == [(2, (100,)), (5, (25,))]
    assert method.stages([400], [400], range(1, 8)) == ()
    assert {stage.rule for stage in stages} == {RULES["attention"]()}


@settings(max_examples=60)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(2, 80), st.integers(1, 3))
def test_g_search_without_a_plan_falls_to_k(count, share, depth, first):
    k, layers = max(1, round(share * count)), range(min(first, depth - 1), depth)
    stages = make_method("g-search").stages([count], [k], layers)
    counts = [count, *(stage.budgets[0] for stage in stages)]
    assert counts[-1] == k and counts == sorted(set(counts), reverse=True)
    assert all(stage.layer in layers for stage in stages)


# (rule, options, the same written out)
RULE_MATRIX = [
    ("duplication", {}, slow.duplication),
    ("duplication", {"visual_pivots": 1, "text_pivots": 0}, slow.duplication),
    ("duplication", {"visual_pivots": 7, "text_pivots": 2}, slow.duplication),
    ("suppression", {}, slow.suppression),
    ("suppression", {"centre": 0.3, "radius": 2.3, "sigma": 4.0, "likeness": 0.8}, slow.suppression),
    ("suppression", {"radius": 0.0}, slow.suppression),
    ("pyramid", {}, slow.pyramid),
    ("pyramid", {"alpha": 0.9}, slow.pyramid),
    ("coordinates", {}, slow.coordinates),
    ("coordinates", {"coordinate_share": 0.7, "seed_share": 0.2}, slow.coordinates),
    ("balanced", {}, slow.balanced),
    ("balanced", {"attention_share": 0.4}, slow.balanced),
    ("balanced", {"attention_share": 0.0}, slow.balanced),
    ("attention", {}, lambda layer_signals, k, rule: sorted(slow.ranked(layer_signals.attention.tolist())[:k])),
]


@st.composite
def sights(draw):
    """What a rule sees: all tokens of some views, or what an earlier stage left, and a text of 0 to 5 tokens."""
    signals, _ = draw(problems())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tokens = (torch.rand(signals.count, generator=generator) < draw(st.sampled_from([0.6, 1.0]))).nonzero()[:, 0]
    text = torch.randn(draw(st.integers(0, 5)), 12, generator=generator).to(signals.image_embeds.dtype)
    layer_signals = LayerSignals(
        tokens,
        torch.zeros(len(tokens), dtype=torch.bool),
        signals.views,
        attention=signals.saliency[tokens].double(),
        hidden_states=signals.image_embeds[tokens],
        keys=signals.vision_features[tokens],
        text_hidden_states=text[:, :7],
        text_keys=text[:, 7:],
        saliency=signals.received_attention[tokens],
        values=signals.image_embeds[tokens],
        text_values=text[:, :7],
        rotary=torch.rand(len(tokens), 2, generator=generator) * 2 - 1,
    )
    return layer_signals, draw(st.integers(0, len(tokens)))


@pytest.mark.parametrize(("name", "options", "written_out"), RULE_MATRIX)
@settings(deadline=None, max_examples=40)
@given(sights())
def test_each_rule_is_what_its_formula_says(name, options, written_out, problem):
    layer_signals, k = problem
    rule = RULES[name](**options)
    kept = rule.select(layer_signals, k)
    assert kept.dtype == torch.int64 and kept.shape == (k,) and bool((kept.diff() > 0).all())
    assert k == 0 or (int(kept[0]) >= 0 and int(kept[-1]) < len(layer_signals.tokens))
    assert torch.equal(kept, rule.select(layer_signals, k))
    assert kept.tolist() == written_out(layer_signals, k, rule)
    assert rule.select(layer_signals, len(layer_signals.tokens)).tolist() == list(range(len(layer_signals.tokens)))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9), st.integers(0, 6), st.sampled_from([0.0, 1.0, 30.0]), st.sampled_from(DTYPES), st.integers(0, 99)
)
def test_raters(visual, text, scale, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    visual, text = ((scale * torch.randn(n, 5, generator=generator)).to(dtype) for n in (visual, text))
    if seed % 3 == 0:  # a question that says one thing only
        text = text[:1].expand(len(text), -1)
    rates = RULES["rated-attention"]().raters(visual, text)
    assert rates.tolist() == (slow.raters(visual, text) if len(text) else [])


def test_adaptprune_spreads_what_attention_would_keep_in_one_place():
    """Two bright spots, of which attention alone keeps the one; with unlike keys it does here, too."""
    attention = torch.full((12, 12), 0.001, dtype=torch.float64)
    attention[5:7, 5:7], attention[2, 9] = 0.1, 0.08
    layer_signals = LayerSignals(
        torch.arange(144), torch.zeros(144, dtype=torch.bool), (View(12, 12),), attention.flatten()
    )
    alike, unlike = replace(layer_signals, keys=torch.ones(144, 8)), replace(layer_signals, keys=torch.eye(144))
    assert RULES["suppression"]().select(alike, 2).tolist() == [2 * 12 + 9, 5 * 12 + 5]
    assert RULES["suppression"]().select(unlike, 4).tolist() == [65, 66, 77, 78]


def test_rules_pick_by_attention():
    within = torch.tensor([False, True, False, True, False])
    layer_signals = LayerSignals(torch.arange(5), within, attention=torch.tensor([0.4, 0.1, 0.2, 0.0, 0.2]))
    assert RULES["attention"]().select(layer_signals, 2).tolist() == [0, 2]
    assert RULES["stage-attention"]().select(layer_signals, 0).tolist() == []
    assert RULES["region"]().select(layer_signals, 2).tolist() == [1, 3]
    assert [RULES["region-attention"]().select(layer_signals, k).tolist() for k in (1, 2, 4)] == [
        [1],
        [1, 3],
        [0, 1, 2, 3],
    ]
    left = replace(layer_signals, tokens=torch.tensor([1, 2, 5, 7, 9]))
    assert RULES["selection"](tokens=(2, 5, 8, 9)).select(left, 3).tolist() == [1, 2, 4]  # of the prompt's tokens
    assert {rule.name for rule in RULES.values()} == set(RULES)


def test_unknown_names_and_options_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'grid'.*gridprune.*uniform"):
        make_method("grid")
    with pytest.raises(ValueError, match=r"'size'.*zone, alpha"):
        make_method("gridprune", size=3)
    with pytest.raises(ValueError, match=r"'alpha'.*none"):
        make_method("uniform", alpha=0.2)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("gridprune", "zone", 0),
        ("gridprune", "alpha", 1.1),
        ("gridprune", "alpha", math.nan),
        ("gridprune", "region_share", -0.1),
        ("gridprune", "temperature", 0.0),
        ("gridprune", "temperature", math.inf),
        ("gridprune", "temperature", math.nan),
        ("gridprune", "saliency_scale", "log"),
        ("gridprune", "relevance_sign", 0),
        ("topk-relevance", "relevance_sign", 2),
        ("fastv", "layer", 0),
        ("dart", "layer", 0),
        ("dart", "visual_pivots", 0),
        ("dart", "text_pivots", -1),
        ("adaptprune", "layer", 0),
        ("adaptprune", "centre", 0.0),
        ("adaptprune", "radius", -1.0),
        ("adaptprune", "radius", math.inf),
        ("adaptprune", "sigma", math.nan),
        ("adaptprune", "likeness", 0.0),
        ("ptp", "layer", 0),
        ("ptp", "alpha", -0.1),
        ("ivc-prune", "layer", -1),
        ("ivc-prune", "coordinate_share", 1.1),
        ("ivc-prune", "seed_share", math.nan),
        ("btp", "layers", "2,x"),
        ("btp", "layers", "3,2"),
        ("btp", "layers", "0,2"),
        ("g-search", "plan", "1"),
        ("g-search", "plan", "0:0.5"),
        ("g-search", "plan", "2:0.5,1:0.4"),
        ("g-search", "plan", "1:0.5,1:0.4"),
        ("g-search", "plan", "1:0.5,2:0.5"),
        ("g-search", "plan", "1:0.5,2:0.0"),
        ("sparsevlm", "count", "first"),
        ("vtw", "layer", -1),
        ("visionzip", "contextual_share", 1.1),
        ("visionzip", "merge_by", "max"),
        ("vispruner", "important_share", -0.1),
        ("vispruner", "step", 0),
        ("scope", "alpha", -1.0),
        ("scope", "alpha", math.inf),
        ("holov", "crops", "tiles"),
        ("cdpruner", "relevance_sign", 2),
        ("mmtok", "alpha", -0.5),
        ("mmtok", "text_temperature", 0.0),
        ("mmtok", "vision_temperature", math.nan),
        ("trim", "relevance_sign", -2),
        ("hired", "base_share", 1.5),
        ("hiprune", "alpha", 1.5),
        ("hivtp", "global_share", -0.5),
        ("hivtp", "regions", 0),
        ("hivtp", "window", 0),
        ("fopru", "strategy", "column"),
        ("vflowopt", "beta", 2.0),
        ("vflowopt", "recycled_share", -1.0),
        ("vflowopt", "cell", 0),
        ("rate", "oversampling", -1),
        ("rate", "seed", 2**63),
        # of another kind than the option
        ("gridprune", "zone", 2.5),
        ("gridprune", "alpha", "0.5"),
        ("gridprune", "saliency_scale", 1),
        ("trim", "mean_token", 1),
        ("random", "seed", True),
    ],
)
def test_options_out_of_range_are_errors(name, option, value):
    with pytest.raises(ValueError, match=option):
        make_method(name, **{option: value})


EQUIVARIANT = ("topk-relevance", "fastervlm", "vispruner", "divprune", "scope", "cdpruner", "mmtok", "trim", "rate")


@pytest.mark.parametrize("name", EQUIVARIANT)
@pytest.mark.parametrize("k", [1, 9, 40])
def test_the_order_of_tokens_does_not_matter(name, k):
    generator = torch.Generator().manual_seed(k)
    relevance, saliency = torch.rand(2, 60, generator=generator, dtype=torch.float64)
    vision_features, rows, question_embeds = (
        torch.randn(n, 50, generator=generator, dtype=torch.float64) for n in (60, 60, 3)
    )
    order = torch.randperm(60, generator=generator)
    here = Signals((View(6, 10),), relevance, saliency, None, vision_features, rows, question_embeds)
    there = Signals(
        (View(10, 6),), relevance[order], saliency[order], None, vision_features[order], rows[order], question_embeds
    )
    assert torch.equal(order[select(make_method(name), there, k)].sort().values, select(make_method(name), here, k))


@settings(deadline=None, max_examples=60)
@given(problems(), st.data())
def test_what_is_merged(problem, data):
    signals, k = problem
    method, written_out = data.draw(
        st.sampled_from(
            [
                (make_method("visionzip"), slow.visionzip_weights),
                (make_method("visionzip", merge_by="sum", contextual_share=0.5), slow.visionzip_weights),
                (make_method("vflowopt"), slow.vflowopt_weights),
                (make_method("vflowopt", recycled_share=0.8, cell=3), slow.vflowopt_weights),
                (make_method("trim"), slow.trim_weights),
                (make_method("trim", mean_token=False), slow.trim_weights),
                (make_method("trim", cosine=False), slow.trim_weights),
            ]
        )
    )
    kept = select(method, signals, k)
    weights = method.merge(signals, kept)
    if k == signals.count:
        assert weights is None
        return
    expected = torch.zeros(k, signals.count)
    for place, (_, parts) in enumerate(sorted(written_out(signals, k, method).items())):
        for token, share in parts.items():
            expected[place, token] = share
    alone = torch.eye(signals.count)[kept]
    assert torch.allclose(alone if weights is None else weights.to_dense(), expected)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("visionzip", "trim", "vflowopt")])
def test_all_others_merge_nothing(name):
    known = {signal: torch.rand(9, 5) for signal in VECTORS} | {signal: torch.rand(9) for signal in SCALARS}
    signals = Signals((View(3, 3),), torch.rand(9), torch.rand(9), **known)
    assert make_method(name).merge(signals, select(make_method(name), signals, 4)) is None


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_that_are_none(name):
    for bad, message in (
        (torch.rand(9), "shape"),
        (torch.full((9, 2), math.nan), "finite"),
        (torch.rand(0, 2), "shape"),
    ):
        with pytest.raises(ValueError, match=f"{name} has .*{message}"):
            Signals((View(3, 3),), **{name: bad})
    if name != "question_embeds":
        with pytest.raises(ValueError, match="9 tokens"):
            Signals((View(3, 3),), **{name: torch.rand(8, 2)})


# GridPrune


def slow_gridprune(signals, k, method):
    """The formulas, token by token and zone by zone."""
    relevance = [value * method.relevance_sign for value in signals.relevance.tolist()]
    saliency = signals.saliency.tolist()
    low, high = min(saliency), max(saliency)
    scale = {
        "none": lambda a: a,
        "max": lambda a: a / high if high else 0.0,
        "minmax": lambda a: (a - low) / (high - low) if high > low else 0.0,
        "rank": lambda a: sum(b < a for b in saliency) / (len(saliency) - 1),
    }[method.saliency_scale]
    score = [
        (1 - method.alpha) * (r + 1) / 2 + method.alpha * scale(a) for r, a in zip(relevance, saliency, strict=True)
    ]
    sides, first, number = {True: {}, False: {}}, 0, 0
    for view in signals.views:
        left, top, right, bottom = view.box
        zone_rows, zone_cols = math.ceil(view.rows / method.zone), math.ceil(view.cols / method.zone)
        for i in range(zone_rows):
            for j in range(zone_cols):
                for row in range(i * view.rows // zone_rows, (i + 1) * view.rows // zone_rows):
                    for col in range(j * view.cols // zone_cols, (j + 1) * view.cols // zone_cols):
                        x = 8 * (left + (col + 0.5) / view.cols * (right - left)) + 1e-9
                        y = 8 * (top + (row + 0.5) / view.rows * (bottom - top)) + 1e-9
                        box = signals.region
                        within = box is None or (box[0] <= x < box[2] + 1 and box[1] <= y < box[3] + 1)
                        sides[within].setdefault(number, []).append(first + row * view.cols + col)
                number += 1
        first += view.count
    sizes = {side: sum(map(len, zones.values())) for side, zones in sides.items()}
    quotas = {True: k, False: 0}
    if signals.region is not None:
        inner = min(math.floor(max(method.region_share, sizes[True] / sum(sizes.values())) * k + 0.5), sizes[True])
        if inner == k and k > 1 and sizes[False]:
            inner -= 1
        outer = min(k - inner, sizes[False])
        quotas = {True: k - outer, False: outer}
    kept, limits = [], {}
    for side, zones in sides.items():
        powers = {j: math.exp(statistics.fmean(relevance[i] for i in m) / method.temperature) for j, m in zones.items()}
        budgets = slow_budgets(powers, {j: len(m) for j, m in zones.items()}, quotas[side])
        for j, members in zones.items():
            kept += sorted(members, key=lambda i: -score[i])[: budgets[j]]
            limits[side, j] = budgets[j] + 1
    by_cosine = signals.relevance_kind in ("clip", "siglip")
    way = {"auto": "unlike" if by_cosine else "apart"}.get(method.few, method.few)
    if way == "top" or k >= number:
        return sorted(kept)
    halves = {(side, j): members for side, zones in sides.items() for j, members in zones.items()}
    if way == "apart":
        part_of = {i: half for half, members in halves.items() for i in members}
        return slow_spaced(score, signals.views, part_of, limits, quotas, 2)
    return slow_diverse(relevance, signals.vision_features.tolist(), halves, quotas, signals.region is not None)


def slow_spaced(score, views, part_of, limits, quotas, spacing):
    """Again and again the best token that may still be taken; what is near it counts less from then on."""
    places = [(v, row, col) for v, view in enumerate(views) for row in range(view.rows) for col in range(view.cols)]
    low, high = min(score), max(score)
    value = [(s - low) / (high - low) for s in score]
    limits, quotas, kept = dict(limits), dict(quotas), []
    while sum(quotas.values()):
        free = [i for i in range(len(score)) if i not in kept and limits[part_of[i]] and quotas[part_of[i][0]]]
        best = max(free, key=lambda i: value[i])
        kept.append(best)
        limits[part_of[best]] -= 1
        quotas[part_of[best][0]] -= 1
        for i, (view, row, col) in enumerate(places):
            if view == places[best][0]:
                square = (row - places[best][1]) ** 2 + (col - places[best][2]) ** 2
                value[i] *= round((1 - math.exp(-square / (2 * spacing**2))) * 2**32) / 2**32
    return sorted(kept)


def slow_diverse(relevance, features, zones, quotas, region):
    """Again and again the token, of those that may be taken, of which most is above the median and in no taken one."""
    # 1. how far each token is above the median
    median, high = statistics.median_low(relevance), max(relevance)
    excess = [max(0, r - median) / (high - median) if high > median else float(r == high) for r in relevance]
    # 2. budgets by the squares of that; inside the region not fewer than its quota
    k, weights = sum(quotas.values()), {zone: math.fsum(excess[i] ** 2 for i in m) for zone, m in zones.items()}
    sizes, most = {zone: len(members) for zone, members in zones.items()}, dict(quotas)
    if region:
        most[True] = k - min(1, quotas[False])
        by_weight = slow_budgets(weights, sizes, k)
        inner = min(max(quotas[True], sum(n for (side, _), n in by_weight.items() if side)), most[True])
        quotas = {True: inner, False: k - inner}
    limits = {}
    for side in quotas:
        of_side = [zone for zone in zones if zone[0] == side]
        budgets = slow_budgets(
            {zone: weights[zone] for zone in of_side}, {zone: sizes[zone] for zone in of_side}, quotas[side]
        )
        limits |= {zone: budget + 1 for zone, budget in budgets.items()}
    # 3. one by one; what a taken vector spans is taken out of all others
    zone_of = {i: zone for zone, members in zones.items() for i in members}
    outside = [[x / math.hypot(*vector) for x in vector] for vector in features]
    kept = []
    while len(kept) < k:
        free = [i for i in zone_of if i not in kept and limits[zone_of[i]] and most[zone_of[i][0]]]
        squares = {i: math.fsum(x * x for x in outside[i]) for i in free}
        gains = {i: excess[i] ** 4 * squares[i] for i in free if squares[i] > 1e-8 and excess[i]}
        if gains:
            best = max(gains, key=gains.get)
            slow.take_out(outside, best)
        else:
            best = min(free, key=lambda i: (-relevance[i], i))
        kept.append(best)
        limits[zone_of[best]] -= 1
        most[zone_of[best][0]] -= 1
    return sorted(kept)


def slow_budgets(weights, caps, k):
    """Shares of what is left among zones with room, until none overflows; then the largest remainders.

    Where no zone with room has weight, all have the same.
    """
    shares, open_, left = {}, set(weights), k
    while open_:
        if not any(weights[j] for j in open_):
            weights = dict.fromkeys(weights, 1.0)
        total = sum(weights[j] for j in open_)
        full = {j for j in open_ if left * weights[j] / total >= caps[j]}
        if not full:
            shares |= {j: left * weights[j] / total for j in open_}
            break
        shares |= {j: caps[j] for j in full}
        left -= sum(caps[j] for j in full)
        open_ -= full
    budgets = {j: math.floor(share) for j, share in shares.items()}
    for j in sorted(shares, key=lambda j: budgets[j] - shares[j])[: k - sum(budgets.values())]:
        budgets[j] += 1
    return budgets


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_gridprune_is_what_the_formulas_say(data):
    views = data.draw(st.sampled_from([(View(8, 8),), (View(1, 17),), (View(7, 11),), (View(5, 5), *TILES)]))
    count = sum(view.count for view in views)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    relevance, saliency = torch.rand(2, count, generator=generator, dtype=torch.float64)
    features = torch.randn(count, data.draw(st.sampled_from([3, 30])), generator=generator, dtype=torch.float64)
    region, kind = (
        data.draw(st.sampled_from(REGIONS)),
        data.draw(st.sampled_from(["clip", "siglip", "attention", "words"])),
    )
    signals = Signals(views, relevance - 0.4, saliency, region, features, relevance_kind=kind)
    method = GridPrune(
        zone=data.draw(st.integers(1, 5)),
        alpha=data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])),
        temperature=data.draw(st.sampled_from([0.05, 0.1, 1.0])),
        saliency_scale=data.draw(st.sampled_from(SALIENCY_SCALES)),
        region_share=data.draw(st.sampled_from([0.0, 0.5, 0.8, 1.0])),
        few=data.draw(st.sampled_from(FEW)),
        relevance_sign=data.draw(st.sampled_from([1, -1])),
    )
    k = data.draw(st.integers(1, count - 1))
    assert select(method, signals, k).tolist() == slow_gridprune(signals, k, method)


def test_relevant_zones_keep_more_the_colder_the_more():
    relevance = torch.zeros(8, 8)
    relevance[:4, :4] = 0.3
    signals = Signals((View(8, 8),), relevance.flatten(), torch.rand(64, generator=torch.Generator().manual_seed(0)))
    budgets = []
    for options in (LITERAL, {"temperature": 0.1}, {"temperature": 0.01}):
        method = GridPrune(**{"few": "top"} | options)
        index, zones = method.zones(signals)
        budgets.append(torch.bincount(index[select(method, signals, 16)], minlength=zones.count).tolist())
    assert budgets == [[5, 4, 4, 3], [14, 1, 1, 0], [16, 0, 0, 0]]


def test_few_tokens_are_of_each_object_before_a_second_that_is_like_the_first():
    relevance, features = torch.zeros(16, 16), torch.rand(16, 16, 4, generator=torch.Generator().manual_seed(0))
    for value, (top, left) in ((0.9, (1, 1)), (0.8, (11, 2)), (0.7, (6, 12))):
        relevance[top : top + 3, left : left + 3] = value
        features[top : top + 3, left : left + 3] = torch.eye(4)[int(value * 10) - 6]
    signals = Signals((View(16, 16),), relevance.flatten(), torch.zeros(256), vision_features=features.flatten(0, 1))
    objects = {}
    for few in ("top", "apart", "unlike"):
        kept = select(GridPrune(few=few, temperature=0.02), signals, 3)
        objects[few] = sorted({round(float(value), 1) for value in relevance.flatten()[kept]})
    assert objects == {"top": [0.9], "apart": [0.7, 0.8, 0.9], "unlike": [0.7, 0.8, 0.9]}


def test_a_zone_exceeds_its_budget_by_one_at_most():
    signals = Signals((View(8, 8), View(4, 4)), *torch.rand(2, 80, generator=torch.Generator().manual_seed(0)))
    index, zones = GridPrune().zones(signals)
    for k in (4, 5):  # of five zones
        counts = [
            torch.bincount(index[select(GridPrune(few=few), signals, k)], minlength=zones.count)
            for few in ("top", "apart")
        ]
        assert int(counts[1].sum()) == k and int((counts[1] - counts[0]).max()) == (1 if k < zones.count else 0)


def test_few_tokens_are_all_letters_of_a_word():
    relevance, features = torch.zeros(16, 16), torch.ones(16, 16, 6)
    relevance[5, 4:7], relevance[10:12, 10:12] = 0.9, 0.3
    features[5, 4:7] += 2 * torch.eye(6)[:3]  # unlike each other, but for what all tokens have in common
    signals = Signals((View(16, 16),), relevance.flatten(), torch.zeros(256), vision_features=features.flatten(0, 1))
    assert {84, 85, 86} <= set(select(GridPrune(), signals, 5).tolist())


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_budgets_give_the_region_its_share_at_least(data):
    caps = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=2))
    )
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.1, 5.0]), min_size=6, max_size=6))).view(2, 3)
    within, count = int(caps[0].sum()), int(caps.sum())
    assume(count > 1)
    quotas = region_quotas(data.draw(st.integers(1, count - 1)), within, count, data.draw(st.floats(0, 1)))
    budgets, most = least_share_budgets(weights, caps, quotas)
    assert int(budgets.sum()) == sum(quotas) and bool(((budgets >= 0) & (budgets <= caps)).all())
    assert int(budgets[0].sum()) >= quotas[0] and int(budgets[1].sum()) >= min(1, quotas[1])
    assert most.tolist() == [sum(quotas) - min(1, quotas[1]), quotas[1]]


@pytest.mark.parametrize(
    ("relevance", "expected"),
    [
        ([0.0, 0.25, 0.75, 0.5], [0.0, 0.0, 1.0, 0.5]),  # the median is the lower of 0.25 and 0.5
        ([-0.25, -0.25, -0.25], [1.0, 1.0, 1.0]),
        ([0.5, 0.5, 0.5, 0.0], [1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_relevance_above_its_median(relevance, expected):
    assert above_median(torch.tensor(relevance, dtype=torch.float64)).tolist() == expected


@pytest.mark.parametrize("region", REGIONS[:4])
def test_few_tokens_of_no_relevance_and_no_difference_are_still_k(region):
    signals = Signals((View(8, 8),), torch.zeros(64), torch.zeros(64), region, torch.ones(64, 2))
    for k in range(1, 16):
        assert len(select(GridPrune(zone=2), signals, k).unique()) == k


@pytest.mark.parametrize(
    ("k", "within", "count", "share", "expected"),
    [
        (10, 50, 100, 0.8, [8, 2]),
        (10, 5, 100, 0.8, [5, 5]),  # a small region's surplus goes outside
        (10, 0, 100, 0.8, [0, 10]),
        (10, 50, 100, 1.0, [9, 1]),  # never blind outside
        (1, 50, 100, 0.8, [1, 0]),
        (10, 100, 100, 0.8, [10, 0]),  # there is no outside
        (10, 99, 100, 0.5, [9, 1]),  # nor enough of it
        (99, 50, 100, 0.2, [50, 49]),
        (5, 50, 100, 0.5, [3, 2]),  # half a token counts as one inside
        (10, 50, 100, 0.0, [5, 5]),  # inside is never kept more thinly than outside
    ],
)
def test_region_quotas(k, within, count, share, expected):
    assert region_quotas(k, within, count, share) == expected


# The others


def test_random_draws_every_token_alike_and_leaves_the_global_generator_alone():
    signals = Signals((View(4, 5),))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    draws = torch.cat([select(make_method("random", seed=seed), signals, 5) for seed in range(800)])
    assert torch.equal(torch.rand(1), expected)
    counts = torch.bincount(draws, minlength=20)  # 200 expected each, standard deviation 12
    assert int(counts.min()) > 140 and int(counts.max()) < 260


def covering_radius(rows, cols, kept):
    """How far the token that is farthest from any kept token is from the nearest one."""
    places = [divmod(i, cols) for i in kept]
    return max(min(math.dist((r, c), place) for place in places) for r in range(rows) for c in range(cols))


def best_lattice_radius(rows, cols, k):
    """The smallest covering radius of any m x n lattice, centred, of at most k tokens."""
    radii = []
    for m in range(1, min(rows, k) + 1):
        n = min(k // m, cols)
        lines = [(2 * i + 1) * rows // (2 * m) for i in range(m)]
        columns = [(2 * j + 1) * cols // (2 * n) for j in range(n)]
        radii.append(covering_radius(rows, cols, [r * cols + c for r in lines for c in columns]))
    return min(radii)


@pytest.mark.parametrize(
    ("rows", "cols", "ks"),
    [
        (16, 16, (1, 2, 3, 5, 7, 11, 16, 28, 64, 100, 200)),
        (24, 24, (16, 64)),
        (7, 13, (1, 4, 9, 20, 45, 90)),
        (1, 29, (1, 2, 5, 14, 28)),
        (31, 2, (1, 3, 10, 40)),
    ],
)
def test_uniform_covers_the_grid_as_well_as_a_lattice(rows, cols, ks):
    """Or, where that leaves single tokens out, at least so that each of them has a kept neighbour."""
    for k in ks:
        kept = select(make_method("uniform"), Signals((View(rows, cols),)), k).tolist()
        assert covering_radius(rows, cols, kept) <= max(best_lattice_radius(rows, cols, k), math.sqrt(2)) + 1e-9


def test_uniform_by_eye():
    assert select(make_method("uniform"), Signals((View(24, 24),)), 64).tolist() == [
        row * 24 + col for row in range(1, 24, 3) for col in range(1, 24, 3)
    ]
    rows = torch.bincount(select(make_method("uniform"), Signals((View(16, 16),)), 28) // 16, minlength=16)
    assert rows.tolist() == [0, 5, 0, 0, 6, 0, 0, 0, 5, 0, 0, 6, 0, 0, 6, 0]


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_a_lattice_has_exactly_k_tokens(rows, cols, data):
    k = data.draw(st.integers(0, rows * cols))
    tokens = lattice(rows, cols, k)
    assert tokens.shape == (k,)
    assert k == 0 or (bool((tokens.diff() > 0).all()) and int(tokens[0]) >= 0 and int(tokens[-1]) < rows * cols)


def test_uniform_splits_k_over_views_by_size():
    signals = Signals((View(2, 2), View(4, 4)))
    assert torch.bincount((select(make_method("uniform"), signals, 10) >= 4).long()).tolist() == [2, 8]
