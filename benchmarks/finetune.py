"""Fine-tune one encoder on one task with jaxlm and with torch, seed by seed in turns, and compare scores and speed.

Both sides take the same rows in the same order, padded alike, through the same recipe (`benchmarks/torch_finetune.py`
says which); dropout and the new head draw from each framework's own generator.

    python benchmarks/finetune.py sst2 --model FOLDER --data FOLDER --seeds 3 --epochs 3 --learning-rate 2e-5
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

# Task → config, rows to score, the split of that name in the torch script, score there and here, length.
TASKS = {
    "sst2": ("finetune-sst2", "sentiment-sst2/dev.tsv", "dev", "accuracy", "accuracy", 64),
    "agnews": ("finetune-agnews", "topic-agnews/test_1000.csv", "test_1000", "accuracy", "accuracy", 128),
    "banking77": ("finetune-banking77", "intent-banking77/test.csv", "test", "accuracy", "accuracy", 64),
    "cola": ("finetune-cola", "glue-cola/in_domain_dev.tsv", "dev", "mcc", "mcc", 64),
    "mrpc": ("finetune-mrpc", "glue-mrpc/msr_paraphrase_test.txt", "test", "f1", "f1", 128),
    "thucnews": ("finetune-thucnews", "topic-zh-thucnews-titles/test.txt", "test", "accuracy", "accuracy", 64),
    "wnut17": ("finetune-wnut17", "ref-wnut17-ner/emerging.dev.conll", "dev", "f1", "f1", 128),
}


def jaxlm(task: str, seed: int, options: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Train in a process of its own; scores after each epoch, seconds of training without evaluation."""
    config, rows, _, _, score, length = TASKS[task]
    flags = {
        "name": f"{task}-{seed}", "runs": str(folder), "seed": seed, "model.init-from": options.model, "data.length": length,
        "data.validation": str(options.data / rows), "data.epochs": options.epochs, "data.batch-size": options.batch_size,
        "optim.learning-rate": options.learning_rate, "train.log-every": 1, "train.sample-tokens": 0, "train.keep": 1,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "train.py", f"configs/{config}.yaml", *words], cwd=HERE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    recorded = [json.loads(line) for line in (folder / f"{task}-{seed}" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step_seconds"] for row in recorded if row["kind"] == "train"]
    scores = [row[score] for row in recorded if row["kind"] == "eval"]
    return {"scores": scores, "steps": len(steps), "seconds": sum(steps)}


def torch(task: str, seed: int, options: argparse.Namespace, folder: pathlib.Path) -> dict:
    """The same by `torch_finetune.py`."""
    *_, split, score, _, length = TASKS[task]
    out = folder / "torch.jsonl"
    flags = {
        "model": options.model, "data": options.data, "seed": seed, "epochs": options.epochs, "batch-size": options.batch_size,
        "learning-rate": options.learning_rate, "length": length, "out": out,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, str(HERE / "torch_finetune.py"), task, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    row = json.loads(out.read_text().splitlines()[-1])
    return {"scores": [epoch[split][score] for epoch in row["epochs"]], "steps": row["steps"], "seconds": row["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", required=True, help="folder of a BERT model and its tokenizer")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder that holds the folders of the data sets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--out", type=pathlib.Path, help="folder that keeps the runs; a temporary one if none is given")
    options = parser.parse_args()
    from jaxlm.metrics import mean_interval

    folder = options.out or pathlib.Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict]] = {"jaxlm": [], "torch": []}
    for seed in range(options.seeds):
        for name, side in (("jaxlm", jaxlm), ("torch", torch)):
            one = side(options.task, seed, options, folder)
            found[name].append(one)
            scores = ", ".join(f"{score:.4f}" for score in one["scores"])
            print(f"seed {seed}, {name}: {scores}; {one['steps'] / one['seconds']:.3f} steps/s", flush=True)
    for name, runs in found.items():
        last = mean_interval([run["scores"][-1] for run in runs])
        speeds = sorted(run["steps"] / run["seconds"] for run in runs)
        told = f"{last.value:.4f} ({last.low:.4f} to {last.high:.4f})"
        print(f"{name}: {TASKS[options.task][4]} {told}, {speeds[len(speeds) // 2]:.3f} steps/s")
    ratios = sorted(one["seconds"] / other["seconds"] for one, other in zip(found["jaxlm"], found["torch"], strict=True))
    print(f"time, jaxlm/torch: {ratios[len(ratios) // 2]:.3f} (each seed: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
