"""What `measure` counts, what it leaves out, and what it makes of the figures."""

import io
import json

import pytest

from gridprune_cli.bench import measure as bench
from gridprune_cli.bench.cost import Decoder, Roofline, kv_bytes, prefill_flops, prefill_steps
from gridprune_cli.bench.measure import Spread, count_steps, measure, sample_scene
from gridprune_cli.bench.rates import weight_bytes
from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import BadInput
from gridprune_cli.generation import Generated, generate
from gridprune_cli.images import load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm.quantized import linear_layers

QUESTION = "What colour is the star?"


@pytest.fixture
def pipeline(tiny_llava):
    return Pipeline(str(tiny_llava), dtype="float32")


def png(picture):
    """A picture as the bytes of an image file."""
    data = io.BytesIO()
    picture.image.save(data, "PNG")
    return data.getvalue()


def test_counts_are_those_of_the_answers(pipeline, noise, monkeypatch):
    measured, steps = [], []

    def watched(family, batch, *args, **options):
        measured.append((batch[0], generate(family, batch, *args, **options)[0]))
        return [measured[-1][1]]

    monkeypatch.setattr(bench, "generate", watched)
    report = measure(
        pipeline,
        png(noise((80, 60))),
        QUESTION,
        Pruning(keep=0.25),
        repeat=2,
        new_tokens=5,
        step=lambda: steps.append(1),
    )
    assert len(steps) == 9
    assert [len(answer.ids) for _, answer in measured] == [5] * 6  # no more and no fewer
    kept = [len(pruned.kept) for pruned, _ in measured]
    assert kept == [4, 16, 16, 4, 4, 16]  # in turn, and each is first in its turn
    decoder = Decoder.of(pipeline.family.load("language").config)
    for side, pruned in ((report.full, measured[1][0]), (report.pruned, measured[0][0])):
        prompt = len(pruned.input_ids)
        assert (side.tokens, side.prompt) == (len(pruned.kept), prompt)
        assert side.prefill_flops == prefill_flops(decoder, [prompt] * decoder.layers)
        assert side.kv_bytes == kv_bytes(decoder, [prompt] * decoder.layers, 4)
        linear = list(linear_layers(pipeline.family.load("language"), "model.language_model").values())
        steps = prefill_steps(decoder, [prompt] * decoder.layers, itemsize=4, weight_bytes=weight_bytes(linear))
        assert weight_bytes(linear) == 4
        assert side.roofline == Roofline.of(steps, report.rates)
        assert side.peak_bytes > 50 << 20
    assert report.load > 0 and report.encode.median > 0 and report.encode_peak_bytes > 50 << 20
    assert measure(pipeline, png(noise((80, 60))), QUESTION, Pruning(), repeat=1, new_tokens=2).load is None
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert record["ratio"]["flops"] == report.full.prefill_flops / report.pruned.prefill_flops
    assert record["pruned"]["prefill_ms"]["median"] == report.pruned.prefill.median
    assert {"tokens", "localize_ms", "select_ms", "decode_ms", "answer_ms", "kv_bytes", "peak_bytes"} <= set(
        record["full"]
    )


def test_tokens_that_leave_inside_count_in_the_layers_that_they_reach(pipeline, noise):
    report = measure(pipeline, png(noise((80, 60))), QUESTION, Pruning(keep=1.0, ilp=0.25), repeat=1, new_tokens=2)
    decoder = Decoder.of(pipeline.family.load("language").config)
    assert report.full.inside == (16,) * decoder.layers and report.pruned.tokens == 16
    assert report.pruned.inside[0] == 16 and report.pruned.inside[-1] == 4
    layers = [report.pruned.prompt - 16 + there for there in report.pruned.inside]
    assert report.pruned.prefill_flops == prefill_flops(decoder, layers) < report.full.prefill_flops
    assert report.pruned.kv_bytes == kv_bytes(decoder, layers, 4)


def test_a_selection_inside_is_measured_beside_pruning_before_and_from_scratch(pipeline, noise, monkeypatch):
    sets, steps = [], []

    def watched(family, batch, *args, **options):
        sets.extend(batch)
        return generate(family, batch, *args, **options)

    monkeypatch.setattr(bench, "generate", watched)
    pruning, picture = Pruning(keep=0.25, ilp="selection"), png(noise((80, 60)))
    report = measure(pipeline, picture, QUESTION, pruning, repeat=1, new_tokens=2, step=lambda: steps.append(1))
    assert len(steps) == count_steps(pruning, 1) == 10 and count_steps(Pruning(), 1) == 6
    order = [(len(pruned.kept), pruned.schedule is not None, pruned.prefix is not None) for pruned in sets]
    full, before, scratch, inside = (16, False, False), (4, False, False), (16, True, False), (16, True, True)
    assert order == [scratch, before, inside, full, full, inside, before, scratch]
    decoder = Decoder.of(pipeline.family.load("language").config)
    prompt, prefix = len(sets[0].input_ids), len(sets[2].prefix.ids)
    layers = [prompt, prompt - 12, prompt - 12]  # of 3 layers 1 sees all
    assert report.pruned.prefill_flops == prefill_flops(decoder, layers, [prompt - prefix, *layers[1:]])
    assert report.scratch.prefill_flops == prefill_flops(decoder, layers)
    assert report.before.prefill_flops == prefill_flops(decoder, [prompt - 12] * 3)
    assert report.pruned.kv_bytes == report.scratch.kv_bytes == kv_bytes(decoder, layers, 4)
    assert [name for name, _, _ in report.others] == ["before", "scratch"]
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert record["pruned_of"]["before"]["flops"] == report.pruned.prefill_flops / report.before.prefill_flops < 1
    assert record["pruned_of"]["scratch"]["prefill"]["median"] == pytest.approx(
        report.pruned.prefill.median / report.scratch.prefill.median
    )
    assert record["pruned"]["prefix_layers"] == 1 and record["scratch"]["prefix_layers"] == 0


def test_a_localizers_time_is_told_and_part_of_the_answer(pipeline, noise, tiny_llava, monkeypatch):
    seen = []
    run_tower = Encoder.run_tower

    def watched(self, pictures, *settings, **named):
        seen.append(self)
        return run_tower(self, pictures, *settings, **named)

    monkeypatch.setattr(Encoder, "run_tower", watched)
    asking = Pruning(keep=0.25, localizer=str(tiny_llava))
    report = measure(pipeline, png(noise((80, 60))), QUESTION, asking, repeat=2, new_tokens=2)
    assert seen.count(pipeline.encoder) == 3
    assert seen.count(pipeline.localizers.find(asking)) == 3  # the picture anew each time
    assert report.full.localize == Spread(0.0, 0.0, 0.0)
    pruned = report.pruned
    assert pruned.answer.low > pruned.localize.low > 0 and pruned.answer.high > pruned.localize.high
    assert json.loads(json.dumps(report.to_json()))["pruned"]["localize_ms"]["median"] == pruned.localize.median


def test_every_question_is_new_to_the_text_tower(pipeline, noise, monkeypatch):
    heard = []
    relevance = pipeline.family.relevance
    pieces = relevance._pieces

    def watched(questions):
        heard.extend(questions)
        return pieces(questions)

    monkeypatch.setattr(relevance, "_pieces", watched)  # of questions that were not read before
    measure(pipeline, png(noise((80, 60))), QUESTION, Pruning(query="star"), repeat=3, new_tokens=2)
    assert len(heard) == len(set(heard)) == 4 and all(text.startswith("star ") for text in heard)


def test_ratios_are_of_neighbours_and_the_first_round_does_not_count(pipeline, noise, monkeypatch):
    """Figures are made up here, so what must come out of them is known."""
    full, pruned = iter([9e9, 400.0, 900.0, 800.0]), iter([9e9, 100.0, 100.0, 400.0])

    def timed(family, batch, new_tokens, **options):
        prefill = next(full if len(batch[0].kept) == 16 else pruned)
        return [Generated("", (), prefill, 3 * prefill)]

    monkeypatch.setattr(bench, "generate", timed)
    report = measure(pipeline, png(noise((80, 60))), QUESTION, Pruning(keep=0.25), repeat=3, new_tokens=4)
    assert report.prefill == report.decode == Spread(4.0, 3.0, 6.5)  # of 4, 9 and 2
    assert report.full.prefill == report.full.decode == Spread(800.0, 600.0, 850.0)
    assert report.pruned.prefill.median == 100.0
    assert report.achieved == 4.0 / (report.full.prefill_flops / report.pruned.prefill_flops)
    assert 0 < report.selecting.low <= report.selecting.median


def test_spread_of_one_value_is_that_value():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3.0, 2.0, 4.0)


PEAK = """
import torch
from gridprune_cli.bench import measure as bench

bench._reset_peak("cpu")
before = bench._peak("cpu")
big = torch.ones(16 << 20)  # 64 MiB
assert 60 << 20 < bench._peak("cpu") - before < 80 << 20, (before, bench._peak("cpu"))
del big
bench._reset_peak("cpu")
assert bench._peak("cpu") - before < 20 << 20, (before, bench._peak("cpu"))
"""


def test_the_peak_is_of_what_came_since(server, tmp_path):
    """In a process of its own: here threads of other tests may free memory meanwhile."""
    script, err = tmp_path / "peak.py", tmp_path / "err"
    script.write_text(PEAK)
    with open(err, "wb") as stderr:
        process = server.start(script=script, streams=(None, stderr.fileno(), stderr.fileno()))
    assert process.wait(60) == 0, err.read_text()


def test_too_few_tokens_or_repeats(pipeline, noise):
    for repeat, new_tokens in ((0, 4), (1, 1)):
        with pytest.raises(BadInput, match="--repeat"):
            measure(pipeline, png(noise((80, 60))), QUESTION, Pruning(), repeat=repeat, new_tokens=new_tokens)


def test_sample_scenes():
    assert load_image(sample_scene("scenes")).image.size == (224, 224)
    assert load_image(sample_scene("else")).image.size == (672, 672)
