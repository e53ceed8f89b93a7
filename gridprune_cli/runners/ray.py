"""Ray as the engine: many images and many questions on the workers of a machine or of a cluster.

Work is cut into parts of one batch, and each goes through two stages of Ray Data that scale apart: tasks, on whatever
CPUs are free, read images and decode those that are not in the cache; workers, a model each and a GPU each where there
are GPUs, run `Bulk` on them and write to the shared cache. Parts come back in any order, and are given in that of the
input. A part whose process dies is done again: entries are whole or not there, so what it had written is a hit by then,
and what it had not is made anew. Nothing is given twice, since a part is given once it is done.

Device and dtype are those of the process that calls. Images, model, cache and working folder are to lie under the same
paths on all machines. This module needs no torch, so that the processes that decode start quickly.
"""

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gridprune_cli.cache.store import Store, entry_key
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.images import Picture, identify, load_image

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.runners.local import Ask, Bulk, Reply

_TOGETHER = 4  # parts that a worker takes at once: it reads and writes one while its model is at another
_MOST_PIXELS = 100_000_000  # of a part that are handed over decoded, about 300 MB; the worker decodes the rest
_CPUS = 4  # per worker, where there are no GPUs and nothing is said

T = TypeVar("T")
Job = Callable[["Bulk", list[Any]], list[Any]]  # gives a result for each item


@dataclass(frozen=True)
class Encoded:
    """What the process that calls is told of an encoded image, which stays where it was made."""

    key: str
    count: int
    nbytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Ray:
    """A Ray cluster, and how many workers to use of it.

    address  of a running one, `HOST:PORT` or `auto`; None: that of RAY_ADDRESS, else Ray is started on this machine
    workers  None: one per GPU, without GPUs one per 4 CPUs

    Raises BadInput where Ray is not installed.
    """

    address: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if missing := [name for name in ("ray", "pyarrow", "pandas") if find_spec(name) is None]:
            raise BadInput(f"--engine ray: {' and '.join(missing)} missing; pip install 'gridprune[ray]'")

    def encode(
        self,
        pipeline: "Pipeline",
        images: Sequence[str | Path],
        *,
        batch: int = 16,
        refresh: bool = False,
        notice: Callable[[str], None],
    ) -> Iterator[tuple[str, Encoded | GridpruneError, bool]]:
        """As `Pipeline.encode_all`; the encoded images themselves stay in the cache."""
        names = [str(image) for image in images]
        job = partial(_encode, refresh=refresh)
        return self._run(pipeline, names, lambda name: (name,), batch, job, notice, refresh)

    def answer(
        self,
        pipeline: "Pipeline",
        asks: Sequence["Ask"],
        *,
        batch: int = 32,
        notice: Callable[[str], None],
        **given: Any,
    ) -> "Iterator[Reply | GridpruneError]":
        """As `Bulk.answer`, with questions about one image close together, so that they share a worker.

        Sources are paths. `given` is what `Bulk.answer` takes besides.
        """
        from gridprune_cli.runners.local import in_order

        for pruning in {ask.pruning for ask in asks}:
            pipeline.find_relevance(pruning)  # here, once, and not in every worker
        together: dict[Any, list[int]] = {}
        for index, ask in enumerate(asks):
            together.setdefault(ask.sources[0], []).append(index)
        order = [index for indices in together.values() for index in indices]
        job = partial(_answer, given=given)
        replies = self._run(pipeline, [asks[i] for i in order], lambda ask: ask.sources, batch, job, notice)
        return in_order(zip(order, replies, strict=True))

    def _run(
        self,
        pipeline: "Pipeline",
        items: Sequence[T],
        sources: Callable[[T], Sequence[Any]],
        size: int,
        job: Job,
        notice: Callable[[str], None],
        refresh: bool = False,
    ) -> Iterator[Any]:
        """The result of every item, in turn, with `size` items to a part."""
        from gridprune_cli.runners.local import in_order

        if not items:
            return
        device = pipeline.family.device
        if pipeline.family.sharded or device not in ("cpu", "cuda"):
            raise BadInput(f"--device {device}: with --engine ray, auto, cpu or cuda; a worker has one device")
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        with _ray(self.address) as ray:
            resources = ray.cluster_resources()
            cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0)) if device == "cuda" else 0
            if device == "cuda" and not gpus:
                raise BadInput("--device cuda: Ray has no GPU; use --device cpu, or another --address")
            workers = min(self.workers or gpus or max(1, cpus // _CPUS), len(parts))
            rows = [
                {"number": number, "names": pickle.dumps(names), "items": pickle.dumps(part)}
                for number, part in enumerate(parts)
                for names in [list(dict.fromkeys(str(source) for item in part for source in sources(item)))]
            ]
            # half of the CPUs are left to what reads images, however many workers there are
            half = _share(cpus, 2 * workers)
            data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _decode,
                fn_args=(_cache(pipeline, refresh), os.getcwd()),
                batch_size=1,
                batch_format="numpy",
                num_cpus=_share(cpus, 2),
            )
            data = data.map_batches(
                _Worker,
                fn_constructor_args=(pickle.dumps(pipeline), job, size, os.getcwd(), max(1, cpus // workers)),
                batch_size=min(_TOGETHER, -(-len(parts) // workers)),
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                num_cpus=half,
                num_gpus=1 / -(-workers // gpus) if gpus else None,
            )
            given = 0
            for results in in_order(_received(data.iter_rows(), pipeline, notice)):
                given += len(results)
                yield from results
            if given != len(items):
                raise GridpruneError(f"--engine ray: gave {given} results for {len(items)}; give the command again")


# Ray's environment variables, read when it is imported
_SETTINGS = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what matters is raised in Python
    "RAY_DEDUP_LOGS": "1",  # and none of the lines is printed, to stdout, that match this expression: all of them
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or workers without a GPU warn
}
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would tell its makers
    "RAY_worker_niceness": "0",  # as urgent as this command, not 15 less
}


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, started or connected to, silent, and left again. What fails inside it is a GridpruneError."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {}
    if address == "local":
        own = {"include_dashboard": False, "object_store_memory": _object_store()}
    os.environ |= _DEFAULTS | os.environ | _SETTINGS
    try:
        _check(address)
        with _silent():
            import ray
            import ray.data

            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **own)
    except Exception as fault:
        raise GridpruneError(f"--address {address}: can't use Ray there ({_first(fault)}); see `ray status`") from fault
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield ray
    except GridpruneError:
        raise
    except Exception as fault:  # Ray Data raises nearly everything
        raise GridpruneError(f"--engine ray: {_first(fault)}; what is done is in the cache") from fault
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT, which Ray would take minutes to find out."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _silent() -> Iterator[None]:
    """What is written to stderr, be it from C++, goes nowhere: Ray says there how loud it is going to be."""
    own = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def _first(fault: BaseException) -> str:
    fault = getattr(fault, "cause", None) or fault  # of Ray's own, whose text is a traceback
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)


def _object_store() -> int:
    """Bytes that Ray may hold between the stages: an eighth of the memory, at most 4 GB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 33
    return max(1 << 28, min(memory // 8, 1 << 32))


def _share(cpus: int, parts: int) -> float:
    """CPUs of one of so many parts, at most 1, as finely as Ray counts."""
    return min(1.0, cpus * 10_000 // parts / 10_000)


def _received(
    rows: Iterator[dict[str, Any]], pipeline: "Pipeline", notice: Callable[[str], None]
) -> Iterator[tuple[int, list[Any]]]:
    """Number and results of every part, as workers have done them. What they say is said once."""
    told: set[str] = set()
    for row in rows:
        done: _Done = pickle.loads(row["done"])
        for text in done.told:
            if text not in told:
                notice(text)
                told.add(text)
        if pipeline.store:
            pipeline.store.adopt(done.written)
        if done.fault:
            raise done.fault
        yield from done.parts


# ---- in tasks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cache:
    """Where to look for an image before it is decoded."""

    root: Path
    encoder: Mapping[str, Any]
    signals: tuple[str, ...]

    def holds(self, sha256: str) -> bool:
        return Store(self.root, None).holds(self.encoder, entry_key(sha256, self.encoder, self.signals))


def _cache(pipeline: "Pipeline", refresh: bool) -> _Cache | None:
    """The cache, where images need not be decoded that are in it."""
    from gridprune_cli.pipeline import SIGNALS

    encoder = pipeline.encoder  # also made here once, and sent along
    return _Cache(pipeline.store.root.absolute(), encoder, SIGNALS) if pipeline.store and not refresh else None


def _decode(row: dict[str, Any], cache: _Cache | None, folder: str) -> dict[str, Any]:
    """Adds the pictures of a part, by name, but for those that the cache holds. Runs in tasks."""
    os.chdir(folder)
    pictures: dict[str, Picture] = {}
    room = _MOST_PIXELS
    for name in pickle.loads(row["names"][0]):
        with suppress(Exception):  # the worker meets it again, and knows what to say of it
            sha256, _, data = identify(name)
            if cache is None or not cache.holds(sha256):
                picture = load_image(data, name)
                room -= picture.image.width * picture.image.height
                if room < 0:
                    break
                pictures[name] = picture
    return {"number": row["number"], "items": row["items"], "pictures": [pickle.dumps(pictures)]}


# ---- in workers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """What a worker gives back: numbers and results of parts, what it has to say, and which entries it wrote.

    `fault` is one that all other parts would meet too.
    """

    parts: list[tuple[int, list[Any]]]
    told: list[str]
    written: list[tuple[str, int]]  # path and bytes
    fault: GridpruneError | None


class _Worker:
    """A model in a process of its own. `job` makes results of items, `size` of which are a batch."""

    def __init__(self, pipeline: bytes, job: Job, size: int, folder: str, threads: int):
        import torch

        from gridprune_cli.runners.local import Bulk

        with suppress(OSError):
            os.chdir(folder)
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self.told: list[str] = []
        self.pictures: dict[str, Picture] = {}
        own: Pipeline = pickle.loads(pipeline)
        self.store = own.store = _Noting(own.store.root, self.told.append) if own.store else None
        self.bulk = Bulk(own, images=size, questions=size, notice=self.told.append, load=self._load)
        self.job = job

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        parts = sorted(zip(rows["number"].tolist(), map(pickle.loads, rows["items"]), strict=True))
        for pictures in rows["pictures"]:
            self.pictures |= pickle.loads(pictures)
        results: Iterator[Any] = iter(())
        fault = None
        try:
            results = iter(self.job(self.bulk, [item for _, items in parts for item in items]))
        except GridpruneError as met:
            fault, parts = met, []
        done = [(number, [next(results) for _ in items]) for number, items in parts]
        written = self.store.written if self.store else []
        row = pickle.dumps(_Done(done, self.told, written, fault))
        self.pictures.clear()
        self.told.clear()
        written.clear()
        return {"done": [row]}

    def _load(self, data: bytes, name: str) -> Picture:
        picture = self.pictures.get(name)
        if picture and picture.sha256 == identify(data)[0]:  # else the file was changed meanwhile
            return picture
        return load_image(data, name)


class _Noting(Store):
    """A store that notes what it wrote, for the process that calls, which keeps the limit."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        super().__init__(root, None, warn)
        self.written: list[tuple[str, int]] = []

    def adopt(self, written: Sequence[tuple[str, int]]) -> None:
        super().adopt(written)
        self.written += written


def _encode(bulk: "Bulk", names: list[str], refresh: bool) -> list[tuple[str, Encoded | GridpruneError, bool]]:
    made: list[tuple[str, Encoded | GridpruneError, bool]] = []
    for name, result, hit in bulk.encode(names, refresh=refresh, store=True):
        bulk.pipeline.check_written()
        if isinstance(result, GridpruneError):
            made.append((name, result, hit))
        else:
            made.append((name, Encoded(result.key, result.count, result.nbytes, result.notes), hit))
    return made


def _answer(bulk: "Bulk", asks: list["Ask"], given: dict[str, Any]) -> list["Reply | GridpruneError"]:
    return list(bulk.answer(asks, **given))
