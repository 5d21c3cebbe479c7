"""The verbs as a person meets them: one line for a mistake, the right exit code, text that repeats."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxlm import cli

SMALL = [
    "--model.kv-heads", "null", "--model.mlp-width", 64,
    "--model.layers", 1, "--model.width", 32, "--model.heads", 2, "--data.tokenizer.kind", "bytes",
    "--train.steps", 4, "--train.eval-every", 2, "--train.sample-tokens", 4,
]  # fmt: skip


@pytest.mark.parametrize(
    "words, parts",
    [
        (["train", "--optim.learning_rat", "1"], ["--optim.learning-rate"]),
        (["train", "configs/tinny.yaml"], ["no config file"]),
        (["trian"], ["unknown verb 'trian'", "did you mean 'train'"]),
        (["generate"], ["MODEL"]),
        (["generate", "nowhere"], ["no model at 'nowhere'", "train.py"]),
        (["generate", "nowhere", "--promt", "x"], ["--promt", "did you mean '--prompt'"]),
        (["generate", "nowhere", "--top-p", "7"], ["top_p is 7"]),
        (["generate", "nowhere", "--min-p", "7"], ["min_p is 7"]),
        (["generate", "nowhere", "--draft", "a", "--lookup", "3"], ["draft and lookup are both given"]),
        (["generate", "nowhere", "--lookup", "0"], ["lookup is 0"]),
        (["generate", "nowhere", "--draft-tokens", "4"], ["draft_tokens 4", "with draft only"]),
        (["generate", "nowhere", "--penalty-alpha", "0.6"], ["penalty_alpha needs top_k"]),
        (["generate", "nowhere", "--penalty-alpha", "2", "--top-k", "4"], ["penalty_alpha is 2", "from 0 to 1"]),
        (["generate", "x", "--penalty-alpha", "1", "--top-k", "4", "--seed", "1", "--top-p", "0.5"], ["leave off top_p, seed"]),
        (["generate", "nowhere", "--lookup", "3", "--regex", "a"], ["guess several tokens at once"]),
        (["generate", "nowhere", "--json-schema", "none.json"], ["json_schema 'none.json' cannot be read"]),
        (["config", "--data.sources.kind", "file"], ["'file'", "did you mean 'files'"]),
        (["config", "--data.length", "100000"], ["data.length 100000", "model.positions"]),
        (["config", "--model.preset", "bert-tiny"], ["encoder with head masked_lm", "task causal needs decoder"]),
        (["show", "lama-8b"], ["no model at 'lama-8b'", "Hugging Face folder"]),
        (["show", "llama-1m"], ["--vocab-size"]),
        (["show", "bert-base", "--length", "0"], ["length is 0"]),
        (["export", "somewhere"], ["DIR is missing", "MODEL and DIR"]),
        (["export", "nowhere", "there", "--dtype", "float8"], ["float8", "bfloat16"]),
        (["export", "a", "b", "--adapter", "true", "--license", "mit"], ["license would do nothing", "without adapter"]),
        (["export", "a", "b", "--adapter", "true", "--parallel.fsdp", "2"], ["parallel would do nothing"]),
        (["diff", "one"], ["MODEL B is missing"]),
        (["diff", "one", "two", "--file", "none.txt"], ["no file 'none.txt'"]),
    ],
)
def test_mistakes_are_one_line_and_exit_1(words, parts, capsys, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("error: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("config nothere.yaml", "no config file 'nothere.yaml': there are: broken.yaml"),  # it suggested broken.yaml
        ("config brokn.yaml", "did you mean 'broken.yaml'? there are: broken.yaml"),
        ("train runs/a", "runs/a is the folder of a run: its config file is runs/a/config.yaml"),
        ("config --train.metric acc", "unknown metric 'acc': did you mean 'accuracy'?"),  # it was mcc, the nearest by spelling
        ("predict runs --text x", "(a run; it holds runs/a)"),
        ("predict runs/a --text x", "runs/a has no checkpoint yet: train it first with: jaxlm train runs/a/config.yaml"),
        ("predict runs/a --file rows.csv --out none/p.jsonl", "there is no folder 'none'"),  # it was told after all the work
        ("predict runs/a --file rows.csv --out runs", "out 'runs' is a folder: name a file in it"),
        ("evaluate runs/a --data rows.csv --out rows.csv", "out 'rows.csv' is a file: name a folder"),
    ],
)
def test_wrong_folders_and_files_are_told_before_any_work(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/config.yaml").write_text(
        "task: {kind: classification}\nmodel: {architecture: encoder, vocab_size: 300, head: {kind: sequence, labels: 2}}\n"
    )
    (tmp_path / "broken.yaml").write_text("task: {kind: classification\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.yaml").touch()
    (tmp_path / "rows.csv").write_text("text,label\n")
    there = sorted(tmp_path.rglob("*"))
    assert cli.main(words.split()) == 1
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there, "a refused command leaves nothing behind"


def test_help_lists_the_verbs_and_their_options(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"jaxlm {verb}" in out for verb in cli.VERBS)
    assert cli.main(["train", "--help"]) == 0
    assert "--optim.learning-rate float (default 0.001)" in capsys.readouterr().out
    assert cli.main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--max-tokens int | None (default null)" in out and "empty: the model's own setting, else 200" in out
    assert "--dtype auto|float32|bfloat16 | None" in out


def test_help_imports_nothing_heavy():
    code = "import sys; from jaxlm.cli import main; main(['--help']); print([m for m in ('jax', 'flax') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")


def test_config_prints_values_and_origins(capsys, tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("model: {preset: llama-1m}\ntrain: {steps: 7}\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "a.yaml", "--optim.learning-rate", "3e-4"]) == 0
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "0.0003" in lines["optim.learning_rate"] and lines["optim.learning_rate"].endswith("# --optim.learning-rate")
    assert lines["train.steps"].endswith("# a.yaml:2") and lines["model.layers"].endswith("# preset llama-1m")
    assert lines["seed"].endswith("# default") and lines["name"].startswith("name: a ")


def test_internal_errors_exit_2_with_the_traceback(monkeypatch, capsys):
    def broken(words):
        raise RuntimeError("wires crossed")

    monkeypatch.setitem(cli.VERBS, "config", broken)
    assert cli.main(["config"]) == 2
    message = capsys.readouterr().err
    assert "wires crossed" in message and "Traceback" in message and "fault of jaxlm" in message


def test_show_counts_published_models(capsys):
    assert cli.main(["show", "bert-base"]) == 0
    out = capsys.readouterr().out
    assert "109,514,298" in out and "30522 × 768  (V W)" in out and "(layers D N H)" in out
    assert cli.main(["show", "llama-8b", "--length", "4096"]) == 0
    out = capsys.readouterr().out
    # 8,192 bytes of keys and values a layer and token in bfloat16: 2 · 8 heads · 128 · 2 bytes · 2, over 32 layers.
    assert "8,030,261,248" in out and "512.0 MiB of cache" in out


@pytest.mark.slow
@pytest.mark.parity
def test_a_trained_model_goes_to_transformers_and_writes_the_same(command, tmp_path):
    """export → show → diff; AutoModelForCausalLM and AutoTokenizer continue a prompt greedily as we do, from either folder."""
    import transformers

    assert command("train.py", *SMALL, "--train.steps", 30).returncode == 0
    for words in (("export", "runs/tiny", "out"), ("show", "runs/tiny"), ("show", "out")):
        done = command(*words)
        assert done.returncode == 0, done.stderr
    same = command("diff", "runs/tiny", "out", "--tokens", 200, "--tolerance", 1e-5)
    assert same.returncode == 0 and "100.00%" in same.stdout, same.stderr
    half = command("export", "runs/tiny", "half", "--dtype", "bfloat16")
    assert half.returncode == 0
    differs = command("diff", "out", "half", "--tolerance", 1e-7)
    assert differs.returncode == 1 and "more than the tolerance" in differs.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = "The statement"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.new_full((1, 1), model.config.bos_token_id)  # as `jaxlm generate` begins a text
    import torch

    theirs = model.generate(torch.cat([start, ids], dim=1), max_new_tokens=40, do_sample=False)
    expected = tokenizer.decode(theirs[0, 1:], skip_special_tokens=True)
    for folder in ("runs/tiny", "out"):
        ours = command("generate", folder, "--prompt", prompt, "--max-tokens", 40, "--temperature", 0)
        assert ours.stdout.removesuffix("\n") == expected


@pytest.mark.slow
def test_a_run_from_start_to_text(command, tmp_path):
    """train → finished → raised → generate twice with a seed, each as a process of its own."""
    done = command("train.py", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "held-out bits per byte" in done.stdout and "jaxlm generate runs/tiny" in done.stdout
    again = command("train.py", *SMALL)
    assert again.returncode == 0 and "is finished" in again.stdout and "--train.steps 8" in again.stdout
    more = command("train.py", *SMALL, "--train.steps", 6)
    assert more.returncode == 0 and "resuming" in more.stdout
    one, two, other = (
        command("generate", "runs/tiny", "--prompt", "The", "--max-tokens", 20, "--temperature", 1, "--seed", seed)
        for seed in (1, 1, 2)
    )
    assert one.returncode == 0 and one.stdout.startswith("The") and len(one.stdout) > 5
    assert one.stdout == two.stdout != other.stdout
    greedy = ("generate", "runs/tiny", "--prompt", "The", "--max-tokens", 20, "--temperature", 0)
    plain, drafted, looked_up = (command(*greedy, *more) for more in ((), ("--draft", "runs/tiny"), ("--lookup", 3)))
    assert plain.returncode == 0 and plain.stdout == drafted.stdout == looked_up.stdout
    assert re.search(r"(\d+) of \1 guessed tokens were taken", drafted.stderr), "a model takes all of its own guesses"
    contrast = ("generate", "runs/tiny", "--prompt", "The", "--max-tokens", 20, "--top-k", 4, "--penalty-alpha")
    contrasted, likeliest = (command(*contrast, alpha) for alpha in (0.9, 0))
    assert contrasted.returncode == 0 and contrasted.stdout.startswith("The"), contrasted.stderr
    assert plain.stdout == likeliest.stdout != contrasted.stdout
    matched = command("generate", "runs/tiny", "--max-tokens", 20, "--regex", "[ab]{3}-[0-9]")
    assert re.fullmatch(r"[ab]{3}-[0-9]\n", matched.stdout), matched.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_ends_with_the_numbers_of_one_left_alone(command, tmp_path, number):
    """A signal in the middle, then the same command: every recorded number is the same, bit for bit."""
    import os
    import pathlib

    words = [*SMALL, "--train.steps", 60, "--train.eval-every", 10, "--train.log-every", 1]
    assert command("train.py", *words, "--name", "whole").returncode == 0
    root = pathlib.Path(cli.__file__).parent.parent
    env = {**os.environ, "JAXLM_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    process = subprocess.Popen(
        [sys.executable, str(root / "train.py"), *map(str, words), "--name", "parted"], cwd=tmp_path, env=env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    record = tmp_path / "runs" / "parted" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not record.exists() or record.read_text().count("\n") < 27):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == (42 if number == signal.SIGTERM else -signal.SIGKILL)
    resumed = command("train.py", *words, "--name", "parted")
    assert resumed.returncode == 0 and "resuming" in resumed.stdout, resumed.stderr

    def rows(name):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]

    assert rows("parted") == rows("whole")


@pytest.mark.slow
def test_eight_virtual_devices(command):
    """More devices than cores, queued steps and collectives: must neither hang nor abort."""
    words = [*SMALL, "--train.steps", 20, "--parallel.fsdp", 4, "--parallel.tensor", 2, "--data.batch-size", 8]
    done = command("train.py", *words, devices=8)
    assert done.returncode == 0, done.stderr
    assert "devices: 8" in done.stdout and "fsdp 4" in done.stdout
