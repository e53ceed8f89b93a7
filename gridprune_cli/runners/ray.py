"""Ray runs it: many images and many questions on the workers of a machine or of a cluster.

Work is cut into batches, and each goes through two stages of Ray Data that scale apart: tasks, on whatever CPUs are
free, read images and decode those that are not in the cache; workers, a model each and a GPU each where there are GPUs,
run a `Runner` on them and write to the shared cache. Batches come back in any order, and are given in that of the
input. A batch whose process dies is done again: entries of the cache are whole or not there, so what it had written is
a hit by then, and what it had not is encoded anew. Nothing is given twice, since a batch is given once it is done.

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
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from gridprune_cli.cache.store import Store, Written, entry_key
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.images import Picture, identify, load_image

if TYPE_CHECKING:
    from gridprune_cli.encoder import Encoder
    from gridprune_cli.runners.local import Reply, Runner
    from gridprune_cli.settings import Request

_TOGETHER = 4  # batches that a worker takes at once: it reads and writes one while its model is at another
_MOST_PIXELS = 100_000_000  # of a batch that are handed over decoded, about 300 MB; the worker decodes the rest
_CPUS = 4  # per worker, where there are no GPUs and nothing is said

_log = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[["Runner", list[Any]], list[Any]]  # gives a result for each item


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
    starts_once: ClassVar[bool] = True  # for all requests, so they are read before

    def __post_init__(self) -> None:
        if missing := [name for name in ("ray", "pyarrow", "pandas") if find_spec(name) is None]:
            raise BadInput(
                f"{' and '.join(missing)} missing; pip install 'gridprune[ray]'", field="engine", value="ray"
            )

    def encode(
        self, runner: "Runner", images: Sequence[str | Path], *, refresh: bool = False, with_prefix: bool = False
    ) -> Iterator[tuple[str, Encoded | GridpruneError, bool]]:
        """As `runner.encode` with `store`; the encoded images themselves stay in the cache."""
        names = [str(image) for image in images]
        job = partial(_encode, refresh=refresh, with_prefix=with_prefix)
        return self._run(runner, names, lambda name: (name,), runner.batch_sizes[0], job, refresh)

    def answer(
        self, runner: "Runner", requests: Sequence["Request"], **options: Any
    ) -> "Iterator[Reply | GridpruneError]":
        """As `runner.answer`, with questions about one image close together, so that they share a worker.

        Images are paths.
        """
        from gridprune_cli.runners.batches import in_order
        from gridprune_cli.selector import find_relevance

        for pruning in {request.pruning for request in requests}:
            find_relevance(runner.family, pruning)  # here, once, and not in every worker
        by_image: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            by_image.setdefault(request.images[0], []).append(index)
        order = [index for indices in by_image.values() for index in indices]
        job = partial(_answer, options=options)
        ordered = [requests[index] for index in order]
        replies = self._run(runner, ordered, lambda request: request.images, runner.batch_sizes[1], job)
        return in_order(zip(order, replies, strict=True))

    def _run(
        self,
        runner: "Runner",
        items: Sequence[T],
        images: Callable[[T], Sequence[Any]],
        size: int,
        job: Job,
        refresh: bool = False,
    ) -> Iterator[Any]:
        """The result of every item, in turn, with `size` items to a batch."""
        from gridprune_cli.runners.batches import in_order

        if not items:
            return
        device = runner.family.device
        if runner.family.sharded or device not in ("cpu", "cuda"):
            raise BadInput(
                "with `engine=ray`, auto, cpu or cuda; a worker has one device", field="device", value=device
            )
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        with _ray(self.address) as ray:
            resources = ray.cluster_resources()
            cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0)) if device == "cuda" else 0
            if device == "cuda" and not gpus:
                raise BadInput("Ray has no GPU; use `device=cpu`, or another `address`", field="device", value="cuda")
            workers = min(self.workers or gpus or max(1, cpus // _CPUS), len(batches))
            blocks = [
                {"number": number, "names": pickle.dumps(names), "items": pickle.dumps(batch)}
                for number, batch in enumerate(batches)
                for names in [list(dict.fromkeys(str(source) for item in batch for source in images(item)))]
            ]
            model = pickle.dumps((runner.encoder, runner.localizers))
            # half of the CPUs are left to what reads images, however many workers there are
            half = _share(cpus, 2 * workers)
            data = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map_batches(
                _decode,
                fn_args=(_cache(runner.encoder, refresh), os.getcwd()),
                batch_size=1,
                batch_format="numpy",
                num_cpus=_share(cpus, 2),
            )
            data = data.map_batches(
                _Worker,
                fn_constructor_args=(model, job, size, os.getcwd(), max(1, cpus // workers)),
                batch_size=min(_TOGETHER, -(-len(batches) // workers)),
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                num_cpus=half,
                num_gpus=1 / -(-workers // gpus) if gpus else None,
            )
            count = 0
            for results in in_order(_received(data.iter_rows(), runner)):
                count += len(results)
                yield from results
            if count != len(items):
                raise GridpruneError(f"gave {count} results for {len(items)}; start again", field="engine", value="ray")


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
    options: dict[str, Any] = {}
    if address == "local":
        options = {"include_dashboard": False, "object_store_memory": _object_store()}
    os.environ |= _DEFAULTS | os.environ | _SETTINGS
    try:
        _check(address)
        with _silent():
            import ray
            import ray.data

            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as fault:
        raise GridpruneError(
            f"can't use Ray there ({_first(fault)}); see `ray status`", field="address", value=address
        ) from fault
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield ray
    except GridpruneError:
        raise
    except Exception as fault:  # Ray Data raises nearly everything
        raise GridpruneError(f"{_first(fault)}; what is done is in the cache", field="engine", value="ray") from fault
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
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _first(fault: BaseException) -> str:
    fault = getattr(fault, "cause", None) or fault  # of Ray's own, whose text is a traceback
    return next((line.strip() for line in str(fault).splitlines() if line.strip()), type(fault).__name__)


def _object_store() -> int:
    """Bytes that Ray may hold between the stages: an eighth of the memory, at most 4 GB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 33
    return max(1 << 28, min(memory // 8, 1 << 32))


def _share(cpus: int, shares: int) -> float:
    """CPUs of one of so many shares, at most 1, as finely as Ray counts."""
    return min(1.0, cpus * 10_000 // shares / 10_000)


def _received(blocks: Iterator[dict[str, Any]], runner: "Runner") -> Iterator[tuple[int, list[Any]]]:
    """Number and results of every batch, as workers have done them. What they log is logged here once."""
    noticed: set[str] = set()
    for block in blocks:
        done: _Done = pickle.loads(block["done"])
        for text in done.notices:
            if text not in noticed:
                _log.warning("%s", text)
                noticed.add(text)
        if runner.encoder.store:
            runner.encoder.store.adopt(done.written)
        if done.fault:
            raise done.fault
        yield from done.batches


# ---- in tasks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cache:
    """Where to look for an image before it is decoded."""

    root: Path
    encoder: Mapping[str, Any]
    signals: tuple[str, ...]

    def holds(self, sha256: str) -> bool:
        return Store(self.root, None).holds(self.encoder, entry_key(sha256, self.encoder, self.signals))


def _cache(encoder: "Encoder", refresh: bool) -> _Cache | None:
    """The cache, where images need not be decoded that are in it."""
    from gridprune_cli.encoder import SIGNALS

    identity = encoder.identity()  # also computed here once, and sent along
    return _Cache(encoder.store.root.absolute(), identity, SIGNALS) if encoder.store and not refresh else None


def _decode(block: dict[str, Any], cache: _Cache | None, folder: str) -> dict[str, Any]:
    """Adds the pictures of a batch, by name, but for those that the cache holds. Runs in tasks."""
    os.chdir(folder)
    pictures: dict[str, Picture] = {}
    room = _MOST_PIXELS
    for name in pickle.loads(block["names"][0]):
        with suppress(Exception):  # the worker meets it again, and knows what to say of it
            sha256, _, data = identify(name)
            if cache is None or not cache.holds(sha256):
                picture = load_image(data, name)
                room -= picture.image.width * picture.image.height
                if room < 0:
                    break
                pictures[name] = picture
    return {"number": block["number"], "items": block["items"], "pictures": [pickle.dumps(pictures)]}


# ---- in workers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """What a worker gives back: numbers and results of batches, what it has to say, and which entries it wrote.

    `fault` is one that all other batches would meet too.
    """

    batches: list[tuple[int, list[Any]]]
    notices: list[str]
    written: list[Written]
    fault: GridpruneError | None


class _Worker:
    """A model in a process of its own. `job` makes results of items, `size` of which are a batch."""

    def __init__(self, model: bytes, job: Job, size: int, folder: str, threads: int):
        import torch

        from gridprune_cli.runners.local import Runner

        with suppress(OSError):
            os.chdir(folder)
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self.notices: list[str] = []
        self.pictures: dict[str, Picture] = {}
        encoder, localizers = pickle.loads(model)
        self.store = encoder.store = _Noting(encoder.store.root, self.notices.append) if encoder.store else None
        encoder.prefixes.store = self.store
        self.runner = Runner(encoder, localizers, images=size, questions=size, load=self._load)
        self.job = job

    def __call__(self, blocks: dict[str, Any]) -> dict[str, Any]:
        batches = sorted(zip(blocks["number"].tolist(), map(pickle.loads, blocks["items"]), strict=True))
        for pictures in blocks["pictures"]:
            self.pictures |= pickle.loads(pictures)
        results: Iterator[Any] = iter(())
        fault = None
        collector, logger = _Collector(self.notices), logging.getLogger("gridprune_cli")
        logger.addHandler(collector)
        try:
            results = iter(self.job(self.runner, [item for _, items in batches for item in items]))
        except GridpruneError as error:
            fault, batches = error, []
        finally:
            logger.removeHandler(collector)
        done = [(number, [next(results) for _ in items]) for number, items in batches]
        written = self.store.written if self.store else []
        result = pickle.dumps(_Done(done, self.notices, written, fault))
        self.pictures.clear()
        self.notices.clear()
        written.clear()
        return {"done": [result]}

    def _load(self, data: bytes, name: str) -> Picture:
        picture = self.pictures.get(name)
        if picture and picture.sha256 == identify(data)[0]:  # else the file was changed meanwhile
            return picture
        return load_image(data, name)


class _Collector(logging.Handler):
    """Puts warnings that are logged in a list, for the process that calls."""

    def __init__(self, warnings: list[str]):
        super().__init__(logging.WARNING)
        self.warnings = warnings

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


class _Noting(Store):
    """A store that notes what it wrote, for the process that calls, which keeps the limit."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        super().__init__(root, None, warn)
        self.written: list[Written] = []

    def adopt(self, written: Sequence[Written]) -> None:
        super().adopt(written)
        self.written += written


def _encode(
    runner: "Runner", names: list[str], refresh: bool, with_prefix: bool
) -> list[tuple[str, Encoded | GridpruneError, bool]]:
    results: list[tuple[str, Encoded | GridpruneError, bool]] = []
    for name, encoded, hit in runner.encode(names, refresh=refresh, with_prefix=with_prefix, store=True):
        if isinstance(encoded, GridpruneError):
            results.append((name, encoded, hit))
        else:
            results.append((name, Encoded(encoded.key, encoded.count, encoded.nbytes, encoded.notes), hit))
    return results


def _answer(runner: "Runner", requests: list["Request"], options: dict[str, Any]) -> list["Reply | GridpruneError"]:
    return list(runner.answer(requests, **options))
