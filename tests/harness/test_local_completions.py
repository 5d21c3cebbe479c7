"""lm-evaluation-harness through the server, as `local-completions`: the numbers of `jaxlm evaluate` in process."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from made_up import Writer
from test_adapter import READY, ours, theirs, write_tasks

from jaxlm.harness import Scorer

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.fixture
def server(tiny_folder):
    words = [sys.executable, "-m", "jaxlm", "serve", str(tiny_folder), "--port", "0", "--slots", "4", "--name", "tiny"]
    env = {**os.environ, "XLA_FLAGS": ""}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+:\d+", line):
                break
        else:
            pytest.fail("the server did not start")
        yield found[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_harness_through_the_server_gives_the_same_numbers(server, tiny, tiny_folder, tmp_path):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    w = Writer(7)
    choices = [
        {"query": w.rare(2), "choices": [f" {w.rare(1)}" for _ in range(4)], "gold": i % 4} for i in range(10)
    ]  # fmt: skip
    write_tasks(tmp_path, {"openbookqa": choices}, {"openbookqa": READY})
    model = LocalCompletionsAPI(
        model="tiny", base_url=f"{server}/v1/completions", tokenizer_backend="huggingface", tokenizer=str(tiny_folder),
        tokenized_requests=True, num_concurrent=3, max_length=64, batch_size=2,
    )  # fmt: skip
    given = theirs(tmp_path, ["openbookqa"], model)
    found = ours("openbookqa", tmp_path / "openbookqa.jsonl", Scorer(tiny, batch_size=8))
    for one, sample in zip(found.samples, given["samples"]["local_openbookqa"], strict=True):
        np.testing.assert_allclose(one["logprobs"], [response[0][0] for response in sample["resps"]], rtol=1e-4)
    for score, interval in found.scores.items():
        assert interval.value == pytest.approx(given["results"]["local_openbookqa"][f"{score},none"])
