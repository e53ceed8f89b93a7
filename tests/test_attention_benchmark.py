"""The benchmark of attention as relevance: its maps against another way to the same attention, its scales by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import attention
from gridprune_cli.evaluation.data import scenes
from gridprune_cli.evaluation.run import FULL, Cell, Plan, answers
from gridprune_cli.generation import prompts
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.schedule import LayerSignals
from gridprune_cli.scenes.scene import TUNE
from gridprune_cli.settings import Request
from gridprune_cli.vlm.attention import watch_queries

QUESTIONS = 5  # about two images


@pytest.fixture(scope="module")
def trial():
    return attention.Trial(scenes(QUESTIONS, TUNE, "few"))


def test_the_last_tokens_attention_is_that_of_the_layer_when_watched(trial):
    pipeline = Pipeline("scenes")
    family, runner = pipeline.family, pipeline.runner()
    model = family.load("language")
    layer = model.model.language_model.layers[2].self_attn
    for item, image, attention_maps in zip(trial.items, trial.encoded, trial.attention, strict=True):
        pruned = runner.prune_one(Request((image,), item.question, FULL.pruning)).pruned
        ids, mask, positions = prompts(family, [pruned])  # one prompt, not padded
        weight = torch.zeros(mask.shape)
        weight[0, -1] = 1
        with torch.inference_mode(), watch_queries(layer, weight) as record:
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                mm_encoder_outputs={"image": family.features([pruned.image_embeds])},
                **family.extras(ids),
            )
        expected = record[0][0, (ids[0] == family.image_token)]
        torch.testing.assert_close(attention_maps[2].mean(0)[-1], expected, rtol=1e-4, atol=1e-6)


def test_masks_choose_the_tokens_that_they_are_named_after(trial):
    for item, masks, maps in zip(trial.items, trial.masks, trial.attention, strict=True):
        assert {len(mask) for mask in masks.values()} == {maps.shape[2]}
        assert masks["all"].all() and masks["last"].nonzero().tolist() == [[maps.shape[2] - 1]]
        words_and_sign = len(item.question.split()) + 1
        assert masks["question"].sum() == words_and_sign and masks["question"][:words_and_sign].all()
        assert masks["content"].any() and not masks["content"][~masks["question"]].any()


def test_maps_are_reduced_over_heads_and_tokens(trial):
    whole, tail = trial.attention[0][3], trial.masks[0]["question"]
    torch.testing.assert_close(trial.maps(3)[0], whole.amax((0, 1)).double())
    expected = whole.mean(0)[tail].mean(0).double()
    torch.testing.assert_close(trial.maps(3, "mean", "question", "mean")[0], expected)


def test_clip_in_the_place_of_attention_gives_what_an_evaluation_gives(trial):
    share = attention.SHARES[1]
    cell = Cell("gridprune", replace(attention.GRIDPRUNE, keep=share))
    answered = {}
    for _ in answers(Pipeline("scenes"), Plan(scenes(QUESTIONS, TUNE, "few"), (cell,)), answered):
        pass
    expected = [answered["gridprune", share, item.id].score for item in trial.items]
    sets = trial._select(trial.clip, cell.pruning)
    assert trial._scores(sets).tolist() == expected
    assert {len(pruned.kept) for pruned in sets} == {13}


def test_inside_the_listed_tokens_stay_from_the_layer_on(trial):
    kept = torch.tensor([3, 77, 78, 200])
    pruned = attention.select_inside(trial.family, trial.whole[0], kept, 3)
    assert pruned.schedule.tokens == (256, 256, 256, 4, 4, 4)
    signals = LayerSignals(torch.tensor([1, 3, 78, 200, 255]), torch.zeros(5, dtype=torch.bool))
    assert pruned.schedule.stages[0].rule.select(signals, 3).tolist() == [1, 2, 3]
    sets = [attention.select_inside(trial.family, whole, whole.kept[:-1], 3) for whole in trial.whole]
    assert trial._scores(sets).tolist() == trial.full.tolist()  # the last corner of these scenes holds nothing


def test_scales_by_hand():
    maps = torch.tensor([[0.0, 1.0, 4.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    by_name = {name: scale(maps)[0].tolist() for name, scale in attention.SCALES.items() if name != "z-score"}
    assert by_name == {
        "raw": [0, 1, 4],
        "square root": [0, 1, 2],
        "min-max, 0..1": [0, 0.25, 1],
        "min-max, -1..1": [-1, -0.5, 1],
        "square root, min-max, 0..1": [0, 0.5, 1],
        "log, min-max, 0..1": [0, pytest.approx(27.631021 / 29.017315), 1],
        "rank, 0..1": [0, 0.5, 1],
    }
    assert attention.minmax(maps)[1].tolist() == attention.ranks(maps)[1].tolist() == [0, 0, 0]
    far = torch.zeros(1, 101, dtype=torch.float64)
    far[0, 0] = 1
    assert attention.zscore(far)[0, 0] == 1  # ten standard deviations


def test_what_is_common_to_an_image_and_what_stands_out_are_left_out():
    maps = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 0.0], [9.0, 1.0, 1.0]])
    less = attention.without_common(maps, np.array(["a", "a", "b"]))
    assert less.tolist() == [[-2, 0, 2], [2, 0, -2], [9, 1, 1]]
    assert attention.without_top(maps).tolist() == [[1, 2, 2], [3, 3, 0], [1, 1, 1]]


def test_a_table_is_of_shares_of_the_full_score(trial):
    head, _, line = attention.table(trial, iter([("all of it", trial.clip, attention.TOPK)]))
    assert head == "| relevance | 0.11 | 0.05 | 0.02 |" and line.startswith("| all of it | ")
    figure = trial.figure(trial.clip, attention.TOPK)
    assert len(figure.of_full) == len(figure.errors) == 3
    assert line.count("±") == 3 and f"{100 * figure.of_full[0]:.1f} ± {100 * figure.errors[0]:.1f}" in line
