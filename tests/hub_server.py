"""A small server that speaks the hub's protocol, as far as huggingface_hub asks it.

It serves folders as repositories, on a port of this machine, from a thread. Point HF_ENDPOINT at `endpoint`.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from functools import cache, cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A folder served as a repository, and how it behaves.

    revisions   branch or tag -> folder
    gated       whether everything but its existence needs a licence accepted
    breaks      how often the connection closes in the middle of a weight file
    stalls      how many bytes of a weight file go out at once, before the rest comes in drops; 0 for all
    """

    revisions: dict[str, Path]
    gated: bool = False
    breaks: int = 0
    stalls: int = 0

    @cached_property
    def commits(self) -> dict[str, Path]:
        """Commit -> folder. A commit is made up from the name of its branch or tag."""
        return {commit(name): folder for name, folder in self.revisions.items()}

    def find(self, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a branch, tag or commit."""
        sha = revision if revision in self.commits else commit(revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


def commit(name: str) -> str:
    """The commit that a branch or tag points at."""
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Hub:
    """The server. `requests`: method and path of each request for a model; `sent`: bytes of weights that went out."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        if parts[0] == "api" and not api:  # what the client asks about itself
            return self._json({})
        self.hub.requests.append(f"{self.command} {path}")
        parts = parts[2:] if api else parts
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            return self._fail(401, "RepoNotFound")  # as the hub does, who says not which private ones there are
        kind, revision, *rest = parts[2:] or ["revision", "main"]
        snapshot = repository.find(revision)
        if snapshot is None:
            return self._fail(404, "RevisionNotFound")
        if repository.gated and not (api and kind == "revision"):
            return self._fail(403, "GatedRepo")
        sha, folder = snapshot
        if api:
            listing = [_describe(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()]
            return self._json(listing if kind == "tree" else {"id": "/".join(parts[:2]), "sha": sha, "siblings": []})
        file = folder.joinpath(*rest)
        if not file.is_file():
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": sha})
        self._send(repository, file, {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": sha})

    def _send(self, repository: Repository, file: Path, headers: dict[str, str]) -> None:
        data = file.read_bytes()
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first:
            headers |= {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        self._begin(206 if first else 200, len(data) - first, headers | {"Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return
        if file.suffix not in (".safetensors", ".bin"):
            self.wfile.write(data[first:])
            return
        end, broken = len(data), repository.breaks > 0 and len(data) > 1 << 20
        if broken:
            repository.breaks -= 1
            end = (first + end) // 2 + 1
        try:
            while first < end:
                drop = repository.stalls and first >= repository.stalls
                piece = min(1024 if drop else 1 << 20, end - first)
                self.wfile.write(data[first : first + piece])
                first += piece
                self.hub.sent += piece
                if drop:
                    time.sleep(0.05)
        except OSError:  # the client has left
            broken = True
        self.close_connection = broken

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self._begin(200, len(data), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._begin(status, 0, {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def _begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _describe(file: Path, folder: Path) -> dict[str, Any]:
    size, digest = file.stat().st_size, _digest(file)
    entry = {"type": "file", "path": file.relative_to(folder).as_posix(), "size": size, "oid": digest[:40]}
    return entry | ({"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if size > 1 << 20 else {})
