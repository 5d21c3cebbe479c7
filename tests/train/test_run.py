"""A whole run in its folder: resumed bit for bit, finished once, refused under another config, exhausted aloud."""

import contextlib
import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.experiment import ExperimentConfig, Run
from jaxlm.model import Model
from jaxlm.models import load_model, start_parameters
from jaxlm.parallel import ParallelConfig, make_mesh

TEXT = "\n\n".join(
    f"The {a} {b} sat on the {c}. It was {b}."
    for a in ("old", "new", "red")
    for b in ("cat", "dog", "owl", "fox")
    for c in ("mat", "log", "wall", "roof")
)
TIMES = ("tokens_per_second", "step_seconds", "data_wait_seconds", "model_flops_per_second", "mfu")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """`make(name, **flags)`: a config of a tiny run on a few documents, in a folder of its own."""
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in TEXT.split("\n\n")))

    def config(name: str, **flags: object) -> ExperimentConfig:
        settings: dict[str, object] = {
            "name": name, "runs": str(tmp_path / "runs"), "model.positions": 32, "model.layers": 2, "model.width": 16,
            "model.heads": 2, "model.dropout": 0.1, "data.tokenizer.kind": "bytes", "data.length": 32, "data.batch_size": 8,
            "data.layout": "packed", "data.holdout.fraction": 0.2, "data.sources.kind": "files",
            "data.sources.path": str(tmp_path / "text.jsonl"), "optim.warmup": 2, "train.steps": 10, "train.eval_every": 4,
            "train.log_every": 1, "train.sample_tokens": 5, "parallel.data": 2, "parallel.fsdp": 2, "parallel.tensor": 2,
            **{key.replace("__", "."): value for key, value in flags.items()},
        }  # fmt: skip
        text = {key: configs.Text("null" if value is None else str(value)) for key, value in settings.items()}
        return configs.load(ExperimentConfig, None, text).value

    return config


def rows(config: ExperimentConfig) -> list[dict]:
    """What was recorded, without what a clock measured."""
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def interrupt_after(monkeypatch, steps: int, looks: int = 0) -> None:
    """The next run is asked to stop after that many steps, as by a signal; it then looks `looks` times in vain."""
    from jaxlm.parallel import settle

    taken: list[int] = []
    asked: list[int] = []

    def counted(mesh, tree):
        taken.append(1)
        return settle(mesh, tree)

    def stop() -> bool:
        if len(taken) >= steps:
            asked.append(1)
        return len(asked) > looks

    @contextlib.contextmanager
    def interruptible():
        yield stop

    monkeypatch.setattr("jaxlm.train.loop.settle", counted)
    monkeypatch.setattr("jaxlm.train.loop.interruptible", interruptible)


@pytest.mark.parametrize(
    "stop, looks",
    [(4, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 0), (4, 0), (9, 0), (10, 0), (10, 2)))],
)
def test_resume_is_bit_equal(make, monkeypatch, stop, looks, capsys):
    """N steps are k + stop + N − k: data, dropout, schedule, metrics, samples and parameters.

    Steps 4 and 10 are evaluation steps, stopped before and within the evaluation: a run stopped at 4 used to
    lose it, and one stopped at the last step called itself finished without it.
    """
    whole = make("whole")
    assert Run(whole).train() == "finished"
    parted = make("parted")
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop, looks)
        assert Run(parted).train() == "interrupted"
    assert Run(parted).train() == "finished"
    assert f"resuming {parted.folder} at step {stop}" in capsys.readouterr().out
    assert rows(parted) == rows(whole)
    one, two = load_model(str(whole.folder)), load_model(str(parted.folder))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_rows_after_the_last_checkpoint_are_dropped(make):
    """A run killed without notice has recorded steps that it will take again: they must not stand twice."""
    config = make("killed", train__steps=6)
    Run(config).train()
    before = rows(config)
    (last,) = [p for p in (config.folder / "checkpoints").iterdir() if p.name == "6"]
    import shutil

    shutil.rmtree(last)  # as if it had died between the checkpoint of step 4 and the end
    with (config.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # and in the middle of a line
    assert Run(config).start == 4
    Run(config).train()
    assert rows(config) == before


def test_finished_then_raised(make):
    config = make("more", train__steps=4)
    Run(config).train()
    assert Run(config).finished
    further = Run(make("more", train__steps=6))
    assert not further.finished and further.train() == "finished"
    assert [row["step"] for row in rows(config) if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_another_config_in_the_folder_is_refused(make):
    Run(make("mine", train__steps=2)).train()
    with pytest.raises(ValueError, match=r"optim\.learning_rate 0\.001 → 0\.5.*--name"):
        Run(make("mine", train__steps=2, optim__learning_rate=0.5))
    file = make("mine", train__steps=2).folder / "config.yaml"  # as if of before these options: they had their defaults then
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not re.search("moments|zero1|offload:", line)))
    elsewhere = {"parallel__data": 8, "parallel__fsdp": 1, "parallel__tensor": 1, "optim__zero1": True, "optim__offload": True}
    assert Run(make("mine", train__steps=4, **elsewhere)).train() == "finished"


def test_a_run_begins_from_one_that_holds_fewer_bits(make):
    """All of its parameters, a head of its own among them."""
    first = make("narrow", train__steps=2, model__tie_embeddings=False, model__param_dtype="bfloat16")
    Run(first).train()
    found = load_model(str(first.folder))
    model = Model(dataclasses.replace(found.model.config, param_dtype="float32"))
    start = start_parameters(str(first.folder), model, make_mesh(ParallelConfig(data=1), jax.devices()[:1]), seed=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), start, found.params
    )


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"data__batch_size": 6}, ["data.batch_size 6", "4 device(s)", "multiple of 4", "such as 8"]),
        ({"train__accumulate": 4}, ["data.batch_size 8", "4 part(s)", "multiple of 16"]),
        ({"model__heads": 1}, ["parallel.tensor 2", "model.heads 1", "parallel.tensor may be 1"]),
        ({"model__vocab_size": 100}, ["the model 100", "257"]),
    ],
)
def test_what_the_mesh_or_the_tokenizer_does_not_allow(make, flags, parts):
    with pytest.raises(ValueError) as caught:
        Run(make("wrong", **flags)).train()
    for part in parts:
        assert part in str(caught.value)


def test_restore_onto_another_mesh_goes_on_with_the_same_numbers(make, monkeypatch):
    same = make("same")
    Run(same).train()
    moved = make("moved")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        Run(moved).train()
    Run(make("moved", parallel__data=1, parallel__fsdp=4, parallel__tensor=2)).train()
    losses = [[row["loss"] for row in rows(config) if row["kind"] == "train"] for config in (same, moved)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_exhausted_data_says_so(make, capsys):
    """The schedule ends with the data: the last rate is the final one."""
    config = make("short", data__epochs=1, train__steps=500, optim__schedule="linear", optim__final=0.25)
    assert Run(config).train() == "exhausted"
    out = capsys.readouterr().out
    assert "the data is exhausted after 1 epoch(s)" in out and "--data.epochs" in out
    assert 0 < rows(config)[-1]["step"] < 500
    last = [row for row in rows(config) if row["kind"] == "train"][-1]
    assert last["learning_rate"] == pytest.approx(0.25 * config.optim.learning_rate)


def test_the_folder_holds_what_it_should(make):
    config = make("whole", train__steps=4, train__eval_every=2)
    Run(config).train()
    there = {path.name for path in config.folder.iterdir()}
    assert there == {
        "config.yaml",
        "task.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "samples.md",
        "curves.png",
        "report.html",
        "tokenizer",
    }
    assert configs.load(ExperimentConfig, config.folder / "config.yaml").value == config
    assert (config.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (config.folder / "report.html").read_text()
    assert "xz -9" in page and "jaxlm generate" in page and "data:image/png;base64" in page
    assert "## Step 2" in (config.folder / "samples.md").read_text()
    evals = [row for row in rows(config) if row["kind"] == "eval"]
    assert [row["step"] for row in evals] == [2, 4] and all(0 < row["bits_per_byte"] < 9 for row in evals)


def test_keeps_the_newest_and_the_best(make):
    config = make("kept", train__steps=8, train__eval_every=2, train__keep=1)
    run = Run(config)
    run.train()
    scores = {row["step"]: row["loss"] for row in rows(config) if row["kind"] == "eval"}
    kept = {int(path.name) for path in (config.folder / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {8, min(scores, key=scores.get)}


@pytest.mark.parametrize("layout", ["windows", pytest.param("packed", marks=pytest.mark.slow)])
def test_bits_per_byte_do_not_depend_on_batch_or_padding(make, layout):
    """The same parameters score the same however the held-out text is batched; by hand too, token by token."""
    scores = []
    for rows_a_batch in (8, 16, 64):
        still = {"train__steps": 1, "train__sample_tokens": 0, "optim__learning_rate": 1e-12}
        config = make(f"b{rows_a_batch}", data__layout=layout, data__batch_size=rows_a_batch, **still)
        Run(config).train()
        scores += [row["bits_per_byte"] for row in rows(config) if row["kind"] == "eval"]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)


def test_bits_per_byte_by_hand(make):
    """Each held-out document alone through the model, its surprisal summed in bits, over its bytes."""
    config = make("hand", train__steps=2)
    run = Run(config)
    run.train()
    trained = load_model(str(config.folder))
    bits, size = 0.0, 0
    for text in run.job.corpora.heldout[0].texts():
        ids = np.concatenate([trained.tokenizer.encode(text), [trained.tokenizer.eos_id]])[None].astype(np.int32)
        for start in range(0, ids.shape[1], 32):  # longer documents are cut where the rows are
            targets = ids[:, start : start + 32]
            before = ids[:, start - 1 : start] if start else np.array([[trained.tokenizer.bos_id]], np.int32)
            inputs = np.concatenate([before, targets[:, :-1]], axis=1)
            logits, _ = trained.model.apply(trained.params, {"tokens_BL": inputs})
            log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))[0]
            bits -= log_p[np.arange(targets.shape[1]), targets[0]].sum() / np.log(2)
        size += len(text.encode())
    recorded = [row["bits_per_byte"] for row in rows(config) if row["kind"] == "eval"][-1]
    assert bits / size == pytest.approx(recorded, rel=1e-4)
