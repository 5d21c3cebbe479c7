"""Pieces of text → OpenAI's objects, whole or as a stream."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from jaxlm.serve.asks import Ask
from jaxlm.serve.choices import Choices, Piece, Placed
from jaxlm.serve.errors import ApiError, to_json
from jaxlm.serve.tokens import TokenTexts


class Answer:
    """One answer in the making. Subclasses say how a text and its log-probabilities are written down."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, name: str, ask: Ask, texts: TokenTexts):
        self._ask, self._texts = ask, texts
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    async def whole(self, choices: Choices) -> dict[str, Any]:
        """The one object, once all texts are there. ApiError where the engine fails."""
        pieces: list[list[Piece]] = [[] for _ in self._ask.requests]
        async for piece in choices.pieces():
            pieces[piece.index].append(piece)
        made = []
        for i, some in enumerate(pieces):
            text, tokens = "".join(piece.text for piece in some), [token for piece in some for token in piece.tokens]
            made.append({"index": i, **self.full(text), "logprobs": self._told(i, tokens), "finish_reason": some[-1].finish})
        return {**self._head, "object": self.kind, "choices": made, "usage": self._usage(choices)}

    async def stream(self, choices: Choices) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk for each piece, an error where the engine fails, and what says that it is the end."""
        try:
            for i in range(len(self._ask.requests)):
                for first in self.opening():
                    yield self._event(self._chunk(choices, i, first, None, None))
            async for piece in choices.pieces():
                told = self._told(piece.index, piece.tokens) if piece.tokens else None
                if piece.text or piece.tokens:
                    yield self._event(self._chunk(choices, piece.index, self.part(piece.text), told, None))
                if piece.finish is not None:
                    yield self._event(self._chunk(choices, piece.index, self.part(None), None, piece.finish))
            if self._ask.usage:
                yield self._event({**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage(choices)})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield self._event(error.body())
        finally:
            choices.close()

    def _chunk(self, choices: Choices, index: int, body: dict[str, Any], told: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **body, "logprobs": told, "finish_reason": finish}
        usage = {"usage": self._usage(choices) if self._ask.usage_each else None} if self._ask.usage else {}
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **usage}

    def _event(self, value: dict[str, Any]) -> bytes:
        return b"data: " + to_json(value) + b"\n\n"

    def _usage(self, choices: Choices) -> dict[str, int]:
        read, wrote = self._ask.prompt_tokens, choices.new_tokens
        return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}

    def _told(self, index: int, tokens: Sequence[Placed]) -> Any:
        return None if self._ask.requests[index].logprobs is None else self.logprobs(tokens)

    def opening(self) -> Sequence[dict[str, Any]]:
        """What a stream says of each text before its first piece."""
        return ()

    def full(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def part(self, text: str | None) -> dict[str, Any]:
        """Of a piece; None: the last chunk, which has no text."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[Placed]) -> Any:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def full(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def part(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def logprobs(self, tokens: Sequence[Placed]) -> Any:
        return {
            "tokens": [self._texts.text(placed.token.id, placed.begins) for placed in tokens],
            "token_logprobs": [placed.token.logprob for placed in tokens],
            "top_logprobs": [self._likeliest(placed) for placed in tokens],
            "text_offset": [placed.at for placed in tokens],
        }

    def _likeliest(self, placed: Placed) -> dict[str, float] | None:
        """Text → log-probability; of tokens with the same text the likelier one. None where nothing predicts the token."""
        if placed.token.logprob is None:
            return None
        return {self._texts.text(i, placed.begins): value for i, value in reversed(placed.token.top)}


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> Sequence[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def full(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def part(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def logprobs(self, tokens: Sequence[Placed]) -> Any:
        told = []
        for placed in tokens:
            top = [self._one(i, value) for i, value in placed.token.top]
            told.append({**self._one(placed.token.id, placed.token.logprob), "top_logprobs": top})
        return {"content": told, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._texts.text(token), "logprob": logprob, "bytes": self._texts.bytes(token)}
