"""The commands through a server: all that they print and write is what they print and write without one."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from served import SAMPLES, wait_until

from gridprune_cli.cli.drawing import figure_text
from gridprune_cli.client.connection import Connection, parse_address
from gridprune_cli.client.protocol import SESSION, ServerFault, error_from_json, error_to_json
from gridprune_cli.client.remote import RemotePipeline, RemotePruned, RemoteRequest
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.tokens import load_pruned

QUESTION = "Which object has the T?"
SCENE = SAMPLES / "scene-1.png"
Run = tuple[object, str, str]


class Home:
    """A running server at its socket, with the folders that it shares with the commands."""

    def __init__(self, server: Any, folder: Path):
        self.runtime, self.cache, self.socket = folder / "run", folder / "cache", folder / "run/gridprune/server.sock"
        self.runtime.mkdir()
        self.errors = folder / "stderr"
        self._server = server
        self.start()

    def start(self) -> None:
        env = os.environ | {"XDG_RUNTIME_DIR": str(self.runtime), "GRIDPRUNE_CACHE_DIR": str(self.cache)}
        with open(self.errors, "wb") as err, open(os.devnull) as null:
            streams = (null.fileno(), 1, err.fileno())
            self.process = self._server.start("serve", "--socket", env=env, streams=streams)
        wait_until(lambda: "listening" in self.errors.read_text() or self.process.poll() is not None)

    @property
    def url(self) -> str:
        return f"unix:{self.socket}"


def is_ready(home: Home) -> bool:
    try:
        return bool(list(Connection(parse_address(home.url)).post(SESSION, {"version": ""})))
    except ServerFault as fault:
        assert fault.status == 503
        return False


@pytest.fixture(scope="module")
def home(server) -> Iterator[Home]:
    with tempfile.TemporaryDirectory() as folder:  # of a short path: a socket's has at most 107 bytes
        home = Home(server, Path(folder))
        wait_until(lambda: is_ready(home))
        yield home
        home.process.send_signal(signal.SIGTERM)
        assert home.process.wait(60) == 0
        assert not home.socket.exists()


@pytest.fixture
def both(home, command, monkeypatch, tmp_path) -> Callable[..., tuple[Run, Run]]:
    """Runs a command without the server, then by it, in a folder each: what each gave."""
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(home.cache))

    def run(*arguments: object, **options: Any) -> tuple[Run, Run]:
        runs = []
        for name, more in (("here", ["--no-server"]), ("there", ["--server", home.url])):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            monkeypatch.chdir(folder)
            runs.append(command(*arguments, *more, **options))
        return runs[0], runs[1]

    return run


def records(text: str) -> list[dict[str, Any]]:
    """Lines of JSON without times, and without whether an image was cached by an earlier one."""
    values = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in record.items() if name not in ("ms", "cache")} for record in values]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--keep", "0.2"],
        ["--tokens", "9", "--region", "none", "--positions", "compact"],
        ["--method", "random", "--method-option", "seed=7"],
        ["--method-option", "zone=2", "--query", "the T"],
        ["--plc", "pool", "--inside-ratio", "1.5"],
        ["--ilp", "region", "--ilp-layer", "1"],
        ["--ilp", "selection"],
        ["--literal", "--max-new-tokens", "1"],
        ["--generation", "num_beams=3", "--no-cache"],
        ["--localizer", "vlm"],
        ["--prompt-template", "USER: {image}{question} ASSISTANT:"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_ask_gives_what_it_gives_here(both, arguments):
    here, there = both("ask", SCENE, QUESTION, "--json", *arguments)
    assert here[0] == there[0] == 0
    assert records(there[1]) == records(here[1])
    assert records(there[1])[0]["answer"]
    (record,) = [json.loads(line) for line in there[1].splitlines()]
    assert record["ms"].keys() == json.loads(here[1])["ms"].keys()
    assert record["ms"]["total"] > 0


@pytest.mark.parametrize("arguments", [[], ["--stream"]], ids=["at once", "streamed"])
def test_an_answer_with_its_files(both, tmp_path, arguments):
    here, there = both("ask", SCENE, QUESTION, *arguments, "--save", "set", "--show", "figure.png")
    assert here[:2] == there[:2] == (0, "red star\n")
    for name in ("set", "figure.png"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


CHAT = f"{QUESTION}\n/show\n/keep 0.3\nWhat colour is it?\n/save set\n/keep 3\n/show\n \nHow many stars are there?\n"


@pytest.mark.parametrize("arguments", [[], ["--pin", "--system", "Be short."]], ids=["anew", "pinned"])
def test_a_conversation(both, tmp_path, arguments):
    here, there = both("chat", SCENE, "--json", "-q", *arguments, stdin=CHAT.encode())
    assert here[0] == there[0] == 3  # /keep 3
    assert records(there[1]) == records(here[1])
    assert len(records(there[1])) == 3
    assert there[2] == here[2]
    assert there[2].count("warning: ") == 2
    assert (tmp_path / "there/set").read_bytes() == (tmp_path / "here/set").read_bytes()
    here, there = both("chat", SCENE, "-q", "--stream", *arguments, stdin=CHAT.encode())
    assert there == here


def test_a_conversation_says_whether_its_picture_came_from_the_cache(home, command, monkeypatch, tmp_path):
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(home.cache))
    (tmp_path / "new.png").write_bytes(SCENE.read_bytes() + b" ")
    out = command("chat", tmp_path / "new.png", "--server", home.url, "--json", stdin=f"{QUESTION}\nWhy?".encode())[1]
    assert [json.loads(line)["cache"] for line in out.splitlines()] == ["miss", "hit"]


def test_a_pinned_conversation_goes_on_at_the_server(home, command, monkeypatch):
    """With the answers that it has anew; that it goes on from its keys and values, test_conversations counts."""
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(home.cache))
    lines = "\n".join([QUESTION, *["And what colour is it now?"] * 4])
    options = ("--server", home.url, "--keep", "1", "--json", "-q")
    out = {pin: command("chat", SCENE, *options, *pin, stdin=lines.encode())[1] for pin in ((), ("--pin",))}
    assert [record["answer"] for record in records(out[()])] == [r["answer"] for r in records(out[("--pin",)])]


def test_several_images_one_of_them_from_stdin(both):
    here, there = both("ask", "-", SAMPLES / "scene-2.png", QUESTION, "--json", stdin=SCENE.read_bytes())
    assert here[0] == there[0] == 0
    assert records(there[1]) == records(here[1])
    assert records(there[1])[0]["image"] == ["-", str(SAMPLES / "scene-2.png")]


def test_show_and_prune_and_generate(both, tmp_path):
    here, there = both("show", SCENE, QUESTION)
    assert here == there
    assert "#" in there[1]
    both("show", SCENE, QUESTION, "-o", "figure.png")
    here, there = both("prune", SCENE, QUESTION, "-o", "prefix", "--ilp", "selection", "--with-prefix")
    assert here[0] == there[0] == 0
    assert "with the prefix" in there[2]
    here, there = both("prune", SCENE, QUESTION, "-o", "set.safetensors", "--json")
    assert here[0] == there[0] == 0
    assert records(there[1]) == records(here[1])
    for name in ("figure.png", "prefix", "set.safetensors"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    (tmp_path / "damaged").write_bytes(b"no set")
    files = ["set.safetensors", tmp_path / "damaged", tmp_path / "missing"]
    here, there = both("generate", *files, "--json")
    assert here[0] == there[0] == 3
    assert here == there
    assert both("generate", "set.safetensors")[1] == (0, "red star\n", "")
    here, there = both("generate", tmp_path / "damaged")
    assert here == there
    assert there[0] == 2


def test_batch_in_order_with_its_errors(both, tmp_path):
    lines = (SAMPLES / "questions.jsonl").read_text().splitlines()[:12]
    lines.insert(3, json.dumps({"image": "missing.png", "question": "?"}))
    lines.insert(5, "no JSON")
    lines.insert(7, json.dumps({"image": "scene-1.png", "question": QUESTION, "keep": 0.5, "id": 7}))
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines).replace('"scene', f'"{SAMPLES}/scene'))
    here, there = both("batch", file, "--batch-size", "4", "-o", "results.jsonl")
    assert here[0] == there[0] == 3
    results = (tmp_path / "there/results.jsonl").read_text()
    assert results == (tmp_path / "here/results.jsonl").read_text()
    assert results.count("\n") == len(lines)
    assert [line for line in there[2].splitlines() if "warning" in line] == [
        line for line in here[2].splitlines() if "warning" in line
    ]
    (tmp_path / "there/results.jsonl").write_text("".join(results.splitlines(True)[:5]))  # as if it was interrupted
    both("batch", file, "--resume", "results.jsonl")
    assert (tmp_path / "there/results.jsonl").read_text() == results
    for name in ("here", "there"):
        (tmp_path / name / "sets").mkdir()
    here, there = both("prune", "--batch", file, "-o", "sets", "--json")
    assert here[0] == there[0] == 3
    assert here[1] == there[1]
    folders = [tmp_path / name / "sets" for name in ("here", "there")]
    sets = [[load_pruned(path) for path in sorted(folder.iterdir())] for folder in folders]
    for one, other in zip(*sets, strict=True):
        assert one.to_json() == other.to_json()
        assert torch.equal(one.kept, other.kept)
        # which questions are worked on together decides the last bits, as it does without a server
        torch.testing.assert_close(one.image_embeds, other.image_embeds, atol=1e-5, rtol=1e-5)
    assert len(sets[0]) == len(lines) - 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "missing.png", QUESTION],
        ["ask", __file__, QUESTION],
        ["ask", SAMPLES / "hills.jpg", QUESTION],
        ["ask", SCENE, " "],
        ["ask", SCENE, QUESTION, "--keep", "2"],
        ["ask", SCENE, QUESTION, "--tokens", "999"],
        ["ask", SCENE, QUESTION, "--region", "9,9"],
        ["ask", SCENE, QUESTION, "--method-option", "zone=0"],
        ["ask", SCENE, QUESTION, "--method-option", "colour=1"],
        ["ask", SCENE, QUESTION, "--generation", "nonsense=1"],
        ["ask", SCENE, QUESTION, "--generation", "temperature=hot", "--generation", "do_sample=true"],
        ["ask", SCENE, QUESTION, "--ilp-layer", "1"],
        ["ask", SCENE, QUESTION, "--system", "x" * 70_000],
        ["ask", SCENE, QUESTION, "--save", "."],
        ["chat", "missing.png"],
        ["ask", SCENE, QUESTION, "--keep", "nan"],
        ["ask", SCENE, QUESTION, "--plc", "pool", "--inside-ratio", "inf"],
        ["ask", SCENE, QUESTION, "--generation", "temperature=NaN"],
        ["chat", SAMPLES / "hills.jpg"],
        ["chat", __file__],
        ["chat", SCENE, "--pin", "--ilp", "0.5"],
        ["chat", SCENE, "--pin", "--method", "fastv"],
        ["chat", SCENE, "--tokens", "999"],
        ["chat", SCENE, "--method", "colour"],
        ["ask", SCENE, QUESTION, "--plc", "trained", "--model", "scenes"],
        ["show", SCENE, QUESTION, "-o", "none/figure.png"],
        ["batch", SAMPLES / "questions.jsonl", "--keep", "0"],
        ["batch", "missing.jsonl"],
        ["prune", SCENE, QUESTION, "-o", "."],
    ],
    ids=lambda arguments: " ".join(str(argument)[-20:] for argument in arguments[3:] or arguments),
)
def test_bad_input_is_refused_in_the_same_line(both, arguments):
    here, there = both(*arguments)
    assert there[0] == here[0]
    if here[0] == 2:
        assert here == there
        assert there[2].count("\n") == 1


def test_a_picture_that_is_no_scene_is_taken_where_the_model_was_named(both):
    here, there = both("ask", SAMPLES / "hills.jpg", QUESTION, "--model", "scenes", "--json")
    assert here[0] == there[0] == 0
    assert records(here[1]) == records(there[1])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "other"], "--model other: the server has scenes"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: the server has float32"),
        (["--relevance", "words"], "--relevance words: the server has clip"),
        (["--device", "cuda"], "--device cuda: the server has cpu"),
        (["--clip", "other"], "--clip other: the server has"),
        (["--cache-dtype", "int8"], "--cache-dtype int8: the server has full"),
        (["--cache-dir", "other"], "--cache-dir other: the server has"),
        (["--cache-limit", "1G"], "--cache-limit"),
        (["--localizer", "other"], "--localizer other: a server works alone"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_setting_that_the_server_has_otherwise_is_refused_by_name(home, command, monkeypatch, arguments, line):
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(home.cache))
    code, out, err = command("ask", SCENE, QUESTION, "--server", home.url, *arguments)
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1


def test_what_the_server_has_may_be_named(home, command, monkeypatch):
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", "/of/another/machine")  # not asked of a server that was named
    monkeypatch.setenv("GRIDPRUNE_SERVER", home.url)
    settings = [
        "--model",
        "scenes",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--relevance",
        "clip",
        "--cache-dir",
        home.cache,
    ]
    assert command("ask", SCENE, QUESTION, *settings, "-q") == (0, "red star\n", "")
    assert command("ask", SCENE, QUESTION, "-q") == (0, "red star\n", "")


def refuse_to_open(options: Any) -> None:
    raise GridpruneError("opened here")


def test_a_server_is_found_by_its_socket_and_used_where_it_does_the_same(home, command, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home.runtime))
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(home.cache))
    monkeypatch.setattr("gridprune_cli.opening.open_pipeline", refuse_to_open)
    assert command("ask", SCENE, QUESTION, "-q") == (0, "red star\n", "")
    for more in (["--no-server"], ["--server", "off"]):
        assert command("ask", SCENE, QUESTION, *more) == (1, "", "gridprune: opened here\n")
    config = Path(os.environ["XDG_CONFIG_HOME"], "gridprune/config.toml")
    config.parent.mkdir(parents=True)
    config.write_text('[models."scenes"]\nrelevance = "words"\n')  # after the server has read it
    assert "other settings for scenes" in command("ask", SCENE, QUESTION)[2]
    config.unlink()
    for more in (["--relevance", "words"], ["--cache-dir", "other"], ["--model", "scenes-2"], ["--localizer", "m"]):
        code, out, err = command("ask", SCENE, QUESTION, *more)
        assert (code, out) == (1, "")
        note, line = err.splitlines()
        assert note.startswith("working without the server at unix:")
        assert line == "gridprune: opened here"


@pytest.mark.parametrize("fault", ["dead", "public", "none"])
def test_a_socket_without_a_server_of_this_user_is_passed_over(command, monkeypatch, tmp_path, fault):
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, "gridprune")
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        monkeypatch.setattr("gridprune_cli.opening.open_pipeline", refuse_to_open)
        listener = socket.socket(socket.AF_UNIX)
        if fault != "none":
            folder.mkdir(mode=0o755 if fault == "public" else 0o700)
            listener.bind(str(folder / "server.sock"))
        if fault == "public":
            listener.listen()
        assert command("ask", SCENE, QUESTION) == (1, "", "gridprune: opened here\n")
        listener.close()


def test_a_server_that_is_found_and_fails_is_named(command, monkeypatch):
    """One that has ended is not, as above: its socket alone is left."""
    monkeypatch.setattr("gridprune_cli.opening.open_pipeline", refuse_to_open)
    with tempfile.TemporaryDirectory() as base, socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.setenv("XDG_RUNTIME_DIR", base)
        path = Path(base, "gridprune/server.sock")
        path.parent.mkdir(mode=0o700)
        listener.bind(str(path))
        listener.listen()
        connect = Connection._connect
        monkeypatch.setattr(Connection, "_connect", lambda self: (connect(self), listener.accept()[0].close())[0])
        code, out, err = command("ask", SCENE, QUESTION)  # whose first byte finds the other end closed
    note, line = err.splitlines()
    assert (code, out, line) == (1, "", "gridprune: opened here")
    assert note.startswith(f"working without the server at unix:{path}: ") and "ended the connection" in note


class Strange(BaseHTTPRequestHandler):
    """Answers everything as the test wants it."""

    reply: Any = None
    status = 200
    timeout = 10  # seconds for which a request is waited for

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.reply is None:
            return  # hangs up
        data = self.reply if isinstance(self.reply, bytes) else json.dumps(self.reply).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def strange() -> Iterator[Callable[..., str]]:
    """A server that answers everything in one way: its URL."""
    servers = []

    def start(status: int, reply: Any, base: type[Strange] = Strange) -> str:
        handler = type("Handler", (base,), {"status": status, "reply": reply})
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refusal(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "code": code}}


@pytest.mark.parametrize(
    ("status", "reply", "code", "text"),
    [
        (200, {"result": {"version": "99.0"}}, 2, "the server is gridprune 99.0, this is 0."),
        (503, refusal("loading", "the model is being loaded"), 1, "the model is being loaded; try again soon"),
        (401, refusal("invalid_api_key", "the API key is missing or wrong"), 2, "give its --api-key"),
        (404, b"not found", 2, "no gridprune server that this version can ask"),
        (200, b"<html>", 1, "answered in a way that this version does not know"),
        (200, b"", 1, "ended the connection before it had answered"),
        (200, None, 1, "ended the connection before it had answered"),
        (413, refusal("body_too_large", "the body has more than 9 bytes"), 2, "9 bytes; raise its --max-upload"),
        (500, b"oops", 1, "answered with status 500"),
    ],
)
def test_a_server_that_can_not_be_worked_with_is_named_in_one_line(command, strange, status, reply, code, text):
    url = strange(status, reply)
    result, out, err = command("ask", SCENE, QUESTION, "--server", url)
    assert (result, out, err.count("\n")) == (code, "", 1)
    assert err.startswith(f"gridprune: {url}: ")
    assert text in err


def test_a_busy_server_is_asked_again(strange):
    replies = [(429, refusal("too_many_waiting", "too many")), (200, {"result": 1})]

    class Busy(Strange):
        def do_POST(self) -> None:
            self.status, self.reply = replies.pop(0)
            super().do_POST()

        def end_headers(self) -> None:
            self.send_header("Retry-After", "0")
            super().end_headers()

    url = strange(0, None, Busy)
    assert list(Connection(parse_address(url)).post("/", {})) == [{"result": 1}]
    assert not replies


def test_a_batch_ends_with_its_server(command, strange, tmp_path):
    """What no line can be answered by is no fault of a line."""
    remote = RemotePipeline(Connection(parse_address(strange(200, None))), SESSION_OF_SCENES, True, True, True)
    request = RemoteRequest((SCENE,), QUESTION, {})
    with pytest.raises(ServerFault, match="ended the connection"):
        list(remote.map(remote.run, [request] * 5, 2))


def test_no_line_is_written_for_what_was_not_sent_and_a_failure_of_one_line_is_that_line_s():
    """The first question fails when the server has ended already for the second, and the third is never sent."""
    remote = RemotePipeline(Connection(parse_address("http://localhost:9")), SESSION_OF_SCENES, True, True, True)
    ended, sent = threading.Event(), []

    def act(number: int) -> Any:
        sent.append(number)
        if number == 0:
            assert ended.wait(10)
            raise ServerFault("of this question", status=500)
        ended.set()
        raise ServerFault("of all")

    results = remote.map(act, [0, 1, 2, 3], 1)
    assert str(next(results)) == "of this question"
    with pytest.raises(ServerFault, match="of all"):
        next(results)
    assert sorted(sent) == [0, 1]


OBEYED = "\x1b]0;title\x07\x1b[2J\x1b[31mred"


def test_what_a_server_sends_is_shown_and_not_obeyed(strange):
    result = {"record": {}, "counts": "", "notes": [], "image_notes": [], "hits": [], "ms": {}, "remarks": []}
    lines = [{"text": piece} for piece in OBEYED] + [{"result": result | {"answer": OBEYED}}]
    url = strange(200, "\n".join(map(json.dumps, lines)).encode())
    remote = RemotePipeline(Connection(parse_address(url)), SESSION_OF_SCENES, True, True, True)
    shown = io.StringIO()
    remote.run(RemoteRequest((SCENE,), QUESTION, {}), {}, shown)
    assert shown.getvalue() == r"\x1b]0;title\x07\x1b[2J\x1b[31mred"
    figure = figure_text(SCENE, RemotePruned({}, "", (), figure=OBEYED.encode()))
    assert figure == r"\x1b]0;title\x07\x1b[2J" + "\x1b[31mred"


def test_a_server_that_is_not_there(command):
    code, out, err = command("ask", SCENE, QUESTION, "--server", "http://127.0.0.1:9")
    assert (code, out) == (1, "")
    assert err == (
        "gridprune: http://127.0.0.1:9: can't be reached (Connection refused); start it with `gridprune serve`, or "
        "take --no-server to work without one\n"
    )


def test_a_key_that_can_be_none(command):
    code, _, err = command("ask", SCENE, QUESTION, "--server", "http://127.0.0.1:9", "--api-key", "a b")
    assert (code, err) == (2, "gridprune: --api-key: must be of printable ASCII characters, without blanks\n")


@pytest.mark.parametrize("url", ["localhost:8090", "ftp://host", "http://", "http://host/x", "http://u@host", "unix:"])
def test_an_address_that_is_none(command, url):
    code, _, err = command("ask", SCENE, QUESTION, "--server", url)
    assert code == 2
    assert err == f"gridprune: --server {url}: not http://HOST:PORT, https://HOST or unix:PATH\n"


CLEAN = """
import sys
from gridprune_cli.cli.app import main
for arguments in {commands!r}:
    sys.argv = ["gridprune", *arguments]
    try:
        main()
    except SystemExit as stop:
        print(stop.code or 0, file=sys.stderr)
loaded = {{"torch", "transformers", "PIL", "numpy", "safetensors"}} & set(sys.modules)
assert not loaded, loaded
"""


def test_the_client_imports_neither_torch_nor_pillow(home, tmp_path):
    scene, file = str(SCENE), tmp_path / "questions.jsonl"
    lines = (SAMPLES / "questions.jsonl").read_text().splitlines()[:2]
    file.write_text(
        "\n".join([*lines, '{"image": "missing.png", "question": "?"}']).replace('"scene', f'"{SAMPLES}/scene')
    )
    commands = [
        ["ask", scene, QUESTION, "--save", "set", "--show", "figure.png"],
        ["ask", scene, QUESTION, "--stream", "--generation", "num_beams=1", "-q"],
        ["prune", scene, QUESTION, "-o", "set", "-q"],
        ["generate", "set", "-q"],
        ["show", scene, QUESTION, "-q"],
        ["chat", scene, "-q"],
        ["batch", str(file), "-q"],
        ["ask", scene, QUESTION, "--method-option", "zone=0"],
        ["ask", scene, QUESTION, "--save", "."],
        ["ask", scene, QUESTION, "--dtype", "float16"],
    ]
    env = os.environ | {"GRIDPRUNE_SERVER": home.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("GRIDPRUNE_CACHE_DIR")
    result = subprocess.run(
        [sys.executable, "-c", CLEAN.format(commands=commands)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    codes = [int(line) for line in result.stderr.splitlines() if line.isdecimal()]
    assert codes == [0, 0, 0, 0, 0, 0, 3, 2, 2, 2]


SESSION_OF_SCENES = {"generation": {}, "pruning": {}, "method_options": [], "model": "scenes", "fault": None}
LONG = ("--max-new-tokens", "1500", "--generation", "min_new_tokens=1500")


def test_ctrl_c_ends_the_work_of_the_server_too(home, server, tmp_path):
    reader, writer = os.pipe()
    with open(os.devnull) as null, open(tmp_path / "stderr", "wb") as err:
        env = os.environ | {"GRIDPRUNE_SERVER": home.url, "GRIDPRUNE_CACHE_DIR": str(home.cache)}
        process = server.start(
            "ask", SCENE, QUESTION, "--stream", *LONG, env=env, streams=(null.fileno(), writer, err.fileno())
        )
    os.close(writer)
    assert os.read(reader, 10)  # the answer has begun
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    os.close(reader)
    assert (tmp_path / "stderr").read_text() == ""
    remote = RemotePipeline(Connection(parse_address(home.url)), SESSION_OF_SCENES, True, True, True)
    answer = remote.run(RemoteRequest((SCENE,), QUESTION, {}), {"max_new_tokens": 8})
    assert answer.text == "red star"
    assert answer.ms["total"] < 10_000  # 1,500 tokens take longer, and would have been waited for


def test_a_batch_that_is_interrupted_goes_on_later(home, server, tmp_path, command, monkeypatch):
    lines = [json.dumps({"image": str(SCENE), "question": f"{QUESTION} {n}"}) for n in range(300)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    env = os.environ | {"GRIDPRUNE_SERVER": home.url, "GRIDPRUNE_CACHE_DIR": str(home.cache)}
    results = tmp_path / "results.jsonl"
    with open(os.devnull) as null, open(tmp_path / "stderr", "wb") as err:
        process = server.start(
            *("batch", tmp_path / "questions.jsonl", "-o", results, "--batch-size", 2),
            env=env,
            streams=(null.fileno(), 1, err.fileno()),
        )
    wait_until(lambda: results.exists() and results.read_bytes())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert f"give the same command with --resume {results}" in line
    assert 0 < results.read_text().count("\n") < len(lines)


def test_ctrl_c_while_an_answer_is_printed_ends_the_work_on_the_other_sets(home, command, monkeypatch, tmp_path):
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(home.cache))
    file, closed = tmp_path / "set", []
    assert command("prune", SCENE, QUESTION, "-o", file, "-q")[0] == 0

    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gridprune_cli.cli.generate.emit_text", interrupted)
    close = Connection.close
    monkeypatch.setattr(Connection, "close", lambda connection: closed.append(True) or close(connection))
    assert command("generate", *[file] * 9, "--server", home.url, "--batch-size", 1)[0] == 130
    assert closed


def test_what_is_under_way_ends_at_once_when_the_connection_is_closed(home):
    connection = Connection(parse_address(home.url))
    remote = RemotePipeline(connection, SESSION_OF_SCENES, True, True, True)
    options = {"max_new_tokens": 1500, "min_new_tokens": 1500}
    failures: list[GridpruneError] = []

    def ask_all() -> None:
        request = RemoteRequest((SCENE,), QUESTION, {})
        with pytest.raises(ServerFault) as fault:
            list(remote.map(lambda one: remote.run(one, options), [request] * 6, 3))
        failures.append(fault.value)

    thread = threading.Thread(target=ask_all)
    thread.start()
    wait_until(lambda: len(connection._open) == 6)  # two batches
    connection.close()
    thread.join(10)
    assert failures


def test_a_found_server_of_another_model_is_passed_over_for_pruned_sets(
    home, command, monkeypatch, tmp_path, tiny_llava
):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home.runtime))
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(home.cache))
    file = tmp_path / "set.safetensors"
    assert command("prune", SCENE, QUESTION, "-o", file, "--model", tiny_llava, "-q")[0] == 0
    code, _, err = command("generate", file, "--max-new-tokens", "2")
    assert (code, err) == (0, "working without the server that was found: it has another model\n")
    code, _, err = command("generate", file, "--server", home.url)
    assert code == 2
    assert "was made for another model" in err
    assert command("prune", SCENE, QUESTION, "-o", file, "-q")[0] == 0
    monkeypatch.setenv("GRIDPRUNE_MODEL", "of/others")  # the set's own is what counts
    assert command("generate", file) == (0, "red star\n", "")


def test_one_server_of_a_user_listens_at_the_socket(home, command, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home.runtime))
    code, _, err = command("serve", "--socket")
    assert (code, err) == (
        2,
        f"gridprune: --socket: a server of yours listens at {home.socket} already; end it first\n",
    )
    assert command("serve", "--socket", "--port", "1")[0] == 2
    home.socket.parent.chmod(0o755)
    code, _, err = command("serve", "--socket")
    home.socket.parent.chmod(0o700)
    assert code == 2
    assert "must be a folder of yours alone" in err
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/dev/null")
    assert "no place for a socket" in command("serve", "--socket")[2]


def test_a_server_that_is_killed_is_named_in_one_line(server, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        home = Home(server, Path(folder))
        reader, writer = os.pipe()
        env = os.environ | {"GRIDPRUNE_SERVER": home.url, "GRIDPRUNE_CACHE_DIR": str(home.cache)}
        with open(os.devnull) as null, open(tmp_path / "stderr", "wb") as err:
            streams = (null.fileno(), writer, err.fileno())
            wait_until(lambda: is_ready(home))
            process = server.start("ask", SCENE, QUESTION, "--stream", *LONG, env=env, streams=streams)
        os.close(writer)
        assert os.read(reader, 10)  # the answer has begun
        home.process.kill()
        assert process.wait(60) == 1
        home.process.wait(60)
        os.close(reader)
        (line,) = (tmp_path / "stderr").read_text().splitlines()
        assert line.startswith(f"gridprune: {home.url}: ended the connection before it had answered")
        home.start()  # what the killed server left is no obstacle
        assert home.process.poll() is None
        home.process.send_signal(signal.SIGTERM)
        home.process.wait(60)


@pytest.mark.parametrize(
    "error",
    [
        BadInput("must be above 0", field="keep", value=0.5, place="a.png"),
        GridpruneError("failed", value=Path("x")),
        BadInput("half a character \ud800"),
    ],
)
def test_a_failure_arrives_as_it_was(error):
    arrived = error_from_json(json.loads(json.dumps(error_to_json(error))))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
