"""The request fields of OpenAI's and of vLLM's API: which ones each route honours, which change nothing, which are refused.

A field is never accepted and then ignored, unless `HARMLESS` says why that changes nothing. The tables of docs/serving.md are
tested against these.
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.serve.fields import bad

COMPLETIONS, CHAT, EMBEDDINGS, CLASSIFY = "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/classify"
_log = logging.getLogger(__name__)


class Refused(NamedTuple):
    """A field that this server does not have."""

    why: str
    neutral: Sequence[Any] = ()
    """Values that ask for nothing; clients send them by default."""


_BOTH = frozenset({
    "add_special_tokens", "allowed_token_ids", "bad_words", "best_of", "cache_salt", "echo", "frequency_penalty", "guided_choice",
    "guided_grammar", "guided_json", "guided_regex", "guided_whitespace_pattern", "ignore_eos", "include_stop_str_in_output",
    "logit_bias", "logprobs", "max_tokens", "min_p", "min_tokens", "model", "n", "presence_penalty", "prompt_logprobs",
    "repetition_penalty", "request_id", "response_format", "return_token_ids", "return_tokens_as_token_ids", "seed",
    "skip_special_tokens", "spaces_between_special_tokens", "stop", "stop_token_ids", "stream", "stream_options",
    "structured_outputs", "temperature", "top_k", "top_p", "truncate_prompt_tokens", "truncation_side", "user",
})  # fmt: skip
HONOURED: Mapping[str, frozenset[str]] = {
    COMPLETIONS: _BOTH | {"prompt"},
    CHAT: _BOTH | {
        "add_generation_prompt", "continue_final_message", "function_call", "functions", "max_completion_tokens", "messages",
        "tool_choice", "tools", "top_logprobs",
    },
    EMBEDDINGS: frozenset({"encoding_format", "input", "model", "user"}),
    CLASSIFY: frozenset({"input", "model", "pair", "text", "user"}),
}  # fmt: skip
"""Fields that a route reads."""

HARMLESS: Mapping[str, str] = {
    "guided_decoding_backend": "there is one, llguidance",
    "include_reasoning": "no part of a text is set apart as reasoning",
    "metadata": "OpenAI stores it with the answer; nothing is stored",
    "parallel_tool_calls": "tools are not called",
    "prompt_cache_key": "prompt prefixes are reused without it",
    "prompt_cache_options": "prompt prefixes are reused without it",
    "prompt_cache_retention": "prompt prefixes are reused without it",
    "reasoning_effort": "no part of a text is set apart as reasoning",
    "safety_identifier": "nobody is reported",
    "service_tier": "there is one",
    "store": "nothing is stored",
}
"""Fields that cannot change an answer of this server, and why."""

_NONE = "this server does not have it"
_TEXT_ONLY = "this server reads and writes text"
_WRITING: Mapping[str, Refused] = {
    "ec_transfer_params": Refused(_NONE), "kv_transfer_params": Refused(_NONE), "vllm_xargs": Refused(_NONE, ({},)),
    "length_penalty": Refused("it is for beam search, which this server does not have", (1, 1.0)),
    "logits_processors": Refused("a request brings no program", ([],)),
    "mm_processor_kwargs": Refused(_TEXT_ONLY), "media_io_kwargs": Refused(_TEXT_ONLY),
    "priority": Refused("clients take turns", (0,)),
    "repetition_detection": Refused(_NONE), "structural_tag": Refused(_NONE),
    "return_token_offsets": Refused(_NONE, (False,)),
    "thinking_token_budget": Refused("no part of a text is set apart as reasoning", (-1,)),
    "use_beam_search": Refused("this server has no beam search", (False,)),
}  # fmt: skip
_POOLING: Mapping[str, Refused] = {
    "activation": Refused(_NONE), "add_special_tokens": Refused("give token ids for a text without them", (True,)),
    "cache_salt": Refused("no prompt prefix is reused"),
    "chat_template": Refused(_NONE), "chat_template_kwargs": Refused(_NONE, ({},)),
    "embed_dtype": Refused("vectors are float32", ("float32",)), "endianness": Refused("it is little", ("native", "little")),
    "messages": Refused("give texts or token ids as input"), "mm_processor_kwargs": Refused(_TEXT_ONLY),
    "normalize": Refused("vectors have length 1", (True,)), "priority": Refused("clients take turns", (0,)),
    "request_id": Refused("the answer has no id"), "softmax": Refused("the model says what its outputs mean"),
    "truncate_prompt_tokens": Refused("a text that is too long is refused, not cut"),
    "truncation_side": Refused("a text that is too long is refused, not cut"),
    "use_activation": Refused("the model says what its outputs mean"),
}  # fmt: skip
REFUSED: Mapping[str, Mapping[str, Refused]] = {
    COMPLETIONS: {
        **_WRITING,
        "prompt_embeds": Refused(_TEXT_ONLY),
        "suffix": Refused("this server writes behind a prompt, not into it", ("",)),
    },
    CHAT: {
        **_WRITING,
        "audio": Refused(_TEXT_ONLY), "modalities": Refused(_TEXT_ONLY, (["text"],)), "moderation": Refused(_NONE),
        "chat_template": Refused("the model's own chat template is used, never one from a request"),
        "chat_template_kwargs": Refused("the model's own chat template is used as it is", ({},)),
        "documents": Refused("the chat template is given messages alone", ([],)),
        "prediction": Refused(_NONE),
        "return_assistant_tokens_mask": Refused(_NONE, (False,)), "return_prompt_text": Refused(_NONE, (False,)),
        "verbosity": Refused("this server's models have no such setting", ("medium",)),
        "web_search_options": Refused("this server searches nothing"),
    },
    EMBEDDINGS: {**_POOLING, "dimensions": Refused("a vector is as long as the model is wide")},
    CLASSIFY: _POOLING,
}  # fmt: skip
"""Fields that a route answers with status 400, unless their value is neutral."""

FIELDS = 256
"""Maximum number of fields of a request."""
_WARNED: set[str] = set()


def check_fields(route: str, body: Mapping[str, Any]) -> None:
    """Refuse, by its name, a field that would be ignored. A field that neither API has is let through with a warning in the log, as
    vLLM does, unless it is nearly the name of one that the route honours."""
    honoured, refused = HONOURED[route], REFUSED[route]
    if len(body) > FIELDS:
        raise bad(f"the body has {len(body)} fields: at most {FIELDS} may be")
    for name, value in body.items():
        if value is None or name in honoured or name in HARMLESS:
            continue
        if name in refused:
            if not any(type(value) is type(plain) and value == plain for plain in refused[name].neutral):
                raise bad(f"{name} is not supported: {refused[name].why}", name, "unsupported_parameter")
            continue
        near = difflib.get_close_matches(name[:60], honoured, 1, 0.8)
        if near:
            raise bad(f"there is no field {name[:60]!r}: did you mean {near[0]!r}?", name[:60], "unknown_parameter")
        if name[:60] not in _WARNED and len(_WARNED) < 1000:
            _WARNED.add(name[:60])
            _log.warning("requests hold a field that %s does not have, which is ignored: %r", route, name[:60])
