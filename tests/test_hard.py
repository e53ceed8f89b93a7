"""The recipe of the hard checkpoint: its scenes, its questions, and a training of a few steps."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, LlavaForConditionalGeneration, LlavaProcessor

from gridprune_cli.evaluation.data import open_data
from gridprune_cli.scenes.scene import COLOURS, SHAPES
from training.data import normalise
from training.hard import run
from training.hard.data import IGNORE, contents, one_hot
from training.hard.language import NAMES, fit_projector, names_of, pack
from training.hard.model import WIDTH, llava_config, make_tokenizer
from training.hard.questions import KINDS, MAX_COUNT, HardQuestion, ask, questions
from training.hard.scene import GRID, LETTERS, PATCH, SIZE, N, draw, make_scene, pixel_owners
from training.hard.tower import HardTower, embed
from training.hard.write import PER_SCENE, write_questions
from training.plan import Plan
from training.tower import embed as embed_all

SEEDS = range(40)


def test_scenes_are_as_the_docs_say():
    counts, lengths, sides = set(), set(), set()
    for seed in SEEDS:
        scene = make_scene(seed)
        counts.add(len(scene.objects))
        lengths |= {len(sign.text) for sign in scene.signs}
        sides |= {o.box[2] - o.box[0] for o in scene.objects}
        boxes = [o.box for o in (*scene.objects, *scene.signs)]
        for i, a in enumerate(boxes):
            assert 0 <= a[0] < a[2] <= SIZE and 0 <= a[1] < a[3] <= SIZE
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[i + 1 :])
        assert len({s.colour for s in scene.signs}) == len(scene.signs) >= 1
    assert min(counts) == 6 and max(counts) == 16 and lengths == {3, 4, 5}
    assert min(sides) / PATCH > 1.2 and max(sides) / PATCH < 1.8


def test_a_scene_follows_from_its_seed():
    assert make_scene(7) == make_scene(7) != make_scene(8)
    assert np.array_equal(draw(make_scene(7)), draw(make_scene(7)))
    assert draw(make_scene(7)).size == (SIZE, SIZE)


def test_signs_have_a_letter_in_each_patch():
    """The ink of a letter lies in its patch: 90 % of what is neither plate nor outside of it."""
    for seed in range(6):
        scene = make_scene(seed)
        for sign in scene.signs:
            plate = pixel_owners(scene) == len(scene.objects) + scene.signs.index(sign) + 1
            for patch in sign.patches:
                row, column = divmod(patch, GRID)
                block = plate[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
                assert block.mean() > 0.7


def test_questions_have_the_one_right_answer():
    kinds = set()
    for seed in SEEDS:
        scene = make_scene(seed)
        for q in questions(scene, 8, random.Random(seed)):
            kinds.add(q.kind)
            if q.kind == "word":
                (sign,) = [s for s in scene.signs if f"{s.colour} sign" in q.text]
                assert q.answer == sign.text and [p for (p,) in q.looks] == list(sign.patches)
            elif q.kind == "sign":
                assert [s.colour for s in scene.signs if s.text == q.text.rstrip("?").split()[-1]] == [q.answer]
            elif q.kind == "count":
                assert int(q.answer) == len(q.asked) == len(q.looks[0]) <= MAX_COUNT
            elif q.kind == "exists":
                assert (q.answer == "yes") == bool(q.asked)
            else:
                (i,) = q.asked
                assert getattr(scene.objects[i], q.kind) == q.answer
    assert kinds == set(KINDS)


def test_a_word_on_two_signs_names_neither():
    scene = next(s for s in map(make_scene, range(100)) if len(s.signs) > 1)
    twice = scene.__class__(
        0, scene.objects, tuple(s.__class__(s.row, s.column, s.offset, s.colour, "BAD") for s in scene.signs)
    )
    assert ask(twice, "sign", random.Random(0)) is None


def test_contents_are_of_the_patch_itself():
    """Independently of `contents`: at an object's patches its colour, its shape at one of them, a letter a patch."""
    for seed in range(5):
        scene = make_scene(seed)
        owner, surface, shape, letter, place = contents(scene)
        pixels = pixel_owners(scene)
        for i, obj in enumerate(scene.objects):
            assert [SHAPES[s - 1] for s in shape[owner == i] if s] == [obj.shape]
            assert set(surface[owner == i]) == {1 + list(COLOURS).index(obj.colour)}
            for patch in np.flatnonzero(owner == i):
                row, column = divmod(int(patch), GRID)
                assert (pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] == i + 1).any()
        for sign in scene.signs:
            assert "".join(LETTERS[n - 1] for n in letter[list(sign.patches)]) == sign.text
        assert (letter > 0).sum() == sum(len(s.text) for s in scene.signs)
        assert set(surface[owner == -1]) == {0} and set(surface[owner == -2]) <= {IGNORE}
        assert place[0] == 0 and place[GRID - 1] == 2 and place[N - 1] == 8


def test_contents_as_vectors():
    table = torch.from_numpy(contents(make_scene(0))).long().T[None, :, 1:]  # (1, N, 4)
    vectors = one_hot(table)
    assert vectors.shape == (1, N, WIDTH)
    assert torch.equal(vectors.sum(-1), (table >= 0).sum(-1).float())
    assert torch.equal(vectors[..., :17].argmax(-1), table[..., 0].clamp(min=0))


def test_tokenizer_reads_words_letter_by_letter():
    tokenizer = make_tokenizer(close=False)
    for text in ("BAD", "OPABA", "red", "top left", "3", "yes"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        assert len(ids) == (len(text) if text.isupper() else len(text.split()))
    rng = random.Random(0)
    for seed in SEEDS:
        for q in questions(make_scene(seed), 8, rng):
            assert tokenizer.unk_token_id not in tokenizer(f"USER: \n{q.text} ASSISTANT: {q.answer}").input_ids


def test_pack_looks_at_a_letter_for_each_token_of_the_answer():
    scene = next(s for s in map(make_scene, range(100)) if len(s.signs[0].text) == 4)
    question = next(
        q for i in range(99) if (q := ask(scene, "word", random.Random(i))) and q.asked[0] == len(scene.objects)
    )
    tokenizer = make_tokenizer(close=False)
    packed = pack([[question, question]], torch.arange(N)[None], tokenizer, random.Random(1))
    assert packed.probed.shape == (1, 8) and packed.asked.shape == (1, 8, N)
    assert [int(row.argmax()) for row in packed.asked[0]] == list(scene.signs[0].patches) * 2
    predicted = packed.labels[0, packed.probed[0]]  # the token after each probed one
    assert tokenizer.decode(predicted[:4]) == scene.signs[0].text


def test_embed_is_the_towers_own():
    vision = HardTower().clip.vision_model
    pictures = np.stack([np.asarray(draw(make_scene(seed))) for seed in range(2)])
    chosen = torch.stack([torch.arange(0, N, 4), torch.arange(1, N, 4)])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "randn", lambda *size, device: torch.zeros(size))
        chosen_alone = embed(vision, pictures, chosen)
    torch.testing.assert_close(chosen_alone, embed_all(vision, normalise(pictures, "cpu"), chosen), atol=1e-4, rtol=0)


def test_projector_is_fitted_to_what_it_gave_of_contents():
    projector = LlavaForConditionalGeneration(llava_config()).model.multi_modal_projector
    table = torch.from_numpy(np.stack([contents(make_scene(s)) for s in range(3)])).long().transpose(1, 2)[..., 1:]
    with torch.no_grad():
        before = projector(one_hot(table))
        features = torch.randn(WIDTH, WIDTH)  # a tower that gives contents, mixed
        fit_projector(projector, (one_hot(table) @ features).flatten(0, 1), table.flatten(0, 1))
        after = projector(one_hot(table) @ features)
    assert (after - before).norm() < 0.1 * before.norm()
    assert not projector.linear_1.weight.requires_grad and projector.linear_2.weight.requires_grad


def test_training_resumes_and_writes_a_checkpoint_that_answers(monkeypatch, tmp_path):
    led = {"kinds": KINDS, "led": ((1, 2), (2, 2))}
    monkeypatch.setattr(run, "TOWER", Plan(2, 2, 4, 0, 1e-3, ((1.0, 64),)))
    monkeypatch.setattr(run, "TOWER_AGAIN", Plan(1, 2, 4, 4, 1e-3, ((1.0, 64),), start=2))
    monkeypatch.setattr(run, "LANGUAGE", Plan(2, 2, 4, 4, 1e-3, ((1.0, 32),), **led))
    monkeypatch.setattr(run, "JOIN", Plan(2, 2, 4, 8, 1e-3, ((1.0, 32),), **led))
    monkeypatch.setattr(run, "JOIN_AGAIN", Plan(1, 2, 4, 8, 1e-3, ((1.0, 32),), start=2, **led))
    device = torch.device("cpu")
    run.train(tmp_path / "out", tmp_path / "work", 0, device, ("tower", "language"))
    assert not (tmp_path / "out").exists()
    run.train(tmp_path / "out", tmp_path / "work", 0, device)  # the first two are at their ends
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    clip = CLIPModel.from_pretrained(tmp_path / "out" / "clip")
    tower = llava.model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], value) for name, value in clip.vision_model.state_dict().items())
    processor = LlavaProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(
        images=draw(make_scene(0)), text="USER: <image>\nRead the red sign. ASSISTANT:", return_tensors="pt"
    )
    assert (inputs.input_ids == llava.config.image_token_index).sum() == N
    assert llava.generate(**inputs.to(torch.bfloat16), max_new_tokens=2).shape[1] > inputs.input_ids.shape[1]


def test_questions_are_written_as_eval_takes_them(tmp_path):
    write_questions(tmp_path, 7)
    items = open_data(str(tmp_path / "questions.jsonl")).items
    assert len(items) == 7 and {item.category for item in items} <= set(KINDS)
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len({line["image"] for line in lines}) == -(-7 // PER_SCENE)
    assert all(Image.open(tmp_path / line["image"]).size == (SIZE, SIZE) for line in lines)


def test_names_of_questions():
    count = HardQuestion("count", "how many red stars are there", "2", (0, 1), ((3, 4),))
    sign = HardQuestion("sign", "What colour is the sign with BAD?", "blue", (12,), ((1, 2, 3),))
    word = HardQuestion("word", "Read the cyan sign.", "BA", (12,), ((1,), (2,)))
    named = names_of([[count, sign], [word, count]], 3)
    assert named.shape == (2, 3, len(NAMES))
    held = [[{n for n, x in zip(NAMES, line, strict=True) if x == 1} for line in group] for group in named.tolist()]
    assert held == [[{"red", "star"}, {"B", "A", "D"}, set()], [{"cyan"}, {"cyan"}, {"red", "star"}]]
    assert named[0, 2].isnan().all() and named[0, :2].isfinite().all()
