"""A server of ours on a free port of the loopback, in a thread of this process."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from starlette.types import ASGIApp

from gridprune_cli.serve import http

SAMPLES = Path(__file__).parent.parent / "sample_images"


@contextmanager
def serving(app: ASGIApp) -> Iterator[int]:
    """Serves an application, and yields its port. uvicorn's own server minds no signals outside of the main thread."""
    listener = http.listen("127.0.0.1", 0)
    server = uvicorn.Server(http.configure(app))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((SAMPLES / name).read_bytes()).decode()


def chat_body(question: str, *images: str, **values: Any) -> dict[str, Any]:
    """A body of a question about sample images."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(name)}} for name in images]
    content = [*parts, {"type": "text", "text": question}]
    return {"model": "scenes", "messages": [{"role": "user", "content": content}]} | values


def ask(port: int, body: Any, **headers: str) -> httpx2.Response:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    headers |= {"Content-Type": "application/json"}
    return httpx2.post(url, content=json.dumps(body), headers=headers, timeout=60)  # `json=` would refuse surrogates


def send_raw(port: int, data: bytes, seconds: float = 60) -> bytes:
    """Sends bytes, and gives all that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        with suppress(ConnectionResetError):  # where it closed on what it had not read
            while piece := connection.recv(1 << 16):
                received += piece
    return received
