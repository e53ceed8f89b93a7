"""Many images and many questions through one pipeline, as fast as its tower and its language model alone allow.

Worker threads read and decode images while the tower runs on a GPU, else between its batches, and one thread writes
behind it. Questions are answered in left-padded batches of like length, which gives the answers of one question at a
time. Of many millions, only as many are held as are being worked on.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Condition, Lock
from typing import Any, TypeVar

import torch

from gridprune_cli.decoding import BYTES_PER_PIXEL, MAX_TOGETHER, stop_when
from gridprune_cli.errors import GridpruneError
from gridprune_cli.generation import generate
from gridprune_cli.images import Picture, Source, identify, load_image, memory_of
from gridprune_cli.pipeline import Asked, Pipeline
from gridprune_cli.regions import Localized
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import EncodedImage, PrunedSet

_MOST_PIXELS = 36_000_000  # that wait decoded for the tower; about 150 MB
_MOST_MEMORY = MAX_TOGETHER  # bytes that reading ahead takes
_MOST_BYTES = 1 << 29  # of rows of pruned sets that wait for their turn
_GROUP = 4  # batches of questions among which those of like length are put together
_WORKERS = 16  # threads at most; more would wait for one another

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Ask:
    """A question about one picture or several."""

    sources: tuple[Source, ...]
    question: str
    pruning: Pruning


@dataclass(frozen=True)
class Pruned:
    """What came of an `Ask`: its pruned set, whether no image of it went through the tower, and notes on its images.

    A note is the image's name, and what a user should know of it.
    """

    pruned: PrunedSet
    hit: bool
    notes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Reply:
    """The answer to an `Ask`, with what `PrunedSet.to_json` says of it; the tensors are gone."""

    text: str
    record: dict[str, Any]
    hit: bool
    notes: tuple[tuple[str, str], ...]


class Batches:
    """Work in batches whose size is halved where memory runs out. What was done stays done.

    `what` names the items in the notice.
    """

    def __init__(self, size: int, what: str, notice: Callable[[str], None]):
        self.size, self.what, self.notice = size, what, notice

    def run(self, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> Iterator[R | GridpruneError]:
        """A result, or a fault, for each item in turn. An item is at fault where `work` fails for it alone."""
        start = 0
        while start < len(items):
            part = items[start : start + self.size]
            try:
                made: list[R | GridpruneError] = list(work(part))
            except Exception as fault:
                if len(part) == 1:
                    made = [_told(fault)]
                elif _lacks_memory(fault):
                    self.size = len(part) // 2
                    self.notice(f"memory ran out with {len(part)} {self.what} at once; going on with {self.size}")
                    continue
                else:  # one of them is at fault: find out which
                    made = [result for one in part for result in self.run([one], work)]
            yield from made
            start += len(part)


class Bulk:
    """Encodes, prunes and answers in bulk. Batches start at `images` pictures and `questions` questions.

    `notice` is called with a line for the user. `load` decodes the bytes of an image file, given its name.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        images: int = 16,
        questions: int = 32,
        notice: Callable[[str], None] = warnings.warn,
        load: Callable[[bytes, str], Picture] = load_image,
    ):
        self.pipeline = pipeline
        self._load = load
        self._images = Batches(images, "images", notice)
        self._questions = Batches(questions, "questions", notice)
        self._prunings = Batches(questions, "questions to prune for", notice)
        self._loading = Lock()  # not while generating: transformers sets torch's dtype for the whole process meanwhile
        self._seeing = False  # whether the tower is loaded

    # ---- encode ------------------------------------------------------------------------------------------------------

    def encode(
        self, sources: Iterable[Source], *, refresh: bool = False, several: bool = False, store: bool = False
    ) -> Iterator[tuple[str, EncodedImage | GridpruneError, bool]]:
        """Encodes pictures into the cache: (name, what came of it, whether the tower was spared), in turn.

        `several`: each picture will be one of several in a prompt. `store`: one that is not stored has failed, as where
        something else holds its place in the cache.

        What is given was written before, where the cache can be written. A picture that can't be read or encoded gives
        its fault in place of an encoded image, and the rest goes on.
        """
        _ = self.pipeline.family.encoder  # made before the threads ask for it
        with ExitStack() as stack:
            room = _Room(_MOST_MEMORY)
            readers = ThreadPoolExecutor(_workers(), initializer=stop_when, initargs=(lambda: room.closed,))
            writer = ThreadPoolExecutor(1)
            stack.callback(writer.shutdown)  # what is on its way to the disk gets there
            stack.callback(readers.shutdown, cancel_futures=True)
            stack.callback(room.close)  # an image that is being read is not waited for
            latest: dict[str, _Latest] = {}  # by sha256: the same file again, read before it was written
            waiting: list[_Read] = []
            done: list[_Done] = []
            # a tower on the CPU takes all cores: reading beside it slows it by more than reading between batches takes
            beside = self.pipeline.family.device != "cpu"
            work = partial(self._read, refresh=refresh, several=several)
            for read in _ahead(readers, work, sources, 2 * self._images.size, room, beside=beside):
                waiting.append(read)
                pictures = [r.found for r in waiting if isinstance(r.found, Picture)]
                pixels = [_pixels(picture) for picture in pictures]
                # another as large as the largest of them would be too much
                full = sum(pixels) + max(pixels, default=0) > _MOST_PIXELS or len(waiting) >= 4 * self._images.size
                if not pictures or len(pictures) >= self._images.size or full:
                    now = self._see(waiting, latest, writer, several)
                    yield from _written(done, store)  # while the tower ran
                    done, waiting = now, []
                del read, pictures  # not held while the next are read
            now = self._see(waiting, latest, writer, several)
            yield from _written(done + now, store)

    def _read(self, source: Source, refresh: bool, several: bool) -> "_Read":
        """An encoded image from the cache, else a decoded picture, prepared for the tower. Runs in worker threads."""
        name = "-" if isinstance(source, bytes) else str(source)
        try:
            sha256, name, data = identify(source)
            if not refresh and (hit := self.pipeline.look_up(sha256, name, several)):
                return _Read(name, hit)
            picture = self._load(data, name)
            self.pipeline.check(picture)
            del data  # preparing takes the most memory
        except Exception as fault:
            return _Read(name, _named(name, _told(fault)))
        if not (several and self.pipeline.family.encodes_multi_image):
            self.pipeline.family.prepare(picture.image)
        return _Read(name, picture)

    def _see(
        self, reads: Sequence["_Read"], latest: dict[str, "_Latest"], writer: ThreadPoolExecutor, several: bool
    ) -> list["_Done"]:
        """Runs the tower on the pictures among `reads`, each once, and hands what it gives to the writer."""
        pictures = {read.found.sha256: read.found for read in reads if isinstance(read.found, Picture)}
        new = [picture for sha256, picture in pictures.items() if sha256 not in latest]
        if new and not self._seeing:
            with self._loading:
                self.pipeline.family.load("tower")  # what fails here would fail for every picture
            self._seeing = True
        results: dict[str, _Latest | GridpruneError] = dict(latest)
        first = {picture.sha256 for picture in new}
        for picture, result in zip(
            new, self._images.run(new, partial(self.pipeline.run_tower, several=several)), strict=True
        ):
            if isinstance(result, EncodedImage):
                latest[picture.sha256] = result, writer.submit(self.pipeline.put, result)
                results[picture.sha256] = latest[picture.sha256]
            else:
                results[picture.sha256] = result
        for sha256 in list(latest)[: -3 * self._images.size]:
            del latest[sha256]
        done = []
        for read in reads:
            if not isinstance(read.found, Picture):
                done.append(_Done(read.name, read.found, True))
                continue
            came = results[read.found.sha256]
            if isinstance(came, GridpruneError):
                done.append(_Done(read.name, came, False))
            else:
                done.append(_Done(read.name, came[0], read.found.sha256 not in first, came[1]))
                first.discard(read.found.sha256)  # the first of equal files is the one that was encoded
        return done

    # ---- prune -------------------------------------------------------------------------------------------------------

    def prune(
        self, asks: Sequence[Ask], *, system: str | None = None, template: str | None = None
    ) -> Iterator[tuple[int, Pruned | GridpruneError]]:
        """Prunes for every question, image by image: index of the question, and what came of it. In no order.

        An image that several questions are about is read once. One that fails fails its questions.
        """
        queries = [ask.pruning.query or ask.question for ask in asks if ask.pruning.needs_relevance]
        if queries:
            self.pipeline.family.relevance.load()  # what fails here would fail for every question
            with suppress(Exception):  # a question that can't be read is told when its turn comes
                self.pipeline.family.relevance.read(queries)
        apart: dict[bool, list[int]] = {}  # by whether the images of a question are encoded as some of several
        for index, ask in enumerate(asks):
            apart.setdefault(self.pipeline.family.encodes_multi_image and len(ask.sources) > 1, []).append(index)
        for several, indices in apart.items():
            yield from self._prune_images(asks, indices, several, system, template)

    def _prune_images(
        self, asks: Sequence[Ask], indices: Sequence[int], several: bool, system: str | None, template: str | None
    ) -> Iterator[tuple[int, Pruned | GridpruneError]]:
        """`prune` for the questions of some indices, whose images are encoded in one way."""
        users: dict[Source, list[int]] = {}
        for index in indices:
            for source in dict.fromkeys(asks[index].sources):
                users.setdefault(source, []).append(index)
        left = {source: len(indices) for source, indices in users.items()}
        found: dict[Source, tuple[EncodedImage | GridpruneError, bool]] = {}
        ready: list[_Ready] = []
        for source, (_, result, hit) in zip(users, self.encode(users, several=several), strict=True):
            found[source] = result, hit
            for index in users[source]:
                ask = asks[index]
                if not all(other in found for other in ask.sources):
                    continue
                images = [found[other] for other in ask.sources]
                encoded = tuple(image for image, _ in images if isinstance(image, EncodedImage))
                if len(encoded) == len(images):
                    ready.append(_Ready(index, ask, encoded, all(spared for _, spared in images)))
                else:
                    yield index, next(image for image, _ in images if isinstance(image, GridpruneError))
                for other in dict.fromkeys(ask.sources):
                    found[other] = found[other][0], True
                    left[other] -= 1
                    if not left[other]:
                        del found[other]
            if len(ready) >= self._prunings.size:
                yield from self._prune(ready, system, template)
                ready.clear()
        yield from self._prune(ready, system, template)

    def _prune(
        self, ready: Sequence["_Ready"], system: str | None, template: str | None
    ) -> Iterator[tuple[int, Pruned | GridpruneError]]:
        def work(part: Sequence[_Ready]) -> list[PrunedSet]:
            asked = [
                Asked(one.images, one.ask.question, one.ask.pruning, said)
                for one, said in zip(part, self._localize([one.ask for one in part]), strict=True)
            ]
            return self.pipeline.prune_each(asked, system=system, template=template)

        for one, result in zip(ready, self._prunings.run(ready, work), strict=True):
            if isinstance(result, GridpruneError):
                yield one.index, result
            else:
                notes = tuple(dict.fromkeys((image.name, note) for image in one.images for note in image.notes))
                yield one.index, Pruned(result, one.hit, notes)

    def _localize(self, asks: Sequence[Ask]) -> list[list[Localized] | None]:
        alike: dict[Pruning, list[int]] = {}
        for n, ask in enumerate(asks):
            if self.pipeline.localizer(ask.pruning, len(ask.sources)):
                alike.setdefault(ask.pruning, []).append(n)
        said: dict[int, list[Localized] | None] = {}
        for pruning, some in alike.items():
            with self._loading:
                found = self.pipeline.localize_each(
                    [asks[n].sources for n in some], [asks[n].question for n in some], pruning
                )
            said |= zip(some, found, strict=True)
        return [said.get(n) for n in range(len(asks))]

    # ---- generate ----------------------------------------------------------------------------------------------------

    def generate(
        self, sets: Sequence[PrunedSet], *, max_new_tokens: int = 128, **options: Any
    ) -> Iterator[tuple[int, str | GridpruneError]]:
        """Answers from pruned sets, those of like length together: index of the set, and its answer. In no order."""
        self.pipeline.family.load("language")  # what fails here would fail for every set
        order = sorted(range(len(sets)), key=lambda index: len(sets[index].input_ids))
        yield from zip(order, self._texts([sets[index] for index in order], max_new_tokens, options), strict=True)

    def _texts(
        self, sets: Sequence[PrunedSet], max_new_tokens: int, options: dict[str, Any]
    ) -> Iterator[str | GridpruneError]:
        def work(batch: Sequence[PrunedSet]) -> list[str]:
            with self._loading:
                return [made.text for made in generate(self.pipeline.family, batch, max_new_tokens, **options)]

        return self._questions.run(sets, work)

    def answer(
        self,
        asks: Sequence[Ask],
        *,
        system: str | None = None,
        template: str | None = None,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> Iterator[Reply | GridpruneError]:
        """Encodes, prunes and generates: the answer to every question, or its fault, in turn.

        `options` go to transformers' `generate`.
        """
        if asks:
            for pruning in {ask.pruning for ask in asks}:
                self.pipeline.find_relevance(pruning)
            self.pipeline.family.load("projector", "language")
        return in_order(self._answer(asks, system, template, max_new_tokens, options))

    def _answer(
        self,
        asks: Sequence[Ask],
        system: str | None,
        template: str | None,
        max_new_tokens: int,
        options: dict[str, Any],
    ) -> Iterator[tuple[int, Reply | GridpruneError]]:
        with ExitStack() as stack:
            worker = ThreadPoolExecutor(1)  # generates while this thread prunes
            stack.callback(worker.shutdown, cancel_futures=True)
            flying: deque[tuple[list[tuple[int, Pruned]], Future[list[str | GridpruneError]]]] = deque()
            waiting: list[tuple[int, Pruned]] = []
            held = 0  # bytes of rows that wait

            def texts(sets: Sequence[PrunedSet]) -> list[str | GridpruneError]:
                return list(self._texts(sets, max_new_tokens, options))

            def send() -> None:
                waiting.sort(key=lambda own: len(own[1].pruned.input_ids))
                size = self._questions.size
                for start in range(0, len(waiting), size):
                    batch = waiting[start : start + size]
                    flying.append((batch, worker.submit(texts, [made.pruned for _, made in batch])))
                waiting.clear()

            def receive() -> Iterator[tuple[int, Reply | GridpruneError]]:
                batch, future = flying.popleft()
                for (index, made), text in zip(batch, future.result(), strict=True):
                    if isinstance(text, GridpruneError):
                        yield index, text
                    else:
                        yield index, Reply(text, made.pruned.to_json(), made.hit, made.notes)

            for index, pruned in self.prune(asks, system=system, template=template):
                if isinstance(pruned, GridpruneError):
                    yield index, pruned
                    continue
                waiting.append((index, pruned))
                held += pruned.pruned.image_embeds.nbytes
                if len(waiting) >= _GROUP * self._questions.size or held > _MOST_BYTES:
                    send()
                    held = 0
                while flying and (len(flying) > _GROUP or flying[0][1].done()):
                    yield from receive()
            send()
            while flying:
                yield from receive()


def in_order(pairs: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Values with indices from 0, in any order: the values in turn, each as soon as those before it are there."""
    waiting: dict[int, T] = {}
    following = 0
    for index, value in pairs:
        waiting[index] = value
        while following in waiting:
            yield waiting.pop(following)
            following += 1


@dataclass(frozen=True)
class _Read:
    """A source that was read: its name, and what was found."""

    name: str
    found: EncodedImage | Picture | GridpruneError


@dataclass(frozen=True)
class _Ready:
    """A question whose images are encoded: its place, and whether none of them went through the tower for it."""

    index: int
    ask: Ask
    images: tuple[EncodedImage, ...]
    hit: bool


@dataclass(frozen=True)
class _Done:
    """A source that is done with, but perhaps for its write."""

    name: str
    result: EncodedImage | GridpruneError
    hit: bool
    write: "Future[bool] | None" = None


_Latest = tuple[EncodedImage, "Future[bool]"]  # an encoded image, and whether it was stored


def _written(done: Iterable[_Done], store: bool) -> Iterator[tuple[str, EncodedImage | GridpruneError, bool]]:
    for one in done:
        stored = one.write is None or one.write.result()
        if isinstance(one.result, EncodedImage) and store and not stored:
            yield one.name, GridpruneError(f"{one.name}: encoded, but not cached"), False
        elif isinstance(one.result, EncodedImage):
            yield one.name, replace(one.result, name=one.name), one.hit
        else:
            yield one.name, _named(one.name, one.result), False


class _Room:
    """Bytes of memory that threads may take, granted in the order of tickets 0, 1, ...; each is to `enter`, in turn.

    What is more than all of it gets in alone. Since no one waits for a later one, none waits for ever.
    """

    def __init__(self, most: int):
        self.most, self.closed = most, False
        self.blocked = False  # whether the next in turn waits
        self._held: dict[int, int] = {}
        self._turn, self._changed = 0, Condition()

    def enter(self, ticket: int, size: int) -> None:
        """Waits until `size` bytes are there. Raises GridpruneError once it is closed."""

        def fits() -> bool:
            if self._turn != ticket:
                return False
            self.blocked = bool(self._held) and sum(self._held.values()) + size > self.most
            return not self.blocked

        with self._changed:
            self._changed.wait_for(lambda: self.closed or fits())
            if self.closed:
                raise GridpruneError("interrupted")
            self._held[ticket] = size
            self._turn += 1
            self._changed.notify_all()

    def leave(self, ticket: int) -> None:
        """Gives back what `enter` took."""
        with self._changed:
            self._held.pop(ticket, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Lets everyone go who waits, and those who read stop."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


def _ahead(
    threads: ThreadPoolExecutor,
    work: Callable[[Source], _Read],
    sources: Iterable[Source],
    most: int,
    room: _Room,
    *,
    beside: bool,
) -> Iterator[_Read]:
    """What `work` makes of sources, in turn, up to `most` of them ahead; fewer where pictures are large.

    `beside`: while the caller does other things. Else none of it goes on meanwhile.
    """

    def enter(ticket: int, source: Source) -> _Read:
        room.enter(ticket, memory_of(source))
        return work(source)

    rest = enumerate(sources)
    flying: deque[tuple[int, Future[_Read]]] = deque()
    recent = deque([_MOST_MEMORY // 4], maxlen=8)  # bytes; how large the first ones are is not known
    while True:
        if beside or not flying:
            several = min(most, max(1, _MOST_MEMORY // max(1, *recent)))
            while len(flying) < several and (pair := next(rest, None)) is not None:
                flying.append((pair[0], threads.submit(enter, *pair)))
            if not beside:
                # one that waits for room gets it only when others have been handed on
                while wait([future for _, future in flying], timeout=0.05).not_done and not room.blocked:
                    pass
        if not flying:
            return
        ticket, future = flying.popleft()
        read = future.result()
        recent.append(BYTES_PER_PIXEL * _pixels(read.found))
        yield read
        del read, future  # a picture that is done with is not held while the next is read
        room.leave(ticket)


def _pixels(found: EncodedImage | Picture | GridpruneError) -> int:
    return found.image.width * found.image.height if isinstance(found, Picture) else 0


def _workers() -> int:
    return min(_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _lacks_memory(fault: Exception) -> bool:
    """Whether memory ran out: a GPU's, the machine's, or that of torch's allocator on the CPU, which says it so."""
    return isinstance(fault, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(fault)


def _told(fault: Exception) -> GridpruneError:
    """A failure as one that a user can be told of in a line."""
    if isinstance(fault, GridpruneError):
        return fault
    if _lacks_memory(fault):
        return GridpruneError("memory ran out for this one alone; use a smaller image, keep less, or --device cpu")
    told = GridpruneError(f"unexpected {type(fault).__name__}: {(str(fault).splitlines() or [''])[0]}")
    told.__cause__ = fault
    return told


def _named(name: str, fault: GridpruneError) -> GridpruneError:
    """The fault, with the name of its picture in front where it does not name it yet."""
    if name in str(fault) or ascii(name) in str(fault):  # as it is written where it can't be printed
        return fault
    told = type(fault)(f"{name}: {fault}")
    told.__cause__ = fault.__cause__
    return told
