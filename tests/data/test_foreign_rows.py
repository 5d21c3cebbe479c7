"""Rows as other people write them: headers, separators, encodings, lists in cells, nested JSON, conversations of any form."""

import csv
import io
import json

import numpy as np
import pytest

from jaxlm.data.rows import ColumnsConfig, RowsConfig, Table, read_inputs, read_rows
from jaxlm.data.splits import HELD_OUT, TRAIN, UNSEEN, named_split


def read(path, required=("text", "label"), optional=(), *, columns=None, splits=TRAIN, **rest) -> Table:
    return read_rows(str(path), RowsConfig(columns=ColumnsConfig(**(columns or {})), **rest), required, optional, splits=splits)


def refused(path, required=("text", "label"), optional=(), **rest) -> str:
    with pytest.raises(ValueError) as error:
        read(path, required, optional, **rest)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- headers ----------------------------------------------------------------------------------

BODY = [("a fine film about nothing", "1"), ("no", "0"), ("a dull one", "0"), ("great", "1"), ("what a night", "1")]


def table(file, header, rows=BODY, separator="\t"):
    file.write_text("".join(separator.join(cells) + "\n" for cells in ([header, *rows] if header else rows)))
    return file


@pytest.mark.parametrize("names", [("sentence", "label"), ("Text", "Label"), ("tweet", "airline_mood"), ("Satz", "Klasse")])
def test_a_first_line_that_is_a_header_is_never_a_row(tmp_path, names):
    """The config for SST-2 named the columns of a headerless file; GLUE's own file has a line of names: a third class."""
    rows = read(table(tmp_path / "a.tsv", names), header=("text", "label")).rows
    assert rows == [{"text": text, "label": label} for text, label in BODY]


def test_a_first_line_that_is_a_row_stays_one(tmp_path):
    for first in [("great", "1"), ("label", "0"), ("sentence", "1"), ("a film", "good"), ("one more", "0")]:
        rows = [first, *BODY, ("again", first[1])]
        found = read(table(tmp_path / "a.tsv", None, rows), header=("text", "label")).rows
        assert [(row["text"], row["label"]) for row in found] == rows


def test_columns_that_are_configured_win_over_names_by_place(tmp_path):
    file = table(tmp_path / "a.tsv", ("label", "sentence"), [(label, text) for text, label in BODY])
    found = read(file, header=("text", "label"), columns={"text": "sentence"})
    assert found.rows[0] == {"text": "a fine film about nothing", "label": "1"}
    assert "columns: text from sentence" in found.summary()
    assert "did you mean 'sentence'?" in refused(file, header=("text", "label"))  # not label as text by its place
    three = table(tmp_path / "b.tsv", ("idx", "sentence", "label"), [(str(i), *cells) for i, cells in enumerate(BODY)])
    assert "did you mean 'sentence'?" in refused(three, header=("text", "label"))


def test_which_columns_were_read_is_said(tmp_path):
    told = read(table(tmp_path / "a.tsv", ("sentence", "label")), header=("text", "label")).summary()
    assert told == "a.tsv: 5 rows; line 1 of a.tsv names the columns sentence, label, read as text, label"


@pytest.mark.parametrize(
    ("names", "columns", "told"),
    [
        (("text", "category"), {"label": "intent"}, "no column 'intent' for the label (did you mean 'category'?)"),
        (("utterance", "intent"), {}, "(did you mean 'utterance'?) and no column 'label' for the label (did you mean 'intent'?)"),
        (("a", "b"), {}, "no column 'text' for the text and no column 'label' for the label; its columns: a, b;"),
    ],
)
def test_a_missing_column_is_suggested_by_sense(tmp_path, names, columns, told):
    """ "unknown column 'intent': did you mean 'text'?" was nearest by spelling."""
    message = refused(table(tmp_path / "a.tsv", names), columns=columns)
    assert told in message and "did you mean 'text'" not in message


# --- separators and encodings -----------------------------------------------------------------


@pytest.mark.parametrize(("separator", "spelt"), [(";", "semicolon"), ("\t", "TAB"), ("|", "|")])
def test_a_separator_that_is_guessed_is_named(tmp_path, separator, spelt):
    file = table(tmp_path / "a.csv", ("text", "label"), separator=separator)
    found = read(file)
    assert found.rows[0]["label"] == "1"
    assert f"cells of a.csv are separated by {spelt}, a guess from its first line" in found.summary()
    file.write_text(file.read_text() + "one cell\n" * 5)
    assert f"are separated by {spelt}, a guess" in refused(file)
    (tmp_path / "a.txt").write_text("text,label\nx,1\n")
    assert "cells were separated by TAB, a guess: --data.rows.separator" in refused(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt", separator=",").rows == [{"text": "x", "label": "1"}]


def test_encodings(tmp_path):
    text = "text\tlabel\ncaf\u00e9 \u4f60\t1\n"
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "a.tsv").write_bytes(text.encode(encoding))
        assert read(tmp_path / "a.tsv").rows == [{"text": "caf\u00e9 \u4f60", "label": "1"}]
    (tmp_path / "a.tsv").write_bytes(text.encode("gb18030"))
    assert "--data.rows.encoding names another" in refused(tmp_path / "a.tsv")
    assert read(tmp_path / "a.tsv", encoding="gb18030").rows == [{"text": "caf\u00e9 \u4f60", "label": "1"}]


# --- lists and labels in cells ----------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        "['x', \"y's\"]", '["x", "y\'s"]', "('x', \"y's\")", str(np.array(["x", "y's"])), repr([np.str_("x"), np.str_("y's")]),
    ],
)  # fmt: skip
def test_a_list_as_pandas_and_numpy_print_it_is_a_list(tmp_path, cell):
    out = io.StringIO()
    csv.writer(out).writerows([["text", "labels"], ["a", cell]])
    (tmp_path / "a.csv").write_text(out.getvalue())
    assert read(tmp_path / "a.csv", ["text", "labels"]).rows == [{"text": "a", "labels": ["x", "y's"]}]
    assert read(tmp_path / "a.csv", ["tokens"], columns={"tokens": "labels"}).rows == [{"tokens": ["x", "y's"]}]


@pytest.mark.parametrize("cell", ["['x', 'y'", "['x', y]", "[x, y]", "{x,y}", "['x' ... 'y']"])
def test_what_looks_like_a_list_is_never_cut_at_its_commas(tmp_path, cell):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "labels": cell}))
    if cell.endswith("'"):  # not bracketed: a text like any other
        assert read(tmp_path / "a.jsonl", ["text", "labels"]).rows[0]["labels"] == ["['x'", "'y'"]
    else:
        assert "labels holds" in refused(tmp_path / "a.jsonl", ["text", "labels"])


def test_answers_as_pandas_prints_them(tmp_path):
    answers = {"text": np.array(["Ada"], object), "answer_start": np.array([0])}
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "?", "context": "Ada", "answers": str(answers)}))
    found = read(tmp_path / "a.jsonl", ["question", "context", "answers"]).rows[0]["answers"]
    assert found == {"text": ["Ada"], "answer_start": [0]}
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "?", "context": "Ada", "answers": "{'text': [Ada]}"}))
    assert "answers holds" in refused(tmp_path / "a.jsonl", ["question", "context", "answers"])


def test_several_references_stay_several(tmp_path):
    rows = [["one", "two"], ["one"], "one", "['one', 'two']", '["one", "two"]', ["one", " "]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"source": "x", "target": target}) + "\n" for target in rows))
    found = [row["target"] for row in read(tmp_path / "a.jsonl", ["source", "target"]).rows]
    assert found == [["one", "two"], "one", "one", ["one", "two"], '["one", "two"]', "one"]  # JSON may be what is written


def test_labels_lose_white_space_and_whole_numbers_their_point(tmp_path):
    labels = [" good ", "good\u00a0", 1, 1.0, 1.5]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in labels))
    assert [row["label"] for row in read(tmp_path / "a.jsonl").rows] == ["good", "good", 1, 1, 1.5]


def test_conll_cells_end_at_spaces_and_tabs_alone(tmp_path):
    (tmp_path / "a.conll").write_text("10\u00a0000 O\n\u3000\tO\nNew\u2028York B-LOC\n\x85 O\n")
    (row,) = read(tmp_path / "a.conll", ["tokens", "tags"]).rows
    assert row == {"tokens": ["10\u00a0000", "\u3000", "New\u2028York", "\x85"], "tags": ["O", "O", "B-LOC", "O"]}


# --- JSON in other shapes ---------------------------------------------------------------------

NESTED = {"train": [["card lost", "lost"], ["pay me", "pay"]], "val": [["lost it", "lost"]], "oos": {"a": [["x", "y"]]}}


def test_nested_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(NESTED))
    header = ("text", "label")
    assert [row["label"] for row in read(file, header=header).rows] == ["lost", "pay"]
    assert [row["text"] for row in read(file, header=header, splits=HELD_OUT).rows] == ["lost it"]
    assert read(file, header=header, under="oos.a").rows == [{"text": "x", "label": "y"}]
    assert "'oos.b'): 'b': " in refused(file, header=header, under="oos.b") or "'b'" in refused(file, header=header, under="oos.b")
    assert "is not an object but list: --data.rows.header" in refused(file)
    file.write_text(json.dumps({"lost": ["card lost"], "pay": ["pay me", "where"]}))
    assert "--data.rows.under lost" in refused(file) and "docs/tasks.md" in refused(file)
    for columns in ({"text": ["a", "b"], "label": [0, 1]}, {"text": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}}):
        file.write_text(json.dumps(columns))
        assert read(file).rows == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    (tmp_path / "a.jsonl").write_text('["a", 1]\n["b", 0]\n')
    assert read(tmp_path / "a.jsonl", header=header).rows == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]


def test_the_key_of_the_training_rows_never_gives_held_out_ones(tmp_path):
    """`data.rows.under` names a key of the training file: of others its like for their split is read, or they are read whole."""
    file, flat, under = tmp_path / "a.json", tmp_path / "flat.json", "data.train"
    rows = {name: [{"text": name, "label": "a"}] for name in ("train", "dev", "test", "one")}
    flat.write_text(json.dumps(rows["one"]))
    file.write_text(json.dumps({"data": rows}))
    for splits, texts in ((TRAIN, ["train"]), (HELD_OUT, ["dev"]), (named_split("test"), ["test"]), (UNSEEN, ["dev"])):
        assert [row["text"] for row in read(file, under=under, splits=splits).rows] == texts
    assert read(file, under=under, splits=HELD_OUT).notes == ["split dev"]
    assert [row["text"] for row in read(file, under=under, splits=UNSEEN._replace(exact_key=True)).rows] == ["train"]
    assert read(flat, under=under, splits=HELD_OUT).rows == rows["one"]
    assert read(flat, under="rows", splits=UNSEEN).rows == rows["one"]
    assert "key of" in refused(flat, under=under) and "'data'" in refused(flat, under=under)
    file.write_text(json.dumps({"rows": rows["one"], "train": rows["train"]}))
    assert read(file, under="rows", splits=HELD_OUT).notes == ["rows of a.json under rows"]
    told = refused(file, under="train", splits=HELD_OUT)
    assert "(data.rows.under train, read here under validation or val or valid or dev or test" in told and "rows, train" in told
    file.write_text(json.dumps({"train": rows["train"]}))
    whole = read(file, splits=UNSEEN)
    assert whole.rows == rows["train"] and "the model may have been trained on these rows" in whole.notes[0]
    inputs, notes = read_inputs(str(file), RowsConfig(), ["text"])
    assert len(inputs) == 1 and notes == whole.notes
    for data, name in ((file, "test"), (flat, "test"), (flat, "train")):
        assert name in refused(data, splits=named_split(name))


def test_half_an_emoji_in_a_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good \\ud83d", "label": "x"}\n{"text": "\\ud83e\\udd8a", "label": "y"}\n')
    assert [row["text"] for row in read(tmp_path / "a.jsonl").rows] == ["good ?", "\U0001f98a"]


# --- conversations ----------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": str(CHAT)},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"dialogue": [{"usr": "hi", "sys": "ho"}]},
        {"messages": [{"sys": "ho", "usr": "hi"}]},
        {"turns": [{"speaker": "USER", "utterance": "hi"}, {"speaker": "SYSTEM", "utterance": "ho"}]},
        {"messages": [{"user": "hi"}, {"bot": "ho"}]},
        {"messages": [["hi", "ho"]]},
        {"dialog": ["hi", "ho"]},
        {"dialog": "['hi' 'ho']"},
        {"messages": [{"text": "hi"}, {"text": "ho"}]},
        {"messages": {"messages": CHAT}},
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]},
        {"instruction": "hi", "input": "", "output": "ho"},
        {"prompt": "hi", "completion": "ho"},
    ],
    ids=str,
)
def test_conversations_in_foreign_forms(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "a.jsonl", ["messages"]).rows == [{"messages": CHAT}]


def test_speakers_by_name_are_said_in_the_config(tmp_path):
    turns = [{"speaker": "Ann", "utterance": "hi"}, {"speaker": "Bob", "utterance": "ho"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    assert "the speaker 'Ann': --data.rows.speakers" in refused(tmp_path / "a.jsonl", ["messages"])
    assert read(tmp_path / "a.jsonl", ["messages"], speakers=("Ann=user,Bob=assistant",)).rows == [{"messages": CHAT}]
    with pytest.raises(ValueError, match="NAME=ROLE"):
        RowsConfig(speakers=("Ann",))


def test_an_answer_that_spells_a_list_stays_a_text(tmp_path):
    row = {"chosen": "[1, 2]", "rejected": '["a"]', "prompt": str(CHAT[:1])}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert read(tmp_path / "a.jsonl", ["chosen", "rejected", "prompt"]).rows == [{**row, "prompt": CHAT[:1]}]


# --- rows to predict for ----------------------------------------------------------------------


def test_one_row_in_is_one_row_out_with_all_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,a\n2,\n3,"c\u2028d"\n4\n')
    found, _ = read_inputs(str(tmp_path / "a.csv"), RowsConfig(), ("text",), ("pair",))
    assert [item.row for item in found] == [{"text": "a"}, {"text": ""}, {"text": "c\u2028d"}, None]
    assert [item.record for item in found] == [
        {"id": "1", "text": "a"}, {"id": "2", "text": ""}, {"id": "3", "text": "c\u2028d"}, {},
    ]  # fmt: skip
    assert found[3].place == "a.csv:5" and found[3].why == "has 1 cell, not 2"


def test_rows_to_predict_for_need_no_label(tmp_path):
    config = RowsConfig(header=("text", "label"), columns=ColumnsConfig(text="text"))
    (tmp_path / "a.tsv").write_text("only a text\nand one more\n\nlast\n\n")
    found, _ = read_inputs(str(tmp_path / "a.tsv"), config, ("text",))
    assert [item.row["text"] for item in found] == ["only a text", "and one more", "", "last"]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "b", "more": 1}\n{"text": null}\n')
    config = RowsConfig(columns=ColumnsConfig(text="sentence"))  # the run's column is not there: the role's name is
    found, _ = read_inputs(str(tmp_path / "b.jsonl"), config, ("text",), replaceable=("text",))
    assert [item.row for item in found] == [{"text": "a"}, {"text": "b"}, None] and found[1].record == {"text": "b", "more": 1}
    with pytest.raises(ValueError, match="no column 'sentence' for the text"):
        read_inputs(str(tmp_path / "b.jsonl"), config, ("text",))


# --- roles that are not there -----------------------------------------------------------------


def json_lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_conversation_that_is_not_there_is_none(tmp_path):
    """As an empty text a missing prompt kept what both answers begin with from being the prompt."""
    both = {"chosen": "Hi. Yes", "rejected": "Hi. No"}
    file = json_lines(tmp_path / "a.jsonl", both, {**both, "prompt": ""}, {**both, "prompt": None}, {**both, "chosen": None})
    found = read(file, ["chosen", "rejected"], ["prompt"], max_bad=1)
    assert found.rows == [both] * 3 and [why for _, why in found.bad] == ["chosen is missing"]
    file = json_lines(tmp_path / "b.jsonl", {"text": "a", "pair": "b", "rejected": None})
    assert read(file, ["text", "pair"], ["rejected"]).rows == [{"text": "a", "pair": "b"}]
    rows = json_lines(tmp_path / "c.jsonl", {"messages": None}, {"messages": CHAT})
    assert read(rows, ["messages"]).bad == [("c.jsonl:1", "messages is missing")]


def test_an_exchange_of_messages_and_one_without_an_answer(tmp_path):
    """TRL's prompt and completion as messages; a file of instructions to predict for."""
    file = json_lines(tmp_path / "a.jsonl", {"prompt": CHAT[:1], "completion": CHAT[1:2]})
    assert read(file, ["messages"]).rows == [{"messages": CHAT[:2]}]
    file = json_lines(tmp_path / "b.jsonl", {"instruction": "Add.", "input": "1 and 2"}, {"instruction": "Sing."})
    inputs, notes = read_inputs(str(file), RowsConfig(), ["messages"])
    assert notes == ["columns: messages from instruction and input (user)"]
    assert [item.row["messages"] for item in inputs] == [
        [{"role": "user", "content": "Add.\n\n1 and 2"}],
        [{"role": "user", "content": "Sing."}],
    ]
    assert "no column 'messages'" in refused(file, ["messages"])


def test_each_file_has_its_own_spelling_of_a_column(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,x\n")
    (tmp_path / "b.csv").write_text("Text,Label\nb,y\n")
    assert read(tmp_path).rows == [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]


def test_arrays_of_objects_and_lists_with_both_quotes(tmp_path):
    """pandas writes a column of messages from parquet as NumPy prints it, without commas; Python quotes "it's" in its own way."""
    cell = str(np.array(CHAT[:2], dtype=object))
    assert "}," not in cell
    file = json_lines(tmp_path / "a.jsonl", {"messages": cell})
    assert read(file, ["messages"]).rows == [{"messages": CHAT[:2]}]
    file = json_lines(tmp_path / "b.jsonl", {"source": "a", "target": str(["it's", "is"])}, {"source": "a", "target": '["JSON"]'})
    assert [row["target"] for row in read(file, ["source", "target"]).rows] == [["it's", "is"], '["JSON"]']


def test_a_blank_line_of_one_column_is_a_row(tmp_path):
    """One row in, one prediction out: in .csv as in .tsv."""
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text("text\na\n\n\nb\n\n")
        inputs, _ = read_inputs(str(tmp_path / name), RowsConfig(), ["text"])
        assert [(item.row["text"], item.place) for item in inputs] == [
            ("a", f"{name}:2"), ("", f"{name}:3"), ("", f"{name}:4"), ("b", f"{name}:5"),
        ]  # fmt: skip


def test_numbers_in_lists_of_labels_are_spelt_as_single_ones(tmp_path):
    file = json_lines(tmp_path / "a.jsonl", {"text": "a", "labels": [1.0, 2]}, {"text": "b", "labels": [1, 2.5]})
    assert [row["labels"] for row in read(file, ["text", "labels"]).rows] == [["1", "2"], ["1", "2.5"]]
