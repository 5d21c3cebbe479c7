"""Scores of written texts against references: translation (sacrebleu), summaries (rouge-score).

All scores are percentages. A signature says how each was computed: scores compare only where signatures agree.
B texts · S statistics · N weightings (resamples).
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxlm.config import unknown
from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import Scores, Weighted, averaged, check_sizes
from jaxlm.metrics.scripts import script_of, words_of

References = Sequence[str] | Sequence[Sequence[str]]
"""One reference a text, or any number of them."""
Tokenizer = Literal["auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200", "char", "none"]
# Script of the references → BLEU's tokenizer, and the one that stands in where its package is not installed.
_OF_SCRIPT = {
    "Chinese": ("zh", "zh"), "Japanese": ("ja-mecab", "char"), "Korean": ("ko-mecab", "13a"), "spaceless": ("char", "char"),
    "spaced": ("13a", "13a"),
}  # fmt: skip
_NEEDS = {
    "ja-mecab": "pip install 'sacrebleu[ja]'", "ko-mecab": "pip install 'sacrebleu[ko]'",
    "flores101": "pip install sentencepiece, and a network for the model's first use",
    "flores200": "pip install sentencepiece, and a network for the model's first use",
}  # fmt: skip
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


class TokenizerChoice(NamedTuple):
    """BLEU's tokenizer, and in a sentence why it was taken where the user named none."""

    name: str
    reason: str


def choose_tokenizer(references: References, tokenize: Tokenizer = "auto") -> TokenizerChoice:
    """BLEU's tokenizer by sacrebleu's name. "auto" follows the script of the references: zh, ja-mecab or ko-mecab, single
    characters for other scripts without spaces, else 13a; without MeCab single characters for Japanese and 13a for Korean.

    Raises ValueError for a name that sacrebleu does not know.
    """
    if tokenize not in get_args(Tokenizer):
        raise unknown("tokenize", tokenize, get_args(Tokenizer))
    if tokenize != "auto":
        return TokenizerChoice(tokenize, "")
    script = script_of(text for several in listed(references) for text in several)
    best, instead = _OF_SCRIPT[script]
    because = "the references are " + {"spaced": "written with spaces", "spaceless": "written without spaces"}.get(script, script)
    if _there(best):
        return TokenizerChoice(best, because)
    return TokenizerChoice(instead, f"{because}, and {best} is not installed ({_NEEDS[best]})")


@functools.cache
def _there(tokenize: str) -> bool:
    """Whether one of sacrebleu's tokenizers can be made here."""
    try:
        _bleu(tokenize)
    except ValueError:
        return False
    return True


def translation(hypotheses: Sequence[str], references: References, tokenize: Tokenizer = "auto") -> Scored:
    """bleu (Papineni et al. 2002), chrf (chrF2: Popović 2015) and ter (Snover et al. 2006; lower is better) of a corpus.

    They are sacrebleu's (Post 2018), with its signatures. `tokenize` is BLEU's (`choose_tokenizer`). TER takes each East Asian
    character for a word if the references are Chinese or Japanese, or `tokenize` is one for text without spaces.
    """
    check_sizes(hypotheses, references)
    lists = listed(references)
    columns = _columns(lists)
    values, signatures = {}, {}
    for name, metric in _metrics(lists, tokenize).items():
        values[name] = float(metric.corpus_score(list(hypotheses), columns).score)
        signatures[name] = str(metric.get_signature())
    return Scored(values, signatures)


def weighted_translation(tokenize: Tokenizer = "auto") -> Weighted:
    """The values of `translation` for resampling: each sentence is tokenised, matched and edited once. "auto" looks at the
    references of all texts."""

    def prepare(hypotheses: Sequence[str], references: References) -> Callable[[np.ndarray], Scores]:
        check_sizes(hypotheses, references)
        lists = listed(references)
        columns, metrics = _columns(lists), _metrics(lists, tokenize)
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


def _metrics(references: list[list[str]], tokenize: Tokenizer) -> dict[str, Any]:
    from sacrebleu.metrics import CHRF, TER

    chosen = choose_tokenizer(references, tokenize).name
    texts = (text for several in references for text in several)
    spaceless = chosen in ("zh", "ja-mecab", "char") or script_of(texts) in ("Chinese", "Japanese")
    return {"bleu": _bleu(chosen), "chrf": CHRF(), "ter": TER(normalized=spaceless, asian_support=spaceless)}


def _bleu(tokenize: str) -> Any:
    """sacrebleu's BLEU. Raises ValueError if the packages of its tokenizer are not installed."""
    from sacrebleu.metrics import BLEU

    try:
        return BLEU(tokenize=tokenize, force=True)  # force: no warning that a text looks tokenised
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(f"tokenize {tokenize!r} needs what is not here: {_NEEDS.get(tokenize, error)}") from error


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
    references' words consist of other letters than [a-z0-9]. The signature says which.
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
    found = collections.Counter(
        2 * sum(char.isascii() for char in word) > len(word)
        for several in references
        for text in several
        for word in words_of(text)
    )
    return "unicode" if found[False] > found[True] else "latin"


class _Unicode:
    """Words of any script, as rouge-score asks for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)
