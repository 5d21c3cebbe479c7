"""YAML + overrides → dataclasses: right values, their origins, and one line for every mistake."""

import ast
import dataclasses
import json
import pathlib
from typing import ClassVar, Literal

import pytest

import jaxlm
from jaxlm import config as configs
from jaxlm.config import Text
from jaxlm.data import ColumnsConfig
from jaxlm.experiment import ExperimentConfig, load_config
from jaxlm.model import TransformerConfig
from jaxlm.verbs import OPTIONS


@dataclasses.dataclass(frozen=True)
class Inner:
    PRESETS: ClassVar = {"big": {"size": 9, "name": "huge"}}
    preset: str | None = None
    size: int = 1
    name: str | None = None
    kind: Literal["red", "blue"] = "red"


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float = 0.1
    flag: bool = False
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()


def build(text: str, tmp_path, *flags: str) -> configs.Loaded:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    return configs.load(Outer, file, configs.parse_flags(flags))


def test_file_under_flags_under_presets(tmp_path):
    loaded = build("rate: 3e-4\ninner:\n  preset: big\n  size: 5\n", tmp_path, "--inner.kind", "blue", "--flag")
    assert loaded.value == Outer(3e-4, True, Inner("big", 5, "huge", "blue"))
    file = tmp_path / "x.yaml"
    assert loaded.origins == {
        "rate": f"{file}:1", "flag": "--flag", "inner.preset": f"{file}:3", "inner.size": f"{file}:4",
        "inner.name": "preset big", "inner.kind": "--inner.kind", "parts": "default",
    }  # fmt: skip


def test_lists_of_sections(tmp_path):
    assert build("parts: {size: 2}", tmp_path).value.parts == (Inner(size=2),)
    loaded = build("parts: [{size: 2}, {size: 3}]", tmp_path, "--parts.1.size", "4")
    assert [part.size for part in loaded.value.parts] == [2, 4]
    assert build("", tmp_path, "--parts", "[{size: 7}]").value.parts == (Inner(size=7),)
    assert build("", tmp_path, "--parts.size", "7").value.parts == (Inner(size=7),)


@pytest.mark.parametrize(
    "flags, value",
    [
        (["--inner.size", "1e3"], 1000),
        (["--inner.size=12"], 12),
        (["--inner.size", "-3"], -3),
        (["--inner.name", "007"], "007"),
        (["--inner.name", "null"], None),
        (["--rate", "3e-4"], 3e-4),
        (["--rate", "2"], 2.0),
        (["--flag", "false"], False),
        (["--inner.preset", "null"], None),
    ],
)
def test_flag_values(tmp_path, flags, value):
    loaded = build("inner: {name: x}\nflag: true", tmp_path, *flags).value
    leaf = flags[0].split("=")[0][2:]
    found = configs.flatten(configs.to_dict(loaded))[leaf]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, flags, parts",
    [
        ("inner: {siez: 3}", [], ["inner.siez", "x.yaml:1", "did you mean 'inner.size'", "allowed"]),
        ("", ["--inner.siez", "3"], ["--inner.siez", "did you mean '--inner.size'"]),
        ("", ["--size", "3"], ["did you mean '--inner.size'"]),
        ("inner: {size: three}", [], ["inner.size", "'three'", "x.yaml:1", "whole number"]),
        ("", ["--inner.size", "1.5"], ["inner.size", "1.5", "whole number"]),
        ("", ["--flag", "maybe"], ["flag", "maybe", "true or false"]),
        ("inner: {size: true}", [], ["inner.size", "whole number"]),
        ("inner: {kind: bleu}", [], ["inner.kind", "bleu", "did you mean 'blue'", "red"]),
        ("inner: {preset: bog}", [], ["inner.preset", "bog", "did you mean 'big'"]),
        ("inner: 3", [], ["inner", "3", "section"]),
        ("rate: [1", [], ["not valid YAML"]),
        ("rate: 1\nrate: 2", [], ["rate", "twice"]),
        ("", ["rate", "3"], ["'rate'", "--section.option"]),
        ("parts: [{size: 1}]", ["--parts.3.size", "4"], ["'3'", "index"]),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, text, flags, parts):
    with pytest.raises(ValueError) as caught:
        build(text, tmp_path, *flags)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "tiny.yaml").touch()
    with pytest.raises(ValueError, match=r"tinny\.yaml.*did you mean.*tiny\.yaml"):
        configs.load(Outer, tmp_path / "tinny.yaml")


def test_dump_reads_back_equal(tmp_path):
    file = tmp_path / "run.yaml"
    flags = {"model.preset": Text("gpt2-small"), "model.layers": Text("3"), "data.sources": Text("[{kind: files, path: a}]")}
    file.write_text("")
    first = configs.load(ExperimentConfig, file, flags).value
    file.write_text(configs.dump(first))
    assert configs.load(ExperimentConfig, file).value == first
    assert (first.model.layers, first.model.width) == (3, 768)


def test_diff_names_what_differs():
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": [4]}
    assert configs.diff(old, new) == {"a.c": (2, 3), "d.0": (None, 4)}


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"model.width": "100", "model.heads": "6"}, ["heads 6", "width 100", "5"]),
        ({"model.kv_heads": "4"}, ["kv_heads 4", "heads 6", "1, 2, 3, 6"]),
        ({"data.length": "4096"}, ["data.length 4096", "model.positions"]),
        ({"model.dropout": "1.5"}, ["dropout", "1.5"]),
        ({"optim.decay": "("}, ["decay", "regular expression"]),
        ({"train.steps": "0"}, ["steps is 0"]),
        ({"parallel.data": "-2"}, ["mesh sizes"]),
        ({"name": "a/b"}, ["a/b"]),
    ],
)
def test_impossible_combinations(tmp_path, flags, parts):
    (tmp_path / "x.yaml").touch()
    with pytest.raises(ValueError) as caught:
        load_config(tmp_path / "x.yaml", {name: Text(value) for name, value in flags.items()})
    for part in parts:
        assert part in str(caught.value)


def test_name_defaults_to_the_file(tmp_path):
    (tmp_path / "mine.yaml").touch()
    assert load_config(tmp_path / "mine.yaml", {}).value.name == "mine"
    assert load_config(tmp_path / "mine.yaml", {"name": Text("other")}).value.name == "other"


@pytest.mark.parametrize("name", TransformerConfig.PRESETS)
def test_presets_are_valid_and_complete(name):
    config = configs.build(TransformerConfig, {"preset": name})
    assert config.preset == name and (config.head_width or config.H * config.heads == config.width)


def read_attributes() -> set[str]:
    """Names that some function of the package reads as attributes, validation of the configs apart."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        for child in ast.iter_child_nodes(node):
            walk(child)

    for file in pathlib.Path(jaxlm.__file__).parent.rglob("*.py"):
        walk(ast.parse(file.read_text(encoding="utf8")))
    return found


def test_no_dead_options():
    # A preset is read by its key, in config.py; the columns by the name of their role, in data/rows.py.
    read = read_attributes() | {"preset"} | set(configs.fields_of(ColumnsConfig))
    for root in (ExperimentConfig, *OPTIONS.values()):
        for path, section in configs.sections_of(root):
            for name in configs.fields_of(section):
                assert name in read, f"nothing reads {configs.join(path, name)}"


def test_every_option_is_documented():
    for root in (ExperimentConfig, *OPTIONS.values()):
        undocumented = [name for name, _, _, text in configs.describe(root) if not text]
        assert not undocumented


# --- names from elsewhere ---------------------------------------------------------------------


def test_options_of_other_libraries_are_suggested_by_their_sense():
    """The field's usual spellings, of which ours are no near relatives; each of our options in the table exists somewhere."""
    from jaxlm.spellings import _ADVICE, _NAMES

    def told(name: str, cls: type) -> str:
        with pytest.raises(ValueError, match="unknown option") as caught:
            configs.load(cls, None, configs.parse_flags([f"--{name}", "1"]))
        return str(caught.value)

    for name, ours in {
        "lr": "--optim.learning-rate", "epochs": "--data.epochs", "num-train-epochs": "--data.epochs", "max-iters": "--train.steps",
        "fp16": "--model.dtype bfloat16", "bf16": "--model.dtype bfloat16", "batch-size": "--data.batch-size",
        "steps": "--train.steps",
        "per-device-train-batch-size": "--data.batch-size", "max-length": "--data.length", "block-size": "--data.length",
        "output-dir": "--runs", "out-dir": "--runs", "gpus": "--parallel.data", "n-embd": "--model.width",
        "n_layer": "--model.layers",
        "gradient-accumulation-steps": "--train.accumulate", "optim.lr": "--optim.learning-rate", "data-seed": "--seed",
        "model-name-or-path": "--model.init-from", "eval-interval": "--train.eval-every", "warmup-ratio": "--optim.warmup",
    }.items():  # fmt: skip
        assert f"did you mean '{ours}'?" in told(name, ExperimentConfig), name
    assert "JAX_PLATFORMS" in told("device", ExperimentConfig) and "did you mean" not in told("device", ExperimentConfig)
    for verb, name, ours in (
        ("predict", "max-length", "--length"), ("predict", "output-dir", "--out"), ("predict", "bf16", "--dtype bfloat16"),
        ("generate", "max-new-tokens", "--max-tokens"), ("generate", "num-beams", "--beams"),
        ("generate", "gpus", "--parallel.data"),
        ("serve", "max-model-len", "--context"), ("serve", "tensor-parallel-size", "--parallel.tensor"),
        ("chat", "temp", "--temperature"),
    ):  # fmt: skip
        assert f"did you mean '{ours}'?" in told(name, OPTIONS[verb]), (verb, name)

    there = {leaf for cls in (ExperimentConfig, *OPTIONS.values()) for leaf in configs.leaves_of(cls)}
    named = {option.partition("=")[0] for options in _NAMES for option in options.split()}
    assert named <= there, "the table suggests what does not exist"
    words = [name for names in (*_NAMES.values(), *_ADVICE.values()) for name in names.split()]
    assert len(words) == len(set(words)), "one name has two meanings"


def test_a_mistyped_option_is_told_before_a_model_is_looked_for(monkeypatch, tmp_path):
    """In flags and in files, at any depth, for training and for `jaxlm config`; nothing is located, so nothing is fetched."""
    from jaxlm import cli, models
    from jaxlm.experiment import config as experiment

    def located(*_, **__):
        raise AssertionError("a model was looked for")

    for module in (models, experiment):
        monkeypatch.setattr(module, "locate", located)
    (tmp_path / "good.yaml").write_text("model: {init_from: some/model}\n")
    (tmp_path / "bad.yaml").write_text("model: {init_from: some/model}\ndata: {rows: {columns: {txt: a}}}\n")
    for words in (
        ["train", "good.yaml", "--lr", "1"], ["config", "good.yaml", "--data.lenght", "1"], ["train", "bad.yaml"],
        ["predict", "some/model", "--batch", "1"], ["evaluate", "some/model", "--lr", "1"], ["generate", "some/model", "--lr", "1"],
        ["chat", "some/model", "--lr", "1"], ["serve", "some/model", "--lr", "1"], ["export", "some/model", "d", "--lr", "1"],
        ["show", "some/model", "--lr", "1"], ["diff", "some/model", "some/model", "--lr", "1"],
    ):  # fmt: skip
        monkeypatch.chdir(tmp_path)
        assert cli.main(words) == 1, words


def test_a_config_is_printed_without_the_model_that_it_starts_from(tmp_path, monkeypatch, capsys):
    """What the file, the flags and the defaults say, each with its origin, and one note of what could not be known."""
    from jaxlm import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "task: {kind: classification}\nmodel: {init_from: runs/gone, dropout: 0.1}\ndata: {train: a.tsv, length: 64}\n"
    )
    assert cli.main(["config", "mine.yaml", "--optim.learning-rate", "3e-4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split(":")[0]: line for line in lines if not line.startswith("#")}
    assert shown["model.init_from"].split() == ["model.init_from:", "runs/gone", "#", "mine.yaml:2"]
    assert "0.0003" in shown["optim.learning_rate"] and shown["optim.learning_rate"].endswith("# --optim.learning-rate")
    assert shown["name"].endswith("# the file's name") and shown["data.epochs"].endswith("# default")
    assert "model.width" not in shown and "data.tokenizer.kind" not in shown, "these follow from the model"
    assert [line for line in lines if "runs/gone" in line and "no model at" in line], "it says what is missing"
    assert cli.main(["config", "mine.yaml", "--optim.learning-rate", "high"]) == 1, "mistakes are still told"
    assert cli.main(["train", "mine.yaml"]) == 1 and "no model at 'runs/gone'" in capsys.readouterr().err
    for command in ("config", "train"):  # what nothing would read is told before the model is fetched
        assert cli.main([command, "mine.yaml", "--data.rows.under", "x"]) == 1
        assert "data.rows.under x would do nothing here: it is read from .json files only" in capsys.readouterr().err
    assert cli.main(["config", "mine.yaml", "--task.kind", "regression", "--task.labels", "a,b"]) == 1


def test_a_config_that_is_made_in_python_is_checked_as_one_from_a_file(tmp_path, monkeypatch):
    from jaxlm.experiment import Run

    monkeypatch.chdir(tmp_path)
    config = configs.build(ExperimentConfig, {"optim": {"name": "adafactor", "beta1": 0.5}})
    with pytest.raises(ValueError, match=r"optim.beta1 0.5 would do nothing here"):
        Run(config)
    assert not list(tmp_path.iterdir())


def rows_of(folder, **data):
    """What a run over such rows is told of its options, or None."""
    (folder / "rows.yaml").write_text(json.dumps({"task": {"kind": "classification"}, "data": data}))
    try:
        load_config(folder / "rows.yaml", {"model.architecture": configs.Text("encoder")})
    except ValueError as error:
        return str(error)
    return None


def test_how_rows_are_read_hangs_on_all_their_files(tmp_path):
    assert rows_of(tmp_path, train="a.parquet", validation="b.tsv", rows={"header": ["text", "label"]}) is None
    assert "data.rows.header text,label" in rows_of(tmp_path, train="a.parquet", rows={"header": ["text", "label"]})
    assert "data.rows.separator ;" in rows_of(tmp_path, train="a.{text,label}.txt", rows={"separator": ";"})
    assert rows_of(tmp_path, train="a.{text,label}.txt", rows={"encoding": "latin-1"}) is None
    told = rows_of(tmp_path, train="a.csv", validation="b.csv", holdout={"fraction": 0.2})
    assert "it is read with data.validation null only" in told


@pytest.mark.parametrize(
    "task, read",
    [
        ({}, True), ({"scores": "translation", "template": "{question}"}, True), ({"scores": "summarisation"}, False),
        ({"scores": "answers"}, False), ({"template": "{question} {context}"}, False),
    ],
)  # fmt: skip
def test_a_tokenizer_of_bleu_without_bleu_is_refused(tmp_path, task, read):
    task = {"kind": "text_to_text", "tokenize": "zh", **task}
    (tmp_path / "x.yaml").write_text(json.dumps({"task": task, "data": {"train": "a.jsonl"}}))
    if read:
        assert load_config(tmp_path / "x.yaml", {}).value.task.tokenize == "zh"
    else:
        with pytest.raises(ValueError, match=r"task\.tokenize zh .* would do nothing here"):
            load_config(tmp_path / "x.yaml", {})
