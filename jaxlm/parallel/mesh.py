"""The device mesh: which axes there are, how large, and how to run on devices that are only emulated."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.experimental import mesh_utils

# From the slowest links to the fastest: neighbours on the last axis are neighbours in the machine.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
Across = Literal["stage", "data", "fsdp"]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes; their product is the number of devices. -1 means: what is left."""

    data: int = -1
    """Copies of the model, each on its own rows of the batch."""
    fsdp: int = 1
    """Parameters and optimiser state split over this many devices, each on its own rows of the batch."""
    stage: int = 1
    """The layers split over this many devices, through which parts of the batch go one behind the other."""
    expert: int = 1
    """Experts split over this many devices, each on its own rows of the batch, which send each other tokens."""
    context: int = 1
    """The length of the rows split over this many devices."""
    tensor: int = 1
    """Heads, MLP and vocabulary split over this many devices that share the same rows."""
    across: Across = "data"
    """The axis that spans several slices of a pod, or several hosts' islands of fast links, whose links are slow."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of AXES."""
        return self.stage, self.data, self.fsdp, self.expert, self.context, self.tensor

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            given = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
            raise ValueError(f"mesh sizes are positive, at most one of them -1 (what is left); given: {given}")


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of AXES over all devices, or ValueError with sizes that would fit.

    Devices of several slices lie so that only the axis `across` leads from one slice to another.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = config.sizes, len(devices)
    fixed = math.prod(size for size in sizes if size != -1)
    left = count // fixed
    if left * fixed != count or (-1 not in sizes and left != 1):
        given = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True) if size != 1)
        raise ValueError(
            f"parallel: {given or 'data 1'} does not fit {count} {devices[0].platform} device(s): the sizes must multiply to "
            f"{count}, as {_fitting(config, count)} do (--parallel.data -1 takes what the others leave)"
        )
    shape = [left if size == -1 else size for size in sizes]
    # Auto: the compiler spreads shardings from the parameters and constraints that the rules name.
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # An axis may take a part of one of the pod's own.
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(laid, AXES, axis_types=auto)
    place = AXES.index(config.across)
    if shape[place] % slices:
        raise ValueError(
            f"parallel.{config.across} {shape[place]} spans {slices} slices (parallel.across): it must be a multiple of {slices}"
        )
    outer = [slices if axis == config.across else 1 for axis in AXES]
    inner = [size // ways for size, ways in zip(shape, outer, strict=True)]
    laid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(laid, AXES, axis_types=auto)


def abstract_mesh(config: ParallelConfig) -> jax.sharding.AbstractMesh:
    """The mesh of these sizes without devices; -1 counts as 1."""
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.AbstractMesh(tuple(max(size, 1) for size in config.sizes), AXES, axis_types=auto)


def _fitting(config: ParallelConfig, count: int) -> str:
    """Sizes near those asked for that multiply to `count`: each, the fastest links first, as large as still divides."""
    found, left = {}, count
    for axis, size in reversed([(axis, size) for axis, size in zip(AXES, config.sizes, strict=True) if axis != "data"]):
        asked = max(size, 1)
        found[axis] = next(size for size in range(min(asked, left), 0, -1) if left % size == 0)
        left //= found[axis]
    found["data"] = left
    return " × ".join(f"{axis} {found[axis]}" for axis in AXES if found[axis] != 1) or "data 1"


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
