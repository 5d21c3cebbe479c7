"""The routes."""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxlm.serve.answers import Answer, ChatAnswer, CompletionAnswer
from jaxlm.serve.asks import Ask
from jaxlm.serve.choices import Choices, texts_of
from jaxlm.serve.errors import INTERNAL, ApiError, json_response, unavailable
from jaxlm.serve.fields import Fields, bad, check_ids, texts_or_ids
from jaxlm.serve.guard import Guard, gone, read_json
from jaxlm.serve.page import Page
from jaxlm.serve.protocol import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS, check_fields
from jaxlm.serve.readers import Client
from jaxlm.serve.rows import Job
from jaxlm.serve.service import Service


def make_app(service: Service) -> ASGIApp:
    """The server as an ASGI application."""
    routes = _Routes(service)
    table: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
        "/": ("GET", routes.page),
        "/healthz": ("GET", routes.healthz),
        "/health": ("GET", routes.healthz),
        "/metrics": ("GET", routes.metrics),
        "/v1/models": ("GET", routes.models),
        COMPLETIONS: ("POST", routes.completions),
        CHAT: ("POST", routes.chat),
        EMBEDDINGS: ("POST", routes.embeddings),
        CLASSIFY: ("POST", routes.classify),
    }
    made = [Route(path, function, methods=[method]) for path, (method, function) in table.items()]
    made.append(Route("/v1/models/{name:path}", routes.model, methods=["GET"]))
    app = Starlette(routes=made, exception_handlers={ApiError: _told, HTTPException: _refused, Exception: _failed})
    return Guard(app, service, tuple(table))


def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "what it is registered for"
    return error.response()


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "what it is registered for"
    allowed = (error.headers or {}).get("Allow")
    what = {
        404: f"there is no route {request.url.path!r:.80}",
        405: f"{request.url.path} takes {allowed}, not {request.method:.20}",
    }
    return ApiError(error.status_code, what.get(error.status_code, str(error.detail)), headers=error.headers).response()


def _failed(request: Request, error: Exception) -> Response:
    return ApiError(500, INTERNAL).response()


class _Stream(StreamingResponse):
    """Server-sent events; whatever ends them, `choices` is closed, even before the first was sent."""

    def __init__(self, answer: Answer, choices: Choices):
        self._choices = choices
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(answer.stream(choices), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._choices.close()


class _Routes:
    def __init__(self, service: Service):
        limit = service.asker.limits.max_tokens if service.asker is not None else 0
        self._service, self._page = service, Page(service.name, service.mode, bool(service.options.key), limit)

    async def page(self, request: Request) -> Response:
        return self._page.response()

    async def healthz(self, request: Request) -> Response:
        why = self._service.sick()
        return json_response(
            {"status": "ok"} if why is None else {"status": "unavailable", "reason": why}, 200 if why is None else 503
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return json_response(self._card())

    def _card(self) -> dict[str, Any]:
        s = self._service
        more = {"context": s.engine.config.context} if s.engine is not None else {}
        return {"id": s.name, "object": "model", "created": s.created, "owned_by": "jaxlm", "routes": s.routes(), **more}

    def _check_model(self, name: Any) -> None:
        if name is not None and name != self._service.name:
            raise ApiError(
                404, f"there is no model {name!r:.80}: this server has {self._service.name!r}", "model", "model_not_found"
            )

    async def _body(self, request: Request) -> dict[str, Any]:
        path = request.url.path
        if path not in self._service.routes():
            there = ", ".join(self._service.routes())
            raise ApiError(404, f"{self._service.name} cannot answer {path}: it is for {there}", code="unsupported_route")
        body = await read_json(request, self._service.options.max_body)
        self._check_model(body.get("model"))
        return body

    # --- text --------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        body = await self._body(request)
        assert self._service.asker is not None, "_body has seen that there is an engine"
        return await self._answer(request, body, self._service.asker.completion, CompletionAnswer)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        assert self._service.asker is not None, "_body has seen that there is an engine"
        return await self._answer(request, body, self._service.asker.conversation, ChatAnswer)

    async def _answer(
        self, request: Request, body: dict[str, Any], read: Callable[[dict[str, Any], Client], Ask], kind: type[Answer]
    ) -> Response:
        s = self._service
        client = _client(request, body)

        def prepare() -> tuple[Ask, Any]:
            ask = read(body, client)
            return ask, texts_of(s.texts.spelled if ask.special else s.tokenizer, ask, s.engine)

        ask, texts = await s.readers.run(client, prepare)
        answer = kind(s.name, ask, s.texts)
        choices = Choices(s.engine, texts, ask, s.metrics, s.options.timeout)
        if ask.stream:
            return _Stream(answer, choices)
        try:
            return await _unless_gone(request, answer.whole(choices))
        finally:
            choices.close()

    # --- vectors and labels --------------------------------------------------------------------

    async def embeddings(self, request: Request) -> Response:
        body = await self._body(request)
        fields, s = Fields(body), self._service

        def read() -> tuple[str, Job]:
            assert s.vectors is not None, "_body has seen that there is"
            check_fields(EMBEDDINGS, body)
            coding = fields.text("encoding_format") or "float"
            if coding not in ("float", "base64"):
                raise bad(f"encoding_format is {coding!r:.40}: it must be float or base64", "encoding_format")
            return coding, s.vectors.submit(self._inputs(fields.get("input"), "input"), "input")

        def write() -> Response:
            data = [
                {"object": "embedding", "index": i, "embedding": _coded(prediction["anchor"], coding)}
                for i, prediction in enumerate(found)
            ]
            usage = {"prompt_tokens": job.tokens, "total_tokens": job.tokens}
            return json_response({"object": "list", "data": data, "model": s.name, "usage": usage})

        coding, job = await s.readers.run(_client(request, body), read)
        found = await self._predicted(request, job)
        return await asyncio.to_thread(write)

    def _inputs(self, given: Any, name: str) -> list[dict[str, Any]]:
        """Rows of texts, or of token ids, which are read as they are: nothing is added to them."""
        made: list[dict[str, Any]] = []
        for item in texts_or_ids(given, name, self._service.options.max_texts):
            if not item:
                raise bad(f"{name} holds an empty {'text' if isinstance(item, str) else 'list of token ids'}", name)
            if not isinstance(item, str):
                check_ids(item, self._service.tokenizer.vocab_size, name)
            made.append({"text": item} if isinstance(item, str) else {"ids": item})
        return made

    async def classify(self, request: Request) -> Response:
        body = await self._body(request)
        s = self._service

        def write() -> Response:
            usage = {"prompt_tokens": job.tokens, "total_tokens": job.tokens}
            return json_response({"model": s.name, "results": found, "usage": usage})

        job = await s.readers.run(_client(request, body), self._read_classify, body)
        found = await self._predicted(request, job)
        return await asyncio.to_thread(write)

    def _read_classify(self, body: dict[str, Any]) -> Job:
        fields, s = Fields(body), self._service
        assert s.labels is not None, "_body has seen that there is"
        check_fields(CLASSIFY, body)
        if fields.get("text") is not None and fields.get("input") is not None:
            raise bad("text and input are given: they are two names of one field", "input")
        name = "input" if fields.get("input") is not None else "text"
        if fields.get(name) is None or fields.get(name) == []:
            raise bad("text is missing: give a text, or a list of texts", "text")
        rows, pairs = self._inputs(fields.get(name), name), fields.texts("pair", s.options.max_texts)
        if pairs and len(pairs) != len(rows):
            raise bad(f"pair holds {len(pairs)} texts, and {name} {len(rows)}: there must be one for each", "pair")
        if pairs and "pair" not in s.labels.task.optional:
            raise bad(f"{s.name} reads single texts: leave out pair", "pair")
        if pairs and "ids" in rows[0]:
            raise bad(f"pair is for texts: {name} holds token ids, which may be those of a pair", "pair")
        rows = [{**row, "pair": pair} for row, pair in zip(rows, pairs, strict=True)] if pairs else rows
        return s.labels.submit(rows, name)

    async def _predicted(self, request: Request, job: Job) -> list[dict[str, Any]]:
        self._service.metrics.rows.labels(request.url.path).inc(len(job.rows))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.answer), self._service.options.timeout)
        except TimeoutError:
            raise unavailable("the server was too busy for this request: try again later") from None


def _client(request: Request, body: dict[str, Any]) -> Client:
    return Client(request.client.host if request.client else "", (Fields(body).text("user") or "")[:200])


def _coded(vector: list[float], coding: str) -> Any:
    return vector if coding == "float" else base64.b64encode(np.array(vector, "<f4").tobytes()).decode()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, bytes]) -> Response:
    """The work's result, or its end as soon as the client goes away."""
    working, away = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({working, away}, return_when=asyncio.FIRST_COMPLETED)
        return Response(working.result(), media_type="application/json") if working.done() else Response(status_code=499)
    finally:
        for task in (working, away):
            task.cancel()
