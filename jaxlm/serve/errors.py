"""Answers in JSON, and errors in the shape that OpenAI's clients read."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

INTERNAL = "Internal error: this is a bug in the server"
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What is wrong with a request, for the person who sent it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def to_json(value: Any) -> bytes:
    """Compact JSON. A lone surrogate, which a request may hold and its answer repeat, has no UTF-8: it becomes `?`."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf8", "replace")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def busy(message: str) -> ApiError:
    """429: come again."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def unavailable(message: str, seconds: int = 5) -> ApiError:
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(seconds)})
