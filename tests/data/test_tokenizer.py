"""Tokenizers: exact round trips, nothing special by accident, whole characters only."""

import dataclasses
import json
import random

import numpy as np
import pytest

from jaxlm.data.detokenizer import StreamDecoder
from jaxlm.data.tokenizer import HuggingFace, TokenizerConfig, expand, load_tokenizer, train_tokenizer

TEXTS = [
    "the cat sat on the mat; the dog sat on the cat. " * 20,
    "naïve café 🎉 <|endoftext|> \r\n\t日本語 👩‍👩‍👧",
    "def f(x):\n    return x\n",
]
KINDS = [TokenizerConfig("bytes"), TokenizerConfig("characters"), TokenizerConfig("bpe", vocab_size=290)]


@pytest.fixture(params=KINDS, ids=lambda config: config.kind)
def tokenizer(request):
    return train_tokenizer(request.param, TEXTS)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A Hugging Face tokenizer folder with a beginning-of-text token of its own, and truncation left on."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    rust.train_from_iterator(TEXTS, trainer)
    rust.enable_truncation(8)
    folder = tmp_path_factory.mktemp("hf") / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def any_text(rng: random.Random, longest: int = 40) -> str:
    """Random code points from everywhere but the surrogates, which have no UTF-8."""
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1FB00), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(longest)))


def test_known_text_comes_back_exactly(tokenizer):
    for text in [*TEXTS, "", " ", "sat"]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_any_unicode_comes_back_exactly_from_bytes():
    rng = random.Random(0)
    for config in (KINDS[0], KINDS[2]):
        tokenizer = train_tokenizer(config, TEXTS)
        texts = [any_text(rng) for _ in range(300)]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert tokenizer.decode(ids) == text


def test_batch_and_single_give_the_same_ids(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(tokenizer.encode(text), ids)


def test_a_corpus_cannot_spell_the_end_of_text(tokenizer):
    """A web page that shows `<|endoftext|>` would otherwise cut itself in two documents."""
    ids = tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.bos_id == tokenizer.eos_id


def test_special_ids_and_ids_beyond_the_vocabulary_give_no_text(tokenizer):
    """A model's table is padded to a round size: a sampled id may lie beyond the vocabulary."""
    ids = [*tokenizer.encode("cat"), tokenizer.eos_id, tokenizer.vocab_size, tokenizer.vocab_size + 63]
    assert tokenizer.decode(ids) == "cat"
    assert tokenizer.decode(np.array(ids)) == "cat"


def test_lone_surrogates_become_a_question_mark(tokenizer):
    text = "the \ud800 cat"
    decoded = tokenizer.decode(tokenizer.encode(text))
    assert decoded in ("the ? cat", "the \ufffd cat")  # `?` is not among the training characters


def test_saved_and_loaded_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    again = load_tokenizer(tmp_path / "t")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.vocab_size, again.eos_id, again.bos_id) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id)
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_transformers_opens_the_saved_folder_and_gives_the_same_ids(tokenizer, tmp_path):
    import transformers

    tokenizer.save(tmp_path)
    text = TEXTS[0] + TEXTS[2]
    bare = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    whole = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for hf in (bare, whole):
        assert hf.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
        assert len(hf) == tokenizer.vocab_size
    assert whole.eos_token_id == tokenizer.eos_id
    assert whole.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_the_fingerprint_follows_the_text():
    for config in KINDS:
        one, two = train_tokenizer(config, TEXTS), train_tokenizer(config, iter(TEXTS))
        assert one.fingerprint == two.fingerprint
    other = [train_tokenizer(config, ["completely other words, quite other words! " * 9, *TEXTS[1:]]) for config in KINDS[1:]]
    assert all(t.fingerprint != train_tokenizer(c, TEXTS).fingerprint for t, c in zip(other, KINDS[1:], strict=True))


def test_bpe_has_exactly_the_size_asked_for():
    assert train_tokenizer(TokenizerConfig("bpe", vocab_size=300), TEXTS).vocab_size == 300
    with pytest.raises(ValueError, match=r"vocab_size 4096 is more than the training text gives: at most \d+"):
        train_tokenizer(TokenizerConfig("bpe", vocab_size=4096), ["a b c"])
    with pytest.raises(ValueError, match="256 bytes"):
        TokenizerConfig("bpe", vocab_size=100)


def test_bytes_are_their_own_ids():
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    assert tokenizer.encode("Aé").tolist() == [65, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)


def test_characters_are_sorted_and_an_unseen_one_has_a_name():
    tokenizer = train_tokenizer(TokenizerConfig("characters"), ["cab", "bad"])
    assert tokenizer.encode("abcd!").tolist() == [0, 1, 2, 3, tokenizer.unknown_id]
    assert (tokenizer.unknown_id, tokenizer.eos_id, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.decode([0, tokenizer.unknown_id, 1]) == "a\ufffdb"
    assert json.loads(tokenizer.definition())["model"]["vocab"]["<|unknown|>"] == 4


def test_stream_never_gives_half_a_character(tokenizer):
    """A two-token emoji printed as it came showed two replacement marks instead."""
    text = TEXTS[1] + "🎉🎉é"
    decoder = StreamDecoder(tokenizer)
    shown = [decoder.push(token) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in shown) or tokenizer.kind == "characters"
    assert "".join(shown) + decoder.flush() == text


def test_stream_of_any_ids_adds_up_to_decoding_them_at_once(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(30))]
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def sentence_pieces():
    """Like Llama's: a space is part of the word behind it, unknown characters are bytes, a text's first space is dropped."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    rust = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    rust.train_from_iterator(
        ["the small red fox ran"] * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=pieces, show_progress=False)
    )
    definition = json.loads(rust.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in special]
    rust = tokenizers.Tokenizer.from_str(json.dumps(definition))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_continuation_is_decoded_behind_its_prompt(tmp_path):
    """The first word of a continuation lost its space: a decoder took it for the beginning of a text."""
    sentence_pieces().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    bos = tokenizer.bos_id
    ids = [bos, *tokenizer.encode("the small fox 🎉🎉🎉🎉🎉 ran é the red fox").tolist()]
    for i in range(len(ids)):
        stream, before = StreamDecoder(tokenizer, ids[:i]), tokenizer.decode(ids[:i])
        after = "".join(map(stream.push, ids[i:])) + stream.flush()
        assert before.rstrip("\ufffd") + after == tokenizer.decode(ids), i  # a prompt may end within a character
    stream = StreamDecoder(tokenizer, [*ids, *[bos] * 40])  # as a chat template may end
    assert stream.push(tokenizer.encode("the")[0]) == " the"


def test_stream_flush_gives_what_was_cut_off():
    tokenizer = train_tokenizer(TokenizerConfig("bytes"), [])
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(byte) for byte in "é".encode()[:1]] == [""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_huggingface_folder_keeps_its_own_ends_and_loses_nothing(hf_folder, tmp_path):
    import transformers

    tokenizer = train_tokenizer(TokenizerConfig("huggingface", path=str(hf_folder)), [])
    hf = transformers.AutoTokenizer.from_pretrained(hf_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (hf.bos_token_id, hf.eos_token_id)
    text = TEXTS[0] + "</s> <s>"
    ids = tokenizer.encode(text)
    assert len(ids) > 8, "the truncation in tokenizer.json is not for corpora"
    assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids
    assert tokenizer.decode(ids) == text

    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert load_tokenizer(hf_folder).fingerprint == tokenizer.fingerprint  # a folder that is not ours
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == text


def test_wordpiece_ends_with_its_separator_and_streams_as_it_decodes(tmp_path):
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "the", "game", ","]
    rust = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **names).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    ids = tokenizer.encode("playing the game, playing")
    assert ids.tolist() == [4, 5, 6, 7, 8, 4, 5]
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids) == "playing the game, playing"


# --- special tokens ---------------------------------------------------------------------------

ROLES = ("pad", "cls", "sep", "mask", "prefix", "middle", "suffix")
WITH = [
    dataclasses.replace(config, special=special, sentinels=sentinels)
    for config in KINDS
    for special, sentinels in [(ROLES, 3), (("mask", "cls"), 0), ((), 2)]
]


@pytest.fixture(params=WITH, ids=lambda config: f"{config.kind}-{len(config.special)}-{config.sentinels}")
def asked(request):
    return request.param


def test_special_tokens_come_after_the_ordinary_ones_and_change_nothing_else(asked):
    plain = train_tokenizer(dataclasses.replace(asked, special=(), sentinels=0), TEXTS)
    tokenizer = train_tokenizer(asked, TEXTS)
    for text in TEXTS:
        np.testing.assert_array_equal(tokenizer.encode(text), plain.encode(text))
    assert (tokenizer.eos_id, tokenizer.bos_id) == (plain.eos_id, plain.bos_id)
    roles = [role for role in ROLES if role in asked.special]
    added = [*(tokenizer.special[role] for role in roles), *tokenizer.sentinels]
    assert set(tokenizer.special) == set(roles)
    assert added == list(range(plain.vocab_size, tokenizer.vocab_size)) and len(added) == len(roles) + asked.sentinels
    assert not plain.special and not plain.sentinels
    assert tokenizer.fingerprint != plain.fingerprint
    assert tokenizer.decode([*tokenizer.encode("cat"), *added]) == "cat"
    turned = dataclasses.replace(asked, special=asked.special[::-1])
    assert train_tokenizer(turned, TEXTS).fingerprint == tokenizer.fingerprint


def test_a_corpus_cannot_spell_a_special_token(asked):
    tokenizer = train_tokenizer(asked, TEXTS)
    text = "[PAD] [CLS] [SEP] [MASK] <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <extra_id_0><extra_id_1>"
    assert not {*tokenizer.special.values(), *tokenizer.sentinels, tokenizer.eos_id} & {*tokenizer.encode(text).tolist()}


def test_special_tokens_are_saved_loaded_and_seen_by_transformers(asked, tmp_path):
    import transformers

    tokenizer = train_tokenizer(asked, TEXTS)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (dict(again.special), list(again.sentinels)) == (dict(tokenizer.special), list(tokenizer.sentinels))
    assert (again.fingerprint, again.vocab_size, again.eos_id) == (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(hf) == tokenizer.vocab_size
    for role in ("pad", "cls", "sep", "mask"):
        assert getattr(hf, f"{role}_token_id") == tokenizer.special.get(role)
    texts = {"prefix": "<|fim_prefix|>", "middle": "<|fim_middle|>", "suffix": "<|fim_suffix|>", "mask": "[MASK]"}
    for role in {*texts} & {*tokenizer.special}:
        assert hf.convert_tokens_to_ids(texts[role]) == tokenizer.special[role]
    assert hf.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(asked.sentinels)]) == list(tokenizer.sentinels)
    assert {*tokenizer.special.values(), *tokenizer.sentinels, tokenizer.eos_id} == {*hf.all_special_ids}
    foreign = HuggingFace(hf)  # what another program's reading of the folder gives us back
    assert (foreign.special, list(foreign.sentinels)) == (dict(tokenizer.special), list(tokenizer.sentinels))


def test_roles_of_a_huggingface_tokenizer():
    import transformers

    t5 = transformers.T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], extra_ids=3)
    ours = HuggingFace(t5)
    assert ours.special == {"pad": 0} and list(ours.sentinels) == t5.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(3)])
    vocab = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    assert HuggingFace(transformers.BertTokenizerFast(vocab=vocab)).special == {"pad": 0, "cls": 2, "sep": 3, "mask": 4}
    bart = transformers.BartTokenizerFast(
        vocab={t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}, merges=[]
    )
    assert HuggingFace(bart).special == {"pad": 1, "cls": 0, "sep": 2, "mask": 4}
    for names in (
        ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"],
        ["▁<PRE>", "▁<MID>", "▁<SUF>"],
        ["[PREFIX]", "[MIDDLE]", "[SUFFIX]"],
    ):
        rust = train_tokenizer(TokenizerConfig("bpe", vocab_size=260), TEXTS)
        folder_free = transformers.PreTrainedTokenizerFast(
            tokenizer_object=_copy(rust), eos_token="<|endoftext|>", extra_special_tokens=names
        )
        assert HuggingFace(folder_free).special == {"prefix": 260, "middle": 261, "suffix": 262}


def _copy(tokenizer):
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer.definition())


def test_mistakes_in_special_tokens_are_told():
    assert TokenizerConfig("bytes", special=("mask,cls", " sep")).special == ("mask", "cls", "sep")  # as a command line gives it
    for wrong, told in [
        ({"special": ("msk",)}, "unknown tokenizer special token 'msk': did you mean 'mask'"),
        ({"special": ("mask,mask",)}, "names 'mask' twice"),
        ({"sentinels": -1}, "sentinels -1 must be at least 0"),
        ({"kind": "huggingface", "path": "x", "special": ("mask",)}, "a Hugging Face one brings its own"),
    ]:
        with pytest.raises(ValueError, match=told) as error:
            TokenizerConfig(**wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["no/such-tokenizer", "nonexistent-tokenizer"])
def test_a_tokenizer_that_is_not_there_is_one_line(path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"no tokenizer '{path}'") as error:
        train_tokenizer(TokenizerConfig("huggingface", path=path), [])
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_config_mistakes_are_told():
    with pytest.raises(ValueError, match="needs a path"):
        TokenizerConfig("huggingface")
    with pytest.raises(ValueError, match="only read by kind 'huggingface'"):
        TokenizerConfig("bytes", path="gpt2")


def test_paths_take_environment_variables(monkeypatch):
    monkeypatch.setenv("THERE", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand("${THERE}/x") == "/data/x"
    assert expand("${NOWHERE:-../shared}/${THERE:-y}") == "../shared//data"
    assert not expand("~/x").startswith("~")
    with pytest.raises(ValueError, match="NOWHERE is not set"):
        expand("${NOWHERE}/x")


@pytest.mark.realdata
def test_gpt2_gives_the_published_ids(data, tmp_path):
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    reference = data / "ref-gpt2-tokenizer"
    vocabulary = json.loads((reference / "gpt2_encoder.json").read_text(encoding="utf8"))
    merges = [tuple(line.split()) for line in (reference / "gpt2_vocab.bpe").read_text(encoding="utf8").splitlines()[1:] if line]
    rust = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|endoftext|>").save_pretrained(tmp_path)

    tokenizer = load_tokenizer(tmp_path)
    sample = json.loads((reference / "gpt2_encoded_sample.json").read_text(encoding="utf8"))
    ids = next(value for name, value in sample.items() if "id" in name)
    assert tokenizer.encode(sample["text"]).tolist() == ids
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (50257, 50256, 50256)
