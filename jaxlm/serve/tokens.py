"""A single token as text and as bytes, for those who ask for log-probabilities."""

import functools
import re
from collections.abc import Iterable
from typing import Any

from jaxlm.data import Tokenizer
from jaxlm.data.tokenizer import byte_characters


class Spelled:
    """A tokenizer whose texts show special tokens by their names."""

    def __init__(self, rust: Any):
        self._rust = rust

    def decode(self, ids: Iterable[int]) -> str:
        return self._rust.decode([int(i) for i in ids], skip_special_tokens=False)


class TokenTexts:
    """What each token of a tokenizer stands for."""

    def __init__(self, tokenizer: Tokenizer):
        import tokenizers

        self._tokenizer = tokenizer
        self._names = tokenizers.Tokenizer.from_str(tokenizer.definition())
        self.spelled: Any = Spelled(self._names)
        """The tokenizer for texts that show special tokens."""
        self._bytes = {character: byte for byte, character in enumerate(byte_characters())}
        # Some decoders drop the space of a text's first token: a token is read behind another one.
        self._before = next((i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]).isalpha()), 0)
        self.text = functools.lru_cache(maxsize=1 << 16)(self._text)

    def _text(self, token: int, begins: bool = False) -> str:
        """Its text, without the space that a decoder drops where it `begins` a text; of a special token its name; of bytes
        that are no characters OpenAI's `bytes:\\xe2\\x80`."""
        text = self._tokenizer.decode([token]) if begins else self._behind(token)
        if not text:
            return self._names.id_to_token(token) or ""
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token)) if "\ufffd" in text else text

    def bytes(self, token: int) -> list[int]:
        """Its bytes in UTF-8, or those that are a part of a character."""
        text = self._behind(token)
        name = self._names.id_to_token(token) or ""
        if "\ufffd" not in text:
            return list((text or name).encode())
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return [int(match[1], 16)]
        return [self._bytes[c] for c in name] if set(name) <= self._bytes.keys() else list(text.encode())

    def _behind(self, token: int) -> str:
        before = self._tokenizer.decode([self._before])
        return self._tokenizer.decode([self._before, token])[len(before) :]
