"""The benchmarks run, and compare the same computation; what they measure is not tested."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*words: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "PYTEST"))}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parity
def test_train_step_checks_the_losses_and_prints_a_ratio():
    out = run("benchmarks/train_step.py", "--shapes", "4x128@12x64", "--rounds", "1", "--no-compile")
    assert "jaxlm/eager between" in out and "losses of 3 steps, jaxlm against eager" in out


@pytest.mark.slow
def test_loop_prints_what_it_adds():
    # Of few steps on a busy machine a difference of two times may be negative.
    out = run("benchmarks/loop.py", "--devices", "1", "4", "--steps", "20", "--rounds", "1")
    assert re.findall(r"(\d) device\(s\), \d+ rows: -?[\d.]+ ms a step, bare -?[\d.]+, the loop adds", out) == ["1", "4"], out


@pytest.mark.slow
def test_startup_prints_both_times():
    out = run("benchmarks/startup.py", "--rounds", "1")
    assert "jaxlm --help: median" in out and "python -c pass: median" in out


@pytest.mark.slow
@pytest.mark.parity
def test_load_prints_time_and_memory_of_both():
    out = run("benchmarks/load.py", "--size", "0.05", "--rounds", "1", "--devices", "2")
    assert out.count("× the model's bytes") == 2 and "time, jaxlm/torch:" in out


@pytest.mark.slow
def test_precision_prints_losses_and_draws_curves(tmp_path):
    out = run("benchmarks/precision.py", "--steps", "5", "--ways", "int8", "--out", str(tmp_path / "curves.png"))
    assert "float32: held-out loss" in out and "int8: held-out loss" in out and (tmp_path / "curves.png").is_file()


@pytest.mark.slow
@pytest.mark.parity
def test_decode_compares_the_texts_and_prints_a_ratio():
    sizes = ("--layers", "2", "--width", "64", "--heads", "2", "--vocab", "500", "--prompt", "8", "--new", "16")
    out = run("benchmarks/decode.py", *sizes, "--batches", "1", "3", "--rounds", "1")
    assert re.findall(r"batch (\d): jaxlm [\d.]+ tokens/s, torch [\d.]+ tokens/s, jaxlm / torch [\d.]+", out) == ["1", "3"], out


@pytest.mark.slow
def test_serve_prints_speed_and_latency():
    sizes = ("--layers", "1", "--width", "32", "--heads", "2", "--prompt", "8", "--new", "8", "--slots", "4")
    out = run("benchmarks/serve.py", *sizes, "--clients", "1", "3", "--rounds", "1")
    assert "offline, batches of 32:" in out and re.findall(r"(\d) clients: \d+ tokens/s", out) == ["1", "3"], out
