"""What a client asks for → requests for the engine."""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data import Chat, TextEncoder, Tokenizer
from jaxlm.generate import NO_SETTINGS, GenerationSettings, SampleConfig
from jaxlm.generate.request import BAD, BAD_LENGTH, BIASES, TOP, Request
from jaxlm.generate.request import STOPS as STOP_IDS
from jaxlm.serve.errors import ApiError
from jaxlm.serve.fields import Fields, bad, check_ids, texts_or_ids
from jaxlm.serve.guided import Guided
from jaxlm.serve.messages import read_messages
from jaxlm.serve.protocol import CHAT, COMPLETIONS, check_fields
from jaxlm.serve.readers import NOBODY, Client
from jaxlm.serve.speaking import turns_of

STOPS = 16
STOP_LENGTH = 1024
"""Most characters of a stop string: every new piece of text is compared with it."""
_PROMPT_FIELD = {COMPLETIONS: "prompt", CHAT: "messages"}


@dataclasses.dataclass(frozen=True)
class Ask:
    """Texts to be written for one HTTP request."""

    requests: tuple[Request, ...]
    """One for each text."""
    prompt_tokens: int
    """Tokens of the prompts, each counted once however many texts it has."""
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    """Of the tokens that end a text those that the client named: they are told as `stop_reason`."""
    keep_stop: bool = False
    """The stop string, or the text of the stop token, is shown at the end of a text."""
    special: bool = False
    """Special tokens are shown by their names."""
    logprobs: int | None = None
    """Likeliest tokens told with each one; None: no log-probabilities."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, in vLLM's form."""
    token_ids: bool = False
    """Ids are told with the text."""
    names: bool = True
    """Tokens are told by their texts; False: as `token_id:5`."""
    id: str | None = None
    """Of the answer, as the client wants it."""
    stream: bool = False
    usage: bool = False
    """The stream ends with how many tokens there were."""
    usage_each: bool = False
    """Each of its chunks says how many there are so far."""
    trim: bool = False
    """White space at the beginning of a text is left out."""
    echoes: tuple[str, ...] | None = None
    """What is shown before each text: its prompt, or what the last message of a conversation says."""
    echo_scored: bool = False
    """Log-probabilities of that prompt are told with it."""
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

    def __init__(
        self, tokenizer: Tokenizer, chat: Chat | None, stop_ids: Sequence[int], limits: Limits, *,
        split_special_tokens: bool = False, settings: GenerationSettings = NO_SETTINGS,
    ):  # fmt: skip
        """`settings` are the model's own: what a request leaves out is as they have it."""
        self.settings = settings
        self.tokenizer, self.chat, self.limits = tokenizer, chat, limits
        self._encoder = TextEncoder(tokenizer, split_special_tokens=split_special_tokens)
        self._stop_ids = frozenset([tokenizer.eos_id, *stop_ids])
        self._banned, self.left_out = settings.for_requests(self._stop_ids)

    def completion(self, body: Mapping[str, Any], client: Client = NOBODY) -> Ask:
        """Of `/v1/completions`. ApiError for what cannot be answered."""
        check_fields(COMPLETIONS, body)
        fields = Fields(body)
        n = self._n(fields)
        given = fields.get("prompt")
        prompts = texts_or_ids("" if given is None else given, "prompt", self.limits.max_texts // n)
        echo, logprobs = fields.flag("echo"), fields.whole("logprobs", 0, TOP)
        prompt_logprobs = self._prompt_logprobs(fields)
        scored = prompt_logprobs is not None or (echo and logprobs is not None)
        wanted = self._max_tokens(fields, "max_tokens", 0 if echo or scored else 1)
        special, cut = fields.flag("add_special_tokens", True), self._cut(fields, wanted or 0)
        tokens, echoes, unseen = [], [], 0
        for prompt in prompts:
            if isinstance(prompt, str):
                ids, unseen = self._encode(prompt, special)
                shown = prompt
                if cut is not None and len(ids) > cut.size:
                    ids, unseen = cut(ids, unseen), min(unseen, cut.size)
                    shown = self.tokenizer.decode(ids[unseen:])
            else:
                if not prompt:
                    raise bad("prompt holds an empty list of token ids: give at least one", "prompt")
                check_ids(prompt, self.tokenizer.vocab_size, "prompt")
                ids = tuple(prompt) if cut is None else cut(tuple(prompt))
                shown = self.tokenizer.decode(ids) if echo else ""
            tokens.append(ids)
            echoes.append(shown)
        how = _Scores(logprobs, prompt_logprobs, scored)
        most = min(16, self.limits.max_tokens)
        requests = self._requests(fields, tokens, n, wanted, most, how, self._stop_ids, client, COMPLETIONS)
        repeated = tuple(text for text in echoes for _ in range(n)) if echo else None
        scored_echo = echo and logprobs is not None
        return self._ask(fields, requests, tokens, how, (), echoes=repeated, echo_scored=scored_echo, unseen=unseen)

    def conversation(self, body: Mapping[str, Any], client: Client = NOBODY) -> Ask:
        """Of `/v1/chat/completions`. ApiError for what cannot be answered."""
        assert self.chat is not None, "the route says so before"
        check_fields(CHAT, body)
        fields = Fields(body)
        _refuse_tools(fields)
        n = self._n(fields)
        header = fields.flag("add_generation_prompt", not fields.flag("continue_final_message"))
        go_on = fields.flag("continue_final_message")
        if header and go_on:
            raise bad("continue_final_message needs add_generation_prompt: false, or none", "continue_final_message")
        messages = read_messages(fields.get("messages"))
        try:
            ids = self.chat.prompt(messages, add_generation_prompt=header, continue_final_message=go_on)
        except ValueError as error:
            raise bad(str(error), "messages") from None
        prompt = tuple(ids.tolist())
        if fields.flag("add_special_tokens"):
            prompt = (*self._encoder.prefix, *prompt)
        top, asked = fields.whole("top_logprobs", 0, TOP), fields.flag("logprobs")
        if top is not None and not asked:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        newer, older = self._max_tokens(fields, "max_completion_tokens", 1), self._max_tokens(fields, "max_tokens", 1)
        wanted = older if newer is None else newer
        if (cut := self._cut(fields, wanted or 1)) is not None:
            prompt = cut(prompt)
        prompt_logprobs = self._prompt_logprobs(fields)
        how = _Scores((top or 0) if asked else None, prompt_logprobs, prompt_logprobs is not None)
        stop_ids, most = self._stop_ids | self.chat.stop_ids, self.limits.max_tokens
        requests = self._requests(fields, [prompt], n, wanted, most, how, stop_ids, client, CHAT)
        echoes = None
        if fields.flag("echo"):  # as vLLM: the last message stands before the text where it is the same speaker's
            last = messages[-1]
            echoes = (last["content"] if last["role"] == "assistant" else "",) * n
        return self._ask(fields, requests, [prompt], how, turns_of(self.chat), echoes=echoes, trim=not go_on)

    def _n(self, fields: Fields) -> int:
        n = fields.whole("n", 1, self.limits.max_n) or 1
        if fields.whole("best_of", 1, 1 << 31) not in (None, n):
            raise bad("best_of is not supported: ask for n texts and choose among them", "best_of", "unsupported_parameter")
        return n

    def _max_tokens(self, fields: Fields, name: str, least: int) -> int | None:
        limit, context = self.limits.max_tokens, self.limits.context
        wanted = fields.whole(name, least, 1 << 63)
        if wanted is not None and wanted > limit:
            why = f"{name} is {wanted}: it must be a whole number from {least} to {limit}"
            if limit < context:
                raise bad(why, name)
            raise bad(f"This model's maximum context length is {context} tokens. However, {why}.", name, "context_length_exceeded")
        return wanted

    def _prompt_logprobs(self, fields: Fields) -> int | None:
        wanted = fields.whole("prompt_logprobs", 0, TOP)
        if wanted is not None and fields.flag("stream"):
            raise bad("prompt_logprobs are not told in a stream: leave out stream", "prompt_logprobs")
        return wanted

    def _encode(self, text: str, special: bool) -> tuple[tuple[int, ...], int]:
        """The ids of a text, and how many special tokens stand before it."""
        if not special:
            return tuple(self._encoder.bare([text])[0].tolist()), 0
        encoding = self._encoder.encode([text])[0]
        return tuple(encoding.ids.tolist()), int(np.argmax(np.append(encoding.sequence, 0) >= 0))

    def _cut(self, fields: Fields, new: int) -> "_Cut | None":
        """How prompts are cut; None: not at all."""
        size, side = fields.whole("truncate_prompt_tokens", -1, self.limits.context), fields.text("truncation_side")
        if side not in (None, "left", "right"):
            raise bad(f"truncation_side is {side!r:.40}: it must be left or right", "truncation_side")
        if size is None:
            if side is not None:
                raise bad("truncation_side needs truncate_prompt_tokens", "truncation_side")
            return None
        if size == 0:
            raise bad("truncate_prompt_tokens is 0: it must be at least 1, or -1 for as many as fit", "truncate_prompt_tokens")
        return _Cut(max(1, self.limits.context - new) if size == -1 else size, side or "left")

    def _requests(
        self, fields: Fields, prompts: Sequence[tuple[int, ...]], n: int, wanted: int | None, default: int, how: "_Scores",
        ends: frozenset[int], client: Client, route: str,
    ) -> tuple[Request, ...]:  # fmt: skip
        stop = (frozenset() if fields.flag("ignore_eos") else ends) | frozenset(self._stop_token_ids(fields))
        if len(stop) > STOP_IDS:
            most = STOP_IDS - len(stop) + len(self._stop_token_ids(fields))
            raise bad(f"stop_token_ids may hold up to {most} tokens beside those that end the model's texts", "stop_token_ids")
        context = self.limits.context
        seed = fields.whole("seed", -(1 << 63), (1 << 64) - 1)
        seed = random.getrandbits(31) if seed is None else seed
        common: dict[str, Any] = {
            "sample": self._sample(fields), "stop": stop, "logprobs": how.asked, "prompt_logprobs": how.prompt,
            "owner": client.address, "user": client.user, "cache_salt": fields.text("cache_salt") or "",
            "bias": self._bias(fields), "allowed": self._allowed(fields), "bad": self._bad_words(fields),
        }  # fmt: skip
        least = fields.whole("min_tokens", 0, 1 << 31)
        guided = Guided(fields, self.tokenizer, stop)
        made: list[Request] = []
        for prompt in prompts:
            if not prompt:
                raise bad("the prompt is empty: without special tokens it must hold at least one character", _PROMPT_FIELD[route])
            most = min(default, self.settings.room(len(prompt), default)) if route == CHAT else default
            size = min(most, context - len(prompt)) if wanted is None else wanted
            if size < (wanted is None) or len(prompt) + size > context:
                raise too_long(context, len(prompt), wanted, route)
            if least is not None and least > size:
                raise bad(f"min_tokens is {least}: the text may have {size} tokens", "min_tokens")
            common["min_tokens"] = min(self.settings.least(len(prompt)), size) if least is None else least
            made += [Request(prompt, size, seed=(seed + i) & 0x7FFFFFFF, guide=guided.text(), **common) for i in range(n)]
        return tuple(made)

    def _stop_token_ids(self, fields: Fields) -> tuple[int, ...]:
        return fields.ids("stop_token_ids", self.tokenizer.vocab_size) or ()

    def _allowed(self, fields: Fields) -> tuple[int, ...] | None:
        allowed = fields.ids("allowed_token_ids", self.tokenizer.vocab_size)
        if allowed == ():
            raise bad("allowed_token_ids is empty: name at least one token", "allowed_token_ids")
        return allowed

    def _bad_words(self, fields: Fields) -> tuple[tuple[int, ...], ...]:
        """Token sequences of vLLM's `bad_words`: each word as it begins a text, and behind a space where that is another token."""
        name, made = "bad_words", list(self._banned)
        for word in fields.texts(name, BAD, 1000):
            alone, behind = (tuple(self.tokenizer.encode(space + word.lstrip()).tolist()) for space in ("", " "))
            made += [alone] if alone else []
            made += [behind] if alone and behind[0] != alone[0] and len(behind) == len(alone) else []
        if len(made) > BAD or any(len(ids) > BAD_LENGTH for ids in made):
            raise bad(f"{name} may be up to {BAD} sequences of up to {BAD_LENGTH} tokens", name)
        return tuple(made)

    def _sample(self, fields: Fields) -> SampleConfig:
        own = self.settings.values
        temperature = 0.0 if own.get("do_sample") is False else own.get("temperature", 1.0)
        top_k = fields.whole("top_k", -1, 1 << 31)
        given: dict[str, Any] = {
            "temperature": fields.number("temperature", temperature, 0, 2),
            "top_p": fields.number("top_p", own.get("top_p", 1.0), 0, 1),
            "top_k": own.get("top_k") if top_k is None else top_k, "min_p": fields.number("min_p", own.get("min_p", 0.0), 0, 1),
            "typical_p": own.get("typical_p"),
            "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
            "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
            "repetition_penalty": fields.number("repetition_penalty", own.get("repetition_penalty", 1.0), 0.1, 10),
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
        self, fields: Fields, requests: tuple[Request, ...], prompts: Sequence[Sequence[int]], how: "_Scores",
        stop: tuple[str, ...], **more: Any,
    ) -> Ask:  # fmt: skip
        stream, options = fields.flag("stream"), fields.get("stream_options")
        if options is not None and not stream:
            raise bad("stream_options needs stream: true", "stream_options")
        if options is not None and not isinstance(options, dict):
            raise bad('stream_options must be an object such as {"include_usage": true}', "stream_options")
        for name in options or {}:
            if name not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
                raise bad(
                    f"stream_options has no field {name[:60]!r}: there are include_usage and continuous_usage_stats",
                    "stream_options",
                )
        try:
            usage, each, padded = (
                Fields(options or {}).flag(name) for name in ("include_usage", "continuous_usage_stats", "include_obfuscation")
            )
        except ApiError as error:
            raise bad(f"stream_options.{error.message}", "stream_options") from None
        if padded:
            raise bad("stream_options.include_obfuscation is not supported", "stream_options", "unsupported_parameter")
        special = not fields.flag("skip_special_tokens", True)
        if special and not fields.flag("spaces_between_special_tokens", True):
            raise bad(
                "spaces_between_special_tokens: false is not supported", "spaces_between_special_tokens", "unsupported_parameter"
            )
        wanted_id = fields.text("request_id")
        if wanted_id is not None and not re.fullmatch(r"[!-~]{1,200}", wanted_id):
            raise bad("request_id must be of up to 200 printable characters of ASCII, without spaces", "request_id")
        ends = self.settings.stop_strings if fields.get("stop") is None else fields.texts("stop", STOPS, STOP_LENGTH)
        return Ask(
            requests, sum(map(len, prompts)), (*ends, *stop),
            frozenset(self._stop_token_ids(fields)), fields.flag("include_stop_str_in_output"), special, how.logprobs,
            how.prompt_logprobs, fields.flag("return_token_ids"), not fields.flag("return_tokens_as_token_ids"), wanted_id, stream,
            usage, usage and each, **more,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Which log-probabilities are told, and which the engine has to compute for that."""

    logprobs: int | None
    prompt_logprobs: int | None
    prompt: bool

    @property
    def asked(self) -> int | None:
        counts = [count for count in (self.logprobs, self.prompt_logprobs) if count is not None]
        return max(counts, default=None)


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Truncates a prompt to `size` tokens, as transformers does: special tokens before the text are kept."""

    size: int
    side: str

    def __call__(self, ids: tuple[int, ...], special: int = 0) -> tuple[int, ...]:
        room = self.size - min(special, self.size)
        before, text = ids[: self.size - room], ids[special:]
        return (*before, *(text[:room] if self.side == "right" else text[len(text) - min(room, len(text)) :]))


def too_long(context: int, prompt: int, new: int | None, route: str) -> ApiError:
    """The error by which clients recognise that a prompt does not fit, in OpenAI's words."""
    where = _PROMPT_FIELD[route]
    alone = not new or prompt >= context
    said = f"your {where} resulted in {prompt} tokens" if alone else (
        f"you requested {prompt + (new or 0)} tokens ({prompt} in the {where}, {new} in the completion)"
    )  # fmt: skip
    what = where if alone else f"{where} or completion"
    return bad(
        f"This model's maximum context length is {context} tokens. However, {said}. Please reduce the length of the {what}.",
        "prompt" if prompt >= context else "max_tokens",
        "context_length_exceeded",
    )  # fmt: skip


def _refuse_tools(fields: Fields) -> None:
    """Let tools through where none may be called."""
    for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        given, wanted = fields.get(tools), fields.get(choice)
        if given is not None and not isinstance(given, list):
            raise bad(f"{tools} must be a list", tools)
        if wanted == "none" or (not given and wanted in (None, "auto")):
            continue
        name = tools if given else choice
        raise bad(
            f'{name} is not supported: this server\'s models call no tools; {choice} "none" lets them through',
            name,
            "unsupported_parameter",
        )
