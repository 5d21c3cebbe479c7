"""Import time and peak memory of a Hugging Face folder: jaxlm beside torch's `from_pretrained`.

A checkpoint of random weights is written once (llama-like, about the size asked for), then each side loads it
in a process of its own, in turns, so that neither's memory counts for the other and a drift of the machine hits
both. torch then sums every parameter: it maps the files and would otherwise have read nothing, where
jaxlm has copied them. Peak memory is what the process grew by from just before the load to its high-water mark
(VmHWM − VmRSS).

    python benchmarks/load.py --size 1.0 --rounds 5
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

LOADERS = {
    "jaxlm": """
import jax
from transformers import CONFIG_MAPPING
from jaxlm.hub import load_folder
from jaxlm.parallel import ParallelConfig, make_mesh
mesh = make_mesh(ParallelConfig(data=1, fsdp=-1))
def load():
    return jax.block_until_ready(load_folder(folder, mesh).params)
""",
    "torch": """
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
def load():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, [float(parameter.sum()) for parameter in model.parameters()]
""",
}
CHILD = """
import json, sys, time
folder = sys.argv[1]
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
{loader}
before, began = status("VmRSS"), time.perf_counter()
model = load()
print(json.dumps({{"seconds": time.perf_counter() - began, "bytes": status("VmHWM") - before}}))
"""


def write(folder: pathlib.Path, size: float) -> int:
    """A llama of about `size` GB in float32, in files of 500 MB; returns its bytes."""
    import jax

    from jaxlm.config import build
    from jaxlm.hub import save_folder
    from jaxlm.model import Model, TransformerConfig

    layers = max(1, round(size * 1e9 / 4 / (12.3 * 1024**2)))
    model = Model(build(TransformerConfig, {"preset": "llama-300m", "layers": layers, "vocab_size": 8192}))
    save_folder(folder, model, jax.jit(model.init)(jax.random.key(0)), max_shard_bytes=500_000_000)
    return 4 * model.parameters()


def measure(side: str, folder: pathlib.Path, devices: int) -> dict[str, float]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    code = CHILD.format(loader=LOADERS[side])
    out = subprocess.run([sys.executable, "-c", code, str(folder)], env=env, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.0, help="GB of the checkpoint, float32")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each side")
    parser.add_argument("--devices", type=int, default=8, help="virtual CPU devices that jaxlm spreads it over")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "model"
        size = write(folder, args.size)
        print(f"{size / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} files; medians of {args.rounds} rounds in turns")
        found: dict[str, list[dict[str, float]]] = {side: [] for side in LOADERS}
        for side in LOADERS:
            measure(side, folder, args.devices)  # the files are in the page cache from here on
        for _ in range(args.rounds):
            for side in LOADERS:
                found[side].append(measure(side, folder, args.devices))
        for side, rows in found.items():
            seconds = statistics.median(row["seconds"] for row in rows)
            peak = statistics.median(row["bytes"] for row in rows) / size
            print(f"{side:<6} {seconds:6.2f} s   {size / seconds / 1e9:5.2f} GB/s   peak {peak:.2f} × the model's bytes")
        ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(found["jaxlm"], found["torch"], strict=True)]
        print(f"time, jaxlm/torch: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"({time.perf_counter() - began:.0f} s in all)")
