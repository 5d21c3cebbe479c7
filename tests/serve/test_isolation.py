"""What one client sends and is slow or fails is that client's affair: the others are answered as if it were not there."""

import asyncio
import concurrent.futures
import json
import queue
import threading
import time

import httpx
import numpy as np
import pytest
from served import fake_server, serving
from test_vectors import trained

from jaxlm.serve import guided
from jaxlm.serve.errors import ApiError
from jaxlm.serve.options import ServeOptions
from jaxlm.serve.readers import Client, Readers
from jaxlm.serve.rows import Job
from jaxlm.serve.service import serve_what


def post(live, **body):
    return httpx.post(f"{live.url}/v1/completions", json={"prompt": "hello", "max_tokens": 8, **body}, timeout=30)


@pytest.mark.parametrize("users", ["one user", "invented users"])
def test_slow_grammars_leave_threads_to_others(live, monkeypatch, users):
    """A dozen requests of one client, each of which takes long to compile: another client's are answered meanwhile, also where
    the first one names a new user each time."""
    free, begun = threading.Event(), threading.Semaphore(0)
    grammar = guided.Grammar

    def slow(tokenizer, constraint, stop):
        begun.release()
        assert free.wait(20)
        return grammar(tokenizer, constraint, stop)

    monkeypatch.setattr(guided, "Grammar", slow)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        user = (lambda i: "slow") if users == "one user" else str
        held = [pool.submit(post, live, user=user(i), guided_regex="a") for i in range(12)]
        for _ in range(2 if users == "one user" else 6):
            assert begun.acquire(timeout=10)
        address = "127.0.0.1" if users == "one user" else "127.0.0.2"
        with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=10) as other:
            for _ in range(3):
                body = {"prompt": "hello", "max_tokens": 8, "user": "other"}
                assert other.post(f"{live.url}/v1/completions", json=body).json()["choices"][0]["text"] == "hello"
        assert httpx.get(f"{live.url}/healthz").status_code == 200
        assert not any(future.done() for future in held)
        free.set()
        assert {future.result().status_code for future in held} == {200}


class Panic(BaseException):
    """As a library in Rust raises: no Exception."""


def panic():
    raise Panic


def test_a_request_that_takes_too_long_to_read_is_refused():
    """Its client's next one waits for the thread to be free again; another client's does not."""

    async def run():
        readers = Readers(threads=4, address=1, seconds=0.2)
        free = threading.Event()
        with pytest.raises(ApiError, match=r"takes more than 0.2 s") as told:
            await readers.run(Client("a", "1"), free.wait, 20)
        assert told.value.status == 400
        with pytest.raises(ApiError):
            await readers.run(Client("a", "2"), int)
        assert await readers.run(Client("b"), int) == 0
        free.set()
        await asyncio.sleep(0.05)
        assert await readers.run(Client("a"), int) == 0
        with pytest.raises(RuntimeError, match="Panic"):
            await readers.run(Client("a"), panic)
        assert await readers.run(Client("a"), int) == 0
        readers.close()

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_cannot_be_decoded_ends_alone(stream, monkeypatch):
    """A tokenizer that fails on one client's tokens; its neighbours' texts are whole, and its slot is free again."""
    with fake_server(delay=0.002) as live:
        decode = live.service.tokenizer.decode

        def fails(ids):
            ids = list(ids)
            if 7 in ids[1:]:
                raise RuntimeError("cannot be decoded")
            return decode(ids)

        monkeypatch.setattr(live.service.tokenizer, "decode", fails)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            one, bad, two = (
                pool.submit(post, live, prompt=prompt, max_tokens=40, stream=stream) for prompt in ([104], [105, 106, 7], [106])
            )
        for future, letter in ((one, "h"), (two, "j")):
            text = future.result().text
            assert text.count(letter) >= 40 if stream else future.result().json()["choices"][0]["text"] == letter * 40
        if stream:
            events = [line for line in bad.result().text.splitlines() if line]
            assert "Internal error" in json.loads(events[-1][6:])["error"]["message"]
        else:
            assert bad.result().status_code == 500 and "Internal error" in bad.result().json()["error"]["message"]
        deadline = time.monotonic() + 10
        while live.engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert live.engine.stats().running == 0 and post(live).json()["choices"][0]["text"] == "hello"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    made = trained(tmp_path_factory.mktemp("model"), "encoder", {"kind": "masked_lm"})
    service = serve_what(made, ServeOptions())
    with serving(service) as (url, _):
        yield service, url
    service.close()


def test_a_new_shape_is_compiled_aside(vectors, monkeypatch):
    """While it is, texts of known shapes are answered, alone and together."""
    service, url = vectors
    free, predict = threading.Event(), {}

    def embed(*texts):
        return httpx.post(f"{url}/v1/embeddings", json={"input": list(texts)}, timeout=30)

    first = embed("a").json()["data"][0]["embedding"]
    for size, predictor in service.vectors._predictors.items():
        predict[size] = predictor.predict

        def held(params, rows, examples, size=size):
            shapes = {len(item["tokens"]) for item in examples.items}
            assert max(shapes) < 60 or free.wait(20)
            return predict[size](params, rows, examples)

        monkeypatch.setattr(predictor, "predict", held)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        long = pool.submit(embed, "x" * 70)
        time.sleep(0.1)
        others = list(pool.map(embed, ["a", "b", "a", "c"]))
        assert not long.done()
        np.testing.assert_allclose(others[2].json()["data"][0]["embedding"], first, atol=2e-6)
        free.set()
        assert long.result().status_code == 200


def test_nobody_waits_for_an_answer_that_does_not_come(vectors, monkeypatch):
    service, url = vectors

    def embed(text):
        return httpx.post(f"{url}/v1/embeddings", json={"input": text}, timeout=20).status_code

    with monkeypatch.context() as patch:
        patch.setattr(service.vectors, "_shape", lambda jobs: 1 / 0)
        assert embed("a") == 500
    assert service.vectors.alive and embed("a") == 200
    with monkeypatch.context() as patch:
        patch.setattr(service.vectors, "_jobs", queue.Queue())  # which nobody reads
        patch.setattr(service, "options", ServeOptions(timeout=0.2))
        assert embed("a") == 503
    assert embed("a") == 200


def test_a_text_that_fails_in_a_batch_fails_alone(vectors, monkeypatch):
    service, url = vectors
    predictor, together = service.vectors._predictors[4], []

    def fails(params, rows, examples):
        together.append(len(rows))
        raise RuntimeError("no batch of four")

    expected = [httpx.post(f"{url}/v1/embeddings", json={"input": text}, timeout=30).json() for text in "abc"]
    monkeypatch.setattr(predictor, "predict", fails)
    rows = [[{"text": text}] for text in "abc"]
    made = [Job(row, service.vectors.task.examples(row), concurrent.futures.Future()) for row in rows]
    service.vectors._compute(made)
    assert together == [3]
    for job, answer in zip(made, expected, strict=True):
        np.testing.assert_allclose(job.answer.result(1)[0]["anchor"], answer["data"][0]["embedding"], atol=2e-6)
