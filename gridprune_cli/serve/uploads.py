"""Bodies of requests, read within bounds of size, time and memory."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from gridprune_cli.serve.wire import Refusal

UPLOAD_SECONDS = 60.0  # within which a body must be there
DISCARD_SECONDS = 5.0  # for which what is refused is still read, so that its sender gets to read the refusal
RETRY_AFTER = 5  # seconds


class Budget:
    """Bytes of bodies, pictures and results that all requests together may hold.

    most   of all requests
    upload of one body
    """

    def __init__(self, most: int, upload: int):
        self.most, self.upload, self.held = most, upload, 0
        self._lock = Lock()

    @contextmanager
    def share(self) -> Iterator["Share"]:
        """The share of one request, given back at the end."""
        share = Share(self)
        try:
            yield share
        finally:
            self.change(-share.size)

    def change(self, size: int, bounded: bool = True) -> None:
        """Takes bytes, or gives them back. Raises Refusal with 429 where they are not there, if `bounded`."""
        with self._lock:
            if bounded and size > 0 and self.held + size > self.most:
                raise Refusal(429, "too much is being worked on", code="memory", retry_after=RETRY_AFTER)
            self.held += size


class Share:
    """What one request holds of a budget."""

    def __init__(self, budget: Budget):
        self.budget, self.size = budget, 0

    def take(self, size: int) -> None:
        """Raises Refusal with 429 where that is too much."""
        self.budget.change(size)
        self.size += size

    def count(self, size: int) -> None:
        """Counts what is held already: it is not refused, but what others want to hold beside it is."""
        self.budget.change(size, bounded=False)
        self.size += size


async def read_body(request: Request, share: Share) -> bytes:
    """The body of a request. Raises Refusal: 413 where it is too large, 429 where all together are, 408 where it takes
    too long, 415 where it is no JSON by its type, and 400 where it ends too early."""
    most = share.budget.upload
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a browser sends for a page of another site without asking is none
        raise Refusal(415, "the content type must be application/json", code="invalid_content_type")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    raise _too_large(most)
                share.take(len(piece))
                pieces.append(piece)
    except TimeoutError as fault:
        raise Refusal(408, f"the body was not there after {UPLOAD_SECONDS:g} s", code="timeout") from fault
    except ClientDisconnect as fault:
        raise Refusal(400, "the body ended too early", code="incomplete_body") from fault
    return b"".join(pieces)


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body has more than {most} bytes", code="body_too_large")


async def discard(receive: Receive) -> None:
    """Reads the rest of a body, for a while: a connection that is closed on unread bytes takes the answer along."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while (await receive()).get("more_body", False):
                pass
