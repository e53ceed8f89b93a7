"""A headless Chromium, driven by its DevTools protocol over a pair of pipes, which takes nothing but the browser."""

import base64
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--remote-debugging-pipe"),
)


class Browser:
    """A browser with one page.

    events   what the protocol reported of the page, in turn: console, exceptions, requests, the log
    """

    def __init__(self, folder: Path):
        """`folder`: for the profile, an empty one."""
        assert CHROMIUM
        there, self._commands = _high(os.pipe())
        self._replies, back = _high(os.pipe())
        null = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, there, 3), (os.POSIX_SPAWN_DUP2, back, 4)]
        actions += [(os.POSIX_SPAWN_DUP2, null, stream) for stream in (1, 2)]
        arguments = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._pid = os.posix_spawn(CHROMIUM, arguments, os.environ, file_actions=actions, setpgroup=0)
        for number in (there, back, null):
            os.close(number)
        self._ids, self._buffer, self._session = itertools.count(1), b"", None
        self.events: list[dict[str, Any]] = []
        (target,) = (t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._commands)
        os.close(self._replies)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        ident = next(self._ids)
        message = {"id": ident, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        end = time.monotonic() + 60
        while True:
            reply = self._next(end - time.monotonic())
            assert reply is not None, f"no reply to {method}"
            if reply.get("id") == ident:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """The next message, which is put down if it is an event; None where there is none in time."""
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._replies], [], [], max(0, end - time.monotonic()))[0]:
                return None
            data = os.read(self._replies, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "id" not in message:
            self.events.append(message)
        return message

    def of(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of a kind so far."""
        while self._next(0):
            pass
        return [event["params"] for event in self.events if event["method"] == method]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait(self, condition: str | Callable[[], Any], seconds: float = 60) -> None:
        """Waits until an expression, or a function of ours, is true."""
        end = time.monotonic() + seconds
        while not (self.evaluate(condition) if isinstance(condition, str) else condition()):
            assert time.monotonic() < end, f"waited in vain for {condition}"
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def choose(self, path: Path) -> None:
        """Chooses a file in the page's file field."""
        node = self.evaluate_node("#file")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=node)

    def evaluate_node(self, selector: str) -> str:
        expression = f"document.querySelector({json.dumps(selector)})"
        return self.call("Runtime.evaluate", expression=expression)["result"]["objectId"]

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key of the keyboard, by its DOM name and its Windows code."""
        for kind in ("keyDown", "keyUp"):
            values = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **values, **({"text": text} if text else {}))

    def resize(self, width: int, height: int, *, dark: bool = False, scale: float = 1, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


def _high(pair: tuple[int, int]) -> tuple[int, int]:
    """Two descriptors as ones above those that the browser has its pipes at."""
    import fcntl

    moved = tuple(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 10) for number in pair)
    for number in pair:
        os.close(number)
    return moved  # type: ignore[return-value]
