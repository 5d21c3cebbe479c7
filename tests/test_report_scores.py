"""The page of a fine-tuned model: stands alone, escapes all it is given, cuts nothing off, reads with 2 classes and with 77."""

import math
import re
import warnings

import numpy as np
import pytest

from jaxlm.report import write_scores
from jaxlm.report.scores import NUMBERED, draw_confusion

NAN = (math.nan,) * 3
BINS = [(0.0, 0.5, math.nan, math.nan, 0), (0.5, 1.0, 0.8, 0.7, 10)]


def pixels(file):
    import matplotlib.image

    return matplotlib.image.imread(file)[..., :3]


def write(folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that no font has, a layout that does not fit
        page = write_scores(folder, **{"title": "t", "summary": {}, "scores": {}, **more})
    return page.read_text(encoding="utf8")


def test_everything_from_data_is_escaped_and_nothing_is_fetched(tmp_path):
    evil = "<script>alert('&')</script>"
    page = write(
        tmp_path,
        title=evil,
        summary={evil: evil},
        scores={evil: (0.5, 0.4, 0.6)},
        confusion=([evil + str(i) for i in range(NUMBERED + 1)], 1 + np.arange((NUMBERED + 1) ** 2).reshape(NUMBERED + 1, -1)),
        errors=[{evil: evil, "expected": evil}],
        reliability=BINS,
        curve=[{"kind": "eval", "step": 1, "loss": 1.0, evil: 0.5}],
    )
    assert "<script" not in page and page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)") >= 7 + 30
    sources = re.findall(r'(?:src|href)="([^"]{0,22})', page)
    assert len(sources) == 3 and all(source == "data:image/png;base64," for source in sources)
    assert {file.name for file in tmp_path.iterdir()} == {"scores.html", "confusion.png", "reliability.png", "curve.png"}


def test_scores_stand_with_their_intervals(tmp_path):
    scores = {"f1": (0.51234, 0.4, 0.6), "bleu": (27.345, 26.0, 28.0), "auroc": NAN, "nll": (math.inf, 1.0, math.inf)}
    page = write(tmp_path, scores=scores | {"alone": (0.5, math.nan, math.nan)}, level=0.9)
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert rows == [
        ("f1", "0.5123", "0.4000 to 0.6000"),
        ("bleu", "27.34", "26.00 to 28.00"),
        ("auroc", "undefined", ""),
        ("nll", "∞", "1.0000 to ∞"),
        ("alone", "0.5000", ""),
    ]
    assert "90% interval" in page and "<img" not in page and "Confusion" not in page


@pytest.mark.parametrize("C", [1, 2, 7, NUMBERED, NUMBERED + 1, 77, 150])
def test_nothing_is_cut_off_at_the_edge(tmp_path, C):
    labels = [f"a label of some length {i}" if i % 3 else f"${i}" for i in range(C)]
    draw_confusion(tmp_path / "c.png", labels, np.random.default_rng(0).integers(0, 1000, (C, C)))
    image = pixels(tmp_path / "c.png")
    for edge in (image[:4], image[-4:], image[:, :4], image[:, -4:]):
        assert (edge == 1).all(), "only white at the edge"
    assert (image < 0.5).any() and max(image.shape) < 2400


def test_a_small_matrix_shows_numbers_a_large_one_lists_pairs(tmp_path):
    counts = np.diag(np.full(20, 90))
    counts[3, 4], counts[7, 1], counts[1, 7] = 10, 30, 10
    labels = [f"class-{chr(97 + i)}" for i in range(20)]
    page = write(tmp_path, confusion=(labels, counts))
    rows = re.findall(r"<tr><td>(class-.)</td><td>(class-.)</td><td>(\d+)</td><td>(.*?)</td></tr>", page)
    assert rows == [
        ("class-h", "class-b", "30", "25.0% of 120"),
        ("class-b", "class-h", "10", "10.0% of 100"),
        ("class-d", "class-e", "10", "10.0% of 100"),
    ]
    assert "Most confused" not in write(tmp_path, confusion=(labels[:NUMBERED], counts[:NUMBERED, :NUMBERED]))
    counts[:] = 1
    assert write(tmp_path, confusion=(labels, counts)).count("5.0% of 20") == 15
    assert "every prediction is right" in write(tmp_path, confusion=(labels, np.eye(20, dtype=int)))


def test_more_confusion_is_darker(tmp_path):
    def blue(counts):
        draw_confusion(tmp_path / "c.png", ["a", "b"], np.array(counts))
        image = pixels(tmp_path / "c.png")
        return float(((image[..., 2] - image[..., 0]) > 0.1).mean())

    assert blue([[9, 0], [0, 9]]) < blue([[9, 5], [5, 9]]) and blue([[0, 0], [0, 0]]) < blue([[9, 0], [0, 9]])


def test_labels_of_any_script(tmp_path, monkeypatch):
    """What no font can draw gets a number in the picture, and the page says which."""
    monkeypatch.setattr("jaxlm.report.scores._letters", lambda: frozenset(range(0x250)))
    page = write(tmp_path, confusion=(["财经", "$\\frac$ ok", "", "two\nlines"], np.eye(4, dtype=int)))
    assert re.findall(r"<tr><td>(class \d+)</td><td>(.*?)</td></tr>", page) == [("class 0", "财经")]
    assert "in the picture" not in write(tmp_path, confusion=(["naïve", "b"], np.eye(2, dtype=int)))


def test_long_texts_are_cut_and_half_characters_survive(tmp_path):
    page = write(tmp_path, errors=[{"text": "x" * 5000, "expected": "a\ud800"}])
    assert "x" * 599 + "…" in page and "x" * 600 not in page and "a?" in page


def test_a_curve_is_a_picture_or_rows(tmp_path):
    rows = [{"kind": "train", "step": s, "loss": 1.0 / s} for s in (1, 2)] + [
        {"kind": "eval", "step": 2, "accuracy": 0.5, "loss": None}
    ]
    page = write(tmp_path, curve=rows)
    assert "Training" in page and (pixels(tmp_path / "curve.png") < 0.9).any()
    assert write(tmp_path / "again", curve=tmp_path / "curve.png") == page
    assert "Training" in write(tmp_path, curve=[])


def test_a_table_without_examples_is_no_diagram(tmp_path):
    assert "Reliability" not in write(tmp_path, reliability=[(0.0, 1.0, math.nan, math.nan, 0)])
    assert not (tmp_path / "reliability.png").exists()
