"""What the commands and the server agree on: paths, how failures travel, and where a server is found by its socket."""

import os
import stat
from collections.abc import Mapping
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

from gridprune_cli.errors import BadInput, GridpruneError

SESSION = "/v1/gridprune/session"
COMMAND = "/v1/gridprune/command"
FIGURES = ("png", "plain", "colour")  # a picture file, or one for a terminal
UNKNOWN_IMAGE = "unknown_image"  # code of a refusal: an image was named by its sha256 alone, and is not held any more
_NAME = "server.sock"


class ServerFault(GridpruneError):
    """A server that can't be reached, or does not answer.

    status  of its response, where it gave one
    code    of its error object
    gone    whether nothing listens at its address
    """

    def __init__(
        self, reason: str, *, status: int | None = None, code: str | None = None, gone: bool = False, **about: Any
    ) -> None:
        super().__init__(reason, **about)
        self.status, self.code, self.gone = status, code, gone
        if status is not None and 400 <= status < 429:  # what was sent is at fault
            self.exit_code = BadInput.exit_code

    def at(self, place: str) -> "ServerFault":
        inside = super().at(place).place
        about: dict[str, Any] = {"status": self.status, "code": self.code, "gone": self.gone}
        return ServerFault(self.reason, place=inside, field=self.field, value=self.value, **about)

    @property
    def for_all(self) -> bool:
        """Whether every other request would fail the same way."""
        return self.status is None or self.status in (401, 403, 404, 503)


def installed_version() -> str:
    return version("gridprune")


def finite(value: Any) -> Any:
    """The value; nan and infinity as texts, since JSON can't hold them, and they are read from these as well."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def error_to_json(error: GridpruneError) -> dict[str, Any]:
    """A failure with its setting and place, for the other side to raise."""
    kind = "input" if isinstance(error, BadInput) else "failure"
    value = finite(error.value) if isinstance(error.value, bool | int | float | str | None) else str(error.value)
    return {"kind": kind, "reason": error.reason, "field": error.field, "value": value, "place": error.place}


def error_from_json(error: Mapping[str, Any]) -> GridpruneError:
    """The inverse of `error_to_json`. Raises KeyError for what it did not write."""
    kind = BadInput if error["kind"] == "input" else GridpruneError
    return kind(error["reason"], field=error["field"], value=error["value"], place=error["place"])


def socket_path() -> Path:
    """Where a server listens for the commands of the same user.

    $XDG_RUNTIME_DIR/gridprune/server.sock, else gridprune-UID in the folder for temporary files, UID being a number.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(base):
        return Path(base, "gridprune", _NAME)
    import tempfile

    return Path(tempfile.gettempdir(), f"gridprune-{os.getuid()}", _NAME)


def is_private(folder: Path) -> bool:
    """Whether a folder is this user's, and nobody else can put a socket into it. Raises OSError where there is none."""
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
