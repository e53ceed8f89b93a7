"""`gridprune serve` under load for as long as one likes: `python -m benchmarks.serving_load --minutes 30`.

Clients ask, plainly and streamed, about pictures that are new, in the cache, or no pictures; some leave before their
answer. A line a minute has the server's memory. In the end it is killed amid its work, and every entry of the cache is
checked. Exit code 1 where an answer was not that of a single run, an error not the expected one, memory grew by more
than 5 % after the first tenth, or an entry was lost or broken.
"""

import argparse
import base64
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from io import BytesIO
from pathlib import Path

from benchmarks.serving import ask, bodies, server
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene

NEW = 0.02  # share of questions about a picture that was not there before
BAD = 0.1  # share of requests that are refused
LEAVE = 0.1  # share of clients that leave
GROWTH = 1.05


class Client(threading.Thread):
    """Asks whatever comes into its mind until it is stopped. `faults` has what should not have been."""

    def __init__(self, number: int, port: int, asked: list[bytes], expected: list[str], stopped: threading.Event):
        super().__init__(daemon=True)
        self._random, self._port, self._asked, self._expected = random.Random(number), port, asked, expected
        self._stopped, self._number = stopped, number
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self) -> None:
        while not self._stopped.is_set():
            n = self._random.randrange(len(self._asked))
            body, chance = json.loads(self._asked[n]), self._random.random()
            try:
                if chance < BAD:
                    self._ask_badly(body)
                elif chance < BAD + LEAVE:
                    self._leave(json.dumps(body | {"stream": chance < BAD + LEAVE / 2}).encode())
                elif chance < BAD + LEAVE + NEW:
                    self._ask_new(body)
                else:
                    self._ask(body, self._expected[n], chance < 0.6)
            except (OSError, HTTPException) as fault:
                if not self._stopped.is_set():
                    self.faults.append(f"{type(fault).__name__}: {fault}")

    def _post(self, body: object) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=120)
        data = json.dumps(body).encode()
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def _ask(self, body: dict[str, object], expected: str, stream: bool) -> None:
        status, text = self._post(body | {"stream": stream})
        if status == 200 and stream:
            chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
            answer = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        elif status == 200:
            answer = json.loads(text)["choices"][0]["message"]["content"]
        else:
            answer = text
        self.counts["streamed" if stream else "answered"] += 1
        if answer != expected:
            self.faults.append(f"{answer!r} instead of {expected!r}")

    def _ask_new(self, body: dict[str, object]) -> None:
        file = BytesIO()
        draw(make_scene(HELDOUT + 10_000 * (1 + self._number) + self._random.randrange(10_000)))[0].save(file, "PNG")
        self._replace_picture(body, file.getvalue())
        status, text = self._post(body)
        self.counts["new pictures"] += 1
        if status != 200:
            self.faults.append(text)

    def _ask_badly(self, body: dict[str, object]) -> None:
        kind = self._random.randrange(3)
        if kind == 0:
            self._replace_picture(body, b"no picture")
        elif kind == 1:
            body["gridprune"] = {"keep": 7}
        else:
            body["tools"] = [{}]
        status, text = self._post(body)
        self.counts["refused"] += 1
        if status != 400:
            self.faults.append(f"status {status} instead of 400: {text}")

    @staticmethod
    def _replace_picture(body: dict[str, object], data: bytes) -> None:
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        body["messages"][0]["content"][1]["image_url"]["url"] = url  # type: ignore[index]

    def _leave(self, body: bytes) -> None:
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body)
            time.sleep(self._random.random() / 5)
        self.counts["left"] += 1


def memory_of(pid: int) -> float:
    """MiB that a process holds: Linux alone tells."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    asked, stopped, memory = bodies(80), threading.Event(), list[float]()
    with tempfile.TemporaryDirectory() as cache:
        with server(cache) as (process, port):
            expected = ask(port, asked, 1)[2]
            clients = [Client(n, port, asked, expected, stopped) for n in range(options.clients)]
            for client in clients:
                client.start()
            start = time.monotonic()
            for second in range(1, int(60 * options.minutes) + 1):
                time.sleep(max(0.0, start + second - time.monotonic()))
                if process.poll() is not None:
                    sys.exit(f"the server ended with {process.returncode}")
                memory.append(memory_of(process.pid))
                if second % 60 == 0:
                    counts = sum((client.counts for client in clients), Counter[str]())
                    print(f"{second // 60} min: {memory[-1]:.0f} MiB, {dict(counts)}", flush=True)
            entries = count_entries(cache)
            stopped.set()  # before the kill, whose failures are no faults
            process.kill()
        for client in clients:
            client.join()
        verified = subprocess.run(
            [sys.executable, "-m", "gridprune_cli", "cache", "verify", "--cache-dir", cache],
            capture_output=True,
            text=True,
        )
        lost = entries - count_entries(cache)
    faults = [fault for client in clients for fault in client.faults]
    tenth = len(memory) // 10
    growth = max(memory[-tenth:]) / max(memory[: 2 * tenth])
    print(f"faults: {len(faults)} {faults[:3]}")
    print(f"memory at the end against the first fifth: {growth:.3f} times")
    print(f"killed: {lost} entries lost; {verified.stderr.strip()}")
    if faults or growth > GROWTH or lost > 0 or verified.returncode:
        sys.exit(1)


def count_entries(cache: str) -> int:
    return sum(1 for _ in Path(cache).rglob("*.safetensors"))


if __name__ == "__main__":
    main()
