"""Localisers: models that are asked for the contextual region (CROP, arXiv 2505.21233).

CROP fine-tunes a small vision-language model that answers a question with a box on an 8 x 8 grid over the picture. Any
supported model can be asked. The answer of one that was not trained for it is read strictly: what is no box counts as
none, and the result says so.
"""

import re
from dataclasses import dataclass
from typing import Any

from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import BadInput
from gridprune_cli.images import Source
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.pruning.region import GRID, parse_box
from gridprune_cli.pruning.signals import Box
from gridprune_cli.settings import RELEVANCE, Pruning, Request
from gridprune_cli.vlm import open_model
from gridprune_cli.vlm.checkpoint import EMBEDDED, EMBEDDED_LOCALIZER

VLM = "vlm"  # the localiser that comes with the embedded model; it was trained on bare questions

TEMPLATE = (
    f"The image is divided into {GRID} columns and {GRID} rows of cells, numbered from 0 to {GRID - 1}, from left to "
    "right and from top to bottom. Which part of the image does one need to see to answer this question: {question} "
    "Answer with the smallest box of cells that holds that part, as [x0,y0,x1,y1]: its first column and row, then its "
    "last column and row. Say nothing else."
)
MAX_ANSWER = 32  # tokens; a box takes about ten
ALL_TOKENS = Pruning(keep=1.0, method=make_method("uniform"))  # a localiser sees the whole picture


@dataclass(frozen=True)
class Localized:
    """What a localiser, called `name`, answered, and the box that its answer names, or None where it names none."""

    name: str
    answer: str
    box: Box | None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "answer": self.answer, "parsed": self.box is not None}


def read_answer(text: str) -> Box | None:
    """The box that an answer names: its only pair of brackets, with four ordered numbers from 0 to 7, else None."""
    brackets = re.findall(r"\[([^\[\]]*)\]", text)
    if len(brackets) != 1:
        return None
    try:
        return parse_box(re.sub(r"\s*,\s*", ",", brackets[0].strip()))
    except ValueError:
        return None


def localizer_request(image: Source, question: str, pruning: Pruning) -> Request:
    """What a localiser is asked, for the region of one image that a question is about."""
    template = pruning.localizer_template or ("{question}" if pruning.localizer == VLM else TEMPLATE)
    return Request((image,), template.replace("{question}", question), ALL_TOKENS)


class Localizers:
    """The localisers of a model, opened when they are first needed.

    encoder        the model's; localisers use the same cache, and store in the same way
    device, dtype, quantize  where localisers run, what they compute in and how their weights are held, as `open_model`
             takes them
    """

    def __init__(
        self, encoder: Encoder, device: str = "auto", dtype: str = "auto", quantize: str | None = None
    ) -> None:
        self._encoder, self._device, self._dtype, self._quantize = encoder, device, dtype, quantize
        self._opened: dict[str, Encoder] = {}

    def find(self, pruning: Pruning, images: int = 1) -> Encoder | None:
        """The model that is asked for the regions of `images` images of one question; None where no model is.

        Raises BadInput for a localiser that can't be used with this model, and as `open_model`.
        """
        name, encoder = pruning.localizer, self._encoder
        if name == RELEVANCE or not pruning.heeds_region(images):
            return None
        if name == VLM and encoder.model != EMBEDDED:
            raise BadInput(
                "it knows only the embedded model's scenes; name a model, as in `localizer=FOLDER`",
                field="localizer",
                value=VLM,
            )
        if name not in self._opened:
            model = EMBEDDED_LOCALIZER if name == VLM else name
            family = open_model(
                *(model, self._dtype, self._device), quantize=self._quantize, store=encoder.store, field="localizer"
            )
            self._opened[name] = Encoder(family, encoder.store, encoder.cache_dtype)
        return self._opened[name]
