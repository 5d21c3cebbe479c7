"""Time `jaxlm serve` under 1 to 64 clients against the same model and prompts in one offline batch.

Trains a decoder for one step, serves it on this machine, and lets clients send one request after the other over HTTP.
Prints for each number of clients the new tokens per second, beside those of `BatchGenerator` in batches of 32, and how long a
request took: the median and the 99th percentile.

    python benchmarks/serve.py --clients 1 4 16 64
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def train(folder, args):
    """A run's folder."""
    sizes = {"layers": args.layers, "width": args.width, "heads": args.heads, "kv-heads": args.heads, "positions": 512}
    words = [str(ROOT / "train.py"), str(ROOT / "configs/tiny.yaml"), "--runs", str(folder), "--name", "served"]
    words += [word for name, value in sizes.items() for word in (f"--model.{name}", str(value))]
    words += ["--train.steps", "1", "--train.sample-tokens", "0"]
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-1000:] + done.stderr[-1000:])
    return folder / "served"


def prompts_of(count, args):
    return np.random.default_rng(count).integers(10, 200, (count, args.prompt)).tolist()


def offline(run, args):
    """New tokens per second of one batch after the other; greedy, as the clients ask."""
    from jaxlm import host

    host.prepare()
    from jaxlm.generate import BatchGenerator, DecodeConfig
    from jaxlm.models import load_model

    trained = load_model(str(run))
    generator = BatchGenerator(trained.model, trained.mesh, trained.tokenizer.vocab_size, pad_id=0)
    prompts, seconds = prompts_of(64, args), []
    for _ in range(1 + args.rounds):
        began = time.perf_counter()
        texts = generator(trained.params, prompts, DecodeConfig(max_tokens=args.new), [trained.tokenizer.eos_id], batch_size=32)
        seconds.append(time.perf_counter() - began)
    return sum(map(len, texts)) / statistics.median(seconds[1:])


def ask(url, prompt, args):
    """Seconds that a request took, and its new tokens."""
    body = {"prompt": prompt, "max_tokens": args.new, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        told = json.load(answer)
    return time.perf_counter() - began, told["usage"]["completion_tokens"]


def online(url, clients, args):
    """New tokens per second, and the seconds of each request."""
    prompts = prompts_of(max(64, clients) if clients > 1 else 8, args)
    found, lock = [], threading.Lock()

    def client():
        while True:
            with lock:
                if not prompts:
                    return
                prompt = prompts.pop()
            took = ask(url, prompt, args)
            with lock:
                found.append(took)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    return sum(tokens for _, tokens in found) / took, [seconds for seconds, _ in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="clients at a time")
    parser.add_argument("--slots", type=int, default=32, help="texts that the server writes at a time")
    parser.add_argument("--exact", choices=["true", "false"], default="true", help="as `jaxlm serve --exact`")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="most new tokens of each text")
    parser.add_argument("--rounds", type=int, default=2, help="offline measurements")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = train(pathlib.Path(folder), args)
        alone = offline(run, args)
        print(f"offline, batches of 32: {alone:.0f} tokens/s", flush=True)
        words = [sys.executable, "-m", "jaxlm", "serve", str(run), "--port", "0", "--slots", str(args.slots), "--exact", args.exact]
        server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            url = None
            while url is None and (line := server.stdout.readline()):
                url = re.search(r"http://\S+:\d+", line)
            if url is None:
                raise SystemExit("the server did not start")
            threading.Thread(target=server.stdout.read, daemon=True).start()
            online(url[0], 1, args)  # what is still to be compiled
            for clients in args.clients:
                speed, seconds = online(url[0], clients, args)
                median, late = np.percentile(seconds, [50, 99])
                print(
                    f"{clients} clients: {speed:.0f} tokens/s, {speed / alone:.2f} of offline; a request of {args.new} tokens "
                    f"took {median:.2f} s, the slowest of a hundred {late:.2f} s",
                    flush=True,
                )
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
