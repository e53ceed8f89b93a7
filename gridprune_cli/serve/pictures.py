"""Image parts of requests to the bytes of image files: from data URLs, allowed folders and hosts, or sent before."""

import base64
import binascii
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from urllib.parse import unquote, urlsplit

from gridprune_cli.errors import BadInput
from gridprune_cli.images import measure, read_image
from gridprune_cli.serve.fetching import Hosts, fetch
from gridprune_cli.serve.wire import PicturePart, Refusal

MAX_STORED = 256 << 20  # bytes of pictures that a uuid or a sha256 names; the longest unused go first


class Pictures:
    """Reads the pictures of requests.

    folders  below which `file://` may name files; links are followed before that is looked at
    hosts    from which pictures are fetched
    most     bytes of one picture

    sent  those that may be named instead of being sent again
    """

    def __init__(self, folders: Sequence[Path], hosts: Hosts, most: int):
        """Raises BadInput for a folder that is none."""
        self._folders = []
        for folder in folders:
            if not folder.is_dir():
                raise BadInput("no such folder", field="allow_folder", value=folder)
            self._folders.append(os.path.realpath(folder))
        self._hosts, self._most = hosts, most
        self.sent = SentPictures(MAX_STORED)

    def read(self, picture: PicturePart, end: float) -> bytes:
        """The bytes of an image file, whose header was looked at. `end` as of `fetch`.

        Raises Refusal, which names the place of the part.
        """
        if picture.url is None:
            assert picture.uuid is not None
            data = self.sent.get(f"uuid:{picture.uuid}")
            if data is None:
                reason = "names no picture that is still held; send its image_url once more"
                raise Refusal(
                    400, f"{picture.place}.uuid: {reason}", code="unknown_uuid", param=f"{picture.place}.uuid"
                )
            return data
        try:
            data = self._load(picture.url, end)
            measure(data)  # what is no image, or too large to be decoded, is known by its header
        except BadInput as fault:
            param = f"{picture.place}.image_url"
            raise Refusal(400, f"{param}: {fault.reason}", code="invalid_image", param=param) from fault
        except Refusal as refusal:
            param = f"{picture.place}.image_url"
            raise Refusal(refusal.status, f"{param}: {refusal.message}", code=refusal.code, param=param) from refusal
        if picture.uuid is not None:
            self.sent.put(f"uuid:{picture.uuid}", data)
        return data

    def _load(self, url: str, end: float) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return _decode(url)
        if scheme == "file":
            return self._open(url)
        if is_remote(url):
            return fetch(url, self._hosts, self._most, end)
        raise BadInput("must be a URL of scheme data, file, http or https")

    def _open(self, url: str) -> bytes:
        """A file below an allowed folder. Outside of these nothing tells whether a file is there."""
        no_path = BadInput("must be file:///PATH, an absolute path on the server")
        try:
            parsed = urlsplit(url)
            path = unquote(parsed.path)
            resolved = os.path.realpath(path)
        except ValueError as fault:  # brackets, NUL, and characters that no file name has
            raise no_path from fault
        if parsed.netloc not in ("", "localhost") or not path.startswith("/"):
            raise no_path
        if not any(os.path.commonpath([resolved, folder]) == folder for folder in self._folders):
            raise Refusal(403, "outside of the folders that the server was allowed to read", code="path_not_allowed")
        if not os.path.isfile(resolved):
            raise BadInput("no such file")
        if os.path.getsize(resolved) > self._most:
            raise BadInput(f"more than {self._most} bytes")
        data = read_image(resolved)
        if os.path.realpath(resolved) != resolved:  # a link took the place of a folder meanwhile
            raise Refusal(403, "outside of the folders that the server was allowed to read", code="path_not_allowed")
        return data


def is_remote(url: str) -> bool:
    """Whether a URL names a picture on a host, which takes the time that the host takes."""
    return url[:6].lower().startswith(("http:", "https:"))


class SentPictures:
    """Pictures that were sent, at most `most` bytes, by `uuid:` and what a client called them, and by `sha256:`.

    A uuid names what was sent with it last.
    """

    def __init__(self, most: int):
        self._most, self._size = most, 0
        self._pictures: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def get(self, name: str) -> bytes | None:
        with self._lock:
            if name in self._pictures:
                self._pictures.move_to_end(name)
            return self._pictures.get(name)

    def put(self, name: str, data: bytes) -> None:
        with self._lock:
            self._size -= len(self._pictures.pop(name, b""))
            if len(data) > self._most:
                return
            self._pictures[name] = data
            self._size += len(data)
            while self._size > self._most:
                self._size -= len(self._pictures.popitem(last=False)[1])


def _decode(url: str) -> bytes:
    """The bytes of a data URL in base64."""
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise BadInput("must be data:image/...;base64,...")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as fault:
        raise BadInput(f"no base64 ({fault})") from fault
    if not data:
        raise BadInput("the picture is empty, 0 bytes")
    return data
