"""Live servers for tests."""

import contextlib
import threading
import time

from fake_engine import FakeEngine, Live

from jaxlm.data import Chat, TokenizerConfig, framed, train_tokenizer
from jaxlm.serve.options import ServeOptions


@contextlib.contextmanager
def serving(service):
    """A live server of a service on loopback, in a thread."""
    from jaxlm.serve.server import Server, listen

    server, there = Server(service), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [there]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{there.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server does not end"
        there.close()


@contextlib.contextmanager
def fake_server(options=None, chats=True, **engine):
    from jaxlm.serve.service import Service

    tokenizer = framed(train_tokenizer(TokenizerConfig("bytes"), []), "auto", architecture="decoder")
    engine = FakeEngine(**engine)
    service = Service(
        options or ServeOptions(max_body=1 << 16, max_n=4, max_texts=8), "parrot", tokenizer, engine, Chat(tokenizer), chats
    )
    with serving(service) as (url, server):
        yield Live(url, engine, service, server)
    engine.close()
