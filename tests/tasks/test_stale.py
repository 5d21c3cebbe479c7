"""What a run computed from its start is used with that start alone: the reference of preferences, a frozen base, a tokenizer."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxlm.experiment.run as run_module
from jaxlm.experiment import Run, load_config
from jaxlm.hub import fingerprint_files, save_folder
from jaxlm.model import Model, TransformerConfig
from jaxlm.models import load_model

CONFIG = """
task: {{kind: preference}}
model: {{layers: 1, width: 16, heads: 2, positions: 32}}
data: {{length: 32, batch_size: 8, tokenizer: {{kind: bytes}}, train: {folder}/pairs.jsonl}}
train: {{steps: 2, eval_every: 2}}
runs: {folder}/runs
"""


class KilledError(Exception):
    pass


def write_pairs(folder, word: str) -> None:
    rows = [{"prompt": f"number {i}", "chosen": f"{word} {i}", "rejected": f"no {i}"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """The config file of a run that ended before its first checkpoint, after its reference had been computed."""

    def die(*_, **__):
        raise KilledError

    write_pairs(tmp_path, "yes")
    file = tmp_path / "dpo.yaml"
    file.write_text(CONFIG.format(folder=tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "fit", die)
        with pytest.raises(KilledError):
            Run(load_config(file, {}).value).train()
    assert (tmp_path / "runs/dpo/reference.npz").is_file()
    return file


def reference(folder) -> np.ndarray:
    return np.load(folder / "reference.npz")["train_chosen_B"]


def test_another_config_is_refused_also_before_the_first_checkpoint(killed):
    with pytest.raises(ValueError, match=r"another config \(seed 0 → 7\)"):
        Run(load_config(killed, {"seed": "7"}).value)
    Run(load_config(killed, {"train.steps": "3"}).value)


def test_the_reference_is_of_the_rows_that_are_learned(killed, tmp_path):
    """As many rows as before, and other words in them: the reference is computed anew."""
    before = reference(tmp_path / "runs/dpo")
    run = Run(load_config(killed, {}).value)
    run.job.prepare(lambda: pytest.fail("the same rows and the same model: nothing is computed"))
    write_pairs(tmp_path, "certainly")
    again, fresh = Run(load_config(killed, {}).value), Run(load_config(killed, {"name": "fresh"}).value)
    for one in (again, fresh):
        with jax.set_mesh(one.mesh):
            one.job.prepare(lambda one=one: one.job.model().init(jax.random.key(0)))
    np.testing.assert_array_equal(reference(tmp_path / "runs/dpo"), reference(tmp_path / "runs/fresh"))
    assert not np.allclose(reference(tmp_path / "runs/dpo"), before)


def save(folder, seed: int) -> None:
    from jaxlm.data import TokenizerConfig, train_tokenizer

    shutil.rmtree(folder, ignore_errors=True)
    model = Model(
        TransformerConfig(
            vocab_size=257, positions=32, layers=1, width=16, heads=2, position="rotary", norm="rmsnorm", bias=False,
            activation="swiglu", mlp_width=32, norm_position="pre",
        )
    )  # fmt: skip
    save_folder(folder, model, model.init(jax.random.key(seed)), like={"eos_token_id": 256, "bos_token_id": 256}, family="llama")
    train_tokenizer(TokenizerConfig(kind="bytes"), []).save(folder)


@pytest.mark.slow
def test_a_base_that_changed_is_refused(tmp_path, monkeypatch):
    """Adapters on a folder whose tensors are written over: neither does the run go on, nor is it read, nor is the reference
    of the first base taken for that of the second."""
    write_pairs(tmp_path, "yes")
    save(tmp_path / "base", 0)
    file = tmp_path / "lora.yaml"
    file.write_text(
        CONFIG.format(folder=tmp_path).replace("{layers: 1, width: 16, heads: 2, positions: 32}", f"{{init_from: {tmp_path}/base}}")
        + "tune: {train: null, lora: {rank: 2}}\n"
    )
    Run(load_config(file, {}).value).train()
    folder = tmp_path / "runs/lora"
    load_model(str(folder))
    before = Run(load_config(file, {}).value).job._reference_fingerprint()
    save(tmp_path / "base", 1)
    again = Run(load_config(file, {"train.steps": "4"}).value)
    with pytest.raises(ValueError, match="base has changed since"):
        again.train()
    with pytest.raises(ValueError, match="base has changed since"):
        load_model(str(folder))
    assert again.job._reference_fingerprint() != before
    save(tmp_path / "base", 0)
    assert Run(load_config(file, {"train.steps": "4"}).value).train() == "finished"


def test_a_fingerprint_is_of_names_sizes_and_contents(tmp_path):
    """Large files too: any of many numbers that changed by training is seen; copying changes nothing."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "small").write_bytes(b"small")
    large = rng.integers(0, 256, 3 << 20, np.uint8)
    for name in ("one", "two"):
        (tmp_path / name / "large").write_bytes(large.tobytes())

    def found(name: str) -> str:
        return fingerprint_files(tmp_path / name, (tmp_path / name).iterdir())

    assert found("one") == found("two")
    large[rng.integers(0, large.size, large.size // 10)] ^= 1
    (tmp_path / "two" / "large").write_bytes(large.tobytes())
    assert found("one") != found("two")
    (tmp_path / "two" / "large").write_bytes((tmp_path / "one" / "large").read_bytes())
    assert found("one") == found("two")
    (tmp_path / "two" / "small").rename(tmp_path / "two" / "other")
    assert found("one") != found("two")
