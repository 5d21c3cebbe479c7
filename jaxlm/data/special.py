"""Special tokens beside the end of text: their roles, what our tokenizers call them, and what others do."""

import itertools
from collections.abc import Iterable, Mapping

SPECIAL = {
    "pad": "[PAD]",
    "cls": "[CLS]",
    "sep": "[SEP]",
    "mask": "[MASK]",
    "prefix": "<|fim_prefix|>",
    "middle": "<|fim_middle|>",
    "suffix": "<|fim_suffix|>",
}
"""Role → the text of its token in our own tokenizers, in the order of their ids."""

# The roles of filling in the middle as others spell them: StarCoder, SantaCoder, CodeLlama, Codestral, DeepSeek Coder.
FILL_IN = {
    "prefix": ("<fim_prefix>", "<fim-prefix>", "<PRE>", "▁<PRE>", "[PREFIX]", "<｜fim▁begin｜>"),
    "middle": ("<fim_middle>", "<fim-middle>", "<MID>", "▁<MID>", "[MIDDLE]", "<｜fim▁end｜>"),
    "suffix": ("<fim_suffix>", "<fim-suffix>", "<SUF>", "▁<SUF>", "[SUFFIX]", "<｜fim▁hole｜>"),
}


def sentinel(number: int) -> str:
    """The text of the token that stands for the span of this number (Raffel et al. 2020, as T5's vocabulary spells it)."""
    return f"<extra_id_{number}>"


def texts_of(special: Iterable[str], sentinels: int) -> list[str]:
    """The texts of some roles and of so many sentinels, in the order of their ids."""
    asked = set(special)
    return [*(text for role, text in SPECIAL.items() if role in asked), *map(sentinel, range(sentinels))]


def numbered(first: int, special: Iterable[str], sentinels: int) -> tuple[dict[str, int], range]:
    """Role → id, and the ids of the sentinels, counted from `first` in the order of `texts_of`."""
    asked = set(special)
    roles = {role: first + i for i, role in enumerate(role for role in SPECIAL if role in asked)}
    return roles, range(first + len(roles), first + len(roles) + sentinels)


def present(added: Mapping[str, int]) -> tuple[dict[str, int], list[int]]:
    """Role → id, and the ids of the sentinels from 0 on, of what a tokenizer has added to its vocabulary (text → id)."""
    known = {role: (text, *FILL_IN.get(role, ())) for role, text in SPECIAL.items()}
    roles = {role: next(added[text] for text in texts if text in added) for role, texts in known.items() if added.keys() & {*texts}}
    return roles, [added[text] for text in itertools.takewhile(added.__contains__, map(sentinel, itertools.count()))]
