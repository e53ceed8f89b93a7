"""Questions a second and latency of `gridprune serve`, 1 client against 8 at once: `python -m benchmarks.serving`.

The server is a process of its own on a free port of the loopback. Each client asks, waits for the answer, and asks the
next; rounds of one client and of all take turns, and every answer is compared with that of the same question asked
alone. Pictures are in the cache, and sent again with each question, as clients do.
"""

import argparse
import base64
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from io import BytesIO

from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene

PER_IMAGE = 4


def bodies(count: int) -> list[bytes]:
    """Bodies of `count` different questions about held-out scenes."""
    result: list[bytes] = []
    for seed in range(HELDOUT, HELDOUT + -(-count // PER_IMAGE)):
        scene, file = make_scene(seed), BytesIO()
        draw(scene)[0].save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        for question in questions(scene, PER_IMAGE, random.Random(f"serving-{seed}")):
            content = [{"type": "text", "text": question.text}, {"type": "image_url", "image_url": {"url": url}}]
            result.append(json.dumps({"model": "scenes", "messages": [{"role": "user", "content": content}]}).encode())
    return result[:count]


class Client(threading.Thread):
    """Asks its questions one after the other, on one connection: `answers` and `seconds` of each."""

    def __init__(self, port: int, asked: Sequence[bytes]):
        super().__init__()
        self._port, self._asked = port, asked
        self.answers: list[str] = []
        self.seconds: list[float] = []

    def run(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=120)
        for body in self._asked:
            start = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            self.seconds.append(time.perf_counter() - start)
            text = json.loads(data)["choices"][0]["message"]["content"] if response.status == 200 else ""
            self.answers.append(text if response.status == 200 else f"status {response.status}")
        connection.close()


def ask(port: int, asked: Sequence[bytes], clients: int) -> tuple[float, list[float], list[str]]:
    """Seconds that all took, seconds of each question, and the answers in turn."""
    threads = [Client(port, asked[n::clients]) for n in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - start
    answers = [threads[n % clients].answers[n // clients] for n in range(len(asked))]
    return taken, [seconds for thread in threads for seconds in thread.seconds], answers


@contextmanager
def server(cache: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of the embedded model that is ready, as a process, and its port."""
    command = [sys.executable, "-m", "gridprune_cli", "serve", "--port", "0", "--cache-dir", cache, "--model", "scenes"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        port = int(process.stderr.readline().rstrip("\n").removesuffix("/v1").rpartition(":")[2])
        threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True).start()
        while not is_ready(port):
            time.sleep(0.2)
        yield process, port
    finally:
        process.kill()
        process.wait()


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=80, help="of each round")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    asked = bodies(options.questions)
    with tempfile.TemporaryDirectory() as cache, server(cache) as (process, port):
        expected = ask(port, asked, 1)[2]  # fills the cache
        ask(port, asked, options.clients)
        rounds: dict[int, list[tuple[float, list[float], list[str]]]] = {1: [], options.clients: []}
        for _ in range(options.rounds):
            for clients, results in rounds.items():
                results.append(ask(port, asked, clients))
        process.terminate()
        code = process.wait()
    rates = {}
    for clients, results in rounds.items():
        seconds = [value for _, values, _ in results for value in values]
        rates[clients] = [len(asked) / taken for taken, _, _ in results]
        p50, p95 = quantile(seconds, 0.5), quantile(seconds, 0.95)
        print(
            f"{clients} client{'s' * (clients > 1)}: median {statistics.median(rates[clients]):6.1f} questions/s, "
            f"p50 {1e3 * p50:.0f} ms, p95 {1e3 * p95:.0f} ms ({p95 / p50:.2f} times)"
        )
    ratios = [many / one for one, many in zip(*rates.values(), strict=True)]
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    pairs = [pair for results in rounds.values() for _, _, got in results for pair in zip(got, expected, strict=True)]
    different = sum(answer != other for answer, other in pairs)
    print(f"answers other than those of one client: {different} of {len(pairs)}; the server ended with {code}")
    if different or code:
        sys.exit(1)


def is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/health")
    return connection.getresponse().status == 200


if __name__ == "__main__":
    main()
