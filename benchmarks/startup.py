"""Time what a person waits for before anything happens: `jaxlm --help`, whole processes, beside a bare Python.

python benchmarks/startup.py --rounds 11
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {"python -c pass": ["-c", "pass"], "jaxlm --help": ["-m", "jaxlm", "--help"]}


def seconds(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="times each command is run, in turns")
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            times[name].append(seconds(words))
    for name, taken in times.items():
        print(f"{name}: median {statistics.median(taken):.3f} s, {min(taken):.3f} to {max(taken):.3f} s over {rounds} rounds")


if __name__ == "__main__":
    main()
