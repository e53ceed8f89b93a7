"""What is asked for: which visual tokens to keep (`Pruning`), and a question about images with it (`Request`)."""

from dataclasses import dataclass, field
from math import isfinite

from gridprune_cli.errors import BadInput
from gridprune_cli.images import Source
from gridprune_cli.pruning.methods import Method, make
from gridprune_cli.pruning.region import parse_box
from gridprune_cli.pruning.signals import Box
from gridprune_cli.questions import check_text
from gridprune_cli.tokens import EncodedImage

POSITIONS = ("original", "compact")
PLC = ("off", "pool", "trained")
RELEVANCE = "relevance"  # the localiser that is no model: the region is found from the relevance


@dataclass(frozen=True)
class Pruning:
    """What to keep of an image for a question.

    keep       share of the visual tokens, in (0, 1]; K = keep * N, rounded to the nearest, at least 1
    tokens     K itself, instead of `keep`
    method     how to choose them
    region     "auto" (found from the relevance), "none", or a box; only methods with zones heed it
    positions  "original": kept tokens keep their place in the prompt; "compact": they are numbered on
    localizer  what finds the region "auto": "relevance", "vlm" (the embedded model's own), or a model by name
    localizer_template  how such a model is asked, a text with `{question}`; "" is our own (`localize.TEMPLATE`)
    query      what relevance is measured against, and a localiser is asked about, where that is not the question
    share_budget  several images share one K instead of each having its own; then there is no region
    ilp        what stays inside the language model: "region", exactly the tokens inside the contextual region, or a
               share of the image's N tokens, those inside first; None: everything
    ilp_layer  the layer, from 0, at whose input the others leave; None: `ILP_LAYER`, or the nearest that the model has
    plc        "pool" makes each row outside the region the mean of its cell, "trained" has the checkpoint's compressor
               make the rows of that, "off" leaves rows as they are
    inside_ratio, outside_ratio  visual tokens per row, inside and outside of the region, instead of the method's own
               split of K; both together take the place of `keep` and `tokens`
    """

    keep: float = 0.11
    tokens: int | None = None
    method: Method = field(default_factory=lambda: make("gridprune"))
    region: str | Box = "auto"
    localizer: str = RELEVANCE
    localizer_template: str = ""
    positions: str = "original"
    query: str | None = None
    share_budget: bool = False
    ilp: float | str | None = None
    ilp_layer: int | None = None
    plc: str = "off"
    inside_ratio: float | None = None
    outside_ratio: float | None = None

    def __post_init__(self) -> None:
        """Reads a region that is given as text or a list. Raises BadInput for values out of range."""
        if self.region not in ("auto", "none"):
            given = self.region if isinstance(self.region, str) else ",".join(map(str, self.region))
            try:
                object.__setattr__(self, "region", parse_box(given))
            except ValueError as fault:
                raise BadInput(f"--region: {fault}, or auto, or none") from fault
        if not 0 < self.keep <= 1:
            raise BadInput(f"--keep {self.keep}: must be above 0 and at most 1")
        if self.tokens is not None and self.tokens < 1:
            raise BadInput(f"--tokens {self.tokens}: must be at least 1")
        if self.share_budget and self.method.one_picture:
            raise BadInput(
                f"--share-budget: not with --method {self.method.name}, which splits the budget of one image"
            )
        if self.localizer_template and "{question}" not in self.localizer_template:
            raise BadInput("--localizer-template: needs {question}, where the question goes")
        if self.query is not None and not self.query.strip():
            raise BadInput("--query: is empty; give a text, or leave it out to take the question")
        for flag, text in (("--query", self.query), ("--localizer-template", self.localizer_template)):
            check_text(text or "", flag)
        if self.positions not in POSITIONS:
            raise BadInput(f"--positions {self.positions}: not one of {', '.join(POSITIONS)}")
        if self.ilp is not None and self.ilp != "region":
            try:
                share = float(self.ilp)
            except ValueError as fault:
                raise BadInput(f"--ilp {self.ilp}: neither region nor a share") from fault
            if not 0 < share <= 1:
                raise BadInput(f"--ilp {self.ilp}: must be above 0 and at most 1, or region")
            object.__setattr__(self, "ilp", share)
        if self.ilp is not None and self.method.inner:
            raise BadInput(f"--ilp: not with --method {self.method.name}, which prunes there by itself")
        if self.ilp is None and self.ilp_layer is not None:
            raise BadInput("--ilp-layer: only with --ilp, which says what stays")
        if self.plc not in PLC:
            raise BadInput(f"--plc {self.plc}: not one of {', '.join(PLC)}")
        if self.plc != "off" and self.method.inner:
            raise BadInput(f"--plc: not with --method {self.method.name}, which prunes inside the language model alone")
        for flag, ratio in (("--inside-ratio", self.inside_ratio), ("--outside-ratio", self.outside_ratio)):
            if ratio is None:
                continue
            if not (ratio >= 1 and isfinite(ratio)):
                raise BadInput(f"{flag} {ratio}: must be at least 1, in visual tokens per row")
            if self.plc == "off":
                raise BadInput(f"{flag}: only with --plc pool or --plc trained")
            if self.share_budget or self.region == "none" or not self.method.takes_region:
                raise BadInput(f"{flag}: needs a region; leave out what takes it away")
        if self.inside_ratio and self.outside_ratio and self.inside_ratio > self.outside_ratio:
            raise BadInput(f"--inside-ratio {self.inside_ratio}: must not be above --outside-ratio")

    @property
    def needs_relevance(self) -> bool:
        return "relevance" in self.method.requires or self.plc == "trained"

    def count(self, full: int) -> int:
        """K for an image of `full` tokens. Raises BadInput where more are asked for than there are."""
        if self.tokens is None:
            return max(1, int(self.keep * full + 0.5))
        if self.tokens > full:
            raise BadInput(f"--tokens {self.tokens}: the image has {full} visual tokens")
        return self.tokens

    def heeds_region(self, images: int) -> bool:
        """Whether there is a region of each image to heed."""
        return self.method.takes_region and self.region != "none" and not (self.share_budget and images > 1)


@dataclass(frozen=True)
class Request:
    """A question about one image or several.

    images    image files, or images that are encoded already
    pruning   what to keep of them
    system    a system message, for models that take one
    template  a text with `{image}` and `{question}` that takes the place of the model's chat template
    """

    images: tuple[Source | EncodedImage, ...]
    question: str
    pruning: Pruning = field(default_factory=Pruning)
    system: str | None = None
    template: str | None = None
