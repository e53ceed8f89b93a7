"""`/v1/chat/completions`: a request's way through the server, answered as JSON or as a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gridprune_cli.serve.gate import Json
from gridprune_cli.serve.jobs import Event, Job, Left
from gridprune_cli.serve.pictures import Pictures
from gridprune_cli.serve.replies import Chunks, Outcome, completion_json
from gridprune_cli.serve.uploads import Budget, Share, read_body
from gridprune_cli.serve.wire import ChatRequest, PicturePart, Refusal, parse_chat, refusal_of
from gridprune_cli.serve.work import Worker

PING = 10.0  # seconds without an event after which a stream says that it is alive
_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class Chat:
    """The endpoint, an ASGI application: it holds what a request takes until the answer is out, or the client left."""

    def __init__(self, worker: Worker, pictures: Pictures, budget: Budget):
        self._worker, self._pictures, self._budget = worker, pictures, budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Refusal for what is not answered, as long as no response was begun."""
        with self._budget.share() as share:
            # 1. what can be refused before the body is read
            model = self._worker.check_ready().model
            self._worker.check_room()
            body = await read_body(Request(scope, receive), share)
            # 2. the request with its pictures, in a thread: JSON of many MiB, files and hosts that take their time
            chat, files = await asyncio.to_thread(self._read, body, share, model)
            del body
            # 3. its turn
            client = scope["client"][0] if scope.get("client") else ""
            job = Job(chat, files, tuple(map(_name, chat.pictures)), (client, chat.user))
            self._worker.submit(job)
            leaving = asyncio.create_task(_wait_for_leave(receive))
            leaving.add_done_callback(lambda _: job.events.put_nowait(Left()))
            try:
                if chat.stream:
                    await _stream(job, model, send)
                elif (outcome := await _outcome(job)) is not None:
                    await Json(completion_json(_ident(), int(time.time()), model, outcome))(scope, receive, send)
            finally:
                job.cancelled = True
                leaving.cancel()

    def _read(self, body: bytes, share: Share, model: str) -> tuple[ChatRequest, tuple[bytes, ...]]:
        """The request of a body, and the bytes of its pictures. Raises Refusal."""
        chat = parse_chat(body)
        if chat.model != model:
            reason = f"the model {chat.model[:200]!r} is not here; there is {model!r}"
            raise Refusal(404, reason, code="model_not_found", param="model")
        files = []
        for picture in chat.pictures:
            files.append(self._pictures.read(picture))
            share.take(len(files[-1]))
        return chat, tuple(files)


def _name(picture: PicturePart) -> str:
    """What the record calls a picture: its uuid, else its URL, but `-` for one that came as data."""
    data = picture.url is None or picture.url[:5].lower() == "data:"
    return picture.uuid or ("-" if data else str(picture.url))


def _ident() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


async def _wait_for_leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _outcome(job: Job) -> Outcome | None:
    """What became of a job; None where the client left. Raises Refusal for what failed."""
    while True:
        event = await job.events.get()
        if isinstance(event, Exception):
            raise refusal_of(event) from event
        if isinstance(event, Left):
            return None
        if isinstance(event, Outcome):
            return event


async def _stream(job: Job, model: str, send: Send) -> None:
    """Sends the events of a job as server-sent events, with a comment now and then where there is nothing to say.

    Raises Refusal for what fails before the first event, which then has its status. Later it is an event with an error.
    """
    chunks = Chunks(_ident(), int(time.time()), model, job.request.include_usage)

    async def write(*texts: str) -> None:
        await send({"type": "http.response.body", "body": "".join(texts).encode("ascii"), "more_body": True})

    event = await _next_event(job)
    if isinstance(event, Exception):
        raise refusal_of(event) from event
    headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await write(*_lines([chunks.first()]))
    while not isinstance(event, Left):
        if event is None:
            await write(": working\n\n")
        elif isinstance(event, str):
            await write(*_lines([chunks.text(event)]))
        elif isinstance(event, Outcome):
            await write(*_lines(chunks.last(event)), "data: [DONE]\n\n")
            break
        elif isinstance(event, Exception):
            await write(*_lines([refusal_of(event).to_json()]))
            break
        event = await _next_event(job)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _next_event(job: Job) -> Event | None:
    """The next event; None where there is none for a while."""
    try:
        return await asyncio.wait_for(job.events.get(), PING)
    except TimeoutError:
        return None


def _lines(values: Sequence[object]) -> list[str]:
    return [f"data: {json.dumps(value, allow_nan=False)}\n\n" for value in values]
