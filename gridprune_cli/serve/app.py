"""The server as an ASGI application: its routes, and what starts and ends with it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from gridprune_cli.serve.chat import Chat
from gridprune_cli.serve.gate import Access, Gate, Json
from gridprune_cli.serve.metrics import CONTENT_TYPE, Metrics
from gridprune_cli.serve.page import page
from gridprune_cli.serve.pictures import Pictures
from gridprune_cli.serve.replies import models_json
from gridprune_cli.serve.uploads import Budget
from gridprune_cli.serve.wire import Refusal
from gridprune_cli.serve.work import Worker

STATS_SECONDS = 5.0  # for which a walk over the cache counts


def create_app(
    worker: Worker, pictures: Pictures, access: Access, budget: Budget, metrics: Metrics, more: Sequence[Route] = ()
) -> ASGIApp:
    """The application, with `more` routes. Its lifespan starts the worker, and waits for its last batch."""
    created = int(time.time())
    stats = CacheStats(worker, metrics)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.join)

    async def health(_: Request) -> Response:
        worker.check_ready()
        return Json({"status": "ok"})

    async def models(_: Request) -> Response:
        return Json(models_json(worker.check_ready().model, created, worker.defaults))

    async def metrics_text(_: Request) -> Response:
        gauges = {"requests_waiting": worker.waiting, "held_bytes": budget.held}
        return Response(metrics.to_text(gauges), media_type=CONTENT_TYPE)

    async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
        raise Refusal(404, "not here; there are /v1/models and /v1/chat/completions", code="not_found")

    routes = [
        Route("/", page),
        Route("/v1/chat/completions", Chat(worker, pictures, budget), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/cache/stats", stats),
        Route("/health", health),
        Route("/metrics", metrics_text),
        *more,
    ]
    router = Router(routes, redirect_slashes=False, default=not_found, lifespan=lifespan)
    return Gate(router, access, metrics, public={"/", "/health"}, paths={route.path for route in routes})


class CacheStats:
    """`/v1/cache/stats`: entries and bytes of the cache, and how many pictures since the start were found there."""

    def __init__(self, worker: Worker, metrics: Metrics):
        self._worker, self._metrics = worker, metrics
        self._looked, self._entries, self._bytes = -STATS_SECONDS, 0, 0
        self._walk = asyncio.Lock()  # so that only one goes on at a time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        store = self._worker.check_ready().store
        hits, misses = self._metrics.image_hits()
        record: dict[str, object] = {"enabled": store is not None, "hits": hits, "misses": misses}
        if store is not None:
            async with self._walk:
                if time.monotonic() - self._looked >= STATS_SECONDS:
                    sizes = await asyncio.to_thread(lambda: [entry.bytes for entry in store.entries()])
                    self._entries, self._bytes, self._looked = len(sizes), sum(sizes), time.monotonic()
            record |= {"entries": self._entries, "bytes": self._bytes, "limit": store.limit}
            record |= {"writable": store.writable}
        await Json(record)(scope, receive, send)
