"""The server around the real engine: the model's own numbers, neighbours that change nothing, and nothing lost."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import httpx
import jax
import numpy as np
import openai
import pytest
from served import serving
from test_fuzz import send_anything
from test_vectors import trained

from jaxlm.serve.options import ServeOptions
from jaxlm.serve.service import serve_what
from jaxlm.serve.speaking import open_engine

ROOT = pathlib.Path(__file__).resolve().parents[2]
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A small random decoder of bytes behind the server."""
    made = trained(tmp_path_factory.mktemp("model"), "decoder", {"kind": "language_model"})
    engine = open_engine(made, slots=4, queue=256)
    engine.start()
    service = serve_what(made, ServeOptions(max_texts=32), engine)
    with serving(service) as (url, _):
        yield made, engine, url
    service.close()


@pytest.fixture(scope="module")
def client(real):
    return openai.OpenAI(base_url=f"{real[2]}/v1", api_key="x", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def logprobs(real):
    """(L, vocabulary) log-probabilities of what follows each token of a row, from the model itself."""
    made = real[0]
    apply = jax.jit(made.model.apply)

    def of(ids):
        row = np.zeros((1, 96), np.int32)
        row[0, : len(ids)] = ids
        logits, _ = apply(made.params, {"tokens_BL": row})
        return np.asarray(jax.nn.log_softmax(logits[0, : len(ids)]))[:, : made.tokenizer.vocab_size]  # over the whole table

    return of


def test_the_likeliest_text_and_its_scores_are_the_models(client, logprobs, real):
    """Token for token what the model's logits say, without a cache; a prompt's scores too."""
    prompt = list(b"The harbour")
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, logprobs=3, echo=True).choices[0]
    ids, told = prompt, found.logprobs
    while len(ids) < len(told.tokens):
        ids = [*ids, int(np.argmax(logprobs(ids)[-1]))]
    expected = logprobs(ids)
    assert told.token_logprobs[0] is None
    np.testing.assert_allclose(told.token_logprobs[1:], [expected[i, ids[i + 1]] for i in range(len(ids) - 1)], atol=1e-4)
    best = [max(top.values()) for top in told.top_logprobs[1:]]
    np.testing.assert_allclose(best, expected[:-1].max(axis=1), atol=1e-4)
    assert found.text == real[0].tokenizer.decode(ids)


def test_the_same_seed_has_the_same_text_whatever_runs_beside_it(client):
    def ask(seed):
        return client.completions.create(model="tiny", prompt="Boats", max_tokens=20, seed=seed, n=2).choices

    alone = [choice.text for choice in ask(5)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        crowd = [[choice.text for choice in choices] for choices in pool.map(ask, [5, 6, 5, 7, 8, 5])]
    assert crowd[0] == crowd[2] == crowd[5] == alone and crowd[1][0] == alone[1] and crowd[3] != alone


def test_a_stream_is_the_whole(client):
    options = {
        "model": "tiny",
        "messages": HI,
        "max_tokens": 25,
        "seed": 3,
        "temperature": 0.7,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    tokens = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert tokens == whole.choices[0].logprobs.content and len(tokens) == whole.usage.completion_tokens


def test_every_setting_reaches_the_sampler(client):
    """Each alone pins the first token down to the likeliest or drives the text away from a token that it would repeat."""
    options = {"model": "tiny", "prompt": "Boats", "max_tokens": 1, "seed": 1, "temperature": 1.9}
    likeliest = client.completions.create(**{**options, "temperature": 0}).choices[0].text
    for more in ({"top_p": 0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}):
        assert client.completions.create(**options, **more).choices[0].text == likeliest
    plain = client.completions.create(**{**options, "max_tokens": 40, "temperature": 0}, logprobs=0).choices[0].logprobs.tokens
    for name in ("presence_penalty", "frequency_penalty"):
        other = client.completions.create(**{**options, "max_tokens": 40, "temperature": 0}, logprobs=0, **{name: 2.0})
        assert len(set(other.choices[0].logprobs.tokens)) > len(set(plain))


def test_texts_match_what_they_are_asked_to(client):
    """By OpenAI's field and by vLLM's, beside free texts that stay as they are alone."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    free = {"model": "tiny", "prompt": "Boats", "max_tokens": 20, "seed": 5}
    alone = client.completions.create(**free).choices[0].text
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        objects = pool.submit(client.chat.completions.create, model="tiny", messages=HI, response_format=asked, n=2, max_tokens=40)
        chosen = pool.submit(client.completions.create, **free, extra_body={"guided_choice": ["yes", "no"]})
        matched = pool.submit(client.completions.create, **free, extra_body={"guided_regex": "[ab]{3}-[0-9]{2}"})
        beside = pool.submit(client.completions.create, **free)
    for choice in objects.result().choices:
        assert 0 <= json.loads(choice.message.content)["n"] <= 99 and choice.finish_reason == "stop"
    assert chosen.result().choices[0].text in ("yes", "no")
    assert re.fullmatch("[ab]{3}-[0-9]{2}", matched.result().choices[0].text)
    assert beside.result().choices[0].text == alone


def test_vectors_beside_texts(client, real):
    found = client.embeddings.create(model="tiny", input=["a", "b"])
    assert len(found.data) == 2 and np.linalg.norm(found.data[0].embedding) == pytest.approx(1, abs=1e-5)
    assert client.models.retrieve("tiny").model_dump()["routes"] == ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]


def until_idle(engine, seconds=20):
    end = time.monotonic() + seconds
    while engine.stats().running + engine.stats().waiting:
        assert time.monotonic() < end, "a slot is not freed"
        time.sleep(0.01)


def test_clients_that_go_away_free_their_slots(real):
    """More of them than there are slots, and then one that stays."""
    _, engine, url = real
    body = {"prompt": "a", "max_tokens": 90, "n": 4}
    for _ in range(4):
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60) as found:
            next(found.iter_lines())
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.02)
    until_idle(engine)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=60).status_code == 200


@pytest.mark.slow
def test_of_two_hundred_at_once_none_is_lost(real):
    """Each has the text that it has alone; some stream, some do not."""
    _, engine, url = real

    def ask(i, client):
        body = {"prompt": f"Number {i % 20}", "max_tokens": 5 + i % 17, "seed": i % 5, "stream": i % 2 == 1}
        found = client.post(f"{url}/v1/completions", json=body, headers={"X-Request": str(i)})
        assert found.status_code == 200, found.text
        if i % 2 == 0:
            return found.json()["choices"][0]["text"]
        events = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
        assert found.text.endswith("data: [DONE]\n\n") and events[-1]["choices"][0]["finish_reason"]
        return "".join(event["choices"][0]["text"] for event in events)

    before = engine.stats().requests
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(timeout=300, limits=limits) as client, concurrent.futures.ThreadPoolExecutor(200) as pool:
        crowd = list(pool.map(lambda i: ask(i, client), range(200)))
        assert engine.stats().requests == before + 200
        until_idle(engine)
        for i in range(0, 200, 23):
            assert crowd[i] == ask(i, client)


@pytest.mark.slow
def test_whatever_is_sent_the_engine_goes_on(real):
    _, engine, url = real
    live = types.SimpleNamespace(url=url, engine=engine)
    with httpx.Client(timeout=120) as client:
        send_anything(300)(live, client)
        until_idle(engine)
        assert client.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 3}).status_code == 200


# --- as processes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps, trained as a user would: the folder in which `runs/tiny` lies."""
    place = tmp_path_factory.mktemp("user")
    small = {"preset": "null", "kv-heads": "null", "layers": 1, "width": 32, "heads": 2}
    words = [str(word) for name, value in small.items() for word in (f"--model.{name}", value)]
    words += ["--data.tokenizer.kind", "bytes", "--train.steps", "4", "--train.eval-every", "2", "--train.sample-tokens", "4"]
    words = [str(ROOT / "train.py"), "configs/tiny.yaml", *words]
    (place / "configs").mkdir()
    (place / "configs" / "tiny.yaml").write_bytes((ROOT / "configs" / "tiny.yaml").read_bytes())
    done = subprocess.run([sys.executable, *words], cwd=place, env=environment(place), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


def environment(place):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTEST", "COLUMNS"))}
    return env | {"JAXLM_CACHE": str(place / "cache"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def start(place, *flags):
    """A server process and its address."""
    words = [sys.executable, "-m", "jaxlm", "serve", "runs/tiny", "--port", "0", *flags]
    process = subprocess.Popen(words, cwd=place, env=environment(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if found := re.match(r"http://\S+", line):
            return process, found[0]
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
def test_sigterm_lets_running_texts_end(run):
    process, url = start(run)
    for _ in range(200):
        try:
            if httpx.get(f"{url}/healthz", timeout=60).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.1)
    body = {"prompt": [65], "max_tokens": 120, "stream": True, "stop": ["\x00\x00"]}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as found:
        lines = found.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("length", "stop")
    assert process.wait(30) == 0, process.stderr.read()
    assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_a_file_and_a_conversation_as_processes(run):
    (run / "in.txt").write_text("The\nA\nOne\n")
    words = [sys.executable, "-m", "jaxlm", "generate", "runs/tiny", "--file", "in.txt", "--out", "out.jsonl", "--max-tokens", "9"]
    for _ in range(2):
        done = subprocess.run(words, cwd=run, env=environment(run), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "all 3 answers are there" in done.stdout
    found = [json.loads(line) for line in (run / "out.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in found) == [0, 1, 2] and all(1 <= line["tokens"] <= 9 for line in found)
    chat = [sys.executable, "-m", "jaxlm", "chat", "runs/tiny", "--max-tokens", "5"]
    done = subprocess.run(chat, cwd=run, env=environment(run), capture_output=True, text=True, input="Hi\n/reset\nHi\n/exit\n")
    assert done.returncode == 0 and "a new conversation" in done.stdout, done.stderr
