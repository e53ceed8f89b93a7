"""`gridprune serve` as a process: how it starts, what it refuses to start with, how it ends."""

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import httpx2
import openai
import pytest
from served import SAMPLES, ask, chat_body, wait_until

QUESTION = "Which object has the T?"


@pytest.fixture
def start(server, tmp_path):
    """Starts the server on a free port: (process, port), once it is up, or (process, 0) where it has ended before."""
    processes = []

    def start(*arguments: object):
        path = tmp_path / "stderr"
        with open(path, "wb") as err, open(os.devnull) as null:
            process = server.start("serve", "--port", 0, *arguments, streams=(null.fileno(), 1, err.fileno()))
        processes.append(process)
        wait_until(lambda: path.read_text().count("\n") or process.poll() is not None)
        line = path.read_text().splitlines()[0]
        port = int(line.removesuffix("/v1").rpartition(":")[2]) if line.startswith("listening on ") else 0
        return process, port

    yield start
    for process in processes:
        process.kill()


def is_ready(port: int) -> bool:
    reply = httpx2.get(f"http://127.0.0.1:{port}/health")
    assert reply.status_code == 200 or reply.json()["error"]["code"] == "loading"
    return reply.status_code == 200


def test_the_answers_of_ask_and_an_end_in_order(start, command):
    process, port = start("--api-key", "s3cret", "--keep", "0.2")
    wait_until(lambda: is_ready(port))
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="s3cret", max_retries=0)
    code, printed, _ = command("ask", SAMPLES / "scene-1.png", QUESTION, "--keep", "0.2", "--json")
    assert code == 0
    body = chat_body(QUESTION, "scene-1.png")
    completion = client.chat.completions.create(**body)
    expected = json.loads(printed)
    assert completion.choices[0].message.content == expected["answer"] == "red star"
    for name in ("tokens", "region", "zones", "key", "model", "question", "keep"):
        assert completion.gridprune[name] == expected[name]
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**body, stream=True)]
    assert "".join(pieces) == expected["answer"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="other", max_retries=0).models.list()
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():  # a client that left while it is written to must not end the server, as it would other commands
        ignored = int(re.search(r"SigIgn:\s*([0-9a-f]+)", status.read_text())[1], 16)
        assert ignored & 1 << (signal.SIGPIPE - 1)
    # what runs is finished, what waits is refused, and who comes later finds nobody
    replies: list[tuple[int, str]] = []

    def ask_on() -> None:
        while True:
            try:
                reply = ask(port, body, Authorization="Bearer s3cret")
            except httpx2.TransportError:
                return
            answer = reply.json()
            replies.append(
                (reply.status_code, answer["choices"][0]["message"]["content"] if "choices" in answer else "")
            )

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(replies) >= 8)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    for thread in threads:
        thread.join()
    assert {reply for reply in replies if reply[0] == 200} == {(200, "red star")}
    assert {status for status, _ in replies} <= {200, 503}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_while_the_model_is_loaded(start, number):
    process, port = start()
    assert port
    process.send_signal(number)
    assert process.wait(60) == 0


def test_a_model_that_can_not_be_used_ends_it(start, tmp_path):
    process, _ = start("--model", tmp_path / "none")
    assert process.wait(60) == 2
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert lines[-1].startswith("gridprune: --model ") and len(lines) == 2


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0: others can reach it; give an --api-key"),
        (("--host", "example.invalid"), "--host example.invalid: others"),
        (("--api-key", ""), "--api-key: must be"),
        (("--allow-folder", "/no/such/folder"), "--allow-folder /no/such/folder: no such folder"),
        (("--allow-host", "http://a"), "--allow-host http://a: not HOST"),
        (("--max-upload", "much"), "--max-upload: 'much' is no size"),
        (("--max-upload", "2G"), "--max-upload 2G: must be above 0, and at most --max-held"),
        (("--method", "nearest"), "nearest"),
    ],
)
def test_what_it_does_not_start_with(command, arguments, reason):
    code, out, err = command("serve", "--port", 0, *arguments)
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


def test_a_missing_extra_is_told_in_a_line(command, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else find(name, *a))
    code, _, err = command("serve")
    assert (code, err) == (2, "gridprune: serve: uvicorn missing; pip install 'gridprune[serve]'\n")


def test_nothing_but_the_worker_imports_torch():
    import subprocess

    script = """
import sys
import gridprune_cli.cli.app, gridprune_cli.serve.app, gridprune_cli.serve.http
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
