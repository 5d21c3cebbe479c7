"""A server from its start to its end: what is asked to stop lets running texts end."""

import asyncio
import contextlib
import socket
import time
from types import FrameType

import uvicorn

from jaxlm.generate.constrain import prepare
from jaxlm.models import load_model
from jaxlm.report.console import say
from jaxlm.serve.app import make_app
from jaxlm.serve.options import ServeOptions
from jaxlm.serve.service import Service, serve_what
from jaxlm.serve.speaking import open_engine, writes


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
        trained = load_model(argument, options=options)
        engine = None
        if writes(trained):
            trained = trained.for_writing(free=True)
            engine = open_engine(trained, options.slots, options.context, options.queue, options.cache, options.exact)
        service = serve_what(trained, options, engine)
        host = f"[{options.host}]" if ":" in options.host else options.host
        say(f"{service.name}: {', '.join(service.routes())}")
        if service.asker is not None and (line := service.settings.told(missing=service.asker.left_out)):
            say(line)
        try:
            if engine is not None:
                engine.warm()
                with contextlib.suppress(ValueError):  # told to those who ask for a constraint
                    prepare(trained.tokenizer)
                engine.start()
            page = "" if engine is None else "  (a page to write with; Ctrl-C stops)"
            say(f"http://{host}:{there.getsockname()[1]}{page}")
            Server(service).run(sockets=[there])
        finally:
            service.close()
