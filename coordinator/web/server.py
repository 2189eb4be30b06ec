"""Starlette application and the uvicorn thread that serves it. Read-only: every route is a GET,
nothing is authenticated.

The listening socket is opened before the thread starts, so a taken port is an error at start and
not a line in a log. Handlers are plain functions: starlette runs them in worker threads, where a
look at the store may block.
"""

import json
import logging
import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.metrics import CONTENT_TYPE, CoordinatorMetrics
from coordinator.operations.plain import plain_from_response
from coordinator.ports import listen
from coordinator.web.status_cache import StatusCache
from protos.contract.errors import ErrorCode, MusterError

_LOGGER = logging.getLogger(__name__)
_STATIC_DIR = Path(__file__).parent / "static"
_STATIC_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
    "studies.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "favicon.svg": "image/svg+xml",
}
_SECURITY_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        b"connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_MAX_CONNECTIONS = 256
_STOP_DEADLINE_SECONDS = 5.0


class SecurityHeaders:
    """Adds the same headers to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_SECURITY_HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Pages:
    """Handlers over the status cache."""

    def __init__(self, *, cache: StatusCache, metrics: CoordinatorMetrics) -> None:
        self._cache = cache
        self._metrics = metrics
        self._content_by_name = {name: (_STATIC_DIR / name).read_bytes() for name in _STATIC_TYPES}

    def routes(self) -> list[Route]:
        """Everything that is served."""
        return [
            Route("/", self.static),
            *(Route(f"/{name}", self.static) for name in _STATIC_TYPES if name != "index.html"),
            Route("/api/v1/runs", self.runs),
            Route("/api/v1/runs/{run_id}", self.run),
            Route("/api/v1/runs/{run_id}/series", self.series),
            Route("/api/v1/runs/{run_id}/peers", self.peers),
            Route("/api/v1/runs/{run_id}/events", self.events),
            Route("/api/v1/runs/{run_id}/studies", self.studies),
            Route("/metrics", self.metrics),
            Route("/healthz", self.healthz),
        ]

    def static(self, request: Request) -> Response:
        """A file of the page."""
        name = request.url.path.lstrip("/") or "index.html"
        headers = {"cache-control": "no-cache"}
        return Response(
            self._content_by_name[name], media_type=_STATIC_TYPES[name], headers=headers
        )

    def runs(self, request: Request) -> Response:
        """All runs, newest first."""
        return _json(self._cache.runs())

    def run(self, request: Request) -> Response:
        """Head of a run."""
        return _json(self._cache.status(request.path_params["run_id"]))

    def series(self, request: Request) -> Response:
        """Curves of a run."""
        return _json(self._cache.series(request.path_params["run_id"]))

    def peers(self, request: Request) -> Response:
        """Members of a run."""
        return _json(self._cache.peers(request.path_params["run_id"]))

    def events(self, request: Request) -> Response:
        """Newest events, or those after ?after=ID."""
        after_text, max_text = (
            request.query_params.get("after", "-1"),
            request.query_params.get("max", "200"),
        )
        try:
            after_event_id, max_events = int(after_text), max(1, int(max_text))
        except ValueError as error:
            raise HTTPException(400, "after and max are whole numbers") from error
        run_id = request.path_params["run_id"]
        return _json(
            self._cache.events(run_id, after_event_id=after_event_id, max_events=max_events)
        )

    def studies(self, request: Request) -> Response:
        """Studies of a run: trials by size, curves, the law."""
        return _json(self._cache.studies(request.path_params["run_id"]))

    def metrics(self, request: Request) -> Response:
        """Prometheus text format."""
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE)

    def healthz(self, request: Request) -> Response:
        """200 while the store answers."""
        self._cache.runs()
        return PlainTextResponse("ok\n")


def build_app(*, cache: StatusCache, metrics: CoordinatorMetrics) -> Starlette:
    """The application, also for tests without a socket."""
    return Starlette(
        routes=list(Pages(cache=cache, metrics=metrics).routes()),
        middleware=[Middleware(SecurityHeaders), Middleware(GZipMiddleware, minimum_size=2_000)],
        exception_handlers={MusterError: _muster_error},  # type: ignore[dict-item]
    )


class WebServer:
    """Serves an application in its own thread and event loop between `start` and `stop`."""

    def __init__(self, app: Starlette, *, host: str, port: int) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.address = ""
        """Base address, once started."""

    def start(self) -> None:
        """Open the socket and start the thread. Raises MachineError (PORT_IN_USE)."""
        listener = listen(self._host, self._port, what="the page", flag="--http-port")
        host, port = listener.getsockname()[:2]
        shown_host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
            host, f"[{host}]" if ":" in host else host
        )
        self.address = f"http://{shown_host}:{port}"
        config = uvicorn.Config(
            self._app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
        )
        server = self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="web", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread; open answers get a second."""
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(_STOP_DEADLINE_SECONDS)
        if self._thread.is_alive():
            _LOGGER.warning("the web thread did not end within %.0f s", _STOP_DEADLINE_SECONDS)


def _json(response: object) -> Response:
    body = json.dumps(plain_from_response(response), allow_nan=False).encode()
    return Response(body, media_type="application/json", headers={"cache-control": "no-store"})


def _muster_error(request: Request, error: MusterError) -> Response:
    status_code = 404 if error.code is ErrorCode.UNKNOWN_RUN else 503
    parts = {
        "found": error.found,
        "allowed": error.allowed,
        "remedy": error.remedy,
        "code": int(error.code),
    }
    return JSONResponse(parts, status_code=status_code)
