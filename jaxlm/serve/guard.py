"""What stands before every route: who may ask, what is counted, and bodies within their limits."""

import asyncio
import hashlib
import hmac
import json
import time
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxlm.serve.errors import ApiError, unavailable
from jaxlm.serve.fields import bad
from jaxlm.serve.service import Service

HEALTH = ("/healthz", "/health")
OPEN = ("/", *HEALTH)
"""Routes that ask for no key."""
_BODY_S = 30.0
"""Seconds that a client has to send its body."""
_LARGE = 1 << 16
_LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """Wraps the routes: measures, and refuses before they are reached."""

    def __init__(self, app: ASGIApp, service: Service, paths: tuple[str, ...]):
        self._app, self._service, self._paths = app, service, paths
        key = service.options.key
        self._key = _digest(key.encode("utf8", "replace")) if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            self._check(Request(scope))
            await self._app(scope, receive, watched)
        except ApiError as error:
            await error.response()(scope, receive, watched)
        finally:
            route = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(route, str(status)).inc()
            self._service.metrics.seconds.labels(route).observe(time.monotonic() - began)

    def _check(self, request: Request) -> None:
        if self._key is not None:
            if request.url.path not in OPEN and not hmac.compare_digest(_digest(_bearer(request)), self._key):
                raise ApiError(
                    401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        elif self._service.options.loopback and _host(request) not in _LOCAL:
            # A page of another name that points here (DNS rebinding) would read answers with the browser's help.
            raise bad("this server answers to localhost and 127.0.0.1 alone: set an API key to serve other names")
        if self._service.draining and request.url.path not in (*HEALTH, "/metrics"):
            raise unavailable("the server is stopping")


def _digest(value: bytes) -> bytes:
    """Of one size whatever the value: comparing tells nothing of the key, not even how long it is."""
    return hashlib.sha256(value).digest()


def _bearer(request: Request) -> bytes:
    """The key that a request sends; the scheme's name may be in any case (RFC 9110, 11.1)."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _host(request: Request) -> str:
    host = request.headers.get("host", "")
    return host if host.endswith("]") else host.rpartition(":")[0] or host


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The body as a JSON object of at most `most` bytes. ApiError for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a form of another site cannot send without asking first
        raise ApiError(415, f"Content-Type is {kind!r:.60}: send application/json")
    size = request.headers.get("content-length", "")
    if size.isdecimal() and int(size) > most:
        raise _large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise _large(most)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_S:g} s", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise bad("the client went away") from None
    try:
        # A large body takes long to read: off the event loop, which streams to the others meanwhile.
        value = await asyncio.to_thread(json.loads, bytes(body)) if len(body) > _LARGE else json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise bad("the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise bad("the body must be a JSON object")
    return value


def _large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes", headers={"Connection": "close"})


async def gone(request: Request) -> None:
    """Returns when the client has gone away; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
