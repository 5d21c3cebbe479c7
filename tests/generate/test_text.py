"""Text as it comes: the pieces are the whole, and nothing of a stop string is ever shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import TokenizerConfig, train_tokenizer
from jaxlm.generate.text import TextStream

BYTES = train_tokenizer(TokenizerConfig("bytes"), [])
BPE = train_tokenizer(TokenizerConfig("bpe", vocab_size=274), ["abba abab baba héé 猫猫 abba abab"] * 20)


def by_hand(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Read a character at a time, until what was read ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    st.text("ab é猫", max_size=24),
    st.lists(st.text("ab é猫", min_size=1, max_size=4), max_size=3, unique=True),
    st.sampled_from([BYTES, BPE]),
)
def test_the_pieces_are_the_text_up_to_the_first_stop_string(text, stop, tokenizer):
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(int(token)))
        shown = "".join(pieces)
        assert len(shown) == stream.shown <= stream.seen
        assert not any(s in shown for s in stop)
        assert text.startswith(shown)
    pieces.append(stream.flush())
    assert ("".join(pieces), stream.stopped) == by_hand(text, tuple(stop))
    assert stream.push(97) == "" or stream.stopped is None


def test_text_is_shown_as_soon_as_it_is_safe():
    stream = TextStream(BYTES, ["###"])
    assert [stream.push(i) for i in "a#b##é".encode()] == ["a", "", "#b", "", "", "", "##é"]
    assert [stream.push(i) for i in b"##"] == ["", ""] and stream.flush() == "##"


def test_broken_characters_come_at_the_end():
    stream = TextStream(BYTES, ["x"])
    assert stream.push(0xE7) == "" and stream.flush() == "\ufffd"


def test_white_space_at_the_beginning_is_left_out_on_request():
    stream = TextStream(BYTES, trim=True)
    assert [stream.push(i) for i in b" \n a b"] == ["", "", "", "a", " ", "b"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        TextStream(BYTES, ["a", ""])
