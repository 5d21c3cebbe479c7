"""Documents from every kind of place, and mistakes told in one line."""

import gzip
import json

import pytest

from jaxlm.data import sources
from jaxlm.data.sources import SourceConfig, describe, documents, stream

TEXTS = ["first\r\ndocument", "zweites — Dokument 🎉", "third"]


def files(path, **rest) -> SourceConfig:
    return SourceConfig("files", path=str(path), **rest)


def lines(texts, column="text") -> bytes:
    return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()


def compressed(raw: bytes, suffix: str) -> bytes:
    import zstandard

    return {"": lambda: raw, ".gz": lambda: gzip.compress(raw), ".zst": lambda: zstandard.compress(raw)}[suffix]()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_as_it_stands(tmp_path, suffix):
    (tmp_path / f"a.txt{suffix}").write_bytes(compressed(TEXTS[0].encode(), suffix))
    assert list(documents(files(tmp_path / f"a.txt{suffix}"))) == [TEXTS[0]]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_give_one_document_each(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compressed(lines(TEXTS) + b"\n", suffix))
    assert list(documents(files(tmp_path / f"a.jsonl{suffix}"))) == TEXTS


def test_several_zstandard_frames_are_one_file(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(compressed(lines(TEXTS[:1]), ".zst") + compressed(lines(TEXTS[1:]), ".zst"))
    assert list(documents(files(tmp_path / "a.jsonl.zst"))) == TEXTS


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1, 2, 3]}), tmp_path / "a.parquet", row_group_size=2)
    assert list(documents(files(tmp_path / "a.parquet", column="body"))) == TEXTS
    with pytest.raises(ValueError, match=r"no column 'text' .*its columns: body, n;"):
        list(documents(files(tmp_path / "a.parquet")))
    with pytest.raises(ValueError, match="holds 1, not a text"):
        list(documents(files(tmp_path / "a.parquet", column="n")))


def test_globs_and_folders_are_read_in_sorted_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.jsonl").write_bytes(lines(["d"]))
    (tmp_path / "notes.md").write_text("not data")
    assert list(documents(files(tmp_path / "*.txt"))) == ["a", "b", "c"]
    assert list(documents(files(tmp_path / "**" / "*.jsonl"))) == ["d"]
    assert list(documents(files(tmp_path))) == ["a", "b", "c", "d"]


def test_a_relative_glob_and_an_environment_variable(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", str(tmp_path))
    for path in ("*.txt", "./a.txt", "${HERE}/a.txt", "${NOT_SET_AT_ALL:-.}/a.txt"):
        assert list(documents(files(path))) == ["a"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert list(documents(files(tmp_path / "a.txt"))) == ["word"]


@pytest.mark.parametrize(
    ("name", "raw", "told"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "a.jsonl:1 has no column 'text' for the text .*; its columns: body, id;"),
        ("a.jsonl", b'{"text": null, "title": "x"}\n', "holds None, not a text; columns of text: title"),
        ("a.jsonl", b'["x"]\n', "expected an object with the column 'text'"),
        ("a.csv", b"text\nx\n", "unknown format of .*a.csv.* '.csv'.*allowed: .txt, .jsonl, .parquet"),
        ("a.txt.gz", gzip.compress(b"word" * 999, mtime=0)[:-20], "a.txt.gz cannot be read"),
        ("a.txt.zst", b"not zstandard", "a.txt.zst cannot be read"),
        ("a.parquet.gz", b"", "compressed inside"),
    ],
    ids=["latin-1", "not-json", "column", "null", "not-an-object", "format", "cut-gzip", "not-zstd", "packed-parquet"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, raw, told):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=told) as error:
        list(documents(files(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_a_misspelt_file_name_gets_a_suggestion(tmp_path):
    (tmp_path / "input.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no file matches .*inptu.txt': did you mean 'input.txt'"):
        list(documents(files(tmp_path / "inptu.txt")))
    with pytest.raises(ValueError, match="holds no file ending in"):
        (tmp_path / "empty").mkdir()
        list(documents(files(tmp_path / "empty")))


def test_description_follows_names_and_content(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    one = describe(files(tmp_path))
    assert json.loads(json.dumps(one)) == one
    (tmp_path / "a.txt").write_text("two")  # the same size
    two = describe(files(tmp_path))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    three = describe(files(tmp_path))
    assert one != two and two != three
    (tmp_path / "moved").mkdir()
    (tmp_path / "b.txt").rename(tmp_path / "moved" / "b.txt")
    assert describe(files(tmp_path / "moved")) == three, "a copy elsewhere is the same data"


def test_embedded_texts_are_the_same_each_time_and_known_by_their_content(monkeypatch):
    one = describe(SourceConfig())
    assert one == describe(SourceConfig()) and one["kind"] == "embedded"
    some = sources._standard_library()[:40]
    monkeypatch.setattr(sources, "_standard_library", lambda: some)
    texts = list(documents(SourceConfig()))
    assert texts == list(documents(SourceConfig()))
    assert len(texts) > 79 and min(map(len, texts)) >= 40
    assert describe(SourceConfig()) != one


def test_embedded_texts_leave_out_what_is_installed():
    """Otherwise the corpus, and every loss measured on it, would depend on the packages of the machine."""
    parts = {part for file in sources._standard_library() for part in file.parts}
    assert not parts & {"site-packages", "dist-packages", "test", "idle_test", "lib2to3", "__pycache__"}


def test_config_mistakes_are_told():
    for wrong, told in [
        ({"kind": "files"}, "needs a path"),
        ({"path": "x.txt"}, "takes no path"),
        ({"kind": "files", "path": "x", "streaming": True}, "works with kind 'huggingface' only"),
        ({"kind": "files", "path": "x", "subset": "y"}, "only read by kind 'huggingface'"),
        ({"weight": 0.0}, "must be a positive number"),
    ]:
        with pytest.raises(ValueError, match=told):
            SourceConfig(**wrong)


# --- Hugging Face -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """One dataset in each form that lies in a folder: saved, saved with splits, and plain data files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "split")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_bytes(lines(TEXTS))
    return tmp_path


@pytest.mark.parametrize("form", ["one", "split", "plain"])
@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_folders(saved, form, streaming):
    source = SourceConfig("huggingface", path=str(saved / form), streaming=streaming)
    assert list(documents(source)) == TEXTS
    assert describe(source) == describe(source)
    with pytest.raises(ValueError, match=r"no column 'txt' .*did you mean 'text'"):
        list(documents(SourceConfig("huggingface", path=str(saved / form), column="txt", streaming=streaming)))


def test_huggingface_splits(saved):
    assert list(documents(SourceConfig("huggingface", path=str(saved / "split"), split="test"))) == TEXTS[2:]
    assert list(documents(SourceConfig("huggingface", path=str(saved / "plain"), split="train[:2]"))) == TEXTS[:2]
    for form in ("split", "plain"):
        with pytest.raises(ValueError, match="trian") as error:
            list(documents(SourceConfig("huggingface", path=str(saved / form), split="trian")))
        assert "train" in str(error.value) and "\n" not in str(error.value)


def test_huggingface_streams_can_be_resumed(saved):
    source = SourceConfig("huggingface", path=str(saved / "plain"), streaming=True)
    first = stream(source)
    rows = iter(first)
    assert next(rows)["text"] == TEXTS[0]
    again = stream(source)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [row["text"] for row in again] == TEXTS[1:]


def test_a_dataset_that_is_not_there_is_one_line(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="dataset 'no/such' cannot be read") as error:
        list(documents(SourceConfig("huggingface", path="no/such")))
    assert "\n" not in str(error.value)


# --- TensorFlow datasets ----------------------------------------------------------------------


def test_tfds_is_read_without_tensorflow(tmp_path):
    import sys

    import numpy as np
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(TEXTS[:1])}

        def _generate_examples(self, texts):
            for i, text in enumerate(texts):
                yield i, {"text": text, "label": i}

    builder = Tiny(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = SourceConfig("tfds", path=str(builder.data_dir))
    assert sorted(documents(source)) == sorted(TEXTS)
    assert list(documents(source)) == list(documents(source))
    assert describe(source) == {"kind": "tfds", "split": "train", "column": "text", "name": "tiny/1.0.0", "examples": 3}
    with pytest.raises(ValueError, match=r"no column .*its columns: .*text"):
        list(documents(SourceConfig("tfds", path=str(builder.data_dir), column="body")))
    with pytest.raises(ValueError, match=r"cannot be read.*trian") as error:
        list(documents(SourceConfig("tfds", path=str(builder.data_dir), split="trian")))
    assert "\n" not in str(error.value)
    assert "tensorflow" not in sys.modules


def test_a_column_that_holds_lines_is_read_as_a_text_of_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ["one", "two"]}\n{"text": "three\u2028four"}\n')
    assert list(documents(SourceConfig("files", str(tmp_path / "a.jsonl")))) == ["one\ntwo", "three\u2028four"]
    (tmp_path / "b.txt").write_bytes("caf\u00e9\r\n".encode("utf-16"))
    assert list(documents(SourceConfig("files", str(tmp_path / "b.txt")))) == ["caf\u00e9\r\n"]
