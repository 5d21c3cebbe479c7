"""The device mesh: which axes there are, how large, and how to run on devices that are only emulated."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from jaxlm.devices import AXES, MeshOptions, ParallelConfig


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


def mesh_of(options: MeshOptions) -> jax.sharding.Mesh:
    """The mesh for applying a model: of as many devices as the sizes multiply to, of all where one of them is -1. ValueError where
    there are too few."""
    devices, count = jax.devices(), math.prod(options.sizes)
    if count > len(devices):
        given = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, options.sizes, strict=True) if size != 1)
        raise ValueError(f"parallel: {given} needs {count} devices: there are {len(devices)} of platform {devices[0].platform}")
    return make_mesh(options, devices if count < 0 else devices[:count])


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
