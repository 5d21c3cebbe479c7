"""What words alone can do: the mark that a fine-tuned classifier has to beat."""

import unicodedata
from collections.abc import Sequence

from jaxlm.tasks.task import Prediction, Row, Task

MOST = 50_000  # rows beyond which the baseline is not worth the wait
NAME = "tf-idf + logistic regression"
# In scripts without spaces (Thai, Lao, Burmese, Khmer, kana, Chinese characters) each character counts as a word, in others a run
# of letters with the marks on them, which Python's \w leaves out.
SPACELESS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_MARKS = "".join(char for char in map(chr, range(0x300, 0x10000)) if unicodedata.category(char)[0] == "M")
WORD = rf"(?u)[{SPACELESS}]|(?:[^\W{SPACELESS}][{_MARKS}]*)+|[^\w\s]"


def words_alone(task: Task, train: Sequence[Row], held: Sequence[Row]) -> list[Prediction] | None:
    """Predictions of logistic regression on tf-idf of words and pairs of words (scikit-learn's defaults, sublinear counts),
    learned from the same rows; None where the task is not to tell texts apart, or there are too many rows."""
    if task.config.kind != "classification" or len(train) > MOST:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def texts(rows: Sequence[Row]) -> list[str]:
        return [f"{row['text']} {row.get('pair', '')}" for row in rows]

    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)
    model = make_pipeline(vectors, LogisticRegression(max_iter=1000, C=10.0))
    try:
        model.fit(texts(train), [str(row["label"]) for row in train])
    except ValueError:  # no word is left, or one label alone
        return None
    made = []
    for given in model.predict_proba(texts(held)):
        named = dict.fromkeys(task.labels, 0.0) | {str(name): float(p) for name, p in zip(model.classes_, given, strict=True)}
        best = max(named, key=lambda name: named[name])
        made.append({"label": best, "probability": named[best], "probabilities": named})
    return made
