"""Token ids that arrive one at a time → text."""

from collections.abc import Sequence

from jaxlm.data.tokenizer import Tokenizer


class StreamDecoder:
    """Decode token ids that arrive one at a time, as the continuation of a prompt.

    The pushed texts and `flush()` joined are what `tokenizer.decode` of the prompt and all ids gives beyond the text of the
    prompt: many decoders drop the space of a text's first token, and a continuation must keep it. Bytes are held back until
    they are whole characters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._shown = _tail(tokenizer, prompt)  # ids of the last text given out: some decoders look at what stands before
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this id completes, often empty."""
        self._held.append(int(token))
        text, follows = self._pending()
        if not text or text.endswith("\ufffd"):  # perhaps the first bytes of a longer character
            return ""
        self._shown, self._held = self._held if follows else self._shown + self._held, []
        return text

    def flush(self) -> str:
        """The text still held back, at the end of the stream."""
        (text, _), self._shown, self._held = self._pending(), [], []
        return text

    def _pending(self) -> tuple[str, bool]:
        """The text of the ids held back, and whether it follows the text shown: a prompt of ids may end within a character,
        which the continuation completes."""
        before, whole = self._tokenizer.decode(self._shown), self._tokenizer.decode(self._shown + self._held)
        follows = whole.startswith(before)
        return whole[len(before if follows else before.rstrip("\ufffd")) :], follows


def _tail(tokenizer: Tokenizer, prompt: Sequence[int], least: int = 16) -> list[int]:
    """The last ids of a prompt, from the beginning of a character on, and enough of them to have a text."""
    size = least
    while size < len(prompt):
        text = tokenizer.decode(prompt[-size:])
        if text.strip() and not text.startswith("\ufffd"):
            return list(prompt[-size:])
        size *= 2
    return list(prompt)
