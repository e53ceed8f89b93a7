"""Localisers: models that are asked for the contextual region (CROP, arXiv 2505.21233).

CROP fine-tunes a small vision-language model that answers a question with a box on an 8 x 8 grid over the picture. Any
supported model can be asked; of models that were not trained for it, the answer is read strictly, and what is no box
is told as such.
"""

import re
from dataclasses import dataclass
from typing import Any

from gridprune_cli.pruning.region import GRID, parse_box
from gridprune_cli.pruning.signals import Box

VLM = "vlm"  # the one that comes with the embedded model, which was trained on bare questions

TEMPLATE = (
    f"The image is divided into {GRID} columns and {GRID} rows of cells, numbered from 0 to {GRID - 1}, from left to "
    "right and from top to bottom. Which part of the image does one need to see to answer this question: {question} "
    "Answer with the smallest box of cells that holds that part, as [x0,y0,x1,y1]: its first column and row, then its "
    "last column and row. Say nothing else."
)
LONGEST = 32  # tokens of an answer


@dataclass(frozen=True)
class Localized:
    """What a localiser, called `name`, answered, and the box that this names, or None where it names none."""

    name: str
    answer: str
    box: Box | None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "answer": self.answer, "parsed": self.box is not None}


def read_answer(text: str) -> Box | None:
    """The box that an answer names: its only pair of brackets, with four ordered numbers from 0 to 7, else None."""
    found = re.findall(r"\[([^\[\]]*)\]", text)
    if len(found) != 1:
        return None
    try:
        return parse_box(re.sub(r"\s*,\s*", ",", found[0].strip()))
    except ValueError:
        return None
