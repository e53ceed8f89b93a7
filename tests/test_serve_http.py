"""Connections that are slow, too many, or no HTTP: each gets its answer or its end, and the server lives on."""

import json
import resource
import signal
import socket
import time

import httpx2
import pytest
from served import send_raw, serving, wait_until
from starlette.responses import Response

from gridprune_cli.errors import BadInput
from gridprune_cli.serve import http
from gridprune_cli.serve.http import listen


@pytest.fixture
def port():
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            for answer in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
                await receive()
                await send({"type": answer})
        else:
            size = int(scope["path"][1:] or 0)
            await Response("x" * size if size else "here")(scope, receive, send)

    with serving(app) as number:
        yield number


def lives(port: int) -> bool:
    return httpx2.get(f"http://127.0.0.1:{port}/").text == "here"


def test_what_is_no_http_is_told(port):
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n"):
        answer = send_raw(port, data)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["code"] == "invalid_http"
    send_raw(port, b"x" * 200_000)
    assert lives(port)


def test_half_a_head_is_not_waited_for(port, monkeypatch):
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.3)
    for data in (b"", b"GET / HTTP/1.1\r\nHost: 127.0.0", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HT"):
        answer = send_raw(port, data, seconds=12)  # which would raise if the connection stayed
        assert answer.count(b"here") == data.count(b"\r\n\r\n")
    assert lives(port)


def test_the_rest_of_a_body_is_not_waited_for_once_it_was_answered(port, monkeypatch):
    monkeypatch.setattr(http, "HEAD_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", port), timeout=12) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n")
        received = connection.recv(1 << 16)
        for byte in (b"a", b"b"):
            connection.sendall(byte)
        while piece := connection.recv(1 << 16):  # which would raise if the connection stayed
            received += piece
    assert received.endswith(b"here")


@pytest.fixture
def small_buffers(monkeypatch):
    """The system takes a few KiB of what is written for a client, and no more: the rest waits in the server."""

    def listen(host: str, port: int) -> socket.socket:
        listener = http_listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # as those have that it takes
        return listener

    http_listen = http.listen
    monkeypatch.setattr(http, "listen", listen)


def connect(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    return connection


@pytest.mark.parametrize("size", [40_000, 1 << 24])  # 64 KiB are those from which asyncio calls a buffer full
def test_who_does_not_read_is_dropped(small_buffers, port, monkeypatch, size):
    monkeypatch.setattr(http, "WRITE_SECONDS", 0.3)
    lost, connection_lost = [], http.Protocol.connection_lost
    monkeypatch.setattr(http.Protocol, "connection_lost", lambda *args: (lost.append(1), connection_lost(*args)))
    with connect(port) as connection:
        connection.sendall(f"GET /{size} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: lost, 15)
    assert lives(port)


def test_who_reads_slowly_gets_everything(small_buffers, port, monkeypatch):
    monkeypatch.setattr(http, "WRITE_SECONDS", 1.0)
    received = 0
    with connect(port) as connection:
        connection.sendall(b"GET /150000 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        while piece := connection.recv(4000):
            received += len(piece)
            time.sleep(0.05)
    assert received > 150_000


def test_an_interrupt_that_a_script_ignores_stays_ignored():
    server = http._Server(http.configure(lambda *_: None), None)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with server.capture_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == server.handle_exit
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thousand_connections(port, monkeypatch):
    """Those that are too many are refused or dropped; who has one is answered; when they leave, all is as before."""
    monkeypatch.setattr(http, "HEAD_SECONDS", 300.0)  # a busy machine needs long for so many
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    connections, answers = [], []
    try:
        for _ in range(1000):
            connections.append(socket.create_connection(("127.0.0.1", port), timeout=60))
        for connection in connections:
            answers.append(exchange(connection))
    finally:
        for connection in connections:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    assert answers.count("200 here") == http.MAX_CONNECTIONS
    assert answers.count("503 too_many_connections") == http.MAX_CONNECTIONS
    assert answers.count("") == 1000 - 2 * http.MAX_CONNECTIONS

    def is_free() -> bool:
        return httpx2.get(f"http://127.0.0.1:{port}/").status_code == 200

    wait_until(is_free)
    assert lives(port)


def exchange(connection: socket.socket) -> str:
    """Status and what is said, on a connection that stays open; nothing where it was dropped."""
    try:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
        while head and not body:
            body = connection.recv(1 << 16)
    except ConnectionError:
        return ""
    if not head:
        return ""
    status = head.split()[1].decode()
    return f"{status} {body.decode()}" if status == "200" else f"{status} {json.loads(body)['error']['code']}"


def test_where_it_can_not_listen():
    with listen("127.0.0.1", 0) as listener, pytest.raises(BadInput, match="name another one") as fault:
        listen("127.0.0.1", listener.getsockname()[1])
    assert fault.value.field == "port"
    with pytest.raises(BadInput) as fault:
        listen("no such host", 0)
    assert fault.value.field == "host"
