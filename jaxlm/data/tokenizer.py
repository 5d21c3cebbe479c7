"""Text ↔ token ids: bytes, characters, a byte-level BPE trained here, or any Hugging Face tokenizer.

Whatever the kind, a corpus can never spell a special token: the literal text `<|endoftext|>` inside
a document is encoded as ordinary text, and only the end of a document gives `eos_id`. Every kind can
be written as a `tokenizer.json`, so an exported model opens elsewhere with nothing of ours installed.
The special tokens around a text are that file's post-processor, which `jaxlm.data.text_encoding` applies.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxlm.config import unknown
from jaxlm.data.special import FILL_IN, SPECIAL, numbered, present, texts_of
from jaxlm.data.tokenizer_files import disagreements
from jaxlm.report import warn
from jaxlm.text_files import well_formed

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
CARD = "jaxlm_tokenizer.json"  # beside tokenizer.json: which of our kinds a folder holds
CHAT_TEMPLATE = "chat_template.jinja"  # as transformers names it


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to use or to train."""

    kind: Literal["bytes", "characters", "bpe", "huggingface"] = "bpe"
    """Single bytes, the characters of the training text, byte-level BPE trained on it, or a ready one."""
    vocab_size: int = 4096
    """Entries of a BPE vocabulary, the 256 bytes and the end-of-text token included."""
    path: str | None = None
    """Folder or hub id of a Hugging Face tokenizer, or the tokenizer of a run. `${VAR:-default}` and `~` work."""
    special: tuple[str, ...] = ()
    """Special tokens beside the end of text, of pad, cls, sep, mask, prefix, middle, suffix; they come on top of vocab_size."""
    sentinels: int = 0
    """Tokens <extra_id_0>, <extra_id_1>, … that stand for spans, on top of vocab_size too."""
    framing: Literal["auto", "none", "bos", "eos", "cls_sep"] = "auto"
    """Special tokens around a text, written to tokenizer.json as its post-processor: <|endoftext|> before it (bos) or after it
    (eos), or [CLS] before and [SEP] after it. auto: cls_sep for an encoder whose tokenizer has both, eos for an encoder-decoder,
    else bos. A Hugging Face tokenizer keeps its own."""

    def __post_init__(self) -> None:
        # On the command line a list is spelt with commas.
        roles = tuple(role.strip() for given in self.special for role in given.split(",") if role.strip())
        object.__setattr__(self, "special", roles)
        for role in roles:
            if role not in SPECIAL:
                raise unknown("tokenizer special token", role, SPECIAL)
            if roles.count(role) > 1:
                raise ValueError(f"tokenizer special names {role!r} twice")
        if self.sentinels < 0:
            raise ValueError(f"tokenizer sentinels {self.sentinels} must be at least 0")
        if self.kind == "huggingface" and (roles or self.sentinels):
            raise ValueError("tokenizer special and sentinels are for kinds that are made here: a Hugging Face one brings its own")
        if self.kind == "huggingface" and self.framing != "auto":
            raise ValueError(f"tokenizer framing {self.framing} is for kinds that are made here: a Hugging Face one brings its own")
        if self.framing == "cls_sep" and not {"cls", "sep"} <= {*roles}:
            raise ValueError("tokenizer framing cls_sep needs the tokens cls and sep: add both to tokenizer special")
        if self.kind == "huggingface" and not self.path:
            raise ValueError("tokenizer kind 'huggingface' needs a path: a tokenizer folder or a hub id such as 'gpt2'")
        if self.kind != "huggingface" and self.path:
            raise ValueError(f"tokenizer path {self.path!r} is only read by kind 'huggingface', not by {self.kind!r}")
        if self.kind == "bpe" and self.vocab_size < 257:
            raise ValueError(f"tokenizer vocab_size {self.vocab_size} is too small: 256 bytes + end of text need 257")


class Tokenizer:
    """The face of every tokenizer; ids run from 0 to `vocab_size - 1`."""

    kind: str
    vocab_size: int
    eos_id: int
    """End of text: follows every document."""
    bos_id: int
    """What the first token of a document is predicted from: `eos_id` unless the tokenizer has its own."""
    special: Mapping[str, int] = {}
    """The special tokens that it has by role: pad, cls, sep, mask; prefix, middle, suffix of filling in the middle."""
    sentinels: Sequence[int] = ()
    """The ids of <extra_id_0>, <extra_id_1>, …"""
    chat_template: str | Mapping[str, str] | None = None
    """The Jinja template of conversations that its folder holds; several by name."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32, nothing added at either end. Lone surrogates become `?`."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Special ids and ids beyond the vocabulary give no text; broken UTF-8 gives U+FFFD."""
        raise NotImplementedError

    def definition(self) -> str:
        """The whole tokenizer as the text of a `tokenizer.json`."""
        raise NotImplementedError

    def with_definition(self, definition: str) -> "Tokenizer":
        """The same vocabulary with another `tokenizer.json`: other tokens around a text, or a space before it."""
        raise NotImplementedError

    def within(self, rows: int) -> "Tokenizer":
        """The same tokenizer without the special tokens that an embedding table of `rows` has no row for, where it has no other
        such entries and puts none of them around a text: `<mask>` of BART's models for summaries."""
        return self

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer with a chat template in its folder."""
        made = copy.copy(self)
        made.chat_template = template
        return made

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, int32."""
        return self.encode_batch([text])[0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets."""
        whole = json.dumps([self.kind, self.eos_id, self.bos_id, self.definition()])
        return hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()

    def save(self, folder: pathlib.Path | str) -> None:
        """Write the tokenizer for `load_tokenizer`, and for transformers' AutoTokenizer, into `folder`."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.definition(), encoding="utf8")
        names: dict[str, Any] = own_names(self)
        extra = texts_of([role for role in self.special if role in FILL_IN], len(self.sentinels))
        if extra:
            names["extra_special_tokens"] = extra
        definition = json.loads(self.definition())
        types = ["token_type_ids"] if '"type_id": 1' in json.dumps(definition["post_processor"]) else []
        names["model_input_names"] = ["input_ids", *types, "attention_mask"]
        if (definition["pre_tokenizer"] or {}).get("add_prefix_space"):
            names["add_prefix_space"] = True
        card = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        if isinstance(self.chat_template, str):
            (folder / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf8")
        (folder / "tokenizer_config.json").write_text(json.dumps(card, indent=2), encoding="utf8")
        (folder / CARD).write_text(json.dumps({"kind": self.kind}), encoding="utf8")


def own_names(tokenizer: Tokenizer) -> dict[str, str]:
    """transformers' names of a tokenizer's special tokens, such as bos_token, for one that is made here."""
    roles = {f"{role}_token": SPECIAL[role] for role in tokenizer.special if role not in FILL_IN}
    return {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, **roles}


class _Own(Tokenizer):
    """A kind that encodes without the library; its `tokenizer.json` is written for others."""

    _edited: str | None = None

    def definition(self) -> str:
        return self._plain() if self._edited is None else self._edited

    def _plain(self) -> str:
        raise NotImplementedError

    def with_definition(self, definition: str) -> Tokenizer:
        made = copy.copy(self)
        made.__dict__.pop("fingerprint", None)
        made._edited = definition
        return made


class Bytes(_Own):
    """The byte b is id b; 256 is the end of text."""

    kind = "bytes"
    eos_id = bos_id = 256

    def __init__(self, special: Iterable[str] = (), sentinels: int = 0):
        self.special, self.sentinels = numbered(257, special, sentinels)
        self.vocab_size = 257 + len(self.special) + sentinels

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf8", "replace"), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in _ints(ids) if i < 256).decode("utf8", "replace")

    def _plain(self) -> str:
        from tokenizers import models

        vocabulary = {char: byte for byte, char in enumerate(byte_characters())}
        rust = _byte_level(models.BPE({**vocabulary, END_OF_TEXT: 256}, []), use_regex=False)
        _add(rust, texts_of(self.special, len(self.sentinels)))
        return rust.to_str()


class Characters(_Own):
    """The sorted characters of the training text, then `<|unknown|>` for any other, then the end of text."""

    kind = "characters"

    def __init__(self, characters: Iterable[str], special: Iterable[str] = (), sentinels: int = 0):
        self.characters = sorted(set(characters))
        self.unknown_id = len(self.characters)
        self.eos_id = self.bos_id = self.unknown_id + 1
        self.special, self.sentinels = numbered(self.unknown_id + 2, special, sentinels)
        self.vocab_size = self.unknown_id + 2 + len(self.special) + sentinels
        self._ids = np.full(0x110000, self.unknown_id, np.int32)  # one entry per code point: encoding is a look-up
        self._ids[[ord(character) for character in self.characters]] = np.arange(self.unknown_id, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._ids[np.frombuffer(text.encode("utf-32-le", "replace"), "<u4")] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        texts = [*self.characters, "\ufffd"]
        return "".join(texts[i] for i in _ints(ids) if i <= self.unknown_id)

    def _plain(self) -> str:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        names = [*self.characters, UNKNOWN, END_OF_TEXT]
        vocabulary = {name: i for i, name in enumerate(names)}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        _add(tokenizer, [END_OF_TEXT, *texts_of(self.special, len(self.sentinels))])
        return tokenizer.to_str()


class Rust(Tokenizer):
    """A tokenizer of the `tokenizers` library: our own BPE, or the engine below a fast Hugging Face one."""

    def __init__(self, rust: Any, kind: str, eos_id: int, bos_id: int):
        rust.no_padding()
        rust.no_truncation()
        self.kind, self.eos_id, self.bos_id = kind, eos_id, bos_id
        self.vocab_size = max(rust.get_vocab(with_added_tokens=True).values()) + 1
        added = {token.content: i for i, token in rust.get_added_tokens_decoder().items() if token.special}
        self.special, self.sentinels = present(added)
        self._definition = rust.to_str()
        rust.encode_special_tokens = True  # read special tokens in a corpus as text; not part of tokenizer.json
        self._rust = rust

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        clean = [well_formed(text) for text in texts]
        return [np.array(e.ids, np.int32) for e in self._rust.encode_batch_fast(clean, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._rust.decode(_ints(ids), skip_special_tokens=True)

    def definition(self) -> str:
        return self._definition

    def with_definition(self, definition: str) -> Tokenizer:
        import tokenizers

        made = Rust(tokenizers.Tokenizer.from_str(definition), self.kind, self.eos_id, self.bos_id)
        made.chat_template = self.chat_template
        return made


class HuggingFace(Rust):
    """A fast tokenizer of `transformers`, kept whole so that saving it loses nothing (chat template, names)."""

    def __init__(self, hf: Any):
        eos_id = next((i for i in (hf.eos_token_id, hf.sep_token_id) if i is not None), None)
        if eos_id is None:
            raise ValueError(f"tokenizer {hf.name_or_path!r} has no end-of-text token (eos or sep), which documents need")
        bos_id = next((i for i in (hf.bos_token_id, hf.cls_token_id) if i is not None), eos_id)
        import tokenizers

        # A copy: every call of theirs sets truncation, padding and the reading of special tokens of their own engine.
        super().__init__(tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str()), "huggingface", eos_id, bos_id)
        named = {role: getattr(hf, f"{role}_token_id") for role in SPECIAL if role not in FILL_IN}  # what its files say counts
        self.special = {role: i for role, i in {**self.special, **named}.items() if i is not None}
        self.hf = hf
        self.chat_template = getattr(hf, "chat_template", None)

    def with_definition(self, definition: str) -> Tokenizer:
        import tokenizers

        hf = copy.deepcopy(self.hf)
        hf._tokenizer = tokenizers.Tokenizer.from_str(definition)
        if (json.loads(definition)["pre_tokenizer"] or {}).get("add_prefix_space"):  # some of its classes build their own from it
            hf.add_prefix_space = hf.init_kwargs["add_prefix_space"] = True
        return HuggingFace(hf)

    def within(self, rows: int) -> Tokenizer:
        special = {i: token.content for i, token in self._rust.get_added_tokens_decoder().items() if token.special and i >= rows}
        others = [i for i in self._rust.get_vocab(with_added_tokens=True).values() if i >= rows and i not in special]
        framed = self._rust.encode("a", "a").ids
        if others or not special or not special.keys().isdisjoint([self.eos_id, self.bos_id, *framed]):
            return self
        import tokenizers

        definition = json.loads(self.definition())
        definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] not in special]
        vocabulary = definition["model"]["vocab"]
        kept = vocabulary[:rows] if isinstance(vocabulary, list) else {name: i for name, i in vocabulary.items() if i < rows}
        definition["model"]["vocab"] = kept
        hf = copy.deepcopy(self.hf)
        hf._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
        for role in SPECIAL:
            if role not in FILL_IN and getattr(hf, f"{role}_token") in special.values():
                setattr(hf, f"{role}_token", None)
        return HuggingFace(hf)

    def with_chat_template(self, template: str) -> Tokenizer:
        hf = copy.deepcopy(self.hf)
        hf.chat_template = template
        return HuggingFace(hf)

    def save(self, folder: pathlib.Path | str) -> None:
        self.hf.save_pretrained(str(folder))
        (pathlib.Path(folder) / CARD).write_text(json.dumps({"kind": self.kind}), encoding="utf8")


# --- making them ------------------------------------------------------------------------------


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The configured tokenizer, trained on `texts` where its kind learns from them; deterministic.

    A BPE vocabulary has exactly `config.vocab_size` entries, and the special tokens asked for on top. Raises
    ValueError where the texts are too few for that, and where a Hugging Face tokenizer is neither on this machine
    nor reachable.
    """
    if config.kind == "bytes":
        return Bytes(config.special, config.sentinels)
    if config.kind == "characters":
        characters = itertools.chain.from_iterable(set(well_formed(text)) for text in texts)
        return Characters(characters, config.special, config.sentinels)
    if config.kind == "huggingface":
        assert config.path is not None, "TokenizerConfig checks that there is a path"
        folder = pathlib.Path(expand(config.path))
        return load_tokenizer(folder) if (folder / CARD).is_file() else _open_huggingface(config.path)

    from tokenizers import models, trainers

    rust = _byte_level(models.BPE(), use_regex=True)
    rust.train_from_iterator(
        map(well_formed, texts),
        trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=byte_characters(),
            show_progress=False,
        ),
    )
    if rust.get_vocab_size() < config.vocab_size:
        raise ValueError(
            f"tokenizer vocab_size {config.vocab_size} is more than the training text gives: "
            f"at most {rust.get_vocab_size()}, or take kind 'bytes'"
        )
    _add(rust, texts_of(config.special, config.sentinels))
    return _bpe(rust)


def load_tokenizer(folder: pathlib.Path | str) -> Tokenizer:
    """A tokenizer from what `save` wrote, or from any Hugging Face tokenizer folder."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no tokenizer at {str(folder)!r}: there is no such folder")
    card = folder / CARD
    kind = json.loads(card.read_text(encoding="utf8"))["kind"] if card.exists() else "huggingface"
    if kind == "huggingface":
        return _open_huggingface(str(folder))
    tokenizer = _open_own(kind, (folder / "tokenizer.json").read_text(encoding="utf8"), str(card))
    template = folder / CHAT_TEMPLATE
    return tokenizer.with_chat_template(template.read_text(encoding="utf8")) if template.is_file() else tokenizer


def _open_own(kind: str, text: str, card: str) -> Tokenizer:
    if kind == "bpe":
        import tokenizers

        return _bpe(tokenizers.Tokenizer.from_str(text))
    if kind not in ("bytes", "characters"):
        raise unknown(f"tokenizer kind in {card}:", kind, ["bytes", "characters", "bpe", "huggingface"])
    definition = json.loads(text)
    special, ids = present({token["content"]: token["id"] for token in definition["added_tokens"]})
    sentinels = len(ids)
    if kind == "bytes":
        return Bytes(special, sentinels).with_definition(text)
    characters = (c for c in definition["model"]["vocab"] if c not in (UNKNOWN, END_OF_TEXT))
    return Characters(characters, special, sentinels).with_definition(text)


def expand(path: str) -> str:
    """`${VAR}`, `${VAR:-default}` and a leading `~` replaced; raises ValueError for a variable that is not set."""

    def value(match: re.Match) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(f"path {path!r}: the environment variable {name} is not set; give ${{{name}:-a default}}")
        return found

    path = re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, path)
    return str(pathlib.Path(path).expanduser()) if path.startswith("~") else path


def _bpe(rust: Any) -> Rust:
    eos_id = rust.token_to_id(END_OF_TEXT)
    return Rust(rust, "bpe", eos_id, eos_id)


def _open_huggingface(path: str) -> Tokenizer:
    import transformers

    path = expand(path)
    try:
        hf = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:  # not there, not a tokenizer, a class that we lack
        if pathlib.Path(path).is_dir():
            raise ValueError(f"folder {path!r} holds no tokenizer that transformers can open: {_line(error)}") from None
        raise ValueError(
            f"no tokenizer {path!r}: no such folder, not downloaded before, and the hub did not give it ({_line(error)})"
        ) from None
    if not hf.is_fast:
        raise ValueError(f"tokenizer {path!r} has no fast version (tokenizer.json), which parallel tokenising needs")
    _report_disagreements(path, hf)
    return HuggingFace(hf)


_CHECKED: set[str] = set()


def _report_disagreements(path: str, hf: Any) -> None:
    """Print, once for a folder, where its files disagree with the tokenizer that transformers made of them."""
    if path not in _CHECKED and pathlib.Path(path).is_dir():
        _CHECKED.add(path)
        for line in disagreements(pathlib.Path(path), hf):
            warn(line)


def _byte_level(model: Any, use_regex: bool) -> Any:
    """A Rust tokenizer over bytes (Radford et al. 2019, §2.2): every text is encodable, decoding is exact."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    rust = tokenizers.Tokenizer(model)
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    rust.decoder = decoders.ByteLevel()
    if model.token_to_id(END_OF_TEXT) is not None:
        _add(rust, [END_OF_TEXT])
    return rust


def _add(rust: Any, texts: Sequence[str]) -> None:
    """Special tokens behind the vocabulary, or marked as such where they are in it."""
    import tokenizers

    rust.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in texts])


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of the bytes."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in plain else next(moved)) for byte in range(256)]


def _ints(ids: Iterable[int]) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else [int(i) for i in ids]


def _line(error: BaseException) -> str:
    """The first sentence of an error, on one line."""
    return " ".join(str(error).split())[:160]
