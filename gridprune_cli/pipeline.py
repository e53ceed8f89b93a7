"""encode -> prune -> generate, with the cache between: what the commands call, and users of the package."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.generation import generate
from gridprune_cli.images import Picture, Source, identify, load_image
from gridprune_cli.pruning.methods import Method, make
from gridprune_cli.pruning.methods.gridprune import GridPrune
from gridprune_cli.pruning.region import contextual_region, parse_box
from gridprune_cli.pruning.signals import Box, Signals
from gridprune_cli.pruning.slots import staying
from gridprune_cli.scenes.scene import looks_like_scene
from gridprune_cli.store import Store, entry_key
from gridprune_cli.tokens import EncodedImage, Origin, PrunedSet
from gridprune_cli.vlm import open_model
from gridprune_cli.vlm.checkpoint import EMBEDDED
from gridprune_cli.vlm.family import Encoding

SIGNALS = ("saliency",)  # stored beside the states; relevance follows from the states and the question
POSITIONS = ("original", "compact")
_MOST_PIXELS = 100_000_000  # held decoded at once; about 300 MB


@dataclass(frozen=True)
class Pruning:
    """What to keep of an image for a question.

    keep       share of the visual tokens, in (0, 1]; K = keep * N, rounded to the nearest, at least 1
    tokens     K itself, instead of `keep`
    method     how to choose them
    region     "auto" (found from the relevance), "none", or a box; only methods with zones heed it
    positions  "original": kept tokens keep their place in the prompt; "compact": they are numbered on
    query      what relevance is measured against, where that is not the question
    share_budget  several images share one K instead of each having its own; then there is no region
    """

    keep: float = 0.11
    tokens: int | None = None
    method: Method = field(default_factory=lambda: make("gridprune"))
    region: str | Box = "auto"
    positions: str = "original"
    query: str | None = None
    share_budget: bool = False

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
        if self.positions not in POSITIONS:
            raise BadInput(f"--positions {self.positions}: not one of {', '.join(POSITIONS)}")

    def count(self, full: int) -> int:
        """K for an image of `full` tokens. Raises BadInput where more are asked for than there are."""
        if self.tokens is None:
            return max(1, int(self.keep * full + 0.5))
        if self.tokens > full:
            raise BadInput(f"--tokens {self.tokens}: the image has {full} visual tokens")
        return self.tokens


@dataclass(frozen=True)
class Answer:
    """An answer, and everything about how it came to be."""

    text: str
    pruned: PrunedSet
    notes: tuple[str, ...]  # what a user should know of the images
    hits: tuple[bool, ...]  # of each image, whether it was encoded already
    ms: dict[str, float]

    @property
    def hit(self) -> bool:
        """Whether all images were encoded already."""
        return all(self.hits)

    def to_json(self) -> dict[str, Any]:
        states = ["hit" if hit else "miss" for hit in self.hits]
        return self.pruned.to_json() | {
            "answer": self.text,
            "cache": states[0] if len(states) == 1 else states,
            "ms": {name: round(value, 2) for name, value in self.ms.items()},
        }


class Pipeline:
    """A model with its cache. Parts of the model are loaded when they are first needed, and only those.

    model     `scenes`, a folder, or a hub name, `owner/name` or `owner/name@revision`
    revision  branch, tag or commit of a hub model
    clip      the CLIP that the model's tower was taken from, a folder or hub name, where it is not found by itself
    store     None means no cache

    Raises BadInput for a model, device or dtype that can't be used, GridpruneError where the hub can't be asked.
    """

    def __init__(
        self,
        model: str = "scenes",
        *,
        revision: str | None = None,
        clip: str | None = None,
        store: Store | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ):
        self.store = store
        self.family = open_model(model, dtype, device, revision=revision, clip=clip, store=store)
        self.model = self.family.checkpoint.name

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        """Brings the cache back under its limit."""
        if self.store is not None:
            self.store.finish()

    # ---- encode ------------------------------------------------------------------------------------------------------

    def key(self, image: str) -> str:
        """Cache key of a picture by the sha256 of its file's bytes."""
        return entry_key(image, self.family.encoder, SIGNALS)

    def look_up(self, image: str, name: str) -> EncodedImage | None:
        """The encoded image from the cache, under the name that it is asked for by now."""
        if self.store is None:
            return None
        found = self.store.get(self.family.encoder, self.key(image))
        try:
            return replace(EncodedImage.from_parts(*found), name=name) if found else None
        except (KeyError, TypeError, ValueError):
            return None  # whole, but not what this version writes

    def encode(self, pictures: Sequence[Picture]) -> list[EncodedImage]:
        """Runs the tower on pictures, whatever the cache holds, and stores what it gives."""
        encodings = self.family.encode([picture.image for picture in pictures])
        return [self._keep(picture, encoding) for picture, encoding in zip(pictures, encodings, strict=True)]

    def _keep(self, picture: Picture, encoding: Encoding) -> EncodedImage:
        encoded = EncodedImage(
            key=self.key(picture.sha256),
            model=self.model,
            image=picture.sha256,
            name=picture.name,
            encoder=self.family.encoder,
            size=picture.image.size,
            views=encoding.views,
            states=encoding.states,
            saliency=encoding.saliency,
            slots=encoding.slots.to(torch.int32),
            prompt=encoding.prompt,
            notes=picture.notes + self._remarks(picture),
        )
        if not (torch.isfinite(encoded.states).all() and torch.isfinite(encoded.saliency).all()):
            raise GridpruneError(f"{picture.name}: the tower gave values that are not finite; try --dtype float32")
        if self.store is not None:
            self.store.put(self.family.encoder, encoded.key, encoded.to_bytes())
        return encoded

    def _remarks(self, picture: Picture) -> tuple[str, ...]:
        if self.model != EMBEDDED or looks_like_scene(picture.image):
            return ()
        return ("no scene: the embedded model knows only its own scenes; name a real one, as in --model FOLDER",)

    def remarks(self, pruning: Pruning) -> tuple[str, ...]:
        """What a user should know of how this model prunes."""
        if self.family.lacks_clip and "relevance" in pruning.method.requires:
            return (
                "the CLIP of this model's tower was not found, so relevance makes do with words; name it as --clip",
            )
        return ()

    def encode_one(self, source: Source) -> tuple[EncodedImage, bool]:
        """An encoded image, and whether it came from the cache. Raises BadInput for a picture that can't be read."""
        image, name, data = identify(source)
        found = self.look_up(image, name)
        return (found, True) if found else (self.encode([load_image(data, name)])[0], False)

    # ---- prune -------------------------------------------------------------------------------------------------------

    def prune(
        self,
        images: EncodedImage | Sequence[EncodedImage],
        question: str,
        pruning: Pruning | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
    ) -> PrunedSet:
        """Chooses the tokens that the question needs, of one image or several.

        Each image has its own budget, or all share one where `pruning` says so. `system` is a system message,
        `template` a prompt with `{image}` and `{question}` in place of the model's chat template. Raises BadInput where
        the pruning does not fit the images, or the prompt the model.
        """
        images = [images] if isinstance(images, EncodedImage) else list(images)
        pruning = pruning or Pruning()
        check_question(question)
        signals = [self._signals(image, pruning.query or question, pruning) for image in images]
        counts = [image.count for image in images]
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        if pruning.share_budget and len(images) > 1:
            joined = _join(signals)
            kept = pruning.method.select(joined, pruning.count(sum(counts)))
        else:
            parts = [pruning.method.select(s, pruning.count(s.count)) for s in signals]
            kept = torch.cat([first + part for first, part in zip(firsts, parts, strict=True)])
        slots = torch.cat(
            [torch.where(i.slots < 0, i.slots, i.slots + first) for i, first in zip(images, firsts, strict=True)]
        ).long()
        stays = staying(slots, kept, sum(counts))
        full = self.family.write_prompt(question, images, system, template)
        mask = torch.ones(len(full), dtype=torch.bool)
        mask[full == self.family.image_token] = stays
        ids = full[mask]
        original = pruning.positions == "original"
        owner = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(counts))
        return PrunedSet(
            rows=self._rows(torch.cat([image.states for image in images]), slots[stays]),
            kept=kept,
            input_ids=ids,
            position_ids=self.family.positions(full, images)[..., mask] if original else torch.arange(len(ids)),
            saliency=torch.cat([image.saliency for image in images]),
            relevance=None if signals[0].relevance is None else torch.cat([s.need("relevance") for s in signals]),
            images=tuple(
                Origin(
                    key=image.key,
                    image=image.image,
                    name=image.name,
                    views=image.views,
                    region=own.region,
                    zones=_zones(pruning.method, own, kept[owner[kept] == n] - first),
                )
                for n, (image, own, first) in enumerate(zip(images, signals, firsts, strict=True))
            ),
            model=self.model,
            fingerprint=self.family.fingerprint,
            question=question,
            method={"name": pruning.method.name, **asdict(pruning.method)},
            positions=pruning.positions,
        )

    def _signals(self, image: EncodedImage, query: str, pruning: Pruning) -> Signals:
        relevance = self.family.relevance(image.states, query) if "relevance" in pruning.method.requires else None
        return Signals(image.views, relevance, image.saliency.float(), self._region(pruning, image, relevance))

    def _region(self, pruning: Pruning, image: EncodedImage, relevance: Tensor | None) -> Box | None:
        if not isinstance(pruning.method, GridPrune) or relevance is None or pruning.region == "none":
            return None
        if isinstance(pruning.region, tuple):
            return pruning.region
        return contextual_region(relevance * pruning.method.relevance_sign, image.views)

    def _rows(self, states: Tensor, slots: Tensor) -> Tensor:
        """The rows `(S, D)` of slots `(S,)`: projected states, and the family's separator between them."""
        tokens = slots >= 0
        rows = self.family.project(states[slots[tokens]])
        if bool(tokens.all()):
            return rows
        out = self.family.separator().to(rows.dtype).repeat(len(slots), 1)
        out[tokens] = rows
        return out

    # ---- generate ----------------------------------------------------------------------------------------------------

    def generate(self, pruned: PrunedSet, *, max_new_tokens: int = 128, **options: Any) -> str:
        """The answer from a pruned set. `options` go to transformers' `generate`."""
        return generate(self.family, [pruned], max_new_tokens, **options)[0].text

    def ask(
        self,
        sources: Source | list[Source],
        question: str,
        pruning: Pruning | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> Answer:
        """encode, prune and generate, timed. A picture in the cache is not decoded, and the tower is not loaded."""
        ms = dict.fromkeys(("load", "encode", "select", "prefill", "decode", "total"), 0.0)
        with _timed(ms, "total"):
            check_question(question)
            pruning = pruning or Pruning()
            given = [identify(source) for source in (sources if isinstance(sources, list) else [sources])]
            with _timed(ms, "load"):
                found = [self.look_up(image, name) for image, name, _ in given]
                # a bad picture is told before any model is loaded
                pictures = [
                    load_image(data, name) for (_, name, data), hit in zip(given, found, strict=True) if hit is None
                ]
                self.family.load(*(("tower",) if pictures else ()), "projector", "language")
                if "relevance" in pruning.method.requires:
                    self.family.relevance.load()
            with _timed(ms, "encode"):
                new = iter(self.encode(pictures) if pictures else [])
                images = [hit or next(new) for hit in found]
            with _timed(ms, "select"):
                pruned = self.prune(images, question, pruning, system=system, template=template)
            made = generate(self.family, [pruned], max_new_tokens, **options)[0]
        ms |= {"prefill": made.prefill, "decode": made.decode}
        notes = tuple(dict.fromkeys(f"{image.name}: {note}" for image in images for note in image.notes))
        return Answer(made.text, pruned, notes, tuple(hit is not None for hit in found), ms)

    def encode_all(
        self, sources: Iterable[Source], *, batch: int = 16, refresh: bool = False
    ) -> Iterator[tuple[str, EncodedImage | GridpruneError, bool]]:
        """Encodes many pictures in batches into the cache: (name, what came of it, whether it was a hit), in turn.

        A picture that can't be read or encoded gives its error in place of an encoded image, and the rest goes on.
        Raises GridpruneError where the cache can't be written, since then all of it would be for nothing.
        """
        waiting: list[Picture] = []
        for source in sources:
            try:
                image, name, data = identify(source)
                if any(picture.sha256 == image for picture in waiting):  # the same file again: soon a hit
                    yield from self._encode_batch(waiting)
                    waiting = []
                if not refresh and (found := self.look_up(image, name)):
                    yield name, found, True
                    continue
                waiting.append(load_image(data, name))
            except BadInput as fault:
                yield "-" if isinstance(source, bytes) else str(source), fault, False
            pixels = sum(picture.image.width * picture.image.height for picture in waiting)
            if len(waiting) == batch or pixels > _MOST_PIXELS:
                yield from self._encode_batch(waiting)
                waiting = []
        yield from self._encode_batch(waiting)

    def _encode_batch(self, pictures: list[Picture]) -> Iterator[tuple[str, EncodedImage | GridpruneError, bool]]:
        if not pictures:
            return
        try:
            encoded: list[EncodedImage | GridpruneError] = list(self.encode(pictures))
        except GridpruneError:  # one of them is at fault: find out which
            encoded = [self._encode_or_fault(picture) for picture in pictures]
        if self.store is not None and not self.store.writable:
            raise GridpruneError(f"{self.store.root}: the cache can't be written, so nothing was encoded into it")
        for picture, result in zip(pictures, encoded, strict=True):
            yield picture.name, result, False

    def _encode_or_fault(self, picture: Picture) -> EncodedImage | GridpruneError:
        try:
            return self.encode([picture])[0]
        except GridpruneError as fault:
            return fault if picture.name in str(fault) else type(fault)(f"{picture.name}: {fault}")


def _join(signals: Sequence[Signals]) -> Signals:
    """The signals of several images as those of one, without a region: images have no place in one picture."""
    relevance = None if signals[0].relevance is None else torch.cat([s.need("relevance") for s in signals])
    views = tuple(view for own in signals for view in own.views)
    return Signals(views, relevance, torch.cat([s.need("saliency") for s in signals]))


def _zones(method: Method, signals: Signals, kept: Tensor) -> dict[str, Any] | None:
    """Rows, columns and budgets of the zones, for methods that have them; lists of rows and columns for several views.

    A zone keeps just its budget, so the budgets are counted from what was kept.
    """
    if not isinstance(method, GridPrune):
        return None
    index, zones = method.zones(signals)
    rows, cols = (list(sides) for sides in zip(*zones.grids, strict=True))
    budgets = torch.bincount(index[kept], minlength=zones.count).tolist()
    one = len(zones.grids) == 1
    return {"rows": rows[0] if one else rows, "cols": cols[0] if one else cols, "budgets": budgets}


def check_question(question: str) -> None:
    """Raises BadInput for an empty question."""
    if not question.strip():
        raise BadInput("the question is empty; ask something")


@contextmanager
def _timed(ms: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    ms[name] = 1e3 * (time.perf_counter() - start)
