"""Conversations → tokens, with the loss on the assistant's turns alone; rows of them for training.

A chat template (Jinja, rendered in transformers' sandbox) writes a conversation as one text, which is
tokenised in one go, so the ids are those of transformers' `apply_chat_template`: nothing is added that the template does
not write, and a special token that a message spells is read as such. `split_special_tokens` reads those as ordinary text
instead, as `apply_chat_template(sanitize_control_tokens=True)` does, so that a message cannot end its own turn.

Which character
came from whose content is found by rendering a second time with marks around every content: the
rendering without its marks must be the first one again. So it does not matter that a template injects a
system prompt, moves it, or trims contents; where it drops a part of an assistant's turn there is an
error and not a mask over the wrong tokens.

What is trained of an assistant's turn is what the model has to write after `Chat.prompt`: the content,
with whatever the template puts between the header and it (mostly nothing; a space, an empty block of
reasoning), and the special tokens right after it that end the turn, with any white space before them.
The newline that many templates write after those is not trained. Templates with `{% generation %}`
blocks say for themselves what is trained. A token is trained if any of its characters is.

n tokens of a conversation · L tokens of a row.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import unknown
from jaxlm.data.packing import Row, best_fit_decreasing
from jaxlm.data.tokenizer import Tokenizer, own_names
from jaxlm.text_files import well_formed

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Span = tuple[int, int]  # characters [start, stop) of a rendered text
Marks = list[tuple[list[int], list[int]]]  # of each message: where its content starts in a text, and where it stops
ROLES = ("system", "user", "assistant")

# `User: …`, a newline, `Assistant: …`, the end of text; the next turn follows it as a document would. The assistant's
# end is the end-of-text token, so a model learns to stop with the one special token that our own tokenizers have. Roles are
# plain text here: unlike a special token, a content can spell `Assistant:`.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{{ 'Assistant:' if add_generation_prompt }}"
)


class Chat:
    """A tokenizer and a chat template: conversations → text, ids, and which of the ids are trained."""

    stop_ids: frozenset[int]
    """The tokens that end an assistant's turn: those that the template writes after it, and the end of text."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, *, split_special_tokens: bool = False):
        """`template` is a Jinja chat template; None: the tokenizer's own, else `DEFAULT_TEMPLATE`.

        `split_special_tokens` reads the special tokens that messages spell as ordinary text. Raises ValueError where the
        template does not render a question and its answer.
        """
        import tokenizers

        hf = getattr(tokenizer, "hf", None)
        self.tokenizer, self.split_special_tokens = tokenizer, split_special_tokens
        self._spelling: set[int] = set()
        self.template = template if template is not None else _own_template(tokenizer) or DEFAULT_TEMPLATE
        self._blocks = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

        # A copy of our own: here the special tokens in a text count, in the tokenizer's they are ordinary text.
        self._rust: Any = tokenizers.Tokenizer.from_str(tokenizer.definition())
        self._rust.post_processor = None  # some move the offsets away from white space
        added = self._rust.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._names = dict(hf.special_tokens_map) if hf else own_names(tokenizer)

        self._header = self._appended = ""
        question = [{"role": "user", "content": "Question"}]
        answered = [*question, {"role": "assistant", "content": "Answer"}]
        before, asked = self._text(question), self._text(question, generate=True)
        text = self._text(answered)
        starts, stops = self._marks(answered, text)[1]
        if len(starts) != 1 or len(stops) != 1:
            raise ValueError(f"chat template: writes the assistant's content {len(stops)} times instead of once")
        if asked != before:
            self._header = asked[len(before) :] if asked.startswith(before) else ""
        elif text.startswith(before):  # it knows no `add_generation_prompt`: take the header from the turn itself
            self._header = self._appended = text[len(before) : starts[0]].rstrip(" ")
        self._prompts = asked != before or text.startswith(before)

        names = sorted((name for name in self._added.values() if name.strip()), key=len, reverse=True)
        any_added = "|".join(map(re.escape, names)) or "(?!)"
        self._closing = text[stops[0] :]
        ending = re.match(rf"\s*((?:{any_added})+)", self._closing)
        self._ending = re.compile(r"\s*" + re.escape(ending[1])) if ending else None
        ends = re.findall(any_added, ending[1]) if ending else []
        self.stop_ids = frozenset([tokenizer.eos_id, *(i for i, name in self._added.items() if name in ends)])
        frame = {i for i in self._rust.encode(before, add_special_tokens=False).ids if i in added}
        special = [token.content for token in added.values() if token.special]
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._reserved = {i for i, token in added.items() if token.special} | self.stop_ids | frame

    @property
    def spelled(self) -> int:
        """Different messages so far that spell a special token."""
        return len(self._spelling)

    def render(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        """The conversation as text; `generate`: with the header of the assistant's next turn.

        Raises ValueError for messages that `check_messages` refuses and for what the template refuses.
        """
        return self._text(check_messages(messages, "messages", training=False), generate)

    def encode(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """The conversation for training: ids int32 (n,) and trained bool (n,), as the head of this file defines it.

        A turn whose message has a `weight` of 0 is not trained, as in OpenAI's fine-tuning files.

        Raises ValueError as `render` does, without an assistant's turn, and where the template drops or
        rewrites a part of such a turn or writes no special token after it.
        """
        messages = check_messages(messages, "messages")
        text, regions = self._jinja(messages, blocks=self._blocks)
        untrained = [turn for turn, message in enumerate(messages) if message.get("weight") == 0]
        marks = None if self._blocks and not self.split_special_tokens and not untrained else self._marks(messages, text)
        if not self._blocks and marks is not None:
            regions = list(self._answers(messages, text, marks))
        elif marks is not None:
            ends = [stop for turn in untrained for stop in marks[turn][1]]
            regions = [(start, stop) for start, stop in regions if not any(start < end <= stop for end in ends)]
        ids, spans = self._tokens(messages, text, marks)
        starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
        trained = np.zeros(len(ids), bool)
        for start, stop in regions:
            trained |= (starts < stop) & (stops > start)
        if not trained.any():
            raise ValueError("chat template: marks no token of this conversation as the assistant's, so there is nothing to train")
        return np.array(ids, np.int32), trained

    def prompt(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> np.ndarray:
        """The conversation for generation: ids int32 (n,) that end with the header of the assistant's next turn.

        Without `add_generation_prompt` they end with the last turn. With `continue_final_message` they end within the last turn,
        behind its content, so that it is gone on with; the two exclude each other. Both as in `apply_chat_template`.
        """
        assert not (add_generation_prompt and continue_final_message), "a turn is begun or gone on with"
        messages = check_messages(messages, "messages", training=False)
        text = self._text(messages, generate=add_generation_prompt)
        marks = self._marks(messages, text, generate=add_generation_prompt) if self.split_special_tokens else None
        if continue_final_message:
            text = _behind_content(text, messages[-1]["content"])
        return np.array(self._tokens(messages, text, marks)[0], np.int32)

    # --- rendering ---------------------------------------------------------------------------

    def _text(self, messages: Sequence[Message], generate: bool = False) -> str:
        return self._jinja(messages, generate)[0] + (self._appended if generate else "")

    def _jinja(self, messages: Sequence[Message], generate: bool = False, blocks: bool = False) -> tuple[str, list[Span]]:
        """The rendered text and the spans of its `{% generation %}` blocks, if asked for."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.template,
                add_generation_prompt=generate,
                return_assistant_tokens_mask=blocks,
                **self._names,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"chat template: {' '.join(str(error).split())[:200] or type(error).__name__}") from None
        texts, spans = rendered
        return well_formed(texts[0]), spans[0] if blocks else []

    def _marks(self, messages: Sequence[Message], text: str, generate: bool = False) -> Marks:
        """Where in `text` each message's content starts and where it stops, outer white space not counted.

        Mostly one start and one stop; none for a blank content or one that the template leaves out or looks into.
        """
        open_, close, end = _unused_characters(message["content"] for message in messages)
        pattern = re.compile(f"([{open_}{close}])([0-9]+){end}")

        def look(turns: Collection[int]) -> Marks | None:
            marked = []
            for turn, message in enumerate(messages):
                content = message["content"]
                if turn in turns and (core := content.strip()):
                    lead, trail = content.split(core, 1)
                    content = f"{lead}{open_}{turn}{end}{core}{close}{turn}{end}{trail}"
                marked.append({**message, "content": content})
            found: Marks = [([], []) for _ in messages]
            try:
                pieces = pattern.split(self._text(marked, generate))  # text, which mark, of which turn, text, …
            except ValueError:
                return None
            at = len(pieces[0])
            for mark, number, piece in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
                found[int(number)][mark == close].append(at)
                at += len(piece)
            return found if "".join(pieces[::3]) == text else None

        found = look(range(len(messages)))
        if found is None:  # the template looks into some content and writes something else where it is marked
            found = look([turn for turn in range(len(messages)) if look([turn]) is not None])
        if found is None:
            raise ValueError("chat template: what it writes for one turn depends on the text of others, so no turn can be located")
        return found

    # --- what is trained ---------------------------------------------------------------------

    def _answers(self, messages: Sequence[Message], text: str, marks: Marks) -> Iterator[Span]:
        """The span of each assistant's turn that is trained."""
        if self._ending is None:
            raise ValueError(
                f"chat template: writes {self._closing!r} after the assistant's content, which holds no special token, so the end "
                "of a turn would not be learnt: write {{ eos_token }} there"
            )
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            starts, stops = marks[turn]
            blank = not message["content"].strip()
            lost = f"chat template: turn {turn + 1} (assistant) "
            if len(starts) > 1 or len(stops) != (not blank):
                raise ValueError(lost + "is left out, written twice or rewritten, so its tokens cannot be told from others")
            start = starts[0] if starts else None
            if start is None or not (self._header and text.endswith(self._header, 0, start)):
                opening = self._opening(messages[:turn])
                if opening is not None and text.startswith(opening) and (start is None or len(opening) <= start):
                    start = len(opening)
            if start is None:
                raise ValueError(lost + "does not begin with what stands before it when it is generated")
            stop = start if blank else stops[0]
            if not _letters(text[starts[0] if starts else 0 : stop]).endswith(_letters(message["content"])):
                raise ValueError(lost + "is not written whole (reasoning dropped?): end the conversation there or shorten the turn")
            ending = self._ending.match(text, stop)
            yield start, ending.end() if ending else stop

    def _opening(self, messages: Sequence[Message]) -> str | None:
        """The text that an assistant's turn after these messages is generated from, if the template can write it."""
        try:
            return self._text(messages, generate=True) if self._prompts else None
        except ValueError:
            return None

    # --- tokens ------------------------------------------------------------------------------

    def _tokens(self, messages: Sequence[Message], text: str, marks: Marks | None) -> tuple[list[int], list[Span]]:
        """The ids of a rendered text and their spans; where special tokens are split, what a content spells is never one."""
        texts = (message["content"] for message in messages)
        self._spelling.update(hash(content) for content in texts if self._special.search(content))
        contents = self._contents(messages, marks) if self.split_special_tokens and marks is not None else []
        found = self._rust.encode(text, add_special_tokens=False)
        ids: list[int] = []
        spans: list[Span] = []
        for i, (start, stop) in zip(found.ids, found.offsets, strict=True):
            piece = text[start:stop]
            if i in self._added and (core := piece.strip()):  # some swallow the white space around them
                start += piece.index(core)
                stop = start + len(core)
            inside = i in self._reserved and any(start < b and stop > a for a, b in contents)
            these = self._ordinary(piece, i) if inside else [i]
            ids += these
            spans += [(start, stop)] * len(these)
        return ids, spans

    def _contents(self, messages: Sequence[Message], marks: Marks) -> list[Span]:
        """Where the contents stand; ValueError where one is not located and spells a special token."""
        contents: list[Span] = []
        for turn, (starts, stops) in enumerate(marks):
            if len(starts) == len(stops) and (starts or not messages[turn]["content"].strip()):
                contents += zip(starts, stops, strict=True)
                continue
            alone = self._rust.encode(messages[turn]["content"], add_special_tokens=False).ids
            spelled = next((self._added[i] for i in alone if i in self._reserved), None)
            if spelled is not None and spelled != self._names.get("unk_token"):
                raise ValueError(
                    f"chat template: turn {turn + 1} ({messages[turn]['role']}) is left out or rewritten and holds {spelled!r}, "
                    "which cannot be told from the template's own: remove it"
                )
        return contents

    def _ordinary(self, piece: str, reserved: int) -> list[int]:
        """The ids of a text as ordinary text, without the reserved token that it spells."""
        for parts in ([piece], [piece[:1], piece[1:]]):  # in two, a token that is matched though it is not special falls apart
            # Behind a newline, because some tokenizers put a space before the first word of a text.
            newline, *whole = (ids.tolist() for ids in self.tokenizer.encode_batch(["\n", *(f"\n{part}" for part in parts)]))
            bare = self.tokenizer.encode_batch(parts)
            cut = [
                ids[len(newline) :] if ids[: len(newline)] == newline else b.tolist() for ids, b in zip(whole, bare, strict=True)
            ]
            ids = list(itertools.chain.from_iterable(cut))
            if reserved not in ids:
                return ids
        name = self._added[reserved]
        if piece.strip() == name != self._names.get("unk_token"):
            raise ValueError(f"a message holds {name!r}, and the tokenizer cannot write it as ordinary text: remove it")
        return [reserved]  # an unknown word, which is no spelling of anything


def check_messages(messages: Sequence[Message], where: str, *, training: bool = True) -> list[dict]:
    """Messages as plain dicts, keys without a value dropped as transformers drops them; lone surrogates become `?`.

    `where` names their place in errors, such as `chats.jsonl:12`. Raises a one-line ValueError where there
    are none, a role is not one of `ROLES`, a content is not text, or, for `training`, no turn is the
    assistant's. Roles need not alternate: that is for the template to say.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"{where}: expected a list of messages such as {{'role': 'user', 'content': 'Hi'}}, got {messages!r:.80}")
    checked = []
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}, turn {turn}: expected a message with role and content, got {message!r:.80}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"{where}, turn {turn}: has no {key!r}, only {', '.join(map(repr, message)) or 'nothing'}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise unknown(f"role in {where}, turn {turn}:", role, ROLES)
        if not isinstance(content, str):
            raise ValueError(f"{where}, turn {turn} ({role}): content must be text, got {content!r:.80}")
        more = {key: value for key, value in message.items() if value is not None}
        checked.append({**more, "role": role, "content": well_formed(content)})
    if training and not any(message["role"] == "assistant" for message in checked):
        raise ValueError(f"{where}: no turn is the assistant's, so there is nothing to train")
    return checked


class ChatRows:
    """Conversations as rows (L,) for training: `tokens`, `targets`, `weights`, `segments`, `positions`.

    A conversation of n tokens gives n − 1 pairs of a token and the next one, weighted 1 where the next one
    is trained, all in one row: what goes beyond L pairs is cut off at its end. Packed, conversations share
    rows as documents do in `Packed` (segments from 1, positions from 0 in each); otherwise each has a
    row of its own. A conversation with nothing trained left has no row. `cut` counts the conversations
    longer than a row, `dropped` those without one.
    """

    def __init__(self, encoded: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad_id: int, packed: bool = True):
        self.length, self.pad_id, self.cut, self.dropped = length, pad_id, 0, 0
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        for ids, trained in encoded:
            assert len(ids) == len(trained), "each token is trained or not"
            self.cut += len(ids) - 1 > length
            if np.any(trained[1 : length + 1]):
                self._kept.append((ids[: length + 1], trained[: length + 1]))
            else:
                self.dropped += 1
        if encoded and not self._kept:
            raise ValueError(f"none of {len(encoded)} conversations has a trained token within a row of {length}: take longer rows")
        sizes = np.array([len(ids) - 1 for ids, _ in self._kept], np.int64)
        self._order: np.ndarray = np.arange(len(sizes))
        self._bounds: np.ndarray = np.arange(len(sizes) + 1)
        if packed:
            self._order, self._bounds = best_fit_decreasing(sizes, length)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, i: int) -> Row:
        row, at = self.blank(), 0
        for segment, item in enumerate(self._order[self._bounds[i] : self._bounds[i + 1]], 1):
            ids, trained = self._kept[item]
            n = len(ids) - 1
            here = slice(at, at + n)
            row["tokens"][here], row["targets"][here] = ids[:-1], ids[1:]
            row["weights"][here] = trained[1:]
            row["segments"][here] = segment
            row["positions"][here] = np.arange(n)
            at += n
        return row

    def blank(self) -> Row:
        """A row of padding alone."""
        whole = {"tokens": self.pad_id, "targets": self.pad_id, "segments": 0, "positions": 0}
        row = {name: np.full(self.length, value, np.int32) for name, value in whole.items()}
        return row | {"weights": np.zeros(self.length, np.float32)}


def pack_chats(encoded: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad_id: int, packed: bool = True) -> ChatRows:
    """`Chat.encode`d conversations as rows of `length`, several to a row where `packed`; see `ChatRows`."""
    return ChatRows(encoded, length, pad_id, packed)


def _own_template(tokenizer: Tokenizer) -> str | None:
    """The chat template that a tokenizer brings; of several, the one named `default`."""
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        if "default" not in own:
            raise ValueError(
                f"the tokenizer has chat templates named {', '.join(own)} and none named 'default': give one as a text"
            )
        return own["default"]
    return own


def _behind_content(text: str, content: str) -> str:
    """A rendered text up to the end of the last turn's content, as transformers' `continue_final_message` ends it."""
    core = content.strip()
    at = text.rfind(core)
    if at < 0:
        raise ValueError("chat template: it rewrites the last message, which therefore cannot be continued")
    whole = content.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else core)]


def _unused_characters(texts: Iterable[str]) -> list[str]:
    """Three characters that none of the texts holds, out of the 32 that Unicode keeps for use inside a program (§23.7)."""
    used = set().union(*texts)
    free = [chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in used]
    if len(free) < 3:
        raise ValueError("messages hold nearly all of Unicode's noncharacters U+FDD0 to U+FDEF: remove them")
    return free[:3]


def _letters(text: str) -> str:
    """The text without its white space, which templates trim."""
    return "".join(text.split())
