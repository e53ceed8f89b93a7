"""The page at `/`: its headers, and in a headless Chromium what it asks, what it draws, and that text stays text."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browser import CHROMIUM, Browser
from PIL import Image
from served import SAMPLES, chat_body, wait_until
from served import ask as post

from gridprune_cli.choices import list_methods
from gridprune_cli.tokens import load_pruned

KEY = "s3cret"
QUESTION = "Which object has the T?"
HOSTILE = "</textarea><img src=x onerror=alert(1)><script>alert(2)</script>\u202e&amp;\x1b[31m"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; on Debian, apt-get install chromium")


@pytest.fixture(scope="module")
def port(server, tmp_path_factory) -> Iterator[int]:
    """Of a server with the embedded model, which asks for a key."""
    folder = tmp_path_factory.mktemp("page")
    with open(folder / "stderr", "wb") as err, open(os.devnull) as null:
        process = server.start(
            *("serve", "--port", 0, "--api-key", KEY),
            streams=(null.fileno(), 1, err.fileno()),
            env=os.environ | {"GRIDPRUNE_CACHE_DIR": str(folder / "cache")},
        )
    wait_until(lambda: (folder / "stderr").read_text().count("\n"))
    number = int(re.search(r"127\.0\.0\.1:(\d+)", (folder / "stderr").read_text())[1])
    wait_until(lambda: httpx2.get(f"http://127.0.0.1:{number}/health").status_code == 200)
    yield number
    process.kill()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    with contextlib.closing(Browser(tmp_path_factory.mktemp("profile"))) as browser:
        yield browser


@pytest.fixture
def page(chromium, port) -> Iterator[Browser]:
    """The browser with the page, which has got the key. Nothing may fail in it, and it may call nobody else."""
    chromium.resize(1280, 900)
    chromium.open(f"http://127.0.0.1:{port}/")
    chromium.wait("!document.querySelector('#key-form').hidden")
    unlock(chromium, KEY)
    chromium.wait("document.querySelector('#method').options.length")
    chromium.of("Log.entryAdded")
    chromium.events.clear()  # that without a key models aren't told is an error in its log
    yield chromium
    chromium.call("Fetch.disable")
    for kind in (
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
        "Log.entryAdded",
        "Page.javascriptDialogOpening",
    ):
        assert chromium.of(kind) == []
    urls = [event["request"]["url"] for event in chromium.of("Network.requestWillBeSent")]
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")) for url in urls)


def unlock(page: Browser, key: str) -> None:
    page.evaluate("document.querySelector('#key').focus()")
    page.call("Input.insertText", text=key)
    page.press("Enter", 13, "\r")


def choose(page: Browser, path: Path) -> None:
    page.choose(path)
    page.wait("!document.querySelector('#shown').hidden && document.activeElement.id === 'question'")


def ask(page: Browser, question: str = QUESTION) -> None:
    """Types a question and sends it, by the keyboard."""
    page.evaluate("document.querySelector('#question').select()")
    page.call("Input.insertText", text=question)
    page.press("Enter", 13, "\r")


def wait_idle(page: Browser) -> None:
    page.wait("document.querySelector('#stop').hidden && !document.querySelector('#results').hidden")


def chat_requests(page: Browser) -> list[dict[str, Any]]:
    """The bodies of what was asked so far."""
    sent = [event["request"] for event in page.of("Network.requestWillBeSent")]
    return [json.loads(request["postData"]) for request in sent if request["url"].endswith("/v1/chat/completions")]


class Stub:
    """Answers what the page asks of the model, in the server's place."""

    def __init__(self, page: Browser):
        self._page, self._taken = page, 0
        page.call("Fetch.enable", patterns=[{"urlPattern": "*/v1/chat/completions"}])

    def next(self) -> tuple[str, dict[str, Any]]:
        """The next request: what the browser calls it, and its body."""
        self._page.wait(lambda: len(self._page.of("Fetch.requestPaused")) > self._taken)
        event = self._page.of("Fetch.requestPaused")[self._taken]
        self._taken += 1
        return event["requestId"], json.loads(event["request"]["postData"])

    @property
    def waiting(self) -> int:
        """Requests that came since."""
        return len(self._page.of("Fetch.requestPaused")) - self._taken

    def send(self, ident: str, *values: Any, status: int = 200) -> None:
        """Answers a request with events of a stream, or with an error."""
        text = "".join(f"data: {json.dumps(value)}\n\n" for value in values) if status == 200 else json.dumps(values[0])
        body = base64.b64encode(text.encode()).decode()
        self._page.call("Fetch.fulfillRequest", requestId=ident, responseCode=status, body=body)

    def answer(self, ident: str, text: str, **record: Any) -> None:
        whole = {"role": "assistant", "content": text}
        self.send(ident, chunk(whole), chunk({}) | {"gridprune": RECORD | record}, {"choices": [], "usage": USAGE})


def chunk(delta: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta}]}


USAGE = {"prompt_tokens": 9, "completion_tokens": 2}
FIGURE = {
    "views": [{"rows": 2, "cols": 2, "box": [0, 0, 1, 1]}],
    "kept": [1],
    "relevance": [0, 1, 0.5, 0],
    "zones": [[0, 0, 0, 2, 2, 1]],
    "region": [0, 0, 3, 7],
}
RECORD = {
    "tokens": {"full": 4, "kept": 1},
    "inside": None,
    "cache": "hit",
    "ms": {"wait": 0, "prune": 1, "prefill": 2, "decode": 3, "total": 6},
    "notes": [],
    "figure": FIGURE,
}


def as_command(command: Callable[..., Any], tmp_path: Path, *options: object) -> tuple[dict[str, Any], list[int]]:
    """What `ask` answers about the first scene, and the tokens that `prune` keeps for that."""
    code, printed, _ = command("ask", SAMPLES / "scene-1.png", QUESTION, "--json", *options)
    assert code == 0
    code, _, _ = command("prune", SAMPLES / "scene-1.png", QUESTION, "-o", tmp_path / "kept.safetensors", *options)
    assert code == 0
    return json.loads(printed), load_pruned(tmp_path / "kept.safetensors").kept.tolist()


def drawn_tokens(page: Browser, rows: int, cols: int) -> list[int]:
    """The tokens that the drawing leaves bright: those whose middle has the picture's own pixels."""

    def pixels(layer: str) -> list[list[int]]:
        page.evaluate(f"document.querySelector('#layer-{layer}').click()")
        return page.evaluate(f"""(() => {{
            const canvas = document.querySelector("canvas");
            const [width, height] = [canvas.width - 12, canvas.height - 12];  // without the margin of 6 pixels
            const copy = new OffscreenCanvas(canvas.width, canvas.height);
            const context = copy.getContext("2d", {{willReadFrequently: true}});
            context.drawImage(canvas, 0, 0);
            const cells = [];
            for (let row = 0; row < {rows}; row++) for (let col = 0; col < {cols}; col++) {{
                const middle = [6 + (col + 0.5) / {cols} * width - 4, 6 + (row + 0.5) / {rows} * height - 4];
                cells.push([...context.getImageData(...middle.map(Math.round), 8, 8).data]);
            }}
            return cells;
        }})()""")

    pairs = zip(pixels("picture"), pixels("kept"), strict=True)
    return [token for token, (plain, drawn) in enumerate(pairs) if plain == drawn]


def point_at(page: Browser, token: int, rows: int, cols: int) -> None:
    """Moves the pointer to the middle of a token of the only view."""
    box = page.evaluate("document.querySelector('canvas').getBoundingClientRect().toJSON()")
    x = box["x"] + 6 + (token % cols + 0.5) / cols * (box["width"] - 12)
    y = box["y"] + 6 + (token // cols + 0.5) / rows * (box["height"] - 12)
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait("document.querySelector('#token').textContent")


# ---- without a browser -----------------------------------------------------------------------------------------------


def test_the_page_runs_its_script_alone_and_talks_to_its_server_alone(port):
    reply = httpx2.get(f"http://127.0.0.1:{port}/")
    assert reply.status_code == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
    for name in ("script", "style"):
        (inside,) = re.findall(f"<{name}>(.*?)</{name}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["require-trusted-types-for"] == "'script'"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert not [name for name in reply.headers if name.startswith("access-control-")]
    assert httpx2.post(f"http://127.0.0.1:{port}/").status_code == 405
    assert httpx2.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401  # the page alone needs no key


def test_the_page_names_no_other_address_and_makes_no_markup_of_text():
    text = files("gridprune_cli.serve").joinpath("page.html").read_text("utf-8")
    assert set(re.findall(r"https?://[^'\"\s]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|\son\w+=", text)


def test_models_say_what_the_page_offers(port):
    reply = httpx2.get(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    expected = {"methods": [*list_methods()], "keep": 0.11, "method": "gridprune"}
    assert reply.json()["data"][0]["gridprune"] == expected


def test_the_figure_of_several_pictures_is_that_of_each(port):
    def figure(*images: str) -> Any:
        body = chat_body(QUESTION, *images, gridprune={"figure": True}, max_tokens=1)
        reply = post(port, body, Authorization=f"Bearer {KEY}").json()
        assert "figure" not in reply["gridprune"]["options"]
        return reply["gridprune"]["figure"]

    single = [figure("scene-1.png"), figure("scene-2.png")]
    assert figure("scene-1.png", "scene-2.png") == single
    for values in single:
        assert len(values["kept"]) == 28 and len(values["relevance"]) == 256
        assert sum(budget for *_, budget in values["zones"]) == 28
        for _, row0, col0, row1, col1, budget in values["zones"]:
            inside = [n for n in values["kept"] if row0 <= n // 16 < row1 and col0 <= n % 16 < col1]
            assert len(inside) == budget


# ---- in a browser ----------------------------------------------------------------------------------------------------


@in_browser
def test_it_answers_as_ask_does_and_draws_what_prune_keeps(page, command, tmp_path):
    choose(page, SAMPLES / "scene-1.png")
    ask(page)
    wait_idle(page)
    expected, kept = as_command(command, tmp_path)
    assert page.text("#answer-pruned .text") == expected["answer"] == "red star"
    assert page.text("#answer-pruned h2") == f"Pruned: {len(kept)} of 256"
    assert page.text("#keep-value") == "11 % · 28 of 256"
    assert "28 kept" in page.text("#legend") and "contextual region" in page.text("#legend")
    assert drawn_tokens(page, *expected["grid"]) == kept
    point_at(page, kept[0], *expected["grid"])
    assert page.text("#token").startswith(f"Row {kept[0] // 16 + 1}, column {kept[0] % 16 + 1}: kept, relevance ")
    # a key of the keyboard moves the slider, which asks again, without the picture
    page.evaluate("document.querySelector('#keep').focus()")
    page.press("ArrowRight", 39)
    page.wait("document.querySelector('#answer-pruned h2').textContent === 'Pruned: 31 of 256'")
    wait_idle(page)
    expected, kept = as_command(command, tmp_path, "--keep", "0.12")
    assert page.text("#answer-pruned .text") == expected["answer"]
    assert drawn_tokens(page, *expected["grid"]) == kept
    first, second = (request["messages"][0]["content"][0] for request in chat_requests(page))
    assert first["image_url"]["url"].startswith("data:image/png;base64,")
    assert second == {"type": "image_url", "uuid": first["uuid"]}


@in_browser
def test_all_tokens_beside_the_kept_ones(page, command, tmp_path):
    choose(page, SAMPLES / "scene-1.png")
    page.evaluate("document.querySelector('#compare').click()")
    ask(page)
    wait_idle(page)
    expected, _ = as_command(command, tmp_path, "--keep", "1.0")
    assert page.text("#answer-full .text") == expected["answer"]
    assert page.text("#answer-full h2") == "All tokens: 256"
    cells = page.evaluate(
        "[...document.querySelectorAll('#numbers tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )
    numbers = {title: values for title, *values in cells}
    assert numbers["Visual tokens"] == ["28 of 256", "256 of 256"]
    few, many = map(int, numbers["Prompt tokens"])
    assert many - few == 256 - 28
    assert all(re.fullmatch(r"\d+(\.\d)? ms( \*)?", value) for value in numbers["Prefill"] + numbers["In all"])
    assert page.text("#verdict") == "The same answer, with 89 % fewer visual tokens."
    # another share asks for the kept ones alone: all tokens are known
    page.evaluate("document.querySelector('#keep').focus()")
    page.press("ArrowRight", 39)
    page.wait("document.querySelector('#answer-pruned h2').textContent === 'Pruned: 31 of 256'")
    wait_idle(page)
    assert [request["gridprune"]["keep"] for request in chat_requests(page)] == [0.11, 1, 0.12]


@in_browser
def test_a_moving_slider_asks_once_and_ends_what_was_asked_before(page):
    choose(page, SAMPLES / "scene-2.png")
    stub = Stub(page)
    ask(page)
    stub.next()
    page.evaluate("document.querySelector('#keep').focus()")
    for _ in range(5):
        page.press("ArrowRight", 39)
    ident, body = stub.next()
    assert body["gridprune"]["keep"] == 0.16 and stub.waiting == 0
    assert [event["canceled"] for event in page.of("Network.loadingFailed")] == [True]
    stub.answer(ident, "it")
    wait_idle(page)
    assert page.text("#answer-pruned .text") == "it" and len(chat_requests(page)) == 2
    page.evaluate("document.querySelector('#ask').click()")
    stub.next()
    page.evaluate("document.querySelector('#stop').click()")
    page.wait("document.querySelector('#stop').hidden")
    assert page.text("#answer-pruned .text") == "it"  # what was known


@in_browser
def test_hostile_names_questions_answers_and_errors_stay_text(page, tmp_path):
    path = tmp_path / HOSTILE.replace("/", "")
    shutil.copy(SAMPLES / "scene-1.png", path)
    choose(page, path)
    elements = page.evaluate("document.querySelectorAll('*').length")
    stub = Stub(page)
    assert page.text("#name") == path.name
    ask(page, HOSTILE)
    ident, body = stub.next()
    typed = body["messages"][0]["content"][1]["text"]
    assert typed == HOSTILE
    stub.answer(ident, HOSTILE, notes=[HOSTILE])
    wait_idle(page)
    assert page.text("#asked") == typed
    assert page.text("#answer-pruned .text") == page.text("#notes li") == HOSTILE
    page.evaluate("document.querySelector('#ask').click()")
    ident, _ = stub.next()
    page.evaluate("document.querySelector('#fault').textContent = ''")
    stub.send(ident, chunk({"content": "so far"}), {"error": {"message": HOSTILE, "code": "internal_error"}})
    page.wait("document.querySelector('#fault').textContent")
    assert page.text("#fault") == HOSTILE
    assert (
        page.evaluate("document.images.length + document.querySelectorAll('#results script, main script').length") == 0
    )
    assert page.evaluate("document.querySelectorAll('*').length") > elements  # the answer's own
    # and where something slipped through, the policy would hold it
    assert (
        page.evaluate("(() => { try { document.body.innerHTML = 'x' } catch (fault) { return fault.name } })()")
        == "TypeError"
    )
    script = "document.head.append(Object.assign(document.createElement('base'), {href: 'http://127.0.0.2/'}))"
    assert page.evaluate(f"{script}, document.baseURI.startsWith('http://127.0.0.1:')")
    assert "Content Security Policy" in str(page.of("Log.entryAdded"))
    page.events.clear()


@in_browser
def test_the_picture_that_came_last_stays(page):
    """Also where the browser needs longer for the one before it."""
    page.evaluate("""(() => {
        const decode = window.createImageBitmap, released = new Promise((resolve) => { window.release = resolve; });
        window.createImageBitmap = async (file) => {
            if (file.name === "scene-1.png") await released;
            return decode(file);
        };
    })()""")
    page.choose(SAMPLES / "scene-1.png")
    choose(page, SAMPLES / "scene-2.png")
    page.evaluate("release(), new Promise((resolve) => setTimeout(resolve, 100))")
    assert page.text("#name") == "scene-2.png"


@in_browser
def test_what_was_chosen_stays_where_the_key_is_asked_for_again(page):
    choose(page, SAMPLES / "scene-1.png")
    stub = Stub(page)
    page.evaluate("document.querySelector('#keep').value = 30, document.querySelector('#method').value = 'uniform'")
    ask(page)
    ident, body = stub.next()
    assert (body["gridprune"]["keep"], body["gridprune"]["method"]) == (0.3, "uniform")
    stub.send(ident, {"error": {"message": "the key is wrong", "code": "invalid_api_key"}}, status=401)
    page.wait("!document.querySelector('#key-form').hidden")
    unlock(page, KEY)
    page.wait("document.querySelector('#key-form').hidden")
    assert page.evaluate("[document.querySelector('#keep').value, document.querySelector('#method').value]") == [
        "30",
        "uniform",
    ]
    page.of("Log.entryAdded")
    page.events.clear()  # the browser logs the 401


@in_browser
def test_a_picture_that_the_server_lost_is_sent_again(page):
    choose(page, SAMPLES / "scene-3.png")
    stub = Stub(page)
    ask(page)
    stub.answer(stub.next()[0], "one")
    wait_idle(page)
    page.evaluate("document.querySelector('#ask').click()")
    ident, body = stub.next()
    assert "image_url" not in body["messages"][0]["content"][0]
    stub.send(ident, {"error": {"message": "not held", "code": "unknown_uuid"}}, status=400)
    ident, body = stub.next()
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:")
    stub.answer(ident, "two")
    page.wait("document.querySelector('#answer-pruned .text').textContent === 'two'")
    page.of("Log.entryAdded")
    page.events.clear()  # the browser logs the 400


@in_browser
def test_views_that_overlap_are_drawn_apart_and_without_relevance_there_is_no_map(page):
    views = [[0, 0, 1, 1], [0, -0.25, 0.5, 1.25], [0.5, -0.25, 1, 1.25]]
    choose(page, SAMPLES / "scene-4.png")
    stub = Stub(page)
    ask(page)
    figure = {
        "views": [{"rows": 2, "cols": 2, "box": box} for box in views],
        "kept": [0, 5, 11],
        "relevance": None,
        "zones": [],
        "region": None,
    }
    inside = {"stages": [{"layer": 2, "keep": [3]}], "tokens": [12, 12, 3], "mean": 9}
    stub.answer(stub.next()[0], "it", figure=figure, tokens={"full": 12, "kept": 3}, inside=inside)
    wait_idle(page)
    captions = page.evaluate("[...document.querySelectorAll('figcaption')].map(caption => caption.textContent)")
    assert captions == ["View 1", "Views 2-3"]
    size = "(() => {{ const c = document.querySelectorAll('canvas')[{}]; return (c.width - 12) / (c.height - 12) }})()"
    assert page.evaluate(size.format(1)) == pytest.approx(1 / 1.5, abs=0.02)  # with what the tiles pad
    assert page.evaluate("document.querySelector('#layer-relevance').disabled")
    assert "contextual region" not in page.text("#legend") and "zone" not in page.text("#legend")
    assert page.text("#answer-pruned h2") == "Pruned: 3 of 12, 3 from layer 2 on"


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(page, tmp_path, dark):
    path = tmp_path / f"{'n' * 200}.png"
    Image.new("RGB", (1200, 300)).save(path)
    page.resize(360, 740, dark=dark, scale=2, mobile=True)
    choose(page, path)
    page.evaluate("document.querySelector('#compare').click()")
    stub = Stub(page)
    ask(page, "w" * 300)
    for keep in (0.11, 1):
        ident, body = stub.next()
        assert body["gridprune"]["keep"] == keep
        stub.answer(ident, "w" * 300, notes=["w" * 300])
    wait_idle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == dark


@in_browser
def test_pictures_are_dropped_and_pasted_and_what_is_none_is_named(page, tmp_path):
    drop = """
        new Promise((done) => Object.assign(document.createElement("canvas"), {{width: 32}}).toBlob((blob) => {{
            const data = new DataTransfer();
            data.items.add(new File([blob], "{name}", {{type: "image/png"}}));
            {event}
            done();
        }}))"""
    page.evaluate(drop.format(name="dropped.png", event="dispatchEvent(new DragEvent('drop', {dataTransfer: data}));"))
    page.wait("document.querySelector('#name').textContent === 'dropped.png'")
    page.evaluate(
        drop.format(name="pasted.png", event="dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));")
    )
    page.wait("document.querySelector('#name').textContent === 'pasted.png'")
    (tmp_path / "<b>none.png").write_text("no picture")
    page.choose(tmp_path / "<b>none.png")
    page.wait("!document.querySelector('#picture-fault').hidden")
    assert page.text("#picture-fault").startswith("<b>none.png: no picture")
    assert page.text("#name") == "pasted.png"


@in_browser
def test_a_wrong_key_is_asked_for_again_and_none_is_left_behind(page):
    page.call("Page.reload")
    page.wait("document.readyState === 'complete' && !document.querySelector('#key-form').hidden")
    unlock(page, "other")
    page.wait("document.querySelector('#status').textContent === 'the key is wrong'")
    assert page.evaluate(
        "document.querySelector('#ask').disabled && document.querySelector('#method').options.length === 0"
    )
    unlock(page, KEY)
    page.wait("document.querySelector('#status').textContent === 'model scenes'")
    fields = ["localStorage.length", "sessionStorage.length", "document.cookie", "document.querySelector('#key').value"]
    assert [page.evaluate(field) for field in fields] == [0, 0, "", ""]
    page.of("Log.entryAdded")
    page.events.clear()  # the browser logs each 401
