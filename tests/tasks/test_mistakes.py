"""A mistake in the data is one clear line: what was given, where, what is allowed. Long and odd rows are not mistakes."""

import json
import pathlib

import pytest

from jaxlm import cli, models

GOOD = [f"{word} film number {i}\t{label}" for i in range(30) for word, label in (("good", "pos"), ("bad", "neg"))]
MODEL = [
    "--model.architecture", "encoder", "--model.positions", "32", "--model.layers", "1", "--model.width", "16",
    "--model.heads", "2",
    "--data.length", "32", "--data.batch-size", "8", "--data.tokenizer.kind", "bytes", "--data.tokenizer.special", "pad,cls,sep",
    "--train.steps", "2", "--train.sample-tokens", "0",
]  # fmt: skip


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Train two steps on a file; gives the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text("task: {kind: classification}\ndata: {rows: {header: [text, label]}}\n")

    def run(content, *flags, name="rows.tsv"):
        raw = content if isinstance(content, bytes) else "\n".join(content).encode()
        (tmp_path / name).write_bytes(raw)
        code = cli.main(["train", "task.yaml", "--data.train", name, *MODEL, *flags])
        said = capsys.readouterr()
        assert code == 0 or said.err.count("\n") == 1, said.err
        return code, said.out + said.err

    return run


def test_rows_without_fault_train(train, tmp_path):
    code, said = train(GOOD)
    assert code == 0 and "accuracy" in said
    assert json.loads((tmp_path / "runs/task/task.json").read_text())["labels"] == ["neg", "pos"]


@pytest.mark.parametrize(
    ("content", "flags", "parts"),
    [
        (b"", (), ["rows.tsv", "no rows"]),
        ([line.split("\t")[0] for line in GOOD], (), ["rows.tsv", "1 cell"]),
        (["sentence\tclass", *GOOD], ("--data.rows.header", "[]"), ["text", "sentence", "data.rows"]),
        ([f"film {i}\tpos" for i in range(30)], (), ["one label", "pos"]),
        (GOOD, ("--task.labels", "[pos, negative]"), ["label", "neg", "negative"]),
        ([*GOOD, *["\tpos"] * 9], (), ["text is empty", "rows.tsv"]),
        ("\n".join(GOOD).replace("film", "fi\xe9lm").encode("latin1"), (), ["UTF-8", "rows.tsv:1"]),
    ],
    ids=["empty", "one column", "other names", "one class", "wrong labels", "empty texts", "latin-1"],
)
def test_what_is_wrong_is_told_in_a_line(train, content, flags, parts):
    code, said = train(content, *flags)
    assert code == 1
    for part in parts:
        assert part in said


def test_a_label_that_training_did_not_have_is_told_with_its_place(train, tmp_path):
    (tmp_path / "held.tsv").write_text("good film\tpos\nwhat film\tneutral\n")
    code, said = train(GOOD, "--data.validation", "held.tsv")
    assert code == 1 and "neutral" in said and "held.tsv:2" in said and "neg, pos" in said


def test_a_line_of_a_megabyte_is_cut_and_told(train):
    code, said = train([*GOOD, "good " * 200_000 + "\tpos"])
    assert code == 0 and "longer than data.length 32 tokens" in said


def test_a_few_bad_rows_are_counted_and_shown(train):
    code, said = train([*GOOD * 4, "only one cell"])
    assert code == 0 and "1 left out" in said and "rows.tsv:241" in said


def test_tasks_and_data_must_fit(train, tmp_path, capsys):
    code, said = train(GOOD, "--task.kind", "masked")
    assert code == 1 and "data.train" in said
    assert cli.main(["train", "task.yaml", *MODEL]) == 1
    assert "--data.train" in capsys.readouterr().err
    code, said = train(GOOD, "--task.kind", "classificatoin")
    assert code == 1 and "did you mean 'classification'" in said
    code, said = train(GOOD, "--task.kind", "text_to_text")
    assert code == 1 and "decoder" in said


def test_a_flag_of_predict_or_evaluate_is_honoured_or_refused(train, tmp_path, capsys, monkeypatch):
    three = [*GOOD, *(f"odd film number {i}\tnone" for i in range(30))]
    assert train(three)[0] == 0
    assert cli.main(["predict", "runs/task"]) == 1
    assert "--text" in capsys.readouterr().err
    assert cli.main(["predict", "runs/task", "--text", "a good film"]) == 0
    assert capsys.readouterr().out.split()[0] in ("pos", "neg", "none")
    assert cli.main(["predict", "runs/task", "--text", "a", "--file", "b"]) == 1
    assert "not both" in capsys.readouterr().err
    assert cli.main(["predict", "runs/nowhere", "--text", "a"]) == 1
    assert "runs/task" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("good\nbad\n")
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}]))
    splits = {"train": [{"text": "good", "label": "pos"}] * 3, "test": [{"text": "bad", "label": "neg"}] * 2}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    refused = {
        "predict": [
            ("--text good --header text", "data.rows.header"), ("--text good --split test", "split"),
            ("--text good --question x", "question"),
            ("--text good --choices a|b", "choices"), ("--text good --length 33", "32 positions"),
            ("--file rows.json --data.rows.max-bad 0", "data.rows.max_bad"),
            ("--file rows.json --data.rows.group text", "data.rows.group"),
            ("--file rows.json --data.rows.subset x", "data.rows.subset"), ("--file rows.json --split test", "has no splits"),
            ("--file rows.json --data.rows.separator ,", "data.rows.separator"),
            ("--file rows.json --columns answers=text", "columns.answers"),
            ("--file texts.txt --columns text=x", "columns.text"), ("--file texts.txt --split test", "split"),
        ],
        "evaluate": [
            ("--tokenize zh", "tokenize zh"), ("--positive pos", "positive pos"), ("--split test", "split"), ("--limit 3", "limit"),
            ("--data rows.json --data.rows.group text", "data.rows.group"),
            ("--data rows.json --data.rows.subset x", "data.rows.subset"),
            ("--data.rows.subset x", "data.rows.subset"), ("--data rows.json --split dev", "has no splits"),
            ("--task hellaswag --data rows.json --split dev", "split is not for task"),
            ("--task hellaswag --data rows.json --split-special-tokens true", "split_special_tokens is not for task"),
        ],
    }  # fmt: skip
    trained = models.load_model("runs/task")  # once for all
    monkeypatch.setattr(models, "load_model", lambda argument, options: trained)
    for verb, cases in refused.items():
        for flags, part in cases:
            capsys.readouterr()
            assert cli.main([verb, "runs/task", *flags.split()]) == 1, flags
            told = capsys.readouterr().err
            assert part in told and told.count("\n") == 1, told
    capsys.readouterr()
    for flags, lines in (("texts.txt --data.rows.limit 1", 1), ("splits.json", 2), ("splits.json --split train", 3)):
        assert cli.main(["predict", "runs/task", "--file", *flags.split(), "--out", "out.jsonl"]) == 0
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == lines
    assert "split test" in capsys.readouterr().out
    assert cli.main(["evaluate", "runs/task", "--data", "splits.json"]) == 0 and "2 rows; split test" in capsys.readouterr().out


@pytest.mark.slow
def test_outputs_that_are_no_numbers_stop_no_training_and_are_no_predictions(train, tmp_path):
    """Parameters of 1e38 are finite, and what the model makes of them is not."""
    code, said = train(GOOD, "--optim.learning-rate", "1e38", "--optim.warmup", "0", "--train.eval-every", "1")
    rows = list(map(json.loads, (tmp_path / "runs/task/metrics.jsonl").read_text().splitlines()))
    assert [row["accuracy"] for row in rows if row["kind"] == "eval"] == [None, None], said
    assert "held-out texts are NaN: they are not scored" in said and code == 1 and "the model's outputs for" in said


def test_a_metric_that_the_task_does_not_have_is_told(train):
    code, said = train(GOOD, "--train.metric", "acuracy")
    assert code == 1 and "did you mean 'accuracy'" in said
    # One of other tasks, and F1 of one class where there are three: told before anything is computed or written.
    for rows, metric, near in ((GOOD, "pearson", ""), ([*GOOD, *(f"odd {i}\tnone" for i in range(30))], "f1", "did you mean 'f1_")):
        code, said = train(rows, "--train.metric", metric)
        assert code == 1 and f"unknown train.metric of task classification '{metric}': {near}" in said
        assert "f1_macro, " in said and "parameters" not in said and not pathlib.Path("runs").exists()
