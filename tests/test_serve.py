"""The server with the embedded model: its answers, and what comes of bad input, of clients that leave, and of load."""

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
from served import SAMPLES, ask, chat_body, data_url, send_raw, serving, wait_until

from gridprune_cli.cache.store import open_store
from gridprune_cli.client.protocol import COMMAND
from gridprune_cli.errors import BadInput
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.questions import Exchange
from gridprune_cli.runners.local import Runner
from gridprune_cli.serve import answering, app, chat, commands, uploads
from gridprune_cli.serve.app import create_app
from gridprune_cli.serve.commands import command_routes
from gridprune_cli.serve.fetching import Hosts
from gridprune_cli.serve.gate import Access
from gridprune_cli.serve.metrics import Metrics
from gridprune_cli.serve.pictures import Pictures
from gridprune_cli.serve.uploads import Budget
from gridprune_cli.serve.wire import Refusal
from gridprune_cli.serve.work import Worker
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import PrunedSet

QUESTION = "Which object has the T?"
ASKED = [json.loads(line) for line in (SAMPLES / "questions.jsonl").read_text().splitlines()][:10]


class Served:
    """A running server, with its parts."""

    def __init__(self, port: int, worker: Worker, budget: Budget, metrics: Metrics, pictures: Pictures):
        self.port, self.worker, self.budget, self.metrics, self.pictures = port, worker, budget, metrics, pictures

    def ask(self, question: str = QUESTION, *images: str, **values: Any) -> httpx2.Response:
        return ask(self.port, chat_body(question, *(images or ["scene-1.png"]), **values))

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return httpx2.get(f"http://127.0.0.1:{self.port}{path}", headers=headers)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Pipeline:
    return Pipeline("scenes", store=open_store(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def served(pipeline) -> Iterator[Served]:
    metrics, budget = Metrics(), Budget(8 << 20, 2 << 20)
    worker = Worker(lambda: pipeline, metrics, defaults={"keep": 0.11})
    pictures = Pictures([SAMPLES], Hosts([]), 2 << 20)
    routes = command_routes(worker, budget, {}, pictures.sent)
    with serving(create_app(worker, pictures, Access(), budget, metrics, routes)) as port:
        wait_until(lambda: worker.pipeline)
        yield Served(port, worker, budget, metrics, pictures)


@pytest.fixture(scope="module")
def expected(pipeline) -> list[str]:
    """What `ask` answers."""
    return [pipeline.ask(SAMPLES / line["image"], line["question"]).text for line in ASKED]


@pytest.fixture
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="any", max_retries=0)


class HeldBack:
    """Answers stop at their first token until they are released."""

    def __init__(self) -> None:
        self._released, self._reached = threading.Event(), threading.Event()

    def wait(self) -> None:
        self._reached.set()
        self._released.wait(60)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(60)

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def held_back(monkeypatch) -> Iterator[HeldBack]:
    barrier, watch = HeldBack(), answering.Answer.watch

    def wait_and_watch(answer: answering.Answer, ids: Any) -> bool:
        barrier.wait()
        return watch(answer, ids)

    monkeypatch.setattr(answering.Answer, "watch", wait_and_watch)
    yield barrier
    barrier.release()


# ---- answers ---------------------------------------------------------------------------------------------------------


def messages(line: dict[str, Any]) -> Any:
    return chat_body(line["question"], line["image"])["messages"]


def test_the_openai_client_gets_the_answers_of_ask(client, pipeline, expected):
    assert [model.id for model in client.models.list()] == ["scenes"]
    for line, answer in zip(ASKED, expected, strict=True):
        completion = client.chat.completions.create(model="scenes", messages=messages(line))
        pruned = pipeline.prune(SAMPLES / line["image"], line["question"])
        generated = pipeline.runner().generate_one(pruned)
        assert completion.choices[0].message.content == answer and completion.choices[0].finish_reason == "stop"
        assert completion.usage.prompt_tokens == len(pruned.input_ids)
        assert completion.usage.completion_tokens == len(generated.ids)
        record = completion.gridprune
        assert record["tokens"] == {"full": 256, "kept": 28, "separators": 0} and record["key"] == pruned.images[0].key


def test_the_openai_client_streams_the_answers_of_ask(client, expected):
    for line, answer in zip(ASKED, expected, strict=True):
        stream = client.chat.completions.create(
            model="scenes", messages=messages(line), stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == answer and sum(map(bool, pieces)) == len(answer.split())  # each token as it comes
        assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-2].gridprune["keep"] == 0.1094
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(answer.split()) + 1


def test_the_openai_client_has_the_conversation_that_chat_has(client, pipeline):
    """Each turn is pruned for its own question; pictures may come with any of the user's messages."""
    turns = [(ASKED[0], QUESTION), (None, "What colour is it?"), (ASKED[-1], "And in this one?")]
    messages_so_far, history, images = [], [], []
    for line, question in turns:
        images += [SAMPLES / line["image"]] if line else []
        messages_so_far += chat_body(question, *([line["image"]] if line else []))["messages"]
        answer = pipeline.ask(images, question, Pruning(keep=0.3), history=history)
        asked = {"model": "scenes", "messages": messages_so_far, "extra_body": {"gridprune": {"keep": 0.3}}}
        completion = client.chat.completions.create(**asked)
        assert completion.choices[0].message.content == answer.text
        assert completion.usage.prompt_tokens == len(answer.pruned.input_ids)
        positions = answer.pruned.to_json()["positions"]
        assert completion.gridprune["positions"] == json.loads(json.dumps(positions))
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces) == answer.text
        messages_so_far.append(completion.choices[0].message)  # as it is given back
        history.append(Exchange(question, answer.text, int(line is not None)))
    del messages_so_far[-1]
    with pytest.raises(openai.BadRequestError, match="template: holds one question"):
        client.chat.completions.create(**asked | {"extra_body": {"gridprune": {"template": "{image}{question}"}}})


def test_questions_that_come_together_are_answered_together(served, expected):
    with ThreadPoolExecutor(10) as threads:
        for stream in (False, True):
            replies = list(
                threads.map(lambda line: served.ask(line["question"], line["image"], stream=stream), ASKED)  # noqa: B023
            )
            if not stream:
                assert [reply.json()["choices"][0]["message"]["content"] for reply in replies] == expected
                assert max(reply.json()["gridprune"]["batch"] for reply in replies) > 1
            else:
                assert ["".join(texts(reply)) for reply in replies] == expected


def texts(reply: httpx2.Response) -> list[str]:
    """Pieces of a streamed answer."""
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    return texts_of_events(reply.text)


def texts_of_events(events: str) -> list[str]:
    lines = [line for line in events.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    return [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]


def test_options_of_pruning(served, pipeline):
    for options, pruning in (
        ({"keep": 1.0}, Pruning(keep=1.0)),
        ({"tokens": 5, "region": "none"}, Pruning(tokens=5, region="none")),
        ({"method": "random", "method_option": {"seed": 3}}, None),
        ({"query": "the red star", "zone": 2}, None),
    ):
        record = served.ask(gridprune=options).json()["gridprune"]
        wanted = pruning or Pruning.from_options(options)
        pruned = json.loads(json.dumps(pipeline.prune(SAMPLES / "scene-1.png", QUESTION, wanted).to_json()))
        assert all(record[name] == pruned[name] for name in ("tokens", "region", "zones", "method", "options"))
    assert record["cache"] == "hit" and record["image"] == "-"


def test_sets_with_a_prefix_beside_others(served, pipeline):
    """They make batches of their own; each answer, streamed and to its length, is that of `ask`."""
    options = [{"ilp": "selection"}, {"ilp": 0.3}, {"keep": 0.3}]
    expected = [
        pipeline.ask(SAMPLES / "scene-1.png", QUESTION, Pruning.from_options(values)).text for values in options
    ]
    with ThreadPoolExecutor(6) as threads:
        whole = [threads.submit(served.ask, stream=True, gridprune=values) for values in options]
        cut = [threads.submit(served.ask, max_tokens=1, gridprune=values) for values in options]
        assert ["".join(texts(reply.result())) for reply in whole] == expected
        assert [reply.result().json()["usage"]["completion_tokens"] for reply in cut] == [1, 1, 1]


def test_the_cache_may_be_left_out(served, pipeline):
    def count() -> int:
        return sum(1 for _ in pipeline.store.entries())

    before = count()
    for _ in range(2):
        record = served.ask(QUESTION, "scene-5.png", gridprune={"cache": False}).json()["gridprune"]
        assert record["cache"] == "miss" and count() == before
    served.ask(QUESTION, "scene-5.png")
    assert count() == before + 1


def test_several_pictures_files_and_uuids(served, pipeline):
    names = ["scene-1.png", "scene-2.png"]
    body = chat_body(QUESTION, names[0])
    parts = body["messages"][0]["content"]
    parts[0]["uuid"] = "first"
    parts.insert(1, {"type": "image_url", "image_url": {"url": f"file://{SAMPLES}/{names[1]}"}})
    expected = pipeline.ask([SAMPLES / name for name in names], QUESTION).text
    first = ask(served.port, body).json()
    assert first["choices"][0]["message"]["content"] == expected
    assert first["gridprune"]["image"] == ["first", f"file://{SAMPLES}/{names[1]}"]
    parts[0] = {"type": "image_url", "uuid": "first"}
    assert ask(served.port, body).json()["choices"][0]["message"]["content"] == expected


def test_answers_end_where_they_are_to(served):
    def end(**values: Any) -> tuple[str, str, int]:
        reply = served.ask(**values).json()
        choice = reply["choices"][0]
        assert "".join(texts(served.ask(stream=True, **values))) == choice["message"]["content"]
        return choice["message"]["content"], choice["finish_reason"], reply["usage"]["completion_tokens"]

    assert end() == ("red star", "stop", 3)
    assert end(max_tokens=1) == ("red", "length", 1)
    assert end(max_tokens=1_000_000) == ("red star", "stop", 3)
    assert end(stop="star") == ("red", "stop", 2)
    assert end(stop=["x", "d s"]) == ("re", "stop", 2)
    assert end(stop=["start"]) == ("red star", "stop", 3)


def test_each_of_a_batch_ends_at_its_own_length(served):
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda n: served.ask(max_tokens=n).json(), [1, 2, 3, 1, 2, 3]))
    assert [reply["usage"]["completion_tokens"] for reply in replies] == [1, 2, 3, 1, 2, 3]


def test_a_seed_gives_the_same_answer_again(served):
    def sample(seed: int) -> str:
        values = {"temperature": 2.0, "seed": seed, "max_tokens": 8}
        return served.ask(**values).json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(6) as threads:
        first = list(threads.map(sample, range(6)))
    assert [sample(seed) for seed in range(6)] == first and len(set(first)) > 1


# ---- bad input -------------------------------------------------------------------------------------------------------


def error(reply: httpx2.Response) -> tuple[int, str | None]:
    fault = reply.json()["error"]
    assert set(fault) == {"message", "type", "param", "code"} and fault["message"] and fault["type"]
    return reply.status_code, fault["code"]


def test_bad_requests_have_a_status_and_the_server_lives_on(served):
    url = f"http://127.0.0.1:{served.port}/v1/chat/completions"
    headers = {"content-type": "application/json"}
    assert error(httpx2.post(url, content=b"{", headers=headers)) == (400, "invalid_json")
    assert error(httpx2.post(url, content=b"{}")) == (415, "invalid_content_type")
    assert error(served.ask(model="gpt-4")) == (404, "model_not_found")
    assert error(served.ask(gridprune={"keep": 2})) == (400, "invalid_value")
    assert error(served.ask(gridprune={"\ud800": 2})) == (400, "invalid_value")
    assert error(served.ask(gridprune={"tokens": 999})) == (400, "invalid_value")  # more than the picture has
    assert error(served.ask("word " * 10_000)) == (400, "invalid_value")  # beyond the model's positions
    assert error(served.ask("<image> \x00\x1b[2J what?")) == (400, "invalid_value")  # its image token
    assert served.ask("\x00\x1b[2J\u202e what?").status_code == 200  # stays text
    body = chat_body(QUESTION, "scene-1.png")
    picture = body["messages"][0]["content"][0]["image_url"]
    head, comma, picture_base64 = data_url("scene-1.png").partition(",")
    picture["url"] = head + comma + picture_base64[:2000]  # a whole header, and not all of the rest
    assert error(ask(served.port, body)) == (400, "invalid_image")
    picture["url"] = "file:///etc/passwd"
    assert error(ask(served.port, body)) == (403, "path_not_allowed")
    assert error(served.get("/v1/none")) == (404, "not_found")
    assert error(served.get("/v1/chat/completions"))[0] == 405
    assert served.ask().status_code == 200
    wait_until(lambda: served.budget.held == 0)


def test_one_bad_request_does_not_fail_those_beside_it(served, held_back):
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(served.ask)
        held_back.wait_until_reached()
        bad = [threads.submit(served.ask, gridprune=options) for options in ({"keep": "x"}, {"tokens": 999})]
        good = [threads.submit(served.ask) for _ in range(3)]
        wait_until(lambda: served.worker.waiting == 5)
        held_back.release()
        assert [reply.result().status_code for reply in (first, *good)] == [200] * 4
        assert [error(reply.result()) for reply in bad] == [(400, "invalid_value")] * 2


def test_a_request_that_fails_the_whole_batch_fails_alone(served, held_back, monkeypatch):
    prune = Runner.prune

    def fail(runner: Runner, requests: Any, **options: Any) -> Any:
        if any(request.question == "Bad?" for request in requests):
            raise BadInput("can't be")
        return prune(runner, requests, **options)

    monkeypatch.setattr(Runner, "prune", fail)
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(served.ask)
        held_back.wait_until_reached()
        replies = [threads.submit(served.ask, question) for question in (QUESTION, "Bad?", QUESTION)]
        wait_until(lambda: served.worker.waiting == 3)
        held_back.release()
        assert first.result().status_code == 200
        assert [reply.result().status_code for reply in replies] == [200, 400, 200]


def test_uploads_are_bounded(served, monkeypatch):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    monkeypatch.setattr(uploads, "DISCARD_SECONDS", 0.2)
    answer = send_raw(served.port, head + b"Content-Length: 200000000\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"code": "body_too_large"' in answer
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = send_raw(served.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + 40 * chunk)
    assert answer.startswith(b"HTTP/1.1 413 ")
    monkeypatch.setattr(uploads, "UPLOAD_SECONDS", 0.2)
    answer = send_raw(served.port, head + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    wait_until(lambda: served.budget.held == 0)


def test_what_is_too_much_at_once_comes_back_later(served, monkeypatch):
    monkeypatch.setattr(served.budget, "most", 1000)
    reply = served.ask()
    assert error(reply) == (429, "memory") and int(reply.headers["retry-after"]) > 0
    monkeypatch.undo()
    monkeypatch.setattr(served.worker, "_max_waiting", 0)
    reply = served.ask()
    assert error(reply) == (429, "too_many_waiting") and int(reply.headers["retry-after"]) > 0
    wait_until(lambda: served.budget.held == 0)


# ---- who may ask -----------------------------------------------------------------------------------------------------


def get_status(served: Served, access: Access, path: str = "/v1/models", **headers: str | bytes) -> int:
    from starlette.testclient import TestClient

    app = create_app(served.worker, served.pictures, access, served.budget, served.metrics)
    client = TestClient(app, base_url="http://127.0.0.1")  # outside of its lifespan, which would start the worker again
    reply = client.get(path, headers=headers)
    if reply.status_code != 200:
        error(reply)
    return reply.status_code


def test_the_key(served):
    access = Access("s3cret")
    assert get_status(served, access) == 401 and get_status(served, access, "/metrics") == 401
    assert get_status(served, access, authorization="Bearer s3cre") == 401
    assert get_status(served, access, authorization="Basic s3cret") == 401
    assert get_status(served, access, authorization="Bearer s3cr\xe9t".encode("latin-1")) == 401
    assert get_status(served, access, authorization="Bearer s3cret") == 200
    assert get_status(served, access, authorization="Bearer s3cret", host="models.example.org") == 200
    assert get_status(served, access, "/health") == 200


def test_pages_of_other_sites_can_not_ask(served):
    assert get_status(served, Access(), host="evil.example.org") == 403  # a name that was made to lead here
    assert get_status(served, Access(names=("box.lan",)), host="box.lan:8090") == 200
    assert get_status(served, Access(), host="localhost:8090") == 200
    assert get_status(served, Access(), host="[::1]:8090") == 200
    assert get_status(served, Access(), origin="http://evil.example.org") == 403
    assert get_status(served, Access(), origin="null") == 403
    assert get_status(served, Access(), host="127.0.0.1:8090", origin="http://127.0.0.1:8090") == 200


# ---- clients that leave, and what is slow ----------------------------------------------------------------------------


def open_request(served: Served, **values: Any) -> socket.socket:
    """A connection on which a question was asked, and nothing was read."""
    return open_post(served, "/v1/chat/completions", chat_body(QUESTION, "scene-1.png", **values))


def open_post(served: Served, path: str, values: Any) -> socket.socket:
    body = json.dumps(values).encode()
    connection = socket.create_connection(("127.0.0.1", served.port))
    head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(f"POST {path} HTTP/1.1\r\n{head}".encode() + body)
    return connection


def command_body(name: str = "scene-1.png", **values: Any) -> dict[str, Any]:
    """What `gridprune prune` sends."""
    data = (SAMPLES / name).read_bytes()
    image = {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "data": base64.b64encode(data).decode()}
    return {"images": [image], "question": QUESTION, "cache": True} | values


def test_who_leaves_before_its_turn_is_not_answered(served, held_back):
    def answered() -> int:
        return served.metrics._counts["questions_total"]

    before = answered()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(served.ask)
        held_back.wait_until_reached()
        connections = [open_request(served, stream=stream) for stream in (False, True)]
        connections.append(open_post(served, COMMAND, command_body()))
        wait_until(lambda: served.worker.waiting == 3)
        for connection in connections:
            connection.close()
        held_alone = len(json.dumps(chat_body(QUESTION, "scene-1.png")))
        wait_until(lambda: served.budget.held < 2 * held_alone)  # what they held was given back
        wait_until(lambda: served.worker.waiting == 0)  # so that others have their places
        held_back.release()
        assert first.result().status_code == 200
    assert served.ask().status_code == 200
    assert answered() == before + 2


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_amid_its_answer_ends_it(served, monkeypatch, stream):
    lengths, watch, entered = [], answering.Answer.watch, threading.Event()

    def wait_and_watch(answer: answering.Answer, ids: Any) -> bool:
        entered.set()
        wait_until(lambda: answer.job.cancelled)
        lengths.append(len(ids))
        return watch(answer, ids)

    monkeypatch.setattr(answering.Answer, "watch", wait_and_watch)
    connection = open_request(served, stream=stream)
    assert entered.wait(30)
    connection.close()
    wait_until(lambda: lengths and served.budget.held == 0)
    monkeypatch.undo()
    assert served.ask().status_code == 200
    assert lengths == [1]


def test_fetching_holds_up_nobody_else_and_ends_with_its_client(served, monkeypatch):
    ends, left, released = [], [], threading.Event()
    read, wait_for_leave = Pictures.read, chat.wait_for_leave

    def read_slowly(pictures: Pictures, picture: Any, end: float) -> bytes:
        if not picture.url.startswith("http:"):
            return read(pictures, picture, end)
        ends.append(end)
        released.wait(60)
        return b""

    async def wait_and_tell(receive: Any) -> None:
        await wait_for_leave(receive)
        left.append(receive)

    monkeypatch.setattr(Pictures, "read", read_slowly)
    monkeypatch.setattr(chat, "wait_for_leave", wait_and_tell)
    remote = {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}
    content = [remote, remote, {"type": "text", "text": QUESTION}]
    count = 10  # above the threads that asyncio has on a few cores
    connections = [open_request(served, messages=[{"role": "user", "content": content}]) for _ in range(count)]
    wait_until(lambda: len(ends) == count)
    assert served.ask().status_code == 200
    for connection in connections[1:]:
        connection.close()
    wait_until(lambda: len(left) == count - 1)
    released.set()
    assert b" 400 Bad Request" in connections[0].recv(1 << 16)  # its pictures are no images
    connections[0].close()
    wait_until(lambda: served.budget.held == 0)
    assert len(ends) == count + 1 and len(set(ends)) == count  # one end for both; the second only of who stayed


def test_a_stream_says_that_it_is_alive(served, monkeypatch, held_back):
    monkeypatch.setattr(chat, "PING", 0.05)
    body, events = chat_body(QUESTION, "scene-1.png", stream=True), ""
    url = f"http://127.0.0.1:{served.port}/v1/chat/completions"
    with httpx2.stream("POST", url, json=body, timeout=60) as reply:
        for piece in reply.iter_text():
            events += piece
            if events.count(": working\n\n") >= 2:
                held_back.release()
    assert "".join(texts_of_events(events)) == "red star"


def test_an_error_amid_a_stream_is_an_event(served, client, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(answering.Answer, "watch", fail)
    reply = served.ask(stream=True)
    last = json.loads(reply.text.strip().rpartition("data: ")[2])
    assert reply.status_code == 200 and last["error"]["code"] == "internal_error"
    with pytest.raises(openai.APIError, match="the model is broken"):
        list(client.chat.completions.create(model="scenes", messages=messages(ASKED[0]), stream=True))
    assert error(served.ask()) == (500, "internal_error")
    monkeypatch.undo()
    assert served.ask().status_code == 200


# ---- what it tells of itself -----------------------------------------------------------------------------------------


def test_metrics_and_the_cache(served):
    def values() -> dict[str, float]:
        text = served.get("/metrics").text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = values()
    usage = served.ask().json()["usage"]
    after = values()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["gridprune_questions_total"] == 1 == grown["gridprune_image_hits_total"]
    assert grown["gridprune_prompt_tokens_total"] == usage["prompt_tokens"]
    assert grown["gridprune_kept_tokens_total"] == 28 and grown["gridprune_visual_tokens_total"] == 256
    assert grown['gridprune_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert grown['gridprune_request_seconds_bucket{le="+Inf"}'] == 1 == grown["gridprune_request_seconds_count"]
    stats = served.get("/v1/cache/stats").json()
    assert stats["enabled"] and stats["entries"] >= 1 and stats["bytes"] > 0 and stats["hits"] > 0
    command(served, command_body())
    assert served.get("/v1/cache/stats").json()["hits"] == stats["hits"] + 1  # of what is pruned alone, too


def test_those_who_ask_during_the_walk_over_the_cache_wait_for_it(served, pipeline, monkeypatch):
    entries = pipeline.store.entries
    faults = [OSError("no such folder")]

    def walk_slowly() -> Any:
        time.sleep(0.2)
        if faults:
            raise faults.pop()
        return entries()

    monkeypatch.setattr(pipeline.store, "entries", walk_slowly)
    monkeypatch.setattr(app, "STATS_SECONDS", 0.0)
    assert error(served.get("/v1/cache/stats")) == (500, "internal_error")
    monkeypatch.setattr(app, "STATS_SECONDS", 5.0)  # for which no walk counts that failed
    with ThreadPoolExecutor(4) as threads:
        replies = list(threads.map(lambda _: served.get("/v1/cache/stats").json(), range(4)))
    assert all(reply["entries"] >= 1 for reply in replies)


def command(served: Served, body: Any) -> dict[str, Any]:
    """The result of a command."""
    reply = httpx2.post(f"http://127.0.0.1:{served.port}{COMMAND}", json=body, timeout=60)
    return json.loads(reply.text.splitlines()[-1])["result"]


def test_what_goes_back_to_a_command_is_counted_and_goes_in_pieces(served, monkeypatch):
    monkeypatch.setattr(commands, "PIECE", 3 << 10)
    counted, count = [], uploads.Share.count
    monkeypatch.setattr(uploads.Share, "count", lambda share, size: (counted.append(size), count(share, size)))
    result = command(served, command_body(file=True, figure="png"))
    files = [base64.b64decode(result[name], validate=True) for name in ("file", "figure")]
    assert PrunedSet.from_bytes(files[0], "-").images[0].key == result["record"]["key"]
    assert files[1].startswith(b"\x89PNG")
    assert counted == [sum(map(len, files))]
    wait_until(lambda: served.budget.held == 0)


def test_a_uuid_is_no_sha256(served):
    """A client that calls a picture by the sha256 of another does not have commands ask about it."""
    body = command_body()
    fake = chat_body(QUESTION, "scene-2.png")
    sha256 = body["images"][0]["sha256"]
    fake["messages"][0]["content"][0]["uuid"] = sha256
    record = command(served, body)["record"]
    assert ask(served.port, fake).status_code == 200
    del body["images"][0]["data"]
    assert command(served, body)["record"]["key"] == record["key"]


def test_while_it_loads_and_when_it_stops(pipeline):
    loading, metrics = threading.Event(), Metrics()

    def open_slowly() -> Pipeline:
        loading.wait(30)
        return pipeline

    worker = Worker(open_slowly, metrics)
    app = create_app(worker, Pictures([], Hosts([]), 1 << 20), Access(), Budget(1 << 20, 1 << 20), metrics)
    with serving(app) as port:
        for path in ("health", "v1/models"):
            assert error(httpx2.get(f"http://127.0.0.1:{port}/{path}")) == (503, "loading")
        assert error(ask(port, chat_body(QUESTION, "scene-1.png"))) == (503, "loading")
        loading.set()
        wait_until(lambda: httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200)
        worker.stop()
        assert error(ask(port, chat_body(QUESTION, "scene-1.png"))) == (503, "stopping")


def test_a_model_that_can_not_be_opened_ends_the_worker():
    def fail() -> Pipeline:
        raise ValueError("no such model")

    worker = Worker(fail, Metrics())
    worker.start()
    worker.join()
    assert isinstance(worker.fault, ValueError)
    with pytest.raises(Refusal):
        worker.check_ready()


def test_a_fault_of_the_worker_itself_is_told_and_ends_it(pipeline, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("not foreseen")

    worker, metrics = Worker(lambda: pipeline, Metrics()), Metrics()
    app = create_app(worker, Pictures([], Hosts([]), 1 << 20), Access(), Budget(1 << 20, 1 << 20), metrics)
    with serving(app) as port:
        wait_until(lambda: worker.pipeline)
        monkeypatch.setattr(answering.Answerer, "answer", fail)
        assert error(ask(port, chat_body(QUESTION, "scene-1.png"))) == (500, "internal_error")
        assert error(ask(port, chat_body(QUESTION, "scene-1.png"))) == (503, "stopping")
        assert isinstance(worker.fault, RuntimeError)  # for which the command ends, too
