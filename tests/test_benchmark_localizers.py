"""The localisers' benchmark: its measures against counts by hand, its formula against torch's own, and its figures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from benchmarks import localizers
from gridprune_cli.scenes.scene import HELDOUT, covering, draw, make_scene
from training import model

boxes = st.tuples(*[st.integers(0, 7)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def cells(box):
    return {(x, y) for x in range(box[0], box[2] + 1) for y in range(box[1], box[3] + 1)}


@given(boxes, boxes)
def test_overlap_counts_cells(a, b):
    expected = len(cells(a) & cells(b)) / len(cells(a) | cells(b))
    assert localizers.overlap(a, b) == pytest.approx(expected)
    assert localizers.area(a) == len(cells(a))


@given(boxes, st.integers(0, 50), st.sets(st.integers(0, 1)))
def test_held_counts_pixels(box, seed, asked):
    scene = make_scene(seed)
    owner = draw(scene)[1].astype(int)
    wanted = [(x, y) for y in range(224) for x in range(224) if owner[y, x] - 1 in asked] if asked else []
    inside = [(x, y) for x, y in wanted if (x // 28, y // 28) in cells(box)]
    expected = len(inside) / len(wanted) if wanted else 1.0
    assert localizers.held(scene, tuple(asked), box) == pytest.approx(expected)
    assert localizers.held(scene, tuple(asked), covering(scene, tuple(asked))) == 1.0


@pytest.mark.parametrize("configured", [model.llava_config, model.localizer_config], ids=["main", "localizer"])
def test_the_formula_counts_what_torch_counts(configured):
    config, cut = configured().to_dict(), configured()
    cut.vision_config.num_hidden_layers += 1 + cut.vision_feature_layer  # no layer behind the one that is read
    cut.vision_feature_layer = -1
    model = LlavaForConditionalGeneration._from_config(cut, attn_implementation="eager").eval()
    side = config["vision_config"]["image_size"]
    patches = (side // config["vision_config"]["patch_size"]) ** 2
    ids = torch.full((1, patches + 14), 5)
    ids[0, 3 : 3 + patches] = model.config.image_token_id
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, side, side), logits_to_keep=1)
    assert localizers.flops(config, 14, 1) == pytest.approx(counter.get_total_flops(), rel=0.005)


@pytest.mark.slow
def test_the_embedded_localizer_finds_what_is_asked_for():
    results = localizers.run(HELDOUT, 200)
    table = results["localizers"]["vlm"]
    one = table[localizers.ONE]
    assert one["held"] >= 0.95 and one["area"] <= 0.2 and one["iou"] >= 0.6
    assert results["unread"] == {"relevance": 0, "vlm": 0}
    results["cost"] = localizers.cost(HELDOUT, 2)
    assert results["cost"]["flops ratio"] <= 1 / 3
    text = localizers.markdown(results)
    assert f"| one object | {one['questions']} |" in text and text.count("\n| ") == 14
