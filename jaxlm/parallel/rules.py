"""Logical axis → mesh axes: one table for stored arrays, one for computed ones, and how to apply them.

Logical axes are the letters of the shape alphabet (`jaxlm/model/transformer.py` has the legend); a
model names letters only, so what is split over which devices is decided here alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]

# Parameters and optimiser state. A letter that is not named is held whole by every device.
STORED: Rules = {
    "layers": ("stage",), "D": ("fsdp",), "W": ("fsdp",), "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",),
    "E": ("expert",),
}  # fmt: skip

# Activations. fsdp and expert split the batch as well: they are data
# parallelism that stores its parameters, or its experts, in parts.
COMPUTED: Rules = {
    "Z": ("stage",), "B": ("data", "fsdp", "expert"), "L": ("context",), "E": ("expert",),
    "N": ("tensor",), "K": ("tensor",), "F": ("tensor",), "V": ("tensor",),
}  # fmt: skip

# Activations between the maps of a layer, where norms, dropout and sums take each place by itself: tensor, which splits
# none of their other axes, splits the length (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
# Transformer Models", §4.2.2: sequence parallelism).
RESIDUAL: Rules = {**COMPUTED, "L": ("context", "tensor")}


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any, rules: Rules) -> PartitionSpec:
    """The partition of an array with these logical axes.

    A dimension is split over the first of its mesh axes, as many as divide it: one key/value head is held whole by two
    devices, and so is a dimension whose mesh axes split one before it (both sides of a square matrix).
    """
    assert len(axes) == len(shape), f"logical axes {axes} do not match the shape {shape}"
    sizes = dict(mesh.shape)
    parts: list[tuple[str, ...] | None] = []
    for letter, length in zip(axes, shape, strict=True):
        over = rules.get(letter, ()) if letter else ()
        free = not any(part and set(part) & set(over) for part in parts)
        while over and length % math.prod(sizes[axis] for axis in over):
            over = over[:-1]
        parts.append(over if free and math.prod(sizes[axis] for axis in over) > 1 else None)
    return PartitionSpec(*parts)


class Split(NamedTuple):
    """The mesh axes over which a dimension is split, and the number of devices that they make."""

    axes: tuple[str, ...]
    ways: int


def split_over(letter: str, size: int, rules: Rules = COMPUTED) -> Split:
    """How the mesh that is set splits a dimension of this logical axis and size."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Split((), 1)
    axes = tuple(axis for axis in _axes(spec((letter,), (size,), mesh, rules)[0]) if mesh.shape[axis] > 1)
    return Split(axes, math.prod(mesh.shape[axis] for axis in axes))


class DeviceSum(NamedTuple):
    """The sum over devices of an array that each of them computes of its own tokens, to be split as a stored array is.

    It is scattered at once where the devices that are summed over hold parts of the stored array (fsdp). Left to the compiler
    it is often summed whole and cut afterwards, which sends twice as much.
    """

    over: tuple[str, ...]
    """Mesh axes that are summed over."""
    inner: tuple[tuple[str, ...], ...]
    """Mesh axes that split each dimension of what a device computes."""
    scattered: dict[str, int]
    """The dimension over which each of some axes scatters the sum."""

    @classmethod
    def of(cls, axes: str, shape: Sequence[int], *splits: Split) -> "DeviceSum":
        """For an array of these logical axes, summed over the devices of `splits`."""
        mesh = jax.sharding.get_abstract_mesh()
        over = tuple(axis for split in splits for axis in split.axes)
        if mesh.empty:
            return cls(over, ((),) * len(shape), {})
        inner = tuple(_axes(part) for part in spec(axes, shape, mesh, COMPUTED))
        stored = [_axes(part) for part in spec(axes, shape, mesh, STORED)]
        return cls(over, inner, {axis: i for i, part in enumerate(stored) for axis in part if axis in over and not inner[i]})

    def __call__(self, x: jax.Array) -> jax.Array:
        """One device's part of the sum, under `shard_map`."""
        for axis, dimension in self.scattered.items():
            # Along the dimension that is the first in memory: along the last one a TPU's compiler sums the array whole and cuts it.
            order = (dimension, *(i for i in range(x.ndim) if i != dimension))
            x = with_layout_constraint(x, Layout(order))
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
        rest = tuple(axis for axis in self.over if axis not in self.scattered)
        return jax.lax.psum(x, rest) if rest else x

    @property
    def out_specs(self) -> PartitionSpec:
        scattered = (tuple(axis for axis, at in self.scattered.items() if at == i) for i in range(len(self.inner)))
        return PartitionSpec(*((*there, *new) or None for there, new in zip(self.inner, scattered, strict=True)))


def sum_over_devices(x_IJ: jax.Array, axes: str, rows: Split, length: Split) -> jax.Array:
    """Sum an array over its leading two dimensions, of which every device of `rows` and `length` holds one entry; the other
    dimensions have these logical axes."""
    total = DeviceSum.of(axes, x_IJ.shape[2:], rows, length)
    if not total.over:
        return jnp.sum(x_IJ, axis=(0, 1))
    given = PartitionSpec(rows.axes or None, length.axes or None, *(part or None for part in total.inner))
    return jax.shard_map(lambda x: total(x[0, 0]), in_specs=given, out_specs=total.out_specs, check_vma=False)(x_IJ)


def _axes(part: Any) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def constrain(x: jax.Array, axes: str, rules: Rules = COMPUTED, free: bool = False) -> jax.Array:
    """Say inside jit how an activation lies, e.g. `constrain(x_BLD, "BLD")`; no effect without a mesh. With `free` the
    compiler may split as it likes the dimensions that no rule names."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    parts = spec(axes, x.shape, mesh, rules)
    if free:
        parts = PartitionSpec(*(PartitionSpec.UNCONSTRAINED if part is None else part for part in parts))
    return jax.lax.with_sharding_constraint(x, parts)


@jax.custom_vjp
def gathered(x_BLD: jax.Array) -> jax.Array:
    """Parts of the residual stream brought together over tensor, for maps whose results are split over it. The gradient
    goes back in parts at once: what the maps give is added up and scattered, not added up whole."""
    return constrain(constrain(x_BLD, "BLD", RESIDUAL), "BLD")


def _gathered_forward(x_BLD: jax.Array) -> tuple[jax.Array, None]:
    return gathered(x_BLD), None


def _gathered_backward(_: None, grad_BLD: jax.Array) -> tuple[jax.Array]:
    return (constrain(grad_BLD, "BLD", RESIDUAL),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def platform() -> str:
    """cpu, gpu or tpu: of the mesh that is set, which when compiling ahead of time is not this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        found = jax.default_backend()
    else:  # JAX 0.10.0 knows the kind of an abstract device only: "cpu", "TPU v5 lite", "NVIDIA H100"
        kind = device.device_kind
        found = getattr(device, "platform", "tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu" else "gpu")
    return "gpu" if found in ("cuda", "rocm") else found


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data and fsdp axes; of few numbers, so that each device holds the whole length."""
    return NamedSharding(mesh, PartitionSpec(COMPUTED["B"]))


def batch_ways(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in COMPUTED["B"])


def share(mesh: Mesh) -> tuple[int, int]:
    """(which, of how many) equal runs of a batch's rows this process holds: of as many as there are processes, or of fewer
    where processes share rows (a mesh whose other axes reach from one to the next)."""
    ways = batch_ways(mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((ways,))
    mine = sorted({(index[0].start or 0) for index in held.values() if index is not None})
    if mine != list(range(mine[0], mine[0] + len(mine))) or ways % len(mine) or mine[0] % len(mine):
        raise ValueError(
            f"process {jax.process_index()} would hold parts {mine} of {ways} of a batch, which are no run of them: let the axes "
            "that split the batch (data, fsdp, expert) multiply to a multiple of the number of processes, or to fewer"
        )
    return mine[0] // len(mine), ways // len(mine)


def length_ways() -> int:
    """Over how many devices the mesh that is set splits the length of an activation."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in COMPUTED["L"])


def place_batch(batch: Any, mesh: Mesh, whole: bool = False) -> Any:
    """This process's rows of a batch (a tree of host arrays) as global device arrays; with `whole` every process gives all
    rows."""
    sharding = batch_sharding(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        if whole:
            return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(place, batch)


def fitting(array: Any, like: NamedSharding) -> NamedSharding:
    """The sharding of an array that belongs to a parameter: as that lies, in the dimensions that can be split so; whole, if
    it has others (the rows and columns of a factored moment)."""
    parts = (*like.spec, *(None,) * (len(array.shape) - len(like.spec)))
    if len(parts) != len(array.shape):
        return NamedSharding(like.mesh, PartitionSpec())

    def ways(over: Any) -> int:
        return math.prod(like.mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over or ()))

    fits = (over if length % ways(over) == 0 else None for over, length in zip(parts, array.shape, strict=True))
    return NamedSharding(like.mesh, PartitionSpec(*fits))


def spread(like: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array of this shape that is split as `like` says and over data too, along one dimension that both
    divide: one between the first and the last, else the first (layers are taken one by one), else the last (whose blocks share
    scales in an 8-bit state)."""
    sizes = like.mesh.shape
    padded = (*like.spec, *(None,) * (len(shape) - len(like.spec)))
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in padded]
    for i in sorted(range(len(shape)), key=lambda i: (i == len(shape) - 1, i == 0)):
        if shape[i] % math.prod(sizes[axis] for axis in (*parts[i], "data")) == 0:
            parts[i] = (*parts[i], "data")
            break
    return NamedSharding(like.mesh, PartitionSpec(*(part or None for part in parts)))


def stored_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Shardings of a parameter tree from its trees of logical axes (PartitionSpecs of letters) and shapes."""

    def place(shape: jax.ShapeDtypeStruct, letters: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, spec(tuple(letters), shape.shape, mesh, STORED))

    return jax.tree.map(place, shapes, axes)
