"""Questions about hard scenes: those about the first scenes that need no character or neighbour, and about signs."""

import random
from dataclasses import dataclass

from gridprune_cli.scenes import questions as first
from gridprune_cli.scenes.questions import Question
from training.hard.scene import HardScene

KINDS = ("word", "colour", "shape", "place", "count", "exists", "sign")
MAX_COUNT = 6

PHRASES: dict[str, tuple[str, ...]] = {
    "word": ("What does the {} say?", "What is written on the {}?", "Which word is on the {}?", "Read the {}."),
    "sign": ("Which colour is the sign that says {}?", "What colour is the sign with {}?"),
}


@dataclass(frozen=True)
class HardQuestion(Question):
    """A question about a hard scene; signs count on from the objects in `asked`.

    looks  the patches that each token of the answer is read from, in turn
    """

    looks: tuple[tuple[int, ...], ...] = ()


def ask(scene: HardScene, kind: str, rng: random.Random) -> HardQuestion | None:
    """A question of a kind with one right answer, or None where the scene allows none."""
    if kind in PHRASES:
        i = rng.randrange(len(scene.signs))
        sign, patches = scene.signs[i], scene.signs[i].patches
        about = f"{sign.colour} sign" if kind == "word" else sign.text
        if kind == "sign" and [s.text for s in scene.signs].count(sign.text) > 1:
            return None
        answer = sign.text if kind == "word" else sign.colour
        looks: tuple[tuple[int, ...], ...] = tuple((p,) for p in patches) if kind == "word" else (patches,)
        text = rng.choice(PHRASES[kind]).format(about)
        return HardQuestion(kind, text, answer, (len(scene.objects) + i,), looks)
    question = first.ask(scene, kind, rng)
    if question is None or (kind == "count" and int(question.answer) > MAX_COUNT):
        return None
    centres = tuple(scene.objects[i].centre_patch for i in question.asked)
    read = (centres,) * len(question.answer.split())
    return HardQuestion(kind, question.text, question.answer, question.asked, read)


def questions(scene: HardScene, n: int, rng: random.Random, kinds: tuple[str, ...] = KINDS) -> list[HardQuestion]:
    """n questions, kinds in turn from a random start; a kind that the scene does not allow is passed over."""
    out: list[HardQuestion] = []
    turn = rng.randrange(len(kinds))
    while len(out) < n:
        question = ask(scene, kinds[turn % len(kinds)], rng)
        turn += 1
        if question is not None:
            out.append(question)
    return out
