"""Image files to encoded images, as fast as the vision tower alone allows.

Threads read and decode images while the tower runs on a GPU, else between its batches, and one thread writes to the
cache behind it. Of many millions, only as many are held as are being worked on.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import GridpruneError
from gridprune_cli.image_files import Source, name_of, stop_when
from gridprune_cli.images import Picture, identify, load_image
from gridprune_cli.runners.batches import MODELS, Batches, Stopwatch, as_error
from gridprune_cli.runners.reading import MAX_MEMORY, Reading, Room, count_threads, read_ahead
from gridprune_cli.settings import Request
from gridprune_cli.tokens import EncodedImage

MAX_PIXELS = 36_000_000  # that wait decoded for the tower; about 150 MB

Encoded = tuple[str, EncodedImage | GridpruneError, bool]
"""An image's name, its encoded form or what failed, and whether the tower was spared: a hit."""

EncodedImages = tuple[tuple[EncodedImage, ...], tuple[bool, ...]]
"""The encoded images of a request, and which of them were hits."""

_Latest = tuple[EncodedImage, "Future[bool]"]  # an encoded image, and whether it was stored


@dataclass(frozen=True)
class _Result:
    """What a source came to, but perhaps for the write to the cache."""

    source: Source
    name: str
    image: EncodedImage | GridpruneError
    hit: bool
    write: "Future[bool] | None" = None


class ImageRunner:
    """Encodes images in batches, `batch` of them at first.

    load  decodes the bytes of an image file, whose name it gets for its errors
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        batch: int = 16,
        load: Callable[[bytes, str], Picture] = load_image,
        stopwatch: Stopwatch | None = None,
    ):
        self.encoder, self._load_image = encoder, load
        self._batches = Batches(batch, "images")
        self._stopwatch = stopwatch or Stopwatch()
        self._loaded: set[str] = set()  # parts of the model

    def encode(
        self,
        sources: Iterable[Source],
        *,
        refresh: bool = False,
        several: bool = False,
        optional: Collection[str] = (),
        store: bool = False,
        parts: Sequence[str] = (),
    ) -> Iterator[Encoded]:
        """Encodes images into the cache, and gives them in turn.

        refresh  encode again what the cache holds
        several  each picture will be one of several in a prompt
        optional  names of optional signals that each is to have
        store    one that is not stored has failed, as where something else holds its place in the cache
        parts    of the model that are needed later, and loaded in one go with the tower where that is

        What is given was written before, where the cache can be written. A picture that can't be read or encoded gives
        its error in place of an encoded image, and the rest goes on. Raises GridpruneError where the model can't be
        loaded, and with `store` where the cache can't be written.
        """
        _ = self.encoder.family.encoder  # computed before the threads ask for it
        with ExitStack() as stack:
            # 1. threads that read, within bounds of memory, and one that writes
            room = Room(MAX_MEMORY)
            readers = ThreadPoolExecutor(count_threads(), initializer=stop_when, initargs=(lambda: room.closed,))
            writer = ThreadPoolExecutor(1)
            stack.callback(writer.shutdown)  # what is on its way to the disk gets there
            stack.callback(readers.shutdown, cancel_futures=True)
            stack.callback(room.close)  # an image that is being read is not waited for
            # a tower on the CPU takes all cores: reading beside it slows it by more than reading between batches takes
            beside = self.encoder.family.device != "cpu"
            read = partial(self._read, refresh=refresh, several=several, optional=optional)
            run_tower = partial(self.encoder.run_tower, several=several, optional=optional)
            readings = read_ahead(readers, read, sources, 2 * self._batches.size, room, beside=beside)
            # 2. batches for the tower; the results of one are given while the next is on its way
            latest: dict[str, _Latest] = {}  # by sha256: the same file again, read before it was written
            waiting: list[Reading] = []
            results: list[_Result] = []
            needed = frozenset(parts)
            for reading in readings:
                waiting.append(reading)
                pixels = [r.pixels for r in waiting if isinstance(r.result, Picture)]
                # another as large as the largest of them would be too much
                full = sum(pixels) + max(pixels, default=0) > MAX_PIXELS or len(waiting) >= 4 * self._batches.size
                if not pixels or len(pixels) >= self._batches.size or full:
                    encoded = self._run_tower(waiting, latest, writer, run_tower, needed)
                    yield from self._written(results, store)  # while the tower ran
                    results, waiting = encoded, []
                del reading  # not held while the next are read
            encoded = self._run_tower(waiting, latest, writer, run_tower, needed)
            yield from self._written(results + encoded, store)

    def encode_requests(
        self,
        requests: Sequence[Request],
        indices: Sequence[int],
        several: bool,
        optional: Collection[str],
        parts: Sequence[str],
    ) -> Iterator[tuple[int, EncodedImages | GridpruneError]]:
        """Encodes the images of the requests of some indices: index, and its images as soon as all of them are there.

        An image that several requests are about is encoded once. One that fails fails its requests.
        """
        files = {index: _files(requests[index]) for index in indices}
        users: dict[Source, list[int]] = {}
        for index in indices:
            for source in files[index]:
                users.setdefault(source, []).append(index)
            if not files[index]:  # all are encoded already
                self._load(frozenset(parts))
                yield index, _images_of(requests[index], {})
        unfinished = {source: len(asking) for source, asking in users.items()}
        results: dict[Source, tuple[EncodedImage | GridpruneError, bool]] = {}
        encoded = self.encode(users, several=several, optional=optional, parts=parts)
        for source, (_, result, hit) in zip(users, encoded, strict=True):
            results[source] = result, hit
            for index in users[source]:
                if not all(other in results for other in files[index]):
                    continue
                yield index, _images_of(requests[index], results)
                for other in files[index]:
                    results[other] = results[other][0], True  # the next request finds it encoded
                    unfinished[other] -= 1
                    if not unfinished[other]:
                        del results[other]

    def _read(self, source: Source, refresh: bool, several: bool, optional: Collection[str]) -> Reading:
        """An encoded image from the cache, else a decoded picture, prepared for the tower. Runs in reading threads."""
        name = name_of(source)
        family = self.encoder.family
        try:
            with self._stopwatch.measure("load"):
                sha256, name, data = identify(source)
                if isinstance(source, str | Path) and not os.path.isfile(source):
                    source = data  # a pipe can be read only once, and a localiser reads the image again
                if not refresh and (hit := self.encoder.look_up(sha256, name, several, optional)):
                    return Reading(source, name, hit)
                picture = self._load_image(data, name)
                self.encoder.check(picture)
                del data  # preparing takes the most memory
        except Exception as error:
            return Reading(source, name, as_error(error).about(name))
        if not (several and family.encodes_multi_image):
            family.prepare(picture.image)
        return Reading(source, name, picture)

    def _run_tower(
        self,
        readings: Sequence[Reading],
        latest: dict[str, _Latest],
        writer: ThreadPoolExecutor,
        run_tower: Callable[[Sequence[Picture]], list[EncodedImage]],
        needed: frozenset[str],
    ) -> list[_Result]:
        """Runs the tower on the pictures among `readings`, each once, and hands what it gives to the writer."""
        pictures = {r.result.sha256: r.result for r in readings if isinstance(r.result, Picture)}
        new = [picture for sha256, picture in pictures.items() if sha256 not in latest]
        # 1. what is needed of the model by now, in one go; what fails here would fail for every picture
        self._load(needed | ({"tower"} if new else set()))
        # 2. pictures through the tower
        outcomes: dict[str, _Latest | GridpruneError] = dict(latest)
        with self._stopwatch.measure("encode"):
            encoded = list(self._batches.run(new, run_tower))
        for picture, result in zip(new, encoded, strict=True):
            if isinstance(result, EncodedImage):
                latest[picture.sha256] = result, writer.submit(self.encoder.put, result)
                outcomes[picture.sha256] = latest[picture.sha256]
            else:
                outcomes[picture.sha256] = result
        for sha256 in list(latest)[: -3 * self._batches.size]:
            del latest[sha256]
        # 3. what each source came to; of equal files the first is the one that was encoded
        first = {picture.sha256 for picture in new}
        results = []
        for reading in readings:
            if not isinstance(reading.result, Picture):
                results.append(_Result(reading.source, reading.name, reading.result, True))
                continue
            outcome = outcomes[reading.result.sha256]
            if isinstance(outcome, GridpruneError):
                results.append(_Result(reading.source, reading.name, outcome, False))
            else:
                hit = reading.result.sha256 not in first
                results.append(_Result(reading.source, reading.name, outcome[0], hit, outcome[1]))
                first.discard(reading.result.sha256)
        return results

    def _load(self, parts: frozenset[str]) -> None:
        """Loads parts of the model that were not needed before."""
        if missing := parts - self._loaded:
            with MODELS, self._stopwatch.measure("load"):
                self.encoder.family.load(*missing)
            self._loaded |= missing

    def _written(self, results: Iterable[_Result], store: bool) -> Iterator[Encoded]:
        """Results once they are written, each image with the name and the source that it was asked for by."""
        for result in results:
            stored = result.write is None or result.write.result()
            if store:
                self.encoder.check_written()
            if isinstance(result.image, GridpruneError):
                yield result.name, result.image.about(result.name), False
            elif store and not stored:
                yield result.name, GridpruneError("encoded, but not cached", place=result.name), False
            else:
                yield result.name, replace(result.image, name=result.name, source=result.source), result.hit


def _files(request: Request) -> list[Source]:
    """The distinct images of a request that are to be encoded."""
    return list(dict.fromkeys(image for image in request.images if not isinstance(image, EncodedImage)))


def _images_of(
    request: Request, results: dict[Source, tuple[EncodedImage | GridpruneError, bool]]
) -> EncodedImages | GridpruneError:
    """The encoded images of a request, and which were hits; or the error of the first that could not be encoded."""
    pairs = [(image, True) if isinstance(image, EncodedImage) else results[image] for image in request.images]
    images = []
    for image, _ in pairs:
        if isinstance(image, GridpruneError):
            return image
        images.append(image)
    return tuple(images), tuple(hit for _, hit in pairs)
