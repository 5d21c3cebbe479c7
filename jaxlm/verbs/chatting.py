"""jaxlm chat."""

import dataclasses
import queue
import sys
from collections.abc import Sequence
from typing import Any

from jaxlm import config as configs
from jaxlm.report.console import say
from jaxlm.verbs.decoding import Decoding, SamplingOptions, check_flags, decoding_of
from jaxlm.verbs.words import split_words

MAX_TOKENS = 512
"""New tokens of an answer where neither a flag nor the model says how many."""


@dataclasses.dataclass(frozen=True)
class ChatOptions(SamplingOptions):
    """The flags of `jaxlm chat`."""

    system: str | None = None
    """System message at the beginning of the conversation."""
    context: int | None = None
    """Most tokens of a conversation; empty: the model's positions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context is not None and self.context < 1:
            raise ValueError(f"context is {self.context}: it must be at least 1")


def chat(words: Sequence[str]) -> int:
    """jaxlm chat MODEL [--system TEXT] [--max-tokens N] [--temperature T] [--seed S]: a conversation in the terminal."""
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(ChatOptions, None, flags).value
    check_flags(options)
    from jaxlm.models import load_model
    from jaxlm.serve.speaking import open_engine

    trained = load_model(argument, options=options).for_writing(free=True)
    decoding = decoding_of(trained, options, MAX_TOKENS)
    engine = open_engine(trained, 1, options.context)
    engine.start()
    try:
        conversation = Conversation(trained, engine, options, decoding)
        if line := decoding.told(conversation.left_out):
            say(line)
        converse(conversation, trained.name)
    finally:
        engine.close()
    return 0


def converse(conversation: "Conversation", name: str) -> None:
    """Read a turn, write its answer, until /exit or the end of the input. Ctrl-C ends an answer, not the conversation."""
    say(f"{name}: /reset begins anew, /exit ends, Ctrl-C stops an answer")
    while True:
        try:
            words = input("> ").strip()
        except EOFError:
            say()
            return
        except KeyboardInterrupt:
            say("\n/exit ends")
            continue
        if words == "/exit":
            return
        if words == "/reset":
            conversation.reset()
            say("a new conversation")
        elif words.startswith("/"):
            say(f"unknown command {words!r}: there are /reset and /exit")
        elif words:
            try:
                conversation.answer(words, lambda text: print(text, end="", file=sys.stdout, flush=True))
                print()
            except ValueError as error:
                say(f"{error}; /reset begins anew")


class Conversation:
    """Turns so far, and an engine that writes the next."""

    def __init__(self, trained: Any, engine: Any, options: ChatOptions, decoding: Decoding):
        """ValueError for a model whose chat template does not render."""
        from jaxlm.serve.speaking import chat_of, stop_ids, turns_of

        chat, _ = chat_of(trained, options.split_special_tokens)
        if chat is None:
            raise ValueError(f"the chat template of {trained.name} writes no question and its answer")
        self._chat, self._tokenizer, self._engine = chat, trained.tokenizer, engine
        self._options, self._decoding = options, decoding
        self._stop_ids, self._stop = stop_ids(trained, chat), (*turns_of(chat), *decoding.stop_strings)
        self._bad, self.left_out = decoding.settings.for_requests(self._stop_ids)
        self.reset()

    def reset(self) -> None:
        system = self._options.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, words: str, write: Any) -> None:
        """Write the answer to one more turn of the user's. ValueError, and the turn is not kept, where it does not fit."""
        from jaxlm.generate.request import Event, Request
        from jaxlm.generate.text import TextStream

        asked = [*self.messages, {"role": "user", "content": words}]
        prompt = tuple(self._chat.prompt(asked).tolist())
        room = self._engine.config.context - len(prompt)
        if room < 1:
            raise ValueError(f"the conversation has {len(prompt)} tokens: the context of {self._engine.config.context} is full")
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        room = min(self._decoding.room(len(prompt)), room)
        request = Request(
            prompt, room, self._decoding.sampling, self._options.seed, self._stop_ids, bad=self._bad,
            min_tokens=min(self._decoding.settings.least(len(prompt)), room),
        )  # fmt: skip
        ticket = self._engine.submit(request, events.put)
        text, said, ended = TextStream(self._tokenizer, self._stop, trim=True, prompt=prompt), "", False
        while not ended:
            try:
                event = events.get()
            except KeyboardInterrupt:
                self._engine.cancel(ticket)
                continue
            if event.ended == "error":
                raise RuntimeError(f"the model failed: {event.reason}")
            more = "".join(text.push(token.id) for token in event.tokens)
            ended = event.ended is not None or text.stopped is not None
            more += text.flush() if ended else ""
            said += more
            write(more)
        if text.stopped is not None:
            self._engine.cancel(ticket)
        self.messages = [*asked, {"role": "assistant", "content": said}]
