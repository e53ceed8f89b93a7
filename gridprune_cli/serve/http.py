"""Connections: how many, how long they may take, and how the server ends. uvicorn does the rest."""

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gridprune_cli.errors import BadInput
from gridprune_cli.serve.gate import error_response
from gridprune_cli.serve.wire import Refusal
from gridprune_cli.serve.work import Worker

MAX_CONNECTIONS = 256  # more are answered with 503; twice as many are not taken
WRITE_SECONDS = 30.0  # for which a client may read nothing of what was written for it
LOOKS = 10  # within these
HEAD_SECONDS = 15.0  # within which the head of a request must be there
_log = logging.getLogger(__name__)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    fault = Refusal(503, "too many connections", code="too_many_connections", retry_after=1)
    response = error_response(fault)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


class Protocol(H11Protocol):
    """HTTP/1.1 whose connections are bounded in number, and in the time that a client may take to ask and to read."""

    _timer: asyncio.TimerHandle | None = None  # until a head is there
    _watch: asyncio.TimerHandle  # until the connection is lost
    _unread = _stalls = 0  # bytes, and how many looks in a row have found no fewer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * MAX_CONNECTIONS:
            transport.abort()
        elif len(self.connections) > MAX_CONNECTIONS:
            self.app = _refuse
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._watch.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:  # a head is there, whose answer is not
            self._stop_timer()

    def on_response_complete(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)  # for the next one
        super().on_response_complete()

    def _look(self) -> None:
        """Ends the connection where nothing was read for WRITE_SECONDS; else looks again in a while.

        It looks at the buffer itself: asyncio tells when it is full and when it is nearly empty, but neither of a slow
        reader between these, nor of a little that is never read, for which a transport that is closed waits for ever.
        """
        unread = self.transport.get_write_buffer_size()
        self._stalls = self._stalls + 1 if unread >= self._unread > 0 else 0
        self._unread = unread
        if self._stalls == LOOKS:
            self.transport.abort()
        self._watch = self.loop.call_later(WRITE_SECONDS / LOOKS, self._look)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state is not h11.IDLE:  # a response is on its way
            self.transport.close()
            return
        fault = Refusal(400, "no HTTP request", code="invalid_http")
        body = json.dumps(fault.to_json()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's server, which ends as a command does: the first signal lets it finish, a second one does not.

    It also ends where the worker can't open its model.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self._worker = worker

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self.handle_exit)}
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a script ignores it for what it has in background
            before[signal.SIGINT] = signal.signal(signal.SIGINT, self.handle_exit)
        if hasattr(signal, "SIGPIPE"):  # which ends other commands: here a client has left, and no more
            before[signal.SIGPIPE] = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            name = listener.getsockname()
            if isinstance(name, str):
                _log.info("listening on unix:%s", name)
                continue
            host, port = name[:2]
            _log.info("listening on http://%s:%d/v1", f"[{host}]" if ":" in host else host, port)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._worker.fault is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()  # what waits is refused, so that only the batch that is being answered is waited for
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free. Raises BadInput, with the setting, where that can't be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as fault:
        reason = "no host of this machine; name an address, such as 127.0.0.1"
        raise BadInput(reason, field="host", value=host) from fault
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(MAX_CONNECTIONS)
    except OSError as fault:
        listener.close()
        reason = f"can't be listened to on {host} ({fault.strerror}); name another one"
        raise BadInput(reason, field="port", value=port) from fault
    return listener


def run(app: ASGIApp, worker: Worker, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, finishes what is being answered, and returns. Raises why the worker failed."""
    _Server(configure(app), worker).run([listener])
    if worker.fault is not None:
        raise worker.fault


def configure(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves an application: in this process, over `Protocol`, without a word of its own."""
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        log_level="critical",  # what goes wrong in a request, the gate reports
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(HEAD_SECONDS),
    )
