"""What the commands work with where a server has the model: it stands in for a pipeline, and sends what that would do.

Nothing of a pruned set but its file, its figure and its record comes back, so there are no tensors here.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gridprune_cli.client.protocol import COMMAND, UNKNOWN_IMAGE, ServerFault, error_from_json
from gridprune_cli.errors import GridpruneError
from gridprune_cli.image_files import Source, name_of, read_image
from gridprune_cli.questions import Exchange, cache_outcome
from gridprune_cli.text import visible

if TYPE_CHECKING:
    from gridprune_cli.client.connection import Connection

MAX_UNDER_WAY = 64  # of one command's questions: two of a server's batches, and as many as may wait by its default


@dataclass(frozen=True)
class RemoteRequest:
    """A question about images, with options of pruning by name, as `Pruning.from_options` takes them.

    history  earlier turns, as of `Request`
    pin      whether the server goes on from what it holds of the conversation's prompt, and holds it again
    """

    images: tuple[Source, ...]
    question: str
    pruning: Mapping[str, Any]
    system: str | None = None
    template: str | None = None
    history: Sequence[Exchange] = ()
    pin: bool = False


@dataclass(frozen=True)
class RemotePruned:
    """A pruned set of the server.

    record  what `PrunedSet.to_json` gives
    file    its bytes, where they were asked for
    figure  the figure, where that was asked for: a PNG file, or the text for a terminal in UTF-8
    """

    record: dict[str, Any]
    counts: str
    notes: tuple[str, ...]
    file: bytes = b""
    figure: bytes = b""

    def to_json(self) -> dict[str, Any]:
        return self.record

    def to_bytes(self) -> bytes:
        return self.file


@dataclass(frozen=True)
class RemoteAnswer:
    """What came of a request, with an answer where one was asked for; in place of `Answer`, `Pruned` and `Reply`."""

    pruned: RemotePruned
    hits: tuple[bool, ...]
    image_notes: tuple[tuple[str, str], ...]
    ms: dict[str, float]
    text: str = ""

    @property
    def record(self) -> dict[str, Any]:
        return self.pruned.record

    @property
    def notes(self) -> tuple[str, ...]:
        return self.pruned.notes

    @property
    def hit(self) -> bool:
        """Whether all images came from the cache."""
        return all(self.hits)

    def to_json(self) -> dict[str, Any]:
        """What `Answer.to_json` gives."""
        return self.record | {"answer": self.text, "cache": cache_outcome(self.hits), "ms": self.ms}


class RemotePipeline:
    """A server, once it is known to have what was asked for.

    pruning     options by name, which the server has checked
    generation  options for transformers' `generate`, from those of the command
    methods     names of options of pruning methods
    fingerprint  of the language model, where that was asked for
    named       whether the user named it, or it was found by its socket
    fault       what is wrong with the options, for the command to raise
    remarks     what a user should know of how the model prunes, from the latest answer
    """

    def __init__(
        self, connection: "Connection", session: Mapping[str, Any], cache: bool, scenes_only: bool, named: bool
    ):
        self.generation: dict[str, Any] = session["generation"]
        self.pruning: dict[str, Any] = session["pruning"]
        self.methods = frozenset(session["method_options"])
        self.model: str = session["model"]
        self.fingerprint: str | None = session.get("fingerprint")
        self.named = named
        self.fault = error_from_json(session["fault"]) if session["fault"] else None
        self.remarks: tuple[str, ...] = ()
        self._connection, self._common = connection, {"cache": cache, "scenes_only": scenes_only}
        self._sent: set[str] = set()  # sha256 of images that the server got

    def __enter__(self) -> "RemotePipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(
        self,
        images: Sequence[Source],
        question: str,
        pruning: Mapping[str, Any],
        *,
        system: str | None = None,
        template: str | None = None,
        history: Sequence[Exchange] = (),
        pin: bool = False,
        stream: TextIO | None = None,
        outputs: Mapping[str, Any] | None = None,
        **generation: Any,
    ) -> RemoteAnswer:
        """The answer to a question, as of `Pipeline.ask`. `outputs` are those of `run`."""
        request = RemoteRequest(tuple(images), question, pruning, system, template, history, pin)
        return self.run(request, generation, stream, outputs)

    def run(
        self,
        request: RemoteRequest,
        generation: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> RemoteAnswer:
        """Has a request pruned, and answered where there are options for that. Raises its error.

        stream   gets the answer as it comes
        outputs  what else comes back: `file=True`, the pruned set's file; `figure=`, one of `protocol.FIGURES`; and
                 `with_prefix=`, as of `Runner.prune`
        """
        body: dict[str, Any] = dict(self._common) | {"generation": generation, "stream": stream is not None}
        body |= {"question": request.question, "pruning": dict(request.pruning), **(outputs or {})}
        body |= {"system": request.system, "template": request.template, "pin": request.pin}
        body["history"] = [[turn.question, turn.answer, turn.images] for turn in request.history]
        files = [(name_of(source), _read(source)) for source in request.images]
        keys = [hashlib.sha256(data).hexdigest() for _, data in files]

        def send(known: set[str]) -> RemoteAnswer:
            images = [
                {"name": name, "sha256": key} | ({} if key in known else {"data": base64.b64encode(data).decode()})
                for key, (name, data) in zip(keys, files, strict=True)
            ]
            return self._send(body | {"images": images}, stream)

        try:
            answer = send(self._sent)
        except ServerFault as fault:
            if fault.code != UNKNOWN_IMAGE:
                raise
            answer = send(set())
        self._sent.update(keys)
        return answer

    def generate(self, name: str, data: bytes, generation: Mapping[str, Any]) -> RemoteAnswer:
        """The answer from the file of a pruned set. Raises its error."""
        file = {"name": name, "data": base64.b64encode(data).decode()}
        return self._send(self._common | {"generation": generation, "pruned": file}, None)

    def map(self, act: Callable[[Any], RemoteAnswer], items: Sequence[Any], batch_size: int) -> Iterator[Any]:
        """What `act` gives for every item, or its error, in turn.

        Two batches are under way, so that the next one waits at the server, and whole, when it has done with one.

        Raises ServerFault, since what the server does not answer it would answer for no item.
        """
        from concurrent.futures import ThreadPoolExecutor

        remaining = len(items)
        fatal: list[ServerFault] = []  # after the first of these nothing is sent any more

        def attempt(item: Any) -> RemoteAnswer | GridpruneError:
            if fatal:
                return fatal[0]
            try:
                return act(item)
            except GridpruneError as fault:
                if isinstance(fault, ServerFault) and fault.for_all:
                    fatal.append(fault)
                return fault

        threads = ThreadPoolExecutor(min(2 * batch_size, MAX_UNDER_WAY, max(1, len(items))))
        try:
            for result in threads.map(attempt, items):
                if isinstance(result, ServerFault) and result.for_all:
                    raise fatal[0]
                remaining -= 1
                yield result
        except BaseException:
            if remaining:  # nobody waits for them any more
                self._connection.close()
            raise
        finally:
            threads.shutdown(cancel_futures=True)

    def _send(self, body: Mapping[str, Any], stream: TextIO | None) -> RemoteAnswer:
        for value in self._connection.post(COMMAND, body):
            if stream is not None and "text" in value:
                stream.write(visible(value["text"]))
                stream.flush()
        result = value["result"]
        self.remarks = tuple(result["remarks"])
        pruned = RemotePruned(
            result["record"],
            result["counts"],
            tuple(result["notes"]),
            base64.b64decode(result.get("file") or ""),
            base64.b64decode(result.get("figure") or ""),
        )
        notes = tuple((name, note) for name, note in result["image_notes"])
        return RemoteAnswer(pruned, tuple(result["hits"]), notes, result["ms"], result["answer"] or "")


def _read(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    return read_image(source) if isinstance(source, str | Path) else source.data
