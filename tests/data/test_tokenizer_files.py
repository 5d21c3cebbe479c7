"""Folders whose files disagree about the tokenizer: stale ones, and classes of transformers that read texts otherwise."""

import json

import pytest

from jaxlm.data.tokenizer_files import disagreements

TEXTS = ["the small red fox saw a big dog near the old river", "Good films, bad films: 2,048 of them aren't great."] * 4


def wordpiece(folder, size):
    """A folder like BERT's with the older file beside tokenizer.json."""
    import tokenizers
    import transformers
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    rust = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    rust.normalizer, rust.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    rust.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    named = {f"{name[1:-1].lower()}_token": name for name in special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **named).save_pretrained(folder)
    vocabulary = rust.get_vocab()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(vocabulary, key=vocabulary.get)))
    return folder


def byte_pairs(folder):
    """A folder like GPT-2's: tokenizer.json, vocab.json and merges.txt."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<e>").save_pretrained(folder)
    rust.model.save(str(folder))
    return folder


def opened(folder):
    import transformers

    return list(disagreements(folder, transformers.AutoTokenizer.from_pretrained(folder)))


@pytest.mark.parametrize("make", [lambda folder: wordpiece(folder, 90), byte_pairs])
def test_files_that_agree_give_no_line(make, tmp_path):
    assert opened(make(tmp_path / "t")) == []


def test_a_stale_tokenizer_json_is_told_from_vocab_txt(tmp_path):
    folder, other = wordpiece(tmp_path / "a", 90), wordpiece(tmp_path / "b", 70)
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    (line,) = opened(folder)
    assert "of the 90 entries of vocab.txt" in line and "of 70 entries" in line and "stale" in line


def test_other_ids_and_other_merges_are_told(tmp_path):
    folder = byte_pairs(tmp_path / "t")
    merges = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join([*merges[:5], merges[6], merges[5], *merges[7:]]))
    (line,) = opened(folder)
    assert "differ from number 5 on" in line or "differ from number 6 on" in line
    (folder / "merges.txt").write_text("\n".join(merges))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["the"], vocabulary["a"] = vocabulary["a"], vocabulary.get("the", 319)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (line,) = opened(folder)
    assert "entries of vocab.json" in line


def test_a_class_that_reads_texts_otherwise_is_told(tmp_path):
    """As transformers#45701: a class that ignores what tokenizer.json says between words."""
    folder = wordpiece(tmp_path / "t", 90)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    (line,) = disagreements(folder, tokenizer)
    assert "which reads 'Hello world' as" in line and type(tokenizer).__name__ in line


def message(pieces):
    """A SentencePiece model as its protobuf: pieces of (text, type)."""
    made = b""
    for text, kind in pieces:
        inner = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15\x00\x00\x00\x00" + b"\x18" + bytes([kind])
        made += b"\x0a" + bytes([len(inner)]) + inner
    return made + b"\x12\x02\x18\x01"  # the trainer's settings, which nothing reads


@pytest.mark.parametrize("shift", [0, 1])
def test_a_sentencepiece_model_is_compared_by_its_pieces(tmp_path, shift):
    import tokenizers
    import transformers
    from tokenizers import models

    pieces = ["▁the", "▁fox", "s", "▁", "t"]
    names = ["<pad>"] * shift + ["<unk>", "<s>", "</s>", *pieces]
    rust = tokenizers.Tokenizer(models.Unigram([(name, -float(i)) for i, name in enumerate(names)], unk_id=shift))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", eos_token="</s>")
    model = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((piece, 1) for piece in pieces)]
    file = tmp_path / "spiece.model"
    file.write_bytes(message(model))
    assert list(disagreements(tmp_path, tokenizer)) == []
    file.write_bytes(message([*model, ("▁dog", 1)]))
    (line,) = disagreements(tmp_path, tokenizer)
    assert "1 of the 6 entries of spiece.model (such as '▁dog')" in line
    for raw in (b"IQ== 0\nIg== 1\n", b"", b"\x0a\xff"):  # of tiktoken's format, empty, cut short
        file.write_bytes(raw)
        assert list(disagreements(tmp_path, tokenizer)) == []
