"""Images and questions in, answers out: what users of the package call, and what the commands are thin layers over."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gridprune_cli.cache.store import Store
from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import GridpruneError
from gridprune_cli.image_files import NamedImage, Source
from gridprune_cli.questions import Exchange, cache_outcome
from gridprune_cli.regions import Localizers
from gridprune_cli.runners.batches import Stopwatch, result_or_raise
from gridprune_cli.runners.local import Runner
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import EncodedImage, PrunedSet
from gridprune_cli.vlm import open_model
from gridprune_cli.vlm.checkpoint import EMBEDDED
from gridprune_cli.vlm.family import Family

STEPS = ("load", "localize", "encode", "select", "prefill", "decode", "total")

Images = Source | EncodedImage | Sequence[Source | EncodedImage]


@dataclass(frozen=True)
class Answer:
    """An answer, and everything about how it came to be.

    hits  of each image, whether it came from the cache
    ms    milliseconds of each of `STEPS`
    """

    text: str
    pruned: PrunedSet
    hits: tuple[bool, ...]
    ms: dict[str, float]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the images, and of how they were pruned."""
        return self.pruned.notes

    @property
    def hit(self) -> bool:
        """Whether all images came from the cache."""
        return all(self.hits)

    def to_json(self) -> dict[str, Any]:
        return self.pruned.to_json() | {
            "answer": self.text,
            "cache": cache_outcome(self.hits),
            "ms": {name: round(value, 2) for name, value in self.ms.items()},
        }


class Pipeline:
    """A model with its cache. Parts of the model are loaded when they are first needed, and only those.

    model        `scenes`, a folder, or a hub name, `owner/name` or `owner/name@revision`; or a family that was opened
                 already, and then only `store` and `cache_dtype` count of the rest. None: none was chosen, so it is
                 `scenes`, and a picture that is no scene is refused, where `scenes` by name answers, with a note
    revision     branch, tag or commit of a hub model
    clip         the CLIP or SigLIP that the model's tower was taken from, a folder or hub name, where it is not known
    relevance    what it comes from: "clip", the CLIP or SigLIP of the model's tower; "attention", the language model's;
                 "both", half of each; "words", its word embeddings; or "auto", clip where the tower is a CLIP's or
                 `clip` is named, else attention
    store        the cache; None: there is none
    quantize     "int8" or "int4", the weights of the language model's layers; None: as they are stored
    cache_dtype  how vision features and prefixes are stored, see `Encoder`

    Raises BadInput for a model, device or dtype that can't be used, GridpruneError where the hub can't be asked.
    """

    def __init__(
        self,
        model: str | Family | None = None,
        *,
        revision: str | None = None,
        clip: str | None = None,
        relevance: str = "auto",
        store: Store | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        cache_dtype: str = "full",
    ):
        if isinstance(model, Family):
            self.family = model
        else:
            name = EMBEDDED if model is None else model
            self.family = open_model(
                *(name, dtype, device),
                revision=revision,
                clip=clip,
                relevance=relevance,
                quantize=quantize,
                store=store,
            )
        self.model = self.family.checkpoint.name
        self.encoder = Encoder(self.family, store, cache_dtype, scenes_only=model is None)
        self.localizers = Localizers(self.encoder, device, dtype, quantize)

    @property
    def store(self) -> Store | None:
        """The cache."""
        return self.encoder.store

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        """Brings the cache back under its limit."""
        if self.store is not None:
            self.store.finish()

    def runner(self, **settings: Any) -> Runner:
        """What encodes, prunes and answers many at once, with the settings of `Runner`."""
        return Runner(self.encoder, self.localizers, **settings)

    def ask(
        self,
        images: Images,
        question: str,
        pruning: Pruning | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
        history: Sequence[Exchange] = (),
        max_new_tokens: int = 128,
        **options: Any,
    ) -> Answer:
        """The answer to a question about one image or several, from the tokens that the pruning keeps.

        An image in the cache is not decoded, and the tower is not loaded for it. `system` is a system message,
        `template` a text with `{image}` and `{question}` in place of the model's chat template. `history` are the
        earlier turns of a conversation; images that are of none of them come with the question. `options` go to
        transformers' `generate`; with `stream`, a text file, the answer is written to it as it comes, and with
        `conversations` it goes on from the keys and values that these hold.

        Raises BadInput where an image can't be read, the pruning does not fit the images, the prompt not the model, or
        options can't be used.
        """
        stopwatch = Stopwatch()
        runner = self.runner(stopwatch=stopwatch)
        request = Request(_as_tuple(images), question, pruning or Pruning(), system, template, tuple(history))
        with stopwatch.measure("total"):
            pruned = runner.prune_one(request, parts=("projector", "language"))
            generated = runner.generate_one(pruned.pruned, max_new_tokens=max_new_tokens, **options)
        measured = stopwatch.ms | {"prefill": generated.prefill, "decode": generated.decode}
        return Answer(generated.text, pruned.pruned, pruned.hits, {step: measured.get(step, 0.0) for step in STEPS})

    def encode(
        self, image: Source, *, several: bool = False, optional: Collection[str] = ()
    ) -> tuple[EncodedImage, bool]:
        """An encoded image, and whether it came from the cache. Raises BadInput for an image that can't be read.

        `several`: it will be one of several in a prompt, which some families encode in another way. `optional`: names
        of the optional signals that it is to have, as `Pruning.optional` has those that its method needs.
        """
        ((_, encoded, hit),) = self.runner().encode([image], several=several, optional=optional)
        return result_or_raise(encoded), hit

    def encode_all(
        self, images: Iterable[Source], *, batch: int = 16, refresh: bool = False, with_prefix: bool = False
    ) -> Iterator[tuple[str, EncodedImage | GridpruneError, bool]]:
        """Encodes many images in batches into the cache: (name, what came of it, whether it was a hit), in turn.

        An image that can't be read, encoded or stored gives its error in place of an encoded image, and the rest goes
        on. `with_prefix` also stores what the language model's first layers make of a prompt about each. Where memory
        runs out, batches are smaller from then on, as the log says. Raises BadInput as `add_prefixes`, and
        GridpruneError where the cache can't be written, since then all of it would be for nothing.
        """
        return self.runner(images=batch).encode(images, refresh=refresh, with_prefix=with_prefix, store=True)

    def prune(
        self,
        images: Images,
        question: str,
        pruning: Pruning | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
        history: Sequence[Exchange] = (),
        with_prefix: bool | None = None,
    ) -> PrunedSet:
        """The pruned set of a question about one image or several, from image files or encoded images.

        Arguments and errors are those of `ask`. A localiser that is a model looks at the image file. `with_prefix`: in
        place of its image embeds it holds what the first layers of the language model make of the prompt up to its last
        image, also in a file; BadInput where an answer can't go on from that. None: it holds both, where the prefix is
        cached, and its file the image embeds. False: it holds image embeds alone.
        """
        request = Request(_as_tuple(images), question, pruning or Pruning(), system, template, tuple(history))
        return self.runner().prune_one(request, with_prefix=with_prefix).pruned

    def generate(self, pruned: PrunedSet, *, max_new_tokens: int = 128, **options: Any) -> str:
        """The answer from a pruned set. `options` go to transformers' `generate`. Raises BadInput for a set of another
        model, and for options that can't be used."""
        return self.runner().generate_one(pruned, max_new_tokens=max_new_tokens, **options).text


def _as_tuple(images: Images) -> tuple[Source | EncodedImage, ...]:
    """One image or several as a tuple. Bytes are one image."""
    if isinstance(images, str | Path | bytes | NamedImage | EncodedImage):
        return (images,)
    return tuple(images)
