"""Questions about scenes, with the one right answer that follows from a scene's contents."""

import random
from dataclasses import dataclass

from gridprune_cli.scenes.scene import COLOURS, DIRECTIONS, SHAPES, Scene, neighbour

KINDS = ("character", "colour", "shape", "place", "count", "exists", "object", "relation")

PHRASES: dict[str, tuple[str, ...]] = {
    "character": (
        "What character is on the {}?",
        "Which character does the {} carry?",
        "What is written on the {}?",
        "Read the {}.",
    ),
    "colour": (
        "What colour is the {}?",
        "What color is the {}?",
        "Which colour does the {} have?",
        "Tell me the colour of the {}.",
    ),
    "shape": ("What shape is the {}?", "Which shape does the {} have?", "Tell me the shape of the {}."),
    "place": ("Where is the {}?", "In which part of the image is the {}?", "Where can I find the {}?"),
    "count": ("How many {} are there?", "Count the {}.", "What is the number of {}?"),
    "exists": ("Is there {}?", "Does the image show {}?", "Can you see {}?"),
    "object": (
        "Which object has the {}?",
        "What carries the {}?",
        "Which object is marked {}?",
        "What is the {} written on?",
    ),
    "relation": ("What is {} the {}?", "Which object is {} the {}?", "What can you see {} the {}?"),
}


@dataclass(frozen=True)
class Question:
    """A question about a scene. `asked` are the objects (by index) that the answer depends on."""

    kind: str
    text: str
    answer: str
    asked: tuple[int, ...]


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of a kind with one right answer, or None where the scene allows none."""
    writer = {"count": _count, "exists": _exists, "object": _object, "relation": _relation}.get(kind)
    if writer is not None:
        return writer(scene, rng)
    singled_out_by = {
        "character": ("pair", "colour", "shape"),
        "colour": ("shape", "character"),
        "shape": ("colour", "character"),
        "place": ("pair", "colour", "shape", "character"),
    }[kind]
    references = _references(scene, singled_out_by)
    if not references:
        return None
    i, reference = rng.choice(references)
    return Question(kind, rng.choice(PHRASES[kind]).format(reference), getattr(scene.objects[i], kind), (i,))


def questions(scene: Scene, n: int, rng: random.Random, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """n questions, kinds in turn from a random start; a kind that the scene does not allow is passed over."""
    out: list[Question] = []
    start, turn = rng.randrange(len(kinds)), 0
    while len(out) < n:
        question = ask(scene, kinds[(start + turn) % len(kinds)], rng)
        turn += 1
        if question is not None:
            out.append(question)
    return out


def _references(scene: Scene, properties: tuple[str, ...]) -> list[tuple[int, str]]:
    """(object, phrase) for every object that one of the properties singles out; "pair" is colour and shape."""
    references = []
    for how in properties:
        keys = [o.name if how == "pair" else getattr(o, how) for o in scene.objects]
        for i, key in enumerate(keys):
            if keys.count(key) == 1:
                phrase = {"colour": f"{key} object", "character": f"object with {key}"}.get(how, key)
                references.append((i, phrase))
    return references


def _count(scene: Scene, rng: random.Random) -> Question:
    how = rng.choice(("colour", "shape", "name"))
    present = [getattr(o, how) for o in scene.objects]
    key = rng.choice(sorted(set(present))) if rng.random() < 0.75 else _random_key(how, rng)
    asked = tuple(i for i, value in enumerate(present) if value == key)
    noun = f"{key} objects" if how == "colour" else f"{key}es" if key.endswith("cross") else f"{key}s"
    return Question("count", rng.choice(PHRASES["count"]).format(noun), str(len(asked)), asked)


def _exists(scene: Scene, rng: random.Random) -> Question:
    how = rng.choice(("colour", "shape", "name", "name"))
    present = [getattr(o, how) for o in scene.objects]
    if rng.random() < 0.35:  # with what is there by chance, about half of the answers are yes
        key = rng.choice(present)
    elif how == "name" and rng.random() < 0.6:  # the hard no: its colour is there, its shape is there, not together
        key = f"{rng.choice(scene.objects).colour} {rng.choice(scene.objects).shape}"
    else:
        key = _random_key(how, rng)
    asked = tuple(i for i, value in enumerate(present) if value == key)
    noun = f"{key} object" if how == "colour" else key
    noun = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    return Question("exists", rng.choice(PHRASES["exists"]).format(noun), "yes" if asked else "no", asked)


def _random_key(how: str, rng: random.Random) -> str:
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    return {"colour": colour, "shape": shape, "name": f"{colour} {shape}"}[how]


def _object(scene: Scene, rng: random.Random) -> Question | None:
    references = _references(scene, ("character",))
    if not references:
        return None
    i, _ = rng.choice(references)
    obj = scene.objects[i]
    return Question("object", rng.choice(PHRASES["object"]).format(obj.character), obj.name, (i,))


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    references = _references(scene, ("pair", "colour", "shape", "character"))
    rng.shuffle(references)
    for i, reference in references:
        options = [(d, j) for d in DIRECTIONS if (j := neighbour(scene, i, d)) is not None]
        if options:
            nothing = [o for o in options if o[1] < 0]
            something = [o for o in options if o[1] >= 0]
            direction, j = rng.choice(something if something and (not nothing or rng.random() < 0.75) else nothing)
            text = rng.choice(PHRASES["relation"]).format(direction, reference)
            return Question("relation", text, "nothing" if j < 0 else scene.objects[j].name, (i,) if j < 0 else (i, j))
    return None
