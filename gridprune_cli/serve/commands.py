"""`/v1/gridprune/...`: what the commands of the same version ask. Private to them; see `client` for the other side.

`session` says what the server is, and checks options before anything is sent for them. `command` prunes, answers, or
answers from a pruned set. What comes of it goes back as lines of JSON: `{"text": ...}` while an answer is streamed, an
empty line where there is nothing to say, last `{"result": ...}` or `{"error": ...}`.
"""

import asyncio
import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gridprune_cli.client.protocol import COMMAND, FIGURES, SESSION, UNKNOWN_IMAGE, error_to_json, installed_version
from gridprune_cli.errors import GridpruneError
from gridprune_cli.image_files import NamedImage
from gridprune_cli.questions import MAX_IMAGES, Exchange
from gridprune_cli.serve.chat import next_event, wait_for_leave
from gridprune_cli.serve.jobs import Command, CommandJob, Finished, Left
from gridprune_cli.serve.pictures import SentPictures
from gridprune_cli.serve.uploads import Budget, Share, read_body
from gridprune_cli.serve.wire import Refusal, read_object
from gridprune_cli.serve.work import Worker

PIECE = 3 << 18  # bytes of a file that are sent at once, in base64 1 MiB; a multiple of 3, so that pieces can be joined


def command_routes(worker: Worker, budget: Budget, settings: Mapping[str, Any], sent: SentPictures) -> list[Route]:
    """The routes. `settings` are those that the server's pipeline was opened with, by name; `sent` may be shared."""
    return [
        Route(SESSION, Session(worker, budget, settings), methods=["POST"]),
        Route(COMMAND, Commands(worker, budget, sent), methods=["POST"]),
    ]


class Session:
    """The first exchange: what the server is, and what is wrong with options."""

    def __init__(self, worker: Worker, budget: Budget, settings: Mapping[str, Any]):
        self._worker, self._budget, self._settings = worker, budget, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._worker.check_ready()
        with self._budget.share() as share:
            values = read_object(await read_body(Request(scope, receive), share))
        result: dict[str, Any] = {"version": installed_version()}
        if values.get("version") == result["version"]:  # else nobody knows what the rest means
            result |= await asyncio.to_thread(self._describe, values)
        await _start(send)
        await _write(send, {"result": result})
        await _end(send)

    def _describe(self, values: Mapping[str, Any]) -> dict[str, Any]:
        commands = self._worker.commands
        assert commands is not None  # since the worker is ready
        pruning, generation = _mapping(values, "pruning"), _mapping(values, "generation")
        fault = None
        try:
            checked = commands.check_options(pruning, generation)
        except GridpruneError as error:
            fault, checked = error_to_json(error), {}
        session = commands.describe(self._settings) | {"pruning": pruning, "generation": checked, "fault": fault}
        return session | ({"fingerprint": commands.fingerprint} if values.get("fingerprint") else {})


class Commands:
    """The endpoint of everything else."""

    def __init__(self, worker: Worker, budget: Budget, sent: SentPictures):
        self._worker, self._budget, self._sent = worker, budget, sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Refusal for what is not begun."""
        with self._budget.share() as share:
            self._worker.check_ready()
            self._worker.check_room()
            body = await read_body(Request(scope, receive), share)
            command = await asyncio.to_thread(self._read, body, share)
            del body
            job = CommandJob(command, client=(scope["client"][0] if scope.get("client") else "", ""))
            self._worker.submit(job)
            leaving = asyncio.create_task(wait_for_leave(receive))
            leaving.add_done_callback(lambda _: job.events.put_nowait(Left()))
            try:
                await _start(send)
                await _report(job, share, send)
            finally:
                self._worker.withdraw(job)
                leaving.cancel()

    def _read(self, body: bytes, share: Share) -> Command:
        """Raises Refusal for what no command of this version sends, and for an image that is not held any more."""
        values = read_object(body)
        images = values.get("images", [])
        pruned, generation = values.get("pruned"), values.get("generation")
        if not isinstance(images, list) or len(images) > MAX_IMAGES or values.get("figure") not in (None, *FIGURES):
            raise _unknown()
        if generation is not None:
            generation = _mapping(values, "generation")
        command = Command(
            tuple(self._image(image, share) for image in images),
            _text(values, "question") or "",
            _mapping(values, "pruning"),
            _text(values, "system"),
            _text(values, "template"),
            None if pruned is None else (_text(pruned, "name") or "", _bytes(pruned, share)),
            generation,
            stream=values.get("stream") is True,
            cache=values.get("cache") is True,
            scenes_only=values.get("scenes_only") is True,
            file=values.get("file") is True,
            with_prefix=None if values.get("with_prefix") is None else values["with_prefix"] is True,
            figure=values.get("figure"),
            history=_history(values),
            pin=values.get("pin") is True,
        )
        if bool(images) == bool(pruned) or (pruned and generation is None):
            raise _unknown()
        return command

    def _image(self, image: Any, share: Share) -> NamedImage:
        name, key = _text(image, "name"), _text(image, "sha256")
        if name is None or key is None:
            raise _unknown()
        data = _bytes(image, share) if "data" in image else self._sent.get(f"sha256:{key}")
        if data is None:
            raise Refusal(400, "the image is not held any more; send it again", code=UNKNOWN_IMAGE)
        if "data" in image:
            self._sent.put(f"sha256:{hashlib.sha256(data).hexdigest()}", data)
        else:
            share.take(len(data))
        return NamedImage(data, name)


def _unknown() -> Refusal:
    return Refusal(400, "not what a command of this version sends", code="invalid_value")


def _mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name) or {}
    if not isinstance(value, dict):
        raise _unknown()
    return value


def _text(values: Any, name: str) -> str | None:
    value = values.get(name) if isinstance(values, dict) else 0
    if not isinstance(value, str | None):
        raise _unknown()
    return value


def _history(values: Mapping[str, Any]) -> tuple[Exchange, ...]:
    try:
        turns = tuple(Exchange(*turn) for turn in values.get("history") or ())
        fits = all(isinstance(text, str) for turn in turns for text in (turn.question, turn.answer))
        if not fits or not all(type(turn.images) is int for turn in turns):
            raise _unknown()
    except TypeError as fault:
        raise _unknown() from fault
    return turns


def _bytes(values: Mapping[str, Any], share: Share) -> bytes:
    try:
        data = base64.b64decode(_text(values, "data") or "", validate=True)
    except (binascii.Error, ValueError) as fault:
        raise _unknown() from fault
    share.take(len(data))
    return data


async def _report(job: CommandJob, share: Share, send: Send) -> None:
    """Sends what becomes of a job, up to its end."""
    while True:
        event = await next_event(job)
        if event is None:
            await send({"type": "http.response.body", "body": b"\n", "more_body": True})
        elif isinstance(event, str):
            await _write(send, {"text": event})
        elif isinstance(event, Finished):
            share.count(sum(map(len, event.files.values())))
            for piece in _pieces(event):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            break
        elif isinstance(event, Exception):
            await _write(send, {"error": _error(event)})
            break
        elif isinstance(event, Left):
            break
    await _end(send)


def _pieces(finished: Finished) -> Iterator[bytes]:
    """The line of JSON with a result, in pieces: its files may have hundreds of MB.

    No piece stops the event loop for long, and none is made before the client has read most of those before it.
    """
    yield json.dumps({"result": finished.result}, allow_nan=False).encode("ascii").removesuffix(b"}}")
    for name, data in finished.files.items():
        yield f', "{name}": "'.encode("ascii")
        for start in range(0, len(data), PIECE):
            yield base64.b64encode(data[start : start + PIECE])
        yield b'"'
    yield b"}}\n"


def _error(error: Exception) -> dict[str, Any]:
    if isinstance(error, GridpruneError):
        return error_to_json(error)
    reason = error.message if isinstance(error, Refusal) else f"unexpected {type(error).__name__}"
    return error_to_json(GridpruneError(reason))


async def _start(send: Send) -> None:
    headers = [
        (b"content-type", b"application/x-ndjson"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _write(send: Send, value: object) -> None:
    line = json.dumps(value, allow_nan=False).encode("ascii") + b"\n"
    await send({"type": "http.response.body", "body": line, "more_body": True})


async def _end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})
