"""Pieces of text → OpenAI's objects, whole or as a stream."""

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from jaxlm.generate.request import Token
from jaxlm.serve.asks import Ask
from jaxlm.serve.choices import Choices, Piece, Placed
from jaxlm.serve.errors import INTERNAL, ApiError, to_json
from jaxlm.serve.tokens import TokenTexts

_log = logging.getLogger(__name__)


class Answer:
    """One answer in the making. Subclasses say how a text and its log-probabilities are written down."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, name: str, ask: Ask, texts: TokenTexts):
        self._ask, self._texts = ask, texts
        self._head = {"id": f"{self.prefix}-{ask.id or uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    async def whole(self, choices: Choices) -> bytes:
        """The one object in JSON, once all texts are there. ApiError where the engine fails."""
        pieces: list[list[Piece]] = [[] for _ in self._ask.requests]
        async for piece in choices.pieces():
            pieces[piece.index].append(piece)
        return await asyncio.to_thread(self._joined, choices, pieces)  # log-probabilities of many tokens are much to write

    def _joined(self, choices: Choices, pieces: Sequence[Sequence[Piece]]) -> bytes:
        made = []
        for i, some in enumerate(pieces):
            text, tokens = "".join(piece.text for piece in some), [token for piece in some for token in piece.tokens]
            end = {"finish_reason": some[-1].finish, "stop_reason": some[-1].stop_reason}
            ids = {"token_ids": [i for piece in some for i in piece.ids]} if self._ask.token_ids else {}
            made.append({"index": i, **self.full(text), "logprobs": self._told(tokens), **end, **ids})
        prompts = [self._of_prompt(i, [token for piece in some for token in piece.prompt]) for i, some in enumerate(pieces)]
        whole = {**self._head, "object": self.kind, "choices": made, "usage": self._usage(choices)}
        return to_json(self.with_prompts(whole, prompts))

    async def stream(self, choices: Choices) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk for each piece, an error where the engine fails, and what says that it is the end."""
        try:
            for i in range(len(self._ask.requests)):
                for first in self.opening():
                    yield self._event(self._chunk(choices, Piece(i), first, None, None, self._of_prompt(i, ())))
            begun: set[int] = set()
            async for piece in choices.pieces():
                told = self._told(piece.tokens) if piece.tokens else None
                ids, prompt = piece.ids, {}
                if piece.index not in begun and not self.opening():
                    prompt = self._of_prompt(piece.index, ())
                begun.add(piece.index)
                if piece.text or piece.tokens or (ids and self._ask.token_ids):
                    yield self._event(self._chunk(choices, piece, self.part(piece.text), told, None, prompt))
                    piece, prompt = dataclasses.replace(piece, ids=()), {}
                if piece.finish is not None:
                    yield self._event(self._chunk(choices, piece, self.part(None), None, piece.finish, prompt))
            if self._ask.usage:
                yield self._event({**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage(choices)})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield self._event(error.body())
        except Exception:  # the status is sent: what is left is to say so
            _log.exception("a stream failed")
            yield self._event(ApiError(500, INTERNAL).body())
        finally:
            choices.close()

    def _chunk(
        self, choices: Choices, piece: Piece, body: dict[str, Any], told: Any, finish: str | None, prompt: dict[str, Any]
    ) -> dict[str, Any]:
        choice = {"index": piece.index, **body, "logprobs": told, "finish_reason": finish}
        choice |= {} if finish is None else {"stop_reason": piece.stop_reason}
        choice |= {"token_ids": list(piece.ids)} if self._ask.token_ids else {}
        usage = {"usage": self._usage(choices) if self._ask.usage_each else None} if self._ask.usage else {}
        return self.with_prompts({**self._head, "object": self.chunk_kind, "choices": [choice], **usage}, [prompt])

    def _of_prompt(self, index: int, scores: Sequence[Token]) -> dict[str, Any]:
        """vLLM's fields about a text's prompt, where they are asked for."""
        told: dict[str, Any] = {}
        if self._ask.prompt_logprobs is not None:
            told["prompt_logprobs"] = [self._prompt_token(token) for token in scores]
        if self._ask.token_ids:
            told["prompt_token_ids"] = list(self._ask.requests[index].prompt)
        return told

    def _prompt_token(self, token: Token) -> dict[str, Any] | None:
        """Log-probabilities of the most likely tokens and of the prompt token itself, by id; None for the first token."""
        if token.logprob is None:
            return None
        ranked = [(rank, i, value) for rank, (i, value) in enumerate(token.top[: self._ask.prompt_logprobs], 1)]
        if token.id not in (i for _, i, _ in ranked):
            ranked.append((token.rank or 0, token.id, token.logprob))
        return {str(i): {"logprob": value, "rank": rank, "decoded_token": self._texts.text(i)} for rank, i, value in ranked}

    def _likeliest(self, token: Token) -> list[tuple[int, float]]:
        """(id, log-probability) of the likeliest tokens, best first, and of the token itself."""
        top = list(token.top[: self._ask.logprobs])
        if token.logprob is not None and token.id not in (i for i, _ in top):
            top.append((token.id, token.logprob))
        return sorted(top, key=lambda pair: -pair[1])

    def _name(self, token: int, begins: bool = False) -> str:
        return self._texts.text(token, begins) if self._ask.names else f"token_id:{token}"

    def _event(self, value: dict[str, Any]) -> bytes:
        return b"data: " + to_json(value) + b"\n\n"

    def _usage(self, choices: Choices) -> dict[str, int]:
        read, wrote = self._ask.prompt_tokens, choices.new_tokens
        return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}

    def _told(self, tokens: Sequence[Placed]) -> Any:
        return None if self._ask.logprobs is None else self.logprobs(tokens)

    def with_prompts(self, answer: dict[str, Any], prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The answer with what it says of the prompts: in each choice, or once."""
        raise NotImplementedError

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
            "tokens": [self._name(placed.token.id, placed.begins) for placed in tokens],
            "token_logprobs": [placed.token.logprob for placed in tokens],
            "top_logprobs": [self._top(placed) for placed in tokens],
            "text_offset": [placed.at for placed in tokens],
        }

    def _top(self, placed: Placed) -> dict[str, float] | None:
        """Text → log-probability; of tokens with the same text the likelier one. None where nothing predicts the token."""
        if placed.token.logprob is None:
            return None
        told: dict[str, float] = {}
        for i, value in self._likeliest(placed.token):
            told.setdefault(self._name(i, placed.begins), value)
        return told

    def with_prompts(self, answer: dict[str, Any], prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for choice, prompt in zip(answer["choices"], prompts, strict=True):
            choice.update(prompt)
        return answer


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
            top = [self._one(i, value) for i, value in self._likeliest(placed.token)] if self._ask.logprobs else []
            told.append({**self._one(placed.token.id, placed.token.logprob), "top_logprobs": top})
        return {"content": told, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": logprob, "bytes": self._texts.bytes(token)}

    def with_prompts(self, answer: dict[str, Any], prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**answer, **prompts[0]}  # one conversation, however many texts
