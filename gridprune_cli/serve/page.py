"""The page at `/`: one file of HTML with its style and its script, which talks to this server alone."""

import base64
import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_TEXT = files("gridprune_cli.serve").joinpath("page.html").read_text("utf-8")


def _digest(element: str) -> str:
    """The source of a policy for the page's only element of this name: the digest of what is in it."""
    text = _TEXT.split(f"<{element}>")[1].split(f"</{element}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# No script but the page's own, no address but the server's, and no text that becomes markup
_POLICY = (
    "default-src 'none'",
    f"script-src {_digest('script')}",
    f"style-src {_digest('style')}",
    "img-src blob: data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


async def page(_: Request) -> Response:
    return Response(_TEXT, media_type="text/html", headers=HEADERS)
