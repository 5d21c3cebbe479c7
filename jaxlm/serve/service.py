"""What one server serves, and how it stands."""

import dataclasses
import time
from typing import Any, Literal

from jaxlm.data import Chat, Tokenizer
from jaxlm.generate import NO_SETTINGS, GenerationSettings
from jaxlm.models import Trained
from jaxlm.serve.asks import Asker, Limits
from jaxlm.serve.metrics import Metrics
from jaxlm.serve.options import OF_ENGINE, ServeOptions
from jaxlm.serve.readers import Readers
from jaxlm.serve.rows import Rows, labels_of, vectors_of
from jaxlm.serve.speaking import chat_of
from jaxlm.serve.tokens import TokenTexts

STALLED = 120.0
"""Seconds without a step after which an engine counts as stuck; compiling for a new length may take some."""


@dataclasses.dataclass
class Service:
    """A model behind the routes; what it cannot do is None."""

    options: ServeOptions
    name: str
    tokenizer: Tokenizer
    engine: Any = None
    chat: Chat | None = None
    chats: bool = False
    """The model has a chat template of its own: it was made for conversations."""
    stop_ids: tuple[int, ...] = ()
    vectors: Rows | None = None
    labels: Rows | None = None
    settings: GenerationSettings = NO_SETTINGS
    """The model's own for writing, for what requests leave out."""
    draining: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine.stats if self.engine is not None else None)
        self.texts = TokenTexts(self.tokenizer)
        self.readers = Readers()
        self.asker: Asker | None = None
        if self.engine is not None:
            context = self.engine.config.context
            limits = Limits(context, min(self.options.max_tokens or context, context), self.options.max_n, self.options.max_texts)
            split = self.options.split_special_tokens
            self.asker = Asker(self.tokenizer, self.chat, self.stop_ids, limits, split_special_tokens=split, settings=self.settings)

    @property
    def mode(self) -> Literal["chat", "completion", "none"]:
        """What the page at / offers."""
        return "none" if self.engine is None else "chat" if self.chats and self.chat is not None else "completion"

    def routes(self) -> list[str]:
        """The routes that this model answers."""
        there = {"/v1/completions": self.engine, "/v1/chat/completions": self.engine and self.chat,
                 "/v1/embeddings": self.vectors, "/classify": self.labels}  # fmt: skip
        return [route for route, part in there.items() if part is not None]

    def sick(self) -> str | None:
        """Why it cannot serve now, or None."""
        if self.draining:
            return "the server is stopping"
        if self.engine is not None:
            stats = self.engine.stats()
            if not stats.alive:
                return "the engine's thread has ended"
            if stats.beat_s > STALLED:
                return f"the engine has done nothing for {stats.beat_s:.0f} s"
        if any(rows is not None and not rows.alive for rows in (self.vectors, self.labels)):
            return "the thread that computes vectors and labels has ended"
        return None

    def idle(self) -> bool:
        """Nothing is being written."""
        if self.engine is None:
            return True
        stats = self.engine.stats()
        return stats.running + stats.waiting == 0

    def close(self, drain_s: float = 0.0) -> None:
        self.readers.close()
        if self.engine is not None:
            self.engine.close(drain_s)
        for rows in (self.vectors, self.labels):
            if rows is not None:
                rows.close()


def serve_what(trained: Trained, options: ServeOptions, engine: Any = None) -> Service:
    """All that a model can do. ValueError for one that can do nothing here, and for options of an engine without one."""
    for field in dataclasses.fields(options) if engine is None else ():
        if field.name in OF_ENGINE and (value := getattr(options, field.name)) != field.default:
            raise ValueError(
                f"{field.name} {value} would do nothing here: {trained.name} is no model that writes text; leave it out"
            )
    split = options.split_special_tokens
    chat, chats = chat_of(trained, split) if engine is not None else (None, False)
    vectors, labels = vectors_of(trained, split), labels_of(trained, split)
    service = Service(
        options, options.name or trained.name, trained.tokenizer, engine, chat, chats, tuple(trained.stop_ids()),
        Rows(trained, vectors, options.queue) if vectors is not None else None,
        Rows(trained, labels, options.queue) if labels is not None else None,
        trained.generation() if options.generation_config == "auto" else NO_SETTINGS,
    )  # fmt: skip
    if not service.routes():
        kind = trained.model.config
        raise ValueError(f"{trained.name} is an {kind.architecture} with head {kind.head.kind}: no route of the server is for it")
    return service
