"""Several processes as one machine: how they find each other, who speaks for them, and what happens when one dies."""

import atexit
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from jaxlm.host import EXIT_RESUMABLE

BEAT, LIMIT = 1.0, 20.0
"""Seconds between two signs of life, and without any until a process counts as dead."""

# What a launcher sets for the processes that it starts together: (number of them, which one this is).
_LAUNCHERS = {
    "SLURM": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Cloud TPU": ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
}


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Which processes train together. Empty: those that SLURM, Open MPI, GKE or Cloud TPU started together, else this one."""

    coordinator: str | None = None
    """Address and port of process 0, such as 10.0.0.1:1234, where no launcher tells."""
    count: int | None = None
    """Number of processes; needed beside coordinator."""
    index: int | None = None
    """Which of them this is, from 0; needed beside coordinator."""

    def __post_init__(self) -> None:
        given = [name for name in ("coordinator", "count", "index") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"hosts.{given[0]} is given: coordinator, count and index belong together")
        if self.count is not None and self.index is not None and not 0 <= self.index < self.count:
            raise ValueError(f"hosts.index is {self.index}: of {self.count} process(es) it lies between 0 and {self.count - 1}")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"hosts.coordinator is {self.coordinator!r}: give address:port, such as 10.0.0.1:1234")


def launched() -> str | None:
    """The launcher that started several processes together, of which this is one."""
    for name, (count, index) in _LAUNCHERS.items():
        said = os.environ.get(count, "")
        several = len(said.split(",")) > 1 if name == "Cloud TPU" else said.isdigit() and int(said) > 1
        if several and index in os.environ:
            return name
    return None


def join(config: HostsConfig) -> None:
    """Meet the other processes, before anything asks for devices; alone where there are none. Raises ValueError where they
    do not come, or have different numbers of devices."""
    if jax.distributed.is_initialized() or (config.coordinator is None and launched() is None):
        return
    # A process that dies must not take the others along before they have said so (`Watch`).
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(config.coordinator, config.count, config.index, initialization_timeout=120)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the processes did not meet within 2 minutes: {' '.join(str(error).split())[:300]}; start all of them with one "
            "coordinator and count, and another index each"
        ) from error
    _outlive_coordinator()  # before anything asks for devices, which waits for the others: process 0 may be gone by then
    watch = Watch()
    watch.start()
    atexit.register(watch.stop)
    each = jax.local_device_count()
    if each * jax.process_count() != jax.device_count():
        raise ValueError(
            f"process {jax.process_index()} has {each} device(s), but {jax.process_count()} processes have {jax.device_count()}: "
            "give all the same number (XLA_FLAGS, CUDA_VISIBLE_DEVICES)"
        )


def speaks() -> bool:
    """This process prints and writes for all."""
    return jax.process_index() == 0


class Watch(threading.Thread):
    """Gives a sign of life, and ends this process with one line and a resumable exit code when another gives none.

    Signs are numbers under a key of the coordination service, so they cost nothing on the devices. Without the
    coordinator, process 0, there are none.
    """

    running: "Watch | None" = None

    def __init__(self) -> None:
        super().__init__(daemon=True, name="watch")
        self.done, self.over = False, threading.Event()
        from jax._src import distributed  # the one way to its key-value store; multihost_utils has none without a barrier

        self.client: Any = distributed.global_state.client
        Watch.running = self

    def run(self) -> None:
        me, beats = jax.process_index(), 0
        seen: dict[int, tuple[Any, float]] = {}
        while True:
            beats, now, mine = beats + 1, time.monotonic(), "done" if self.done else str(beats)
            try:
                self.client.key_value_set(f"jaxlm/alive/{me}", mine, allow_overwrite=True)
                signs: dict[int, Any] = {
                    int(key.rpartition("/")[2]): value for key, value in self.client.key_value_dir_get("jaxlm/alive/")
                }
                signs[0] = beats if me else signs.get(0)
            except Exception:  # what a lost connection raises is not documented
                signs = {}
            for other in range(jax.process_count()):
                sign = signs.get(other)
                if other not in seen or (sign is not None and sign != seen[other][0]):
                    seen[other] = sign, now
                elif other != me and sign != "done" and now - seen[other][1] > LIMIT:
                    died(other)
            # Process 0 coordinates until all others are done, too.
            if mine == "done" and (me or [*signs.values()] == ["done"] * jax.process_count()):
                return
            if self.over.wait(BEAT):
                return

    def end(self) -> None:
        """Say that this process is done, and no longer to be waited for."""
        self.done = True
        self.join()
        if speaks():
            time.sleep(1)  # those that said so last are on their way out

    def stop(self) -> None:
        """Give no more signs, and take none. Python must not end while this thread waits for an answer, nor while an abort
        would call Python: either ends the process with a wrong exit code, after any number of lines."""
        if not self.over.is_set():
            self.over.set()
            self.join()
            jax.distributed.shutdown()
            ctypes.CDLL(None).signal(signal.SIGABRT, None)


def leave() -> None:
    """This process is done: the others, of which process 0 writes the page of the run, no longer wait for its signs."""
    if Watch.running is not None and not Watch.running.over.is_set():
        Watch.running.end()
        Watch.running.stop()


def died(process: int) -> NoReturn:
    """Tell who died and end: at once, for what is left to be closed waits for the dead."""
    from jax._src import distributed

    role, me = " (the coordinator)" if process == 0 else "", distributed.global_state.process_id
    print(  # not by jax.process_index(), which would first ask for devices where nobody has yet
        f"process {process}{role} is gone: process {me} ends too; the same commands resume from the last checkpoint",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(EXIT_RESUMABLE)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    """JAX aborts a process as soon as its connection to the coordinator is lost, whatever it is told."""
    try:
        socket.create_connection(_coordinator[0], timeout=5).close()
    except OSError:
        died(0)
    signal.signal(signal.SIGABRT, signal.SIG_DFL)  # another cause: process 0 is there
    os.kill(os.getpid(), signal.SIGABRT)


_coordinator: list[tuple[str, int]] = []


def _outlive_coordinator() -> None:
    """Have the death of process 0 end this one as the death of any other does. Python's own handlers run in its main
    thread, which never comes to it when another thread aborts; so the C library is given this one."""
    from jax._src import distributed

    if distributed.global_state.process_id == 0:
        return
    address, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
    _coordinator.append((address.strip("[]"), int(port)))
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)


def failed() -> None:
    """After an error of which another process's death may be the cause: wait until that can be known. Returns if none died."""
    if Watch.running is not None and jax.process_count() > 1:
        time.sleep(LIMIT + 3 * BEAT)
