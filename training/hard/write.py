"""Held-out hard scenes as files: pictures, and questions as `gridprune eval` takes them."""

import json
import random
from pathlib import Path

from gridprune_cli.scenes.scene import HELDOUT
from training.hard.questions import questions
from training.hard.scene import draw, make_scene

PER_SCENE = 4  # questions


def write_questions(folder: Path, count: int, first_seed: int = HELDOUT) -> None:
    """`questions.jsonl` and `scene-SEED.png`; `category` is the kind of the question."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(first_seed, first_seed + -(-count // PER_SCENE)):
        scene, image = make_scene(seed), f"scene-{seed}.png"
        draw(scene).save(folder / image)
        for i, q in enumerate(questions(scene, PER_SCENE, random.Random(f"hard-questions-{seed}"))):
            line = {"id": f"{seed}-{i}", "image": image, "question": q.text, "answers": [q.answer], "category": q.kind}
            lines.append(json.dumps(line))
    (folder / "questions.jsonl").write_text("\n".join(lines[:count]) + "\n")
