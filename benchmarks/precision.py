"""Train configs/tiny.yaml in several precisions on the same data, and compare the held-out losses.

Prints a line for each: float32, bfloat16, products in int8 and fp8, parameters in bfloat16. Draws the curves of
the training losses into a PNG.

    python benchmarks/precision.py --steps 300
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAYS = {
    "float32": (),
    "bfloat16": ("--model.dtype", "bfloat16"),
    "int8": ("--model.quantize", "int8"),
    "fp8": ("--model.quantize", "fp8"),
    "bfloat16-parameters": ("--model.dtype", "bfloat16", "--model.param-dtype", "bfloat16"),
}


def train(folder: pathlib.Path, name: str, steps: int) -> list[dict]:
    """The recorded rows of a run."""
    words = [str(ROOT / "train.py"), "--runs", str(folder), "--name", name, "--train.steps", str(steps), *WAYS[name]]
    words += ["--train.eval-every", str(steps), "--train.log-every", "1"]
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf8").splitlines()]


def curves(rows: dict[str, list[dict]], file: pathlib.Path) -> None:
    """Training losses, and how far each way's mean of 20 steps lies from float32's."""
    from matplotlib.figure import Figure

    losses = {name: [row["loss"] for row in own if row["kind"] == "train"] for name, own in rows.items()}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, seen in losses.items():
        left.plot(seen, label=name, linewidth=1)
        windows = range(0, len(seen) - 19, 20)
        means = [statistics.fmean(seen[i : i + 20]) / statistics.fmean(losses["float32"][i : i + 20]) for i in windows]
        right.plot([i + 10 for i in windows], [100 * (ratio - 1) for ratio in means], label=name, marker=".")
    left.set(title="training loss", xlabel="step", ylabel="nats per token")
    right.set(title="difference from float32, means of 20 steps", xlabel="step", ylabel="%")
    left.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of each run")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="float32, and what to compare with it")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("precision.png"), help="where the curves are drawn")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(["float32", *args.ways]):
            rows[name] = train(pathlib.Path(folder), name, args.steps)
            loss = [row["loss"] for row in rows[name] if row["kind"] == "eval"][-1]
            first = [row["loss"] for row in rows["float32"] if row["kind"] == "eval"][-1]
            print(f"{name}: held-out loss {loss:.4f} after {args.steps} steps, {100 * (loss / first - 1):+.2f}%", flush=True)
    curves(rows, args.out)
    print(f"curves in {args.out}")


if __name__ == "__main__":
    main()
