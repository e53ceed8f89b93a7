"""Requests to answers on this machine, one or many: encode, localise, prune, generate.

A single question is a batch of one. Questions are answered in left-padded batches of like length, which gives the
answers of one question at a time. While the language model generates, the next questions are encoded and pruned.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from gridprune_cli.builder import build_pruned_sets
from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.generation import Generated, Watcher, generate
from gridprune_cli.images import Picture, Source, identify, load_image
from gridprune_cli.questions import check_history, check_question
from gridprune_cli.regions import MAX_ANSWER, Localized, Localizers, localizer_request, read_answer
from gridprune_cli.runners.batches import MODELS, Batches, Stopwatch, as_error, in_order, result_or_raise
from gridprune_cli.runners.images import Encoded, ImageRunner
from gridprune_cli.selector import (
    EncodedRequest,
    compute_signals,
    find_relevance,
    read_queries,
    select_tokens,
    with_prompts,
)
from gridprune_cli.settings import Request
from gridprune_cli.tokens import EncodedImage, PrunedSet
from gridprune_cli.vlm.family import Family

Watchers = Sequence[Watcher] | None  # one for each pruned set

MAX_BYTES = 1 << 29  # of image embeds and prefixes of pruned sets that wait for their turn
GROUP = 4  # batches of questions, at most, among which those of like length are put together
READ_AHEAD = 512  # questions that a text tower reads before any is pruned for: the lines that `batch` looks at together


@dataclass(frozen=True)
class Pruned:
    """What came of a request before an answer: its pruned set, and whether each image came from the cache."""

    pruned: PrunedSet
    hits: tuple[bool, ...]

    @property
    def hit(self) -> bool:
        """Whether no image went through the tower for it."""
        return all(self.hits)

    @property
    def image_notes(self) -> tuple[tuple[str, str], ...]:
        """Notes on its images: the image's name, and what a user should know of it."""
        return tuple(dict.fromkeys((image.name, note) for image in self.pruned.images for note in image.notes))


@dataclass(frozen=True)
class Reply:
    """The answer to a request, with what `PrunedSet.to_json` has of it; the tensors are gone."""

    text: str
    record: dict[str, Any]
    hit: bool
    image_notes: tuple[tuple[str, str], ...]


class Runner:
    """Answers requests with one model. Batches start at `images` pictures and `questions` questions.

    encoder     the model with its cache
    localizers  of the model
    load        decodes the bytes of an image file, given its name
    stopwatch   gets the milliseconds of "load", "encode", "localize" and "select"

    A model that can't be used at all raises from every method: BadInput or GridpruneError. What fails for one image
    or request gives its error in place of a result, and the rest goes on.
    """

    def __init__(
        self,
        encoder: Encoder,
        localizers: Localizers,
        *,
        images: int = 16,
        questions: int = 32,
        load: Callable[[bytes, str], Picture] = load_image,
        stopwatch: Stopwatch | None = None,
    ):
        self.encoder, self.localizers = encoder, localizers
        self.family = encoder.family
        self.stopwatch = stopwatch or Stopwatch()
        self.batch_sizes = images, questions
        self._images = ImageRunner(encoder, batch=images, load=load, stopwatch=self.stopwatch)
        self._to_prune = Batches(questions, "questions to prune for")
        self._to_answer = Batches(questions, "questions")

    def encode(self, images: Iterable[Source], *, with_prefix: bool = False, **settings: Any) -> Iterator[Encoded]:
        """Encodes images into the cache, in turn, with the settings of `ImageRunner.encode`, and as `add_prefixes`."""
        encoded = self._images.encode(images, **settings)
        return add_prefixes(self, encoded, settings.get("refresh", False)) if with_prefix else encoded

    # ---- prune -------------------------------------------------------------------------------------------------------

    def prune(
        self,
        requests: Sequence[Request],
        *,
        parts: Sequence[str] = ("projector",),
        with_prefix: bool | None = None,
    ) -> Iterator[tuple[int, Pruned | GridpruneError]]:
        """Prunes for every request, image by image: the request's index, and what came of it. In no order.

        An image that several requests are about is read and encoded once. `parts` of the model are loaded together
        with the tower, or alone where that is not needed. `with_prefix` is that of `build_pruned_sets`.
        """
        # 1. what would fail for every request fails before any work
        for pruning in {request.pruning for request in requests}:
            find_relevance(self.family, pruning)
        # 2. requests that can't be asked; the others by how their images are encoded
        by_encoding: dict[tuple[bool, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            try:
                self._check(request)
            except GridpruneError as error:
                yield index, error
                continue
            several = self.family.encodes_multi_image and len(request.images) > 1
            by_encoding.setdefault((several, request.pruning.optional), []).append(index)
        to_ask = [requests[index] for indices in by_encoding.values() for index in indices]
        with MODELS, self.stopwatch.measure("load"):
            _load_signals(self.family, to_ask, parts)
        with self.stopwatch.measure("select"):
            read_queries(self.family, to_ask[:READ_AHEAD])
        # 3. images through the tower, and requests pruned as soon as theirs are there
        for (several, optional), indices in by_encoding.items():
            ready: list[tuple[int, EncodedRequest, tuple[bool, ...]]] = []
            for index, encoded in self._images.encode_requests(requests, indices, several, optional, parts):
                if isinstance(encoded, GridpruneError):
                    yield index, encoded
                    continue
                ready.append((index, EncodedRequest(requests[index], encoded[0]), encoded[1]))
                if len(ready) >= self._to_prune.size:
                    yield from self._prune(ready, with_prefix)
                    ready.clear()
            yield from self._prune(ready, with_prefix)

    def prune_one(self, request: Request, **settings: Any) -> Pruned:
        """What came of one request, with the settings of `prune`. Raises its error."""
        ((_, result),) = self.prune([request], **settings)
        return result_or_raise(result)

    def _check(self, request: Request) -> None:
        """Raises BadInput for a request that can't be asked, whatever its images hold."""
        check_question(request.question, len(request.images))
        check_history(request.history, len(request.images))
        self.localizers.find(request.pruning, len(request.images))
        self.encoder.check_encoded(request.images)
        texts = [text for turn in request.history for text in (turn.question, turn.answer)]
        remedy = "begin a new conversation" if texts else "ask shorter"
        self.family.check_length(self.family.count_words("\n".join([*texts, request.question])), remedy)

    def _prune(
        self, ready: Sequence[tuple[int, EncodedRequest, tuple[bool, ...]]], with_prefix: bool | None
    ) -> Iterator[tuple[int, Pruned | GridpruneError]]:
        """Localises and prunes for requests whose images are encoded."""

        def prune_batch(batch: Sequence[EncodedRequest]) -> list[PrunedSet]:
            localized = _localize(self, batch)
            with self.stopwatch.measure("select"):
                return _select(self.encoder, localized, with_prefix)

        results = self._to_prune.run([request for _, request, _ in ready], prune_batch)
        for (index, _, hits), result in zip(ready, results, strict=True):
            yield index, result if isinstance(result, GridpruneError) else Pruned(result, hits)

    # ---- generate ----------------------------------------------------------------------------------------------------

    def generate(
        self, sets: Sequence[PrunedSet], *, max_new_tokens: int = 128, watchers: Watchers = None, **options: Any
    ) -> Iterator[tuple[int, Generated | GridpruneError]]:
        """Answers from pruned sets, those of like length together: index of the set, and its answer. In no order.

        `watchers` and `options` go to `generation.generate`. Where a batch fails and is run again in smaller ones, its
        watchers see its answers once more from the start.
        """
        with MODELS:
            self.family.load("language")  # what fails here would fail for every set
        order = sorted(range(len(sets)), key=lambda index: _batch_order(sets[index]))
        sorted_watchers = watchers and [watchers[index] for index in order]
        answers = self._generate([sets[index] for index in order], max_new_tokens, options, sorted_watchers)
        yield from zip(order, answers, strict=True)

    def generate_one(self, pruned: PrunedSet, *, max_new_tokens: int = 128, **options: Any) -> Generated:
        """The answer from one pruned set. Raises its error."""
        ((_, result),) = self.generate([pruned], max_new_tokens=max_new_tokens, **options)
        return result_or_raise(result)

    def _generate(
        self, sets: Sequence[PrunedSet], max_new_tokens: int, options: dict[str, Any], watchers: Watchers = None
    ) -> Iterator[Generated | GridpruneError]:
        def generate_batch(batch: Sequence[int]) -> list[Generated]:
            of_batch = watchers and [watchers[n] for n in batch]
            with MODELS:
                return generate(self.family, [sets[n] for n in batch], max_new_tokens, watchers=of_batch, **options)

        return self._to_answer.run(range(len(sets)), generate_batch)

    # ---- both --------------------------------------------------------------------------------------------------------

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 128, **options: Any
    ) -> Iterator[Reply | GridpruneError]:
        """Encodes, localises, prunes and generates: the answer to every request, or its error, in turn.

        `options` go to `generation.generate`.
        """
        return in_order(self._answer(requests, max_new_tokens, options))

    def _answer(
        self, requests: Sequence[Request], max_new_tokens: int, options: dict[str, Any]
    ) -> Iterator[tuple[int, Reply | GridpruneError]]:
        """`answer` in no order: this thread prunes, another one generates."""
        with ExitStack() as stack:
            generator = ThreadPoolExecutor(1)
            stack.callback(generator.shutdown, cancel_futures=True)
            in_flight: deque[tuple[list[tuple[int, Pruned]], Future[list[Generated | GridpruneError]]]] = deque()
            waiting: list[tuple[int, Pruned]] = []
            held = 0  # bytes of image embeds that wait, and of their prefixes, each of which several sets may share
            prefixes: set[int] = set()
            group = 1  # batches that are waited for; few at first, so that the language model starts soon

            def texts(sets: Sequence[PrunedSet]) -> list[Generated | GridpruneError]:
                return list(self._generate(sets, max_new_tokens, options))

            def send() -> None:
                waiting.sort(key=lambda pair: _batch_order(pair[1].pruned))
                size = self._to_answer.size
                for start in range(0, len(waiting), size):
                    batch = waiting[start : start + size]
                    in_flight.append((batch, generator.submit(texts, [pruned.pruned for _, pruned in batch])))
                waiting.clear()

            def receive() -> Iterator[tuple[int, Reply | GridpruneError]]:
                batch, future = in_flight.popleft()
                for (index, pruned), generated in zip(batch, future.result(), strict=True):
                    yield index, _reply(pruned, generated)

            for index, pruned in self.prune(requests, parts=("projector", "language")):
                if isinstance(pruned, GridpruneError):
                    yield index, pruned
                    continue
                waiting.append((index, pruned))
                held += pruned.pruned.image_embeds.nbytes
                prefix = pruned.pruned.prefix
                if prefix is not None and id(prefix) not in prefixes:
                    held += prefix.nbytes
                    prefixes.add(id(prefix))
                if len(waiting) >= group * self._to_answer.size or held > MAX_BYTES:
                    send()
                    held, group = 0, min(GROUP, 2 * group)
                    prefixes.clear()
                while in_flight and (len(in_flight) > GROUP or in_flight[0][1].done()):
                    yield from receive()
            send()
            while in_flight:
                yield from receive()


def _load_signals(family: Family, requests: Sequence[Request], parts: Sequence[str]) -> None:
    """Loads what pruning needs beside `parts`: a text tower, embeddings or layers, trained modules."""
    for request in requests:
        if request.pruning.plc == "trained":
            _ = family.compressor
        needs = request.pruning.method.needs
        if "importance" in needs:
            _ = family.pruning_module
        if needs & {"question_embeds", "importance"}:
            family.vocabulary.load()
        if request.pruning.needs_relevance:
            family.load_relevance(layers="language" not in parts)


def _reply(pruned: Pruned, generated: Generated | GridpruneError) -> Reply | GridpruneError:
    """The answer with what is told of its pruned set; an error as it is."""
    if isinstance(generated, GridpruneError):
        return generated
    return Reply(generated.text, pruned.pruned.to_json(), pruned.hit, pruned.image_notes)


def _batch_order(pruned: PrunedSet) -> tuple[bool, int]:
    """Sorts sets with a prefix to one another, since these are run apart from the others, and then by length."""
    return pruned.prefix is not None, len(pruned.input_ids)


def _select(encoder: Encoder, requests: Sequence[EncodedRequest], with_prefix: bool | None) -> list[PrunedSet]:
    """The pruned sets of requests whose images are encoded, and localised; `with_prefix` as in `build_pruned_sets`."""
    requests = with_prompts(encoder.family, requests)
    signals = compute_signals(encoder.family, requests, encoder.prefixes)
    kept = select_tokens(requests, signals)
    return build_pruned_sets(encoder.family, requests, signals, kept, encoder.prefixes, with_prefix=with_prefix)


def add_prefixes(runner: Runner, encoded: Iterable[Encoded], refresh: bool) -> Iterator[Encoded]:
    """The encoded images, once the prefix of a prompt about each is in the cache. One without gives its error.

    Loads the projector and the first layers of the language model. Raises BadInput where the image sees the question,
    so that there is no prefix for all questions.
    """
    family = runner.family
    if family.sees_question:
        reason = f"in {family.checkpoint.name} the image sees the question, so each has a prefix of its own"
        raise BadInput(f"{reason}; leave it out", field="with_prefix")
    with MODELS, runner.stopwatch.measure("load"):
        family.load("projector")
        family.first_layers(family.relevance_depth)
    for name, result, hit in encoded:
        outcome = result
        if isinstance(result, EncodedImage):
            try:
                runner.encoder.prefixes.store_for_image(result, refresh=refresh)
            except Exception as error:
                outcome = as_error(error).about(name)
        yield name, outcome, hit


def _localize(runner: Runner, requests: Sequence[EncodedRequest]) -> list[EncodedRequest]:
    """The requests with the regions of their images, where the pruning has a model asked for them."""
    by_model: dict[int, tuple[Encoder, list[int]]] = {}
    for n, request in enumerate(requests):
        if localizer := runner.localizers.find(request.pruning, len(request.images)):
            by_model.setdefault(id(localizer), (localizer, []))[1].append(n)
    localized = list(requests)
    for localizer, places in by_model.values():
        asked = [
            localizer_request(_picture_file(image), requests[n].query, requests[n].pruning)
            for n in places
            for image in requests[n].images
        ]
        images, questions = runner.batch_sizes
        asking = Runner(localizer, runner.localizers, images=images, questions=questions)
        with runner.stopwatch.measure("localize"):
            replies = iter(list(asking.answer(asked, max_new_tokens=MAX_ANSWER)))
        for n in places:
            request = requests[n]
            texts = [result_or_raise(next(replies)).text for _ in request.images]
            boxes = tuple(Localized(request.pruning.localizer, text, read_answer(text)) for text in texts)
            localized[n] = EncodedRequest(request.request, request.images, boxes)
    return localized


def _picture_file(image: EncodedImage) -> Source:
    """The image file that an encoded image came from. Raises BadInput where it is not known, or has changed since."""
    if image.source is None:
        raise BadInput(f"looks at the picture; give the file of {image.name}, not the encoded image", field="localizer")
    if identify(image.source)[0] != image.image:
        raise BadInput("changed while it was in use; start again", place=image.name)
    return image.source
