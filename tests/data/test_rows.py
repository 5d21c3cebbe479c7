"""Labelled rows from every kind of place; a bad row is counted and told, never lost."""

import collections
import csv
import gzip
import json
import pathlib
import sys

import pytest

from jaxlm.data import rows as rows_module
from jaxlm.data.rows import ColumnsConfig, RowsConfig, Table, read_inputs, read_rows, split_rows
from jaxlm.data.splits import HELD_OUT, TRAIN, UNSEEN, named_split

TEXTS = ["first, text", 'zweites "—" Dokument 🎉', "third\u2028line"]
PAIRS = [{"text": text, "label": label} for text, label in zip(TEXTS, ["a", "b", "a"], strict=True)]


def packed(raw: bytes, suffix: str) -> bytes:
    import zstandard

    return {"": lambda: raw, ".gz": lambda: gzip.compress(raw), ".zst": lambda: zstandard.compress(raw)}[suffix]()


def read(path, required=("text", "label"), optional=(), *, columns=None, splits=TRAIN, **rest) -> Table:
    return read_rows(str(path), RowsConfig(columns=ColumnsConfig(**(columns or {})), **rest), required, optional, splits=splits)


def refused(path, required=("text", "label"), optional=(), **rest) -> str:
    with pytest.raises(ValueError) as error:
        read(path, required, optional, **rest)
    assert "\n" not in str(error.value)
    return str(error.value)


def csv_file(file, rows, **options):
    with file.open("w", newline="", encoding="utf8") as out:
        csv.writer(out, **options).writerows(rows)
    return file


# --- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_tsv(tmp_path, suffix, start, end):
    lines = ["text\tlabel", *(f"{row['text']}\t{row['label']}" for row in PAIRS)]
    (tmp_path / f"a.tsv{suffix}").write_bytes(packed(start + end.join(lines).encode(), suffix))
    table = read(tmp_path / f"a.tsv{suffix}")
    assert table.rows == PAIRS and table.bad == []
    assert table.where == [f"a.tsv{suffix}:{line}" for line in (2, 3, 4)]
    assert table.summary() == f"a.tsv{suffix}: 3 rows"


def test_quote_characters_of_a_tsv_are_text(tmp_path):
    """A reader that knows quoting joined rows of MRPC from one stray quote to the next."""
    (tmp_path / "a.tsv").write_text('text\tlabel\n"He said\t1\nno" he said\t0\n')
    assert read(tmp_path / "a.tsv").rows == [{"text": '"He said', "label": "1"}, {"text": 'no" he said', "label": "0"}]


def test_csv_cells_hold_line_ends_commas_and_quotes(tmp_path):
    texts = ["a,b", 'say "x"', "two\nlines", "two\r\nmore", "x" * 1_000_000]
    file = csv_file(tmp_path / "a.csv", [["text", "label"], *([text, "1"] for text in texts)])
    table = read(file)
    assert [row["text"] for row in table.rows] == texts
    assert table.where == [f"a.csv:{line}" for line in (2, 3, 4, 6, 8)]


def test_names_given_and_names_repeated(tmp_path):
    (tmp_path / "bare.tsv").write_text("x y\t1\nz\t0\n")
    (tmp_path / "named.tsv").write_text("sentence\tlabel\nx y\t1\nz\t0\n")
    bare = read(tmp_path / "bare.tsv", header=("sentence", "label"), columns={"text": "sentence"})
    named = read(tmp_path / "named.tsv", header=("sentence", "label"), columns={"text": "sentence"})
    assert bare.rows == named.rows == read(tmp_path / "named.tsv", columns={"text": "sentence"}).rows
    assert bare.rows[0] == {"text": "x y", "label": "1"}


def test_missing_columns_are_told_with_those_that_are_there(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlable\nx\t1\n")
    told = refused(tmp_path / "a.tsv", columns={"text": "sentense"})
    assert "no column 'sentense' for the text (did you mean 'sentence'?)" in told and "its columns: sentence, lable;" in told
    assert "--data.rows.columns.text" in told and "--data.rows.header text,label names the columns" in told
    told = refused(tmp_path / "a.tsv", columns={"text": "sentence"})
    assert "no column 'label' for the label (did you mean 'lable'?)" in told
    assert "'pairs'" in refused(tmp_path / "a.tsv", ["text"], ["pair"], columns={"text": "sentence", "pair": "pairs"})
    (tmp_path / "long.tsv").write_text(f"{'word ' * 99}\t1\n")
    assert len(refused(tmp_path / "long.tsv")) < 400
    (tmp_path / "b.csv").write_text("text,label,label\nx,y,z\n")
    assert "two columns 'label'; --data.rows.header" in refused(tmp_path / "b.csv")


def test_only_roles_asked_for_and_optional_ones_where_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "x", "pair": "y", "extra": 1, "label": 2}\n{"text": "z", "pair": null, "label": 0.5}\n'
    )
    assert read(tmp_path / "a.jsonl", ["text"]).rows == [{"text": "x"}, {"text": "z"}]
    both = read(tmp_path / "a.jsonl", ["text"], ["pair", "label", "id"]).rows
    assert both == [{"text": "x", "pair": "y", "label": 2}, {"text": "z", "label": 0.5}]


def test_json_in_many_dresses(tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, PAIRS)))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, PAIRS)))
    (tmp_path / "array.json").write_text(json.dumps(PAIRS, indent=1))
    (tmp_path / "under.json").write_text(json.dumps({"version": 1, "data": PAIRS}))
    for name in ("lines.jsonl", "lines.json", "array.json", "under.json"):
        assert read(tmp_path / name).rows == PAIRS, name
    assert read(tmp_path / "lines.jsonl").where[1] == "lines.jsonl:3"
    (tmp_path / "keys.json").write_text('{"sst2": [], "qqp": []}')
    assert "one dict with the keys sst2, qqp: expected an array" in refused(tmp_path / "keys.json")
    (tmp_path / "cut.json").write_text('[{"text": "x",\n "label"')
    assert "cut.json:2 is not JSON" in refused(tmp_path / "cut.json")


def test_parquet_and_a_damaged_one(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": TEXTS, "label": [0, 1, 0], "words": [["a"], ["b", "c"], []]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row["label"] for row in read(tmp_path / "a.parquet").rows] == [0, 1, 0]
    assert [row["tokens"] for row in read(tmp_path / "a.parquet", ["text"], ["tokens"], columns={"tokens": "words"}).rows[:2]] == [
        ["a"],
        ["b", "c"],
    ]
    assert "(did you mean 'label'?); its columns: text, label, words;" in refused(
        tmp_path / "a.parquet", columns={"label": "lable"}
    )
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    assert "b.parquet cannot be read" in refused(tmp_path / "b.parquet")


def test_folders_and_globs_in_sorted_order_with_names_that_tell_apart(tmp_path):
    for place, label in (("b/a.tsv", "2"), ("a/a.tsv", "1"), ("c.jsonl", "3")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text('{"text": "x", "label": "3"}' if place[0] == "c" else f"text\tlabel\nx\t{label}\n")
    (tmp_path / "notes.txt").write_text("not data")
    table = read(tmp_path)
    assert [row["label"] for row in table.rows] == ["1", "2", "3"]
    assert table.where == ["a/a.tsv:2", "b/a.tsv:2", f"{tmp_path.name}/c.jsonl:1"]
    assert [row["label"] for row in read(tmp_path / "*" / "*.tsv").rows] == ["1", "2"]
    (tmp_path / "named.txt").write_text("x\t1\n")
    assert read(tmp_path / "named.txt", header=("text", "label")).rows == [{"text": "x", "label": "1"}]


def test_what_is_not_there_is_told(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\nx\t1\n")
    assert "did you mean 'train.tsv'" in refused(tmp_path / "trian.tsv")
    (tmp_path / "a.xlsx").write_text("")
    assert "allowed: .tsv, .csv, .jsonl, .json, .parquet, .conll, .conllu, .txt" in refused(tmp_path / "a.xlsx")
    (tmp_path / "empty").mkdir()
    assert "holds no file ending in .tsv, .csv" in refused(tmp_path / "empty")
    assert "did you mean 'embedded:modules'?" in refused("embeded:modules")
    assert "allowed: embedded:modules, hf:ID, tfds:NAME" in refused("huggingface:glue")


# --- question answering -----------------------------------------------------------------------

CONTEXT = "Ada wrote the first program. Ada met Babbage."


def squad_file(file, qas):
    article = {"title": "Ada", "paragraphs": [{"context": CONTEXT, "qas": qas}, {"context": "Nothing here.", "qas": []}]}
    file.write_text(json.dumps({"version": "v2.0", "data": [article, {"title": "Void", "paragraphs": []}]}))
    return file


def answered(place: int, text: str = "Ada", id: str = "q") -> dict:
    return {"id": id, "question": "Who?", "answers": [{"text": text, "answer_start": place}]}


def test_squad_is_flattened_with_questions_that_have_no_answer(tmp_path):
    impossible = {"id": "n", "question": "When?", "is_impossible": True, "answers": [], "plausible_answers": [{"text": "x"}]}
    file = squad_file(tmp_path / "dev.json", [answered(0), impossible])
    table = read(file, ["question", "context", "answers"], ["id"], group="title")
    about = {"context": CONTEXT, "group": "Ada"}
    assert table.rows == [
        {"question": "Who?", "answers": {"text": ["Ada"], "answer_start": [0]}, "id": "q", **about},
        {"question": "When?", "answers": {"text": [], "answer_start": []}, "id": "n", **about},
    ]
    assert table.where == ["dev.json q", "dev.json n"]


def test_an_answer_that_its_start_misses_is_looked_for(tmp_path):
    """The nearest occurrence: files count bytes or UTF-16 units here and there."""
    second = CONTEXT.rindex("Ada")
    qas = [
        answered(1, id="near the first"),
        answered(second - 2, id="near the second"),
        answered(second + 9, id="after"),
        answered(999),
    ]
    table = read(squad_file(tmp_path / "dev.json", qas), ["question", "context", "answers"])
    assert [row["answers"]["answer_start"] for row in table.rows] == [[0], [second], [second], [second]]
    qas = [answered(0), answered(3, "Lovelace", "wrong")]
    table = read(squad_file(tmp_path / "dev.json", qas), ["question", "context", "answers"])
    assert table.bad == [("dev.json wrong", "answers do not all occur in the context")]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Babbage", {"text": ["Babbage"], "answer_start": [CONTEXT.index("Babbage")]}),
        (["Babbage", "nobody"], {"text": ["Babbage", "nobody"], "answer_start": [CONTEXT.index("Babbage"), -1]}),
        ({"text": ["Ada"], "answer_start": [0]}, {"text": ["Ada"], "answer_start": [0]}),
        ([{"text": "Ada", "answer_start": 0}], {"text": ["Ada"], "answer_start": [0]}),
        ('{"text": ["Ada"], "answer_start": [0]}', {"text": ["Ada"], "answer_start": [0]}),
        ([], {"text": [], "answer_start": []}),
    ],
)
def test_answers_in_many_dresses(tmp_path, given, wanted):
    (tmp_path / "a.json").write_text(json.dumps([{"question": "?", "context": CONTEXT, "answers": given}]))
    assert read(tmp_path / "a.json", ["question", "context", "answers"]).rows[0]["answers"] == wanted


def test_answers_without_a_context_keep_what_they_say(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"question": "?", "answers": ["4"]}]))
    assert read(tmp_path / "a.json", ["question", "answers"]).rows[0]["answers"] == {"text": ["4"], "answer_start": [-1]}


# --- words with tags, parallel texts ----------------------------------------------------------


def test_conll_sentences_end_at_any_blank_line(tmp_path):
    """The training file of WNUT 2017 has a TAB on the lines between its sentences."""
    text = "-DOCSTART- -X- O\n\n# id = 1\nJohn\tNNP\tB-PER\nNew York\tNNP\tB-LOC\n\t\n#\tO\n#x\tO\n \n\nlast\tO"
    (tmp_path / "a.conll").write_text(text)
    table = read(tmp_path / "a.conll", ["tokens", "tags"])
    assert table.rows == [
        {"tokens": ["John", "New York"], "tags": ["B-PER", "B-LOC"]},
        {"tokens": ["#", "#x"], "tags": ["O", "O"]},
        {"tokens": ["last"], "tags": ["O"]},
    ]
    assert table.where == ["a.conll:4", "a.conll:7", "a.conll:11"]
    (tmp_path / "b.conll").write_text("EU NNP B-NP B-ORG\r\nrejects VBZ B-VP O\r\n\r\n")
    assert read(tmp_path / "b.conll", ["tokens", "tags"]).rows == [{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}]
    assert "its columns: tokens, tags;" in refused(tmp_path / "b.conll", ["text"])


def test_tokens_and_tags_of_other_formats_are_lists(tmp_path):
    good = {"tokens": ["a", "b"], "tags": ["O", 1]}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [good, {**good, "tags": ["O"]}])))
    table = read(tmp_path / "a.jsonl", ["tokens", "tags"])
    assert table.rows == [{"tokens": ["a", "b"], "tags": ["O", "1"]}]
    assert table.bad == [("a.jsonl:2", "has 2 tokens, but 1 tag")]
    csv_file(tmp_path / "b.csv", [["tokens", "tags"], [json.dumps(["a", "b"]), json.dumps(["X", "Y"])], ["a b", "[]"]])
    table = read(tmp_path / "b.csv", ["tokens", "tags"])
    assert table.rows == [{"tokens": ["a", "b"], "tags": ["X", "Y"]}]
    assert table.bad == [("b.csv:3", "tokens holds 'a b', not a list of texts")]


def test_parallel_texts(tmp_path):
    (tmp_path / "train.en.txt").write_bytes("one\ntwo\u2028still two\nthree\n".encode())
    (tmp_path / "train.de.txt").write_bytes("\ufeffeins\r\nzwei\r\ndrei".encode())
    columns = {"source": "en", "target": "de"}
    table = read(tmp_path / "train.{en,de}.txt", ["source", "target"], columns=columns)
    assert table.rows[1:] == [{"source": "two\u2028still two", "target": "zwei"}, {"source": "three", "target": "drei"}]
    assert table.rows[0]["target"] == "eins" and table.where[2] == "train.{en,de}.txt:3"
    (tmp_path / "train.de.txt").write_text("eins\n\n")
    assert "different numbers of lines: train.en.txt 3, train.de.txt 2" in refused(
        tmp_path / "train.{en,de}.txt", ["source", "target"], columns=columns
    )
    assert "its columns: en, de;" in refused(tmp_path / "train.{en,de}.txt", ["source", "target"])
    assert "no file matches" in refused(tmp_path / "train.{en,fr}.txt", ["source"], columns={"source": "en"})
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text("text\tlabel\nx\t1\n")
    assert "lists in braces are for parallel text files" in refused(tmp_path / "{a,b}.tsv")


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a", ["a"]),
        ("a|b, c", ["a", "b, c"]),
        ("a, b,a", ["a", "b"]),
        ("", []),
        ('["x", "y"]', ["x", "y"]),
        (["x", 3], ["x", "3"]),
        ([], []),
    ],
)
def test_labels_of_which_there_may_be_several(tmp_path, given, wanted):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "labels": given}))
    assert read(tmp_path / "a.jsonl", ["text", "labels"]).rows == [{"text": "x", "labels": wanted}]


def test_conversations_and_columns_inside_objects(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    row = {
        "prompt": messages[:1],
        "chosen": messages[1:],
        "rejected": "no",
        "messages": json.dumps(messages),
        "translation": {"en": "x"},
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    table = read(tmp_path / "a.jsonl", ["prompt", "chosen", "rejected", "messages", "source"], columns={"source": "translation.en"})
    assert table.rows == [{"prompt": messages[:1], "chosen": messages[1:], "rejected": "no", "messages": messages, "source": "x"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"act": 1}]}))
    assert "not a message: an object with role and content" in refused(tmp_path / "b.jsonl", ["messages"])


def test_texts_of_several_sentences_are_joined(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"source": ["One.", "Two."], "target": "x"}))
    assert read(tmp_path / "a.jsonl", ["source", "target"]).rows == [{"source": "One. Two.", "target": "x"}]


@pytest.mark.parametrize("label", [0, 1.5, "a", False])
def test_labels_stay_as_they_are_found(tmp_path, label):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "label": label}))
    (row,) = read(tmp_path / "a.jsonl").rows
    assert row["label"] == label and type(row["label"]) is type(label)


# --- bad rows ---------------------------------------------------------------------------------

BAD_LINES = [
    ("a.tsv", b"just text", "has 1 cell, not 2"),
    ("a.tsv", b"x\ty\tz", "has 3 cells, not 2"),
    ("a.tsv", b"\t1", "text is empty"),
    ("a.tsv", b"  \t1", "text is empty"),
    ("a.tsv", b"x\t", "label is empty"),
    ("a.tsv", b"caf\xe9\t1", "is not UTF-8: byte 0xe9"),
    ("a.csv", b"caf\xe9,1", "is not UTF-8: byte 0xe9"),
    ("a.csv", b"a,b,c", "has 3 cells, not 2"),
    ("a.csv", b'"a"b,1', "is not CSV: ',' expected after '\"'"),
    ("a.csv", b'"a,1', "is not CSV: "),
    ("a.jsonl", b'{"text": "x"', "is not JSON: Expecting ',' delimiter"),
    ("a.jsonl", b'["x", 1]', "is not an object but list"),
    ("a.jsonl", b'{"text": "caf\xe9", "label": 1}', "is not UTF-8: byte 0xe9"),
    ("a.jsonl", b'{"text": "x"}', "label is missing"),
    ("a.jsonl", b'{"text": "x", "label": null}', "label is missing"),
    ("a.jsonl", b'{"text": "x", "label": NaN}', "label is missing"),
    ("a.jsonl", b'{"text": "x", "label": ["a"]}', "label holds ['a'], not a text or a number"),
    ("a.jsonl", b'{"text": 3, "label": 1}', "text holds 3, not a text"),
    ("a.jsonl", b"[" * 100_000, "is not JSON"),
]


@pytest.mark.parametrize(("name", "line", "why"), BAD_LINES, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD_LINES)])
@pytest.mark.parametrize("last", [False, True])
def test_a_bad_row_is_left_out_and_told_alone(tmp_path, name, line, why, last):
    """Those before and after it stay, also where a stray quote could take in the rest of the file."""
    good = {"a.tsv": b"x\t1", "a.csv": b"x,1", "a.jsonl": b'{"text": "x", "label": "1"}'}[name]
    head = {"a.tsv": [b"text\tlabel"], "a.csv": [b"text,label"], "a.jsonl": []}[name]
    (tmp_path / name).write_bytes(b"\n".join([*head, *[good] * 5, line, *([] if last else [good] * 150)]))
    table = read(tmp_path / name)
    assert table.rows == [{"text": "x", "label": "1"}] * (5 if last else 155)
    ((where, told),) = table.bad
    assert where == f"{name}:{len(head) + 6}" and told.startswith(why)
    assert len(table.where) == len(table.rows) and where not in table.where
    assert read(tmp_path / name, max_bad=1.0).bad == table.bad
    assert f"1 of {len(table.rows) + 1} rows cannot be used" in refused(tmp_path / name, max_bad=0.0)


def test_a_quoted_cell_that_closes_far_below_takes_no_rows_with_it(tmp_path):
    """`"5 inches` opened a quote; the next quote stood 30 rows on, and all between were gone."""
    for closing in ('7" tall,0', '7",0,0', '7"" tall,0'):
        lines = ["text,label", *["x,1"] * 50, '"5 inches,1', *["y,1"] * 30, closing, *["z,1"] * 200]
        (tmp_path / "a.csv").write_text("\n".join(lines))
        table = read(tmp_path / "a.csv")
        counts = collections.Counter(row["text"] for row in table.rows)
        assert (counts["x"], counts["y"], counts["z"]) == (50, 30, 200)
        assert table.where[50] == "a.csv:53" and table.bad[0][0] == "a.csv:52" and len(table.bad) <= 2
    lines = ["text,label", *["x,1"] * 50, '"5 inches,1', *["y,1"] * 30, '7" tall,0', *["z,1"] * 100]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    table = read(tmp_path / "a.csv")
    assert collections.Counter(row["text"] for row in table.rows) == {"x": 50, "y": 30, "z": 100, '7" tall': 1}
    assert [where for where, _ in table.bad] == ["a.csv:52"]


def test_the_summary_groups_reasons_and_gives_the_first_place_of_each(tmp_path):
    lines = ["text\tlabel", *["x\t1"] * 500, "one cell", "x\t", "again one"]
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    table = read(tmp_path / "train.tsv")
    assert table.summary() == (
        "train.tsv: 500 rows; 3 left out: train.tsv:502 has 1 cell, not 2 (2 rows); train.tsv:503: label is empty (1 row)"
    )
    many = Table("many", [{}] * 1234, [""] * 1234, [(f"many:{i}", f"label holds [{i}]") for i in range(5)])
    assert many.summary().startswith("many: 1,234 rows; 5 left out: many:0: label holds [0] (1 row); ")
    assert many.summary().endswith("; 2 other reasons")


@pytest.mark.parametrize(
    ("good", "bad", "passes"), [(1, 1, True), (50, 2, False), (97, 2, False), (298, 2, True), (298, 4, False), (0, 1, False)]
)
def test_more_than_a_few_bad_rows_refuse_the_file(tmp_path, good, bad, passes):
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *["x\t1"] * good, *["y"] * bad]))
    if passes:
        assert len(read(tmp_path / "a.tsv").bad) == bad
        return
    told = refused(tmp_path / "a.tsv")
    assert f"{bad} of {good + bad} row" in told
    assert f"a.tsv:{good + 2} has 1 cell, not 2" in told and told.count("has 1 cell") == min(bad, 3)


def test_files_that_are_bad_as_a_whole_are_one_line(tmp_path):
    for name, raw, told in [
        ("a.tsv", b"", "a.tsv holds no rows"),
        ("a.tsv", b"text\tlabel\n", "a.tsv holds no rows"),
        ("a.json", b"[]", "a.json holds no rows"),
        ("a.jsonl", b"\n\n", "a.jsonl holds no rows"),
        ("a.tsv", "t\xe9xt\tlabel\nx\t1\n".encode("latin-1"), "a.tsv:1 should name the columns but is not UTF-8"),
        ("a.tsv", "\n".join(["text\tlabel", *["caf\xe9\t1"] * 9]).encode("latin-1"), "9 of 9 rows cannot be used"),
        ("a.json", b'[{"text": "caf\xe9"}]', "a.json is not UTF-8"),
        (
            "a.jsonl",
            b'{"txt": "x", "label": 1}\n' * 3,
            "no column 'text' for the text (did you mean 'txt'?); its columns: txt, label;",
        ),
        ("a.tsv.gz", gzip.compress(b"text\tlabel\n" + b"x\t1\n" * 9999)[:-20], "a.tsv.gz cannot be read"),
        ("a.parquet.gz", b"", "compressed inside"),
    ]:
        (tmp_path / name).write_bytes(raw)
        assert told in refused(tmp_path / name)


def test_limit_and_config_mistakes(tmp_path):
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *[f"{i}\t1" for i in range(9)]]))
    assert [row["text"] for row in read(tmp_path / "a.tsv", limit=4).rows] == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match="limit 0 must be at least 1"):
        RowsConfig(limit=0)
    with pytest.raises(ValueError, match=r"max_bad 2.0 must be a share"):
        RowsConfig(max_bad=2.0)


def test_options_are_read_as_any_config():
    from jaxlm.config import describe, load, parse_flags

    flags = parse_flags(["--header", "text,label", "--columns.text", "sentence", "--group", "title"])
    with pytest.raises(ValueError, match=r"unknown option --columns\.txt: did you mean '--columns\.text'"):
        load(RowsConfig, None, parse_flags(["--columns.txt", "x"]))
    config = load(RowsConfig, None, flags).value
    assert (config.header, config.columns.text, config.group) == (("text", "label"), "sentence", "title")
    assert load(RowsConfig, None, parse_flags(["--header", "[a, b]"])).value.header == ("a", "b")
    assert all(sentence for *_, sentence in describe(RowsConfig))


# --- splitting --------------------------------------------------------------------------------


def table_of(rows) -> Table:
    return Table("t", list(rows), [f"t:{i}" for i in range(len(rows))], [("t:99", "is bad")])


def test_the_side_of_a_row_is_its_own():
    """Not its place's, nor the other rows': a data set that grows moves nothing across, and equal rows leak to no side."""
    rows = [{"text": f"text {i % 900}", "label": i % 900 % 3, "id": str(i)} for i in range(1000)]
    train, held = split_rows(table_of(rows), 0.1)
    assert len(train.rows) + len(held.rows) == 1000 and 60 < len(held.rows) < 150
    assert not {row["text"] for row in train.rows} & {row["text"] for row in held.rows}
    assert [rows[int(where[2:])] for where in held.where] == held.rows
    assert train.bad == [("t:99", "is bad")] and held.bad == []
    texts = {row["text"] for row in held.rows}
    backwards = split_rows(table_of(rows[::-1]), 0.1)[1]
    fewer = split_rows(table_of(rows[:500]), 0.1)[1]
    assert {row["text"] for row in backwards.rows} == texts
    assert {row["text"] for row in fewer.rows} == texts & {row["text"] for row in rows[:500]}
    assert texts < {row["text"] for row in split_rows(table_of(rows), 0.3)[1].rows}


def test_the_split_is_the_same_in_every_process():
    held = split_rows(table_of([{"text": f"text {i}"} for i in range(40)]), 0.1)[1]
    told = "a run that goes on elsewhere, or with a later version, would see other rows held out"
    assert [row["text"] for row in held.rows] == ["text 8", "text 30", "text 36"], told


def test_groups_stay_together_and_both_sides_have_rows():
    rows = [{"text": f"{i}", "group": f"g{i % 13}"} for i in range(300)]
    train, held = split_rows(table_of(rows), 0.2)
    assert not {row["group"] for row in train.rows} & {row["group"] for row in held.rows}
    assert held.rows and train.rows
    for fraction in (1e-9, 0.5, 1 - 1e-9):
        assert all(side.rows for side in split_rows(table_of([{"text": "a"}, {"text": "b"}]), fraction))
    with pytest.raises(ValueError, match="t: 5 rows cannot be split: all are of one group"):
        split_rows(table_of([{"text": str(i), "group": "x"} for i in range(5)]), 0.1)
    with pytest.raises(ValueError, match="1 row cannot be split: they are all equal"):
        split_rows(table_of([{"text": "x"}]), 0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_rows(table_of(rows), 1.0)


# --- datasets of others, embedded -------------------------------------------------------------


def test_huggingface_rows_have_the_names_of_their_classes(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    classes = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": classes, "tags": datasets.List(classes), "n": datasets.Value("int64")}
    )
    columns = {"text": TEXTS, "label": [1, 0, -1], "tags": [[0, 1], [1], [0]], "n": [5, 6, 7]}
    whole = datasets.Dataset.from_dict(columns, features=features)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "both")
    table = read(tmp_path / "one", ["text", "label"], ["tags"])
    assert [(row["label"], row["tags"]) for row in table.rows] == [("pos", ["neg", "pos"]), ("neg", ["pos"])]
    assert table.bad == [("one row 2", "label is missing")], "-1 stands for a label that is kept secret"
    assert read(tmp_path / "one", columns={"label": "n"}).rows[2]["label"] == 7
    assert read(tmp_path / "both", splits=named_split("test")).rows == [{"text": TEXTS[1], "label": "neg"}]
    assert "did you mean 'train'" in refused(tmp_path / "both", splits=named_split("trian"))
    assert "has no splits" in refused(tmp_path / "one", splits=named_split("test"))
    assert "(did you mean 'text'?); its columns: text, label, tags, n;" in refused(tmp_path / "one", columns={"text": "txt"})
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    (tmp_path / "plain" / "test.jsonl").write_text(json.dumps(PAIRS[2]))
    for path, held in ((tmp_path / "both", {"text": TEXTS[1], "label": "neg"}), (f"hf:{tmp_path / 'plain'}", PAIRS[2])):
        for splits in (HELD_OUT, UNSEEN):  # there is no validation split
            assert (read(path, splits=splits).rows, read(path, splits=splits).notes) == ([held], ["split test"])
        assert len(read_inputs(str(path), RowsConfig(), ["text"])[0]) == 1, "to predict for, too"
    assert read(f"hf:{tmp_path / 'plain'}", splits=named_split("train[1:3]")).rows == PAIRS[1:3]
    table = read(f"hf:{tmp_path / 'plain'}", limit=2)
    assert table.rows == PAIRS[:2] and table.where[1] == f"{tmp_path / 'plain'} row 1"
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "dataset 'no/such' cannot be read" in refused("hf:no/such")


def test_tfds_rows(tmp_path):
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class TinyRows(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            classes = tfds.features.ClassLabel(names=["neg", "pos"])
            features = {"text": tfds.features.Text(), "label": classes, "words": tfds.features.Sequence(tfds.features.Text())}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples(TEXTS)}

        def _generate_examples(self, texts):
            for i, text in enumerate(texts):
                yield i, {"text": text, "label": i % 2, "words": text.split()}

    builder = TinyRows(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    path = f"tfds:{builder.data_dir}"
    table = read(path, ["text", "label"], ["tokens"], columns={"tokens": "words"})
    wanted = [{"text": text, "label": ["neg", "pos", "neg"][i], "tokens": text.split()} for i, text in enumerate(TEXTS)]
    assert sorted(table.rows, key=lambda row: row["text"]) == sorted(wanted, key=lambda row: row["text"])
    assert "its columns: " in refused(path, columns={"text": "body"})
    alone = read(path, splits=UNSEEN)
    assert len(alone.rows) == 3 and "split train, as there is no other" in alone.notes[0]
    assert "allowed: train" in refused(path, splits=HELD_OUT)
    assert "tensorflow" not in sys.modules


def test_embedded_modules_are_labelled_rows_of_this_python():
    table = read("embedded:modules")
    counts = collections.Counter(row["label"] for row in table.rows)
    assert len(counts) == 20 and max(counts.values()) == 200 and min(counts.values()) > 30
    assert {"asyncio", "email", "logging"} <= set(counts) and not any(name.startswith("_") for name in counts)
    texts = [row["text"] for row in table.rows]
    assert len(set(texts)) == len(texts) > 2000 and min(map(len, texts)) >= 40
    assert len({row["label"] for row in table.rows[:100]}) > 10, "mixed, so that the first rows are of many classes"
    assert "its columns: text, label;" in refused("embedded:modules", ["text", "pair"])


def test_embedded_rows_are_the_largest_modules_each_text_once(tmp_path, monkeypatch):
    def module(name: str, *numbers: int) -> tuple[str, pathlib.Path]:
        file = tmp_path / f"{name}.py"
        functions = [f"def f{i}():\n    'The docstring that has the number {i}, long enough to count.'\n" for i in numbers]
        file.write_text("\n".join(functions))
        return name, file

    library = [
        module("alpha", 1, 2, 3, 4, 5, 5),
        module("beta", 4, 5, 6, 7, 8),
        module("gamma", 9, 10),
        module("_private", *range(20, 40)),
        module("idlelib", *range(40, 60)),
        module("config-3", *range(60, 80)),
    ]
    monkeypatch.setattr(rows_module, "modules", lambda: iter(library))
    numbers = {"alpha": {1, 2, 3, 4, 5}, "beta": {6, 7, 8}, "gamma": {9, 10}}
    for classes, most, wanted in [(3, 9, 10), (2, 9, 8), (2, 2, 4)]:
        found = [row for _, row in rows_module._modules(classes, most)]
        assert found == [row for _, row in rows_module._modules(classes, most)] and len(found) == wanted
        assert len({row["text"] for row in found}) == wanted
        assert all(int(row["text"].split("number ")[1].split(",")[0]) in numbers[row["label"]] for row in found)
        assert {row["label"] for row in found} == set(list(numbers)[:classes])


# --- real data --------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_sets_give_the_rows_that_their_sources_state(data):
    """Every row, none left out: counts are those of the README files beside the data."""
    two = {"header": ("text", "label")}
    mrpc = {"columns": {"text": "#1 String", "pair": "#2 String", "label": "Quality"}}
    qa = ["question", "context", "answers"]
    for path, count, required, options in [
        ("sentiment-sst2/train.tsv", 6920, ["text", "label"], two),
        ("glue-mrpc/msr_paraphrase_train.txt", 4076, ["text", "pair", "label"], mrpc),
        ("glue-mrpc/msr_paraphrase_test.txt", 1725, ["text", "pair", "label"], mrpc),
        ("topic-agnews/train_5000.csv", 5000, ["text", "label"], two),
        ("topic-zh-thucnews-titles/dev.txt", 5000, ["text", "label"], two),
        ("intent-banking77/train.csv", 10003, ["text", "label"], {"columns": {"label": "category"}}),
        ("toxicity-davidson/labeled_data.csv", 24783, ["text", "label"], {"columns": {"text": "tweet", "label": "class"}}),
        ("qa-squad-v1.1-dev/dev-v1.1.json", 10570, qa, {}),
        ("qa-xquad-en-zh/*.json", 2380, qa, {}),
        ("mt-multi30k-en-de/train.{en,de}.txt", 29000, ["source", "target"], {"columns": {"source": "en", "target": "de"}}),
        ("ref-preference-hh/*.jsonl", 1000, ["chosen", "rejected"], {}),
        ("summ-scitldr/*.jsonl", 3229, ["source", "target"], {}),
    ]:
        table = read(data / path, required, **options)
        assert (len(table.rows), table.bad) == (count, []), path


@pytest.mark.realdata
def test_real_answers_stand_where_they_say(data):
    table = read(data / "qa-squad-v1.1-dev" / "dev-v1.1.json", ["question", "context", "answers"], group="title")
    for row in table.rows:
        for text, start in zip(*row["answers"].values(), strict=True):
            assert row["context"][start : start + len(text)] == text
    train, held = split_rows(table, 0.2)
    assert not {row["group"] for row in train.rows} & {row["group"] for row in held.rows}
    assert len({row["group"] for row in table.rows}) == 48 and held.rows


@pytest.mark.realdata
def test_wnut_has_its_sentences_and_tokens(data):
    for name, sentences, tokens in (("wnut17train.conll", 3394, 62730), ("emerging.dev.conll", 1009, 15733)):
        table = read(data / "ref-wnut17-ner" / name, ["tokens", "tags"])
        assert (len(table.rows), sum(len(row["tokens"]) for row in table.rows)) == (sentences, tokens)
        assert {tag[:2] for row in table.rows for tag in row["tags"]} == {"O", "B-", "I-"}
