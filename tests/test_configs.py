"""Every config starts: its header's command takes two steps on made-up data of the same form, and leaves a model to use."""

import json
import pathlib
import runpy
import shlex
import shutil

import jax
import pytest
from made_up import json_lines, write_data, write_documents

from jaxlm import cli
from jaxlm import config as configs
from jaxlm.data import DataConfig, read_rows
from jaxlm.parallel import make_mesh
from jaxlm.tasks import TASKS, TaskConfig
from jaxlm.tasks.comparing import answers

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = {file.stem: file for file in sorted((ROOT / "configs").glob("*.yaml"))}
BERT = "sentence-transformers/all-MiniLM-L6-v2"
TREES = {name: configs.read_yaml(file)[0] for name, file in CONFIGS.items()}
KIND = {name: tree.get("task", {}).get("kind", "causal") for name, tree in TREES.items()}
ROWS = [name for name in CONFIGS if KIND[name] in TASKS]
# Of several configs of one task and one kind of model these are tried in any case, the rest with the slow tests.
MORE = ["finetune-agnews", "finetune-banking77", "finetune-cola", "finetune-stdlib", "pretrain-fim"]

SMALL = ["--model.width", "32", "--model.layers", "1", "--model.heads", "2", "--model.mlp-width", "64"]
TEXT = ["--data.sources.kind", "files", "--data.sources.path", "documents.jsonl", "--data.length", "32", "--data.batch-size", "4"]


def command(name: str) -> str:
    """The command of a config's header."""
    (line,) = [line for line in CONFIGS[name].read_text(encoding="utf8").splitlines() if line.startswith("# command:")]
    return line.removeprefix("# command:").strip()


def shortened(name: str) -> list[str]:
    """Flags that cut a run down: two steps, and small where its config gives the sizes and the tokenizer."""
    tree = TREES[name]
    flags = ["--train.steps", "2", "--train.eval-every", "2"]
    if KIND[name] == "causal":
        flags += ["--train.sample-tokens", "4"]
    if KIND[name] in ("text_to_text", "chat"):
        flags += ["--task.decode.max-tokens", "4"]
    if "init_from" not in tree["model"]:
        flags += SMALL
    if str(tree["model"].get("preset")).startswith("llama"):
        flags += ["--model.kv-heads", "2"]
    if tree["data"].get("tokenizer", {}).get("kind") == "bpe":
        flags += ["--data.tokenizer.vocab-size", "300"]
    if KIND[name] not in TASKS and "JAXLM_DATA" not in CONFIGS[name].read_text(encoding="utf8"):
        flags += TEXT
    return flags


def train(words: str, *flags: str) -> None:
    """`python train.py …` as typed at the root of a clone."""
    python, script, *rest = shlex.split(words)
    assert (python, script) == ("python", "train.py")
    assert cli.main(["train", *(rest or ["configs/tiny.yaml"]), *flags]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a clone's, with made-up data, a small decoder in runs/tiny and a small BERT where the hub's is named."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAXLM_DATA", str(write_data(folder / "data")))
        patch.setenv("JAXLM_CACHE", str(folder / "cache"))
        patch.setattr("jaxlm.experiment.run.make_mesh", lambda parallel: make_mesh(parallel, jax.devices()[:1]))
        write_documents(folder / "documents.jsonl")
        prepare(patch)
        train(command("tiny"), *shortened("tiny"), "--data.length", "128")
        train(command("pretrain-masked"), *shortened("pretrain-masked"), "--name", "bert", "--model.positions", "512")
        assert cli.main(["export", "runs/bert", BERT]) == 0
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as in a user's process
            yield folder


def prepare(patch) -> None:
    """`python benchmarks/prepare.py`: what is in $JAXLM_DATA as rows in runs/data."""
    patch.setattr("sys.argv", ["prepare.py"])
    runpy.run_path(str(ROOT / "benchmarks" / "prepare.py"), run_name="__main__")


def read(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]


def given(name: str, rows: list[dict]) -> list[dict]:
    """The rows as one has them who does not know the answer."""
    if KIND[name] == "reward":
        return [{"text": row["chosen"]} for row in rows]
    if KIND[name] == "preference":
        return [dict(zip(("prompt", "chosen", "rejected"), answers(row), strict=True)) for row in rows]
    unknown = {"label", "labels", "tags", "target", "answers", "group", "id", "prediction"}
    return [{role: value for role, value in row.items() if role not in unknown} for row in rows]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in MORE else ()) for name in CONFIGS])
def test_a_config_starts(name, place, capsys):
    run = place / "runs" / name
    if not run.exists():  # as runs/tiny does
        train(command(name), *shortened(name))
    assert [row["step"] for row in read(run / "metrics.jsonl") if row["kind"] == "eval"] == [2]
    assert (run / "config.yaml").is_file() and (run / "report.html").is_file() and (run / "curves.png").is_file()
    assert "error" not in capsys.readouterr().err
    if name not in ROWS:
        return
    assert (run / "scores.html").is_file()
    rows = given(name, read(run / "predictions.jsonl")[:3])
    file = place / f"{name}.jsonl"
    file.write_text(json_lines(rows), encoding="utf8")
    assert cli.main(["predict", f"runs/{name}", "--file", str(file), "--out", f"{name}-out.jsonl"]) == 0
    made = read(place / f"{name}-out.jsonl")
    assert len(made) == len(rows) and all(row["prediction"] for row in made)
    assert cli.main(["evaluate", f"runs/{name}"]) == 0
    assert (run / "evaluation" / "scores.html").is_file()


def test_each_kind_of_task_has_a_config_that_is_always_tried():
    tried = {KIND[name] for name in CONFIGS if name not in MORE}
    assert tried == set(KIND.values()) and set(TASKS) <= tried


def test_a_text_is_no_longer_than_the_model_that_a_config_starts_from():
    """all-MiniLM-L6-v2 has 512 positions, runs/tiny those of its config."""
    positions = {BERT: 512, "runs/tiny": TREES["tiny"]["model"]["positions"]}
    for name, tree in TREES.items():
        source = tree["model"].get("init_from")
        assert source is None or tree["data"]["length"] <= positions[source], name


@pytest.mark.realdata
@pytest.mark.parametrize("name", ROWS)
def test_the_real_rows_are_read(name, data, tmp_path, monkeypatch):
    """All of them: the notes on the sets know of none that could not be used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLM_DATA", str(data))
    if "runs/data" in CONFIGS[name].read_text(encoding="utf8"):
        prepare(monkeypatch)
    tree = TREES[name]
    task, own = configs.build(TaskConfig, tree["task"]), configs.build(DataConfig, tree["data"])
    roles = TASKS[task.kind].roles(task, tree["model"].get("architecture", "decoder"))
    for path in filter(None, (own.train, own.validation)):
        found = read_rows(path, own.rows, *roles)
        assert not found.bad and len(found.rows) >= 500, found.summary()
        assert all(role in row for row in found.rows for role in roles[0]), found.summary()
