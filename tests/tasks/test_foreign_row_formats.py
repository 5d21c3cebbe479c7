"""What tasks make of rows as other people write them: messages, several references, answers with loose ends, swapped columns."""

import json

import numpy as np
import pytest

from jaxlm import cli, metrics
from jaxlm.data import Table, TokenizerConfig, train_tokenizer
from jaxlm.tasks import TASKS, TaskConfig, usable
from jaxlm.tasks.reading import _place, _text_of

TOKENIZER = train_tokenizer(TokenizerConfig(kind="bytes", special=("pad", "cls", "sep")), [])


def task_of(kind, length=64, architecture="decoder", tokenizer=TOKENIZER, **options):
    return TASKS[kind](TaskConfig(kind=kind, **options), tokenizer, length, architecture=architecture)


# --- messages ---------------------------------------------------------------------------------

# Gemma's rule: turns alternate, beginning with the user's.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else '\n') }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)
PROMPT = [{"role": "user", "content": "Hi"}]
GOOD, BAD = [{"role": "assistant", "content": "Yo"}], [{"role": "assistant", "content": "No"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"prompt": PROMPT, "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"prompt": "Hi", "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT, "chosen": "Yo", "rejected": "No"},
    ],
    ids=["explicit", "implicit", "repeated", "text prompt", "text answers"],
)
def test_preference_rows_of_messages(row):
    """TRL's conversational forms: the answer is what the template writes beyond the prompt, up to the end of its turn."""
    task = task_of("preference", chat_template=ALTERNATING)
    (item,) = task.examples([row]).items
    eos = TOKENIZER.eos_id
    for name, answer in (("chosen", b"Yo"), ("rejected", b"No")):
        whole = [*b"user: Hi\nassistant: ", *answer, eos]
        example = item[name]
        assert example["tokens"].tolist() == whole[:-1] and example["targets"].tolist() == whole[1:]
        assert example["targets"][example["weights"] > 0].tolist() == [*answer, eos]
    reward = task_of("reward", chat_template=ALTERNATING).examples([row]).items[0]
    assert reward["chosen"]["tokens"].tolist() == [*b"user: Hi\nassistant: Yo", eos]


@pytest.mark.parity
def test_preference_rows_have_the_ids_of_transformers(tmp_path):
    import tokenizers
    import transformers

    from jaxlm.data import load_tokenizer

    rust = tokenizers.Tokenizer.from_str(TOKENIZER.definition())
    rust.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|im_end|>")
    theirs.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    theirs.save_pretrained(tmp_path)
    (item,) = (
        task_of("preference", 128, tokenizer=load_tokenizer(tmp_path))
        .examples([{"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}])
        .items
    )
    before = theirs.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
    whole = theirs.apply_chat_template(PROMPT + GOOD, return_dict=False)
    ids = [*item["chosen"]["tokens"].tolist(), int(item["chosen"]["targets"][-1])]
    assert ids == whole[: len(ids)] and theirs.decode(whole[len(ids) :]) == "\n"  # what follows the end of the turn is not learned
    assert int((item["chosen"]["weights"] > 0).argmax()) + 1 == len(before)


def test_a_conversation_that_the_template_cannot_write_is_left_out_and_named():
    talk = [*PROMPT, *GOOD]
    rows = [{"messages": talk}, {"messages": [*PROMPT, *talk]}, {"messages": talk}]
    task = task_of("chat", chat_template=ALTERNATING)
    table = usable(task, Table("t.jsonl", rows, ["t.jsonl:1", "t.jsonl:2", "t.jsonl:3"], []))
    assert table.rows == [{"messages": talk}] * 2 and table.where == ["t.jsonl:1", "t.jsonl:3"]
    assert "1 left out: t.jsonl:2: " in table.summary() and "Roles must alternate" in table.summary()
    assert len(task.examples(table.rows, table.where)) == 1  # both in one packed row
    with pytest.raises(ValueError, match=r"none of 1 rows can be used: x:1: .*Roles must alternate"):
        usable(task, Table("x", rows[1:2], ["x:1"], []))


# --- references and answers -------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["translation", "summarisation"])
def test_several_references_are_scored_and_one_is_learned(scores):
    rows = [{"source": "a", "target": ["the cat sat", "a cat was sitting"]}, {"source": "b", "target": "it slept"}]
    predictions = [{"text": "a cat was sitting"}, {"text": "it slept well"}]
    task = task_of("text_to_text", scores=scores)
    expected = getattr(metrics, scores)([p["text"] for p in predictions], [["the cat sat", "a cat was sitting"], ["it slept"]])
    assert task.scores(rows, predictions) == pytest.approx(expected.values)
    assert "nrefs:var" in task.signatures(rows)["bleu" if scores == "translation" else "rouge1"]
    first = task.examples(rows[:1]).items[0]
    assert bytes(first["targets"][first["weights"] > 0][:-1].tolist()) == b"the cat sat"


CONTEXT = "the  old river\u00ad ran"
SPANS = np.array([[0, 0], [0, 3], [5, 8], [9, 14], [16, 19], [0, 0]])  # the soft hyphen belongs to no token
INSIDE = np.array([False, True, True, True, True, False])


LOOSE = [
    ("old river", (2, 3)), ("  old river", (2, 3)), ("old river\u00ad", (2, 3)), ("river\u00ad ", (3, 3)), (" ran", (4, 4)),
    ("\u00ad", (0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "tokens"), LOOSE)
def test_loose_ends_of_an_answer_are_left_out(answer, tokens):
    answers = {"text": [answer], "answer_start": [CONTEXT.index(answer)]}
    assert _place(answers, SPANS, INSIDE) == tokens


def test_an_answer_is_read_back_with_the_marks_on_its_last_letter():
    assert _text_of("a cafe\u0301 ran", 2, 6) == "cafe\u0301" and _text_of("a cafe", 2, 6) == "cafe"


def test_an_answer_that_is_cut_by_a_window_is_in_none_and_counted():
    answers = {"text": ["old river"], "answer_start": [5]}
    assert _place(answers, SPANS[:3], INSIDE[:3], SPANS[1:5]) == (0, 0)  # its second word is in the next window
    task = task_of("extractive_qa", 16, "encoder", stride=2)
    rows = [
        {"question": "q", "context": "x" * 30, "answers": {"text": [text], "answer_start": [5]}} for text in ("x" * 20, "x")
    ] + [{"question": "q", "context": "x" * 30, "answers": {"text": [], "answer_start": []}}]
    task.examples(rows, ["d:1", "d:2", "d:3"])
    assert task.remarks == ["1 of 3 answers are in no window whole, so their questions count as without answer in training: d:1"]


# --- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["1", "1.0", "0"], ["true", "True", "x"], [1, True, 0]])
def test_labels_that_look_like_one_class_are_told(labels):
    with pytest.raises(ValueError, match="look like one class: write it in one way"):
        task_of("classification").learn([{"text": "a", "label": label} for label in labels])
    named = tuple(dict.fromkeys(map(str, labels)))
    task_of("classification", labels=named).learn([{"text": "a", "label": label} for label in labels])


def test_many_labels_of_few_texts_are_no_swapped_columns():
    """Of several labels a text, most of which are rare, as in tagging by keywords."""
    rows = [{"text": f"text {i}", "labels": [f"{i} {j}" for j in range(6)] + ["a", "b", "c", "d"]} for i in range(10)]
    task = task_of("multilabel")
    task.learn(rows)
    assert len(task.labels) == 64


def test_a_label_of_its_own_for_nearly_every_row_is_told():
    rows = [{"text": str(i % 2), "label": f"a whole sentence {i}"} for i in range(20)]
    with pytest.raises(ValueError, match=r"20 labels for 20 training rows.*are text and label swapped"):
        task_of("classification").learn(rows)
    with pytest.raises(ValueError, match="are text and label swapped"):
        task_of("classification").learn([{**row, "label": f"sentence {i // 1.6:.0f}"} for i, row in enumerate(rows)])
    task_of("classification").learn(rows[:4])  # few rows may well have a label each
    task_of("classification").learn([{"text": f"text {i}", "label": str(i % 10)} for i in range(20)])


# --- the commands -----------------------------------------------------------------------------

MODEL = [
    "--model.width", "16", "--model.layers", "1", "--model.heads", "2", "--model.architecture", "encoder", "--data.length", "32",
    "--data.tokenizer.kind", "bytes", "--data.tokenizer.special", "[pad, cls, sep]", "--train.steps", "2", "--data.batch-size", "8",
]  # fmt: skip
FILMS = [(f"{word} film {i}", label) for i in range(8) for word, label in (("good", "pos"), ("bad", "neg"))]


def test_predict_and_evaluate_read_the_columns_of_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text("task: {kind: classification}\n")
    header = "utterance;intent\n"
    (tmp_path / "train.csv").write_text(header + "".join(f"{text};{label}\n" for text, label in FILMS))
    train = ["train", "task.yaml", "--data.train", "train.csv", *MODEL]
    assert cli.main(train) == 1
    told = capsys.readouterr().err
    assert "(did you mean 'utterance'?)" in told and "(did you mean 'intent'?)" in told
    assert not (tmp_path / "runs").exists()  # a refused run leaves nothing behind
    columns = ["--columns", "text=utterance,label=intent"]
    code = cli.main([*train, *columns, "--data.rows.limit", "16", "--data.rows.group", "utterance"])
    said, told = capsys.readouterr()
    assert code == 0, told
    assert "columns: text from utterance, label from intent" in said.replace("\n", " ") and "separated by semicolon" in said

    def predictions(name, content, *flags):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert cli.main(["predict", "runs/task", "--file", name, "--out", "out.jsonl", *flags]) == 0, capsys.readouterr().err
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]

    found = predictions("new.csv", "id;utterance\n1;good\u2028film\n2;\n3\n")
    assert [row.get("id") for row in found] == ["1", "2", None] and found[0]["utterance"] == "good\u2028film"
    assert [row["prediction"] is None for row in found] == [False, False, True]
    assert found[2]["error"] == "new.csv:4: has 1 cell, not 2"
    assert len(predictions("new.jsonl", '\ufeff{"text": "good \\ud83d", "n": 1}\n')) == 1  # by the role's name
    found = predictions("new.txt", "good\r\n\nbad\x0cfilm\n".encode("utf-16"))
    assert [row["text"] for row in found] == ["good", "", "bad\x0cfilm"]
    assert len(predictions("many.txt", "good film\n" * 20)) == 20  # the limit was of the rows to train on
    found = predictions("q.tsv", "good film\t9\nbad\t8\n", "--header", "q,n", "--columns", "text=q")
    assert [row["q"] for row in found] == ["good film", "bad"]
    (tmp_path / "bad.csv").write_text("a,b\nx,y\n")
    assert cli.main(["predict", "runs/task", "--file", "bad.csv"]) == 1
    assert "--data.rows.columns.text" in capsys.readouterr().err
    assert cli.main(["predict", "runs/task", "--file", "bad.csv", "--data.rows.columns.text", "a"]) == 0
    assert cli.main(["predict", "runs/task", "--file", "bad.csv", "--columns", "txt=a"]) == 1
    assert "data.rows.columns.text" in capsys.readouterr().err

    (tmp_path / "held.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in FILMS[:6]))
    evaluate = ["evaluate", "runs/task", "--data", "held.tsv", "--out", "scores", "--header", "text,intent"]
    assert cli.main(evaluate) == 0
    assert len((tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()) == 6
    (tmp_path / "other.jsonl").write_text('{"prediction": 1}\n')
    assert cli.main([*evaluate, "--against", "other.jsonl", "--out", "scores-2"]) == 1
    assert "holds 1 predictions, for 6 rows" in capsys.readouterr().err and not (tmp_path / "scores-2").exists()
    (tmp_path / "other.jsonl").write_text(
        '{"prediction": {"label": "good", "probability": 1.0, "probabilities": {"good": 1}}}\n' * 6
    )
    assert cli.main([*evaluate, "--against", "other.jsonl", "--out", "scores-2"]) == 1
    assert "predictions of another form" in capsys.readouterr().err and not (tmp_path / "scores-2").exists()
    turned = (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()[::-1]
    (tmp_path / "other.jsonl").write_text("\n".join(turned))
    assert cli.main([*evaluate, "--against", "other.jsonl", "--out", "scores-2"]) == 1
    assert "other.jsonl:1 has another text than held.tsv:1: predictions are compared row by row" in capsys.readouterr().err
