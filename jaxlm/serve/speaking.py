"""How a model that writes text is spoken with: its conversations, what ends its texts, its engine."""

from typing import Any, Literal

from jaxlm.data import DEFAULT_TEMPLATE, Chat
from jaxlm.models import Trained


def chat_of(trained: Trained, split_special_tokens: bool = False) -> tuple[Chat | None, bool]:
    """A model's conversations, and whether it was made for them: by its run's template, else its tokenizer's, else the plain
    one of `jaxlm.data.chat`. None where the tokenizer's template does not render. `split_special_tokens`: as `Chat`'s, which the
    run of a chat may ask for too."""
    tokenizer = trained.tokenizer
    try:
        task: Any = trained.task()
        if task.config.kind == "chat":
            split = split_special_tokens or task.config.split_special_tokens
            return Chat(tokenizer, task.chat.template, split_special_tokens=split), True
    except ValueError:
        pass  # pretrained: no task over rows
    try:
        return Chat(tokenizer, split_special_tokens=split_special_tokens), tokenizer.chat_template is not None
    except ValueError:
        return None, False


def turns_of(chat: Chat) -> tuple[str, ...]:
    """Stop strings of the plain template, whose roles are plain text: a model that was not taught to stop would go on with
    the user's turn."""
    return ("\nUser:", "\nSystem:", "\nAssistant:") if chat.template == DEFAULT_TEMPLATE else ()


def stop_ids(trained: Trained, chat: Chat | None = None) -> frozenset[int]:
    """The tokens that end a text, or an assistant's turn."""
    return frozenset([trained.tokenizer.eos_id, *trained.stop_ids(), *(chat.stop_ids if chat is not None else ())])


def writes(trained: Trained) -> bool:
    """It is a decoder that writes text."""
    return (trained.model.config.architecture, trained.model.config.head.kind) == ("decoder", "language_model")


CONTEXT = 4096
"""Tokens of a text that are made room for where nobody says how many; models may read far more than memory holds."""


def open_engine(
    trained: Trained, slots: int, context: int | None = None, queue: int = 1024, cache: Literal["same", "int8"] = "same",
    exact: bool = True,
) -> Any:  # fmt: skip
    """An engine for a decoder that writes text, not yet started. ValueError for a context that the model does not have."""
    from jaxlm.generate.engine import Engine, EngineConfig

    positions = trained.model.config.positions
    if context is not None and context > positions:
        raise ValueError(f"context is {context}: the model has {positions} positions")
    config = EngineConfig(slots=slots, context=context or min(positions, CONTEXT), queue=queue, cache=cache, exact=exact)
    return Engine(trained.model, trained.params, trained.mesh, trained.tokenizer.vocab_size, config)
