"""A server from its start to its end: what is asked to stop lets running texts end."""

import asyncio
import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from jaxlm.models import load_model
from jaxlm.report.console import say
from jaxlm.serve.app import make_app
from jaxlm.serve.options import ServeOptions
from jaxlm.serve.service import Service, serve_what


class Server(uvicorn.Server):
    """Serves until a signal: then new requests are told 503, `/healthz` too, and running texts have `drain` seconds to end.
    A second signal ends at once."""

    def __init__(self, service: Service):
        config = uvicorn.Config(
            make_app(service), log_level="warning", access_log=False, server_header=False, lifespan="off", timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )  # fmt: skip
        super().__init__(config)
        self._service = service
        self._until = 0.0

    def stop(self) -> None:
        """Begin to drain."""
        self._until = time.monotonic() + self._service.options.drain
        self._service.draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
        else:
            self.stop()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; True: the end."""
        if self._service.draining:
            late = time.monotonic() > self._until
            if late and self._service.engine is not None:  # those who still wait are told so
                await asyncio.to_thread(self._service.engine.close)
            if late or self._service.idle():
                return True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. ValueError where it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(found[4][:2], family=found[0], backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def serve(argument: str, options: ServeOptions) -> None:
    """Load a model and serve it until a signal says to stop. ValueError for what cannot be served."""
    with listen(options.host, options.port) as there:
        trained = load_model(argument)
        service = serve_what(trained, options, start_engine(trained, options))
        host = f"[{options.host}]" if ":" in options.host else options.host
        say(f"{service.name}: {', '.join(service.routes())}")
        say(f"http://{host}:{there.getsockname()[1]}" + ("" if service.engine is None else "  (a page to write with; Ctrl-C stops)"))
        try:
            Server(service).run(sockets=[there])
        finally:
            service.close()


def start_engine(trained: Any, options: ServeOptions) -> Any:
    """The running engine of a decoder that writes text; None for any other model."""
    config = trained.model.config
    if (config.architecture, config.head.kind) != ("decoder", "language_model"):
        return None
    from jaxlm.generate.engine import Engine, EngineConfig

    context = min(options.context or config.positions, config.positions)
    engine = Engine(
        trained.model, trained.params, trained.mesh, trained.tokenizer.vocab_size,
        EngineConfig(slots=options.slots, context=context, queue=options.queue),
    )  # fmt: skip
    engine.start()
    return engine
