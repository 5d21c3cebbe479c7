"""The cache of tokenised corpora: split, reuse, refusal, and going on after a cut."""

import json
import lzma
import multiprocessing
import threading

import numpy as np
import pytest

from jaxlm.data import cache
from jaxlm.data.cache import build_corpora, corpus_folder
from jaxlm.data.corpus import DataConfig, HoldoutConfig, in_memory, xz_bits_per_byte
from jaxlm.data.sources import SourceConfig
from jaxlm.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

TEXTS = [f"document number {i}: " + "some words, " * (i % 7 + 1) for i in range(60)]
BYTES = TokenizerConfig("bytes")


def write(folder, texts, name="data"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf8")
    return SourceConfig("files", path=str(folder / f"{name}.jsonl"))


def config(tmp_path, texts=TEXTS, tokenizer=BYTES, **rest):
    sources = rest.pop("sources", None) or (write(tmp_path, texts),)
    rest.setdefault("cache", str(tmp_path / "cache"))
    return DataConfig(sources=sources, tokenizer=tokenizer, holdout=rest.pop("holdout", HoldoutConfig(fraction=0.2)), **rest)


def contents(corpora):
    """Everything that a corpus holds, to compare."""
    return [(c.tokens.tolist(), c.offsets.tolist(), list(c.texts())) for c in corpora.train + corpora.heldout]


def files_of(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def count_encoded(monkeypatch):
    """A list that grows by the number of texts of each call of the tokenizer."""
    calls = []
    kinds = [kind for parent in Tokenizer.__subclasses__() for kind in (parent, *parent.__subclasses__())]
    for kind in [kind for kind in kinds if "encode_batch" in vars(kind)]:

        def counted(self, texts, encode=kind.encode_batch):
            calls.append(len(texts))
            return encode(self, texts)

        monkeypatch.setattr(kind, "encode_batch", counted)
    return calls


# --- what a corpus is -------------------------------------------------------------------------


def test_every_document_is_there_once_and_ends_in_the_end_of_text(tmp_path):
    corpora = build_corpora(config(tmp_path))
    train, held = corpora.train[0], corpora.heldout[0]
    assert sorted([*train.texts(), *held.texts()]) == sorted(TEXTS)
    assert train.n_docs + held.n_docs == len(TEXTS) and 0 < held.n_docs < len(TEXTS) / 2
    for corpus in (train, held):
        assert corpus.bytes == sum(len(text.encode()) for text in corpus.texts())
        for d, text in enumerate(corpus.texts()):
            tokens = corpus.tokens[corpus.offsets[d] : corpus.offsets[d + 1]]
            assert tokens[-1] == corpora.tokenizer.eos_id
            assert corpora.tokenizer.decode(tokens[:-1]) == text
    assert isinstance(train.tokens, np.memmap) and train.tokens.dtype == np.uint16
    assert "to train on" in corpora.summary() and "\n" not in corpora.summary()


def test_measures_add_up(tmp_path):
    corpora = build_corpora(config(tmp_path))
    assert corpora.heldout_bytes == len(corpora.heldout_text().encode()) == corpora.heldout[0].bytes
    assert corpora.train_bytes == len(corpora.train_text().encode())
    held = corpora.heldout[0]
    assert corpora.heldout_tokens_per_byte == (held.bytes + held.n_docs) / held.bytes  # bytes, and an end each
    assert corpora.train_tokens_per_byte == len(corpora.train[0].tokens) / corpora.train_bytes


def test_in_memory_is_the_same_as_on_disk(tmp_path):
    corpora = build_corpora(config(tmp_path))
    for corpus in (corpora.train[0], corpora.heldout[0]):
        made = in_memory(corpus.texts(), corpora.tokenizer)
        np.testing.assert_array_equal(made.tokens, corpus.tokens)
        np.testing.assert_array_equal(made.offsets, corpus.offsets)
        assert list(made.texts()) == list(corpus.texts()) and made.bytes == corpus.bytes


def test_large_vocabularies_take_four_bytes():
    characters = train_tokenizer(TokenizerConfig("characters"), ["".join(map(chr, range(0x10000, 0x20000)))])
    assert in_memory(["\U00010000"], characters).tokens.dtype == np.uint32
    assert in_memory(["a"], train_tokenizer(BYTES, [])).tokens.dtype == np.uint16


def test_duplicates_and_empty_documents_are_dropped(tmp_path):
    corpora = build_corpora(config(tmp_path, [*TEXTS, TEXTS[3], "", TEXTS[3], *TEXTS[:5]]))
    assert sorted([*corpora.train[0].texts(), *corpora.heldout[0].texts()]) == sorted(TEXTS)
    assert corpora.duplicates == 7


def test_the_split_does_not_depend_on_the_order_or_on_other_documents(tmp_path):
    """A document must not move from held-out to train because the data grew."""
    grown = [*reversed(TEXTS), *(f"another text {i}" for i in range(40))]
    sooner, later = (build_corpora(config(tmp_path, sources=(write(tmp_path, t, n),))) for t, n in ((TEXTS, "a"), (grown, "b")))
    assert set(sooner.heldout[0].texts()) < set(later.heldout[0].texts())
    assert set(later.heldout[0].texts()).isdisjoint(later.train[0].texts())


def test_two_documents_are_one_of_each(tmp_path):
    corpora = build_corpora(config(tmp_path, ["one", "two"], holdout=HoldoutConfig(fraction=0.001)))
    assert corpora.train[0].n_docs == corpora.heldout[0].n_docs == 1


def test_one_document_asks_for_the_tail(tmp_path):
    with pytest.raises(ValueError, match="one document, none to hold out: use holdout by 'tail'"):
        build_corpora(config(tmp_path, ["only one"]))
    with pytest.raises(ValueError, match="gives no text"):
        build_corpora(config(tmp_path, [""]))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("texts", [["aé🎉dефghij" * 10], ["aé", "🎉", "dефghij", "klm nop", "qrstuvw"], TEXTS])
def test_tail_cuts_the_characters_as_nanogpt_does(tmp_path, texts, fraction):
    corpora = build_corpora(config(tmp_path, texts, holdout=HoldoutConfig("tail", fraction)))
    whole = "".join(texts)
    cut = int(len(whole) * (1 - fraction))
    assert corpora.train_text() == whole[:cut]
    assert corpora.heldout_text() == whole[cut:]


def test_tail_of_too_little_text_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"too little text to hold out 0.9"):
        build_corpora(config(tmp_path, ["a"], holdout=HoldoutConfig("tail", 0.9)))


def test_the_tokenizer_sees_the_train_part_alone(tmp_path):
    texts = [f"{chr(0x4E00 + i)} text" for i in range(40)]  # each has a character of its own
    corpora = build_corpora(config(tmp_path, texts, TokenizerConfig("characters")))
    train = {character for text in corpora.train[0].texts() for character in text}
    assert set(corpora.tokenizer.characters) == train
    assert all(corpora.tokenizer.unknown_id in tokens for tokens in [corpora.heldout[0].tokens])


def test_a_mixture_has_one_tokenizer_and_a_corpus_for_each_source(tmp_path):
    one, two = write(tmp_path, TEXTS, "one"), write(tmp_path, [text.upper() for text in TEXTS], "two")
    corpora = build_corpora(config(tmp_path, tokenizer=TokenizerConfig("characters"), sources=(one, two)))
    assert [c.n_docs + d.n_docs for c, d in zip(corpora.train, corpora.heldout, strict=True)] == [60, 60]
    assert {"d", "D"} <= set(corpora.tokenizer.characters)
    assert all(text.upper() == text for text in corpora.train[1].texts())


def test_a_text_in_two_sources_is_held_out_of_both(tmp_path):
    one, two = write(tmp_path, TEXTS, "one"), write(tmp_path, [*TEXTS[:40], "more"], "two")
    corpora = build_corpora(config(tmp_path, sources=(one, two)))
    held = {text for corpus in corpora.heldout for text in corpus.texts()}
    assert held.isdisjoint(text for corpus in corpora.train for text in corpus.texts())


def test_tokenizer_training_on_a_sample_spreads_over_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "TRAINING_BYTES", 600)
    texts = [f"{chr(0x4E00 + i)} text" for i in range(200)]
    corpora = build_corpora(config(tmp_path, texts, TokenizerConfig("characters")))
    seen = sorted(ord(c) - 0x4E00 for c in corpora.tokenizer.characters if ord(c) >= 0x4E00)
    assert 30 < len(seen) < 100 and seen[-1] > 150


# --- the cache --------------------------------------------------------------------------------


def test_a_finished_corpus_is_opened_not_built(tmp_path, monkeypatch):
    first = contents(build_corpora(config(tmp_path)))
    folder = corpus_folder(config(tmp_path))
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    calls = count_encoded(monkeypatch)
    assert contents(build_corpora(config(tmp_path))) == first
    assert calls == []
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    assert not [name for name in files_of(folder) if "unfinished" in name or name.endswith("building.json") or "-" in name]


def test_how_tokens_are_read_needs_no_new_corpus(tmp_path):
    plain = config(tmp_path)
    other = config(tmp_path, length=64, batch_size=2, layout="packed", epochs=2.0, prefetch=1)
    assert corpus_folder(plain) == corpus_folder(other)
    even, uneven = (
        config(tmp_path, sources=tuple(SourceConfig("files", path=plain.sources[0].path, weight=weight) for weight in weights))
        for weights in ((1.0, 1.0), (3.0, 1.0))
    )
    assert corpus_folder(even) == corpus_folder(uneven), "weights only choose among what is tokenised"
    different = [
        config(tmp_path, tokenizer=TokenizerConfig("characters")),
        config(tmp_path, holdout=HoldoutConfig(fraction=0.3)),
        config(tmp_path, sources=plain.sources * 2),
        config(tmp_path, tokenizer=TokenizerConfig("bytes", special=("mask", "cls"))),
        config(tmp_path, tokenizer=TokenizerConfig("bytes", sentinels=1)),
    ]
    assert len({corpus_folder(c) for c in [plain, *different]}) == 6
    turned = config(tmp_path, tokenizer=TokenizerConfig("bytes", special=("cls", "mask")))
    assert corpus_folder(turned) == corpus_folder(different[3])


def test_special_tokens_come_back_from_the_cache(tmp_path):
    asked = config(tmp_path, tokenizer=TokenizerConfig("bytes", special=("mask", "cls"), sentinels=2))
    built, opened = build_corpora(asked), build_corpora(asked)
    assert built.tokenizer.special == opened.tokenizer.special == {"cls": 257, "mask": 258}
    assert list(opened.tokenizer.sentinels) == [259, 260]
    np.testing.assert_array_equal(opened.train[0].tokens, build_corpora(config(tmp_path)).train[0].tokens)


def test_the_folder_does_not_depend_on_how_a_path_is_spelt(tmp_path, monkeypatch):
    write(tmp_path, TEXTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", str(tmp_path))
    spelt = ["data.jsonl", "${HERE}/data.jsonl", str(tmp_path / "data.jsonl")]
    sources = [SourceConfig("files", path=path) for path in spelt]
    assert len({corpus_folder(config(tmp_path, sources=(source,))) for source in sources}) == 1


def test_the_cache_root_comes_from_config_or_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "env"))
    assert corpus_folder(config(tmp_path, cache=None)).parent == tmp_path / "env"
    assert corpus_folder(config(tmp_path, cache="${JAXLM_CACHE}/x")).parent == tmp_path / "env" / "x"
    monkeypatch.delenv("JAXLM_CACHE")
    assert corpus_folder(config(tmp_path, cache=None)).parent.parts[-2:] == (".cache", "jaxlm")


def test_changed_data_is_refused_with_what_changed_and_what_to_do(tmp_path):
    asked = config(tmp_path)
    build_corpora(asked)
    write(tmp_path, [*TEXTS[:-1], "changed"])
    folder = corpus_folder(asked)
    with pytest.raises(ValueError, match="no longer fits its data") as error:
        build_corpora(asked)
    assert "data.jsonl" in str(error.value) and str(folder) in str(error.value) and "delete" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_changed_tokenizer_is_refused(tmp_path):
    build_corpora(config(tmp_path, tokenizer=TokenizerConfig("characters")))
    folder = corpus_folder(config(tmp_path, tokenizer=TokenizerConfig("characters")))
    train_tokenizer(TokenizerConfig("characters"), ["other"]).save(folder / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer was .* is .*delete"):
        build_corpora(config(tmp_path, tokenizer=TokenizerConfig("characters")))


def test_meta_holds_the_counts(tmp_path):
    corpora = build_corpora(config(tmp_path, [*TEXTS, TEXTS[0]]))
    meta = json.loads((corpus_folder(config(tmp_path)) / "meta.json").read_text())
    source = meta["sources"][0]
    train = corpora.train[0]
    assert source["train"] == {"n_docs": train.n_docs, "tokens": len(train.tokens), "bytes": train.bytes}
    assert source["duplicates"] == 1
    assert meta["tokens_per_second"] > 0
    assert meta["fingerprint"]["tokenizer"] == corpora.tokenizer.fingerprint


class PowerCutError(Exception):
    """Stands for one."""


@pytest.mark.parametrize("after", range(16))
def test_a_cut_off_build_goes_on_and_ends_up_the_same(tmp_path, monkeypatch, after):
    """Cut after each of the renames that finish a step; what was finished is kept, and the result is that of one go."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 900)
    tokenizer = TokenizerConfig("characters")
    expected = contents(build_corpora(config(tmp_path, tokenizer=tokenizer, cache=str(tmp_path / "one-go"))))
    whole = count_encoded(monkeypatch)
    steps = 0
    real = cache._finished

    @cache.contextlib.contextmanager
    def cut_later(file):
        nonlocal steps
        with real(file) as unfinished:
            yield unfinished
            if steps == after:  # the file is written but never gets its name
                raise PowerCutError
            steps += 1

    monkeypatch.setattr(cache, "_finished", cut_later)
    with pytest.raises(PowerCutError):
        build_corpora(config(tmp_path, tokenizer=tokenizer))
    folder = corpus_folder(config(tmp_path, tokenizer=tokenizer))
    assert not (folder / "meta.json").exists()
    # What the cut left may be anything: also a shard of which only half was written.
    for left in folder.rglob("*.unfinished"):
        if left.is_file():
            left.write_bytes(left.read_bytes()[: left.stat().st_size // 2])
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("train-*.npz")}
    encoded_before = sum(whole)

    monkeypatch.setattr(cache, "_finished", real)
    seen = []
    unlink = cache.pathlib.Path.unlink

    def note(self, *args, **kwargs):
        seen.append((self, self.stat().st_mtime_ns))
        unlink(self, *args, **kwargs)

    monkeypatch.setattr(cache.pathlib.Path, "unlink", note)
    assert contents(build_corpora(config(tmp_path, tokenizer=tokenizer))) == expected
    assert kept.items() <= dict(seen).items(), "a finished shard was written again"
    assert sum(whole) <= len(TEXTS) + len(TEXTS) // 3, f"encoded {encoded_before} before and {sum(whole)} in all"
    assert not list(folder.rglob("*.unfinished"))


def test_data_that_changed_during_a_cut_off_build_starts_anew(tmp_path, monkeypatch):
    real = cache._tokenise
    monkeypatch.setattr(cache, "_tokenise", lambda *args: (_ for _ in ()).throw(PowerCutError()))
    with pytest.raises(PowerCutError):
        build_corpora(config(tmp_path))
    monkeypatch.setattr(cache, "_tokenise", real)
    corpora = build_corpora(config(tmp_path, [f"new {text}" for text in TEXTS]))
    assert all(text.startswith("new ") for text in corpora.train[0].texts())


def test_sharded_and_whole_give_the_same_corpus(tmp_path, monkeypatch):
    whole = contents(build_corpora(config(tmp_path, cache=str(tmp_path / "a"))))
    monkeypatch.setattr(cache, "SHARD_BYTES", 100)
    monkeypatch.setattr("jaxlm.data.corpus.BATCH_BYTES", 50)
    assert contents(build_corpora(config(tmp_path, cache=str(tmp_path / "b")))) == whole


def test_threads_that_build_at_once_build_once(tmp_path, monkeypatch):
    calls = count_encoded(monkeypatch)
    setup = config(tmp_path)
    built = [None] * 4
    workers = [threading.Thread(target=lambda i=i: built.__setitem__(i, contents(build_corpora(setup)))) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert built[0] is not None and all(b == built[0] for b in built)
    assert sum(calls) == len(TEXTS)


def _build_in_process(setup, results):
    results.put(contents(build_corpora(setup)))


@pytest.mark.slow
def test_processes_that_build_at_once_do_not_harm_each_other(tmp_path):
    setup = config(tmp_path, [f"{text} {i}" for i in range(200) for text in TEXTS], TokenizerConfig("bpe", vocab_size=300))
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    workers = [spawn.Process(target=_build_in_process, args=(setup, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    built = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert built[0] == built[1] == built[2]


# --- measures and real texts ------------------------------------------------------------------


def test_xz_is_what_the_command_makes_of_it():
    text = "the quick brown fox — 🦊 " * 50
    raw = text.encode()
    assert (
        xz_bits_per_byte(text) == xz_bits_per_byte(raw) == 8 * len(lzma.compress(raw, format=lzma.FORMAT_XZ, preset=9)) / len(raw)
    )
    assert xz_bits_per_byte(text, after=text) < xz_bits_per_byte(text) / 2
    with pytest.raises(ValueError, match="empty"):
        xz_bits_per_byte("")


@pytest.mark.slow
def test_the_embedded_corpus_is_split_disjoint(tmp_path):
    corpora = build_corpora(DataConfig(tokenizer=BYTES, cache=str(tmp_path)))
    train, held = set(corpora.train[0].texts()), set(corpora.heldout[0].texts())
    assert train.isdisjoint(held)
    assert corpora.train_bytes + corpora.heldout_bytes > 1_000_000
    assert 0.02 < corpora.heldout_bytes / corpora.train_bytes < 0.12


@pytest.mark.realdata
def test_tiny_shakespeare_is_cut_where_nanogpt_cuts_it(data, tmp_path):
    source = SourceConfig("files", path=str(data / "lm-tinyshakespeare" / "input.txt"))
    corpora = build_corpora(
        config(tmp_path, tokenizer=TokenizerConfig("characters"), sources=(source,), holdout=HoldoutConfig("tail", 0.1))
    )
    assert len(corpora.train[0].tokens) == 1_003_854 + 1  # nanoGPT's train.bin, and our end of text
    assert len(corpora.heldout[0].tokens) == 111_540 + 1
    assert corpora.tokenizer.vocab_size == 65 + 2


@pytest.mark.realdata
def test_chinese_text_has_no_unknown_bytes(data, tmp_path):
    source = SourceConfig("files", path=str(data / "lm-zh-hongloumeng" / "*.txt"))
    corpora = build_corpora(config(tmp_path, sources=(source,), holdout=HoldoutConfig("tail", 0.05)))
    assert corpora.tokenizer.decode(corpora.heldout[0].tokens) == corpora.heldout_text()
