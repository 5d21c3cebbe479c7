"""Each suite's contexts and choices, written by hand; its files, whole and broken; scores of likelihoods chosen by hand."""

import json

import numpy as np
import pytest

from jaxlm import cli
from jaxlm.harness import SUITES, Likelihood, Question, Read, answer, detokenised, read_pages, read_questions
from jaxlm.harness.scores import choices
from jaxlm.harness.suites import pages

COPA = {"premise": "My body cast a shadow. ", "question": "cause", "choice1": "The sun rose.", "choice2": "Rain fell.", "label": 0}
HELLASWAG = {
    "activity_label": "Making tea", "ctx_a": "[header] How to pour [title] Warm the pot.", "ctx_b": "then SHE",
    "endings": ["pours  it. [step] Wait.", " drinks. "], "label": "1",
}  # fmt: skip
OPENBOOKQA = {
    "question_stem": "The sun is", "choices": {"text": ["a star", "a moon", "tea"], "label": ["A", "B", "C"]}, "answerKey": " B",
}  # fmt: skip
WINOGRANDE = {"sentence": "Ann beat Bea, as _ is quick. ", "option1": "Ann", "option2": "Bea", "answer": "2"}
READY = {"query": "The sun is", "choices": ["a star", "a moon"], "gold": 1}
FILLED = {"context_options": ["so Ann", "so Bea"], "continuation": "won.", "gold": 1}

# (suite, row) → the pairs that a model scores, the texts whose lengths count, the right one.
BY_HAND = [
    (
        "hellaswag", HELLASWAG,
        # The first mark becomes a full stop where it is a title, others go, and only the first letter of ctx_b stays large.
        [("Making tea: How to pour. Warm the pot. Then she", " pours it. Wait."),
         ("Making tea: How to pour. Warm the pot. Then she", " drinks.")],
        ("pours it. Wait.", "drinks."), 1,
    ),
    ("openbookqa", OPENBOOKQA, [("The sun is", " a star"), ("The sun is", " a moon"), ("The sun is", " tea")],
     ("a star", "a moon", "tea"), 1),
    ("copa", COPA, [("My body cast a shadow because", "  the sun rose."), ("My body cast a shadow because", "  rain fell.")],
     (" the sun rose.", " rain fell."), 0),
    ("copa", {**COPA, "question": "effect", "label": 1},
     [("My body cast a shadow therefore", "  the sun rose."), ("My body cast a shadow therefore", "  rain fell.")],
     (" the sun rose.", " rain fell."), 1),
    ("winogrande", WINOGRANDE, [("Ann beat Bea, as Ann", " is quick."), ("Ann beat Bea, as Bea", " is quick.")],
     ("Ann beat Bea, as Ann", "Ann beat Bea, as Bea"), 1),
    ("winogrande", FILLED, [("so Ann", " won."), ("so Bea", " won.")], ("so Ann", "so Bea"), 1),
    ("copa", READY, [("The sun is", " a star"), ("The sun is", " a moon")], ("a star", "a moon"), 1),
]  # fmt: skip


def write(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.write_text(rows if isinstance(rows, str) else "".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf8")
    return str(file)


@pytest.mark.parametrize(("suite", "row", "pairs", "texts", "gold"), BY_HAND, ids=lambda x: x if isinstance(x, str) else "")
def test_contexts_and_choices_are_those_written_by_hand(suite, row, pairs, texts, gold, tmp_path):
    read = read_questions(SUITES[suite], write(tmp_path, [row, row]))
    assert read.places == ["rows.jsonl:1", "rows.jsonl:2"]
    assert read.questions == [Question(tuple(pairs), texts, gold)] * 2


def test_hellaswag_as_text_is_six_lines_a_question(tmp_path):
    text = "Tea: she\n1\npours.\ndrinks.\nsings.\nfalls.\n"
    read = read_questions(SUITES["hellaswag"], write(tmp_path, text * 2, "h.txt"), limit=1)
    assert read.places == ["h.txt:1"]
    (question,) = read.questions
    assert question.pairs[1] == ("Tea: she", " drinks.") and question.gold == 1 and len(question.pairs) == 4


def test_wikitext_is_cut_into_articles_and_written_as_before():
    text = " \n = Tea = \n \n It is hot , @-@ ish . \n = = How = = \n Pour ( 1 @,@ 000 ) . \n = Pot = \n He 's in . \n"
    first, second = pages(text)
    assert first.startswith(" = Tea = \n") and " = = How = = " in first and second.startswith(" = Pot = ")
    assert pages("") == [] and pages("no title") == ["no title"]
    assert detokenised(' " Tea " costs 1 @,@ 000 ( N ) ; he \'s 5 @.@ 5 @-@ ish . \n It : a , b \n') == (
        ' "Tea" costs 1,000 (N); he\'s 5.5-ish.\nIt: a, b\n'
    )


@pytest.mark.parametrize(
    ("suite", "rows", "parts"),
    [
        (
            "copa",
            [FILLED],
            ["rows.jsonl:1", "context_options", "premise, question, choice1, choice2, label or query, choices, gold"],
        ),
        ("copa", [COPA, {**COPA, "label": 2}], ["rows.jsonl:2", "label is 2", "from 0 to 1"]),
        ("copa", [{**COPA, "label": -1}], ["label is -1", "from 0 to 1"]),
        ("copa", [{**COPA, "question": "why"}], ["question is 'why'", "cause or effect"]),
        ("copa", [{**READY, "gold": True}], ["gold is True"]),
        ("copa", [{**READY, "choices": ["one"]}], ["choices is ['one']", "two or more texts"]),
        ("copa", [{**READY, "query": " "}], ["query is ' '", "expected a text"]),
        ("openbookqa", [{**OPENBOOKQA, "answerKey": "D"}], ["answerKey is 'D'", "A, B, C"]),
        ("openbookqa", [{**OPENBOOKQA, "choices": ["a", "b"]}], ["choices is ['a', 'b']", "text and label"]),
        ("winogrande", [{**WINOGRANDE, "answer": ""}], ["answer is ''", "from 1 to 2"]),
        ("winogrande", [{**WINOGRANDE, "sentence": "no gap"}], ["sentence is 'no gap'", "_ for the gap"]),
        ("hellaswag", [{**HELLASWAG, "ctx_a": None}], ["ctx_a is None"]),
        ("hellaswag", "{oops\n", ["rows.jsonl:1", "not JSON"]),
        ("hellaswag", "", ["rows.jsonl", "holds no rows"]),
        ("wikitext", [{"text": "x"}], ["rows.jsonl:1", "column page"]),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_file_is_told_in_a_line(suite, rows, parts, tmp_path):
    file = write(tmp_path, rows)
    with pytest.raises(ValueError) as told:
        read_questions(SUITES[suite], file) if SUITES[suite].forms else read_pages(file)
    assert "\n" not in str(told.value)
    for part in parts:
        assert part in str(told.value)


def test_a_cut_off_text_file_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"h\.txt:7 begins a question of 3 lines: each has 6"):
        read_questions(SUITES["hellaswag"], write(tmp_path, "q\n0\na\nb\nc\nd\nq\n0\na\n", "h.txt"))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--task", "helaswag", "--data", "x"], ["unknown task 'helaswag'", "did you mean 'hellaswag'", "wikitext"]),
        (["--task", "copa"], ["task copa needs --data FILE"]),
        (["--task", "copa", "--data", "x.jsonl"], ["no file matches 'x.jsonl'"]),
        (["--task", "copa", "--data", "x", "--columns", "text=a"], ["not for task copa"]),
        (["--task", "copa", "--data", "x", "--limit", "0"], ["limit is 0"]),
        (["--limit", "3"], ["for the suites (hellaswag"]),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line_are_one_line(words, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "nowhere", *words]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(part in message for part in parts), message


def test_the_length_that_divides_is_that_of_the_choice():
    """-10 for 2 characters of 6 bytes, -12 for 4 of 4: the sum takes the first, a character the second, a byte the first."""
    question = Question((("", " ☃☃"), ("", " abcd")), ("☃☃", "abcd"), 0)
    assert choices(question, [Likelihood(-10, False), Likelihood(-12, False)]) == {"acc": 0, "acc_norm": 1, "acc_bytes": 0}
    even = Question((("", " ab"), ("", " cd")), ("ab", "cd"), 1)
    assert choices(even, [Likelihood(-1, False)] * 2)["acc"] == 0, "of equal ones the first, as numpy's argmax has it"


def test_accuracies_are_counted_and_chance_is_that_of_the_rows():
    """Three questions with likelihoods by hand, of two, two and four choices: two right."""

    class Known:
        def continuations(self, pairs):
            return [Likelihood(-float(len(continuation)), False) for _, continuation in pairs]

    def question(texts, gold):
        return Question(tuple(("q", text) for text in texts), texts, gold)

    read = Read(["a", "b", "c"], [question(("x", "yy"), 0), question(("x", "yy"), 1), question(("xxx", "yy", "z", "vvvv"), 2)])
    result = answer(SUITES["copa"], read, Known())
    assert result.scores["acc"].value == pytest.approx(2 / 3) and 0 <= result.scores["acc"].low <= result.scores["acc"].high <= 1
    assert result.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert [sample["chosen"]["acc"] for sample in result.samples] == [0, 0, 2]


def test_evaluate_prints_and_writes(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, [READY, {**READY, "query": "The sun, which is far away from us and hot and bright as none, is " * 2}])
    assert cli.main(["evaluate", str(tiny_folder), "--task", "openbookqa", "--data", file]) == 0
    said = capsys.readouterr().out
    assert "openbookqa: 2 questions" in said and "acc_norm:" in said and "chance 0.5000" in said
    assert "2 contexts lost their beginnings" in said
    folder = tmp_path / "evaluation" / "openbookqa"
    scores = json.loads((folder / "scores.json").read_text())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert scores["rows"] == len(samples) == 2 and scores["chance"] == 0.5 and scores["truncated"] == 2
    right = [int(np.argmax(sample["logprobs"])) == sample["gold"] for sample in samples]
    assert scores["scores"]["acc"]["value"] == np.mean(right)
    text = write(tmp_path, " = A = \n Tea is hot . \n = B = \n So is coffee . \n", "w.txt")
    assert cli.main(["evaluate", str(tiny_folder), "--task", "wikitext", "--data", text, "--limit", "1", "--out", "w"]) == 0
    assert "word_perplexity" in capsys.readouterr().out
    (page,) = [json.loads(line) for line in (tmp_path / "w" / "samples.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "w" / "scores.json").read_text())["scores"]
    assert page["words"] == 9, "of the page as given, the empty ones at its ends too: so the harness counts"
    assert page["tokens"] == len(" = A =\nTea is hot. "), "a token is a byte of what the model reads"
    assert found["bits_per_byte"]["value"] == pytest.approx(-page["logprob"] / np.log(2) / page["bytes"])


@pytest.mark.realdata
def test_the_real_files_are_read_whole(data):
    """As many rows as their sources say; 62 articles are what the harness's wikitext counts in the test part."""
    sizes = {
        "copa": ("copa.jsonl", 100, 2),
        "openbookqa": ("openbook_qa.jsonl", 500, 4),
        "winogrande": ("winogrande.jsonl", 1267, 2),
    }
    for name, (file, rows, ways) in sizes.items():
        read = read_questions(SUITES[name], str(data / "mc-openbookqa-copa-winogrande" / file))
        assert len(read.questions) == rows and {len(question.pairs) for question in read.questions} == {ways}
    assert len(read_questions(SUITES["hellaswag"], str(data / "mc-hellaswag-val" / "hellaswag_val_1000.txt")).questions) == 1000
    assert len(read_pages(str(data / "lm-wikitext2-valid-test" / "test.txt"))) == 62
