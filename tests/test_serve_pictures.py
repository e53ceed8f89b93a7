"""Where the pictures of a request may come from: nowhere that was not named."""

import base64
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gridprune_cli.errors import BadInput
from gridprune_cli.serve import fetching
from gridprune_cli.serve.fetching import Hosts, fetch
from gridprune_cli.serve.pictures import Pictures, SentPictures
from gridprune_cli.serve.wire import PicturePart, Refusal

SCENE = (Path(__file__).parent.parent / "sample_images" / "scene-1.png").read_bytes()
MOST = 1 << 20


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def part_of(url: str | None, uuid: str | None = None) -> PicturePart:
    return PicturePart("messages[0].content[1]", url, uuid)


def read(pictures: Pictures, url: str | None, uuid: str | None = None) -> bytes:
    return pictures.read(part_of(url, uuid), time.monotonic() + fetching.SECONDS)


def refusal(pictures: Pictures, url: str | None, uuid: str | None = None) -> tuple[int, str | None]:
    with pytest.raises(Refusal) as fault:
        read(pictures, url, uuid)
    assert fault.value.message.startswith("messages[0].content[1].")
    return fault.value.status, fault.value.code


@pytest.fixture
def pictures() -> Pictures:
    return Pictures([], Hosts([]), MOST)


def test_a_data_url(pictures):
    assert read(pictures, data_url(SCENE)) == SCENE


def png(width: int, height: int) -> bytes:
    """A PNG that says it is of this size, and holds nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


@pytest.mark.parametrize(
    "url",
    [
        data_url(b""),
        data_url(b"no image"),
        data_url(png(60_000, 60_000)),  # a bomb
        "data:image/png;base64,@@@@",
        "data:image/png;base64,A",
        "data:image/png,abc",
        "data:",
        "ftp://host/picture.png",
        "picture.png",
        "-",
        "\ud800",
        "file://[",
        "file:///\ud800",
    ],
)
def test_what_is_no_picture(pictures, url):
    assert refusal(pictures, url) == (400, "invalid_image")


def test_a_uuid_names_a_picture_that_was_sent(pictures):
    assert refusal(pictures, None, "a") == (400, "unknown_uuid")
    read(pictures, data_url(SCENE), "a")
    assert read(pictures, None, "a") == SCENE
    other = SCENE + b"\0"
    assert read(pictures, data_url(other), "a") == other == read(pictures, None, "a")
    assert (
        refusal(pictures, data_url(b"no image"), "a") == (400, "invalid_image") and read(pictures, None, "a") == other
    )


def test_pictures_that_were_sent_are_bounded():
    sent = SentPictures(10)
    sent.put("a", b"1234")
    sent.put("b", b"1234")
    assert sent.get("a") == b"1234"  # so that b is the longest unused
    sent.put("c", b"1234")
    assert (sent.get("a"), sent.get("b"), sent.get("c")) == (b"1234", None, b"1234")
    sent.put("a", b"x" * 11)
    assert (sent.get("a"), sent.get("c")) == (None, b"1234")
    sent.put("d", b"123456")
    assert (sent.get("c"), sent.get("d")) == (b"1234", b"123456")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """An allowed folder, with a picture in it, beside a folder that is not allowed."""
    for name in ("open", "open/below", "open-not", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a b.png").write_bytes(SCENE)
    (tmp_path / "open/link.png").symlink_to(tmp_path / "closed/a b.png")
    (tmp_path / "open/folder").symlink_to(tmp_path / "closed")
    (tmp_path / "open/inside.png").symlink_to(tmp_path / "open/below/a b.png")
    (tmp_path / "open/text.png").write_text("no image")
    (tmp_path / "open/large.png").write_bytes(SCENE + bytes(MOST))
    return tmp_path


@pytest.mark.parametrize("path", ["open/a%20b.png", "open/below/a b.png", "open/inside.png", "open/below/../a%20b.png"])
def test_files_in_an_allowed_folder(folder, path):
    pictures = Pictures([folder / "open"], Hosts([]), MOST)
    assert read(pictures, f"file://{folder}/{path}") == SCENE
    assert read(pictures, f"file://localhost{folder}/{path}") == SCENE


@pytest.mark.parametrize(
    "path",
    [
        *("closed/a%20b.png", "open/../closed/a%20b.png", "open/%2e%2e/closed/a%20b.png", "open/link.png"),
        *("open/folder/a%20b.png", "open-not/a%20b.png", "closed/none.png", "open/../../../../../../etc/passwd", ""),
    ],
)
def test_files_elsewhere_also_by_dots_and_links(folder, path):
    pictures = Pictures([folder / "open"], Hosts([]), MOST)
    assert refusal(pictures, f"file://{folder}/{path}") == (403, "path_not_allowed")
    assert refusal(Pictures([], Hosts([]), MOST), f"file://{folder}/open/a%20b.png") == (403, "path_not_allowed")


@pytest.mark.parametrize("path", ["open/none.png", "open/below", "open/text.png", "open/%00.png", "open/large.png"])
def test_what_is_no_picture_in_an_allowed_folder(folder, path):
    assert refusal(Pictures([folder / "open"], Hosts([]), MOST), f"file://{folder}/{path}") == (400, "invalid_image")
    for url in (f"file://host{folder}/open/a%20b.png", "file:open/a.png", "file:///" + "x" * 5000):
        assert refusal(Pictures([folder / "open"], Hosts([]), MOST), url)[0] in (400, 403)


def test_a_folder_that_is_none_can_not_be_allowed(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        Pictures([tmp_path / "none"], Hosts([]), MOST)


# ---- hosts -----------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `/to?URL` redirects there."""

    def do_GET(self) -> None:
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        body = b"x" * (2 * MOST) if self.path == "/large" else SCENE
        self.send_response(404 if self.path == "/missing" else 200)
        if self.path == "/cut":
            self.send_header("Content-Length", str(len(body) + 10))
        self.end_headers()
        self.wfile.write(body)
        if self.path == "/slow":
            threading.Event().wait(2)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_picture_from_an_allowed_host(host):
    pictures = Pictures([], Hosts([host]), MOST)
    assert read(pictures, f"http://{host}/a.png") == SCENE
    assert read(pictures, f"http://{host}/to?/b.png") == SCENE
    assert read(pictures, f"http://{host}/to?http://{host}/to?/c.png") == SCENE


@pytest.mark.parametrize("path", ["/missing", "/large", "/cut", "/to?/to?/to?/to?/to?/a.png", "/to?//[", "/ä"])
def test_what_a_host_may_not_answer(host, path):
    assert refusal(Pictures([], Hosts([host]), MOST), f"http://{host}{path}") == (400, "invalid_image")


def test_a_host_that_takes_too_long(host, monkeypatch):
    monkeypatch.setattr(fetching, "SECONDS", 0.3)
    assert refusal(Pictures([], Hosts([host]), MOST), f"http://{host}/slow") == (400, "invalid_image")


def test_a_host_that_takes_too_long_to_connect_to(host, monkeypatch):
    """Then there is no connection yet that could be hung up."""
    connect, ends = socket.create_connection, []

    def create_connection(address: tuple[str, int], timeout: float) -> socket.socket:
        assert timeout <= fetching.SECONDS
        time.sleep(max(0.0, ends[0] - time.monotonic()))
        return connect(address, timeout)

    monkeypatch.setattr(fetching, "SECONDS", 0.3)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    ends.append(time.monotonic() + 0.4)
    start = time.monotonic()
    assert refusal(Pictures([], Hosts([host]), MOST), f"http://{host}/slow") == (400, "invalid_image")
    assert time.monotonic() - start < 1.5  # the host takes 2 s


def test_other_hosts_and_ports_are_not_asked(host):
    nobody, somebody = Pictures([], Hosts([]), MOST), Pictures([], Hosts([host, "example.org"]), MOST)
    closed = (403, "host_not_allowed")
    assert refusal(nobody, f"http://{host}/a.png") == closed
    for url in (
        *("http://127.0.0.1/a.png", "http://127.0.0.1:1/a.png", "http://localhost/a.png", "https://example.com/"),
        *(
            f"http://ann@{host}/a.png",
            f"http://{host}/to?http://169.254.169.254/latest",
            f"http://{host}/to?file:///etc",
        ),
        *(f"http://{host}/to?http://127.0.0.1:1/", "http://[::1]/", "http://2130706433/", "http:///a.png"),
    ):
        assert refusal(somebody, url) == closed, url


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "fe80::1%1"])
def test_a_name_that_leads_inside_is_not_asked(monkeypatch, address):
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))]
    public = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: public + resolved)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(Refusal, match="address inside"):
        fetch("http://example.org/a.png", Hosts(["example.org"]), MOST, time.monotonic() + 30)
    if "%" not in address:  # named by itself, it is allowed
        named = f"[{address}]" if ":" in address else address
        assert Hosts(["example.org", named]).resolve("example.org", 80) in (address, "93.184.215.14")


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(host, monkeypatch):
    """A name whose second answer would lead elsewhere is looked up once."""
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers.pop())
    asked = []

    def create_connection(address, **options):
        asked.append(address)
        sock = socket.socket()
        sock.connect(address)
        return sock

    monkeypatch.setattr(socket, "create_connection", create_connection)
    name, port = "pictures.example.org", host.rpartition(":")[2]
    hosts = Hosts([f"{name}:{port}", host])
    assert fetch(f"http://{name}:{port}/a.png", hosts, MOST, time.monotonic() + 30) == SCENE
    assert asked == [("127.0.0.1", int(port))]


@pytest.mark.parametrize("name", ["", "http://host", "host:port", "host/path", "ann@host", "host:99999999"])
def test_what_names_no_host(name):
    with pytest.raises(BadInput, match="not HOST"):
        Hosts([name])
