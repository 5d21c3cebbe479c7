"""Scores of written texts against references: translation (sacrebleu), summaries (rouge-score).

All scores are percentages. A signature says how each was computed: scores compare only where signatures agree.
B texts · S statistics · N weightings (resamples).
"""

import collections
import functools
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxlm.config import unknown
from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import Scores, Weighted, averaged, check_sizes

References = Sequence[str] | Sequence[Sequence[str]]
"""One reference a text, or any number of them."""
Tokenizer = Literal["13a", "zh", "ja-mecab", "char", "intl", "none"]
Words = Literal["auto", "latin", "unicode"]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
declare(higher=("bleu", "chrf", *ROUGE), lower=("ter",))


class Scored(NamedTuple):
    """Scores, and the signature of each: how it was computed, for others to repeat."""

    values: dict[str, float]
    signatures: dict[str, str]


def listed(references: References) -> list[list[str]]:
    """The references of each text as a list; ValueError for a text without any."""
    lists = [[each] if isinstance(each, str) else list(each) for each in references]
    for i, each in enumerate(lists):
        if not each:
            raise ValueError(f"text {i} has no reference")
    return lists


# --- translation -----------------------------------------------------------------------------


def translation(hypotheses: Sequence[str], references: References, tokenize: Tokenizer = "13a") -> Scored:
    """bleu (Papineni et al. 2002), chrf (chrF2: Popović 2015) and ter (Snover et al. 2006; lower is better) of a corpus.

    They are sacrebleu's (Post 2018), with its signatures. `tokenize` is BLEU's; with one for text without spaces (zh,
    ja-mecab, char) TER, too, takes each East Asian character for a word.
    """
    check_sizes(hypotheses, references)
    columns = _columns(listed(references))
    values, signatures = {}, {}
    for name, metric in _metrics(tokenize).items():
        values[name] = float(metric.corpus_score(list(hypotheses), columns).score)
        signatures[name] = str(metric.get_signature())
    return Scored(values, signatures)


def weighted_translation(tokenize: Tokenizer = "13a") -> Weighted:
    """The values of `translation` for resampling: each sentence is tokenised, matched and edited once."""

    def prepare(hypotheses: Sequence[str], references: References) -> Callable[[np.ndarray], Scores]:
        check_sizes(hypotheses, references)
        columns, metrics = _columns(listed(references)), _metrics(tokenize)
        # sacrebleu's own bootstrap works on these two methods; it shows them in no other way. A test holds us to it.
        rows = {k: np.array(m._extract_corpus_statistics(list(hypotheses), columns), float) for k, m in metrics.items()}

        def scores(weights_NB: np.ndarray) -> Scores:
            found = {}
            for name, metric in metrics.items():
                sums_NS = weights_NB @ rows[name]
                found[name] = np.array([metric._compute_score_from_stats(sums_S).score for sums_S in sums_NS.tolist()])
            return found

        return scores

    return Weighted(prepare)


def _metrics(tokenize: str) -> dict[str, Any]:
    if tokenize not in get_args(Tokenizer):
        raise unknown("tokenize", tokenize, get_args(Tokenizer))
    from sacrebleu.metrics import BLEU, CHRF, TER

    spaceless = tokenize in ("zh", "ja-mecab", "char")
    try:
        bleu = BLEU(tokenize=tokenize, force=True)  # force: no warning that a text looks tokenised
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"tokenize {tokenize!r} needs a package that is not here: pip install 'sacrebleu[ja]'") from error
    return {"bleu": bleu, "chrf": CHRF(), "ter": TER(normalized=spaceless, asian_support=spaceless)}


def _columns(references: list[list[str]]) -> list[list[str | None]]:
    """sacrebleu takes the first reference of every text, then the second of every text, …, None where there is none."""
    most = max(len(each) for each in references)
    return [[each[i] if i < len(each) else None for each in references] for i in range(most)]


# --- summaries -------------------------------------------------------------------------------


def summarisation(summaries: Sequence[str], references: References, words: Words = "auto") -> Scored:
    """rouge1, rouge2, rougeL and rougeLsum (Lin 2004): F-measures in percent, like BLEU, averaged over texts.

    They are rouge-score's. Of several references the best counts, for each score by itself. rougeLsum takes lines for
    sentences: put a newline between those of a summary. An empty text scores 0.

    `words`: "latin" is ROUGE-1.5.5's, runs of [a-z0-9] with Porter's stemmer for English, and drops every other letter;
    "unicode" takes runs of letters, marks and digits of any script, unstemmed, and single characters of scripts written
    without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese). "auto" is "unicode" where more than half of the
    references' letters and digits lie outside [a-z0-9]. The signature says which.
    """
    lists = listed(references)
    check_sizes(summaries, lists)
    chosen = _words(lists, words)
    values = {name: float(np.mean(value_B)) for name, value_B in _rouge(summaries, lists, chosen).items()}
    return Scored(values, dict.fromkeys(ROUGE, _rouge_signature(lists, chosen)))


def weighted_summarisation(words: Words = "auto") -> Weighted:
    """The values of `summarisation` for resampling; "auto" looks at the references of all texts."""

    def values(summaries: Sequence[str], references: References) -> dict[str, np.ndarray]:
        lists = listed(references)
        check_sizes(summaries, lists)
        return _rouge(summaries, lists, _words(lists, words))

    return averaged(values)


def _rouge(summaries: Sequence[str], references: list[list[str]], words: str) -> dict[str, np.ndarray]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True) if words == "latin" else RougeScorer(list(ROUGE), tokenizer=_Unicode())
    found = [scorer.score_multi(several, text) for text, several in zip(summaries, references, strict=True)]
    return {name: np.array([100 * scores[name].fmeasure for scores in found]) for name in ROUGE}


def _rouge_signature(references: list[list[str]], words: str) -> str:
    import importlib.metadata

    counts = {len(each) for each in references}
    nrefs = counts.pop() if len(counts) == 1 else "var"
    stemmer = "porter" if words == "latin" else "none"
    return f"nrefs:{nrefs}|words:{words}|stem:{stemmer}|mean:texts|rouge-score:{importlib.metadata.version('rouge-score')}"


def _words(references: list[list[str]], words: str) -> str:
    if words not in get_args(Words):
        raise unknown("words", words, get_args(Words))
    if words != "auto":
        return words
    letters = collections.Counter(char for several in references for text in several for char in text.lower())
    kept = sum(n for char, n in letters.items() if char.isascii() and char.isalnum())
    return "unicode" if sum(n for char, n in letters.items() if _kind(char) in ("letter", "single")) > 2 * kept else "latin"


class _Unicode:
    """Words of any script, as rouge-score asks for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        before = "other"
        for char in unicodedata.normalize("NFC", text.lower()):
            kind = _kind(char)
            if kind == "mark" and before != "other":
                tokens[-1] += char  # belongs to the letter before it
                continue
            if kind == "letter" and before == "letter":
                tokens[-1] += char
            elif kind in ("letter", "single"):
                tokens.append(char)
            before = "other" if kind == "mark" else kind
        return tokens


@functools.lru_cache(maxsize=65536)
def _kind(char: str) -> Literal["letter", "single", "mark", "other"]:
    """A letter or digit, one of a script without spaces, a mark on the letter before, or anything else."""
    category = unicodedata.category(char)[0]
    if category == "M":
        return "mark"
    if category not in "LN":
        return "other"
    script = unicodedata.name(char, "").split(" ")[0]
    spaceless = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    return "single" if script in spaceless else "letter"
