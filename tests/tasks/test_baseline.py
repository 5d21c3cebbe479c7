"""What words alone can do."""

import random
import re
from types import SimpleNamespace

import pytest

from jaxlm.tasks import words_alone
from jaxlm.tasks.baseline import WORD


@pytest.mark.parametrize(
    "text, words",
    [
        ("It's naïve, ok?", ["It", "'", "s", "naïve", ",", "ok", "?"]),
        ("中国2012年", ["中", "国", "2012", "年"]),
        ("हिन्दी भाषा। snake_case", ["हिन्दी", "भाषा", "।", "snake_case"]),
        ("ພາສາ 𠮷野", ["ພ", "າ", "ສ", "າ", "𠮷", "野"]),
        ("カタ kana ไทย", ["カ", "タ", "kana", "ไ", "ท", "ย"]),
    ],
)
def test_words_of_any_script(text, words):
    assert re.findall(WORD, text) == words


@pytest.mark.parametrize(
    "signs, yes, no", [("天地玄黄宇宙洪荒", "日月", "月日"), (["red ", "old ", "far "], "sun moon ", "moon sun ")]
)
def test_pairs_of_words_tell_texts_apart(signs, yes, no):
    """The same words in another order, in a script with spaces and in one without."""
    rng = random.Random(0)
    rows = []
    for i in range(120):
        label = "yes" if i % 2 else "no"
        around = ["".join(rng.choices(signs, k=3)) for _ in range(2)]
        rows.append({"text": around[0] + (yes if label == "yes" else no) + around[1], "label": label})
    task = SimpleNamespace(config=SimpleNamespace(kind="classification"), labels=("no", "yes"))
    found = words_alone(task, rows[:80], rows[80:])
    assert [one["label"] for one in found] == [row["label"] for row in rows[80:]]
    assert all(sum(one["probabilities"].values()) == pytest.approx(1) for one in found)
    assert words_alone(SimpleNamespace(config=SimpleNamespace(kind="regression")), rows, rows) is None
