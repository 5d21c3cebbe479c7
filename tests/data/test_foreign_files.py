"""Files as other programs write them: R, spreadsheets, pandas, datasets, annotation tools."""

import json

import pytest

from jaxlm.data.rows import ColumnsConfig, RowsConfig, read_inputs, read_rows
from jaxlm.text_files import read_lines

BODY = [("a fine film", "good"), ("no, dull", "bad"), ("what a night", "good")]
ROWS = [{"text": text, "label": label} for text, label in BODY]


def read(path, required=("text", "label"), optional=(), *, columns=None, **rest):
    return read_rows(str(path), RowsConfig(columns=ColumnsConfig(**(columns or {})), **rest), required, optional)


def refused(path, required=("text", "label"), **rest):
    with pytest.raises(ValueError) as error:
        read(path, required, **rest)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_tab_separated_table_with_all_names_in_quotes_is_quoted(tmp_path):
    """R's write.table; the names were `"text"` and `"label"`, which no role has."""
    cells = [("text", "label"), *BODY, ('a\ttab and a "', "bad")]
    lines = ("\t".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in cells)
    (tmp_path / "a.tsv").write_text("".join(lines))
    table = read(tmp_path / "a.tsv")
    assert [(row["text"], row["label"]) for row in table.rows] == cells[1:] and "read as quoted" in table.summary()
    (tmp_path / "b.tsv").write_text('text\tlabel\n"he said ""no"" to me"\tbad\n"one" and "two"\tgood\n')
    table = read(tmp_path / "b.tsv")
    assert (
        table.rows[0]["text"] == '"he said ""no"" to me"'
        and "b.tsv:2 holds" in table.summary()
        and "name it .csv" in table.summary()
    )


def test_spaces_behind_the_commas_of_a_csv_are_no_part_of_its_cells(tmp_path):
    """The class of `text, "good"` was `"good"`, with its quotes."""
    (tmp_path / "a.csv").write_text('text, label\nfine, "good"\n"no, dull", "bad"\nwhat,  good\n')
    assert [tuple(row.values()) for row in read(tmp_path / "a.csv").rows] == [
        ("fine", "good"),
        ("no, dull", "bad"),
        ("what", "good"),
    ]
    (tmp_path / "b.csv").write_text("id,text,label\n1, kept ,good\n")
    assert read(tmp_path / "b.csv").rows == [{"text": " kept ", "label": "good"}]


def test_columns_of_one_name_matter_only_where_they_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,note,note\nfine,good,x,y\n")
    assert read(tmp_path / "a.csv").rows == [{"text": "fine", "label": "good"}]
    (item,), _ = read_inputs(str(tmp_path / "a.csv"), RowsConfig(), ["text"])
    assert item.record == {"text": "fine", "label": "good", "note": "x", "note.1": "y"}
    assert "has two columns 'note'" in refused(tmp_path / "a.csv", columns={"label": "note"})


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table"])
def test_json_in_every_form_of_pandas(tmp_path, orient):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(ROWS).to_json(tmp_path / "a.json", orient=orient)
    assert read(tmp_path / "a.json").rows == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_by_any_line_breaks(tmp_path, name):
    """A .jsonl that was one array, or whose objects took several lines, was refused line by line."""
    lines = ",\n".join(map(json.dumps, ROWS))
    whole = [json.dumps(ROWS), json.dumps(ROWS, indent=1), f"[\n{lines}\n]\n", "\n".join(json.dumps(row, indent=2) for row in ROWS)]
    for text in [*whole, "".join(json.dumps(row) + "\n" for row in ROWS)]:
        (tmp_path / name).write_text(text)
        assert read(tmp_path / name).rows == ROWS, text
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"text": \n' + json.dumps(ROWS[0]) + "\n")
    table = read(tmp_path / name)
    assert table.rows == [*ROWS, ROWS[0]] and [place for place, _ in table.bad] == [f"{name}:4"]


@pytest.mark.parametrize("header", [(), ("text", "label"), ("Text", "LABEL")])
def test_a_first_list_that_names_the_columns_is_never_a_row(tmp_path, header):
    lists = [["text", "label"], *map(list, BODY)]
    (tmp_path / "a.json").write_text(json.dumps(lists))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(cells) + "\n" for cells in lists))
    for name in ("a.json", "a.jsonl"):
        assert [list(row.values()) for row in read(tmp_path / name, header=header and ("text", "label")).rows] == lists[1:]
    (tmp_path / "b.json").write_text(json.dumps(lists[1:]))
    assert len(read(tmp_path / "b.json", header=("text", "label")).rows) == len(BODY)
    assert "--data.rows.header text,label" in refused(tmp_path / "b.json")


def test_keys_in_the_errors_of_json_are_quoted_for_the_shell(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "my rows": {"x": ROWS}}))
    assert "--data.rows.under 'my rows' reads" in refused(tmp_path / "a.json")
    assert read(tmp_path / "a.json", under="my rows.x").rows == ROWS


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_and_names_in_capitals(tmp_path, encoding):
    text = "text\tlabel\nein schöner Film\tgood\n日本語\tbad\n"
    (tmp_path / "A.TSV").write_bytes(text.encode(encoding))
    assert [row["text"] for row in read(tmp_path / "A.TSV").rows] == ["ein schöner Film", "日本語"]
    (tmp_path / "nul.txt").write_bytes(b"a\0b\n\0\n")
    assert [line for _, line in read_lines(tmp_path / "nul.txt")] == ["a\0b", "\0"]


def test_class_names_that_datasets_wrote_into_a_parquet_file(tmp_path):
    """The classes were 0, 1 and -1; a test set's -1 stands for no label."""
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["bad", "good"])
    features = {"text": datasets.Value("binary"), "label": kind, "tags": datasets.Sequence(kind)}
    columns = {"text": ["ä".encode(), b"b", b"c"], "label": [1, 0, -1], "tags": [[0, 1], [1], []]}
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet", ("text", "label", "tags"))
    assert [tuple(row.values()) for row in table.rows] == [("ä", "good", ["bad", "good"]), ("b", "bad", ["good"])]
    assert table.bad == [("a.parquet row 2", "label is missing")]


def test_conll_u_and_conll_2003(tmp_path):
    """The tokens of CoNLL-U were the numbers of its lines, and their tags `_`; CoNLL-2003's train.txt was read as a table."""
    rest = "_\t_\t0\troot\t_\t_"
    lines = [
        "# text = Vámonos al mar",
        "1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_",
        f"1\tVamos\tir\tVERB\t{rest}",
        f"2\tnos\tnos\tPRON\t{rest}",
    ]
    lines += [f"2.1\tx\tx\tX\t{rest}", f"3\t.\t.\tPUNCT\t{rest}", "", ""]
    for name in ("a.conllu", "a.conll"):
        (tmp_path / name).write_text("\n".join(lines))
        table = read(tmp_path / name, ("tokens", "tags"))
        assert table.rows == [{"tokens": ["Vamos", "nos", "."], "tags": ["VERB", "PRON", "PUNCT"]}] and "UPOS" in table.summary()
    (tmp_path / "train.txt").write_text("-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nBonn NNP B-NP B-LOC\n")
    rows = read(tmp_path / "train.txt", ("tokens", "tags")).rows
    assert rows == [{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}, {"tokens": ["Bonn"], "tags": ["B-LOC"]}]
    (tmp_path / "table.txt").write_text("tokens\ttags\n['a', 'b']\t['O', 'O']\n")
    assert read(tmp_path / "table.txt", ("tokens", "tags")).rows == [{"tokens": ["a", "b"], "tags": ["O", "O"]}]


def test_columns_inside_objects_that_a_cell_spells(tmp_path):
    columns = {"source": "translation.en", "target": "translation.de"}
    (tmp_path / "a.csv").write_text("translation\n\"{'en': 'hi', 'de': 'hallo'}\"\n")
    assert read(tmp_path / "a.csv", ("source", "target"), columns=columns).rows == [{"source": "hi", "target": "hallo"}]
    told = refused(tmp_path / "a.csv", ("source", "target"), columns={**columns, "target": "translation.fr"})
    assert "target is missing: translation has the keys en, de" in told


def test_nan_is_no_class_and_an_id_no_conversation(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "a,good\n" * 3 + "b,nan\n")
    assert read(tmp_path / "a.csv").bad == [("a.csv:5", "label holds 'nan', which stands for a missing value")]
    (tmp_path / "a.jsonl").write_text('{"message_id": 1, "text": "a"}\n')
    assert "did you mean" not in refused(tmp_path / "a.jsonl", ("messages",))  # it advised message_id


def test_a_column_with_the_system_message(tmp_path):
    """It was left out silently: OpenOrca's system_prompt, the `system` beside ShareGPT's conversations."""
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    own = [{"from": "system", "value": "own"}, *turns]
    lines = [
        {"system": "be kind", "conversations": turns},
        {"system": "no", "conversations": own},
        {"system": "", "conversations": turns},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = read(tmp_path / "a.jsonl", ("messages",))
    heads = [row["messages"][0] for row in table.rows]
    assert [(head["role"], head["content"]) for head in heads] == [("system", "be kind"), ("system", "own"), ("user", "hi")]
    assert "the system message from system" in table.summary()
    (tmp_path / "b.jsonl").write_text(json.dumps({"system_prompt": "be kind", "question": "q", "response": "a"}) + "\n")
    (row,) = read(tmp_path / "b.jsonl", ("messages",)).rows
    assert [message["content"] for message in row["messages"]] == ["be kind", "q", "a"]


def test_a_file_is_suggested_by_its_name_and_not_by_its_ending(tmp_path):
    (tmp_path / "one.csv").write_text("text,label\na,b\n")
    assert "did you mean" not in refused(tmp_path / "nothere.csv")  # it was one.csv
    assert "did you mean 'one.csv'?" in refused(tmp_path / "one.cvs") and "'one.csv'?" in refused(tmp_path / "on.csv")


def test_choices_with_their_signs(tmp_path):
    """ARC's answer "1" stands for the first of the choices "1" to "4", not for number 1 from 0."""
    choices = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    lettered = {**choices, "label": ["A", "B", "C"]}
    lines = [{"question": "q", "choices": choices, "answerKey": "1"}, {"question": "q", "choices": lettered, "answerKey": "C"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read(tmp_path / "a.jsonl", ("question", "choices", "label"), columns={"label": "answerKey"}).rows
    assert [(row["choices"], row["label"]) for row in rows] == [(["a", "b", "c"], 0), (["a", "b", "c"], 2)]
