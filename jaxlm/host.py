"""The machine that Python runs on: its memory, where the CPU is the device, is kept between steps."""

import ctypes
import importlib.util
import os
import platform

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def keep_freed_memory() -> bool:
    """Have malloc keep freed memory; True where that took effect. Call it before importing JAX or NumPy.

    XLA:CPU allocates all temporaries of a step as one block, which glibc maps afresh at each call: the
    kernel then zeroes every page again (docs/benchmarks.md says what that costs; in some processes it
    still happens). One arena for all threads is
    what lets the next call find the block; a thread that already has an arena of its own keeps it, and
    those cannot hold large blocks, hence before any library starts threads. Left alone where an
    accelerator may be in use and on other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(importlib.util.find_spec(name) for name in _PLUGINS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 256 << 20))
    return all(mallopt(name, value) for name, value in settings)
