"""Every field of OpenAI's and vLLM's requests, on every route: it changes the request to the engine or the answer, it is refused by
its name, or the documentation says why it changes nothing."""

import dataclasses
import json
import pathlib
import typing

import httpx
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from served import serving
from test_vectors import trained

from jaxlm.data.tokenizer import Bytes
from jaxlm.serve import protocol
from jaxlm.serve.asks import Asker, Limits
from jaxlm.serve.options import ServeOptions
from jaxlm.serve.protocol import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS
from jaxlm.serve.service import serve_what

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "serving.md"
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "You"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}

# vLLM's own fields, of its releases with guided_… and of those with structured_outputs.
VLLM_BOTH = """
    use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs
    bad_words add_special_tokens response_format structured_outputs guided_json guided_regex guided_choice guided_grammar
    guided_decoding_backend guided_whitespace_pattern structural_tag priority request_id logits_processors
    return_tokens_as_token_ids return_token_ids return_token_offsets cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection thinking_token_budget
"""
VLLM_CHAT = """
    best_of echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs mm_processor_kwargs
    media_io_kwargs include_reasoning return_prompt_text return_assistant_tokens_mask
"""
VLLM_POOLING = """
    truncate_prompt_tokens truncation_side request_id priority add_special_tokens messages chat_template chat_template_kwargs
    mm_processor_kwargs use_activation cache_salt
"""
VLLM = {
    COMPLETIONS: f"{VLLM_BOTH} prompt_embeds",
    CHAT: f"{VLLM_BOTH} {VLLM_CHAT}",
    EMBEDDINGS: f"{VLLM_POOLING} normalize embed_dtype endianness",
    CLASSIFY: f"{VLLM_POOLING} input user activation softmax",
}


def names(params):
    return set(typing.get_type_hints(params))


OPENAI = {
    COMPLETIONS: names(completion_create_params.CompletionCreateParamsStreaming),
    CHAT: names(chat_create_params.CompletionCreateParamsStreaming),
    EMBEDDINGS: names(embedding_create_params.EmbeddingCreateParams),
    CLASSIFY: set(),
}
CASES = [(route, name) for route in OPENAI for name in sorted({*OPENAI[route], *VLLM[route].split()})]

BASE = {
    COMPLETIONS: {"prompt": "hello", "max_tokens": 8, "seed": 1},
    CHAT: {"messages": HI, "max_tokens": 8, "seed": 1},
    EMBEDDINGS: {"input": "hello"},
    CLASSIFY: {"text": "hello"},
}
# Of each field that is honoured: a value that must change something, and what it needs beside it, in both requests.
TEXT = {
    "add_special_tokens": (False, {}), "allowed_token_ids": ([104], {}), "bad_words": (["lo"], {}), "cache_salt": ("s", {}),
    "echo": (True, {}), "frequency_penalty": (0.5, {}), "guided_choice": (["a"], {}), "guided_grammar": ('root ::= "a"', {}),
    "guided_json": (SCHEMA, {}), "guided_regex": ("[a-c]", {}), "guided_whitespace_pattern": (" ?", {"guided_json": SCHEMA}),
    "ignore_eos": (True, {}), "include_stop_str_in_output": (True, {"stop": "l"}), "logit_bias": ({"5": 1}, {}),
    "logprobs": (1, {}),
    "max_tokens": (3, {}), "min_p": (0.1, {}), "min_tokens": (4, {}), "model": ("other", {}), "n": (2, {}),
    "presence_penalty": (0.5, {}), "prompt_logprobs": (1, {}), "repetition_penalty": (1.5, {}), "request_id": ("mine", {}),
    "response_format": ({"type": "json_object"}, {}), "return_token_ids": (True, {}),
    "return_tokens_as_token_ids": (True, {"logprobs": 1}), "seed": (2, {}),
    "skip_special_tokens": (False, {"ignore_eos": True, "min_tokens": 1}),
    "spaces_between_special_tokens": (False, {"skip_special_tokens": False}), "stop": ("l", {}), "stop_token_ids": ([108], {}),
    "stream": (True, {}), "stream_options": ({"include_usage": True}, {"stream": True}),
    "structured_outputs": ({"choice": ["a"]}, {}), "temperature": (0.5, {}), "top_k": (3, {}), "top_p": (0.5, {}),
    "truncate_prompt_tokens": (3, {}), "truncation_side": ("right", {"truncate_prompt_tokens": 3}), "user": ("someone", {}),
    "best_of": (3, {}),
}  # fmt: skip
CHANGES = {
    COMPLETIONS: TEXT | {"prompt": ("other", {})},
    CHAT: TEXT | {
        "add_generation_prompt": (False, {}), "add_special_tokens": (True, {}),
        "continue_final_message": (True, {"add_generation_prompt": False}),
        "function_call": ({"name": "f"}, {}), "functions": ([{"name": "f"}], {}), "logprobs": (True, {}),
        "max_completion_tokens": (3, {}), "messages": ([{"role": "user", "content": "Hello"}], {}),
        "return_tokens_as_token_ids": (True, {"logprobs": True}),
        "tool_choice": ("required", {}), "tools": ([{"type": "function", "function": {"name": "f"}}], {}),
        "top_logprobs": (2, {"logprobs": True}), "include_stop_str_in_output": (True, {"stop": "e"}), "stop": ("e", {}),
        "truncate_prompt_tokens": (12, {}),
        "truncation_side": ("right", {"truncate_prompt_tokens": 12}),
    },
    EMBEDDINGS: {"encoding_format": ("base64", {}), "input": ("other", {}), "model": ("other", {})},
    CLASSIFY: {"input": ([104], {}), "model": ("other", {}), "text": ("other", {})},
}  # fmt: skip
# A value that is refused where one of another type would be neutral or wrong for another reason.
REFUSED_VALUES = {
    "priority": 1,
    "length_penalty": 2.0,
    "thinking_token_budget": 5,
    "modalities": ["audio"],
    "embed_dtype": "float16",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A small encoder with labels, and one without, for the routes that write nothing."""
    services = {
        EMBEDDINGS: serve_what(trained(tmp_path_factory.mktemp("vectors"), "encoder", {"kind": "masked_lm"}), ServeOptions()),
        CLASSIFY: serve_what(
            trained(tmp_path_factory.mktemp("labels"), "encoder", {"kind": "sequence", "labels": 3}), ServeOptions()
        ),
    }
    with serving(services[EMBEDDINGS]) as (vectors, _), serving(services[CLASSIFY]) as (labels, _):
        yield {EMBEDDINGS: vectors, CLASSIFY: labels}
    for service in services.values():
        service.close()


def observe(live, rows, route, body):
    """Status, what the engine was asked, and the answer without what differs each time."""
    engine = live.engine if route in (COMPLETIONS, CHAT) else None
    before = len(engine.seen) if engine else 0
    url = live.url if engine else rows[route]
    found = httpx.post(url + route, json={name: value for name, value in body.items() if value is not None}, timeout=60)
    asked = [] if engine is None else [seen(request) for request in engine.seen[before:]]
    text = found.text
    if found.status_code == 200 and not body.get("stream"):
        answer = found.json()
        answer["created"] = 0
        if not body.get("request_id"):
            answer.pop("id", None)
        text = json.dumps(answer, sort_keys=True)
    elif found.status_code == 200:
        answer = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        text = json.dumps([{**event, "id": 0, "created": 0} for event in answer], sort_keys=True)
    return found.status_code, asked, text


def seen(request):
    made = dataclasses.asdict(dataclasses.replace(request, guide=None))
    made["guide"] = None if request.guide is None else walk(request.guide)
    return made


def walk(guide):
    """The masks of a guide along the way of its first tokens."""
    masks = []
    while not guide.ended and len(masks) < 6:
        masks.append(guide.mask().tobytes())
        guide.take(int(guide.mask().argmax()))
    return masks


@pytest.mark.parametrize("route, name", CASES, ids=[f"{route}-{name}" for route, name in CASES])
def test_no_field_is_accepted_and_ignored(live, rows, route, name):
    classes = [name in protocol.HONOURED[route], name in protocol.REFUSED[route], name in protocol.HARMLESS]
    assert sum(classes) == 1, f"{name} on {route} must be honoured, refused or harmless"
    if name in protocol.HARMLESS:
        assert f"| `{name}` | {protocol.HARMLESS[name]} |" in DOCS.read_text(), "docs/serving.md must say why it changes nothing"
        return
    if name in protocol.REFUSED[route]:
        value = REFUSED_VALUES.get(name, "something")
        status, _, text = observe(live, rows, route, {**BASE[route], name: value})
        error = json.loads(text)["error"]
        assert status == 400 and error["param"] == name and name in error["message"]
        for neutral in protocol.REFUSED[route][name].neutral:
            assert observe(live, rows, route, {**BASE[route], name: neutral})[0] == 200
        return
    if name == "user" and route in (EMBEDDINGS, CLASSIFY):
        return  # whose turn it is to be read: see `Readers`
    value, beside = CHANGES[route][name]
    plain = {**BASE[route], **beside}
    changed = {**plain, name: value}
    if route == CLASSIFY and name == "input":
        del changed["text"]
    before, after = observe(live, rows, route, plain), observe(live, rows, route, changed)
    assert before[0] == 200 or json.loads(before[2])["error"]["param"] == name, before[2]
    if after[0] != 200:
        assert after[0] in (400, 404) and json.loads(after[2])["error"]["param"] == name, after[2]
        assert (name, route) in {("model", route), ("best_of", route), ("spaces_between_special_tokens", route), *TOOLS}
    assert before != after


TOOLS = {(name, CHAT) for name in ("tools", "tool_choice", "functions", "function_call")}


@pytest.mark.parametrize("route", OPENAI)
def test_the_documentation_names_every_field(route):
    """A row for each route, of the fields that it honours and of those that it refuses."""
    table = {cells[1].strip(" `"): cells for line in DOCS.read_text().splitlines() if len(cells := line.split("|")) == 5}
    honoured, refused = ([name.strip(" `") for name in cell.split(",")] for cell in table[route][2:4])
    assert honoured == sorted(protocol.HONOURED[route]) and refused == sorted(protocol.REFUSED[route])


def test_the_servers_limit_holds_for_what_a_request_leaves_out():
    asker = Asker(Bytes(), None, (), Limits(64, 4, 16, 256))
    assert [request.max_tokens for request in asker.completion({"prompt": "a"}).requests] == [4]
