"""`/v1/chat/completions`: a request's way through the server, answered as JSON or as a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gridprune_cli.serve.fetching import SECONDS
from gridprune_cli.serve.gate import Json
from gridprune_cli.serve.jobs import Event, Job, Left, Turn
from gridprune_cli.serve.pictures import Pictures, is_remote
from gridprune_cli.serve.replies import Chunks, Outcome, completion_json
from gridprune_cli.serve.uploads import Budget, Share, read_body
from gridprune_cli.serve.wire import PicturePart, Refusal, parse_chat, refusal_of
from gridprune_cli.serve.work import Worker

PING = 10.0  # seconds without an event after which a stream says that it is alive
MAX_FETCHING = 16  # requests whose pictures are fetched at once; others wait for these
_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class Chat:
    """The endpoint, an ASGI application: it holds what a request takes until the answer is out, or the client left."""

    def __init__(self, worker: Worker, pictures: Pictures, budget: Budget):
        self._worker, self._pictures, self._budget = worker, pictures, budget
        self._fetchers = ThreadPoolExecutor(MAX_FETCHING, "gridprune-fetch")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Refusal for what is not answered, as long as no response was begun."""
        with self._budget.share() as share:
            # 1. what can be refused before the body is read
            model = self._worker.check_ready().model
            self._worker.check_room()
            body = await read_body(Request(scope, receive), share)
            # 2. the request, in a thread: it may be JSON of many MiB
            chat = await asyncio.to_thread(parse_chat, body)
            del body
            if chat.model != model:
                reason = f"the model {chat.model[:200]!r} is not here; there is {model!r}"
                raise Refusal(404, reason, code="model_not_found", param="model")
            leaving = asyncio.create_task(wait_for_leave(receive))
            try:
                # 3. its pictures, in a thread; hosts take their time, and have threads that nothing else waits for
                pool = self._fetchers if any(is_remote(picture.url or "") for picture in chat.pictures) else None
                loop = asyncio.get_running_loop()
                files = await loop.run_in_executor(pool, self._read, chat.pictures, share, leaving)
                # 4. its turn
                if not leaving.done():
                    client = scope["client"][0] if scope.get("client") else ""
                    job = Job(chat, files, tuple(map(_name, chat.pictures)), client=(client, chat.user))
                    await self._answer(job, model, leaving, scope, receive, send)
            finally:
                leaving.cancel()

    async def _answer(
        self, job: Job, model: str, leaving: asyncio.Task[None], scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._worker.submit(job)
        leaving.add_done_callback(lambda _: job.events.put_nowait(Left()))
        try:
            if job.request.stream:
                await _stream(job, model, send)
            elif (outcome := await _outcome(job)) is not None:
                await Json(completion_json(_ident(), int(time.time()), model, outcome))(scope, receive, send)
        finally:
            self._worker.withdraw(job)

    def _read(self, pictures: Sequence[PicturePart], share: Share, leaving: asyncio.Task[None]) -> tuple[bytes, ...]:
        """The bytes of pictures, or of some of them where nobody waits for them any more. Raises Refusal."""
        end = time.monotonic() + SECONDS
        files: list[bytes] = []
        for picture in pictures:
            self._worker.check_ready()  # else the server stops, and does not wait for the others
            if leaving.done():
                break
            files.append(self._pictures.read(picture, end))
            share.take(len(files[-1]))
        return tuple(files)


def _name(picture: PicturePart) -> str:
    """What the record calls a picture: its uuid, else its URL, but `-` for one that came as data."""
    data = picture.url is None or picture.url[:5].lower() == "data:"
    return picture.uuid or ("-" if data else str(picture.url))


def _ident() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


async def wait_for_leave(receive: Receive) -> None:
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

    event = await next_event(job)
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
        event = await next_event(job)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def next_event(job: Turn) -> Event | None:
    """The next event; None where there is none for a while."""
    try:
        return await asyncio.wait_for(job.events.get(), PING)
    except TimeoutError:
        return None


def _lines(values: Sequence[object]) -> list[str]:
    return [f"data: {json.dumps(value, allow_nan=False)}\n\n" for value in values]
