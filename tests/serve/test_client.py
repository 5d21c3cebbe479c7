"""The official client drives every route of text; the engine is a made-up one, so each answer is known."""

import json
import threading
import time

import fake_engine
import httpx
import openai
import pytest
from served import fake_server

from jaxlm.generate.request import Request, Token
from jaxlm.serve.options import ServeOptions

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)


def until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def complete(client, **more):
    return client.completions.create(**{"model": "parrot", "prompt": "hello", "max_tokens": 8, **more})


def test_models(client):
    assert [m.id for m in client.models.list()] == ["parrot"] and client.models.retrieve("parrot").owned_by == "jaxlm"
    with pytest.raises(openai.NotFoundError, match="parrot"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'") as caught:
        complete(client, model="other")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_a_completion(client, live):
    """The text begins with what the model reads before the prompt, the end of text, so it ends after one round."""
    found = complete(client, max_tokens=16)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("hello", "stop", None)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (6, 5, 11)
    assert found.object == "text_completion" and found.id.startswith("cmpl-")
    short = complete(client, max_tokens=3).choices[0]
    assert (short.text, short.finish_reason) == ("he", "length")
    request = live.engine.seen[-1]
    assert request.prompt == (256, *b"hello") and 256 in request.stop and request.sample.temperature == 1


def test_many_prompts_and_texts(client, live):
    found = complete(client, prompt=["ab", "cde"], n=2, seed=7, max_tokens=4, temperature=0.5, top_p=0.25)
    assert [(c.index, c.text) for c in found.choices] == [(0, "ab"), (1, "ab"), (2, "cde"), (3, "cde")]
    assert found.usage.prompt_tokens == 3 + 4 and found.usage.completion_tokens == 2 + 2 + 3 + 3
    requests = live.engine.seen[-4:]
    assert [r.seed for r in requests] == [7, 8, 7, 8]
    assert {(r.sample.temperature, r.sample.top_p) for r in requests} == {(0.5, 0.25)}


def test_prompts_of_token_ids(client, live):
    assert complete(client, prompt=[104, 105], max_tokens=4).choices[0].text == "hihi"
    assert live.engine.seen[-1].prompt == (104, 105)
    found = complete(client, prompt=[[104], [105, 106]], max_tokens=2, echo=True)
    assert [c.text for c in found.choices] == ["hhh", "ijij"]


def test_echo_and_logprobs(client):
    """Each token with its log-probability, the likeliest beside it, and its place in the text; the made-up model's are −id/100,
    then −1 less for each of the tokens after it."""
    found = complete(client, prompt="hé", echo=True, logprobs=2, max_tokens=3).choices[0]
    told = found.logprobs
    assert found.text == "héh\ufffd"
    assert told.tokens == ["h", "bytes:\\xc3", "bytes:\\xa9", "h", "bytes:\\xc3"]
    assert told.token_logprobs == [-1.04, -1.95, -1.69, -1.04, -1.95] and told.text_offset == [0, 1, 1, 2, 3]
    assert told.top_logprobs[0] == pytest.approx({"h": -1.04, "i": -2.04})
    ids = complete(client, prompt=[104, 105], echo=True, logprobs=0, max_tokens=0).choices[0]
    assert (ids.text, ids.finish_reason) == ("hi", "length")
    assert ids.logprobs.token_logprobs == [None, -1.05] and ids.logprobs.top_logprobs == [None, {"i": -1.05}]


@pytest.mark.parametrize(
    "options", [{}, {"stop": ["lo", "zz"]}, {"n": 2, "logprobs": 1}, {"echo": True, "logprobs": 1, "stop": "ll"}]
)
def test_a_stream_is_the_whole_in_pieces(client, options):
    whole = complete(client, **options)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == [] and all(c.usage is None for c in chunks[:-1])
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        if choice.logprobs:
            for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                joined = [x for c in own if c.logprobs for x in getattr(c.logprobs, name)]
                assert joined == getattr(choice.logprobs, name)


def test_stop_strings_end_the_text_and_free_the_slot(client, live):
    found = complete(client, stop=["lo", "lol"], logprobs=0, prompt=[*b"hello"], max_tokens=50)
    assert found.choices[0].text == "hel" and found.choices[0].finish_reason == "stop"
    assert found.choices[0].logprobs.tokens == ["h", "e", "l"]
    assert found.usage.completion_tokens == 5  # the stop string's were written too
    until(lambda: live.engine.stats().running == 0)


def test_stop_tokens_and_strings_as_vllm_has_them(client, live):
    """`stop_token_ids` beside the model's own, which `ignore_eos` leaves out; the reason is told, and shown if it is asked for."""

    def text(**more):
        choice = complete(client, prompt=[*b"hello"], max_tokens=12, extra_body=more).choices[0]
        return choice.text, choice.finish_reason, choice.stop_reason

    assert text() == ("hellohellohe", "length", None)
    assert text(stop_token_ids=[ord("o")]) == ("hell", "stop", ord("o"))
    assert text(stop_token_ids=[ord("o")], include_stop_str_in_output=True) == ("hello", "stop", ord("o"))
    assert text(stop="lo") == ("hel", "stop", "lo")
    assert text(stop="lo", include_stop_str_in_output=True) == ("hello", "stop", "lo")
    assert text(stop="lo", min_tokens=5) == ("hellohel", "stop", "lo")  # vLLM: completed by the sixth token or a later one
    assert live.engine.seen[-1].min_tokens == 5
    bos = {"prompt": "hi", "max_tokens": 6, "logprobs": 0}
    ends, goes_on = complete(client, **bos), complete(client, **bos, extra_body={"ignore_eos": True})
    assert ends.choices[0].finish_reason == "stop" and 256 in live.engine.seen[-2].stop
    assert goes_on.choices[0].finish_reason == "length" and not live.engine.seen[-1].stop
    shown = complete(client, **bos, extra_body={"ignore_eos": True, "skip_special_tokens": False}).choices[0].text
    assert shown == "<|endoftext|>hi<|endoftext|>hi" and goes_on.choices[0].text == "hihi"


def test_prompts_are_cut_as_transformers_cuts_them(client, live):
    """At their beginning, or at their end; special tokens before a text are kept."""
    for prompt, more, expected in (
        ("hello", {"truncate_prompt_tokens": 3}, (256, *b"lo")),
        ("hello", {"truncate_prompt_tokens": 3, "truncation_side": "right"}, (256, *b"he")),
        ("hello", {"truncate_prompt_tokens": 3, "add_special_tokens": False}, (*b"llo",)),
        ([1, 2, 3, 4], {"truncate_prompt_tokens": 3}, (2, 3, 4)),
        ("x" * 100, {"truncate_prompt_tokens": -1}, (256, *b"x" * 55)),
    ):
        complete(client, prompt=prompt, extra_body=more)
        assert live.engine.seen[-1].prompt == expected
    echoed = complete(client, echo=True, max_tokens=1, extra_body={"truncate_prompt_tokens": 3}).choices[0]
    assert echoed.text.startswith("lo")


def test_bad_words_as_vllm_reads_them(client, live):
    """Each word as it begins a text; behind a space it is another first token, but here not one token, so that it is left out."""
    complete(client, extra_body={"bad_words": ["ab", " c"]})
    assert live.engine.seen[-1].bad == (tuple(b"ab"), tuple(b"c"))


def test_scores_of_prompts_in_vllms_form(client):
    """By token id, with ranks; None for the first. Of a conversation once, not for each choice."""
    found = complete(client, prompt=[104, 105], max_tokens=1, extra_body={"prompt_logprobs": 2}).choices[0].prompt_logprobs
    assert found[0] is None and list(found[1]) == ["105", "106"]
    assert found[1]["105"] == {"logprob": -1.05, "rank": 1, "decoded_token": "i"}
    none = complete(client, prompt=[104, 105], max_tokens=1, extra_body={"prompt_logprobs": 0}).choices[0]
    assert list(none.prompt_logprobs[1]) == ["105"] and none.logprobs is None
    chat = client.chat.completions.create(model="parrot", messages=HI, max_tokens=1, n=2, extra_body={"prompt_logprobs": 1})
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens


def test_ids_are_told_with_the_text(client):
    """Whole and in a stream; the token that ended the text among them."""
    ids = {"return_token_ids": True, "stop_token_ids": [ord("o")]}
    found = complete(client, prompt=[*b"hello"], extra_body=ids).choices[0]
    assert found.token_ids == [*b"hello"] and found.prompt_token_ids == [*b"hello"] and found.text == "hell"
    chunks = [c.choices[0] for c in complete(client, prompt=[*b"hello"], stream=True, extra_body=ids)]
    assert [i for c in chunks for i in c.token_ids] == [*b"hello"]
    assert [hasattr(c, "prompt_token_ids") for c in chunks] == [True] + [False] * (len(chunks) - 1)
    named = complete(client, logprobs=1, max_tokens=2, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    assert named.tokens == ["token_id:256", "token_id:104"] or named.tokens[0].startswith("token_id:")


class Ranked:
    """Tokens of which the sampled one is the fifth likeliest."""

    top = ((10, -0.5), (11, -1.0), (12, -2.0), (13, -3.0), (104, -4.0))


def test_the_likeliest_come_first_and_the_sampled_one_is_among_them(client, monkeypatch):
    monkeypatch.setattr(fake_engine, "token", lambda i, n: Token(104, -4.0, Ranked.top[: n or 0], 5) if n is not None else Token(i))
    for n in (1, 3, 5):
        top = complete(client, prompt=[104], max_tokens=1, logprobs=n).choices[0].logprobs.top_logprobs[0]
        assert list(top.values()) == sorted(top.values(), reverse=True) and top["h"] == -4.0 and len(top) == min(n + 1, 5)
        told = client.chat.completions.create(model="parrot", messages=HI, max_tokens=2, logprobs=True, top_logprobs=n)
        chosen = told.choices[0].logprobs.content[0].top_logprobs
        assert [t.logprob for t in chosen] == sorted((t.logprob for t in chosen), reverse=True)
        assert "h" in [t.token for t in chosen] and len(chosen) == min(n + 1, 5)


def test_answers_are_taken_back_as_messages(client, live):
    """OpenAI's own objects, refusals and all; names and parts of text too."""
    answer = client.chat.completions.create(model="parrot", messages=HI).choices[0].message
    whole = answer.model_dump()  # with null for what there is not
    client.chat.completions.create(model="parrot", messages=[*HI, whole, *HI])
    assert b"Assistant: User: Hi" in bytes(i for i in live.engine.seen[-1].prompt if i < 256)
    refused = {"role": "assistant", "content": None, "refusal": "No.", "tool_calls": None, "function_call": None, "audio": None}
    parts = {"role": "assistant", "content": [{"type": "refusal", "refusal": "Ne"}, {"type": "text", "text": "ver."}]}
    nothing = {"role": "assistant", "content": None, "tool_calls": []}
    named = {"role": "user", "name": "someone", "content": "Hi"}
    for message, expected in ((refused, b"No."), (parts, b"Never."), (nothing, b"")):
        client.chat.completions.create(model="parrot", messages=[named, message], max_tokens=1)
        said = bytes(i for i in live.engine.seen[-1].prompt[1:] if i < 256)
        assert said == b"User: Hi\nAssistant: " + expected + b"Assistant:"


def test_a_last_message_is_continued(client, live):
    begun = [*HI, {"role": "assistant", "content": "It is "}]

    def prompt(**more):
        found = client.chat.completions.create(model="parrot", messages=begun, max_tokens=1, extra_body=more)
        return bytes(live.engine.seen[-1].prompt[1:]) if 256 not in live.engine.seen[-1].prompt[1:] else None, found

    assert prompt(continue_final_message=True)[0] == b"User: Hi\nAssistant: It is "
    assert prompt()[0] is None  # the end of a turn, and the header of the next one
    assert live.engine.seen[-1].prompt[-11:] == (256, *b"Assistant:")
    prompt(add_generation_prompt=False)
    assert live.engine.seen[-1].prompt[-1] == 256
    echoed = prompt(continue_final_message=True, echo=True)[1]
    assert echoed.choices[0].message.content.startswith("It is ")
    with pytest.raises(openai.BadRequestError, match="needs add_generation_prompt: false"):
        prompt(continue_final_message=True, add_generation_prompt=True)


def test_tools_that_must_not_be_called_are_let_through(client):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for more in ({"tools": tools, "tool_choice": "none"}, {"functions": [{"name": "f"}], "function_call": "none"}):
        assert client.chat.completions.create(model="parrot", messages=HI, **more).choices[0].message.content == "User: Hi"
    with pytest.raises(openai.BadRequestError, match="call no tools"):
        client.chat.completions.create(model="parrot", messages=HI, tools=tools, tool_choice="auto")


def test_structured_outputs_beside_the_older_fields(client, live):
    for more in (
        {"structured_outputs": {"regex": "[ab]+"}}, {"guided_regex": "[ab]+"}, {"structured_outputs": {"choice": ["a", "b"]}},
        {"guided_grammar": 'root ::= "a" | "b"'}, {"structured_outputs": {"grammar": 'start: "a" | "b"', "json": None}},
    ):  # fmt: skip
        complete(client, extra_body=more)
        allowed = live.engine.seen[-1].guide.mask()
        assert [chr(i) for i in range(256) if allowed[i]] == ["a", "b"]
    complete(client, n=2, extra_body={"structured_outputs": {"json_object": True}})
    one, two = (request.guide for request in live.engine.seen[-2:])
    one.take(ord("{"))
    assert two.mask()[ord("{")] and not one.mask()[ord("{")]


def test_a_conversation(client, live):
    """The made-up model says the prompt again, which the plain template writes as `User: Hi`, `Assistant:`; its stop strings end
    it before the second turn."""
    found = client.chat.completions.create(model="parrot", messages=HI, logprobs=True, top_logprobs=1, n=2)
    assert [c.message.content for c in found.choices] == ["User: Hi", "User: Hi"]
    assert found.choices[0].finish_reason == "stop" and found.choices[0].message.role == "assistant"
    first = found.choices[0].logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("U", -0.85, [85]) and first.top_logprobs[0].token == "U"
    chunks = list(client.chat.completions.create(model="parrot", messages=HI, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "User: Hi"
    assert live.engine.seen[-1].prompt == (256, *b"User: Hi\nAssistant:")


def test_parts_of_text_and_developers_are_understood(client, live):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]
    client.chat.completions.create(model="parrot", messages=messages, max_completion_tokens=3, user="someone")
    request = live.engine.seen[-1]
    assert bytes(request.prompt[1:]) == b"System: Be brief\nUser: Hi\nAssistant:" and request.max_tokens == 3
    assert (request.owner, request.user) == ("127.0.0.1", "someone")


@pytest.mark.parametrize(
    "options, param, says",
    [
        ({"best_of": 3}, "best_of", "ask for n"),
        ({"suffix": "x"}, "suffix", "behind a prompt"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "token ids with numbers"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "token 300"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "of token 5 is 101: it must be a number from -100 to 100"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "up to 300"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_tokens": 500}, "max_tokens", "from 1 to 64"),
        ({"max_tokens": 60}, "max_tokens", "maximum context length is 64 tokens.*requested 66 tokens .6 in the prompt, 60 in the"),
        ({"prompt": "x" * 100}, "prompt", "101 tokens"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [300]}, "prompt", "token 300"),
        ({"prompt": ["a", [3]]}, "prompt", "a list of texts"),
        ({"prompt": ["a"] * 9}, "prompt", "at most 8"),
        ({"prompt": ["a"] * 8, "n": 2}, "prompt", "at most 4"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"logprobs": 100}, "logprobs", "from 0 to 20"),
        ({"stop": ["a"] * 17}, "stop", "up to 16"),
        ({"stop": [""]}, "stop", "empty"),
        ({"extra_body": {"stream_options": {}}}, "stream_options", "needs stream"),
        ({"extra_body": {"stream": True, "stream_options": {"include_usage": 1}}}, "stream_options", "include_usage is 1"),
        ({"extra_body": {"user": ["me"]}}, "user", "must be a text"),
        ({"extra_body": {f"x{i}": 1 for i in range(300)}}, None, "at most 256"),
        ({"extra_body": {"response_format": {"type": "yaml"}}}, "response_format", "json_object"),
        ({"extra_body": {"response_format": {"type": "json_schema"}}}, "response_format", "must be a JSON schema"),
        ({"extra_body": {"response_format": {"type": "json_object", "schema": {}}}}, "response_format", "schema"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex", "cannot be used"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice", "at least one"),
        ({"extra_body": {"guided_choice": ["a"], "guided_regex": "a"}}, "guided_choice", "one of them"),
        ({"extra_body": {"guided_grammar": "x"}}, "guided_grammar", "cannot be used"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "json": {}}}}, "structured_outputs", "must hold one of"),
        ({"extra_body": {"structured_outputs": {"regexp": "a"}}}, "structured_outputs", "regex"),
        ({"extra_body": {"guided_whitespace_pattern": " ?"}}, "guided_whitespace_pattern", "needs a JSON schema"),
        ({"stop": "a" * 2000}, "stop", "more than 1,024"),
        ({"extra_body": {"temprature": 0.5}}, "temprature", "did you mean 'temperature'"),
        ({"extra_body": {"max_new_tokens": 5}}, "max_new_tokens", "did you mean 'max_tokens'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_its_name(client, options, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        complete(client, **options)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "options, param, says",
    [
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools", "call no tools"),
        ({"functions": [{"name": "f"}]}, "functions", "call no tools"),
        ({"extra_body": {"chat_template": "{{ messages }}"}}, "chat_template", "never one from a request"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": []}, "messages", "1 to"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages", "tools"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "messages", "user"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages", "not text"),
        ({"messages": [{"role": "user", "content": "x" * 99}]}, "prompt", "maximum context length is 64"),
    ],
)  # fmt: skip
def test_what_a_conversation_cannot_hold(client, options, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        client.chat.completions.create(**{"model": "parrot", "messages": HI, **options})
    assert caught.value.param == param


def test_biases_reach_the_engine(client, live):
    complete(client, logit_bias={"5": -100, "65": 2.5})
    assert live.engine.seen[-1].bias == ((5, -100.0), (65, 2.5))
    client.chat.completions.create(model="parrot", messages=HI, logit_bias={"7": 1})
    assert live.engine.seen[-1].bias == ((7, 1.0),)


def test_what_says_nothing_is_let_through(client):
    """Clients send the defaults of what we do not do, and names that we do not know."""
    complete(client, suffix="", best_of=1, logit_bias={}, extra_body={"something": 1, "response_format": {"type": "text"}})
    client.chat.completions.create(model="parrot", messages=HI, tools=[], store=False, metadata={}, reasoning_effort="low")


def test_a_failing_model_is_a_500_and_the_next_request_works(client):
    for stream in (False, True):
        with pytest.raises((openai.InternalServerError, openai.APIError), match="a made-up fault"):
            list(complete(client, prompt=[7, 1], stream=stream))
    assert complete(client).choices[0].text == "hello"


# --- below the client -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("DELETE", "/", None, 405),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("POST", "/classify", b"{}", 404),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"[1]", 400),
        ("POST", "/v1/completions", b'{"prompt": NaN', 400),
        ("POST", "/v1/completions", b"[" * 60_000, 400),
        ("POST", "/v1/completions", b'{"prompt": "\xff"}', 400),
        ("POST", "/v1/completions", b'{"temperature": NaN, "prompt": "a"}', 400),
        *(("POST", "/v1/completions", b'{"%s": %s}' % (name, b"9" * 4000), 400) for name in (b"max_tokens", b"top_p", b"seed")),
        ("POST", "/v1/completions", b'{"seed": ' + b"9" * 5000 + b"}", 400),
        ("POST", "/v1/completions", b'{"seed": 1e999}', 400),
        ("POST", "/v1/completions", b" " * 70_000, 413),
    ],
)
def test_errors_have_openais_shape(live, method, path, body, status):
    found = httpx.request(method, live.url + path, content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == status
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and "\n" not in error["message"]


def test_a_form_of_another_site_is_refused(live):
    """A browser sends text/plain across sites without asking; JSON it asks for first, and no answer allows it. And a name that
    someone points at this machine is no name of ours."""
    assert httpx.post(f"{live.url}/v1/completions", content=b'{"prompt": "a"}').status_code == 415
    assert httpx.get(f"{live.url}/v1/models", headers={"Host": "evil.example"}).status_code == 400
    assert httpx.get(f"{live.url}/v1/models", headers={"Host": "localhost:8000"}).status_code == 200
    asked = httpx.options(f"{live.url}/v1/completions", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in asked.headers


def test_a_body_without_a_length_is_cut_off(live):
    parts = (b" " * 10_000 for _ in range(1000))
    try:
        found = httpx.post(f"{live.url}/v1/completions", content=parts, headers={"Content-Type": "application/json"})
        assert found.status_code == 413
    except httpx.WriteError:
        pass  # the connection was closed before the answer could be read
    assert next(parts, None) is not None, "all of it was read"


def test_lone_surrogates_do_no_harm(live):
    body = b'{"prompt": "a\\ud800b", "max_tokens": 3, "echo": true, "user": "\\udfff"}'
    found = httpx.post(f"{live.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 200 and found.json()["choices"][0]["text"] == "a?ba?"
    wrong = httpx.post(f"{live.url}/v1/completions", content=b'{"model": "\\ud800"}', headers={"Content-Type": "application/json"})
    assert wrong.status_code == 404


def test_keys():
    with fake_server(ServeOptions(api_key="sésame")) as live:
        url = f"{live.url}/v1/models"
        for header in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sésame".encode()},
            {"Authorization": "Basic sésame".encode()},
        ):
            found = httpx.get(url, headers=header)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(f"{live.url}/metrics", headers=header).status_code == 401
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert httpx.get(url, headers={"Authorization": f"{scheme} sésame".encode()}).status_code == 200
        for path in ("/healthz", "/health", "/"):
            assert httpx.get(f"{live.url}{path}").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_no_other_address_without_a_key(host, monkeypatch):
    monkeypatch.delenv("JAXLM_API_KEY", raising=False)
    with pytest.raises(ValueError, match="set an API key"):
        ServeOptions(host=host)
    monkeypatch.setenv("JAXLM_API_KEY", "k")
    assert ServeOptions(host=host).key == "k"
    assert ServeOptions(host="::1", api_key=None).loopback and ServeOptions(host="localhost").loopback


def test_a_full_queue_is_429_and_takes_nothing():
    with fake_server(slots=1, queue=2, delay=0.01) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client, prompt=["a", "b", "c", "d", "e", "f"], max_tokens=30)
        assert caught.value.response.headers["retry-after"] and caught.value.type == "rate_limit_error"
        until(lambda: live.engine.stats().running + live.engine.stats().waiting == 0)
        assert complete(client).choices[0].text == "hello"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(stream):
    with fake_server(slots=1, context=100_000, delay=0.005) as live:
        body = {"prompt": [104], "max_tokens": 90_000, "stream": stream, "n": 2}
        if stream:
            with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as found:
                next(found.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{live.url}/v1/completions", json=body, timeout=0.2)
        until(lambda: live.engine.stats().running + live.engine.stats().waiting == 0)
        assert len(live.engine.cancelled) == 2


def test_time_ends_a_text():
    with fake_server(ServeOptions(timeout=0.2), slots=1, context=100_000, delay=0.005) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0)
        other = live.engine.submit(Request((104,), 90_000), lambda event: None)
        until(lambda: live.engine.stats().running == 1)
        with pytest.raises(openai.InternalServerError, match="too busy") as caught:  # the other has the only slot
            complete(client, prompt=[105], max_tokens=90_000)
        assert caught.value.status_code == 503
        live.engine.cancel(other)
        found = complete(client, prompt=[104], max_tokens=90_000)
        assert found.choices[0].finish_reason == "length" and 5 < found.usage.completion_tokens < 90_000
        until(lambda: live.engine.stats().running == 0)


def test_health_follows_the_engine():
    with fake_server() as live:
        assert httpx.get(f"{live.url}/healthz").json() == httpx.get(f"{live.url}/health").json() == {"status": "ok"}
        live.engine.beat = 1000.0
        assert httpx.get(f"{live.url}/healthz").status_code == 503
        live.engine.beat = 0.0
        live.engine.close()
        found = httpx.get(f"{live.url}/healthz")
        assert found.status_code == 503 and "ended" in found.json()["reason"]
        again = httpx.post(f"{live.url}/v1/completions", json={"prompt": "a"})
        assert again.status_code == 503 and again.headers["retry-after"]


def test_draining_lets_texts_end_and_takes_no_more():
    with fake_server(ServeOptions(drain=10), context=1000, delay=0.005) as live:
        found = {}

        def ask():
            found["text"] = httpx.post(f"{live.url}/v1/completions", json={"prompt": [104], "max_tokens": 60}).json()

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: live.engine.stats().running == 1)
        live.server.stop()
        refused = httpx.post(f"{live.url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert httpx.get(f"{live.url}/healthz").status_code == 503
        thread.join()
        assert found["text"]["choices"][0]["text"] == "h" * 60
        until(lambda: _refuses(live.url))


def test_what_does_not_end_in_time_is_told_so():
    with fake_server(ServeOptions(drain=0.2), context=100_000, delay=0.005) as live:
        body = {"prompt": [104], "max_tokens": 90_000, "stream": True}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body) as found:
            lines = found.iter_lines()
            next(lines)
            live.server.stop()
            last = [line for line in lines if line][-1]
        assert "stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
        until(lambda: _refuses(live.url))


def _refuses(url):
    try:
        httpx.get(url)
    except httpx.TransportError:
        return True
    return False


def test_metrics_count(client, live):
    def figures():
        lines = httpx.get(f"{live.url}/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if not name.startswith("#")}

    before = figures()
    complete(client, prompt=[104], max_tokens=5)
    httpx.get(f"{live.url}/secret-{time.time()}")
    after = figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['jaxlm_http_requests_total{route="/v1/completions",status="200"}'] == 1
    assert grown['jaxlm_http_requests_total{route="other",status="404"}'] == 1 and not any("secret" in name for name in after)
    assert grown["jaxlm_engine_new_tokens_total"] == 5 and grown["jaxlm_engine_prompt_tokens_total"] == 1
    assert grown["jaxlm_time_to_first_token_seconds_count"] == 1 and grown["jaxlm_time_per_token_seconds_count"] == 4
    assert after["jaxlm_engine_slots"] == 4 and after["jaxlm_engine_running"] == after["jaxlm_engine_waiting"] == 0
