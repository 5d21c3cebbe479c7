"""Memory kept between steps: asked of glibc's malloc on a CPU, and of nothing else."""

import importlib.util
import platform

import pytest

from jaxlm import host


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, int]]:
    """What malloc is asked for, without asking it."""
    calls: list[tuple[int, int]] = []

    class Libc:
        def mallopt(self, name: int, value: int) -> int:
            calls.append((name, value))
            return 1

    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return calls


def test_a_cpu_keeps_its_memory(asked):
    """The numbers are M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of glibc's malloc.h."""
    assert host.keep_freed_memory()
    assert [name for name, _ in asked] == [-8, -4, -1, -2]


def test_an_accelerator_or_another_libc_is_left_alone(asked, monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not host.keep_freed_memory()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    assert not host.keep_freed_memory()
    assert not asked
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # the accelerator is there and not in use
    assert host.keep_freed_memory()
