"""The platform is named where only the CPU is there, and malloc is asked to keep memory there and nowhere else."""

import os
import platform
import subprocess
import sys

import pytest

from jaxlm import host


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """What malloc is asked for, without asking it; no accelerator is to be seen and JAX_PLATFORMS is not set."""
    calls: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, name: int, value: int) -> int:
            calls.append((name, value))
            return 1

    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(host, "accelerators", list)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="device files and glibc are Linux's")
def test_a_cpu_keeps_its_memory(asked):
    """The numbers are M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h. A trim
    threshold of 2³¹ − 1 used to stand here: a heap with more than that free gave its pages back at each step."""
    host.prepare()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert [name for name, _ in asked] == [-8, -4, -1, -2] and asked[2] == (-1, -1)


def test_an_accelerator_another_platform_or_another_libc_is_left_alone(asked, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(host, "accelerators", lambda: ["/dev/accel0"])
        host.prepare()
        assert "JAX_PLATFORMS" not in os.environ
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    host.prepare()
    assert os.environ["JAX_PLATFORMS"] == "cuda"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    host.prepare()
    assert not asked


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is what is asked")
def test_a_freed_block_keeps_its_pages():
    """A 256 MiB block written, freed and asked for again: the kernel maps its 65,536 pages once, not each time."""
    code = """
import ctypes, resource
from jaxlm.host import keep_freed_memory
assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(256 << 20)
    ctypes.memset(block, 1, 256 << 20)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    first, *later = map(int, out.split())
    assert max(later) < 100, f"page faults of three turns: {first}, {later}"
