"""Memory that is kept between steps: the page faults that it is there to avoid are gone."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from jaxlm.parallel import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # two temporaries of 64 MB, far above what malloc keeps by itself
    return jnp.sort(jnp.outer(x, x), axis=0).sum()

x = jnp.ones(4096, jnp.float32)
for _ in range(2):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_repeated_steps_no_longer_fault_their_pages_in():
    kept, with_it = faults("keep")
    _, without = faults("leave")
    assert kept == "True"
    assert without > 10_000, "otherwise there is nothing to avoid, and this module may go"
    assert with_it < without / 10
