"""Writing: a text for a text (translation, summarisation, generative question answering), and the assistant's turns."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxlm import metrics
from jaxlm.config import unknown
from jaxlm.data import Chat, Example, TextEncoder, Tokenizer, check_messages, pack_chats
from jaxlm.tasks.reading import answer_notes, texts_of
from jaxlm.tasks.task import Examples, Prediction, Row, Task, TaskConfig, of_columns, together
from jaxlm.train import Objective, objectives

_FIELD = re.compile(r"\{(\w+)\}")


class _Written(Task):
    """Predictions are written token by token: by an encoder-decoder, or by a decoder behind a prompt."""

    head: ClassVar[Any] = {"kind": "language_model"}
    metric = "loss"
    unit = "tokens"
    generates = True

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        self.chunk = chunk
        return objectives.tokens(chunk, z_loss, self.config.label_smoothing)

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The log-likelihood (nats) of each row's targets, and how many they are."""
        logprob_B, _ = apply(params, batch, train=False, rng=None, method="log_likelihood", chunk=self.chunk)
        return {"logprob_B": logprob_B, "tokens_B": batch.get("decoder", batch)["weights_BL"].sum(axis=1)}

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Tokens that each row's prediction is written behind, or that the encoder reads."""
        raise NotImplementedError

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a prediction."""
        return frozenset({self.tokenizer.eos_id})

    def written(self, tokens: Sequence[int]) -> Prediction:
        return {"text": self.tokenizer.decode(list(tokens)).strip()}

    def show(self, row: Row, prediction: Prediction) -> str:
        return prediction["text"]


def _template(config: TaskConfig, architecture: str) -> str:
    return config.template or ("{source}" if architecture == "encoder_decoder" else "{source}\n")


def _fields(template: str) -> list[str]:
    fields = list(dict.fromkeys(_FIELD.findall(template)))
    if not fields:
        raise ValueError(f"task.template {template!r} names no field of a row: it needs one, such as {{source}}")
    return fields


def _answers(config: TaskConfig, fields: Sequence[str]) -> bool:
    """Whether rows hold acceptable answers, not one target."""
    return config.scores == "answers" or (config.scores == "auto" and "question" in fields)


class TextToText(_Written):
    """Another text for a text. The model reads `task.template`, filled with the row's fields."""

    def __init__(self, config: TaskConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        self.seq2seq = self.architecture == "encoder_decoder"
        self.target_encoder = TextEncoder(self.tokenizer, config.target_length, split_special_tokens=config.split_special_tokens)
        self.template = _template(config, self.architecture)
        self.given = tuple(_fields(self.template))  # type: ignore[misc]
        self.answers = _answers(config, self.given)
        self._ends_itself = False

    @property
    def spelled(self) -> int:
        return self.text_encoder.spelled + self.target_encoder.spelled

    @classmethod
    def roles(cls, config: TaskConfig, architecture: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        fields = _fields(_template(config, architecture))
        return (*fields, "answers" if _answers(config, fields) else "target"), ()

    def _target(self, row: Row) -> str | None:
        """What is learned: the target, of several the first."""
        if not self.answers:
            target = row.get("target")
            return target if target is None or isinstance(target, str) else target[0]
        found = texts_of(row["answers"]) if "answers" in row else None
        return None if found is None else found[0] if found else ""

    def _filled(self, row: Row) -> str:
        return _FIELD.sub(lambda match: str(row[match[1]]), self.template)

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        texts = [self._filled(row) for row in rows]
        room = self.length if self.seq2seq else self.length - min(self.config.target_length, self.length // 2)
        return [encoding.ids.tolist() for encoding in self.text_encoder.encode(texts, max_length=room)]

    def _targets(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each target: for an encoder-decoder all that the tokenizer gives, for a decoder those of a continuation;
        with the end-of-text token where `append_eos` says so and it is not there."""
        eos = self.tokenizer.eos_id
        end = np.array([eos] * self.config.append_eos, np.int32)
        most = self.config.target_length
        if not self.seq2seq:
            return [np.concatenate([ids[: most - len(end)], end]) for ids in self.target_encoder.bare(texts)]
        encoded = [encoding.ids for encoding in self.target_encoder.encode(texts)]
        self._ends_itself = any(ids[-1] == eos for ids in encoded)
        return [ids if ids[-1] == eos else np.concatenate([ids[: most - len(end)], end]) for ids in encoded]

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        targets = [self._target(row) for row in rows]
        if any(target is None for target in targets):
            raise ValueError("rows without a target have no loss: give the column of the target")
        encoded = zip(self.prompts(rows), self._targets([str(target) for target in targets]), strict=True)
        make = self._pair if self.seq2seq else self._row
        return Examples([make(np.array(prompt, np.int32), target) for prompt, target in encoded], np.arange(len(rows)))

    def idle_options(self) -> dict[str, str]:
        given = not self.config.append_eos and self._ends_itself
        return {"append_eos": "the tokenizer itself ends texts with the end-of-text token"} if given else {}

    def _pair(self, source: np.ndarray, target: np.ndarray) -> Example:
        ones = np.ones(len(target), np.int32)
        shifted = np.concatenate([np.array([self.start_id], np.int32), target[:-1]])
        decoder = {"tokens": shifted, "targets": target, "weights": ones.astype(np.float32), "segments": ones}
        return {"encoder": {"tokens": source, "segments": np.ones(len(source), np.int32)}, "decoder": decoder}

    def _row(self, prompt: np.ndarray, target: np.ndarray) -> Example:
        whole = np.concatenate([prompt, target])[: self.length + 1]
        weights = (np.arange(1, len(whole)) >= len(prompt)).astype(np.float32)
        return {"tokens": whole[:-1], "targets": whole[1:], "weights": weights, "segments": np.ones(len(whole) - 1, np.int32)}

    @property
    def _kind(self) -> str:
        return "answers" if self.answers else "translation" if self.config.scores == "auto" else self.config.scores

    @property
    def scoring_options(self) -> dict[str, str | None]:
        own = None if self._kind == "translation" else f"with BLEU only, and this task is scored as {self._kind}"
        return super().scoring_options | {"tokenize": own}

    def statistic(self) -> Callable[..., dict[str, float]]:
        scores = {
            "answers": metrics.weighted_squad(), "summarisation": metrics.weighted_summarisation(),
            "translation": metrics.weighted_translation(self.config.tokenize),
        }[self._kind]  # fmt: skip
        return of_columns(scores, lambda predictions, rows: ([p["text"] for p in predictions], self._references(rows)))

    def _references(self, rows: Sequence[Row]) -> list[Any]:
        return [texts_of(row["answers"]) if self.answers else row["target"] for row in rows]

    def signatures(self, rows: Sequence[Row]) -> dict[str, str]:
        if self.answers:
            return {}
        references = self._references(rows)
        texts = [each if isinstance(each, str) else each[0] for each in references]  # a signature does not depend on them
        if self._kind == "summarisation":
            return metrics.summarisation(texts, references).signatures
        return metrics.translation(texts, references, self.config.tokenize).signatures

    def notes(self, rows: Sequence[Row]) -> dict[str, str]:
        references = self._references(rows)
        if self.answers:
            return answer_notes(references)
        if self._kind == "summarisation":
            return {}
        name, reason = metrics.choose_tokenizer(references, self.config.tokenize)
        return {"BLEU's tokenizer": f"{name}: {reason} (task.tokenize names another)" if reason else name}


class ChatTask(_Written):
    """The assistant's turns of conversations; nothing else is learned."""

    required = ("messages",)
    given = ("messages",)

    def __init__(self, config: TaskConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        self.chat = Chat(self.tokenizer, config.chat_template, split_special_tokens=config.split_special_tokens)
        self._encoded: dict[int, tuple[Any, tuple[np.ndarray, np.ndarray]]] = {}

    @property
    def saved_tokenizer(self) -> Tokenizer:
        """With the chat template that was trained on."""
        return self.tokenizer.with_chat_template(self.chat.template)

    @property
    def spelled(self) -> int:
        return self.chat.spelled

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn."""
        return self.chat.stop_ids

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        encoded = []
        for i, row in enumerate(rows):
            try:
                encoded.append(self._encode(row["messages"]))
            except ValueError as error:
                raise ValueError(f"{where[i] if where else f'row {i}'}: {error}") from None
        packed = pack_chats(encoded, self.length, self.pad_id, packed=self.config.packed)
        self.text_encoder.truncated += packed.cut
        if packed.dropped:
            self.remarks.append(
                f"{packed.dropped:,} conversations have no assistant's token within data.length and are not learned"
            )
        return Examples([packed[i] for i in range(len(packed))], np.arange(len(packed)))

    def _encode(self, messages: Any) -> tuple[np.ndarray, np.ndarray]:
        """`Chat.encode`, computed once for the check of a row and its example."""
        held = self._encoded.pop(id(messages), None)
        return self.chat.encode(check_messages(messages, "messages")) if held is None else held[1]

    def check(self, row: Row, *, training: bool = True) -> None:
        """A conversation that the template cannot write is left out."""
        if training:
            messages = row["messages"]
            self._encoded[id(messages)] = (messages, self._encode(messages))  # the messages are kept, so that their id stays theirs
        else:
            self.prompts([row])

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """Each conversation up to its last turn by the assistant."""
        made = []
        for row in rows:
            turns = [{"role": "user", "content": row["messages"]}] if isinstance(row["messages"], str) else list(row["messages"])
            while turns and turns[-1]["role"] == "assistant":
                turns.pop()
            made.append(self.chat.prompt(turns).tolist())
        return made

    def answered(self, rows: Sequence[Row]) -> Examples | None:
        """Each conversation in a row of its own, for the likelihood of its assistant's turns; None where one has no reply."""
        if any(isinstance(row["messages"], str) or row["messages"][-1]["role"] != "assistant" for row in rows):
            return None
        packed = pack_chats([self.chat.encode(row["messages"]) for row in rows], self.length, self.pad_id, packed=False)
        return Examples([packed[i] for i in range(len(packed))], np.arange(len(packed))) if len(packed) == len(rows) else None

    def statistic(self) -> Callable[..., dict[str, float]]:
        """ROUGE of the last reply, and the perplexity of the assistant's turns where predictions hold their likelihood."""

        def columns(predictions: Sequence[Prediction], rows: Sequence[Row]) -> Sequence[Any]:
            last = [row["messages"][-1] for row in rows]
            for turn in last:
                if turn["role"] != "assistant":
                    raise unknown("role of the last message, which is what a reply is compared with:", turn["role"], ["assistant"])
            return [p["text"] for p in predictions], [turn["content"] for turn in last]

        def perplexity(predictions: Sequence[Prediction], rows: Sequence[Row]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
            if not all("nll" in p for p in predictions):
                return lambda weights_NB: {}
            nll_B, tokens_B = (np.array([p[name] for p in predictions], float) for name in ("nll", "tokens"))
            return lambda weights_NB: {"perplexity": np.exp(np.minimum(weights_NB @ nll_B / (weights_NB @ tokens_B), 700.0))}

        return together(metrics.Weighted(perplexity), of_columns(metrics.weighted_summarisation(), columns))
