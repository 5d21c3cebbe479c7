"""Whatever is sent to whatever route: no answer says that the server is at fault, and the engine goes on."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from served import fake_server

from jaxlm.serve.options import ServeOptions
from jaxlm.serve.protocol import HONOURED

ROUTES = ["/", "/healthz", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/classify", "/x"]
METHODS = ["POST"] * 6 + ["GET", "PUT", "HEAD", "OPTIONS"]
FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n", "best_of", "echo",
    "logprobs", "top_logprobs", "stop", "seed", "stream", "stream_options", "suffix", "tools", "logit_bias", "user", "input",
    "encoding_format", "text", "pair", "presence_penalty", "response_format", "role", "content", "include_usage", "type",
    "guided_regex", "guided_json", "guided_choice", "json_schema", "schema", "name", "refusal", "regex", "grammar", "choice",
]  # fmt: skip
FIELDS += sorted({*HONOURED["/v1/completions"], *HONOURED["/v1/chat/completions"]} - {*FIELDS})
TEXTS = st.one_of(
    st.sampled_from(["parrot", "a", "", "user", "assistant", "text", "é\ud800", "\x00", "base64"]), st.text(max_size=20)
)
NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.booleans(), st.none())
VALUES = st.recursive(
    st.one_of(TEXTS, NUMBERS),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(FIELDS) | TEXTS, inner, max_size=4),
)
# Bodies that are nearly right reach further than those that are wrong at once.
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]), "content": TEXTS | VALUES}
)
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXTS | st.lists(st.integers(0, 260), max_size=9) | st.lists(TEXTS, max_size=4),
        "messages": st.lists(MESSAGE, max_size=4), "max_tokens": st.integers(0, 70), "n": st.integers(0, 5),
        "stop": TEXTS | st.lists(TEXTS, max_size=3), "stream": st.booleans(), "echo": st.booleans(),
        "logprobs": st.integers(0, 21) | st.booleans(), "top_logprobs": st.integers(0, 21), "seed": st.integers(),
        "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "input": TEXTS | st.lists(TEXTS, max_size=4),
        "min_tokens": st.integers(0, 9), "stop_token_ids": st.lists(st.integers(0, 260), max_size=9), "ignore_eos": st.booleans(),
        "allowed_token_ids": st.lists(st.integers(0, 256), max_size=5), "bad_words": st.lists(TEXTS, max_size=4),
        "truncate_prompt_tokens": st.integers(-2, 20), "truncation_side": st.sampled_from(["left", "right", "up"]),
        "include_stop_str_in_output": st.booleans(), "skip_special_tokens": st.booleans(), "add_special_tokens": st.booleans(),
        "continue_final_message": st.booleans(), "prompt_logprobs": st.integers(0, 21), "return_token_ids": st.booleans(),
        "structured_outputs": st.dictionaries(st.sampled_from(["regex", "choice", "json", "grammar"]), VALUES, max_size=2),
        "text": TEXTS | st.lists(TEXTS, max_size=4), "stream_options": st.just({"include_usage": True}) | VALUES,
    },
)  # fmt: skip
BODIES = st.one_of(NEARLY, st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6), VALUES)


@pytest.fixture(scope="module")
def guarded():
    """Nothing of the prompt that fails is sent: a failing model's 500 is an honest one."""
    with fake_server(ServeOptions(max_body=1 << 16, max_n=4, max_texts=8), fails=False) as live, httpx.Client(timeout=20) as client:
        yield live, client


def check(live, found):
    assert found.status_code < 500, found.text
    if found.status_code >= 400 and found.request.method != "HEAD":
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    if found.headers["content-type"].startswith("text/event-stream"):
        assert found.text.endswith("data: [DONE]\n\n") and '"error"' not in found.text
    stats = live.engine.stats()
    assert stats.alive


def send_anything(examples):
    """A test that sends JSON to routes; the text's routes more often."""

    @settings(deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(route=st.sampled_from(ROUTES[4:6] * 4 + ROUTES), method=st.sampled_from(METHODS), body=BODIES)
    @example(route="/v1/completions", method="POST", body={"prompt": "a", "max_tokens": 3})
    @example(route="/v1/chat/completions", method="POST", body={"messages": [{"role": "user", "content": "a"}], "max_tokens": 3})
    def send(live, client, route, method, body):
        content = json.dumps(body).encode()
        check(live, client.request(method, live.url + route, content=content, headers={"Content-Type": "application/json"}))

    return send


def test_any_json_to_any_route(guarded):
    send_anything(60)(*guarded)


@pytest.mark.slow
def test_much_json_to_any_route(guarded):
    live, client = guarded
    send_anything(1000)(live, client)
    told = client.get(f"{live.url}/metrics").text
    for route in ("/v1/completions", "/v1/chat/completions"):
        for status in (200, 400, 405):
            assert f'route="{route}",status="{status}"' in told, f"nothing sent to {route} had {status}"


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    route=st.sampled_from(ROUTES),
    body=st.binary(max_size=300),
    kind=st.sampled_from(["application/json", "text/plain", "APPLICATION/JSON; charset=x", "", "\x7f"]),
)
def test_any_bytes_to_any_route(guarded, route, body, kind):
    live, client = guarded
    check(live, client.post(live.url + route, content=body, headers={"Content-Type": kind}))


def test_after_all_that_it_still_writes(guarded):
    live, client = guarded
    found = client.post(f"{live.url}/v1/completions", json={"prompt": "hello"}).json()
    assert found["choices"][0]["text"] == "hello"
    stats = live.engine.stats()
    assert stats.running == stats.waiting == 0
