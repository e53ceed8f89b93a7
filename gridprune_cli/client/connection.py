"""Requests to a server, over TCP or a Unix socket, whose answers are lines of JSON."""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from gridprune_cli.client.protocol import ServerFault, error_from_json, is_private, socket_path
from gridprune_cli.errors import BadInput

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 60.0  # without a byte; a server that works says so every 10 seconds
BUSY_SECONDS = 600.0  # for which a request is sent again to a server where too many wait
RETRY_SECONDS = 30.0  # at most between two times

_LOCAL = "take `no_server` to work without one"


@dataclass(frozen=True)
class Address:
    """Where a server listens: a Unix socket, or a host and port; and how it was named."""

    name: str
    socket: Path | None = None
    host: str = "localhost"
    port: int | None = None
    tls: bool = False


def parse_address(url: str) -> Address:
    """An address from http://HOST:PORT, which may end in /v1, or unix:PATH. Raises BadInput for any other."""
    if url.startswith("unix:") and len(url) > len("unix:"):
        return Address(url, Path(url.removeprefix("unix:")))
    wrong = BadInput("not http://HOST:PORT, https://HOST or unix:PATH", field="server", value=url)
    try:
        parsed = urlsplit(url)
        host, port = parsed.hostname, parsed.port
    except ValueError as fault:
        raise wrong from fault
    extra = parsed.username is not None or parsed.query or parsed.fragment
    if extra or not host or parsed.scheme not in ("http", "https") or parsed.path.rstrip("/") not in ("", "/v1"):
        raise wrong
    return Address(url, host=host, port=port, tls=parsed.scheme == "https")


def http_connection(address: Address) -> http.client.HTTPConnection:
    """A connection to a host and port, not yet opened."""
    kind = http.client.HTTPSConnection if address.tls else http.client.HTTPConnection
    return kind(address.host, address.port, timeout=CONNECT_SECONDS)


def request_headers(key: str | None) -> dict[str, str]:
    """Headers of a request with a body of JSON; `key` is what the server asks for as the API key."""
    headers = {"Content-Type": "application/json", "Connection": "close"}
    return headers if key is None else headers | {"Authorization": f"Bearer {key}"}


def find_socket() -> Address | None:
    """The socket of this user's server, where there is one in a folder that is this user's alone."""
    path = socket_path()
    with suppress(OSError):
        if is_private(path.parent) and path.is_socket():
            return Address(f"unix:{path}", path)
    return None


class Connection:
    """A server that is asked. Several threads may, each over a connection of its own.

    key  what the server asks for as the API key
    """

    def __init__(self, address: Address, key: str | None = None):
        self.address, self._key = address, key
        self._open: set[socket.socket] = set()
        self._lock, self._closed = Lock(), Event()

    def close(self) -> None:
        """Ends all requests that are on their way, and with them the server's work on them."""
        self._closed.set()
        with self._lock:
            for open_socket in self._open:
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it

    def post(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Sends an object, and gives those of the answer as they come. The last has `result`.

        Raises the library's error where the answer has one, and ServerFault where there is no whole answer. While the
        server has too much to do, the request waits and is sent again.
        """
        data = json.dumps(body, allow_nan=False).encode("ascii")
        end = monotonic() + BUSY_SECONDS
        while True:
            connection = self._connect()
            open_socket = connection.sock  # which the connection forgets once a response is there
            try:
                with self._send(connection, path, data) as response:
                    if response.status == 200:
                        yield from self._lines(response)
                        return
                    fault = self._fault(response)
                    text = response.headers.get("Retry-After", "")
                    wait = min(float(text), RETRY_SECONDS) if text.isdecimal() else 1.0
            except (OSError, http.client.HTTPException) as error:
                reason = f"ended the connection before it had answered ({_reason(error)}); see its log, or {_LOCAL}"
                raise self._error(reason) from error
            finally:
                with self._lock:
                    self._open.discard(open_socket)
                connection.close()
            if fault.status != 429 or monotonic() + wait > end or self._closed.wait(wait):
                raise fault

    def _connect(self) -> http.client.HTTPConnection:
        address = self.address
        if address.socket is not None:
            connection: http.client.HTTPConnection = _UnixConnection(address.socket)
        else:
            connection = http_connection(address)
        try:
            if address.socket is None and not address.tls and address.host.isascii():
                # as bytes: else the codec for names of other scripts is loaded, for some 5 ms
                target = address.host.encode(), connection.port
                connection.sock = socket.create_connection(target, CONNECT_SECONDS)  # type: ignore[arg-type]
            else:
                connection.connect()
        except OSError as error:
            reason = f"can't be reached ({_reason(error)}); start it with `gridprune serve`, or {_LOCAL}"
            gone = isinstance(error, ConnectionRefusedError | FileNotFoundError)
            raise self._error(reason, gone=gone) from error
        connection.sock.settimeout(SILENCE_SECONDS)
        with self._lock:
            if self._closed.is_set():
                connection.close()
                raise self._error("interrupted")
            self._open.add(connection.sock)
        return connection

    def _send(self, connection: http.client.HTTPConnection, path: str, data: bytes) -> http.client.HTTPResponse:
        connection.request("POST", path, data, request_headers(self._key))
        return connection.getresponse()

    def _lines(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The objects of an answer, up to the one with the result. Empty lines say that the server is at work."""
        while line := response.readline():
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if "error" in value:
                    raise error_from_json(value["error"])
            except (ValueError, KeyError, TypeError) as error:
                raise self._error(f"answered in a way that this version does not know; {_LOCAL}") from error
            yield value
            if "result" in value:
                return
        raise http.client.IncompleteRead(b"")

    def _fault(self, response: http.client.HTTPResponse) -> ServerFault:
        """What a response that is none of success says."""
        status = response.status
        try:
            error = json.loads(response.read())["error"]
            message, code = str(error["message"]), error.get("code")
        except (ValueError, KeyError, TypeError):
            message, code = f"answered with status {status}", None
        if status == 401:
            return self._error(f"{message}; give its `api_key`", status=status, code=code)
        if status == 404 and code != "model_not_found":
            message = "no gridprune server that this version can ask"
        hint = {413: "; raise its --max-upload", 503: f"; try again soon, or {_LOCAL}", 404: f"; {_LOCAL}"}
        return self._error(message + hint.get(status, ""), status=status, code=code)

    def _error(self, reason: str, **about: Any) -> ServerFault:
        return ServerFault(reason, place=self.address.name, **about)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path):
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it gave no sign for too long"
    text = error.strerror if isinstance(error, OSError) else None
    return text or ("it broke off" if isinstance(error, http.client.HTTPException) else str(error))
