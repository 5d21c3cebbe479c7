"""The machine that Python runs on: which accelerators it shows, and what malloc keeps where the CPU is the device."""

import ctypes
import os
import pathlib
import platform
import sys

EXIT_RESUMABLE = 42
"""Exit code of a process whose work the same command goes on with."""
# Device files of NVIDIA (WSL: dxg) and AMD GPUs and of TPUs (accel up to v4, vfio from v5 on).
_DEVICES = ("nvidia[0-9]*", "nvidiactl", "dxg", "kfd", "accel[0-9]*", "vfio/[0-9]*")
# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def prepare() -> None:
    """Settle what must be settled before JAX, NumPy or transformers is imported: the platform, then malloc."""
    choose_platform()
    # transformers would tell everyone who has no PyTorch that it was not found.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    keep_freed_memory()


def choose_platform() -> None:
    """Name the CPU as JAX's platform where no accelerator is to be seen and nobody named one.

    JAX would find the CPU by itself, but where `libtpu` is installed (the `plan` extra) every process
    would first complain, at length, that there is no TPU.
    """
    if "JAX_PLATFORMS" not in os.environ and sys.platform == "linux" and not accelerators():
        os.environ["JAX_PLATFORMS"] = "cpu"


def accelerators() -> list[pathlib.Path]:
    """The device files of accelerators."""
    return [file for pattern in _DEVICES for file in pathlib.Path("/dev").glob(pattern)]


def keep_freed_memory() -> bool:
    """Have malloc keep freed memory; True where that took effect. Only where the CPU is JAX's named platform.

    XLA:CPU allocates all temporaries of a step as one block, which glibc maps afresh at each call: the
    kernel then zeroes every page again (docs/benchmarks.md says what that costs). So blocks come from the
    heap (no mmap), which is never trimmed: -1 is the one value that says so, any other is an int and so
    below the 2 GiB that a step of a large model leaves free. One arena for all threads is what lets the
    next call find the block; a thread that already has an arena of its own keeps it, hence before any
    library starts threads. In the first steps a block may still be taken afresh, until those freed
    before it have grown together to a large enough one.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("JAX_PLATFORMS") != "cpu":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 256 << 20))
    return all(mallopt(name, value) for name, value in settings)
