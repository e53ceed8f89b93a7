"""Scenes and questions: the same for a seed everywhere, and true."""

import hashlib
import random
from collections import Counter

import numpy as np
import pytest

from gridprune_cli.scenes.questions import KINDS, ask, questions
from gridprune_cli.scenes.scene import (
    CHARACTERS,
    COLOURS,
    HELDOUT,
    SAMPLES,
    SHAPES,
    SIZE,
    TRAIN,
    TUNE,
    Scene,
    SceneObject,
    covering,
    draw,
    looks_like_scene,
    make_scene,
    neighbour,
)


def test_a_seed_is_a_scene():
    assert make_scene(7) == make_scene(7) != make_scene(8)
    first, owner = draw(make_scene(7))
    second, _ = draw(make_scene(7))
    assert first.tobytes() == second.tobytes() and first.size == (SIZE, SIZE)
    assert set(np.unique(owner)) == set(range(len(make_scene(7).objects) + 1))


@pytest.mark.parametrize("margin", [0, 8])
def test_boxes_cover_what_is_asked_for_and_no_cell_more(margin):
    for seed in range(50):
        scene = make_scene(seed)
        asked = tuple(range(0, len(scene.objects), 2))
        box = covering(scene, asked, margin)
        around = [
            (max(0, x0 - margin), max(0, y0 - margin), min(SIZE, x1 + margin), min(SIZE, y1 + margin))
            for x0, y0, x1, y1 in (scene.objects[i].box for i in asked)
        ]
        cells = {
            (x // 28, y // 28) for x0, y0, x1, y1 in around for x in range(x0, x1) for y in (*range(y0, y1, 7), y1 - 1)
        }
        columns, rows = zip(*cells, strict=True)
        assert box == (min(columns), min(rows), max(columns), max(rows))
    assert covering(scene, (), margin) == (0, 0, 7, 7)


def test_scenes_stay_as_they_were_trained_on():
    """A changed generator is another task: the model, and every figure in the docs, would have to be made anew."""
    seen = hashlib.sha256()
    for seed in range(50):
        scene = make_scene(seed)
        seen.update(repr(scene).encode())
        seen.update(repr(questions(scene, 8, random.Random(seed))).encode())
    assert seen.hexdigest() == "7b98018c41b46efd870ee3e5f108230993a675834a9d1f64f6e4521cb98999b4"


def test_the_splits_do_not_meet():
    from training.plan import COMPRESSOR, LANGUAGE, TOWER

    last = max(plan.first_seed + plan.scenes for plan in (TOWER, LANGUAGE, COMPRESSOR))
    assert TRAIN <= TOWER.first_seed < last < TUNE < HELDOUT < SAMPLES
    assert TOWER.first_seed + TOWER.scenes <= LANGUAGE.first_seed


@pytest.mark.parametrize("start", [0, HELDOUT])
def test_objects_are_apart_inside_and_in_their_place(start):
    for seed in range(start, start + 200):
        objects = make_scene(seed).objects
        assert 2 <= len(objects) <= 8
        assert len({o.place for o in objects}) == len(objects)
        for i, o in enumerate(objects):
            x0, y0, x1, y1 = o.box
            assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE and 38 <= x1 - x0 == y1 - y0 <= 58
            assert o.colour in COLOURS and o.shape in SHAPES and o.character in CHARACTERS
            for p in objects[:i]:
                assert x1 <= p.box[0] or p.box[2] <= x0 or y1 <= p.box[1] or p.box[3] <= y0


def test_an_object_is_drawn_in_its_colour_at_its_place():
    for seed in range(30):
        scene = make_scene(seed)
        picture, owner = draw(scene)
        pixels = np.asarray(picture, np.int32)
        for i, o in enumerate(scene.objects):
            shown = owner == i + 1
            rows, cols = np.nonzero(shown)
            assert o.box[0] <= cols.min() and cols.max() < o.box[2] and o.box[1] <= rows.min() and rows.max() < o.box[3]
            typical = np.median(pixels[shown], axis=0)
            distance = {name: np.abs(typical - rgb).sum() for name, rgb in COLOURS.items()}
            assert min(distance, key=distance.get) == o.colour


def refers(scene, text):
    """Objects that a phrase fits, read in another way than the one in which the generator writes."""
    tokens = text.replace("?", "").replace(".", "").replace("crosses", "cross").split()
    fits = list(range(len(scene.objects)))
    for word in tokens:
        single = word if word in COLOURS or word in SHAPES else word.rstrip("s")
        if single in COLOURS:
            fits = [i for i in fits if scene.objects[i].colour == single]
        elif single in SHAPES:
            fits = [i for i in fits if scene.objects[i].shape == single]
        elif len(word) == 1 and word in CHARACTERS:
            fits = [i for i in fits if scene.objects[i].character == word]
    return fits


def test_answers_are_true():
    for seed in range(300):
        scene = make_scene(seed)
        for question in questions(scene, 16, random.Random(seed)):
            fits, answer = refers(scene, question.text), question.answer
            if question.kind == "count":
                assert answer == str(len(fits))
            elif question.kind == "exists":
                assert answer == ("yes" if fits else "no")
            else:
                assert len(fits) == 1, question
                asked = scene.objects[fits[0]]
                if question.kind == "relation":
                    others = [o for o in scene.objects if o is not asked]
                    dx, dy = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[
                        next(w for w in ("left", "right", "above", "below") if w in question.text.split())
                    ]
                    gap = [
                        ((o.centre[0] - asked.centre[0]) * dx + (o.centre[1] - asked.centre[1]) * dy) for o in others
                    ]
                    if answer == "nothing":
                        assert question.asked == (fits[0],)
                    else:
                        named = [g for o, g in zip(others, gap, strict=True) if o.name == answer]
                        assert named and max(named) > 0
                else:
                    kind = {"object": "name"}.get(question.kind, question.kind)
                    assert answer == getattr(asked, kind)


def test_kinds_come_in_turn_and_answers_are_not_all_alike():
    kinds, answers = Counter(), {kind: Counter() for kind in KINDS}
    for seed in range(300):
        for question in questions(make_scene(seed), 8, random.Random(seed)):
            kinds[question.kind] += 1
            answers[question.kind][question.answer] += 1
    assert set(kinds) == set(KINDS) and max(kinds.values()) < 1.2 * min(kinds.values())
    for kind, counted in answers.items():
        assert counted.most_common(1)[0][1] < 0.65 * counted.total(), kind


def at(x, y, name="red circle"):
    colour, shape = name.split()
    return SceneObject((x - 20, y - 20, x + 20, y + 20), colour, shape, "A")


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([at(150, 100)], 1),  # plainly to the right
        ([], -1),  # nothing at all
        ([at(100, 200)], -1),  # below is not right
        ([at(150, 148)], None),  # on the diagonal
        ([at(150, 100), at(156, 110)], None),  # two about as near
        ([at(150, 100), at(200, 100)], 1),  # the nearer of two
    ],
)
def test_neighbours(others, expected):
    assert neighbour(Scene(0, (at(100, 100), *others)), 0, "right of") == expected


def test_a_kind_that_a_scene_does_not_allow():
    twins = Scene(0, (at(40, 40), at(180, 180)))
    assert ask(twins, "character", random.Random(0)) is None
    assert len(questions(twins, 4, random.Random(0))) == 4


def test_what_looks_like_a_scene():
    assert all(looks_like_scene(draw(make_scene(seed))[0]) for seed in range(100))
    picture = draw(make_scene(1))[0]
    assert not looks_like_scene(picture.resize((300, 224)))
    assert not looks_like_scene(picture.convert("L").convert("RGB"))
