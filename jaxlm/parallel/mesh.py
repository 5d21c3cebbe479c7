"""The device mesh: which axes there are, how large, and how to run on devices that are only emulated."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes; their product is the number of devices. -1 means: what is left."""

    data: int = -1
    """Copies of the model, each on its own rows of the batch."""
    fsdp: int = 1
    """Parameters and optimiser state split over this many devices, each on its own rows of the batch."""
    tensor: int = 1
    """Heads, MLP and vocabulary split over this many devices that share the same rows."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Sizes in the order of AXES."""
        return self.data, self.fsdp, self.tensor

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            given = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
            raise ValueError(f"mesh sizes are positive, at most one of them -1 (what is left); given: {given}")


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A `data × fsdp × tensor` mesh over all devices, or ValueError with the sizes that would fit."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes
    fixed = int(np.prod([size for size in sizes if size != -1]))
    left = len(devices) // fixed
    if (-1 in sizes and (left < 1 or left * fixed != len(devices))) or (-1 not in sizes and fixed != len(devices)):
        given = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"parallel: {given} does not fit {len(devices)} {devices[0].platform} device(s): "
            f"the sizes must multiply to {len(devices)}; --parallel.data -1 takes what the others leave"
        )
    shape = [left if size == -1 else size for size in sizes]
    # Auto: the compiler spreads shardings from the parameters and constraints that the rules name.
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)


def settle(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """On an emulated mesh wait until `tree` is computed; elsewhere return it at once.

    Several CPU devices in one process share one thread pool. Steps queued behind each other fill it
    with programs that wait for one another at a collective, and XLA aborts after 40 s ("Termination
    timeout for all reduce"). One program at a time always ends, so every dispatch on a mesh passes here.
    """
    if mesh.devices.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(tree)
    return tree


# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; the key begins JAX's device_kind.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    """What the whole mesh could compute a second in bfloat16, or None where the device is not known."""
    kind = mesh.devices.flat[0].device_kind
    found = [peak for name, peak in _PEAKS.items() if kind.startswith(name)]
    return found[0] * mesh.devices.size if found else None
