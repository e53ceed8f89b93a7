"""Makes the pictures in this folder and questions.jsonl: `python sample_images/make.py`. The same bytes every time.

The scenes come from seeds that the embedded model never saw. They were chosen for being answered right with all tokens,
so they are examples, and no measure of the model: that is the benchmark. `hills.jpg` is no scene: a drawn landscape,
for trying what the tool says of other pictures, and for real models.
"""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import SAMPLES, draw, make_scene

FOLDER = Path(__file__).parent
SCENES = (0, 1, 3, 4, 6, 7, 8, 9)  # those of the first 10 on which the embedded model gets all questions right
EACH = 5  # questions per scene


def hills(width: int = 640, height: int = 427) -> Image.Image:
    """Hills in the evening: a sky, a sun, ridges one behind the other, and grain."""
    rng = np.random.default_rng(0)
    up = np.linspace(0, 1, height)[:, None, None]
    sky = (1 - up) * np.array([72, 96, 160]) + up * np.array([250, 190, 120])
    picture = Image.fromarray(np.broadcast_to(sky, (height, width, 3)).astype(np.uint8))
    ImageDraw.Draw(picture).ellipse((430, 120, 500, 190), fill=(255, 236, 190))
    picture = picture.filter(ImageFilter.GaussianBlur(3))
    x = np.arange(width)
    for layer in range(5):
        base = height * (0.45 + 0.11 * layer)
        ridge = base + sum(rng.normal(0, 18 / (k + 1)) * np.sin(x * (k + 1) / 70 + rng.uniform(0, 6)) for k in range(6))
        tint = tuple(int(v) for v in np.array([120, 110, 140]) * (1 - 0.19 * layer))
        outline = [(0, height), *zip(x.tolist(), ridge.tolist(), strict=True), (width, height)]
        ImageDraw.Draw(picture).polygon(outline, fill=tint)
    grain = rng.normal(0, 5, (height, width, 1))
    return Image.fromarray((np.asarray(picture, float) + grain).clip(0, 255).astype(np.uint8))


def main() -> None:
    lines = []
    for number, i in enumerate(SCENES, 1):
        scene = make_scene(SAMPLES + i)
        name = f"scene-{number}.png"
        draw(scene)[0].save(FOLDER / name, optimize=True)
        for question in questions(scene, EACH, random.Random(i)):
            lines.append(json.dumps({"image": name, "question": question.text, "answers": [question.answer]}))
    hills().save(FOLDER / "hills.jpg", quality=88)
    (FOLDER / "questions.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
