"""What a client asks for → requests for the engine."""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.data import Chat, Tokenizer
from jaxlm.generate import SampleConfig
from jaxlm.generate.request import Request
from jaxlm.generate.slots import BIASES, TOP
from jaxlm.serve.errors import ApiError
from jaxlm.serve.fields import Fields, bad, check_ids, texts_or_ids
from jaxlm.serve.guided import Guided
from jaxlm.serve.speaking import turns_of

STOPS = 16
MESSAGES = 4096
# What would change the answer and is not there: refused, so that nobody takes an answer for what it is not.
_NEVER: Mapping[str, Sequence[Any]] = {
    "guided_grammar": (), "structured_outputs": (), "use_beam_search": (False,),
}  # fmt: skip
_TOOLS: Mapping[str, Sequence[Any]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
}
_TEMPLATES: Mapping[str, Sequence[Any]] = {"chat_template": (), "chat_template_kwargs": ({},)}
_MEDIA: Mapping[str, Sequence[Any]] = {"modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": ()}


@dataclasses.dataclass(frozen=True)
class Ask:
    """Texts to be written for one HTTP request."""

    requests: tuple[Request, ...]
    """One for each text."""
    prompt_tokens: int
    """Tokens of the prompts, each counted once however many texts it has."""
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    """The stream ends with how many tokens there were."""
    usage_each: bool = False
    """Each of its chunks says how many there are so far."""
    trim: bool = False
    """White space at the beginning of a text is left out."""
    echoes: tuple[str, ...] | None = None
    """What is shown before each text: its prompt."""
    unseen: int = 0
    """Tokens at the beginning of each prompt that the client did not send."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    context: int
    max_tokens: int
    """New tokens of a text."""
    max_n: int
    max_texts: int


class Asker:
    """Reads requests for one model."""

    def __init__(self, tokenizer: Tokenizer, chat: Chat | None, stop_ids: Sequence[int], limits: Limits):
        self.tokenizer, self.chat, self.limits = tokenizer, chat, limits
        self._stop_ids = frozenset([tokenizer.eos_id, *stop_ids])

    def completion(self, body: Mapping[str, Any], owner: str) -> Ask:
        """Of `/v1/completions`. ApiError for what cannot be answered."""
        fields = Fields(body)
        fields.refuse(_NEVER, "this server has no such way to write")
        fields.refuse({"suffix": ("",)}, "this server writes behind a prompt, not into it")
        n = fields.whole("n", 1, self.limits.max_n) or 1
        fields.refuse({"best_of": (n,)}, "ask for n texts and choose among them")
        given = fields.get("prompt")
        prompts = texts_or_ids("" if given is None else given, "prompt", self.limits.max_texts // n)
        echo, logprobs = fields.flag("echo"), fields.whole("logprobs", 0, TOP)
        tokens, echoes, unseen = [], [], 0
        for prompt in prompts:
            if isinstance(prompt, str):  # what every document of the training text began with comes first
                tokens.append((self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()))
                echoes.append(prompt)
                unseen = 1
            else:
                if not prompt:
                    raise bad("prompt holds an empty list of token ids: give at least one", "prompt")
                check_ids(prompt, self.tokenizer.vocab_size, "prompt")
                tokens.append(tuple(prompt))
                echoes.append(self.tokenizer.decode(prompt) if echo else "")
        wanted = fields.whole("max_tokens", 0 if echo else 1, self.limits.max_tokens)
        requests = self._requests(fields, tokens, n, wanted, 16, logprobs, echo and logprobs is not None, self._stop_ids, owner)
        shown = tuple(text for text in echoes for _ in range(n)) if echo else None
        return self._ask(fields, requests, tokens, fields.texts("stop", STOPS), echoes=shown, unseen=unseen)

    def conversation(self, body: Mapping[str, Any], owner: str) -> Ask:
        """Of `/v1/chat/completions`. ApiError for what cannot be answered."""
        assert self.chat is not None, "the route says so before"
        fields = Fields(body)
        fields.refuse(_NEVER, "this server has no such way to write")
        fields.refuse(_TOOLS, "this server's models call no tools")
        fields.refuse(_TEMPLATES, "the model's own chat template is used, never one from a request")
        fields.refuse(_MEDIA, "this server reads and writes text")
        n = fields.whole("n", 1, self.limits.max_n) or 1
        try:
            prompt = tuple(self.chat.prompt(_messages(fields.get("messages"))).tolist())
        except ValueError as error:
            raise bad(str(error), "messages") from None
        top = fields.whole("top_logprobs", 0, TOP)
        asked = fields.flag("logprobs")
        if top is not None and not asked:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        most = self.limits.max_tokens
        wanted, older = fields.whole("max_completion_tokens", 1, most), fields.whole("max_tokens", 1, most)
        logprobs = (top or 0) if asked else None
        stop_ids = self._stop_ids | self.chat.stop_ids
        requests = self._requests(fields, [prompt], n, older if wanted is None else wanted, most, logprobs, False, stop_ids, owner)
        return self._ask(fields, requests, [prompt], (*fields.texts("stop", STOPS), *turns_of(self.chat)), trim=True)

    def _requests(
        self, fields: Fields, prompts: Sequence[tuple[int, ...]], n: int, wanted: int | None, default: int,
        logprobs: int | None, prompt_logprobs: bool, stop: frozenset[int], owner: str,
    ) -> tuple[Request, ...]:  # fmt: skip
        sample, context = self._sample(fields), self.limits.context
        seed = fields.whole("seed", -(1 << 63), (1 << 64) - 1)
        seed = random.getrandbits(31) if seed is None else seed
        guided, bias = Guided(fields, self.tokenizer, stop), self._bias(fields)
        made = []
        for prompt in prompts:
            room = context - len(prompt)
            if room < (1 if wanted is None else wanted):
                raise bad(
                    f"the prompt has {len(prompt)} tokens" + (f" and max_tokens is {wanted}" if wanted else "")
                    + f": together they must not be more than the context of {context} tokens",
                    "prompt" if room < 1 else "max_tokens", "context_length_exceeded",
                )  # fmt: skip
            size = min(default, room) if wanted is None else wanted
            for i in range(n):
                seed_i = (seed + i) & 0x7FFFFFFF
                made.append(Request(prompt, size, sample, seed_i, stop, logprobs, prompt_logprobs, owner, guided.text(), bias))
        return tuple(made)

    def _sample(self, fields: Fields) -> SampleConfig:
        given: dict[str, Any] = {
            "temperature": fields.number("temperature", 1.0, 0, 2), "top_p": fields.number("top_p", 1.0, 0, 1),
            "top_k": fields.whole("top_k", -1, 1 << 31), "min_p": fields.number("min_p", 0.0, 0, 1),
            "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
            "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
            "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.1, 10),
        }  # fmt: skip
        given["top_k"] = given["top_k"] if (given["top_k"] or 0) > 0 else None  # 0 and −1: off, as others spell it
        given["top_p"] = max(given["top_p"], 1e-6)  # 0: the likeliest token alone
        return SampleConfig(**given)

    def _bias(self, fields: Fields) -> tuple[tuple[int, float], ...]:
        """OpenAI's: what is added to the logits of tokens, by their ids as texts."""
        given, name = fields.get("logit_bias"), "logit_bias"
        if given is None:
            return ()
        if not isinstance(given, dict) or len(given) > BIASES or not all(re.fullmatch("[0-9]{1,9}", key) for key in given):
            raise bad(f'{name} must be an object of up to {BIASES} token ids with numbers, such as {{"50": -100}}', name)
        check_ids([int(key) for key in given], self.tokenizer.vocab_size, name)
        each = Fields(given)
        try:
            return tuple((int(key), each.number(key, 0.0, -100, 100)) for key in given)
        except ApiError as error:
            raise bad(f"{name} of token {error.message}", name) from None

    def _ask(
        self, fields: Fields, requests: tuple[Request, ...], prompts: Sequence[Sequence[int]], stop: tuple[str, ...], **more: Any
    ) -> Ask:
        stream, options = fields.flag("stream"), fields.get("stream_options")
        if options is not None and not stream:
            raise bad("stream_options needs stream: true", "stream_options")
        if options is not None and not isinstance(options, dict):
            raise bad('stream_options must be an object such as {"include_usage": true}', "stream_options")
        usage, each = (Fields(options or {}).flag(name) for name in ("include_usage", "continuous_usage_stats"))
        return Ask(requests, sum(map(len, prompts)), stop, stream, usage, usage and each, **more)


def _messages(given: Any) -> list[dict[str, str]]:
    """OpenAI's messages as those of `Chat`: parts of text joined, `developer` for `system`. ApiError for what it is not."""
    if not isinstance(given, list) or not given or len(given) > MESSAGES:
        raise bad(f"messages must be a list of 1 to {MESSAGES} objects with role and content", "messages")
    made = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise bad(f"{where} must be an object with role and content", "messages")
        Fields(message).refuse({"tool_calls": ([],), "function_call": (), "audio": ()}, "this server's models call no tools")
        role = message.get("role")
        if role in ("tool", "function"):
            raise bad(f"{where} has role {role!r}: this server's models call no tools", "messages", "unsupported_parameter")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, where) for part in content)
        made.append({**message, "role": "system" if role == "developer" else role, "content": content})
    return made


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise bad(f"{where} holds a part that is not text: this server's models read text alone", "messages")
