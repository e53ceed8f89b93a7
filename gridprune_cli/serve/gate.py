"""Who may ask, and what everybody gets to read where something fails."""

import hmac
import ipaddress
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gridprune_cli.serve.metrics import Metrics
from gridprune_cli.serve.uploads import discard
from gridprune_cli.serve.wire import Refusal, refusal_of

_log = logging.getLogger(__name__)


class Json(Response):
    """JSON in ASCII, which can hold whatever a client sent: halves of characters, too."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    key    what the header `Authorization: Bearer KEY` must say; None: nothing
    names  host names that requests may be sent to where there is no key, beside addresses and localhost. A page of
           another site, whose name was made to lead to this machine, is sent to that name
    """

    key: str | None = None
    names: tuple[str, ...] = ()

    def check(self, request: Request) -> None:
        """Raises Refusal with 401 or 403."""
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal(403, "asked by a page of another site", code="origin_not_allowed")
        if self.key is None:
            if not _is_local_name(host, self.names):
                reason = "without a key the server is asked by its address or as localhost"
                raise Refusal(403, reason, code="host_not_allowed")
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self.key.encode()):
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")


def _is_local_name(host: str, names: Collection[str]) -> bool:
    """Whether a Host header, perhaps with a port, is an address, localhost, or one of the names."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() in ("localhost", *names):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Gate:
    """The outermost layer: checks who asks, counts what is answered, and turns every failure into an error object.

    public  paths that need no key
    paths   those that are counted by name
    """

    def __init__(
        self, app: ASGIApp, access: Access, metrics: Metrics, *, public: Collection[str], paths: Collection[str]
    ):
        self._app, self._access, self._metrics = app, access, metrics
        self._public, self._paths = public, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self  # without one, Starlette's routes answer what they don't know by themselves
        request = Request(scope)
        path = scope["path"]
        started = whole = False

        async def receive_counted() -> Message:
            nonlocal whole
            message = await receive()
            whole = whole or not message.get("more_body", False)
            return message

        async def send_counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.add_request(path if path in self._paths else "other", message["status"])
            await send(message)

        try:
            if path not in self._public:
                self._access.check(request)
            await self._app(scope, receive_counted, send_counted)
        except Exception as fault:
            if not isinstance(fault, Refusal | HTTPException):
                _log.warning("unexpected %s in a request", type(fault).__name__, exc_info=fault)
            if started:  # nothing can be said any more
                raise
            response = error_response(fault)
            if not whole:
                response.headers["connection"] = "close"
                await discard(receive_counted)
            await response(scope, receive_counted, send_counted)


def error_response(fault: Exception) -> Response:
    """A failure as OpenAI's error object, with its status."""
    headers: dict[str, str] = {}
    if isinstance(fault, HTTPException):
        refusal = Refusal(fault.status_code, f"{fault.detail}; there are /v1/models and /v1/chat/completions")
        headers |= fault.headers or {}
    else:
        refusal = refusal_of(fault)
    if refusal.retry_after:
        headers["Retry-After"] = str(refusal.retry_after)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Json(refusal.to_json(), refusal.status, headers)
