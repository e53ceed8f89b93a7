"""Schedules found on samples: which layers, which shares, and the file that the options of a method are read from."""

import json
from itertools import pairwise

import pytest
import torch
from test_calibrate import write_questions
from torch.nn.functional import cosine_similarity

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.evaluation import schedules
from gridprune_cli.evaluation.data import read_jsonl
from gridprune_cli.evaluation.run import FULL, Plan
from gridprune_cli.evaluation.schedules import SHARES, find_schedule
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning


@pytest.fixture
def pipeline(checkpoint):
    return Pipeline(str(checkpoint("qwen2_vl")), dtype="float32")


@pytest.fixture
def plan(tmp_path):
    return Plan(read_jsonl(str(write_questions(tmp_path, 1)), scored=False), (), max_new_tokens=4, batch=4)


def test_btp_takes_the_layers_that_change_most(pipeline, plan, monkeypatch):
    """Against transformers' own hidden states."""
    monkeypatch.setattr(schedules, "STAGES", 1)
    done = []
    schedule = find_schedule("btp", pipeline, plan, done.append)
    family, changes = pipeline.family, []
    for item in plan.data.items:
        image, _ = pipeline.encode(plan.data.find(item.images[0]))
        pruned = pipeline.prune(image, item.question, FULL.pruning)
        with torch.no_grad():
            out = family.load("language")(
                input_ids=pruned.input_ids[None],
                position_ids=pruned.position_ids[..., None, :],
                mm_encoder_outputs={"image": family.features([pruned.image_embeds])},
                **family.extras(pruned.input_ids[None]),
                output_hidden_states=True,
            ).hidden_states
        inputs = [hidden[0, pruned.input_ids == family.image_token] for hidden in out[: family.depth]]
        changes.append([1 - cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(inputs)])
    mean = torch.tensor(changes).mean(0)
    layers = range(family.first_inner, family.depth)
    assert schedule.figures["change"] == {
        str(layer): pytest.approx(float(mean[layer - 1]), abs=1e-5) for layer in layers
    }
    assert schedule.options == {"layers": str(max(layers, key=lambda layer: mean[layer - 1]))}
    assert sum(done) == len(plan.data.items)
    assert make_method("btp", **schedule.options).stages([9], [3], layers)[0].budgets == (3,)


@pytest.mark.parametrize(("least", "expected"), [({1: 0.25, 2: 0.06}, "1:0.25,2:0.06"), ({1: 1.0, 2: 0.5}, "2:0.5")])
def test_g_search_finds_the_least_share_of_each_layer(pipeline, plan, monkeypatch, least, expected):
    """Of a model whose answers change where fewer than some share of tokens is at a layer."""
    asked = []

    def answer(pipeline, plan, cell, step):
        step(len(plan.data.items))
        asked.append(cell)
        shares = dict(pair.split(":") for pair in cell.pruning.method.plan.split(",")) if cell is not FULL else {}
        left, changed = 1.0, False
        for layer, needed in least.items():
            left = float(shares.get(str(layer), left))
            changed |= left < needed
        return ["changed" if changed else "same"] * 4

    monkeypatch.setattr(schedules, "_all_answers", answer)
    monkeypatch.setattr(type(pipeline.family), "depth", 3)
    schedule = find_schedule("g-search", pipeline, plan, lambda count: None)
    assert schedule.options == {"plan": expected}
    assert schedule.figures == {"agreement": 1.0, "keep": float(expected.rpartition(":")[2])}
    assert len(asked) <= schedules.count_answers("g-search", pipeline, 1)
    assert all(cell.pruning.keep == float(cell.name.rpartition(":")[2]) for cell in asked[1:])


def test_g_search_of_a_model_that_needs_all_tokens(pipeline, plan, monkeypatch):
    monkeypatch.setattr(schedules, "_all_answers", lambda pipeline, plan, cell, step: [cell.name] * 4)
    with pytest.raises(GridpruneError, match="no layer can do with fewer tokens: with 75% of them"):
        find_schedule("g-search", pipeline, plan, lambda count: None)
    assert list(SHARES) == sorted(SHARES, reverse=True)


def test_a_schedule_goes_from_calibrate_to_ask_by_a_file(pipeline, command, tmp_path):
    questions, file = write_questions(tmp_path, 3), tmp_path / "schedule.json"
    model = ("--model", pipeline.model, "--dtype", "float32", "-q")
    code, out, err = command(
        "calibrate", questions, "--schedule", "btp", "-o", file, "--max-new-tokens", 2, "--json", *model
    )
    record = json.loads(out)
    assert (code, err) == (0, "") and json.loads(file.read_text()) == record
    assert (record["method"], record["questions"], record["model"]) == ("btp", 12, pipeline.model)
    assert record["fingerprint"] == pipeline.family.fingerprint
    ask = ("ask", tmp_path / "0.png", "What?", "--method", "btp", "--max-new-tokens", 2, *model)
    code, out, _ = command(*ask, "--json", "--method-option", f"@{file}")
    assert code == 0 and json.loads(out)["options"] == record["options"]
    stages = [str(stage["layer"]) for stage in json.loads(out)["inside"]["stages"]]
    assert record["options"]["layers"] == ",".join(stages)
    broken = tmp_path / "broken.json"
    broken.write_text("[]")
    for name, reason in ((broken, "holds no schedule; make one with"), (tmp_path / "none", "can't be read (No such")):
        code, out, err = command(*ask, "--method-option", f"@{name}")
        assert (code, out) == (2, "") and f"--method-option @{name}: {reason}" in err
    for arguments, reason in (
        (("--schedule", "btp"), "--output: --schedule needs it, too"),
        (("-o", file), "--schedule: --output needs it, too"),
        (("--schedule", "btp", "-o", tmp_path / "gone" / "s"), "there is no folder"),
        (("--schedule", "btp", "-o", file, "--dry-run"), "--dry-run: not with --schedule"),
        (("--schedule", "btp", "-o", file, "--keep", 0.5), "--keep 0.5: not with --schedule"),
    ):
        code, _, err = command("calibrate", questions, *arguments, *model)
        assert code == 2 and reason in err


def test_eval_reads_a_schedule(tmp_path):
    from gridprune_cli.cli.evaluate import read_cells

    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"method": "g-search", "options": {"plan": "1:0.5"}}))
    (cell,) = read_cells([f"g-search --method-option @{file}"], "0.1")
    assert cell.pruning == Pruning(keep=0.1, method=make_method("g-search", plan="1:0.5"))
    with pytest.raises(BadInput, match="can't be read"):
        read_cells(["g-search --method-option @nowhere"], "0.1")
